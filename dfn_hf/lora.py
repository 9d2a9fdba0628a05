"""Low-rank adaptation (LoRA, Hu et al. 2021) of a language model, causal or an encoder-decoder, through PEFT."""

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

# The mixer's projections and the MLP's linear maps; FlowNorm's maps and the influence stay as they were trained.
DFN_TARGETS = ["position_proj", "flow_proj", "value_proj", "gate_proj", "out_proj", "up_proj", "down_proj"]


def add_lora(model: PreTrainedModel, *, rank: int = 16) -> PeftModel:
    """Freeze `model` and give each of its linear maps a trainable update of rank `rank`, scaled by 2.

    Raises:
        ValueError: `rank` is below 1.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    targets = DFN_TARGETS if model.config.model_type == "dfn" else "all-linear"
    task = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type=task))
