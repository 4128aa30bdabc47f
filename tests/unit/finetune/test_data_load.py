"""Files of records: found, read with their lines, recognised, converted; what is unusable is counted with its place."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import zstandard

from megatron_llm.finetune.data.files import find_files, read_raw
from megatron_llm.finetune.data.formats import format_names
from megatron_llm.finetune.data.load import RECORD_SUFFIXES, load_conversations
from megatron_llm.finetune.data.records import Message
from megatron_llm.utils.errors import UserError

SHARED = Path(__file__).parents[3].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the sample data beside the checkout is not there")
GOOD = {"instruction": "Add.", "input": "1 2", "output": "3"}


def lines(path: Path, *records: Any) -> Path:
    """Write JSON lines; texts are written as they are."""
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in records), encoding="utf-8")
    return path


def turns(*texts: str) -> list[Message]:
    """Messages of user and assistant in turn."""
    return [Message("assistant" if number % 2 else "user", text) for number, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("record", "title", "expected"),
    [
        (GOOD, "Alpaca (instruction, input, output)", turns("Add.\n1 2", "3")),
        ({"instruction": "Add.", "output": "3"}, "Alpaca (instruction, input, output)", turns("Add.", "3")),
        ({**GOOD, "input": None, "history": None}, "Alpaca (instruction, input, output)", turns("Add.", "3")),
        ({**GOOD, "system": "S", "history": [["a", "b"]]}, None, [Message("system", "S"), *turns("a", "b", "Add.\n1 2", "3")]),
        ({"name": "x", "instruction": "I", "instances": [{"input": "", "output": "o"}], "is_classification": False}, None, turns("I", "o")),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "ShareGPT (conversations)", turns("a", "b")),
        ({"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, None, turns("a", "b")),
        (
            {"messages": [{"role": r, "content": c} for r, c in (("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"))]},
            "OpenAI (messages)",
            [Message("system", "S"), *turns("a", "b")],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": "b"}]},
            None,
            turns("a", "b"),
        ),
        ({"dialog": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "dialog", turns("a", "b")),
        ({"chat": [{"input": "a", "output": "b"}, {"input": "c", "output": "d"}]}, None, turns("a", "b", "c", "d")),
        ({"chat": [{"input": "a", "output": "b"}], "prompt": "P"}, None, [Message("system", "P"), *turns("a", "b")]),
        ({"prompt": "a", "answer": "b"}, "question and answer", turns("a", "b")),
        ({"question": "a", "answer": "b", "source": "s"}, None, turns("a", "b")),
        ({"context": "a", "target": "b"}, None, turns("a", "b")),
        ({"user": "a", "assistant": "b"}, None, turns("a", "b")),
    ],
)
def test_every_format(tmp_path: Path, record: dict[str, Any], title: str | None, expected: list[Message]) -> None:
    path = lines(tmp_path / "d.jsonl", record, record)
    loaded = load_conversations([str(path)])
    assert [list(one.messages) for one in loaded.conversations] == [expected, expected]
    assert [one.source for one in loaded.conversations] == [f"{path}:1", f"{path}:2"]
    if title:
        assert loaded.lines() == [f"{path}: {title}, 2 records, 2 conversations"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("{broken", "the line is not JSON"),
        ("[1, 2]", "it is no JSON object"),
        ({"instruction": "x"}, "it has no 'output'"),
        ({**GOOD, "output": ["a", "b"]}, "its 'output' is a list (chosen and rejected answers are for a reward model)"),
        ({**GOOD, "output": 3}, "its 'output' is a number, not a text"),
        ({**GOOD, "output": None}, "its 'output' is null, not a text"),
        ({**GOOD, "output": "  \n"}, "an answer is empty"),
        ({**GOOD, "instruction": "", "input": ""}, "a question is empty"),
        ({**GOOD, "history": [["a"]]}, "its 'history' is no list of [question, answer]"),
        ({**GOOD, "output": "\ud800"}, "a message holds half a surrogate pair, which is no text"),
    ],
)
def test_unusable_records_are_counted_with_their_place(tmp_path: Path, record: Any, reason: str) -> None:
    path = lines(tmp_path / "d.jsonl", GOOD, "", record, GOOD, record, record, record)
    loaded = load_conversations([str(path)])
    assert len(loaded.conversations) == 2
    assert loaded.rejects.lines() == [f"4 left out, {reason}: {path}:3, {path}:5, {path}:6, ..."]
    assert loaded.files[0].records == 6


@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        ("au", "an answer comes first"),  # its question at the end is left off
        ("aua", "an answer comes first"),
        ("uua", "two messages of the same side follow each other"),
        ("uaa", "two messages of the same side follow each other"),
        ("usa", "a system message stands behind the first message"),
        ("s", "it holds no answer"),
        ("uta", "a message is of neither the user nor the assistant nor the system (tool calls are not supported)"),
    ],
)
def test_dialogues_that_cannot_be_used(tmp_path: Path, roles: str, reason: str) -> None:
    names = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    messages = [{"role": names[role], "content": "x"} for role in roles]
    good = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    loaded = load_conversations([str(lines(tmp_path / "d.jsonl", good, {"messages": messages}))])
    assert list(loaded.rejects.reasons) == [reason]
    assert len(loaded.conversations) == 1


def test_lines_of_a_json_array_and_of_csv(tmp_path: Path) -> None:
    array = tmp_path / "a.json"
    array.write_text('\n[\n  {"prompt": "a",\n   "answer": "b"},\n\n  {"prompt": "c", "answer": "d"}, 7\n]\n', encoding="utf-8")
    table = tmp_path / "t.csv"
    table.write_text('\ufeffprompt,answer\n"a\nb",c\n\nd,"e ""f"""\nonly one\n', encoding="utf-8")
    loaded = load_conversations([str(array), str(table)])
    assert [one.source for one in loaded.conversations] == [f"{array}:3", f"{array}:6", f"{table}:2", f"{table}:5"]
    assert [one.messages[0].content for one in loaded.conversations] == ["a", "c", "a\nb", "d"]
    assert loaded.conversations[-1].messages[1].content == 'e "f"'
    assert loaded.rejects.first == {
        "it is no JSON object": [f"{array}:6"],
        "the row has more or fewer values than the header has names": [f"{table}:6"],
    }


def test_an_array_agrees_with_the_json_library(tmp_path: Path) -> None:
    values = [{"a": [1, {"b": "],"}]}, {}, [], "x", 1.5, None]
    for indent in (None, 1):
        path = tmp_path / "a.json"
        path.write_text(json.dumps(values, indent=indent), encoding="utf-8")
        assert [raw.value for raw in read_raw(str(path))] == values
    path.write_text("[ ]", encoding="utf-8")
    assert list(read_raw(str(path))) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}, {"b": ', r"a.json:1: element 2 of the array is not JSON"),
        ('[{"a": 1}\n{"b": 2}]', r"a.json:2: a comma or \] is missing behind element 1"),
        ('[{"a": 1}', r"a comma or \] is missing behind element 1"),
        ('[{"a": 1},]', r"element 2 of the array is not JSON"),
        ('[{"a": 1}] x', r"text behind the end of the array"),
        ("[", r"element 1 of the array is not JSON"),
    ],
)
def test_a_broken_array_is_an_error_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        list(read_raw(str(tmp_path / "a.json")))


def test_json_lines_and_one_object_under_json(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.json", GOOD, "{broken", GOOD)
    assert [(raw.line, raw.error) for raw in read_raw(str(path))] == [(1, None), (2, "the line is not JSON"), (3, None)]
    path.write_text("\n" + json.dumps(GOOD, indent=2), encoding="utf-8")
    assert [(raw.line, raw.value) for raw in read_raw(str(path))] == [(2, GOOD)]


def test_compressed_files_folders_and_patterns(tmp_path: Path) -> None:
    text = (json.dumps(GOOD) + "\n").encode()
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text))
    (tmp_path / "sub" / "a.jsonl.zst").write_bytes(zstandard.compress(text))
    (tmp_path / "c.csv.gz").write_bytes(gzip.compress(b"prompt,answer\nx,y\n"))
    (tmp_path / "notes.md").write_text("not data")
    for patterns, expected in (
        ([tmp_path], ["b.jsonl.gz", "c.csv.gz", "a.jsonl.zst"]),
        ([tmp_path / "c*", tmp_path], ["c.csv.gz", "b.jsonl.gz", "a.jsonl.zst"]),
    ):
        assert [Path(path).name for path in find_files(list(map(str, patterns)), RECORD_SUFFIXES)] == expected
    assert len(load_conversations([str(tmp_path)]).conversations) == 3
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text)[:-9])
    with pytest.raises(UserError, match=r"b\.jsonl\.gz.*truncated"):
        load_conversations([str(tmp_path)])


def test_bad_bytes_are_counted_in_lines_and_refused_in_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"instruction": "\xff", "output": "x"}\n')
    assert load_conversations([str(path)]).rejects.lines() == [f"1 left out, the line is not UTF-8 text: {path}:2"]
    table = tmp_path / "a.csv"
    table.write_bytes(b"prompt,answer\nx,\xff\n")
    with pytest.raises(UserError, match=r"a\.csv:2: not UTF-8"):
        load_conversations([str(table)])


def test_a_file_of_nothing_usable_is_refused(tmp_path: Path) -> None:
    bad = {**GOOD, "output": ""}
    path = lines(tmp_path / "d.jsonl", bad, bad)
    with pytest.raises(UserError, match=r"no usable record in .*d\.jsonl: of 2 records 2 .* an answer is empty, the first at .*d\.jsonl:1"):
        load_conversations([str(path)])
    lines(path, {"prompt": "p", "selected": "a", "rejected": "b"})
    with pytest.raises(UserError, match="preference pair"):
        load_conversations([str(path)])
    lines(path, {"text": "p"})
    with pytest.raises(UserError, match="for continued pretraining"):
        load_conversations([str(path)])
    lines(path, {"fish": 1, "bird": 2})
    with pytest.raises(UserError, match=r"in no known format, its first record has 'fish', 'bird': known are .*Alpaca"):
        load_conversations([str(path)])
    lines(path)
    with pytest.raises(UserError, match="holds no record"):
        load_conversations([str(path)])
    lines(path, "{", "{")
    with pytest.raises(UserError, match=r"d\.jsonl:1: the line is not JSON; a record a line"):
        load_conversations([str(path)])
    (tmp_path / "t.csv").write_text("a,b\nc,d\n")
    with pytest.raises(UserError, match="first line of a CSV file names its columns"):
        load_conversations([str(tmp_path / "t.csv")])


def test_wrong_names_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_conversations([str(tmp_path / "none.jsonl")])
    (tmp_path / "a.parquet").write_text("x")
    with pytest.raises(UserError, match="of no known kind"):
        load_conversations([str(tmp_path / "a.parquet")])
    with pytest.raises(UserError, match="the data file .* gives no file whose name ends in .jsonl, .json, .csv"):
        load_conversations([str(tmp_path)])
    with pytest.raises(UserError, match="no data was given"):
        load_conversations([])
    path = lines(tmp_path / "d.jsonl", GOOD)
    with pytest.raises(UserError, match=r"format 'alpacca' is unknown; did you mean 'alpaca'\?"):
        load_conversations([str(path)], format="alpacca")
    assert len(load_conversations([str(path)], format="alpaca").conversations) == 1
    assert set(format_names()) == {"instances", "alpaca", "sharegpt", "messages", "dialog", "chat", "pair"}


@needs_shared
def test_the_sample_files_of_users() -> None:
    loaded = load_conversations([str(SHARED / "self_instruct")])
    assert [(report.format.split()[0], report.records, report.conversations) for report in loaded.files] == [
        ("ShareGPT", 500, 500),
        ("seed", 50, 50),
        ("seed", 175, 175),
    ]
    assert loaded.rejects.total == 0
    assert len(load_conversations([str(SHARED / "eval" / "knowledge_and_reasoning.jsonl")]).conversations) == 200
    with pytest.raises(UserError, match="of 1000 records 1000 were left out because it is a preference pair"):
        load_conversations([str(SHARED / "reward" / "sentiment_comments.jsonl")])
