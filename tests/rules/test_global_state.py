"""No global mutable state: groups and configs are passed, so two models with different layouts live in one process.

Module-level tables in capitals are constants, and nothing in their module may change them. `testing` is exempt: the
harness keeps its warm processes for the whole run of pytest.
"""

import ast
from collections.abc import Iterator

import pytest

from tests.rules.sources import COMMANDS, PACKAGE, Source, report, sources

MUTABLE_CALLS = {
    "list",
    "dict",
    "set",
    "bytearray",
    "defaultdict",
    "OrderedDict",
    "Counter",
    "deque",
    "WeakKeyDictionary",
    "WeakValueDictionary",
}
CHANGES = {"append", "add", "update", "setdefault", "pop", "popitem", "clear", "extend", "insert", "remove", "discard", "appendleft"}


def is_mutable(value: ast.expr | None) -> bool:
    """Whether an expression makes a list, dict, set or the like."""
    if isinstance(value, ast.Call):
        name = value.func.attr if isinstance(value.func, ast.Attribute) else getattr(value.func, "id", "")
        return name in MUTABLE_CALLS
    return isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp)


def module_variables(source: Source) -> Iterator[tuple[ast.stmt, str, ast.expr | None]]:
    """Assignments at module level: statement, name, value."""
    for node in source.tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        for target in targets:
            if isinstance(target, ast.Name):
                yield node, target.id, getattr(node, "value", None)


def changed_names(source: Source) -> Iterator[tuple[ast.AST, str]]:
    """Names whose contents some function of the module changes."""
    for function in source.functions():
        for node in ast.walk(function):
            stored = isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del)
            called = isinstance(node, ast.Attribute) and node.attr in CHANGES
            if (stored or called) and isinstance(node.value, ast.Name):
                yield node, node.value.id


def global_state(source: Source) -> list[str]:
    """What this file keeps, or changes, at module level."""
    findings = []
    tables = set()
    for node, name, value in module_variables(source):
        if name == "__all__" or not is_mutable(value):
            continue
        tables.add(name)
        if name.strip("_") != name.strip("_").upper():
            findings.append(source.at(node, f"{name} is mutable and lives in the module"))
    findings += [
        source.at(node, f"{name} is a table of the module and is changed here") for node, name in changed_names(source) if name in tables
    ]
    findings += [source.at(node, "a global statement") for node in ast.walk(source.tree) if isinstance(node, ast.Global)]
    findings += [source.at(function, "global arguments") for function in source.functions() if function.name == "get_args"]
    return findings


def test_global_state() -> None:
    looked_at = [source for source in sources(*PACKAGE, *COMMANDS) if not source.path.startswith("megatron_llm/testing/")]
    findings = [finding for source in looked_at for finding in global_state(source)]
    assert not findings, report(findings)


@pytest.mark.parametrize(
    "text",
    [
        "groups = {}",
        "seen: list[int] = []",
        "counts = collections.Counter()",
        "TABLE = {}\ndef register(name: str) -> None:\n    TABLE[name] = 1",
        "TABLE = []\ndef register(name: str) -> None:\n    TABLE.append(name)",
        "STATE = None\ndef set_state(value: int) -> None:\n    global STATE\n    STATE = value",
        "def get_args() -> None: ...",
    ],
)
def test_the_rule_sees_state(text: str) -> None:
    assert len(global_state(Source.of("x.py", text))) == 1


def test_the_rule_allows_constants() -> None:
    text = "TABLE = {'a': 1}\n_NAMES = ['a']\ndef f() -> list[int]:\n    found = []\n    found.append(TABLE['a'])\n    return found\n"
    assert global_state(Source.of("x.py", text)) == []
