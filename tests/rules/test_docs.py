"""The documentation does not go stale: links lead somewhere, commands name what exists, flags are known to their tool."""

import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_llm.config.flags import make_parser
from tests.rules.sources import ROOT

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *ROOT.glob("csrc/*.md")])
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)")
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def broken_links(page: Path, text: str) -> list[str]:
    """Relative links of a page that lead nowhere."""
    return [target for target in LINK.findall(text) if not (page.parent / target).exists()]


def commands(text: str) -> list[list[str]]:
    """The commands in the ```sh blocks of a page, split into words, without the variables before them."""
    found = []
    for block in BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words:
                found.append(words)
    return found


@functools.cache
def known_flags(tool: str) -> frozenset[str]:
    """The flags in a tool's help; those of the training for the scripts that pass them on."""
    if tool in ("tools/pretrain.py", "tools/check_config.py"):
        flags = {flag for action in make_parser()._actions for flag in action.option_strings}
        return frozenset(flags | {"--world-size", "--show"})
    done = subprocess.run([sys.executable, tool, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    return frozenset(re.findall(r"(?<![\w-])--[a-z][\w-]*", done.stdout))


def mistakes(words: list[str]) -> list[str]:
    """What is wrong with one command: a file or flag that does not exist."""
    started = [word for word in words if re.fullmatch(r"[\w./-]+\.(py|sh)", word)]
    wrong = [f"{word} does not exist" for word in started if not (ROOT / word).exists()]
    if wrong or not started:
        return wrong
    if started[0].endswith(".sh"):
        known = known_flags("tools/pretrain.py") if "pretrain" in started[0] else None
    else:
        known = known_flags(started[0])
    flags = [word.partition("=")[0] for word in words[words.index(started[0]) :] if word.startswith("--")]
    return [f"{started[0]} has no {flag}" for flag in flags if known is not None and flag not in known]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links(page: Path) -> None:
    assert broken_links(page, page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands(page: Path) -> None:
    found = [mistake for words in commands(page.read_text(encoding="utf-8")) for mistake in mistakes(words)]
    assert not found, "\n".join(found)


def test_the_first_screen_of_the_readme_shows_two_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    first_screen = text.partition("\n## ")[0]
    assert commands(first_screen) == [["sh", "run_pretrain_gpt.sh"], ["sh", "run_tests.sh"]]
    assert len(first_screen.splitlines()) <= 24


def test_the_rule_sees_mistakes(tmp_path: Path) -> None:
    assert broken_links(tmp_path / "x.md", "see [a](none.md) and [b](https://example.org) and [c](#here)") == ["none.md"]
    text = "```sh\nA=1 .venv/bin/python tools/no_such_tool.py\nsh run_pretrain_gpt.sh --num-layres 3\n```\n"
    assert [mistakes(words) for words in commands(text)] == [
        ["tools/no_such_tool.py does not exist"],
        ["run_pretrain_gpt.sh has no --num-layres"],
    ]
