"""run_install_environment.sh with a stand-in for Python: the order of what it does, what it keeps, what it refuses.

The stand-in writes down each call of pip and pretends to install; CI installs for real before any test runs.
"""

import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.rules.sources import ROOT

PYTHON = """#!/bin/sh
here=$(dirname "$0")
case "$*" in
--version) echo "Python 3.11.7" ;;
*version_info*) exit "${TOO_OLD:-0}" ;;
*ensurepip*) exit "${NO_VENV:-0}" ;;
*"-m venv"*) for folder; do :; done; mkdir -p "$folder/bin"; cp "$0" "$folder/bin/python" ;;
*'import pip'*) [ "$here" != "$BASE" ] ;;
*find_spec*) { [ -e "$here/torch" ] || [ -n "${HAS_TORCH:-}" ]; } && echo /somewhere || echo ;;
*'version("torch")'*) echo "${TORCH_VERSION:-2.13.0}" ;;
*kept_torch.pth*) echo kept >>"$CALLS" ;;
*"pip install"*)
    echo "$*" >>"$CALLS"
    sleep "${SLOW:-0}"
    case "$*" in *torch==*) : >"$here/torch" ;; *" -e "*) exit "${BROKEN:-0}" ;; esac ;;
esac
"""


@dataclass(frozen=True)
class Checkout:
    """The installer in a folder of its own, and a base interpreter that is the stand-in."""

    folder: Path

    def environment(self, **variables: str) -> dict[str, str]:
        """What the script is started with."""
        base = self.folder / "base"
        return {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "PYTHON": str(base / "python"),
            "BASE": str(base),
            "CALLS": str(self.log),
            **variables,
        }

    @property
    def log(self) -> Path:
        """Where the calls are written down."""
        return self.folder / "calls"

    @property
    def command(self) -> list[str]:
        """How the script is started."""
        return ["sh", str(self.folder / "run_install_environment.sh")]

    def run(self, **variables: str) -> "subprocess.CompletedProcess[str]":
        """Run the script to its end, from another folder."""
        return subprocess.run(self.command, cwd="/", env=self.environment(**variables), capture_output=True, text=True, check=False)

    def calls(self) -> list[str]:
        """What pip was asked for since the last look: the words after its options."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return [line.split("--no-compile ")[-1] for line in lines]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    """A copy of what the installer reads."""
    for name in ("run_install_environment.sh", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "python").write_text(PYTHON)
    (tmp_path / "base" / "python").chmod(0o755)
    return Checkout(tmp_path)


def test_torch_comes_first_and_a_second_run_does_nothing(checkout: Checkout) -> None:
    done = checkout.run()
    assert done.returncode == 0, done.stderr
    calls = checkout.calls()
    wanted = ["-U pip>=25", "torch==2.13.0", "setuptools wheel pybind11", f"-e {checkout.folder}[dev]", "test-no-deps.txt"]
    assert [call.endswith(end) for call, end in zip(calls, wanted, strict=True)] == [True] * 5, calls
    again = checkout.run()
    assert again.returncode == 0 and "up to date" in again.stdout and checkout.calls() == []


def test_an_environment_is_the_same_by_a_relative_name(checkout: Checkout) -> None:
    """`make` says .venv and other scripts say the whole path: none of them installs what the other has installed."""
    absolute = checkout.folder / ".venv"
    assert checkout.run(VENV=str(absolute).lstrip("/")).returncode == 0 and (absolute / ".installed").exists()
    checkout.calls()
    for name in (str(absolute), str(absolute).lstrip("/")):
        assert "up to date" in checkout.run(VENV=name).stdout and checkout.calls() == []


@pytest.mark.parametrize("name", ["pyproject.toml", "setup.py", "csrc/index.cpp", "requirements/lock.txt"])
def test_a_change_of_what_it_installs_from_installs_again(checkout: Checkout, name: str) -> None:
    checkout.run()
    checkout.calls()
    with open(checkout.folder / name, "a") as file:
        file.write("\n# changed\n")
    checkout.run()
    calls = checkout.calls()
    assert any(" -e " in f" {call}" for call in calls) and not any("torch==2.13.0" in call for call in calls)


def test_an_installed_torch_is_kept(checkout: Checkout) -> None:
    done = checkout.run(HAS_TORCH="1", TORCH_VERSION="2.12.1+cu130")
    assert done.returncode == 0, done.stderr
    assert "keeping the torch in /somewhere" in done.stdout
    calls = checkout.calls()
    assert "kept" in calls and not any(call.startswith("torch==") for call in calls)
    constraints = (checkout.folder / ".venv" / "constraints.txt").read_text().splitlines()
    assert [line for line in constraints if line.startswith("torch==")] == ["torch==2.12.1+cu130"]


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"TOO_OLD": "1"}, "no Python 3.11, 3.12 or 3.13 was found"),
        ({"NO_VENV": "1"}, "lacks the modules venv and ensurepip"),
        ({"HAS_TORCH": "1", "TORCH_VERSION": "2.4.0"}, "torch 2.4.0 is installed in /somewhere"),
        ({"PYTHON": "/nowhere/python3"}, "no Python 3.11, 3.12 or 3.13 was found"),
    ],
)
def test_what_does_not_fit_is_one_sentence(checkout: Checkout, variables: dict[str, str], words: str) -> None:
    done = checkout.run(**variables)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and words in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (checkout.folder / ".venv.lock").exists()


def test_a_failed_installation_is_not_taken_for_a_good_one(checkout: Checkout) -> None:
    assert checkout.run(BROKEN="9").returncode == 9
    assert not (checkout.folder / ".venv.lock").exists()
    checkout.calls()
    assert checkout.run().returncode == 0
    assert any(call.startswith("-c") for call in checkout.calls())


def test_two_at_once_install_once(checkout: Checkout) -> None:
    environment = checkout.environment(SLOW="0.4")
    with subprocess.Popen(checkout.command, env=environment, stdout=subprocess.PIPE, text=True) as first:
        deadline = time.monotonic() + 30
        while not (checkout.folder / ".venv.lock" / "owner").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        second = checkout.run()
        assert first.wait(timeout=60) == 0
    assert second.returncode == 0, second.stderr
    assert "waiting for the installation" in second.stdout and "up to date" in second.stdout
    assert len(checkout.calls()) == 5


def test_the_lock_of_a_dead_process_is_removed(checkout: Checkout) -> None:
    gone = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True, check=True).stdout.strip()
    (checkout.folder / ".venv.lock").mkdir()
    (checkout.folder / ".venv.lock" / "owner").write_text(f"{os.uname().nodename} {gone}\n")
    done = checkout.run()
    assert done.returncode == 0 and "left behind" in done.stdout


def test_extras_can_be_chosen(checkout: Checkout) -> None:
    checkout.run(EXTRAS="track,data")
    calls = checkout.calls()
    assert calls[-1].endswith(f"-e {checkout.folder}[track,data]")
