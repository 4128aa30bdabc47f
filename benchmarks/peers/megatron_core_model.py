"""megatron-core's GPTModel with the benchmark's shape, its data-parallel wrapper, schedules and optimizer.

Imports megatron-core: where there is no GPU, call `cuda_on_cpu.redirect` before.
"""

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state as state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

from benchmarks.workload import Workload


def initialize(work: Workload, settings: dict[str, Any]) -> None:
    """Its groups and its random streams; the default process group is there."""
    state.initialize_model_parallel(settings.get("tp", 1), settings.get("pp", 1))
    model_parallel_cuda_manual_seed(work.seed)


def transformer_config(work: Workload, settings: dict[str, Any]) -> TransformerConfig:
    """Its description of the workload's LLaMA. Settings: see megatron_core_gpt.py, and device (default cpu)."""
    dtype = torch.bfloat16 if settings["precision"] == "bf16" else torch.float32
    fused = settings.get("fused", False)
    return TransformerConfig(
        num_layers=work.layers,
        hidden_size=work.hidden,
        ffn_hidden_size=work.ffn,
        num_attention_heads=work.heads,
        normalization="RMSNorm",
        layernorm_epsilon=work.norm_eps,
        init_method_std=work.init_std,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=fused,
        cross_entropy_loss_fusion=fused,
        bias_dropout_fusion=fused,
        masked_softmax_fusion=False,  # a CUDA kernel
        gradient_accumulation_fusion=False,  # a CUDA kernel
        attention_softmax_in_fp32=False,
        use_cpu_initialization=settings.get("device", "cpu") == "cpu",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=settings.get("tp", 1),
        pipeline_model_parallel_size=settings.get("pp", 1),
        num_layers_in_last_pipeline_stage=settings.get("last_layers"),
        sequence_parallel=settings.get("sequence_parallel", False),
        batch_p2p_comm=False,
        finalize_model_grads_func=finalize_model_grads,
    )


def build(work: Workload, settings: dict[str, Any], config: TransformerConfig) -> DistributedDataParallel:
    """This rank's part of the model, in its data-parallel wrapper."""
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=work.vocabulary,
        max_sequence_length=work.length,
        pre_process=state.is_pipeline_first_stage(),
        post_process=state.is_pipeline_last_stage(),
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    model = model.to(settings.get("device", "cpu"))
    if config.bf16:
        model = model.bfloat16()
    wrapping = DistributedDataParallelConfig(
        grad_reduce_in_fp32=settings.get("reduce_in_fp32", True),
        overlap_grad_reduce=settings.get("overlap", False),
        use_distributed_optimizer=settings.get("distributed_optimizer", False),
    )
    return DistributedDataParallel(config, wrapping, model)


class FusedAdamW(torch.optim.AdamW):
    """PyTorch's AdamW in its fused form. Without Apex and Transformer Engine megatron-core takes the plain one, which is slower."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, fused=True, **options)


def optimizer_of(work: Workload, settings: dict[str, Any], config: TransformerConfig, model: DistributedDataParallel) -> Any:
    """Its optimizer: fp32 main weights in bf16, gradient clipping, AdamW."""
    described = OptimizerConfig(
        optimizer="adam",
        lr=work.lr,
        weight_decay=work.weight_decay,
        adam_beta1=work.betas[0],
        adam_beta2=work.betas[1],
        adam_eps=work.eps,
        clip_grad=work.clip,
        bf16=config.bf16,
        params_dtype=config.params_dtype,
        use_distributed_optimizer=settings.get("distributed_optimizer", False),
    )
    with mock.patch.object(torch.optim, "AdamW", FusedAdamW):
        return get_megatron_optimizer(described, [model])


def step_of(
    work: Workload, settings: dict[str, Any], config: TransformerConfig, model: DistributedDataParallel
) -> Callable[[], float | None]:
    """One optimizer step over this replica's share of the batch; the loss on the last stage, None elsewhere."""
    optimizer = optimizer_of(work, settings, config, model)
    config.grad_scale_func = optimizer.scale_loss
    if settings.get("overlap"):
        config.no_sync_func = model.no_sync
    replica, replicas = state.get_data_parallel_rank(), state.get_data_parallel_world_size()
    device = settings.get("device", "cpu")
    ids = torch.from_numpy(work.batch()).to(device)
    count = work.sequences // (replicas * work.micro)
    mine = [ids[(number * replicas + replica) * work.micro :][: work.micro] for number in range(count)]
    pieces = [(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) for rows in mine]
    positions = torch.arange(work.length, device=device)[None].expand(work.micro, -1)
    mask = torch.triu(torch.ones(work.length, work.length, dtype=torch.bool, device=device), 1)[None, None]

    def forward(pieces: Iterator[tuple[torch.Tensor, torch.Tensor]], model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
        tokens, labels = next(pieces)

        def mean(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            loss = losses.float().mean()
            return loss, {"loss": loss.detach().clone()}  # the schedule divides the first in place

        return model(tokens, positions, mask, labels=labels), mean

    run = get_forward_backward_func()

    def step() -> float | None:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        found = run(
            forward_step_func=forward,
            data_iterator=iter(pieces),
            model=[model],
            num_microbatches=count,
            seq_length=work.length,
            micro_batch_size=work.micro,
            forward_only=False,
        )
        optimizer.step()
        return sum(float(one["loss"]) for one in found) / count if found else None

    return step


def parameters_of(model: torch.nn.Module, ranks: int) -> int:
    """Parameters of the whole model: split ones of all ranks, copies once."""
    split = sum(p.numel() for p in model.parameters() if getattr(p, "tensor_model_parallel", False))
    copied = sum(p.numel() for p in model.parameters()) - split
    counts = torch.tensor([split, copied], dtype=torch.int64)
    if ranks > 1:
        dist.all_reduce(counts, group=state.get_model_parallel_group())
    return int(counts[0]) + int(counts[1]) // state.get_tensor_model_parallel_world_size()
