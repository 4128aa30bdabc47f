"""What the ranks tell each other around a save or a load: small JSON values and whether all went well.

Only JSON travels, as bytes in tensors on the groups' device, so it works on gloo and NCCL and unpickles nothing. What is
short goes along with its size: one collective instead of two.
`agree` is what keeps a failure on one rank from becoming a hang on the others: every rank learns of it and raises.
"""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from megatron_llm.parallel.comm import all_gather_first_dim, broadcast
from megatron_llm.parallel.groups import Group, ParallelGroups
from megatron_llm.utils.errors import UserError

T = TypeVar("T")
_SHORT = 504  # bytes of a first message besides the eight of the size


def gather_json(value: Any, groups: ParallelGroups, group: Group | None = None) -> list[Any]:
    """The value of every rank of `group` (the world), in its order, on each of them. Collective over that group."""
    group = group if group is not None else groups.world
    if group.size == 1:
        return [value]
    data = json.dumps(value).encode()
    rows = _gather(_first(data), groups, group)
    sizes = [_size(row) for row in rows]
    if max(sizes) > _SHORT:
        rest = _gather(data[_SHORT:].ljust(max(sizes) - _SHORT, b" "), groups, group)
        rows = [row + more for row, more in zip(rows, rest, strict=True)]
    return [json.loads(row[8 : 8 + size]) for row, size in zip(rows, sizes, strict=True)]


def share_json(value: Any, groups: ParallelGroups) -> Any:
    """Rank 0's value on every rank; what the others pass is not looked at. Collective over the world."""
    if groups.world.size == 1:
        return value
    data = json.dumps(value).encode()
    row = _spread(_first(data), groups)
    size = _size(row)
    if size > _SHORT:
        row += _spread(data[_SHORT:] if groups.world.rank == 0 else bytes(size - _SHORT), groups)
    return json.loads(row[8 : 8 + size])


def _first(data: bytes) -> bytes:
    """The first message: how long the text is, and as much of it as has room."""
    return len(data).to_bytes(8, "little") + data[:_SHORT].ljust(_SHORT, b" ")


def _size(row: bytes) -> int:
    return int.from_bytes(row[:8], "little")


def _gather(data: bytes, groups: ParallelGroups, group: Group) -> list[bytes]:
    """As many bytes from every rank."""
    mine = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(groups.device)
    rows = all_gather_first_dim(mine, group).view(group.size, -1).cpu()
    return [row.numpy().tobytes() for row in rows]


def _spread(data: bytes, groups: ParallelGroups) -> bytes:
    """Rank 0's bytes, as many as those given, on every rank."""
    mine = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(groups.device)
    return broadcast(mine, groups.world).cpu().numpy().tobytes()


def attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """Run `work` and return its result or its error, for the caller to exchange with the other ranks and raise."""
    try:
        return work(), None
    except Exception as error:  # noqa: BLE001 - kept, told to all ranks and raised by `agree`
        return None, error


def agree(error: Exception | None, doing: str, groups: ParallelGroups, also: Any = None) -> list[Any]:
    """Raise on every rank when any rank brings an error: its own there, a UserError naming the culprit elsewhere.

    `doing` completes the sentence: `rank 3 (...) failed while <doing>: <its error>`. Returns the JSON value `also` of every
    rank, in order. Collective over the world.
    """
    rows = gather_json([None if error is None else describe_error(error), also], groups)
    if error is not None:
        raise error
    for rank, (text, _) in enumerate(rows):
        if text is not None:
            raise UserError(f"{groups.grid.describe(rank)} failed while {doing}: {text}")
    return [value for _, value in rows]


def describe_error(error: Exception) -> str:
    """One line for another rank: the sentence of a UserError, otherwise the kind of error and its text."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
