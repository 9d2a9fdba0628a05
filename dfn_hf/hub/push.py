"""Saved folders on the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import HfApi, get_token

from .model_card import hub_card


def require_token() -> None:
    """Raise ValueError unless a Hub token is at hand, so that a long run does not end without one."""
    if get_token() is None:
        raise ValueError("there is no Hub token: run `hf auth login` or set HF_TOKEN")


def push_folder(folder: Path, repo_id: str, *, private: bool = False) -> str:
    """Upload a saved model folder, making the repository where there is none.

    Args:
        folder: a transformers folder.
        repo_id: `owner/name`, or `name` for one's own.
        private: of a repository made here.

    Returns:
        The address of the repository. A README.md that the repository has already stays as it is; else the folder's
        card goes up, with the repository's name in its example, or one that says how to load the model.

    Raises:
        ValueError: `folder` holds no model, or there is no token.
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
