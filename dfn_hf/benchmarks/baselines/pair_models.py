"""Baselines of DFNForContrastive on text pairs: bags of bytes or n-grams, and a Transformer.

They take the same batches and minimise the same loss. Ids are int64 `[batch, length]`.
"""

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from dfn_hf.data.contrastive import Row
from dfn_hf.modeling.dfn.modeling_dfn_contrastive import (
    INITIAL_TEMPERATURE,
    DFNContrastiveOutput,
    capped_scale,
    info_nce,
    masked_mean,
)


class PairModel(nn.Module, ABC):
    """Model of two text views with the outputs of `DFNForContrastive`; a subclass defines the embedding of a text."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(INITIAL_TEMPERATURE)))

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    @abstractmethod
    def embed_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, side: int) -> torch.Tensor:
        """Return embeddings `[batch, projection_dim]`; `side` is 0 for first views and 1 for second views."""

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        pair_input_ids: torch.Tensor,
        pair_attention_mask: torch.Tensor,
        use_cache: bool = False,
    ) -> DFNContrastiveOutput:
        embeds = F.normalize(self.embed_text(input_ids, attention_mask, 0), dim=-1)
        pair_embeds = F.normalize(self.embed_text(pair_input_ids, pair_attention_mask, 1), dim=-1)
        loss = info_nce(embeds, pair_embeds, capped_scale(self.logit_scale))
        return DFNContrastiveOutput(loss=loss, embeds=embeds, pair_embeds=pair_embeds)


class BagPairModel(PairModel):
    """A linear map of log(1 + count) of each id, one map per side.

    Args:
        vocab_size: number of ids.
        projection_dim: width of the embeddings.
    """

    def __init__(self, vocab_size: int, projection_dim: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        projections = [nn.Linear(vocab_size, projection_dim, bias=False) for _ in range(2)]
        for projection in projections:
            nn.init.normal_(projection.weight, std=projection_dim**-0.5)
        self.projections = nn.ModuleList(projections)

    def embed_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, side: int) -> torch.Tensor:
        counts = torch.zeros(len(input_ids), self.vocab_size, device=self.device)
        return self.projections[side](counts.scatter_add(1, input_ids, attention_mask.float()).log1p())


class TransformerPairModel(PairModel):
    """A mean-pooled and projected BERT with a given number of parameters.

    Args:
        parameters: target number of parameters, met to within one unit of `intermediate_size`.
        longest: tokens of the longest text.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        hidden_size: int,
        num_hidden_layers: int,
        num_attention_heads: int,
        projection_dim: int,
        longest: int,
        parameters: int,
    ) -> None:
        super().__init__()

        def tower(intermediate_size: int) -> BertModel:
            config = BertConfig(
                vocab_size=vocab_size,
                hidden_size=hidden_size,
                num_hidden_layers=num_hidden_layers,
                num_attention_heads=num_attention_heads,
                intermediate_size=intermediate_size,
                max_position_embeddings=longest,
                type_vocab_size=1,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                initializer_range=hidden_size**-0.5,
            )
            return BertModel(config, add_pooling_layer=False)

        self.projection = nn.Linear(hidden_size, projection_dim, bias=False)
        minimum, second = (tower(width).num_parameters() for width in (1, 2))
        others = self.projection.weight.numel() + 1
        width = 1 + round((parameters - others - minimum) / (second - minimum))
        if width < 1:
            raise ValueError(
                f"a BERT with hidden_size {hidden_size} has more than {parameters:,} parameters: choose a smaller "
                "hidden_size"
            )
        self.model = tower(width)

    def embed_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, side: int) -> torch.Tensor:
        states = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.projection(masked_mean(states, attention_mask, "attention_mask"))


def ngram_rows(texts: Sequence[bytes], longest: int, buckets: int) -> list[Row]:
    """Return the n-grams of 1 to `longest` bytes of each lower-cased text, hashed into `buckets` ids by CRC-32."""
    rows = []
    for text in texts:
        lower = text.lower()
        grams = (lower[i : i + n] for n in range(1, longest + 1) for i in range(len(lower) - n + 1))
        rows.append({"input_ids": [zlib.crc32(gram) % buckets for gram in grams]})
    return rows
