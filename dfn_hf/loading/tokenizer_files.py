"""Loads tokenizers; an error names the damaged file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .errors import RUST_PANIC, explain_damage, explain_hub_errors
from .model_files import find_file, read_json_object

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
OTHER_FILES = ("merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja")
# Words of transformers' message for a tokenizer that it cannot build without tokenizer.json.
NO_TOKENIZER_JSON = "sentencepiece or tiktoken"


def load_checked_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or a Hub id, without running code that it names.

    Raises:
        ValueError: a file of the tokenizer is damaged, or there is no such Hub id.
        OSError: the folder holds no tokenizer.
    """
    with explain_hub_errors(path):
        files = [file for name in JSON_FILES if (file := find_file(path, name, optional=True)) is not None]
        for file in files:
            read_json_object(file)
        with explain_missing_file(path), explain_damage(lambda: suspects(path, files)):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            tokenizer("a b", truncation=False)  # settings of a wrong type raise at the first call
            return tokenizer


@contextmanager
def explain_missing_file(path: str) -> Iterator[None]:
    """Name tokenizer.json if a folder lacks it and its tokenizer needs it.

    Raises:
        ValueError: the folder holds no file with a vocabulary.
    """
    try:
        yield
    except ValueError as error:
        vocabularies = (*TOKENIZER_FILES, *OTHER_FILES)
        held = [name for name in vocabularies if Path(path, name).is_file()]
        if NO_TOKENIZER_JSON not in str(error) or not Path(path).is_dir() or held != ["tokenizer_config.json"]:
            raise
        raise ValueError(
            f"{path} holds no tokenizer.json, which its tokenizer needs: save the tokenizer again "
            "(tokenizer.save_pretrained), or copy or download the file"
        ) from error


def suspects(path: str, files: list[Path]) -> str:
    """Name the file that keeps the tokenizer from loading, or all files that may do so."""
    for file in files:
        if file.name == "tokenizer.json":
            try:
                Tokenizer.from_file(str(file))
            except BaseException as error:
                if isinstance(error, Exception) or type(error).__name__ == RUST_PANIC:
                    return str(file)
                raise
            files = [other for other in files if other != file]
    names = [file.name for file in files] + [name for name in OTHER_FILES if Path(path, name).is_file()]
    return f"the tokenizer in {path}" + (f" (one of {', '.join(names)})" if names else "")


def check_tokenizer_files(path: str, source: str) -> None:
    """Raise ValueError if `path` is a folder without a tokenizer; a Hub id is not checked."""
    if Path(path).is_dir() and not any((Path(path) / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(f"{source} holds no tokenizer: save one beside the model (tokenizer.save_pretrained)")
