"""Files and folders that appear whole or not at all."""

import errno
import json
import os
from pathlib import Path

import pytest

from megatron_llm.utils.atomic import atomic_file, atomic_folder, make_folder, write_error, write_json, write_text
from megatron_llm.utils.errors import UserError


class Stop(Exception):
    """Stands for anything that goes wrong in the middle of writing."""


def test_file_appears_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.bin"
    with atomic_file(target) as stream:
        stream.write(b"12")
        assert not target.exists()
        stream.write(b"34")
    assert target.read_bytes() == b"1234"
    assert os.listdir(target.parent) == ["a.bin"]


def test_file_stays_as_it_was_when_writing_fails(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    write_text(target, "old")
    with pytest.raises(Stop), atomic_file(target, "w") as stream:
        stream.write("half")
        raise Stop
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_full_disk_is_a_sentence_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*a\.bin: No space left on device; free space"), atomic_file(tmp_path / "a.bin"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert os.listdir(tmp_path) == []


def test_errors_about_other_files_are_not_taken_for_writing_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "out" / "a.bin"):
        (tmp_path / "missing").read_bytes()
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "out" / "b"):
        (tmp_path / "missing").read_bytes()


def test_a_file_in_the_way_of_a_folder_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        make_folder(tmp_path / "a" / "b")
    assert isinstance(write_error("x", OSError(errno.EACCES, "Permission denied")), UserError)


def test_json_keeps_order_and_text(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"z": 1, "a": "\u4e2d"})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"z": 1, "a": "\u4e2d"} and text.index("z") < text.index("a") and "\u4e2d" in text


def test_folder_replaces_the_old_one_whole(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    for content in ("1", "2"):
        with atomic_folder(target) as work:
            (work / "sub").mkdir()
            (work / "sub" / content).write_text(content)
    assert os.listdir(target / "sub") == ["2"]
    assert os.listdir(tmp_path) == ["folder"]


def test_folder_stays_as_it_was_when_filling_fails(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with atomic_folder(target) as work:
        (work / "old").touch()
    with pytest.raises(Stop), atomic_folder(target) as work:
        (work / "new").touch()
        raise Stop
    assert os.listdir(target) == ["old"]
    assert os.listdir(tmp_path) == ["folder"]


def test_what_a_crash_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder.tmp").mkdir()
    (tmp_path / "folder.tmp" / "stale").touch()
    (tmp_path / "folder.old").mkdir()
    with atomic_folder(tmp_path / "folder") as work:
        (work / "a").touch()
    assert os.listdir(tmp_path / "folder") == ["a"]
    assert os.listdir(tmp_path) == ["folder"]
