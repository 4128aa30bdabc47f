"""What no file may contain: paths of one machine, names of package registries, characters outside ASCII in code."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rules.sources import ROOT, report

CODE = {".py", ".sh", ".cpp", ".h", ".cu", ".toml", ".yaml", ".yml", ".cfg", ".txt"}
SKIPPED = {"LICENSE"}
# Put together from parts, so that this file passes its own rule.
FORBIDDEN = {
    "a path of one machine": re.compile("(?<![\\w.$}])/(" + "|".join(["work", "root", "home"]) + ")/\\w"),
    "the host of a package registry": re.compile(
        "|".join(["pypi" + r"\.org", "python" + r"hosted\.org", "registry" + r"\.npmjs", "deb" + r"\.debian"])
    ),
}


def findings_in(path: str, text: str) -> Iterator[str]:
    """Places in one file that break the rule."""
    for number, line in enumerate(text.splitlines(), 1):
        for what, pattern in FORBIDDEN.items():
            if pattern.search(line):
                yield f"{path}:{number}: {what}: {line.strip()}"
        if Path(path).suffix in CODE and not line.isascii():
            yield f"{path}:{number}: not ASCII (write an escape): {line.strip()}"


def project_files() -> list[Path]:
    """Files that git tracks or would track; without git, those that are no build output."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        return [ROOT / name for name in listed.stdout.splitlines()]
    hidden = (".venv", ".git", "build", "demo", "runs")
    return [path for path in ROOT.rglob("*") if path.is_file() and path.relative_to(ROOT).parts[0] not in hidden]


def test_text() -> None:
    findings = []
    looked_at = 0
    for path in project_files():
        if path.name in SKIPPED or not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a picture or another binary file
            continue
        looked_at += 1
        findings += findings_in(str(path.relative_to(ROOT)), text)
    assert looked_at > 50
    assert not findings, report(findings)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("x.py", "PATH = '/" + "work/data'"),
        ("x.md", "see /" + "root/x"),
        ("x.md", "https://" + "pypi" + ".org/simple"),
        ("x.py", "name = '\u4f60'"),
    ],
)
def test_the_rule_sees_it(path: str, line: str) -> None:
    assert len(list(findings_in(path, line))) == 1


def test_the_rule_allows_the_rest() -> None:
    assert list(findings_in("x.md", "a caf\u00e9 in docs/work/x.md, $HOME/work/x")) == []
