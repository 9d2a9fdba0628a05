"""Writing a FlowNetwork's memory bank while a `Trainer` trains it."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class FlowMemoryCallback(TrainerCallback):
    """Writes the memory bank once per optimizer step; other models are left alone.

    Forward passes only stage what they would write, so that gradient accumulation, checkpointing and several
    processes cannot write twice. In a loop of one's own, call `model.commit_memory()` behind `optimizer.step()`.
    """

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        commit = getattr(kwargs["model"], "commit_memory", None)
        if commit is not None:
            commit()
