"""Servers for tests: the application of `dfn-hf serve` in this process, or the command in another."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import uvicorn

import dfn_hf
from dfn_hf.serving.server import serve

CHAT_TEMPLATE = """
{%- for tool in tools or [] %}{{ tool.function.name + ' ' }}{% endfor %}
{%- for message in messages %}
{%- if message.role not in ('system', 'user', 'assistant', 'tool') %}{{ raise_exception('unknown role') }}{% endif %}
{{- message.role + ': ' + message.content + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}assistant: {% endif %}"""


def make_app(model: str, *arguments: str, **limits: Any) -> Any:
    """Return the ASGI application that `dfn-hf serve` would run."""
    apps = []

    def keep(server: uvicorn.Server, *args: Any) -> None:
        apps.append(server.config.app)

    with mock.patch.object(uvicorn.Server, "run", keep):
        try:
            serve(model, ["--device", "cpu", *arguments], **limits)
        except SystemExit as exit:
            assert not exit.code
    return apps[0]


def make_chat_model(folder: Path) -> str:
    """Copy dfn-tiny to `folder` with a chat template and return the path."""
    shutil.copytree(dfn_hf.checkpoint_path("dfn-tiny"), folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return str(folder)


def answers(url: str) -> bool:
    """Whether a GET request to `url` is answered."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


@contextmanager
def running_server(model: str, folder: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run `dfn-hf serve` on a free port; its log is `folder/server.txt`. Yields the URL and the process."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    environment = os.environ | {"HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dfn_hf.cli", "serve", model, "--port", str(port), "--device", "cpu", *options]
    log = folder / "server.txt"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        url = f"http://localhost:{port}"
        deadline = time.monotonic() + 240
        while not answers(f"{url}/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(log.read_text()[-3000:])
            time.sleep(0.5)
        yield url, process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:  # it waits for a generation
            process.kill()
            process.wait()
