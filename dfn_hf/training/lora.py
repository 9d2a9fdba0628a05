"""LoRA (Hu et al., 2021) for causal language models and encoder-decoders, with PEFT."""

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from ..hub.peft_defaults import LINEAR_MAPS


def add_lora(model: PreTrainedModel, *, rank: int = 16) -> PeftModel:
    """Freeze `model` and add trainable low-rank updates to its linear layers, with `lora_alpha = 2 * rank`.

    Targets are the layers in `peft_defaults.LINEAR_MAPS`, or all linear layers for models outside this package.

    Args:
        model: causal language model or encoder-decoder.
        rank: rank of the updates.

    Raises:
        ValueError: `rank` is below 1.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    task = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    targets = LINEAR_MAPS.get(model.config.model_type, "all-linear")
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type=task))
