"""kill -9 of ranks during saves, at random instants: the next start loads the newest complete checkpoint and says so.

Two ranks resume from whatever is there and save as fast as they can; random pauses between the steps of the protocol
spread the instants at which the kill can fall over all of them. All rounds work on one folder, so each start also has
to cope with what the kills before it left behind.
"""

import contextlib
import multiprocessing
import os
import random
import re
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist

from megatron_llm.checkpoint import checkpointer as checkpointer_module
from megatron_llm.checkpoint import durable, pieces
from megatron_llm.checkpoint import save as save_module
from megatron_llm.checkpoint.checkpointer import Checkpointer
from megatron_llm.checkpoint.entries import Entry
from megatron_llm.checkpoint.find import choose_checkpoint
from megatron_llm.checkpoint.load import load_entries, load_state
from megatron_llm.parallel.grid import Grid
from megatron_llm.parallel.groups import build_groups

RANKS = 2
Form = Literal["sharded", "hf"]


def held(rank: int, step: int) -> list[Entry]:
    """What rank `rank` holds at a step: half of each of two weights and of a moment, all elements equal to the step."""
    return [
        Entry("rows", (8, 3), (4 * rank, 0), torch.full((4, 3), float(step))),
        Entry("columns", (5, 6), (0, 3 * rank), torch.full((3, 5), float(step)).t()),
        Entry("optimizer.exp_avg.rows", (8, 3), (4 * rank, 0), torch.full((4, 3), float(step))),
    ]


def _stumble(seed: int) -> None:
    """Put a random pause before and after every step of the protocol, in this process only."""
    chance = random.Random(seed)

    def pausing(real: Any) -> Any:
        def step(*args: Any) -> Any:
            time.sleep(chance.random() * 0.004)
            result = real(*args)
            time.sleep(chance.random() * 0.004)
            return result

        return step

    for name in ("move_folder", "remove_folder", "replace_file", "write_manifest", "write_at_once", "flush", "prepare"):
        setattr(save_module, name, pausing(getattr(save_module, name)))
    checkpointer_module.copy_entries = pausing(checkpointer_module.copy_entries)
    pieces.PieceWriter._write_piece = pausing(pieces.PieceWriter._write_piece)  # type: ignore[method-assign]
    durable.shutil.rmtree = pausing(durable.shutil.rmtree)


def resume_and_save(rank: int, root: str, rendezvous: str, form: Form, async_save: bool, seed: int, report: Connection) -> None:
    """One rank of one start: load the newest complete checkpoint, say which, then save step after step until killed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what a rank says when its peer is killed is of no interest
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=20))
    groups = build_groups(Grid(tp=RANKS), torch.device("cpu"))
    lines: list[str] = []
    path = choose_checkpoint(root, groups, lines.append)
    step = 0
    if path is not None:
        step = load_state(path)["step"]
        entries = held(rank, -1)
        load_entries(path, entries, groups)
        assert all(entry.tensor.eq(float(step)).all() for entry in entries), f"step {step} holds other values"
    report.send((step, lines))
    _stumble(seed)
    checkpointer = Checkpointer(root, groups, keep_last=2, async_save=async_save, form=form)
    while True:
        step += 1
        checkpointer.save(step, held(rank, step), {"step": step}, documents={"config.json": {"step": step}})


def _complete_steps(root: Path) -> list[int]:
    """Steps of the folders with a final name, which is a promise that they are whole (also one being replaced)."""
    found = (re.fullmatch(r"step_(\d+)(\.replaced)?", path.name) for path in root.iterdir())
    return sorted(int(name[1]) for name in found if name)


def campaign(root: Path, scratch: Path, kills: int, form: Form, async_save: bool, seed: int) -> int:
    """Start, let it save for a random while, kill; again and again. Returns how many starts found an unfinished save."""
    chance = random.Random(seed)
    context = multiprocessing.get_context("forkserver")  # torch is imported once, ranks are forked from there
    context.set_forkserver_preload(["torch", "torch.distributed", __name__, "megatron_llm.checkpoint.checkpointer"])
    unfinished, window = 0, 0.35
    for round_number in range(kills + 1):
        expected, leftovers = _complete_steps(root)[-1:], sorted(path.name for path in root.glob("step_*.tmp"))
        pipes = [context.Pipe(duplex=False) for _ in range(RANKS)]
        rendezvous = scratch / f"rendezvous_{round_number}"
        processes = [
            context.Process(target=resume_and_save, args=(r, str(root), str(rendezvous), form, async_save, chance.random(), pipes[r][1]))
            for r in range(RANKS)
        ]
        for process in processes:
            process.start()
        try:
            answers = [receive(pipe[0], process) for pipe, process in zip(pipes, processes, strict=True)]
            window += 0.0 if _complete_steps(root) else 0.35  # on a busy machine a first save takes longer
            time.sleep(chance.random() * window)
            victims = chance.choice([processes[:1], processes[1:], processes])
            for process in victims:
                process.kill()
            time.sleep(chance.random() * 0.05)  # the survivor goes on for a moment, or finds its peer gone
        finally:
            for process in processes:
                process.kill()
                process.join()
        (step, lines), (other_step, no_lines) = answers
        assert step == other_step == (expected[0] if expected else 0)
        assert not no_lines and len(lines) == (1 if expected or leftovers else 0)
        assert all("manifest" not in line and "digest" not in line for line in lines), lines  # nothing is half there
        assert all(name in lines[0] for name in leftovers)
        assert not expected or re.search(rf"loading \S+step_{expected[0]:07d}", lines[0])
        unfinished += bool(leftovers)
    return unfinished


def receive(pipe: Connection, process: Any) -> tuple[int, list[str]]:
    """What a rank reports after loading."""
    assert pipe.poll(60), "a rank did not start"
    with contextlib.suppress(EOFError):
        answer: tuple[int, list[str]] = pipe.recv()
        return answer
    raise AssertionError(f"a rank failed while loading, exit code {process.exitcode}")


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("form", ["sharded", "hf"])
def test_killed_while_saving(tmp_path: Path, form: Form, async_save: bool) -> None:
    (tmp_path / "root").mkdir()
    campaign(tmp_path / "root", tmp_path, kills=6, form=form, async_save=async_save, seed=11)
    assert _complete_steps(tmp_path / "root"), "no save was ever completed: the test killed too early"


@pytest.mark.full
@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("form", ["sharded", "hf"])
def test_killed_while_saving_many_times(tmp_path: Path, form: Form, async_save: bool) -> None:
    (tmp_path / "root").mkdir()
    unfinished = campaign(tmp_path / "root", tmp_path, kills=100, form=form, async_save=async_save, seed=12)
    assert unfinished >= 20, f"only {unfinished} of 100 kills fell into a save"
