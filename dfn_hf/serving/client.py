"""The client of one request: signals the generation when the client has disconnected."""

import asyncio
import threading
from collections.abc import Callable
from contextvars import ContextVar

from starlette.types import Message, Receive, Send

STALL_SECONDS = 60.0

CURRENT: ContextVar["Client"] = ContextVar("CURRENT")


class Client:
    """The connection of one request.

    The wrapped application never sees a disconnect: it waits for the generation, which stops at its next token. A
    request therefore counts as running until its memory is free.

    Args:
        body: the request body that the application receives.
        receive: the ASGI channel that reports the disconnect.
        send: the ASGI channel to the client.
        on_end: called before the last part of the response is sent, so that the client's next request finds room.
    """

    def __init__(self, body: bytes, receive: Receive, send: Send, *, on_end: Callable[[], object] = lambda: None):
        self._body: bytes | None = body
        self._receive, self._send, self._on_end = receive, send, on_end
        self._callbacks: list[Callable[[], None]] = []
        self.gone = threading.Event()

    def call_when_gone(self, callback: Callable[[], None]) -> None:
        """Call `callback` when the client leaves, or now if it has left."""
        self._callbacks.append(callback)
        if self.gone.is_set():
            callback()

    def leave(self) -> None:
        """Record that the client has left."""
        self.gone.set()
        for callback in self._callbacks:
            callback()

    async def watch(self) -> None:
        """Wait until the client leaves."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.leave()

    async def receive(self) -> Message:
        """Return the body once; then wait, because the application must not see a disconnect."""
        if self._body is None:
            await asyncio.Event().wait()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Message) -> None:
        """Send a part of the response. A client that reads nothing for `STALL_SECONDS` counts as gone."""
        if self.gone.is_set():
            return
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._on_end()
        try:
            async with asyncio.timeout(STALL_SECONDS):
                await self._send(message)
        except OSError:  # includes TimeoutError
            self.leave()
