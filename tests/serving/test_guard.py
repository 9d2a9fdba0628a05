"""Tests of the routes, origins, sizes and numbers of requests that the server accepts."""

import asyncio
import json

import pytest
from starlette.testclient import TestClient

import dfn_hf
from dfn_hf.serving import client as client_module
from dfn_hf.serving import guard as guard_module
from dfn_hf.serving.client import Client
from dfn_hf.serving.guard import Guard, ServerLimits
from dfn_hf.serving.requests import Bounds
from tests.support.serving import make_app

BODY = {"prompt": "And it came", "max_tokens": 2}
POSTS = ["/v1/completions", "/v1/chat/completions", "/v1/responses"]


@pytest.fixture(scope="module")
def client():
    return TestClient(make_app("dfn-tiny", max_body_bytes=2000))


@pytest.mark.parametrize("path", [
    "/load_model", "/reset", "/v1/audio/transcriptions", "/v1/systemone", "/docs", "/openapi.json", "/redoc", "/",
    "/v1/completions/", "//v1/completions", "/V1/completions",
])  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "DELETE"])
def test_other_routes_are_off(client, path, method):
    answer = client.request(method, path, json={"model": str(dfn_hf.checkpoint_path("flownetwork-tiny"))})
    assert answer.status_code == 404
    assert client.post("/v1/completions", json=BODY).status_code == 200


@pytest.mark.parametrize(("method", "path"), [
    ("GET", "/v1/completions"), ("PUT", "/v1/responses"), ("POST", "/v1/models"), ("POST", "/health"),
    ("OPTIONS", "/v1/models"),
])  # fmt: skip
def test_other_methods_are_off(client, method, path):
    answer = client.request(method, path)
    assert answer.status_code == 405
    assert answer.headers["allow"] in ("GET", "POST")


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("model", ["gpt-4", "", "flownetwork-tiny", "x/y@main", "x:y.gguf", 5, ["a"]])
def test_other_models_are_refused(client, path, model):
    bodies = {"prompt": "a", "messages": [{"role": "user", "content": "a"}], "input": "a"}
    field = {"/v1/completions": "prompt", "/v1/chat/completions": "messages", "/v1/responses": "input"}[path]
    answer = client.post(path, json={"model": model, field: bodies[field]})
    assert answer.status_code in (404, 422)
    assert answer.json()["error"]["param"] == "model"


def test_own_model_is_served(client):
    name = client.get("/v1/models").json()["data"][0]["id"]
    assert name == str(dfn_hf.checkpoint_path("dfn-tiny"))
    for model in (name, None):
        assert client.post("/v1/completions", json=BODY | {"model": model}).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:3000", "https://localhost:80"])
def test_foreign_pages_are_refused(client, origin):
    answer = client.post("/v1/completions", json=BODY, headers={"Origin": origin})
    assert answer.status_code == 403
    assert "--allow-origin" in answer.json()["error"]["message"]
    assert not any("access-control" in name for name in client.get("/v1/models", headers={"Origin": origin}).headers)
    preflight = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    assert client.options("/v1/completions", headers=preflight).status_code == 405


def test_own_pages_are_served(client):
    for host in ("localhost", "127.0.0.1", "[::1]"):
        assert client.post("/v1/completions", json=BODY, headers={"Origin": f"http://{host}:80"}).status_code == 200


@pytest.mark.parametrize(("options", "limits", "origin", "status"), [
    ((), {"origins": ("https://a.example",)}, "https://a.example", 200),
    ((), {"origins": ("https://a.example",)}, "https://b.example", 403),
    (("--enable-cors",), {}, "https://b.example", 200),
])  # fmt: skip
def test_allowed_origins(options, limits, origin, status):
    client = TestClient(make_app("dfn-tiny", *options, **limits))
    answer = client.post("/v1/completions", json=BODY, headers={"Origin": origin})
    assert answer.status_code == status
    assert ("access-control-allow-origin" in answer.headers) == (status == 200)
    preflight = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    assert client.options("/v1/completions", headers=preflight).status_code == (200 if status == 200 else 400)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None])
def test_body_must_be_declared_as_json(client, kind):
    headers = {} if kind is None else {"Content-Type": kind}
    assert client.post("/v1/completions", content=json.dumps(BODY), headers=headers).status_code == 415


def test_too_large_body_is_refused(client):
    answer = client.post("/v1/completions", json={"prompt": "a" * 2000})
    assert answer.status_code == 413
    assert "--max-body-bytes" in answer.json()["error"]["message"]
    chunks = (b"a" * 100 for _ in range(21))
    json_type = {"Content-Type": "application/json"}
    assert client.post("/v1/completions", content=chunks, headers=json_type).status_code == 413


def call(app, chunks, headers=(), path="/v1/completions"):
    """Call `app` with a body in `chunks`; return the status, the body and the number of chunks that were read."""
    read, sent = [], []

    async def receive():
        if len(read) == len(chunks):
            await asyncio.Event().wait()
        read.append(None)
        return {"type": "http.request", "body": chunks[len(read) - 1], "more_body": len(read) < len(chunks)}

    async def send(message):
        sent.append(message)

    headers = [(b"content-type", b"application/json"), *headers]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "scheme": "http", "query_string": b""}
    asyncio.run(asyncio.wait_for(app(scope, receive, send), 60))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:]), len(read)


async def answer_ok(scope, receive, send):
    message = await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": message["body"]})


def make_guard(app=answer_ok, **limits):
    return Guard(app, "model", ServerLimits(**limits), Bounds(100, 50, 64))


def test_endless_body_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr(guard_module, "DROPPED_BYTES", 1000)
    status, _, read = call(make_guard(max_body_bytes=1000), [b"a" * 100] * 500)
    assert (status, read) == (413, 21)
    status, _, read = call(make_guard(max_body_bytes=1000), [b"a"], [(b"content-length", b"2001")])
    assert (status, read) == (413, 0)


def test_body_of_a_refused_request_is_dropped():
    """Many clients read the response only after they have sent the body."""
    status, _, read = call(make_guard(), [b"a"] * 10, path="/load_model")
    assert (status, read) == (404, 10)
    status, _, read = call(make_guard(), [b"a"] * 10, [(b"origin", b"http://evil.example")])
    assert (status, read) == (403, 10)


def test_slow_body_is_refused(monkeypatch):
    monkeypatch.setattr(guard_module, "BODY_SECONDS", 0.05)

    async def receive():
        await asyncio.sleep(10)

    guard, sent = make_guard(), []

    async def send(message):
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "scheme": "http"}
    asyncio.run(guard(scope, receive, send))
    assert sent[0]["status"] == 408
    assert not guard.running


def test_client_that_leaves_in_the_body_gets_no_answer():
    async def receive():
        return {"type": "http.disconnect"}

    guard, sent = make_guard(), []
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "scheme": "http"}
    asyncio.run(guard(scope, receive, sent.append))
    assert (sent, len(guard.running)) == ([], 0)


def test_busy_server_asks_to_come_back():
    async def run():
        release = asyncio.Event()

        async def wait(scope, receive, send):
            await release.wait()
            await answer_ok(scope, receive, send)

        guard, statuses, retry = make_guard(wait, max_requests=2), [], []

        async def request():
            body = iter([{"type": "http.request", "body": b'{"prompt": "a"}', "more_body": False}])

            async def receive():
                return next(body, None) or await asyncio.Event().wait()

            async def send(message):
                if message["type"] == "http.response.start":
                    statuses.append(message["status"])
                    retry.append(dict(message["headers"]).get(b"retry-after"))

            headers = [(b"content-type", b"application/json")]
            scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "scheme": "http"}
            await guard(scope, receive, send)

        tasks = [asyncio.create_task(request()) for _ in range(5)]
        await asyncio.sleep(0.05)
        assert statuses == [429] * 3
        assert retry == [b"1"] * 3
        release.set()
        await asyncio.gather(*tasks)
        assert statuses[3:] == [200] * 2
        await request()
        assert statuses[5:] == [200]
        assert not guard.running

    asyncio.run(run())


def test_client_that_reads_nothing_counts_as_gone(monkeypatch):
    monkeypatch.setattr(client_module, "STALL_SECONDS", 0.05)

    async def run():
        async def stall(message):
            await asyncio.Event().wait()

        client, called = Client(b"", stall, stall), []
        client.call_when_gone(lambda: called.append(1))
        await client.send({"type": "http.response.start"})
        assert client.gone.is_set()
        client.call_when_gone(lambda: called.append(2))
        await client.send({"type": "http.response.body"})
        assert called == [1, 2]

    asyncio.run(run())


def test_websockets_are_refused(client):
    from starlette.websockets import WebSocketDisconnect

    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/v1/completions"):
        pass
