"""English-Spanish translation of the bundled verses: Liquid, its ablations, and a T5 of equal size."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import BatchSampler
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, set_seed
from transformers.trainer_pt_utils import LengthGroupedSampler

from dfn_hf.assets.tokenizers import load_tokenizer
from dfn_hf.assets.verses import load_verses
from dfn_hf.data.pairs import SIDES, training_pairs
from dfn_hf.evaluation.translation import score_translations, shuffle_sources, translate
from dfn_hf.seq2seq_presets import new_seq2seq_lm

from ..baselines.ablated_liquid import remove_frequency_attention
from ..harness.environment import describe_machine
from ..harness.lr_search import SEARCH_SEED
from ..harness.results import ResultsFile, markdown_table, mean_with_error
from ..harness.training_loop import fit

TOKENIZER = "bpe-en-es"
NO_FREQUENCY_ATTENTION = "no frequency attention"
VARIANTS: dict[str, dict[str, Any]] = {
    "liquid": {},
    NO_FREQUENCY_ATTENTION: {},
    "no offsets": {"max_offset": 0},
    "1 expert": {"num_experts": 1},
    "no LSTM": {"lstm_hidden_size": 0},
    "no compression": {"min_compression_ratio": 1},
}


@dataclass(frozen=True)
class TranslationSettings:
    """One training run.

    Attributes:
        model: "t5" or a key of `VARIANTS`.
        pairs: number of pairs of each split; None for all.
        scored: whether the test split is translated and scored.
    """

    model: str = "liquid"
    seed: int = 0
    learning_rate: float = 2e-3
    steps: int = 10000
    batch_size: int = 32
    max_length: int = 80
    size: str = "tiny"
    pairs: int | None = None
    scored: bool = True
    device: str = "cpu"


@dataclass(frozen=True)
class TranslationResult:
    """Validation loss in nats per token; chrF and BLEU on the test split, and chrF with shuffled sources."""

    parameters: int
    loss: float
    chrf: float | None
    bleu: float | None
    shuffled_chrf: float | None
    training_seconds: float
    machine: str


def measure_translation(
    settings: TranslationSettings, report: Callable[[str], None] = lambda line: None
) -> TranslationResult:
    """Train a model, evaluate its validation loss and, if `settings.scored`, translate the test split.

    Raises:
        ValueError: the model is unknown.
    """
    if settings.model != "t5" and settings.model not in VARIANTS:
        raise ValueError(f"model is {settings.model!r}: choose one of t5, {', '.join(VARIANTS)}")
    set_seed(settings.seed)
    tokenizer = load_tokenizer(TOKENIZER)
    model = new_seq2seq_lm(
        tokenizer,
        architecture="t5" if settings.model == "t5" else "liquid",
        size=settings.size,
        seed=settings.seed,
        **VARIANTS.get(settings.model, {}),
    )
    if settings.model == NO_FREQUENCY_ATTENTION:
        remove_frequency_attention(model)
    model = torch.nn.Module.to(model, settings.device)
    train, validation = encoded(settings.max_length, settings.pairs)
    collate = DataCollatorForSeq2Seq(tokenizer, model)

    def announce(step: int) -> None:
        report(f"{settings.model}, learning rate {settings.learning_rate:g}, seed {settings.seed}: step {step}")

    trained = fit(
        model,
        random_batches(train, settings.batch_size, settings.seed, collate),
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        evaluate=announce,
    )
    chrf = bleu = shuffled = None
    if settings.scored:
        test = first_pairs("test", settings.pairs)
        sources, references = list(test["source"]), list(test["target"])
        scores = score_translations(translate(model, tokenizer, sources), references)
        chrf, bleu = scores.chrf, scores.bleu
        shuffled = score_translations(translate(model, tokenizer, shuffle_sources(sources)), references).chrf
    return TranslationResult(
        parameters=model.num_parameters(),
        loss=validation_loss(model, validation, collate),
        chrf=chrf,
        bleu=bleu,
        shuffled_chrf=shuffled,
        training_seconds=round(trained.seconds, 1),
        machine=describe_machine(settings.device),
    )


@cache
def encoded(max_length: int, count: int | None) -> tuple[Dataset, Dataset]:
    """Return the tokenized pairs of the train and validation splits; `count` limits each split."""
    train, validation = (first_pairs(split, count) for split in ("train", "validation"))
    return training_pairs(load_tokenizer(TOKENIZER), max_length, train, validation)[:2]


def first_pairs(split: str, count: int | None) -> Dataset:
    verses = load_verses(split).select_columns(SIDES)
    return verses if count is None else verses.select(range(min(count, len(verses))))


def random_batches(
    pairs: Dataset, batch_size: int, seed: int, collate: Callable[[list], Any]
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield endless padded batches of pairs of similar length, determined by `seed`."""
    lengths = [
        max(len(source), len(target)) for source, target in zip(pairs["input_ids"], pairs["labels"], strict=True)
    ]
    generator = torch.Generator().manual_seed(seed)
    sampler = LengthGroupedSampler(batch_size, lengths=lengths, generator=generator)
    while True:
        for numbers in BatchSampler(sampler, batch_size, drop_last=True):
            yield collate(with_masks(pairs.select(numbers)))


def with_masks(pairs: Dataset) -> list[dict[str, list[int]]]:
    """Add attention masks, which the collator pads."""
    return [{**pair, "attention_mask": [1] * len(pair["input_ids"])} for pair in pairs]


@torch.no_grad()
def validation_loss(model: PreTrainedModel, pairs: Dataset, collate: Callable[[list], Any]) -> float:
    """Return the mean loss over all target tokens in nats, without router and reconstruction losses."""
    total, count = 0.0, 0
    for start in range(0, len(pairs), 32):
        chosen = with_masks(pairs.select(range(start, min(start + 32, len(pairs)))))
        batch = {name: tensor.to(model.device) for name, tensor in collate(chosen).items()}
        labels = batch["labels"]
        logits = model(**batch, use_cache=False).logits
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum"
        ).item()
        count += int((labels != -100).sum())
    return total / count


def run_translation(
    settings: TranslationSettings,
    *,
    models: Sequence[str],
    seeds: Iterable[int],
    learning_rates: Sequence[float],
    search_steps: int,
    path: Path,
    report: Callable[[str], None] = lambda line: None,
) -> list[tuple[TranslationSettings, TranslationResult]]:
    """Measure every model with every seed, Liquid and T5 each at its best learning rate in short runs.

    The variants of Liquid use Liquid's learning rate. With `search_steps` 0, every model trains at every rate.
    Finished runs are read from the CSV at `path`. Batches depend only on the seed, so all models train on the same
    ones.
    """
    results = ResultsFile(path, TranslationSettings, TranslationResult)

    def run(**changes: Any) -> tuple[TranslationSettings, TranslationResult]:
        changed = replace(settings, **changes)
        return changed, results.run(changed, lambda missing: measure_translation(missing, report))

    if search_steps == 0:
        return [
            run(model=model, seed=seed, learning_rate=rate)
            for seed in seeds
            for model in models
            for rate in learning_rates
        ]
    best = {}
    for architecture in dict.fromkeys("t5" if model == "t5" else "liquid" for model in models):
        searched = [
            run(model=architecture, seed=SEARCH_SEED, steps=search_steps, learning_rate=rate, scored=False)
            for rate in learning_rates
        ]
        best[architecture] = min(searched, key=lambda pair: pair[1].loss)[0].learning_rate
        report(f"{architecture}: learning rate {best[architecture]:g}")
    return [
        run(model=model, seed=seed, learning_rate=best["t5" if model == "t5" else "liquid"])
        for seed in seeds
        for model in models
    ]


def translation_table(results: list[tuple[TranslationSettings, TranslationResult]]) -> str:
    """Return a table with one row per model and learning rate: mean ± standard error over seeds."""
    scored = any(run.scored for run, _ in results)
    scores = ("chrF", "BLEU", "chrF, shuffled sources") if scored else ()
    header = (
        "model", "parameters", "learning rate", "seeds", "validation loss, nats per token", *scores, "CPU ms per step",
    )  # fmt: skip
    lines = []
    for name, rate in dict.fromkeys((run.model, run.learning_rate) for run, _ in results):
        runs = [run for run, _ in results if (run.model, run.learning_rate) == (name, rate)]
        found = [result for run, result in results if (run.model, run.learning_rate) == (name, rate)]
        reached = [[getattr(one, score) for one in found] for score in ("chrf", "bleu", "shuffled_chrf")]
        lines.append(
            (
                name,
                f"{found[0].parameters:,}",
                f"{rate:g}",
                str(len(found)),
                mean_with_error([one.loss for one in found]),
                *((mean_with_error(values, digits=1) for values in reached) if scored else ()),
                mean_with_error([1000 * one.training_seconds / runs[0].steps for one in found], digits=0),
            )
        )
    return markdown_table(header, lines)
