"""Updates a FlowNetwork's memory bank during training with `Trainer`."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class FlowMemoryCallback(TrainerCallback):
    """Calls `model.commit_memory()` once per optimizer step if the model has it.

    A forward pass only stages its update of the memory bank, so that gradient accumulation, gradient checkpointing and
    several processes do not apply it twice. A custom loop calls `model.commit_memory()` after `optimizer.step()`.
    """

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        commit = getattr(kwargs["model"], "commit_memory", None)
        if commit is not None:
            commit()
