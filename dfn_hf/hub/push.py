"""Uploads saved models to the Hugging Face Hub, in one commit."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from .model_card import hub_card
from .upload_files import ANY_WEIGHTS, CARD, ModelFiles, read_model_folder

INITIAL_FILES = {".gitattributes"}  # the Hub adds it to every new repository
CommitOperation = CommitOperationAdd | CommitOperationDelete
NUM_NAMES = 20  # names that are listed before the rest is counted


@dataclass(frozen=True)
class PushedModel:
    """A repository that a model was uploaded to.

    Attributes:
        url: its address.
        private: whether only its owners can read it.
    """

    url: str
    private: bool

    def __str__(self) -> str:
        return f"{self.url} ({visibility(self.private)})"


@dataclass(frozen=True)
class Repository:
    """A repository before the upload.

    Attributes:
        repo_id: `owner/name`.
        private: whether only its owners can read it.
        files: the paths in its main branch.
        commit: the last commit of its main branch.
        created: whether this upload created it.
    """

    repo_id: str
    private: bool
    files: set[str]
    commit: str | None
    created: bool


def check_destination(repo_id: str) -> None:
    """Raise ValueError unless `repo_id` is a valid name and there is a Hub token; called before long runs."""
    validate_repo_id(repo_id)
    if get_token() is None:
        raise ValueError("there is no Hub token: run `hf auth login` or set HF_TOKEN")


def push_folder(
    folder: str | Path, repo_id: str, *, private: bool = True, say: Callable[[str], None] = lambda line: None
) -> PushedModel:
    """Upload a saved model folder in one commit; the repository is created if it does not exist.

    Only the files of the model are uploaded (`upload_files`). An existing README.md in the repository is kept;
    otherwise the card from `hub_card` is uploaded. Weights of an earlier model are deleted in the same commit. If the
    upload to a new repository fails, the repository is deleted if it is still empty.

    Args:
        folder: a transformers folder.
        repo_id: `owner/name`, or `name` in the user's own namespace.
        private: make a new repository private. An existing one keeps its visibility.
        say: receives a line on each step: the files, and the visibility before the upload starts.

    Raises:
        ValueError: `folder` holds no model, a file of it is damaged, is a link or contains a local path, `repo_id` is
            not a valid name, or there is no Hub token.
        OSError: the Hub cannot be reached or refuses the upload.
    """
    folder = Path(folder)
    files = read_model_folder(folder)
    check_destination(repo_id)
    api = HfApi()
    with explain_failure(f"{repo_id} cannot be opened at {api.endpoint}"):
        repo_id = repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"
    card = hub_card(folder, repo_id)
    with explain_failure(f"{repo_id} cannot be opened at {api.endpoint}"):
        repository = open_repository(api, repo_id, private)
    url = f"{api.endpoint}/{repository.repo_id}"
    with removed_on_failure(api, repository), explain_failure(f"the upload to {url} failed"):
        operations = changes(files, repository, card)
        for line in [*described(files, operations), describe_visibility(repository, url, private)]:
            say(line)
        if repository.created and private and not repository.private:
            raise OSError("the Hub made the new repository public: create a private one in its web interface")
        api.create_commit(
            repository.repo_id,
            operations,
            commit_message="Upload model",
            parent_commit=repository.commit,
        )
    return PushedModel(url, repository.private)


def described(files: ModelFiles, operations: Sequence[CommitOperation]) -> list[str]:
    """Return the lines that name the uploaded, cleaned, kept and deleted files, and those that are not uploaded."""
    uploaded = [operation.path_in_repo for operation in operations if isinstance(operation, CommitOperationAdd)]
    deleted = [operation.path_in_repo for operation in operations if isinstance(operation, CommitOperationDelete)]
    parts = {
        "uploads": uploaded,
        "uploads without the local paths in them:": files.cleaned,
        "keeps the repository's": [] if CARD in uploaded else [CARD],
        "deletes weights of the earlier model:": deleted,
        "does not upload": files.left,
    }
    return [f"{action} {listed(names)}" for action, names in parts.items() if names]


def listed(names: Sequence[str]) -> str:
    """Return the names on one line; of many names, the first ones and the number of the others."""
    shown = ", ".join(name if name.isprintable() else ascii(name) for name in names[:NUM_NAMES])
    return shown if len(names) <= NUM_NAMES else f"{shown} and {len(names) - NUM_NAMES:,} more"


def visibility(private: bool) -> str:
    """Return the Hub's word for who can read a repository."""
    return "private" if private else "public"


def describe_visibility(repository: Repository, url: str, private: bool) -> str:
    """Return the line that says where the model is uploaded to and who can read it."""
    line = f"to the {'new' if repository.created else 'existing'} {visibility(repository.private)} repository {url}"
    if repository.private == private:
        return line
    if repository.private:
        return f"{line}, which stays private"
    return f"{line}, which everyone can read"


def open_repository(api: HfApi, repo_id: str, private: bool) -> Repository:
    """Read the repository, after creating it if it does not exist.

    Raises:
        OSError: the new repository cannot be read.
    """
    created = False
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=private)
        created = True
        try:
            info = api.model_info(repo_id)
        except (HTTPError, OSError) as error:
            raise OSError(f"{error}; the new repository {repo_id} is empty: push again") from error
    files = {sibling.rfilename for sibling in info.siblings or ()}
    return Repository(info.id, bool(info.private), files, info.sha, created)


def changes(files: ModelFiles, repository: Repository, card: str) -> list[CommitOperation]:
    """Return the operations of the commit.

    They add the files and, unless the repository has a card, `card`, and delete the weights of an earlier model.
    """
    contents = {**files.uploaded, CARD: card.encode()}
    if CARD in repository.files:
        del contents[CARD]
    stale = sorted(path for path in repository.files if ANY_WEIGHTS.fullmatch(path) and path not in contents)
    added = [CommitOperationAdd(path, content) for path, content in sorted(contents.items())]
    return [*added, *map(CommitOperationDelete, stale)]


@contextmanager
def removed_on_failure(api: HfApi, repository: Repository) -> Iterator[None]:
    """Delete the repository if the block fails, this upload created it, and it is still empty."""
    try:
        yield
    except BaseException as error:
        if not repository.created:
            raise
        outcome = delete_if_empty(api, repository)
        if isinstance(error, OSError):
            raise OSError(f"{error}; {outcome}") from error
        raise


def delete_if_empty(api: HfApi, repository: Repository) -> str:
    """Delete a repository without files, and return a sentence on the outcome."""
    name = f"the new repository {repository.repo_id}"
    try:
        info = api.model_info(repository.repo_id)
        if info.sha != repository.commit or {sibling.rfilename for sibling in info.siblings or ()} - INITIAL_FILES:
            return f"{name} holds files and was kept: check it before you push again"
        api.delete_repo(repository.repo_id)
    except (HTTPError, OSError):
        return f"{name} is empty and could not be deleted: push again, or delete it in its settings"
    return f"{name} was empty and was deleted: push again"


@contextmanager
def explain_failure(action: str) -> Iterator[None]:
    """Raise network and Hub errors as an OSError whose message holds neither the token nor a signed URL."""
    try:
        yield
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        cause = f" ({error.__cause__})" if isinstance(error, RuntimeError) and error.__cause__ else ""
        message = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]+", r"\1", f"{error}{cause}" or type(error).__name__)
        if isinstance(error, HfHubHTTPError) and error.response.status_code == HTTPStatus.UNAUTHORIZED:
            message = f"the Hub does not accept the token: run `hf auth login` or set HF_TOKEN ({message})"
        token = get_token()
        raise OSError(f"{action}: {message.replace(token, '***') if token else message}") from error
