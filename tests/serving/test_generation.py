"""Tests that a generation is bounded and stops when its client leaves."""

import asyncio
import functools
import json

import pytest
import torch
from starlette.testclient import TestClient
from transformers.utils import logging

from dfn_hf import DFNForCausalLM
from dfn_hf.serving import generation
from tests.support.serving import make_app, make_chat_model

LONG = {"prompt": "And it came", "max_tokens": 4096, "generation_config": '{"min_new_tokens": 4096}'}


@pytest.fixture
def steps(monkeypatch):
    """A list that gets one entry for each forward pass."""
    forward, passes = DFNForCausalLM.forward, []

    @functools.wraps(forward)
    def counted(*args, **kwargs):
        passes.append(1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(DFNForCausalLM, "forward", counted)
    return passes


class Connection:
    """A client of an ASGI application that can leave."""

    def __init__(self, app, **body):
        self.app, self.body, self.gone, self.sent = app, json.dumps(body).encode(), asyncio.Event(), []
        self.task = asyncio.create_task(self.run())

    async def run(self):
        headers = [(b"content-type", b"application/json")]
        scope = {
            "type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions",
            "headers": headers, "scheme": "http", "query_string": b"", "root_path": "", "http_version": "1.1",
            "asgi": {"version": "3.0", "spec_version": "2.3"}, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
        }  # fmt: skip
        await self.app(scope, self.receive, self.send)

    async def receive(self):
        if self.body is None:
            await self.gone.wait()
            return {"type": "http.disconnect"}
        body, self.body = self.body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message):
        assert not self.gone.is_set()
        self.sent.append(message)


async def wait_for(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
def test_generation_stops_when_the_client_leaves(steps, stream):
    async def run():
        guard = make_app("dfn-tiny")
        client = Connection(guard, **LONG, stream=stream)
        await wait_for(lambda: len(steps) > 5)
        client.gone.set()
        await asyncio.wait_for(client.task, 60)
        count = len(steps)
        assert count < 2000
        await asyncio.sleep(0.1)
        assert len(steps) == count
        assert not guard.running

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_waiting_generation_does_not_start_without_its_client(steps, stream):
    async def run():
        guard = make_app("dfn-tiny")
        first = Connection(guard, **LONG)
        await wait_for(lambda: len(steps) > 5)
        second = Connection(guard, **LONG, stream=stream)
        await asyncio.sleep(0.1)
        assert len(guard.running) == 2
        second.gone.set()
        await asyncio.sleep(0.1)
        assert len(guard.running) == 2  # its memory is freed when its turn comes
        first.gone.set()
        await asyncio.wait_for(first.task, 60)
        count = len(steps)
        await asyncio.wait_for(second.task, 60)
        assert len(steps) - count <= 1
        assert not guard.running

    asyncio.run(run())


def test_other_clients_are_served_while_one_leaves(steps):
    async def run():
        guard = make_app("dfn-tiny")
        leaving, staying = Connection(guard, **LONG), Connection(guard, prompt="And it came", max_tokens=3)
        await wait_for(lambda: len(steps) > 5)
        leaving.gone.set()
        await asyncio.wait_for(staying.task, 60)
        assert json.loads(staying.sent[1]["body"])["usage"]["completion_tokens"] == 3

    asyncio.run(run())


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return TestClient(make_app(make_chat_model(tmp_path_factory.mktemp("chat") / "model"), max_new_tokens=20))


@pytest.mark.parametrize(("path", "field", "usage"), [
    ("/v1/completions", {"prompt": "And"}, "completion_tokens"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "And"}]}, "completion_tokens"),
    ("/v1/responses", {"input": "And", "stream": False}, "output_tokens"),
])  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"generation_config": "{}"}])
def test_outputs_are_bounded(chat, path, field, usage, options):
    answer = chat.post(path, json=field | options)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"][usage] <= 20


def test_too_long_output_is_refused(chat):
    for field in ("max_tokens", "max_completion_tokens"):
        body = {"messages": [{"role": "user", "content": "And"}], field: 21}
        answer = chat.post("/v1/chat/completions", json=body)
        assert answer.status_code == 422
        assert answer.json()["error"]["param"] == field


def test_empty_prompt_is_refused(chat):
    assert (
        chat.post("/v1/completions", json={"prompt": ""}).json()["error"]["message"].startswith("the prompt is empty")
    )


def test_beams_cannot_stream(chat):
    body = {"prompt": "And", "generation_config": '{"num_beams": 2, "max_new_tokens": 3}'}
    assert chat.post("/v1/completions", json=body).status_code == 200
    answer = chat.post("/v1/completions", json=body | {"stream": True})
    assert answer.status_code == 422
    assert "beam search cannot stream" in answer.json()["error"]["message"]


def test_template_that_refuses_the_messages(chat):
    messages = [{"role": "stranger", "content": "a"}]
    answer = chat.post("/v1/chat/completions", json={"messages": messages})
    assert answer.status_code == 422
    assert answer.json()["error"]["message"] == "the chat template refuses the messages: unknown role"
    answer = chat.post("/v1/chat/completions", json={"messages": messages, "tools": [{"function": 5}]})
    assert answer.status_code == 422


def test_model_without_chat_template():
    client = TestClient(make_app("dfn-tiny"))
    answer = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}]})
    assert answer.status_code == 422
    assert "no chat template" in answer.json()["error"]["message"]


def test_error_of_generate_names_its_reason(monkeypatch, chat):
    def fail(*args, **kwargs):
        raise ValueError("no such option")

    monkeypatch.setattr(DFNForCausalLM, "generate", fail)
    answer = chat.post("/v1/completions", json={"prompt": "And"})
    assert answer.status_code == 422
    assert answer.json()["error"]["message"] == "no such option"


def test_messages_that_are_logged_once_are_forgotten(monkeypatch, chat):
    monkeypatch.setattr(generation, "MAX_LOGGED_MESSAGES", 5)
    for number in range(20):
        temperature = 0.5 + number / 100
        chat.post("/v1/completions", json={"prompt": "And", "max_tokens": 1, "temperature": temperature})
    assert logging.info_once.cache_info().currsize <= 10


def test_stopping_criterion_has_one_value_for_each_row():
    class Client:
        gone = asyncio.Event()

    criterion = generation.ClientGone(Client)
    assert criterion(torch.zeros(3, 2), None).tolist() == [False] * 3
    Client.gone.set()
    assert criterion(torch.zeros(3, 2), None).tolist() == [True] * 3
