"""The model that adapters are merged into: a Hugging Face folder, its tensors found by the names that modules have in memory."""

from pathlib import Path
from typing import Any

import torch

from megatron_llm.checkpoint.hf_folder import CONFIG, is_hf_folder, list_tensors, read_hf_config
from megatron_llm.lora.tensors import StoredTensors
from megatron_llm.utils.errors import UserError

_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
_HEADS = ("lm_head", "embed_out", "output_layer")
_INNER = ("model.", "transformer.", "gpt_neox.")
_ROWS = 256  # of two matrices that are compared, at a time
# transformers' GPT-2 stores its linear layers the other way round, [in, out].
_TRANSPOSED = {"gpt2": ("c_attn", "q_attn", "c_proj", "c_fc"), "openai-gpt": ("c_attn", "c_proj", "c_fc")}


class Base:
    """An opened base.

    settings   content of config.json
    tensors    every stored tensor
    embedding  name of the input embedding's weight, None when it cannot be told
    head       name of the output layer's weight; stored or, when `tied`, only another name of the embedding
    tied       whether the output layer is the embedding
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder: give the base as a Hugging Face folder or one of our checkpoints")
        if not is_hf_folder(folder):
            raise UserError(f"{folder} holds no model: {CONFIG} and weights (*.safetensors or pytorch_model*.bin) are needed")
        self.folder = folder
        self.settings: dict[str, Any] = read_hf_config(folder)
        if "quantization_config" in self.settings:
            raise UserError(f"{folder} holds quantised weights: merge into the full ones, and quantise the result")
        self.tensors = StoredTensors(folder, list_tensors(folder))
        self.embedding = next((name for name in self.tensors.specs if _is(name, _EMBEDDINGS)), None)
        stored = next((name for name in self.tensors.specs if _is(name, _HEADS)), None)
        said = self.settings.get("tie_word_embeddings", stored is None)
        self.tied = bool(said) and self.embedding is not None
        self.head = stored or ("embed_out.weight" if self.settings.get("model_type") == "gpt_neox" else "lm_head.weight")
        self.has_copy = self.tied and stored is not None
        if self.has_copy:
            self._check_copy()
        elif stored is None and not self.tied:
            raise UserError(
                f"{folder} has tie_word_embeddings false in {CONFIG} but no weights of an output layer: fetch the folder again, whole"
            )

    def find(self, module: str, parameter: str) -> str | None:
        """The stored name of a module's parameter (a tied output layer has that of `head`); None when the base has none."""
        name = f"{module}.{parameter}"
        if self.tied and name == self.head:
            return name
        shorter = next((name.removeprefix(prefix) for prefix in _INNER if name.startswith(prefix)), name)
        return next((candidate for candidate in (name, shorter) if candidate in self.tensors.specs), None)

    def source(self, name: str) -> str:
        """Where the values of a weight are stored: those of a tied output layer are the embedding's."""
        assert self.embedding is not None or not self.tied
        return self.embedding or name if self.tied and name == self.head else name

    def is_embedding(self, name: str) -> bool:
        """Whether a weight is the input embedding's."""
        return name == self.embedding

    def is_transposed(self, name: str) -> bool:
        """Whether a weight is stored as [in, out]."""
        layers = _TRANSPOSED.get(str(self.settings.get("model_type")), ())
        return _is(name, layers) and len(self.tensors.specs[self.source(name)].shape) == 2

    def has_vocabulary_rows(self, name: str) -> bool:
        """Whether the rows of a tensor are those of the vocabulary."""
        return name in (self.embedding, self.head) or name == self.head.removesuffix("weight") + "bias"

    def matrices(self) -> list[str]:
        """Modules with a weight of two dimensions, by their stored names."""
        named = [name for name, spec in self.tensors.specs.items() if name.endswith(".weight") and len(spec.shape) == 2]
        return [name.removesuffix(".weight") for name in named]

    def _check_copy(self) -> None:
        assert self.embedding is not None
        shapes = [self.tensors.specs[name].shape for name in (self.head, self.embedding)]
        if shapes[0] != shapes[1] or not all(self._same_rows(first) for first in range(0, shapes[0][0], _ROWS)):
            raise UserError(
                f"{self.folder} has tie_word_embeddings true in {CONFIG} but another matrix in {self.head} than in {self.embedding}: "
                "set tie_word_embeddings to what the model is"
            )

    def _same_rows(self, first: int) -> bool:
        assert self.embedding is not None
        last = min(first + _ROWS, self.tensors.specs[self.head].shape[0])
        one, other = (self.tensors.read_rows(name, first, last) for name in (self.head, self.embedding))
        return torch.equal(one, other)


def _is(name: str, modules: tuple[str, ...]) -> bool:
    return name.endswith(".weight") and name.removesuffix(".weight").rpartition(".")[2] in modules
