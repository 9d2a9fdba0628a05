"""`transformers serve`, an OpenAI-compatible server, for the model classes of this package."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel
from transformers.utils.import_utils import is_serve_available

from ..loading.model_path import resolve_source
from ..loading.models import check_causal_lm

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from .guard import ServerLimits

CLASSES = ("DFNForCausalLM", "FlowNetworkForCausalLM")
DEFAULT_PROMPT_TOKENS = 16384
UNSUPPORTED = {"--continuous-batching": "the models keep their state in caches of their own"}


def serve(model: str, arguments: Sequence[str] = (), **limits: Any) -> None:
    """Load a causal language model and answer requests for it until the process ends.

    The server looks model classes up by name in `transformers`, and not through auto classes or `auto_map`, so the
    classes of this package are added to that namespace.

    Args:
        model: a folder, a bundled checkpoint or a Hub id. Requests use the printed model name or omit it.
        arguments: options of `transformers serve`, such as `["--port", "8001"]`.
        limits: fields of `ServerLimits`.

    Raises:
        ValueError: the packages of the server are not installed, `model` is not a causal language model, or an option
            is not supported.
    """
    if not is_serve_available():
        raise ValueError("the server needs more packages: pip install 'dfn-hf[serve]'")
    for option, reason in UNSUPPORTED.items():
        if option in arguments:
            raise ValueError(f"{option} is not supported: {reason}")
    check_causal_lm(model)

    from transformers.cli.serving import model_manager
    from transformers.cli.transformers import app

    import dfn_hf

    from .guard import ServerLimits

    for name in CLASSES:
        head: type[PreTrainedModel] = getattr(dfn_hf, name)
        # Not the module in `sys.modules`: importing model code replaces that one (`direct_transformers_import`).
        setattr(model_manager.transformers, name, head)
    path = resolve_source(model)
    print(f"serving {path}: requests use this model name or omit it", flush=True)
    with guarded_server(path, ServerLimits(**limits)):
        app(["serve", path, *arguments], prog_name="dfn-hf")


@contextmanager
def guarded_server(path: str, limits: "ServerLimits") -> Iterator[None]:
    """Put the guard in front of the application that `transformers serve` builds in this context."""
    server: Any = import_module("transformers.cli.serving.server")
    build = server.build_server
    server.build_server = partial(guard, build, path, limits)
    try:
        yield
    finally:
        server.build_server = build


def guard(
    build: Callable[..., Any], path: str, limits: "ServerLimits", model_manager: Any, *args: Any, **options: Any
) -> "ASGIApp":
    """Build the application of `transformers serve` and wrap it.

    Args:
        build: `build_server` of transformers.
        path: the model of the server.
        limits: what the server accepts.
        model_manager: the manager that has loaded the model.
        args: further arguments of `build`.
        options: keyword arguments of `build`.
    """
    from starlette.exceptions import HTTPException
    from starlette.middleware.cors import CORSMiddleware

    from .generation import BoundedGenerateManager, explain_template_errors
    from .guard import Guard, error_response
    from .request_errors import RequestError
    from .requests import Bounds

    use_announced_name(model_manager)
    model, processor = model_manager.load_model_and_processor(path)
    explain_template_errors(processor)
    length = limits.max_prompt_tokens or getattr(model.config, "max_position_embeddings", None)
    bounds = Bounds(length or DEFAULT_PROMPT_TOKENS, limits.max_new_tokens, model.config.vocab_size)
    generation = BoundedGenerateManager(bounds)
    options["generation_state"].get_manager = lambda model_id, use_cb=False: generation
    if options.pop("enable_cors", False):
        limits = replace(limits, origins=("*",))

    app = build(model_manager, *args, **options)

    async def refuse(request: Any, error: Exception) -> Any:
        if isinstance(error, HTTPException):
            error = RequestError(str(error.detail), status=error.status_code, headers=error.headers)
        return error_response(error if isinstance(error, RequestError) else RequestError(str(error)))

    app.add_exception_handler(HTTPException, refuse)
    app.add_exception_handler(RequestError, refuse)
    app.add_exception_handler(ValueError, refuse)
    guarded: ASGIApp = Guard(app, path, limits, bounds)
    if limits.origins:
        guarded = CORSMiddleware(guarded, allow_origins=limits.origins, allow_methods=["*"], allow_headers=["*"])
    return guarded


def use_announced_name(model_manager: Any) -> None:
    """Let responses name the model as requests do: `transformers serve` adds `@main` to the name."""
    add_revision, load = model_manager.process_model_name, model_manager.load_model_and_processor
    model_manager.process_model_name = str
    model_manager.load_model_and_processor = lambda name, **options: load(add_revision(name), **options)
