"""Every argument and every return value has a type."""

import ast

import pytest

from tests.rules.sources import EVERYTHING, Source, report, sources


def missing_types(source: Source) -> list[str]:
    """Functions with an argument or a return value without annotation; self and cls need none."""
    methods = {id(node) for owner in ast.walk(source.tree) if isinstance(owner, ast.ClassDef) for node in owner.body}
    findings = []
    for function in source.functions():
        given = function.args
        arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
        static = any(isinstance(mark, ast.Name) and mark.id == "staticmethod" for mark in function.decorator_list)
        if id(function) in methods and not static:
            arguments = arguments[1:]
        bare = [argument.arg for argument in arguments if argument.annotation is None]
        if function.returns is None:
            bare.append("return")
        if bare:
            findings.append(source.at(function, f"no type for {', '.join(bare)}"))
    return findings


def test_annotations() -> None:
    findings = [finding for source in sources(*EVERYTHING) for finding in missing_types(source)]
    assert not findings, report(findings)


@pytest.mark.parametrize(
    "text",
    [
        "def f(a) -> int: ...",
        "def f(a: int): ...",
        "def f(*a: int, b) -> None: ...",
        "def f(*a) -> None: ...",
        "def f(**a) -> None: ...",
        "class A:\n    def f(self, a) -> None: ...",
        "class A:\n    def __init__(self): ...",
        "class A:\n    @staticmethod\n    def f(a) -> None: ...",
        "def f() -> None:\n    def g(): ...",
        "async def f(a) -> None: ...",
    ],
)
def test_the_rule_sees_a_missing_type(text: str) -> None:
    assert len(missing_types(Source.of("x.py", text))) == 1


def test_the_rule_asks_no_more() -> None:
    text = (
        "class A:\n    def f(self, a: int = 1, *b: str, c: float, **d: int) -> None: ...\n    @classmethod\n    def g(cls) -> None: ...\n"
    )
    assert missing_types(Source.of("x.py", text)) == []
