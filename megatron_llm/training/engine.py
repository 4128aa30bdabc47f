"""The native engine: one optimizer step, and one evaluation, of a model laid over the ranks.

A step counts the unmasked tokens of the whole global batch first, so that the loss each micro-batch sends backward is
already its share of the global mean: gradients are then only ever summed, over micro-batches and over replicas, and
neither the micro-batch size nor the number of replicas changes them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_llm.config.schema import RunConfig
from megatron_llm.data.batch import Batch
from megatron_llm.kernels import fp8
from megatron_llm.kernels.dispatch import select_kernels
from megatron_llm.lora.parallel import add_adapters
from megatron_llm.models.causal_lm import ModelOptions, build_chunks
from megatron_llm.models.family import Family
from megatron_llm.models.inputs import MicroBatch
from megatron_llm.optim.optimizer import DistributedOptimizer
from megatron_llm.parallel.comm import all_reduce
from megatron_llm.parallel.executor import PipelineExecutor
from megatron_llm.parallel.grad_sync import GradSync
from megatron_llm.parallel.groups import ParallelGroups
from megatron_llm.parallel.random import DropoutKey
from megatron_llm.parallel.schedules import Action


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step gave, equal on all ranks. `loss` is None when no token of the batch counts."""

    loss: float | None
    tokens: int
    grad_norm: float
    skipped: bool
    loss_scale: float | None


def model_dtype(config: RunConfig) -> torch.dtype:
    """Type of the parameters and activations."""
    if config.train.bf16:
        return torch.bfloat16
    return torch.float16 if config.train.fp16 else torch.float32


class NativeEngine:
    """Model chunks, gradient synchronisation, optimizer and pipeline of this rank.

    `config` must be resolved. With a LoRA rank the weights are frozen and adapters are added; `family` then has a table
    with rules for both. `chunks`, `grad_sync` and `optimizer` are public: checkpoints read them. `on_action` is
    told each pipeline action before it starts, for the line that a failure prints. `before_update` is called in each step
    when the gradients are there, before weights and optimizer state change.
    """

    def __init__(
        self, config: RunConfig, family: Family, groups: ParallelGroups, on_action: Callable[[Action], None] | None = None
    ) -> None:
        self.config, self.family, self.groups = config, family, groups
        self.before_update: Callable[[], None] = lambda: None
        self.dtype = model_dtype(config)
        options = ModelOptions(
            seed=config.train.seed,
            dtype=self.dtype,
            sequence_parallel=config.parallel.sequence_parallel,
            recompute=config.train.recompute_granularity,  # type: ignore[arg-type]
            compile=config.train.compile,
            compile_mode=config.train.compile_mode,
            fp8=config.train.fp8 != "none",
        )
        if options.fp8:
            fp8.require(groups.device)
        parallel = config.parallel
        self.kernels = kernels = select_kernels(
            config.train.kernels,  # type: ignore[arg-type]
            groups.device,
            compiled=config.train.compile,
        )
        self.chunks = build_chunks(
            family,
            config.model,
            groups,
            kernels,
            options,
            virtual=parallel.virtual_pipeline_model_parallel_size,
            first_layers=parallel.decoder_first_pipeline_num_layers,
            last_layers=parallel.decoder_last_pipeline_num_layers,
        )
        if config.lora.lora_rank is not None:
            self.family = add_adapters(self.chunks, config.lora, self.chunks[0].context)
        self.grad_sync = GradSync(
            self.chunks,
            groups,
            shard=parallel.use_distributed_optimizer,
            overlap=parallel.overlap_grad_reduce,
            bucket_size=parallel.ddp_bucket_size,
            accumulate=kernels.accumulate_,
        )
        self.optimizer = DistributedOptimizer(self.grad_sync, config.optimizer, groups, kernels)
        self.executor = PipelineExecutor(
            self.chunks,
            groups,
            config.parallel.pipeline_schedule,
            self.dtype,
            on_action,
            deferred=[chunk.context.deferred for chunk in self.chunks],
        )

    def train_step(self, batches: Sequence[Batch], *, step: int, first_sample: int, lr: float) -> StepOutcome:
        """One optimizer step over this replica's micro-batches of a global batch that starts at sample `first_sample`."""
        loss, tokens = self.compute_gradients(batches, step=step, first_sample=first_sample)
        self.before_update()
        result = self.optimizer.step(lr)
        return StepOutcome(
            loss=loss,
            tokens=tokens,
            grad_norm=result.grad_norm,
            skipped=result.skipped,
            loss_scale=result.loss_scale if self.config.train.fp16 else None,
        )

    def compute_gradients(self, batches: Sequence[Batch], *, step: int, first_sample: int) -> tuple[float | None, int]:
        """Forward and backward of all micro-batches, and the gradients' reduction; mean loss and count of the global batch.

        Gradients are those of the mean loss of a token times the loss scale, left in the flat buffers for the optimizer.
        """
        batches = [batch.to(self.groups.device, non_blocking=True) for batch in batches]
        count = self._count(batches)
        scale = self.optimizer.loss_scale
        weight = (scale / count.clamp(min=1.0)).float()
        micro = self.config.train.micro_batch_size
        stride, offset = micro * self.groups.dp.size, micro * self.groups.dp.rank
        micro_batches = [
            MicroBatch(batch, weight, DropoutKey(self.config.train.seed, step, first_sample + number * stride + offset))
            for number, batch in enumerate(batches)
        ]
        for chunk in self.chunks:
            chunk.train()
        self.grad_sync.zero_grad()
        outputs = self.executor.run(micro_batches, self._hidden_shape(batches[0]), before_last_backward=self.grad_sync.start_reduction)
        self.grad_sync.finish()
        loss, tokens = self._total(outputs) / scale, int(count.item())
        return (float(loss.item()) if tokens else None), tokens

    @torch.no_grad()
    def evaluate(self, global_batches: Iterable[Sequence[Batch]]) -> float | None:
        """Mean loss of a token over whole global batches (sum over sum, never a mean of means); None without tokens."""
        for chunk in self.chunks:
            chunk.eval()
        loss = torch.zeros((), dtype=torch.float64, device=self.groups.device)
        tokens = torch.zeros((), dtype=torch.float64, device=self.groups.device)
        for batches in global_batches:
            moved = [batch.to(self.groups.device, non_blocking=True) for batch in batches]
            tokens += self._count(moved)
            outputs = self.executor.run([MicroBatch(batch) for batch in moved], self._hidden_shape(moved[0]), forward_only=True)
            loss += self._total(outputs)
        return float((loss / tokens).item()) if tokens.item() else None

    def _count(self, batches: Sequence[Batch]) -> Tensor:
        """Unmasked tokens of the global batch, as an fp64 scalar."""
        return all_reduce(torch.stack([batch.loss_mask.sum(dtype=torch.float64) for batch in batches]).sum(), self.groups.dp)

    def _total(self, outputs: Sequence[Tensor]) -> Tensor:
        """Sum of the last stage's losses over micro-batches and replicas, known to every rank (fp64 scalar)."""
        total = torch.zeros((), dtype=torch.float64, device=self.groups.device)
        for output in outputs:
            total += output
        return all_reduce(all_reduce(total, self.groups.pp), self.groups.dp)

    def _hidden_shape(self, batch: Batch) -> tuple[int, int, int]:
        """Shape of what stages send to each other."""
        size, length = batch.tokens.shape
        if self.config.parallel.sequence_parallel:
            length //= self.groups.tp.size
        return length, size, self.config.model.hidden_size
