"""What users get wrong, given to the real entry point: one sentence with what was given and what to do, nothing half-written."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_llm.data.indexed_writer import write_indexed_dataset
from megatron_llm.data.preprocess import PreprocessSettings, preprocess
from megatron_llm.training.pretrain import main
from megatron_llm.utils.errors import UserError

ROOT = Path(__file__).parents[2]
SMALL = (
    "--device",
    "cpu",
    "--num-layers",
    "2",
    "--hidden-size",
    "32",
    "--seq-length",
    "16",
    "--micro-batch-size",
    "2",
    "--train-iters",
    "2",
)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A small dataset without a sidecar."""
    random = np.random.default_rng(0)
    write_indexed_dataset(tmp_path / "corpus", [random.integers(0, 97, 40) for _ in range(30)], 97)
    return tmp_path / "corpus"


def told(*flags: str) -> str:
    """The sentence that training with these flags ends with."""
    with pytest.raises(UserError) as caught:
        main([*SMALL, *flags])
    return str(caught.value)


def files_below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


Damage = Callable[[Path], None]


def truncate_bin(corpus: Path) -> None:
    path = corpus.with_suffix(".bin")
    path.write_bytes(path.read_bytes()[:-10])


def truncate_idx(corpus: Path) -> None:
    path = corpus.with_suffix(".idx")
    path.write_bytes(path.read_bytes()[:50])


def garble_idx(corpus: Path) -> None:
    path = corpus.with_suffix(".idx")
    path.write_bytes(b"not an index at all" + path.read_bytes())


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        pytest.param(lambda corpus: corpus.with_suffix(".bin").unlink(), ("corpus.bin",), id="bin missing"),
        pytest.param(lambda corpus: corpus.with_suffix(".idx").unlink(), ("corpus.idx",), id="idx missing"),
        pytest.param(truncate_bin, ("corpus.bin", "2390"), id="bin truncated"),
        pytest.param(truncate_idx, ("corpus.idx",), id="idx truncated"),
        pytest.param(garble_idx, ("corpus.idx",), id="idx of another kind"),
    ],
)
def test_damaged_dataset(corpus: Path, damage: Damage, words: tuple[str, ...]) -> None:
    damage(corpus)
    before = files_below(corpus.parent)
    sentence = told("--data-path", str(corpus), "--vocab-size", "97", "--save", str(corpus.parent / "save"))
    assert all(word in sentence for word in words), sentence
    assert "\n" not in sentence and files_below(corpus.parent) == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        pytest.param(("--data-path", "/no/such/corpus", "--vocab-size", "97"), ("/no/such/corpus",), id="no dataset"),
        pytest.param(("--mock-data",), ("--vocab-size",), id="no vocabulary"),
        pytest.param(("--train-itres", "5"), ("--train-itres", "--train-iters"), id="misspelt flag"),
        pytest.param(("--mock-data", "--vocab-size", "97", "--tp", "2"), ("1 ", "2", "ranks"), id="layout of more ranks"),
        pytest.param(("--mock-data", "--vocab-size", "97", "--global-batch-size", "3"), ("3", "2"), id="batch does not divide"),
        pytest.param(("--mock-data", "--vocab-size", "97", "--load", "/no/such/checkpoint"), ("/no/such/checkpoint",), id="no checkpoint"),
        pytest.param(
            ("--mock-data", "--vocab-size", "97", "--num-attention-heads", "5", "--bf16", "--fp16"),
            ("5", "bf16", "fp16"),
            id="two violations at once",
        ),
    ],
)
def test_flags_that_cannot_work(flags: tuple[str, ...], words: tuple[str, ...]) -> None:
    sentence = told(*flags)
    assert all(word in sentence for word in words), sentence


def test_too_little_data_has_the_counts(corpus: Path) -> None:
    sentence = told("--data-path", str(corpus), "--vocab-size", "97", "--seq-length", "4096")
    assert "4096" in sentence and "4097" in sentence and "tokens" in sentence


def test_wrong_tokenizer_is_refused_with_both_fingerprints(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "some words to train on"}\n' * 40)
    prefix = tmp_path / "bytes"
    preprocess(PreprocessSettings((str(text),), str(prefix), "ByteTokenizer", append_eod=True, workers=1))
    vocab, merges = tmp_path / "gpt2" / "vocab.json", tmp_path / "gpt2" / "merges.txt"
    vocab.parent.mkdir()
    vocab.write_text('{"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}')
    merges.write_text("#version: 0.2\na b\n")
    sentence = told(
        "--data-path",
        f"{prefix}_text_document",
        "--tokenizer-type",
        "GPT2BPETokenizer",
        "--tokenizer-model",
        str(vocab.parent),
        "--vocab-size",
        "300",
    )
    assert "tokenizer fingerprint" in sentence and "in the dataset" in sentence and "in this run" in sentence


def test_corrupt_checkpoint_is_named(corpus: Path) -> None:
    save = corpus.parent / "save"
    flags = ("--data-path", str(corpus), "--vocab-size", "97", "--split", "1,0,0", "--save", str(save))
    main([*SMALL, *flags])
    weights = next((save / "step_0000002").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    sentence = told(*flags, "--auto-resume", "--train-iters", "4")
    assert "step_0000002" in sentence and weights.name in sentence and "digest" in sentence


def test_the_command_prints_one_line_and_fails(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "pretrain.py"), *SMALL, "--data-path", "/no/such/corpus", "--vocab-size", "97"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert not list(tmp_path.iterdir())
