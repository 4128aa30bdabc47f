"""`torchrun` without its stack trace: the same launcher and the same arguments, but a failure is told once.

    python -m megatron_llm.training.launch --standalone --nproc-per-node 4 tools/pretrain.py ...

When a rank fails it has already said what was wrong in one sentence; torchrun would add a table of every rank and its
own stack below it, and the sentence would scroll away. The exit status is that of the first rank that failed.
"""

import logging
import sys

from torch.distributed.elastic.agent.server.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

_NOISY = (
    "torch.distributed.elastic.multiprocessing.api",
    "torch.distributed.elastic.multiprocessing.errors.error_handler",
    "torch.distributed.elastic.agent.server.api",
    "torch.distributed.run",
)


def main(argv: list[str] | None = None) -> None:
    """Run torchrun; leave with the status of the first failed rank, or 128 + signal when the launcher itself was told to stop."""
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        torchrun(argv)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        # A negative exit code is the signal that killed the rank.
        status = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        print(f"rank {rank} ended first, with exit status {status}", file=sys.stderr, flush=True)
        raise SystemExit(status) from None
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None


if __name__ == "__main__":
    main()
