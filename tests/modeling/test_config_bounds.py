"""Every number of every configuration has a maximum, and a wrong value is an error that names the field."""

import dataclasses
import math
import typing

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModel, AutoModelForSeq2SeqLM

from dfn_hf import (
    DFNConfig,
    DFNNativeConfig,
    FlowNetworkConfig,
    FlowNetworkNativeConfig,
    LiquidConfig,
    LiquidNativeConfig,
)

CONFIGS = (DFNConfig, FlowNetworkConfig, LiquidConfig, DFNNativeConfig, FlowNetworkNativeConfig, LiquidNativeConfig)
HUGE = (10**12, 2**63, 10**400, -(10**12), -(10**400))
NOT_CHECKED = {"eos_token_id"}  # a list, or an id that no table is sized by


def fields_of(config_class, kind):
    """The own fields of a configuration whose annotation includes `kind`."""
    own = config_class.__annotations__
    return [
        field.name
        for field in dataclasses.fields(config_class)
        if field.name in own and field.name not in NOT_CHECKED
        if kind in (typing.get_args(own[field.name]) or (own[field.name],))
    ]


def cases(kind):
    return [(config_class, field) for config_class in CONFIGS for field in fields_of(config_class, kind)]


@pytest.mark.parametrize(("config_class", "field"), cases(int))
def test_huge_numbers_are_refused(config_class, field):
    for value in HUGE:
        with pytest.raises(ValueError, match=f"`{field}`"):
            config_class(**{field: value})


@pytest.mark.parametrize(("config_class", "field"), cases(float))
def test_numbers_that_are_not_finite_are_refused(config_class, field):
    for value in (math.nan, math.inf, -math.inf):
        if (field, value) == ("max_expert_load", math.inf):
            continue
        with pytest.raises(ValueError, match=f"`{field}`"):
            config_class(**{field: value})


@pytest.mark.parametrize(("config_class", "field"), cases(int))
def test_other_types_are_refused(config_class, field):
    for value in ("1", True, [1], {"a": 1}, [None]):
        with pytest.raises(StrictDataclassError, match=field):
            config_class(**{field: value})


@pytest.mark.parametrize("config_class", CONFIGS)
def test_the_deepest_model_is_built_without_storage(config_class):
    name = "num_decoder_layers" if "num_decoder_layers" in config_class.__annotations__ else "num_layers"
    name = name if name in config_class.__annotations__ else "num_hidden_layers"
    config = config_class(**{name: 64})
    auto_class = AutoModelForSeq2SeqLM if config_class is LiquidConfig else AutoModel
    with torch.device("meta"):
        assert auto_class.from_config(config).num_parameters() > 0


@pytest.mark.parametrize("config_class", [FlowNetworkConfig, LiquidConfig])
@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_theta": math.inf},
        {"rope_theta": 10**400},
        {"rope_theta": "10000"},
        {"rope_theta": None},
        {"rope_theta": {}},
        {"rope_type": "spiral"},
        {"rope_type": ["yarn"]},
        {"rope_type": "linear", "factor": math.nan},
        {"rope_type": "linear", "factor": [2.0]},
        {"rope_type": "yarn"},
    ],
    ids=str,
)
def test_parameters_of_rotary_embeddings_are_checked(config_class, parameters):
    with pytest.raises((ValueError, StrictDataclassError), match="`rope_parameters`"):
        config_class(rope_parameters=parameters)
