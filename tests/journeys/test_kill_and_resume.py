"""A training killed without warning goes on as if nothing had happened, started the way users start it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from megatron_llm.checkpoint.load import CheckpointReader
from megatron_llm.data.indexed_writer import write_indexed_dataset

ROOT = Path(__file__).parents[2]
RANKS, STEPS, HALF = 4, 40, 20  # the second half takes long enough to notice the checkpoint in it


def start(corpus: Path, save: Path, *flags: str, ranks: int = RANKS) -> "subprocess.Popen[str]":
    """A small LLaMA with dropout under TP2 x PP2, in a process group of its own."""
    command = [sys.executable, "-m", "megatron_llm.training.launch", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", str(ranks), str(ROOT / "tools" / "pretrain.py"), "--tp", "2", "--pp", "2", "--device", "cpu"]
    command += ["--data-path", str(corpus), "--split", "8,2,0", "--save", str(save), "--auto-resume", "--train-iters", str(STEPS)]
    command += ["--save-interval", str(HALF), "--eval-interval", "20", "--eval-iters", "1", "--log-interval", "1"]
    command += ["--num-layers", "4", "--hidden-size", "64", "--seq-length", "64", "--micro-batch-size", "4", "--global-batch-size", "64"]
    command += ["--hidden-dropout", "0.1", "--sequence-parallel", "--sanity-checks", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        command, cwd=save.parent, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def finish(process: "subprocess.Popen[str]") -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def kill_at_half(corpus: Path, save: Path, *flags: str) -> bool:
    """kill -9 of the whole process group as soon as the checkpoint in the middle is there; whether the run was still going on."""
    process = start(corpus, save, *flags)
    deadline = time.monotonic() + 200
    while not (save / f"step_{HALF:07d}").exists():
        assert time.monotonic() < deadline and process.poll() is None, f"no checkpoint appeared: {process.communicate()[0]}"
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    return not (save / f"step_{STEPS:07d}").exists()


def losses(save: Path) -> dict[int, float]:
    events = [json.loads(line) for line in (save / "log.jsonl").read_text().splitlines()]
    return {event["step"]: event["loss"] for event in events if event["event"] == "step"}


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    with CheckpointReader(checkpoint) as reader:
        return {key: reader.read(key) for key in reader.manifest.tensors}


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    """kill -9 of everything right after the checkpoint in the middle; the losses and the final state are the same to the bit."""
    random = np.random.default_rng(0)
    corpus = tmp_path / "corpus"
    write_indexed_dataset(corpus, [random.integers(0, 97, 150) for _ in range(100)], 97)
    flags = ("--vocab-size", "97")
    finish(start(corpus, tmp_path / "straight", *flags))

    # On a busy machine noticing the checkpoint may take longer than the other half, and the kill come too late: try again.
    save = next((folder for folder in (tmp_path / f"broken{i}" for i in range(5)) if kill_at_half(corpus, folder, *flags)), None)
    assert save is not None, "every kill came too late to prove anything"

    output = finish(start(corpus, save, *flags))
    assert f"loading {save / f'step_{HALF:07d}'}" in output and f"steps    {HALF + 1} to {STEPS}" in output
    assert losses(save) == losses(tmp_path / "straight") and set(losses(save)) == set(range(1, STEPS + 1))
    one, other = (tensors(folder / f"step_{STEPS:07d}") for folder in (save, tmp_path / "straight"))
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert torch.equal(tensor, other[key]), f"{key} differs"


def test_sigterm_saves_and_leaves_cleanly_and_exit_interval_too(tmp_path: Path) -> None:
    """SIGTERM to the launcher: a checkpoint of the step it stood at; then resuming to a step with --exit-interval."""
    random = np.random.default_rng(0)
    corpus, save = tmp_path / "corpus", tmp_path / "save"
    write_indexed_dataset(corpus, [random.integers(0, 97, 150) for _ in range(100)], 97)
    flags = ("--vocab-size", "97", "--train-iters", "100000", "--save-interval", "100000", "--eval-interval", "0", "--pp", "1")
    process = start(corpus, save, *flags, ranks=2)
    assert process.stdout is not None
    seen = ""
    while "step      3/" not in seen:
        line = process.stdout.readline()
        assert line, f"training ended early:\n{seen}"
        seen += line
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=120)
    assert "SIGTERM received" in rest and "leaving early" in rest, seen + rest
    (saved,) = save.glob("step_*")
    step = int(saved.name.removeprefix("step_"))
    assert step >= 3 and losses(save).keys() == set(range(1, step + 1))
    target = step // 4 * 4 + 4
    output = finish(start(corpus, save, *flags, "--exit-interval", "4", ranks=2))
    assert f"is a multiple of exit_interval 4) at step {target}" in output
    assert (save / f"step_{target:07d}").exists()
