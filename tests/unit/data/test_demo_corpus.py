"""The demo corpus: from a small library made up here, and from the real one."""

import json
import os
import subprocess
import sys
import sysconfig
from itertools import islice
from pathlib import Path

import pytest

from megatron_llm.data.demo_corpus import demo_documents, write_demo_corpus
from megatron_llm.utils.errors import UserError

LONG = "A docstring that is long enough to be taken into the corpus."


NESTED = f'''
class C:
    """C {LONG}

      indented
    not indented
    """
    def f(self):
        "f {LONG}"
        def g():
            "g {LONG}"
'''
REPEATED = f"""
try:
    def f():
        "p {LONG}"
except ImportError:
    pass
def again():
    "p {LONG}"
def short():
    "too short"
"""


def _library(folder: Path, files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(folder)})


def test_topics_and_docstrings_in_a_fixed_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "pydoc_data/topics.py": f"# made by a tool\ntopics = {{'while': 'W {LONG}', 'assert': 'A {LONG}\\n'}}\n",
        "zoo.py": f'"""Z {LONG}"""\nraise SystemExit("imported")\n',
        "app/__init__.py": NESTED,
        "app/part.py": REPEATED,
        "test/test_a.py": f'"""{LONG} left out"""',
        "site-packages/other.py": f'"""{LONG} left out"""',
    }
    _library(tmp_path, files, monkeypatch)
    documents = list(demo_documents())
    assert [(d.src, d.kind, d.title, d.text[:1]) for d in documents] == [
        ("pydoc_data.topics", "reference", "assert", "A"),
        ("pydoc_data.topics", "reference", "while", "W"),
        ("zoo", "module", "zoo", "Z"),
        ("app", "class", "app.C", "C"),
        ("app", "function", "app.C.f", "f"),
        ("app", "function", "app.C.f.g", "g"),
        ("app.part", "function", "app.part.f", "p"),
    ]
    assert documents[3].text == f"C {LONG}\n\n  indented\nnot indented"


def test_an_installation_without_sources_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _library(tmp_path / "library", {"a.py": "x = 1\n"}, monkeypatch)
    with pytest.raises(UserError, match="has neither pydoc topics nor sources"):
        write_demo_corpus(tmp_path / "corpus.jsonl")
    assert not (tmp_path / "corpus.jsonl").exists()


def test_the_real_corpus(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    output = tmp_path / "demo" / "corpus.jsonl"
    command = [sys.executable, "tools/make_demo_corpus.py", "--output", str(output)]
    # Under another hash seed than ours: the order may not depend on it.
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONHASHSEED": "7"}
    subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True)
    records = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [set(record) for record in records] == [{"text", "src", "type", "id", "title"}] * len(records)
    assert [record["id"] for record in records] == [str(number) for number in range(len(records))]
    texts = [record["text"] for record in records]
    assert 1_500_000 < sum(map(len, texts)) < 4_000_000
    assert len(set(texts)) == len(texts)
    assert {record["type"] for record in records} == {"reference", "module", "class", "function"}
    assert texts[:300] == [document.text for document in islice(demo_documents(), 300)]
