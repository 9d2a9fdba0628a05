"""Saved folders on the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import HfApi, get_token


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
        The address of the repository. A README.md that the repository has already stays as it is.

    Raises:
        ValueError: `folder` holds no model, or there is no token.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json: give the folder of a saved model")
    require_token()
    api = HfApi()
    repository = api.create_repo(repo_id, private=private, exist_ok=True)
    kept = ["README.md"] if api.file_exists(repository.repo_id, "README.md") else []
    api.upload_folder(repo_id=repository.repo_id, folder_path=folder, ignore_patterns=["checkpoints/*", *kept])
    return str(repository)
