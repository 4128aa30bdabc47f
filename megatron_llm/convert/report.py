"""The report that lies beside what was converted: where it came from, what was checked, and a digest of every file.

A folder with a report vouches for itself: when it is converted again its files are compared with the digests, and the
report with its own.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_llm.checkpoint.tensor_file import FileSeal, seal_file
from megatron_llm.utils.atomic import write_json
from megatron_llm.utils.errors import UserError
from megatron_llm.utils.json_files import read_json

REPORT = "conversion_report.json"
_DIGEST = "digest"


def write_report(folder: Path, content: Mapping[str, Any], known: Mapping[str, FileSeal]) -> dict[str, Any]:
    """Write the report with size and SHA-256 of every file under `folder`; returns it. `known` seals are not computed again."""
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != REPORT:
            files[name] = asdict(known.get(name) or seal_file(path))
    report = {**content, "files": files}
    report[_DIGEST] = _digest(report)
    write_json(folder / REPORT, report)
    return report


def sealed_files(folder: Path) -> dict[str, FileSeal]:
    """The seals that a folder's report holds; UserError when the report itself is damaged."""
    report = read_json(folder / REPORT)
    files = report.get("files")
    try:
        if _DIGEST in report and report[_DIGEST] != _digest({key: value for key, value in report.items() if key != _DIGEST}):
            raise ValueError("it does not match its own digest")
        if not isinstance(files, dict):
            raise ValueError("it lists no files")
        return {str(name): FileSeal(int(seal["size"]), str(seal["sha256"])) for name, seal in files.items()}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder / REPORT} is damaged: {error}; take another copy of the folder, or remove that file") from error


def _digest(report: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(report, sort_keys=True).encode()).hexdigest()
