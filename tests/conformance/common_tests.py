"""Fetches transformers' own model tests from the source distribution of the installed release.

pip downloads the archive once; the tests are kept beside this file and are not committed. The archive contains only
the top-level files of transformers' `tests`. The generation and export mixins that they import are replaced by empty
classes.
"""

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers
from filelock import FileLock

FILES = ("test_modeling_common.py", "test_training_mixin.py", "test_configuration_common.py")
STAND_INS = {
    "__init__.py": "",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/__init__.py": "",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
}
FETCHED = Path(__file__).parent / "fetched"


def fetch_common_tests() -> Path:
    """Fetch the tests if necessary and return the folder that contains the package `common_tests_<version>`."""
    version = transformers.__version__
    package = FETCHED / package_name()
    FETCHED.mkdir(exist_ok=True)
    with FileLock(FETCHED / "lock"):
        if not package.exists():
            with tempfile.TemporaryDirectory(dir=FETCHED) as scratch:
                unpacked = Path(scratch, package.name)
                unpack(download(version, Path(scratch)), version, unpacked)
                unpacked.rename(package)
    return FETCHED


def package_name() -> str:
    return "common_tests_" + transformers.__version__.replace(".", "_")


def download(version: str, folder: Path) -> Path:
    """Download the source distribution of a transformers release into `folder` and return its path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--no-binary", ":all:", "--dest", str(folder), f"transformers=={version}"]
    subprocess.run(command, check=True)
    return folder / f"transformers-{version}.tar.gz"


def unpack(archive: Path, version: str, package: Path) -> None:
    """Write the unchanged files named in `FILES` and the stand-ins into `package`."""
    for name, text in STAND_INS.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    with tarfile.open(archive) as source:
        for name in FILES:
            member = source.extractfile(f"transformers-{version}/tests/{name}")
            assert member is not None
            (package / name).write_bytes(member.read())
