"""Model cards: what a saved folder says about its model, and what is read from it again."""

import re
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..conversion.report import REPORT_FILE, ConversionReport
from .pipelines import TASK as TEXT2TEXT

PROVENANCE = "Provenance"
UNSTATED = "Training text not stated."
WITHOUT_PACKAGE = "Without `dfn-hf`: leave out its line and add `trust_remote_code=True`."
LANGUAGE_MODELS = {"AutoModelForCausalLM": "text-generation", "AutoModelForSeq2SeqLM": "text2text-generation"}


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
    options = ", ".join(f"{option} {value:g}" for option, value in settings.items())
    text = f"""A `{type(model).__name__}` of {model.num_parameters():,} parameters.

{how_to_load(model.config, name)}

## {PROVENANCE}

{provenance or UNSTATED}
Validation loss {validation_loss:.4f} nats per token.

Options: {options}.
Made with torch {torch.__version__} and transformers {transformers.__version__}.
"""
    return titled_card(model.config, name, text, task=language_task(model.config))


def conversion_card(config: PreTrainedConfig, report: ConversionReport, *, name: str, source: str) -> ModelCard:
    """The card of a converted checkpoint: what it is and is not.

    Args:
        config: of the converted model.
        report: of the conversion.
        name: its title.
        source: what was converted.
    """
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

`{REPORT_FILE}` names every weight.
"""
    return titled_card(config, name, text, task=LANGUAGE_MODELS.get(auto_class))


def hub_card(folder: Path, repo_id: str) -> str:
    """The text of a saved model's card under its name on the Hub: the folder's own, or one that says how to load it.

    Args:
        folder: a transformers folder; its card stays as it is.
        repo_id: `owner/name`, which takes the place of the folder's name in the example.
    """
    readme = folder / "README.md"
    if readme.is_file():
        loaded = rf'(model=|from_pretrained\()"{re.escape(folder.resolve().name)}"'
        return re.sub(loaded, rf'\1"{repo_id}"', readme.read_text())
    config = AutoConfig.from_pretrained(folder)
    text = f"{how_to_load(config, repo_id)}\n\n## {PROVENANCE}\n\n{UNSTATED}\n"
    return str(titled_card(config, repo_id, text, task=language_task(config)))


def titled_card(config: PreTrainedConfig, name: str, text: str, *, task: str | None) -> ModelCard:
    """`text` below what the Hub reads of a card and a title; `task` is the Hub's word, None for what has none."""
    metadata = ModelCardData(library_name="transformers", pipeline_tag=task, tags=[config.model_type]).to_yaml()
    return ModelCard(f"---\n{metadata}\n---\n\n# {name}\n\n{text}")


def language_task(config: PreTrainedConfig) -> str:
    """The Hub's word for what a language model does."""
    return LANGUAGE_MODELS["AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"]


def how_to_load(config: PreTrainedConfig, name: str) -> str:
    """A few lines of Python, and what to do where this package is not installed."""
    ours = config.model_type in ("dfn", "flownetwork", "liquid")
    task, example, without = "text-generation", '"Once", max_new_tokens=60', ""
    imports = "import dfn_hf\n" if ours else ""
    if config.is_encoder_decoder:
        imports = imports or "import dfn_hf  # brings this pipeline\n"
        task, example = TEXT2TEXT, '"In the beginning"'
    elif ours:
        without = f"\n\n{WITHOUT_PACKAGE}"
    return f"""```python
{imports}from transformers import pipeline

pipeline("{task}", model="{name}")({example})
```{without}"""


def read_provenance(readme: Path | None) -> str | None:
    """The text under the card's Provenance heading, or None where there is none."""
    if readme is None:
        return None
    section = re.search(rf"^## {PROVENANCE}\s*\n(.*?)(?=^#|\Z)", readme.read_text(), re.MULTILINE | re.DOTALL)
    return section.group(1).strip() if section else None
