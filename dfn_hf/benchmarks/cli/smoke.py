"""`dfn-hf bench --smoke`: all benchmarks with minimal sizes, and the rows that their tables must contain."""

import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..harness.environment import without_isolation
from ..quality.ablations import VARIANTS
from ..quality.byte_chunking import MODELS as BYTE_MODELS
from ..quality.neighbor_ranking import RANKINGS
from ..quality.quantization import CHECKPOINTS
from ..quality.search_settings import CHOICES, LEAVES
from ..speed.peers import WORKLOADS as PEER_WORKLOADS
from ..speed.seq2seq_speed import WORKLOADS as SEQ2SEQ_WORKLOADS
from ..speed.single_head import WORKLOADS as SINGLE_HEAD_WORKLOADS
from ..speed.throughput import WORKLOADS
from ..speed.tree_search import SHAPES
from .output import Command, captured_output


@dataclass(frozen=True)
class SmokeTable:
    """Arguments of a benchmark command without `--results`, and the first cells of each row of its table."""

    command: str
    rows: Sequence[tuple[str, ...]]


TABLES = (
    SmokeTable(
        "recall --seeds 1 --max-steps 2 --tuning-steps 1 --long-length 128 --longest-length 160 --long-num-pairs 16",
        [("dfn", "1"), ("llama-conv", "1")],
    ),
    SmokeTable(
        "lm --seeds 2 --max-steps 2 --search-steps 1 --length 32 --batch-size 2 --hidden-size 32 "
        "--intermediate-size 64 --num-hidden-layers 1 --evaluation-windows 4",
        [("dfn",), ("llama",), ("llama-conv",)],
    ),
    SmokeTable(
        "ablations --seeds 1 --lm-steps 1 --recall-steps 1 --long-length 128 --long-num-pairs 16",
        [(variant, "1") for variant in VARIANTS],
    ),
    SmokeTable(
        "neighbor-ranking --seeds 1 --steps 1 --recall-steps 1 --recall-length 480 --length 64 --long-length 150",
        [(ranking, "1") for ranking in RANKINGS],
    ),
    SmokeTable(
        "search-settings --seeds 1 --lm-steps 1 --lm-length 256 --recall-steps 1 --recall-length 480 "
        "--retrieval-steps 1 --tuning-steps 0 --contexts 1 --context-length 4096",
        [(str(dims), str(neighbors), str(leaves)) for dims, neighbors in CHOICES for leaves in LEAVES],
    ),
    SmokeTable("isolation --model dfn --model llama", [("dfn",), ("llama",)]),
    SmokeTable(
        "scaling --length 256 --length 512 --baseline-length 256 --hidden-size 32 --num-hidden-layers 1 --repeats 1",
        [("256",), ("512",)],
    ),
    SmokeTable(
        "million-tokens --length 2048 --chunk-length 500 --hidden-size 32 --num-hidden-layers 2",
        [("one pass",), ("chunks of 500",)],
    ),
    SmokeTable(
        "retrieval --length 8192 --contexts 1 --control-contexts 1 --seeds 1 --max-steps 1 --tuning-steps 0 "
        "--chunk-length 5000",
        [("8,192", "16", "1", "5"), ("8,192", "0", "1", "5")],
    ),
    SmokeTable(
        "long-lm --max-steps 2 --search-steps 1 --length 300 --hidden-size 32 --intermediate-size 256 "
        "--num-hidden-layers 1 --evaluation-windows 2 --tokenizer byte",
        [("dfn", "nats per token"), ("llama", "bits per byte"), ("dfn", "nats per token, K = 0")],
    ),
    SmokeTable(
        "byte-chunking --seeds 1 --max-steps 2 --search-steps 1 --learning-rate 6e-3 --length 64 --batch-size 2 "
        "--evaluation-windows 4",
        [(model,) for model in BYTE_MODELS],
    ),
    SmokeTable(
        "fields --field camera --side 64 --max-steps 3",
        [("camera", method) for method in ("adaptive", "uniform", "siren", "resampling")]
        + [("camera, 1/4 of samples", method) for method in ("pre-trained", "from scratch")],
    ),
    SmokeTable("field-speed --side 16 --side 32", [("256",), ("1,024",)]),
    SmokeTable(
        "contrastive --task images --max-steps 1", [("images", model) for model in ("dfn", "class-mean", "logistic")]
    ),
    SmokeTable("memory --seeds 1 --max-steps 1", [("8", "1"), ("0", "1")]),
    SmokeTable("speed --length 64 --repeats 1", [(work, "64") for work in WORKLOADS]),
    SmokeTable(
        "peers --length 64 --training-length 64 --repeats 1 --num-hidden-layers 1",
        [(work, "64") for work in PEER_WORKLOADS],
    ),
    SmokeTable("single-head --length 64 --repeats 1", [(work, "64") for work in SINGLE_HEAD_WORKLOADS]),
    SmokeTable(
        "search --position-dim 4 --length 512 --timed-queries 300 --repeats 1",
        [(shape, "4", "512") for shape in SHAPES],
    ),
    SmokeTable("paper-lengths --length 32 --length 512 --hidden-size 32 --num-hidden-layers 1", [("32",), ("512",)]),
    SmokeTable(
        "translation --max-steps 1 --search-steps 1 --learning-rate 1e-3 --batch-size 2 --pairs 4 --no-scores",
        [("liquid",), ("t5",)],
    ),
    SmokeTable("reversal --seeds 1 --max-steps 1", [("32", "8")]),
    SmokeTable("seq2seq-speed --length 64 --repeats 1", [(work, "64") for work in SEQ2SEQ_WORKLOADS]),
    SmokeTable(
        'quantization --format bfloat16 --format "bitsandbytes NF4" --documents 1 --pairs 8',
        [(name,) for name in CHECKPOINTS],
    ),
)


def run_smoke(
    group: Command, tables: Sequence[SmokeTable] = TABLES, report: Callable[[str], None] = lambda line: None
) -> list[str]:
    """Run benchmarks with minimal sizes and check the rows of their tables; times and peak memory are not meaningful.

    Args:
        group: the command `dfn-hf bench`.
        tables: the benchmarks; each starts with an empty CSV file.
        report: receives one line per table, with its time in seconds.

    Returns:
        One line per missing row.
    """
    lines = []
    for table in tables:
        started = time.perf_counter()
        output = output_of(group, table.command)
        missing = [" | ".join(row) for row in table.rows if row not in leading_cells(output, len(row))]
        lines += [f"bench {table.command}: no row {row}" for row in missing]
        count, seconds = len(table.rows) - len(missing), time.perf_counter() - started
        report(f"{table.command.split()[0]}: {count} of {len(table.rows)} rows, {seconds:.0f} s")
    return lines


def output_of(group: Command, command: str) -> str:
    """Return the output of a benchmark command that starts with an empty CSV file."""
    with tempfile.TemporaryDirectory() as folder, without_isolation():
        return captured_output(group, [*shlex.split(command), "--results", str(Path(folder) / "results.csv")])


def leading_cells(output: str, count: int) -> set[tuple[str, ...]]:
    """Return the first `count` cells of each row of the tables in an output."""
    lines = [line.split("|")[1:-1] for line in output.splitlines() if line.startswith("|")]
    return {tuple(cell.strip() for cell in line[:count]) for line in lines}
