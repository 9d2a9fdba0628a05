"""Originals of Liquid: detection of their formats, functions of the native models, and converted weights."""

import cmath
import math

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForSeq2SeqLM

from dfn_hf import LiquidForSeq2SeqLM, LiquidNativeConfig, LiquidNativeModel
from dfn_hf.conversion.detect import detect_format
from dfn_hf.conversion.formats.liquid import LIQUID
from dfn_hf.conversion.plan import plan_conversion
from tests.support.native_checkpoints import random_weights, save_checkpoint

FORMATS = {one.name.removeprefix("liquid-"): one for one in LIQUID}
SIZES = {"V": 29, "E": 16, "L": 24, "F": 20, "X": 3, "Q": 10, "K": 8, "D": 4, "R": 2, "P": 9}
COUNTS = {"encoder_layer": 1, "decoder_layer": 2, "expert": 3, "encoder_expert": 2, "lstm_layer": 2}
HEADS, GROUPS = 4, 2
WINDOWS = {"L3": 15, "L6": 6}
NEW = ("frequency_attention", "cross_", "q_norm", "k_norm", "gated_conv.norm", "moe.experts", "mlp_norm")


def settings(name):
    given = {"window_size": WINDOWS.get(name, 8), "compression_ratio": 0.4}
    return {**given, "num_heads": HEADS} if "num_heads" in FORMATS[name].settings else given


@pytest.fixture(scope="module", params=FORMATS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def weights(name):
    return random_weights(FORMATS[name].table, SIZES, COUNTS)


@pytest.fixture(scope="module")
def checkpoint(weights, tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("liquid") / "best_model.pth", weights)


def write(checkpoint, folder, name, **options):
    folder.mkdir()
    conversion = plan_conversion(checkpoint, settings=settings(name), **options)
    conversion.write(folder)
    return conversion.report


def tokens(length, rows=2):
    return torch.randint(0, SIZES["V"], (rows, length), generator=torch.Generator().manual_seed(length))


def test_format_is_detected_from_keys(name, weights):
    assert detect_format(set(weights)) is FORMATS[name]


def test_model_receives_weights_with_a_counterpart(name, weights, checkpoint, tmp_path):
    report = write(checkpoint, tmp_path / "out", name)
    model, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(model) is LiquidForSeq2SeqLM and not any(info[kind] for kind in ("missing_keys", "unexpected_keys"))
    assert set(report.mapped) | set(report.dropped) == set(weights) and not set(report.mapped) & set(report.dropped)
    state = model.state_dict()
    for key, targets in report.mapped.items():
        found = [state[target] for target in targets]
        source = weights[key]
        if "qkv" in key:
            found = [torch.cat(found)]
        elif "offset_conv" in key:
            source = source[::2]
        elif "deform_conv.conv.weight" in key:
            source = source[..., 0]
        assert found and all(torch.equal(tensor, source) for tensor in found), key
    filled = [target for targets in report.mapped.values() for target in targets]
    assert len(filled) == len(set(filled)) and set(filled) | set(report.new) == set(state)
    assert not set(filled) & set(report.new)
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    logits = model(input_ids=tokens(20), decoder_input_ids=tokens(11)).logits
    assert logits.shape == (2, 11, SIZES["V"]) and torch.isfinite(logits).all()
    generated = model.generate(tokens(9), decoder_start_token_id=3, max_new_tokens=4, do_sample=False)
    assert generated.shape == (2, 5)


def test_configuration_follows_shapes_and_settings(name, checkpoint):
    config = plan_conversion(checkpoint, settings=settings(name)).config
    assert config.num_attention_heads == HEADS and config.num_decoder_layers == 2
    assert config.num_hidden_layers == (2 if name == "L0" else 1)
    assert config.num_key_value_heads == (GROUPS if name in ("L4", "L5", "L6") else HEADS)
    assert config.lstm_hidden_size == (0 if name in ("L0", "L1", "L2") else SIZES["Q"])
    assert config.attention_window == WINDOWS.get(name, 8) and config.max_position_embeddings == SIZES["L"]
    assert config.base_compression_ratio == 0.4 and not config.tie_word_embeddings
    assert config.min_compression_ratio == (0.4 if name in ("L0", "L1") else 0.1)
    assert config.num_experts_per_tok == (2 if name in ("L2", "L3") else 3)
    assert config.hidden_dropout == {"L0": 0, "L1": 0, "L2": 0.12, "L3": 0.12}.get(name, 0.1)


@pytest.mark.parametrize("name", ["L3", "L4", "L5", "L6"], indirect=True)
def test_only_weights_missing_in_the_original_are_new(name, checkpoint):
    new = plan_conversion(checkpoint, settings=settings(name)).report.new
    lacking = (*NEW, "proj_norm", "layer_norm", "mlp.norm") if name == "L3" else NEW
    assert all(any(part in one for part in lacking) for one in new)


def original(name, weights, row, window):
    """Return the logits of one row, computed token by token in float64 from the equations of the original."""
    w = {key: tensor.double() for key, tensor in weights.items()}
    w = {key: x[..., 0] if key.endswith("deform_conv.conv.weight") else x for key, x in w.items()}
    size, head_dim = SIZES["E"], SIZES["E"] // HEADS

    def linear(key, x):
        return w[f"{key}.weight"] @ x + w.get(f"{key}.bias", 0)

    def activation(x):
        return x.clamp(min=0) if name == "L3" else F.gelu(x)

    def normalise(x, eps):
        return (x - x.mean()) / torch.sqrt(x.var(unbiased=False) + eps)

    def layer_norm(key, x):
        return normalise(x, 1e-5) * w[f"{key}.weight"] + w[f"{key}.bias"]

    def softmax(scores):
        powers = [math.exp(score) for score in scores]
        return [power / sum(powers) for power in powers]

    def convolve(key, states, dilation=1):
        """Apply a centred convolution with 3 taps."""
        outputs = []
        for place in range(len(states)):
            y = w[f"{key}.bias"]
            for tap in range(3):
                source = place + dilation * (tap - 1)
                if 0 <= source < len(states):
                    y = y + w[f"{key}.weight"][:, :, tap] @ states[source]
            outputs.append(y)
        return outputs

    def embedding(row):
        key = "decoder_embedding"
        states = [
            w[f"{key}.token_embedding.weight"][token] + w[f"{key}.position_embedding.weight"][place]
            for place, token in enumerate(row)
        ]
        for conv in ("conv1", "conv2"):
            states = [activation(y) for y in convolve(f"{key}.{conv}", states)]
        if name == "L6":
            states = [layer_norm(f"{key}.layer_norm", x) for x in states]
        length, padded = len(states), 1
        while padded < length:
            padded *= 2
        bins = [
            sum(cmath.exp(-2j * math.pi * k * i / padded) * x for i, x in enumerate(states)) for k in range(padded)
        ]
        magnitude = torch.stack([one.abs() for one in bins])
        complexity = float((magnitude > 0.1 * magnitude.max(dim=0).values).double().mean())
        kept = max(1, int(min(max(0.5 * (1 - complexity), 0.1), 1) * length))
        restored = [
            sum(cmath.exp(2j * math.pi * k * i / length) * bins[k] for k in range(kept)).real / length
            for i in range(length)
        ]
        states = [linear(f"{key}.proj", x) for x in restored]
        return [layer_norm(f"{key}.layer_norm", x) for x in states] if name == "L6" else states

    def attend_over_heads(query, key, value):
        """Attend from each head to itself and the preceding heads."""
        read = []
        for head, q in enumerate(query):
            weights = softmax([float(q @ k) / math.sqrt(head_dim) for k in key[: head + 1]])
            read.append(sum(weight * v for weight, v in zip(weights, value, strict=False)))
        return read

    def fused_attention(key, states):
        states = states + [torch.zeros(size, dtype=torch.float64)] * (window - len(states))
        read = []
        for x in states:
            query, keys, value = (part.split(head_dim) for part in linear(f"{key}.qkv", x).split(size))
            read.append(attend_over_heads(query, keys, value))
        by_head = torch.cat([read[place][head] for head in range(HEADS) for place in range(window)])
        return [linear(f"{key}.out", x) for x in by_head.split(size)]

    def rotate(x, place):
        even, odd = [], []
        for pair in range(head_dim // 2):
            angle = place * 10000 ** (-2 * pair / head_dim)
            first, second = x[2 * pair], x[2 * pair + 1]
            even.append(first * math.cos(angle) - second * math.sin(angle))
            odd.append(first * math.sin(angle) + second * math.cos(angle))
        return torch.stack(even + odd)

    def differential_attention(key, states):
        products = [w[f"{key}.lambda_q{one}"] @ w[f"{key}.lambda_k{one}"] for one in (1, 2)]
        factor = min(max(math.exp(products[0]) - math.exp(products[1]) + 0.8, 0.1), 0.9)
        read = []
        for place, x in enumerate(states):
            value = linear(f"{key}.v_proj", x).split(head_dim) * (HEADS // GROUPS)
            maps = []
            for one in (1, 2):
                query = [rotate(q, place) for q in linear(f"{key}.q_proj{one}", x).split(head_dim)]
                keys = [rotate(k, place) for k in linear(f"{key}.k_proj{one}", x).split(head_dim)]
                maps.append(torch.cat(attend_over_heads(query, keys * (HEADS // GROUPS), value)))
            read.append(maps[0] - factor * maps[1])
        padded = -(-len(states) // window) * window
        read += [torch.zeros(size, dtype=torch.float64)] * (padded - len(states))
        laid = [x for start in range(0, padded - window + 1, window // 2) for x in read[start : start + window]]
        return [linear(f"{key}.out", x) for x in laid]

    def gated_convolution(key, states):
        key, length = f"{key}.deform_conv", len(states)
        offsets = convolve(f"{key}.offset_conv", states, dilation=2)
        nothing = [torch.zeros(size, dtype=torch.float64)] * 2
        padded = nothing + states + nothing
        taps = []
        for tap in range(3):
            for place in range(length):
                where = min(max(place + 2 + float(offsets[place][2 * tap]), 0), length + 3)
                left = math.floor(where)
                right = min(left + 1, length + 3)
                taps.append((left + 1 - where) * padded[left] + (where - left) * padded[right])
        numbers = torch.cat(taps)  # order: tap, token, feature; the original reinterprets it as [feature, token]
        outputs = []
        for place in range(length):
            y = linear(f"{key}.conv", numbers[place::length])
            gated = F.gelu(y[:size]) * torch.sigmoid(y[size:])
            outputs.append(normalise(gated, 1e-5 if name == "L3" else 1e-8))
        return outputs

    def feed_forward(key, x):
        if name == "L3":
            return linear(f"{key}.3", F.gelu(linear(f"{key}.0", x)))
        inner = layer_norm(f"{key}.1", linear(f"{key}.0", x).clamp(-100, 100))
        return linear(f"{key}.4", F.gelu(inner)).clamp(-100, 100)

    def lstm(states, memory):
        for layer in range(COUNTS["lstm_layer"]):
            h, c = memory[layer]
            outputs = []
            for x in states:
                gates = w[f"external_memory.lstm.weight_ih_l{layer}"] @ x + w[f"external_memory.lstm.bias_ih_l{layer}"]
                gates = gates + w[f"external_memory.lstm.weight_hh_l{layer}"] @ h
                gates = gates + w[f"external_memory.lstm.bias_hh_l{layer}"]
                write, keep, new, show = gates.chunk(4)
                c = keep.sigmoid() * c + write.sigmoid() * new.tanh()
                h = show.sigmoid() * c.tanh()
                outputs.append(h)
            memory[layer] = h, c
            states = outputs
        return states

    attention = fused_attention if name == "L3" else differential_attention
    states = embedding(row)
    zeros = torch.zeros(SIZES["Q"], dtype=torch.float64)
    memory = [(zeros, zeros)] * COUNTS["lstm_layer"]
    for layer in range(COUNTS["decoder_layer"]):
        key = f"decoder_layers.{layer}"
        for part, norm, run in (("attention", "norm1", attention), ("dilated_conv", "norm2", gated_convolution)):
            added = run(f"{key}.{part}", [layer_norm(f"{key}.{norm}", x) for x in states])
            states = [x + y for x, y in zip(states, added, strict=False)]
        states = [x + feed_forward(f"{key}.ff_layer", x) for x in states]
        hidden = lstm(states, memory)
        states = [
            x + linear("external_memory.output_layer.2", F.gelu(linear("external_memory.output_layer.0", h)))
            for x, h in zip(states, hidden, strict=True)
        ]
    return torch.stack([linear("output_layer", layer_norm("layer_norm", x)) for x in states])


@pytest.mark.parametrize(
    "name, length", [*(("L3", n) for n in (1, 6, 11, 15)), *(("L6", n) for n in (1, 5, 13, 23, 27))], indirect=["name"]
)
def test_native_model_computes_the_original(name, length, weights, checkpoint, tmp_path):
    report = write(checkpoint, tmp_path / "out", name, native=True)
    model = AutoModel.from_pretrained(tmp_path / "out")
    assert type(model) is LiquidNativeModel and not report.dropped and not report.new
    row = tokens(length)
    expected = torch.stack([original(name, weights, one[: SIZES["L"]], WINDOWS[name]) for one in row])
    logits = model(input_ids=tokens(4), decoder_input_ids=row).logits
    torch.testing.assert_close(logits.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["L6"], indirect=True)
@pytest.mark.parametrize("part", ["ff_layer.0", "ff_layer.4"])
def test_native_model_clamps_its_feed_forward_network(name, part, weights, tmp_path):
    loud = {key: 1000 * tensor if part in key else tensor for key, tensor in weights.items()}
    write(save_checkpoint(tmp_path / "loud.pth", loud), tmp_path / "out", name, native=True)
    row = tokens(5, rows=1)
    logits = AutoModel.from_pretrained(tmp_path / "out")(decoder_input_ids=row).logits
    torch.testing.assert_close(logits[0].double(), original(name, loud, row[0], WINDOWS[name]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["L3", "L6"], indirect=True)
def test_native_round_trip_is_exact(name, weights, checkpoint, tmp_path):
    write(checkpoint, tmp_path / "out", name, native=True)
    loaded = AutoModel.from_pretrained(tmp_path / "out").state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in weights.items())


@pytest.mark.parametrize("name", ["L0", "L1", "L2", "L4", "L5"], indirect=True)
def test_other_formats_have_no_native_model(name, checkpoint):
    with pytest.raises(ValueError, match=f"no native model for liquid-{name}, because .*omit --native"):
        plan_conversion(checkpoint, native=True)


@pytest.mark.parametrize("name", ["L4"], indirect=True)
def test_contradictory_settings_raise(name, checkpoint):
    with pytest.raises(ValueError, match="`num_heads` \\(3\\) gives heads of 5.33333 features"):
        plan_conversion(checkpoint, settings={"num_heads": 3})
    with pytest.raises(ValueError, match="must be a multiple of twice `num_attention_heads` \\(16\\)"):
        plan_conversion(checkpoint, settings={"num_heads": 16})


@pytest.mark.parametrize("name", ["L6"], indirect=True)
def test_empty_weights_raise(name, weights, tmp_path):
    empty = {key: tensor[:0] if "lambda" in key else tensor for key, tensor in weights.items()}
    with pytest.raises(ValueError, match="lambda_q1' has shape \\(0,\\), which is empty"):
        plan_conversion(save_checkpoint(tmp_path / "empty.pth", empty))


@pytest.mark.parametrize("layout", ["L3", "L6"])
def test_new_native_model_is_initialised(layout):
    sizes = {"embed_dim": 8, "num_heads": 2, "num_kv_groups": 1, "ff_hidden_dim": 8, "vocab_size": 11}
    model = LiquidNativeModel(LiquidNativeConfig(layout=layout, num_encoder_layers=1, num_decoder_layers=1, **sizes))
    assert all(torch.isfinite(weight).all() for weight in model.parameters())
    assert torch.isfinite(model(decoder_input_ids=torch.arange(7)[None]).logits).all()


def test_native_configuration_and_inputs_are_checked():
    with pytest.raises(ValueError, match="`layout` must be one of"):
        LiquidNativeConfig(layout="L4")
    with pytest.raises(ValueError, match="`embed_dim` \\(512\\) must be a multiple of `num_heads` \\(7\\)"):
        LiquidNativeConfig(num_heads=7)
    with pytest.raises(ValueError, match="`num_kv_groups` \\(3\\) must divide `num_heads` \\(8\\)"):
        LiquidNativeConfig(num_kv_groups=3)
    with pytest.raises(ValueError, match="`window_size` must be at least 2"):
        LiquidNativeConfig(window_size=1)
    sizes = {"embed_dim": 8, "num_heads": 2, "num_encoder_layers": 1, "num_decoder_layers": 1, "vocab_size": 11}
    model = LiquidNativeModel(LiquidNativeConfig(layout="L3", window_size=4, **sizes))
    with pytest.raises(ValueError, match="has 5 tokens, but the original accepts 1 to 4.*set `window_size`"):
        model(decoder_input_ids=torch.zeros(1, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="`decoder_input_ids` .* is required"):
        model(input_ids=torch.zeros(1, 5, dtype=torch.long))
