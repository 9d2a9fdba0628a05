"""Tests of the checks of request bodies, and of the server with random bodies."""

import json
import random

import pytest
from starlette.testclient import TestClient

from dfn_hf.serving.request_errors import RequestError
from dfn_hf.serving.requests import Bounds, parse_body
from tests.campaigns.requests import FIELDS, random_body
from tests.support.serving import make_app, make_chat_model

COMPLETION, CHAT, RESPONSE = "/v1/completions", "/v1/chat/completions", "/v1/responses"
USER = {"role": "user", "content": "a"}
CALL = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
BOUNDS = Bounds(prompt_tokens=100, new_tokens=50, vocab_size=64)


def parse(path, body):
    return parse_body(path, body if isinstance(body, bytes) else json.dumps(body).encode(), BOUNDS)


@pytest.mark.parametrize("raw", [
    b"", b"{", b"nonsense", b"\xff\xfe\xfd", b'{"prompt": "\xff"}', b'{"prompt": NaN}', b'{"prompt": -Infinity}',
    b"[" * 100_000, b'{"a":' * 100_000, b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    b'{"a":' * 70 + b"1" + b"}" * 70, b'{"prompt": "a"} {}',
])  # fmt: skip
def test_what_is_not_json_is_refused(raw):
    with pytest.raises(RequestError, match="not valid JSON|nested more than 64 levels") as caught:
        parse(COMPLETION, raw)
    assert caught.value.status == 400


@pytest.mark.parametrize(("path", "body", "field"), [
    (COMPLETION, [], "the body"),
    (COMPLETION, "text", "the body"),
    (COMPLETION, {}, "prompt"),
    (COMPLETION, {"prompt": None}, "prompt"),
    (COMPLETION, {"prompt": ["a"]}, "prompt"),
    (COMPLETION, {"prompt": "\ud800"}, "prompt"),
    (COMPLETION, {"prompt": "a", "suffix": 1}, "suffix"),
    (COMPLETION, {"prompt": "a", "stream": "yes"}, "stream"),
    (COMPLETION, {"prompt": "a", "model": 5}, "model"),
    (COMPLETION, {"prompt": "a", "max_tokens": 0}, "max_tokens"),
    (COMPLETION, {"prompt": "a", "max_tokens": 51}, "max_tokens"),
    (COMPLETION, {"prompt": "a", "max_tokens": 10**400}, "max_tokens"),
    (COMPLETION, {"prompt": "a", "max_tokens": 1.5}, "max_tokens"),
    (COMPLETION, {"prompt": "a", "max_tokens": True}, "max_tokens"),
    (COMPLETION, {"prompt": "a", "temperature": "hot"}, "temperature"),
    (COMPLETION, {"prompt": "a", "temperature": -1}, "temperature"),
    (COMPLETION, {"prompt": "a", "temperature": 1e-9}, "temperature"),
    (COMPLETION, {"prompt": "a", "temperature": 10**400}, "temperature"),
    (COMPLETION, b'{"prompt": "a", "temperature": 1e999}', "temperature"),
    (COMPLETION, {"prompt": "a", "top_p": 1.1}, "top_p"),
    (COMPLETION, {"prompt": "a", "seed": 2**64}, "seed"),
    (COMPLETION, {"prompt": "a", "seed": "1"}, "seed"),
    (COMPLETION, {"prompt": "a", "frequency_penalty": -1}, "frequency_penalty"),
    (COMPLETION, {"prompt": "a", "stop": 5}, "stop"),
    (COMPLETION, {"prompt": "a", "stop": ""}, "stop"),
    (COMPLETION, {"prompt": "a", "stop": ["a", 5]}, "stop[1]"),
    (COMPLETION, {"prompt": "a", "stop": ["a"] * 5}, "stop"),
    (COMPLETION, {"prompt": "a", "stop": "a" * 101}, "stop"),
    (COMPLETION, {"prompt": "a", "n": 1000}, "n"),
    (COMPLETION, {"prompt": "a", "n": 0}, "n"),
    (COMPLETION, {"prompt": "a", "n": "1"}, "n"),
    (COMPLETION, {"prompt": "a", "best_of": 2}, "best_of"),
    (CHAT, {"messages": [USER], "n": 2}, "n"),
    (COMPLETION, {"prompt": "a", "unknown": {"x": ["\udfff"]}}, "unknown.x[0]"),
    (COMPLETION, {"prompt": "a", "generation_config": {"top_k": 5}}, "generation_config"),
    (COMPLETION, {"prompt": "a", "generation_config": "{"}, "generation_config"),
    (COMPLETION, {"prompt": "a", "generation_config": "[]"}, "generation_config"),
    (COMPLETION, {"prompt": "a", "generation_config": '{"temperature": NaN}'}, "generation_config"),
    (COMPLETION, {"prompt": "a", "generation_config": '{"num_beams": 1000}'}, "generation_config.num_beams"),
    (COMPLETION, {"prompt": "a", "generation_config": '{"max_new_tokens": 51}'}, "generation_config.max_new_tokens"),
    (COMPLETION, {"prompt": "a", "generation_config": '{"num_return_sequences": 9}'},
     "generation_config.num_return_sequences"),
    (COMPLETION, {"prompt": "a", "generation_config": '{"pad_token_id": 64}'}, "generation_config.pad_token_id"),
    (CHAT, {}, "messages"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": {}}, "messages"),
    (CHAT, {"messages": ["a"]}, "messages[0]"),
    (CHAT, {"messages": [USER, {"content": "a"}]}, "messages[1].role"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": ["a"]}]}, "messages[0].content[0]"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
     "messages[0].content[0].type"),
    (CHAT, {"messages": [USER | {"tool_calls": [5]}]}, "messages[0].tool_calls[0]"),
    (CHAT, {"messages": [USER | {"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
     "messages[0].tool_calls[0].function.arguments"),
    (CHAT, {"messages": [USER], "tools": [5]}, "tools[0]"),
    (CHAT, {"messages": [USER], "logit_bias": {}}, "logit_bias"),
    (CHAT, {"messages": [USER], "logit_bias": {"a": 1}}, "logit_bias"),
    (CHAT, {"messages": [USER], "logit_bias": {"64": 1}}, "logit_bias"),
    (CHAT, {"messages": [USER], "logit_bias": {"1": "a"}}, "logit_bias.1"),
    (CHAT, {"messages": [USER], "chat_template_kwargs": []}, "chat_template_kwargs"),
    (CHAT, {"messages": [USER], "chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
    (CHAT, {"messages": [USER], "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    (RESPONSE, {}, "input"),
    (RESPONSE, {"input": 5}, "input"),
    (RESPONSE, {"input": []}, "input"),
    (RESPONSE, {"input": ["a"]}, "input[0]"),
    (RESPONSE, {"input": [CALL]}, "input"),
    (RESPONSE, {"input": [USER, {"type": "input_text", "text": "a"}]}, "input"),
    (RESPONSE, {"input": [USER, CALL | {"arguments": "["}]}, "input[1].arguments"),
    (RESPONSE, {"input": [USER, {"type": "reasoning", "content": "a"}]}, "input[1].content"),
    (RESPONSE, {"input": "a", "instructions": 5}, "instructions"),
    (RESPONSE, {"input": "a", "parallel_tool_calls": "a"}, "parallel_tool_calls"),
])  # fmt: skip
def test_wrong_fields_are_named(path, body, field):
    with pytest.raises(RequestError) as caught:
        parse(path, body)
    assert caught.value.field == field
    assert caught.value.message.startswith(field)
    assert caught.value.status in (400, 422)


@pytest.mark.parametrize(("path", "body", "message"), [
    (COMPLETION, {"prompt": "a", "stop": ["a"] * 6}, "stop has 6 strings, at most 4 are possible"),
    (COMPLETION, {"prompt": "a", "stop": "a" * 101}, "stop has 101 characters, at most 100 are possible"),
    (COMPLETION, {"prompt": "a", "stop": ["a", "b" * 102]}, "stop[1] has 102 characters, at most 100 are possible"),
    (COMPLETION, {"prompt": "a", "stop": []}, "stop is empty"),
    (COMPLETION, {"prompt": "a", "stop": ""}, "stop is empty"),
    (COMPLETION, {"prompt": "a", "generation_config": json.dumps({"stop_strings": ["a"] * 5})},
     "generation_config.stop_strings has 5 strings, at most 4 are possible"),
    (CHAT, {"messages": []}, "messages is empty"),
    (CHAT, {"messages": [{"role": ""}]}, "messages[0].role is empty"),
    (CHAT, {"messages": [USER], "logit_bias": {}}, "logit_bias is empty"),
    (RESPONSE, {"input": []}, "input is empty"),
    (COMPLETION, {"prompt": "a", "n": 10**400},
     "n: must be 1 or absent, because the server returns one text for each request"),
])  # fmt: skip
def test_lengths_and_numbers_of_texts_are_in_plain_words(path, body, message):
    with pytest.raises(RequestError) as caught:
        parse(path, body)
    assert caught.value.message == message
    assert caught.value.status == 422


@pytest.mark.parametrize(("path", "body"), [
    (COMPLETION, {"prompt": "a", "temperature": 0, "top_p": 1, "stop": ["a", "b"], "user": {"any": []}, "n": 1}),
    (CHAT, {"messages": [USER], "n": 1}),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "logit_bias": {"3": -100.0}}),
    (CHAT, {"messages": [USER], "tools": [{"type": "function", "function": {"name": "f", "default": None}}]}),
    (RESPONSE, {"input": [{"type": "input_text", "text": "a"}], "instructions": "b", "max_output_tokens": 50}),
    (RESPONSE, {"input": [USER, {"type": "reasoning"},
                          {"type": "function_call_output", "call_id": "1", "output": ""}]}),
])  # fmt: skip
def test_right_bodies_are_kept(path, body):
    assert parse(path, body) == body
    assert parse(path, body | {"seed": None}) == body


def test_json_in_text_becomes_an_object():
    message = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": null}'}}]}
    parsed = parse(CHAT, {"messages": [message | {"content": None}]})["messages"][0]
    assert parsed["tool_calls"][0]["function"]["arguments"] == {"x": None}
    assert "content" not in parsed


def test_generation_config_of_transformers_is_read():
    from transformers import GenerationConfig

    text = GenerationConfig(do_sample=True, max_new_tokens=5, top_k=3).to_json_string()
    parsed = json.loads(parse(COMPLETION, {"prompt": "a", "generation_config": text})["generation_config"])
    assert parsed.items() >= {"do_sample": True, "max_new_tokens": 5, "top_k": 3}.items()


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    model = make_chat_model(tmp_path_factory.mktemp("chat") / "model")
    app = make_app(model, max_new_tokens=4, max_prompt_tokens=200)
    return TestClient(app, raise_server_exceptions=False)


@pytest.mark.parametrize(("path", "body"), [
    (COMPLETION, {"prompt": "a", "foo": 1}),
    (CHAT, {"messages": [USER], "foo": 1}),
    (RESPONSE, {"input": "a", "foo": 1}),
])  # fmt: skip
def test_unknown_fields_are_refused_in_the_format_of_all_errors(client, path, body):
    answer = client.post(path, json=body)
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error" and "foo" in error["message"]


@pytest.mark.parametrize("path", FIELDS)
def test_random_bodies_never_fail_the_server(client, path):
    dice, statuses = random.Random(f"bodies for {path}"), []
    for _ in range(120):
        raw = random_body(dice, path)
        answer = client.post(path, content=raw, headers={"Content-Type": "application/json"})
        assert answer.status_code in (200, 400, 404, 422), (answer.status_code, raw)
        assert answer.status_code == 200 or answer.json()["error"]["message"]
        assert '"error"' not in answer.text or answer.status_code != 200, (answer.text, raw)
        statuses.append(answer.status_code)
    assert 12 < statuses.count(200) < 108
