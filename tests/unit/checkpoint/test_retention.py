"""Which checkpoints stay: last N, every K, best; the newest always does."""

from pathlib import Path

import pytest

from megatron_llm.checkpoint.durable import remove_folder
from megatron_llm.checkpoint.manifest import Manifest, parse_step, step_name, write_manifest
from megatron_llm.checkpoint.retention import Retention, apply_retention, complete_checkpoints


def saves(*steps: int, losses: dict[int, float] | None = None) -> list[Manifest]:
    return [Manifest(step, n, {}, {}, validation_loss=(losses or {}).get(step)) for n, step in enumerate(steps, start=1)]


def kept_steps(policy: Retention, manifests: list[Manifest]) -> list[int]:
    kept = policy.kept(manifests)
    return [manifest.step for manifest in manifests if manifest.sequence in kept]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Retention(last=2, every=None, best=False), [40, 50]),
        (Retention(last=1, every=20, best=False), [20, 40, 50]),
        (Retention(last=1, every=None, best=True), [30, 50]),
        (Retention(last=2, every=20, best=True), [20, 30, 40, 50]),
        (Retention(last=0), [10, 20, 30, 40, 50]),
        (Retention(last=9, every=None, best=False), [10, 20, 30, 40, 50]),
    ],
)
def test_policies(policy: Retention, expected: list[int]) -> None:
    manifests = saves(10, 20, 30, 40, 50, losses={10: 3.0, 20: 2.5, 30: 2.0, 40: 2.2})
    assert kept_steps(policy, manifests) == expected


def test_after_going_back_the_latest_saves_count_not_the_highest_steps() -> None:
    assert kept_steps(Retention(last=2, best=False), saves(100, 200, 300, 150, 175)) == [150, 175]


def test_a_loss_that_is_no_number_is_never_the_best() -> None:
    assert kept_steps(Retention(last=1), saves(1, 2, 3, losses={1: float("nan"), 2: 5.0})) == [2, 3]


def test_removal_leaves_no_trace_and_keeps_what_is_damaged(tmp_path: Path) -> None:
    for manifest in saves(1, 2, 3, 4):
        folder = tmp_path / step_name(manifest.step)
        folder.mkdir()
        write_manifest(folder, manifest)
    (tmp_path / step_name(2) / "manifest.json").write_text("{}")  # damaged: neither counted nor removed
    for left_behind in ("9.tmp", "8.deleted", "6.tmp.deleted", "3.replaced", "7.replaced"):
        left_behind = f"step_000000{left_behind}"
        (tmp_path / left_behind).mkdir()
    (tmp_path / "notes").mkdir()
    known = complete_checkpoints(tmp_path)
    removed, doomed = apply_retention(tmp_path, Retention(last=2, best=False), known)
    assert [path.name for path in removed] == ["step_0000001"]
    assert all(parse_step(path.name)[1] == ".deleted" for path in doomed)  # type: ignore[index]
    for path in doomed:
        remove_folder(path)
    # step_0000007.replaced is the only copy of step 7: a save was killed between its two renames
    expected = ["notes", "step_0000002", "step_0000003", "step_0000004", "step_0000007.replaced"]
    assert sorted(path.name for path in tmp_path.iterdir()) == expected
    assert sorted(path.name for path in known) == ["step_0000003", "step_0000004"]
