"""Rules on the model's sizes and on how model and batch are laid over the ranks.

A rule takes the configuration with its defaults filled in and the number of processes, and returns one sentence that
says what does not fit and what would, or None. A rule keeps quiet where another one already speaks (a size of zero, a
world that does not divide), so that each fault is named once.
"""

import math

from megatron_llm.config.schema import RunConfig


def data_parallel_size(config: RunConfig, world_size: int) -> int | None:
    """Replicas that fill the world, or None when tensor x pipeline parallel size does not divide it."""
    replica = config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size
    return world_size // replica if replica > 0 and world_size > 0 and world_size % replica == 0 else None


def micro_batches(config: RunConfig, world_size: int) -> int | None:
    """Micro-batches of one step on each replica, or None when the batch does not divide."""
    dp, total, micro = data_parallel_size(config, world_size), config.train.global_batch_size, config.train.micro_batch_size
    if dp is None or total is None or total < 1 or micro < 1 or total % (micro * dp):
        return None
    return total // (micro * dp)


def world_divides(config: RunConfig, world_size: int) -> str | None:
    """Tensor x pipeline parallel size divides the number of processes."""
    tp, pp = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    if tp < 1 or pp < 1 or data_parallel_size(config, world_size) is not None:
        return None
    return (
        f"{world_size} processes cannot be laid out as TP {tp} x PP {pp} = {tp * pp} ranks a replica: "
        f"start {_multiples(world_size, tp * pp)} processes, or change tensor_model_parallel_size or pipeline_model_parallel_size"
    )


def batch_divides(config: RunConfig, world_size: int) -> str | None:
    """The global batch is a multiple of micro-batch x data-parallel size."""
    dp, total, micro = data_parallel_size(config, world_size), config.train.global_batch_size, config.train.micro_batch_size
    if dp is None or total is None or total < 1 or micro < 1 or total % (micro * dp) == 0:
        return None
    text = (
        f"global_batch_size {total} is not a multiple of micro_batch_size {micro} x data-parallel size {dp} = {micro * dp}: "
        f"use a global batch of {_multiples(total, micro * dp)}"
    )
    if total % dp == 0:
        text += f", or a micro-batch of {_nearest_divisor(total // dp, micro)}"
    return text


def heads_divide_hidden(config: RunConfig, world_size: int) -> str | None:
    """The heads share the hidden size evenly, unless the head size is given."""
    hidden, heads, channels = config.model.hidden_size, config.model.num_attention_heads, config.model.kv_channels
    if min(hidden, heads) < 1 or hidden % heads == 0 or channels is not None:
        return None
    return (
        f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}: "
        f"use a hidden size of {_multiples(hidden, heads)}, or set kv_channels"
    )


def groups_divide_heads(config: RunConfig, world_size: int) -> str | None:
    """Every key/value head serves the same number of query heads."""
    heads, groups = config.model.num_attention_heads, config.model.num_query_groups
    if groups is None or min(heads, groups) < 1 or heads % groups == 0:
        return None
    return f"num_attention_heads {heads} is not a multiple of num_query_groups {groups}: use {_divisors(heads)} groups"


def heads_over_tp(config: RunConfig, world_size: int) -> str | None:
    """Each tensor-parallel rank holds the same number of query heads."""
    heads, tp = config.model.num_attention_heads, config.parallel.tensor_model_parallel_size
    if min(heads, tp) < 1 or heads % tp == 0:
        return None
    return (
        f"num_attention_heads {heads} cannot be split over tensor_model_parallel_size {tp}: "
        f"use a tensor-parallel size of {_divisors(heads)}"
    )


def groups_over_tp(config: RunConfig, world_size: int) -> str | None:
    """Key/value heads are split evenly, or each is copied to the same number of ranks."""
    groups, tp = config.model.num_query_groups, config.parallel.tensor_model_parallel_size
    if groups is None or min(groups, tp) < 1 or groups % tp == 0 or tp % groups == 0:
        return None
    return (
        f"num_query_groups {groups} and tensor_model_parallel_size {tp} do not fit: one must divide the other, "
        f"so that key/value heads are split or copied evenly"
    )


def ffn_over_tp(config: RunConfig, world_size: int) -> str | None:
    """Each tensor-parallel rank holds the same part of the MLP."""
    ffn, tp = config.model.ffn_hidden_size, config.parallel.tensor_model_parallel_size
    if ffn is None or min(ffn, tp) < 1 or ffn % tp == 0:
        return None
    return f"ffn_hidden_size {ffn} is not a multiple of tensor_model_parallel_size {tp}: use {_multiples(ffn, tp)}"


def layers_over_stages(config: RunConfig, world_size: int) -> str | None:
    """The model chunks whose layers are not given hold equally many."""
    layers, parallel = config.model.num_layers, config.parallel
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    given = [n for n in (parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers) if n is not None]
    if given:
        return _uneven_stages(layers, pp, vpp, given)
    if min(layers, pp, vpp) < 1 or layers % (pp * vpp) == 0:
        return None
    return (
        f"num_layers {layers} cannot be split into {pp} pipeline stages x {vpp} chunks = {pp * vpp} equal parts: "
        f"use {_multiples(layers, pp * vpp)} layers, or give decoder_first_pipeline_num_layers or decoder_last_pipeline_num_layers"
    )


def _uneven_stages(layers: int, pp: int, vpp: int, given: list[int]) -> str | None:
    """The layers of the first or the last stage are given: the stages between share the rest."""
    named = "decoder_first_pipeline_num_layers and decoder_last_pipeline_num_layers"
    if pp < 2 or vpp > 1:
        return f"{named} need at least 2 pipeline stages without virtual stages, got {pp} stages x {vpp} chunks: leave them out"
    rest, others = layers - sum(given), pp - len(given)
    if (others == 0 and rest == 0) or (others > 0 and rest >= others and rest % others == 0):
        return None
    return (
        f"{named} leave {rest} of {layers} layers for the other {others} of {pp} stages: "
        f"{'the two must add up to num_layers' if others == 0 else 'that must be a positive multiple of their number'}"
    )


def sequence_over_tp(config: RunConfig, world_size: int) -> str | None:
    """Under sequence parallelism each tensor-parallel rank holds the same part of the sequence."""
    length, tp = config.train.seq_length, config.parallel.tensor_model_parallel_size
    if not config.parallel.sequence_parallel or min(length, tp) < 1 or length % tp == 0:
        return None
    return f"sequence_parallel needs seq_length {length} to be a multiple of tensor_model_parallel_size {tp}: use {_multiples(length, tp)}"


def sequence_within_positions(config: RunConfig, world_size: int) -> str | None:
    """Sequences are no longer than the model is made for."""
    model, length, longest = config.model, config.train.seq_length, config.model.max_position_embeddings
    # ALiBi has no limit, and dynamic scaling stretches beyond this length by itself.
    unlimited = model.model == "bloom" or model.position_embedding_type == "alibi" or model.rope_scaling_type == "dynamic"
    if unlimited or longest is None or length <= longest:
        return None
    return f"seq_length {length} is longer than max_position_embeddings {longest}: raise the second or shorten the first"


def virtual_stages_need_pipeline(config: RunConfig, world_size: int) -> str | None:
    """Chunks interleave between stages, so there must be stages."""
    pp, vpp = config.parallel.pipeline_model_parallel_size, config.parallel.virtual_pipeline_model_parallel_size
    if vpp <= 1 or pp != 1:
        return None
    return f"virtual_pipeline_model_parallel_size {vpp} needs pipeline_model_parallel_size above 1: one stage interleaves nothing"


def clex_needs_one_chunk(config: RunConfig, world_size: int) -> str | None:
    """The learned scaling is held once a rank."""
    vpp = config.parallel.virtual_pipeline_model_parallel_size
    if config.model.rope_scaling_type != "clex" or vpp <= 1:
        return None
    return f"rope_scaling_type clex needs virtual_pipeline_model_parallel_size 1, got {vpp}: its weights are held once a rank"


def schedule_fits_chunks(config: RunConfig, world_size: int) -> str | None:
    """Only the interleaved schedule runs several chunks a rank, and it needs several."""
    name, vpp = config.parallel.pipeline_schedule, config.parallel.virtual_pipeline_model_parallel_size
    if name == "interleaved" and vpp == 1:
        return "pipeline_schedule interleaved needs virtual_pipeline_model_parallel_size of at least 2"
    if name in ("gpipe", "1f1b", "zero-bubble") and vpp > 1:
        return f"pipeline_schedule {name} runs one chunk a rank, virtual_pipeline_model_parallel_size is {vpp}: use interleaved (or auto)"
    return None


def zero_bubble_needs_pipeline(config: RunConfig, world_size: int) -> str | None:
    """Weight gradients that are put off fill the time in which stages wait for each other."""
    if config.parallel.pipeline_schedule != "zero-bubble" or config.parallel.pipeline_model_parallel_size != 1:
        return None
    return "pipeline_schedule zero-bubble needs pipeline_model_parallel_size above 1: one stage never waits, use auto"


def zero_bubble_needs_eager(config: RunConfig, world_size: int) -> str | None:
    """A compiled graph has one backward: its weight gradients cannot be put off."""
    if config.parallel.pipeline_schedule != "zero-bubble" or not config.train.compile:
        return None
    return "pipeline_schedule zero-bubble splits the backward, which compile makes one: turn compile off, or use 1f1b"


def compile_mode_needs_compile(config: RunConfig, world_size: int) -> str | None:
    """A mode of the compiler has an effect only with compile."""
    mode = config.train.compile_mode
    if mode == "default" or config.train.compile:
        return None
    return f"compile_mode {mode} has an effect only with compile: turn compile on, or leave the mode out"


def cuda_graphs_need_one_stage(config: RunConfig, world_size: int) -> str | None:
    """Recorded kernels write each output where the last one was, which a pipeline may still be sending."""
    mode, stages = config.train.compile_mode, config.parallel.pipeline_model_parallel_size
    if not _records_graphs(config) or stages <= 1:
        return None
    return (
        f"compile_mode {mode} records CUDA graphs, whose outputs the next micro-batch overwrites, and {stages} pipeline stages keep "
        f"several micro-batches at a time: use default or max-autotune-no-cudagraphs, or pipeline_model_parallel_size 1"
    )


def cuda_graphs_need_no_dropout(config: RunConfig, world_size: int) -> str | None:
    """Recorded kernels draw the same numbers again, and each micro-batch's dropout has a seed of its own."""
    model = config.model
    if not _records_graphs(config) or max(model.attention_dropout, model.hidden_dropout) <= 0:
        return None
    return (
        f"compile_mode {config.train.compile_mode} records CUDA graphs, which cannot take a new seed for each micro-batch's dropout: "
        f"use default or max-autotune-no-cudagraphs, or turn attention_dropout and hidden_dropout off"
    )


def _records_graphs(config: RunConfig) -> bool:
    return config.train.compile and config.train.compile_mode in ("reduce-overhead", "max-autotune")


def backend_fits_device(config: RunConfig, world_size: int) -> str | None:
    """NCCL moves GPU memory only, shared memory CPU memory only."""
    backend, device = config.parallel.distributed_backend, config.parallel.device
    if backend == "nccl" and device == "cpu":
        return "distributed_backend nccl cannot move CPU tensors: use gloo, shm (or auto) with device cpu"
    if backend == "shm" and device == "cuda":
        return "distributed_backend shm cannot move GPU tensors: use nccl (or auto) with device cuda"
    return None


def _multiples(value: int, unit: int) -> str:
    # The valid values on both sides of an invalid one: "8 or 16".
    below = value // unit * unit
    return f"{below} or {below + unit}" if below > 0 else str(unit)


def _divisors_of(value: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(value) + 1) if value % n == 0]
    return sorted({*small, *(value // n for n in small)})


def _divisors(value: int) -> str:
    *others, last = map(str, _divisors_of(value))
    return f"{', '.join(others)} or {last}" if others else last


def _nearest_divisor(value: int, wanted: int) -> int:
    return max(n for n in _divisors_of(value) if n <= max(wanted, 1))


LAYOUT_RULES = (
    world_divides,
    batch_divides,
    heads_divide_hidden,
    groups_divide_heads,
    heads_over_tp,
    groups_over_tp,
    ffn_over_tp,
    layers_over_stages,
    sequence_over_tp,
    sequence_within_positions,
    virtual_stages_need_pipeline,
    clex_needs_one_chunk,
    schedule_fits_chunks,
    zero_bubble_needs_pipeline,
    zero_bubble_needs_eager,
    compile_mode_needs_compile,
    cuda_graphs_need_one_stage,
    cuda_graphs_need_no_dropout,
    backend_fits_device,
)
