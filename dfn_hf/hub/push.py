"""Uploads saved models to the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import HfApi, get_token

from .model_card import hub_card


def require_token() -> None:
    """Raise ValueError unless there is a Hub token; called before long runs."""
    if get_token() is None:
        raise ValueError("there is no Hub token: run `hf auth login` or set HF_TOKEN")


def push_folder(folder: Path, repo_id: str, *, private: bool = False) -> str:
    """Upload a saved model folder; the repository is created if it does not exist.

    An existing README.md in the repository is kept. Otherwise the card from `hub_card` is uploaded.

    Args:
        folder: a transformers folder.
        repo_id: `owner/name`, or `name` in the user's own namespace.
        private: make a new repository private.

    Returns:
        URL of the repository.

    Raises:
        ValueError: `folder` holds no model, or there is no Hub token.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json: give the folder of a saved model")
    require_token()
    api = HfApi()
    repository = api.create_repo(repo_id, private=private, exist_ok=True)
    api.upload_folder(repo_id=repository.repo_id, folder_path=folder, ignore_patterns=["checkpoints/*", "README.md"])
    if not api.file_exists(repository.repo_id, "README.md"):
        card = hub_card(folder, repository.repo_id).encode()
        api.upload_file(repo_id=repository.repo_id, path_in_repo="README.md", path_or_fileobj=card)
    return str(repository)
