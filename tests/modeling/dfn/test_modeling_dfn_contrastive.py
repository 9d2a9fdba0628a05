"""DFNForContrastive: loss compared with a loop, padding, row order, processes, precision, saving, messages."""

import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel

from dfn_hf import DFNConfig, DFNModel
from dfn_hf.modeling.dfn.modeling_dfn_contrastive import DFNForContrastive, capped_scale
from tests.support.families import draw_dfn_config, draw_ids

SEEDS = range(4)
STRICT = {"atol": 1e-9, "rtol": 0}
ROWS = 4


def draw(seed, fields=False, **overrides):
    overrides = {"memory_slots": 0, "readout_window": 1, "coordinate_dim": 2, "value_dim": 3, **overrides}
    config = draw_dfn_config(random.Random(seed), projection_dim=6, contrastive_fields=fields, **overrides)
    torch.manual_seed(seed)
    model = DFNForContrastive(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale" and (parameter.dim() < 2 or parameter.shape[1] == 1):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def draw_texts(seed):
    """Draw two views of token ids; the first has padding inside its rows."""
    ids, pair_ids = draw_ids(ROWS, 23, seed), draw_ids(ROWS, 17, seed + 100)
    mask = torch.rand(ROWS, 23, generator=torch.Generator().manual_seed(seed)) < 0.7
    mask[:, 3] = True
    return {"input_ids": ids, "attention_mask": mask.long(), "pair_input_ids": pair_ids}


def draw_fields(seed, samples=19):
    generator = torch.Generator().manual_seed(seed)
    coordinates = torch.rand(ROWS, samples, 2, generator=generator, dtype=torch.float64)
    values = torch.randn(ROWS, samples, 3, generator=generator, dtype=torch.float64)
    mask = torch.rand(ROWS, samples, generator=generator) < 0.7
    mask[:, 0] = True
    return {"coordinates": coordinates, "values": values, "mask": mask}


def reference_embeds(states, mask, projection):
    """Pool, project and normalise row by row."""
    rows = []
    for row in range(len(states)):
        kept = [states[row, place] for place in range(states.shape[1]) if mask[row, place]]
        projected = projection.weight @ (sum(kept) / len(kept))
        rows.append(projected / projected.square().sum().sqrt())
    return torch.stack(rows)


def reference_loss(embeds, pair_embeds, scale):
    """Compute symmetric InfoNCE by a loop over pairs."""
    count, total = len(embeds), 0.0
    for one, other in ((embeds, pair_embeds), (pair_embeds, embeds)):
        for i in range(count):
            logits = [scale * (one[i] * other[j]).sum() for j in range(count)]
            total = total - (logits[i] - torch.stack(logits).logsumexp(dim=0)) / (2 * count)
    return total


@pytest.mark.parametrize("seed", SEEDS)
def test_loss_and_gradients_equal_a_loop(seed):
    model, texts = draw(seed), draw_texts(seed)
    outputs = model(**texts)
    outputs.loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    model.zero_grad()
    tower = DFNModel(model.config).double().eval()
    tower.load_state_dict(model.model.state_dict())
    first = tower(texts["input_ids"], attention_mask=texts["attention_mask"]).last_hidden_state
    second = tower(texts["pair_input_ids"]).last_hidden_state
    embeds = reference_embeds(first, texts["attention_mask"], model.projection)
    pair_embeds = reference_embeds(second, torch.ones(second.shape[:2]), model.projection)
    scale = model.logit_scale.double().exp()
    loss = reference_loss(embeds, pair_embeds, scale)
    loss.backward()
    assert torch.allclose(outputs.loss, loss, **STRICT)
    assert torch.allclose(outputs.embeds, embeds, **STRICT)
    assert torch.allclose(outputs.logits_per_pair, scale * embeds @ pair_embeds.T, **STRICT)
    for name, parameter in tower.named_parameters():
        assert torch.allclose(found[f"model.{name}"], parameter.grad, **STRICT), name
    for name in ("projection.weight", "logit_scale"):
        assert torch.allclose(found[name], model.get_parameter(name).grad, **STRICT), name


@pytest.mark.parametrize("seed", SEEDS)
def test_padding_and_other_rows_have_no_effect(seed):
    model, texts = draw(seed), draw_texts(seed)
    with torch.no_grad():
        whole = model(**texts)
        for row in range(ROWS):
            real = texts["attention_mask"][row].bool()
            alone = model(texts["input_ids"][row : row + 1, real])
            assert torch.allclose(alone.embeds[0], whole.embeds[row], **STRICT)
        other = texts["input_ids"].masked_fill(texts["attention_mask"] == 0, 7)
        assert torch.equal(model(**texts | {"input_ids": other}).embeds, whole.embeds)
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(seed))
        reordered = model(**{name: tensor[order] for name, tensor in texts.items()})
    assert torch.allclose(reordered.embeds, whole.embeds[order], **STRICT)
    assert torch.allclose(reordered.logits_per_pair, whole.logits_per_pair[order][:, order], **STRICT)
    assert torch.allclose(reordered.loss, whole.loss, **STRICT)
    assert torch.allclose(whole.embeds.square().sum(dim=1), torch.ones(ROWS, dtype=torch.float64), **STRICT)


def test_loss_includes_the_ratio_loss_of_texts():
    model, texts = draw(1, entity_sampling="adaptive", local_window=4, ratio_loss_coef=0.5), draw_texts(1)
    outputs = model(**texts)
    expected = reference_loss(outputs.embeds, outputs.pair_embeds, model.logit_scale.double().exp())
    first = model.model(texts["input_ids"], attention_mask=texts["attention_mask"]).ratio_loss
    second = model.model(texts["pair_input_ids"]).ratio_loss
    ratio = torch.cat([first, second]).mean()
    assert ratio > 0.01
    assert torch.allclose(outputs.loss, expected + 0.5 * ratio, **STRICT)


@pytest.mark.parametrize("sampling", ["token", "adaptive"])
@pytest.mark.parametrize("seed", SEEDS)
def test_fields_replace_either_text(seed, sampling):
    model = draw(seed, fields=True, entity_sampling=sampling, num_entities=8, local_window=4)
    fields, texts = draw_fields(seed), draw_texts(seed)
    pair = {f"pair_{name}": tensor for name, tensor in fields.items()}
    first = {name: texts[name] for name in ("input_ids", "attention_mask")}
    second = {f"pair_{name}": tensor for name, tensor in first.items()}
    field_first, text_first = model(**fields, **second), model(**first, **pair)
    assert torch.allclose(field_first.embeds, text_first.pair_embeds, **STRICT)
    assert torch.allclose(field_first.logits_per_pair, text_first.logits_per_pair.T, **STRICT)
    assert torch.allclose(field_first.loss, text_first.loss, **STRICT)
    field_first.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    seen = model.field_model(**fields)
    mask = torch.ones(seen.last_hidden_state.shape[:2]) if seen.entity_mask is None else seen.entity_mask
    expected = reference_embeds(seen.last_hidden_state, mask, model.field_projection)
    assert torch.allclose(field_first.embeds, expected, **STRICT)
    hidden = fields["values"].masked_fill(~fields["mask"].unsqueeze(-1), 5.0)
    assert torch.allclose(model(**fields | {"values": hidden}).embeds, field_first.embeds, **STRICT)


@pytest.mark.parametrize("fields", [False, True])
def test_save_and_load_are_exact(fields, tmp_path):
    config = draw_dfn_config(
        random.Random(3), memory_slots=0, readout_window=1, coordinate_dim=2, value_dim=3, contrastive_fields=fields
    )
    assert config.is_causal
    model = DFNForContrastive(config).eval()
    assert config.is_causal and not model.config.is_causal
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    model.save_pretrained(tmp_path)
    loaded = DFNForContrastive.from_pretrained(tmp_path).eval()
    assert not loaded.config.is_causal and (loaded.field_model is not None) == fields
    texts = draw_texts(0)
    with torch.no_grad():
        assert torch.equal(model(**texts).logits_per_pair, loaded(**texts).logits_per_pair)
        states = model.model(texts["input_ids"]).last_hidden_state
        for tower in (DFNModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
            assert torch.equal(tower.eval()(texts["input_ids"]).last_hidden_state, states)
    half = DFNForContrastive.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.logit_scale.dtype == torch.float32 and half.projection.weight.dtype == torch.bfloat16


def test_half_precision_and_checkpointing_are_close():
    model = draw(1, fields=True).float().train()
    texts = draw_texts(1)
    fields = {
        name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in draw_fields(1).items()
    }
    inputs = {**fields, "pair_input_ids": texts["pair_input_ids"]}

    def learn():
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    plain = learn()
    with torch.no_grad():
        embeds = model(**inputs).embeds
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(**inputs)
    outputs.loss.backward()
    assert outputs.loss.dtype == outputs.embeds.dtype == torch.float32
    assert ((outputs.embeds * embeds).sum(dim=-1) > 0.99).all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    model.gradient_checkpointing_enable()
    for ours, expected in zip(learn(), plain, strict=True):
        assert torch.allclose(ours, expected, atol=1e-6)
    half = model.to(torch.bfloat16)
    embeds = half(texts["input_ids"]).embeds
    assert embeds.dtype == torch.float32 and torch.allclose(embeds.norm(dim=1), torch.ones(ROWS), atol=1e-5)


def test_scale_is_capped_with_gradient():
    log_scale = torch.tensor(7.0, requires_grad=True)
    scale = capped_scale(log_scale)
    scale.backward()
    assert scale.item() == pytest.approx(100, rel=1e-5)
    assert log_scale.grad.item() == pytest.approx(100, rel=1e-5)
    assert capped_scale(torch.tensor(1.0)).item() == pytest.approx(math.e)


def test_lora_trains_the_projection():
    model = draw(2).float()
    tuned = get_peft_model(model, LoraConfig(target_modules=["value_proj", "up_proj"], modules_to_save=["projection"]))
    tuned.train()
    tuned(**draw_texts(2)).loss.backward()
    learnt = [name for name, parameter in tuned.named_parameters() if parameter.grad is not None]
    assert any("lora_" in name for name in learnt) and any("projection" in name for name in learnt)


def test_messages_name_invalid_inputs():
    model = draw(0)
    texts, fields = draw_texts(0), draw_fields(0)
    ids = texts["input_ids"]
    with pytest.raises(ValueError, match="input_ids .* or a field"):
        model()
    with pytest.raises(ValueError, match="pair_input_ids"):
        model(ids, pair_attention_mask=texts["attention_mask"])
    with pytest.raises(ValueError, match="not both"):
        model(ids, coordinates=fields["coordinates"], values=fields["values"])
    with pytest.raises(ValueError, match="contrastive_fields=True"):
        model(ids, pair_coordinates=fields["coordinates"], pair_values=fields["values"])
    with pytest.raises(ValueError, match="4 first views and 3 second"):
        model(ids, pair_input_ids=ids[:3])
    with pytest.raises(ValueError, match="pair_attention_mask is 0 everywhere"):
        model(ids, pair_input_ids=ids, pair_attention_mask=torch.zeros_like(ids))
    assert model(ids[:1], pair_input_ids=ids[:1]).loss == 0
    assert model(**texts, return_loss=False).loss is None
    with pytest.raises(ValueError, match="coordinates and values: pass both"):
        draw(0, fields=True)(coordinates=fields["coordinates"])
    with pytest.raises(ValueError, match="memory_slots"):
        DFNForContrastive(DFNConfig(memory_slots=2))


def test_a_last_batch_of_one_pair_trains_nothing():
    model, texts = draw(0).train(), draw_texts(0)
    loss = model(texts["input_ids"][:1], pair_input_ids=texts["pair_input_ids"][:1]).loss
    loss.backward()
    assert loss == 0
    assert all(weight.grad is None or not weight.grad.abs().max() > 1e-12 for weight in model.parameters())


PROCESS = """
import sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tests.modeling.dfn.test_modeling_dfn_contrastive import ROWS, draw, draw_texts

dist.init_process_group("gloo")
rank, processes = dist.get_rank(), dist.get_world_size()
model = DistributedDataParallel(draw(5).train())
mine = slice(rank * ROWS // processes, (rank + 1) * ROWS // processes)
loss = model(**{name: tensor[mine] for name, tensor in draw_texts(5).items()}).loss
loss.backward()
loss = loss.detach()
dist.all_reduce(loss)
gradients = {name: parameter.grad for name, parameter in model.module.named_parameters()}
torch.save((loss / processes, gradients), f"{sys.argv[1]}/{rank}.pt")
dist.destroy_process_group()
"""


def test_two_processes_equal_one(tmp_path):
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    root = str(Path(__file__).parents[3])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    finished = subprocess.run(
        [*command, str(script), str(tmp_path)], capture_output=True, text=True, timeout=120, env=environment, cwd=root
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    model = draw(5).train()
    expected = model(**draw_texts(5)).loss
    expected.backward()
    for rank in range(2):
        loss, gradients = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.allclose(loss, expected, **STRICT)
        for name, parameter in model.named_parameters():
            assert torch.allclose(gradients[name], parameter.grad, **STRICT), name
