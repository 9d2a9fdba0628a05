"""Runs of compared models, each at the learning rate that did best for it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from .results import MeasuresT, ResultsFile, SettingsT

SEARCH_SEED = 1000


def run_at_best_rates(
    results: ResultsFile[SettingsT, MeasuresT],
    settings: SettingsT,
    measure: Callable[[SettingsT, Callable[[str], None]], MeasuresT],
    *,
    models: Sequence[str],
    seeds: Iterable[int],
    learning_rates: Sequence[float],
    search_steps: int,
    report: Callable[[str], None],
) -> list[tuple[SettingsT, MeasuresT]]:
    """Every model with every seed, at the learning rate of least loss in short runs with a seed of their own.

    Args:
        results: what is finished, short runs too.
        settings: what all runs share; `model`, `seed`, `learning_rate` and, of the short runs, `steps` are replaced.
        measure: of settings and `report`; its measures have a `loss`.
    """

    def run(**changes: Any) -> tuple[SettingsT, Any]:
        changed = replace(settings, **changes)
        return changed, results.run(changed, lambda missing: measure(missing, report))

    best = {}
    for model in models:
        losses = {
            rate: run(model=model, seed=SEARCH_SEED, steps=search_steps, learning_rate=rate)[1].loss
            for rate in learning_rates
        }
        best[model] = min(losses, key=lambda rate: losses[rate])
        report(f"{model}: learning rate {best[model]:g}")
    # All models of a seed before the next seed: a table cut short compares like with like.
    return [run(model=model, seed=seed, learning_rate=best[model]) for seed in seeds for model in models]
