"""The index cache: found again only by who would build the same, built once, never half there, blocking nobody."""

import errno
import fcntl
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_llm.config.schema import DataConfig
from megatron_llm.data import index_cache
from megatron_llm.data.build import SampleCounts, build_datasets
from megatron_llm.data.index_cache import Arrays, IndexCache, MappedArrays, file_digest
from megatron_llm.testing.corpora import random_documents, write_corpus
from megatron_llm.utils.errors import UserError

ROOT = Path(__file__).parents[3]
SPAWN = multiprocessing.get_context("fork")


def quiet(_: str) -> None:
    """Say nothing."""


def cache_in(folder: Path, timeout: float = 20.0, say: Callable[[str], None] = quiet) -> IndexCache:
    return IndexCache(folder, timeout, say)


def counted(folder: Path, seconds: float = 0.0) -> Callable[[], Arrays]:
    """A build that leaves a mark for each time it runs."""

    def build() -> Arrays:
        (folder / f"built-{os.getpid()}-{time.monotonic_ns()}").touch()
        time.sleep(seconds)
        return [("a", np.arange(1000)), ("b", np.zeros((2, 3), np.float32)), ("empty", np.zeros(0, np.int16))]

    return build


def marks(folder: Path) -> int:
    return len(list(folder.glob("built-*")))


def test_an_entry_is_built_once_and_mapped(tmp_path: Path) -> None:
    cache = cache_in(tmp_path / "cache")
    for _ in range(3):
        arrays = cache.get("corpus", {"seed": 1}, counted(tmp_path))
    assert marks(tmp_path) == 1
    assert sorted(arrays) == ["a", "b", "empty"] and arrays["a"].tolist() == list(range(1000)) and arrays["empty"].shape == (0,)
    assert not arrays["a"].flags.writeable and not arrays["a"].flags.owndata
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [cache.entry("corpus", {"seed": 1}).name]


def test_another_description_is_another_entry(tmp_path: Path) -> None:
    cache = cache_in(tmp_path / "cache")
    for description in ({"seed": 1}, {"seed": 2}, {"seed": 1, "epochs": 2}):
        cache.get("corpus", description, counted(tmp_path))
    assert marks(tmp_path) == 3


def test_the_key_covers_everything_the_index_depends_on(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", random_documents(300))

    def entries(**changes: Any) -> int:
        """Number of cache entries after building with these changes."""
        values: dict[str, Any] = {"split": "90,10,0", "seq_length": 16, "seed": 1, "samples": 100} | changes
        config = DataConfig(data_path=[prefix], split=values["split"])
        build_datasets(config, SampleCounts(values["samples"]), seq_length=values["seq_length"], seed=values["seed"], say=quiet)
        return len(list((tmp_path / "cache").iterdir()))

    assert entries() == entries() == entries(samples=101) == 1, "the same epochs are the same index"
    assert entries(seed=2) == 2
    assert entries(split="80,20,0") == 3
    assert entries(seq_length=17) == 4
    assert entries(samples=2000) == 5
    write_corpus(tmp_path / "c", random_documents(300, seed=9))
    assert entries() == 6


def test_two_corpora_of_equal_size_and_time_are_not_confused(tmp_path: Path) -> None:
    for name, lengths in (("a", (30, 10)), ("b", (10, 30))):
        write_corpus(tmp_path / name, [[1] * length for length in lengths])
        os.utime(tmp_path / f"{name}.idx", ns=(10**18, 10**18))
    assert file_digest(tmp_path / "a.idx")["size"] == file_digest(tmp_path / "b.idx")["size"]
    assert file_digest(tmp_path / "a.idx") != file_digest(tmp_path / "b.idx")


def test_large_files_are_told_apart_by_blocks_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_cache, "WHOLE_DIGEST_BYTES", 1000)
    monkeypatch.setattr(index_cache, "DIGEST_BLOCKS", 4)
    monkeypatch.setattr(index_cache, "DIGEST_BLOCK_BYTES", 64)
    digests = []
    for change in (None, 0, 2047):
        content = bytearray(2048)
        if change is not None:
            content[change] = 1
        (tmp_path / "file").write_bytes(content)
        os.utime(tmp_path / "file", ns=(10**18, 10**18))
        digests.append(file_digest(tmp_path / "file")["sha256_of_blocks"])
    assert len(set(digests)) == 3


def _get(folder: Path, results: Any) -> None:
    arrays = cache_in(folder / "cache").get("corpus", {"seed": 1}, counted(folder, 0.3))
    results.put((os.getpid(), int(arrays["a"].sum())))


def test_four_processes_at_once_build_once_and_agree(tmp_path: Path) -> None:
    results = SPAWN.Queue()
    processes = [SPAWN.Process(target=_get, args=(tmp_path, results)) for _ in range(4)]
    for process in processes:
        process.start()
    found = [results.get(timeout=30) for _ in processes]
    for process in processes:
        process.join(30)
    assert marks(tmp_path) == 1
    assert len({pid for pid, _ in found}) == 4 and {total for _, total in found} == {499500}
    assert len(list((tmp_path / "cache").iterdir())) == 1, "locks and temporary folders are gone"


def test_where_locks_do_not_work_the_first_rename_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    results = SPAWN.Queue()
    processes = [SPAWN.Process(target=_get, args=(tmp_path, results)) for _ in range(3)]
    for process in processes:
        process.start()
    assert {results.get(timeout=30)[1] for _ in processes} == {499500}
    for process in processes:
        process.join(30)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def _hang(folder: Path, where: str) -> None:
    if where == "building":
        cache_in(folder / "cache").get("corpus", {"seed": 1}, counted(folder, 60.0))
    else:
        index_cache.fsync_tree = lambda _: time.sleep(60.0)  # type: ignore[assignment]
        cache_in(folder / "cache").get("corpus", {"seed": 1}, counted(folder))


@pytest.mark.parametrize("where", ["building", "writing"])
def test_a_killed_builder_leaves_nothing_that_blocks(tmp_path: Path, where: str) -> None:
    process = SPAWN.Process(target=_hang, args=(tmp_path, where))
    process.start()
    started = "built-*" if where == "building" else "cache/*.tmp/description.json"
    for _ in range(500):
        if list(tmp_path.glob(started)):
            break
        time.sleep(0.02)
    else:
        pytest.fail("the builder did not start")
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    begin = time.monotonic()
    arrays = cache_in(tmp_path / "cache").get("corpus", {"seed": 1}, counted(tmp_path))
    assert time.monotonic() - begin < 5 and marks(tmp_path) == 2
    assert int(arrays["a"].sum()) == 499500
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_what_a_live_builder_writes_is_not_removed(tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    entry = cache.entry("corpus", {"seed": 1})
    alive = Path(f"{entry}.{socket.gethostname()}.{os.getpid()}.00000000.tmp")
    elsewhere = Path(f"{entry}.another-machine.1.00000000.tmp")
    for folder in (alive, elsewhere):
        folder.mkdir()
    cache.get("corpus", {"seed": 1}, lambda: [("a", np.arange(3))])
    assert alive.is_dir() and elsewhere.is_dir() and entry.is_dir()


def test_waiting_says_for_whom_and_ends(tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    lock = Path(f"{cache.entry('corpus', {'seed': 1})}.lock")
    said: list[str] = []
    with open(lock, "w", encoding="utf-8") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.write("process 4711 on node7")
        stream.flush()
        with pytest.raises(UserError, match=r"waited 0 s for process 4711 on node7 to build the index .*tools/build_index.py"):
            cache_in(tmp_path, 0.3, said.append).get("corpus", {"seed": 1}, lambda: [("a", np.arange(3))])
    assert len(said) == 1 and "waiting for the index of corpus: process 4711 on node7" in said[0]


def test_a_failed_build_leaves_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    def fail() -> Arrays:
        raise UserError("no tokens")

    cache = cache_in(tmp_path / "cache")
    with pytest.raises(UserError, match="no tokens"):
        cache.get("corpus", {"seed": 1}, fail)
    assert cache.get("corpus", {"seed": 1}, lambda: [("a", np.arange(3))])["a"].tolist() == [0, 1, 2]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_full_disk_is_a_sentence_and_leaves_no_half_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(UserError, match="cannot write .*: No space left on device"):
            cache_in(tmp_path / "cache").get("corpus", {"seed": 1}, lambda: [("a", np.arange(3))])
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    assert len(cache_in(tmp_path / "cache").get("corpus", {"seed": 1}, lambda: [("a", np.arange(3))])["a"]) == 3


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        cache_in(tmp_path / "file" / "cache").get("corpus", {"seed": 1}, lambda: [("a", np.arange(3))])


@pytest.mark.parametrize("damage", ["truncate", "remove", "garble"])
def test_a_damaged_entry_is_a_sentence_that_says_what_to_delete(tmp_path: Path, damage: str) -> None:
    cache = cache_in(tmp_path)
    folder = cache.get("corpus", {"seed": 1}, lambda: [("a", np.arange(3))]).folder
    if damage == "truncate":
        (folder / "a.npy").write_bytes((folder / "a.npy").read_bytes()[:-8])
    elif damage == "remove":
        (folder / "a.npy").unlink()
    else:
        np.save(folder / "a.npy", np.arange(4))
    with pytest.raises(UserError, match="is damaged .*: delete that folder"):
        cache.get("corpus", {"seed": 1}, lambda: [("a", np.arange(3))])


def test_pickled_arrays_are_mapped_again(tmp_path: Path) -> None:
    arrays = cache_in(tmp_path).get("corpus", {"seed": 1}, counted(tmp_path))
    copy = pickle.loads(pickle.dumps(arrays))  # noqa: S301
    assert isinstance(copy, MappedArrays) and copy["a"].tolist() == arrays["a"].tolist()
    assert len(pickle.dumps(arrays)) < 1000


def test_the_tool_builds_what_training_finds(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", random_documents(200))
    arguments = ["--data-path", prefix, "--split", "90,10,0", "--seq-length", "16", "--seed", "3", "--train-iters", "20"]
    command = [sys.executable, str(ROOT / "tools" / "build_index.py"), *arguments, "--global-batch-size", "8", "--eval-iters", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("building the index of ") == 2
    said: list[str] = []
    config = DataConfig(data_path=[prefix], split="90,10,0")
    build_datasets(config, SampleCounts(160, 16), seq_length=16, seed=3, say=said.append)
    assert said and not [line for line in said if "building" in line]


def test_the_tool_says_what_is_missing(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "build_index.py"), "--data-path", "x", "--seq-length", "8"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert result.returncode == 1
    assert result.stderr == "error: give --train-iters and --global-batch-size, or --train-samples\n"
