"""LoRA (Hu et al., 2021) for causal language models and encoder-decoders, with PEFT."""

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from ..hub.peft_defaults import LINEAR_MAPS
from ..hub.private_paths import public_name


def add_lora(model: PreTrainedModel, *, rank: int = 16) -> PeftModel:
    """Freeze `model` and add trainable low-rank updates to its linear layers, with `lora_alpha = 2 * rank`.

    Targets are the layers in `peft_defaults.LINEAR_MAPS`, or all linear layers for models outside this package. A base
    model from a local path is named by the last component of the path, because the adapter and its card hold the name.

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
    model.name_or_path = model.config.name_or_path = public_name(model.name_or_path or "")
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type=task))
