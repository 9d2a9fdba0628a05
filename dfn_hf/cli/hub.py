"""`dfn-hf info`, `push` and `serve`."""

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from .errors import refuse
from .options import ModelSource
from .paths import check_models
from .rows import echo_rows

ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\s]+")


def info(model: ModelSource) -> None:
    """Print the configuration, parameters, cache size and provenance of a model without loading its weights.

    Example: `dfn-hf info dfn-tiny`
    """
    check_models(model)

    from ..hub.model_info import describe_model

    found = describe_model(model)
    rows = {"path": found.path, "family": found.model_type, "parameters": f"{found.parameters:,}"}
    if found.state_bytes_per_token is not None:
        rows["cache"] = f"{found.state_bytes_per_token:,} bytes per token"
    echo_rows(rows | {field: str(value) for field, value in found.fields.items()})
    if found.provenance is not None:
        typer.echo(f"\n{found.provenance}")


def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a saved model.")],
    repository: Annotated[str, typer.Argument(help="Hub repository, owner/name; created if it does not exist.")],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public. Default: private.")] = False,
) -> None:
    """Upload a saved model with its code, tokenizer and model card to the Hugging Face Hub.

    Other files in FOLDER are not uploaded. A new repository is private. Example: `dfn-hf push my-model me/my-model`
    """
    refuse(not (folder / "config.json").is_file(), f"{folder} holds no config.json: give the folder of a saved model")

    from ..hub.push import push_folder

    typer.echo(f"pushed to {push_folder(folder, repository, private=not public, say=typer.echo)}")


def serve(
    context: typer.Context,
    model: ModelSource,
    max_prompt_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Maximum length of a prompt in tokens.",
            show_default="max_position_embeddings of the model, or 16,384",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum number of tokens generated for one request.")
    ] = 4096,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Maximum size of a request body in bytes.")] = 2**18,
    max_requests: Annotated[
        int,
        typer.Option(min=1, help="Maximum number of requests that run or wait at the same time; more get status 429."),
    ] = 16,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(help="Web pages of this origin may use the server, e.g. https://example.org; may be repeated."),
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    log_level: Annotated[
        Literal["detail", "debug", "info", "warning", "error", "critical"], typer.Option(help="Level of the log.")
    ] = "warning",
) -> None:
    """Serve a causal language model over HTTP with an OpenAI-compatible API.

    Further options are those of `transformers serve`. Example: `dfn-hf serve dfn-tiny --port 8001`
    """
    check_models(model)
    for origin in allow_origin or ():
        refuse(
            ORIGIN.fullmatch(origin) is None,
            f"--allow-origin {origin} is not an origin: give a scheme, a host and a port, such as https://example.org "
            "or http://localhost:3000",
        )

    from ..serving.server import serve as serve_model

    serve_model(
        model,
        ["--port", str(port), "--log-level", log_level, *context.args],
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_new_tokens,
        max_body_bytes=max_body_bytes,
        max_requests=max_requests,
        origins=tuple(allow_origin or ()),
    )
