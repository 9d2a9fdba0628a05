"""The package as users get it: wheel, source distribution, editable install and plain checkout."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import dfn_hf

ROOT = Path(__file__).parents[1]
NOT_SOURCE = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "demo", "notebooks", "tests")

# Every module of the mapped folders comes from the place that the test expects, and no second copy of it is imported.
PROBE = """
import sys
{setup}
import dfn_hf.conversion, dfn_hf.assets.corpus, dfn_hf.modeling.ops.neighbor_search
from dfn_hf.data import load_corpus, load_tokenizer
assert len(load_corpus("validation")) and len(load_tokenizer("bpe")) == 4096
assert "modeling" not in sys.modules and "conversion" not in sys.modules
print(dfn_hf.__file__, dfn_hf.modeling.ops.neighbor_search.__file__, dfn_hf.conversion.__file__, sep="\\n")
"""


def run(*command: str | Path, cwd: Path, python_path: Path | None = None) -> str:
    environment = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if python_path is not None:
        environment["PYTHONPATH"] = str(python_path)
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def probe(cwd: Path, python_path: Path | None = None, setup: str = "") -> list[Path]:
    """The files of dfn_hf, dfn_hf.modeling.ops.neighbor_search and dfn_hf.conversion, as a new process finds them."""
    output = run(sys.executable, "-c", PROBE.format(setup=setup), cwd=cwd, python_path=python_path)
    return [Path(line) for line in output.splitlines()[-3:]]


def in_checkout(checkout: Path) -> list[Path]:
    return [
        checkout / "dfn_hf" / "__init__.py",
        checkout / "modeling" / "ops" / "neighbor_search.py",
        checkout / "conversion" / "__init__.py",
    ]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the source tree, since building leaves files in it."""
    copy = tmp_path_factory.mktemp("source") / "dfn-hf"
    shutil.copytree(ROOT, copy, ignore=NOT_SOURCE)
    return copy


@pytest.fixture(scope="module")
def sdist(checkout) -> Path:
    run(sys.executable, "-c", "from setuptools.build_meta import build_sdist; build_sdist('dist')", cwd=checkout)
    return next((checkout / "dist").glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """Built from the source distribution, so that it too is known to be complete."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    run(*pip, "--wheel-dir", folder, sdist, cwd=folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site-packages")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_wheel_holds_every_module_and_data_file(wheel, checkout):
    held = set(zipfile.ZipFile(wheel).namelist())
    for folder, package in {
        "dfn_hf": "dfn_hf",
        "modeling": "dfn_hf/modeling",
        "conversion": "dfn_hf/conversion",
    }.items():
        for file in (checkout / folder).rglob("*"):
            if file.is_file() and file != checkout / "modeling" / "README.md":  # which is for developers
                assert f"{package}/{file.relative_to(checkout / folder)}" in held
    assert not any(name.startswith(("modeling/", "conversion/", "tests/", "build/")) for name in held)
    dist_info = f"dfn_hf-{dfn_hf.__version__}.dist-info"
    assert f"{dist_info}/licenses/LICENSE" in held
    assert "dfn-hf = dfn_hf_cli:main" in zipfile.ZipFile(wheel).read(f"{dist_info}/entry_points.txt").decode()


def test_wheel_is_small(wheel):
    assert wheel.stat().st_size <= 16.5e6


WITHOUT_COMPILER = """
import shutil
shutil.which = lambda *args, **kwargs: None
import torch
from dfn_hf.modeling.ops.kernels.flow_attention_cpu import attention_library
from dfn_hf.modeling.ops.kernels.box_tree_cpu import tree_library
print(attention_library(torch.ones(1)) is not None, tree_library(torch.ones(1)) is not None)
"""


def test_a_wheel_may_carry_the_compiled_kernels(checkout, wheel, installed, tmp_path):
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    environment = {"PATH": "/usr/bin:/bin", "DFN_HF_BUILD_KERNELS": "1"}
    subprocess.run([*pip, "--wheel-dir", tmp_path, checkout], cwd=tmp_path, env=environment, check=True)
    carrying = next(tmp_path.glob("*.whl"))
    assert re.fullmatch(r"dfn_hf-[\d.]+-py3-none-(?!any).+\.whl", carrying.name)
    assert wheel.name.endswith("-py3-none-any.whl")
    folder = tmp_path / "site-packages"
    zipfile.ZipFile(carrying).extractall(folder)
    assert run(sys.executable, "-c", WITHOUT_COMPILER, cwd=tmp_path, python_path=folder).split() == ["True", "True"]
    assert run(sys.executable, "-c", WITHOUT_COMPILER, cwd=tmp_path, python_path=installed).split() == [
        "False",
        "False",
    ]


def test_sdist_holds_what_a_developer_needs(sdist):
    held = {name.partition("/")[2] for name in tarfile.open(sdist).getnames()}
    assert {
        "Makefile",
        "constraints.txt",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "LICENSE",
        "SECURITY.md",
        "mkdocs.yml",
        "modeling/ops/neighbor_search.py",
        "docs/guides/peft.md",
    } <= held


def test_wheel_works_anywhere(installed, tmp_path):
    assert probe(tmp_path, python_path=installed) == [
        installed / "dfn_hf" / "__init__.py",
        installed / "dfn_hf" / "modeling" / "ops" / "neighbor_search.py",
        installed / "dfn_hf" / "conversion" / "__init__.py",
    ]


def test_checkout_works_beside_an_installed_wheel(installed, checkout):
    assert probe(checkout, python_path=installed) == in_checkout(checkout)


def test_checkout_works_on_the_path(checkout, tmp_path):
    assert probe(tmp_path, python_path=checkout) == in_checkout(checkout)


def test_editable_install_works_anywhere(checkout, tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index"]
    # Without --ignore-installed pip would remove the package from the environment that runs the tests.
    run(*pip, "--ignore-installed", "--prefix", tmp_path, "--editable", checkout, cwd=tmp_path)
    site_packages = str(next(tmp_path.rglob("site-packages")))
    # The environment that runs the tests may hold an editable install of its own, which would be found first.
    setup = f"""
import site, sys
sys.meta_path = [finder for finder in sys.meta_path if not finder.__module__.startswith("__editable__")]
for name in [name for name in sys.modules if name.startswith("__editable__")]:
    del sys.modules[name]
sys.path.insert(0, {site_packages!r})
site.addsitedir({site_packages!r})
"""
    assert probe(tmp_path, setup=setup) == in_checkout(checkout)


def test_version_is_the_same_everywhere():
    version = re.escape(dfn_hf.__version__)
    assert re.search(f"^version: {version}$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert re.search(f"^## {version} ", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)


def test_unknown_checkpoint_names_those_there_are():
    with pytest.raises(ValueError, match="no bundled checkpoint is named 'dfn-vast': choose one of "):
        dfn_hf.checkpoint_path("dfn-vast")
