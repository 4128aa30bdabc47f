"""A real corpus that every machine has: the documentation that ships with Python, as jsonl. No download.

The reference topics of `pydoc_data` and the docstrings of the standard library, about 2 MB of English with code. The
library's sources are parsed, never imported: importing some modules has effects (windows, messages, threads).
"""

import ast
import inspect
import json
import os
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_llm.utils.atomic import atomic_file
from megatron_llm.utils.errors import UserError

# Third-party packages, tests, and programs rather than libraries.
_LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "ensurepip",
    "pydoc_data",
    "__pycache__",
}
_SHORTEST = 40


@dataclass(frozen=True)
class Document:
    """One record of the corpus: `src` says where in the documentation it is from, `kind` what it documents."""

    text: str
    src: str
    kind: str
    title: str


def write_demo_corpus(path: str | Path) -> tuple[int, int]:
    """Write the corpus to `path` atomically, a JSON object {"text", "src", "type", "id", "title"} a line.

    Returns the number of documents and of characters of text. One Python version always gives the same file.
    """
    count = characters = 0
    with atomic_file(path, "w") as stream:
        for document in demo_documents():
            record = {"text": document.text, "src": document.src, "type": document.kind, "id": str(count), "title": document.title}
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
            count, characters = count + 1, characters + len(document.text)
        if not count:
            raise UserError("this Python installation has neither pydoc topics nor sources of the standard library to make a corpus of")
    return count, characters


def demo_documents() -> Iterator[Document]:
    """The documents in a fixed order, each text once."""
    seen: set[str] = set()
    library = Path(sysconfig.get_paths()["stdlib"])
    for documents in (_topics(library), _docstrings(library)):
        for document in documents:
            if len(document.text) >= _SHORTEST and document.text not in seen:
                seen.add(document.text)
                yield document


def _topics(library: Path) -> Iterator[Document]:
    """The language reference's chapters that `help()` shows: a dictionary in a source file."""
    path = library / "pydoc_data" / "topics.py"
    if not path.is_file():
        return
    for statement in _parse(path).body:
        value = getattr(statement, "value", None)
        if isinstance(statement, ast.Assign | ast.AnnAssign) and isinstance(value, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(value)
            for name in sorted(topics):
                yield Document(topics[name].strip(), "pydoc_data.topics", "reference", name)


def _docstrings(library: Path) -> Iterator[Document]:
    for path in _sources(library):
        relative = path.relative_to(library).with_suffix("")
        parts = relative.parts[:-1] if relative.name == "__init__" else relative.parts
        module = ".".join(parts)
        tree = _parse(path)
        yield from _documented(tree, module, module)


def _sources(library: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(library):
        folders[:] = sorted(name for name in folders if name not in _LEFT_OUT and not name.startswith("config-"))
        yield from (Path(folder) / name for name in sorted(names) if name.endswith(".py"))


def _documented(node: ast.AST, module: str, name: str) -> Iterator[Document]:
    """The docstring of a module, class or function, and those of what is defined in it."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node, clean=False)
        if text:
            kind = {ast.Module: "module", ast.ClassDef: "class"}.get(type(node), "function")
            yield Document(inspect.cleandoc(text).strip(), module, kind, name)
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _documented(child, module, f"{name}.{child.name}")
        elif isinstance(child, ast.If | ast.Try | ast.With):
            yield from _documented(child, module, name)


def _parse(path: Path) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in strings are the library's affair
        return ast.parse(path.read_bytes(), filename=str(path))
