"""Writing of model folders tensor by tensor: peak memory is that of one shard, for models of any size."""

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
    """Create a model on the meta device, without storage."""
    with torch.device("meta"):
        return model_class(config)


def saved_names(model: PreTrainedModel) -> list[str]:
    """Return the names of the weights in a saved folder of `model`; tied weights occur once."""
    return [name for name in model.state_dict() if name not in model.all_tied_weights_keys]


class FolderWriter:
    """Writes a model whose weights come from a checkpoint or are newly initialised.

    Args:
        model: result of `empty_model`.
        checkpoint: source of the tensors.
        targets: target of each source key.
    """

    def __init__(self, model: PreTrainedModel, checkpoint: CheckpointFile, targets: Mapping[str, Target]) -> None:
        self.model = model
        self.checkpoint = checkpoint
        self.sources = {name: key for key, target in targets.items() for name in target_names(target)}
        self.targets = targets

    def write(self, folder: Path) -> None:
        """Write weights, configuration, generation configuration and model code to `folder`."""
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
        shards: dict[str, dict[str, torch.Tensor]] = {name: {} for name in plan.filename_to_tensors}
        for name, tensor in self._weights():
            file_name = plan.tensor_to_filename[name]
            shards[file_name][name] = tensor
            if len(shards[file_name]) == len(plan.filename_to_tensors[file_name]):
                save_file(shards.pop(file_name), folder / file_name, metadata={"format": "pt"})
                self.checkpoint = self.checkpoint.reopen()
        assert not shards, "a weight was not written"
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")

    def _empty_weights(self) -> dict[str, torch.Tensor]:
        """Return the weights on the meta device, in the dtype of the file."""
        state = self.model.state_dict()
        dtype = self.checkpoint.dtype
        return {
            name: state[name].to(dtype) if state[name].is_floating_point() else state[name]
            for name in saved_names(self.model)
        }

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield all weights by name, unit by unit."""
        wanted = set(saved_names(self.model))
        for prefix, module, whole in init_units(self.model):
            names = [prefix + name for name in unit_names(module, whole) if prefix + name in wanted]
            fresh = {} if all(name in self.sources for name in names) else self._initialised(module, whole)
            for name in names:
                yield name, self._mapped(name) if name in self.sources else fresh[name.removeprefix(prefix)]

    def _mapped(self, name: str) -> torch.Tensor:
        """Return the weight `name` from the checkpoint."""
        key = self.sources[name]
        # A copy: views of the mapped file would keep the whole file open.
        return apply_target(self.targets[key], self.checkpoint.tensors[key])[name].clone().contiguous()

    def _initialised(self, module: nn.Module, whole: bool) -> dict[str, torch.Tensor]:
        """Initialise one unit, and return its weights with floats in the dtype of the checkpoint."""
        module.to_empty(device="cpu", recurse=whole)
        for part in reversed(list(module.modules())) if whole else [module]:
            self.model._init_weights(part)
        fresh = {
            name: tensor.detach().to(self.checkpoint.dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in unit_tensors(module, whole)
        }
        module.to_empty(device="meta", recurse=whole)
        return fresh


def init_units(model: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """Yield the parts of a model that are initialised together, with the prefix of their names.

    The third element is True for layers and for modules without children, which are initialised recursively, and False
    for other modules, of which only their own weights are initialised.
    """
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(layer) for layer in inside):
            continue
        whole = isinstance(module, GradientCheckpointingLayer) or not any(True for _ in module.children())
        if whole:
            inside.append(f"{name}.")
        yield f"{name}." if name else "", module, whole


def unit_tensors(module: nn.Module, whole: bool) -> list[tuple[str, torch.Tensor]]:
    """Return the parameters and buffers of a unit."""
    return [*module.named_parameters(recurse=whole), *module.named_buffers(recurse=whole)]


def unit_names(module: nn.Module, whole: bool) -> list[str]:
    """Return the names of the parameters and buffers of a unit."""
    return [name for name, _ in unit_tensors(module, whole)]
