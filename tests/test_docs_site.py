"""The documentation site builds without warnings, and its pages agree with the code."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dfn_hf
from dfn_hf import (
    DFNConfig,
    DFNForCausalLM,
    FlowNetworkConfig,
    FlowNetworkForCausalLM,
    LiquidConfig,
    LiquidForSeq2SeqLM,
)
from dfn_hf.benchmarks.speed.single_head import torch_operations_only

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
CONFIGS = {"dfn": DFNConfig, "flownetwork": FlowNetworkConfig, "liquid": LiquidConfig}
DEVELOPER_PAGES = [*sorted((DOCS / "develop").glob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "modeling" / "README.md"]
KINDS = {"GrowingState": "growing", "RollingState": "rolling", "IndexState": "index", "ReplaceState": "replaced"}
SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def rows_of(family: str, heading: str) -> list[list[str]]:
    """Return the cells of the table rows below a heading of a family's page, without their headings."""
    text = (DOCS / "models" / f"{family}.md").read_text(encoding="utf-8")
    section = re.split(r"^## ", text.split(f"\n## {heading}", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return [row for row in rows if row[0].startswith("`")]


@pytest.mark.parametrize("family", CONFIGS)
def test_every_configuration_field_is_in_the_table_of_its_page(family):
    listed = [re.findall(r"`(\w+)`", row[0]) for row in rows_of(family, "Configuration")]
    fields = vars(CONFIGS[family])["__annotations__"]
    # A field may be both a size and a switch of the paper.
    assert {name for names in listed for name in names} == set(fields)


@pytest.mark.parametrize("family", CONFIGS)
def test_tables_state_the_defaults(family):
    config = CONFIGS[family]
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for field, default, *_ in rows_of(family, "Configuration"):
        stated = default.strip("`").strip('"')
        actual = defaults[field.strip("`")]
        if actual is None or not re.fullmatch(r"[\w.-]+", stated) or stated in defaults or stated == "set":
            continue
        assert stated == str(actual) or float(stated) == actual, field


def dfn_states():
    ids = torch.randint(0, 32, (1, 40))
    sizes = {**SIZES, "num_neighbors": 2, "local_window": 4, "max_entity_length": 8}
    switches = {"flow_norm": "running", "memory_slots": 2, "memory_chunk": 4}
    yield DFNForCausalLM(DFNConfig(**sizes, **switches, readout_window=3))(ids).past_key_values
    yield DFNForCausalLM(DFNConfig(**sizes, **switches, entity_sampling="adaptive"))(ids).past_key_values
    with torch_operations_only():  # the search keeps other tensors than in C
        yield DFNForCausalLM(DFNConfig(**sizes))(ids).past_key_values


def flownetwork_states():
    ids = torch.randint(0, 32, (1, 40))
    for block_type in ("enhanced_flow", "flow_transformer"):
        config = FlowNetworkConfig(
            **SIZES, num_memory_heads=2, flow_window=8, min_flow_window=2, memory_chunk=4, block_type=block_type
        )
        yield FlowNetworkForCausalLM(config)(ids).past_key_values


def liquid_states():
    model = LiquidForSeq2SeqLM(LiquidConfig(**SIZES, attention_window=8, frame_length=8))
    cache = model(input_ids=torch.randint(0, 32, (1, 20)), decoder_input_ids=torch.randint(0, 32, (1, 20)))
    yield cache.past_key_values.self_attention_cache
    yield cache.past_key_values.cross_attention_cache


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_every_cache_state_is_in_the_table_of_its_page(family):
    caches = {"dfn": dfn_states, "flownetwork": flownetwork_states, "liquid": liquid_states}[family]()
    states = [item for cache in caches for layer in cache.layers for item in layer.states.items()]
    rows = rows_of(family, "State and cache")
    listed = [(name, row) for row in rows for name in re.findall(r"`(\w+)`", row[0])]
    assert {name for name, _ in listed} == {name for name, _ in states}
    for name, state in states:
        described = [row for listed_name, row in listed if listed_name == name]
        kind, rank = KINDS[type(state).__name__], state.data.dim()
        # Some states are of another kind in another configuration, which the last column says.
        assert any(kind in row[1] or f" {kind}" in row[-1] for row in described), (name, kind)
        ranks = {row[2].split("]")[0].count(",") + 1 for row in described if kind in row[1]}
        assert not ranks or rank in ranks, (name, rank)


def test_the_reference_lists_every_export():
    pages = "".join(path.read_text(encoding="utf-8") for path in sorted((DOCS / "reference").glob("*.md")))
    listed = set(re.findall(r"^::: dfn_hf\.(\w+)$", pages, flags=re.MULTILINE))
    assert listed - {"data", "training", "evaluation"} == set(dfn_hf.__all__)


@pytest.mark.parametrize("page", DEVELOPER_PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_and_tests_that_developer_pages_name_exist(page):
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:modeling|conversion|dfn_hf|tests|docs|benchmarks)/[\w/.-]*)`", text):
        assert (ROOT / path).exists(), path
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in sources, name


def test_links_between_developer_pages_lead_somewhere():
    for page in [*DEVELOPER_PAGES, ROOT / "SECURITY.md"]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_site_builds_without_warnings_and_loads_nothing_from_the_network(tmp_path):
    pytest.importorskip("mkdocs")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        html = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"?([^\"\s>]+)", html)
        loaded += re.findall(r"<link[^>]*rel=\"?(?:stylesheet|preconnect|icon)\"?[^>]*href=\"?([^\"\s>]+)", html)
        assert not [address for address in loaded if "//" in address], page
    commands = (tmp_path / "site" / "reference" / "cli" / "index.html").read_text(encoding="utf-8")
    assert "dfn-hf train lm" in commands and "dfn-hf bench" in commands
