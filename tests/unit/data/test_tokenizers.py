"""Tokenizers: ids, round trips, fingerprints, and folders that transformers opens with equal ids."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_llm.data.tokenizer_export import byte_level_bpe, byte_level_json
from megatron_llm.data.tokenizer_json import listed_ids
from megatron_llm.data.tokenizers import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    build_tokenizer,
)
from megatron_llm.data.train_tokenizer import train_tokenizer
from megatron_llm.utils.errors import UserError

SHARED = Path(__file__).parents[3].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the sample data beside the checkout is not there")

PARTS = [
    "the ",
    "quick",
    " fox",
    "  ",
    "    ",
    "\n",
    "\t",
    "def f(x):",
    "caf\u00e9",
    "\u4e2d\u6587",
    "\u3002",
    "\U0001f600",
    "e\u0301",
    "1234",
    "<",
    "'s",
]


def _texts(count: int = 400, seed: int = 0) -> list[str]:
    """Texts with runs of spaces, several scripts and combining marks; the first ones are special cases."""
    source = random.Random(seed)
    texts = ["".join(source.choice(PARTS) for _ in range(source.randint(1, 15))) for _ in range(count)]
    return ["", " ", "  a  b  ", "\n\n a", " " * 40 + "x", "\u2581 a", "\x00\x7f", *texts]


def _corpus(folder: Path) -> Path:
    path = folder / "corpus.txt"
    # No spaces beside line ends: the trainer of sentencepiece reads lines.
    path.write_text("\n".join(text.replace("\n", " ") for text in _texts(2000, seed=1)), encoding="utf-8")
    return path


def _opened_by_transformers(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _check_export(tokenizer: Tokenizer, folder: Path, texts: list[str], *, decodes: bool = True) -> None:
    """The folder opened by transformers, and by ourselves, gives the same ids and texts."""
    tokenizer.save_pretrained(folder)
    theirs = _opened_by_transformers(folder)
    again = HuggingFaceTokenizer(folder)
    ids = [array.tolist() for array in tokenizer.encode_batch(texts)]
    # With and without: the folder adds no begin or end token by itself.
    assert theirs(texts, add_special_tokens=False)["input_ids"] == ids
    assert theirs(texts)["input_ids"] == ids
    assert [array.tolist() for array in again.encode_batch(texts)] == ids
    assert len(theirs) == tokenizer.vocab_size == again.vocab_size
    assert theirs.eos_token_id == tokenizer.eod_id == again.eod_id
    if decodes:
        assert [theirs.decode(i) for i in ids] == [tokenizer.decode(i) for i in ids]


@pytest.fixture(scope="module")
def sentencepiece_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small models of several kinds, trained here."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("sentencepiece")
    corpus = _corpus(folder)
    plain = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    kinds: dict[str, dict[str, Any]] = {
        "bpe": {"model_type": "bpe", "byte_fallback": True, "allow_whitespace_only_pieces": True, **plain},
        "bpe-user-defined": {
            "model_type": "bpe",
            "byte_fallback": True,
            "user_defined_symbols": ["<|user|>", "<|user|>x", "quick f"],
            **plain,
        },
        "unigram": {"model_type": "unigram", "byte_fallback": True, **plain},
        "unigram-no-prefix": {"model_type": "unigram", "add_dummy_prefix": False, "byte_fallback": True, **plain},
        "unigram-nfkc": {"model_type": "unigram"},
    }
    for kind, options in kinds.items():
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus), model_prefix=str(folder / kind), vocab_size=360, hard_vocab_limit=False, minloglevel=2, **options
        )
    return {kind: folder / f"{kind}.model" for kind in kinds}


KINDS = ["bpe", "bpe-user-defined", "unigram", "unigram-no-prefix", "unigram-nfkc"]


@pytest.mark.parametrize("kind", KINDS)
def test_sentencepiece_conversion_is_exact(kind: str, sentencepiece_models: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = SentencePieceTokenizer(sentencepiece_models[kind])
    texts = [*_texts(), "say <|user|> and caf\u00e9", "<|user|>x <|user|>y", " <|user|> a quick fox"]
    if "unigram" in kind:  # runs of spaces have equally likely cuts: the documented limit
        texts = [text for text in texts if "  " not in text]
    if "nfkc" in kind:  # so is a lost accent behind what the normalisation replaces
        texts = [text for text in texts if "\u2581" not in text]
    # Texts with unknown pieces come back as different marks from the two libraries.
    _check_export(tokenizer, tmp_path, texts, decodes="nfkc" not in kind)
    assert (tmp_path / "tokenizer.model").read_bytes() == sentencepiece_models[kind].read_bytes()


def test_sentencepiece_keeps_text(sentencepiece_models: dict[str, Path]) -> None:
    tokenizer = SentencePieceTokenizer(sentencepiece_models["bpe"])
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in _texts() if "\u2581" not in text)
    assert tokenizer.eod_id == 2


@needs_shared
def test_chinese_sentencepiece_model_on_real_text(tmp_path: Path) -> None:
    tokenizer = SentencePieceTokenizer(SHARED / "tokenizer" / "chinese_sp.model")
    texts = []
    for name in ("mnbvc_news.jsonl", "mnbvc_wiki.jsonl"):
        for line in (SHARED / "pretrain" / name).read_text(encoding="utf-8").splitlines():
            text = json.loads(line)["text"]
            texts += [text, *text.split("\n")]
    assert len(texts) > 1000 and tokenizer.vocab_size == 20000
    _check_export(tokenizer, tmp_path, texts, decodes=False)


@needs_shared
def test_gpt2_files(tmp_path: Path) -> None:
    folder = SHARED / "tokenizer"
    tokenizer = build_tokenizer("GPT2BPETokenizer", vocab_file=folder / "gpt2-vocab.json", merge_file=folder / "gpt2-merges.txt")
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (50257, 50256)
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in _texts())
    assert build_tokenizer("GPT2BPETokenizer", folder).fingerprint == tokenizer.fingerprint
    _check_export(tokenizer, tmp_path, _texts())


def test_bytes(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("a\u00e9") == [97, 0xC3, 0xA9]
    assert tokenizer.decode([0xC3, 0xA9, 256, 0xC3]) == "\u00e9<|endoftext|>\ufffd"
    _check_export(tokenizer, tmp_path, _texts())


def test_trained_tokenizer_and_its_copy(tmp_path: Path) -> None:
    train_tokenizer([str(_corpus(tmp_path))], tmp_path / "tok", 300)
    tokenizer = HuggingFaceTokenizer(tmp_path / "tok")
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (300, 299)
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in _texts())
    (tmp_path / "tok" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "config.json").write_text('{"model_type": "llama"}')
    _check_export(tokenizer, tmp_path / "copy", _texts())
    assert (tmp_path / "copy" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (tmp_path / "copy" / "config.json").read_text() == '{"model_type": "llama"}'
    assert HuggingFaceTokenizer(tmp_path / "copy").fingerprint == tokenizer.fingerprint
    assert HuggingFaceTokenizer(tmp_path / "tok" / "tokenizer.json").eod_id == 299


def test_fingerprint_covers_what_decides_ids_and_nothing_else(tmp_path: Path) -> None:
    ByteTokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    original = HuggingFaceTokenizer(tmp_path).fingerprint
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}}))
    shortened = HuggingFaceTokenizer(tmp_path)
    assert shortened.fingerprint == original and len(shortened.encode("more than three")) == 15
    values["added_tokens"][0]["content"] = "<end>"
    path.write_text(json.dumps(values))
    assert HuggingFaceTokenizer(tmp_path).fingerprint != original


def _with_tokens(content: dict[str, Any], vocab: dict[str, int], added: list[tuple[str, int]]) -> str:
    """A tokenizer.json with other tokens."""
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokens = [{"id": number, "content": name, **token} for name, number in added]
    return json.dumps(content | {"model": content["model"] | {"vocab": vocab}, "added_tokens": tokens})


ADDED = {
    "in the vocabulary": [("b", 1)],
    "behind it": [("<x>", 3), ("<y>", 4)],
    "one of each": [("c", 2), ("<x>", 3)],
    "twice": [("<x>", 3), ("<x>", 3), ("<y>", 4)],
    "numbered by the file alone": [("<x>", 9)],
    "another number than the vocabulary's": [("b", 2)],
    "in another order": [("<x>", 4), ("<y>", 3)],
}


@pytest.mark.parametrize("vocab", [{"a": 0, "b": 1, "c": 2}, {"a": 0, "b": 1, "c": 7}], ids=["without holes", "with holes"])
@pytest.mark.parametrize("added", ADDED.values(), ids=ADDED)
def test_the_ids_that_a_file_lists_are_the_librarys(tmp_path: Path, vocab: dict[str, int], added: list[tuple[str, int]]) -> None:
    """Where they are not, or it cannot be told, the library is asked; either way a tokenizer has the library's ids."""
    from tokenizers import Tokenizer as Fast

    ByteTokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    text = _with_tokens(json.loads(path.read_text()), vocab, added)
    path.write_text(text)
    theirs = Fast.from_str(text).get_vocab(with_added_tokens=True)
    assert listed_ids(json.loads(text)) in (theirs, None)
    tokenizer = HuggingFaceTokenizer(tmp_path)
    assert tokenizer.vocab_size == max(theirs.values()) + 1 and tokenizer.encode("abc") == [vocab["a"], vocab["b"], vocab["c"]]


def test_plain_files_are_not_built_to_be_asked_for_their_ids(tmp_path: Path) -> None:
    train_tokenizer([str(_corpus(tmp_path))], tmp_path / "tok", 300)
    text = (tmp_path / "tok" / "tokenizer.json").read_text()
    ids = listed_ids(json.loads(text))
    assert ids is not None and len(ids) == 300
    tokenizer = HuggingFaceTokenizer(tmp_path / "tok")
    assert (tokenizer.vocab_size, tokenizer.eod_id, tokenizer.as_json()) == (300, 299, text) and "_tokenizer" not in vars(tokenizer)
    for other in (
        "{}",
        "[]",
        "not JSON",
        '{"model": {"vocab": [["a", 0.0]]}}',
        '{"model": {"vocab": {}}}',
        '{"model": {"vocab": {"a": "0"}}}',
    ):
        assert listed_ids(other) is None


def test_a_file_that_lists_other_ids_than_the_library_reads_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ByteTokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr("megatron_llm.data.tokenizers.listed_ids", lambda content: {"<|endoftext|>": 299})
    with pytest.raises(UserError, match="lists other ids than the tokenizers library reads from it"):
        HuggingFaceTokenizer(tmp_path).encode("a")


@pytest.mark.parametrize("end", ["<|endoftext|>", "</s>"])
def test_the_json_of_a_byte_level_bpe_is_the_librarys(end: str) -> None:
    vocab = {"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3, "caf\u00e9": 4}
    built = byte_level_bpe(vocab, [("a", "b")], end)
    assert json.loads(byte_level_json(vocab, [["a", "b"]], end)) == json.loads(built.to_str())


def test_half_a_surrogate_pair_is_refused_by_all(sentencepiece_models: dict[str, Path]) -> None:
    for tokenizer in (ByteTokenizer(), SentencePieceTokenizer(sentencepiece_models["bpe"])):
        with pytest.raises((UnicodeEncodeError, TypeError)):
            tokenizer.encode("a\ud800b")


def test_files_that_cannot_be_used_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "bad.model").write_text("not a model")
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b c\n")
    (tmp_path / "spm").mkdir()
    (tmp_path / "spm" / "tokenizer.model").touch()
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges2.txt").write_text("a b\n")
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("HuggingFaceTokenizer", {"model": tmp_path / "none"}, "none' does not exist: give a folder with tokenizer.json"),
        ("HuggingFaceTokenizer", {"model": tmp_path / "spm"}, "use --tokenizer-type SentencePieceTokenizer"),
        ("HuggingFaceTokenizer", {"model": tmp_path / "bad.json"}, "bad.json is not a tokenizer"),
        ("HuggingFaceTokenizer", {}, "needs --tokenizer-model: a folder with tokenizer.json"),
        ("SentencePieceTokenizer", {"model": tmp_path / "bad.model"}, "bad.model is not a sentencepiece model"),
        ("SentencePieceTokenizer", {"model": tmp_path / "none.model"}, "cannot read the tokenizer file .*none.model: No such file"),
        ("GPT2BPETokenizer", {}, "give --vocab-file and --merge-file"),
        ("GPT2BPETokenizer", {"vocab_file": tmp_path / "vocab.json", "merge_file": tmp_path / "merges.txt"}, "found 'a b c'"),
        ("GPT2BPETokenizer", {"vocab_file": tmp_path / "vocab.json", "merge_file": tmp_path / "merges2.txt"}, "do not go together"),
        ("SentencepieceTokenizer", {}, "did you mean 'SentencePieceTokenizer'"),
    ]
    for kind, options, message in cases:
        with pytest.raises(UserError, match=message):
            build_tokenizer(kind, **options)


def test_importing_the_module_is_light() -> None:
    heavy = ("torch", "transformers", "tokenizers", "sentencepiece")
    code = f"import sys, megatron_llm.data.tokenizers; print([m for m in {heavy} if m in sys.modules])"
    root = Path(__file__).parents[3]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout.strip() == "[]"
