"""Weights of one model-parallel rank out of ZeRO's files, by the names the module has.

Up to stage 2 the 16-bit weights lie whole in the model file; stage 3 keeps none of them. The fp32 master copy is flat
either way. Stages 1 and 2 lay the parameters of a group one after the other, pad the end, and cut the whole into equal
partitions, one a rank; a parameter may begin in one partition and end in the next. Stage 3 cuts every parameter by
itself: ceil(n / ranks) elements a rank, the last ones padded, and lays a rank's pieces one after the other over
sub-groups of limited size. Either way a parameter becomes a list of pieces, which are read from the mapped files when
it is asked for: memory is about two copies of one parameter.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_llm.convert.deepspeed.folder import FOREIGN, StepFolder
from megatron_llm.convert.pickles import Foreign, PickleFile
from megatron_llm.convert.source import TensorInfo
from megatron_llm.utils.errors import UserError

_STATE = "optimizer_state_dict"
_FLAT_12 = "single_partition_of_fp32_groups"
_FLAT_3 = "fp32_flat_groups"
_KEPT = (  # of the model file; the rest is the state of optimizers, schedules and the configuration of DeepSpeed
    "args",
    "buffer_names",
    "checkpoint_version",
    "frozen_param_shapes",
    "global_steps",
    "iteration",
    "mp_world_size",
    "param_shapes",
    "shared_params",
)
_OPTIMIZER_KEPT = ("partition_count", "param_alignment_paddings", "param_slice_mappings", "zero_stage")


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + size) of a flat tensor: that of `group` in the optimizer file of data-parallel `rank`."""

    rank: int
    group: int
    start: int
    size: int


class ZeroRank:
    """The weights of one model-parallel rank.

    stage      0 to 3, as far as the files tell: 0 where only 16-bit weights are read, 1 where the stage is not recorded
    ranks      data-parallel ranks the fp32 weights are cut over; 1 without any
    master     whether weights are read from the fp32 copy; those that are frozen are read as they were saved
    tensors    type and shape by parameter name, as DeepSpeed saved it
    shared     names of parameters that are another one's memory, to that one's name
    state      what the model file of rank 0 tells besides: arguments, step, shapes
    """

    def __init__(self, folder: StepFolder, model_rank: int = 0, *, prefer_master: bool = True) -> None:
        self.folder = folder
        self._models = _model_files(folder, model_rank)
        self._optimizers: list[PickleFile] = []
        self._pieces: dict[str, list[Piece]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._frozen: dict[str, tuple[int, ...]] = {}
        content = self._models[0].content()
        if not isinstance(content, dict) or not isinstance(content.get("module"), dict | None):
            raise UserError(f"{self._models[0].path} is not a model file of DeepSpeed: it holds no module")
        self.state: dict[str, Any] = {key: content[key] for key in _KEPT if content.get(key) is not None}
        self.stage = 3 if folder.zero_model and not folder.model else 0
        files = {rank: path for (model, rank), path in folder.optimizer.items() if model == model_rank}
        groups = self.state.get("param_shapes")
        wanted = prefer_master or self.stage == 3
        self.master = bool(files and groups and wanted)
        self.ranks = 1
        if self.master and groups is not None:
            self._optimizers = [PickleFile(path, foreign=FOREIGN) for path in _ranked(files, folder)]
            self._open_master([{str(name): _shape(shape) for name, shape in group.items()} for group in groups])
        elif self.stage == 3:
            raise UserError(f"{folder.path} lacks *_optim_states.pt: with ZeRO 3 the weights are in those files alone; copy them too")
        self.shared = {str(copy): str(of) for copy, of in (self.state.get("shared_params") or {}).items()}
        self.tensors = self._infos(content.get("module") or {})

    def read(self, name: str) -> Tensor:
        """One parameter or buffer, whole, on the CPU."""
        name = self.shared.get(name, name) if name not in self._pieces else name
        if name in self._pieces:
            flat = [self._fetch(piece) for piece in self._pieces[name]]
            whole = flat[0] if len(flat) == 1 else torch.cat(flat)
            shape = self.tensors[name].shape
            return whole[: math.prod(shape)].view(shape)
        if name in self._frozen:
            parts = [file.copy(lambda content: content["frozen_param_fragments"][name]).view(-1) for file in self._models]
            return torch.cat(parts)[: math.prod(self._frozen[name])].view(self._frozen[name])
        return self._models[0].copy(lambda content: content["module"][name])

    def _fetch(self, piece: Piece) -> Tensor:
        return self._optimizers[piece.rank].copy(lambda content: _flat(content)[piece.group].narrow(0, piece.start, piece.size))

    def close(self) -> None:
        """Let go of all files."""
        for file in (*self._models, *self._optimizers):
            file.close()

    def _infos(self, module: Mapping[str, Any]) -> dict[str, TensorInfo]:
        found = {str(name): TensorInfo(value.dtype, tuple(value.shape)) for name, value in module.items() if isinstance(value, Tensor)}
        if not self.master:
            return found
        buffers = {str(name) for name in self.state.get("buffer_names") or ()}
        infos = {name: info for name, info in found.items() if name in buffers}
        infos |= {name: TensorInfo(torch.float32, shape) for name, shape in self._shapes.items()}
        fragments = self._models[0].content().get("frozen_param_fragments") or {}
        infos |= {name: TensorInfo(fragments[name].dtype, shape) for name, shape in self._frozen.items()}
        infos |= {copy: infos[of] for copy, of in self.shared.items() if of in infos}
        unread = sorted(found.keys() - infos.keys())
        for name in unread:  # the module lists a tied weight under both names, the optimizer under one
            if self.stage == 3:
                raise UserError(f"{self.folder.path} has no fp32 copy of {name}, and with ZeRO 3 no other: the folder is incomplete")
            infos[name] = found[name]
        return {name: infos[name] for name in (*found, *(infos.keys() - found.keys()))}

    def _open_master(self, groups: Sequence[dict[str, tuple[int, ...]]]) -> None:
        """Fill pieces and shapes from the optimizer files."""
        states = [_optimizer_state(file) for file in self._optimizers]
        sizes = [[flat.numel() for flat in _flat(file.content())] for file in self._optimizers]
        self._shapes = {name: shape for group in groups for name, shape in group.items()}
        frozen = self.state.get("frozen_param_shapes") or {}
        self._frozen = {str(name): _shape(shape) for name, shape in frozen.items()}
        count = states[0].get("partition_count")
        self.ranks = max(count) if isinstance(count, list | tuple) else int(count or len(states))
        if self.ranks != len(states):
            have = ", ".join(file.path.name for file in self._optimizers[:3])
            raise UserError(
                f"{self.folder.path} has {len(states)} of {self.ranks} optimizer files ({have} ...): copy the files of all ranks"
            )
        if _FLAT_3 in states[0]:
            self._pieces = whole_cuts(sizes[0], self._shapes, self.ranks)
        else:
            self.stage = max(self.stage, _stage(states[0]))
            self._pieces = _mapped(states, self._shapes) or flat_cuts(sizes, groups, states[0].get("param_alignment_paddings"))
        self._check(sizes)

    def _check(self, sizes: Sequence[Sequence[int]]) -> None:
        for name, shape in self._shapes.items():
            pieces = self._pieces.get(name, [])
            total = sum(piece.size for piece in pieces)
            inside = all(
                piece.group < len(sizes[piece.rank]) and piece.start + piece.size <= sizes[piece.rank][piece.group] for piece in pieces
            )
            slack = self.ranks if self.stage == 3 else 1
            if not inside or not 0 <= total - math.prod(shape) < slack:
                raise UserError(
                    f"{self.folder.path}: the optimizer files do not hold {name} of shape {list(shape)} where they should; "
                    "files of different runs were mixed, or one is damaged"
                )


def flat_cuts(
    sizes: Sequence[Sequence[int]], groups: Sequence[Mapping[str, tuple[int, ...]]], paddings: Sequence[Sequence[int]] | None
) -> dict[str, list[Piece]]:
    """Pieces under stages 1 and 2: parameters of a group one after the other over the partitions of all ranks.

    `sizes[rank][group]` are elements of the partitions, `paddings[group]` elements left free after each parameter.
    UserError when the partitions are shorter than the parameters, or longer than the padding at the end explains.
    """
    pieces: dict[str, list[Piece]] = {}
    for number, group in enumerate(groups):
        lengths = [rank[number] if number < len(rank) else 0 for rank in sizes]
        offset = 0
        for place, (name, shape) in enumerate(group.items()):
            pieces[name] = [Piece(rank, number, start, count) for rank, start, count in _overlaps(lengths, offset, math.prod(shape))]
            offset += math.prod(shape) + (paddings[number][place] if paddings else 0)
        align = 2 * len(sizes)  # partitions are aligned for the network, and the last one filled up
        if not 0 <= sum(lengths) - offset <= align:
            raise UserError(f"parameter group {number} has {offset} elements, the partitions of all ranks hold {sum(lengths)}")
    return pieces


def whole_cuts(sizes: Sequence[int], shapes: Mapping[str, tuple[int, ...]], ranks: int) -> dict[str, list[Piece]]:
    """Pieces under stage 3: ceil(n / ranks) elements of every parameter on each rank, over the rank's flat groups in turn."""
    pieces: dict[str, list[Piece]] = {}
    offset = 0
    for name, shape in shapes.items():
        share = math.ceil(math.prod(shape) / ranks)
        parts = list(_overlaps(sizes, offset, share))
        pieces[name] = [Piece(rank, group, start, count) for rank in range(ranks) for group, start, count in parts]
        offset += share
    if offset != sum(sizes):
        raise UserError(f"the parameters take {offset} elements a rank, the flat groups hold {sum(sizes)}: files do not belong together")
    return pieces


def _overlaps(lengths: Sequence[int], offset: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Of parts that lie one behind the other those that hold elements [offset, offset + size): number, first in it, how many."""
    before = 0
    for number, length in enumerate(lengths):
        start, end = max(offset, before), min(offset + size, before + length)
        if start < end:
            yield number, start - before, end - start
        before += length


def _mapped(states: Sequence[Mapping[str, Any]], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Piece]] | None:
    """Pieces as newer versions write them down themselves: they hold whatever order the parameters were laid in."""
    pieces: dict[str, list[Piece]] = {}
    for rank, state in enumerate(states):
        mapping = state.get("param_slice_mappings")
        if not isinstance(mapping, list):
            return None
        for group, fragments in enumerate(mapping):
            for name, fragment in fragments.items():
                pieces.setdefault(str(name), []).append(Piece(rank, group, int(fragment.start), int(fragment.numel)))
    return pieces if pieces.keys() >= shapes.keys() else None


def _model_files(folder: StepFolder, model_rank: int) -> list[PickleFile]:
    if model_rank in folder.model:
        return [PickleFile(folder.model[model_rank], foreign=FOREIGN)]
    files = {rank: path for (model, rank), path in folder.zero_model.items() if model == model_rank}
    if not files:
        raise UserError(f"{folder.path} lacks mp_rank_{model_rank:02d}_model_states.pt: copy the whole folder")
    return [PickleFile(path, foreign=FOREIGN) for path in _ranked(files, folder)]


def _ranked(files: Mapping[int, Any], folder: StepFolder) -> list[Any]:
    missing = [rank for rank in range(max(files) + 1) if rank not in files]
    if missing:
        raise UserError(
            f"{folder.path} lacks the files of data-parallel rank {missing[0]}, there is {files[max(files)].name}: copy those of all ranks"
        )
    return [files[rank] for rank in sorted(files)]


def _optimizer_state(file: PickleFile) -> dict[str, Any]:
    content = file.content()
    state = content.get(_STATE) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not (_FLAT_12 in state or _FLAT_3 in state):
        raise UserError(f"{file.path} is not an optimizer file of ZeRO: it has neither {_FLAT_12} nor {_FLAT_3}")
    return {key: value for key, value in state.items() if key in _OPTIMIZER_KEPT} | {
        key: True for key in (_FLAT_12, _FLAT_3) if key in state
    }


def _stage(state: Mapping[str, Any]) -> int:
    recorded = state.get("zero_stage", 1)
    if isinstance(recorded, Foreign) and recorded.foreign_args:
        recorded = recorded.foreign_args[0]
    return int(recorded) if isinstance(recorded, int) else 1


def _flat(content: Mapping[str, Any]) -> Sequence[Tensor]:
    state = content[_STATE]
    flat: Sequence[Tensor] = state[_FLAT_3] if _FLAT_3 in state else state[_FLAT_12]
    return flat


def _shape(value: Any) -> tuple[int, ...]:
    if isinstance(value, Foreign):
        raise UserError(f"a parameter's shape is saved as {value.foreign_class}, expected a torch.Size")
    return tuple(int(size) for size in value)
