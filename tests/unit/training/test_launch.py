"""The launcher: when ranks are forked, and that a forked rank is as one that was started afresh."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_llm.training.launch import forkable_script

ROOT = Path(__file__).parents[3]
SCRIPT = """
import atexit, json, os, pathlib, sys
here = os.environ["RANK"]
if __name__ == "__main__":
    atexit.register(lambda: pathlib.Path(f"left{here}").write_text("yes"))
    about = {"rank": here, "arguments": sys.argv, "path": sys.path[0], "imported": "torch" in sys.modules}
    about |= {"session": os.getsid(0), "process": os.getpid()}
    print(json.dumps(about | {name: os.environ[name] for name in ("WORLD_SIZE", "OMP_NUM_THREADS")}))
    if "fail" in sys.argv and here == "1":
        raise KeyError("a defect")
    if "leave" in sys.argv and here == "0":
        sys.exit(7)
    if "nothing" in sys.argv:
        sys.exit()
"""


def _launch(folder: Path, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "megatron_llm.training.launch", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, *arguments], cwd=folder, env=environment | variables, capture_output=True, text=True, timeout=120, check=False
    )


def _told(output: str) -> list[dict[str, object]]:
    return sorted((json.loads(line) for line in output.splitlines() if line.startswith("{")), key=lambda one: str(one["rank"]))


@pytest.mark.parametrize("variables", [{}, {"MEGATRON_LLM_FORK_RANKS": "0"}], ids=["as it chooses", "afresh"])
def test_a_rank_is_as_one_that_python_started(tmp_path: Path, variables: dict[str, str]) -> None:
    """Arguments, search path, a session of its own, functions to call at the end, and an end by sys.exit()."""
    done = _launch(tmp_path, "script.py", "--flag", "a b", "nothing", **variables)
    assert done.returncode == 0, done.stderr
    ranks = _told(done.stdout)
    assert [one["rank"] for one in ranks] == ["0", "1"]
    for one in ranks:
        assert one["arguments"] == ["script.py", "--flag", "a b", "nothing"] and Path(str(one["path"])).resolve() == tmp_path.resolve()
        assert one["session"] == one["process"] and one["WORLD_SIZE"] == "2" and one["OMP_NUM_THREADS"] == "1"
        assert one["imported"] == (forkable_script([str(tmp_path / "script.py")], variables) is not None)
    assert [(tmp_path / f"left{rank}").read_text() for rank in (0, 1)] == ["yes", "yes"]


@pytest.mark.parametrize(
    ("word", "status", "said"), [("fail", 1, "KeyError: 'a defect'"), ("leave", 7, "rank 0 ended first, with exit status 7")]
)
def test_the_first_failure_is_told_once(tmp_path: Path, word: str, status: int, said: str) -> None:
    done = _launch(tmp_path, "script.py", word)
    assert done.returncode == status
    assert done.stderr.count(said) == 1 and "ChildFailedError" not in done.stderr and "site-packages/torch" not in done.stderr


def test_ranks_are_forked_where_that_is_safe_and_nothing_else_was_asked_for(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.touch()
    plain = ["--standalone", "--nproc-per-node", "2", str(script), "-m", "x"]  # what follows the script is the script's
    assert forkable_script(plain, {}, gpus=()) == str(script)
    assert forkable_script(plain, {}, gpus=(str(script),)) is None  # stands for a GPU's device file
    assert forkable_script(plain, {"MEGATRON_LLM_FORK_RANKS": "0"}, gpus=()) is None
    assert forkable_script(["--run-path", *plain], {}, gpus=()) is None
    assert forkable_script(["-m", "package.module"], {}, gpus=()) is None
    assert forkable_script([str(tmp_path / "none.py")], {}, gpus=()) is None


def test_output_goes_where_torchrun_was_told(tmp_path: Path) -> None:
    """--redirects and --log-dir: a file for each stream of each rank."""
    done = _launch(tmp_path, "--redirects", "3", "--log-dir", "logs", "script.py", "fail")
    assert done.returncode == 1 and not _told(done.stdout) and "KeyError" not in done.stderr
    written = {path.parent.name + path.name: path.read_text() for path in (tmp_path / "logs").rglob("std*.log")}
    assert _told(written["0stdout.log"])[0]["rank"] == "0" and "KeyError: 'a defect'" in written["1stderr.log"]
