"""Tests that training on two processes, replicated or sharded, equals training on one."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from tests.modeling.liquid import test_modeling_liquid as liquid
from tests.support.families import FAMILIES, draw_ids, draw_model
from tests.support.small_models import MODELS, make_small_model

PROCESSES = 2
ROWS = 4
SEED = 3


def make_model(family, options):
    if family == "liquid":
        return liquid.draw_model(SEED, **options).train()
    return draw_model(family, SEED, **options).train()


def draw_batch():
    """Draw ids and labels `[rows, length]`; rows have different numbers of labels."""
    ids = draw_ids(ROWS, 40, 0)
    labels = ids.clone()
    for row in range(ROWS):
        labels[row, : 9 * row] = -100
    return ids, labels


def count_items(family, labels):
    """Number of labels in the mean loss; a decoder-only model does not predict the first."""
    return (labels if family == "liquid" else labels[:, 1:]).ne(-100).sum()


def full_tensor(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def gradients_and_buffers(model):
    """Gradients, and buffers after staged updates are committed."""
    if hasattr(model, "commit_memory"):
        model.commit_memory()
    gradients = {f"{name}.grad": full_tensor(parameter.grad) for name, parameter in model.named_parameters()}
    return gradients | dict(model.named_buffers())


def replicated(model: nn.Module) -> nn.Module:
    # Every parameter must have a gradient: DDP waits for unused parameters unless it searches for them.
    return DistributedDataParallel(model)


def sharded(model: nn.Module) -> nn.Module:
    """Shard every layer and the remaining parameters over both processes."""
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            fully_shard(module)
    return fully_shard(model)


WAYS = {"DDP": replicated, "FSDP2": sharded}


def train(rank, way, cases, rendezvous, results):
    """Save loss, gradients and buffers of each case, computed from the rows of this process."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=PROCESSES)
    try:
        torch.set_num_threads(1)
        ids, labels = draw_batch()
        mine = slice(rank * ROWS // PROCESSES, (rank + 1) * ROWS // PROCESSES)
        found = []
        for family, options in cases:
            model = WAYS[way](make_model(family, options))
            # Like Trainer: normalized by all labels, and scaled by the processes because gradients are averaged.
            items = count_items(family, labels)
            loss = model(ids[mine], labels=labels[mine], num_items_in_batch=items, use_cache=False).loss
            (loss * PROCESSES).backward()
            loss = loss.detach()
            dist.all_reduce(loss)
            found.append((loss, gradients_and_buffers(getattr(model, "module", model))))
        torch.save(found, results / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


CASES = [
    ("dfn", {"memory_slots": 2, "readout_window": 3}),
    ("dfn", {"carry_positions": True, "memory_slots": 0}),
    ("dfn-adaptive", {"memory_slots": 0}),
    ("flownetwork", {"block_type": "enhanced_flow", "memory_size": 3}),
    ("flownetwork", {"block_type": "flow_transformer", "memory_size": 2, "memory_bank_decay": 0.5}),
    ("flownetwork", {"memory_size": 0}),
    ("liquid", {"lstm_hidden_size": 7, "attention_window": 8}),
]


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_equal_one(way, tmp_path):
    assert {family for family, _ in CASES} == {*FAMILIES, "liquid"}
    mp.spawn(train, (way, CASES, tmp_path / "rendezvous", tmp_path), nprocs=PROCESSES)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]
    ids, labels = draw_batch()
    for case, (family, options) in enumerate(CASES):
        model = make_model(family, options)
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        expected = model(ids, labels=labels, use_cache=False).loss
        expected.backward()
        expected_values = gradients_and_buffers(model)
        banks = [name for name in before if name.endswith("memory_bank")]
        assert bool(banks) == (options.get("memory_size", 0) > 0)
        assert not any(torch.equal(expected_values[name], before[name]) for name in banks)
        for loss, values in (of_rank[case] for of_rank in found):
            assert torch.allclose(loss, expected, atol=1e-6)
            assert values.keys() == expected_values.keys()
            for name, value in expected_values.items():
                assert torch.allclose(values[name], value, atol=1e-9, rtol=0), name
        for name in banks:
            assert torch.equal(*(of_rank[case][1][name] for of_rank in found))


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForSequenceClassification, "LM"])
@pytest.mark.parametrize("family", MODELS)
def test_fsdp_wrap_policy_finds_the_layers(family, auto_class):
    config = make_small_model(family).config
    language_model = AutoModelForSeq2SeqLM if family == "liquid" else AutoModelForCausalLM
    model = (language_model if auto_class == "LM" else auto_class).from_config(config)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    shards_by = fsdp2_prepare_auto_wrap_policy(plugin, model)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert len(layers) >= 2 and all(map(shards_by, layers))


def test_train_command_on_two_processes_equals_one(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"The {number} little letters lay in a long line." for number in range(900)))
    size = ["--size", "tiny", "--block-size", "48", "--max-steps", "4"]
    alone = [sys.executable, "-m", "dfn_hf.cli", "train", "lm", tmp_path / "alone", "--batch-size", "4"]
    both = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    both += ["-m", "dfn_hf.cli", "train", "lm", tmp_path / "both", "--batch-size", "2"]
    losses = []
    for command in (alone, both):
        arguments = [str(word) for word in (*command, "--data", text, *size)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        finished = subprocess.run(arguments, capture_output=True, text=True, timeout=300, env=environment)
        assert finished.returncode == 0, finished.stderr[-2000:]
    for name in ("alone", "both"):
        log = json.loads((tmp_path / name / "training_log.json").read_text())
        losses.append([(entry["loss"], entry["grad_norm"]) for entry in log if "loss" in entry])
        AutoModelForCausalLM.from_pretrained(tmp_path / name)
    assert losses[0] and torch.allclose(torch.tensor(losses[0]), torch.tensor(losses[1]), atol=1e-4, rtol=0)
