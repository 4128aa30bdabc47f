"""Finding input files, cutting them into blocks, and what counts as a document."""

import gzip
import json
from pathlib import Path

import pytest
import zstandard

from megatron_llm.data import sources
from megatron_llm.data.records import iterate_texts, parse_block
from megatron_llm.data.sources import Block, Position, find_inputs, read_blocks, sample_blocks
from megatron_llm.utils.errors import UserError


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few lines, so that small files have many."""
    monkeypatch.setattr(sources, "BLOCK_BYTES", 200)


def _blocks(path: Path, start: Position | None = None) -> list[Block]:
    return list(read_blocks(find_inputs([str(path)])[0], 0, start or Position()))


def _texts(blocks: list[Block]) -> list[str]:
    return [text for block in blocks for text in parse_block(block, ["text"]).texts["text"]]


def test_names_patterns_and_folders(tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name in ("b.jsonl", "a.txt.gz", "deep/c.json.zst", "deep/README.md", "d.jsonl"):
        (tmp_path / "in" / name).touch()
    folder = str(tmp_path / "in")
    names = [Path(file.path).name for file in find_inputs([folder])]
    assert names == ["a.txt.gz", "b.jsonl", "d.jsonl", "c.json.zst"]
    # In the order given; a file that several inputs give counts once.
    names = [Path(file.path).name for file in find_inputs([f"{folder}/*.jsonl", f"{folder}/deep/../b.jsonl", f"{folder}/**/*.zst", folder])]
    assert names == ["b.jsonl", "d.jsonl", "c.json.zst", "a.txt.gz"]
    assert [file.kind for file in find_inputs([folder])] == [".txt", ".jsonl", ".jsonl", ".json"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.jsonl", "the input .*none.jsonl does not exist"),
        ("*.jsonl", r"the input .*\*.jsonl gives no file whose name ends in .jsonl, .json, .txt"),
        ("", "gives no file whose name ends in"),
        ("a.md", "a.md is of no known kind: its name should end in .jsonl"),
    ],
)
def test_inputs_that_give_nothing_are_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "a.md").touch()
    with pytest.raises(UserError, match=message):
        find_inputs([str(tmp_path / name)])


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", "-array.json", "-array.json.gz", ".txt"])
def test_blocks_give_every_document_once_from_any_block_on(tmp_path: Path, suffix: str) -> None:
    texts = [f"text {i} \u4e2d{'x' * (i * 7 % 500)}" for i in range(100)]
    if suffix == ".txt":
        content = "\r\n".join(texts)  # no line end at the end
    elif suffix.startswith("-array"):
        content = json.dumps([{"id": i, "text": text} for i, text in enumerate(texts)], indent=1, ensure_ascii=False)
    else:
        content = "".join(json.dumps({"text": text}) + "\n\n" for text in texts)
    data = b"\xef\xbb\xbf" + content.encode()
    path = tmp_path / f"a{suffix}"
    if suffix.endswith(".gz"):
        data = gzip.compress(data)
    elif suffix.endswith(".zst"):
        data = zstandard.ZstdCompressor().compress(data)
    path.write_bytes(data)
    blocks = _blocks(path)
    assert len(blocks) > 20
    assert _texts(blocks) == texts
    assert blocks[0].start == 0 and blocks[-1].consumed == len(data)
    lines = [parse_block(block, ["text"]).lines for block in blocks]
    for index in (0, 7, len(blocks) - 1):
        place = Position(blocks[index].end, sum(lines[: index + 1]))
        assert _blocks(path, place) == blocks[index + 1 :]


def test_lines_longer_than_a_block(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x" * 1000 + "\nshort\n" + "y" * 1000)
    blocks = _blocks(path)
    assert _texts(blocks) == ["x" * 1000, "short", "y" * 1000]
    assert [(block.start, block.end) for block in blocks] == [(0, 1001), (1001, 2007)]
    assert [parse_block(block, ["text"]).lines for block in blocks] == [1, 2]


def test_a_file_that_becomes_shorter_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("line\n" * 200)
    blocks = _blocks(path)
    path.write_text("line\n" * 60)
    with pytest.raises(UserError, match=r"a\.txt has become shorter while it was read"):
        _texts(blocks)


def test_the_sample_is_spread_over_all_plain_files(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name}{i:03d}\n" for i in range(100)))
    files = find_inputs([str(tmp_path)])
    texts = [parse_block(block, ["text"]).texts["text"] for block in sample_blocks(files, 50, 25, 5)]
    assert texts[0] == [f"a{i:03d}" for i in range(10)]
    assert [part[0] for part in texts[1:]] == ["a051", "b001", "b051", "c001", "c051"]
    assert all(len(part) == 5 for part in texts[1:])
    (tmp_path / "small.txt").write_text("x\ny")
    assert next(sample_blocks(find_inputs([str(tmp_path / "small.txt")]), 50, 25, 5)).read() == b"x\n"


BAD_LINES = {
    b"{": r"not JSON \(Expecting property name",
    b'"text"': "a text, not a JSON object with the key 'text'",
    b"[1]": "a list, not a JSON object",
    b'{"Text": "a", "id": 1}': "no key 'text', it has 'Text', 'id'; did you mean 'Text'",
    b'{"text": 5}': "the value of 'text' is a number, not a text",
    b'{"text": null}': "the value of 'text' is null",
    b'{"text": "\\ud800"}': "holds half a surrogate pair at character 0",
    b'{"text": "\xff"}': r"not UTF-8 text \(invalid start byte at byte 10\)",
    b"[" * 100_000: "JSON that cannot be read",
    b'{"text": "", "n": ' + b"1" * 5000 + b"}": "JSON that cannot be read",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:22].decode("latin-1"))
def test_bad_lines_are_told_with_their_numbers(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "good too"}\n')
    blocks = _blocks(path)
    assert _texts(blocks) == ["good", "good too"]
    bad, before = [], 0
    for block in blocks:
        records = parse_block(block, ["text"])
        bad += [(before + number, reason) for number, reason in records.bad]
        before += records.lines
    assert len(bad) == 1 and bad[0][0] == 2
    with pytest.raises(AssertionError, match=BAD_LINES[line]):
        raise AssertionError(bad[0][1])


def test_several_keys_of_a_record(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "title": "A"}\n{"text": "b"}\n{"title": "C", "text": ""}\n')
    records = parse_block(_blocks(path)[0], ["text", "title"])
    assert records.texts == {"text": ["a", ""], "title": ["A", "C"]}
    assert records.bad == [(2, "no key 'title', it has 'text'")]
    assert [text for text, _ in iterate_texts(find_inputs([str(path)]), ["title"])] == ["A", "C"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"} {"text": "b"}]', "character 15: expected a comma or ] after element 1"),
        ('[{"text": "a"},]', "element 2 is not JSON: Expecting value"),
        ('[{"text": "a"}, {"text: 1}]', "element 2 is not JSON"),
        ('[{"text": "a"}', "expected a comma or ] after element 1"),
        ('[{"text": "a"}] more', "character 16: text after the end of the array"),
    ],
)
def test_broken_arrays_are_fatal_with_the_place(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(UserError, match=rf"a\.json, {message}" if message.startswith("char") else message):
        _blocks(path)


def test_records_of_the_wrong_kind_in_arrays_are_bad_elements(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"}, "b", [], {"text": "c"}]')
    blocks = _blocks(path)
    assert _texts(blocks) == ["a", "c"] and blocks[0].unit == "element"
    assert [number for number, _ in parse_block(blocks[0], ["text"]).bad] == [2, 3]


def test_an_element_larger_than_many_blocks(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    texts = ["x" * 50_000, "y", "\\" * 3000]
    path.write_text(json.dumps([{"text": text} for text in texts]))
    assert _texts(_blocks(path)) == texts


def test_blocks_are_a_hundredth_of_the_input_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the real bounds
    small, large = 256 * 1024, 1024 * 1024
    totals = (0, 1, 100 * small - 1, 100 * small + 100, 100 * large, 10**13)
    assert [sources.block_size(total) for total in totals] == [small, small, small, small + 1, large, large]
