"""Base and adapters by transformers and peft without the model in memory: each layer's weights are read before it runs.

The model is built without weights and given to peft, which puts its layers and the adapters' factors into it. When one of
these layers runs, it gets the base's weight in fp32, and peft itself does to that what it does to a whole model: it starts
PiSSA and OLoRA from it, merges the adapters before the last, each into what the ones before it made, and runs the last
one unmerged. Weights that the adapters hold as a whole are read in the place of the base's. After the layer all is let go.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_llm.checkpoint.hf_folder import list_tensors
from megatron_llm.checkpoint.streamed import stream_weights
from megatron_llm.lora.adapter import Adapter
from megatron_llm.lora.base import Base
from megatron_llm.lora.merge_proof_memory import IdentityWithoutMemory, MergeWithoutCopies
from megatron_llm.lora.merge_proof_weights import (
    CannotStream,
    ChainWeights,
    copy_stored,
    meta_model,
    parameter_places,
    stored_names,
    whole_tensors,
)
from megatron_llm.lora.merge_proof_whole import Expected, is_exact
from megatron_llm.lora.tensors import StoredTensors

_MAGNITUDE = "lora_magnitude_vector"
_TOKENS = ".trainable_tokens_delta"


def folder_logits(folder: Path, ids: Tensor) -> Tensor:
    """Logits of a model folder, fp32. CannotStream when its tensors are not the parameters of transformers' class, one to one."""
    model, tensors = meta_model(folder), StoredTensors(folder, list_tensors(folder))
    names = stored_names(model, tensors)
    stream_weights(model, lambda name, first, last, target: copy_stored(tensors, names[name], first, last, target))
    logits: Tensor = model(ids, use_cache=False).logits
    return logits.float()


def expected_streamed(
    base: Base,
    adapters: Sequence[Adapter],
    ids: Tensor,
    dtypes: Mapping[str, torch.dtype],
    *,
    vocab_size: int | None,
) -> Expected:
    """The logits that a merge must have. `vocab_size` is given where the merged vocabulary has another size than the base's.

    CannotStream when base or adapters do not fit together in the way that this needs; the whole model may yet be run.
    """
    model = _AdaptedModel(base, adapters, dtypes, vocab_size)
    plain = model.logits(ids, applied=0) if vocab_size is None else None
    adapted = model.logits(ids, applied=len(adapters), unmerged=adapters[-1].weight == 1.0)
    if is_exact(dtypes):
        return Expected(plain, adapted, None)
    return Expected(plain, adapted, model.logits(ids, applied=len(adapters), rounded=True))


class _AdaptedModel:
    """A base without weights and all of its adapters in peft."""

    def __init__(self, base: Base, adapters: Sequence[Adapter], dtypes: Mapping[str, torch.dtype], vocab_size: int | None) -> None:
        model = meta_model(base.folder, vocab_size)
        places = parameter_places(model)
        ends = (model.get_input_embeddings(), model.get_output_embeddings()) if vocab_size is not None else ()
        names = stored_names(model, base.tensors, {name for (module, _), name in places.items() if module in ends})
        wholes = [whole_tensors(adapter, model) for adapter in adapters]
        self._chain = ChainWeights(base.tensors, names, adapters, wholes, dtypes)
        shared = _stand_ins(model)
        self._adapted = _adapt(model, adapters)
        layers = _tuned_layers(self._adapted)
        tuned = {layer.get_base_layer() for layer in layers}
        parameters = _to_meta(self._adapted, places)
        for layer in layers:
            hook = _TunedLayer(layer, self._chain, parameters, shared)
            layer.register_forward_pre_hook(hook.load)
            layer.register_forward_hook(hook.release)
        by_path = {path: parameters[place] for place, path in parameter_places(self._adapted).items() if place in parameters}

        def fill(path: str, first: int, last: int, target: Tensor) -> None:
            self._chain.fill(by_path[path], first, last, target)

        self._refresh = stream_weights(self._adapted, fill, tuned)

    def logits(self, ids: Tensor, *, applied: int, unmerged: bool = False, rounded: bool = False) -> Tensor:
        """Logits with the first `applied` adapters merged, or all but the last of them, which then is run unmerged."""
        chain, tuner = self._chain, self._adapted.base_model
        chain.applied, chain.rounded, chain.unmerged = applied, rounded, applied - 1 if unmerged else None
        if chain.unmerged is None:
            tuner.disable_adapter_layers()
        else:
            tuner.enable_adapter_layers()
            self._adapted.set_adapter(_name(chain.unmerged), inference_mode=True)
        self._refresh()
        with IdentityWithoutMemory():
            logits: Tensor = self._adapted(ids, use_cache=False).logits
        return logits.float()


class _TunedLayer:
    """A layer of peft: before it runs its base layer gets weights, afterwards it has none."""

    def __init__(
        self, layer: Any, chain: ChainWeights, parameters: Mapping[tuple[nn.Module, str], str], shared: set[tuple[nn.Module, str]]
    ) -> None:
        self._layer, self._chain, self._base = layer, chain, layer.get_base_layer()
        self._metas = {attribute: value for attribute, value in self._base._parameters.items() if value is not None}
        self._names = {attribute: parameters[self._base, attribute] for attribute in self._metas}
        self._is_shared = any((self._base, attribute) in shared for attribute in self._metas)

    def load(self, module: nn.Module, args: Any) -> None:
        """The base's weights, and what the adapters before the one that is run unmerged make of them."""
        known: dict[str, int] = {}
        for attribute, meta in self._metas.items():
            target = torch.zeros(meta.shape)
            known[attribute] = self._chain.begin(self._names[attribute], 0, len(target), target)
            self._base._parameters[attribute] = nn.Parameter(target, requires_grad=False)
        for number in range(self._chain.applied):
            self._apply(number, known)
        for attribute, name in self._names.items():
            self._chain.finish(name, self._weight(attribute), known[attribute])

    def release(self, module: nn.Module, args: Any, output: Any) -> None:
        """Let the weights go."""
        self._base._parameters.update(self._metas)

    def _weight(self, attribute: str) -> Tensor:
        parameter = self._base._parameters[attribute]
        assert parameter is not None
        return parameter.data

    def _apply(self, number: int, known: dict[str, int]) -> None:
        chain, layer = self._chain, self._layer
        replaced = [attribute for attribute, name in self._names.items() if chain.replaces(number, name)]
        has_factors = any(_name(number) in getattr(layer, kind, ()) for kind in ("lora_A", "lora_embedding_A", "trainable_tokens_delta"))
        if not replaced and not has_factors:
            return
        keep = chain.adapters[number].weight != 1.0
        before = {attribute: self._weight(attribute).clone() for attribute in self._names} if keep else {}
        had = dict(known)
        for attribute in replaced:
            target = self._weight(attribute)
            chain.replace(number, self._names[attribute], 0, len(target), target)
            known[attribute] = len(target)
        if has_factors:
            if any(known[attribute] != len(self._weight(attribute)) for attribute in self._names):
                raise CannotStream(f"{chain.adapters[number].folder} has factors for a vocabulary of another size than the merged one")
            self._merge(number, started="weight" in replaced)
        for attribute, values in before.items():
            chain.blend(number, values, self._weight(attribute), had[attribute])

    def _merge(self, number: int, *, started: bool) -> None:
        """Have peft merge an adapter, after it has started it; the one that it is to run beside the weight is only started."""
        layer, name = self._layer, _name(number)
        start = self._chain.adapters[number].initialisation
        if start != "plain" and not started and name in getattr(layer, "lora_A", ()):
            if self._is_shared:
                raise CannotStream(f"{start} takes away a part of a matrix that is embedding and output layer at once")
            factors = layer.lora_A[name].weight, layer.lora_B[name].weight
            trained = [factor.data for factor in factors]
            if start == "pissa":
                layer.pissa_init(name, start)
            else:
                layer.olora_init(name)
            for factor, data in zip(factors, trained, strict=True):
                factor.data = data
        if number != self._chain.unmerged:
            with MergeWithoutCopies():
                layer.merge(adapter_names=[name])
            layer.merged_adapters = []  # as after merge_and_unload: the next one sees what this one made as its base


def _name(number: int) -> str:
    """What peft calls an adapter."""
    return f"number{number:03d}"


def _adapt(model: Any, adapters: Sequence[Adapter]) -> Any:
    """The model with the adapters' factors in it, none of them active for good."""
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict

    adapted: Any = None
    for number, adapter in enumerate(adapters):
        config: Any = PeftConfig.from_pretrained(str(adapter.folder))
        config.inference_mode = True
        config.modules_to_save, config.bias = None, "none"  # whole tensors are read in the place of the base's
        if not isinstance(config.init_lora_weights, bool):
            config.init_lora_weights = True  # they are overwritten; what some starts do to the base comes with its weights
        if adapted is None:
            adapted = get_peft_model(model, config, adapter_name=_name(number))
        else:
            adapted.add_adapter(_name(number), config)
        kinds = [(parts.down, parts.up, parts.magnitude, parts.up_bias, parts.tokens) for parts in adapter.modules.values()]
        factors = {stored: adapter.tensors.read(stored).float() for stored_of in kinds for stored in stored_of if stored is not None}
        set_peft_model_state_dict(adapted, factors, adapter_name=_name(number))
        _check_factors(adapted, adapter, number, factors)
    return adapted.eval()


def _check_factors(adapted: Any, adapter: Adapter, number: int, factors: Mapping[str, Tensor]) -> None:
    """CannotStream unless peft, asked to save the adapter, gives back what its file holds, and nothing else."""
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(adapted, adapter_name=_name(number), save_embedding_layers=False)
    saved, given = ({_plain(key): value for key, value in each.items()} for each in (found, factors))
    for key in [key for key in given if key not in saved and key.endswith(_TOKENS)]:
        # Rows of tied matrices may be in the file for both, and are in peft once.
        if any(torch.equal(given[key], value) for other, value in saved.items() if other.endswith(_TOKENS)):
            del given[key]
    wrong = sorted(given.keys() ^ saved.keys()) + [key for key in given if key in saved and not torch.equal(given[key], saved[key])]
    if wrong:
        raise CannotStream(f"peft has other factors than {adapter.folder}: {', '.join(wrong[:3])}")


def _plain(key: str) -> str:
    """Releases of peft differ in how they call DoRA's magnitudes."""
    return key.removesuffix(".weight") if key.endswith(f"{_MAGNITUDE}.weight") else key


def _stand_ins(model: nn.Module) -> set[tuple[nn.Module, str]]:
    """Give every parameter on the meta device one number of memory: peft puts factors on the device of the weight beside them.

    Returns the places of parameters that several modules share.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, value in list(module._parameters.items()):
            if value is not None:
                if value not in made:
                    made[value] = nn.Parameter(torch.zeros(()).expand(value.shape), requires_grad=False)
                module._parameters[attribute] = made[value]
                places.setdefault(value, []).append((module, attribute))
    return {place for shared in places.values() if len(shared) > 1 for place in shared}


def _to_meta(adapted: nn.Module, places: Mapping[tuple[nn.Module, str], str]) -> dict[tuple[nn.Module, str], str]:
    """Put the base's parameters, wherever peft has them now, back on the meta device, each for itself; returns their names."""
    found = {place: places[place] for place in parameter_places(adapted) if place in places}
    if set(found.values()) != set(places.values()):
        raise CannotStream("peft takes modules out of the model")
    for module, attribute in found:
        stand_in = module._parameters[attribute]
        assert stand_in is not None
        module._parameters[attribute] = nn.Parameter(torch.empty(stand_in.shape, device="meta"), requires_grad=False)
    return found


def _tuned_layers(adapted: nn.Module) -> list[Any]:
    """The layers that peft put around modules of the base. CannotStream when one lies in another."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[Any] = [module for module in adapted.modules() if isinstance(module, BaseTunerLayer)]
    if any(isinstance(module, BaseTunerLayer) for layer in layers for module in layer.modules() if module is not layer):
        raise CannotStream("an adapter changes a module in two ways")
    return layers
