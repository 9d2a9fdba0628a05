"""Executes notebooks and compares their stored text outputs with those of a run.

`python -m tests.support.notebooks notebooks/01_quickstart.ipynb …` executes the notebooks and stores them with their
outputs, without warnings, progress bars and execution times.
"""

import base64
import hashlib
import os
import re
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

from . import hub_server

TIMEOUT = 600  # seconds per cell
RELATIVE_TOLERANCE = 5e-3  # three significant digits
VOLATILE = re.compile(r"0x[0-9a-f]+|(?:/[\w.+-]+){2,}|\b[\d.]+ ?(?:ms|s|seconds|minutes)\b")
FLOAT = re.compile(r"-?\d+\.\d*(?:e[-+]?\d+)?")


def execute(path: Path, folder: Path) -> NotebookNode:
    """Execute a notebook in `folder` against a local Hub; the outputs are text on stdout, results and images."""
    notebook = nbformat.read(path, as_version=4)
    with hub_server.serve() as address:
        hub = {"HF_ENDPOINT": address, "HF_TOKEN": hub_server.TOKEN, "HF_HUB_DISABLE_XET": "1"}
        # The order of summation, and so the last digits of losses, depends on the number of threads.
        env = os.environ | hub | {"HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
        resources = {"metadata": {"path": str(folder)}}
        NotebookClient(notebook, timeout=TIMEOUT, resources=resources, coalesce_streams=True).execute(env=env)
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata.language_info = {"name": "python"}
    notebook.metadata.processor = processor()
    return notebook


def processor() -> str:
    """Return the CPU's model name and a hash of its flags. Training magnifies differences of rounding between CPUs."""
    lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    fields = {name.strip(): value.strip() for name, _, value in lines}
    flags = fields.get("flags", fields.get("Features", ""))
    return f"{fields.get('model name', 'unknown')}, {hashlib.sha256(flags.encode()).hexdigest()[:8]}"


def changed_outputs(stored: NotebookNode, executed: NotebookNode) -> Iterator[tuple[str, str, str]]:
    """Yield id, stored text and new text of the cells whose text outputs differ; images are not compared.

    On a CPU other than the one that stored the outputs, a cell differs only if it has text in one of the two runs.
    """
    same_processor = stored.metadata.get("processor") == processor()
    for before, after in zip(stored.cells, executed.cells, strict=True):
        if before.cell_type == "code":
            texts = output_text(before), output_text(after)
            if not (same_text(*texts) if same_processor else bool(texts[0]) == bool(texts[1])):
                yield before.id, *texts


def output_text(cell: NotebookNode) -> str:
    """Return the results of a code cell as text, after its stdout."""
    stdout = "".join(output.text for output in cell.outputs if output.output_type == "stream")
    results = [output.data.get("text/plain", "") for output in cell.outputs if output.output_type != "stream"]
    return "\n".join([stdout.rstrip(), *results])


def same_text(before: str, after: str) -> bool:
    """Compare two texts: floats to three significant digits; addresses, paths and times not at all."""
    before, after = (VOLATILE.sub("…", text) for text in (before, after))
    floats, expected = ([float(number) for number in FLOAT.findall(text)] for text in (after, before))
    return FLOAT.sub("#", before) == FLOAT.sub("#", after) and floats == pytest.approx(
        expected, rel=RELATIVE_TOLERANCE, abs=1e-6
    )


def shrink_images(notebook: NotebookNode) -> None:
    """Reduce images to 256 colours, which takes a third of the bytes."""
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        if "image/png" in output.get("data", {}):
            image = Image.open(BytesIO(base64.b64decode(output.data["image/png"]))).convert("RGB")
            image = image.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
            stored = BytesIO()
            image.save(stored, "PNG", optimize=True)
            output.data["image/png"] = base64.b64encode(stored.getvalue()).decode()


if __name__ == "__main__":
    for name in sys.argv[1:]:
        with TemporaryDirectory() as folder:
            executed = execute(Path(name).absolute(), Path(folder))
        shrink_images(executed)
        nbformat.write(executed, name)
