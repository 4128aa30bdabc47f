"""How a process learns its place: the launcher's variables, device, threads, checkpoints that belong to the run."""

import pytest
import torch

from megatron_llm.config.schema import ParallelConfig
from megatron_llm.training.session import Launch, choose_device, choose_threads, usable_cores
from megatron_llm.utils.errors import UserError


def test_alone_without_a_launcher() -> None:
    assert Launch.from_environment({"HOME": "/root"}) == Launch(0, 1, 0, 1)


def test_what_torchrun_sets() -> None:
    given = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert Launch.from_environment(given) == Launch(5, 8, 1, 4)
    del given["LOCAL_WORLD_SIZE"]
    assert Launch.from_environment(given).local_world_size == 8


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"RANK": "0"}, "WORLD_SIZE, LOCAL_RANK not"),
        ({"RANK": "0", "WORLD_SIZE": "two", "LOCAL_RANK": "0"}, "whole numbers"),
    ],
)
def test_half_a_launcher_is_refused(given: dict[str, str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Launch.from_environment(given)


def test_device_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(ParallelConfig(device="auto"), Launch()).type == "cpu"
    with pytest.raises(UserError, match="no GPU is usable"):
        choose_device(ParallelConfig(device="cuda"), Launch())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device(ParallelConfig(device="auto"), Launch(5, 8, 1, 2)) == torch.device("cuda", 1)
    assert choose_device(ParallelConfig(device="cpu"), Launch(5, 8, 1, 2)).type == "cpu"
    with pytest.raises(UserError, match="4 processes were started on a machine with 2 GPUs"):
        choose_device(ParallelConfig(device="auto"), Launch(3, 4, 3, 4))


def test_threads_share_the_cores() -> None:
    assert choose_threads(None, Launch(0, 4, 0, 4), cores=2) == 1
    assert choose_threads(None, Launch(0, 4, 0, 4), cores=16) == 4
    assert choose_threads(3, Launch(0, 4, 0, 4), cores=16) == 3
    assert usable_cores() >= 1
