"""The one thing that pyproject.toml cannot say: put the compiled CPU kernel into the wheel, where a compiler is at hand.

Without one, or on a platform that the kernel is not for, the wheel is the pure Python one, and the kernel is compiled at first
use (``hf_sparse/runtime/cpu/library.py``, which also has the recipe). The library has a plain C interface: the wheel fits
every Python, so its tag is ``py3-none-<platform>``.

    HF_SPARSE_NO_KERNEL=1 python -m build --wheel      the pure Python wheel, whatever is there
"""

import importlib.util
import os
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
CPU = Path("hf_sparse", "runtime", "cpu")


def kernel_recipe():
    """The module ``library``, by its file: it needs nothing but the standard library, the package needs torch."""
    spec = importlib.util.spec_from_file_location("library", HERE / CPU / "library.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RECIPE = kernel_recipe()


def compiler() -> str | None:
    if os.environ.get("HF_SPARSE_NO_KERNEL") or not RECIPE.supported_platform():
        return None
    return RECIPE.find_compiler()


class BuildPy(build_py):
    """Copies the package, then compiles the kernel beside it; an editable install leaves the source tree alone."""

    def run(self):
        super().run()
        if self.editable_mode or not compiler():
            return
        try:
            RECIPE.compile_kernel(Path(self.build_lib) / CPU / RECIPE.PREBUILT, compiler())
        except RuntimeError as error:
            self.warn(f"the CPU kernel is left to be compiled at first use: {error}")


class BdistWheel(bdist_wheel):
    """A wheel for this platform if the kernel is in it, else one for all."""

    def get_tag(self):
        self.root_is_pure = not (Path(self.bdist_dir) / CPU / RECIPE.PREBUILT).is_file()
        return "py3", "none", super().get_tag()[2]


class Kernel(Distribution):
    """Tells setuptools that something in here may depend on the platform, though it is no extension module."""

    def has_ext_modules(self):
        return bool(compiler())


setup(cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel}, distclass=Kernel)
