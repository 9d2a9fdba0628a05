"""transformers' own tests of models, from the source distribution of the installed release.

pip fetches the archive once; it is kept beside this file and never committed. The archive has the top-level files of
transformers' `tests` alone: the mixins of generation and export that they import are not in it, and stand empty here.
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
    """The folder to import the package of transformers' tests from, named `common_tests_<version>`."""
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
    """The archive of a release."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--no-binary", ":all:", "--dest", str(folder), f"transformers=={version}"]
    subprocess.run(command, check=True)
    return folder / f"transformers-{version}.tar.gz"


def unpack(archive: Path, version: str, package: Path) -> None:
    """Write the files named in `FILES`, unchanged, and the stand-ins into `package`."""
    for name, text in STAND_INS.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    with tarfile.open(archive) as source:
        for name in FILES:
            member = source.extractfile(f"transformers-{version}/tests/{name}")
            assert member is not None
            (package / name).write_bytes(member.read())
