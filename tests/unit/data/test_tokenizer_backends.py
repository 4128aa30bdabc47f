"""gigatoken beside a tokenizer's own library: taken where the ids are equal, refused in one line where they are not."""

import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from megatron_llm.data import tokenizer_backends
from megatron_llm.data.indexed import IndexedDataset
from megatron_llm.data.preprocess import PreprocessSettings, preprocess
from megatron_llm.data.sources import BLOCK_BYTES
from megatron_llm.data.tokenizer_backends import HARD_TEXTS, GigatokenEncoder, LibraryEncoder, hard_block
from megatron_llm.data.tokenizers import Tokenizer, build_tokenizer
from megatron_llm.utils.errors import UserError
from tests.small_tokenizers import TEXTS, byte_level, sentencepiece_bytes, with_pieces

WORDS = [word for text in TEXTS for word in text.split()]


class FakeGigatoken:
    """Stands for gigatoken where it is not installed: the library's ids, but for texts that hold `wrong`."""

    def __init__(self, tokenizer: Tokenizer, wrong: str = "\0never\0") -> None:
        self.fast, self.wrong, self.loads = tokenizer._tokenizer, wrong, 0  # type: ignore[attr-defined]

    def load_hf_json(self, content: str) -> "FakeGigatoken":
        """As gigatoken's."""
        json.loads(content)
        self.loads += 1
        return self

    def encode(self, text: bytes) -> np.ndarray:
        """As gigatoken's."""
        ids = np.array(self.fast.encode(text.decode(), add_special_tokens=False).ids, np.uint32)
        return ids[::-1] if self.wrong in text.decode() else ids


def _install(monkeypatch: pytest.MonkeyPatch, fake: Any) -> None:
    module = ModuleType("gigatoken")
    monkeypatch.setitem(sys.modules, "gigatoken", module)
    monkeypatch.setitem(sys.modules, "gigatoken.gigatoken_rs", fake)
    monkeypatch.setattr(tokenizer_backends, "available", lambda name: True)


@pytest.fixture
def settings(tmp_path: Path) -> PreprocessSettings:
    """A run over a few blocks, in this process."""
    byte_level(tmp_path / "tokenizer")
    source = random.Random(0)
    lines = [json.dumps({"text": " ".join(source.choices(WORDS, k=50)), "n": i}) for i in range(1100)]
    lines[-30] = json.dumps({"text": "a rare zebra"})
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    assert (tmp_path / "a.jsonl").stat().st_size > BLOCK_BYTES
    return PreprocessSettings(
        (str(tmp_path / "a.jsonl"),),
        str(tmp_path / "out"),
        "HuggingFaceTokenizer",
        str(tmp_path / "tokenizer"),
        append_eod=True,
        workers=0,
    )


def _ids(settings: PreprocessSettings) -> list[list[int]]:
    preprocess(settings)
    dataset = IndexedDataset(settings.dataset_prefix("text"))
    return [dataset[i].tolist() for i in range(len(dataset))]


def test_the_choice_is_said_and_the_ids_are_the_librarys(
    settings: PreprocessSettings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = _ids(replace(settings, tokenizer_backend="library"))
    assert "ids from" not in capsys.readouterr().err
    monkeypatch.setattr(tokenizer_backends, "available", lambda name: False)
    assert _ids(settings) == expected
    assert "ids from tokenizers: gigatoken, which is many times faster, is not installed (pip install" in capsys.readouterr().err
    with pytest.raises(UserError, match="--tokenizer-backend gigatoken: gigatoken, .* is not installed .*; use auto or library"):
        preprocess(replace(settings, tokenizer_backend="gigatoken"))
    fake = FakeGigatoken(build_tokenizer(*settings.tokenizer))
    _install(monkeypatch, fake)
    assert _ids(settings) == expected and fake.loads > 0
    assert "ids from gigatoken: equal to those of tokenizers in a sample of the input" in capsys.readouterr().err


@pytest.mark.parametrize(("wrong", "where"), [("zebra", "a.jsonl"), (HARD_TEXTS[0][:9], "texts that are hard to cut")])
def test_other_ids_in_the_sample_are_seen(
    settings: PreprocessSettings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: str, where: str
) -> None:
    """Also where they are at the end of the input: the sample is taken from all over it."""
    monkeypatch.setattr("megatron_llm.data.preprocess.SAMPLE_PLACES", 12)
    expected = _ids(replace(settings, tokenizer_backend="library"))
    _install(monkeypatch, FakeGigatoken(build_tokenizer(*settings.tokenizer), wrong))
    capsys.readouterr()
    assert _ids(settings) == expected
    assert f"ids from tokenizers: gigatoken comes to other ids in {where}" in capsys.readouterr().err.replace(
        f"{settings.input[0]}", "a.jsonl"
    )
    with pytest.raises(UserError, match="--tokenizer-backend gigatoken: gigatoken comes to other ids in"):
        preprocess(replace(settings, tokenizer_backend="gigatoken"))


def test_a_tokenizer_that_gigatoken_cannot_read_is_no_error(
    settings: PreprocessSettings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Refusing:
        def load_hf_json(self, content: str) -> None:
            raise RuntimeError("Unsupported model type\n\nLocation: somewhere")

    _install(monkeypatch, Refusing())
    assert len(_ids(settings)) == 1100
    assert "ids from tokenizers: gigatoken cannot read this tokenizer (Unsupported model type)\n" in capsys.readouterr().err


def test_what_gigatoken_remembers_is_bounded(settings: PreprocessSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeGigatoken(build_tokenizer(*settings.tokenizer))
    _install(monkeypatch, fake)
    resident = 10**9
    monkeypatch.setattr(tokenizer_backends, "_resident_bytes", lambda: resident)
    encoder = GigatokenEncoder("{}")
    encoder(["low"])
    assert fake.loads == 1
    resident += 200 << 20
    encoder(["low"])
    assert fake.loads == 2
    encoder(["low"])
    assert fake.loads == 2  # measured anew from there


def test_hard_texts_reach_the_encoder_as_they_are() -> None:
    from megatron_llm.data.records import parse_block

    assert parse_block(hard_block(["a", "b"]), ["a", "b"]).texts == {"a": list(HARD_TEXTS), "b": list(HARD_TEXTS)}


def _small_tokenizer(kind: str, folder: Path) -> Tokenizer:
    if kind == "sentencepiece":
        return with_pieces(sentencepiece_bytes(folder, remove_extra_whitespaces=False), ["\u4e2d\u4e2d"], folder / "tokenizer.model")
    return byte_level(folder, add_space=kind == "space")


@pytest.mark.parametrize("kind", ["bytes", "space", "sentencepiece"])
def test_gigatoken_gives_the_librarys_ids(tmp_path: Path, kind: str) -> None:
    """The real one, on what every run tries and on random texts, for kinds that it reads."""
    pytest.importorskip("gigatoken", reason="gigatoken is in the extra 'data'")
    tokenizer = _small_tokenizer(kind, tmp_path)
    content = tokenizer.as_json()
    assert content is not None
    quick, slow = GigatokenEncoder(content), LibraryEncoder(tokenizer)
    source = random.Random(1)
    pieces = [*WORDS, " ", "  ", "\n", "\t", "'s", "12", "\u4e2d", "\U0001f600", "e\u0301", "<|endoftext|>", "</s>"]
    texts = ["".join(source.choices(pieces, k=source.randint(1, 40))) for _ in range(500)]
    for sample in (HARD_TEXTS, texts):
        assert [ids.tolist() for ids in quick(sample)] == [ids.tolist() for ids in slow(sample)]
