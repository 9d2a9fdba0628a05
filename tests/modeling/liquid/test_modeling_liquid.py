"""Liquid models over random small configurations: invariants of encoder and decoder, losses, loading and errors."""

import copy
import random

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, DynamicCache, EncoderDecoderCache

from dfn_hf import LiquidConfig, LiquidForSeq2SeqLM, LiquidForSequenceClassification, LiquidModel
from dfn_hf.modeling.ops import chunking as pieces

VOCABULARY = 40
SOURCE, TARGET = 37, 29
SEEDS = range(8)
STRICT = {"atol": 1e-9, "rtol": 0}
FP32 = {"atol": 1e-5, "rtol": 0}  # transformers computes the token loss in float32
seeds = pytest.mark.parametrize("seed", SEEDS)


def draw_config(seed: int, **overrides) -> LiquidConfig:
    rng = random.Random(seed)
    heads = rng.choice([1, 2, 4])
    num_experts = rng.choice([2, 3, 4])
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": heads * rng.choice([8, 12]),
        "num_hidden_layers": rng.choice([1, 2]),
        "num_decoder_layers": rng.choice([1, 2, 3]),
        "num_attention_heads": heads,
        "num_key_value_heads": rng.choice([1, heads]),
        "intermediate_size": rng.choice([20, 33]),
        "attention_window": rng.choice([1, 3, 8, 64]),
        "max_position_embeddings": 90,
        "learned_positions": rng.choice([False, True]),
        "frame_length": rng.choice([4, 8, 64]),
        "decoder_frame_length": rng.choice([2, 4, 8]),
        "min_compression_ratio": rng.choice([0.1, 0.5]),
        "num_experts": num_experts,
        "num_experts_per_tok": rng.choice([1, 2]),
        "max_expert_load": 2.0,
        "moe_intermediate_size": rng.choice([10, 17]),
        "dynamic_experts": rng.random() < 0.7,
        "conv_kernel": rng.choice([3, 5]),
        "conv_dilation": rng.choice([1, 2]),
        "max_offset": rng.choice([0, 0.7, 2.5]),
        "lstm_hidden_size": rng.choice([0, 7, 16]),
        "num_lstm_layers": rng.choice([1, 2]),
        "tie_word_embeddings": rng.random() < 0.7,
        "initializer_range": 0.5,
    }
    return LiquidConfig(**{**options, **overrides})


def draw_model(seed: int, model_class=LiquidForSeq2SeqLM, dtype=torch.float64, **overrides):
    config = draw_config(seed, **overrides)
    torch.manual_seed(seed)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:  # norms and biases, which are initialised to constants
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def draw_ids(batch: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def draw_pair(batch: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return draw_ids(batch, SOURCE, seed), draw_ids(batch, TARGET, seed + 1)


@torch.no_grad()
def logits_of(model, source, target, **inputs):
    return model(source, decoder_input_ids=target, use_cache=False, **inputs).logits


def new_cache(model) -> EncoderDecoderCache:
    return EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))


def change_token(ids: torch.Tensor, place: int) -> torch.Tensor:
    changed = ids.clone()
    changed[:, place] = (changed[:, place] + 1) % VOCABULARY
    return changed


# Causality, and use of the source


@seeds
@pytest.mark.parametrize("training", [False, True])
def test_target_tokens_do_not_affect_earlier_logits(seed, training):
    model = draw_model(seed).train(training)
    source, target = draw_pair(2, seed)
    before = logits_of(model, source, target)
    for place in (TARGET - 1, TARGET // 2, 1):
        after = logits_of(model, source, change_token(target, place))
        assert torch.allclose(after[:, :place], before[:, :place], rtol=0, atol=1e-10)
        assert (after[:, place] - before[:, place]).abs().max() > 1e-3


@seeds
def test_gradients_do_not_reach_later_tokens(seed):
    model = draw_model(seed)
    source, target = draw_pair(2, seed)
    embeddings = model.get_input_embeddings()(target).detach().requires_grad_()
    place = TARGET // 2
    logits = model(source, decoder_inputs_embeds=embeddings, use_cache=False).logits
    (gradient,) = torch.autograd.grad(logits[:, place].square().sum(), embeddings)
    assert not gradient[:, place + 1 :].any()
    assert gradient[:, place].any()


@seeds
def test_source_tokens_affect_logits_and_states_on_both_sides(seed):
    model = draw_model(seed)
    source, target = draw_pair(2, seed)
    logits = logits_of(model, source, target)
    with torch.no_grad():
        states = model.model.encoder(source).last_hidden_state
    for place in range(SOURCE):
        changed = change_token(source, place)
        assert (logits_of(model, changed, target) - logits).abs().amax(dim=(1, 2)).min() > 1e-4
        with torch.no_grad():
            moved = (model.model.encoder(changed).last_hidden_state - states).abs().amax(dim=(0, 2))
        assert moved[max(0, place - 1)] > 1e-6 and moved[min(SOURCE - 1, place + 1)] > 1e-6


# Any split


def in_calls(model, source, target, sizes, mask=None, source_mask=None):
    cache, parts, start = new_cache(model), [], 0
    for size in sizes:
        stop = start + size
        with torch.no_grad():
            outputs = model(
                source,
                attention_mask=source_mask,
                decoder_input_ids=target[:, start:stop],
                decoder_attention_mask=None if mask is None else mask[:, :stop],
                past_key_values=cache,
            )
        assert outputs.past_key_values is cache and cache.get_seq_length() == stop
        parts.append(outputs.logits)
        start = stop
    return torch.cat(parts, dim=1)


@seeds
@pytest.mark.parametrize("sizes", [[1] * TARGET, [7] * 4 + [1], [12, 1, 1, 1, 14], [2, 27]])
def test_any_split_gives_the_logits_of_one_pass(seed, sizes):
    model = draw_model(seed)
    source, target = draw_pair(2, seed)
    assert torch.allclose(in_calls(model, source, target, sizes), logits_of(model, source, target), **STRICT)


# Padding and rows

MASKS = {
    "left": [[0] * 9 + [1] * 20, [1] * 29],
    "right": [[1] * 20 + [0] * 9, [1] * 28 + [0]],
    "holes": [[1, 0, 0, 1, 1, 0, 1, 1, 1] * 3 + [0, 1], [0, 1] * 14 + [1]],
    "mostly": [[0] * 28 + [1], [0] * 10 + [1] + [0] * 18],
}


@seeds
@pytest.mark.parametrize("name", MASKS)
def test_target_padding_does_not_affect_real_positions(seed, name):
    model = draw_model(seed)
    mask = torch.tensor(MASKS[name])
    source, target = draw_pair(2, seed)
    garbage = torch.where(mask.bool(), target, draw_ids(2, TARGET, seed + 5))
    for ids in (target, garbage):
        padded = logits_of(model, source, ids, decoder_attention_mask=mask)
        for sizes in ([12, 1, 1, 1, 14], [1] * TARGET):
            parts = in_calls(model, source, ids, sizes, mask)
            assert torch.allclose(parts[mask.bool()], padded[mask.bool()], **STRICT)
        for row in range(2):
            real = mask[row].bool()
            alone = logits_of(model, source[row : row + 1], target[row : row + 1, real])
            assert torch.allclose(padded[row : row + 1, real], alone, **STRICT)


@seeds
@pytest.mark.parametrize("name", MASKS)
def test_source_padding_does_not_affect_outputs(seed, name):
    model = draw_model(seed)
    mask = torch.tensor(MASKS[name])
    source, target = draw_ids(2, 29, seed), draw_ids(2, TARGET, seed + 1)
    embeddings = model.get_input_embeddings()(source).detach()
    padded = logits_of(model, source, target, attention_mask=mask)
    broken = embeddings.masked_fill(mask[..., None] == 0, float("nan"))
    assert torch.equal(
        logits_of(model, None, target, inputs_embeds=broken, attention_mask=mask),
        logits_of(model, None, target, inputs_embeds=embeddings, attention_mask=mask),
    )
    assert torch.allclose(in_calls(model, source, target, [20, 9], source_mask=mask), padded, **STRICT)
    with torch.no_grad():
        states = model.model.encoder(source, attention_mask=mask).last_hidden_state
    assert not states[mask == 0].any()
    for row in range(2):
        alone = source[row : row + 1, mask[row].bool()]
        assert torch.allclose(padded[row : row + 1], logits_of(model, alone, target[row : row + 1]), **STRICT)


@seeds
def test_rows_are_independent_and_may_be_empty(seed):
    model = draw_model(seed)
    source, target = draw_pair(4, seed)
    together = logits_of(model, source, target)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.allclose(logits_of(model, source[order], target[order]), together[order], **STRICT)
    source_mask, mask = torch.ones_like(source), torch.ones_like(target)
    source_mask[0] = mask[1] = 0
    empty = logits_of(model, source, target, attention_mask=source_mask, decoder_attention_mask=mask)
    assert empty.isfinite().all()
    assert torch.allclose(empty[2:], together[2:], **STRICT)


@seeds
def test_eval_does_not_change_the_model(seed):
    model = draw_model(seed)
    source, target = draw_pair(2, seed)
    before = copy.deepcopy(model.state_dict())
    first = logits_of(model, source, target)
    generated = model.generate(source, max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(source, max_new_tokens=12, do_sample=False), generated)
    assert torch.equal(logits_of(model, source, target), first)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


# Generation


@seeds
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_and_without_cache(seed, beams):
    model = draw_model(seed)
    source, _ = draw_pair(2, seed)
    mask = torch.ones_like(source)
    mask[0, :9] = 0
    options = {
        "attention_mask": mask,
        "max_new_tokens": 20,
        "num_beams": beams,
        "do_sample": False,
        "num_return_sequences": beams,
    }
    assert torch.equal(model.generate(source, **options), model.generate(source, use_cache=False, **options))


@seeds
def test_cache_rows_can_be_reordered_repeated_and_selected(seed):
    model = draw_model(seed)
    source, target = draw_pair(2, seed)
    expected = logits_of(model, source, target)[:, 12:]

    def continued(change, rows):
        cache = new_cache(model)
        with torch.no_grad():
            model(source, decoder_input_ids=target[:, :12], past_key_values=cache)
            change(cache)
            outputs = model(source[rows], decoder_input_ids=target[rows, 12:], past_key_values=cache)
        return torch.allclose(outputs.logits, expected[rows], **STRICT)

    assert continued(lambda cache: cache.reorder_cache(torch.tensor([1, 0])), torch.tensor([1, 0]))
    assert continued(lambda cache: cache.batch_repeat_interleave(2), torch.tensor([0, 0, 1, 1]))
    assert continued(lambda cache: cache.batch_select_indices(torch.tensor([1])), torch.tensor([1]))


def test_assisted_decoding_raises():
    model, assistant = draw_model(0), draw_model(1)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(draw_ids(1, 9, 0), assistant_model=assistant, max_new_tokens=5)
    cache = new_cache(model)
    with torch.no_grad():
        model(draw_ids(1, 9, 0), decoder_input_ids=draw_ids(1, 5, 0), past_key_values=cache)
    if model.config.lstm_hidden_size:
        with pytest.raises(ValueError, match="crop"):
            cache.crop(-1)


def test_encoder_outputs_may_be_a_tuple():
    model = draw_model(2)
    source, target = draw_pair(2, 2)
    with torch.no_grad():
        states = model.get_encoder()(source).last_hidden_state
        given = model(encoder_outputs=(states,), decoder_input_ids=target).logits
    assert torch.allclose(given, logits_of(model, source, target), **STRICT)


# Outputs


@seeds
def test_hidden_states_attentions_and_logits_to_keep(seed):
    model = draw_model(seed)
    config = model.config
    source, target = draw_pair(2, seed)
    mask = torch.tensor(MASKS["left"])
    with torch.no_grad():
        outputs = model(
            source,
            decoder_input_ids=target,
            decoder_attention_mask=mask,
            output_attentions=True,
            output_hidden_states=True,
            output_router_logits=True,
        )
    assert len(outputs.encoder_hidden_states) == config.num_hidden_layers + 1
    assert len(outputs.decoder_hidden_states) == config.num_decoder_layers + 1
    assert torch.equal(model.lm_head(outputs.decoder_hidden_states[-1]), outputs.logits)
    heads = config.num_attention_heads
    for weights in outputs.encoder_attentions:
        assert weights.shape == (2, heads, SOURCE, SOURCE)
        assert torch.allclose(weights.sum(dim=-1), torch.ones(()).double(), **STRICT)
    for weights in outputs.decoder_attentions:
        assert weights.shape == (2, heads, TARGET, TARGET)
        assert not weights.triu(1).any() and not weights[0, :, :9].any()
    for weights in outputs.cross_attentions:
        assert weights.shape == (2, heads, TARGET, SOURCE)
        assert torch.allclose(weights[1].sum(dim=-1), torch.ones(()).double(), **STRICT)
    for logits in outputs.decoder_router_logits:
        assert logits.shape == (2, TARGET, config.num_experts)
    kept = logits_of(model, source, target, decoder_attention_mask=mask, logits_to_keep=3)
    assert torch.allclose(kept, outputs.logits[:, -3:], **STRICT)


def test_compression_and_experts_are_active():
    model = draw_model(3, min_compression_ratio=0.1, num_experts=4, num_experts_per_tok=1, dynamic_experts=True)
    with torch.no_grad():
        outputs = model(*draw_pair(2, 3)[:1], decoder_input_ids=draw_pair(2, 3)[1], output_router_logits=True)
    for side in ("", "decoder_"):
        assert 0.1 < outputs.metrics[f"{side}compression_ratio"] < 0.9
        assert 1 <= outputs.metrics[f"{side}experts_per_token"] <= 2


def test_output_router_logits():
    model = draw_model(0)
    source, target = draw_pair(2, 0)
    names = {"encoder_router_logits", "decoder_router_logits", "metrics"}
    losses = {"aux_loss", "reconstruction_loss", "router_loss"}
    plain = model(source, decoder_input_ids=target)
    routed = model(source, decoder_input_ids=target, output_router_logits=True)
    assert routed.keys() - plain.keys() == names | losses
    model.config.output_router_logits = True
    assert names <= model(source, decoder_input_ids=target).keys()
    assert not names & model(source, decoder_input_ids=target, output_router_logits=False).keys()


def test_model_without_target_reads_the_source():
    model = draw_model(0, LiquidModel)
    source, _ = draw_pair(2, 0)
    mask = torch.ones_like(source)
    mask[0, :9] = 0
    with torch.no_grad():
        alone = model(source, attention_mask=mask).last_hidden_state
        expected = model(
            source, attention_mask=mask, decoder_input_ids=source, decoder_attention_mask=mask
        ).last_hidden_state
    assert torch.equal(alone, expected)


@seeds
@pytest.mark.parametrize("padded", [False, True])
def test_chunked_operations_give_equal_outputs(seed, padded, monkeypatch):
    model = draw_model(seed)
    source, target = draw_pair(3, seed)
    inputs = {"decoder_input_ids": target, "labels": target}
    if padded:
        mask = torch.ones_like(source)
        mask[0, 5:20] = mask[1, -9:] = 0
        inputs["attention_mask"] = mask

    def everything() -> list[torch.Tensor]:
        with torch.no_grad():
            quick = model(source, output_attentions=True, **inputs)
        weights = (*quick.encoder_attentions, *quick.decoder_attentions, *quick.cross_attentions)
        model.zero_grad()
        outputs = model(source, **inputs)
        losses = [outputs.logits.square().mean(), outputs.reconstruction_loss, outputs.router_loss]
        sum(losses).backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        return [quick.logits, outputs.logits.detach(), *(loss.detach() for loss in losses), *gradients, *weights]

    whole = everything()
    monkeypatch.setattr(pieces, "CHUNK_SIZE", 16)
    for one, other in zip(everything(), whole, strict=True):
        assert torch.allclose(one, other, **STRICT)


# Training


def loss_and_gradients(model, source, labels, **inputs):
    model.zero_grad()
    loss = model(source, labels=labels, **inputs).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@seeds
def test_every_parameter_learns(seed):
    options = {"learned_positions": False, "min_compression_ratio": 0.1, "max_expert_load": None}
    # In a window of one entity, queries and keys receive no gradient.
    model = draw_model(seed, attention_window=max(2, draw_config(seed).attention_window), **options).train()
    for length in (1, 2, 3):
        model.zero_grad()
        model(draw_ids(2, length, seed), labels=draw_ids(2, length, seed)).loss.backward()
        assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    _, gradients = loss_and_gradients(model, draw_ids(4, 150, seed), draw_ids(4, 60, seed))
    assert not [name for name, gradient in gradients.items() if not gradient.any()]


@seeds
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_equal_gradients(seed, reentrant):
    model = draw_model(seed).train()
    source, labels = draw_pair(2, seed)
    mask = torch.ones_like(source)
    mask[0, 3:9] = 0
    loss, gradients = loss_and_gradients(model, source, labels, attention_mask=mask)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    again, checkpointed = loss_and_gradients(model, source, labels, attention_mask=mask)
    assert torch.equal(loss, again)
    assert all(torch.allclose(gradients[name], checkpointed[name], **STRICT) for name in gradients)


@seeds
def test_accumulated_gradients_equal_those_of_one_batch(seed):
    model = draw_model(seed, max_expert_load=None).train()
    source, labels = draw_pair(4, seed)
    labels[0, 20:] = labels[1, 5:] = labels[3, :4] = -100
    loss, gradients = loss_and_gradients(model, source, labels)
    total = int((labels != -100).sum())
    model.zero_grad()
    parts = [
        model(source[row : row + 1], labels=labels[row : row + 1], num_items_in_batch=total).loss for row in range(4)
    ]
    sum(parts).backward()
    assert torch.allclose(sum(parts), loss, **FP32)
    assert all(torch.allclose(parameter.grad, gradients[name], **FP32) for name, parameter in model.named_parameters())


@seeds
def test_losses_ignore_padding_and_sum_to_the_loss(seed):
    model = draw_model(seed, max_expert_load=None, learned_positions=False)
    source, labels = draw_pair(2, seed)
    with torch.no_grad():
        plain = model(source, labels=labels)
        wide_source = torch.cat([draw_ids(2, 70, seed), source], dim=1)
        mask = torch.cat([torch.zeros(2, 70, dtype=torch.int64), torch.ones_like(source)], dim=1)
        wide_labels = torch.cat([labels, torch.full((2, 30), -100)], dim=1)
        padded = model(wide_source, attention_mask=mask, labels=wide_labels)
        # As a data collator returns it: decoder inputs from the labels, without a mask.
        shifted = model.prepare_decoder_input_ids_from_labels(wide_labels)
        collated = model(wide_source, attention_mask=mask, labels=wide_labels, decoder_input_ids=shifted)
    for name, close in (
        ("loss", FP32),
        ("token_loss", FP32),
        ("reconstruction_loss", STRICT),
        ("router_loss", STRICT),
    ):
        assert torch.allclose(padded[name], plain[name], **close)
        assert torch.allclose(collated[name], padded[name], **STRICT)
    total = plain.token_loss + model.config.reconstruction_loss_coef * plain.reconstruction_loss + plain.router_loss
    assert torch.allclose(plain.loss, total, **STRICT)
    assert plain.reconstruction_loss > 1e-3 and plain.router_loss > 1e-6


def test_reconstruction_loss_is_0_without_compression():
    model = draw_model(1, min_compression_ratio=1)
    source, labels = draw_pair(2, 1)
    with torch.no_grad():
        outputs = model(source, labels=labels, output_router_logits=True)
    assert outputs.reconstruction_loss < 1e-12
    assert outputs.metrics["compression_ratio"] == 1


# Loading, dtypes, heads


@seeds
def test_save_and_load_is_exact(seed, tmp_path):
    model = draw_model(seed)
    source, target = draw_pair(2, seed)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert type(loaded) is LiquidForSeq2SeqLM
    weights = loaded.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    # The alignment of loaded tensors can change the rounding of matrix products.
    assert torch.allclose(logits_of(loaded, source, target), logits_of(model, source, target), **STRICT)
    assert (loaded.lm_head.weight is loaded.model.encoder.embed_tokens.weight) == model.config.tie_word_embeddings


def test_encoder_moves_between_translator_and_classifier(tmp_path):
    model = draw_model(0, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "translator")
    classifier, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "translator", dtype=torch.float64, output_loading_info=True
    )
    assert report["missing_keys"] == {"score.weight"}
    source, _ = draw_pair(2, 0)
    with torch.no_grad():
        states = [encoder.eval()(source).last_hidden_state for encoder in (model.model.encoder, classifier.encoder)]
    assert torch.allclose(*states, **STRICT)
    classifier.save_pretrained(tmp_path / "classifier")
    _, report = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "classifier", output_loading_info=True)
    assert not any("encoder" in key for key in report["missing_keys"])


def test_every_parameter_is_initialised():
    config = draw_config(4)
    torch.manual_seed(0)
    expected = LiquidForSeq2SeqLM(config)
    with torch.device("meta"):
        model = LiquidForSeq2SeqLM(config)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(float("nan"))
    for module in model.modules():
        for tensor in module.parameters(recurse=False):
            tensor._is_hf_initialized = False
    model.apply(model._init_weights)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        assert (parameter.std() > 0) == (expected.state_dict()[name].std() > 0), name


@seeds
def test_bf16_is_finite_and_close(seed):
    model = draw_model(seed, dtype=torch.float32, max_expert_load=None)
    source, labels = draw_pair(2, seed)
    with torch.no_grad():
        expected = model(source, labels=labels).loss
        with torch.autocast("cpu", torch.bfloat16):
            under_autocast = model(source, labels=labels).loss
        in_bf16 = copy.deepcopy(model).bfloat16()(source, labels=labels).loss
    assert abs(under_autocast - expected) < 0.1 * expected
    assert abs(in_bf16 - expected) < 0.1 * expected


@seeds
def test_classification_ignores_padding(seed):
    model = draw_model(seed, LiquidForSequenceClassification, num_labels=3)
    ids = draw_ids(2, 29, seed)
    mask = torch.tensor(MASKS["holes"])
    with torch.no_grad():
        padded = model(ids, attention_mask=mask).logits
        for row in range(2):
            alone = model(ids[row : row + 1, mask[row].bool()]).logits
            assert torch.allclose(padded[row : row + 1], alone, **STRICT)
    model.train()
    loss = model(ids, attention_mask=mask, labels=torch.tensor([0, 2])).loss
    loss.backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_base_model_returns_the_states_of_the_logits():
    model = draw_model(5)
    source, target = draw_pair(2, 5)
    with torch.no_grad():
        outputs = model.model(source, decoder_input_ids=target)
    assert isinstance(model.model, LiquidModel)
    assert torch.allclose(model.lm_head(outputs.last_hidden_state), logits_of(model, source, target), **STRICT)


# Errors


def test_invalid_inputs_raise():
    model = draw_model(0, max_position_embeddings=20, learned_positions=True)
    ids = draw_ids(1, 9, 0)
    with pytest.raises(ValueError, match="max_position_embeddings"):
        logits_of(model, draw_ids(1, 21, 0), ids)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(decoder_input_ids=ids)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        logits_of(model, ids + VOCABULARY, ids)
    with pytest.raises(ValueError, match="attention_mask must be"):
        logits_of(model, ids, ids, attention_mask=torch.ones(1, 5))
    with pytest.raises(ValueError, match="decoder_attention_mask must be"):
        logits_of(model, ids, ids, decoder_attention_mask=torch.ones(1, 5))
    with pytest.raises(ValueError, match="decoder_input_ids holds"):
        logits_of(model, ids, ids + VOCABULARY)
    with pytest.raises(ValueError, match="The target is missing"):
        model(ids)
    with pytest.raises(ValueError, match="same number of rows, got 1 and 2"):
        logits_of(model, ids, ids.expand(2, -1))
    with pytest.raises(ValueError, match=r"DynamicCache\(config=model.config\)"):
        model(ids, decoder_input_ids=ids, past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()))
    with pytest.raises(ValueError, match="cannot hold this model's state"):
        model.generate(ids, cache_implementation="static", max_new_tokens=3)
    broken = draw_model(0, finite_check="raise")
    embeddings = broken.get_input_embeddings()(ids).detach()
    embeddings[0, 3] = float("inf")
    with pytest.raises(FloatingPointError, match="encoder block 0, attention"):
        broken(inputs_embeds=embeddings, decoder_input_ids=ids)
