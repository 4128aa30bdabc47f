"""The newest complete checkpoint is found; damage of any kind is seen, named and passed over."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_llm.checkpoint.checkpointer import Checkpointer
from megatron_llm.checkpoint.entries import Entry
from megatron_llm.checkpoint.find import find_latest, load_newest
from megatron_llm.checkpoint.load import load_entries, load_state
from megatron_llm.parallel.groups import single_process_groups
from megatron_llm.utils.errors import UserError

GROUPS = single_process_groups()
DATA = "rank_00000.safetensors"


def make(root: Path, *steps: int) -> None:
    checkpointer = Checkpointer(root, GROUPS, keep_last=0)
    for step in steps:
        checkpointer.save(step, [Entry("w", (50,), (0,), torch.arange(50.0) + step)], {"step": step})


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit in the header": (lambda folder: flip(folder / DATA, 20), f"{DATA} does not match its digest"),
    "bit in the tensors": (lambda folder: flip(folder / DATA, -3), f"{DATA} does not match its digest"),
    "bit in the manifest": (lambda folder: flip(folder / "manifest.json", 30), "manifest.json does not match its digest"),
    "truncated": (lambda folder: truncate(folder / DATA), f"{DATA} has "),
    "missing file": (lambda folder: (folder / DATA).unlink(), f"{DATA} is missing"),
    "missing manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
    "empty folder": (lambda folder: [path.unlink() for path in folder.iterdir()], "manifest.json is missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_one_before_is_taken(tmp_path: Path, kind: str) -> None:
    make(tmp_path, 10, 20)
    damage, text = DAMAGE[kind]
    damage(tmp_path / "step_0000020")
    lines: list[str] = []
    assert find_latest(tmp_path, lines.append) == tmp_path / "step_0000010"
    assert len(lines) == 1
    assert f"skipped step_0000020 ({text}" in lines[0] and f"loading {tmp_path / 'step_0000010'}" in lines[0]


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_asked_for_by_name_is_an_error(tmp_path: Path, kind: str) -> None:
    make(tmp_path, 10, 20)
    damage, text = DAMAGE[kind]
    damage(tmp_path / "step_0000020")
    with pytest.raises(UserError, match=f"no complete checkpoint in .*step_0000020 .*{text}"):
        find_latest(tmp_path / "step_0000020", print)


def loaded_weight(root: Path, lines: list[str]) -> torch.Tensor | None:
    """The weight of the newest checkpoint, verified while it is read."""
    target = torch.zeros(50)

    def load(path: Path) -> torch.Tensor:
        load_entries(path, [Entry("w", (50,), (0,), target)], verify=True)
        return target

    return load_newest(root, GROUPS, load, lines.append)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_found_while_loading_leads_to_the_one_before(tmp_path: Path, kind: str) -> None:
    make(tmp_path, 10, 20)
    DAMAGE[kind][0](tmp_path / "step_0000020")
    lines: list[str] = []
    weight = loaded_weight(tmp_path, lines)
    assert weight is not None and torch.equal(weight, torch.arange(50.0) + 10)
    assert "skipped step_0000020 (" in lines[-1] and f"loading {tmp_path / 'step_0000010'}" in lines[-1]
    with pytest.raises(UserError, match=r"no complete checkpoint in .*step_0000020 .*to start afresh"):
        loaded_weight(tmp_path / "step_0000020", [])


def test_when_loading_finds_all_damaged_it_does_not_start_afresh(tmp_path: Path) -> None:
    make(tmp_path, 10, 20)
    for step in ("10", "20"):
        flip(tmp_path / f"step_00000{step}" / DATA, -1)
    lines: list[str] = []
    with pytest.raises(UserError, match=r"step_0000020 .*digest.*; step_0000010 .*digest.*to start afresh"):
        loaded_weight(tmp_path, lines)
    assert [line.split("loading ")[1][-12:] for line in lines] == ["step_0000020", "step_0000010"]


def test_nothing_to_load_is_none_and_other_errors_pass(tmp_path: Path) -> None:
    assert loaded_weight(tmp_path / "absent", []) is None
    make(tmp_path, 10, 20)

    def refuse(path: Path) -> None:
        raise UserError(f"{path.name} is of another family")

    with pytest.raises(UserError, match="step_0000020 is of another family"):
        load_newest(tmp_path, GROUPS, refuse, print)


def test_small_files_are_verified_before_loading(tmp_path: Path) -> None:
    for step in (1, 2):
        Checkpointer(tmp_path, GROUPS, form="hf").save(
            step, [Entry("w", (50,), (0,), torch.ones(50))], {}, documents={"config.json": {"a": step}}
        )
    flip(tmp_path / "step_0000002" / "config.json", 5)
    lines: list[str] = []
    assert loaded_weight(tmp_path, lines) is not None
    assert len(lines) == 1 and "skipped step_0000002 (config.json does not match its digest" in lines[0]


def test_when_all_are_damaged_it_does_not_start_afresh_silently(tmp_path: Path) -> None:
    make(tmp_path, 10, 20)
    for step in ("10", "20"):
        flip(tmp_path / f"step_00000{step}" / DATA, -1)
    with pytest.raises(UserError, match=r"step_0000020 .*; step_0000010 .*to start afresh"):
        find_latest(tmp_path, print)


def test_an_unfinished_save_is_passed_over_with_a_line(tmp_path: Path) -> None:
    make(tmp_path, 10)
    (tmp_path / "step_0000020.tmp").mkdir()
    (tmp_path / "step_0000005.deleted").mkdir()
    lines: list[str] = []
    assert find_latest(tmp_path, lines.append) == tmp_path / "step_0000010"
    assert lines == [f"checkpoint: skipped step_0000020.tmp (its save was not finished); loading {tmp_path / 'step_0000010'}"]


def test_only_an_unfinished_save_is_a_fresh_start_with_a_line(tmp_path: Path) -> None:
    (tmp_path / "step_0000020.tmp").mkdir()
    lines: list[str] = []
    assert find_latest(tmp_path, lines.append) is None
    assert "step_0000020.tmp (its save was not finished); there is no complete one" in lines[0]
    with pytest.raises(UserError, match="unfinished save"):
        find_latest(tmp_path / "step_0000020.tmp", print)


@pytest.mark.parametrize("exists", [True, False])
def test_nothing_there_is_none(tmp_path: Path, exists: bool) -> None:
    assert find_latest(tmp_path if exists else tmp_path / "absent", print) is None


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(UserError, match="not a folder"):
        find_latest(tmp_path / "x", print)


def test_newest_means_saved_last(tmp_path: Path) -> None:
    make(tmp_path, 100, 200, 300)
    make(tmp_path, 150)  # went back to 100 and trained on
    assert find_latest(tmp_path, print) == tmp_path / "step_0000150"


def test_a_crash_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path: Path) -> None:
    make(tmp_path, 10, 20)
    (tmp_path / "step_0000020").rename(tmp_path / "step_0000020.replaced")
    found = find_latest(tmp_path, print)
    assert found == tmp_path / "step_0000020.replaced"
    assert load_state(found) == {"step": 20}
    make(tmp_path, 20)
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_0000010", "step_0000020"]
    assert find_latest(tmp_path, print) == tmp_path / "step_0000020"
