"""Cutting sentences: which splitter is taken, what it says, where it cuts."""

import pickle
from pathlib import Path

import pytest

from megatron_llm.data import sentences
from megatron_llm.data.sentences import SentenceSplitter, build_splitter
from megatron_llm.utils.errors import UserError

TEXT = "Mr. Smith went home.  He slept!\nWhy not? Nobody knows"
CUT = ["Mr. Smith went home.", "He slept!", "Why not?", "Nobody knows"]


def _no_sample() -> list[str]:
    raise AssertionError("training was not needed")


def _punkt_folder(folder: Path, abbreviations: str = "mr\n") -> Path:
    folder.mkdir(parents=True)
    (folder / "abbrev_types.txt").write_text(abbreviations)
    (folder / "collocations.tab").write_text("##number##\tstreet\n")
    (folder / "ortho_context.tab").write_text("he\t2\nwhy\t2\n")
    (folder / "sent_starters.txt").write_text("he\n")
    return folder


def _check(splitter: SentenceSplitter) -> None:
    assert splitter.split(TEXT) == CUT
    assert splitter.split(" \n ") == []
    again: SentenceSplitter = pickle.loads(pickle.dumps(splitter))  # noqa: S301 - our own bytes: workers are sent splitters
    assert again.split(TEXT) == CUT and again.fingerprint == splitter.fingerprint


@pytest.mark.parametrize("inner", ["", "english", "punkt_tab/english", "tokenizers/punkt_tab/english"])
def test_parameters_given_by_path(tmp_path: Path, inner: str) -> None:
    pytest.importorskip("nltk", reason="nltk is in the extra 'data'")
    folder = _punkt_folder(tmp_path / "data" / inner)
    splitter = build_splitter("english", tmp_path / "data", False, _no_sample)
    assert splitter.description == f"NLTK punkt with the parameters in {folder}"
    _check(splitter)
    other = build_splitter("english", _punkt_folder(tmp_path / "other", abbreviations=""), False, _no_sample)
    assert other.split(TEXT)[0] == "Mr."
    assert other.fingerprint != splitter.fingerprint


def test_installed_parameters_come_before_nupunkt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nltk_data = pytest.importorskip("nltk.data", reason="nltk is in the extra 'data'")
    _punkt_folder(tmp_path / "tokenizers" / "punkt_tab" / "english")
    monkeypatch.setattr(nltk_data, "path", [str(tmp_path)])
    splitter = build_splitter("english", None, False, _no_sample)
    assert "installed parameters" in splitter.description
    _check(splitter)


def test_nupunkt_where_nltk_has_no_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nupunkt", reason="nupunkt is in the extra 'data'")
    monkeypatch.setattr(sentences, "_find_parameters", lambda roots, lang: None)
    splitter = build_splitter("english", None, False, _no_sample)
    assert splitter.description.startswith("nupunkt")
    _check(splitter)


def test_training_on_the_corpus_where_nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nltk", reason="nltk is in the extra 'data'")
    monkeypatch.setattr(sentences, "_find_parameters", lambda roots, lang: None)
    sample = ["Der Bundeskanzler sprach z. B. gestern. Er ging um 10 Uhr nach Hause. " * 50] * 3
    splitter = build_splitter("german", None, False, lambda: sample)
    assert "trained on the first 10,500 characters of the corpus (no parameters for 'german' are installed)" in splitter.description
    assert splitter.split("Er ging. Wir auch.") == ["Er ging.", "Wir auch."]
    assert splitter.fingerprint == build_splitter("german", None, False, lambda: sample).fingerprint


def test_chinese_end_marks() -> None:
    splitter = build_splitter("chinese", None, False, _no_sample)
    text = "\u4ed6\u8bf4\uff1a\u201c\u597d\uff01\u201d\u7136\u540e\u8d70\u4e86\u3002\u771f\u7684\uff1f\n\u4e0b\u4e00\u6bb5"
    assert splitter.split(text) == [
        "\u4ed6\u8bf4\uff1a\u201c\u597d\uff01\u201d",
        "\u7136\u540e\u8d70\u4e86\u3002",
        "\u771f\u7684\uff1f",
        "\u4e0b\u4e00\u6bb5",
    ]
    kept = build_splitter("chinese", None, True, _no_sample)
    assert "".join(kept.split(text)) == text


def test_keep_newlines_loses_nothing(tmp_path: Path) -> None:
    pytest.importorskip("nltk", reason="nltk is in the extra 'data'")
    splitter = build_splitter("english", _punkt_folder(tmp_path / "p"), True, _no_sample)
    assert splitter.split(TEXT) == ["Mr. Smith went home.  ", "He slept!\n", "Why not? ", "Nobody knows"]
    assert "".join(splitter.split(f" {TEXT}\n\n")) == f" {TEXT}\n\n"


def test_folders_without_parameters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no punkt parameters for 'english': expected abbrev_types.txt"):
        build_splitter("english", tmp_path, False, _no_sample)
    pytest.importorskip("nltk", reason="nltk is in the extra 'data'")
    (_punkt_folder(tmp_path / "bad") / "collocations.tab").write_text("one column\n")
    with pytest.raises(UserError, match="are garbled"):
        build_splitter("english", tmp_path / "bad", False, _no_sample)
