"""Arrays of results through shared memory: equal, aligned, read-only, and beside it what does not fit."""

from collections.abc import Callable

import numpy as np
import pytest

from megatron_llm.data import worker_pool
from megatron_llm.data.shared_slots import Packed, SharedSlots
from megatron_llm.data.worker_pool import WorkerPool


def _arrays(number: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(number)
    return {
        "ids": random.integers(0, 60_000, 7 * number).astype(np.uint16),
        "lengths": random.integers(0, 9, number).astype(np.int32),
        "every other": np.arange(2 * number)[::2],
    }


def _make_arrays() -> Callable[[int], dict[str, np.ndarray]]:
    return _arrays


def test_what_comes_out_is_what_went_in() -> None:
    slots = SharedSlots(2, 4096)
    packed = [slots.pack(_arrays(number), slot) for slot, number in enumerate((11, 13))]
    for slot, number in enumerate((11, 13)):
        message = packed[slot]
        assert isinstance(message, Packed) and len(message.head) < 1000 and all(start % 64 == 0 for start, _ in message.places)
        result = slots.unpack(message, slot)
        for name, array in _arrays(number).items():
            assert result[name].dtype == array.dtype and result[name].tolist() == array.tolist()
        assert not result["ids"].flags.writeable
    slots.close()


def test_too_large_results_and_missing_slots_stay_as_they_are() -> None:
    slots = SharedSlots(1, 256)
    small, large = _arrays(1), _arrays(100)
    assert isinstance(slots.pack(small, 0), Packed)
    assert slots.pack(large, 0) is large and slots.pack(small, None) is small


@pytest.mark.parametrize("size", [1 << 16, 512])
def test_the_pool_gives_equal_arrays_in_order(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """With slots for all results and with slots that the larger ones do not fit into; many results held up by none."""
    monkeypatch.setattr(worker_pool, "SLOT_BYTES", size)
    with WorkerPool[int, dict[str, np.ndarray]](_make_arrays, 2) as pool:
        for number, result in enumerate(pool.map(range(40))):
            assert {name: array.tolist() for name, array in result.items()} == {name: a.tolist() for name, a in _arrays(number).items()}
