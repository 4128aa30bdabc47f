"""What a preprocessing run has to do and by how many processes: known before any library is imported.

The first of the processes is started here, so that it gets ready while the main process imports what it needs.
"""

import os
from dataclasses import dataclass

from megatron_llm.data.preprocess_settings import PreprocessSettings
from megatron_llm.data.sources import BLOCK_BYTES, InputFile, find_inputs
from megatron_llm.data.worker_pool import start_server
from megatron_llm.utils.compressed import is_compressed

_WORKERS_NEED = "megatron_llm.data.encoder"


@dataclass(frozen=True)
class WorkPlan:
    """The input files, the number of worker processes (0: everything in one), and whether it all is a block or less."""

    files: tuple[InputFile, ...]
    workers: int
    small: bool

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def plan_work(settings: PreprocessSettings) -> WorkPlan:
    """Find the input and start the process that workers come from. UserError: settings or input that cannot be."""
    settings.check()
    files = tuple(find_inputs(settings.input))
    small = sum(file.size for file in files) < BLOCK_BYTES and not any(is_compressed(file.path) for file in files)
    workers = len(os.sched_getaffinity(0)) if settings.workers is None else settings.workers
    if small:
        workers = 0  # starting processes would take longer than the work
    if workers:
        start_server(_WORKERS_NEED)
    return WorkPlan(files, workers, small)
