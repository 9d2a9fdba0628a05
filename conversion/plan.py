"""A native checkpoint on its way to a transformers folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .checkpoint_file import CheckpointFile, read_checkpoint
from .detect import detect_layout, match
from .key_table import Dropped, Target, target_names
from .report import ConversionReport
from .vocabulary import character_tokenizer
from .writer import FolderWriter, empty_model, saved_names

VOCABULARY = "V"  # letter of the tables: rows of the embedding


@dataclass(frozen=True)
class Conversion:
    """What is going to be written.

    Attributes:
        checkpoint: the source.
        model: of the destination, without storage.
        targets: of each source key.
        report: what becomes of each key.
        tokenizer: of the source's vocabulary, or None where it holds none.
    """

    checkpoint: CheckpointFile
    model: PreTrainedModel
    targets: dict[str, Target]
    report: ConversionReport
    tokenizer: PreTrainedTokenizerBase | None

    @property
    def config(self) -> PreTrainedConfig:
        """Configuration of what is written."""
        return self.model.config

    def write(self, folder: Path) -> None:
        """Write the transformers folder: weights, configuration, code, report, and a tokenizer where there is one."""
        FolderWriter(self.model, self.checkpoint, self.targets).write(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        self.report.save(folder)


def plan_conversion(source: Path, *, native: bool = False, settings: Mapping[str, Any] | None = None) -> Conversion:
    """Find out what a native checkpoint is and what of it goes where; nothing is written.

    Args:
        source: file of a DFN, Liquid or FlowNetwork original.
        native: for a model that computes the original's function, not this package's causal one.
        settings: arguments of the original's constructor that shapes don't give; those missing are as in the file, or
            the original's defaults.

    Raises:
        ValueError: a file that cannot be read, keys of no layout, a shape that contradicts the others, a setting that
            has no meaning, or no native model for this layout; the message names what and the remedy.
    """
    checkpoint = read_checkpoint(source)
    layout = detect_layout(set(checkpoint.tensors))
    destination = layout.native if native else layout.model
    if destination is None:
        raise ValueError(f"there is no native model for {layout.name}: {layout.not_native}; leave out --native")
    found = match(layout, checkpoint.tensors)
    targets: dict[str, Target] = {key: key for key in found.targets} if native else found.targets
    config = destination.config(found.sizes, layout.settle(settings or {}, checkpoint.settings))
    model = empty_model(destination.model, config)
    report = ConversionReport(layout.name, destination.model.__name__, notes=list(destination.notes))
    tokenizer = None
    if checkpoint.vocabulary and VOCABULARY in found.sizes:
        tokenizer = character_tokenizer(checkpoint.vocabulary, found.sizes[VOCABULARY])
    elif checkpoint.vocabulary:
        report.notes.append("The file's vocabulary (stoi) is left out: the original reads no tokens.")
    for key, target in targets.items():
        if isinstance(target, Dropped):
            report.dropped[checkpoint.prefix + key] = target.why
        else:
            report.mapped[checkpoint.prefix + key] = target_names(target)
    filled = {name for names in report.mapped.values() for name in names}
    saved = saved_names(model)
    report.new = [name for name in saved if name not in filled]
    assert filled <= set(saved), filled - set(saved)
    return Conversion(checkpoint, model, targets, report, tokenizer)
