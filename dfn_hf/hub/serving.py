"""`transformers serve`, an OpenAI-compatible server, for the model classes of this package."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_serve_available

from .loading import check_kind
from .model_path import resolve_source

CLASSES = ("DFNForCausalLM", "FlowNetworkForCausalLM")


def serve(model: str, arguments: Sequence[str] = ()) -> None:
    """Load a causal language model and answer requests for it until the process ends.

    The server looks model classes up by name in `transformers`, and not through auto classes or `auto_map`, so the
    classes of this package are added to that namespace.

    Args:
        model: a folder, a bundled checkpoint or a Hub id. Requests use the printed name, or no model name.
        arguments: options of `transformers serve`, such as `["--port", "8001"]`.

    Raises:
        ValueError: the packages of the server are not installed, or `model` is not a causal language model.
    """
    if not is_serve_available():
        raise ValueError("the server needs more packages: pip install 'dfn-hf[serve]'")
    check_kind(model, encoder_decoder=False)

    # Imported here: importing model code replaces the module `transformers` once (`direct_transformers_import`).
    import transformers
    from transformers.cli.transformers import app

    import dfn_hf

    for name in CLASSES:
        head: type[PreTrainedModel] = getattr(dfn_hf, name)
        setattr(transformers, name, head)
    path = resolve_source(model)
    print(f"serving {path}: requests use this model name, or none", flush=True)
    Path(constants.HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)  # `GET /v1/models` fails if it does not exist
    app(["serve", path, *arguments], prog_name="dfn-hf")
