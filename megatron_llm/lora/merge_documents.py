"""The small files of a merged folder: configuration, tokenizer and chat template, so that nothing has to be copied by hand.

The tokenizer and the template are those of the last adapter that has them, otherwise the base's: an adapter that was trained
on a template must be asked with it.
"""

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_llm.checkpoint.contract import Contract, folder_tokenizers
from megatron_llm.checkpoint.hf_folder import CONFIG, CONTRACT, GENERATION_CONFIG, read_contract, tokenizer_folder
from megatron_llm.data.chat_template import chat_template_hash, special_token_ids
from megatron_llm.data.tokenizers import build_tokenizer
from megatron_llm.lora.adapter import Adapter
from megatron_llm.lora.base import Base
from megatron_llm.utils.atomic import write_json
from megatron_llm.utils.errors import UserError
from megatron_llm.utils.json_files import read_json

_TOKENIZER_FILE = re.compile(
    r"tokenizer(_config)?\.json|tokenizer\.model|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|"
    r"chat_template\.(jinja|json)|.*\.tiktoken|spiece\.model|sentencepiece\.bpe\.model|tokenization_\w+\.py"
)
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_EXTRA = "additional_chat_templates"
_KINDS = (("tokenizer.json", "HuggingFaceTokenizer"), ("tokenizer.model", "SentencePieceTokenizer"), ("merges.txt", "GPT2BPETokenizer"))


@dataclass(frozen=True)
class TokenizerSource:
    """Folders that tokenizer and chat template come from; None for none. `changed`: one of them is an adapter's."""

    tokenizer: Path | None
    template: Path | None
    changed: bool


def choose_tokenizer(base: Base, adapters: Sequence[Adapter]) -> TokenizerSource:
    """Where tokenizer and template come from: the last adapter with one, otherwise the base."""
    own = [adapter.folder for adapter in reversed(adapters) if tokenizer_folder(adapter.folder) == adapter.folder]
    tokenizer = own[0] if own else tokenizer_folder(base.folder)
    templates = [adapter.folder for adapter in reversed(adapters) if any((adapter.folder / name).is_file() for name in _TEMPLATES)]
    template = templates[0] if templates and templates[0] != tokenizer else None
    return TokenizerSource(tokenizer, template, bool(own or templates))


def copied_files(base: Base, source: TokenizerSource) -> list[Path]:
    """Every file, besides weights and config.json, that the merged folder is made from."""
    found = [path for folder in (source.tokenizer, source.template) if folder is not None for path in sorted(folder.iterdir())]
    files = [path for path in found if path.is_file() and _TOKENIZER_FILE.fullmatch(path.name)]
    extra = source.tokenizer / _EXTRA if source.tokenizer is not None else None
    files += sorted(extra.iterdir()) if extra is not None and extra.is_dir() else []
    named = [base.folder / name for name in (GENERATION_CONFIG, CONTRACT)]
    modules = sorted(base.folder.glob("*.py")) if "auto_map" in base.settings else []
    return [*files, *(path for path in named if path.is_file()), *modules]


def write_documents(base: Base, source: TokenizerSource, folder: Path, *, vocab_size: int | None, tied: bool, dtype: str | None) -> None:
    """Write every file but the weights. `dtype` is the type asked for; None leaves what config.json says.

    UserError when the tokenizer has more entries than the merged model.
    """
    copy_tokenizer(source, folder)
    _check_tokenizer(source, folder, vocab_size)
    write_json(folder / CONFIG, _config(base, vocab_size, tied, dtype))
    for name in (path.name for path in sorted(base.folder.glob("*.py")) if "auto_map" in base.settings):
        shutil.copyfile(base.folder / name, folder / name)
    generation = _generation_config(base, source, folder)
    if generation is not None:
        write_json(folder / GENERATION_CONFIG, generation)
    stamp = read_contract(base.folder)
    if stamp:
        write_json(folder / CONTRACT, {**stamp, "contract": _contract(stamp, source, folder, vocab_size, dtype)})


def copy_tokenizer(source: TokenizerSource, folder: Path) -> None:
    """Copy tokenizer and template; nothing else that lies beside them (states of an optimizer, logs) goes along."""
    if source.tokenizer is not None:
        for path in sorted(source.tokenizer.iterdir()):
            if path.is_file() and _TOKENIZER_FILE.fullmatch(path.name):
                shutil.copyfile(path, folder / path.name)
        extra = source.tokenizer / _EXTRA
        if extra.is_dir():
            shutil.copytree(extra, folder / extra.name)
    for name in _TEMPLATES if source.template is not None else ():
        (folder / name).unlink(missing_ok=True)
        if (source.template / name).is_file():  # type: ignore[operator]
            shutil.copyfile(source.template / name, folder / name)  # type: ignore[operator]


def tokenizer_size(folder: Path) -> int | None:
    """Largest id plus one of the tokenizer in a folder, None without one that is known."""
    kind = next((kind for sign, kind in _KINDS if (folder / sign).is_file()), None)
    return build_tokenizer(kind, folder).vocab_size if kind is not None else None


def _check_tokenizer(source: TokenizerSource, folder: Path, vocab_size: int | None) -> None:
    size = tokenizer_size(folder)
    if size is not None and vocab_size is not None and size > vocab_size:
        raise UserError(
            f"the tokenizer in {source.tokenizer} has {size} entries, the merged model {vocab_size}: the rows of the new tokens "
            "were not saved with the adapter (save_embedding_layers=True, or modules_to_save)"
        )


def _config(base: Base, vocab_size: int | None, tied: bool, dtype: str | None) -> dict[str, Any]:
    config = dict(base.settings)
    if vocab_size is not None and base.embedding is not None and vocab_size != base.tensors.specs[base.embedding].shape[0]:
        named = [name for name in ("vocab_size", "padded_vocab_size") if name in config]
        if not named:
            raise UserError(f"the vocabulary becomes {vocab_size}, but {base.folder / CONFIG} has no vocab_size to be changed")
        config |= dict.fromkeys(named, vocab_size)
    if base.tied and not tied:
        config["tie_word_embeddings"] = False
    if dtype is not None:
        config["dtype"] = dtype
        if "torch_dtype" in config:
            config["torch_dtype"] = dtype
    return config


def _generation_config(base: Base, source: TokenizerSource, folder: Path) -> dict[str, Any] | None:
    """The base's; an adapter's tokenizer adds its end of text to what ends an answer, so that a tuned model stops."""
    path = base.folder / GENERATION_CONFIG
    settings: dict[str, Any] = read_json(path) if path.is_file() else {}
    end = special_token_ids(folder)["eos"] if source.changed else None
    if end is None:
        return settings if path.is_file() else None
    known = settings.get("eos_token_id", base.settings.get("eos_token_id"))
    ends = [end, *(each for each in (known if isinstance(known, list) else [known]) if isinstance(each, int) and each != end)]
    return {**settings, "eos_token_id": ends if len(ends) > 1 else end}


def _contract(stamp: dict[str, Any], source: TokenizerSource, folder: Path, vocab_size: int | None, dtype: str | None) -> dict[str, Any]:
    contract = Contract.from_json(stamp.get("contract", {}))
    contract = replace(contract, vocab_size=vocab_size, dtype=dtype if dtype is not None else contract.dtype)
    if source.changed:
        special = special_token_ids(folder)
        known = [] if special["eos"] is None else [special["eos"]]
        contract = replace(
            contract,
            tokenizers=folder_tokenizers(folder),
            eos=known or contract.eos,
            bos=special["bos"] if special["bos"] is not None else contract.bos,
            chat_template=chat_template_hash(folder),
        )
    return contract.to_json()
