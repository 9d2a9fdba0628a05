"""Converts a contrastive model to a `SentenceTransformer`; needs the extra `[clients]`."""

from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerBase

from ..modeling.dfn.modeling_dfn_contrastive import DFNForContrastive

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def to_sentence_transformer(model: DFNForContrastive, tokenizer: PreTrainedTokenizerBase) -> "SentenceTransformer":
    """Convert `model` to the modules Transformer, mean Pooling, Dense and Normalize of sentence-transformers.

    A folder from its `save` loads with `SentenceTransformer(folder)` if `dfn_hf` is imported, or with
    `trust_remote_code=True`.

    Args:
        model: model to convert; the weights are copied.
        tokenizer: the model's tokenizer.

    Returns:
        A model whose `encode(texts)` equals the `embeds` of `model` for the same texts.

    Raises:
        ValueError: sentence-transformers is not installed.
    """
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
    except ImportError as error:
        raise ValueError("sentence-transformers is not installed: pip install dfn-hf[clients]") from error
    config = model.config
    with TemporaryDirectory() as folder:
        model.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        transformer = Transformer(folder)
    dense = Dense(
        config.hidden_size, config.projection_dim, bias=False, activation_function=torch.nn.Identity(),
        init_weight=model.projection.weight.detach().clone().float(),
    )  # fmt: skip
    pooling = Pooling(config.hidden_size, pooling_mode="mean")
    return SentenceTransformer(modules=[transformer, pooling, dense, Normalize()], device=str(model.device))
