"""Sample and blending index: against a plain reference, native against numpy, and the rules for epochs."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llm.data import index_numpy
from megatron_llm.data.index_backend import VARIABLE, IndexBackend, load_backend
from megatron_llm.data.sample_index import build_sample_index, plan_epochs, shuffled_documents, shuffled_samples
from megatron_llm.utils.errors import UserError

ROOT = Path(__file__).parents[3]
NUMPY = IndexBackend(None, "test")


def native_backend() -> IndexBackend:
    """The extension. Where there is a compiler the installation built it, so its absence is a failure."""
    backend = load_backend()
    if backend.name == "numpy":
        if shutil.which("c++") or shutil.which("g++"):
            pytest.fail(f"the C++ extension is not there although this machine has a compiler: {backend.describe()}")
        pytest.skip(f"no C++ compiler on this machine: {backend.describe()}")
    return backend


def reference_boundaries(lengths: list[int], documents: list[int], seq_length: int, samples: int, extra: int) -> list[list[int]]:
    """The boundaries read off a list of all tokens, each as (place, offset)."""
    stream = [(place, offset) for place, document in enumerate(documents) for offset in range(lengths[document])]
    found = [[0, 0]]
    for boundary in range(1, samples + 1):
        last = boundary * seq_length + extra - 1
        if last < len(stream):
            place, offset = stream[last]
            found.append([place, offset + 1 - extra])
        else:
            found.append([len(documents) - 1, lengths[documents[-1]] - extra])
    return found


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], list[int], int, int, int]:
    """Lengths (some zero), an order of documents, seq_length, samples (with or without the partial last one), extra."""
    lengths = draw(st.lists(st.integers(0, 12), min_size=1, max_size=12))
    documents = draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=40))
    seq_length, extra = draw(st.integers(1, 9)), draw(st.integers(0, 1))
    tokens = sum(lengths[document] for document in documents) - extra
    whole = max(tokens, 0) // seq_length
    partial = tokens > 0 and tokens % seq_length > 0 and draw(st.booleans())
    return lengths, documents, seq_length, whole + partial, extra


@settings(max_examples=150, deadline=None)
@given(cases(), st.integers(1, 6))
def test_numpy_equals_reference_whatever_the_piece(case: tuple[list[int], list[int], int, int, int], piece: int) -> None:
    lengths, documents, seq_length, samples, extra = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_numpy, "DOCUMENT_PIECE", piece)
        found = NUMPY.sample_index(np.array(lengths, np.int32), np.array(documents, np.int32), seq_length, samples, extra)
    assert found.dtype == np.int32
    assert found.tolist() == reference_boundaries(lengths, documents, seq_length, samples, extra)


def test_native_equals_numpy() -> None:
    native = native_backend()

    @settings(max_examples=150, deadline=None)
    @given(cases())
    def check(case: tuple[list[int], list[int], int, int, int]) -> None:
        lengths, documents = np.array(case[0], np.int32), np.array(case[1], np.int32)
        ours, theirs = native.sample_index(lengths, documents, *case[2:]), NUMPY.sample_index(lengths, documents, *case[2:])
        assert ours.dtype == theirs.dtype
        assert ours.tolist() == theirs.tolist()

    check()


def plain_blend(weights: list[float], size: int) -> tuple[list[int], list[int]]:
    """The definition, one sample after the other."""
    taken, datasets, samples = [0] * len(weights), [], []
    for sample in range(size):
        deficits = [weight * max(sample, 1) - count for weight, count in zip(weights, taken, strict=True)]
        best = deficits.index(max(deficits))
        datasets.append(best)
        samples.append(taken[best])
        taken[best] += 1
    return datasets, samples


WEIGHTS = st.lists(st.one_of(st.integers(1, 20), st.floats(1e-6, 1.0)), min_size=1, max_size=8)


def vector_widths() -> list[int]:
    """The widths of vectors that the extension has a blend for on this processor; 2 is everywhere."""
    _C = importlib.import_module("megatron_llm._C")
    found = []
    for width in (2, 4, 8):
        try:
            _C.blend_index(np.array([1.0]), 1, width=width)
        except ValueError:
            continue
        found.append(width)
    return found


def test_blends_walked_in_stretches_equal_the_definition() -> None:
    """`early` 1 and 2 make short stretches that begin wrong often, so that they are walked again."""
    native_backend()
    _C = importlib.import_module("megatron_llm._C")
    widths = vector_widths()
    assert 2 in widths

    @settings(max_examples=40, deadline=None)
    @given(WEIGHTS, st.integers(0, 900), st.sampled_from([1, 2, 8]), st.integers(1, 3))
    def check(raw: list[float], size: int, early: int, threads: int) -> None:
        weights = np.array(raw, np.float64) / sum(raw)
        expected = plain_blend(weights.tolist(), size)
        found = [index_numpy.blend_index(weights, size, early), _C.blend_index(weights, size)]
        found += [_C.blend_index(weights, size, threads, early, width) for width in widths]
        for datasets, samples in found:
            assert datasets.dtype == np.int16 and samples.dtype == np.int64
            assert (datasets.tolist(), samples.tolist()) == expected

    check()


@pytest.mark.parametrize("raw", [[3, 7], [0.123, 0.4, 0.2], [1] * 5, [1e-7, 1, 1e-3], [1 / 3, 1 / 7, 9], list(range(1, 20))])
def test_long_blends_are_the_same_whichever_way_they_are_walked(raw: list[float]) -> None:
    native = native_backend()
    weights = np.array(raw, np.float64) / sum(raw)
    _C = importlib.import_module("megatron_llm._C")
    plain = _C.blend_index(weights, 150_001, 1, 150_001)  # so early that there is one stretch only
    for other in (NUMPY.blend_index(weights, 150_001), native.blend_index(weights, 150_001), _C.blend_index(weights, 150_001, 2, 3)):
        assert np.array_equal(plain[0], other[0]) and np.array_equal(plain[1], other[1])


def test_weights_that_do_not_sum_to_one_are_walked_too() -> None:
    native = native_backend()
    for raw in ([0.5, 0.7], [0.1, 0.2], [0.0, 1.0]):
        weights = np.array(raw)
        expected = plain_blend(raw, 40_000)
        for backend in (NUMPY, native):
            assert backend.blend_index(weights, 40_000)[0].tolist() == expected[0]


def test_exhaustive_blends_take_every_sample_once() -> None:
    native_backend()
    _C = importlib.import_module("megatron_llm._C")

    def plain(sizes: list[int]) -> list[int]:
        taken, total, found = [0] * len(sizes), sum(sizes), []
        for sample in range(total):
            open_ones = [dataset for dataset, size in enumerate(sizes) if taken[dataset] < size]
            deficits = [sizes[dataset] / total * max(sample, 1) - taken[dataset] for dataset in open_ones]
            found.append(open_ones[deficits.index(max(deficits))])
            taken[found[-1]] += 1
        return found

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.one_of(st.integers(0, 3), st.integers(0, 200)), min_size=1, max_size=8), st.sampled_from([1, 4, 512]))
    def check(raw: list[int], early: int) -> None:
        sizes = np.array(raw, np.int64)
        expected = plain(raw)
        for datasets, samples in (index_numpy.exhaustive_blend_index(sizes, early), _C.exhaustive_blend_index(sizes, 2, early)):
            assert datasets.tolist() == expected
            drawn = sorted(zip(datasets.tolist(), samples.tolist(), strict=True))
            assert drawn == [(dataset, sample) for dataset, size in enumerate(raw) for sample in range(size)]

    check()


@pytest.mark.parametrize("count", [0, 1, 2, 3, 17, 623, 624, 625, 4095, 4097, 65_536, 65_537, 100_003])
def test_shuffles_equal_numpys_and_leave_the_same_state(count: int) -> None:
    native = native_backend()
    for dtype in (np.int32, np.uint32, np.int64):
        expected, ours = np.random.RandomState(count), np.random.RandomState(count)
        order = np.arange(count, dtype=dtype)
        mine = order.copy()
        for _ in range(3):
            expected.shuffle(order)
            native.shuffle(mine, ours)
        assert np.array_equal(mine, order)
        assert ours.normal() == expected.normal() and ours.randint(1 << 30) == expected.randint(1 << 30)


def test_threads_place_the_same_boundaries() -> None:
    """More documents than one thread takes at a time, some of them empty."""
    native = native_backend()
    random = np.random.default_rng(3)
    lengths = np.maximum(random.integers(-20, 90, 70_001), 0).astype(np.int32)
    documents = random.integers(0, len(lengths), 200_003).astype(np.int32)
    total = int(lengths[documents].sum())
    for seq_length, extra, samples in ((37, 1, (total - 1) // 37), (64, 0, -(-total // 64)), (1, 1, 1000)):
        expected = NUMPY.sample_index(lengths, documents, seq_length, samples, extra)
        for threads in (1, 2, 5):
            found = IndexBackend(importlib.import_module("megatron_llm._C"), threads=threads).sample_index(
                lengths, documents, seq_length, samples, extra
            )
            assert np.array_equal(found, expected)
    assert native.threads >= 1


def test_native_refuses_what_it_would_misread() -> None:
    native_backend()
    _C = importlib.import_module("megatron_llm._C")
    lengths = np.array([3, 4], np.int32)
    with pytest.raises(TypeError):
        _C.sample_index_int32(lengths.astype(np.int64), np.array([0], np.int32), 2, 1, 1)
    with pytest.raises(IndexError, match="document 2 is outside the 2 known lengths"):
        _C.sample_index_int32(lengths, np.array([2], np.int32), 2, 1, 1)


def test_lengths_mapped_from_an_unaligned_offset_are_read_rightly() -> None:
    lengths = np.frombuffer(b"xx" + np.array([3, 4, 5], np.int32).tobytes(), np.int32, 3, 2)
    assert not lengths.flags.aligned
    documents = np.arange(3, dtype=np.int32)
    for backend in (load_backend(), NUMPY):
        assert backend.sample_index(lengths, documents, 2, 5, 1).tolist() == [
            [0, 0],
            [0, 2],
            [1, 1],
            [1, 3],
            [2, 1],
            [2, 3],
        ]


def test_documents_beyond_32_bits_get_a_wide_index() -> None:
    wide = index_numpy.sample_index(np.array([5], np.int32), np.zeros(2, np.int32), 3, 3, 1, np.int64)
    assert wide.dtype == np.int64 and wide.tolist() == [[0, 0], [0, 3], [1, 1], [1, 4]]


@pytest.mark.parametrize(
    ("tokens", "samples", "epochs", "separate", "total"),
    [
        (101, None, 1, False, 10),  # one epoch, whatever it gives
        (101, 10, 1, False, 10),  # exactly one epoch: 10 x 10 + 1 tokens
        (100, 10, 2, True, 19),  # one token short: a second epoch, of which 1 sample in 9 is wanted
        (101, 17, 2, True, 20),  # 7 wanted of the second epoch's 10: below four fifths
        (101, 18, 2, False, 20),  # 8 of 10: shuffled with the first
        (101, 0, 1, False, 10),
    ],
)
def test_epochs(tokens: int, samples: int | None, epochs: int, separate: bool, total: int) -> None:
    plan = plan_epochs(tokens, 10, samples)
    assert (plan.epochs, plan.separate_last_epoch, plan.samples) == (epochs, separate, total)


def test_partial_last_sample_counts_when_kept() -> None:
    assert plan_epochs(107, 10, None).samples == 10
    assert plan_epochs(107, 10, None, drop_last_partial=False).samples == 11
    assert plan_epochs(101, 10, None, drop_last_partial=False).samples == 10


def test_too_few_tokens_is_a_sentence_with_the_counts() -> None:
    with pytest.raises(UserError, match=r"^19 tokens, seq_length 1024 needs 1025: use --seq-length <= 18 or add data$"):
        plan_epochs(19, 1024, 5)
    with pytest.raises(UserError, match=r"^0 tokens, seq_length 8 needs 9: add data$"):
        plan_epochs(0, 8, None)


def test_separate_last_epoch_keeps_its_documents_and_samples_last() -> None:
    plan = plan_epochs(101, 10, 17)
    index = dict(build_sample_index(np.array([50, 51], np.int32), range(0, 2), plan, seed=3, backend=NUMPY))
    assert sorted(index["document_index"][:2].tolist()) == sorted(index["document_index"][2:].tolist()) == [0, 1]
    assert sorted(index["shuffle_index"][:10].tolist()) == list(range(10))
    assert sorted(index["shuffle_index"][10:].tolist()) == list(range(10, 20))


def test_order_depends_on_the_seed_and_on_nothing_else() -> None:
    def order(seed: int) -> list[int]:
        random = np.random.RandomState(seed)
        return [*shuffled_documents(range(5, 25), 3, True, random, NUMPY).tolist(), *shuffled_samples(10, 30, random, NUMPY).tolist()]

    assert order(1) == order(1) != order(2)


def test_the_environment_chooses_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "numpy")
    assert load_backend().name == "numpy" and f"{VARIABLE}=numpy" in load_backend().describe()
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(UserError, match="expected auto, native or numpy"):
        load_backend()
    monkeypatch.setenv(VARIABLE, "native")
    monkeypatch.setitem(sys.modules, "megatron_llm._C", None)
    with pytest.raises(UserError, match="cannot be imported"):
        load_backend()
    monkeypatch.setenv(VARIABLE, "auto")
    assert load_backend().name == "numpy" and "pip install" in load_backend().describe()


@pytest.mark.parametrize("missing", ["compiler", "pybind11"])
def test_setup_goes_on_without(missing: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "setup.py", tmp_path)
    shutil.copytree(ROOT / "csrc" / "index", tmp_path / "csrc" / "index")  # of the extensions, this one only
    shutil.copy(ROOT / "csrc" / "index.cpp", tmp_path / "csrc")
    (tmp_path / "megatron_llm").mkdir()
    environment = dict(os.environ)
    if missing == "compiler":
        environment |= {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}
    else:
        (tmp_path / "pybind11.py").write_text("raise ImportError('no pybind11')\n")
        environment["PYTHONPATH"] = str(tmp_path)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("the C++ index builder is not built") == 1
    assert not list((tmp_path / "megatron_llm").glob("*.so"))
