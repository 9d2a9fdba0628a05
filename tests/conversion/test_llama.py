"""Llama-family checkpoints become DFNs that differ only in the attention weights."""

import json

import pytest
import torch
from transformers import (
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto import AutoModelForCausalLM

from dfn_hf import DFNForCausalLM
from dfn_hf.assets.tokenizers import load_tokenizer
from dfn_hf.conversion.llama import llama_to_dfn
from dfn_hf.hub.convert import convert_llama

SMALL = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 6,
    "intermediate_size": 40,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "untied": LlamaConfig(**SMALL, tie_word_embeddings=False),
    "mistral": MistralConfig(**SMALL | {"num_key_value_heads": 2}, sliding_window=8),
    "qwen3": Qwen3Config(**SMALL | {"num_key_value_heads": 1}),
}
IDS = torch.arange(2, 42).view(2, 20)


def make(config) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def test_damaged_configurations_are_named(tmp_path):
    make(CONFIGS["llama"]).save_pretrained(tmp_path / "llama")
    load_tokenizer("byte").save_pretrained(tmp_path / "llama")
    path = tmp_path / "llama" / "config.json"
    config = json.loads(path.read_text())
    for field, value in {"hidden_size": "x", "vocab_size": 1.5, "num_hidden_layers": 10**12, "hidden_act": 3}.items():
        path.write_text(json.dumps({**config, field: value}))
        with pytest.raises(ValueError, match=rf"config\.json.*{field}"):
            convert_llama(tmp_path / "llama", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(params=CONFIGS)
def llama(request, tmp_path):
    model = make(CONFIGS[request.param])
    model.save_pretrained(tmp_path)
    return model


def test_every_weight_is_converted_or_dropped_with_a_reason(llama, tmp_path):
    dfn, report = llama_to_dfn(tmp_path, position_dim=3, num_neighbors=5, local_window=6)

    source, target = llama.state_dict(), dfn.state_dict()
    assert report.mapped.keys() | report.dropped.keys() == source.keys()
    assert not report.mapped.keys() & report.dropped.keys()
    assert all("q_" in key or "k_" in key for key in report.dropped)
    filled = [name for names in report.mapped.values() for name in names]
    assert sorted([*filled, *report.new]) == sorted(target)
    config, width = llama.config, llama.config.hidden_size
    for key, (name,) in report.mapped.items():
        weight = source[key]
        if "v_proj" in key:
            heads = weight.view(config.num_key_value_heads, -1, width)
            groups = config.num_attention_heads // config.num_key_value_heads
            assert torch.equal(
                target[name].view(-1, groups, *heads.shape[1:]), heads[:, None].expand(-1, groups, -1, -1)
            )
        elif "gate_proj" in key or "up_proj" in key:
            assert torch.equal(target[name][:, :width], weight) and not target[name][:, width:].any()
        else:
            assert torch.equal(target[name], weight)
    assert (dfn.config.position_dim, dfn.config.num_neighbors, dfn.config.local_window) == (3, 5, 6)
    assert dfn.generation_config.eos_token_id == 2


def test_without_attention_output_the_logits_are_equal(llama, tmp_path):
    dfn, _ = llama_to_dfn(tmp_path)
    with torch.no_grad():
        for layer in llama.model.layers:
            layer.self_attn.o_proj.weight.zero_()
        for layer in dfn.model.layers:
            layer.out_proj.weight.zero_()
        torch.testing.assert_close(dfn(IDS).logits, llama(IDS).logits, atol=1e-5, rtol=0)


def test_single_token_rows_have_equal_logits(llama, tmp_path):
    dfn, _ = llama_to_dfn(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(dfn(IDS[:, :1]).logits, llama(IDS[:, :1]).logits, atol=1e-5, rtol=0)


def test_save_and_load_is_exact(llama, tmp_path):
    dfn, _ = llama_to_dfn(tmp_path)
    dfn.save_pretrained(tmp_path / "dfn")
    loaded = DFNForCausalLM.from_pretrained(tmp_path / "dfn")
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == llama.config.tie_word_embeddings
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in dfn.state_dict().items())


def test_dtype_is_kept_and_scales_stay_float32(tmp_path):
    make(CONFIGS["llama"]).to(torch.bfloat16).save_pretrained(tmp_path)
    dfn, _ = llama_to_dfn(tmp_path)
    assert dfn.dtype == torch.bfloat16
    assert dfn.model.layers[0].attention.log_sharpness.dtype == torch.float32


def test_seed_determines_the_new_weights(tmp_path):
    make(CONFIGS["llama"]).save_pretrained(tmp_path)
    one, again, other = (llama_to_dfn(tmp_path, seed=seed)[0].state_dict() for seed in (0, 0, 1))
    name = "model.layers.0.attention.entities.position_proj.weight"
    assert torch.equal(one[name], again[name]) and not torch.equal(one[name], other[name])


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (LlamaConfig(**SMALL, attention_bias=True), ["self_attn.k_proj.bias", "no counterpart"]),
        (LlamaConfig(**SMALL, mlp_bias=True), ["mlp.down_proj.bias", "no counterpart"]),
        (LlamaConfig(**SMALL, hidden_act="gelu"), ["hidden_act", "'gelu'", "'silu'"]),
        (LlamaConfig(**SMALL | {"head_dim": 8}), ["head_dim (8)", "32", "hidden_size (24)"]),
        (Qwen2Config(**{name: value for name, value in SMALL.items() if name != "head_dim"}), ["'qwen2'", "mistral"]),
        (GemmaConfig(**SMALL), ["'gemma'", "llama, mistral, qwen3"]),
    ],
)
def test_parts_without_a_counterpart_are_named(config, parts, tmp_path):
    make(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError) as error:
        llama_to_dfn(tmp_path)
    assert all(part in str(error.value) for part in parts)
