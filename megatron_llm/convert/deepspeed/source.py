"""A folder of DeepSpeed as a source of weights by Hugging Face key, with its configuration.

Around a model of transformers DeepSpeed saves that model's own keys but no architecture: `config.json` has to lie in the
run's folder, or be given. Megatron-DeepSpeed saves the arguments of its run, from which the configuration follows.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_llm.checkpoint.hf_folder import CONFIG
from megatron_llm.config.resolve import with_defaults
from megatron_llm.config.schema import ModelConfig, RunConfig
from megatron_llm.convert.deepspeed.folder import StepFolder, find_step, step_number
from megatron_llm.convert.deepspeed.pipeline import PipelineWeights
from megatron_llm.convert.deepspeed.zero import ZeroRank
from megatron_llm.convert.hf_source import check_weights, match_names, read_config
from megatron_llm.convert.logical import HfFromLogical
from megatron_llm.convert.megatron.arguments import config_from_megatron_args, true_vocabulary
from megatron_llm.convert.megatron.folders import arguments
from megatron_llm.convert.pickles import Foreign
from megatron_llm.convert.source import TensorInfo
from megatron_llm.models.registry import get_family
from megatron_llm.utils.errors import UserError
from megatron_llm.utils.json_files import read_json

_TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")
_POSITIONS = {1: "rope", 2: "learned_absolute", 3: "alibi"}  # numbers of BigScience's PositionEmbeddingType
_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")


class DeepSpeedSource:
    """A `WeightSource` over weights around a model of transformers, of any ZeRO stage.

    `master` tells whether the fp32 copies are read. Memory while reading: about two copies of one tensor.
    """

    format = "deepspeed"

    def __init__(self, folder: StepFolder, config: ModelConfig, *, prefer_master: bool) -> None:
        if folder.model_ranks != [0]:
            raise UserError(
                f"{folder.path} was split over {len(folder.model_ranks)} tensor-parallel ranks in a way that it does not record: "
                "let DeepSpeed write it as one (save_16bit_model) and convert that folder"
            )
        self.path, self.config = folder.path, config
        self._rank = ZeroRank(folder, prefer_master=prefer_master)
        self.master = self._rank.master
        self.step = _step(folder, self._rank.state)
        self.layout: Mapping[str, int] = {"dp": self._rank.ranks, "zero": self._rank.stage}
        self.tokenizer = _tokenizer(folder)
        stored = {_WRAPPERS.sub("", name): name for name in self._rank.tensors}
        infos = {key: self._rank.tensors[name] for key, name in stored.items()}
        self._names = {key: stored[name] for key, name in match_names(folder.path, infos, config).items()}
        self._rows = _vocabulary_keys(config)
        self.tensors: Mapping[str, TensorInfo] = {key: self._cut(key, self._rank.tensors[name]) for key, name in self._names.items()}
        check_weights(self)
        self._check_tied(stored)

    def read(self, key: str) -> Tensor:
        """The whole tensor on the CPU, fp32 where the master copy is read. UserError when a file is damaged."""
        tensor = self._rank.read(self._names[key])
        return tensor[: self.config.vocab_size] if key in self._rows else tensor

    def close(self) -> None:
        """Release files."""
        self._rank.close()

    def _cut(self, key: str, info: TensorInfo) -> TensorInfo:
        size = self.config.vocab_size
        if key in self._rows and size is not None and info.shape[0] > size:
            return TensorInfo(info.dtype, (size, *info.shape[1:]))
        return info

    def _check_tied(self, stored: Mapping[str, str]) -> None:
        head, embedding = self._rows
        if head in self._names or head not in stored or self._rank.shared.get(stored[head]) == self._names[embedding]:
            return
        copy = self._rank.tensors[stored[head]]
        if copy == self._rank.tensors[self._names[embedding]] and not torch.equal(
            self._rank.read(stored[head]), self._rank.read(self._names[embedding])
        ):
            raise UserError(
                f"{self.path}: {CONFIG} has tie_word_embeddings true, but {head} is another matrix than {embedding}: "
                "set tie_word_embeddings to what the model is"
            )


class PipelineSource:
    """A `WeightSource` over a pipeline folder of Megatron-DeepSpeed at any TP x PP.

    `master` tells whether the fp32 copies are read. Memory while reading: about three copies of one fused tensor.
    """

    format = "deepspeed"

    def __init__(self, folder: StepFolder, weights: PipelineWeights, config: ModelConfig) -> None:
        self.path, self.config, self._weights = folder.path, config, weights
        self.master = weights.master
        self.step = _step(folder, weights.state)
        self.layout: Mapping[str, int] = {"tp": weights.tp, "pp": weights.pp, "dp": weights.ranks}
        self.tokenizer = _tokenizer(folder)
        self._hf = HfFromLogical(config, lambda name: weights.read(name, config))
        wanted = {name for key in self._hf.shapes for name in self._hf.logical_names(key)}
        missing, unused = sorted(wanted - weights.slots.keys()), sorted(weights.slots.keys() - wanted)
        if config.tie_word_embeddings and "head.weight" in unused:
            raise UserError(f"{folder.path} has a head of its own, but the configuration ties it to the embedding")
        if missing or unused:
            raise UserError(
                f"{folder.path} is not of the {config.model} model that the configuration describes: "
                f"missing {', '.join(missing[:5]) or 'nothing'}; unused {', '.join(unused[:5]) or 'nothing'}"
            )
        self.tensors: Mapping[str, TensorInfo] = {
            key: TensorInfo(weights.info(self._hf.logical_names(key)[0]).dtype, shape) for key, shape in self._hf.shapes.items()
        }

    def read(self, key: str) -> Tensor:
        """The whole tensor on the CPU. UserError when a file is damaged, or has not the shape the configuration asks for."""
        try:
            tensor = self._hf.read(key)
        except (RuntimeError, IndexError) as error:
            raise UserError(f"{key} in {self.path} has not the shape that its configuration asks for: {error}") from error
        if tuple(tensor.shape) != self.tensors[key].shape:
            raise UserError(
                f"{key} in {self.path} has shape {list(tensor.shape)}, the configuration asks for {list(self.tensors[key].shape)}"
            )
        return tensor

    def close(self) -> None:
        """Release files."""
        self._weights.close()


def open_deepspeed(
    path: Path | str, hf_config: Path | str | None = None, vocab_size: int | None = None, *, prefer_master: bool = True
) -> DeepSpeedSource | PipelineSource:
    """Open a step's folder of DeepSpeed, or the newest of a run.

    `hf_config` is a `config.json` or its folder, where none lies beside the weights. `vocab_size` is the true vocabulary;
    rows beyond it are padding. fp32 master weights are read where all of them are there and `prefer_master` holds.
    UserError for what is missing, damaged, or not written by DeepSpeed in this form.
    """
    folder = find_step(path)
    try:
        found = _given_config(folder, Path(hf_config) if hf_config is not None else None)
        if folder.pipeline:
            weights = PipelineWeights(folder, prefer_master=prefer_master)
            config = _sized(found, vocab_size) if found is not None else config_from_arguments(weights, vocab_size)
            return PipelineSource(folder, weights, config)
        if found is None:
            raise UserError(
                f"{folder.path} has no {CONFIG}, and DeepSpeed does not save the architecture: give the model's {CONFIG} with --hf-config"
            )
        return DeepSpeedSource(folder, _sized(found, vocab_size), prefer_master=prefer_master)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        # Files of a structure that no version of DeepSpeed writes.
        raise UserError(f"{folder.path} is not laid out as DeepSpeed writes it: {type(error).__name__}: {error}") from error


def config_from_arguments(weights: PipelineWeights, vocab_size: int | None = None) -> ModelConfig:
    """The configuration of a pipeline folder from the arguments saved in it. UserError when they are absent or not supported."""
    where = weights.folder.path
    raw = weights.state.get("args")
    if raw is None:
        raise UserError(f"{where} has no arguments of the run (args), so the architecture is not known: give its {CONFIG} with --hf-config")
    args = arguments(raw, where)
    kind = (raw if isinstance(raw, Mapping) else vars(raw)).get("position_embedding_type")
    if isinstance(kind, Foreign) and kind.foreign_args:
        args["position_embedding_type"] = _POSITIONS.get(kind.foreign_args[0], kind.foreign_class)
    args.setdefault("tensor_model_parallel_size", weights.tp)
    if args.get("position_embedding_type") in ("absolute", "rotary"):
        args["position_embedding_type"] = {"absolute": "learned_absolute", "rotary": "rope"}[args["position_embedding_type"]]
    if "embedding.norm.weight" not in weights.slots:
        if "head.weight" in weights.slots:
            args["untie_embeddings_and_output_weights"] = True
        return config_from_megatron_args(args, vocab_size)
    return _bloom(args, vocab_size, where)


def _bloom(args: Mapping[str, Any], vocab_size: int | None, where: Path) -> ModelConfig:
    positions = args.get("position_embedding_type")
    if positions != "alibi" or args.get("apply_residual_connection_post_layernorm"):
        raise UserError(
            f"{where} has a norm after the embedding, as BLOOM has, but not its ALiBi positions or residuals: no family is like that"
        )
    hidden = int(args["hidden_size"])
    fields: dict[str, Any] = {
        "num_layers": int(args["num_layers"]),
        "hidden_size": hidden,
        "ffn_hidden_size": int(args.get("ffn_hidden_size") or 4 * hidden),
        "num_attention_heads": int(args["num_attention_heads"]),
        "vocab_size": vocab_size if vocab_size is not None else true_vocabulary(args),
        "max_position_embeddings": int(args.get("seq_length") or args.get("max_position_embeddings") or 2048),
        "norm_epsilon": float(args.get("layernorm_epsilon") or 1e-5),
        "tie_word_embeddings": not args.get("untie_embeddings_and_output_weights", False),
    }
    fields |= {name: float(args[name]) for name in ("attention_dropout", "hidden_dropout", "init_method_std") if name in args}
    config = with_defaults(RunConfig(model=ModelConfig(model="bloom", **fields)), 1).model
    found = get_family("bloom").violations(config)
    if found:
        raise UserError(f"the model in {where} cannot be built: {'; '.join(found)}")
    return config


def _given_config(folder: StepFolder, given: Path | None) -> ModelConfig | None:
    if given is not None:
        file = given / CONFIG if given.is_dir() else given
        return read_config(file.parent, read_json(file))
    for place in dict.fromkeys((folder.path, folder.root)):
        if (place / CONFIG).is_file():
            return read_config(place, read_json(place / CONFIG))
    return None


def _sized(config: ModelConfig, vocab_size: int | None) -> ModelConfig:
    return config if vocab_size is None else replace(config, vocab_size=vocab_size)


def _step(folder: StepFolder, state: Mapping[str, Any]) -> int | None:
    for name in ("iteration", "global_steps"):
        if isinstance(state.get(name), int):
            return int(state[name])
    return step_number(folder)


def _tokenizer(folder: StepFolder) -> Path | None:
    places = (folder.root, folder.root / "tokenizer", folder.path)
    return next((place for place in places if any((place / name).is_file() for name in _TOKENIZER)), None)


def _vocabulary_keys(config: ModelConfig) -> tuple[str, str]:
    table = get_family(config.model).table
    head, embedding = (table.rule_for(f"{name}.weight")[0].tensors[0].key for name in ("head", "embedding.word"))
    return head, embedding
