"""Writes model cards and reads their provenance."""

import re
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..conversion.report import REPORT_FILE, ConversionReport
from .pipelines import TASK as TEXT2TEXT
from .private_paths import public_name

PROVENANCE = "Provenance"
UNSTATED = "Training text not stated."
WITHOUT_PACKAGE = "Without `dfn-hf`, omit `import dfn_hf` and add `trust_remote_code=True`."
LANGUAGE_MODELS = {"AutoModelForCausalLM": "text-generation", "AutoModelForSeq2SeqLM": "text2text-generation"}


def model_card(
    model: PreTrainedModel, *, name: str, provenance: str, settings: dict[str, Any], validation_loss: float
) -> ModelCard:
    """Build the card of a trained language model.

    Args:
        model: the trained model.
        name: title of the card.
        provenance: one sentence: the training data and the initial model.
        settings: names and values of the training settings.
        validation_loss: validation loss in nats per token.
    """
    text = f"""A `{type(model).__name__}` with {model.num_parameters():,} parameters.

{how_to_load(model.config, name)}

## {PROVENANCE}

{provenance or UNSTATED}
Validation loss {validation_loss:.4f} nats per token.

{options_line(settings)}
"""
    return titled_card(model.config, name, text, task=language_task(model.config))


def conversion_card(config: PreTrainedConfig, report: ConversionReport, *, name: str, source: str) -> ModelCard:
    """Build the card of a converted checkpoint.

    Args:
        config: configuration of the converted model.
        report: report of the conversion.
        name: title of the card.
        source: path or Hub id of the original; the card holds the last component of a local path.
    """
    source = public_name(source)
    lines = "\n".join(f"- {line}" for line in report.lines())
    auto_class = next(one for one, path in config.auto_map.items() if path.endswith(f".{report.model}"))
    text = f"""A `{report.model}` converted from `{source}`.

```python
import dfn_hf
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{name}")
```

{WITHOUT_PACKAGE}

## {PROVENANCE}

Converted from `{source}` (layout {report.layout}). {UNSTATED}

## Conversion

{lines}

`{REPORT_FILE}` lists every weight.
"""
    return titled_card(config, name, text, task=LANGUAGE_MODELS.get(auto_class))


def hub_card(folder: Path, repo_id: str) -> str:
    """Return the text of the card for the Hub: the folder's card, or a new card that shows how to load the model.

    Args:
        folder: a transformers folder; its files do not change.
        repo_id: `owner/name`, which replaces the folder's name in the example.
    """
    readme = folder / "README.md"
    if readme.is_file():
        loaded = rf'(model=|from_pretrained\()"{re.escape(folder.resolve().name)}"'
        return re.sub(loaded, rf'\1"{repo_id}"', readme.read_text(encoding="utf-8"))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    text = f"{how_to_load(config, repo_id)}\n\n## {PROVENANCE}\n\n{UNSTATED}\n"
    return str(titled_card(config, repo_id, text, task=language_task(config)))


def options_line(settings: dict[str, Any]) -> str:
    """The settings of a training run and the versions of the libraries, in the words of a card."""
    options = ", ".join(f"{option} {value:g}" for option, value in settings.items())
    return f"Options: {options}.\nMade with torch {torch.__version__} and transformers {transformers.__version__}."


def titled_card(config: PreTrainedConfig, name: str, text: str, *, task: str | None) -> ModelCard:
    """Build a card from metadata, title and `text`; `task` is the Hub's `pipeline_tag` or None."""
    metadata = ModelCardData(library_name="transformers", pipeline_tag=task, tags=[config.model_type]).to_yaml()
    return ModelCard(f"---\n{metadata}\n---\n\n# {name}\n\n{text}")


def language_task(config: PreTrainedConfig) -> str:
    """The Hub's `pipeline_tag` of a language model."""
    return LANGUAGE_MODELS["AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"]


def how_to_load(config: PreTrainedConfig, name: str) -> str:
    """Markdown with an example that loads the model, and a note for users without this package."""
    is_own_model = config.model_type in ("dfn", "flownetwork", "liquid")
    task, example, without = "text-generation", '"Once", max_new_tokens=60', ""
    imports = "import dfn_hf\n" if is_own_model else ""
    if config.is_encoder_decoder:
        imports = imports or "import dfn_hf  # registers this pipeline\n"
        task, example = TEXT2TEXT, '"In the beginning"'
    elif is_own_model:
        without = f"\n\n{WITHOUT_PACKAGE}"
    return f"""```python
{imports}from transformers import pipeline

pipeline("{task}", model="{name}")({example})
```{without}"""


def read_provenance(readme: Path | None) -> str | None:
    """Return the text under the card's Provenance heading, or None."""
    if readme is None:
        return None
    text = readme.read_text(encoding="utf-8")
    section = re.search(rf"^## {PROVENANCE}\s*\n(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
    return section.group(1).strip() if section else None
