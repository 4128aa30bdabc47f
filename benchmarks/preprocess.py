"""Speed and memory of preprocessing, beside Megatron's own flow, gigatoken alone and `datasets.map`.

example:
  python benchmarks/preprocess.py --megabytes 200 --rounds 3

Each contender runs as a command of its own, in turn with the others, `--rounds` times: "ours" is tools/preprocess_data.py
with whatever tokenizer backend it chooses, "ours-library" the same with the tokenizer's own library, "megatron" feeds
Megatron's IndexedDatasetBuilder from a pool with the same tokenizer one document at a time, as Megatron-LM's
tools/preprocess_data.py does, "gigatoken" only encodes the file and writes nothing, "datasets" tokenizes with
`datasets.map`. Seconds and CPU seconds are of the whole command, with everything it starts; MB/s are of input, from the
middle one of the rounds. Contenders that take minutes get the first `--slow-megabytes` of the input, and their time does
then not count importing and loading, in their favour.
"""

import argparse
import ctypes
import itertools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_llm.utils.errors import UserError, run_command
from megatron_llm.utils.optional import available

ROOT = Path(__file__).resolve().parents[1]
NEEDS = {"ours": None, "ours-library": None, "megatron": "megatron.core", "gigatoken": "gigatoken", "datasets": "datasets"}
SLOW = ("ours-library", "megatron", "datasets")


@dataclass(frozen=True)
class Run:
    """One run of a contender: MB of input, seconds, CPU seconds of all its processes, peak resident MB of them together."""

    megabytes: float
    seconds: float
    cpu_seconds: float
    peak_mb: float

    @property
    def speed(self) -> float:
        """MB/s."""
        return self.megabytes / self.seconds


def main() -> None:
    """Make what is missing, run, print."""
    values = parse_arguments()
    if values.child:
        CHILDREN[values.child](values)
        return
    with tempfile.TemporaryDirectory(dir=values.folder) as name:
        folder = Path(name)
        source, tokenizer = inputs(values, folder)
        runs = compare(values, folder, source, tokenizer)
    report(runs, values)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input", help=".jsonl with the key text (default: one is made of random words, as many megabytes as --megabytes)")
    add("--tokenizer", help="folder with a tokenizer.json (default: a byte-level BPE is trained on the beginning of the input)")
    add("--megabytes", type=float, default=200.0, help="how much of the input to take (default: 200)")
    add("--slow-megabytes", type=float, default=20.0, help="how much of it for the slow contenders (default: 20)")
    add("--workers", type=int, default=2, help="processes of each contender (default: 2)")
    add("--rounds", type=int, default=3, help="runs of each contender (default: 3)")
    add("--contenders", nargs="+", choices=NEEDS, default=list(NEEDS), help="which to run (default: all that are installed)")
    add("--peer-python", help="Python that has the contenders which are not installed beside this one")
    add("--folder", help="where to put inputs and outputs, removed at the end (default: the system's)")
    add("--json", help="file to write all runs to")
    add("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def inputs(values: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """The input of the wanted size and the tokenizer's folder."""
    source = folder / "input.jsonl"
    if values.input:
        with open(values.input, "rb") as lines:
            copy_lines(lines, source, values.megabytes)
    else:
        copy_lines(synthetic_lines(), source, values.megabytes)
    if values.tokenizer:
        return source, Path(values.tokenizer)
    from megatron_llm.data.train_tokenizer import train_tokenizer

    train_tokenizer([str(source)], str(folder / "tokenizer"), 32_000, max_megabytes=10.0)
    return source, folder / "tokenizer"


def copy_lines(lines: Any, path: Path, megabytes: float) -> None:
    """Write lines until there are so many megabytes."""
    size = 0
    with open(path, "wb") as stream:
        for line in lines:
            stream.write(line)
            size += len(line)
            if size >= megabytes * 1e6:
                return


def synthetic_lines() -> Iterator[bytes]:
    """Documents of random words whose frequencies fall as those of a language do (Zipf), with numbers and punctuation."""
    generator = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    weights = [1.0 / (rank + 2) for rank in range(len(letters))]
    words = ["".join(generator.choices(letters, weights, k=generator.randint(2, 10))) for _ in range(200_000)]
    totals = list(itertools.accumulate(1.0 / (rank + 3) for rank in range(len(words))))
    for number in itertools.count():
        picked = generator.choices(words, cum_weights=totals, k=generator.randint(20, 800))
        for place in range(0, len(picked), 11):
            picked[place] = generator.choice((picked[place].title() + ",", f"{generator.randint(0, 9999)}", picked[place] + ".\n"))
        yield json.dumps({"id": number, "text": " ".join(picked)}).encode() + b"\n"


def compare(values: argparse.Namespace, folder: Path, source: Path, tokenizer: Path) -> dict[str, list[Run]]:
    """The runs of each contender, in turn."""
    pythons = {name: python_for(need, values.peer_python) for name, need in NEEDS.items() if name in values.contenders}
    for name in [name for name, python in pythons.items() if python is None]:
        print(f"{name}: skipped, {NEEDS[name]} is not installed here nor in --peer-python")
    short = folder / "short.jsonl"
    with open(source, "rb") as lines:
        copy_lines(lines, short, min(values.slow_megabytes, values.megabytes))
    runs: dict[str, list[Run]] = {name: [] for name, python in pythons.items() if python is not None}
    for _ in range(values.rounds):
        for name in runs:
            taken = short if name in SLOW else source
            runs[name].append(measure(command(name, str(pythons[name]), taken, tokenizer, folder / "out", values.workers), taken))
            for path in folder.glob("out*"):
                path.unlink()
    return runs


def python_for(module: str | None, peer: str | None) -> str | None:
    """The interpreter that has a module."""
    if module is None or available(module):
        return sys.executable
    if peer is not None and subprocess.run([peer, "-c", f"import {module}"], capture_output=True).returncode == 0:
        return peer
    return None


def command(name: str, python: str, source: Path, tokenizer: Path, output: Path, workers: int) -> list[str]:
    """The command line of a contender."""
    if name.startswith("ours"):
        flags = ["--input", source, "--output-prefix", output, "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer]
        backend = "library" if name == "ours-library" else "auto"
        flags += ["--append-eod", "--workers", workers, "--tokenizer-backend", backend]
        return [python, str(ROOT / "tools/preprocess_data.py"), *map(str, flags)]
    flags = ["--child", name, "--input", source, "--tokenizer", tokenizer, "--folder", output, "--workers", workers]
    return [python, str(Path(__file__).resolve()), *map(str, flags)]


def measure(arguments: list[str], source: Path) -> Run:
    """Run a command to its end."""
    # Processes whose parent is gone become children of this one, so that their CPU time is counted too.
    PR_SET_CHILD_SUBREAPER = 36
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    begin = time.perf_counter()
    process = subprocess.Popen(
        arguments, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    watch = Watch(process.pid)
    out, errors = process.communicate()
    seconds = time.perf_counter() - begin
    watch.stop()
    while reap():
        pass
    if process.returncode:
        raise UserError(f"{' '.join(arguments)} failed:\n{errors}")
    own = [json.loads(line)["seconds"] for line in out.splitlines() if line.startswith('{"seconds"')]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(source.stat().st_size / 1e6, own[0] if own else seconds, cpu, watch.peak / 1e6)


def reap() -> bool:
    """Wait for an orphan of the command; False when there is none."""
    try:
        os.waitpid(-1, 0)
    except ChildProcessError:
        return False
    return True


class Watch:
    """Follows the resident memory of all processes of a session."""

    def __init__(self, session: int) -> None:
        self.peak = 0
        self._session = session
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        while not self._ended.wait(0.05):
            self.peak = max(self.peak, sum(self._resident()))

    def _resident(self) -> Iterator[int]:
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal():
                continue
            try:
                if os.getsid(int(entry.name)) == self._session:
                    yield int((entry / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            except (ProcessLookupError, FileNotFoundError):
                continue  # it ended while being looked at

    def stop(self) -> None:
        """End following."""
        self._ended.set()
        self._thread.join()


def report(runs: dict[str, list[Run]], values: argparse.Namespace) -> None:
    """The table, and the file if one is wanted."""
    middle = {name: statistics.median(run.speed for run in found) for name, found in runs.items()}
    print(f"{'contender':<14}{'MB':>7}{'seconds':>10}{'CPU s':>9}{'MB/s':>9}{'ours is':>10}{'peak MB':>10}")
    for name, found in runs.items():
        seconds, cpu = statistics.median(run.seconds for run in found), statistics.median(run.cpu_seconds for run in found)
        ratio = f"{middle['ours'] / middle[name]:.2f} x" if "ours" in middle else "-"
        peak = max(run.peak_mb for run in found)
        print(f"{name:<14}{found[0].megabytes:>7.0f}{seconds:>10.2f}{cpu:>9.2f}{middle[name]:>9.1f}{ratio:>10}{peak:>10.0f}")
    if values.json:
        Path(values.json).write_text(json.dumps({name: [asdict(run) for run in found] for name, found in runs.items()}, indent=1) + "\n")


def encode_line(line: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """A worker's part of Megatron's flow: the ids of one document with the end token, and the lengths of its sequences."""
    ids = tokenizer(json.loads(line)["text"]).input_ids
    ids.append(tokenizer.eos_token_id)
    return ids, [len(ids)]


class PoolWorker:
    """Holds the tokenizer of a pool's process."""

    tokenizer: Any = None

    @classmethod
    def start(cls, folder: str) -> None:
        """Load the tokenizer, once in each process."""
        from transformers import AutoTokenizer

        cls.tokenizer = AutoTokenizer.from_pretrained(folder)

    @classmethod
    def encode(cls, line: str) -> tuple[list[int], list[int]]:
        """See encode_line."""
        return encode_line(line, cls.tokenizer)


def megatron_flow(values: argparse.Namespace) -> None:
    """Megatron's way: a pool encodes line by line, the main process adds document by document."""
    import multiprocessing

    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    from transformers import AutoTokenizer

    size = len(AutoTokenizer.from_pretrained(values.tokenizer))
    begin = time.perf_counter()
    with open(values.input, encoding="utf-8") as lines, multiprocessing.Pool(values.workers, PoolWorker.start, (values.tokenizer,)) as pool:
        builder = IndexedDatasetBuilder(f"{values.folder}.bin", dtype=DType.optimal_dtype(size))
        for ids, lengths in pool.imap(PoolWorker.encode, lines, 32):
            builder.add_document(torch.IntTensor(ids), lengths)
        builder.finalize(f"{values.folder}.idx")
    print(json.dumps({"seconds": time.perf_counter() - begin}))


def gigatoken_alone(values: argparse.Namespace) -> None:
    """gigatoken reads and encodes the file; the ids stay in memory."""
    import gigatoken

    tokenizer = gigatoken.Tokenizer(str(Path(values.tokenizer) / "tokenizer.json"))
    tokenizer.encode_files(gigatoken.JsonlFileSource([values.input], field="text"))


def tokenize_batch(batch: dict[str, list[str]], tokenizer: Any) -> dict[str, Any]:
    """A batch of `datasets.map`."""
    return {"ids": tokenizer(batch["text"]).input_ids}


def datasets_map(values: argparse.Namespace) -> None:
    """`datasets.map` in batches over processes, to its arrow files."""
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(values.tokenizer)
    with tempfile.TemporaryDirectory() as cache:
        begin = time.perf_counter()
        found = datasets.load_dataset("json", data_files=values.input, split="train", cache_dir=cache)
        found.map(partial(tokenize_batch, tokenizer=tokenizer), batched=True, num_proc=values.workers, remove_columns=found.column_names)
        print(json.dumps({"seconds": time.perf_counter() - begin}))


CHILDREN: dict[str, Callable[[argparse.Namespace], None]] = {
    "megatron": megatron_flow,
    "gigatoken": gigatoken_alone,
    "datasets": datasets_map,
}

if __name__ == "__main__":
    run_command(main)
