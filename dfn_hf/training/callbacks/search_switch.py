"""A callback that uses exact neighbour search in the first steps of training."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class SearchSwitchCallback(TrainerCallback):
    """Uses exact neighbour search in the first steps of training and cell lists afterwards.

    A cell list proposes only entities in the query's own cells, so positions receive no gradient towards a match in
    another cell. Trained from scratch with small cells, a model may therefore not learn recall. Two settings avoid
    this: a coarsest cell that spans the whole ball, as in the default `cell_sizes`, so that the most recent distant
    entities are always proposed; or exact search in the first steps, which is fast on blocks up to 2,048 tokens. The
    remaining steps use cell lists, so that positions adapt to the search that is used at inference.

    Sets `model.config.search_implementation`, which the model reads in each forward pass, to `"exact"` or `"cells"`,
    and to `"cells"` at the end.

    Args:
        exact_search_ratio: fraction of the steps, from the first, with exact search.
    """

    def __init__(self, exact_search_ratio: float) -> None:
        self.exact_search_ratio = exact_search_ratio

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        searches_exactly = state.global_step < self.exact_search_ratio * state.max_steps
        kwargs["model"].config.search_implementation = "exact" if searches_exactly else "cells"

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kwargs["model"].config.search_implementation = "cells"
