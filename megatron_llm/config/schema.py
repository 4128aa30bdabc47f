"""The typed configuration of a run: one frozen dataclass a concern, `RunConfig` holding them all.

Every field is one command-line flag (`num_layers` is `--num-layers`, the names are Megatron's) and one YAML key. The
help text in each field's metadata is what `--help` and `docs/config.md` print, so the three cannot disagree. The range
of a single number stands beside it; rules that span fields live in `rules.py`.
"""

from dataclasses import dataclass, field
from typing import Any

from megatron_llm.config.bounds import COUNT, FINITE, NOT_NEGATIVE, POSITIVE, PROBABILITY, SEED, Bounds


def option(
    default: Any,
    text: str,
    *,
    choices: tuple[str, ...] = (),
    bounds: Bounds = FINITE,
    aliases: tuple[str, ...] = (),
    constants: tuple[tuple[str, Any], ...] = (),
) -> Any:
    """A dataclass field with what its flag needs.

    text       help, as `--help` and docs/config.md show it
    choices    the only values allowed
    bounds     the range of a number
    aliases    other spellings of the same flag, without the dashes: the usual abbreviation or another Megatron name
    constants  flags without a value that set this field, as (spelling, value): Megatron's store_true spellings
    """
    metadata = {"help": text, "choices": choices, "bounds": bounds, "aliases": aliases, "constants": constants}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of the model. Sizes are global: nothing here depends on the layout."""

    model: str = option(
        "llama",
        "model family, one of the registry's names; gpt is GPT-2, glm is GLM-4 as transformers has it",
        choices=("llama", "gpt", "mistral", "qwen2", "qwen3", "baichuan", "chatglm", "glm", "bloom", "gpt_neox", "gemma"),
    )
    num_layers: int = option(4, "number of transformer blocks", bounds=COUNT)
    hidden_size: int = option(256, "width of the residual stream", bounds=COUNT)
    ffn_hidden_size: int | None = option(
        None,
        "width of the MLP; default 8/3 x hidden_size rounded up to a multiple of 32 where it is gated (llama and most others), "
        "4 x hidden_size where it is not (gpt, bloom, gpt_neox)",
        bounds=COUNT,
    )
    num_attention_heads: int = option(4, "number of query heads", bounds=COUNT)
    num_query_groups: int | None = option(
        None,
        "number of key/value heads: equal to the query heads by default, fewer for grouped-query, 1 for multi-query attention",
        bounds=COUNT,
    )
    kv_channels: int | None = option(None, "size of one head; default hidden_size / num_attention_heads", bounds=COUNT)
    max_position_embeddings: int | None = option(None, "longest sequence the model is made for; default seq_length", bounds=COUNT)
    vocab_size: int | None = option(
        None, "true vocabulary size; default: the tokenizer's, as stamped into the dataset sidecar", bounds=COUNT
    )
    norm_epsilon: float = option(1e-5, "epsilon of LayerNorm or RMSNorm", bounds=POSITIVE, aliases=("layernorm-epsilon",))
    position_embedding_type: str | None = option(
        None, "how positions are told; default the family's own (a choice only in baichuan)", choices=("rope", "alibi", "learned_absolute")
    )
    rotary_base: float = option(10000.0, "base of the rotary position embedding", bounds=POSITIVE)
    rotary_percent: float | None = option(
        None, "share of each head's channels that are rotated; default the family's own", bounds=PROBABILITY
    )
    rope_scaling_type: str = option(
        "none",
        "how rotary positions reach beyond the length the model was first trained with; the names are transformers'",
        choices=("none", "linear", "dynamic", "yarn", "llama3", "longrope", "clex"),
    )
    rope_scaling_factor: float | None = option(
        None, "times the original length that is reached (linear, dynamic, yarn, llama3, longrope, clex)", bounds=POSITIVE
    )
    rope_original_max_position: int | None = option(
        None, "length the model was first trained with (yarn, llama3, longrope, clex); default max_position_embeddings", bounds=COUNT
    )
    rope_low_freq_factor: float = option(1.0, "llama3: wavelengths above original length / this are fully scaled", bounds=POSITIVE)
    rope_high_freq_factor: float = option(4.0, "llama3: wavelengths below original length / this are not scaled", bounds=POSITIVE)
    rope_beta_fast: float = option(32.0, "yarn: channels that turn more often than this over the original length stay", bounds=POSITIVE)
    rope_beta_slow: float = option(1.0, "yarn: channels that turn less often than this are fully interpolated", bounds=POSITIVE)
    rope_mscale: float | None = option(None, "yarn: coefficient of the attention scale", bounds=NOT_NEGATIVE)
    rope_mscale_all_dim: float | None = option(None, "yarn: coefficient the attention scale is divided by", bounds=NOT_NEGATIVE)
    rope_truncate: bool = option(True, "yarn: round the bounds of the ramp to whole channels")
    rope_attention_factor: float | None = option(
        None, "yarn, longrope: factor on the rotary tables; default what the method derives from the scaling factor", bounds=POSITIVE
    )
    rope_short_factor: list[float] = option([], "longrope: divisor of each frequency up to the original length", bounds=POSITIVE)
    rope_long_factor: list[float] = option([], "longrope: divisor of each frequency beyond the original length", bounds=POSITIVE)
    sliding_window: int | None = option(
        None, "a token looks back at most this many tokens, itself included (mistral)", bounds=COUNT, aliases=("window-size",)
    )
    add_qkv_bias: bool | None = option(None, "biases in the attention's projections; default the family's own")
    qk_layernorm: bool | None = option(None, "normalise queries and keys per head; default the family's own")
    parallel_residual: bool | None = option(
        None, "attention and MLP both read the block's input and are added together (gpt_neox); default the family's own"
    )
    normalized_head: bool | None = option(
        None, "rows of the output layer are scaled to length 1 in the forward pass (baichuan2); default no"
    )
    tie_word_embeddings: bool | None = option(
        None,
        "use the input embedding as the output layer; default: yes for gpt, bloom and gemma, no for the others",
        constants=(("untie-embeddings-and-output-weights", False),),
    )
    attention_dropout: float = option(0.0, "dropout probability on attention weights", bounds=PROBABILITY)
    hidden_dropout: float = option(0.0, "dropout probability on embeddings and on each residual branch", bounds=PROBABILITY)
    init_method_std: float = option(
        0.02,
        "standard deviation of the normal initialisation; projections into the residual stream use std / sqrt(2 x layers)",
        bounds=NOT_NEGATIVE,
    )


@dataclass(frozen=True)
class ParallelConfig:
    """How the model and the batch are laid over the ranks."""

    tensor_model_parallel_size: int = option(1, "ranks one layer's matrices are split over", bounds=COUNT, aliases=("tp",))
    pipeline_model_parallel_size: int = option(1, "pipeline stages the layers are split over", bounds=COUNT, aliases=("pp",))
    virtual_pipeline_model_parallel_size: int = option(
        1,
        "model chunks each pipeline rank holds (interleaved schedule when above 1)",
        bounds=COUNT,
        aliases=("vpp", "num-virtual-stages-per-pipeline-rank"),
    )
    decoder_first_pipeline_num_layers: int | None = option(
        None, "layers of the first pipeline stage, which also embeds; default as many as the other stages", bounds=COUNT
    )
    decoder_last_pipeline_num_layers: int | None = option(
        None,
        "layers of the last pipeline stage, whose output layer and loss weigh as much as several layers; default as many as the others",
        bounds=COUNT,
    )
    pipeline_schedule: str = option(
        "auto",
        "auto is 1f1b, or interleaved when there are virtual stages; zero-bubble is ZB-H1, which fills waits with weight gradients",
        choices=("auto", "gpipe", "1f1b", "interleaved", "zero-bubble"),
    )
    sequence_parallel: bool = option(
        False, "split activations along the sequence outside the matrix products; has no effect at TP 1", aliases=("sp",)
    )
    use_distributed_optimizer: bool = option(
        True, "shard optimizer state over the data-parallel ranks (ZeRO-1); otherwise plain replication"
    )
    overlap_grad_reduce: bool = option(True, "reduce gradient buckets over the data-parallel ranks while the backward pass still runs")
    ddp_bucket_size: int = option(40_000_000, "elements in one gradient bucket", bounds=COUNT)
    distributed_backend: str = option(
        "auto", "auto is nccl on GPUs; on CPUs shm when all ranks are on one host, else gloo", choices=("auto", "nccl", "gloo", "shm")
    )
    distributed_timeout_seconds: float = option(
        600.0, "a collective that waits longer than this fails, naming the rank and what it was doing", bounds=POSITIVE
    )
    device: str = option("auto", "auto takes a GPU when there is one", choices=("auto", "cuda", "cpu"))


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its learning-rate schedule, clipping, loss scaling."""

    lr: float = option(3e-4, "peak learning rate", bounds=POSITIVE)
    min_lr: float = option(0.0, "learning rate at the end of the decay", bounds=NOT_NEGATIVE)
    lr_decay_style: str = option("cosine", "shape of the decay", choices=("constant", "linear", "cosine", "inverse-square-root", "WSD"))
    lr_decay_iters: int | None = option(None, "step at which the decay reaches min_lr; default train_iters", bounds=COUNT)
    lr_warmup_iters: int = option(0, "steps of linear warm-up", bounds=NOT_NEGATIVE)
    lr_warmup_fraction: float | None = option(
        None, "warm-up as a fraction of lr_decay_iters, instead of lr_warmup_iters", bounds=PROBABILITY
    )
    lr_wsd_decay_iters: int | None = option(
        None, "steps of the final decay of the WSD schedule; default a tenth of lr_decay_iters", bounds=COUNT
    )
    lr_wsd_decay_style: str = option("linear", "shape of the final decay of WSD", choices=("linear", "cosine", "exponential"))
    weight_decay: float = option(0.1, "decoupled weight decay; never applied to biases and norm weights", bounds=NOT_NEGATIVE)
    adam_beta1: float = option(0.9, "AdamW beta1", bounds=PROBABILITY)
    adam_beta2: float = option(0.95, "AdamW beta2", bounds=PROBABILITY)
    adam_eps: float = option(1e-8, "AdamW epsilon", bounds=POSITIVE)
    clip_grad: float = option(1.0, "clip the global gradient norm to this; 0 turns it off", bounds=NOT_NEGATIVE)
    loss_scale: float | None = option(None, "static loss scale for fp16; default dynamic", bounds=POSITIVE)
    initial_loss_scale: float = option(2.0**16, "first dynamic loss scale", bounds=POSITIVE)
    min_loss_scale: float = option(1.0, "training stops with advice when the dynamic scale would fall below this", bounds=POSITIVE)
    loss_scale_window: int = option(1000, "good steps after which the dynamic scale doubles", bounds=COUNT)
    hysteresis: int = option(2, "overflowing steps before the dynamic scale halves", bounds=COUNT)


@dataclass(frozen=True)
class TrainConfig:
    """Batches, steps, precision, recomputation, leaving."""

    micro_batch_size: int = option(4, "sequences in one forward pass of one data-parallel rank", bounds=COUNT)
    global_batch_size: int | None = option(
        None, "sequences in one optimizer step; default micro_batch_size x data-parallel size", bounds=COUNT
    )
    seq_length: int = option(256, "tokens in one sequence", bounds=COUNT)
    train_iters: int = option(100, "optimizer steps to take in all, counted from step 0", bounds=COUNT)
    eval_interval: int = option(0, "steps between evaluations on the validation split; 0 never evaluates", bounds=NOT_NEGATIVE)
    eval_iters: int = option(10, "global batches in one evaluation", bounds=NOT_NEGATIVE)
    seed: int = option(1234, "seed of weights, dropout and data order", bounds=SEED)
    bf16: bool = option(False, "bfloat16 parameters with fp32 main copy")
    fp16: bool = option(False, "float16 parameters with fp32 main copy and dynamic loss scaling")
    fp8: str = option(
        "none",
        "tensorwise: the linear layers of the blocks multiply in 8 bits, e4m3 forward and e5m2 for gradients, with one scale a "
        "tensor; weights keep their type. Needs a GPU of compute capability 8.9 (Ada, Hopper); CPUs emulate it, slowly",
        choices=("none", "tensorwise"),
    )
    recompute_granularity: str = option(
        "none",
        "recompute activations in the backward: selective is the attention core, full is whole blocks",
        choices=("none", "selective", "full"),
        constants=(("recompute-activations", "selective"),),
    )
    exit_duration_in_mins: float | None = option(None, "save and leave after this many minutes", bounds=POSITIVE)
    exit_interval: int | None = option(None, "save and leave after a step that is a multiple of this", bounds=COUNT)
    compile: bool = option(False, "torch.compile the layers of a stage as one graph: a minute at the start, faster steps after it")
    compile_mode: str = option(
        "default",
        "torch.compile's mode. On a GPU reduce-overhead records CUDA graphs, whose kernels start at once: for small micro-batches; "
        "max-autotune also tries several kernels for each product, for minutes",
        choices=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    )
    kernels: str = option(
        "auto",
        "fused: the C++ (CPU) or Triton (GPU) forms of norms, loss, optimizer ..., an error where they are missing; torch: plain "
        "torch; auto takes fused where it is there",
        choices=("auto", "torch", "fused"),
    )
    num_threads: int | None = option(None, "torch threads of a process; default: an equal share of its machine's cores", bounds=COUNT)
    sanity_checks: bool = option(False, "check at each step that replicated weights and gradients agree between ranks (slow)")


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from."""

    data_path: list[str] = option([], "prefix of .bin/.idx, or weight prefix weight prefix ...")
    split: str = option("969,30,1", "weights of the train, validation and test split of the documents")
    data_cache_path: str | None = option(None, "folder of the index cache; default <data prefix folder>/cache")
    tokenizer_type: str | None = option(
        None,
        "tokenizer kind; default: the one stamped into the dataset sidecar",
        choices=("HuggingFaceTokenizer", "SentencePieceTokenizer", "GPT2BPETokenizer", "ByteTokenizer"),
    )
    tokenizer_model: str | None = option(
        None, "folder or file of the tokenizer, copied into every export; default: the one the dataset was made with, if it is still there"
    )
    vocab_file: str | None = option(None, "vocab.json of GPT2BPETokenizer, instead of a folder as tokenizer_model")
    merge_file: str | None = option(None, "merges.txt of GPT2BPETokenizer")
    reset_position_ids: bool = option(False, "restart positions after every document end")
    reset_attention_mask: bool = option(False, "tokens do not attend across document ends")
    eod_mask_loss: bool = option(False, "no loss on the document-end token")
    num_workers: int = option(0, "processes that prefetch batches; 0 reads ahead in a thread of the training process", bounds=NOT_NEGATIVE)
    mock_data: bool = option(False, "random tokens instead of a dataset, for smoke tests and benchmarks; needs vocab_size")


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving, loading, retention."""

    save: str | None = option(None, "folder checkpoints are written to")
    load: str | None = option(
        None,
        "folder to start from: a checkpoint, a folder of checkpoints (the newest complete one is taken), or a Hugging Face folder, "
        "whose config.json then gives the model",
    )
    checkpoint_format: str = option(
        "hf",
        "hf: each checkpoint is a folder that transformers opens, the optimizer beside the weights; sharded: each rank writes its own "
        "part of everything, for very large runs",
        choices=("hf", "sharded"),
    )
    save_interval: int = option(0, "steps between checkpoints; 0 saves only at the end", bounds=NOT_NEGATIVE)
    keep_last: int = option(3, "newest checkpoints to keep; 0 keeps all", bounds=NOT_NEGATIVE)
    keep_every: int | None = option(None, "also keep every checkpoint whose step is a multiple of this", bounds=COUNT)
    keep_best: bool = option(True, "also keep the checkpoint with the lowest validation loss")
    async_save: bool = option(False, "write in the background while training goes on")
    auto_resume: bool = option(False, "load from --save when it holds a complete checkpoint, otherwise start fresh")
    finetune: bool = option(False, "take only the weights: step, data position and optimizer start fresh")
    load_optim: bool = option(True, "load optimizer state")
    allow_mismatch: list[str] = option(
        [],
        "go on although data, weights and run disagree about these",
        choices=("tokenizer", "vocab", "eod", "rope", "dtype", "chat-template"),
    )


@dataclass(frozen=True)
class LogConfig:
    """What is shown and where it is kept."""

    log_interval: int = option(10, "steps between lines on the console", bounds=COUNT)
    log_jsonl: str | None = option(None, "file of one JSON object a step; default <save>/log.jsonl when saving")
    tensorboard_dir: str | None = option(None, "folder of TensorBoard events; needs tensorboard installed")
    wandb_project: str | None = option(None, "Weights & Biases project; needs wandb installed")
    wandb_exp_name: str | None = option(None, "name of the run in the Weights & Biases project")
    img_log_dir: str | None = option(None, "folder of the PNG grid: loss, validation, learning rate, gradient norm, tokens/s")
    profile_step_start: int | None = option(None, "first step the profiler records; the first step of a run is 1", bounds=COUNT)
    profile_step_end: int | None = option(None, "step the profiler stops before", bounds=COUNT)
    profile_ranks: list[int] = option([0], "ranks the profiler records", bounds=NOT_NEGATIVE)
    profile_dir: str = option("profile", "folder of the profiler's traces")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters beside frozen weights; without a rank everything is trained."""

    lora_rank: int | None = option(None, "train adapters of this rank and nothing else; needs load", bounds=COUNT)
    lora_alpha: float = option(32.0, "scale of the adapters: what they add is multiplied by lora_alpha / lora_rank", bounds=POSITIVE)
    lora_rslora: bool = option(False, "divide lora_alpha by the square root of the rank instead")
    lora_target_modules: list[str] = option(
        [], "linear modules to adapt, in the family's Hugging Face names, or all-linear; default query and value projections"
    )


@dataclass(frozen=True)
class RunConfig:
    """Everything one run is made of."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
