"""The GPU benchmark's code, on the CPU at tiny sizes: it finishes, says what it measured, and says what did not run."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import bench, kernels
from benchmarks.gpu.waves import OUT_OF_TIME, Result, Turns, waves_of
from benchmarks.programs import Program
from benchmarks.workload import Workload
from megatron_llm.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
# Speaks the protocol of benchmarks/protocol.py without torch; the settings say how long a step takes and which one fails.
FAKE = """
import json, sys, time
settings = json.loads(sys.argv[2])
if settings.get("broken"):
    sys.exit("ModuleNotFoundError: No module named 'peer'")
print(json.dumps({"ready": True, "parameters": 1, "first_losses": [4.0, 3.5], "memory": 2**30}), flush=True)
for number, line in enumerate(sys.stdin):
    if line.strip() == "quit" or number == settings.get("dies_at"):
        sys.exit("Error: out of memory" if line.strip() == "step" else 0)
    time.sleep(settings["seconds"])
    print(json.dumps({"seconds": settings["seconds"], "cpu": 0.0, "loss": 3.0}), flush=True)
"""


@pytest.fixture
def turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Turns:
    """Four rounds, two programs at a time, with a fake program that the folder's name leads to."""
    (tmp_path / "fake_program.py").write_text(FAKE)
    monkeypatch.setattr("benchmarks.programs.ROOT", tmp_path)
    return Turns(bench.TINY["tiny"], rounds=4, alive=2, deadline=time.monotonic() + 60, folder=tmp_path, say=lambda text: None)


def fake(name: str, **settings: object) -> Program:
    """One configuration of the fake program."""
    return Program(name, sys.executable, "fake_program", {"threads": 1, "seconds": 0.01, **settings})


def test_waves_compare_with_the_anchor_and_keep_reasons(turns: Turns) -> None:
    programs = [fake("anchor"), fake("slow", seconds=0.04), fake("absent", broken=True), fake("dies", dies_at=2)]
    anchor, slow, absent, dies = turns.run(programs)
    assert len(anchor.seconds) == 12 and anchor.median == 0.01  # four rounds in each of three waves
    assert slow.median == 0.04 and slow.anchor_s == 0.01
    assert absent.not_run == "ModuleNotFoundError: No module named 'peer'"
    assert dies.not_run == "failed after 2 steps: Error: out of memory"
    about = {"matmul_flops": 1e12, "data_sheet_flops": 2e12}
    work: Workload = turns.work
    cells = bench.row(slow, work, about)
    assert cells[2] == "800" and cells[5:7] == ("1", "0.25")
    assert float(cells[3].rstrip("%")) == pytest.approx(float(cells[4].rstrip("%")) / 2, abs=0.1)
    assert bench.row(absent, work, about)[1].startswith("not run: ModuleNotFoundError")


def test_a_program_that_needs_the_memory_of_two_has_a_wave_to_itself() -> None:
    programs = [fake("anchor"), fake("a"), fake("large", alone=True), fake("b"), fake("c")]
    assert waves_of(programs, 2) == [[1, 3], [2], [4]]
    assert waves_of(programs[:1], 2) == []


def test_every_program_has_its_turn_once() -> None:
    found = bench.programs("cuda", tiny=False)
    names = [program.name for program in found]
    assert names[0] == "ours, compiled, fused" and len(names) == len(set(names)) == len(bench.OURS) + len(bench.TRANSFORMERS) + 1
    assert "megatron-core, local modules" in names[:4]


def test_waves_end_with_the_time_budget(turns: Turns) -> None:
    turns.deadline = time.monotonic() + 2.0
    began = time.monotonic()
    results = turns.run([fake("anchor"), fake("stuck", seconds=60), fake("late")])
    assert time.monotonic() - began < 30
    assert results[1].not_run == "it was not done when the time budget ran out"
    assert results[2].not_run == OUT_OF_TIME


def test_a_result_without_steps_is_not_run() -> None:
    assert bench.row(Result(fake("x"), not_run="why"), bench.TINY["tiny"], {"matmul_flops": 1.0})[1] == "not run: why"


def test_the_whole_benchmark_at_tiny_sizes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu.bench", "--device", "cpu", "--tiny", "--rounds", "2", "--minutes", "4"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    ours, liger, megatron, fp8 = found["training"]["tiny"]
    for row, steps in ((ours, 4), (fp8, 2)):  # the first program is in both waves
        assert len(row["seconds"]) == steps and row["memory"] > 0 and row["parameters"] == bench.TINY["tiny"].parameters
    assert fp8["first_losses"] == pytest.approx(ours["first_losses"], rel=2e-2) and fp8["first_losses"] != ours["first_losses"]
    assert "megatron-core is not installed" in megatron.get("not_run", "") or megatron["parameters"] == ours["parameters"]
    assert "not_run" in megatron or megatron["first_losses"] == pytest.approx(ours["first_losses"], rel=1e-1)
    assert "needs liger_kernel, which is not installed" in liger["not_run"] or liger["median_s"] > 0
    assert len(found["kernels"]["rows"]) == 7 and "GPUs" in found["kernels"]["triton_not_run"]
    text = (tmp_path / "gpu.md").read_text()
    assert text.strip() == done.stdout.strip() and "| ours, eager, torch |" in text


def test_every_operation_of_the_kernel_benchmark_runs() -> None:
    """With the plain forms of megatron_llm.kernels.reference, whose signatures the benchmark must follow."""
    made = kernels.make_operations(kernels.TINY, torch.device("cpu"), torch.bfloat16)
    assert {operation.function for operation in made} >= {"rms_norm", "rotary", "swiglu", "adamw_"}
    assert all(operation.megabytes > 0 for operation in made)
    rows = [
        kernels.measure(operation, {"torch": getattr(kernels.reference, operation.function)}, torch.device("cpu"), 1) for operation in made
    ]
    assert all(row["milliseconds"]["torch"] > 0 for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(UserError, match="found no CUDA device"):
        bench.main(["--minutes", "1"])
