"""Original FlowNetworks: formats, functions of the native models, and converted weights."""

import math

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from dfn_hf import FlowNetworkForCausalLM, FlowNetworkNativeConfig, FlowNetworkNativeModel
from dfn_hf.conversion.formats.flow_transformer import FLOW_TRANSFORMERS
from dfn_hf.conversion.formats.flownetwork import FLOW_NETWORKS
from dfn_hf.conversion.plan import plan_conversion
from dfn_hf.modeling.native import modeling_flownetwork_native as native
from tests.support.native_checkpoints import random_weights, save_checkpoint

SIZES = {"V": 11, "D": 9, "M": 20, "P": 7, "G": 6, "L": 5, "K": 8, "Y": 18, "C": 2, "X": 9}
SMALL = {"V": 7, "D": 5, "M": 20, "P": 3}  # all flow matrices have at most 64 entries
COUNTS = {"layer": 2}
FORMATS = [*FLOW_NETWORKS, *FLOW_TRANSFORMERS]
CHARACTERS = "\n abcdefgh."
formats = pytest.mark.parametrize(
    "source_format", FORMATS, ids=lambda source_format: f"{source_format.name}-{len(source_format.table)}"
)
native_formats = pytest.mark.parametrize(
    "source_format",
    [source_format for source_format in FORMATS if source_format.native],
    ids=lambda source_format: f"{source_format.name}-{len(source_format.table)}",
)


def by_name(name):
    return next(source_format for source_format in FORMATS if source_format.name == f"flownetwork-{name}")


def write(weights, folder, beside=None, **options):
    """Save a checkpoint of the weights and convert it to `folder`."""
    folder.mkdir()
    checkpoint = save_checkpoint(folder.parent / "checkpoint.pt", weights, **(beside or {}))
    conversion = plan_conversion(checkpoint, **options)
    conversion.write(folder)
    return conversion.report


def tokens(sizes, length):
    return torch.randint(sizes["V"], (2, length), generator=torch.Generator().manual_seed(length))


def linear(w, name, x):
    return w[f"{name}.weight"] @ x + w[f"{name}.bias"]


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def sigmoid(x):
    return 1 / (1 + math.exp(-float(x)))


def softmax(x):
    return (x - x.max()).exp() / (x - x.max()).exp().sum()


def layer_norm(w, name, x):
    x = (x - x.mean()) / torch.sqrt(x.var(unbiased=False) + 1e-5)
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


def flow_map(w, name, x):
    """Return the matrix W(x) of a token."""
    weights = softmax(linear(w, f"{name}.pattern_selector.0", x))
    patterns = w[f"{name}.flow_patterns"]
    mixed = sum(weight * pattern for weight, pattern in zip(weights, patterns, strict=True))
    return sigmoid(linear(w, f"{name}.flow_intensity.0", x)) * mixed


def sparse_layer(w, name, x, dense_limit):
    matrix = flow_map(w, f"{name}.flow_router", x)
    if matrix.numel() > dense_limit:
        entries = sorted(matrix.flatten().abs().tolist(), reverse=True)
        least = entries[max(1, int(matrix.numel() * 0.1)) - 1]
        matrix = torch.where(matrix.abs() >= least, matrix, 0)
    return gelu(layer_norm(w, f"{name}.layer_norm", matrix @ x + w[f"{name}.bias"]))


def dense_layer(w, name, x):
    return layer_norm(w, f"{name}.norm", gelu(flow_map(w, f"{name}.router", x) @ x))


def num_layers(weights):
    return 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("flow_layers."))


def flow_network(weights, ids, layer):
    """Compute the function of F1 and F5 token by token in float64.

    Args:
        layer: the layer of the version, called as `layer(w, name, x)`.
    """
    w = {key: tensor.double() for key, tensor in weights.items()}
    layers = num_layers(weights)

    def token(number, place):
        x = torch.cat([w["token_embedding.weight"][number], w["pos_embedding.weight"][place]])
        x = layer(w, "embedding_flow", x) * w["global_flow_gate"]
        for number in range(layers):
            x = layer(w, f"flow_layers.{number}", x)
        return layer(w, "output_flow", x)

    return torch.stack([torch.stack([token(number, place) for place, number in enumerate(row)]) for row in ids])


def enhanced_layer(w, name, row, boundaries):
    """Run the layer of F4 on the tokens of one row; `boundaries` holds 0 or 1 per token, or is None."""
    router, spatial = f"{name}.flow_router", f"{name}.spatial_router"
    normed = [layer_norm(w, f"{name}.norm1", x) for x in row]
    mean = sum(normed) / len(normed)
    context = linear(w, f"{router}.context_projection", mean)
    channels = softmax(linear(w, f"{router}.channel_mixer.2", gelu(linear(w, f"{router}.channel_mixer.0", mean))))
    out = []
    for place, (x, u) in enumerate(zip(row, normed, strict=True)):
        weights = softmax(linear(w, f"{router}.context_selector.0", torch.cat([u, context])))
        flow = 0
        for channel, channel_weight in enumerate(channels):
            patterns = w[f"{router}.channel_patterns.{channel}"]
            flow = flow + channel_weight * sum(a * pattern @ u for a, pattern in zip(weights, patterns, strict=True))
        flow = flow * sigmoid(linear(w, f"{router}.flow_intensity.0", u))
        if boundaries is None:
            hidden = linear(w, f"{spatial}.classifier.0", flow).clamp(min=0)
            boundary = sigmoid(linear(w, f"{spatial}.classifier.2", hidden))
        else:
            boundary = boundaries[place]
        inside, between = (pattern @ flow for pattern in w[f"{spatial}.patterns"])
        flow = flow + (1 - boundary) * inside + boundary * between
        y = layer_norm(w, f"{name}.norm2", x + flow if len(x) == len(flow) else flow)
        out.append(y + linear(w, f"{name}.ffn.2", gelu(linear(w, f"{name}.ffn.0", y))))
    return out


def flow_transformer(weights, ids, known=()):
    """Compute the function of F4 in float64; also return the number of layers that ran."""
    w = {key: tensor.double() for key, tensor in weights.items()}
    rows, wanted = [], []
    for row in ids:
        states = [dense_layer(w, "embedding_flow", w["token_embedding.weight"][number]) for number in row]
        states = [layer_norm(w, "norm_embedding", x) * w["global_flow_gate"] for x in states]
        hidden = gelu(linear(w, "adaptive_controller.0", sum(states) / len(states)))
        wanted.append(sigmoid(linear(w, "adaptive_controller.2", hidden)))
        rows.append(states)
    layers = max(2, int(num_layers(weights) * sum(wanted) / len(wanted)))
    logits = []
    for row, states in zip(ids, rows, strict=True):
        boundaries = [float(int(number) in known) for number in row] if known else None
        for number in range(layers):
            states = enhanced_layer(w, f"flow_layers.{number}", states, boundaries)
        states = [layer_norm(w, "final_norm", x) for x in states]
        logits.append(torch.stack(enhanced_layer(w, "output_flow", states, None)))
    return torch.stack(logits), layers


def large_random_weights(source_format, sizes, layers, patterns=1.0):
    """Return weights that make the logits depend on the tokens clearly; `patterns` scales the pattern weights."""
    weights = random_weights(source_format.table, sizes, {"layer": layers})
    for key, tensor in weights.items():
        if "norm" in key and key.endswith("weight"):
            tensor += 1
        elif key.endswith("bias"):
            tensor *= 0.3
        elif "patterns" in key:
            tensor *= patterns
        elif "ffn" in key:
            tensor *= 0.5
    return weights


def converted(weights, folder, **settings):
    """Convert the weights and load the native model."""
    report = write(weights, folder, native=True, settings=settings)
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(model) is FlowNetworkNativeModel and not info["missing_keys"] and not info["unexpected_keys"]
    assert not report.dropped and not report.new
    return model


def assert_same(model, ids, expected):
    """Compare the logits in float32 and float64; a call must not change the model."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-9), (torch.float32, 1e-5)):
        logits = model.to(dtype)(ids).logits
        # Rounding errors are in proportion to the largest logits, and differ between processors.
        torch.testing.assert_close(logits.double(), expected, atol=tolerance * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("sizes", [SIZES, SMALL], ids=["large", "small"])
@pytest.mark.parametrize("dense_limit", [0, 64])
def test_f1_computes_the_original(tmp_path, monkeypatch, sizes, dense_limit):
    weights = large_random_weights(by_name("F1"), sizes, 2, patterns=3)
    model = converted(weights, tmp_path / "out", dense_limit=dense_limit)
    for length in (1, 8, sizes["M"]):
        ids = tokens(sizes, length)
        expected = flow_network(weights, ids, lambda w, name, x: sparse_layer(w, name, x, dense_limit))
        assert length == 1 or expected.std(dim=1).mean() > 0.05
        assert_same(model, ids, expected)
        monkeypatch.setattr(native, "SORT_CHUNK", 3 * sizes["D"] ** 2)  # chunks of a few tokens
        assert_same(model, ids, expected)


def test_matrices_up_to_the_dense_limit_stay_dense(tmp_path):
    weights = large_random_weights(by_name("F1"), SMALL, 2, patterns=3)
    first = converted(weights, tmp_path / "first", dense_limit=0)
    improved = converted(weights, tmp_path / "improved")
    assert improved.config.dense_limit == 64
    ids = tokens(SMALL, 4)
    assert (first(ids).logits - improved(ids).logits).abs().max() > 1e-2


def test_f5_computes_the_original(tmp_path):
    weights = large_random_weights(by_name("F5"), SIZES, 3)
    model = converted(weights, tmp_path / "out")
    for length in (1, 8, SIZES["M"]):
        ids = tokens(SIZES, length)
        expected = flow_network(weights, ids, dense_layer)
        assert length == 1 or expected.std(dim=1).mean() > 0.05
        assert_same(model, ids, expected)


@pytest.mark.parametrize("known", [[], [0, 3, -1]], ids=["guessed", "known"])
@pytest.mark.parametrize("vocab_size", [SIZES["V"], SIZES["D"]])
def test_f4_computes_the_original(tmp_path, vocab_size, known):
    sizes = {**SIZES, "V": vocab_size}
    weights = large_random_weights(by_name("F4"), sizes, 4)
    depths = set()
    for shift in (-1, 0, 1):  # of the number of layers that run
        weights["adaptive_controller.2.bias"] = torch.full((1,), 1.5 * shift)
        model = converted(weights, tmp_path / f"out{shift}", boundary_token_ids=known)
        for length in (1, 5, 23):
            ids = tokens(sizes, length)
            expected, layers = flow_transformer(weights, ids, known)
            assert length == 1 or expected.std(dim=1).mean() > 0.05
            assert_same(model, ids, expected)
            depths.add(layers)
    assert len(depths) > 1


def test_f4_runs_at_least_two_layers_and_at_most_all(tmp_path):
    weights = random_weights(by_name("F4").table, SIZES, {"layer": 1})
    model = converted(weights, tmp_path / "one")
    assert model(tokens(SIZES, 4)).logits.isfinite().all()
    weights["adaptive_controller.2.bias"] = torch.full((1,), math.nan)  # the original then runs all layers
    assert converted(weights, tmp_path / "nan")(tokens(SIZES, 4)).logits.isfinite().all()


@native_formats
def test_native_round_trip_is_exact(source_format, tmp_path):
    weights = random_weights(source_format.table, SIZES, COUNTS)
    loaded = converted(weights, tmp_path / "out").state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in weights.items())


@formats
def test_model_receives_weights_with_a_counterpart(source_format, tmp_path):
    weights = random_weights(source_format.table, SIZES, COUNTS)
    report = write(weights, tmp_path / "out")
    assert report.layout == source_format.name
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(model) is FlowNetworkForCausalLM and not any(
        info[kind] for kind in ("missing_keys", "unexpected_keys")
    )
    state = model.state_dict()
    assert set(report.mapped) | set(report.dropped) == set(weights) and not set(report.mapped) & set(report.dropped)
    for key, targets in report.mapped.items():
        assert torch.equal(torch.cat([state[target] for target in targets]), weights[key])
    filled = {target for targets in report.mapped.values() for target in targets}
    assert filled | set(report.new) == set(state) - {"lm_head.weight"} and not filled & set(report.new)
    assert all(state[name].isfinite().all() for name in report.new)
    assert model.config.num_attention_heads == 3  # the largest divisor of 9 up to the original's 8
    assert model(tokens(SIZES, 40)).logits.isfinite().all()


def test_attention_weights_are_split_into_query_key_and_value(tmp_path):
    weights = random_weights(by_name("F2").table, SIZES, COUNTS)
    write(weights, tmp_path / "out", settings={"num_heads": 9, "dropout": 0.2})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    config = model.config
    assert config.block_type == "flow_transformer" and config.num_attention_heads == 9
    assert config.hidden_dropout == config.attention_dropout == 0.2
    assert config.memory_size == SIZES["G"] and config.max_position_embeddings == SIZES["M"]
    query, key, value = weights["flow_layers.1.self_attention.in_proj_weight"].chunk(3)
    attention = model.model.layers[1].attention
    for proj, weight in ((attention.q_proj, query), (attention.k_proj, key), (attention.v_proj, value)):
        assert torch.equal(proj.weight, weight)
    assert torch.equal(model.model.memory.memory_bank, weights["global_memory"])


@pytest.mark.parametrize("name", ["F2", "F3", "F4"])
def test_use_memory_false_gives_a_model_without_memory(name, tmp_path):
    source_format = [
        source_format
        for source_format in FORMATS
        if source_format.name == f"flownetwork-{name}" and "memory_gate" not in source_format.table
    ]
    write(random_weights(source_format[0].table, SIZES, COUNTS), tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.memory_size == 0


@pytest.mark.parametrize("name", ["num_heads", "heads"])
def test_stored_settings_are_read_under_both_names(name, tmp_path):
    weights = random_weights(by_name("F4").table, SIZES, COUNTS)
    checkpoint = save_checkpoint(tmp_path / "checkpoint.pt", weights, config={"d_model": 9, name: 1})
    assert plan_conversion(checkpoint).config.num_attention_heads == 1
    assert plan_conversion(checkpoint, settings={"num_heads": 9}).config.num_attention_heads == 9


@pytest.mark.parametrize("name", ["F2", "F3"])
def test_random_output_layers_have_no_native_model(name, tmp_path):
    weights = random_weights(by_name(name).table, SIZES, COUNTS)
    with pytest.raises(ValueError, match="random projection"):
        plan_conversion(save_checkpoint(tmp_path / "checkpoint.pt", weights), native=True)


def test_one_pattern_requires_native(tmp_path):
    weights = random_weights(by_name("F1").table, {**SIZES, "P": 1}, COUNTS)
    with pytest.raises(ValueError, match="num_patterns is 1"):
        write(weights, tmp_path / "out")
    assert converted(weights, tmp_path / "native").config.num_patterns == 1


@pytest.mark.parametrize("native_model", [False, True])
def test_characters_of_the_checkpoint_become_a_tokenizer(native_model, tmp_path):
    stoi = {character: number for number, character in enumerate(sorted(CHARACTERS))}
    vocabulary = {"stoi": stoi, "itos": {number: character for character, number in stoi.items()}}
    weights = random_weights(by_name("F4").table, SIZES, COUNTS)
    write(weights, tmp_path / "out", vocabulary, native=native_model)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = " bad\n\n  cage. \n"
    ids = tokenizer(text).input_ids
    assert ids == [stoi[character] for character in text] and tokenizer.decode(ids) == text
    assert tokenizer("aXbé\tc").input_ids == tokenizer("abc").input_ids
    inputs = tokenizer([text, text], return_tensors="pt")
    if native_model:
        assert AutoModel.from_pretrained(tmp_path / "out")(**inputs).logits.shape == (2, len(text), SIZES["V"])
    else:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        generated = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert tokenizer.batch_decode(generated)[0].startswith(text)


@pytest.mark.parametrize("version", ["F1", "F4", "F5"])
def test_new_models_are_initialised(version):
    torch.manual_seed(0)
    memory = {"memory_size": 3} if version == "F4" else {}
    config = FlowNetworkNativeConfig(version=version, vocab_size=7, d_model=6, num_layers=2, **memory)
    with torch.device("meta"):
        model = FlowNetworkNativeModel(config)
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(math.nan)
    model.init_weights()
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert model(torch.arange(7)[None]).logits.isfinite().all()


def test_native_configuration_and_inputs_are_checked():
    with pytest.raises(ValueError, match="`version` must be one of"):
        FlowNetworkNativeConfig(version="F2")
    with pytest.raises(ValueError, match="require `version` \"F4\", got 'F5'"):
        FlowNetworkNativeConfig(version="F5", boundary_token_ids=[1])
    with pytest.raises(ValueError, match=r"`boundary_token_ids` contains 9, which must be below `vocab_size` \(9\)"):
        FlowNetworkNativeConfig(version="F4", vocab_size=9, boundary_token_ids=[-1, 9])
    model = FlowNetworkNativeModel(FlowNetworkNativeConfig(vocab_size=9, d_model=4, num_layers=1, max_seq_len=5))
    with pytest.raises(ValueError, match="6 tokens per row, but there are 5 position embeddings"):
        model(torch.zeros(1, 6, dtype=torch.long))
    with pytest.raises(ValueError, match="outside the vocabulary of 9"):
        model(torch.full((1, 2), 9))
    with pytest.raises(ValueError, match="empty"):
        model(torch.zeros(1, 0, dtype=torch.long))
