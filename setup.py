"""Builds the optional C++ extension `megatron_llm._C` from csrc/; everything else about the package is in pyproject.toml.

The extension only makes index building faster. Whatever stops it from being built (no compiler, no Python headers, no
pybind11), the installation goes on, one line says so, and the numpy functions with the same results are used.
"""

import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

if sys.platform == "win32":
    COMPILE_FLAGS = ["/O2", "/std:c++17", "/fp:precise", "/EHsc"]
else:
    # Without -ffp-contract=off some processors fuse a * b - c into one rounding, and the blend would differ from numpy's.
    COMPILE_FLAGS = ["-O3", "-std=c++17", "-ffp-contract=off", "-fvisibility=hidden"]


def say_not_built(reason: str) -> None:
    """One line on stderr: what is missing, what happens instead, what to do about it."""
    print(
        f"megatron_llm: the C++ index builder is not built ({reason}); its numpy equivalent gives the same results, slower. "
        "To build it: install a C++17 compiler, Python headers and pybind11, then `pip install -e .` again.",
        file=sys.stderr,
        flush=True,
    )


class OptionalBuildExt(build_ext):
    """build_ext that reports a failed build in one line; the extension is marked optional, so setuptools goes on."""

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:
            say_not_built(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
            raise


def extensions() -> list[Extension]:
    """The extension, or nothing (said in one line) when pybind11 is not installed."""
    try:
        import pybind11
    except ImportError:
        say_not_built("pybind11 is not installed")
        return []
    return [
        Extension(
            "megatron_llm._C",
            sources=["csrc/index.cpp"],
            include_dirs=[pybind11.get_include()],
            extra_compile_args=COMPILE_FLAGS,
            language="c++",
            optional=True,
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": OptionalBuildExt})
