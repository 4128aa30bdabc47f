"""Optional dependencies: there, missing, broken."""

import sys
from pathlib import Path

import pytest

from megatron_llm.utils.errors import UserError
from megatron_llm.utils.optional import available, require


def test_installed_modules_are_imported() -> None:
    assert require("json").loads("1") == 1
    assert available("json") and available("xml.dom")
    assert not available("surely_not_installed") and not available("surely_not.installed")


def test_missing_module_says_what_needs_it_and_what_to_install() -> None:
    message = r"--logs needs surely_not_installed, which is not installed: pip install 'megatron_llm\[track\]'"
    with pytest.raises(UserError, match=message):
        require("surely_not_installed.part", extra="track", purpose="--logs")
    with pytest.raises(UserError, match="surely_not_installed is needed, .*: pip install surely_not_installed"):
        require("surely_not_installed")


def test_broken_module_is_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_module.py").write_text("import surely_not_installed\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(UserError, match="installed but cannot be imported .*surely_not_installed"):
        require("broken_module")
