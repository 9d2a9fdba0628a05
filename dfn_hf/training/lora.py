"""Low-rank adaptation (LoRA, Hu et al. 2021) of a language model, causal or an encoder-decoder, through PEFT."""

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from ..hub.peft_defaults import LINEAR_MAPS


def add_lora(model: PreTrainedModel, *, rank: int = 16) -> PeftModel:
    """Freeze `model` and give its linear maps trainable updates of rank `rank`, scaled by 2.

    The maps are those of `peft_defaults`, all of them in a model of another family.

    Raises:
        ValueError: `rank` is below 1.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    task = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    targets = LINEAR_MAPS.get(model.config.model_type, "all-linear")
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type=task))
