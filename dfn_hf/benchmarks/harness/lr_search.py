"""Learning-rate search: each compared model trains at the rate with the lowest loss in short runs."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from .results import ResultsFile, ResultT, SettingsT

SEARCH_SEED = 1000


def run_at_best_rates(
    results: ResultsFile[SettingsT, ResultT],
    settings: SettingsT,
    measure: Callable[[SettingsT, Callable[[str], None]], ResultT],
    *,
    models: Sequence[str],
    seeds: Iterable[int],
    learning_rates: Sequence[float],
    search_steps: int,
    report: Callable[[str], None],
) -> list[tuple[SettingsT, ResultT]]:
    """Measure every model with every seed, each model at its best learning rate.

    The best rate has the lowest loss in short runs with the seed `SEARCH_SEED`.

    Args:
        results: CSV of finished runs, short runs included.
        settings: shared settings; `model`, `seed`, `learning_rate` and, in short runs, `steps` are replaced.
        measure: takes settings and `report`; its result has a `loss`.
        models: names of the models.
        seeds: seeds of the full runs.
        learning_rates: rates of the short runs.
        search_steps: training steps of a short run.
        report: receives one line per event.

    Returns:
        The full runs with their results, ordered by seed, then by model.
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
    # Seed by seed, so that an interrupted table has the same seeds for all models.
    return [run(model=model, seed=seed, learning_rate=best[model]) for seed in seeds for model in models]
