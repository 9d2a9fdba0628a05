"""Loads configurations: checks config.json before a library builds anything from it."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig, PreTrainedConfig, __version__

from ..messages import number_text
from ..registration import register_families
from .errors import explain_damage, explain_hub_errors
from .model_files import REMEDY, find_file, read_json_object

# Names of the fields, in any family, that set a number of modules or a size.
LAYER_COUNT = re.compile(r"(^n|num)_\w*(layer|block|stage)s?$|_layers$|^depth$")
OTHER_COUNT = re.compile(r"(^n|num)_\w*(expert|head|label|group|table|pattern)s?$|_heads$")
SIZE = re.compile(r"_(dim|size|rank)s?$|^d_\w+$|^n_embd$")
MAX_LAYERS = 2**10
MAX_OTHER_COUNT = 2**16
MAX_VOCABULARY = 2**28
MAX_WIDTH = 2**24
MAX_NUMBER = 2**63  # the range of sizes in torch
# Fields of generation_config.json whose types transformers does not check.
BOOLEANS = {
    "do_sample",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "remove_invalid_values",
    "renormalize_logits",
    "return_dict_in_generate",
    "use_cache",
}
NUMBERS = {
    "diversity_penalty",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "epsilon_cutoff",
    "eta_cutoff",
    "guidance_scale",
    "length_penalty",
    "max_length",
    "max_new_tokens",
    "max_time",
    "min_length",
    "min_new_tokens",
    "min_p",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "penalty_alpha",
    "prompt_lookup_num_tokens",
    "repetition_penalty",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
}
TOKEN_IDS = re.compile(r"_token_ids?$|suppress_tokens$|^bad_words_ids$")
FLOAT_TYPES = ("float16", "bfloat16", "float32", "float64")


def load_checked_config(path: str) -> PreTrainedConfig:
    """Load the configuration of a folder or a Hub id, without running code that it names.

    Raises:
        ValueError: config.json is damaged, has a field out of range or names an unknown family; or there is no such
            Hub id.
    """
    register_families()
    with explain_hub_errors(path):
        file = find_file(path, "config.json")
        if file is None:
            raise ValueError(f"{path} holds no config.json: give the folder of a saved model")
        check_fields_of(read_json_object(file), file)
        with explain_damage(str(file)):
            config: PreTrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False)
    check_dtype(config, file)
    return config


def check_fields_of(content: dict[str, Any], file: Path) -> None:
    """Raise ValueError for an unknown family, class names that are not strings, and numbers that are too large."""
    model_type = content.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        if "model_type" not in content:
            raise ValueError(f"{file} has no model_type: {REMEDY}")
        raise ValueError(
            f"{file} has the model_type {str(model_type)[:80]!r}, which neither dfn-hf nor transformers {__version__} "
            "supports: use a model of a supported family"
        )
    architectures = content.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise ValueError(f"{file} is damaged: architectures is not a list of class names; {REMEDY}")
    for field, value in numbers(content):
        maximum = largest(field.rpartition(".")[2])
        if isinstance(value, int) and abs(value) > maximum:
            raise ValueError(f"{file} sets {field} to {number_text(value)}, beyond the limit of {maximum}: correct it")


def largest(field: str) -> int:
    """Return the maximum of a field, which follows from its name in any family."""
    if LAYER_COUNT.search(field):
        return MAX_LAYERS
    if OTHER_COUNT.search(field):
        return MAX_OTHER_COUNT
    if field.endswith("vocab_size"):
        return MAX_VOCABULARY
    return MAX_WIDTH if SIZE.search(field) else MAX_NUMBER - 1


def check_dtype(config: PreTrainedConfig, file: Path) -> None:
    """Raise ValueError unless the model computes in a floating-point type; None is the default type."""
    name = str(config.dtype).removeprefix("torch.")
    if config.dtype is not None and name not in FLOAT_TYPES:
        raise ValueError(f"{file} sets dtype to {name[:80]!r}: use one of {', '.join(FLOAT_TYPES)}")


def check_generation_config(path: str) -> None:
    """Raise ValueError if generation_config.json is damaged; the file is optional."""
    file = find_file(path, "generation_config.json", optional=True)
    if file is None:
        return
    content = read_json_object(file)
    for field, value in numbers(content):
        if isinstance(value, int) and abs(value) >= MAX_NUMBER:
            raise ValueError(f"{file} sets {field} to {number_text(value)}, which is out of range: correct it")
    for fields, types, kind in ((BOOLEANS, bool | None, "true or false"), (NUMBERS, int | float | None, "a number")):
        for field in sorted(fields & content.keys()):
            if not isinstance(content[field], types):
                given = str(content[field])[:80]
                raise ValueError(f"{file} sets {field} to {given!r}, which must be {kind}: correct it")
    for field in sorted(field for field in content if TOKEN_IDS.search(field)):
        if not is_token_ids(content[field]):
            given = str(content[field])[:80]
            raise ValueError(
                f"{file} sets {field} to {given!r}, which must be a token id or a list of them: correct it"
            )
    with explain_damage(str(file)):
        GenerationConfig.from_dict(content)


def is_token_ids(value: Any) -> bool:
    """Whether `value` is None, a token id, or a list of token ids or of such lists."""
    if isinstance(value, list):
        return all(part is not None and is_token_ids(part) for part in value)
    return value is None or (isinstance(value, int) and not isinstance(value, bool))


def numbers(content: Any) -> Iterator[tuple[str, int | float]]:
    """Yield the dotted name and the value of every number in parsed JSON, booleans excluded."""
    stack = [("", content)]
    while stack:
        name, value = stack.pop()
        if isinstance(value, dict):
            stack += [(f"{name}.{key}".lstrip("."), part) for key, part in value.items()]
        elif isinstance(value, list):
            stack += [(name, part) for part in value]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, value
