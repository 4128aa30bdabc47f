"""Text of a growing answer: equal to decoding it whole, whatever the pieces, and nothing of a stop string."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_llm.serve.text import TextStream
from tests.small_tokenizers import byte_level

TEXTS = ["caf\u00e9 \u4e2d\u6587 and \U0001f600 the cat", "low lower lowest", " a  b ", "\u4e2d", "x\n\ny"]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_make_up_the_text(tmp_path: Path, text: str) -> None:
    tokenizer = byte_level(tmp_path)
    stream = TextStream(tokenizer.decode, tokenizer.encode("the hat"))
    pieces = [stream.push(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) + stream.finish() == text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("text", TEXTS)
def test_an_answer_that_nobody_watches_is_the_same_text_at_its_end(tmp_path: Path, text: str) -> None:
    tokenizer = byte_level(tmp_path)
    for ids in (tokenizer.encode(text), tokenizer.encode(text)[:-1]):
        streams = [TextStream(tokenizer.decode, tokenizer.encode("the hat"), whole=whole) for whole in (True, False)]
        pieces = [[stream.push(token) for token in ids] for stream in streams]
        assert pieces[0] == [""] * len(ids)
        assert streams[0].finish() == "".join(pieces[1]) + streams[1].finish()


def test_an_answer_that_ends_within_a_character_shows_that(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path)
    ids = tokenizer.encode("\u8a9e")
    assert len(ids) > 1
    stream = TextStream(tokenizer.decode, tokenizer.encode("the"))
    assert [stream.push(token) for token in ids[:-1]] == [""] * (len(ids) - 1)
    assert stream.finish() == "\ufffd"


def test_a_sentencepiece_answer_keeps_its_first_space() -> None:
    """Such a decoder drops the space before the first word; what comes after a prompt is not the first word."""
    pieces = {1: "\u2581the", 2: "\u2581cat", 3: "s"}
    stream = TextStream(lambda ids: "".join(pieces[token] for token in ids).replace("\u2581", " ").removeprefix(" "), [1])
    assert [stream.push(2), stream.push(3), stream.push(1), stream.finish()] == [" cat", "s", " the", ""]


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.booleans())
def test_stop_strings_match_a_plain_search(text: str, stop: list[str], whole: bool) -> None:
    stream = TextStream(lambda ids: "".join(map(chr, ids)), [], stop, whole=whole)
    shown = ""
    for character in text:
        shown += stream.push(ord(character))
        if stream.stopped:
            break
    shown += stream.finish()
    # The plain version: whichever stop string is complete first ends the text; of those, the one that begins first.
    ends = [(text.find(word) + len(word)) for word in stop if word in text]
    expected = text
    if ends:
        until = text[: min(ends)]
        expected = until[: min(until.find(word) for word in stop if word in until)]
    assert shown == expected and stream.stopped == bool(ends)
