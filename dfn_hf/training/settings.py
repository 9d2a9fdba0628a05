"""Settings of a training run. Imports the standard library only, so the command line checks them quickly."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingSettings:
    """What a training run does; AdamW with warm-up, cosine decay and gradients clipped to norm 1.

    Attributes:
        max_steps: optimizer steps.
        batch_size: blocks per device and forward pass.
        gradient_accumulation_steps: forward passes per optimizer step.
        learning_rate: its peak, reached after warm-up; the cosine ends at 0.
        warmup_ratio: share of the steps over which the learning rate rises linearly from 0.
        weight_decay: decay of matrices; biases, scales and decays (parameters of fewer than two dimensions) have none.
        save_steps: steps from one evaluation to the next; each is followed by a checkpoint to resume from.
        exact_search_ratio: share of the steps with exact neighbour search before cell lists take over; see
            `SearchSwitchCallback`. Means something for DFN only.
        seed: of the order of blocks and of dropout.
    """

    max_steps: int = 1000
    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    learning_rate: float = 3e-3
    warmup_ratio: float = 0.1
    weight_decay: float = 0.1
    save_steps: int = 200
    exact_search_ratio: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "gradient_accumulation_steps", "save_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio must be at least 0 and below 1, got {self.warmup_ratio}")
        if not 0 <= self.exact_search_ratio <= 1:
            raise ValueError(f"exact_search_ratio must lie between 0 and 1, got {self.exact_search_ratio}")
