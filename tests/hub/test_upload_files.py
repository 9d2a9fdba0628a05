"""Tests which files of a model folder are uploaded, and the checks before an upload."""

import json
import os
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from dfn_hf import checkpoint_path
from dfn_hf.assets.tokenizers import load_tokenizer
from dfn_hf.hub.upload_files import read_model_folder
from tests.support.small_models import MODELS, make_small_model

CODE = {
    "dfn": {"configuration_dfn.py", "dfn_kernels.py", "modeling_dfn.py"},
    "flownetwork": {"configuration_flownetwork.py", "modeling_flownetwork.py"},
    "liquid": {"configuration_liquid.py", "modeling_liquid.py"},
}
FOREIGN = (
    ".env", ".git/config", ".dfn-hf-manifest.json", "checkpoints/run.json", "data/poems.txt", "notebook.ipynb",
    "runs/Jan01_host/events.out.tfevents.1.host", "pytorch_model.bin", "optimizer.pt", "training_args.bin", "id_rsa",
    "other.safetensors", "model-00001-of-00002.safetensors", "evil.py", "config.json.bak", "tokenizer.pickle",
    "adapter/optimizer.pt", "adapter/evil.py", "custom_generate/generate.py", "LICENSES/secret.txt",
)  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved DFN with tokenizer and adapter."""
    folder = tmp_path_factory.mktemp("saved") / "my-model"
    make_small_model("dfn", vocab_size=300).save_pretrained(folder)
    load_tokenizer("byte").save_pretrained(folder)
    adapted = get_peft_model(make_small_model("dfn"), LoraConfig(target_modules="all-linear"))
    adapted.save_pretrained(folder / "adapter")
    for name in ("training_log.json", "conversion_report.json"):
        (folder / name).write_text("{}")
    (folder / "README.md").write_text("# Mine\n")
    (folder / "LICENSE").write_text("free")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "my-model")


def test_only_files_of_the_model_are_selected(folder):
    own = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    for name in FOREIGN:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("SECRET=1")
    files = read_model_folder(folder)
    print(sorted(files.uploaded), files.left, sep="\n")
    assert files.uploaded.keys() == own
    expected = {"adapter/adapter_model.safetensors", "model.safetensors", "tokenizer.json", "generation_config.json"}
    assert CODE["dfn"] | expected <= own
    tops = {
        name if name.startswith("adapter/") or "/" not in name else f"{name.partition('/')[0]}/" for name in FOREIGN
    }
    assert set(files.left) == tops


@pytest.mark.parametrize("family", ["dfn", "flownetwork", "liquid"])
def test_the_code_of_each_family_is_selected(family, tmp_path):
    make_small_model(family).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    files = read_model_folder(tmp_path / "model")
    assert {name for name in files.uploaded if name.endswith(".py")} == CODE[family]
    assert "model.safetensors.index.json" in files.uploaded and not files.left
    assert family in MODELS


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "config.json", "README.md", "modeling_dfn.py", "dfn_kernels.py", "adapter",
     "adapter/adapter_model.safetensors", "tokenizer.json"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["link", "missing target"])
def test_links_are_refused_by_name(folder, tmp_path, name, kind):
    target = (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(target if kind == "link" else tmp_path / "nowhere")
    if (kind, name) in {("missing target", "config.json"), ("missing target", "adapter")}:
        pattern = "holds no config.json" if name == "config.json" else "adapter is a link"
    else:
        pattern = rf"{name} is a link, and links are not uploaded: copy the folder with the linked files \(cp -rL "
    with pytest.raises(ValueError, match=pattern) as refusal:
        read_model_folder(folder)
    print(refusal.value)


def test_folders_of_links_are_refused_with_a_remedy_that_works(folder, tmp_path):
    """Such as a snapshot in the cache of the Hub."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in folder.iterdir():
        (snapshot / path.name).symlink_to(path)
    with pytest.raises(ValueError, match=r"is a link.*cp -rL"):
        read_model_folder(snapshot)
    shutil.copytree(snapshot, tmp_path / "copy", symlinks=False)  # cp -rL
    assert read_model_folder(tmp_path / "copy").uploaded.keys() == read_model_folder(folder).uploaded.keys()


def test_the_folder_itself_may_be_a_link_and_foreign_links_stay(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    (folder / "data").symlink_to("/etc")
    files = read_model_folder(tmp_path / "link")
    assert files.left == ["data"] and "model.safetensors" in files.uploaded


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def shard(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    halves = {f"model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    for file, part in halves.items():
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in halves.items() for name in part}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def without_a_shard(folder):
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def without_a_weight(folder):
    shard(folder)
    edit(folder / "model.safetensors.index.json", weight_map={"absent": "model-00001-of-00002.safetensors"})


def with_a_shard_elsewhere(folder):
    shard(folder)
    edit(folder / "model.safetensors.index.json", weight_map={"a": "../../secret.safetensors"})


def pickled(folder):
    torch.save({"a": torch.zeros(1)}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


FAULTS = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no model.safetensors"),
    "pickled weights": (pickled, "holds no model.safetensors: .*pickled weights are not uploaded"),
    "short weights": (lambda folder: truncate(folder / "model.safetensors"), "model.safetensors is damaged"),
    "short adapter": (
        lambda folder: truncate(folder / "adapter/adapter_model.safetensors"), "adapter_model.safetensors is damaged",
    ),
    "empty weights": (lambda folder: save_file({}, folder / "model.safetensors"), "holds no weights"),
    "a folder as weights": (
        lambda folder: ((folder / "model.safetensors").unlink(), (folder / "model.safetensors").mkdir()),
        "holds no model.safetensors",
    ),
    "no shard": (without_a_shard, "'model-00002-of-00002.safetensors', which is missing"),
    "no weight of the index": (without_a_weight, "names the weight absent, which no shard holds"),
    "a shard elsewhere": (with_a_shard_elsewhere, "secret.safetensors'"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
    "damaged config": (lambda folder: truncate(folder / "config.json"), "config.json is damaged"),
    "unknown family": (lambda folder: edit(folder / "config.json", model_type="x"), "has the model_type 'x'"),
    "a pipe": (
        lambda folder: ((folder / "README.md").unlink(), os.mkfifo(folder / "README.md")), "is not a regular file",
    ),
    "no code": (lambda folder: (folder / "dfn_kernels.py").unlink(), "holds no dfn_kernels.py: load the model"),
    "code elsewhere": (
        lambda folder: edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["../secret.Class", None]}),
        r"tokenizer_config.json has '../secret.Class' in auto_map: give module.Class",
    ),
    "a path in the card": (
        lambda folder: (folder / "README.md").write_text(f"Trained on {folder.parent}/secret/poems, twice."),
        "README.md contains the local path .*/secret/poems: remove it from the file",
    ),
    "a path in the log": (
        lambda folder: (folder / "training_log.json").write_text(json.dumps([f"{folder.parent}/secret"])),
        "training_log.json contains the local path .*/secret",
    ),
    "a path in the code": (
        lambda folder: (folder / "modeling_dfn.py").write_text(f"# {folder.parent}/secret\n"),
        "modeling_dfn.py contains the local path .*/secret",
    ),
    "a path in the config": (
        lambda folder: edit(folder / "config.json", note=f"{folder.parent}/secret"),
        "config.json contains the local path .*/secret",
    ),
    "a card in Latin-1": (lambda folder: (folder / "README.md").write_bytes(b"\xe9"), "README.md is not UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_is_not_whole_is_refused(folder, fault):
    damage, pattern = FAULTS[fault]
    damage(folder)
    with pytest.raises(ValueError, match=pattern) as refusal:
        read_model_folder(folder)
    print(refusal.value)
    assert "trust_remote_code" not in str(refusal.value) and "\n" not in str(refusal.value)


def test_bundled_checkpoints_carry_no_code_and_are_refused():
    with pytest.raises(ValueError, match="holds no .*.py: load the model and save it again with save_pretrained"):
        read_model_folder(checkpoint_path("dfn-tiny"))


def test_only_the_weights_that_are_loaded_are_selected(folder):
    copy = (folder / "model.safetensors").read_bytes()
    shard(folder)
    assert not read_model_folder(folder).left
    (folder / "model.safetensors").write_bytes(copy)
    assert read_model_folder(folder).left == [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
    ]  # fmt: skip


def test_fields_with_local_paths_hold_their_last_component(folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert read_model_folder(folder).cleaned == []
    base = "/home/alice/secret/base"
    edit(folder / "config.json", _name_or_path="/home/alice/secret/start")
    edit(
        folder / "tokenizer_config.json", name_or_path="owner/name", special_tokens_map_file="/root/.cache/x/map.json"
    )
    edit(folder / "adapter/adapter_config.json", base_model_name_or_path=base)
    card = f"---\nbase_model: {base}\ntags:\n- base_model:adapter:{base}\n---\n"
    (folder / "adapter/README.md").write_text(card)
    files = read_model_folder(folder)
    sent = {name: files.uploaded[name] for name in files.cleaned}
    assert json.loads(sent["config.json"])["_name_or_path"] == "start"
    tokenizer = json.loads(sent["tokenizer_config.json"])
    assert (tokenizer["name_or_path"], tokenizer["special_tokens_map_file"]) == ("owner/name", "map.json")
    assert json.loads(sent["adapter/adapter_config.json"])["base_model_name_or_path"] == "base"
    assert sent["adapter/README.md"].decode() == card.replace(base, "base")
    assert not any(b"alice" in content for content in sent.values()) and len(sent) == 4
    changed = [path for path, content in before.items() if path.read_bytes() != content]
    assert len(changed) == 4  # those that this test wrote: the folder itself does not change
