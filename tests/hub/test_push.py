"""Tests the upload of model folders to a local Hub: visibility, one commit, failures and kills at every request."""

import json
import os
import re
import signal
from functools import partial

import pytest
from huggingface_hub import HfApi, constants
from typer.testing import CliRunner

from dfn_hf.cli.app import app
from dfn_hf.hub import push
from dfn_hf.hub.push import push_folder
from tests.support.hub_server import TOKEN, HubError, Repository, serve_hub
from tests.support.marks import first_quickly
from tests.support.small_models import make_small_model

NAME = "tester/model"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "my-model"
    make_small_model("flownetwork").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    folder = tmp_path / "my-model"
    folder.mkdir()
    for path in saved.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(push, "get_token", lambda: TOKEN)
    with serve_hub() as server:
        monkeypatch.setattr(push, "HfApi", partial(HfApi, endpoint=server.address, token=TOKEN))
        yield server


def run(*arguments):
    return CliRunner().invoke(app, ["push", *map(str, arguments)])


def add_repository(hub, *, private: bool, **files: bytes) -> Repository:
    repository = hub.repositories[NAME] = Repository(NAME, private)
    repository.branches["main"] = repository.commit(
        {name.replace("__", "."): files[name] for name in files}, "earlier"
    )
    return repository


def test_command_says_what_it_uploads_and_to_whom(hub, folder):
    for name in (".env", "notes.ipynb", "evil.py"):
        (folder / name).write_text("SECRET=1")
    (folder / "checkpoints").mkdir()
    result = run(folder, "model")
    print(result.output)
    assert result.exit_code == 0, result.output
    address = f"{hub.address}/{NAME}"
    uploads, leaves, visibility, last = result.stdout.splitlines()
    files = set(hub.files(NAME))
    assert uploads == f"uploads {', '.join(sorted(files))}"
    assert leaves == "does not upload .env, checkpoints/, evil.py, notes.ipynb"
    assert visibility == f"to the new private repository {address}"
    assert last == f"pushed to {address} (private)"
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_flownetwork.py",
        "README.md",
    } < files
    assert hub.repositories[NAME].private


@pytest.mark.parametrize("public", [False, True])
def test_new_repositories_are_private_unless_public_is_given(hub, folder, public):
    result = run(folder, NAME, *["--public"] * public)
    word = "public" if public else "private"
    assert result.exit_code == 0 and f"new {word} repository" in result.stdout
    assert result.stdout.endswith(f"({word})\n") and hub.repositories[NAME].private is not public
    assert push_folder(folder, "tester/other").private and hub.repositories["tester/other"].private


@pytest.mark.parametrize(
    ("private", "options", "said"),
    [
        (True, [], "existing private repository"),
        (True, ["--public"], "which stays private"),
        (False, [], "which everyone can read"),
        (False, ["--public"], "existing public repository"),
    ],
)
def test_the_visibility_of_an_existing_repository_is_said_before_anything_is_sent(hub, folder, private, options, said):
    add_repository(hub, private=private)
    sent, lines = [], []
    hub.call_before(lambda handler: sent.append(handler.command))
    push_folder(folder, NAME, private=not options, say=lambda line: lines.append((line, list(sent))))
    (before,) = [requests for line, requests in lines if said in line]
    assert before == ["GET"], "the command only reads before it says the visibility"
    result = run(folder, NAME, *options)
    assert said in result.stdout and result.stdout.endswith(f"({'private' if private else 'public'})\n")
    assert hub.repositories[NAME].private is private


def test_nothing_is_sent_if_the_hub_makes_a_private_repository_public(hub, folder):
    def publish(handler):
        for repository in hub.repositories.values():
            repository.private = False

    hub.call_before(publish)
    result = run(folder, NAME)
    assert result.exit_code == 1 and "the Hub made the new repository public" in result.stderr
    assert "was empty and was deleted" in result.stderr and not hub.repositories


def test_one_commit_holds_everything_and_removes_the_earlier_weights(hub, folder):
    earlier = {
        "model-00001-of-00002__safetensors": b"1",
        "model__safetensors__index__json": b"{}",
        "notes__md": b"mine",
    }
    repository = add_repository(hub, private=True, **earlier)
    result = run(folder, NAME)
    assert "deletes weights of the earlier model: model-00001-of-00002.safetensors, model.safetensors.index.json" in (
        result.stdout
    )
    files = hub.files(NAME)
    assert [title for _, title in repository.titles] == ["Upload model", "earlier", "initial commit"]
    assert not any("-of-" in name or name.endswith("index.json") for name in files)
    assert files["notes.md"] == b"mine" and "README.md" in files
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_an_existing_card_is_kept(hub, folder):
    add_repository(hub, private=True, README__md=b"# Theirs\n")
    (folder / "README.md").write_text("# Mine\n")
    result = run(folder, NAME)
    assert "keeps the repository's README.md\n" in result.stdout and "uploads README.md" not in result.stdout
    assert hub.files(NAME)["README.md"] == b"# Theirs\n" and "model.safetensors" in hub.files(NAME)


def test_card_names_the_repository(hub, folder):
    push_folder(folder, NAME)
    made = hub.files(NAME)["README.md"].decode()
    assert f'model="{NAME}")' in made and "trust_remote_code=True" in made and "pipeline_tag: text-generation" in made
    (folder / "README.md").write_text('# Mine\n\npipeline("text-generation", model="my-model")\n')
    push_folder(folder, "other")
    assert hub.files("tester/other")["README.md"].decode() == (
        '# Mine\n\npipeline("text-generation", model="tester/other")\n'
    )
    assert 'model="my-model"' in (folder / "README.md").read_text()


def test_local_paths_stay_here(hub, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": "/home/alice/secret/start"}))
    result = run(folder, NAME)
    assert "uploads without the local paths in them: config.json\n" in result.stdout
    assert json.loads(hub.files(NAME)["config.json"]) == config | {"_name_or_path": "start"}


@pytest.mark.parametrize("fault", ["link", "weights", "card", "name"])
def test_a_mistake_in_the_folder_sends_nothing(hub, folder, fault):
    requests, name = [], NAME
    hub.call_before(lambda handler: requests.append(handler.path))
    if fault == "link":
        (folder / "config.json").rename(folder.parent / "config.json")
        (folder / "config.json").symlink_to(folder.parent / "config.json")
    elif fault == "weights":
        (folder / "model.safetensors").write_bytes(b"damaged")
    elif fault == "card":
        (folder / "README.md").write_bytes(b"\xe9")
    else:
        name = "me/my model"
    result = run(folder, name)
    print(result.stderr)
    assert result.exit_code == 1 and result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    assert requests == [] and not hub.repositories


def test_missing_token_is_an_error_before_training_starts(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(push, "get_token", lambda: None)
    with pytest.raises(ValueError, match="no Hub token: run `hf auth login`"):
        push_folder(folder, "model")
    for arguments in (["train", "lm", str(tmp_path / "out"), "--push-to-hub", NAME], ["push", str(folder), NAME]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 1
        assert result.stderr == "Error: there is no Hub token: run `hf auth login` or set HF_TOKEN\n"
    assert not (tmp_path / "out").exists()


def test_an_invalid_name_is_an_error_before_training_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(push, "get_token", lambda: TOKEN)
    result = CliRunner().invoke(app, ["train", "lm", str(tmp_path / "out"), "--push-to-hub", "me/my model"])
    assert result.exit_code == 1 and "'me/my model'" in result.stderr and not (tmp_path / "out").exists()


def test_folder_without_a_model_is_rejected_before_upload(tmp_path, monkeypatch):
    monkeypatch.setattr(push, "HfApi", lambda: pytest.fail("the Hub client was created"))
    with pytest.raises(ValueError, match="holds no config.json"):
        push_folder(tmp_path, "model")


def test_a_hub_that_cannot_be_reached_is_one_sentence(hub, folder, monkeypatch):
    monkeypatch.setattr(push, "HfApi", partial(HfApi, endpoint="http://127.0.0.1:9", token=TOKEN))
    result = run(folder, NAME)
    print(result.stderr)
    assert result.stderr.startswith(f"Error: {NAME} cannot be opened at http://127.0.0.1:9: ")
    assert result.exit_code == 1 and result.output == result.stderr


def test_a_wrong_token_is_one_sentence_with_a_remedy(hub, folder, monkeypatch):
    monkeypatch.setattr(push, "HfApi", partial(HfApi, endpoint=hub.address, token="hf_wrong"))
    result = run(folder, NAME)
    print(result.stderr)
    assert "the Hub does not accept the token: run `hf auth login` or set HF_TOKEN" in result.stderr
    assert "hf_wrong" not in result.output and not hub.repositories


def requests_of_a_push(hub, folder) -> int:
    """The number of requests of a push to a new repository, which is then deleted."""
    paths = []
    hub.call_before(lambda handler: paths.append(handler.path))
    push_folder(folder, NAME)
    hub.repositories.clear()
    hub.handler.blobs.clear()
    return len(paths)


def is_whole(files, folder) -> bool:
    """Whether the repository holds the new model completely."""
    same = all(files.get(path.name) == path.read_bytes() for path in folder.iterdir())
    return same and "README.md" in files


@pytest.mark.parametrize("exists", first_quickly([False, True]))
def test_a_failure_at_any_request_leaves_the_old_revision_and_no_empty_repository(hub, folder, exists):
    total = requests_of_a_push(hub, folder)
    assert total >= 6
    for failing in range(total):
        hub.repositories.clear()
        hub.handler.blobs.clear()
        if exists:
            add_repository(hub, private=False, model__safetensors=b"old")
        count = iter(range(10**6))

        def refuse(handler, failing=failing, count=count):
            if next(count) == failing:
                raise HubError(403, f"refused {TOKEN}")

        hub.call_before(refuse)
        result = run(folder, NAME)
        print(failing, result.stderr or result.stdout)
        assert TOKEN not in result.output
        if result.exit_code:
            assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
            assert hub.repositories.keys() == ({NAME} if exists else set()) or "is empty: push again" in result.stderr
            assert not exists or hub.files(NAME) == {"model.safetensors": b"old"}
        else:
            assert is_whole(hub.files(NAME), folder)


def test_a_repository_that_was_filled_meanwhile_is_kept(hub, folder):
    def fill(handler):
        if "/commit/" in handler.path:
            repository = hub.repositories[NAME]
            repository.branches["main"] = repository.commit({"theirs.txt": b"1"}, "theirs")
            raise HubError(403)

    hub.call_before(fill)
    result = run(folder, NAME)
    assert "the new repository tester/model holds files and was kept" in result.stderr
    assert hub.files(NAME) == {"theirs.txt": b"1"}


def test_an_empty_repository_that_cannot_be_deleted_is_named(hub, folder):
    def refuse(handler):
        if "/commit/" in handler.path or handler.command == "DELETE":
            raise HubError(403)

    hub.call_before(refuse)
    result = run(folder, NAME)
    assert "tester/model is empty and could not be deleted: push again, or delete it" in result.stderr
    hub.call_before(lambda handler: None)
    assert run(folder, NAME).exit_code == 0 and is_whole(hub.files(NAME), folder)


def test_an_interrupt_deletes_the_empty_repository(hub, folder, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(HfApi, "create_commit", interrupt)
    with pytest.raises(KeyboardInterrupt):
        push_folder(folder, NAME)
    assert not hub.repositories


@pytest.mark.parametrize("exists", first_quickly([True, False]))
def test_after_a_kill_at_any_request_the_repository_is_old_or_new_and_a_push_completes_it(hub, folder, exists):
    total = requests_of_a_push(hub, folder)
    outcomes = []
    for killed in range(total):
        hub.repositories.clear()
        hub.handler.blobs.clear()
        old = {"model.safetensors": b"old"} if exists else {}
        if exists:
            add_repository(hub, private=True, model__safetensors=b"old")
        child: list[int] = []
        count = iter(range(10**6))

        def kill(handler, killed=killed, count=count, child=child):
            if next(count) == killed:
                os.kill(child[0], signal.SIGKILL)

        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.read(read, 1)
                push_folder(folder, NAME)
                os._exit(0)
            finally:
                os._exit(1)
        child.append(pid)
        hub.call_before(kill)
        os.write(write, b"1")
        _, status = os.waitpid(pid, 0)
        os.close(read)
        os.close(write)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        hub.call_before(lambda handler: None)
        if NAME in hub.repositories:
            files = hub.files(NAME)
            outcomes.append("new" if is_whole(files, folder) else "old")
            assert outcomes[-1] == "new" or files == old
        assert run(folder, NAME).exit_code == 0
        assert is_whole(hub.files(NAME), folder)
        assert hub.repositories[NAME].private
    print(f"{total} kills: {outcomes}")
    assert "old" in outcomes


def test_messages_hold_neither_the_token_nor_signed_addresses():
    with pytest.raises(OSError, match="the upload failed: ") as failure, push.explain_failure("the upload failed"):
        raise OSError("403 for url 'https://store.example/abc?X-Signature=1234&X-Key=5' at https://hub/me/model")
    assert str(failure.value) == "the upload failed: 403 for url 'https://store.example/abc' at https://hub/me/model"


def test_long_lists_are_counted(hub, folder):
    for number in range(100):
        (folder / f"foreign-{number:03}").touch()
    (folder / "new\nline").touch()
    leaves = next(line for line in run(folder, NAME).stdout.splitlines() if line.startswith("does not upload"))
    assert leaves.endswith("foreign-019 and 81 more") and not re.search(r"foreign-020", leaves)
