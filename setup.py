"""Builds the optional C++ extensions from csrc/; everything else about the package is in pyproject.toml.

Each only makes something faster. Whatever stops one from being built (no compiler, no Python headers, no torch), the
installation goes on, one line says so, and the slower form with the same results is used.
"""

import importlib.util
import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

if sys.platform == "win32":
    COMPILE_FLAGS = ["/O2", "/std:c++17", "/fp:precise", "/EHsc"]
else:
    # Without -ffp-contract=off some processors fuse a * b - c into one rounding, and the blend would differ from numpy's.
    COMPILE_FLAGS = ["-O3", "-std=c++17", "-ffp-contract=off", "-fvisibility=hidden"]

# No -march: the sources choose instruction sets at run time, so a build works on every machine of its architecture.
# -g0: Python's own flags may ask for debugging information, which doubles the time that torch's headers take.
TORCH_COMPILE_FLAGS = ["-O3", "-std=c++20", "-g0", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=off", "-Wno-psabi"]

# What is said when an extension is not built: its name in words, what happens instead, what it needs.
CONSEQUENCES = {
    "megatron_llm._C": (
        "the C++ index builder",
        "its numpy equivalent gives the same results, slower",
        "a C++17 compiler, Python headers and pybind11",
    ),
    "megatron_llm._kernels": (
        "the C++ CPU kernels",
        "training on CPU uses plain torch in their place, slower",
        "a C++20 compiler with OpenMP beside torch (`pip install --no-build-isolation -e .`)",
    ),
    "megatron_llm._shm": (
        "the shared-memory collectives",
        "CPU ranks of one host talk through gloo, slower",
        "a C++20 compiler with OpenMP and Python headers beside torch (`pip install --no-build-isolation -e .`)",
    ),
}


def say_not_built(name: str, reason: str) -> None:
    """One line on stderr: what is missing, what happens instead, what to do about it."""
    what, instead, needs = CONSEQUENCES[name]
    plural = "are" if what.endswith("s") else "is"
    print(
        f"megatron_llm: {what} {plural} not built ({reason}); {instead}. To build: install {needs}, then `pip install -e .` again.",
        file=sys.stderr,
        flush=True,
    )


class OptionalBuildExt(build_ext):
    """build_ext that compiles an extension's sources at the same time and reports a failed build in one line.

    The extensions are marked optional, so setuptools goes on after a failure.
    """

    def build_extension(self, ext: Extension) -> None:
        compiler = self.compiler
        compile_all = compiler.compile

        def compile_together(sources: list[str], **options: Any) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
                return [made for one in pool.map(lambda source: compile_all([source], **options), sources) for made in one]

        compiler.compile = compile_together
        try:
            super().build_extension(ext)
        except Exception as error:
            say_not_built(ext.name, str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
            raise
        finally:
            compiler.compile = compile_all


def index_extension() -> list[Extension]:
    """The index builders, or nothing (said in one line) when pybind11 is not installed. They need no torch."""
    try:
        import pybind11
    except ImportError:
        say_not_built("megatron_llm._C", "pybind11 is not installed")
        return []
    return [
        Extension(
            "megatron_llm._C",
            sources=["csrc/index.cpp"],
            depends=sorted(glob("csrc/index/*")),
            include_dirs=[pybind11.get_include()],
            extra_compile_args=COMPILE_FLAGS,
            language="c++",
            optional=True,
        )
    ]


def torch_extension(name: str, folder: str, libraries: list[str]) -> list[Extension]:
    """An extension of all C++ sources of a folder, built against the torch that is installed here, where there is one."""
    sources = sorted(glob(f"{folder}/*.cpp"))
    if not sources:
        return []
    if sys.platform == "win32":
        say_not_built(name, f"{platform.system()} is not supported")
        return []
    # Looked up and not imported: importing torch takes seconds, and only its folder is needed.
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        say_not_built(name, "torch is not installed where the package is built")
        return []
    torch = Path(spec.origin).parent
    return [
        Extension(
            name,
            sources=sources,
            # A new torch needs a new build; a header changes the sources that include it.
            depends=[*sorted(glob(f"{folder}/*.h")), str(torch / "version.py")],
            include_dirs=[str(torch / "include"), str(torch / "include" / "torch" / "csrc" / "api" / "include")],
            library_dirs=[str(torch / "lib")],
            libraries=["torch", "torch_cpu", "c10", *libraries],
            define_macros=[("TORCH_EXTENSION_NAME", name.rpartition(".")[2])],
            extra_compile_args=TORCH_COMPILE_FLAGS,
            extra_link_args=["-fopenmp"],
            language="c++",
            optional=True,
        )
    ]


setup(
    ext_modules=[
        *index_extension(),
        *torch_extension("megatron_llm._kernels", "csrc/cpu", []),
        *torch_extension("megatron_llm._shm", "csrc/shm", ["torch_python"]),
    ],
    cmdclass={"build_ext": OptionalBuildExt},
)
