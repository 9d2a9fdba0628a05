"""Tests activation and gradient norms in the Trainer's log, and their plot."""

import pytest
import torch
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

from dfn_hf import LiquidConfig, LiquidForSeq2SeqLM, ModuleNormsCallback
from dfn_hf.assets.tokenizers import load_tokenizer
from dfn_hf.plots.module_norms import plot_module_norms

PART = "model.decoder.layers.0.gated_conv"


class Expected(TrainerCallback):
    """Computes the same norms independently, at every step."""

    def __init__(self):
        self.gradients, self.activations = {}, {}

    def on_train_begin(self, args, state, control, **kwargs):
        part = kwargs["model"].get_submodule(PART)
        part.register_forward_hook(
            lambda module, args, output: self.activations.update({state.global_step + 1: output})
        )

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        gradients = [one.grad.flatten() for one in kwargs["model"].get_submodule(PART).parameters()]
        self.gradients[state.global_step + 1] = torch.cat(gradients).norm().item()


def train(folder, modules=None, **arguments):
    torch.manual_seed(0)
    model = LiquidForSeq2SeqLM(
        LiquidConfig(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            frame_length=8,
            pad_token_id=1,
        )  # fmt: skip
    )
    pairs = [{"input_ids": list(range(2, 9 + n)), "labels": list(range(3, 9 + n))} for n in range(8)]
    settings = {
        "max_steps": 6, "logging_steps": 2, "per_device_train_batch_size": 2, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    callback, expected = ModuleNormsCallback(modules), Expected()
    trainer = Trainer(
        model,
        TrainingArguments(str(folder), **settings | arguments),
        DataCollatorForSeq2Seq(load_tokenizer("bpe-en-es"), model),
        pairs,
        callbacks=[callback, expected],
    )
    trainer.train()
    assert not any(module._forward_hooks for name, module in model.named_modules() if name != PART)
    return [entry for entry in trainer.state.log_history if "loss" in entry], expected


def test_log_contains_the_norms_of_logged_steps(tmp_path):
    log, expected = train(tmp_path)
    assert [entry["step"] for entry in log] == [2, 4, 6]
    parts = {field.partition("/")[2] for field in log[0] if "/" in field}
    assert (
        PART in parts and "model.encoder.layers.0.attention" in parts and "model.encoder.layers.0.dropout" not in parts
    )
    for entry in log:
        assert {f"{kind}/{part}" for kind in ("activation_norm", "gradient_norm") for part in parts} <= entry.keys()
        step = entry["step"]
        assert entry[f"gradient_norm/{PART}"] == pytest.approx(expected.gradients[step], rel=1e-5)
        root_mean_square = expected.activations[step].square().mean().sqrt().item()
        assert entry[f"activation_norm/{PART}"] == pytest.approx(root_mean_square, rel=1e-5)


def test_siblings_of_layers_are_included(tmp_path):
    log, _ = train(tmp_path)
    for part in (
        "encoder.embed_tokens",
        "encoder.embedding",
        "encoder.norm",
        "decoder.embedding",
        "decoder.external_memory",
    ):
        assert log[0][f"activation_norm/model.{part}"] > 0
        assert log[0][f"gradient_norm/model.{part}"] > 0


def test_named_modules_with_gradient_accumulation(tmp_path):
    log, expected = train(tmp_path, [PART], gradient_accumulation_steps=2)
    assert {field for field in log[0] if "/" in field} == {f"activation_norm/{PART}", f"gradient_norm/{PART}"}
    assert log[1][f"gradient_norm/{PART}"] == pytest.approx(expected.gradients[4], rel=1e-5)
    with pytest.raises(ValueError, match="modules names 'model.nowhere'"):
        train(tmp_path, ["model.nowhere"])


@pytest.mark.parametrize("kind", ["activation_norm", "gradient_norm"])
def test_plot_of_a_history(kind, tmp_path):
    log, _ = train(tmp_path)
    figure = plot_module_norms(log, kind, path=str(tmp_path / "norms.png"))
    assert (tmp_path / "norms.png").read_bytes().startswith(b"\x89PNG")
    parts = {field for field in log[0] if field.startswith(f"{kind}/")}
    assert len(figure.axes[0].lines) == len(parts)
    with pytest.raises(ValueError, match=f"holds no '{kind}'"):
        plot_module_norms([{"step": 1, "loss": 2.0}], kind)
