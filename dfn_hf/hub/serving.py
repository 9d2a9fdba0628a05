"""`transformers serve`, an OpenAI-compatible server, for models whose classes are this package's."""

from collections.abc import Sequence
from pathlib import Path

import transformers
from huggingface_hub import constants
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_serve_available

from .loading import check_kind, resolve_source

CLASSES = ("DFNForCausalLM", "FlowNetworkForCausalLM")


def serve(model: str, arguments: Sequence[str] = ()) -> None:
    """Load a causal language model and answer requests for it until the process is ended.

    The server looks classes up by name in `transformers` and reads neither an auto class nor `auto_map`, so it is
    given ours there.

    Args:
        model: a folder, an embedded checkpoint or a Hub id. Requests name what is printed, or no model.
        arguments: options of `transformers serve`, such as `["--port", "8001"]`.

    Raises:
        ValueError: what a server needs is not installed, or `model` is not a causal language model.
    """
    if not is_serve_available():
        raise ValueError("a server needs more packages: pip install 'transformers[serving]'")
    check_kind(model, encoder_decoder=False)

    from transformers.cli.transformers import app

    import dfn_hf

    for name in CLASSES:
        head: type[PreTrainedModel] = getattr(dfn_hf, name)
        setattr(transformers, name, head)
    path = resolve_source(model)
    print(f"serving {path}: requests name that, or no model", flush=True)
    Path(constants.HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)  # `GET /v1/models` fails where it is not there
    app(["serve", path, *arguments], prog_name="dfn-hf")
