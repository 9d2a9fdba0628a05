"""Translation with an encoder-decoder, and its scores.

Example:
    ```python
    translate(model, tokenizer, ["In the beginning"])
    ```
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def translate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    num_beams: int = 4,
    max_new_tokens: int = 128,
    batch_size: int = 32,
) -> list[str]:
    """What an encoder-decoder makes of each text.

    Args:
        model: its device is kept; it is put into evaluation mode.
        tokenizer: the model's.
        num_beams: 1 takes the most probable token each time.
        max_new_tokens: tokens of a target, at most.
        batch_size: texts at a time; those of like length stand together.

    Raises:
        ValueError: a text is blank.
    """
    if any(not text.strip() for text in texts):
        raise ValueError("a text is blank: there is nothing to translate")
    model.eval()
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    outputs = [""] * len(texts)
    for start in range(0, len(texts), batch_size):
        numbers = order[start : start + batch_size]
        batch = tokenizer([texts[number] for number in numbers], padding=True, return_tensors="pt").to(model.device)
        with torch.no_grad():
            generated = cast(Any, model).generate(
                **batch, num_beams=num_beams, do_sample=False, max_new_tokens=max_new_tokens
            )
        for number, text in zip(numbers, tokenizer.batch_decode(generated, skip_special_tokens=True), strict=True):
            outputs[number] = text
    return outputs


def shuffle_sources(sources: Sequence[str]) -> list[str]:
    """Each source in the place of another: half a turn, so that none keeps its own and books change."""
    half = len(sources) // 2
    return [*sources[half:], *sources[:half]]


@dataclass(frozen=True)
class TranslationScores:
    """Of a set of translations against one reference each, both from 0 to 100 (sacrebleu's defaults).

    Attributes:
        chrf: character n-gram F-score.
        bleu: of words, 13a tokenisation.
    """

    chrf: float
    bleu: float


def score_translations(translations: Sequence[str], references: Sequence[str]) -> TranslationScores:
    """chrF and BLEU of `translations`."""
    from sacrebleu.metrics import BLEU, CHRF

    return TranslationScores(
        chrf=CHRF().corpus_score(translations, [references]).score,
        bleu=BLEU().corpus_score(translations, [references]).score,
    )
