"""Runs transformers' own model tests on every family; no test is overridden and no tolerance is changed.

Each family is tested twice: with default initialisation, and with weights so large that every part affects the output.
"""

import importlib
import sys
import unittest

from transformers.models.auto import modeling_auto

from dfn_hf import (
    DFNConfig,
    DFNForCausalLM,
    DFNForSequenceClassification,
    DFNModel,
    FlowNetworkConfig,
    FlowNetworkForCausalLM,
    FlowNetworkForSequenceClassification,
    FlowNetworkModel,
    LiquidConfig,
    LiquidForSeq2SeqLM,
    LiquidForSequenceClassification,
    LiquidModel,
)
from tests.conformance.common_tests import fetch_common_tests, package_name
from tests.conformance.configs import adaptive_dfn_config, dfn_config, flownetwork_config, liquid_config
from tests.conformance.testers import DecoderTester, EncoderTester, Seq2SeqTester

sys.path.insert(0, str(fetch_common_tests()))
common = importlib.import_module(f"{package_name()}.test_modeling_common")
training = importlib.import_module(f"{package_name()}.test_training_mixin")
configuration = importlib.import_module(f"{package_name()}.test_configuration_common")

# The tests look up the task of a head by class name in these tables, which list only transformers' own families.
modeling_auto.MODEL_MAPPING_NAMES.update(dfn="DFNModel", flownetwork="FlowNetworkModel", liquid="LiquidModel")
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.update(dfn="DFNForCausalLM", flownetwork="FlowNetworkForCausalLM")
modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.update(liquid="LiquidForSeq2SeqLM")
modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.update(
    dfn="DFNForSequenceClassification",
    flownetwork="FlowNetworkForSequenceClassification",
    liquid="LiquidForSequenceClassification",
)

LARGE = 0.5
# With 0.5 rounding differences exceed 1e-5: the number of entities, and with it the shapes, depends on the bytes.
LARGE_WITH_SAMPLING = 0.2
LARGE_WITH_SDPA = 0.2  # with 0.5, eager and sdpa attention of a Llama differ by more than the tests' tolerance
DFN = (DFNModel, DFNForCausalLM, DFNForSequenceClassification)
FLOWNETWORK = (FlowNetworkModel, FlowNetworkForCausalLM, FlowNetworkForSequenceClassification)
LIQUID = (LiquidModel, LiquidForSeq2SeqLM)
LIQUID_ENCODER = (LiquidForSequenceClassification,)


class CommonTests(common.ModelTesterMixin):
    """transformers' common tests of a model and of its configuration."""

    config_class: type

    def test_config(self):
        configuration.ConfigTester(self, config_class=self.config_class, hidden_size=32).run_common_tests()


class TestDFN(CommonTests, common.GenerationTesterMixin, training.TrainingTesterMixin, unittest.TestCase):
    config_class = DFNConfig
    all_model_classes = DFN
    model_tester = DecoderTester(dfn_config, DFN)


class TestDFNWithLargeWeights(CommonTests, common.GenerationTesterMixin, unittest.TestCase):
    config_class = DFNConfig
    all_model_classes = DFN
    model_tester = DecoderTester(lambda: dfn_config(initializer_range=LARGE), DFN)


class TestAdaptiveDFN(CommonTests, common.GenerationTesterMixin, training.TrainingTesterMixin, unittest.TestCase):
    config_class = DFNConfig
    all_model_classes = DFN
    has_attentions = False
    model_tester = DecoderTester(adaptive_dfn_config, DFN)


class TestAdaptiveDFNWithLargeWeights(CommonTests, common.GenerationTesterMixin, unittest.TestCase):
    config_class = DFNConfig
    all_model_classes = DFN
    has_attentions = False
    model_tester = DecoderTester(lambda: adaptive_dfn_config(initializer_range=LARGE_WITH_SAMPLING), DFN)


class TestFlowNetwork(CommonTests, common.GenerationTesterMixin, training.TrainingTesterMixin, unittest.TestCase):
    config_class = FlowNetworkConfig
    all_model_classes = FLOWNETWORK
    model_tester = DecoderTester(flownetwork_config, FLOWNETWORK)


class TestFlowNetworkWithLargeWeights(CommonTests, common.GenerationTesterMixin, unittest.TestCase):
    config_class = FlowNetworkConfig
    all_model_classes = FLOWNETWORK
    model_tester = DecoderTester(lambda: flownetwork_config(initializer_range=LARGE_WITH_SDPA), FLOWNETWORK)


class TestLiquid(CommonTests, common.GenerationTesterMixin, unittest.TestCase):
    config_class = LiquidConfig
    all_model_classes = LIQUID
    is_encoder_decoder = True
    model_tester = Seq2SeqTester(liquid_config)


class TestLiquidWithLargeWeights(CommonTests, common.GenerationTesterMixin, unittest.TestCase):
    config_class = LiquidConfig
    all_model_classes = LIQUID
    is_encoder_decoder = True
    model_tester = Seq2SeqTester(lambda: liquid_config(initializer_range=LARGE_WITH_SDPA))


class TestLiquidEncoder(CommonTests, unittest.TestCase):
    config_class = LiquidConfig
    all_model_classes = LIQUID_ENCODER
    model_tester = EncoderTester(lambda: liquid_config(is_encoder_decoder=False))


class TestLiquidEncoderWithLargeWeights(CommonTests, unittest.TestCase):
    config_class = LiquidConfig
    all_model_classes = LIQUID_ENCODER
    model_tester = EncoderTester(lambda: liquid_config(is_encoder_decoder=False, initializer_range=LARGE_WITH_SDPA))
