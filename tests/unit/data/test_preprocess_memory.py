"""Memory of preprocessing does not grow with the number of documents."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def _peaks(session: int) -> dict[int, int]:
    """Peak resident memory in KB of each process of a session."""
    peaks = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            if os.getsid(int(entry.name)) == session:
                lines = (entry / "status").read_text().splitlines()
                peaks[int(entry.name)] = sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
        except (ProcessLookupError, FileNotFoundError):
            continue  # it ended while being looked at
    return peaks


def _run(folder: Path, documents: int) -> tuple[int, int]:
    """Preprocess so many documents with two workers; peak KB of the whole process tree and of the main process."""
    path = folder / f"{documents}.jsonl"
    with open(path, "w") as stream:
        for number in range(documents):
            stream.write(json.dumps({"text": f"document {number} has few words", "src": "x" * 60, "id": number}) + "\n")
    command = [sys.executable, "tools/preprocess_data.py", "--input", str(path), "--output-prefix", str(folder / f"out{documents}")]
    command += ["--tokenizer-type", "ByteTokenizer", "--append-eod", "--workers", "2"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    peaks: dict[int, int] = {}
    while process.poll() is None:
        for number, peak in _peaks(process.pid).items():  # 0 for a process that has just ended
            peaks[number] = max(peak, peaks.get(number, 0))
        time.sleep(0.02)
    assert process.returncode == 0
    assert len(peaks) >= 4, "the main process, the server that starts workers, two workers"
    return sum(peaks.values()), peaks[process.pid]


@pytest.mark.skipif(sys.platform != "linux", reason="reads memory use from /proc")
def test_memory_is_flat_from_20000_to_200000_documents(tmp_path: Path) -> None:
    few, few_main = _run(tmp_path, 20_000)
    many, many_main = _run(tmp_path, 200_000)
    assert many < 1.2 * few, f"{few} KB for 20,000 documents, {many} KB for 200,000"
    # Tighter, since most of the above is the interpreter: a Python list of lengths and offsets would take 10 MB and more.
    assert many_main < few_main + 5_000, f"main process: {few_main} KB for 20,000 documents, {many_main} KB for 200,000"
