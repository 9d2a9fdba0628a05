"""Random damaged and hostile files in the folder of a saved model, for everything that loads it.

Each attempt copies a small valid folder, changes one of its files, and loads, describes or runs the model. It raises
AssertionError unless the model works, or is refused in one sentence that names a file of the folder.
"""

import random
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from dfn_hf.assets.tokenizers import load_tokenizer
from dfn_hf.cli.errors import is_user_error
from dfn_hf.hub.convert import convert
from dfn_hf.hub.model_info import describe_model
from dfn_hf.loading.models import load_causal_lm, load_seq2seq_lm
from dfn_hf.messages import message_of
from tests.campaigns.mutations import mutate_bytes, mutate_json, mutate_json_text, mutate_safetensors
from tests.support.native_checkpoints import random_checkpoint
from tests.support.small_models import MODELS, make_small_model

FAMILIES = (*MODELS, "llama", "native")
MAX_MESSAGE = 2000
ADVICE = ("trust_remote_code", "weights_only")
CONFIGURATION = ("config.json", "generation_config.json")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@cache
def valid_folder(family: str) -> Path:
    """A saved model with its tokenizer; the folder stays until the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="dfn-hf-fuzz-")) / family
    if family == "native":
        convert(random_checkpoint(folder.parent / "original.pt", "dfn"), folder, native=True)
        return folder
    tokenizer = load_tokenizer("byte")
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model: PreTrainedModel
    if family == "llama":
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    else:
        model = make_small_model(family, **sizes)
    model.save_pretrained(folder, max_shard_size="8KB" if family == "flownetwork" else "1GB")
    tokenizer.save_pretrained(folder)
    return folder


def attempt_configuration(folder: Path, random: random.Random) -> None:
    """Change config.json or generation_config.json."""
    family = random.choice(FAMILIES)
    model = copy_folder(family, folder)
    change(model, CONFIGURATION, random, (mutate_json, mutate_json, mutate_json, mutate_json_text, mutate_bytes))
    use(model, family, random)


def attempt_tokenizer(folder: Path, random: random.Random) -> None:
    """Change a file of the tokenizer."""
    family = random.choice([name for name in FAMILIES if name != "native"])
    model = copy_folder(family, folder)
    change(model, TOKENIZER, random, (mutate_json, mutate_json, mutate_json_text, mutate_bytes))
    use(model, family, random)


def attempt_weights(folder: Path, random: random.Random) -> None:
    """Change a file of weights or the index of the shards."""
    family = random.choice(FAMILIES)
    model = copy_folder(family, folder)
    files = [path.name for path in model.glob("*.safetensors*")]
    name = random.choice(files)
    if name.endswith(".json"):
        change(model, (name,), random, (mutate_json, mutate_json, mutate_json_text, mutate_bytes))
    elif random.random() < 0.1:
        (model / name).unlink()
    else:
        change(model, (name,), random, (mutate_safetensors, mutate_safetensors, mutate_bytes))
    use(model, family, random)


def copy_folder(family: str, folder: Path) -> Path:
    """Copy the valid folder of a family."""
    return Path(shutil.copytree(valid_folder(family), folder / "model"))


def change(model: Path, names: tuple[str, ...], random: random.Random, mutators: tuple[Callable, ...]) -> None:
    """Change one of the files `names` that exists, with one of the mutators."""
    path = model / random.choice([name for name in names if (model / name).exists()])
    path.write_bytes(random.choice(mutators)(path.read_bytes(), random))


def use(model: Path, family: str, random: random.Random) -> None:
    """Describe the model, or load it and compute with it."""
    try:
        if family == "native" or random.random() < 0.3:
            describe_model(str(model))
            return
        loaded, tokenizer = (load_seq2seq_lm if family == "liquid" else load_causal_lm)(str(model))
        ids = tokenizer("To be", return_tensors="pt")["input_ids"] % loaded.config.vocab_size
        loaded.generate(ids, max_new_tokens=2, do_sample=False)
    except Exception as error:
        message = message_of(error)
        assert is_user_error(error) and message, f"{type(error).__name__}: {error}"
        assert len(message) < MAX_MESSAGE, f"a message of {len(message)} characters: {message[:300]}"
        assert not any(advice in message for advice in ADVICE), f"passes on advice: {message}"


ATTEMPTS = (attempt_configuration, attempt_tokenizer, attempt_weights)
