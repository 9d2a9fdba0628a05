"""Tests that the OpenAI-compatible server returns the same text as `generate`, in a separate process."""

import http.client
import json
import time
import urllib.request
from urllib.parse import urlsplit

import pytest
import uvicorn
from starlette.testclient import TestClient
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cli.serving import server as upstream

import dfn_hf
from dfn_hf.serving.server import serve
from tests.support.serving import make_app, running_server

PROMPT = "And it came to pass"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module", params=["dfn-tiny", "flownetwork-tiny"])
def server(request, tmp_path_factory):
    options = ("--max-requests", "1", "--max-new-tokens", "100000")
    with running_server(request.param, tmp_path_factory.mktemp("server"), *options) as (url, _):
        yield url, str(dfn_hf.checkpoint_path(request.param))


def post(url: str, **body) -> str:
    request = urllib.request.Request(url, json.dumps(body).encode(), JSON)
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
    assert whole["model"] == path
    streamed = post(f"{url}/v1/completions", **request, stream=True)
    events = [line.removeprefix("data: ") for line in streamed.splitlines() if line.startswith("data: {")]
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == expected
    assert {json.loads(event)["model"] for event in events} == {path}


def test_request_without_model_name(server):
    answer = json.loads(post(f"{server[0]}/v1/completions", prompt=PROMPT, max_tokens=3))
    assert answer["choices"][0]["text"]


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_leaves_makes_room_for_the_next(server, stream):
    host = urlsplit(server[0]).netloc
    long = {"max_tokens": 100_000, "generation_config": '{"min_new_tokens": 100000}', "stream": stream}
    connection = http.client.HTTPConnection(host, timeout=60)
    connection.request("POST", "/v1/completions", json.dumps({"prompt": PROMPT} | long), JSON)
    if stream:
        assert connection.getresponse().read(100)
    statuses = [status_of_a_short_request(host)]
    connection.close()
    deadline = time.monotonic() + 60  # the text takes minutes
    while statuses[-1] != 200 and time.monotonic() < deadline:
        time.sleep(0.2)
        statuses.append(status_of_a_short_request(host))
    assert statuses[0] == 429
    assert statuses[-1] == 200


def status_of_a_short_request(host: str) -> int:
    connection = http.client.HTTPConnection(host, timeout=60)
    try:
        connection.request("POST", "/v1/completions", json.dumps({"prompt": PROMPT, "max_tokens": 1}), JSON)
        return connection.getresponse().status
    finally:
        connection.close()


def test_list_of_models_has_the_served_one(server):
    with urllib.request.urlopen(f"{server[0]}/v1/models", timeout=30) as response:
        assert [model["id"] for model in json.loads(response.read())["data"]] == [server[1]]


def test_encoder_decoder_is_rejected():
    with pytest.raises(ValueError, match="liquid-tiny is a liquid, an encoder-decoder"):
        serve("liquid-tiny")


def test_continuous_batching_is_rejected():
    with pytest.raises(ValueError, match="--continuous-batching is not supported"):
        serve("dfn-tiny", ["--continuous-batching"])


def test_builder_of_transformers_is_restored():
    build = upstream.build_server
    make_app("dfn-tiny")
    assert upstream.build_server is build


@pytest.mark.parametrize(("model", "limits", "length"), [
    ("dfn-tiny", {}, 16384),
    ("flownetwork-tiny", {}, 2048),
    ("dfn-tiny", {"max_prompt_tokens": 7}, 7),
])  # fmt: skip
def test_longest_prompt(model, limits, length):
    client = TestClient(make_app(model, **limits))
    answer = client.post("/v1/completions", json={"prompt": " a" * (length + 1), "max_tokens": 1})
    assert answer.status_code == 422
    assert f"more than the {length} that this server reads" in answer.json()["error"]["message"]


def test_seed_repeats_a_sampled_text():
    client = TestClient(make_app("dfn-tiny"))
    body = {"prompt": PROMPT, "max_tokens": 8, "seed": 3, "generation_config": '{"do_sample": true}'}
    first, second = (client.post("/v1/completions", json=body).json()["choices"][0]["text"] for _ in range(2))
    assert first == second


def test_options_of_the_command(monkeypatch):
    from typer.testing import CliRunner

    from dfn_hf.cli.app import app

    apps = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda server, *args: apps.append(server.config.app))
    options = ["--max-new-tokens", "5", "--max-body-bytes", "100", "--allow-origin", "https://a.example"]
    result = CliRunner().invoke(app, ["serve", "dfn-tiny", *options, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    client = TestClient(apps[0])
    assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 6}).status_code == 422
    assert client.post("/v1/completions", json={"prompt": "a" * 100}).status_code == 413
    allowed = client.post("/v1/completions", json={"prompt": "a"}, headers={"Origin": "https://a.example"})
    assert allowed.json()["usage"]["completion_tokens"] == 5
    assert allowed.headers["access-control-allow-origin"] == "https://a.example"


@pytest.mark.parametrize(("options", "message"), [
    (["--allow-origin", "evil.example"], "--allow-origin evil.example is not an origin"),
    (["--allow-origin", "https://a.example/page"], "is not an origin"),
    (["--port", "99999"], "--port"),
    (["--log-level", "loud"], "--log-level"),
    (["--max-requests", "0"], "--max-requests"),
])  # fmt: skip
def test_wrong_options_are_named(options, message):
    from typer.testing import CliRunner

    from dfn_hf.cli.app import app

    result = CliRunner().invoke(app, ["serve", "dfn-tiny", *options])
    assert result.exit_code in (1, 2)
    assert message in result.output
    assert "Traceback" not in result.output
