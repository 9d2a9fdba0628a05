"""The exception that refuses a request, and one sentence for the problems that pydantic reports about its fields."""

from collections.abc import Mapping, Sequence
from typing import Any

MESSAGES = {
    "missing": "the field is required",
    "model_type": "must be an object",
    "dict_type": "must be an object",
    "list_type": "must be a list",
    "string_type": "must be a string",
    "extra_forbidden": "a request may not set this option",
}


class RequestError(Exception):
    """A request that the server refuses.

    Args:
        message: one sentence for the client.
        field: the field of the body that is wrong, such as `messages[0].content`.
        status: the HTTP status.
        headers: further headers of the response.
    """

    def __init__(
        self,
        message: str,
        field: str | None = None,
        status: int = 422,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.message, self.field, self.status, self.headers = message, field, status, headers


def explain_problems(problems: Sequence[Mapping[str, Any]], data: Any, parent: str) -> RequestError:
    """Describe one field that is wrong.

    Each alternative of a union reports a problem. The alternative that got furthest is the one that was meant.
    """
    ranked = [
        (name.count(".") + name.count("["), not problem["type"].endswith("_type"), name, problem)
        for name, problem in ((field_name(problem, data), problem) for problem in problems)
    ]
    best = max(ranked, key=lambda item: item[:2])
    name = ".".join(filter(None, (parent, best[2]))) or "the body"
    length = describe_length(best[3])
    if length is not None:
        return RequestError(f"{name} {length}", name)
    reasons = [MESSAGES.get(item[3]["type"], item[3]["msg"]) for item in ranked if item[:3] == best[:3]]
    reason = " or ".join(dict.fromkeys(reasons)).replace("Value error, ", "").replace("Input should be", "must be")
    return RequestError(f"{name}: {reason}", name)


def describe_length(problem: Mapping[str, Any]) -> str | None:
    """Describe a text, a list or an object that is too short or too long; None for another problem."""
    if not problem["type"].endswith(("too_short", "too_long")):
        return None
    value, limits = problem["input"], problem["ctx"]
    if not value:
        return "is empty"
    if isinstance(value, str):
        unit = "characters"
    else:
        unit = "strings" if all(isinstance(entry, str) for entry in value) else "entries"
    return f"has {len(value)} {unit}, at most {limits['max_length']} are possible"


def field_name(problem: Mapping[str, Any], data: Any) -> str:
    """Return the path of a field, such as `messages[0].content`, without the names of pydantic's alternatives."""
    name, steps = "", problem["loc"]
    for step in steps:
        missing = step == steps[-1] and problem["type"] == "missing"
        if isinstance(data, list) and isinstance(step, int):
            name, data = f"{name}[{step}]", data[step]
        elif isinstance(data, dict) and (step in data or missing):
            name, data = f"{name}.{step}" if name else str(step), data.get(step)
    return name
