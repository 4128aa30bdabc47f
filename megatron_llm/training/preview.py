"""What a run is going to do, known before its first step: the learning-rate curve and the layout in a line.

A schedule that is driven to the wrong peak or ends too early is visible here; after a day of training it is only
visible in the loss.
"""

from collections.abc import Iterable

import torch
from torch import nn

from megatron_llm.config.schema import RunConfig
from megatron_llm.kernels.fp8 import UNIT
from megatron_llm.optim.lr_schedule import decay_iters, learning_rate, warmup_iters
from megatron_llm.parallel.layers import ColumnParallelLinear, RowParallelLinear


def lr_points(config: RunConfig, start_step: int = 0) -> tuple[tuple[int, float], ...]:
    """(step, learning rate of that step) where the schedule turns: first step, end of warm-up, middle, end of decay, last.

    Steps are counted by completion, so the first step of a fresh run is 1.
    """
    optimizer, total = config.optimizer, config.train.train_iters
    warmup, decay = round(warmup_iters(optimizer, total)), decay_iters(optimizer, total)
    turns = {start_step + 1, warmup + 1, warmup + 1 + (decay - warmup) // 2, decay, decay + 1, total}
    if optimizer.lr_decay_style == "WSD" and optimizer.lr_wsd_decay_iters is not None:
        turns.add(decay - optimizer.lr_wsd_decay_iters + 1)
    if optimizer.lr_decay_style == "constant":
        turns -= {decay, decay + 1, warmup + 1 + (decay - warmup) // 2}
    steps = sorted(step for step in turns | {total} if start_step < step <= total)
    return tuple((step, learning_rate(optimizer, step - 1, total)) for step in steps)


def layout_line(config: RunConfig, world_size: int, device: str, backend: str) -> str:
    """`TP 2 x PP 2 (2 chunks each) x DP 1 on 4 ranks (cpu, gloo), interleaved schedule, sequence parallel`."""
    parallel = config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    chunks = parallel.virtual_pipeline_model_parallel_size
    dp = world_size // (tp * pp)
    text = f"TP {tp} x PP {pp}{f' ({chunks} chunks each)' if chunks > 1 else ''} x DP {dp} on {world_size} "
    text += f"{'ranks' if world_size > 1 else 'rank'} ({', '.join(filter(None, (device, backend)))})"
    if pp > 1:
        text += f", {parallel.pipeline_schedule} schedule"
    if parallel.sequence_parallel and tp > 1:
        text += ", sequence parallel"
    if dp > 1:
        text += ", ZeRO-1" if parallel.use_distributed_optimizer else ", replicated optimizer"
    return text


def fp8_notes(config: RunConfig, chunks: Iterable[nn.Module], device: torch.device) -> list[str]:
    """What the products in 8 bits are on this rank, and what must be padded for them; nothing where there are none."""
    if config.train.fp8 == "none":
        return []
    text = "fp8: the linear layers of the blocks multiply in e4m3 forward and e5m2 for gradients, with one scale a tensor"
    if device.type == "cpu":
        text += "; a CPU emulates it, slower than without it"
    layers = (module for chunk in chunks for module in chunk.modules() if isinstance(module, ColumnParallelLinear | RowParallelLinear))
    uneven = {tuple(layer.weight.shape) for layer in layers if layer.products == "fp8" and any(size % UNIT for size in layer.weight.shape)}
    tokens = config.train.micro_batch_size * config.train.seq_length
    padded = [f"weights of {rows} x {columns}" for rows, columns in sorted(uneven)]
    padded += [f"micro-batches of {tokens} tokens"] if tokens % UNIT else []
    return [text] + ([f"fp8: padded to multiples of {UNIT}, which takes time: {', '.join(padded)}"] if padded else [])
