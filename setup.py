"""Builds the distributions. With DFN_HF_BUILD_KERNELS=1 the wheel carries the C kernels, compiled for its platform.

All other settings are in pyproject.toml.
"""

import ast
import hashlib
import os
import runpy
import subprocess
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

KERNELS = Path("modeling", "ops", "kernels")
C_SOURCE = runpy.run_path(str(KERNELS / "c_source.py"))["c_source"]
CARRIES_KERNELS = os.environ.get("DFN_HF_BUILD_KERNELS") == "1"


class DistributionWithKernels(Distribution):
    def has_ext_modules(self):
        return CARRIES_KERNELS


class BuildWithKernels(build_py):
    def run(self):
        super().run()
        if CARRIES_KERNELS and not self.editable_mode:
            folder = Path(self.build_lib, "dfn_hf", KERNELS)
            for earlier in folder.glob("lib*.so"):
                earlier.unlink()
            for source in sorted(KERNELS.glob("*.c")):
                compile_kernel(source, folder)


class WheelOfPlatform(bdist_wheel):
    """A wheel for one platform and every Python 3: the libraries do not use Python's headers."""

    def get_tag(self):
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if CARRIES_KERNELS else (python, abi, platform)


def compile_kernel(source: Path, folder: Path) -> None:
    """Compile a C file for any processor of the platform, with the flags that the Python module of its name states.

    The library is named by its source, size and hash, as `c_compiler.carried_library` expects it.
    """
    module = ast.parse(source.with_suffix(".py").read_text(encoding="utf-8"))
    flags = next(
        ast.literal_eval(node.value)
        for node in module.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).endswith("_FLAGS")
    )
    built = folder / "library.so"
    command = [os.environ.get("CC", "cc"), *flags, "-O3", "-std=gnu11", "-fPIC", "-shared"]
    subprocess.run([*command, "-o", str(built), str(source), "-lm"], check=True)
    code, library = C_SOURCE(source.name).encode(), built.read_bytes()
    name = f"lib{source.stem.removesuffix('_cpu')}-{hashlib.sha256(code).hexdigest()[:16]}"
    built.replace(folder / f"{name}-{len(library)}-{hashlib.sha256(library).hexdigest()[:32]}.so")


setup(distclass=DistributionWithKernels, cmdclass={"build_py": BuildWithKernels, "bdist_wheel": WheelOfPlatform})
