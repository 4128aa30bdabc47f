"""The benchmark's harness: our program measured at tiny sizes, turns in order, and nothing that did not run counted as run."""

import json
import math
import sys
from pathlib import Path

import pytest

from benchmarks import limits, train_parallel, train_step
from benchmarks.ours import configuration, micro_batches
from benchmarks.parts import comparisons_in
from benchmarks.programs import Program, interleave
from benchmarks.report import Comparison, comparison_table, plot, save
from benchmarks.run import Part, read_part, write_results
from benchmarks.train_step import comparisons, peer_configurations, require_equal_models
from benchmarks.workload import Workload
from megatron_llm.data.mock import MockDataset
from megatron_llm.parallel.groups import single_process_groups
from megatron_llm.training.flops import flops_per_token

TINY = Workload(hidden=32, layers=2, heads=2, ffn=48, vocabulary=96, length=16, sequences=4, micro=2)
FAKE = """
import json, sys
from benchmarks.protocol import claim_stdout, serve
settings = json.loads(sys.argv[2])
answers = claim_stdout()
print("chatter of a library")
if settings.get("broken"):
    raise ValueError("no such device")

def step():
    with open(settings["order"], "a") as file:
        file.write(settings["name"])
    return 1.5

serve(step, {"parameters": settings.get("parameters", 0)}, answers)
"""


def fake(folder: Path, name: str, **settings: object) -> Program:
    """A program that notes its turns in the file `order`."""
    (folder / "fake_program.py").write_text(FAKE)
    chosen = {"threads": 1, "name": name, "order": str(folder / "order"), **settings}
    return Program(name, sys.executable, "fake_program", chosen, role="ours" if name == "a" else "peer")


def test_programs_take_turns_and_failures_keep_their_reason(tmp_path: Path) -> None:
    programs = [fake(tmp_path, "a"), fake(tmp_path, "b"), fake(tmp_path, "c", broken=True)]
    programs.append(Program("d", str(tmp_path / "absent" / "python"), "fake_program", {"threads": 1}))
    said: list[str] = []
    found = interleave(programs, TINY, rounds=3, warmup=2, folder=tmp_path, say=said.append)
    assert (tmp_path / "order").read_text() == "aabb" + "ab" * 3
    assert [len(series.seconds) for series in found] == [3, 3, 0, 0]
    assert [series.failure for series in found[:2]] == [None, None]
    assert found[2].failure == "ValueError: no such device"
    assert "no environment at" in str(found[3].failure)
    assert found[0].first_losses == [1.5, 1.5]
    rows = comparisons("part", "work", found, TINY)
    assert [row.ratio is not None for row in rows] == [True, False, False]
    assert comparison_table(rows).count("not run: ") == 2


def test_a_model_of_another_size_is_not_compared(tmp_path: Path) -> None:
    found = interleave([fake(tmp_path, "b", parameters=7)], TINY, rounds=1, warmup=0, folder=tmp_path, say=lambda line: None)
    with pytest.raises(ValueError, match="b has 7 parameters"):
        require_equal_models(found, TINY)


def test_the_workload_is_what_the_project_computes() -> None:
    config = configuration(TINY, ["--bf16"], 1)
    assert TINY.flops == flops_per_token(config.model, TINY.length, gated_mlp=True) * TINY.tokens
    batches = micro_batches(TINY, single_process_groups())
    dataset = MockDataset(vocab_size=TINY.vocabulary, seq_length=TINY.length, samples=4, seed=TINY.seed)
    rows = [row.tolist() for batch in batches for row in batch.tokens]
    assert rows == [dataset[index].tokens.tolist() for index in range(4)]


def test_ours_alone_writes_a_stamped_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "step.json"
    work = ["--work", TINY.to_json(), "--rounds", "2", "--no-peers", "--json", str(path)]
    train_step.main(["--precision", "fp32", "--threads", "1", "--ours", "", *work])
    document = json.loads(path.read_text())
    series, peak = document["measured"][0]["series"]
    assert peak["name"] == "matrix products alone" and document["measured"][0]["peak_flops"] == peak["flops"] / peak["median_s"] > 0
    assert document["comparisons"] == []  # without a peer there is nothing to compare with
    assert series["parameters"] == TINY.parameters
    first, last = series["first_losses"][0], series["first_losses"][-1]
    assert last < first < math.log(TINY.vocabulary) + 0.2
    assert len(series["seconds"]) == 2 and series["median_s"] > 0 and series["peak_rss_bytes"] > 1e6
    assert {"commit", "cpu", "torch", "time"} <= set(document["stamp"])
    assert "ours, no flags" in capsys.readouterr().out


def test_two_processes_give_the_losses_of_one(tmp_path: Path) -> None:
    two = train_parallel.ours("tp2", ())[0]
    one = train_parallel.one_process(TINY)
    found = interleave([one, two], TINY, rounds=1, warmup=3, folder=tmp_path, say=lambda line: None)
    assert [series.failure for series in found] == [None, None]
    single, split = ([loss for loss in series.first_losses if loss is not None] for series in found)
    assert split == pytest.approx(single, rel=2e-3)
    require_equal_models(found, TINY)
    (row,) = comparisons("part", "work", found, TINY)
    assert row.peer == "ours, one process of 2 threads" and row.ratio == found[0].median / found[1].median and row.share is None


def test_every_peer_is_tried_in_every_precision(tmp_path: Path) -> None:
    groups = peer_configurations("bf16", 2, tmp_path, everything=False)
    assert len(groups) == 4 and all(len(programs) == 2 for programs in groups.values())
    assert {program.settings["precision"] for programs in groups.values() for program in programs} == {"bf16", "autocast"}


def test_ratios_say_how_many_times_better() -> None:
    seconds = Comparison("part", "work", "s", "peer", ours=2.0, theirs=3.0)
    rate = Comparison("part", "work", "MB/s", "peer", ours=2.0, theirs=3.0, lower_is_better=False)
    missing = Comparison("part", "work", "s", "peer", ours=2.0, not_run="it is not installed")
    assert seconds.ratio == 1.5
    assert rate.ratio == pytest.approx(2 / 3)
    assert missing.ratio is None


def test_results_are_merged_and_drawn(tmp_path: Path) -> None:
    one = Comparison("kernels", "softmax", "ms", "torch", ours=1.0, theirs=2.0, share=0.5)
    save(tmp_path / "kernels.json", "kernels", [one], more=1)
    part = read_part("kernels", json.loads((tmp_path / "kernels.json").read_text()), "| a |\n")
    assert part.comparisons == [one] and part.failure is None
    silent = read_part("pipeline", {"something": 1}, "")
    assert silent.failure == "its file has no list of comparisons"
    write_results(tmp_path, [part, silent, Part("limits", failure="no disk")], {"cpu": "c", "cores": 1, "torch": "t", "commit": "x"})
    document = json.loads((tmp_path / "bench.json").read_text())
    assert document["comparisons"][0]["ratio"] == 2.0
    assert document["parts"]["limits"] == {"not_run": "no disk"}
    report = (tmp_path / "bench.md").read_text()
    assert "| softmax | torch | ms | 1 | 2 | 2.00 | 50% |" in report and "- limits: not run: no disk" in report
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert not plot([], tmp_path / "empty.png", "nothing")


def test_rows_of_the_parts_become_comparisons() -> None:
    row = {"name": "norm", "dtype": "bf16", "threads": 1, "ours": 2.0, "eager": 6.0, "compiled": None}
    assert [one.ratio for one in comparisons_in("kernels", [row]) or []] == [3.0]
    run = {"megabytes": 10.0, "seconds": 2.0}
    text = comparisons_in("preprocess", {"ours": [run], "megatron": [{**run, "seconds": 20.0}]}) or []
    assert [one.ratio for one in text] == [10.0, None, None] and text[1].not_run == "it is not installed here"
    saved = {"megabytes": 10.0, "layout": "TP 1", "form": "hf", "save": 2.0, "disk": 10.0, "ratio": 0.5, "stall": 0.1}
    read = {"form": "hf", "megabytes": 10.0, "rate": 8.0, "disk": 16.0, "ratio": 0.5}
    files = comparisons_in("checkpoint", {"saves": [saved], "loads": [read]}) or []
    assert [one.ratio for one in files] == pytest.approx([0.5, 20.0, 0.5])
    assert comparisons_in("pipeline", {"comparisons": []}) == []
    assert comparisons_in("pipeline", {}) is None


def test_limits_are_measured(tmp_path: Path) -> None:
    found = limits.measure(tmp_path, quick=True)
    assert all(value > 0 for values in found.values() for value in values.values())
    assert set(found) == {"matmul_flops", "memory_bytes_per_s", "disk_bytes_per_s", "all_reduce_bytes_per_s"}
