"""Request bodies of the server: strict JSON, and types and bounds of the fields that `transformers serve` reads.

Fields that no schema names are passed on: `transformers serve` ignores some and refuses the others. A null counts as
an absent field.
"""

import inspect
import json
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from ..data.tokens import is_unicode
from .request_errors import RequestError, explain_problems

MAX_DEPTH = 64
MAX_NAME = 200  # longest name of a field in a message
TOO_DEEP = f"nested more than {MAX_DEPTH} levels deep"
MAX_ID = 2**63 - 1
TEXT_PARTS = Literal["text", "input_text", "output_text"]
# Names that `chat_template_kwargs` may not set: a request could otherwise replace the template itself.
RESERVED_TEMPLATE_NAMES = {
    "messages",
    "load_audio_from_video",
    *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters,
    *inspect.signature(render_jinja_template).parameters,
}


@dataclass(frozen=True)
class Bounds:
    """Upper bounds of what one request may ask for.

    Args:
        prompt_tokens: length of the prompt in tokens.
        new_tokens: number of generated tokens.
        vocab_size: size of the model's vocabulary.
    """

    prompt_tokens: int
    new_tokens: int
    vocab_size: int


def parse_body(path: str, raw: bytes, bounds: Bounds) -> dict[str, Any]:
    """Return the checked fields of a request body.

    Args:
        path: the route, a key of `SCHEMAS`.
        raw: the body as it was sent.
        bounds: upper bounds of numbers of tokens and token ids.

    Raises:
        RequestError: the body is not JSON (400), or a field has a wrong type or value (422).
    """
    return check_fields(SCHEMAS[path], parse_json(raw), bounds)


def parse_json(raw: bytes | str, field: str = "") -> Any:
    """Parse strict JSON: finite numbers, Unicode text without lone surrogates, nested at most `MAX_DEPTH` deep.

    Args:
        raw: the JSON.
        field: the field that holds it; empty for the body itself.

    Raises:
        RequestError: `raw` is not such JSON.
    """
    try:
        value = json.loads(raw, parse_constant=refuse_constant)
    except RecursionError:
        raise RequestError(f"{field or 'the body'} is {TOO_DEEP}", field or None, 400) from None
    except ValueError as error:
        reason = str(error).split(";")[0]
        raise RequestError(f"{field or 'the body'} is not valid JSON: {reason}", field or None, 400) from None
    fault = find_fault(value)
    if fault is not None:
        path, reason = fault
        name = (field + path).removeprefix(".")[:MAX_NAME] or "the body"
        raise RequestError(f"{name} is {reason}", name, 400)
    return value


def refuse_constant(name: str) -> None:
    """Raise ValueError: JSON has no NaN and no Infinity."""
    raise ValueError(f"{name} is not a number in JSON")


def find_fault(value: Any, depth: int = 0) -> tuple[str, str] | None:
    """Return the path and the description of a member that is nested too deep, or no finite number or Unicode text."""
    if depth > MAX_DEPTH:
        return "", TOO_DEEP
    if isinstance(value, float) and not math.isfinite(value):
        return "", "a number that is too large"
    if isinstance(value, str) and not is_unicode(value):
        return "", "a text with a lone surrogate, which is not a character"
    if isinstance(value, dict):
        if not all(map(is_unicode, value)):
            return "", "an object with a name that holds a lone surrogate, which is not a character"
        members = ((f".{name}", member) for name, member in value.items())
    elif isinstance(value, list):
        members = ((f"[{index}]", member) for index, member in enumerate(value))
    else:
        return None
    for step, member in members:
        fault = find_fault(member, depth + 1)
        if fault is not None:
            return step + fault[0], fault[1]
    return None


def check_fields(schema: type[BaseModel], data: Any, bounds: Bounds, parent: str = "") -> dict[str, Any]:
    """Return `data` with the fields of `schema` checked.

    Args:
        schema: the fields.
        data: what they are read from.
        bounds: upper bounds of numbers of tokens and token ids.
        parent: the field that holds `data`; empty for the body itself.

    Raises:
        RequestError: a field has a wrong type or value; the message names it.
    """
    try:
        checked = schema.model_validate(data, context=bounds)
    except ValidationError as error:
        raise explain_problems(error.errors(include_url=False), data, parent) from None
    return checked.model_dump(exclude_unset=True, warnings=False)


def bounds_of(info: ValidationInfo) -> Bounds:
    return cast(Bounds, info.context)


def check_new_tokens(value: int, info: ValidationInfo) -> int:
    most = bounds_of(info).new_tokens
    if value > most:
        raise ValueError(
            f"{value} is more than the {most} tokens that this server generates for one request (--max-new-tokens)"
        )
    return value


def check_choices(value: int) -> int:
    if value != 1:
        raise ValueError("must be 1 or absent, because the server returns one text for each request")
    return value


def check_token(value: int, info: ValidationInfo) -> int:
    size = bounds_of(info).vocab_size
    if value >= size:
        raise ValueError(f"{value} is not a token of this model, which has {size}")
    return value


def check_bias(biases: dict[str, float], info: ValidationInfo) -> dict[str, float]:
    for name in biases:
        if not (name.isdecimal() and name.isascii() and len(name) < 20):
            raise ValueError(f"{name[:40]!r} is not a token id")
        check_token(int(name), info)
    return biases


def check_temperature(value: float) -> float:
    if 0 < value < 0.01:
        raise ValueError(f"{value} is too close to 0: use 0 for greedy decoding")
    return value


def check_template_options(options: dict[str, Any]) -> dict[str, Any]:
    reserved = sorted(RESERVED_TEMPLATE_NAMES & options.keys())
    if reserved:
        raise ValueError(f"a request may not set {reserved[0]}")
    return options


def parse_arguments(arguments: Any) -> Any:
    """Return the arguments of a tool call as an object; they may be JSON."""
    if not isinstance(arguments, str):
        return arguments
    try:
        return parse_json(arguments, "the text")
    except RequestError as error:
        raise ValueError(error.message) from None


def check_generation_config(text: str, info: ValidationInfo) -> str:
    """Return the JSON of the checked options of a generation configuration."""
    options = parse_json(text, "generation_config")
    return json.dumps(check_fields(GenerationOptions, options, bounds_of(info), "generation_config"))


NewTokens = Annotated[int, Field(ge=1), AfterValidator(check_new_tokens)]
Choices = Annotated[int, AfterValidator(check_choices)]
Token = Annotated[int, Field(ge=0), AfterValidator(check_token)]
Temperature = Annotated[float, Field(ge=0, le=100), AfterValidator(check_temperature)]
Share = Annotated[float, Field(ge=0, le=1)]
StopString = Annotated[str, Field(min_length=1, max_length=100)]
StopStrings = StopString | Annotated[list[StopString], Field(min_length=1, max_length=4)]
Arguments = Annotated[dict[str, Any], BeforeValidator(parse_arguments)]


class Schema(BaseModel):
    """Fields with strict types; other fields are kept and null counts as absent."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def drop_nulls(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class GenerationOptions(Schema):
    """The options of `GenerationConfig` that a request may set; other options could exhaust the memory."""

    model_config = ConfigDict(extra="forbid")

    transformers_version: str | None = None  # `GenerationConfig.to_json_string` writes it
    max_new_tokens: NewTokens | None = None
    min_new_tokens: NewTokens | None = None
    max_time: Annotated[float, Field(gt=0, le=1e9)] | None = None
    stop_strings: StopStrings | None = None
    do_sample: bool | None = None
    temperature: Temperature | None = None
    top_k: Annotated[int, Field(ge=0, le=MAX_ID)] | None = None
    top_p: Share | None = None
    min_p: Share | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    epsilon_cutoff: Annotated[float, Field(ge=0, lt=1)] | None = None
    eta_cutoff: Annotated[float, Field(ge=0, lt=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    no_repeat_ngram_size: Annotated[int, Field(ge=0, le=1000)] | None = None
    num_beams: Annotated[int, Field(ge=1, le=8)] | None = None
    length_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    early_stopping: bool | Literal["never"] | None = None
    bos_token_id: Token | None = None
    eos_token_id: Token | list[Token] | None = None
    pad_token_id: Token | None = None


class Request(Schema):
    """Fields that all routes read."""

    model: str | None = None
    stream: bool | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    seed: Annotated[int, Field(ge=-MAX_ID, le=MAX_ID)] | None = None
    generation_config: Annotated[str, AfterValidator(check_generation_config)] | None = None
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(check_template_options)] | None = None


class CompletionRequest(Request):
    prompt: str
    suffix: str | None = None
    n: Choices | None = None
    best_of: Choices | None = None
    max_tokens: NewTokens | None = None
    # transformers adds 1 and uses the sum as repetition penalty, which is positive.
    frequency_penalty: Annotated[float, Field(gt=-0.99, le=2)] | None = None
    stop: StopStrings | None = None


class Part(Schema):
    type: TEXT_PARTS
    text: str


class Function(Schema):
    name: str
    arguments: Arguments


class ToolCall(Schema):
    function: Function


class Message(Schema):
    role: Annotated[str, Field(min_length=1)]
    content: str | list[Part] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class ChatRequest(Request):
    messages: Annotated[list[Message], Field(min_length=1)]
    tools: list[dict[str, Any]] | None = None
    n: Choices | None = None
    max_tokens: NewTokens | None = None
    max_completion_tokens: NewTokens | None = None
    frequency_penalty: Annotated[float, Field(gt=-0.99, le=2)] | None = None
    logit_bias: (
        Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(min_length=1), AfterValidator(check_bias)]
        | None
    ) = None
    stop: StopStrings | None = None


class ReasoningText(Schema):
    text: str


class Reasoning(Schema):
    content: list[ReasoningText] | None = None


class FunctionCall(Schema):
    call_id: str
    name: str
    arguments: Arguments


class FunctionOutput(Schema):
    call_id: str
    output: str | list[Part]


ITEMS = {"reasoning": "reasoning", "function_call": "call", "function_call_output": "output"}


def item_tag(item: Any) -> str:
    """Name the kind of an input item by the rule of `transformers serve`."""
    kind = item.get("type") if isinstance(item, dict) else None
    if kind == "reasoning" or (isinstance(item, dict) and "role" not in item):
        return ITEMS.get(kind, "part") if isinstance(kind, str) else "part"
    return "message"


Item = Annotated[
    Annotated[Message, Tag("message")]
    | Annotated[Part, Tag("part")]
    | Annotated[Reasoning, Tag("reasoning")]
    | Annotated[FunctionCall, Tag("call")]
    | Annotated[FunctionOutput, Tag("output")],
    Discriminator(item_tag),
]


def check_items(items: Any) -> Any:
    """Raise ValueError unless parts of one message and items of a conversation are kept apart."""
    if isinstance(items, list) and all(isinstance(item, dict) for item in items):
        parts = [item_tag(item) == "part" for item in items]
        if any(parts) and not all(parts):
            raise ValueError(f"item {parts.index(True)} has neither a role nor the type of an item")
        if items and not any(parts) and "role" not in items[0]:
            raise ValueError("the first item of a conversation must have a role")
    return items


class ResponseRequest(Request):
    input: str | Annotated[list[Item], Field(min_length=1), BeforeValidator(check_items)]
    instructions: str | None = None
    tools: list[dict[str, Any]] | None = None
    max_output_tokens: NewTokens | None = None
    parallel_tool_calls: bool | None = None


SCHEMAS: dict[str, type[Request]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/responses": ResponseRequest,
}
