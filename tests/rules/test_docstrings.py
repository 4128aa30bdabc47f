"""Each module says what it is; public functions and classes of the package say what they do."""

import ast

import pytest

from tests.rules.sources import COMMANDS, PACKAGE, TESTS, Source, report, sources


def missing_docstrings(source: Source, *, names: bool) -> list[str]:
    """The module, and with `names` its public functions and classes, where they have no docstring."""
    if not source.tree.body:
        return []
    findings = []
    if not ast.get_docstring(source.tree):
        findings.append(f"{source.path}:1: the module has no docstring")
    for node in source.tree.body if names else ():
        public = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_")
        overload = any(isinstance(mark, ast.Name) and mark.id == "overload" for mark in getattr(node, "decorator_list", ()))
        if public and not overload and not ast.get_docstring(node):
            findings.append(source.at(node, "no docstring"))
    return findings


def test_package_and_tools() -> None:
    findings = [finding for source in sources(*PACKAGE, *COMMANDS) for finding in missing_docstrings(source, names=True)]
    assert not findings, report(findings)


def test_modules_of_the_tests() -> None:
    findings = [finding for source in sources(*TESTS) for finding in missing_docstrings(source, names=False)]
    assert not findings, report(findings)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("import os", 1),
        ('"""Doc."""\ndef f() -> None: ...', 1),
        ('"""Doc."""\nclass A: ...', 1),
        ('"""Doc."""\ndef _f() -> None: ...', 0),
        ('"""Doc."""\ndef f() -> None:\n    """Doc."""', 0),
    ],
)
def test_the_rule(text: str, count: int) -> None:
    assert len(missing_docstrings(Source.of("x.py", text), names=True)) == count
