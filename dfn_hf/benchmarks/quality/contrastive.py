"""Contrastive training: retrieval of translated verses, of words for spoken digits, and of captions for images.

All models are evaluated on the same held-out views. The baselines "class-mean" and "logistic" are fitted to vectors;
the other models minimise the same loss for the same number of steps and pairs.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import concatenate_datasets
from transformers import set_seed

from dfn_hf import DFNConfig
from dfn_hf.assets.tokenizers import load_tokenizer
from dfn_hf.assets.verses import load_verses
from dfn_hf.data.contrastive import ContrastiveCollator, DistinctPairsSampler, Row, pair_views, text_view
from dfn_hf.data.pairs import SIDES
from dfn_hf.evaluation.retrieval_metrics import embed, retrieval
from dfn_hf.modeling.dfn.modeling_dfn_contrastive import DFNForContrastive

from ..baselines.pair_models import BagPairModel, TransformerPairModel, ngram_rows
from ..datasets.labelled_fields import LabelledFields, handwritten_digit_fields, spoken_digit_fields
from ..harness.environment import describe_machine
from ..harness.results import ResultsFile, markdown_table, mean_with_error
from ..harness.training_loop import fit

CLASSIFIERS = ("class-mean", "logistic")
BAGS = ("bytes", "ngrams")
TASKS: dict[str, tuple[str, ...]] = {
    "verses": ("dfn", "transformer", *BAGS),
    "sounds": ("dfn", *CLASSIFIERS),
    "images": ("dfn", *CLASSIFIERS),
}
TASK_SETTINGS: dict[str, dict[str, Any]] = {
    "verses": {},
    "sounds": {"steps": 300, "hidden_size": 64, "num_hidden_layers": 2, "learning_rate": 1e-3},
    "images": {"steps": 1600, "hidden_size": 64, "num_hidden_layers": 2, "learning_rate": 3e-3},
}
LEARNING_RATES: dict[str, dict[str, Any]] = {bag: {"learning_rate": 1e-2} for bag in BAGS}
CANDIDATES = 1000
LONGEST_NGRAM = 3
NGRAM_BUCKETS = 2**14
AUGMENTED_COPIES = 20


@dataclass(frozen=True)
class ContrastiveSettings:
    """One run.

    Attributes:
        task: a key of `TASKS`.
        model: a model that `TASKS` lists for the task.
        batch_size: pairs per step; unused for labelled fields, whose batches hold one field per word.
        pairs: number of training pairs; None for all.
    """

    task: str = "verses"
    model: str = "dfn"
    seed: int = 0
    steps: int = 1000
    batch_size: int = 128
    learning_rate: float = 3e-3
    hidden_size: int = 128
    num_hidden_layers: int = 1
    pairs: int | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class ContrastiveResult:
    """Retrieval of held-out views.

    Attributes:
        recall: recall@1 from the first view to the second: English to Spanish, field to word.
        back_recall: recall@1 from the second view to the first; None if several fields share a word.
        recall_at_10: recall@10 from the first view to the second; None with ten candidates.
        held_out: number of first views.
        candidates: number of second views.
    """

    parameters: int
    recall: float
    back_recall: float | None
    recall_at_10: float | None
    held_out: int
    candidates: int
    training_seconds: float
    machine: str


def contrastive_runs(tasks: Iterable[str], seeds: Iterable[int]) -> list[ContrastiveSettings]:
    """Return the runs of every model of each task with its tuned settings; classifiers have one seed."""
    return [
        ContrastiveSettings(task=task, model=model, seed=seed, **TASK_SETTINGS[task], **LEARNING_RATES.get(model, {}))
        for task in tasks
        for model in TASKS[task]
        for seed in ([0] if model in CLASSIFIERS else seeds)
    ]


def measure_contrastive(
    settings: ContrastiveSettings, sounds_folder: str | Path = "", report: Callable[[str], None] = lambda line: None
) -> ContrastiveResult:
    """Train a model and evaluate retrieval on the held-out views.

    Args:
        settings: the run.
        sounds_folder: folder of the recordings, used by the task "sounds"; see `spoken_digits`.
        report: receives one line per evaluation.

    Raises:
        ValueError: the task or model is unknown, or `sounds_folder` has no recordings.
    """
    if settings.task not in TASKS:
        raise ValueError(f"task is {settings.task!r}: choose one of {', '.join(TASKS)}")
    if settings.model not in TASKS[settings.task]:
        models = ", ".join(TASKS[settings.task])
        raise ValueError(f"model is {settings.model!r}: for {settings.task} choose one of {models}")
    set_seed(settings.seed)
    if settings.task == "verses":
        return _measure_verses(settings, report)
    train, held_out = spoken_digit_fields(sounds_folder) if settings.task == "sounds" else handwritten_digit_fields()
    measure = _measure_classifier if settings.model in CLASSIFIERS else _measure_fields
    return measure(settings, train, held_out, report)


def _measure_verses(settings: ContrastiveSettings, report: Callable[[str], None]) -> ContrastiveResult:
    tokenizer = load_tokenizer("byte" if settings.model == "bytes" else "bpe-en-es")
    train = load_verses("train")[: settings.pairs]
    held_out = concatenate_datasets([load_verses("test"), load_verses("validation")])[:CANDIDATES]

    def rows(verses: dict[str, list[str]]) -> list[Row]:
        sides = [verses[side] for side in SIDES]
        if settings.model == "ngrams":
            views = [ngram_rows([text.encode() for text in side], LONGEST_NGRAM, NGRAM_BUCKETS) for side in sides]
        else:
            views = [text_view(side, tokenizer) for side in sides]
        return pair_views(*views)

    pairs, queries = rows(train), rows(held_out)
    if settings.model in BAGS:
        model: Any = BagPairModel(
            NGRAM_BUCKETS if settings.model == "ngrams" else len(tokenizer), settings.hidden_size
        )
    else:
        model = DFNForContrastive(_config(settings, len(tokenizer), local_window=8, num_neighbors=0))
    if settings.model == "transformer":
        model = TransformerPairModel(
            vocab_size=len(tokenizer),
            hidden_size=settings.hidden_size,
            num_hidden_layers=settings.num_hidden_layers,
            num_attention_heads=model.config.num_attention_heads,
            projection_dim=settings.hidden_size,
            longest=max(len(row[name]) for row in (*pairs, *queries) for name in row),
            parameters=model.num_parameters(),
        )
    model.to(settings.device)
    collator = ContrastiveCollator(tokenizer.pad_token_id)

    def announce(step: int) -> None:
        found = retrieval(*embed_pairs(model, queries, collator))
        report(f"verses, {settings.model}, seed {settings.seed}: step {step}, recall@1 {found.recall_at_1:.3f}")

    trained = fit(
        model,
        _batches(pairs, settings, collator),
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        weight_decay=0.0 if settings.model in BAGS else 0.1,
        evaluate=announce,
    )
    found = retrieval(*embed_pairs(model, queries, collator))
    return ContrastiveResult(
        parameters=_num_parameters(model),
        recall=found.recall_at_1,
        back_recall=found.back_recall_at_1,
        recall_at_10=found.recall_at_10,
        held_out=found.candidates,
        candidates=found.candidates,
        training_seconds=round(trained.seconds, 1),
        machine=describe_machine(settings.device),
    )


def _batches(
    pairs: list[Row], settings: ContrastiveSettings, collator: ContrastiveCollator
) -> Iterator[dict[str, torch.Tensor]]:
    sampler = DistinctPairsSampler(pairs, settings.batch_size, settings.seed)
    while True:
        numbers = list(sampler)
        for start in range(0, len(numbers), settings.batch_size):
            yield collator([pairs[number] for number in numbers[start : start + settings.batch_size]])


@torch.no_grad()
def embed_pairs(
    model: torch.nn.Module, rows: list[Row], collator: ContrastiveCollator, batch_size: int = 100
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the embeddings of both views, each `[rows, projection_dim]`, on the CPU."""
    model.eval()
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]["input_ids"]))
    embeds, pair_embeds = [], []
    device = next(model.parameters()).device
    for start in range(0, len(rows), batch_size):
        batch = collator([rows[number] for number in order[start : start + batch_size]])
        outputs = model(**{name: tensor.to(device) for name, tensor in batch.items()})
        embeds.append(outputs.embeds.cpu())
        pair_embeds.append(outputs.pair_embeds.cpu())
    return torch.cat(embeds), torch.cat(pair_embeds)


def _measure_fields(
    settings: ContrastiveSettings,
    train: LabelledFields,
    held_out: LabelledFields,
    report: Callable[[str], None],
) -> ContrastiveResult:
    tokenizer = load_tokenizer("byte")
    model = DFNForContrastive(
        _config(
            settings,
            len(tokenizer),
            coordinate_dim=train.fields[0]["coordinates"].shape[1],
            value_dim=train.fields[0]["values"].shape[1],
            local_window=8,
            num_neighbors=8,
            hidden_dropout=0.1,
            contrastive_fields=True,
        )
    )
    model = torch.nn.Module.to(model, settings.device)
    collator = ContrastiveCollator(tokenizer.pad_token_id)
    captions = text_view(train.captions, tokenizer)

    def accuracy() -> float:
        similarity = embed(model, held_out.fields, collator) @ embed(model, captions, collator).T
        return (similarity.argmax(dim=1) == torch.tensor(held_out.labels)).float().mean().item()

    def announce(step: int) -> None:
        report(f"{settings.task}, {settings.model}, seed {settings.seed}: step {step}, accuracy {accuracy():.3f}")

    trained = fit(
        model,
        train.batches(captions, collator, settings.seed),
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        evaluate=announce,
    )
    return _classification_result(settings, held_out, _num_parameters(model), accuracy(), trained.seconds)


def _measure_classifier(
    settings: ContrastiveSettings,
    train: LabelledFields,
    held_out: LabelledFields,
    report: Callable[[str], None],
) -> ContrastiveResult:
    """FitResult nearest class means or logistic regression to the fields as vectors, augmented copies included."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import NearestCentroid

    vectors, labels = train.augmented_vectors(AUGMENTED_COPIES, settings.seed)
    queries = np.stack([held_out.vector(field) for field in held_out.fields])
    logistic = settings.model == "logistic"
    classifier = LogisticRegression(max_iter=1000) if logistic else NearestCentroid()
    classifier.fit(vectors, labels)
    accuracy = float(np.mean(classifier.predict(queries) == held_out.labels))
    parameters = len(train.captions) * (vectors.shape[1] + logistic)
    report(f"{settings.task}, {settings.model}: accuracy {accuracy:.3f}")
    return _classification_result(settings, held_out, parameters, accuracy, 0.0)


def _classification_result(
    settings: ContrastiveSettings, held_out: LabelledFields, parameters: int, accuracy: float, seconds: float
) -> ContrastiveResult:
    return ContrastiveResult(
        parameters=parameters,
        recall=accuracy,
        back_recall=None,
        recall_at_10=None,
        held_out=len(held_out.fields),
        candidates=len(held_out.captions),
        training_seconds=round(seconds, 1),
        machine=describe_machine(settings.device),
    )


def _config(settings: ContrastiveSettings, vocab_size: int, **fields: Any) -> DFNConfig:
    return DFNConfig(
        vocab_size=vocab_size,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.num_hidden_layers,
        intermediate_size=2 * settings.hidden_size,
        projection_dim=settings.hidden_size,
        **fields,
    )


def _num_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def run_contrastive(
    runs: Iterable[ContrastiveSettings],
    path: Path,
    sounds_folder: str | Path = "",
    report: Callable[[str], None] = lambda line: None,
) -> list[tuple[ContrastiveSettings, ContrastiveResult]]:
    """Measure the runs; finished ones are read from the CSV at `path`. See `measure_contrastive`."""
    results = ResultsFile(path, ContrastiveSettings, ContrastiveResult)

    def measure(settings: ContrastiveSettings) -> ContrastiveResult:
        return measure_contrastive(settings, sounds_folder, report)

    return [(run, results.run(run, measure)) for run in runs]


def contrastive_table(results: list[tuple[ContrastiveSettings, ContrastiveResult]]) -> str:
    """Return a table with one row per task and model: mean ± standard error over seeds."""
    header = (
        "task", "model", "parameters", "seeds", "held out", "candidates", "recall@1", "recall@1, reverse", "recall@10",
        "training s",
    )  # fmt: skip
    lines = []
    for task, model in dict.fromkeys((run.task, run.model) for run, _ in results):
        found = [result for run, result in results if (run.task, run.model) == (task, model)]
        lines.append(
            (
                task,
                model,
                f"{found[0].parameters:,}",
                str(len(found)),
                f"{found[0].held_out:,}",
                f"{found[0].candidates:,}",
                *(
                    mean_with_error([getattr(one, name) for one in found])
                    for name in ("recall", "back_recall", "recall_at_10")
                ),
                mean_with_error([one.training_seconds for one in found], digits=0),
            )
        )
    return markdown_table(header, lines)
