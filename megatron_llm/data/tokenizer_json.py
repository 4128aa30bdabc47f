"""What a tokenizer.json says, read without the library it was made for."""

import hashlib
import json
from typing import Any


def parsed(text: str) -> Any:
    """A tokenizer.json as Python values; None where it is no JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def listed_ids(content: Any) -> dict[str, int] | None:
    """The id of each token as a tokenizer.json (its parsed content) lists them; None where it takes the library to tell.

    The library numbers an added token that the model's vocabulary lacks by itself, from the size of that vocabulary on,
    whatever number the file gives; and only some models list a vocabulary by ids.
    """
    try:
        vocab, added = content["model"]["vocab"], content.get("added_tokens") or []
        shortened = content.get("truncation") is not None or content.get("padding") is not None
        if not isinstance(vocab, dict) or not vocab or shortened:
            return None
        ids, following = dict(vocab), len(vocab)
        for token in added:
            if ids.setdefault(token["content"], following) != token["id"]:
                return None
            following = max(following, token["id"] + 1)
    except (TypeError, KeyError, AttributeError):
        return None
    return ids if all(type(number) is int for number in ids.values()) else None


def fingerprint(tokenizer: dict[str, Any]) -> str:
    """Hash of the parts of a tokenizer.json that decide plain ids: template, padding and truncation settings do not."""
    parts = {name: tokenizer.get(name) for name in ("normalizer", "pre_tokenizer", "added_tokens")}
    model = dict(tokenizer.get("model") or {})
    # Old files write a merge as "a b", new ones as ["a", "b"].
    model["merges"] = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", [])]
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {token: model["vocab"][token] for token in sorted(model["vocab"])}  # quicker than sorting by the writer of JSON
    return canonical_hash(parts | {"model": model})


def canonical_hash(value: Any) -> str:
    """SHA-256 of JSON values in one fixed spelling."""
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()
