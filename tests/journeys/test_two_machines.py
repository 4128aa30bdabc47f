"""The script as two machines type it, both of them this one: one meeting point, one run, one log."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def machine(number: int, port: int, output: Path, *flags: str) -> "subprocess.Popen[str]":
    """Start the script as machine `number` of two, one process each, TP 2 across them."""
    settings = {"NNODES": "2", "NODE_RANK": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GPUS_PER_NODE": "1"}
    settings |= {"TP": "2", "PP": "1", "DEVICE": "cpu", "OUTPUT": str(output), "VENV": sys.prefix, "GLOO_SOCKET_IFNAME": "lo"}
    settings |= {"HIDDEN_SIZE": "32", "NUM_LAYERS": "2", "SEQ_LENGTH": "32", "MICRO_BATCH": "2", "TRAIN_ITERS": "6", "EVAL_INTERVAL": "0"}
    command = ["sh", str(ROOT / "run_pretrain_gpt.sh"), "--mock-data", "--vocab-size", "97", *flags]
    return subprocess.Popen(
        command, cwd=output.parent, env={**os.environ, **settings}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def outputs(processes: list["subprocess.Popen[str]"]) -> list[tuple[int, str]]:
    found = []
    for process in processes:
        text, _ = process.communicate(timeout=280)
        found.append((process.returncode, text))
    return found


def test_two_machines_train_together(tmp_path: Path) -> None:
    port = free_port()
    first, second = outputs([machine(number, port, tmp_path / "run") for number in (0, 1)])
    assert first[0] == 0 and second[0] == 0, first[1] + second[1]
    assert "TP 2 x PP 1 x DP 1 on 2 ranks" in first[1] and "training finished at step 6" in first[1]
    assert "step" not in second[1], f"only rank 0 reports:\n{second[1]}"
    assert (tmp_path / "run" / "checkpoint" / "step_0000006" / "manifest.json").exists()


def test_a_mistake_on_one_machine_ends_both(tmp_path: Path) -> None:
    """The second machine was started with another seed: both leave, with the reason and both values."""
    port = free_port()
    processes = [machine(0, port, tmp_path / "run"), machine(1, port, tmp_path / "run", "--seed", "7")]
    for code, text in outputs(processes):
        assert code != 0 and "first failure: rank" in text, text
        assert "was started with seed 7" in text and "rank 0 with 1234" in text, text
