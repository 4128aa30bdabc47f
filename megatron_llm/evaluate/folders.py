"""From a model entry to the folders of its parts, and to an identity that changes when the model does."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_llm.convert.model_folders import Folders, find_folders
from megatron_llm.evaluate.options import ModelEntry
from megatron_llm.utils.errors import UserError


@dataclass(frozen=True)
class Parts(Folders):
    """Where the parts of a model lie, with the chat template that takes the place of the tokenizer's own."""

    chat_template: Path | None

    def identity(self) -> dict[str, Any]:
        """Names, sizes and times of the files that make the model; contents of the small ones. JSON values."""
        folders = [*dict.fromkeys([self.weights, self.tokenizer, *self.adapters])]
        found: dict[str, Any] = {f"folder {number}": _files(folder) for number, folder in enumerate(folders)}
        if self.chat_template is not None:
            found["chat template"] = self.chat_template.read_text(encoding="utf-8")
        return found


def find_parts(entry: ModelEntry, report: Callable[[str], None]) -> Parts:
    """Find weights, tokenizer and adapters; of a folder of checkpoints the newest complete one. UserError for what is missing."""
    found = find_folders(Path(entry.path), [Path(adapter) for adapter in entry.adapters], report)
    template = Path(entry.chat_template) if entry.chat_template is not None else None
    if template is not None and not template.is_file():
        raise UserError(f"the chat template {template} is no file")
    return Parts(found.weights, found.tokenizer, found.adapters, template)


def _files(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            status = path.stat()
            small = status.st_size <= 1_000_000 and path.suffix in (".json", ".jinja", ".txt")
            name = str(path.relative_to(folder))
            found[name] = path.read_text(encoding="utf-8", errors="replace") if small else [status.st_size, status.st_mtime_ns]
    return found
