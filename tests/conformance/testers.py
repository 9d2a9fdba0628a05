"""Model testers that transformers' test mixins expect: small models that use every mechanism."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from tests.conformance.configs import VOCABULARY

BATCH, LENGTH = 2, 24


class EncoderTester:
    """Inputs of a model of one text: two rows, one of them padded on the right.

    Args:
        get_config: returns a new configuration.
    """

    batch_size = BATCH
    seq_length = LENGTH
    is_training = True

    def __init__(self, get_config: Callable[[], PreTrainedConfig]):
        self.get_config = get_config
        config = get_config()
        self.hidden_size = config.hidden_size
        self.num_hidden_layers = config.num_hidden_layers
        self.expected_num_hidden_layers = len(getattr(config, "layer_types", range(config.num_hidden_layers))) + 1
        self.num_attention_heads = config.num_attention_heads

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, Any]]:
        mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
        mask[1, -3:] = 0
        return self.get_config(), {"input_ids": draw_ids(), "attention_mask": mask}


class DecoderTester(EncoderTester):
    """Inputs of a decoder-only family.

    Args:
        get_config: as for `EncoderTester`.
        classes: base model, causal language model and sequence classifier.
    """

    def __init__(self, get_config: Callable[[], PreTrainedConfig], classes: tuple[type[PreTrainedModel], ...]):
        super().__init__(get_config)
        self.base_model_class, self.causal_lm_class, self.sequence_classification_class = classes


class Seq2SeqTester(EncoderTester):
    """Inputs of an encoder-decoder model; both texts have one length, because the tests use one mask for both."""

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, Any]]:
        config, inputs = super().prepare_config_and_inputs_for_common()
        return config, inputs | {"decoder_input_ids": draw_ids()}


def draw_ids() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (BATCH, LENGTH))
