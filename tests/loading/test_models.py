"""Damaged files, and weights that do not fit config.json, are one sentence that names the file."""

import json
import random
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from dfn_hf import DFNConfig, DFNForFieldReconstruction, DFNNativeConfig
from dfn_hf.assets.tokenizers import load_tokenizer
from dfn_hf.cli.draw import draw_field
from dfn_hf.hub.model_info import describe_model
from dfn_hf.loading.errors import explain_damage
from dfn_hf.loading.models import check_causal_lm, check_saved_model, load_causal_lm, load_config, load_seq2seq_lm
from dfn_hf.storage.manifest import write_manifest
from tests.campaigns.mutations import mutate_bytes, mutate_json, mutate_json_text, mutate_safetensors
from tests.support.small_models import make_small_model

VOCABULARY = 260
SECONDS = 30
TINY = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
MODELS = {
    "dfn": lambda: make_small_model("dfn", vocab_size=VOCABULARY),
    "dfn of bytes": lambda: make_small_model("dfn-adaptive", vocab_size=VOCABULARY),
    "flownetwork": lambda: make_small_model("flownetwork", vocab_size=VOCABULARY),
    "liquid": lambda: make_small_model("liquid", vocab_size=VOCABULARY),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(hidden_size=32, **TINY)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    ),
}
PAIRS = ("liquid", "t5")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder per family, with a byte tokenizer."""
    root, tokenizer = tmp_path_factory.mktemp("models"), load_tokenizer("byte")
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model = make()
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture
def folder(saved, tmp_path):
    """Return a function that copies the folder of a family."""

    def copy(name="dfn"):
        return Path(shutil.copytree(saved / name, tmp_path / name.replace(" ", "-")))

    return copy


def load(folder, name="dfn"):
    return (load_seq2seq_lm if name in PAIRS else load_causal_lm)(str(folder))


def message(folder, name="dfn"):
    with pytest.raises((ValueError, OSError)) as error:
        load(folder, name)
    assert "trust_remote_code" not in str(error.value) and "weights_only" not in str(error.value)
    return str(error.value)


def edit(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_folder_loads(saved, name):
    model, _ = load(saved / name, name)
    stored = load_file(saved / name / "model.safetensors")
    assert all(torch.equal(tensor, stored[key]) for key, tensor in model.state_dict().items() if key in stored)


@pytest.mark.parametrize("name", MODELS)
def test_missing_unexpected_and_mismatched_weights_are_one_error(folder, name):
    file = folder(name) / "model.safetensors"
    weights = load_file(file)
    missing, reshaped = [key for key in weights if weights[key].dim() == 2][-2:]
    del weights[missing]
    weights[reshaped], weights["another.weight"] = torch.zeros(3, 5), torch.zeros(2)
    save_file(weights, file, metadata={"format": "pt"})
    text = message(file.parent, name)
    assert (
        str(file) in text and f"1 weight is missing ({missing})" in text and "is unexpected (another.weight)" in text
    )
    assert f"1 weight has another shape ({reshaped} is [3, 5], not [" in text and "save_pretrained" in text


@pytest.mark.parametrize("name", MODELS)
def test_a_vocabulary_that_the_weights_lack_allocates_nothing(folder, name):
    copy = folder(name)
    edit(copy / "config.json", vocab_size=2**27)
    assert "another shape" in message(copy, name) or "other shapes" in message(copy, name)


@pytest.mark.parametrize("name", MODELS)
def test_integers_are_no_weights(folder, name):
    file = folder(name) / "model.safetensors"
    weights = load_file(file)
    key = next(key for key in weights if weights[key].dim() == 2 and weights[key].is_floating_point())
    save_file(weights | {key: weights[key].to(torch.int32)}, file, metadata={"format": "pt"})
    assert f"1 weight is not a floating-point tensor ({key})" in message(file.parent, name)


def test_many_names_are_counted_and_the_first_are_shown(folder):
    file = folder() / "model.safetensors"
    weights = load_file(file)
    save_file({name: weights[name] for name in list(weights)[:2]}, file, metadata={"format": "pt"})
    text = message(file.parent)
    assert "are missing" in text and text.count("model.layers") == 3 and "…)" in text


def test_serve_and_plots_check_the_weights_too(folder, tmp_path):
    file = folder() / "model.safetensors"
    save_file(dict(list(load_file(file).items())[:-1]), file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 weight is missing"):
        check_causal_lm(str(file.parent))
    DFNForFieldReconstruction(DFNConfig(hidden_size=32, num_hidden_layers=1)).save_pretrained(tmp_path / "field")
    file = tmp_path / "field" / "model.safetensors"
    save_file(dict(list(load_file(file).items())[1:]), file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 weight is missing"):
        draw_field(str(tmp_path / "field"), str(tmp_path / "picture.png"), tmp_path / "picture.npy")


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_any_kind_is_checked(folder, name):
    file = folder(name) / "model.safetensors"
    check_saved_model(str(file.parent))
    save_file(dict(list(load_file(file).items())[1:]), file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=". weights? (is|are) missing"):
        check_saved_model(str(file.parent))


def test_old_pickled_weights_load_and_are_checked(folder):
    copy = folder()
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(weights, copy / "pytorch_model.bin")
    load(copy)
    torch.save(dict(list(weights.items())[:-1]), copy / "pytorch_model.bin")
    assert "pytorch_model.bin does not fit config.json: 1 weight is missing" in message(copy)
    torch.save({"weights": print}, copy / "pytorch_model.bin")
    assert "pytorch_model.bin is damaged or holds objects other than tensors" in message(copy)


def without_weights(folder):
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("check", [load_causal_lm, check_causal_lm, check_saved_model])
def test_a_folder_without_weights_is_named(folder, check):
    copy = folder()
    without_weights(copy)
    words = f"{copy} holds no weights (model.safetensors): save, copy or download the model again"
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        check(str(copy))
    edit(copy / "config.json", transformers_weights="other.safetensors")
    with pytest.raises(ValueError, match=r"holds no weights \(other\.safetensors\)"):
        check(str(copy))


def test_the_folder_of_an_adapter_needs_no_weights_of_its_own(folder):
    copy = folder()
    without_weights(copy)
    (copy / "adapter_config.json").write_text("{}")
    check_causal_lm(str(copy))


def flip(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("check", [load_causal_lm, check_causal_lm, check_saved_model])
def test_weights_that_differ_from_the_manifest_are_logged(folder, check, caplog):
    copy = folder()
    check(str(copy))
    write_manifest(copy)
    check(str(copy))
    assert "has changed" not in caplog.text
    flip(copy / "model.safetensors")
    check(str(copy))
    words = f"{copy}/model.safetensors has changed since dfn-hf wrote it: if you did not change it, copy or download"
    assert caplog.text.count(words) == 1
    caplog.clear()
    write_manifest(copy, [copy / "config.json"])
    check(str(copy))
    assert "has changed" not in caplog.text


INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(folder):
    copy = folder()
    (copy / "model.safetensors").unlink()
    make_small_model("dfn", vocab_size=VOCABULARY).save_pretrained(copy, max_shard_size="50KB")
    load(copy)
    return copy


def test_a_missing_shard_is_named(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert f"names the file {shard.name!r}, which is missing" in message(sharded)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "", "weights.pkl"])
def test_an_index_names_files_beside_it_only(sharded, name):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = name
    (sharded / INDEX).write_text(json.dumps(index))
    assert INDEX in message(sharded) and f"names {name!r} as weights" in message(sharded)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": 1}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_named(sharded, content):
    (sharded / INDEX).write_text(content)
    assert f"{INDEX} is damaged" in message(sharded)


@pytest.mark.parametrize(
    "file",
    ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"],
)
@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe\x00", b"{", b"[1]", b"{" * 100_000, b'{"a":' * 100_000, b'{"a": ' + 5000 * b"9" + b"}"],
    ids=["empty", "not UTF-8", "cut", "a list", "braces", "deep", "digits"],
)
def test_a_damaged_file_is_named(folder, file, content):
    copy = folder()
    (copy / file).write_bytes(content)
    assert str(copy / file) in message(copy)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "foreign"}, "has the model_type 'foreign'"),
        ({"model_type": "foreign", "auto_map": {"AutoConfig": "foreign.Config"}}, "has the model_type 'foreign'"),
        ({"model_type": None}, "has the model_type 'None'"),
        ({"dtype": "int8"}, "dtype to 'int8'"),
        ({"dtype": "float7"}, "config.json"),
        ({"num_labels": 10**12}, "num_labels to 1000000000000, beyond the limit of 65536"),
        ({"vocab_size": 10**400}, "vocab_size to about 10^400"),
        ({"head_dim": 2**40}, "head_dim to 1099511627776, beyond the limit of"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"architectures": 3}, "architectures"),
        ({"id2label": {"a": "b"}}, "config.json"),
        ({"quantization_config": 3}, "config.json"),
    ],
)
def test_a_field_of_the_configuration_is_named(folder, fields, words):
    copy = folder()
    edit(copy / "config.json", **fields)
    assert words in message(copy)
    for function in (load_config, describe_model):
        if "quantization_config" not in fields:
            with pytest.raises(ValueError, match="config.json"):
                function(str(copy))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"output_attentions": 3}, "output_attentions to '3', which must be true or false"),
        ({"num_beams": "4"}, "num_beams to '4', which must be a number"),
        ({"max_length": 10**400}, "max_length to about 10^400"),
        ({"eos_token_id": "2"}, "eos_token_id to '2', which must be a token id or a list of them"),
        ({"suppress_tokens": [1, None]}, "suppress_tokens to '[1, None]', which must be a token id or a list of them"),
    ],
)
def test_a_field_of_the_generation_configuration_is_named(folder, fields, words):
    copy = folder()
    edit(copy / "generation_config.json", **fields)
    assert f"generation_config.json sets {words}" in message(copy)


@pytest.mark.parametrize("name", ["dfn", "flownetwork", "liquid", "llama"])
def test_layers_that_the_weights_lack_are_not_built(folder, name):
    copy = folder(name)
    edit(copy / "config.json", num_hidden_layers=1000)
    words = message(copy, name)
    assert "it holds too few weights" in words and "for num_hidden_layers = 1000" in words


def test_an_interruption_is_no_damage():
    class Interruption(BaseException):
        pass

    with pytest.raises(Interruption), explain_damage("config.json"):
        raise Interruption


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("name", ["dfn", "llama", "t5"])
def test_code_that_a_file_names_is_not_offered(folder, name, file, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail(prompt))
    copy = folder(name)
    classes = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoTokenizer")
    edit(copy / file, auto_map=dict.fromkeys(classes, "foreign.Class"))
    for function in (describe_model, check_saved_model, lambda source: load(source, name)):
        try:
            function(str(copy))
        except ValueError as error:
            assert "trust_remote_code" not in str(error)  # noqa: PT017
    edit(copy / "config.json", architectures=["T5EncoderModel"])
    for wrong in ("llama", "t5", "gpt2", "bert", "dfn_native", "clip"):
        edit(copy / "config.json", model_type=wrong)
        (copy / "model.safetensors").unlink(missing_ok=True)
        with pytest.raises((ValueError, OSError)) as error:
            load(copy, name)
        assert "trust_remote_code" not in str(error.value)
        try:
            describe_model(str(copy))
        except ValueError as error:
            assert "trust_remote_code" not in str(error)  # noqa: PT017


def test_no_code_of_a_folder_runs_and_no_question_is_asked(folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail(prompt))
    copy = folder()
    (copy / "evil.py").write_text("raise SystemExit('ran')")
    edit(copy / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]}, tokenizer_class="Evil")
    (copy / "tokenizer.json").unlink()
    assert "tokenizer" in message(copy)


@pytest.mark.parametrize("name", ["dfn", "liquid"])
def test_a_missing_tokenizer_json_is_named(folder, name):
    copy = folder(name)
    (copy / "tokenizer.json").unlink()
    words = message(copy, name)
    assert words.startswith(f"{copy} holds no tokenizer.json, which its tokenizer needs: save the tokenizer again")
    assert "sentencepiece" not in words


def test_a_tokenizer_without_tokenizer_json_loads(folder):
    copy = folder()
    (copy / "tokenizer.json").unlink()
    ByT5Tokenizer().save_pretrained(copy)
    assert not (copy / "tokenizer.json").exists()
    assert type(load(copy)[1]) is ByT5Tokenizer
    edit(copy / "tokenizer_config.json", extra_ids="many")
    assert "holds no tokenizer.json" not in message(copy)


def test_an_adapter_needs_its_model(folder):
    copy = folder()
    (copy / "adapter_config.json").write_text("{}")
    assert "adapter_config.json names no model to adapt" in message(copy)


@pytest.mark.parametrize("seed", range(40))
def test_mutated_files_load_or_are_one_sentence(folder, seed):
    randomness = random.Random(seed)
    name = randomness.choice(tuple(MODELS))
    copy = folder(name)
    file = copy / randomness.choice(("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"))
    mutators = (mutate_bytes, mutate_safetensors if file.suffix == ".safetensors" else mutate_json, mutate_json_text)
    file.write_bytes(randomness.choice(mutators[: 3 if file.suffix == ".json" else 2])(file.read_bytes(), randomness))
    signal.alarm(SECONDS)
    try:
        for function in (describe_model, lambda source: load(source, name)):
            try:
                function(str(copy))
            except (ValueError, OSError) as error:
                assert str(error)  # noqa: PT017
    finally:
        signal.alarm(0)


def test_a_native_model_is_described(tmp_path):
    AutoModel.from_config(DFNNativeConfig(entity_dim=16, num_layers=1)).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        describe_model(str(tmp_path))
