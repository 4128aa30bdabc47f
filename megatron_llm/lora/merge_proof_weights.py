"""The weights of base and adapters by the names that parameters have in transformers, read by rows for the proof of a merge.

Only what an adapter puts in the place of a weight as a whole (`modules_to_save`, embeddings and biases that were saved) is
dealt with here. What its factors do is left to peft.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_llm.checkpoint.streamed import meta_parameters
from megatron_llm.lora.adapter import Adapter
from megatron_llm.lora.tensors import StoredTensors
from megatron_llm.utils.errors import UserError

_BLOCK = 1 << 16  # elements read at a time
_SHOWN = 3


class CannotStream(Exception):
    """Why a model cannot be run layer by layer."""


def meta_model(folder: Path, vocab_size: int | None = None) -> Any:
    """The class of transformers that the `config.json` of a folder names, fp32, its parameters on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    loader: Any = AutoConfig
    config = loader.from_pretrained(folder)
    if vocab_size is not None:
        if not hasattr(config, "vocab_size"):
            raise CannotStream("the size of the vocabulary is not in its configuration")
        config.vocab_size = vocab_size
    with meta_parameters():
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def stored_names(model: Any, tensors: StoredTensors, resized: Collection[str] = ()) -> dict[str, str]:
    """The stored name of every parameter; a tied one that is not stored has the name of the one it is tied to.

    CannotStream unless parameters and stored tensors belong to each other one to one, with the same shapes; parameters in
    `resized` may have other rows.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found: dict[str, str] = {}
    for name in parameters:
        # As transformers' loader has it: folders may lack the prefix of the inner model, and GPT-NeoX has another head.
        candidates = (name, name.removeprefix(f"{model.base_model_prefix}."), name.replace("lm_head.", "embed_out."))
        stored = next((key for key in candidates if key in tensors.specs), None)
        if stored is not None:
            found[name] = stored
    tied = {id(parameters[name]): key for name, key in found.items()}
    found |= {name: tied[id(parameter)] for name, parameter in parameters.items() if name not in found and id(parameter) in tied}
    ignored = model._keys_to_ignore_on_load_unexpected or []
    used = set(found.values())
    wrong = [f"no {name}" for name in parameters if name not in found]
    wrong += [key for key in tensors.specs if key not in used and not any(re.search(pattern, key) for pattern in ignored)]
    for name, key in found.items():
        ours, theirs = tuple(parameters[name].shape), tensors.specs[key].shape
        if ours != theirs and not (name in resized and ours[1:] == theirs[1:]):
            wrong.append(f"{key} of shape {list(theirs)} for {list(ours)}")
    if wrong:
        raise CannotStream(f"{type(model).__name__} names its weights otherwise than {tensors.folder}, which has {_words(wrong)}")
    return found


def whole_tensors(adapter: Adapter, model: Any) -> dict[str, str]:
    """Parameter to the adapter's tensor that takes its place. CannotStream where that has another shape than in the merged model."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    given = {f"{module}.{kind}": stored for module, parts in adapter.modules.items() for kind, stored in parts.whole.items()}
    lost = [name for name in given if name not in parameters]
    if lost:
        raise CannotStream(f"{adapter.folder} holds weights of {_words(lost)}, which {type(model).__name__} does not have")
    kept = tuple(adapter.settings.get("modules_to_save") or ())
    for name, stored in list(given.items()):
        # peft keeps a module of `modules_to_save` beside the base's; any other weight it loads into the base's, and so into
        # all that are tied to it.
        if adapter.keeps_tying or not name.rpartition(".")[0].endswith(kept):
            given |= {other: stored for other in parameters if other not in given and parameters[other] is parameters[name]}
    for name, stored in given.items():
        if adapter.tensors.specs[stored].shape != tuple(parameters[name].shape):
            raise CannotStream(f"{adapter.folder} holds {name} in another size than the merged model")
    return given


class ChainWeights:
    """Rows of the parameters of a model as base and adapters hold them, fp32.

    names     stored name, in the base, of each parameter; wholes: for each adapter what `whole_tensors` gives
    dtypes    types of the written weights by their names
    applied   how many of the adapters count
    unmerged  number of the adapter that peft runs beside the weights, None when it merges all of them
    rounded   whether weights are rounded to the type they are written in
    """

    def __init__(
        self,
        base: StoredTensors,
        names: Mapping[str, str],
        adapters: Sequence[Adapter],
        wholes: Sequence[Mapping[str, str]],
        dtypes: Mapping[str, torch.dtype],
    ) -> None:
        self._base, self._names, self._wholes, self._dtypes = base, names, wholes, dtypes
        self.adapters = adapters
        self.applied, self.rounded = len(adapters), False
        self.unmerged: int | None = None

    def fill(self, name: str, first: int, last: int, target: Tensor) -> None:
        """Rows [first, last) of a parameter that no adapter has factors for."""
        if not target.dim():
            self.fill(name, 0, 1, target.view(1))
            return
        known = self.begin(name, first, last, target)
        for number in range(self.applied):
            if self.replaces(number, name):
                before = target.clone() if self.adapters[number].weight != 1.0 else target
                self.replace(number, name, first, last, target)
                self.blend(number, before, target, known)
                known = last - first
        self.finish(name, target, known)

    def begin(self, name: str, first: int, last: int, target: Tensor) -> int:
        """Rows of the base; returns how many of those that are asked for it has."""
        stored = self._names[name]
        shape = self._base.specs[stored].shape or (1,)
        known = max(0, min(last, shape[0]) - first)
        _copy_rows(self._base, stored, first, first + known, target)
        return known

    def replaces(self, number: int, name: str) -> bool:
        """Whether an adapter holds the whole of a parameter."""
        return name in self._wholes[number]

    def replace(self, number: int, name: str, first: int, last: int, target: Tensor) -> None:
        """Rows that an adapter holds."""
        _copy_rows(self.adapters[number].tensors, self._wholes[number][name], first, last, target)

    def blend(self, number: int, before: Tensor, after: Tensor, known: int) -> None:
        """Go back in `after` to the adapter's weight of the way from `before`, in the rows that there were before."""
        weight = self.adapters[number].weight
        if weight != 1.0:
            after[:known] = before[:known] + weight * (after[:known] - before[:known])

    def finish(self, name: str, target: Tensor, known: int) -> None:
        """Check that all rows are there, and round them if that is asked for."""
        if known != len(target):
            raise CannotStream(f"base and adapters have only some of the rows of {name}")
        if self.rounded:
            dtype = self._dtypes.get(self._names[name]) or written_dtype(self._dtypes, name)
            for block in target.split(max(1, _BLOCK // max(1, target[:1].numel()))):
                block.copy_(block.to(dtype))


def written_dtype(dtypes: Mapping[str, torch.dtype], name: str) -> torch.dtype:
    """The type that a parameter is written in; UserError when it is not among the written weights and they are of several types."""
    inner = next((key for key in dtypes if name == key or name.endswith(f".{key}")), None)
    if inner is not None:
        return dtypes[inner]
    kinds = {dtype for dtype in dtypes.values() if dtype.is_floating_point}
    if len(kinds) != 1:
        raise UserError(f"{name} of the model is not among the written weights, which are of several types")
    return kinds.pop()


def copy_stored(tensors: StoredTensors, name: str, first: int, last: int, target: Tensor) -> None:
    """Rows [first, last) of a stored tensor into `target`, fp32."""
    if target.dim():
        _copy_rows(tensors, name, first, last, target)
    else:
        target.copy_(tensors.read(name))


def _copy_rows(tensors: StoredTensors, name: str, first: int, last: int, target: Tensor) -> None:
    step = max(1, _BLOCK // max(1, target[:1].numel()))
    for start in range(first, last, step):
        end = min(start + step, last)
        target[start - first : end - first].copy_(tensors.read_rows(name, start, end))


def parameter_places(model: nn.Module) -> dict[tuple[nn.Module, str], str]:
    """Name of each parameter by the module that has it and the name it has there; tied ones each by their own name."""
    return {
        (module, attribute): f"{path}.{attribute}" if path else attribute
        for path, module in model.named_modules()
        for attribute, value in module._parameters.items()
        if value is not None
    }


def _words(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
