"""Training a tokenizer: what the folder holds, determinism, bad input."""

import json
from pathlib import Path

import pytest

from megatron_llm.data.tokenizers import HuggingFaceTokenizer
from megatron_llm.data.train_tokenizer import train_tokenizer
from megatron_llm.utils.errors import UserError


def _corpus(folder: Path) -> Path:
    path = folder / "a.jsonl"
    texts = [f"the number {i} and the word {'ab' * (i % 9)} \u4e2d\u6587 caf\u00e9" for i in range(500)]
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    return path


def test_training_is_deterministic_and_loses_no_text(tmp_path: Path) -> None:
    path = _corpus(tmp_path)
    for name in ("one", "two"):
        made = train_tokenizer([str(path)], tmp_path / name, 320, json_keys=["body"])
        assert (made.vocab_size, made.texts) == (320, 500)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)
    tokenizer = HuggingFaceTokenizer(tmp_path / "one")
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (320, 319)
    text = "the word \u4e2d\u6587 \ufb01 \uff0c \U0001f600 never seen\t\n"  # a ligature and a full-width comma stay what they are
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("the number")) < 5


def test_reading_stops_when_there_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = train_tokenizer([str(_corpus(tmp_path))], tmp_path / "tok", 280, json_keys=["body"], max_megabytes=0.004)
    assert 4000 <= made.characters < 4100
    assert "stopped reading after" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("vocab_size", "key", "message"),
    [
        (256, "body", "--vocab-size 256 is too small: the 256 bytes and the end token take 257"),
        (5000, "body", r"gives only \d+ ids, fewer than --vocab-size 5000: ask for \d+ or add text"),
        (300, "text", "no text for the keys text"),
    ],
)
def test_impossible_requests_are_one_sentence(tmp_path: Path, vocab_size: int, key: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_tokenizer([str(_corpus(tmp_path))], tmp_path / "tok", vocab_size, json_keys=[key])
    assert not (tmp_path / "tok").exists()


def test_the_smallest_vocabulary_is_the_bytes_and_the_end(tmp_path: Path) -> None:
    train_tokenizer([str(_corpus(tmp_path))], tmp_path / "tok", 257, json_keys=["body"])
    tokenizer = HuggingFaceTokenizer(tmp_path / "tok")
    assert tokenizer.vocab_size == 257 and len(tokenizer.encode("the")) == 3
