"""Default target modules of PEFT methods for the models of this package."""

from .import_hook import when_imported

# FlowNorm, the influence, the routers and the gates of experts are not adapted.
LINEAR_MAPS = {
    "dfn": ["position_proj", "flow_proj", "value_proj", "gate_proj", "out_proj", "up_proj", "down_proj"],
    "flownetwork": [
        "q_proj", "k_proj", "v_proj", "o_proj", "value_proj", "gate_proj", "out_proj", "up_proj", "down_proj",
    ],
    "liquid": ["q_proj", "k_proj", "v_proj", "o_proj", "tap_proj", "up_proj", "down_proj"],
}  # fmt: skip
RESCALED = {
    "dfn": ["value_proj", "down_proj"],
    "flownetwork": ["k_proj", "v_proj", "value_proj", "down_proj"],
    "liquid": ["k_proj", "v_proj", "down_proj"],
}
RESCALED_INPUTS = {family: ["down_proj"] for family in RESCALED}
# RoAd rotates groups of 64 outputs, so the targets are those with `hidden_size` outputs.
ROTATED = {
    "dfn": ["value_proj", "gate_proj", "out_proj", "down_proj"],
    "flownetwork": ["q_proj", "o_proj", "value_proj", "out_proj", "down_proj"],
    "liquid": ["q_proj", "o_proj", "down_proj"],
}
LOW_RANK_METHODS = ("LORA", "ADALORA", "LOHA", "LOKR", "OFT", "BOFT", "VERA", "FOURIERFT", "HRA")


def register_peft_defaults() -> None:
    """Add the target modules to PEFT's tables when the user imports PEFT, so that `LoraConfig()` needs no targets."""
    when_imported("peft.utils.constants", _extend_tables)


def _extend_tables() -> None:
    from peft.utils import constants

    for method in LOW_RANK_METHODS:
        getattr(constants, f"TRANSFORMERS_MODELS_TO_{method}_TARGET_MODULES_MAPPING").update(LINEAR_MAPS)
    constants.TRANSFORMERS_MODELS_TO_ROAD_TARGET_MODULES_MAPPING.update(ROTATED)
    constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.update(RESCALED)
    constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.update(RESCALED_INPUTS)
