"""Contrastive training of `DFNForContrastive` with a symmetric InfoNCE loss over pairs of views.

`dfn_hf.data.contrastive` makes the rows; `dfn_hf.evaluation.retrieval_metrics` measures recall.

Example:
    ```python
    rows, held_out = (text_pairs(load_verses(split), tokenizer) for split in ("train", "validation"))
    train_contrastive(DFNForContrastive(config), tokenizer, rows, held_out, "my-embedder")
    ```
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from huggingface_hub import ModelCard
from peft import PeftModel
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from ..data.contrastive import ContrastiveCollator, DistinctPairsSampler, Row
from ..hub.model_card import PROVENANCE, UNSTATED, options_line, titled_card
from ..modeling.dfn.modeling_dfn_contrastive import DFNForContrastive
from .run import TrainingResult
from .settings import TrainingSettings
from .trainer import MatrixDecayTrainer, train_model


class ContrastiveTrainer(MatrixDecayTrainer):
    """A Trainer whose batches contain no second view twice, and whose loss needs no labels."""

    def __init__(self, args: TrainingArguments, **kwargs: Any) -> None:
        args.label_names = []
        args.dataloader_drop_last = True  # a smaller batch would have fewer negatives
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
    """Train `model` to give the two views of a row similar embeddings.

    The negatives of a row are the other rows of its batch on all processes. Gradient accumulation does not add
    negatives: each forward pass has its own. Checkpoints, resuming and logs are those of `train_model`.

    Args:
        model: model to train, with or without adapters.
        tokenizer: tokenizer of the model; its pad token pads texts.
        train_rows, validation_rows: rows of two views (`text_pairs`, `pair_views`).
        output_folder, settings, provenance, resume, overwrite, progress, callbacks: see `train_model`.

    Returns:
        The result, with losses in nats per pair. They depend on `batch_size`, the number of candidates.

    Raises:
        ValueError: `batch_size` is 1, or exceeds the number of rows or of distinct second views; or `train_model`
            raises it.
    """
    settings = settings or TrainingSettings()
    if settings.batch_size < 2:
        raise ValueError(
            "batch_size is 1 but contrastive training needs at least 2 pairs per batch: increase it (--batch-size)"
        )
    for name, rows in (("train", train_rows), ("validate", validation_rows)):
        if len(rows) < settings.batch_size:
            raise ValueError(
                f"there are {len(rows)} pairs to {name} on but batch_size is {settings.batch_size}: lower batch_size "
                "(--batch-size), or give more pairs"
            )
    return train_model(
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
        make_card=embedder_card,
    )


def embedder_card(
    model: PreTrainedModel, *, name: str, provenance: str, settings: dict[str, Any], validation_loss: float
) -> ModelCard:
    """Model card of a trained embedding model; for the arguments see `model_card`."""
    config = model.config
    fields = ""
    if config.contrastive_fields:
        fields = f"""
`model(coordinates=..., values=...)` embeds fields over {config.coordinate_dim} axes with {config.value_dim} values per
sample. `dfn_hf.data.fields` converts images, arrays and sound to fields.
"""
    text = f"""A `DFNForContrastive` with embeddings of {config.projection_dim} dimensions.

```python
from transformers import AutoTokenizer
from dfn_hf import DFNForContrastive

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = DFNForContrastive.from_pretrained("{name}")
embeds = model(**tokenizer(["In the beginning", "En el principio"], padding=True, return_tensors="pt")).embeds
```

`dfn_hf.hub.sentence_embeddings.to_sentence_transformer(model, tokenizer)` converts it to a `SentenceTransformer`.
{fields}
## {PROVENANCE}

{provenance or UNSTATED}
Validation loss {validation_loss:.4f} nats per pair (symmetric InfoNCE over batches).

{options_line(settings)}
"""
    return titled_card(config, name, text, task="sentence-similarity")
