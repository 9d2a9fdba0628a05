"""Enters model classes into the name tables of transformers' auto classes.

`AutoModel.register` does not do that. By these names `Trainer` shifts the labels for label smoothing, pipelines accept
a model, and lm-eval tells an encoder-decoder from a causal model.
"""

from typing import Any

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_PRETRAINING_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

NAME_TABLES: dict[str, Any] = {
    "AutoModel": MODEL_MAPPING_NAMES,
    "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForSeq2SeqLM": MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForSequenceClassification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForPreTraining": MODEL_FOR_PRETRAINING_MAPPING_NAMES,
    "AutoModelForTextEncoding": MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
}


def enter_auto_names(model_type: str, auto_map: dict[str, str]) -> None:
    """Enter the classes of a family.

    Args:
        model_type: of the family's configuration.
        auto_map: "module.Class" for each auto class, as in `PreTrainedConfig.auto_map`.
    """
    for auto_class, reference in auto_map.items():
        if auto_class != "AutoConfig":
            NAME_TABLES[auto_class][model_type] = reference.rpartition(".")[2]
