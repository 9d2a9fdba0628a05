"""DFN models: formulas, initial statistics, heads and error messages. Common guarantees: tests/invariants."""

import logging
import math

import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, pipeline
from transformers.utils import logging as transformers_logging

from dfn_hf import DFNConfig, DFNForCausalLM, DFNForSequenceClassification, DFNModel
from dfn_hf.assets.tokenizers import load_tokenizer
from dfn_hf.modeling.dfn.attention import PersistentFieldMemory
from dfn_hf.modeling.dfn.entities import squash_to_ball
from dfn_hf.modeling.dfn.layers import FlowNorm, make_norm
from dfn_hf.modeling.modules.cache import CACHE_NAME
from dfn_hf.modeling.modules.row_layout import make_row_layout
from dfn_hf.modeling.ops import chunking
from tests.support.families import VOCABULARY, draw_ids, draw_model

CPU = torch.device("cpu")
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "local_window": 3,
    "num_neighbors": 4,
    "initializer_range": 0.5,
}
STRICT = {"atol": 1e-10, "rtol": 0}


def make_model(model_class=DFNForCausalLM, **fields):
    torch.manual_seed(0)
    return model_class(DFNConfig(**{**TINY, **fields})).double().eval()


@pytest.fixture(scope="module")
def model():
    return make_model(memory_slots=2, memory_chunk=4)


# Formulas


def test_squash_to_ball_keeps_directions_and_bounds_norms():
    x = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 30
    positions = squash_to_ball(x)
    assert (positions.norm(dim=-1) < 2 * math.sqrt(4)).all()
    assert torch.allclose(F.cosine_similarity(x, positions), torch.ones(1000, dtype=torch.float64))
    assert torch.allclose(squash_to_ball(1e-6 * x), 2e-6 * x, rtol=1e-6)


def draw_norm(flow_norm):
    config = DFNConfig(**TINY, flow_norm=flow_norm, norm_eps=1e-3)
    torch.manual_seed(0)
    norm = make_norm(config, "norm").double()
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    states = torch.randn(2, 11, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return norm, states


def test_flow_norm_equals_its_formula():
    norm, states = draw_norm("entity")
    flow = states @ norm.flow_map.weight.T
    energy = (flow**2).mean(dim=-1, keepdim=True) + 1e-2 * (states**2).mean(dim=-1, keepdim=True)
    expected = norm.weight * states / (energy + 1e-3).sqrt()
    assert torch.allclose(norm(states, make_row_layout(2, 11, CPU), None), expected, **STRICT)


def test_running_flow_norm_equals_a_loop():
    norm, states = draw_norm("running")
    segments = torch.tensor([[0] * 11, [0] * 4 + [1] * 7])
    normed = norm(states, make_row_layout(2, 11, CPU, segment_ids=segments), None)
    flow = states @ norm.flow_map.weight.T
    energy = (flow**2).mean(dim=-1) + 1e-2 * (states**2).mean(dim=-1)
    for row in range(2):
        for i in range(11):
            first = 4 if row == 1 and i >= 4 else 0
            mean = energy[row, first : i + 1].mean()
            expected = norm.weight * states[row, i] / (mean + 1e-3).sqrt()
            assert torch.allclose(normed[row, i], expected, **STRICT)


def test_baseline_norms_equal_their_formulas():
    norm, states = draw_norm("rms")
    expected = norm.norm.weight * states / ((states**2).mean(dim=-1, keepdim=True) + 1e-3).sqrt()
    assert torch.allclose(norm(states, make_row_layout(2, 11, CPU), None), expected, **STRICT)
    norm, states = draw_norm("none")
    assert norm(states, make_row_layout(2, 11, CPU), None) is states


def test_memory_and_entities_share_one_softmax():
    torch.manual_seed(0)
    config = DFNConfig(**TINY, memory_slots=3, memory_chunk=4)
    memory = PersistentFieldMemory(config).double()
    for parameter in memory.parameters():
        torch.nn.init.normal_(parameter)
    y, moved = torch.randn(2, 2, 11, 8).double(), torch.randn(2, 2, 11, 4).double()
    total, sharpness = torch.randn(2, 2, 11).double(), torch.tensor([0.5, 2.0]).double()
    query = torch.cat([2 * sharpness[:, None, None] * moved, torch.ones(2, 2, 11, 1)], dim=-1)
    rows = make_row_layout(2, 11, CPU)
    found, share = memory(y, total, query, sharpness, rows, None, torch.float64)

    slots, layout = memory.slots(y.transpose(1, 2).flatten(2), rows)
    places = squash_to_ball(memory.position)
    for head in range(2):
        gamma = sharpness[head]
        # The logits of entities omit −γ‖q‖², which is the same for all.
        distances = (moved[:, head, :, None] - places[head]).square().sum(dim=-1)
        logits = memory.influence[head] - gamma * distances + gamma * moved[:, head].square().sum(dim=-1, keepdim=True)
        joint = torch.cat([total[:, head, :, None], logits], dim=-1).softmax(dim=-1)
        for row in range(2):
            for i in range(11):
                read = memory.value_proj(slots[row, int(layout.slot[row, i]) // 4]).view(3, 2, 8)[:, head]
                expected = joint[row, i, 0] * y[row, head, i] + joint[row, i, 1:] @ read
                assert torch.allclose(found[row, head, i], expected, **STRICT)
        assert torch.allclose(share[:, head], joint[..., 0], **STRICT)


def test_readout_averages_states_by_influence():
    model = make_model(DFNModel, readout_window=3)
    ids = draw_ids(2, 20, 0)
    seen = []
    model.layers[-1].register_forward_hook(lambda module, inputs, outputs: seen.append(outputs[0]))
    with torch.no_grad():
        outputs = model(ids, output_entities=True)
        weights = outputs.entities[-1].influence.mean(dim=1)
        for i in range(20):
            recent = slice(max(0, i - 2), i + 1)
            share = weights[:, recent].softmax(dim=-1)
            mean = (share[..., None] * seen[0][:, recent]).sum(dim=1)
            assert torch.allclose(outputs.last_hidden_state[:, i], model.norm(mean), **STRICT)


def test_attention_weights_follow_from_entities(model):
    ids = draw_ids(2, 30, 1)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    with torch.no_grad():
        outputs = model(ids, attention_mask=mask, output_entities=True, output_attentions=True)
    assert len(outputs.entities) == len(outputs.attentions) == 2
    for layer, entities, weights in zip(model.model.layers, outputs.entities, outputs.attentions, strict=True):
        attention = layer.attention
        distance = (entities.moved_positions[:, :, :, None] - entities.rest_positions[:, :, None]).square().sum(dim=-1)
        age = torch.arange(30)[:, None] - torch.arange(30)
        logits = (
            -attention.log_sharpness.exp()[:, None, None] * distance
            + entities.influence[:, :, None]
            - attention.log_fading.exp()[:, None, None] * torch.log1p(age.clamp(min=0))
        )
        read = (age >= 0) & (age < 3) & mask.bool()[:, None, None]
        read = read.expand(2, 2, -1, -1).clone()
        for row, head, i, rank in (entities.neighbors >= 0).nonzero().tolist():
            read[row, head, i, entities.neighbors[row, head, i, rank]] = True
        among_tokens = weights / weights.sum(dim=-1, keepdim=True)
        expected = logits.masked_fill(~read, -math.inf).softmax(dim=-1)
        real = mask.bool()
        for row in range(2):
            assert torch.allclose(among_tokens[row][:, real[row]], expected[row][:, real[row]], atol=1e-7)
        assert (entities.neighbors[0, :, :7] == -1).all() and not weights[0, :, :7].any()
        assert not entities.rest_positions[0, :, :7].any() and not entities.influence[0, :, :7].any()


def test_no_flow_leaves_entities_where_they_are():
    still = make_model(flow_step=0.0)
    same_place = make_model(moved_query=False)
    with torch.no_grad():
        for model in (still, same_place):
            entities = model(draw_ids(1, 20, 0), output_entities=True).entities
            assert all(torch.equal(layer.rest_positions, layer.moved_positions) for layer in entities)


def test_carried_positions_change_later_layers_only():
    plain, carried = make_model(), make_model(carry_positions=True)
    carried.load_state_dict(plain.state_dict())
    ids = draw_ids(1, 20, 0)
    with torch.no_grad():
        before, after = (model(ids, output_entities=True).entities for model in (plain, carried))
    assert torch.equal(before[0].rest_positions, after[0].rest_positions)
    assert not torch.allclose(before[1].rest_positions, after[1].rest_positions)


def test_short_rows_are_searched_exactly():
    model = make_model(local_window=2, num_leaves=1)
    ids = draw_ids(2, 60, 2)
    with torch.no_grad():
        logits = model(ids).logits
        model.config.search_implementation = "exact"
        assert torch.allclose(model(ids).logits, logits, **STRICT)


# Initial statistics


@pytest.fixture(scope="module")
def fresh():
    torch.manual_seed(0)
    return DFNForCausalLM(DFNConfig(memory_slots=4, num_hidden_layers=2))


def test_convolutions_start_near_identity(fresh):
    for layer in fresh.model.layers:
        taps = layer.conv.conv.weight.detach()
        assert (taps[..., -1] == 1).all()
        assert taps[..., :-1].std().item() == pytest.approx(0.3, rel=0.1)


def test_position_and_flow_maps_start_with_unit_variance(fresh):
    for layer in fresh.model.layers:
        maps = layer.attention.entities.position_proj, layer.attention.entities.flow_proj, layer.flow_norm.flow_map
        for linear in maps:
            assert linear.weight.std().item() == pytest.approx(256**-0.5, rel=0.05)
            assert linear.weight.mean().abs() < 0.1 * 256**-0.5


def test_flow_norm_starts_with_unit_output(fresh):
    # E‖f‖² = mean(s²), so the output has mean square 1 at every scale of the states.
    generator = torch.Generator().manual_seed(0)
    for scale in (0.02, 1.0, 50.0):
        states = scale * torch.randn(4, 200, 256, generator=generator)
        for norm in (module for module in fresh.modules() if isinstance(module, FlowNorm)):
            with torch.no_grad():
                flow = norm.flow_map(states)
                normed = norm(states, make_row_layout(4, 200, CPU), None)
            assert flow.square().mean() == pytest.approx(states.square().mean().item(), rel=0.1)
            assert normed.square().mean() == pytest.approx(1.0, rel=0.2)


def test_scales_start_as_configured(fresh):
    for layer in fresh.model.layers:
        attention = layer.attention
        assert torch.allclose(attention.log_sharpness.exp(), torch.full((4,), 1.2 / 4))
        assert (attention.log_fading.diff() < 0).all()
        assert torch.allclose(attention.memory.slots.decay_logit.sigmoid(), torch.full((4,), 0.9))


def test_initial_loss_is_that_of_a_uniform_guess(fresh):
    ids = torch.randint(4096, (2, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = fresh.eval()(ids, labels=ids).loss
    assert loss == pytest.approx(math.log(4096), rel=0.15)


# Generation


def test_left_padded_rows_generate_as_single_rows(model):
    ids = draw_ids(3, 20, 3)
    mask = torch.ones_like(ids)
    mask[0, :13] = mask[1, :1] = 0
    options = {"max_new_tokens": 15, "do_sample": False, "pad_token_id": 0}
    together = model.generate(ids, attention_mask=mask, **options)
    for row in range(3):
        alone = model.generate(ids[row : row + 1, mask[row].bool()], **options)
        assert torch.equal(together[row, 20:], alone[0, -15:])


def test_generates_from_embeddings(model):
    ids = draw_ids(2, 20, 4)
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    embeddings = model.get_input_embeddings()(ids).detach()
    new = model.generate(inputs_embeds=embeddings, **options)
    assert torch.equal(new, model.generate(ids, **options)[:, 20:])


@pytest.mark.parametrize(
    "options",
    [{"prompt_lookup_num_tokens": 4}, {"assistant_early_exit": 1}, {"cache_implementation": "offloaded"}],
)
def test_generation_modes_agree_with_greedy(model, options):
    ids = draw_ids(1, 24, 5)
    greedy = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **greedy, **options), model.generate(ids, **greedy))


def test_continues_from_a_cache(model):
    ids = draw_ids(1, 40, 6)
    cache = DynamicCache(config=model.config)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    first = model.generate(ids[:, :20], past_key_values=cache, **options)
    prompt = torch.cat([first, ids[:, 20:]], dim=1)
    second = model.generate(prompt, past_key_values=cache, **options)
    assert torch.equal(second, model.generate(prompt, **options))


def texts_and_warnings(model, tokenizer, batch_size, caplog):
    caplog.clear()
    transformers_logging.warning_once.cache_clear()
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    texts = generate(["To be, or", "The"], max_new_tokens=5, do_sample=False, batch_size=batch_size)
    warned = {record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING}
    return [text[0]["generated_text"] for text in texts], warned


@pytest.mark.parametrize("batch_size", [1, 2])
def test_pipeline_gives_no_warning(batch_size, caplog, recwarn, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tokenizer = load_tokenizer("byte")
    special = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    texts, warned = texts_and_warnings(make_model(**special).float(), tokenizer, batch_size, caplog)
    assert [text[:3] for text in texts] == ["To ", "The"]
    # Some releases of transformers warn for every model.
    llama = LlamaForCausalLM(LlamaConfig(**special, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    assert warned <= texts_and_warnings(llama, tokenizer, batch_size, caplog)[1]
    assert not [str(warning.message) for warning in recwarn]


# Classification


@pytest.mark.parametrize("side", ["left", "right"])
def test_classification_uses_the_last_real_token(side):
    model = make_model(DFNForSequenceClassification, num_labels=3, pad_token_id=0)
    ids = draw_ids(2, 20, 7)
    alone = [model(ids[:1, :13]).logits, model(ids[1:]).logits]
    mask = torch.zeros_like(ids)
    mask[1] = 1
    padded = torch.zeros_like(ids)
    padded[1] = ids[1]
    kept = slice(0, 13) if side == "right" else slice(7, 20)
    mask[0, kept], padded[0, kept] = 1, ids[0, :13]
    assert torch.allclose(model(padded, attention_mask=mask).logits, torch.cat(alone), **STRICT)
    if side == "right":  # the pad token marks the padding too
        assert torch.allclose(model(padded).logits, torch.cat(alone), **STRICT)


@pytest.mark.parametrize(
    ("fields", "labels", "loss"),
    [
        ({"num_labels": 3}, torch.tensor([2, 0]), F.cross_entropy),
        ({"num_labels": 1}, torch.tensor([0.5, -1.0], dtype=torch.float64), lambda x, y: F.mse_loss(x[:, 0], y)),
        (
            {"num_labels": 3, "problem_type": "multi_label_classification"},
            torch.tensor([[1.0, 0, 1], [0, 0, 1]], dtype=torch.float64),
            F.binary_cross_entropy_with_logits,
        ),
    ],
)
def test_classification_losses(fields, labels, loss):
    model = make_model(DFNForSequenceClassification, pad_token_id=0, **fields)
    outputs = model(draw_ids(2, 20, 8), labels=labels)
    assert torch.allclose(outputs.loss, loss(outputs.logits, labels))


def test_classification_needs_mask_or_pad_token():
    model = make_model(DFNForSequenceClassification)
    assert model(draw_ids(1, 9, 0)).logits.shape == (1, 2)
    with pytest.raises(ValueError, match=r"attention_mask.*pad_token_id"):
        model(draw_ids(2, 9, 0))


# Losses


def test_first_token_of_a_segment_is_not_scored(model):
    ids = draw_ids(1, 20, 9)
    segments = torch.tensor([[0] * 7 + [1] * 1 + [2] * 9 + [-1] * 3])
    outputs = model(ids, labels=ids, segment_ids=segments)
    scored = [i for i in range(1, 17) if i not in (7, 8)]
    expected = F.cross_entropy(outputs.logits[0, [i - 1 for i in scored]], ids[0, scored])
    assert outputs.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_packed_rows_return_no_cache(model):
    segments = torch.tensor([[0] * 10 + [1] * 10])
    assert model(draw_ids(1, 20, 0), segment_ids=segments, use_cache=True).past_key_values is None


def test_fully_padded_row_leaves_others_unchanged(model):
    ids = draw_ids(2, 20, 10)
    mask = torch.ones_like(ids)
    mask[0] = 0
    logits = model(ids, attention_mask=mask).logits
    assert logits.isfinite().all()
    assert torch.allclose(logits[1:], model(ids[1:]).logits, **STRICT)


@pytest.mark.parametrize("search", ["tree", "exact"])
def test_diverged_model_gives_nan_without_crash(search):
    model = make_model(search_implementation=search)
    with torch.no_grad():
        model.model.layers[0].attention.entities.position_proj.weight[0, 0] = math.nan
    ids = draw_ids(2, 20, 0)
    outputs = model(ids, labels=ids, use_cache=True)
    assert outputs.loss.isnan()
    outputs.loss.backward()
    assert model(ids[:, :1], past_key_values=outputs.past_key_values).logits.isnan().all()


@pytest.mark.parametrize("frozen", ["position_proj", "value_proj"])
def test_training_in_chunks_with_frozen_parameters(frozen):
    gradients = []
    for freeze in (False, True):
        model = make_model().train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not freeze or frozen not in name)
        cache, loss = DynamicCache(config=model.config), 0
        for piece in draw_ids(2, 36, 0).split([12, 1, 23], dim=1):
            loss = loss + model(piece, past_key_values=cache).logits.square().mean()
        loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[1].items():
        if frozen in name:
            assert gradient is None
        else:
            assert torch.allclose(gradient, gradients[0][name], **STRICT), name


def test_compiled_model_is_equal():
    model = make_model(num_hidden_layers=1).train()
    ids = draw_ids(2, 20, 0)
    results = []
    for step in (model, torch.compile(model, backend="eager")):
        model.zero_grad()
        loss = step(ids, labels=ids, use_cache=False).loss
        loss.backward()
        results.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    assert all(torch.allclose(one, other, **STRICT) for one, other in zip(*results, strict=True))


# Error messages


IDS = torch.randint(VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(0))
EMBEDDINGS = torch.zeros(2, 8, 16, dtype=torch.float64)


@pytest.mark.parametrize(
    ("inputs", "expected_parts"),
    [
        ({}, ["exactly one", "input_ids", "inputs_embeds"]),
        ({"input_ids": IDS, "inputs_embeds": EMBEDDINGS}, ["exactly one"]),
        ({"input_ids": IDS[:, :0]}, ["empty", "length 0"]),
        ({"input_ids": IDS[:0]}, ["empty", "batch 0"]),
        ({"inputs_embeds": EMBEDDINGS[:, :0]}, ["empty", "length 0"]),
        ({"input_ids": IDS[0]}, ["input_ids", "[batch, length]", "[8]"]),
        ({"inputs_embeds": EMBEDDINGS[0]}, ["inputs_embeds", "[8, 16]"]),
        ({"inputs_embeds": EMBEDDINGS[..., :5]}, ["inputs_embeds", "hidden_size of 16", "[2, 8, 5]"]),
        ({"input_ids": IDS + VOCABULARY}, ["input_ids", f"vocabulary of {VOCABULARY}", "vocab_size", "tokenizer"]),
        ({"input_ids": IDS - VOCABULARY}, ["input_ids", "-", "vocabulary"]),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 7)}, ["attention_mask", "[2, 8]", "[2, 7]"]),
        ({"input_ids": IDS, "attention_mask": torch.ones(1, 8)}, ["attention_mask", "[2, 8]", "[1, 8]"]),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 1, 8, 8)}, ["attention_mask", "[2, 1, 8, 8]"]),
        ({"input_ids": IDS, "position_ids": torch.zeros(8)}, ["position_ids", "[2, 8]", "[8]"]),
        ({"input_ids": IDS, "position_ids": torch.zeros(2, 7)}, ["position_ids", "[2, 8]", "[2, 7]"]),
        ({"input_ids": IDS, "segment_ids": torch.zeros(2, 7)}, ["segment_ids", "[2, 8]", "[2, 7]"]),
        ({"input_ids": IDS, "past_key_values": DynamicCache()}, ["DynamicCache(config=model.config)"]),
        ({"input_ids": IDS, "past_key_values": ((EMBEDDINGS,),)}, ["tuple", "DynamicCache(config=model.config)"]),
    ],
)
def test_messages_name_invalid_inputs(model, inputs, expected_parts):
    with pytest.raises(ValueError) as error:
        model(**inputs)
    for part in expected_parts:
        assert part in str(error.value)


def with_cache(model):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
    return cache


@pytest.mark.parametrize(
    ("inputs", "expected_parts"),
    [
        ({"segment_ids": torch.zeros(2, 8).long()}, ["segment_ids", "past_key_values"]),
        ({"attention_mask": torch.ones(2, 12)}, ["[2, 16]", "8 columns of earlier calls", "[2, 12]"]),
        ({"input_ids": IDS[:1]}, ["holds 2 rows", "has 1"]),
    ],
)
def test_refused_call_leaves_cache_unchanged(model, inputs, expected_parts):
    cache = with_cache(model)
    with pytest.raises(ValueError) as error:
        model(**{"input_ids": IDS, **inputs}, past_key_values=cache)
    for part in expected_parts:
        assert part in str(error.value)
    with torch.no_grad():
        logits = model(IDS, past_key_values=cache).logits
        assert torch.allclose(logits, model(torch.cat([IDS, IDS], dim=1)).logits[:, 8:], **STRICT)


def test_an_unknown_search_is_refused():
    model = make_model()
    model.config.search_implementation = "fast"
    with pytest.raises(ValueError, match=r"search_implementation.*'tree'.*'fast'"):
        model(IDS)


def test_buffers_of_an_earlier_version_are_ignored(tmp_path):
    model = make_model()
    grids = {"grid_rotation": torch.zeros(16, 3, 4, dtype=torch.int32), "grid_shift": torch.zeros(16, 3).int()}
    weights = model.state_dict() | {
        f"model.layers.{layer}.attention.{name}": grid.clone() for layer in range(2) for name, grid in grids.items()
    }
    model.save_pretrained(tmp_path, state_dict=weights)
    loaded, report = DFNForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_quantized_cache_is_refused(model):
    with pytest.raises(ValueError, match=r"'quantized' cannot hold.*\"dynamic\""):
        model.generate(IDS, cache_implementation="quantized", max_new_tokens=2, pad_token_id=0)


def test_cache_is_accepted_under_both_names(model):
    with torch.no_grad():
        results = []
        for name in ("past_key_values", "cache"):
            state = DynamicCache(config=model.config)
            model(IDS, **{name: state})
            results.append(model(IDS, **{name: state}))
            assert results[-1][CACHE_NAME] is state and state.get_seq_length() == 2 * IDS.shape[1]
    assert torch.equal(results[0].logits, results[1].logits)


def test_refused_crop_leaves_cache_unchanged():
    config = DFNConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20,
        num_neighbors=4, local_window=4, conv_kernel=1, readout_window=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = DFNForCausalLM(config).double().eval()
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
        with pytest.raises(ValueError, match="activate_past_recording"):
            cache.crop(-2)
        continued = model(IDS, past_key_values=cache).logits
        assert torch.allclose(continued, model(torch.cat([IDS, IDS], dim=1)).logits[:, IDS.shape[1] :], **STRICT)


@pytest.mark.parametrize("flow_norm", ["entity", "running"])
def test_chunk_size_does_not_change_results(flow_norm, monkeypatch):
    config = DFNConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20,
        num_neighbors=4, local_window=4, flow_norm=flow_norm,
    )  # fmt: skip
    torch.manual_seed(0)
    model = DFNForCausalLM(config).double()

    def run():
        model.zero_grad()
        with torch.no_grad():
            logits = model(IDS).logits
        loss = model(IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        return [logits, *(parameter.grad.clone() for parameter in model.parameters())]

    whole = run()
    monkeypatch.setattr(chunking, "CHUNK_SIZE", 3)
    for found, expected in zip(run(), whole, strict=True):
        assert torch.allclose(found, expected, **STRICT)


def test_cache_without_neighbors_has_fixed_size():
    model = draw_model("dfn", 1, num_neighbors=0, local_window=5, memory_slots=0, readout_window=1, flow_norm="entity")
    ids = draw_ids(2, 40, 0)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, output_attentions=True, use_cache=False)
        cache = DynamicCache(config=model.config)
        for start, stop in ((0, 3), (3, 4), (4, 25), (25, 40)):
            part = slice(start, stop)
            step = model(ids[:, part], attention_mask=mask[:, :stop], past_key_values=cache, output_attentions=True)
            assert torch.allclose(step.logits, whole.logits[:, part], atol=1e-9, rtol=0)
            for ours, expected in zip(step.attentions, whole.attentions, strict=True):
                assert torch.allclose(ours, expected[:, :, part, :stop], atol=1e-9, rtol=0)
    assert all(state.data.shape[1] < 5 for layer in cache.layers for state in layer.states.values())
