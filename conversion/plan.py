"""Planning of the conversion of an original checkpoint to a transformers folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .checkpoint_file import CheckpointFile, read_checkpoint
from .detect import detect_format, match_tensors
from .key_table import Dropped, Target, target_names
from .report import ConversionReport
from .vocabulary import character_tokenizer
from .writer import FolderWriter, empty_model, saved_names

VOCAB_LETTER = "V"  # letter of the tables for the number of embeddings


@dataclass(frozen=True)
class Conversion:
    """Planned conversion.

    Attributes:
        checkpoint: the source.
        model: model of the destination, on the meta device.
        targets: target of each source key.
        report: result for each key.
        tokenizer: tokenizer of the source's vocabulary; None if the source has none.
    """

    checkpoint: CheckpointFile
    model: PreTrainedModel
    targets: dict[str, Target]
    report: ConversionReport
    tokenizer: PreTrainedTokenizerBase | None

    @property
    def config(self) -> PreTrainedConfig:
        """Configuration of the converted model."""
        return self.model.config

    def write(self, folder: Path) -> None:
        """Write weights, configuration, code, report and, if there is one, the tokenizer to `folder`."""
        FolderWriter(self.model, self.checkpoint, self.targets).write(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        self.report.save(folder)


def plan_conversion(source: Path, *, native: bool = False, settings: Mapping[str, Any] | None = None) -> Conversion:
    """Detect the format of an original checkpoint and plan its conversion, without writing anything.

    Args:
        source: checkpoint file of a DFN, Liquid or FlowNetwork original.
        native: whether to convert to the model that computes the function of the original.
        settings: arguments of the original constructor that the shapes do not determine. Missing ones are taken from
            the file, or are the defaults of the original.

    Raises:
        ValueError: the file cannot be read, has an unknown format or a contradictory shape, a setting does not apply,
            or the format has no native model; the message names the cause and the remedy.
    """
    checkpoint = read_checkpoint(source)
    source_format = detect_format(set(checkpoint.tensors))
    destination = source_format.native if native else source_format.model
    if destination is None:
        raise ValueError(
            f"there is no native model for {source_format.name}, because {source_format.not_native}: omit --native"
        )
    matched = match_tensors(source_format, checkpoint.tensors)
    targets: dict[str, Target] = {key: key for key in matched.targets} if native else matched.targets
    config = destination.config(matched.sizes, source_format.resolve_settings(settings or {}, checkpoint.settings))
    model = empty_model(destination.model, config)
    report = ConversionReport(source_format.name, destination.model.__name__, notes=list(destination.notes))
    tokenizer = None
    if checkpoint.vocabulary and VOCAB_LETTER in matched.sizes:
        tokenizer = character_tokenizer(checkpoint.vocabulary, matched.sizes[VOCAB_LETTER])
    elif checkpoint.vocabulary:
        report.notes.append("The file's vocabulary (stoi) is omitted, because the original reads no tokens.")
    report_weights(report, targets, checkpoint.prefix, saved_names(model))
    return Conversion(checkpoint, model, targets, report, tokenizer)


def report_weights(report: ConversionReport, targets: Mapping[str, Target], prefix: str, saved: list[str]) -> None:
    """Fill in the mapped, dropped and new weights of a report.

    Args:
        report: changed in place.
        targets: target of each source key.
        prefix: prefix of the keys in the file.
        saved: names of all weights of the destination.
    """
    for key, target in targets.items():
        if isinstance(target, Dropped):
            report.dropped[prefix + key] = target.reason
        else:
            report.mapped[prefix + key] = target_names(target)
    filled = {name for names in report.mapped.values() for name in names}
    assert filled <= set(saved), filled - set(saved)
    report.new = [name for name in saved if name not in filled]
