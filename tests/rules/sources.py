"""What the rules read: the Python sources of this checkout, parsed, and how a finding is written."""

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ("megatron_llm",)
COMMANDS = ("tools",)
TESTS = ("tests",)
EVERYTHING = (*PACKAGE, *COMMANDS, *TESTS)


@dataclass(frozen=True)
class Source:
    """One Python file: its path relative to the checkout, its text, its syntax tree."""

    path: str
    text: str
    tree: ast.Module

    @classmethod
    def of(cls, path: str, text: str) -> "Source":
        """A source that need not exist on disk, for trying a rule on a bad example."""
        return cls(path, text, ast.parse(text))

    def at(self, node: ast.AST, message: str) -> str:
        """A finding with its place and the offending line."""
        line = getattr(node, "lineno", 1)
        code = self.text.splitlines()[line - 1].strip() if self.text else ""
        return f"{self.path}:{line}: {message}: {code}"

    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        """Every function and method, nested ones too."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node


@functools.cache
def sources(*folders: str) -> tuple[Source, ...]:
    """All Python files under these folders of the checkout."""
    files = sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))
    assert files, f"no Python files under {folders}: the rule would pass without having looked at anything"
    return tuple(Source.of(str(file.relative_to(ROOT)), file.read_text(encoding="utf-8")) for file in files)


def report(findings: list[str]) -> str:
    """All findings under each other, for the message of an assertion."""
    return f"{len(findings)} findings\n" + "\n".join(findings)
