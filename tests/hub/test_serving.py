"""Tests that the OpenAI-compatible server returns the same text as `generate`."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import dfn_hf
from dfn_hf.hub.serving import serve

PROMPT = "And it came to pass"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module", params=["dfn-tiny", "flownetwork-tiny"])
def server(request, tmp_path_factory):
    port = free_port()
    environment = os.environ | {"HF_HOME": str(tmp_path_factory.mktemp("home")), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dfn_hf.cli", "serve", request.param, "--port", str(port), "--device", "cpu"]
    log = tmp_path_factory.mktemp("log") / "server.txt"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        url = f"http://localhost:{port}"
        deadline = time.monotonic() + 240
        while not answers(f"{url}/health"):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield url, str(dfn_hf.checkpoint_path(request.param))
    finally:
        process.terminate()
        process.wait(30)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def post(url: str, **body) -> str:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return response.read().decode()


def test_completion_equals_generate(server):
    url, path = server
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs.input_ids.shape[1] :]
    expected = tokenizer.decode(tokens, skip_special_tokens=True)
    request = {"model": path, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    whole = json.loads(post(f"{url}/v1/completions", **request))
    assert whole["choices"][0]["text"] == expected
    streamed = post(f"{url}/v1/completions", **request, stream=True)
    events = [line.removeprefix("data: ") for line in streamed.splitlines() if line.startswith("data: {")]
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == expected


def test_request_without_model_name(server):
    answer = json.loads(post(f"{server[0]}/v1/completions", prompt=PROMPT, max_tokens=3))
    assert answer["choices"][0]["text"]


def test_list_of_models_is_empty(server):
    with urllib.request.urlopen(f"{server[0]}/v1/models", timeout=30) as response:
        assert json.loads(response.read())["data"] == []


def test_encoder_decoder_is_rejected():
    with pytest.raises(ValueError, match="liquid-tiny is a liquid, an encoder-decoder"):
        serve("liquid-tiny")
