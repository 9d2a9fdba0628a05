"""A callback that makes the checkpoints of a run verifiable."""

import math
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..checkpoints import begin_save, checkpoint_fault, complete_save, remove_old_checkpoints

KEPT = 2


class CompleteCheckpointsCallback(TrainerCallback):
    """Writes the manifest of each checkpoint and deletes old ones, but not before the newest is complete.

    The newest and the best checkpoint are kept, and at least two. In a resumed run, the best checkpoint is the one
    with the lowest validation loss among those that are complete, wherever the folder is now.

    Args:
        checkpoints: folder of the checkpoints.
    """

    def __init__(self, checkpoints: Path) -> None:
        self.checkpoints = checkpoints

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            return
        losses = {int(entry["step"]): entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry}
        complete = {
            step: loss
            for step, loss in losses.items()
            if math.isfinite(loss) and step > 0 and checkpoint_fault(self.folder(step)) is None
        }
        best = min(complete, key=lambda step: complete[step], default=None)
        state.best_global_step = best
        state.best_metric = None if best is None else complete[best]
        state.best_model_checkpoint = None if best is None else str(self.folder(best))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_save and state.is_world_process_zero:
            begin_save(self.folder(state.global_step))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()  # every process saves its random state
        if not state.is_world_process_zero:
            return
        newest = self.folder(state.global_step)
        complete_save(newest)
        keep = {newest.name, Path(state.best_model_checkpoint or "").name}
        remove_old_checkpoints(self.checkpoints, keep, limit=KEPT)

    def folder(self, step: int) -> Path:
        """The folder of the checkpoint after `step` optimizer steps."""
        return self.checkpoints / f"checkpoint-{step}"
