"""Folders of tokenizer files that transformers' AutoTokenizer opens with the ids we train on.

Everything is written as a `tokenizer.json` under the class PreTrainedTokenizerFast, which transformers loads as it
stands. Model-specific classes rebuild the tokenizer from its vocabulary and may come to other ids.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_llm.utils.atomic import atomic_file, make_folder, write_json, write_text
from megatron_llm.utils.errors import UserError
from megatron_llm.utils.optional import require

FAST_CLASS = "PreTrainedTokenizerFast"
_SPACE = "\u2581"  # how sentencepiece spells a space
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # kinds of pieces in sentencepiece's model format
_UNIGRAM, _BPE = 1, 2  # kinds of models in it


def write_folder(
    folder: Path,
    tokenizer: Any,
    *,
    eos_token: str | None = None,
    bos_token: str | None = None,
    unk_token: str | None = None,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write `tokenizer` (of the tokenizers library) as a folder for AutoTokenizer, with its special tokens and further files."""
    special = {"bos_token": bos_token, "eos_token": eos_token, "unk_token": unk_token}
    named = {key: token for key, token in special.items() if token is not None}
    make_folder(folder)
    for name, content in (files or {}).items():
        with atomic_file(folder / name) as stream:
            stream.write(content)
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
    write_json(folder / "tokenizer_config.json", named | {"clean_up_tokenization_spaces": False, "tokenizer_class": FAST_CLASS})
    write_json(folder / "special_tokens_map.json", named)


def copy_folder(tokenizer_json: Path, folder: Path, *, end_token: str | None) -> None:
    """Copy a Hugging Face tokenizer: `tokenizer_json` as it is, and the settings beside it with the class made generic."""
    source = tokenizer_json.parent
    config: dict[str, Any] = {"eos_token": end_token} if end_token else {}
    if (source / "tokenizer_config.json").is_file():
        config |= json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["tokenizer_class"] = FAST_CLASS
    # Code of its own would be preferred over the class, and asks for trust.
    config.pop("auto_map", None)
    make_folder(folder)
    write_text(folder / "tokenizer.json", tokenizer_json.read_text(encoding="utf-8"))
    write_json(folder / "tokenizer_config.json", config)
    for name in ("special_tokens_map.json", "chat_template.jinja", "tokenizer.model"):
        if (source / name).is_file():
            with atomic_file(folder / name) as stream:
                stream.write((source / name).read_bytes())


def byte_level_bpe(vocab: dict[str, int], merges: list[tuple[str, str]], end_token: str, *, split_words: bool = True) -> Any:
    """A byte-level BPE of the tokenizers library, as GPT-2's; `end_token` becomes special when the vocabulary has it.

    Without `split_words` the text is not cut into words first (which changes nothing when there are no merges).
    """
    tokenizers = require("tokenizers", purpose="a byte-level BPE")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split_words)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    if end_token in vocab:
        tokenizer.add_special_tokens([end_token])
    return tokenizer


def byte_level_json(vocab: Mapping[str, int], merges: Sequence[Sequence[str]], end_token: str) -> str:
    """What `byte_level_bpe(...).to_str()` gives, without building it."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": merges,
    }
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": vocab[end_token], "content": end_token, **plain}] if end_token in vocab else [],
        "normalizer": None,
        "pre_tokenizer": split,
        "post_processor": None,
        "decoder": {**split, "add_prefix_space": True},
        "model": model,
    }
    return json.dumps(content, ensure_ascii=False)


def convert_sentencepiece(model: bytes, name: str) -> tuple[Any, dict[str, str]]:
    """A sentencepiece model as a tokenizer of the tokenizers library, and its special tokens by role.

    Exact for BPE models without Unicode normalisation (LLaMA's, Mistral's). Unigram models: equally likely cuts of a
    text, as of a run of spaces, may be decided differently. With normalisation (NFKC) a combining mark or variation
    selector behind a character that the normalisation replaces is lost. transformers' own conversion is less exact: it
    orders merges by vocabulary id, not by score.
    """
    tokenizers = require("tokenizers", purpose="converting a sentencepiece model")
    # Importing the module of message classes needs protobuf, which is what fails when something is missing.
    proto = require("sentencepiece.sentencepiece_model_pb2", purpose="converting a sentencepiece model").ModelProto()
    proto.ParseFromString(model)
    if proto.trainer_spec.model_type not in (_UNIGRAM, _BPE):
        raise UserError(
            f"{name} is a sentencepiece model of the word or character kind; only bpe and unigram can be written for transformers"
        )
    pieces = [piece.piece for piece in proto.pieces]
    unk = pieces[proto.trainer_spec.unk_id]
    fallback = bool(proto.trainer_spec.byte_fallback)
    if proto.trainer_spec.model_type == _UNIGRAM:
        scores = [(piece.piece, piece.score) for piece in proto.pieces]
        core = tokenizers.models.Unigram(scores, unk_id=proto.trainer_spec.unk_id, byte_fallback=fallback)
    else:
        # ignore_merges: a stretch of text that is a piece as a whole is that piece (a user-defined one has no merges).
        vocab = {piece: index for index, piece in enumerate(pieces)}
        core = tokenizers.models.BPE(vocab, _merges(proto, vocab), unk_token=unk, fuse_unk=True, byte_fallback=fallback, ignore_merges=True)
    tokenizer = tokenizers.Tokenizer(core)
    tokenizer.normalizer = _normalizer(tokenizers, proto)
    defined = sorted((piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED), key=len, reverse=True)
    if defined:
        # These are cut out of the normalised text, the longest first; added tokens would be cut out before, and each
        # rest of the text would get a leading space of its own.
        pattern = tokenizers.Regex("|".join(re.escape(piece) for piece in defined))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(pattern, "isolated")
    tokenizer.decoder = _decoder(tokenizers, proto)
    control = [piece.piece for piece in proto.pieces if piece.type == _CONTROL]
    tokenizer.add_special_tokens([unk, *control])
    roles = {"unk_token": proto.trainer_spec.unk_id, "bos_token": proto.trainer_spec.bos_id, "eos_token": proto.trainer_spec.eos_id}
    return tokenizer, {role: pieces[index] for role, index in roles.items() if 0 <= index < len(pieces)}


def _merges(proto: Any, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """The merges a BPE model implies: every split of a piece into two pieces, best-scored result first, as sentencepiece merges.

    Among equal scores (runs of spaces, often) sentencepiece goes from left to right, so that a left half grows as far as
    it can before the next is begun: the longest left half has to come first.
    """
    usable = {piece.piece for piece in proto.pieces if piece.type == _NORMAL}
    ranked: list[tuple[float, int, int, str, str]] = []
    for piece in proto.pieces:
        if piece.piece not in usable:
            continue
        for cut in range(1, len(piece.piece)):
            left, right = piece.piece[:cut], piece.piece[cut:]
            if left in usable and right in usable:
                ranked.append((-piece.score, -len(left), vocab[left], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _normalizer(tokenizers: Any, proto: Any) -> Any:
    """What sentencepiece does to a text before cutting it: characters, surplus spaces, a leading space, spaces spelled."""
    kinds, spec = tokenizers.normalizers, proto.normalizer_spec
    steps = []
    if spec.precompiled_charsmap:
        steps.append(kinds.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(kinds.Replace(tokenizers.Regex("^ +| +$"), ""))
        steps.append(kinds.Replace(tokenizers.Regex(" {2,}"), " "))
    if spec.add_dummy_prefix:
        steps.append(kinds.Prepend(_SPACE))
    if spec.escape_whitespaces:
        steps.append(kinds.Replace(" ", _SPACE))
    return kinds.Sequence(steps)


def _decoder(tokenizers: Any, proto: Any) -> Any:
    kinds = tokenizers.decoders
    steps = [kinds.Replace(_SPACE, " "), kinds.ByteFallback(), kinds.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix or proto.normalizer_spec.remove_extra_whitespaces:
        steps.append(kinds.Strip(" ", 1, 0))
    return kinds.Sequence(steps)
