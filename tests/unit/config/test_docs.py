"""docs/config.md is what the schema says."""

import subprocess
import sys
from pathlib import Path

from megatron_llm.config.docs import render
from megatron_llm.config.fields import all_fields
from megatron_llm.config.megatron_names import MEGATRON_HINTS
from megatron_llm.config.rules import RULES

ROOT = Path(__file__).parents[3]


def test_the_page_in_the_tree_is_current() -> None:
    assert (ROOT / "docs" / "config.md").read_text() == render(), "run python tools/make_config_docs.py"


def test_the_page_names_every_flag_rule_and_hint() -> None:
    page = render()
    for spec in all_fields():
        assert page.count(f"| `{spec.flag}` |") == 1
        assert all(f"`--{alias}`" in page for alias in spec.aliases)
    assert all((rule.__doc__ or "").splitlines()[0] in page for rule in RULES)
    assert all(f"`{flag}`" in page for flag in MEGATRON_HINTS)


def test_check_fails_on_a_stale_page_and_passes_on_a_new_one(tmp_path: Path) -> None:
    tool, page = [sys.executable, str(ROOT / "tools" / "make_config_docs.py"), "--output"], tmp_path / "config.md"
    environment = {"PYTHONPATH": str(ROOT)}
    page.write_text("old")
    stale = subprocess.run([*tool, str(page), "--check"], env=environment, capture_output=True, text=True, check=False)
    assert stale.returncode == 1 and "make_config_docs.py" in stale.stderr and "Traceback" not in stale.stderr
    assert page.read_text() == "old"
    subprocess.run([*tool, str(page)], env=environment, check=True)
    subprocess.run([*tool, str(page), "--check"], env=environment, check=True)
    assert page.read_text() == render()
