"""Loader: which samples each rank gets, resuming anywhere under any layout, worker processes, evaluation."""

import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_llm.data.batch import Batch, Sample, collate
from megatron_llm.data.loader import BatchLoader, evaluation_batches
from megatron_llm.data.sampler import micro_batch_count, rank_samples
from megatron_llm.testing.corpora import random_documents, write_corpus
from megatron_llm.utils.errors import UserError


class Numbered:
    """Sample i holds the token i; reading `bad` fails, and uneven delays would show workers out of order."""

    def __init__(self, count: int, *, bad: int = -1, slow: bool = False) -> None:
        self.count, self.bad, self.slow = count, bad, slow

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if index == self.bad:
            raise UserError(f"sample {index} is bad")
        if self.slow:
            time.sleep(0.01 * (index % 3))
        ids = np.array([index, index])
        return Sample(ids, ids, np.ones(2, np.float32), np.arange(2))


def numbers(batches: list[Batch]) -> list[int]:
    return [int(number) for batch in batches for number in batch.tokens[:, 0]]


def loader(dataset: Numbered, *, consumed: int = 0, dp: tuple[int, int] = (0, 1), micro: int = 2, workers: int = 0) -> BatchLoader:
    return BatchLoader(
        dataset,
        micro_batch_size=micro,
        global_batch_size=8,
        dp_rank=dp[0],
        dp_size=dp[1],
        consumed_samples=consumed,
        num_workers=workers,
    )


def test_ranks_take_turns_in_megatrons_order() -> None:
    def of(rank: int) -> list[list[int]]:
        return rank_samples(100, micro_batch_size=2, global_batch_size=8, dp_rank=rank, dp_size=2).tolist()

    assert of(0) == [[100, 101], [104, 105]]
    assert of(1) == [[102, 103], [106, 107]]


@pytest.mark.parametrize(("micro", "dp"), [(1, 1), (2, 2), (4, 2), (1, 8), (2, 4)])
def test_a_global_batch_is_the_same_samples_under_any_layout(micro: int, dp: int) -> None:
    together = [
        rank_samples(40, micro_batch_size=micro, global_batch_size=8, dp_rank=rank, dp_size=dp).ravel().tolist() for rank in range(dp)
    ]
    assert sorted(sum(together, [])) == list(range(40, 48))


def test_sizes_that_do_not_divide_are_refused() -> None:
    assert micro_batch_count(micro_batch_size=2, global_batch_size=8, dp_size=2) == 2
    with pytest.raises(ValueError, match="not a multiple of micro_batch_size 3 x 2"):
        micro_batch_count(micro_batch_size=3, global_batch_size=8, dp_size=2)


def test_batches_have_the_fields_of_the_samples() -> None:
    batches = next(loader(Numbered(8)))
    assert len(batches) == 4
    for name, dtype in (("tokens", torch.int64), ("labels", torch.int64), ("loss_mask", torch.float32), ("position_ids", torch.int64)):
        tensor = getattr(batches[0], name)
        assert tensor.shape == (2, 2) and tensor.dtype == dtype
    assert batches[0].document_ids is None
    moved = batches[0].to("meta")
    assert moved.tokens.device.type == "meta" and moved.document_ids is None


def test_collate_keeps_document_ids_and_refuses_a_mixture() -> None:
    ids = np.arange(3)
    with_ids, without = Sample(ids, ids, np.ones(3, np.float32), ids, ids), Sample(ids, ids, np.ones(3, np.float32), ids)
    batch = collate([with_ids, with_ids])
    assert batch.document_ids is not None and batch.document_ids.tolist() == [[0, 1, 2]] * 2
    with pytest.raises(ValueError, match="1 of 2 samples have document ids"):
        collate([with_ids, without])


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_anywhere_under_another_layout_sees_the_same_samples(workers: int) -> None:
    straight = [numbers(batches) for batches in islice(loader(Numbered(80, slow=True), workers=workers), 10)]
    assert straight == [list(range(start, start + 8)) for start in range(0, 80, 8)]
    first = loader(Numbered(80), workers=workers)
    for _ in range(4):
        next(first)
    first.close()
    assert first.consumed_samples == 32
    ranks = [loader(Numbered(80), consumed=32, dp=(rank, 4), micro=1, workers=workers) for rank in range(4)]
    for step in range(4, 10):
        assert sorted(sum((numbers(next(rank)) for rank in ranks), [])) == straight[step]
    assert {rank.consumed_samples for rank in ranks} == {80}
    for rank in ranks:
        rank.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_running_past_the_end_is_a_sentence_and_moves_nothing(workers: int) -> None:
    short = loader(Numbered(19), consumed=8, workers=workers)
    next(short)
    with pytest.raises(UserError, match=r"has 19 samples and the next step needs numbers 16 to 23"):
        next(short)
    assert short.consumed_samples == 16


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_the_data_stays_one_sentence(workers: int) -> None:
    bad = loader(Numbered(80, bad=9), workers=workers)
    next(bad)
    with pytest.raises(UserError, match=r"^sample 9 is bad$"):
        next(bad)
    bad.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_draws_nothing_from_torchs_global_stream(workers: int) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    batches = loader(Numbered(80), workers=workers)
    next(batches)
    assert torch.equal(torch.rand(1), expected)
    batches.close()


def test_workers_read_a_corpus_like_the_training_process(tmp_path: Path) -> None:
    from megatron_llm.config.schema import DataConfig
    from megatron_llm.data.build import SampleCounts, build_datasets

    prefix = write_corpus(tmp_path / "c", random_documents(100))
    config = DataConfig(data_path=[prefix], split="100,0,0", reset_attention_mask=True)
    dataset = build_datasets(config, SampleCounts(64), seq_length=8, seed=1, say=lambda _: None).train
    assert dataset is not None
    one, other = (
        BatchLoader(dataset, micro_batch_size=4, global_batch_size=8, dp_rank=0, dp_size=1, num_workers=count) for count in (0, 2)
    )
    for _ in range(8):
        for mine, theirs in zip(next(one), next(other), strict=True):
            assert torch.equal(mine.tokens, theirs.tokens) and torch.equal(mine.loss_mask, theirs.loss_mask)
            assert mine.document_ids is not None and theirs.document_ids is not None
            assert torch.equal(mine.document_ids, theirs.document_ids)
    other.close()


def test_each_evaluation_reads_the_same_first_samples() -> None:
    def evaluate(count: int, batches: int, dp: tuple[int, int] = (0, 1)) -> list[list[int]]:
        found = evaluation_batches(Numbered(count), micro_batch_size=2, global_batch_size=8, dp_rank=dp[0], dp_size=dp[1], batches=batches)
        return [numbers(batch) for batch in found]

    assert evaluate(100, 2) == evaluate(100, 2) == [list(range(8)), list(range(8, 16))]
    assert evaluate(100, 1, (1, 2)) == [[2, 3, 6, 7]]
    assert len(evaluate(30, 9)) == 3
    with pytest.raises(UserError, match="has 7 samples, one evaluation batch takes 8"):
        evaluate(7, 1)
