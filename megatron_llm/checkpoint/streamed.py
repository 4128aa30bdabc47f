"""Running a model whose weights never are in memory together: each module's are read before it runs and let go after.

The model is built with its parameters on the meta device (buffers are real). Small parameters are read once; a large
embedding gets only the rows of the ids it is asked for; a large output layer runs over blocks of its rows (each logit
depends on one row, so the logits are the same); every other module gets its parameters in fp32 for the time of its
forward pass. So a model of any size is run in the memory of one of its matrices.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

Fill = Callable[[str, int, int, Tensor], None]
"""`fill(name, first, last, target)` writes rows [first, last) of a parameter into `target`, fp32."""

_SMALL = 1 << 18  # elements: 1 MB in fp32
_LARGE = 1 << 22  # elements: 16 MB in fp32


@contextmanager
def meta_parameters() -> Iterator[None]:
    """Modules built inside have their parameters on the meta device, and everything else where it would be."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    hook: Any = to_meta  # torch's annotation has no result, its documentation a parameter to take instead
    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def stream_weights(
    model: nn.Module, fill: Fill, skip: Collection[nn.Module] = (), *, small: int = _SMALL, large: int = _LARGE
) -> Callable[[], None]:
    """Prepare `model` to run with its parameters that are on the meta device read by `fill`; real ones stay as they are.

    Parameters of at most `small` elements are read now; embeddings and output layers of more than `large` are read in
    part. A parameter that some module uses without being called stays on the meta device, and its use is an error.
    Modules in `skip` are left to the caller. The returned function reads the small parameters again, for a `fill` that
    gives others from then on.
    """
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        names[id(parameter)] = name
    at_once: list[tuple[nn.Module, str, str, nn.Parameter]] = []
    for module in list(model.modules()):
        if module in skip:
            continue
        waiting: dict[str, tuple[str, nn.Parameter]] = {}
        for attribute, value in list(module._parameters.items()):
            if value is None or not value.is_meta:
                continue
            if value.numel() <= small:
                at_once.append((module, attribute, names[id(value)], value))
            else:
                waiting[attribute] = (names[id(value)], value)
        if not waiting:
            continue
        alone = len(waiting) == 1 and "weight" in waiting
        if alone and _is_embedding(module):
            module.forward = _rows_of_ids(module, fill, *waiting["weight"])
        elif alone and _is_output(module) and waiting["weight"][1].numel() > large:
            module.forward = _blocks(module, fill, *waiting["weight"], large)
        else:
            module.register_forward_pre_hook(_load(fill, waiting))
            module.register_forward_hook(_release(waiting))

    def read_small() -> None:
        for module, attribute, name, meta in at_once:
            module._parameters[attribute] = _read(fill, name, meta)

    read_small()
    return read_small


def _is_embedding(module: nn.Module) -> bool:
    return "Embedding" in type(module).__name__ and "Position" not in type(module).__name__


def _is_output(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "VocabParallelHead"


def _read(fill: Fill, name: str, like: Tensor) -> nn.Parameter:
    target = torch.empty(like.shape, dtype=torch.float32)
    fill(name, 0, like.shape[0] if like.dim() else 0, target)
    return nn.Parameter(target, requires_grad=False)


def _load(fill: Fill, waiting: dict[str, tuple[str, nn.Parameter]]) -> Callable[..., None]:
    def load(module: nn.Module, args: Any) -> None:
        for attribute, (name, meta) in waiting.items():
            module._parameters[attribute] = _read(fill, name, meta)

    return load


def _release(waiting: dict[str, tuple[str, nn.Parameter]]) -> Callable[..., None]:
    def release(module: nn.Module, args: Any, output: Any) -> None:
        for attribute, (_, meta) in waiting.items():
            module._parameters[attribute] = meta

    return release


def _rows_of_ids(module: nn.Module, fill: Fill, name: str, meta: nn.Parameter) -> Callable[[Tensor], Tensor]:
    whole = module.forward

    def forward(ids: Tensor) -> Tensor:
        rows, numbers = ids.unique(return_inverse=True)
        weight = torch.empty(len(rows), meta.shape[1], dtype=torch.float32)
        for number, row in enumerate(rows.tolist()):
            fill(name, row, row + 1, weight[number : number + 1])
        module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        if getattr(module, "padding_idx", None) is not None:
            module.padding_idx = None  # type: ignore[assignment]  # it matters to gradients only, and counts other rows now
        output: Tensor = whole(numbers)
        module._parameters["weight"] = meta
        return output

    return forward


def _blocks(module: nn.Module, fill: Fill, name: str, meta: nn.Parameter, large: int) -> Callable[[Tensor], Tensor]:
    whole, step = module.forward, max(1, large // meta.shape[1])

    def forward(x: Tensor) -> Tensor:
        columns, bias = [], module._parameters.get("bias")
        memory = torch.empty(min(step, meta.shape[0]), meta.shape[1], dtype=torch.float32)
        for first in range(0, meta.shape[0], step):
            last = min(first + step, meta.shape[0])
            block = memory[: last - first]
            fill(name, first, last, block)
            module._parameters["weight"] = nn.Parameter(block, requires_grad=False)
            if bias is not None:
                module._parameters["bias"] = nn.Parameter(bias[first:last], requires_grad=False)
            columns.append(whole(x))
        module._parameters["weight"] = meta
        if bias is not None:
            module._parameters["bias"] = bias
        return torch.cat(columns, dim=-1)

    return forward
