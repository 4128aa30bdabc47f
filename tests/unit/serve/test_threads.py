"""How many threads a step gets: tried out, and given back."""

import time

import pytest
import torch

from megatron_llm.serve.threads import best_threads, using_threads


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were four processors and the environment said nothing."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads = [4]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda number: threads.__setitem__(0, number))


@pytest.mark.usefixtures("four")
@pytest.mark.parametrize(
    ("one", "four_of_them", "best"),
    [(0.004, 0.003, 1), (0.012, 0.003, None), (0.51, 0.5, None)],
    ids=["hardly faster", "much faster", "a large model"],
)
def test_all_threads_are_used_where_they_gain_enough(one: float, four_of_them: float, best: int | None) -> None:
    tried = []

    def step() -> None:
        tried.append(torch.get_num_threads())
        time.sleep(one if tried[-1] == 1 else four_of_them)

    assert best_threads(step) == best
    assert torch.get_num_threads() == 4
    assert tried[0] == 1 and len(tried) == (1 if one > 0.5 else 14)


@pytest.mark.usefixtures("four")
def test_what_the_environment_says_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert best_threads(lambda: pytest.fail("tried out")) is None


@pytest.mark.usefixtures("four")
def test_the_number_of_threads_comes_back() -> None:
    with pytest.raises(ZeroDivisionError), using_threads(2):
        assert torch.get_num_threads() == 2
        _ = 1 / 0
    with using_threads(None):
        assert torch.get_num_threads() == 4
    assert torch.get_num_threads() == 4
