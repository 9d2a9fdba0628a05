"""Shows the progress of a training run in one line."""

from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ProgressBarCallback(TrainerCallback):
    """Shows the step and the latest losses in a progress bar, and prints one line per evaluation."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.losses: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True, unit="step")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.bar is None or not logs:
            return
        if "loss" in logs:
            self.losses["loss"] = f"{logs['loss']:.3f}"
        if "eval_loss" in logs:
            self.losses["validation"] = f"{logs['eval_loss']:.3f}"
            self.bar.write(f"step {state.global_step:>6}: validation loss {logs['eval_loss']:.4f}")
        self.bar.set_postfix(self.losses, refresh=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the bar, also after an error in training."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
