"""The work that every program does in the training benchmark: one model, one stream of tokens, one optimizer, one FLOP count.

Imported by the project's own processes and by those of the peers, which run in environments without the project: numpy
and the standard library only.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Workload:
    """A LLaMA (rotary positions, RMSNorm, SwiGLU, untied output layer) and one AdamW step over `sequences` sequences.

    The defaults are the benchmark's: 58 million parameters, 2,048 tokens a step.
    """

    hidden: int = 512
    layers: int = 8
    heads: int = 8
    ffn: int = 1376
    vocabulary: int = 32000
    length: int = 256
    sequences: int = 8
    micro: int = 8  # sequences in one forward pass of one replica
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    norm_eps: float = 1e-5
    init_std: float = 0.02
    seed: int = 1234

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.length * self.sequences

    @property
    def matrix_parameters(self) -> int:
        """Weights that multiply activations: attention, MLP and output layer, not the embedding, which is looked up."""
        return self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.ffn) + self.hidden * self.vocabulary

    @property
    def parameters(self) -> int:
        """All weights: the matrices, the embedding, and the norms (two a layer and the last)."""
        return self.matrix_parameters + self.hidden * self.vocabulary + (2 * self.layers + 1) * self.hidden

    @property
    def flops(self) -> float:
        """Floating-point operations that the mathematics of one step needs, forward and backward.

        6 x matrix parameters x tokens, and causal attention: 6 x layers x hidden x length x tokens (the scores and the
        weighted values are 2 x 2 x length x hidden each way forward, of which the causal mask leaves half; the backward
        is twice the forward). Recomputation, norms, softmax and the optimizer are not credited.
        """
        return 6.0 * self.matrix_parameters * self.tokens + 6.0 * self.layers * self.hidden * self.length * self.tokens

    def batch(self) -> NDArray[np.int64]:
        """Token ids [sequences, length + 1]: inputs are all but the last of a row, labels all but the first.

        Uniformly random, and the same batch at each step: the loss then starts near ln(vocabulary) and falls, at the same
        pace in every program that does the same work.
        """
        rows = [
            np.random.default_rng((self.seed, 0, index)).integers(self.vocabulary, size=self.length + 1, dtype=np.int64)
            for index in range(self.sequences)
        ]
        return np.stack(rows)

    def to_json(self) -> str:
        """One line of JSON for a command line."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Workload":
        """What `to_json` wrote."""
        return cls.from_mapping(json.loads(text))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "Workload":
        """From a mapping of any of the fields."""
        return cls(**{**values, "betas": tuple(values.get("betas", (0.9, 0.95)))})
