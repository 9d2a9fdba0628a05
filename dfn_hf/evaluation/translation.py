"""Translates with an encoder-decoder and scores translations.

Example:
    ```python
    translate(model, tokenizer, ["In the beginning"])
    ```
"""

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.tokens import encode_texts
from .language_model import check_vocabulary


def translate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    num_beams: int = 4,
    max_new_tokens: int = 128,
    batch_size: int = 32,
) -> list[str]:
    """Translate texts with beam search.

    Args:
        model: an encoder-decoder; it is set to evaluation mode.
        tokenizer: the model's tokenizer.
        texts: texts to translate.
        num_beams: beams of the search; 1 means greedy decoding.
        max_new_tokens: maximum number of tokens of a translation.
        batch_size: texts per batch; texts of similar length share a batch.

    Returns:
        One translation per text, in the order of `texts`.

    Raises:
        ValueError: a text is blank, has no tokens or cannot be encoded, or the tokenizer has ids outside the model's
            vocabulary.
    """
    if any(not text.strip() for text in texts):
        raise ValueError("a text is blank: remove it")
    check_vocabulary(model, tokenizer)
    for text, ids in zip(texts, encode_texts(texts, tokenizer)["input_ids"], strict=True):
        if not ids:
            raise ValueError(f"the text {reprlib.repr(text)} has no tokens: remove it, or use another tokenizer")
    model.eval()
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    outputs = [""] * len(texts)
    for start in range(0, len(texts), batch_size):
        numbers = order[start : start + batch_size]
        batch = encode_texts([texts[number] for number in numbers], tokenizer, padding=True, return_tensors="pt")
        batch = batch.to(model.device)
        with torch.no_grad():
            generated = cast(Any, model).generate(
                **batch, num_beams=num_beams, do_sample=False, max_new_tokens=max_new_tokens
            )
        for number, text in zip(numbers, tokenizer.batch_decode(generated, skip_special_tokens=True), strict=True):
            outputs[number] = text
    return outputs


def shuffle_sources(sources: Sequence[str]) -> list[str]:
    """Rotate the sources by half their number, so that no source keeps its target."""
    half = len(sources) // 2
    return [*sources[half:], *sources[:half]]


@dataclass(frozen=True)
class TranslationScores:
    """Corpus scores of translations with one reference each, from 0 to 100, with sacrebleu's defaults.

    Attributes:
        chrf: character n-gram F-score (chrF).
        bleu: BLEU with 13a tokenization.
    """

    chrf: float
    bleu: float


def score_translations(translations: Sequence[str], references: Sequence[str]) -> TranslationScores:
    """Compute chrF and BLEU of `translations`."""
    from sacrebleu.metrics import BLEU, CHRF

    return TranslationScores(
        chrf=CHRF().corpus_score(translations, [references]).score,
        bleu=BLEU().corpus_score(translations, [references]).score,
    )
