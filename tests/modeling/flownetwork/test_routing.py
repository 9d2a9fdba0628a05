"""Flow routing: selection, flow matrix, mixing and router against loops over the equations."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dfn_hf import ContextAwareFlowRouter, FlowLayer
from dfn_hf.modeling.flownetwork import routing as module
from dfn_hf.modeling.flownetwork.routing import TIE_CAP, TIE_MARGIN, interpolate_knots, profile_knots, soft_top_k
from dfn_hf.modeling.modules.cache import FlowCacheLayer
from dfn_hf.modeling.modules.row_layout import make_row_layout

CPU = torch.device("cpu")
FEATURES, OUTPUTS = 6, 5
STRICT = {"atol": 1e-9, "rtol": 0}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}
WINDOWS = [1, 2, 5, 50, None]
LENGTHS = [1, 2, 7, 40]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Selection


def select_by_loop(row, count):
    """Compute relu(F − θ), with θ on the line through the sorted entries (0 after the last), minus a margin for ties.

    The margin is a fraction of θ that decreases with the number of kept entries, up to TIE_CAP entries.
    """
    ordered = [*sorted(row.tolist(), reverse=True), 0.0, 0.0]
    place = max(count - 0.5, 0.5)
    below = math.floor(place)
    threshold = ordered[below] + (place - below) * (ordered[below + 1] - ordered[below])
    margin = TIE_MARGIN / min(max(count, 1), TIE_CAP)
    kept = [max(entry - (1 - margin) * threshold, 0) for entry in row.tolist()]
    return torch.tensor(kept, dtype=torch.float64) / sum(kept)


ROWS = {
    "distinct": draw(4, 9).exp(),
    "some equal": torch.tensor([[3.0, 1, 2, 2, 2, 1, 0, 2, 3], [1, 1, 0, 0, 0, 0, 0, 1, 1]]).double(),
    "all equal": torch.full((1, 9), 0.25).double(),
    "one above 0": torch.eye(9).double(),
}


@pytest.mark.parametrize("count", [0, 0.2, 1, 1.3, 1.5, 2, 3.7, 8.2, 9])
@pytest.mark.parametrize("name", ROWS)
def test_selection_equals_the_loop(name, count):
    flow = ROWS[name]
    for max_count in {math.ceil(count), 9}:
        selected = soft_top_k(flow, torch.tensor(count, dtype=torch.float64), max_count)
        expected = torch.stack([select_by_loop(row, count) for row in flow])
        assert torch.allclose(selected, expected, atol=1e-13, rtol=0)
        assert torch.allclose(selected.sum(dim=-1), torch.ones(len(flow)).double())
        assert not selected[flow == 0].any()


@pytest.mark.parametrize("count", [0, 1, 1.4, 1.6, 2, 6.51, 20.3, 40])
def test_selection_keeps_the_requested_number(count):
    flow = torch.logspace(0, 12, 40, dtype=torch.float64).flip(0).roll(7).expand(3, -1)
    selected = soft_top_k(flow, torch.tensor(float(count)), 40)
    assert ((selected > 0).sum(dim=-1) == max(1, round(count))).all()
    strongest = flow.topk(max(1, round(count)), dim=-1).indices
    assert (selected.gather(-1, strongest) > 0).all()


def test_equal_entries_have_equal_weights():
    selected = soft_top_k(torch.tensor([[1.0, 3, 3, 3, 2]]).double(), torch.tensor([1.0]).double(), 1)
    assert torch.allclose(selected, torch.tensor([[0, 1 / 3, 1 / 3, 1 / 3, 0]]).double())


def test_counts_may_differ_between_rows():
    flow = draw(2, 3, 9).exp()
    count = torch.tensor([[1, 4, 9], [2.4, 0.1, 7]]).double()
    selected = soft_top_k(flow, count, 9)
    for row in range(2):
        for i in range(3):
            expected = select_by_loop(flow[row, i], float(count[row, i]))
            assert torch.allclose(selected[row, i], expected, atol=1e-13, rtol=0)


def test_selection_is_continuous():
    flow, direction = draw(200, 9).exp(), 1e-7 * draw(200, 9, seed=1)
    counts = torch.linspace(0, 9, 200).double()
    selected = soft_top_k(flow, counts, 9)
    assert (soft_top_k(flow + direction, counts, 9) - selected).abs().max() < 1e-4
    assert (soft_top_k(flow, counts + 1e-7, 9) - selected).abs().max() < 1e-4


def test_selection_gradients_equal_numerical_ones():
    # Away from ties and from half-integer counts, where the formula is not differentiable.
    flow = torch.stack([torch.arange(1.0, 8).roll(shift) for shift in range(4)]).double().requires_grad_()
    count = torch.tensor([1.2, 3.7, 5.1, 6.8]).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda flow, count: soft_top_k(flow, count, 7), (flow, count))
    selected = soft_top_k(flow, count, 7)
    (gradient,) = torch.autograd.grad(selected.square().sum(), count)
    assert gradient.all()


def test_nan_counts_give_nan_only_in_their_row():
    selected = soft_top_k(draw(2, 9).exp(), torch.tensor([math.nan, 3]).double(), 9)
    assert selected[0].isnan().all() and selected[1].isfinite().all()


# Profiles


@pytest.mark.parametrize("window", [1, 2, 7, 8, 9, 16, 17, 128, 1000])
def test_knots_are_near_offsets_and_powers_of_two(window):
    knots = profile_knots(window)
    assert knots[:8] == list(range(min(8, window)))
    assert all(knot == 2**power for power, knot in enumerate(knots[8:], start=3))
    assert knots[-1] >= window - 1 and (len(knots) <= 8 or knots[-2] < window - 1)


@pytest.mark.parametrize("window", [1, 5, 8, 30, 100])
def test_profiles_are_exact_at_knots_and_linear_between(window):
    knots = profile_knots(window)
    values = draw(3, len(knots)).requires_grad_()
    width = max(window, knots[-1] + 5)
    found = interpolate_knots(values, knots, width)
    assert torch.equal(found[:, knots], values)
    expected = []
    for offset in range(width):
        right = next((place for place, knot in enumerate(knots) if knot >= offset), len(knots) - 1)
        left = max(right - 1, 0)
        fraction = min(1.0, (offset - knots[left]) / max(1, knots[right] - knots[left]))
        expected.append((1 - fraction) * values[:, left] + fraction * values[:, right])
    assert torch.allclose(found, torch.stack(expected, dim=1), atol=1e-13, rtol=0)
    assert torch.equal(interpolate_knots(values, knots, window), found[:, :window])
    assert torch.autograd.gradcheck(lambda values: interpolate_knots(values, knots, width), values)


# The flow matrix


def make_layer(window, num_patterns=4, base_sparsity=0.3, dtype=torch.float64, rank=3):
    torch.manual_seed(0)
    layer = FlowLayer(FEATURES, OUTPUTS, num_patterns, base_sparsity, window, rank)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return layer.to(dtype)


def draw_routing(layer, batch, length):
    """Return random windows and fractions in the router's range; those of the last entity are the largest."""
    generator = torch.Generator().manual_seed(1)
    window, fraction = torch.rand(2, batch, length, generator=generator, dtype=torch.float64)
    widest = layer.window or length
    window[:, -1] = fraction[:, -1] = 1
    return 1 + (widest - 1) * window, layer.base_sparsity * (0.5 + fraction)


def unit(x):
    """Scale x to a mean square of 1."""
    return x / (x.square().mean() + 1e-6).sqrt()


def flow_matrix_by_loop(layer, x, routing):
    """Compute the module's equations entry by entry in float64 for x `[B, M, input_dim]`."""
    batch, length, _ = x.shape
    num_patterns, rank = layer.profile.shape[0], layer.rank
    maps = layer.query_maps.weight.view(num_patterns, rank, FEATURES)
    profile = F.softplus(interpolate_knots(layer.profile, layer.knots, length))
    temperature = max(1.0, (layer.window or 1) / 16)
    matrix = torch.zeros(batch, length, length, dtype=torch.float64)
    for row in range(batch):
        keys = [unit(layer.key_proj.weight @ entity) for entity in x[row]]
        for i in range(length):
            entity = x[row, i]
            weights = torch.ones(1).double()
            if num_patterns > 1:
                weights = (layer.pattern_selector.weight @ entity).softmax(dim=-1)
            if num_patterns > 2:
                weights = select_by_loop(weights, max(2, num_patterns // 2))
            query = unit(sum(weights[p] * (maps[p] @ entity) for p in range(num_patterns)))
            first = 0 if layer.window is None else max(0, i - layer.window + 1)
            reachable, fraction = i + 1 - first, layer.base_sparsity
            logs = []
            for j in range(first, i + 1):
                mixture = sum(weights[p] * profile[p, i - j] for p in range(num_patterns))
                logs.append(query @ keys[j] / math.sqrt(rank) + mixture.log())
                if routing is not None:
                    logs[-1] = logs[-1] + F.logsigmoid((routing[0][row, i] - (i - j)) / temperature)
            if routing is not None:
                reachable, fraction = min(reachable, float(routing[0][row, i])), float(routing[1][row, i])
            flow = torch.stack(logs).exp()
            intensity = (layer.intensity_proj.weight[0] @ entity + layer.intensity_proj.bias[0]).sigmoid()
            matrix[row, i, first : i + 1] = intensity * select_by_loop(flow, fraction * reachable)
    return matrix


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("length", [1, 2, 7, 21])
def test_flow_matrix_equals_the_loop(window, length, routed):
    layer, x = make_layer(window), draw(2, length, FEATURES)
    routing = draw_routing(layer, 2, length) if routed else None
    with torch.no_grad():
        matrix, metrics = layer(x, routing)
        expected = flow_matrix_by_loop(layer, x, routing)
    assert torch.allclose(matrix, expected, **STRICT)
    reachable = torch.arange(1.0, length + 1).clamp(max=window or length).double()
    if routed:
        reachable = torch.minimum(reachable, routing[0])
    assert torch.allclose(metrics["sparsity_kept"], ((expected > 0).sum(dim=-1) / reachable).mean(), **STRICT)


@pytest.mark.parametrize("base_sparsity", [0.02, 1.0])
@pytest.mark.parametrize("num_patterns", [1, 2, 3, 7])
def test_flow_matrix_with_any_number_of_patterns(num_patterns, base_sparsity):
    layer, x = make_layer(5, num_patterns, base_sparsity), draw(2, 9, FEATURES)
    with torch.no_grad():
        matrix, metrics = layer(x)
        assert torch.allclose(matrix, flow_matrix_by_loop(layer, x, None), **STRICT)
    if base_sparsity == 1:
        assert ((matrix > 0).sum(dim=-1) == torch.arange(1, 10).clamp(max=5)).all()
    assert (layer.pattern_selector is None) == (num_patterns == 1)
    assert 0 <= metrics["pattern_entropy"] <= math.log(max(2, num_patterns // 2)) + 1e-9


@pytest.mark.parametrize("window", WINDOWS)
def test_rows_sum_to_their_intensity_within_the_causal_window(window):
    layer, x = make_layer(window), draw(3, 20, FEATURES)
    with torch.no_grad():
        matrix, _ = layer(x, draw_routing(layer, 3, 20))
        intensity = layer.intensity_proj(x)[..., 0].sigmoid()
    assert torch.allclose(matrix.sum(dim=-1), intensity, **STRICT)
    age = torch.arange(20)[:, None] - torch.arange(20)
    assert (matrix >= 0).all() and not matrix[:, (age < 0) | (age >= (window or 20))].any()


def test_flow_matrix_is_independent_of_later_entities_and_other_rows():
    layer, x = make_layer(None), draw(3, 20, FEATURES)
    changed = x.clone()
    changed[0], changed[1, 12:] = 9, -9
    with torch.no_grad():
        before, after = layer(x)[0], layer(changed)[0]
    assert torch.equal(before[2], after[2]) and torch.equal(before[1, :12], after[1, :12])


@pytest.mark.parametrize("base_sparsity", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("window", [None, 128])
def test_kept_fraction_is_close_to_base_sparsity(base_sparsity, window):
    for seed in range(2):
        torch.manual_seed(seed)
        layer = FlowLayer(64, 64, num_patterns=8, base_sparsity=base_sparsity, window=window)
        with torch.no_grad():
            matrix, metrics = layer(torch.randn(1, 512, 64))
        reachable = torch.arange(1, 513).clamp(max=window or 512)
        counted = ((matrix > 0).sum(dim=-1) / reachable).mean()
        for kept in (counted, metrics["sparsity_kept"]):
            assert kept.item() == pytest.approx(base_sparsity, rel=0.2)


def test_large_scores_stay_finite():
    layer = make_layer(5).float()
    x = (100 * draw(1, 12, FEATURES)).float().requires_grad_()
    mixed, _, _ = layer.mix(x)
    mixed.sum().backward()
    assert mixed.isfinite().all() and x.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


# Mixing


def outputs_and_gradients(layer, x, mix, routing):
    inputs = [x, *(routing or ())]
    inputs = [one.detach().to(layer.profile.dtype).requires_grad_() for one in inputs]
    mixed = mix(inputs[0], tuple(inputs[1:]) or None)
    scale = draw(*mixed.shape, seed=2).to(mixed.dtype)
    gradients = torch.autograd.grad((mixed * scale).sum(), [*inputs, *layer.parameters()])
    return [mixed.detach(), *gradients]


def assert_mixes_as_its_matrix(layer, x, routing, tolerance):
    found = outputs_and_gradients(layer, x, lambda x, routing: layer.mix(x, routing)[0], routing)
    expected = outputs_and_gradients(layer, x, lambda x, routing: layer(x, routing)[0] @ layer.value_proj(x), routing)
    for one, other in zip(found, expected, strict=True):
        scale = other.abs().max().clamp(min=1)
        assert (one - other).abs().max() <= tolerance * scale


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("length", LENGTHS)
def test_mixing_equals_the_matrix(dtype, routed, window, length):
    layer, x = make_layer(window, dtype=dtype), draw(2, length, FEATURES)
    assert_mixes_as_its_matrix(layer, x, draw_routing(layer, 2, length) if routed else None, TOLERANCE[dtype])


@pytest.mark.parametrize("window", [1, 3, 7, None])
def test_chunked_mixing_equals_the_matrix(window, monkeypatch):
    monkeypatch.setattr(module, "QUERY_CHUNK", 7)
    layer, x = make_layer(window), draw(2, 40, FEATURES)
    assert_mixes_as_its_matrix(layer, x, draw_routing(layer, 2, 40), 1e-9)


@pytest.mark.parametrize("window", WINDOWS)
def test_mixing_returns_the_matrix_by_offset_and_equal_metrics(window):
    layer, x = make_layer(window), draw(2, 21, FEATURES)
    routing = draw_routing(layer, 2, 21)
    with torch.no_grad():
        matrix, metrics = layer(x, routing)
        _, flow, same_metrics = layer.mix(x, routing, output_flow=True)
        for i in range(21):
            reached = flow[:, i].flip(1)[:, : i + 1]  # by offset, starting at the entity itself
            assert torch.allclose(reached, matrix[:, i, : i + 1].flip(1)[:, : reached.shape[1]], **STRICT)
            assert not flow[:, i].flip(1)[:, i + 1 :].any()
    assert metrics.keys() == same_metrics.keys() == {"sparsity_kept", "pattern_entropy"}
    assert all(torch.allclose(metrics[name], same_metrics[name], **STRICT) for name in metrics)
    assert layer.mix(x, routing)[1] is None


@pytest.mark.parametrize("window", [1, 5, None])
def test_segments_are_independent(window):
    layer, x = make_layer(window), draw(2, 30, FEATURES)
    lengths = [[1, 4, 9, 5, 11], [12, 18]]
    segments = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])
    mixed, _, _ = layer.mix(x, rows=make_row_layout(2, 30, CPU, segment_ids=segments))
    alone = [layer.mix(piece[None])[0] for row in range(2) for piece in x[row].split(lengths[row])]
    assert torch.allclose(mixed, torch.cat(alone, dim=1).view(2, 30, OUTPUTS), **STRICT)


def test_metrics_ignore_padding():
    layer, x = make_layer(5), draw(2, 30, FEATURES)
    rows = make_row_layout(2, 30, CPU, mask=torch.arange(30) < torch.tensor([[30], [13]]))
    mixed, _, metrics = layer.mix(rows.unpad(x), rows=rows)
    short, _, of_short = layer.mix(x[1:, :13])
    _, _, of_long = layer.mix(x[:1])
    assert torch.allclose(mixed[1:, :13], short, **STRICT)
    for name in metrics:
        assert torch.allclose(metrics[name], (30 * of_long[name] + 13 * of_short[name]) / 43, **STRICT)


SPLITS = {"steps": [1] * 40, "pieces": [3, 1, 17, 2, 17]}


def feed(call, sizes, *inputs):
    """Feed inputs `[B, M, ...]` to a module in chunks, with its state; return the concatenated outputs."""
    state, pieces = FlowCacheLayer(), []
    for parts in zip(*(one.split(sizes, dim=1) for one in inputs), strict=True):
        batch, length = parts[0].shape[:2]
        state.start_forward(batch, length, CPU)
        rows = make_row_layout(batch, length, CPU, past=state.lengths, aligned_past=state.aligned)
        state.set_layout(rows)
        with torch.no_grad():
            pieces.append(call(*parts, rows, state))
        state.finish_forward()
    return [torch.cat(outputs, dim=1) for outputs in zip(*pieces, strict=True)]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("window", [1, 5, 64])
def test_any_split_mixes_equally(split, window):
    layer, x = make_layer(window), draw(2, 40, FEATURES)
    routing = draw_routing(layer, 2, 40)
    found = feed(
        lambda x, span, fraction, rows, state: layer.mix(x, (span, fraction), rows, state, True)[:2],
        SPLITS[split],
        x,
        *routing,
    )
    with torch.no_grad():
        expected = layer.mix(x, routing, output_flow=True)
    assert torch.allclose(found[0], expected[0], **STRICT) and torch.allclose(found[1], expected[1], **STRICT)


def test_state_without_window_raises():
    with pytest.raises(ValueError, match="`window`"):
        make_layer(None).mix(draw(1, 9, FEATURES), state=FlowCacheLayer())


def test_routing_is_at_least_float32():
    layer, x = make_layer(5).bfloat16(), draw(1, 12, FEATURES).bfloat16()
    with torch.no_grad():
        mixed, flow, metrics = layer.mix(x, output_flow=True)
    assert mixed.dtype == torch.bfloat16 and flow.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in metrics.values())


@torch.no_grad()
def test_autocast_does_not_affect_the_routing():
    layer, x = make_layer(5, dtype=torch.float32), draw(1, 12, FEATURES).float()
    expected, (_, flow, _) = layer(x)[0], layer.mix(x, output_flow=True)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, again, _ = layer.mix(x, output_flow=True)
        assert torch.equal(again, flow) and torch.equal(layer(x)[0], expected)
    assert mixed.dtype == torch.bfloat16


def test_apply_mixes_values_and_supports_functions():
    layer, x = make_layer(5), draw(2, 9, FEATURES)
    matrix, _ = layer(x)
    assert torch.equal(layer.apply(matrix, x), matrix @ layer.value_proj(x))
    seen = []
    assert layer.apply(seen.append) is layer
    assert seen == [*layer.children(), layer]
    nn.Sequential(layer).apply(seen.append)
    assert seen[-2] is layer


@pytest.mark.parametrize("routed", [False, True])
def test_metrics_are_detached_scalars(routed):
    layer, x = make_layer(5), draw(2, 9, FEATURES).requires_grad_()
    routing = draw_routing(layer, 2, 9) if routed else None
    if routed:
        routing = tuple(one.requires_grad_() for one in routing)
    for metrics in (layer(x, routing)[1], layer.mix(x, routing)[2]):
        assert all(value.shape == () and not value.requires_grad for value in metrics.values())


SIZES = {"input_dim": 4, "output_dim": 4, "num_patterns": 2}


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        *(
            ({name: size}, [f"`{name}`", "at least 1", str(size)])
            for name in (*SIZES, "window", "rank")
            for size in (0, -3)
        ),
        *(
            ({"base_sparsity": fraction}, ["`base_sparsity`", "(0, 1]", str(fraction)])
            for fraction in (0, -0.1, 1.01, math.nan)
        ),
    ],
)
def test_invalid_layer_options_raise(fields, parts):
    with pytest.raises(ValueError) as error:
        FlowLayer(**SIZES | fields)
    for part in parts:
        assert part in str(error.value)


# The router


def make_router(**options):
    torch.manual_seed(0)
    router = ContextAwareFlowRouter(
        FEATURES, **{"flow_window": 20, "min_flow_window": 3, "base_sparsity": 0.2, "chunk_length": 4} | options
    )
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return router.double()


@pytest.mark.parametrize("base_sparsity", [0.2, 0.9, 1.0])
@torch.no_grad()
def test_routes_are_bounded(base_sparsity):
    router = make_router(base_sparsity=base_sparsity)
    for scale in (1, 1e4):
        window, fraction = router(scale * draw(4, 100, FEATURES))
        assert window.shape == fraction.shape == (4, 100)
        assert ((window >= 3) & (window <= 20)).all() and window.std() > 1
        least, max_count = 0.5 * base_sparsity, min(1.0, 1.5 * base_sparsity)
        assert ((fraction >= least) & (fraction <= max_count)).all() and fraction.std() > 0.05 * base_sparsity


@torch.no_grad()
def test_equal_window_bounds_give_a_constant_window():
    window, _ = make_router(flow_window=7, min_flow_window=7)(draw(1, 9, FEATURES))
    assert (window == 7).all()


@torch.no_grad()
def test_routes_depend_on_the_entity_and_closed_chunks():
    router, x = make_router(), draw(3, 21, FEATURES)
    before = router(x)
    changed = x.clone()
    changed[0], changed[1, 9] = 9, 5
    after = router(changed)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one[2], other[2])
        moved = one[1] != other[1]
        assert moved.tolist() == [i == 9 or i >= 12 for i in range(21)]


@torch.no_grad()
def test_routes_do_not_depend_on_padding():
    router, x = make_router(), draw(2, 30, FEATURES)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[0, ::3] = False
    rows = make_row_layout(2, 30, CPU, mask=mask)
    for found, alone in zip(router(rows.unpad(x), rows), router(x[:1, mask[0]]), strict=True):
        assert torch.allclose(rows.pad(found)[:1, mask[0]], alone, **STRICT)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("chunk_length", [1, 4, 64])
def test_any_split_routes_equally(split, chunk_length):
    router, x = make_router(chunk_length=chunk_length), draw(2, 40, FEATURES)
    with torch.no_grad():
        expected = router(x)
    for found, one in zip(feed(router, SPLITS[split], x), expected, strict=True):
        assert torch.allclose(found, one, **STRICT)


def test_every_router_parameter_has_a_gradient():
    router, x = make_router(), draw(2, 21, FEATURES)
    sum(route.square().sum() for route in router(x)).backward()
    assert all(parameter.grad.any() for parameter in router.parameters())


def test_routes_have_a_gradient_through_the_mixing():
    router, layer, x = make_router(), make_layer(20), draw(2, 21, FEATURES)
    routing = router(x)
    gradients = torch.autograd.grad(layer.mix(x, routing)[0].square().sum(), routing)
    assert all(gradient.any() for gradient in gradients)


@torch.no_grad()
def test_routes_are_at_least_float32():
    router, x = make_router(), draw(1, 9, FEATURES)
    assert all(route.dtype == torch.float32 for route in router.bfloat16()(x.bfloat16()))


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        *(
            ({name: size}, [f"`{name}`", "at least 1", str(size)])
            for name in ("input_dim", "flow_window", "min_flow_window", "chunk_length")
            for size in (0, -2)
        ),
        *(
            ({"base_sparsity": fraction}, ["`base_sparsity`", "(0, 1]", str(fraction)])
            for fraction in (0, -0.1, 1.01, math.nan)
        ),
        ({"flow_window": 5, "min_flow_window": 6}, ["`min_flow_window` (6)", "`flow_window` (5)"]),
    ],
)
def test_invalid_router_options_raise(fields, parts):
    with pytest.raises(ValueError) as error:
        ContextAwareFlowRouter(**{"input_dim": 4} | fields)
    for part in parts:
        assert part in str(error.value)
