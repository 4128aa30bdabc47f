"""The commands and the Python code of the guide to preparing data, run in the order of the page."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_the_guide_works_as_written(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "guide" / "data.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(sh|python)\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert [kind for kind, _ in blocks] == ["sh", "python"]
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for kind, code in blocks:
        command = ["sh", "-euc", code] if kind == "sh" else [sys.executable, "-c", code]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    assert re.match(r"\d+ \d+ \[.*\] 4096", result.stdout)
    assert sorted(path.name for path in (tmp_path / "demo").glob("corpus_*")) == [
        f"corpus_text_document{s}" for s in (".bin", ".idx", ".meta.json")
    ]
