"""Runs `dfn-hf serve` under valid, invalid and interrupted requests, and measures its memory and speed over time.

Each client repeats random actions: it completes texts, disconnects early, sends invalid or too large bodies, or asks
for other models. The run fails if a status is unexpected (every 5xx status is), a completed text differs from the
first one, a request gets no answer, or the memory of the server grows.

    python -m tests.campaigns.soak_serve --minutes 60 --clients 8
"""

import argparse
import http.client
import json
import random
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from tests.support.serving import running_server

SAMPLE_SECONDS = 2.0
MIN_MINUTES = 2.0  # a shorter run says nothing about memory
ALLOWED_GROWTH = 0.05  # of the median memory between the second and the last quarter of the run
PROMPTS = ("And it came to pass", "In the beginning", "KING HENRY.\n", "a", "é")
LIMITS = (
    "--max-requests",
    "6",
    "--max-body-bytes",
    "100000",
    "--max-prompt-tokens",
    "2000",
    "--max-new-tokens",
    "2000",
)
JSON = {"Content-Type": "application/json"}


@dataclass
class Soak:
    """The results of all clients.

    Args:
        host: host of the server.
        port: its port.
        deadline: when clients stop, in seconds of `time.monotonic`.
    """

    host: str
    port: int
    deadline: float
    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    token_times: list[tuple[float, float]] = field(default_factory=list)  # moment, seconds per token
    memory: list[tuple[float, float]] = field(default_factory=list)  # moment, MB
    lock: threading.Lock = field(default_factory=threading.Lock)

    def connect(self, timeout: float = 300) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, self.port, timeout=timeout)

    def ask(self, action: str, allowed: set[int], *request: Any, encode_chunked: bool = False) -> tuple[int, bytes]:
        """Send one request (method, path, body, headers) and record its status."""
        connection = self.connect()
        try:
            connection.request(*request, encode_chunked=encode_chunked)
            response = connection.getresponse()
            self.record(action, response.status, allowed)
            return response.status, response.read()
        finally:
            connection.close()

    def record(self, action: str, status: int, allowed: set[int]) -> None:
        with self.lock:
            self.statuses[action, status] += 1
            if status not in allowed:
                self.faults.append(f"{action}: status {status}")

    def check_text(self, prompt: str, text: str) -> None:
        """Record a fault if the same greedy request has returned another text before."""
        with self.lock:
            if self.texts.setdefault(prompt, text) != text:
                self.faults.append(f"another text for {prompt!r}: {text!r}")


def body(prompt: str, **options: Any) -> bytes:
    return json.dumps({"prompt": prompt, "temperature": 0} | options).encode()


def complete(soak: Soak, dice: random.Random) -> None:
    prompt = dice.choice(PROMPTS)
    status, answer = soak.ask("complete", {200, 429}, "POST", "/v1/completions", body(prompt, max_tokens=24), JSON)
    if status == 200:
        soak.check_text(prompt, json.loads(answer)["choices"][0]["text"])


def stream(soak: Soak, dice: random.Random) -> None:
    """Stream a text and measure the time between its tokens."""
    prompt, connection = dice.choice(PROMPTS), soak.connect()
    try:
        connection.request("POST", "/v1/completions", body(prompt, max_tokens=24, stream=True), JSON)
        response = connection.getresponse()
        soak.record("stream", response.status, {200, 429})
        if response.status != 200:
            return
        text, moments, tokens = "", [], 0
        for line in response:
            if line.startswith(b"data: {"):
                event = json.loads(line.removeprefix(b"data: "))
                text += event["choices"][0]["text"]
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
                moments.append(time.monotonic())
        soak.check_text(prompt, text)
        if tokens > 8:
            with soak.lock:
                soak.token_times.append((moments[-1], (moments[-1] - moments[0]) / (tokens - 1)))
    finally:
        connection.close()


def leave(soak: Soak, dice: random.Random) -> None:
    """Ask for a long text and close the connection at a random moment."""
    connection, streamed = soak.connect(), dice.random() < 0.5
    try:
        options = {"max_tokens": 2000, "generation_config": '{"min_new_tokens": 2000}', "stream": streamed}
        connection.request("POST", "/v1/completions", body(dice.choice(PROMPTS), **options), JSON)
        if streamed and dice.random() < 0.5:
            connection.getresponse().read(dice.randrange(1, 2000))
        else:
            time.sleep(dice.random())
        soak.record("leave", 0, {0})
    finally:
        connection.close()


def leave_early(soak: Soak, dice: random.Random) -> None:
    """Close the connection within the head or the body of a request."""
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 50000\r\n\r\n"
    )
    with socket.create_connection((soak.host, soak.port), timeout=60) as connection:
        connection.sendall((head + b"a" * 1000)[: dice.randrange(len(head) + 1000)])
        time.sleep(dice.random() / 5)
        soak.record("leave early", 0, {0})


def garbage(soak: Soak, dice: random.Random) -> None:
    raw = bytearray(body(dice.choice(PROMPTS), max_tokens=3, stop=["a"]))
    for _ in range(dice.randrange(1, 8)):
        raw[dice.randrange(len(raw))] = dice.randrange(256)
    allowed = {200, 400, 404, 422, 429}
    soak.ask("garbage", allowed, "POST", "/v1/completions", bytes(raw), JSON)
    with socket.create_connection((soak.host, soak.port), timeout=60) as connection:
        connection.sendall(dice.randbytes(dice.randrange(1, 5000)))


def wrong_types(soak: Soak, dice: random.Random) -> None:
    values = [5, "x", [1], {}, True, 1e300, 10**400, "\ud800"]
    name = dice.choice(["prompt", "max_tokens", "temperature", "seed", "stop", "generation_config", "stream"])
    raw = json.dumps({"prompt": "a", "max_tokens": 3, name: dice.choice(values)}).encode()
    soak.ask("wrong types", {200, 400, 422, 429}, "POST", "/v1/completions", raw, JSON)


def huge_body(soak: Soak, dice: random.Random) -> None:
    raw = body("a" * dice.choice([100_000, 1_000_000]))
    soak.ask("huge body", {413, 429}, "POST", "/v1/completions", raw, JSON)
    chunks = (b"a" * 5000 for _ in range(dice.choice([30, 300])))
    headers = JSON | {"Transfer-Encoding": "chunked"}
    soak.ask("huge body", {413, 429}, "POST", "/v1/completions", chunks, headers, encode_chunked=True)


def long_prompt(soak: Soak, dice: random.Random) -> None:
    raw = body(" a" * dice.choice([1500, 3000, 40_000]), max_tokens=2)
    soak.ask("long prompt", {200, 422, 429}, "POST", "/v1/completions", raw, JSON)


def other_model(soak: Soak, dice: random.Random) -> None:
    name = dice.choice(["gpt-4", "/etc", "flownetwork-tiny", ".", ""])
    soak.ask("other model", {404, 429}, "POST", "/v1/completions", body("a", model=name), JSON)
    soak.ask("other route", {404}, "POST", dice.choice(["/load_model", "/reset"]), body("a", model=name), JSON)
    soak.ask("web page", {403}, "POST", "/v1/completions", body("a"), JSON | {"Origin": "http://evil.example"})
    soak.ask("health", {200}, "GET", dice.choice(["/health", "/v1/models"]))


ACTIONS: list[tuple[Callable[[Soak, random.Random], None], int]] = [
    (complete, 4), (stream, 6), (leave, 4), (leave_early, 2), (garbage, 2), (wrong_types, 2), (huge_body, 1),
    (long_prompt, 1), (other_model, 1),
]  # fmt: skip


def run_client(soak: Soak, number: int, seed: int) -> None:
    """Repeat random actions until the deadline."""
    dice = random.Random(f"{seed} {number}")
    actions, weights = zip(*ACTIONS, strict=True)
    while time.monotonic() < soak.deadline:
        action = dice.choices(actions, weights)[0]
        try:
            action(soak, dice)
        except Exception as error:
            with soak.lock:
                soak.faults.append(f"{action.__name__}: {type(error).__name__} {error}")
        if dice.random() < 0.1:
            time.sleep(dice.random())


def sample_memory(soak: Soak, process: psutil.Process, begin: float) -> None:
    """Sample the memory of the server until the deadline and print a line each minute."""
    printed = begin
    while time.monotonic() < soak.deadline:
        time.sleep(SAMPLE_SECONDS)
        now = time.monotonic()
        soak.memory.append((now, process.memory_info().rss / 1e6))
        if now - printed >= 60:
            times = [seconds for moment, seconds in list(soak.token_times) if moment > printed]
            speed = f"{1000 * statistics.median(times):.2f} ms per token" if times else "no streamed text"
            print(
                f"{(now - begin) / 60:5.1f} min: {sum(soak.statuses.values())} requests, {soak.memory[-1][1]:.0f} MB, "
                f"{speed}, {len(soak.faults)} faults",
                flush=True,
            )
            printed = now


def quarters(points: list[tuple[float, float]], begin: float, end: float) -> tuple[float, float]:
    """Return the medians of the second and the last quarter of a run."""
    quarter = (end - begin) / 4
    second = [value for moment, value in points if quarter <= moment - begin < 2 * quarter]
    last = [value for moment, value in points if moment - begin >= 3 * quarter]
    return statistics.median(second or [0.0]), statistics.median(last or [0.0])


def print_trend(name: str, unit: str, points: list[tuple[float, float]], begin: float, end: float) -> bool:
    """Print the medians of quarters 2 and 4 and the slope from quarter 2 on; return whether the values have grown."""
    second, last = quarters(points, begin, end)
    late = [point for point in points if point[0] > begin + (end - begin) / 4]
    slope = 3600 * statistics.linear_regression(*zip(*late, strict=True)).slope if len(late) > 1 else 0.0
    print(
        f"{name}: {second:.2f} {unit} in quarter 2, {last:.2f} {unit} in quarter 4, slope {slope:.2f} {unit} per hour"
    )
    return last > second * (1 + ALLOWED_GROWTH)


def report(soak: Soak, begin: float, minutes: float) -> bool:
    """Print the results and return whether the run has passed."""
    for (action, status), count in sorted(soak.statuses.items()):
        print(f"{action:12} {status or 'left':>5} {count:7}")
    times = [(moment, 1000 * seconds) for moment, seconds in soak.token_times]
    print_trend("time per token", "ms", times, begin, soak.deadline)
    grown = print_trend("memory", "MB", soak.memory, begin, soak.deadline) and minutes >= MIN_MINUTES
    for fault, count in Counter(soak.faults).most_common(20):
        print(f"fault ({count}): {fault}")
    print(
        f"{sum(soak.statuses.values())} requests, {len(soak.faults)} faults, memory {'grows' if grown else 'is flat'}"
    )
    return not soak.faults and not grown


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--model", default="dfn-tiny")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(options.model, Path(folder), *LIMITS) as (url, process),
    ):
        address, begin = urlsplit(url), time.monotonic()
        assert address.hostname and address.port
        soak = Soak(address.hostname, address.port, begin + 60 * options.minutes)
        clients = [threading.Thread(target=run_client, args=(soak, n, options.seed)) for n in range(options.clients)]
        for client in clients:
            client.start()
        sample_memory(soak, psutil.Process(process.pid), begin)
        for client in clients:
            client.join()
        log = (Path(folder) / "server.txt").read_text()
        if "Traceback" in log:
            soak.faults.append(f"traceback in the log: {log[log.index('Traceback') :][:2000]}")
        return 0 if report(soak, begin, options.minutes) else 1


if __name__ == "__main__":
    sys.exit(main())
