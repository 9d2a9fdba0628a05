"""Random request bodies for the server."""

import json
import random
import string
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from tests.support.serving import make_app, make_chat_model

COMPLETION, CHAT, RESPONSE = "/v1/completions", "/v1/chat/completions", "/v1/responses"
ANSWERS = (200, 400, 404, 413, 422)
USER = {"role": "user", "content": "a"}
FIELDS = {
    COMPLETION: ["prompt", "suffix", "max_tokens", "logit_bias", "n", "echo", "best_of"],
    CHAT: ["messages", "tools", "max_tokens", "max_completion_tokens", "logit_bias", "chat_template_kwargs", "user"],
    RESPONSE: ["input", "instructions", "tools", "max_output_tokens", "parallel_tool_calls", "store", "metadata"],
}
SHARED = ["model", "stream", "temperature", "top_p", "seed", "stop", "frequency_penalty", "generation_config", "foo"]
NAMES = ["role", "content", "type", "text", "name", "arguments", "function", "tool_calls", "call_id", "output", "x"]
WORDS = [
    "", "a", "user", "assistant", "text", "input_text", "reasoning", "function_call", "function_call_output", "{}",
    "\ud800", "\x00", "é" * 50, "0", "1", "-1", "NaN", '{"max_new_tokens": 2}', '{"num_beams": 2}', "[" * 200,
]  # fmt: skip
NUMBERS = [0, 1, -1, 2, 0.5, 1e-30, 1e30, 1e308, 2**31, 2**63, 2**64, -(2**70), 10**400, float("nan"), float("inf")]
GOOD = {
    "prompt": "And it came", "messages": [USER], "input": [USER], "max_tokens": 2, "max_output_tokens": 2,
    "max_completion_tokens": 2, "temperature": 0.7, "top_p": 0.9, "seed": 1, "stop": ["e"], "stream": False,
    "generation_config": '{"do_sample": true, "max_new_tokens": 2}', "logit_bias": {"5": 1}, "instructions": "b",
    "frequency_penalty": 0.1,
}  # fmt: skip


def random_value(random: random.Random, depth: int = 0) -> Any:
    """A value of any JSON type."""
    kind = random.randrange(8 if depth < 4 else 6)
    if kind < 2:
        return random.choice([None, True, False])
    if kind < 4:
        return random.choice(NUMBERS)
    if kind < 6:
        return random.choice([*WORDS, "".join(random.choices(string.printable, k=random.randrange(20)))])
    if kind == 6:
        return [random_value(random, depth + 1) for _ in range(random.randrange(4))]
    return {random.choice(NAMES): random_value(random, depth + 1) for _ in range(random.randrange(5))}


def damage(random: random.Random, value: Any) -> Any:
    """Replace a random part of `value`."""
    if isinstance(value, dict) and value and random.random() < 0.8:
        name = random.choice(list(value))
        return value | {name: damage(random, value[name])}
    if isinstance(value, list) and value and random.random() < 0.8:
        return [damage(random, value[0]), *value[1:]]
    return random_value(random)


def random_body(random: random.Random, path: str) -> bytes:
    """A body for a route: right fields, wrong ones, and sometimes damaged JSON."""
    names = [name for name in FIELDS[path] + SHARED if name in GOOD]
    body: Any = {name: GOOD[name] for name in names if name in FIELDS[path][:1] or random.random() < 0.3}
    for _ in range(random.randrange(3)):
        if random.random() < 0.5:
            body = damage(random, body)
        elif isinstance(body, dict):
            body[random.choice(FIELDS[path] + SHARED)] = random_value(random)
    raw = bytearray(json.dumps(body, ensure_ascii=random.random() < 0.9).encode(errors="surrogatepass"))
    if random.random() < 0.15 and raw:
        for _ in range(random.randrange(1, 4)):
            raw[random.randrange(len(raw))] = random.randrange(256)
    return bytes(raw)


@cache
def client() -> Any:
    """A client of a server of a small model, in this process."""
    model = make_chat_model(Path(tempfile.mkdtemp(prefix="dfn-hf-fuzz-"), "model"))
    app = make_app(model, max_new_tokens=4, max_prompt_tokens=200)
    return TestClient(app, raise_server_exceptions=False)


def attempt_requests(folder: Path, random: random.Random) -> None:
    """Post a random body to a route."""
    path = random.choice(list(FIELDS))
    body = random_body(random, path)
    answer = client().post(path, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in ANSWERS, f"{answer.status_code} for {body!r}"
    assert answer.status_code == 200 or isinstance(answer.json(), dict), answer.text


ATTEMPTS = (attempt_requests,)
