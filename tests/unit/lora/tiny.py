"""Tiny random bases and adapters as peft saves them, and what peft and transformers compute with them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 50
TARGET = {"llama": "q_proj", "gpt2": "c_attn", "bloom": "query_key_value"}
EMBEDDING = {"llama": "embed_tokens", "gpt2": "wte", "bloom": "word_embeddings"}


def make_model(family: str, *, tied: bool | None = None, seed: int = 0, width: int = 16, groups: int | None = None) -> Any:
    """A random model of two layers; llama is untied unless said otherwise, and may have `groups` of heads; the others are tied."""
    import transformers as hf

    torch.manual_seed(seed)
    common: dict[str, Any] = {"vocab_size": VOCABULARY, "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None}
    tie = tied if tied is not None else family != "llama"
    if family == "llama":
        shape = {"intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
        shape |= {} if groups is None else {"num_key_value_heads": groups}
        return hf.LlamaForCausalLM(hf.LlamaConfig(hidden_size=width, tie_word_embeddings=tie, **shape, **common))
    if family == "gpt2":
        return hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=width, n_layer=2, n_head=2, n_positions=32, tie_word_embeddings=tie, **common))
    return hf.BloomForCausalLM(hf.BloomConfig(hidden_size=width, n_layer=2, n_head=2, tie_word_embeddings=tie, **common))


def make_base(folder: Path, family: str, **options: Any) -> Path:
    """A base folder of several files of weights."""
    dtype = options.pop("dtype", torch.float32)
    make_model(family, **options).to(dtype).save_pretrained(folder, max_shard_size="6KB")
    return folder


def make_adapter(
    folder: Path, base: Path, *, scale: float = 0.3, seed: int = 1, rows: int | None = None, save_embeddings: Any = "auto", **settings: Any
) -> Path:
    """An adapter for the base whose trained parameters are moved by noise; `rows` resizes the vocabulary before."""
    from peft import LoraConfig, get_peft_model

    with quiet():
        model = open_model(base)
        if rows is not None:
            torch.manual_seed(seed)
            model.resize_token_embeddings(rows, mean_resizing=False)
        adapted: Any = get_peft_model(model, LoraConfig(**{"r": 2, "lora_alpha": 5, "task_type": "CAUSAL_LM", **settings}))
        adapted.peft_config["default"].base_model_name_or_path = str(base)
        generator = torch.Generator().manual_seed(seed)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += scale * torch.randn(parameter.shape, generator=generator)
        adapted.save_pretrained(folder, save_embedding_layers=save_embeddings)
    return folder


def open_model(folder: Path) -> Any:
    """A folder as transformers opens it, fp32; every weight is there and used."""
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    model, info = loader.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model.eval()


def some_ids(rows: int = VOCABULARY) -> Tensor:
    """Ids [3, 17] of a vocabulary, its last id among them."""
    ids = torch.randint(rows, (3, 17), generator=torch.Generator().manual_seed(7))
    ids[1, 3] = rows - 1
    return ids


def folder_logits(folder: Path, ids: Tensor) -> Tensor:
    """Logits of a model folder."""
    with quiet(), torch.no_grad():
        return open_model(folder)(ids).logits


def adapter_logits(base: Path, adapters: Sequence[Path], ids: Tensor, rows: int | None = None) -> Tensor:
    """Logits of the base with adapters by peft: each but the last merged by peft, the last not merged."""
    from peft import PeftModel

    loader: Any = PeftModel
    with quiet(), torch.no_grad():
        model = open_model(base)
        for folder in adapters:
            if rows is not None and model.get_input_embeddings().weight.shape[0] != rows:
                model.resize_token_embeddings(rows, mean_resizing=False)
            adapted = loader.from_pretrained(model, folder).eval()
            if folder is adapters[-1]:
                return adapted(ids).logits
            model = adapted.merge_and_unload()
    raise AssertionError("no adapter was given")


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and warnings of the libraries."""
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
