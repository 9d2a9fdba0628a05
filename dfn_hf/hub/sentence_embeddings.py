"""The text tower of a contrastive model as a model of sentence-transformers, which is installed by `[clients]`."""

from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerBase

from ..modeling.dfn.modeling_dfn_contrastive import DFNForContrastive

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def to_sentence_transformer(model: DFNForContrastive, tokenizer: PreTrainedTokenizerBase) -> "SentenceTransformer":
    """`model` on texts as sentence-transformers' own modules: transformer, mean, dense and unit length.

    Its `save(folder)` writes what `SentenceTransformer(folder)` loads, wherever `dfn_hf` is imported or
    `trust_remote_code=True` is given.

    Args:
        model: its weights are copied.
        tokenizer: the model's.

    Returns:
        A model whose `encode(texts)` are the `embeds` of `model` for the same texts.

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
