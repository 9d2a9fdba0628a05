"""Contrastive training: the two views of a row close, those of other rows far.

    rows, held_out = (text_pairs(load_verses(split), tokenizer) for split in ("train", "validation"))
    train_contrastive(DFNForContrastive(config), tokenizer, rows, held_out, "my-embedder")

Rows are made by `views.py`; `retrieval.py` tells how well one view then finds the other.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from accelerate import PartialState
from huggingface_hub import ModelCard
from peft import PeftModel
from torch.utils.data import Sampler
from transformers import AutoConfig, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from ..data.contrastive import ContrastiveCollator, DistinctPairsSampler, Row
from ..hub.model_card import PROVENANCE, UNSTATED, titled_card
from ..modeling.dfn.modeling_dfn_contrastive import DFNForContrastive
from .trainer import MatrixDecayTrainer, TrainingResult, TrainingSettings, train_model


class ContrastiveTrainer(MatrixDecayTrainer):
    """A Trainer whose batches hold each second view once; the loss needs no labels."""

    def __init__(self, args: TrainingArguments, **kwargs: Any) -> None:
        args.label_names = []
        args.dataloader_drop_last = True  # a batch of few rows has few negatives, of one none
        super().__init__(args=args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        return DistinctPairsSampler(
            cast(Any, self.train_dataset), self.args.per_device_train_batch_size, self.args.seed
        )

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler:
        return DistinctPairsSampler(eval_dataset, self.args.per_device_eval_batch_size, self.args.seed)


def train_contrastive(
    model: DFNForContrastive | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: Sequence[Row],
    validation_rows: Sequence[Row],
    output_folder: str | Path,
    settings: TrainingSettings | None = None,
    *,
    provenance: str = "",
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    callbacks: Iterable[TrainerCallback] = (),
) -> TrainingResult:
    """Train `model` so that the views of a row lie close; saved, resumed and logged as by `training.train_model`.

    The other rows of a batch are a row's negatives, those of all processes together. Batches are not accumulated:
    `gradient_accumulation_steps` means several batches, each with negatives of its own.

    Args:
        train_rows, validation_rows: of two views each (`text_pairs`, `pair_views`).

    Returns:
        Its losses are those of batches, in nats per pair: comparable between runs of one `batch_size`.

    Raises:
        ValueError: fewer different second views than a batch holds, or what `train_model` refuses.
    """
    settings = settings or TrainingSettings()
    if settings.batch_size < 2:
        raise ValueError("batch_size is 1 (--batch-size): one pair has no other to be told from, take at least 2")
    for name, rows in (("train", train_rows), ("validate", validation_rows)):
        if len(rows) < settings.batch_size:
            raise ValueError(
                f"there are {len(rows)} pairs to {name} on, fewer than a batch of {settings.batch_size}: lower "
                "batch_size (--batch-size), or give more"
            )
    result = train_model(
        model,
        tokenizer,
        cast(Any, train_rows),
        cast(Any, validation_rows),
        output_folder,
        settings,
        provenance=provenance,
        resume=resume,
        overwrite=overwrite,
        progress=progress,
        callbacks=callbacks,
        data_collator=ContrastiveCollator(tokenizer.pad_token_id),
        make_trainer=ContrastiveTrainer,
    )
    if PartialState().is_main_process:
        embedder_card(result, provenance).save(result.folder / "README.md")
    return result


def embedder_card(result: TrainingResult, provenance: str) -> ModelCard:
    """The card of a freshly trained model that embeds."""
    config = AutoConfig.from_pretrained(result.folder)
    name = result.folder.resolve().name
    fields = ""
    if config.contrastive_fields:
        fields = f"""
Fields over {config.coordinate_dim} axes with {config.value_dim} values a sample are embedded by
`model(coordinates=…, values=…)`; `dfn_hf.data.fields` makes them of images, arrays and sound.
"""
    text = f"""A `DFNForContrastive` that embeds into {config.projection_dim} dimensions.

```python
from transformers import AutoTokenizer
from dfn_hf import DFNForContrastive

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = DFNForContrastive.from_pretrained("{name}")
embeds = model(**tokenizer(["In the beginning", "En el principio"], padding=True, return_tensors="pt")).embeds
```

`dfn_hf.hub.sentence_embeddings.to_sentence_transformer(model, tokenizer)` makes a model of sentence-transformers of it.
{fields}
## {PROVENANCE}

{provenance or UNSTATED}
Validation loss {result.validation_loss:.4f} nats per pair (symmetric InfoNCE over batches).
"""
    return titled_card(config, name, text, task="sentence-similarity")
