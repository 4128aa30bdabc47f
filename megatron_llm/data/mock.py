"""Random tokens instead of a corpus: for smoke tests and benchmarks. Sample i is the same on every machine and rank."""

import numpy as np

from megatron_llm.data.batch import Sample


class MockDataset:
    """`samples` sequences of `seq_length` uniformly random ids below `vocab_size`; `stream` keeps splits apart."""

    def __init__(self, *, vocab_size: int, seq_length: int, samples: int, seed: int, stream: int = 0) -> None:
        self.vocab_size = vocab_size
        self.seq_length = seq_length
        self.samples = samples
        self.seed = seed
        self.stream = stream

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.samples:
            raise IndexError(f"sample {index} of {self.samples}")
        random = np.random.default_rng((self.seed, self.stream, index))
        ids = random.integers(self.vocab_size, size=self.seq_length + 1, dtype=np.int64)
        return Sample(ids[:-1], ids[1:], np.ones(self.seq_length, np.float32), np.arange(self.seq_length, dtype=np.int64))
