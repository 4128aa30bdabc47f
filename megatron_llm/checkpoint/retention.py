"""Which checkpoints to keep: the last N, every K steps, the best; and the removal of the others.

Only complete checkpoints are counted, so a damaged one never takes the place of a good one, and the newest complete
one is kept whatever the settings. Removal starts with a rename: a half-removed folder has a name nobody loads. What comes
after it has time, and takes some: a file system may wait for the disk while it frees the space of large files.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_llm.checkpoint.durable import set_aside
from megatron_llm.checkpoint.manifest import DELETED, REPLACED, TEMPORARY, DamagedCheckpoint, Manifest, parse_step, read_manifest, step_name


@dataclass(frozen=True)
class Retention:
    """Keep the newest `last` checkpoints (0: all), every multiple of `every` steps, and the lowest validation loss."""

    last: int = 3
    every: int | None = None
    best: bool = True

    def kept(self, saved: Sequence[Manifest]) -> set[int]:
        """Sequence numbers of the checkpoints to keep, of those in `saved`."""
        newest_first = sorted((manifest.sequence for manifest in saved), reverse=True)
        if self.last == 0:
            return set(newest_first)
        kept = set(newest_first[: self.last])
        if self.every:
            kept |= {manifest.sequence for manifest in saved if manifest.step % self.every == 0}
        scored = [(manifest.validation_loss, -manifest.sequence) for manifest in saved if _comparable(manifest.validation_loss)]
        if self.best and scored:
            kept.add(-min(scored)[1])  # of equal losses the newest
        return kept


def _comparable(loss: float | None) -> bool:
    return loss is not None and loss == loss  # not a number is no record


def complete_checkpoints(root: Path) -> dict[Path, Manifest]:
    """The checkpoints under a root whose manifest is whole, by folder. Their files are not read."""
    found = {}
    for path in sorted(root.iterdir()):
        named = parse_step(path.name)
        if named and named[1] == "":
            try:
                found[path] = read_manifest(path)
            except DamagedCheckpoint:
                continue  # left for people to look at; loading says what is wrong with it
    return found


def apply_retention(root: Path, policy: Retention, known: dict[Path, Manifest]) -> tuple[list[Path], list[Path]]:
    """Set the checkpoints in `known` aside that the policy does not keep. Called right after a save succeeded.

    Returns them, and all folders that are now to be removed (`durable.remove_folder`). Among these is also what killed saves
    and removals left behind (one run writes into a root, so nothing else is under way). `known` holds the complete
    checkpoints under the root and is brought up to date. Damaged folders stay.
    """
    doomed = []
    for path in sorted(root.iterdir()):
        named = parse_step(path.name)
        if named and (named[1] in (TEMPORARY, DELETED) or (named[1] == REPLACED and (root / step_name(named[0])).exists())):
            doomed.append(set_aside(path))
    kept = policy.kept(list(known.values()))
    removed = [path for path, manifest in known.items() if manifest.sequence not in kept]
    for path in removed:
        del known[path]
        if path.exists():
            doomed.append(set_aside(path))
    return removed, doomed
