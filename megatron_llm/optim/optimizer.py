"""AdamW over flat buffers: the distributed optimizer (ZeRO stage 1) and plain replication, which are one code.

Sharded, each data-parallel rank updates its equal share of every bucket and the updated parameters are gathered
(Rajbhandari et al. 2020, "ZeRO"); replicated, every rank owns and updates everything. Parameters in 16 bits have an fp32 main
copy of the owned range; fp32 parameters are their own main copy. The update is AdamW (Loshchilov and Hutter 2019,
"Decoupled Weight Decay Regularization"), one pass over one or two flat tensors a bucket: it scales the gradients, updates
the moments and the main copy and rounds the 16-bit parameters, so that each is read and written once.

While the parameters of a bucket are gathered, the next bucket is updated.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_llm.config.schema import OptimizerConfig
from megatron_llm.kernels.dispatch import Kernels, torch_kernels
from megatron_llm.optim.grad_norm import GradNorm, clip_factor, describe_nonfinite
from megatron_llm.optim.loss_scaler import make_loss_scaler
from megatron_llm.optim.param_groups import runs_of
from megatron_llm.parallel.buffers import Bucket
from megatron_llm.parallel.comm import all_reduce
from megatron_llm.parallel.grad_sync import GradSync
from megatron_llm.parallel.groups import ParallelGroups
from megatron_llm.utils.errors import UserError


@dataclass(frozen=True)
class StepResult:
    """One optimizer step: the gradient norm before clipping (loss scale taken out), whether the update was skipped
    because gradients overflowed, and the loss scale that this step's loss had."""

    grad_norm: float
    skipped: bool
    loss_scale: float


@dataclass(frozen=True)
class OptimizerSegment:
    """Elements [start, end) of a flattened local parameter that this rank's optimizer owns, and their state.

    `tensors` are flat fp32 views of length end - start, writable in place: "main" (the parameter's own memory when it
    is fp32), "exp_avg" and "exp_avg_sq".
    """

    parameter: nn.Parameter
    start: int
    end: int
    tensors: dict[str, Tensor]


class _Shard:
    """The owned range of one bucket with its optimizer state."""

    def __init__(self, bucket: Bucket, config: OptimizerConfig, kernels: Kernels) -> None:
        self.bucket = bucket
        owned = bucket.owned_params
        self.main = owned if owned.dtype == torch.float32 else owned.float()
        # Made here and not at the first step, so that a checkpoint can be loaded before it.
        self.state = {"main": self.main, "exp_avg": torch.zeros_like(self.main), "exp_avg_sq": torch.zeros_like(self.main)}
        self._config, self._kernels, self._runs = config, kernels, runs_of(bucket, config)

    def update(self, lr: float, factor: float, step: int) -> None:
        """Update number `step` (from 1) with the gradients times `factor` (clipping and loss scale)."""
        config, low = self._config, self.bucket.owned[0]
        rounds = self.main.dtype != self.bucket.params.dtype
        for run in self._runs:
            own = slice(run.start - low, run.end - low)
            self._kernels.adamw_(
                self.main[own],
                self.state["exp_avg"][own],
                self.state["exp_avg_sq"][own],
                self.bucket.grads[run.start : run.end],
                self.bucket.params[run.start : run.end] if rounds else None,
                lr,
                config.adam_beta1,
                config.adam_beta2,
                config.adam_eps,
                run.weight_decay,
                step,
                factor,
            )

    def write_parameters(self) -> None:
        """Round main into the owned range of the parameters; nothing to do where they are the same memory."""
        if self.main.dtype != self.bucket.params.dtype:
            self.bucket.owned_params.copy_(self.main)

    def read_parameters(self) -> None:
        """Take main from the parameters."""
        if self.main.dtype != self.bucket.params.dtype:
            self.main.copy_(self.bucket.owned_params)

    def segments(self) -> Iterator[OptimizerSegment]:
        """The owned parts of the bucket's parameters with their state."""
        for segment in self.bucket.segments():
            first = segment.offset - self.bucket.owned[0]
            part = slice(first, first + segment.end - segment.start)
            yield OptimizerSegment(segment.parameter, segment.start, segment.end, {name: t[part] for name, t in self.state.items()})


class DistributedOptimizer:
    """AdamW with global-norm clipping and loss scaling over the buckets of a GradSync.

    Multiply the loss by `loss_scale` before the backward; `step` takes the scale out again. Every method is collective
    over the world.
    """

    def __init__(self, grad_sync: GradSync, config: OptimizerConfig, groups: ParallelGroups, kernels: Kernels | None = None) -> None:
        """`kernels` by default in plain torch."""
        kernels = torch_kernels() if kernels is None else kernels
        self._sync, self._config, self._groups = grad_sync, config, groups
        self._steps = 0
        self._norm = GradNorm(grad_sync, groups, kernels)
        self._shards = [_Shard(bucket, config, kernels) for bucket in grad_sync.buckets]
        fp16 = torch.tensor(any(b.params.dtype == torch.float16 for b in grad_sync.buckets), dtype=torch.int32, device=groups.device)
        self._scaler = make_loss_scaler(config, fp16=bool(all_reduce(fp16, groups.world, op="max")))

    @property
    def loss_scale(self) -> float:
        """What to multiply the next loss by; 1 without loss scaling."""
        return self._scaler.scale

    @property
    def step_count(self) -> int:
        """Updates made so far; skipped steps do not count."""
        return self._steps

    @torch.no_grad()
    def step(self, lr: float) -> StepResult:
        """Finish the reduction, clip, update, gather the parameters. All ranks skip when any gradient overflowed.

        UserError naming the parameter when gradients are not finite without loss scaling, or when the loss scale has
        no room left to shrink.
        """
        self._sync.finish()
        scale = self._scaler.scale
        norm = self._norm.compute() / scale
        if not math.isfinite(norm):
            self._reject(norm)
            return StepResult(norm, True, scale)
        factor = clip_factor(norm, self._config.clip_grad) / scale
        pending = []
        for shard in self._shards:
            shard.update(lr, factor, self._steps + 1)
            pending.append(self._sync.gather_parameters(shard.bucket))
        for gathered in pending:
            gathered.wait()
        self._steps += 1
        self._scaler.update(overflow=False)
        return StepResult(norm, False, scale)

    def _reject(self, norm: float) -> None:
        """Handle gradients that are not finite: note an overflow, or explain why the run cannot go on."""
        if not self._scaler.skips:
            raise UserError(
                f"the gradient norm of step {self._steps} is {norm}; the first gradient that is not finite is that of "
                f"{describe_nonfinite(self._sync, self._groups)}: the run has diverged, resume from the last checkpoint with a lower lr, "
                f"a longer lr-warmup-iters or a smaller clip-grad"
            )
        if self._scaler.exhausted:
            raise UserError(
                f"the loss scale is {self._scaler.scale:g} and would fall below min-loss-scale {self._config.min_loss_scale:g} because "
                f"gradients still overflow, first that of {describe_nonfinite(self._sync, self._groups)}: use bf16 instead of fp16 if the "
                f"hardware has it, or resume from the last checkpoint with a lower lr or a longer lr-warmup-iters"
            )
        self._scaler.update(overflow=True)

    def segments(self) -> Iterator[OptimizerSegment]:
        """Everything this rank's optimizer owns, TP replicas and tied copies included (`Placement.counted` tells
        which of it a checkpoint needs). Loading writes into the tensors and then calls `after_load`."""
        for shard in self._shards:
            yield from shard.segments()

    @torch.no_grad()
    def after_load(self) -> None:
        """After writing into the segments: bring the parameters of every rank in line with main."""
        for shard in self._shards:
            shard.write_parameters()
        for pending in [self._sync.gather_parameters(shard.bucket) for shard in self._shards]:
            pending.wait()

    @torch.no_grad()
    def read_parameters(self) -> None:
        """After writing into the parameters (weights loaded without optimizer state): take main from them. Local."""
        for shard in self._shards:
            shard.read_parameters()

    def state_dict(self) -> dict[str, Any]:
        """The plain scalars: number of updates, loss scaler."""
        return {"step": self._steps, "loss_scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from saved scalars."""
        self._steps = int(state["step"])
        self._scaler.load_state_dict(state["loss_scaler"])
