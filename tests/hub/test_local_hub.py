"""Tests upload to a local Hub server, and loading in a process that cannot import dfn_hf."""

import os
import subprocess
import sys
import textwrap

import pytest

from tests.support.hub_server import TOKEN, serve
from tests.support.marks import first_quickly

SIZES = (
    "vocab_size=4096, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, "
    "initializer_range=0.3"
)
FAMILIES = {
    "dfn": ("AutoModelForCausalLM", "bpe", f"dfn_hf.DFNForCausalLM(dfn_hf.DFNConfig({SIZES}))"),
    "flownetwork": (
        "AutoModelForCausalLM", "bpe", f"dfn_hf.FlowNetworkForCausalLM(dfn_hf.FlowNetworkConfig({SIZES}))",
    ),
    "liquid": (
        "AutoModelForSeq2SeqLM", "bpe-en-es", f"dfn_hf.LiquidForSeq2SeqLM(dfn_hf.LiquidConfig({SIZES}))",
    ),
}  # fmt: skip
BLOCKED = "import sys; sys.modules['dfn_hf'] = None"
LOGITS = "model.eval()(input_ids=torch.arange(5, 25)[None], labels=torch.arange(5, 25)[None]).logits.detach()"


@pytest.fixture(scope="module")
def address():
    with serve() as url:
        yield url


def run(code: str, address: str, folder, token: str | None = TOKEN) -> str:
    """Run `code` in a new Python process with the Hub at `address`, and return its output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": address, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    if token is not None:
        environment["HF_TOKEN"] = token
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=folder, env=environment, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("family", first_quickly(FAMILIES))
def test_pushed_model_loads_without_the_package(family, address, tmp_path):
    auto_class, tokenizer, make = FAMILIES[family]
    repository = f"tester/{family}"
    run(
        f"""
        import dfn_hf, torch
        from dfn_hf.data import load_tokenizer
        from huggingface_hub import HfApi
        torch.manual_seed(0)
        model = {make}
        model.push_to_hub("{repository}", max_shard_size="40KB")
        load_tokenizer("{tokenizer}").push_to_hub("{repository}")
        torch.save({LOGITS}, "first.pt")
        first = HfApi().model_info("{repository}").sha
        open("first", "w").write(first)
        HfApi().create_tag("{repository}", tag="v1")
        with torch.no_grad():
            model.lm_head.weight += 0.1
        torch.save({LOGITS}, "second.pt")
        HfApi().create_branch("{repository}", branch="next")
        model.push_to_hub("{repository}", revision="next")
        """,
        address,
        tmp_path,
    )
    output = run(
        f"""
        {BLOCKED}
        import torch
        from transformers import AutoTokenizer, {auto_class}
        for revision, saved in ((None, "first"), ("v1", "first"), (open("first").read(), "first"), ("next", "second")):
            model = {auto_class}.from_pretrained("{repository}", revision=revision, trust_remote_code=True)
            expected = torch.load(saved + ".pt", weights_only=True)
            assert torch.allclose({LOGITS}, expected, rtol=0, atol=1e-5), revision
        tokenizer = AutoTokenizer.from_pretrained("{repository}")
        print(model.generate(**tokenizer("In the beginning", return_tensors="pt"), max_new_tokens=3).shape)
        try:
            {auto_class}.from_pretrained("{repository}")
        except ValueError as error:
            print("refused", "trust_remote_code" in str(error))
        """,
        address,
        tmp_path,
        token=None,
    )
    assert "torch.Size" in output and "refused True" in output


def test_push_commands_upload_private_models_with_their_cards(address, tmp_path):
    run(
        """
        from pathlib import Path
        from typer.testing import CliRunner
        from dfn_hf.cli import app
        Path("text.txt").write_text("To be, or not to be, that is the question. " * 50)
        train = ["train", "lm", "model", "--max-steps", "2", "--batch-size", "2", "--block-size", "32"]
        train += ["--size", "tiny", "--data", "text.txt", "--push-to-hub", "tester/trained"]
        for command in (
            train,
            ["push", "model", "tester/private"],
            ["push", "model", "tester/public", "--public"],
            ["info", "tester/private"],
        ):
            result = CliRunner().invoke(app, command)
            assert result.exit_code == 0, result.output
            if "tester/trained" in command or "push" in command:
                kind = "public" if "--public" in command else "private"
                assert f"to the new {kind} repository" in result.output, result.output
                assert result.output.rstrip().endswith(f"({kind})"), result.output
                assert "does not upload" in result.output, result.output
        assert "Trained on text.txt" in result.output, result.output
        """,
        address,
        tmp_path,
    )
    output = run(
        """
        from huggingface_hub import HfApi, ModelCard, model_info
        card = ModelCard.load("tester/private")
        for name in ("tester/private", "tester/trained", "tester/public"):
            assert f'model="{name}")' in ModelCard.load(name).text
        files = set(HfApi().list_repo_files("tester/trained"))
        assert model_info("tester/trained").private and not model_info("tester/public").private
        held = {"config.json", "model.safetensors", "modeling_dfn.py", "tokenizer.json", "generation_config.json"}
        assert held <= files and not any(file.startswith(("checkpoints/", "runs/", ".dfn")) for file in files), files
        print(card.data.library_name, card.data.pipeline_tag, card.data.tags, model_info("tester/private").private)
        """,
        address,
        tmp_path,
    )
    assert output.split("\n")[0].startswith("transformers text-generation ['dfn'") and output.strip().endswith("True")
    refused = run(
        """
        from transformers import AutoConfig
        try:
            AutoConfig.from_pretrained("tester/private")
        except OSError as error:
            print("not without a token")
        """,
        address,
        tmp_path / "..",
        token=None,
    )
    assert "not without a token" in refused
