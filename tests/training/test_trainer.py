"""Tests training, resuming, LoRA, several processes, full disks and killed runs of language models."""

import json
import os
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback
from transformers.utils import logging

from dfn_hf.assets.corpus import load_corpus
from dfn_hf.assets.tokenizers import load_tokenizer
from dfn_hf.data.collators import PackedBlockCollator, positions_in_segments
from dfn_hf.data.packing import pack, tokenize
from dfn_hf.presets import new_causal_lm
from dfn_hf.storage.manifest import write_manifest
from dfn_hf.training.checkpoints import newest_complete_checkpoint
from dfn_hf.training.lora import add_lora
from dfn_hf.training.settings import TrainingSettings
from dfn_hf.training.trainer import train_model

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SETTINGS = TrainingSettings(max_steps=6, batch_size=4, save_steps=3, learning_rate=1e-2)
LONG = TrainingSettings(max_steps=100_000, batch_size=4, save_steps=3)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("byte")


@pytest.fixture(scope="module")
def blocks(tokenizer):
    return make_blocks(tokenizer)


def make_blocks(tokenizer):
    document = load_corpus("validation")["text"][3][:4000]
    packed = pack(tokenize(Dataset.from_dict({"text": [document]}), tokenizer), 64)
    return packed.select(range(8, len(packed))), packed.select(range(8))


@pytest.fixture(params=["dfn", "llama"])
def model(request, tokenizer):
    return new_causal_lm(tokenizer, architecture=request.param, **TINY)


def train(model, tokenizer, blocks, folder, settings=SETTINGS, **options):
    return train_model(model, tokenizer, *blocks, folder, settings, progress=False, **options)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_training_saves_a_folder_that_loads(model, tokenizer, blocks, tmp_path):
    verbosity = logging.get_verbosity()
    result = train(model, tokenizer, blocks, tmp_path / "model", provenance="Made for a test.")

    assert logging.get_verbosity() == verbosity
    assert result.validation_loss < result.initial_loss
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not (result.folder / "checkpoints").exists()
    assert "Made for a test." in (result.folder / "README.md").read_text()
    assert json.loads((result.folder / "training_log.json").read_text()) == result.history
    reloaded = AutoModelForCausalLM.from_pretrained(result.folder).eval()
    batch = PackedBlockCollator(reloaded)(list(blocks[1]))
    with torch.no_grad():
        assert reloaded(**batch).loss.item() == pytest.approx(result.validation_loss, rel=1e-4)
    assert AutoTokenizer.from_pretrained(result.folder)("Ünï\n")["input_ids"] == list("Ünï\n".encode())
    assert reloaded.config.use_cache
    assert reloaded.generation_config.eos_token_id == tokenizer.eos_token_id


def test_resumed_run_equals_an_uninterrupted_run(model, tokenizer, blocks, tmp_path):
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    whole = train(model, tokenizer, blocks, tmp_path / "whole")

    class Killed(Exception):
        pass

    class KillAtStep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                raise Killed

    folder = tmp_path / "broken"
    model.load_state_dict(start)
    with pytest.raises(Killed):
        train(model, tokenizer, blocks, folder, callbacks=[KillAtStep()])
    (folder / "checkpoints" / "checkpoint-5").mkdir()
    assert newest_complete_checkpoint(folder / "checkpoints")[0].name == "checkpoint-3"

    with pytest.raises(ValueError, match="stopped after checkpoint-3: add --resume"):
        train(model, tokenizer, blocks, folder)
    with pytest.raises(ValueError, match="had learning_rate = 0.01, not 0.02"):
        train(
            model,
            tokenizer,
            blocks,
            folder,
            replace(SETTINGS, learning_rate=0.02),
            resume=True,
        )
    resumed = train(model, tokenizer, blocks, folder, resume=True)

    assert resumed.validation_loss == pytest.approx(whole.validation_loss, abs=1e-6)
    weights = [AutoModelForCausalLM.from_pretrained(result.folder).state_dict() for result in (whole, resumed)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight)


def test_a_model_is_kept_until_training_ends(model, tokenizer, blocks, tmp_path):
    folder = tmp_path / "mine"
    train(model, tokenizer, blocks, folder)
    before = contents(folder)
    with pytest.raises(ValueError, match="not empty .it holds README.md.: choose another folder, or add --overwrite"):
        train(model, tokenizer, blocks, folder)

    class Fail(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        train(model, tokenizer, blocks, folder, callbacks=[Fail()], overwrite=True)
    kept = contents(folder)
    assert {path: kept[path] for path in before} == before

    train(model, tokenizer, blocks, folder, overwrite=True)
    replaced = contents(folder)
    assert list(tmp_path.iterdir()) == [folder]
    assert {path.name for path in replaced if path.parts[0] != "runs"} == {
        path.name for path in before if path.parts[0] != "runs"
    }
    assert replaced[Path("model.safetensors")] != before[Path("model.safetensors")]


def test_diverged_run_keeps_the_folder(model, tokenizer, blocks, tmp_path):
    folder = tmp_path / "model"
    train(model, tokenizer, blocks, folder)
    before = contents(folder)
    model = new_causal_lm(tokenizer, **TINY)
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="diverged: lower learning_rate .*now 0.01"):
        train(model, tokenizer, blocks, folder, overwrite=True)
    kept = contents(folder)
    assert {path: kept[path] for path in before} == before


def test_output_folder_that_is_a_file_is_rejected(tokenizer, blocks, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        train(new_causal_lm(tokenizer, **TINY), tokenizer, blocks, tmp_path / "file")


def test_lora_folder_loads_and_equals_base_plus_adapter(model, tokenizer, blocks, tmp_path):
    base = train(model, tokenizer, blocks, tmp_path / "base")
    pretrained = AutoModelForCausalLM.from_pretrained(base.folder)
    tuned = train(add_lora(pretrained, rank=2), tokenizer, blocks, tmp_path / "tuned")

    assert tuned.initial_loss == pytest.approx(base.validation_loss, rel=1e-5)
    assert tuned.validation_loss < tuned.initial_loss
    merged = AutoModelForCausalLM.from_pretrained(tuned.folder).eval()
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base.folder), tuned.folder / "adapter"
    ).eval()
    batch = PackedBlockCollator(merged)(list(blocks[1]))
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits, adapted(**batch).logits, rtol=1e-4, atol=1e-4)
        assert merged(**batch).loss.item() == pytest.approx(tuned.validation_loss, rel=1e-4)


def test_lora_reaches_every_target_of_dfn(tokenizer):
    adapted = add_lora(new_causal_lm(tokenizer, **TINY), rank=2)
    trainable = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    for target in ("position_proj", "flow_proj", "value_proj", "gate_proj", "out_proj", "up_proj", "down_proj"):
        assert sum(target in name for name in trainable) >= 2 * TINY["num_hidden_layers"], target


def test_accumulation_equals_one_large_batch(model, tokenizer, blocks, tmp_path):
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    large = train(model, tokenizer, blocks, tmp_path / "large", TrainingSettings(max_steps=3, batch_size=8))
    model.load_state_dict(start)
    settings = TrainingSettings(max_steps=3, batch_size=1, gradient_accumulation_steps=8)
    small = train(model, tokenizer, blocks, tmp_path / "small", settings)
    assert small.validation_loss == pytest.approx(large.validation_loss, rel=1e-4)


@pytest.mark.slow
def test_two_processes_equal_one(tokenizer, blocks, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(DISTRIBUTED_SCRIPT))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
    ]
    subprocess.run([*command, str(tmp_path / "two")], check=True, env=environment() | {"ACCELERATE_USE_CPU": "true"})
    two = json.loads((tmp_path / "two" / "training_log.json").read_text())
    one = train(new_causal_lm(tokenizer, **TINY), tokenizer, blocks, tmp_path / "one")
    losses = [[entry["eval_loss"] for entry in history if "eval_loss" in entry] for history in (one.history, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_llama_does_not_attend_across_packed_documents():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_attention_heads=2, use_cache=False)
    model = LlamaForCausalLM(config).eval()
    tokens = torch.randint(32, (12,))
    segments = torch.tensor([0] * 5 + [1] + [2] * 6)
    block = {"input_ids": tokens.tolist(), "labels": tokens.tolist(), "segment_ids": segments.tolist()}
    batch = PackedBlockCollator(model)([block])
    with torch.no_grad():
        packed = model(**batch).logits[0]
        alone = torch.cat([model(part[None]).logits[0] for part in tokens.split([5, 1, 6])])
    torch.testing.assert_close(packed, alone)


def test_positions_restart_in_each_segment():
    segments = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 0, 0, 0, -1, -1]])
    assert positions_in_segments(segments).tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 0, 1]]


def test_baseline_has_equally_many_parameters(tokenizer):
    for size in ("tiny", "small"):
        dfn, llama = (new_causal_lm(tokenizer, architecture=name, size=size) for name in ("dfn", "llama"))
        assert llama.num_parameters() == pytest.approx(dfn.num_parameters(), rel=0.01)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_steps": 10**400}, "max_steps must be at most 2147483647, got about 10.400"),
        ({"max_steps": 1.5}, "max_steps must be an integer, got '1.5'"),
        ({"batch_size": True}, "batch_size must be an integer, got 'True'"),
        ({"seed": 2**70}, "seed must be at most 4294967295"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"learning_rate": float("inf")}, "learning_rate must be a finite number of at most 1000000.0, got inf"),
        ({"learning_rate": "1"}, "learning_rate must be a number, got '1'"),
        ({"weight_decay": float("nan")}, "weight_decay must be a finite number"),
        ({"max_steps": 0}, "max_steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"warmup_ratio": 1.0}, "warmup_ratio must"),
    ],
)
def test_error_names_the_setting_out_of_range(settings, words):
    with pytest.raises(ValueError, match=words):
        TrainingSettings(**settings)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hidden_size": 2**19}, "this machine has .* GiB: lower hidden_size"),
        ({"architecture": "gpt"}, "architecture is 'gpt'"),
        ({"size": "huge"}, "size is 'huge'"),
        ({"position_dims": 8}, "no field 'position_dims'"),
        ({"architecture": "llama", "position_dim": 8}, "no option 'position_dim'"),
    ],
)
def test_error_names_the_wrong_model_option(tokenizer, options, words):
    with pytest.raises(ValueError, match=words):
        new_causal_lm(tokenizer, **options)


DISTRIBUTED_SCRIPT = """
    import sys
    from dataclasses import replace
    from tests.training.test_trainer import SETTINGS, TINY, load_tokenizer, make_blocks, new_causal_lm, train

    tokenizer = load_tokenizer("byte")
    settings = replace(SETTINGS, batch_size=SETTINGS.batch_size // 2)
    train(new_causal_lm(tokenizer, **TINY), tokenizer, make_blocks(tokenizer), sys.argv[1], settings)
"""

SCRIPT = """
    import resource, signal, sys
    from tests.training.test_trainer import LONG, TINY, load_tokenizer, make_blocks, new_causal_lm, train

    folder, most_bytes = sys.argv[1], int(sys.argv[2])
    tokenizer = load_tokenizer("byte")
    if most_bytes:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    try:
        train(new_causal_lm(tokenizer, **TINY), tokenizer, make_blocks(tokenizer), folder, LONG, overwrite=True)
    except OSError as error:
        sys.exit(f"{error}")
"""


def start_training(folder, most_bytes=0):
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(folder), str(most_bytes)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())


def environment():
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def test_full_disk_is_a_one_line_error_and_keeps_the_checkpoint(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    write_manifest(folder)
    process = start_training(folder, most_bytes=8000)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 1
    assert "No space left on device while" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert (folder / "config.json").read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not list((folder / "checkpoints").glob("checkpoint-*"))


def test_killed_run_resumes_from_the_last_checkpoint(tokenizer, blocks, tmp_path):
    folder = tmp_path / "model"
    process = start_training(folder)
    deadline = time.monotonic() + 600
    while (
        newest_complete_checkpoint(folder / "checkpoints")[0] is None
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.1)
    process.kill()
    process.communicate()
    reached = int(newest_complete_checkpoint(folder / "checkpoints")[0].name.rpartition("-")[2])
    assert reached >= LONG.save_steps
    first_steps = []

    class StopSoon(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            first_steps.append(state.global_step)
            control.should_training_stop = True

    model = new_causal_lm(tokenizer, **TINY)
    result = train(model, tokenizer, blocks, folder, LONG, resume=True, callbacks=[StopSoon()])
    assert first_steps == [reached + 1]
    assert result.history[0]["step"] == 0
    assert result.validation_loss < result.initial_loss
