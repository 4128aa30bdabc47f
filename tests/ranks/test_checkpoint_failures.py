"""One rank cannot write: every rank hears of it, none hangs, the former checkpoint is as it was, and saving can go on."""

import errno
import time
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import pytest
import torch

from megatron_llm.checkpoint import checkpointer as checkpointer_module
from megatron_llm.checkpoint import pieces
from megatron_llm.checkpoint import save as save_module
from megatron_llm.checkpoint.checkpointer import Checkpointer
from megatron_llm.checkpoint.entries import Entry
from megatron_llm.checkpoint.find import choose_checkpoint, find_latest, load_newest
from megatron_llm.checkpoint.load import load_entries
from megatron_llm.parallel.groups import ParallelGroups
from megatron_llm.testing.ranks import run_ranks
from megatron_llm.utils.errors import UserError


def entries(groups: ParallelGroups, value: float) -> list[Entry]:
    """A tensor of which each rank owns four rows."""
    tensor = torch.full((4, 3), value + groups.rank)
    return [Entry("w", (4 * groups.world.size, 3), (4 * groups.rank, 0), tensor)]


def whole_and_state(groups: ParallelGroups, value: float) -> list[Entry]:
    """A weight split over the tensor-parallel ranks, which the replicas hold alike, and optimizer state split over all."""
    weight = torch.full((4, 3), value + groups.tp.rank)
    start = (4 * groups.tp.rank, 0)
    state = Entry("optimizer.exp_avg.w", (4 * groups.world.size, 3), (4 * groups.world.rank, 0), torch.full((4, 3), value))
    return [Entry("w", (4 * groups.tp.size, 3), start, weight, owned=groups.dp.rank == 0), state]


def refusing(code: int) -> Any:
    """A disk that refuses every piece."""

    def write_piece(writer: pieces.PieceWriter, number: int, data: memoryview) -> None:
        raise OSError(code, "No space left on device" if code == errno.ENOSPC else "Input/output error")

    return write_piece


def save_with_one_bad_disk(
    groups: ParallelGroups, root: str, bad_rank: int, code: int, form: Literal["sharded", "hf"], async_save: bool
) -> tuple[str, list[str]]:
    """Save 1, fail to save 2 on one rank, save 3; returns what this rank was told, and the folder after the failure."""
    checkpointer = Checkpointer(root, groups, async_save=async_save, form=form)
    make = entries if form == "sharded" else whole_and_state
    checkpointer.save(1, make(groups, 1.0), {"step": 1})
    checkpointer.wait()
    write_piece = pieces.PieceWriter._write_piece
    with mock.patch.object(pieces.PieceWriter, "_write_piece", refusing(code) if groups.rank == bad_rank else write_piece):
        try:
            checkpointer.save(2, make(groups, 2.0), {"step": 2})
            checkpointer.wait()
            told = ""
        except UserError as error:
            told = str(error)
    torch.distributed.barrier()
    names = sorted(path.name for path in Path(root).iterdir())
    torch.distributed.barrier()
    checkpointer.save(3, make(groups, 3.0), {"step": 3})
    checkpointer.wait()
    return told, names


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("bad_rank", [0, 2])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["full", "broken"])
@pytest.mark.parametrize("form", ["sharded", "hf"])
def test_a_rank_that_cannot_write(tmp_path: Path, bad_rank: int, code: int, form: str, async_save: bool) -> None:
    outcomes = run_ranks(save_with_one_bad_disk, str(tmp_path), bad_rank, code, form, async_save, tp=2, pp=1, dp=2, timeout=30.0)
    sentence = "no space left to save step 2" if code == errno.ENOSPC else "cannot save step 2"
    for rank, (told, names) in enumerate(outcomes):
        assert sentence in told
        assert (f"rank {bad_rank} (tp 0, dp {bad_rank // 2}, pp 0) failed while saving step 2: " in told) == (rank != bad_rank)
        assert names == ["latest", "step_0000001"]
    assert find_latest(tmp_path, print) == tmp_path / "step_0000003"


def save_with_a_bad_commit(groups: ParallelGroups, root: str, async_save: bool) -> str:
    checkpointer = Checkpointer(root, groups, async_save=async_save)
    with mock.patch.object(save_module, "write_manifest", side_effect=OSError(errno.ENOSPC, "No space left on device")):
        try:
            checkpointer.save(1, entries(groups, 1.0), {})
            checkpointer.wait()
        except UserError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
def test_a_commit_that_fails_on_rank_0_is_told_to_all(tmp_path: Path, async_save: bool) -> None:
    told = run_ranks(save_with_a_bad_commit, str(tmp_path), async_save, tp=3, timeout=30.0)
    assert all("no space left to save step 1" in text for text in told)
    assert told[1].startswith("rank 0 (tp 0, dp 0, pp 0) failed while saving step 1: ")
    assert list(tmp_path.iterdir()) == []


def save_with_a_bad_copy(groups: ParallelGroups, root: str) -> tuple[str, list[str]]:
    """Rank 1 cannot copy its tensors; then all save again."""
    checkpointer = Checkpointer(root, groups, async_save=True)
    with mock.patch.object(checkpointer_module, "copy_entries", side_effect=MemoryError("no pages") if groups.rank == 1 else None):
        checkpointer.save(1, entries(groups, 1.0), {})
        checkpointer.settle()
        try:
            checkpointer.wait()
            told = ""
        except (UserError, MemoryError) as error:
            told = f"{type(error).__name__}: {error}"
    torch.distributed.barrier()
    names = sorted(path.name for path in Path(root).iterdir())
    torch.distributed.barrier()
    checkpointer.save(2, entries(groups, 2.0), {})
    checkpointer.wait()
    return told, names


def test_a_copy_that_fails_on_one_rank_is_told_to_all(tmp_path: Path) -> None:
    (first, names), (second, _) = run_ranks(save_with_a_bad_copy, str(tmp_path), dp=2, timeout=30.0)
    assert first == "UserError: rank 1 (tp 0, dp 1, pp 0) failed while saving step 1: MemoryError: no pages"
    assert second == "MemoryError: no pages"
    assert names == []
    assert find_latest(tmp_path, print) == tmp_path / "step_0000002"


def save_where_rank_1_sees_another_disk(groups: ParallelGroups, root: str) -> str:
    """Rank 1 has a folder of the same name on a disk of its own."""
    mine = Path(root) / ("a" if groups.rank == 0 else "b")
    with mock.patch.object(checkpointer_module, "_VISIBILITY_SECONDS", 0.2):
        try:
            Checkpointer(mine, groups).save(1, entries(groups, 1.0), {})
        except UserError as error:
            return str(error)
    return ""


def test_a_folder_that_is_not_shared_is_a_sentence(tmp_path: Path) -> None:
    told = run_ranks(save_where_rank_1_sees_another_disk, str(tmp_path), dp=2, timeout=30.0)
    assert all("--save must be a folder that all machines share" in text for text in told)


def late_rank(groups: ParallelGroups, root: str) -> tuple[float, bool]:
    """Rank 1 writes half a second late: the background save returns at once everywhere and completes in `wait`."""
    checkpointer = Checkpointer(root, groups, async_save=True)
    real = checkpointer_module.write_rank

    def slow(*args: Any) -> None:
        time.sleep(0.5 if groups.rank == 1 else 0.0)
        real(*args)

    with mock.patch.object(checkpointer_module, "write_rank", slow):
        start = time.monotonic()
        path = checkpointer.save(1, entries(groups, 1.0), {})
        seconds = time.monotonic() - start
        complete = path.exists()
        checkpointer.wait()
    assert path.exists()
    return seconds, complete


def test_a_background_save_does_not_wait_for_the_slowest(tmp_path: Path) -> None:
    for seconds, complete in run_ranks(late_rank, str(tmp_path), tp=2, timeout=30.0):
        assert seconds < 0.4 and not complete


def stale(groups: ParallelGroups, root: str) -> list[float]:
    """What a killed save of the same step left behind must not be taken for this one's."""
    Checkpointer(root, groups).save(1, entries(groups, 5.0), {})
    target = torch.zeros(4 * groups.world.size, 3)
    load_entries(Path(root) / "step_0000001", [Entry("w", tuple(target.shape), (0, 0), target)], groups)
    return target[:, 0].tolist()


def test_leftovers_of_a_killed_save_are_not_mixed_in(tmp_path: Path) -> None:
    run_ranks(save_other, str(tmp_path), tp=2)
    (tmp_path / "step_0000001").rename(tmp_path / "step_0000001.tmp")
    assert run_ranks(stale, str(tmp_path), tp=2) == [[5.0] * 4 + [6.0] * 4] * 2


def save_other(groups: ParallelGroups, root: str) -> None:
    Checkpointer(root, groups).save(1, entries(groups, 50.0), {})


def choose(groups: ParallelGroups, root: str) -> tuple[str, list[str]]:
    lines: list[str] = []
    return str(choose_checkpoint(root, groups, lines.append)), lines


def test_damage_seen_by_one_rank_is_told_to_all(tmp_path: Path) -> None:
    """Each rank checks some of the files; the damaged one is not rank 0's."""
    for step in (1, 2):
        run_ranks(save_step, str(tmp_path), step, tp=3)
    file = tmp_path / "step_0000002" / "rank_00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    outcomes = run_ranks(choose, str(tmp_path), tp=3)
    assert [path for path, _ in outcomes] == [str(tmp_path / "step_0000001")] * 3
    assert "skipped step_0000002 (rank_00001.safetensors does not match its digest" in outcomes[0][1][0]
    assert outcomes[1][1] == outcomes[2][1] == []


def save_step(groups: ParallelGroups, root: str, step: int) -> None:
    Checkpointer(root, groups).save(step, entries(groups, float(step)), {})


def load_halves(groups: ParallelGroups, root: str) -> tuple[list[float], list[str]]:
    """Each rank loads rows of its own, verified while they are read."""
    lines: list[str] = []
    mine = torch.zeros(4, 3)

    def load(path: Path) -> list[float]:
        load_entries(path, [Entry("w", (4 * groups.world.size, 3), (4 * groups.rank, 0), mine)], groups, verify=True)
        return [float(value) for value in mine[:, 0]]

    loaded = load_newest(root, groups, load, lines.append)
    assert loaded is not None
    return loaded, lines


def test_damage_that_one_rank_reads_takes_all_to_the_one_before(tmp_path: Path) -> None:
    for step in (1, 2):
        run_ranks(save_step, str(tmp_path), step, tp=3)
    file = tmp_path / "step_0000002" / "rank_00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    outcomes = run_ranks(load_halves, str(tmp_path), tp=3, timeout=30.0)
    assert [values for values, _ in outcomes] == [[1.0] * 4, [2.0] * 4, [3.0] * 4]
    assert "loading" in outcomes[0][1][0] and "skipped step_0000002 (rank_00001.safetensors does not match" in outcomes[0][1][1]
    assert outcomes[1][1] == outcomes[2][1] == []


def save_in_two_stages(groups: ParallelGroups, root: str) -> str:
    """A weight of which each pipeline stage holds a half: no rank could put it together from its own group."""
    half = Entry("w", (8, 3), (4 * groups.pp.rank, 0), torch.ones(4, 3))
    try:
        Checkpointer(root, groups, form="hf").save(1, [half], {})
    except ValueError as error:
        return str(error)
    return ""


def test_a_weight_that_cannot_be_put_together_is_told_to_all(tmp_path: Path) -> None:
    told = run_ranks(save_in_two_stages, str(tmp_path), pp=2, timeout=30.0)
    assert all("w: 12 elements are written where the tensor has 24" in text for text in told)
    assert list(tmp_path.iterdir()) == []
