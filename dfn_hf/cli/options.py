"""Arguments and options that several commands share, as annotations for typer."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..training.settings import MAX_COUNT, MAX_SEED

BUNDLED_TEXT = "the bundled corpus of Shakespeare and the King James Bible"
BUNDLED_PAIRS = "the verses of the World English Bible and the Reina-Valera"


DATA, MODEL, TRAINING, OUTPUT = "Data", "Model", "Training", "Output"


def panel(name: str, *declarations: str, help: str, **settings: Any) -> Any:
    """A typer option in the panel `name` of the help."""
    return typer.Option(*declarations, help=help, rich_help_panel=name, **settings)


# Models
ModelSource = Annotated[str, typer.Argument(help="Folder of a saved model, name of a bundled checkpoint, or Hub id.")]
CausalModel = Annotated[
    Literal["dfn", "flownetwork", "llama"] | None,
    panel(MODEL, "--model", help="Architecture. Default: dfn. llama is a baseline with as many parameters."),
]
Seq2SeqModel = Annotated[
    Literal["liquid", "t5"] | None,
    panel(MODEL, "--model", help="Architecture. Default: liquid. t5 is a baseline with as many parameters."),
]
Size = Annotated[
    Literal["tiny", "small", "medium", "large"] | None, panel(MODEL, help="Size of the model. Default: tiny.")
]
Seq2SeqSize = Annotated[Literal["tiny", "small", "medium"] | None, panel(MODEL, help="Size. Default: tiny.")]
ConfigOverride = Annotated[
    list[str] | None,
    panel(MODEL, "--config-override", help="Configuration field, FIELD=VALUE, such as position_dim=8. Repeatable."),
]
Tokenizer = Annotated[
    str | None, panel(MODEL, help="bpe (default), byte, bpe-en-es, a folder or a Hub id. --init-from brings its own.")
]
PairTokenizer = Annotated[
    str | None, panel(MODEL, help="bpe-en-es (default), bpe, byte, a folder or a Hub id. --init-from brings its own.")
]
EmbeddingTokenizer = Annotated[str, panel(MODEL, help="bpe-en-es, bpe, byte, a folder or a Hub id.")]
InitFrom = Annotated[
    str | None, panel(MODEL, help="Fine-tune this model: a folder, a bundled checkpoint or a Hub id.")
]
Lora = Annotated[bool, panel(MODEL, "--lora", help="With --init-from: train low-rank updates only.")]
LoraRank = Annotated[int, panel(MODEL, min=1, max=MAX_COUNT, help="Rank of the updates.")]

# Data
TextData = Annotated[
    str | None, panel(DATA, help="Text: a file or a folder of .txt, .md, .jsonl. Default: the bundled corpus.")
]
PairData = Annotated[
    str | None,
    panel(DATA, help="Pairs: a file or a folder of JSON Lines. Default: the bundled verses, en to es."),
]
ValidationText = Annotated[
    str | None, panel(DATA, help="Text to validate on. Default: 5 % of --data, or the corpus' validation split.")
]
ValidationPairs = Annotated[
    str | None, panel(DATA, help="Pairs to validate on. Default: 5 % of --data, or the verses' validation split.")
]
ValidationBlocks = Annotated[
    int, panel(DATA, min=1, max=MAX_COUNT, help="Maximum number of validation blocks, evenly spaced.")
]
TextField = Annotated[str, panel(DATA, help="Field of JSON Lines that holds the text.")]
SourceField = Annotated[str, panel(DATA, help="Field of JSON Lines that holds a pair's source, such as en.")]
TargetField = Annotated[str, panel(DATA, help="Field of JSON Lines that holds a pair's target, such as es.")]
Streaming = Annotated[bool, panel(DATA, "--streaming", help="Read --data during training instead of before.")]
BlockSize = Annotated[int, panel(DATA, min=2, max=MAX_COUNT, help="Tokens per block.")]

# Training
MaxSteps = Annotated[int, panel(TRAINING, min=1, max=MAX_COUNT, help="Optimizer steps.")]
BatchSize = Annotated[int, panel(TRAINING, min=1, max=MAX_COUNT, help="Examples per device and forward pass.")]
GradientAccumulationSteps = Annotated[
    int, panel(TRAINING, min=1, max=MAX_COUNT, help="Forward passes per optimizer step.")
]
WarmupRatio = Annotated[float, panel(TRAINING, min=0, help="Fraction of the steps with a rising learning rate.")]
WeightDecay = Annotated[float, panel(TRAINING, min=0, help="Weight decay of matrices.")]
SaveSteps = Annotated[
    int, panel(TRAINING, min=1, max=MAX_COUNT, help="Steps between evaluations; each saves a checkpoint.")
]
Seed = Annotated[
    int, panel(TRAINING, min=0, max=MAX_SEED, help="Random seed of the weights and of the order of the data.")
]

# Output
Output = Annotated[Path, typer.Argument(help="New or empty folder for the model.")]
Resume = Annotated[bool, panel(OUTPUT, "--resume", help="Continue from the last checkpoint in OUTPUT.")]
Overwrite = Annotated[bool, panel(OUTPUT, "--overwrite", help="Replace OUTPUT when training has finished.")]
PushToHub = Annotated[
    str | None,
    panel(OUTPUT, help="Upload the trained model to this Hub repository, owner/name. A new repository is private."),
]


def learning_rate_option(default: str) -> Any:
    """The option `--learning-rate`, whose default depends on what is trained."""
    return panel(TRAINING, min=0, help=f"Peak learning rate. Default: {default}.")


def parse_assignments(option: str, assignments: list[str] | None) -> dict[str, Any]:
    """Parse NAME=VALUE; a value is JSON, or else a string.

    Raises:
        ValueError: an assignment has no "=", nests JSON too deeply, or holds a number with thousands of digits.
    """
    import json

    values: dict[str, Any] = {}
    for assignment in assignments or ():
        name, equals, value = assignment.partition("=")
        if not equals:
            raise ValueError(f"{option} {assignment} is not of the form NAME=VALUE")
        try:
            values[name] = json.loads(value)
        except json.JSONDecodeError:
            values[name] = {"True": True, "False": False}.get(value, value)
        except (ValueError, RecursionError):
            raise ValueError(
                f"{option} {name} has a value that is nested too deeply or has too many digits: give a simpler one"
            ) from None
    return values
