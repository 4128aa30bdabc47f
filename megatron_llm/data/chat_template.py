"""What a tokenizer's folder says besides ids: begin and padding token, and the chat template, as a hash to compare."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_llm.data.tokenizers import Tokenizer
from megatron_llm.utils.errors import UserError

_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")


def tokenizer_settings_folder(tokenizer: Tokenizer) -> Path | None:
    """The folder in which a tokenizer's settings lie beside its files; None for a tokenizer without files."""
    if tokenizer.model is None:
        return None
    path = Path(tokenizer.model)
    return path if path.is_dir() else path.parent


def begin_id(tokenizer: Tokenizer) -> int | None:
    """The id of the begin token that the settings beside a tokenizer's files name."""
    folder = tokenizer_settings_folder(tokenizer)
    return special_token_ids(folder, tokenizer.listed)["bos"] if folder is not None else None


def _settings(folder: Path) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for name in reversed(_SETTINGS):
        if (folder / name).is_file():
            try:
                content = json.loads((folder / name).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise UserError(f"{folder / name} cannot be read: {error}") from error
            merged |= content if isinstance(content, dict) else {}
    return merged


def special_token_ids(folder: Path, known: Mapping[str, int] | None = None) -> dict[str, int | None]:
    """`{"bos": id, "eos": id, "pad": id}` as the settings beside `tokenizer.json` name them; None where they name none.

    `known` is what that file lists, for callers who have read it.
    """
    settings = _settings(folder)
    tokens = {role: settings.get(f"{role}_token") for role in ("bos", "eos", "pad")}
    if not (folder / "tokenizer.json").is_file() or not any(tokens.values()):
        return dict.fromkeys(tokens)
    texts = {role: token.get("content") if isinstance(token, dict) else token for role, token in tokens.items()}
    ids = known if known is not None else _ids_by_token(folder / "tokenizer.json")
    return {role: ids.get(text) if text is not None else None for role, text in texts.items()}


def _ids_by_token(path: Path) -> dict[str, int]:
    """The vocabulary of a tokenizer.json, read as it stands: the library takes many times as long to build a tokenizer of it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    vocab = content.get("model", {}).get("vocab", {})
    # Unigram models list their pieces with scores; the place is the id.
    ids = {piece: index for index, (piece, _) in enumerate(vocab)} if isinstance(vocab, list) else dict(vocab)
    return ids | {token["content"]: token["id"] for token in content.get("added_tokens", [])}


def chat_template_hash(folder: Path) -> str | None:
    """Hash of the chat template in a tokenizer's folder (a file of its own, or a setting); None without one."""
    template: Any = _settings(folder).get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if template is None:
        return None
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
