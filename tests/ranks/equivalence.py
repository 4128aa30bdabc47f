"""What the equivalence tests share: a tiny model and batch, one process's answer, and the same from any layout.

Everything is compared in Hugging Face names and true shapes, assembled from the rectangles that the ranks own, so the
placements and the mapping tables are under test as well.
"""

import functools
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megatron_llm.config.resolve import resolve
from megatron_llm.config.schema import ModelConfig, OptimizerConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_llm.data.batch import Batch
from megatron_llm.models.mapping import MappingTable, parameter_rectangles
from megatron_llm.models.registry import get_family
from megatron_llm.parallel.groups import ParallelGroups, single_process_groups
from megatron_llm.testing.ranks import run_ranks
from megatron_llm.training.engine import NativeEngine

SAMPLES, MICRO, LENGTH, STEPS, LR = 24, 3, 16, 2, 1e-3


@dataclass(frozen=True)
class Point:
    """One place in the matrix: a layout and the variations of the model."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    vpp: int = 1
    family: str = "llama"
    tied: bool = False
    sp: bool = False
    vocab: int = 97
    options: tuple[tuple[str, object], ...] = field(default=())

    @property
    def id(self) -> str:
        """As in tp2-pp2-dp2-tied-sp-v97-llama."""
        words = [f"tp{self.tp}", f"pp{self.pp}", f"dp{self.dp}"] + ([f"vpp{self.vpp}"] if self.vpp > 1 else [])
        words += ["tied" if self.tied else "untied"] + (["sp"] if self.sp else []) + [f"v{self.vocab}", self.family]
        return "-".join(words + [f"{name}={value}" for name, value in self.options])

    def config(self) -> RunConfig:
        """The resolved configuration: eight layers, eight heads, four key/value heads in llama."""
        groups = 4 if self.family == "llama" else None
        config = RunConfig(
            model=ModelConfig(
                model=self.family,
                num_layers=8,
                hidden_size=32,
                ffn_hidden_size=88,
                num_attention_heads=8,
                num_query_groups=groups,
                max_position_embeddings=LENGTH,
                vocab_size=self.vocab,
                tie_word_embeddings=self.tied,
                init_method_std=0.1,
            ),
            parallel=ParallelConfig(
                tensor_model_parallel_size=self.tp,
                pipeline_model_parallel_size=self.pp,
                virtual_pipeline_model_parallel_size=self.vpp,
                sequence_parallel=self.sp,
                ddp_bucket_size=5000,
                device="cpu",
            ),
            # Adam divides each gradient by its own size, so with its usual epsilon an element whose gradient is rounding
            # noise moves by a whole learning rate. An epsilon of the gradients' size keeps the weights as exact as they are.
            optimizer=OptimizerConfig(lr=LR, adam_eps=1e-3, clip_grad=0.5),
            train=TrainConfig(micro_batch_size=MICRO, global_batch_size=SAMPLES, seq_length=LENGTH, train_iters=STEPS, seed=11),
            data=replace(RunConfig().data, mock_data=True),
        )
        for name, value in self.options:
            section = next(s for s in ("model", "parallel", "optimizer", "train") if hasattr(getattr(config, s), name))
            config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
        return resolve(config, self.tp * self.pp * self.dp)


@dataclass
class Answer:
    """What a run gave: losses and gradient norms of each step, gradients of the first, weights after the last."""

    losses: list[float | None]
    norms: list[float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


Piece = tuple[str, tuple[int, ...], tuple[int, ...], Tensor]


def whole_batch(vocab: int, step: int) -> Batch:
    """All samples of one global batch, with a ragged loss mask so that no two micro-batches count alike."""
    generator = torch.Generator().manual_seed(100 + step)
    text = torch.randint(0, vocab, (SAMPLES, LENGTH + 1), generator=generator)
    mask = (torch.rand(SAMPLES, LENGTH, generator=generator) < torch.linspace(0.2, 1.0, SAMPLES).unsqueeze(1)).float()
    positions = torch.arange(LENGTH).expand(SAMPLES, LENGTH)
    return Batch(tokens=text[:, :-1], labels=text[:, 1:], loss_mask=mask, position_ids=positions, document_ids=None)


def rows(batch: Batch, first: int, count: int) -> Batch:
    """Samples first .. first + count - 1."""
    cut = slice(first, first + count)
    return Batch(batch.tokens[cut], batch.labels[cut], batch.loss_mask[cut], batch.position_ids[cut], None)


def owned_pieces(engine: NativeEngine, table: MappingTable, what: str) -> list[Piece]:
    """Every rectangle this rank owns, of the gradients or of the weights."""
    pieces = []
    for chunk in engine.chunks:
        for parameter in chunk.parameters():
            tensor = parameter.main_grad if what == "gradients" else parameter.detach()  # type: ignore[attr-defined]
            for rectangle in parameter_rectangles(parameter, table):
                if rectangle.owned:
                    pieces.append((rectangle.key, rectangle.global_shape, rectangle.global_start, rectangle.view(tensor).clone()))
    return pieces


def run_point(groups: ParallelGroups, point: Point) -> tuple[list[float | None], list[float], list[Piece], list[Piece]]:
    """Two optimizer steps on this rank."""
    config = point.config()
    family = get_family(point.family)
    engine = NativeEngine(config, family, groups)
    losses, norms, gradients = [], [], []
    stride = MICRO * groups.dp.size
    for step in range(STEPS):
        batch = whole_batch(point.vocab, step)
        micro = [rows(batch, first + groups.dp.rank * MICRO, MICRO) for first in range(0, SAMPLES, stride)]
        loss, _ = engine.compute_gradients(micro, step=step, first_sample=step * SAMPLES)
        if step == 0:
            engine.grad_sync.gather_gradients()
            gradients = owned_pieces(engine, family.table, "gradients")
        norms.append(engine.optimizer.step(LR).grad_norm)
        losses.append(loss)
    return losses, norms, gradients, owned_pieces(engine, family.table, "weights")


def assemble(pieces: list[list[Piece]]) -> dict[str, Tensor]:
    """Whole tensors from the ranks' rectangles (data-parallel replicas must agree); every element covered."""
    whole: dict[str, Tensor] = {}
    for key, shape, start, data in (piece for rank in pieces for piece in rank):
        target = whole.setdefault(key, torch.full(shape, float("nan"), dtype=data.dtype))
        view = target[tuple(slice(a, a + n) for a, n in zip(start, data.shape, strict=True))]
        known = ~view.isnan()
        assert torch.equal(view[known], data[known]), f"replicas disagree about {key}"
        view.copy_(data)
    for key, tensor in whole.items():
        assert not tensor.isnan().any(), f"{key} is not wholly covered by what the ranks own"
    return whole


def answer_of(results: list[tuple[list[float | None], list[float], list[Piece], list[Piece]]]) -> Answer:
    """One answer from all ranks, which must agree on losses and norms."""
    losses, norms = results[0][:2]
    for other in results:
        assert other[0] == losses and other[1] == norms, "ranks disagree about loss or gradient norm"
    return Answer(losses, norms, assemble([result[2] for result in results]), assemble([result[3] for result in results]))


@functools.lru_cache(maxsize=64)
def reference(family: str, tied: bool, vocab: int, options: tuple[tuple[str, object], ...] = ()) -> Answer:
    """One process, no torch.distributed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return answer_of([run_point(single_process_groups(), Point(family=family, tied=tied, vocab=vocab, options=options))])
    finally:
        torch.set_num_threads(threads)


def assert_close(what: str, got: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    """Largest difference at most `relative` times the largest element."""
    assert got.shape == expected.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    difference, scale = (got - expected).abs().max().item(), expected.abs().max().item()
    assert difference <= relative * scale, (
        f"{what} differs by {difference:.3g} at a scale of {scale:.3g} (relative {difference / scale:.2g})"
    )


def assert_same(got: Answer, expected: Answer, relative: float = 1e-5) -> None:
    """Losses, norms, every gradient and every weight."""
    for step, (a, b) in enumerate(zip(got.losses, expected.losses, strict=True)):
        assert a is not None and b is not None and abs(a - b) <= relative * abs(b), f"loss of step {step}: {a}, expected {b}"
    for step, (x, y) in enumerate(zip(got.norms, expected.norms, strict=True)):
        assert abs(x - y) <= relative * y, f"gradient norm of step {step}: {x}, expected {y}"
    assert got.gradients.keys() == expected.gradients.keys()
    for key, gradient in expected.gradients.items():
        assert_close(f"gradient of {key}", got.gradients[key], gradient, relative)
    assert got.weights.keys() == expected.weights.keys()
    for key, weight in expected.weights.items():
        assert_close(f"weight {key}", got.weights[key], weight, relative)


def check_point(point: Point) -> None:
    """The layout's answer equals one process's."""
    results = run_ranks(run_point, point, tp=point.tp, pp=point.pp, dp=point.dp, timeout=120)
    reference_options = tuple((name, value) for name, value in point.options if name in ("hidden_dropout", "num_query_groups"))
    assert_same(answer_of(results), reference(point.family, point.tied, point.vocab, reference_options))
