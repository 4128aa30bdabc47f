"""Plain, .gz and .zst files read alike; damaged ones are named."""

import gzip
from pathlib import Path

import pytest
import zstandard

from megatron_llm.utils.compressed import SourceFile, is_compressed, plain_suffix, text_lines
from megatron_llm.utils.errors import UserError

LINES = [f"line {i} \u4e2d\u6587 {'x' * (i % 700)}\n".encode() for i in range(3000)]
CONTENT = b"".join(LINES)


def _write(folder: Path, suffix: str) -> Path:
    path = folder / f"a.txt{suffix}"
    half = len(CONTENT) // 2
    if suffix == ".gz":  # two members, as `cat a.gz b.gz` makes
        path.write_bytes(gzip.compress(CONTENT[:half]) + gzip.compress(CONTENT[half:]))
    elif suffix == ".zst":
        frame = zstandard.ZstdCompressor().compress
        path.write_bytes(frame(CONTENT[:half]) + frame(CONTENT[half:]))
    else:
        path.write_bytes(CONTENT)
    return path


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_lines_and_position(tmp_path: Path, suffix: str) -> None:
    path = _write(tmp_path, suffix)
    positions = []
    with SourceFile(path) as source:
        assert source.size == path.stat().st_size
        lines = []
        for line in source:
            lines.append(line)
            positions.append(source.position)
    assert lines == LINES
    assert positions == sorted(positions) and positions[-1] == path.stat().st_size
    assert list(text_lines(path)) == [line.decode().rstrip("\n") for line in LINES]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_skip_counts_decompressed_bytes(tmp_path: Path, suffix: str) -> None:
    with SourceFile(_write(tmp_path, suffix)) as source:
        source.skip(100_000)
        assert source.read(50) == CONTENT[100_000:100_050]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["truncated", "garbled"])
def test_damaged_files_are_named(tmp_path: Path, suffix: str, damage: str) -> None:
    path = _write(tmp_path, suffix)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 4] if damage == "truncated" else b"plain text" + data)
    with pytest.raises(UserError, match=rf"a\.txt\{suffix} .*is truncated or not what its name says"), SourceFile(path) as source:
        while source.read(4096):
            pass


def test_missing_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read .*nothing.txt: No such file"):
        SourceFile(tmp_path / "nothing.txt")


def test_bad_text_is_told_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfgood\r\nb\xffd\n")
    lines = text_lines(path)
    assert next(lines) == "good"
    with pytest.raises(UserError, match="line 2: not UTF-8 text"):
        next(lines)


def test_suffixes() -> None:
    assert plain_suffix("a/b.jsonl.GZ") == ".jsonl" and plain_suffix("b.txt") == ".txt" and plain_suffix("c.zst") == ""
    assert is_compressed("a.json.zst") and not is_compressed("a.json")
