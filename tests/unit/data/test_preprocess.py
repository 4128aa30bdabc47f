"""Preprocessing from files to dataset: contents, options, bad input."""

import gzip
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_llm.data.indexed import IndexedDataset
from megatron_llm.data.preprocess import PreprocessSettings, preprocess
from megatron_llm.data.tokenizers import ByteTokenizer, build_tokenizer
from megatron_llm.utils.errors import UserError

ROOT = Path(__file__).parents[3]
SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the sample data beside the checkout is not there")


def _settings(folder: Path, *inputs: Path, **options: object) -> PreprocessSettings:
    base = PreprocessSettings(tuple(map(str, inputs)), str(folder / "out"), "ByteTokenizer", append_eod=True, workers=0)
    return replace(base, **options)  # type: ignore[arg-type]


def _write_jsonl(path: Path, records: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def _texts(prefix: str, *, eod: bool = True) -> list[str]:
    """The documents of a dataset of bytes, checked for their end."""
    dataset = IndexedDataset(prefix)
    texts = []
    for start, end in zip(dataset.document_indices, dataset.document_indices[1:], strict=False):
        ids = np.concatenate([dataset[i] for i in range(start, end)]).tolist()
        if eod:
            assert ids.pop() == 256
        texts.append(ByteTokenizer().decode(ids))
    return texts


def test_documents_in_order_from_files_of_all_kinds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": " \n"}, {"text": ""}, {"text": "two \u4e2d"}])
    (tmp_path / "b.json").write_text('[{"text": "three"}, {"text": "four"}]')
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"five\n\nsix"))
    summary = preprocess(_settings(tmp_path, tmp_path))
    prefix = str(tmp_path / "out_text_document")
    assert _texts(prefix) == ["one", "two \u4e2d", "three", "four", "five", "six"]
    assert (summary.empty, summary.bad) == (3, 0) and summary.datasets[prefix].documents == 6
    assert sorted(path.name for path in tmp_path.glob("out*")) == [f"out_text_document{s}" for s in (".bin", ".idx", ".meta.json")]
    captured = capsys.readouterr()
    assert captured.out == "" and "6 documents" in captured.err and "100.0 %" in captured.err


def test_sidecar_says_what_made_the_ids(tmp_path: Path) -> None:
    preprocess(_settings(tmp_path, _write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "three"}])))
    sidecar = IndexedDataset(tmp_path / "out_text_document").sidecar
    assert sidecar is not None
    assert sidecar.pop("tokenizer_fingerprint") == ByteTokenizer().fingerprint
    assert sidecar == {
        "dtype": "uint16", "vocab_size": 257, "tokenizer_type": "ByteTokenizer", "eod_id": 256, "append_eod": True,
        "documents": 2, "sequences": 2, "tokens": 10, "tokenizer_model": None, "format_version": 1,
        "bos_id": None, "chat_template": None,
    }  # fmt: skip


def test_several_keys_make_several_datasets(tmp_path: Path) -> None:
    path = _write_jsonl(tmp_path / "a.jsonl", [{"text": "one", "title": "A"}, {"text": "two", "title": ""}])
    summary = preprocess(_settings(tmp_path, path, json_keys=("text", "title"), append_eod=False))
    assert list(summary.datasets) == [str(tmp_path / "out_text_document"), str(tmp_path / "out_title_document")]
    assert _texts(str(tmp_path / "out_text_document"), eod=False) == ["one", "two"]
    assert _texts(str(tmp_path / "out_title_document"), eod=False) == ["A"]


def test_sentences_are_sequences_and_the_end_closes_the_last(tmp_path: Path) -> None:
    pytest.importorskip("nupunkt", reason="nupunkt is in the extra 'data'")
    path = _write_jsonl(tmp_path / "a.jsonl", [{"text": "He went home.  She slept."}, {"text": "One"}])
    preprocess(_settings(tmp_path, path, split_sentences=True))
    dataset = IndexedDataset(tmp_path / "out_text_sentence")
    assert dataset.document_indices.tolist() == [0, 2, 3]
    assert [bytes(s[s < 256].tolist()).decode() for s in map(dataset.get, range(3))] == ["He went home.", "She slept.", "One"]
    assert [int((s == 256).sum()) for s in map(dataset.get, range(3))] == [0, 1, 1]
    preprocess(_settings(tmp_path, path, split_sentences=True, keep_newlines=True))
    assert _texts(str(tmp_path / "out_text_sentence")) == ["He went home.  She slept.", "One"]


def test_the_number_of_workers_does_not_matter(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    records: list[dict[str, object]] = [{"text": "word " * int(n)} for n in random.integers(0, 300, 2000)]
    path = _write_jsonl(tmp_path / "a.jsonl", records)
    outputs = []
    for workers in (0, 3):
        preprocess(_settings(tmp_path, path, workers=workers))
        outputs.append([(tmp_path / f"out_text_document.{suffix}").read_bytes() for suffix in ("bin", "idx")])
    assert outputs[0] == outputs[1]
    assert path.stat().st_size > 4 * 256 * 1024  # several blocks


def test_bad_lines_stop_or_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\nnot json\n{"txt": "two"}\n{"text": "three"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: not JSON \(.*\); correct it, or pass over such lines with --on-error skip"):
        preprocess(_settings(tmp_path, path))
    assert not list(tmp_path.glob("out_*"))
    capsys.readouterr()
    summary = preprocess(_settings(tmp_path, path, on_error="skip"))
    assert summary.bad == 2
    assert _texts(str(tmp_path / "out_text_document")) == ["one", "three"]
    errors = capsys.readouterr().err
    assert "skipped" in errors and "a.jsonl, line 3: no key 'text', it has 'txt'; did you mean 'txt'?" in errors


def test_very_many_bad_lines_are_not_all_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{\n" * 1000 + '{"text": "one"}\n')
    assert preprocess(_settings(tmp_path, path, on_error="skip")).bad == 1000
    errors = capsys.readouterr().err
    assert errors.count("not JSON") == 20 and "skipped more bad lines" in errors


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        ([{"text": ""}], {}, "no document for the key 'text': 1 texts were empty, 0 lines were bad; nothing was written"),
        ([{"body": "x"}], {"on_error": "skip"}, "0 texts were empty, 1 lines were bad"),
        ([{"text": "a"}], {"workers": -1}, "--workers should be 0"),
        ([{"text": "a"}], {"keep_newlines": True}, "it needs --split-sentences"),
        ([{"text": "a"}], {"json_keys": ("a/b",)}, "'a/b' cannot be part of a file name"),
        ([{"text": "a"}], {"json_keys": ("text", "text")}, "one or more different keys"),
    ],
)
def test_nothing_is_left_of_runs_that_cannot_work(
    tmp_path: Path, records: list[dict[str, object]], options: dict[str, object], message: str
) -> None:
    path = _write_jsonl(tmp_path / "a.jsonl", records)
    with pytest.raises(UserError, match=message):
        preprocess(_settings(tmp_path, path, **options))
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_an_end_token_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2}')
    (tmp_path / "merges.txt").write_text("a b\n")
    path = _write_jsonl(tmp_path / "a.jsonl", [{"text": "abab"}])
    options = {"tokenizer_type": "GPT2BPETokenizer", "tokenizer_model": str(tmp_path)}
    with pytest.raises(UserError, match="--append-eod: the GPT2BPETokenizer .* has no end-of-document token"):
        preprocess(_settings(tmp_path, path, **options))
    preprocess(_settings(tmp_path, path, append_eod=False, **options))
    assert IndexedDataset(tmp_path / "out_text_document").get(0).tolist() == [2, 2]


def test_full_disk_is_one_sentence_and_leaves_no_output(tmp_path: Path) -> None:
    path = _write_jsonl(tmp_path / "a.jsonl", [{"text": "x" * 1000}] * 500)
    command = [
        sys.executable,
        "tools/preprocess_data.py",
        "--input",
        path,
        "--output-prefix",
        tmp_path / "out",
        "--tokenizer-type",
        "ByteTokenizer",
    ]
    result = subprocess.run(
        [*map(str, command), "--workers", "0"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        # A file size limit stands in for a full disk: writes beyond it fail in the same way.
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)),
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr and "error: cannot write" in result.stderr and "File too large" in result.stderr
    assert not list(tmp_path.glob("out_*"))


def test_help_starts_with_an_example() -> None:
    command = [sys.executable, "tools/preprocess_data.py", "--help"]
    text = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True).stdout
    assert text.startswith("example:\n  python tools/preprocess_data.py --input ")


HEAVY = ("torch", "transformers", "numpy", "tokenizers", "sentencepiece")


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["--input", "a.jsonl"], 2),
        (["--input", "a.jsonl", "--output-prefix", "b", "--tokenizer-type", "ByteTokenizer", "--workers", "-1"], 1),
    ],
)
def test_help_and_wrong_flags_do_not_wait_for_libraries(arguments: list[str], status: int) -> None:
    code = (
        "import json, runpy, sys\n"
        f"sys.argv = ['tools/preprocess_data.py', *{arguments!r}]\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        f"except SystemExit as end:\n    print(json.dumps([end.code or 0, [m for m in {HEAVY} if m in sys.modules]]), file=sys.stderr)\n"
    )
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    seconds = time.monotonic() - began
    assert json.loads(done.stderr.splitlines()[-1]) == [status, []]
    assert seconds < 5, "it takes a tenth of a second; a busy machine gets fifty times that"


@needs_shared
def test_the_two_line_sample(tmp_path: Path) -> None:
    path = SHARED / "pretrain" / "easyllm_two_lines.jsonl"
    gpt2 = {"tokenizer_type": "GPT2BPETokenizer", "tokenizer_model": str(SHARED / "tokenizer")}
    preprocess(_settings(tmp_path, path, **gpt2))
    dataset = IndexedDataset(tmp_path / "out_text_document")
    tokenizer = build_tokenizer("GPT2BPETokenizer", SHARED / "tokenizer")
    assert len(dataset) == 142
    assert dataset[0].tolist() == [*tokenizer.encode("The quick brown fox"), 50256]
    assert dataset[141].tolist() == [*tokenizer.encode("jumps over the lazy dog"), 50256]


@needs_shared
@pytest.mark.parametrize("name", ["mnbvc_news", "mnbvc_wiki"])
def test_chinese_corpora(tmp_path: Path, name: str) -> None:
    path = SHARED / "pretrain" / f"{name}.jsonl"
    model = SHARED / "tokenizer" / "chinese_sp.model"
    preprocess(_settings(tmp_path, path, tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(model), workers=2))
    dataset = IndexedDataset(tmp_path / "out_text_document")
    tokenizer = build_tokenizer("SentencePieceTokenizer", model)
    texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(dataset) == len(texts) == 100
    for index in range(0, 100, 7):
        assert dataset[index].tolist() == [*tokenizer.encode(texts[index]), tokenizer.eod_id]
