"""Modules import downwards only: the layers of docs/design/architecture.md, checked by parsing the sources."""

import ast
from collections.abc import Iterator

import pytest

from tests.rules.sources import PACKAGE, ROOT, Source, report, sources

LEVELS = (
    ("utils",),
    ("config", "kernels"),
    ("parallel",),
    ("models", "data", "optim"),
    ("checkpoint",),
    ("convert", "lora"),
    ("training", "finetune", "evaluate", "quantize", "serve"),
)
LEVEL_OF = {part: level for level, parts in enumerate(LEVELS) for part in parts}


def imported(source: Source) -> Iterator[tuple[ast.stmt, str]]:
    """Every import statement and the dotted name it brings in; a relative import starts with a dot."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom) and node.module == "megatron_llm":
            for alias in node.names:
                yield node, f"megatron_llm.{alias.name}"
        elif isinstance(node, ast.ImportFrom):
            yield node, "." * node.level + (node.module or "")


def wrong_imports(source: Source) -> list[str]:
    """Imports of this file that point upwards, sideways, or out of the package into tests and tools."""
    part = source.path.split("/")[1].removesuffix(".py")
    findings = []
    for node, name in imported(source):
        names = name.split(".")
        if not names[0]:
            findings.append(source.at(node, "a relative import, write it in full"))
        elif names[0] in ("tests", "tools"):
            findings.append(source.at(node, f"the package must not need {names[0]}"))
        if names[0] != "megatron_llm" or len(names) < 2 or part == "testing":
            continue
        other = names[1]
        if other == "testing":
            findings.append(source.at(node, "testing is for tests only"))
        elif part in LEVEL_OF and other in LEVEL_OF and other != part and LEVEL_OF[other] >= LEVEL_OF[part]:
            relation = "a sibling on the same level" if LEVEL_OF[other] == LEVEL_OF[part] else "a higher level"
            findings.append(source.at(node, f"{part} (level {LEVEL_OF[part]}) imports {other}, {relation}"))
    return findings


def test_imports_point_downwards() -> None:
    findings = [finding for source in sources(*PACKAGE) for finding in wrong_imports(source)]
    assert not findings, report(findings)


def test_every_part_has_a_level() -> None:
    parts = {path.name for path in (ROOT / "megatron_llm").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert parts - set(LEVEL_OF) - {"testing"} == set()


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("megatron_llm/data/x.py", "from megatron_llm.training.trainer import Trainer"),
        ("megatron_llm/data/x.py", "from megatron_llm.models import registry"),
        ("megatron_llm/data/x.py", "from megatron_llm import parallel, models"),
        ("megatron_llm/utils/x.py", "import megatron_llm.config.schema"),
        ("megatron_llm/utils/x.py", "def f() -> None:\n    import megatron_llm.config.schema"),
        ("megatron_llm/training/x.py", "from megatron_llm.testing.ranks import run_ranks"),
        ("megatron_llm/training/x.py", "from tools import pretrain"),
        ("megatron_llm/training/x.py", "from . import trainer"),
    ],
)
def test_the_rule_sees_a_wrong_import(path: str, line: str) -> None:
    (finding,) = wrong_imports(Source.of(path, line))
    assert finding.startswith(path) and "import" in finding


def test_the_rule_allows_what_points_down() -> None:
    text = "import torch\nfrom megatron_llm.utils.errors import UserError\nfrom megatron_llm.data.batch import Batch\n"
    assert wrong_imports(Source.of("megatron_llm/data/x.py", text)) == []
