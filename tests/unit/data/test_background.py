"""One call in another process: its result, and how failures come out."""

import os
import signal
import time
from functools import partial

import pytest

from megatron_llm.data.background import Background
from megatron_llm.data.worker_failures import WorkerFailure
from megatron_llm.utils.errors import UserError


def _add(first: int, second: int) -> tuple[int, int]:
    time.sleep(0.1)
    return first + second, os.getpid()


def _fail(how: str) -> int:
    if how == "user":
        raise UserError("it is bad")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise KeyError("a defect")


def test_the_result_comes_from_another_process() -> None:
    with Background(partial(_add, 2, 3), "sum") as background:
        assert not background.ready()
        result, process = background.result()
    assert result == 5 and process != os.getpid()


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("user", UserError, "^it is bad$"),
        ("defect", WorkerFailure, "KeyError: 'a defect'"),
        ("kill", UserError, "the process 'judge' died, killed by SIGKILL .*; run the command again"),
    ],
)
def test_failures_come_out(how: str, kind: type[Exception], message: str) -> None:
    with Background(partial(_fail, how), "judge") as background, pytest.raises(kind, match=message):
        background.result()


def test_it_ends_when_it_is_no_longer_wanted() -> None:
    background = Background(partial(time.sleep, 1000), "sleeper")
    process = background._process
    background.close()
    assert process.exitcode == -signal.SIGTERM
