"""Small corpora for tests, written as training reads them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_llm.data.indexed_writer import write_indexed_dataset
from megatron_llm.data.sidecar import Sidecar, write_sidecar

VOCAB_SIZE = 97
EOD_ID = 0


def random_documents(count: int, *, longest: int = 40, seed: int = 0) -> list[list[int]]:
    """`count` documents of 1 to `longest` random ids below `VOCAB_SIZE`, each ending in `EOD_ID`, which occurs nowhere else."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, longest + 1, count)
    return [[*random.integers(1, VOCAB_SIZE, length - 1).tolist(), EOD_ID] for length in lengths.tolist()]


def write_corpus(
    prefix: str | Path, documents: Sequence[Sequence[int]], *, sidecar: bool = True, append_eod: bool = True, fingerprint: str = "test"
) -> str:
    """Write `<prefix>.bin/.idx`, with a sidecar unless told otherwise; returns the prefix as text."""
    marks = write_indexed_dataset(prefix, documents, VOCAB_SIZE)
    if sidecar:
        stamped = Sidecar(
            dtype="uint16",
            vocab_size=VOCAB_SIZE,
            tokenizer_type="ByteTokenizer",
            tokenizer_fingerprint=fingerprint,
            eod_id=EOD_ID,
            append_eod=append_eod,
            documents=marks.documents,
            sequences=marks.sequences,
            tokens=marks.tokens,
        )
        write_sidecar(prefix, stamped)
    return str(prefix)
