"""Which tokens make up sample number i: document, sample and shuffle index of one split of one corpus.

The documents of the split, repeated for as many epochs as the samples need, are shuffled and laid end to end; the stream
of tokens is cut every `seq_length` tokens; the pieces are shuffled. Three arrays record it:

    document_index [epochs x documents] int32   the order of the documents
    sample_index   [samples + 1, 2]             where sample k starts: place in document_index, offset in that document
    shuffle_index  [samples] uint32             number i of the dataset is piece shuffle_index[i] of the stream

Random streams and rules are megatron-core's (0.16): the same corpus, seed, split and lengths give the same samples in
the same order. A "document" is here what the index calls a sequence: with one sequence a document they are the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_llm.data.index_backend import IndexBackend
from megatron_llm.utils.errors import UserError

# The last epoch is shuffled on its own when the samples asked for use less than this part of it. Otherwise a document
# of the part that is never reached would be as likely early on as one that is.
SEPARATE_BELOW = 0.80


@dataclass(frozen=True)
class EpochPlan:
    """How often the documents are repeated and how many samples that gives.

    `extra` is 1 when a sample has one token more than `seq_length` (inputs and labels overlap in all but one), else 0.
    `separate_last_epoch`: the last epoch's documents and samples are shuffled apart from those before it.
    `samples` is what the stream holds: at least as many as were asked for.
    """

    tokens_per_epoch: int
    seq_length: int
    extra: int
    epochs: int
    separate_last_epoch: bool
    samples: int

    @property
    def samples_before_last_epoch(self) -> int:
        """Samples that lie wholly in the epochs before the last."""
        return ((self.epochs - 1) * self.tokens_per_epoch - self.extra) // self.seq_length


def plan_epochs(
    tokens_per_epoch: int, seq_length: int, samples: int | None, *, extra: int = 1, drop_last_partial: bool = True
) -> EpochPlan:
    """The least number of epochs that gives `samples` samples; with None, one epoch.

    `drop_last_partial=False` also counts the tokens left over at the end as a sample, to be padded. UserError when one
    epoch does not fill one sequence.
    """
    needed = seq_length + extra
    if tokens_per_epoch < needed:
        raise UserError(
            f"{tokens_per_epoch} tokens, seq_length {seq_length} needs {needed}: "
            + (f"use --seq-length <= {tokens_per_epoch - extra} or add data" if tokens_per_epoch > extra else "add data")
        )
    epochs = 1 if samples is None else max(1, -(-(samples * seq_length + extra) // tokens_per_epoch))
    tokens = epochs * tokens_per_epoch - extra
    plan = EpochPlan(
        tokens_per_epoch=tokens_per_epoch,
        seq_length=seq_length,
        extra=extra,
        epochs=epochs,
        separate_last_epoch=False,
        samples=tokens // seq_length if drop_last_partial else -(-tokens // seq_length),
    )
    if samples is None or epochs == 1:
        return plan
    from_last_epoch = samples - plan.samples_before_last_epoch
    samples_per_epoch = (tokens_per_epoch - extra) // seq_length
    return EpochPlan(**{**vars(plan), "separate_last_epoch": from_last_epoch < int(SEPARATE_BELOW * samples_per_epoch)})


def build_sample_index(
    lengths: NDArray[np.int32], documents: range, plan: EpochPlan, *, seed: int, backend: IndexBackend
) -> Iterator[tuple[str, NDArray[Any]]]:
    """The three arrays and their names, each as soon as it is built, for the documents in the range `documents` of a corpus.

    `lengths` [all documents of the corpus] in tokens.
    """
    random = np.random.RandomState(seed)
    document_index = shuffled_documents(documents, plan.epochs, plan.separate_last_epoch, random, backend)
    yield "document_index", document_index
    yield "sample_index", backend.sample_index(lengths, document_index, plan.seq_length, plan.samples, plan.extra)
    first_part = plan.samples_before_last_epoch if plan.separate_last_epoch else plan.samples
    yield "shuffle_index", shuffled_samples(first_part, plan.samples, random, backend)


def shuffled_documents(
    documents: range, epochs: int, separate_last_epoch: bool, random: np.random.RandomState, backend: IndexBackend
) -> NDArray[np.int32]:
    """Every document `epochs` times in random order, the last epoch after all others when it is separate."""
    if documents.stop > np.iinfo(np.int32).max:
        raise UserError(f"a corpus of {documents.stop} documents is too large for the index: split it into several of at most 2147483647")
    order = np.empty(epochs * len(documents), np.int32)
    order.reshape(epochs, len(documents))[:] = np.arange(documents.start, documents.stop, dtype=np.int32)
    before = (epochs - 1) * len(documents) if separate_last_epoch else 0
    backend.shuffle(order[:before], random)
    backend.shuffle(order[before:], random)
    return order


def shuffled_samples(first_part: int, samples: int, random: np.random.RandomState, backend: IndexBackend) -> NDArray[Any]:
    """The numbers below `samples` in random order: those below `first_part` first, then the others."""
    dtype = np.uint32 if samples < np.iinfo(np.uint32).max - 1 else np.int64
    order = np.arange(samples, dtype=dtype)
    backend.shuffle(order[:first_part], random)
    backend.shuffle(order[first_part:], random)
    return order
