"""A PEFT adapter folder as data: settings, and for each module of the base what the adapter does to it.

Only what LoRA of peft can merge into weights is taken; every other method, and every setting that is not known here, is
refused by name. LoRA: Hu et al. 2021, arXiv:2106.09685; rsLoRA: arXiv:2312.03732; DoRA: arXiv:2402.09353.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_llm.checkpoint.bin_file import list_bin
from megatron_llm.checkpoint.hf_folder import StoredTensor, read_header
from megatron_llm.lora.tensors import StoredTensors
from megatron_llm.utils.errors import UserError
from megatron_llm.utils.json_files import read_json

ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
# Settings that change the merge and are dealt with, and those that only concern training, loading or where it came from.
_HANDLED = (
    "alpha_pattern", "bias", "ensure_weight_tying", "exclude_modules", "fan_in_fan_out", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_bias", "modules_to_save", "peft_type", "r", "rank_pattern", "target_modules",
    "trainable_token_indices", "use_dora", "use_rslora",
)  # fmt: skip
_HARMLESS = (
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode", "loftq_config", "lora_dropout",
    "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
)  # fmt: skip
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")
_REPEATABLE = ("pissa", "olora")  # not pissa_niter_N, whose decomposition begins with random numbers
_SHOWN = 3


@dataclass
class ModuleParts:
    """Names, in the adapter's file, of what it holds for one module.

    down, up    LoRA's A and B, of a linear layer or (`embedding`) of an embedding, whose two are transposed
    magnitude   DoRA's norm of each row, up_bias LoRA's bias of B
    whole       tensors that take the place of the base's, by parameter name; those in `frozen` are copies of the base's
    tokens      rows that take the place of the rows of trainable tokens
    """

    down: str | None = None
    up: str | None = None
    embedding: bool = False
    magnitude: str | None = None
    up_bias: str | None = None
    whole: dict[str, str] = field(default_factory=dict)
    frozen: set[str] = field(default_factory=set)
    tokens: str | None = None


class Adapter:
    """An opened adapter folder. `weight` scales what it does: 1 all of it, 0.5 half of the way from the base.

    UserError when the folder holds no LoRA adapter of peft, or one that cannot be merged into weights.
    """

    def __init__(self, folder: Path, weight: float = 1.0) -> None:
        self.folder, self.weight = folder, weight
        self.settings = _read_settings(folder)
        _check_settings(folder, self.settings)
        file = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
        if file is None:
            raise UserError(f"{folder} has an {ADAPTER_CONFIG} but no {_WEIGHTS[0]}: the adapter was not saved, or not copied, whole")
        self.tensors = StoredTensors(folder, _list(file))
        self.modules = _parse(folder, self.tensors)

    @property
    def files(self) -> list[Path]:
        """The settings and the weights."""
        return [self.folder / ADAPTER_CONFIG, *(self.folder / name for name in self.tensors.files)]

    @property
    def base_name(self) -> str | None:
        """What the adapter says it was trained on."""
        return self.settings.get("base_model_name_or_path")

    @property
    def initialisation(self) -> str:
        """`plain`, or `pissa` or `olora`: those take a part of the base's weight away before they begin."""
        value = self.settings.get("init_lora_weights", True)
        return value if value in _REPEATABLE else "plain"

    @property
    def keeps_tying(self) -> bool:
        """Whether embedding and output layer were kept one matrix in training."""
        return bool(self.settings.get("ensure_weight_tying"))

    def scaling(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA; UserError when the rank of the weights is not that of the settings."""
        said = _by_pattern(self.settings.get("rank_pattern"), module, self.settings.get("r", 8))
        if said != rank:
            raise UserError(
                f"{self.folder}: {module} has rank {rank} in the weights and {said} in {ADAPTER_CONFIG}: they do not belong together"
            )
        alpha = float(_by_pattern(self.settings.get("alpha_pattern"), module, self.settings.get("lora_alpha", 8)))
        return alpha / math.sqrt(rank) if self.settings.get("use_rslora") else alpha / rank

    def token_ids(self, module: str) -> list[int]:
        """Ids of the rows that the trainable tokens of a module take; UserError when the settings do not say them."""
        given = self.settings.get("trainable_token_indices")
        if isinstance(given, dict):
            given = next((ids for name, ids in given.items() if module == name or module.endswith(f".{name}")), None)
        if not isinstance(given, list):
            raise UserError(
                f"{self.folder} holds trained tokens of {module}, but {ADAPTER_CONFIG} does not say which (trainable_token_indices)"
            )
        return [int(index) for index in given]

    def expects(self, module: str) -> bool:
        """Whether the settings say that a module of the base, by its name, has factors here."""
        targets, excluded = self.settings.get("target_modules"), self.settings.get("exclude_modules")
        if not targets or targets == "all-linear" or not _matches(targets, module) or (excluded and _matches(excluded, module)):
            return False
        layers = self.settings.get("layers_to_transform")
        if layers is None:
            return True
        pattern = self.settings.get("layers_pattern")
        names = [pattern] if isinstance(pattern, str) else list(pattern or [r"[^.]*"])
        found = next((match for name in names if (match := re.match(rf".*\.{name}\.(\d+)\.", f".{module}"))), None)
        return found is not None and int(found[1]) in ([layers] if isinstance(layers, int) else layers)

    def absent_modules_to_save(self) -> list[str]:
        """Modules whose whole weights the settings promise and the file lacks."""
        present = [name for name, parts in self.modules.items() if parts.whole]
        return [
            wanted for wanted in self.settings.get("modules_to_save") or [] if not any(f".{wanted}." in f".{name}." for name in present)
        ]


def _matches(targets: Any, module: str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    return next((value for name, value in (patterns or {}).items() if re.match(rf"(.*\.)?({name})$", module)), default)


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise UserError(f"{folder} is no adapter: it has no {ADAPTER_CONFIG}; give the folder that peft's save_pretrained wrote")
    return read_json(path)


def _check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{folder} is an adapter of type {kind}: only LoRA (and rsLoRA, DoRA, PiSSA, OLoRA) can be merged")
    unknown = sorted(name for name, value in settings.items() if name not in (*_HANDLED, *_HARMLESS) and value)
    if unknown:
        raise UserError(f"{folder} uses {', '.join(unknown)}, which cannot be merged into plain weights: serve it with peft as it is")
    start = settings.get("init_lora_weights", True)
    if start not in (*_PLAIN_INITS, *_REPEATABLE):
        raise UserError(
            f"{folder} was started with init_lora_weights={start!r}, which changes the base in a way that cannot be repeated: "
            "save it again with path_initial_model_for_weight_conversion, as a plain LoRA"
        )
    if not all(isinstance(settings.get(name, 1), int | float) for name in ("r", "lora_alpha")):
        raise UserError(f"{folder / ADAPTER_CONFIG}: r and lora_alpha must be numbers")


def _list(file: Path) -> dict[str, StoredTensor]:
    if file.suffix == ".safetensors":
        return read_header(file)
    return {name: StoredTensor(file.name, dtype, shape) for name, (dtype, shape) in list_bin(file).items()}


def _parse(folder: Path, tensors: StoredTensors) -> dict[str, ModuleParts]:
    """Sort the tensors by module. Plain names win over the duplicates that peft writes after a resize."""
    names = {name: name.removeprefix(_PREFIX) for name in tensors.specs}
    if not names:
        raise UserError(f"{folder} holds no weights: the adapter was saved before its weights were gathered")
    modules: dict[str, ModuleParts] = {}
    wholes: dict[tuple[str, str], str] = {}
    for stored, name in sorted(names.items(), key=lambda item: _duplicate(item[1])):
        if any(part in name for part in (".token_indices", ".trainable_tokens_original")):
            continue
        module, kind = _split(name)
        parts = modules.setdefault(module, ModuleParts())
        if kind in ("down", "up", "magnitude", "up_bias", "tokens"):
            setattr(parts, kind, stored)
            parts.embedding = parts.embedding or "lora_embedding_" in name
        elif (module, kind) not in wholes:
            wholes[module, kind] = parts.whole[kind] = stored
            if ".base_layer." in name and kind == "weight":
                parts.frozen.add(kind)
    odd = sorted(module for module, parts in modules.items() if (parts.down is None) != (parts.up is None))
    if odd:
        raise UserError(f"{folder} has only one of the two LoRA factors of {_words(odd)}: the file is not whole")
    return modules


_KINDS = (
    (".lora_A.weight", "down"),
    (".lora_B.weight", "up"),
    (".lora_B.bias", "up_bias"),
    (".lora_embedding_A", "down"),
    (".lora_embedding_B", "up"),
    (".lora_magnitude_vector", "magnitude"),
    (".lora_magnitude_vector.weight", "magnitude"),
    (".token_adapter.trainable_tokens_delta", "tokens"),
)
_WRAPPERS = (".token_adapter.base_layer", ".base_layer", ".modules_to_save", ".original_module")


def _split(name: str) -> tuple[str, str]:
    """Module, and what of it: a kind of part or the name of a parameter."""
    for ending, kind in _KINDS:
        if name.endswith(ending):
            return name.removesuffix(ending), kind
    module, _, parameter = name.rpartition(".")
    for wrapper in _WRAPPERS:
        module = module.removesuffix(wrapper)
    return module, parameter


def _duplicate(name: str) -> int:
    """0 for a plain name; later ones only count where no plainer name gives the same tensor."""
    return 2 if ".original_module." in name else 1 if ".modules_to_save." in name else 0


def _words(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def find_base(folder: Path) -> Path:
    """The base that an adapter says it was trained on, where that is a folder here; UserError otherwise."""
    name = _read_settings(folder).get("base_model_name_or_path")
    if isinstance(name, str) and name and Path(name).is_dir():
        return Path(name)
    said = f"names {name}, which is no folder here" if name else "does not name it"
    raise UserError(f"no base was given, and {folder / ADAPTER_CONFIG} {said}: give the base with --base")
