"""The ASGI application in front of `transformers serve`: routes, origins, sizes and the number of requests."""

import asyncio
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from .client import CURRENT, Client
from .request_errors import RequestError
from .requests import SCHEMAS, Bounds, parse_body

METHODS = {"/health": "GET", "/v1/models": "GET", **dict.fromkeys(SCHEMAS, "POST")}
BODY_SECONDS = 30.0
# A refused body of up to about this size is read and dropped: many clients read the response only after sending.
DROPPED_BYTES = 2**24
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class ServerLimits:
    """What the server accepts.

    Args:
        max_body_bytes: size of a request body.
        max_requests: requests that are read, waiting or running at the same time.
        max_prompt_tokens: length of a prompt; None for `max_position_embeddings` of the model or, if it has none,
            16,384.
        max_new_tokens: tokens generated for one request.
        origins: origins of web pages that may send requests, such as `https://example.org`; `*` for all.
    """

    max_body_bytes: int = 2**18
    max_requests: int = 16
    max_prompt_tokens: int | None = None
    max_new_tokens: int = 4096
    origins: tuple[str, ...] = ()


class Guard:
    """Passes on the requests that the served model can answer, and refuses all others with a 4xx status.

    Args:
        app: the application of `transformers serve`.
        model: the only model name that requests may use.
        limits: sizes and numbers of requests.
        bounds: upper bounds of numbers in a request.
    """

    def __init__(self, app: ASGIApp, model: str, limits: ServerLimits, bounds: Bounds):
        self.app, self.model, self.limits, self.bounds = app, model, limits, bounds
        self.running: set[object] = set()
        # One thread: other clients are served while a large body is checked, and one body is checked at a time.
        self.checker = ThreadPoolExecutor(max_workers=1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; see the ASGI specification."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            await self.answer(scope, receive, send)
        except RequestError as error:
            await error_response(error)(scope, receive, send)
        except ClientDisconnect:
            pass

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on.

        Raises:
            RequestError: the request is refused.
            ClientDisconnect: the client has left before its body was read.
        """
        try:
            self.check_head(scope)
        except RequestError:
            with suppress(RequestError):
                await read_body(scope, receive, 0)
            raise
        if scope["path"] == "/health":
            await self.app(scope, receive, send)
        elif scope["path"] == "/v1/models":
            await self.list_models()(scope, receive, send)
        else:
            await self.generate(scope, receive, send)

    def check_head(self, scope: Scope) -> None:
        """Raise RequestError if the request is refused without reading its body."""
        check_route(scope)
        if scope["method"] != "POST":
            return
        check_origin(scope, self.limits.origins)
        check_content_type(scope)
        if len(self.running) >= self.limits.max_requests:
            raise RequestError(
                f"the server is busy with {len(self.running)} requests (--max-requests): try again later",
                status=429,
                headers={"Retry-After": "1"},
            )

    def list_models(self) -> JSONResponse:
        """Return the list of models, which has one entry."""
        entry = {"id": self.model, "object": "model", "created": 0, "owned_by": "local"}
        return JSONResponse({"object": "list", "data": [entry]})

    async def generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read and check the body and pass it on.

        Raises:
            RequestError: the body is refused.
            ClientDisconnect: the client has left before its body was read.
        """
        slot = object()
        self.running.add(slot)
        try:
            raw = await read_body(scope, receive, self.limits.max_body_bytes)
            loop = asyncio.get_running_loop()
            body = await loop.run_in_executor(self.checker, self.prepare, scope["path"], raw)
            client = Client(body, receive, send, on_end=lambda: self.running.discard(slot))
            del raw, body
            CURRENT.set(client)
            watcher = asyncio.create_task(client.watch())
            try:
                await self.app(scope, client.receive, client.send)
            finally:
                watcher.cancel()
        finally:
            self.running.discard(slot)

    def prepare(self, path: str, raw: bytes) -> bytes:
        """Return the body with checked fields.

        Raises:
            RequestError: a field is wrong, or the body names another model.
        """
        body = parse_body(path, raw, self.bounds)
        if body.get("model", self.model) != self.model:
            raise RequestError(
                f"model: this server has one model, {self.model}: use this name or omit the field", "model", status=404
            )
        return json.dumps(body).encode()


def check_route(scope: Scope) -> None:
    """Raise RequestError unless the server has the route."""
    method = METHODS.get(scope["path"])
    if method is None:
        raise RequestError(f"this server has only the routes {', '.join(METHODS)}", status=404)
    if scope["method"] != method:
        raise RequestError(f"{scope['path']} takes {method} requests only", status=405, headers={"Allow": method})


def check_origin(scope: Scope, allowed: Sequence[str]) -> None:
    """Raise RequestError if a web page sent the request and its origin is neither allowed nor this server."""
    origin = Headers(scope=scope).get("origin")
    host, port = scope.get("server") or ("", None)
    own = {f"{scope['scheme']}://{name}:{port}" for name in (*LOCAL_HOSTS, host)}
    if origin is not None and not {origin, "*"} & {*allowed} and origin not in own:
        raise RequestError(
            "web pages of other origins may not use this server: its owner can allow them with --allow-origin",
            status=403,
        )


def check_content_type(scope: Scope) -> None:
    """Raise RequestError unless the body is declared as JSON."""
    kind = Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError("the body must be JSON: send the header Content-Type: application/json", status=415)


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """Return the request body. At most `limit` bytes are held.

    Raises:
        RequestError: the body is larger than `limit` (413) or takes longer than `BODY_SECONDS` (408).
        ClientDisconnect: the client has left.
    """
    length = Headers(scope=scope).get("content-length", "0")
    declared = int(length) if length.isdecimal() and len(length) < 20 else 0
    too_large = RequestError(f"the body is larger than {limit} bytes (--max-body-bytes)", status=413)
    if declared > limit + DROPPED_BYTES:
        raise too_large
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                chunk, more = message.get("body", b""), message.get("more_body", False)
                size += len(chunk)
                if size > limit + DROPPED_BYTES:
                    raise too_large
                if size <= limit:
                    body += chunk
    except TimeoutError:
        raise RequestError(f"the body was not complete after {BODY_SECONDS:g} seconds", status=408) from None
    if size > limit:
        raise too_large
    return bytes(body)


def error_response(error: RequestError) -> JSONResponse:
    """Return the response to a refused request, in the format of the OpenAI API."""
    details: dict[str, Any] = {"message": error.message, "type": "invalid_request_error", "param": error.field}
    return JSONResponse({"error": details | {"code": None}}, error.status, error.headers)
