"""`dfn-hf bench --smoke`: every table at its smallest, and the rows that it must have."""

import contextlib
import io
import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from typer.main import get_command

from ..harness.environment import without_isolation
from ..quality.ablations import VARIANTS
from ..quality.byte_chunking import MODELS as BYTE_MODELS
from ..quality.quantization import CHECKPOINTS
from ..speed.peers import WORKS as PEER_WORKS
from ..speed.seq2seq_speed import WORKS as SEQ2SEQ_WORKS
from ..speed.single_head import WORKS as OPERATION_WORKS
from ..speed.throughput import WORKS


@dataclass(frozen=True)
class SmokeTable:
    """A benchmark's command without `--results`, and the first cells of each row that it must print."""

    command: str
    rows: Sequence[tuple[str, ...]]


TABLES = (
    SmokeTable(
        "recall --seeds 1 --steps 2 --tuning-steps 1 --long-length 128 --longest-length 160 --long-num-pairs 16",
        [("dfn", "1"), ("llama-conv", "1")],
    ),
    SmokeTable(
        "lm --seeds 2 --steps 2 --search-steps 1 --length 32 --batch-size 2 --hidden-size 32 --intermediate-size 64 "
        "--num-hidden-layers 1 --evaluation-windows 4",
        [("dfn",), ("llama",), ("llama-conv",)],
    ),
    SmokeTable(
        "ablations --seeds 1 --lm-steps 1 --recall-steps 1 --long-length 128 --long-num-pairs 16",
        [(variant, "1") for variant in VARIANTS],
    ),
    SmokeTable(
        "scaling --length 256 --length 512 --baseline-length 256 --hidden-size 32 --num-hidden-layers 1 --repeats 1",
        [("256",), ("512",)],
    ),
    SmokeTable(
        "million --length 2048 --chunk-length 500 --hidden-size 32 --num-hidden-layers 2",
        [("one pass",), ("chunks of 500",)],
    ),
    SmokeTable(
        "retrieval --length 8192 --contexts 1 --control-contexts 1 --steps 1 --lessons 0 --chunk-length 5000",
        [("8,192", "16", "5"), ("8,192", "0", "5")],
    ),
    SmokeTable(
        "long-lm --steps 2 --search-steps 1 --length 300 --hidden-size 32 --intermediate-size 256 "
        "--num-hidden-layers 1 --evaluation-windows 2 --tokenizer byte",
        [("dfn", "nats per token"), ("llama", "bits per byte"), ("dfn", "nats per token, K = 0")],
    ),
    SmokeTable(
        "bytes --seeds 1 --steps 2 --search-steps 1 --learning-rate 6e-3 --length 64 --batch-size 2 "
        "--evaluation-windows 4",
        [(model,) for model in BYTE_MODELS],
    ),
    SmokeTable(
        "fields --field camera --side 64 --steps 3",
        [("camera", method) for method in ("adaptive", "uniform", "siren", "resampling")]
        + [("camera, a quarter given", method) for method in ("pre-trained", "from scratch")],
    ),
    SmokeTable("field-speed --side 16 --side 32", [("256",), ("1,024",)]),
    SmokeTable(
        "contrastive --task images --steps 1", [("images", model) for model in ("dfn", "class-mean", "logistic")]
    ),
    SmokeTable("memory --seeds 1 --steps 1", [("8", "1"), ("0", "1")]),
    SmokeTable("speed --length 64 --repeats 1", [(work, "64") for work in WORKS]),
    SmokeTable(
        "peers --length 64 --training-length 64 --repeats 1 --num-hidden-layers 1",
        [(work, "64") for work in PEER_WORKS],
    ),
    SmokeTable("operation --length 64 --repeats 1", [(work, "64") for work in OPERATION_WORKS]),
    SmokeTable("paper --length 32 --length 512 --hidden-size 32 --num-hidden-layers 1", [("32",), ("512",)]),
    SmokeTable(
        "translation --steps 1 --search-steps 1 --learning-rate 1e-3 --batch-size 2 --pairs 4 --no-scores",
        [("liquid",), ("t5",)],
    ),
    SmokeTable("reversal --seeds 1 --steps 1", [("32", "8")]),
    SmokeTable("seq2seq-speed --length 64 --repeats 1", [(work, "64") for work in SEQ2SEQ_WORKS]),
    SmokeTable(
        'quantization --format bfloat16 --format "bitsandbytes NF4" --documents 1 --pairs 8',
        [(name,) for name in CHECKPOINTS],
    ),
)


def run_smoke(tables: Sequence[SmokeTable] = TABLES, report: Callable[[str], None] = lambda line: None) -> list[str]:
    """Print the tables in their smallest form; their times and peaks of memory mean nothing.

    Args:
        tables: what to run, each with an empty file of results.
        report: takes a line per table, with the seconds that it took.

    Returns:
        A line for each row that its table lacks.
    """
    lacking = []
    for table in tables:
        started = time.perf_counter()
        output = printed(table.command)
        missing = [" | ".join(row) for row in table.rows if row not in leading_cells(output, len(row))]
        lacking += [f"bench {table.command}: no row {row}" for row in missing]
        count, seconds = len(table.rows) - len(missing), time.perf_counter() - started
        report(f"{table.command.split()[0]}: {count} of {len(table.rows)} rows, {seconds:.0f} s")
    return lacking


def printed(command: str) -> str:
    """What a benchmark prints where no run is finished yet."""
    from .app import app

    output = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(output), without_isolation():
        results = Path(folder) / "results.csv"
        get_command(app).main([*shlex.split(command), "--results", str(results)], standalone_mode=False)
    return output.getvalue()


def leading_cells(output: str, count: int) -> set[tuple[str, ...]]:
    """The first cells of every line of a table."""
    lines = [line.split("|")[1:-1] for line in output.splitlines() if line.startswith("|")]
    return {tuple(cell.strip() for cell in line[:count]) for line in lines}
