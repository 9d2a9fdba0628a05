"""Folders written tensor by tensor: a model of any size passes through the memory of one shard."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from .checkpoint_file import CheckpointFile
from .key_table import Target, apply_target, target_names

SHARD_BYTES = 2**28


def empty_model(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model without storage: names, shapes and modules alone."""
    with torch.device("meta"):
        return model_class(config)


def saved_names(model: PreTrainedModel) -> list[str]:
    """Names of the weights that a folder of `model` holds, tied ones once."""
    return [name for name in model.state_dict() if name not in model.all_tied_weights_keys]


class FolderWriter:
    """Writes a model whose weights come from a checkpoint, or are new.

    Args:
        model: an `empty_model`.
        checkpoint: holds the source's tensors.
        targets: of each source key.
    """

    def __init__(self, model: PreTrainedModel, checkpoint: CheckpointFile, targets: Mapping[str, Target]) -> None:
        self.model = model
        self.checkpoint = checkpoint
        self.sources = {name: key for key, target in targets.items() for name in target_names(target)}
        self.targets = targets

    def write(self, folder: Path) -> None:
        """Write weights, configuration, generation configuration and the model's code into `folder`."""
        model, config = self.model, self.model.config
        config.architectures = [type(model).__name__]
        config.dtype = self.checkpoint.dtype
        config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        self._write_weights(folder)

    def _write_weights(self, folder: Path) -> None:
        torch.manual_seed(0)
        plan = split_torch_state_dict_into_shards(self._empty_weights(), max_shard_size=SHARD_BYTES)
        held: dict[str, dict[str, torch.Tensor]] = {name: {} for name in plan.filename_to_tensors}
        for name, tensor in self._weights():
            file_name = plan.tensor_to_filename[name]
            held[file_name][name] = tensor
            if len(held[file_name]) == len(plan.filename_to_tensors[file_name]):
                save_file(held.pop(file_name), folder / file_name, metadata={"format": "pt"})
                self.checkpoint = self.checkpoint.reopened()
        assert not held, "a weight was not written"
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")

    def _empty_weights(self) -> dict[str, torch.Tensor]:
        """The weights to be written, without storage, in the dtype that they will have."""
        state = self.model.state_dict()
        dtype = self.checkpoint.dtype
        return {
            name: state[name].to(dtype) if state[name].is_floating_point() else state[name]
            for name in saved_names(self.model)
        }

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        wanted = set(saved_names(self.model))
        for prefix, module, whole in units(self.model):
            names = [prefix + name for name in own_names(module, whole) if prefix + name in wanted]
            fresh = {} if all(name in self.sources for name in names) else self._initialised(module, whole)
            for name in names:
                yield name, self._mapped(name) if name in self.sources else fresh[name.removeprefix(prefix)]

    def _mapped(self, name: str) -> torch.Tensor:
        key = self.sources[name]
        # A copy: views of the mapped file would keep all of it open.
        return apply_target(self.targets[key], self.checkpoint.tensors[key])[name].clone().contiguous()

    def _initialised(self, module: nn.Module, whole: bool) -> dict[str, torch.Tensor]:
        """Fresh weights of one unit, in the checkpoint's dtype where they are floats."""
        module.to_empty(device="cpu", recurse=whole)
        for part in reversed(list(module.modules())) if whole else [module]:
            self.model._init_weights(part)
        fresh = {
            name: tensor.detach().to(self.checkpoint.dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in own_tensors(module, whole)
        }
        module.to_empty(device="meta", recurse=whole)
        return fresh


def units(model: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """Parts of a model whose weights are set together, with the prefix of their names.

    Layers and modules without children as a whole; of the others (False) what is theirs alone.
    """
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(layer) for layer in inside):
            continue
        whole = isinstance(module, GradientCheckpointingLayer) or not any(True for _ in module.children())
        if whole:
            inside.append(f"{name}.")
        yield f"{name}." if name else "", module, whole


def own_tensors(module: nn.Module, whole: bool) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers of a unit."""
    return [*module.named_parameters(recurse=whole), *module.named_buffers(recurse=whole)]


def own_names(module: nn.Module, whole: bool) -> list[str]:
    """Their names."""
    return [name for name, _ in own_tensors(module, whole)]
