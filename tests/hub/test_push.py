"""Tests the upload of model folders to the Hub."""

from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from dfn_hf import DFNConfig
from dfn_hf.cli.app import app
from dfn_hf.hub import push as hub


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "my-model"
    DFNConfig().save_pretrained(folder)
    return folder


class RecordingApi:
    """Replaces the Hub client and records uploads."""

    def __init__(self, has_readme):
        self.has_readme = has_readme
        self.uploads, self.cards = [], []

    def create_repo(self, repo_id, private, exist_ok):
        assert exist_ok
        return type("Address", (str,), {"repo_id": f"me/{repo_id}"})(f"https://hub/me/{repo_id}")

    def file_exists(self, repo_id, filename):
        return self.has_readme

    def upload_folder(self, **upload):
        self.uploads.append(SimpleNamespace(**upload))

    def upload_file(self, repo_id, path_in_repo, path_or_fileobj):
        assert path_in_repo == "README.md"
        self.cards.append(path_or_fileobj.decode())


@pytest.mark.parametrize("has_readme", [False, True])
def test_push_uploads_the_folder_and_keeps_an_existing_readme(folder, monkeypatch, has_readme):
    api = RecordingApi(has_readme)
    monkeypatch.setattr(hub, "HfApi", lambda: api)
    monkeypatch.setattr(hub, "get_token", lambda: "token")
    assert hub.push_folder(folder, "model") == "https://hub/me/model"
    (upload,) = api.uploads
    assert (upload.repo_id, upload.folder_path) == ("me/model", folder)
    assert upload.ignore_patterns == ["checkpoints/*", "README.md"]
    assert len(api.cards) == (not has_readme)


def test_card_names_the_repository(folder, monkeypatch):
    api = RecordingApi(has_readme=False)
    monkeypatch.setattr(hub, "HfApi", lambda: api)
    monkeypatch.setattr(hub, "get_token", lambda: "token")
    hub.push_folder(folder, "model")
    (folder / "README.md").write_text('# Mine\n\npipeline("text-generation", model="my-model")\n')
    hub.push_folder(folder, "model")
    made, own = api.cards
    assert 'model="me/model")' in made and "trust_remote_code=True" in made and "pipeline_tag: text-generation" in made
    assert own == '# Mine\n\npipeline("text-generation", model="me/model")\n'
    assert 'model="my-model"' in (folder / "README.md").read_text()


def test_missing_token_is_an_error_before_training_starts(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match="no Hub token: run `hf auth login`"):
        hub.push_folder(folder, "model")
    result = CliRunner().invoke(app, ["train", "lm", str(tmp_path / "out"), "--push-to-hub", "me/model"])
    assert result.exit_code == 1
    assert result.stderr == "Error: there is no Hub token: run `hf auth login` or set HF_TOKEN\n"
    assert not (tmp_path / "out").exists()


def test_folder_without_a_model_is_rejected_before_upload(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "HfApi", lambda: pytest.fail("the Hub client was created"))
    with pytest.raises(ValueError, match="holds no config.json"):
        hub.push_folder(tmp_path, "model")
