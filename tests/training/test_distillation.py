"""Tests that distillation fits a converted Llama to the original, and that a run can be resumed."""

from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback
from typer.testing import CliRunner

from dfn_hf.assets.corpus import load_corpus
from dfn_hf.assets.tokenizers import load_tokenizer
from dfn_hf.cli.app import app
from dfn_hf.conversion.llama import llama_to_dfn
from dfn_hf.data.collators import PackedBlockCollator
from dfn_hf.data.packing import pack, tokenize
from dfn_hf.presets import new_causal_lm
from dfn_hf.storage.manifest import MANIFEST, write_manifest
from dfn_hf.training.checkpoints import newest_complete_checkpoint
from dfn_hf.training.distillation import (
    DistillationSettings,
    blocks_loss,
    check_tokenizers,
    distill_model,
    kl_divergence,
    layerwise_error,
    teacher_forced,
)
from dfn_hf.training.settings import TrainingSettings
from dfn_hf.training.trainer import train_model

SETTINGS = DistillationSettings(max_steps=24, batch_size=4, save_steps=8, learning_rate=1e-2, layerwise_ratio=0.5)
WINDOWS = {"local_window": 4, "num_neighbors": 4}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("byte")


@pytest.fixture(scope="module")
def blocks(tokenizer):
    text = load_corpus("validation")["text"][3]
    packed = pack(tokenize(Dataset.from_dict({"text": [text[:8000], text[8000:8100]]}), tokenizer), 64)
    return packed.select(range(8, len(packed))), packed.select(range(8))


@pytest.fixture(scope="module")
def teacher(tokenizer, blocks, tmp_path_factory):
    """Folder of a trained Llama."""
    model = new_causal_lm(
        tokenizer,
        architecture="llama",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
    )
    settings = TrainingSettings(max_steps=120, batch_size=8, learning_rate=1e-2)
    folder = tmp_path_factory.mktemp("llama") / "teacher"
    return train_model(model, tokenizer, *blocks, folder, settings, progress=False).folder


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def distill(teacher, tokenizer, blocks, folder, settings=SETTINGS, **options):
    student, _ = llama_to_dfn(teacher, **WINDOWS)
    return distill_model(student, load(teacher), tokenizer, *blocks, folder, settings, progress=False, **options)


def differences(student, teacher, blocks):
    """Layer-wise error and KL divergence of the next-token distributions on the validation blocks."""
    batch = PackedBlockCollator(teacher)(list(blocks[1]))
    scored = batch.pop("labels")[:, 1:] != -100
    with torch.no_grad():
        taught = teacher(**batch, output_hidden_states=True)
        kl = kl_divergence(student(**batch).logits[:, :-1][scored], taught.logits[:, :-1][scored])
        with teacher_forced(student.model.layers, taught.hidden_states):
            learnt = student(**batch, output_hidden_states=True)
    return layerwise_error(learnt.hidden_states, taught.hidden_states).item(), kl.item()


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class FailAtStep(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise RuntimeError("power cut")


def test_layerwise_error_and_divergence_decrease(teacher, tokenizer, blocks, tmp_path):
    result = distill(teacher, tokenizer, blocks, tmp_path / "student")

    before = differences(llama_to_dfn(teacher, **WINDOWS)[0].eval(), load(teacher), blocks)
    after = differences(load(result.folder), load(teacher), blocks)
    assert after[0] < 0.9 * before[0] and after[1] < 0.7 * before[1]
    assert result.teacher_loss < result.validation_loss < result.initial_loss
    assert result.validation_loss == pytest.approx(blocks_loss(load(result.folder), blocks[1], 4), rel=1e-3)
    assert result.num_tokens == 24 * 4 * 64
    assert result.operations > 6 * 24 * 4 * 64 * load(result.folder).num_parameters(exclude_embeddings=True)


def test_divergence_of_a_copy_is_zero(teacher, tokenizer, blocks):
    model = llama_to_dfn(teacher, **WINDOWS)[0].eval()
    error, kl = differences(model, model, blocks)
    assert error == pytest.approx(0, abs=1e-8) and kl == pytest.approx(0, abs=1e-6)


def test_resumed_run_equals_an_uninterrupted_run(teacher, tokenizer, blocks, tmp_path):
    whole = distill(teacher, tokenizer, blocks, tmp_path / "whole")
    folder = tmp_path / "broken"
    with pytest.raises(RuntimeError, match="power cut"):
        distill(teacher, tokenizer, blocks, folder, callbacks=[FailAtStep(10)])
    assert newest_complete_checkpoint(folder / "checkpoints")[0].name == "checkpoint-8"
    with pytest.raises(ValueError, match=r"had layerwise_ratio = 0\.5, not 0\.2"):
        distill(teacher, tokenizer, blocks, folder, replace(SETTINGS, layerwise_ratio=0.2), resume=True)
    resumed = distill(teacher, tokenizer, blocks, folder, resume=True)

    for kind in ("loss", "eval_loss"):
        losses = [{entry["step"]: entry[kind] for entry in run.history if kind in entry} for run in (whole, resumed)]
        losses[1].pop(10, None)  # of the steps since it was resumed alone
        assert losses[1].items() and losses[1] == pytest.approx(
            {step: losses[0][step] for step in losses[1]}, abs=1e-6
        )
    assert resumed.operations == whole.operations
    weights = [load(result.folder).state_dict() for result in (whole, resumed)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight)


def test_failed_run_does_not_change_the_folder(teacher, tokenizer, blocks, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    write_manifest(folder)
    with pytest.raises(RuntimeError, match="power cut"):
        distill(teacher, tokenizer, blocks, folder, overwrite=True, callbacks=[FailAtStep(1)])
    assert (folder / "config.json").read_text() == "{}"
    assert {path.name for path in folder.iterdir()} == {"config.json", MANIFEST, "checkpoints"}


def test_the_teacher_is_not_overwritten(teacher, tokenizer, blocks):
    with pytest.raises(ValueError, match="holds the teacher: give another output folder"):
        distill(teacher, tokenizer, blocks, teacher, overwrite=True)


@pytest.mark.parametrize("ratio", [-0.1, 1.1])
def test_layerwise_ratio_out_of_range_is_rejected(ratio):
    with pytest.raises(ValueError, match=f"layerwise_ratio must be between 0 and 1, got {ratio}"):
        DistillationSettings(layerwise_ratio=ratio)


def test_student_of_another_teacher_is_rejected(teacher, tokenizer, blocks, tmp_path):
    options = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    for architecture, told in (
        ("dfn", "num_hidden_layers is 3 in the student and 2"),
        ("llama", "has model_type 'llama'"),
    ):
        student = new_causal_lm(tokenizer, architecture=architecture, **options)
        with pytest.raises(ValueError, match=told):
            distill_model(student, load(teacher), tokenizer, *blocks, tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out").exists()


def test_tokenizers_must_agree(tokenizer):
    check_tokenizers(tokenizer, load_tokenizer("byte"))
    with pytest.raises(ValueError, match="in the student's tokenizer and .* in the teacher's"):
        check_tokenizers(tokenizer, load_tokenizer("bpe"))


def test_command(teacher, tokenizer, tmp_path):
    start, output, text = tmp_path / "start", tmp_path / "student", tmp_path / "text.txt"
    llama_to_dfn(teacher, **WINDOWS)[0].save_pretrained(start)
    tokenizer.save_pretrained(start)
    text.write_text(load_corpus("validation")["text"][3][:4000])
    command = ["distill", output, "--student", start, "--teacher", teacher, "--data", text, "--block-size", 64]
    ran = CliRunner().invoke(app, [str(word) for word in [*command, "--max-steps", 2, "--batch-size", 2]])
    assert ran.exit_code == 0, ran.output
    assert "teacher" in ran.output and "256" in ran.output
    assert "Distilled from" in (output / "README.md").read_text()
    again = CliRunner().invoke(app, [str(word) for word in command])
    assert again.exit_code == 1 and "not empty" in again.output
