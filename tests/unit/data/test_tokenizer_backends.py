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

from megatron_llm.data import sources, tokenizer_backends
from megatron_llm.data.encoder import EncodedBlock
from megatron_llm.data.encoding import GigatokenEncoding
from megatron_llm.data.indexed import IndexedDataset
from megatron_llm.data.preprocess import PreprocessSettings, preprocess
from megatron_llm.data.preprocess_output import WorkFolder
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
    monkeypatch.setattr("megatron_llm.data.encoding.SAMPLE_PLACES", 12)
    expected = _ids(replace(settings, tokenizer_backend="library"))
    _install(monkeypatch, FakeGigatoken(build_tokenizer(*settings.tokenizer), wrong))
    capsys.readouterr()
    assert _ids(settings) == expected
    assert f"ids from tokenizers: gigatoken comes to other ids in {where}" in capsys.readouterr().err.replace(
        f"{settings.input[0]}", "a.jsonl"
    )
    with pytest.raises(UserError, match="--tokenizer-backend gigatoken: gigatoken comes to other ids in"):
        preprocess(replace(settings, tokenizer_backend="gigatoken"))


class Later:
    """Stands for the process in which the library does its part; it takes as long as so many blocks."""

    def __init__(self, encoding: GigatokenEncoding, blocks: int) -> None:
        self.encoding, self.left, self.asked = encoding, blocks, False

    def ready(self) -> bool:
        """As Background's."""
        self.left -= 1
        return self.left < 0

    def result(self) -> list[EncodedBlock]:
        """As Background's."""
        self.asked = True
        return self.encoding._expect()

    def close(self) -> None:
        """As Background's."""


def _library_is_late(monkeypatch: pytest.MonkeyPatch, blocks: int) -> list[Later]:
    """Let the library answer after so many blocks; what stands for its process is in the list once the run has begun."""
    made: list[Later] = []

    def late(*arguments: Any) -> GigatokenEncoding:
        encoding = GigatokenEncoding(*arguments)
        encoding._expected = later = Later(encoding, blocks)  # type: ignore[assignment]
        made.append(later)
        return encoding

    monkeypatch.setattr("megatron_llm.data.preprocess.GigatokenEncoding", late)
    return made


@pytest.mark.parametrize("blocks", [0, 1, 10**9])
def test_nothing_is_final_before_the_library_has_answered(
    settings: PreprocessSettings, monkeypatch: pytest.MonkeyPatch, blocks: int
) -> None:
    """Also where the library takes longer than all blocks, and with a point to go on from after each block."""
    monkeypatch.setattr(sources, "BLOCK_BYTES", 20_000)
    expected = _ids(replace(settings, tokenizer_backend="library"))
    _install(monkeypatch, FakeGigatoken(build_tokenizer(*settings.tokenizer)))
    made = _library_is_late(monkeypatch, blocks)
    finals: list[bool] = []
    for name in ("commit", "finish"):
        original = getattr(WorkFolder, name)

        def final(work: WorkFolder, *arguments: Any, original: Any = original) -> None:
            finals.append(made[0].asked)
            original(work, *arguments)

        monkeypatch.setattr(WorkFolder, name, final)
    assert _ids(replace(settings, resume_seconds=0.0)) == expected
    assert len(finals) > 10 and all(finals)


@pytest.mark.parametrize("blocks", [1, 7, 10**9])
def test_what_was_made_with_other_ids_is_thrown_away(
    settings: PreprocessSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, blocks: int
) -> None:
    """Whether the difference is known after some blocks or after the last one; also when a bad line ends the run before."""
    monkeypatch.setattr(sources, "BLOCK_BYTES", 20_000)
    expected = _ids(replace(settings, tokenizer_backend="library"))
    written = {path.name: path.read_bytes() for path in tmp_path.glob("out_*")}
    _install(monkeypatch, FakeGigatoken(build_tokenizer(*settings.tokenizer), HARD_TEXTS[0][:9]))
    _library_is_late(monkeypatch, blocks)
    with pytest.raises(UserError, match="gigatoken comes to other ids in texts that are hard to cut"):
        preprocess(replace(settings, tokenizer_backend="gigatoken"))
    assert not list(tmp_path.glob("*.partial"))
    assert _ids(settings) == expected and {path.name: path.read_bytes() for path in tmp_path.glob("out_*")} == written
    bad = tmp_path / "a.jsonl"
    bad.write_text(bad.read_text() + "not json\n")
    with pytest.raises(UserError, match="not JSON"):
        preprocess(settings)
    journal = tmp_path / "out.partial" / "journal.jsonl"
    entries = journal.read_text().splitlines()[1:] if journal.exists() else []
    assert not entries if blocks > 100 else all(json.loads(entry)["counts"]["documents"] for entry in entries)


def test_the_real_one_in_worker_processes(settings: PreprocessSettings, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gigatoken", reason="gigatoken is in the extra 'data'")
    expected = _ids(replace(settings, tokenizer_backend="library"))
    assert _ids(replace(settings, workers=2)) == expected
    assert "ids from gigatoken: equal to those of tokenizers in a sample of the input" in capsys.readouterr().err


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
