"""Model cards: what a saved folder says about its model, and what is read from it again."""

import re
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel

from .text2text_pipeline import TASK as TEXT2TEXT

PROVENANCE = "Provenance"


def model_card(
    model: PreTrainedModel, *, name: str, provenance: str, settings: dict[str, Any], validation_loss: float
) -> ModelCard:
    """The card of a freshly trained language model.

    Args:
        model: the trained model.
        name: its title.
        provenance: one sentence: which text, and which model it started from.
        settings: option names and values of the training run.
        validation_loss: in nats per token.
    """
    task = "text2text-generation" if model.config.is_encoder_decoder else "text-generation"
    metadata = ModelCardData(library_name="transformers", pipeline_tag=task, tags=[model.config.model_type]).to_yaml()
    options = ", ".join(f"{option} {value:g}" for option, value in settings.items())
    example = '"Once", max_new_tokens=60'
    imports = "import dfn_hf\n" if model.config.model_type in ("dfn", "flownetwork", "liquid") else ""
    if model.config.is_encoder_decoder:
        imports = imports or "import dfn_hf  # brings this pipeline\n"
        task, example = TEXT2TEXT, '"In the beginning"'
    content = f"""---
{metadata}
---

# {name}

A `{type(model).__name__}` of {model.num_parameters():,} parameters.

```python
{imports}from transformers import pipeline

pipeline("{task}", model="{name}")({example})
```

## {PROVENANCE}

{provenance or "Training text not stated."}
Validation loss {validation_loss:.4f} nats per token.

Options: {options}.
Made with torch {torch.__version__} and transformers {transformers.__version__}.
"""
    return ModelCard(content)


def read_provenance(readme: Path | None) -> str | None:
    """The text under the card's Provenance heading, or None where there is none."""
    if readme is None:
        return None
    section = re.search(rf"^## {PROVENANCE}\s*\n(.*?)(?=^#|\Z)", readme.read_text(), re.MULTILINE | re.DOTALL)
    return section.group(1).strip() if section else None
