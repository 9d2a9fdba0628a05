"""Selects the files of a saved model that are uploaded to the Hub, and checks them before anything is sent."""

import os
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_imports

from ..loading.model_files import REMEDY, read_json_object
from ..loading.models import check_saved_model
from ..loading.weight_files import read_headers, weight_files
from .upload_texts import clean_configs, clean_texts, read_text

CARD = "README.md"
CONFIG = "config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter/adapter_model.safetensors"
ANY_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
# JSON objects, some of which name code in `auto_map`.
CONFIGS = (
    CONFIG,
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "adapter/adapter_config.json",
)
TEXTS = (
    CARD,
    "adapter/README.md",
    "conversion_report.json",
    "training_log.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
OTHERS = (
    "tokenizer.json",
    "tokenizer.model",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    ADAPTER,
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
    "NOTICE.md",
    "NOTICE.txt",
)


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model folder.

    Attributes:
        uploaded: path in the repository → the file, or its content where that differs from the file.
        left: names in the folder that are not uploaded; folders end in a slash.
        cleaned: names of the uploaded files in which local paths were replaced by their last component.
    """

    uploaded: dict[str, Path | bytes]
    left: list[str]
    cleaned: list[str]


def read_model_folder(folder: Path) -> ModelFiles:
    """Select the files of the model in `folder`, and check that they can be loaded.

    Raises:
        ValueError: a file is missing or damaged, is a link or contains a local path.
    """
    if not (folder / CONFIG).exists():
        raise ValueError(f"{folder} holds no {CONFIG}: give the folder of a saved model")
    fixed = (*CONFIGS, *TEXTS, *OTHERS)
    names = list(names_in(folder))
    uploaded = [name for name in names if any(fnmatch(name, pattern) for pattern in fixed)]
    for name in uploaded:
        require_regular(folder, name)
    for name in names:
        if ANY_WEIGHTS.fullmatch(name):
            require_no_link(folder / name)
    weights = weight_names(folder)
    check_saved_model(str(folder))
    configs = [name for name in uploaded if name in CONFIGS]
    code = code_files(folder, configs)
    texts = [name for name in uploaded if any(fnmatch(name, pattern) for pattern in TEXTS)]
    read_headers([folder / name for name in uploaded if name == ADAPTER])
    uploaded += [*weights, *code]
    files: dict[str, Path | bytes] = {name: folder / name for name in uploaded}
    cleaned = clean_configs(folder, configs)
    cleaned |= clean_texts(folder, [*texts, *code], cleaned)
    return ModelFiles({**files, **cleaned}, [name for name in names if name not in files], sorted(cleaned))


def names_in(folder: Path) -> Iterator[str]:
    """Yield the names in `folder` in order, and those in its sub-folders that may hold files of a model."""
    inner = {pattern.partition("/")[0] for pattern in (*CONFIGS, *TEXTS, *OTHERS) if "/" in pattern}
    for path in sorted(folder.iterdir()):
        if path.name in inner:
            require_no_link(path)
        if path.name in inner and path.is_dir():
            yield from (f"{path.name}/{name}" for name in sorted(os.listdir(path)))
        else:
            yield f"{path.name}/" if path.is_dir() and not path.is_symlink() else path.name


def require_regular(folder: Path, name: str) -> None:
    """Raise ValueError unless `name` is a regular file of `folder` and not a link."""
    if not os.path.lexists(folder / name):
        raise ValueError(f"{folder} holds no {name}: load the model and save it again with save_pretrained")
    require_no_link(folder / name)
    if not (folder / name).is_file():
        raise ValueError(f"{folder / name} is not a regular file: replace it with one")


def require_no_link(path: Path) -> None:
    """Raise ValueError if `path` is a symbolic link."""
    if path.is_symlink():
        raise ValueError(
            f"{path} is a link, and links are not uploaded: copy the folder with the linked files "
            f"(cp -rL {shlex.quote(str(path.parent))} COPY) and push the copy"
        )


def weight_names(folder: Path) -> list[str]:
    """Return the names of the weight files that `from_pretrained` loads: one file, or an index and its shards.

    Raises:
        ValueError: there are no weights in safetensors files, a file is missing, damaged or a link, or the index names
            a weight that no shard holds.
    """
    files = weight_files(str(folder))
    if not files or any(file.suffix != ".safetensors" for file in files):
        raise ValueError(
            f"{folder} holds no {WEIGHTS}: save the model with save_pretrained (pickled weights are not uploaded)"
        )
    names = [file.name for file in files]
    for name in names:
        require_regular(folder, name)
    headers = read_headers(files)
    if not headers:
        raise ValueError(f"{files[0]} holds no weights: {REMEDY}")
    if names == [WEIGHTS]:
        return names
    require_regular(folder, INDEX)
    missing = read_json_object(folder / INDEX)["weight_map"].keys() - headers.keys()
    if missing:
        raise ValueError(f"{folder / INDEX} names the weight {min(missing)}, which no shard holds: {REMEDY}")
    return [*names, INDEX]


def code_files(folder: Path, configs: Iterable[str]) -> list[str]:
    """Return the names of the Python files that `auto_map` of the `configs` names, and of those that they import.

    Raises:
        ValueError: a file is missing or a link, or `auto_map` names something else than a file of the folder.
    """
    found: dict[str, None] = {}
    waiting = [module for name in configs for module in mapped_modules(folder, name)]
    while waiting:
        name = f"{waiting.pop()}.py"
        if name not in found:
            require_regular(folder, name)
            read_text(folder, name)
            found[name] = None
            waiting += [module for module in get_relative_imports(folder / name) if module.isidentifier()]
    return sorted(found)


def mapped_modules(folder: Path, name: str) -> Iterator[str]:
    """Yield the modules of the folder that `auto_map` in the file `name` names."""
    auto_map = read_json_object(folder / name).get("auto_map")
    for value in auto_map.values() if isinstance(auto_map, dict) else ():
        for path in value if isinstance(value, list) else [value]:
            if path is None or "--" in str(path):  # "owner/name--module.Class" lies in another repository
                continue
            module = str(path).rpartition(".")[0]
            if not module.isidentifier():
                raise ValueError(
                    f"{folder / name} has {path!r} in auto_map: give module.Class of a file in the folder"
                )
            yield module
