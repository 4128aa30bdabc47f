"""Megatron flags that do not exist here, and what to write instead.

A flag that means exactly the same under another name is an alias in the schema. The flags below mean something that is
decided elsewhere here, so accepting them silently could train another model than the one asked for; they are errors
that say what to do.
"""

from collections.abc import Mapping
from types import MappingProxyType

_FAMILY = (
    "the model family decides this: choose it with --model "
    "(llama: RoPE, RMSNorm, SwiGLU, no biases; gpt: learned positions, LayerNorm, GELU, biases)"
)
_KERNELS = "remove it: the fastest available form of each operation is chosen at run time"
_MCORE = "remove it: there is one implementation of the model"

MEGATRON_HINTS: Mapping[str, str] = MappingProxyType(
    {
        "--swiglu": _FAMILY,
        "--squared-relu": _FAMILY,
        "--normalization": _FAMILY,
        "--use-rotary-position-embeddings": _FAMILY,
        "--no-position-embedding": _FAMILY,
        "--add-position-embedding": _FAMILY,
        "--disable-bias-linear": _FAMILY,
        "--apply-layernorm-1p": _FAMILY,
        "--group-query-attention": "remove it: --num-query-groups alone turns on grouped-query attention",
        "--use-flash-attn": _KERNELS,
        "--attention-backend": _KERNELS,
        "--attention-softmax-in-fp32": _KERNELS,
        "--no-masked-softmax-fusion": _KERNELS,
        "--no-bias-gelu-fusion": _KERNELS,
        "--no-bias-swiglu-fusion": _KERNELS,
        "--no-bias-dropout-fusion": _KERNELS,
        "--no-rope-fusion": _KERNELS,
        "--no-gradient-accumulation-fusion": _KERNELS,
        "--cross-entropy-loss-fusion": _KERNELS,
        "--fp8-format": "use --fp8 tensorwise (e4m3 forward, e5m2 for gradients, which Megatron calls hybrid)",
        "--fp8-recipe": "use --fp8 tensorwise",
        "--fp8-amax-history-len": "remove it: a tensor's scale is that of its largest element now",
        "--fp8-amax-compute-algo": "remove it: a tensor's scale is that of its largest element now",
        "--enable-cuda-graph": "use --compile --compile-mode reduce-overhead",
        "--external-cuda-graph": "use --compile --compile-mode reduce-overhead",
        "--cuda-graph-impl": "use --compile --compile-mode reduce-overhead",
        "--transformer-impl": _MCORE,
        "--use-mcore-models": _MCORE,
        "--use-legacy-models": _MCORE,
        "--make-vocab-size-divisible-by": "remove it: any vocabulary works under any tensor-parallel size, padding exists only at run time",
        "--padded-vocab-size": "use --vocab-size with the true size: padding exists only at run time",
        "--num-layers-per-virtual-pipeline-stage": "use --virtual-pipeline-model-parallel-size (chunks a rank)",
        "--distributed-timeout-minutes": "use --distributed-timeout-seconds",
        "--train-samples": "use --train-iters (train samples / global batch size)",
        "--lr-decay-samples": "use --lr-decay-iters",
        "--lr-warmup-samples": "use --lr-warmup-iters",
        "--rampup-batch-size": "the batch size is constant: use --global-batch-size",
        "--batch-size": "use --micro-batch-size (sequences in one forward pass) or --global-batch-size (sequences in one step)",
        "--model-parallel-size": "use --tensor-model-parallel-size",
        "--checkpoint-activations": "use --recompute-granularity full",
        "--recompute-method": "remove it: --recompute-granularity full recomputes every block",
        "--recompute-num-layers": "remove it: --recompute-granularity full recomputes every block",
        "--train-data-path": "use --data-path with --split",
        "--valid-data-path": "use --data-path with --split",
        "--test-data-path": "use --data-path with --split",
        "--data-impl": "remove it: datasets are memory-mapped .bin/.idx files",
        "--dataset-impl": "remove it: datasets are memory-mapped .bin/.idx files",
        "--dataloader-type": "remove it: samples come in one order, whose position is the number of samples consumed",
        "--ckpt-format": "use --checkpoint-format hf or sharded, both load under any layout",
        "--use-dist-ckpt": "remove it: there is one checkpoint format, and it loads under any layout",
        "--use-checkpoint-args": "use --config CHECKPOINT/manifest.json, which holds the resolved configuration",
        "--no-load-rng": "remove it: resuming always restores the random streams",
        "--no-save-rng": "remove it: resuming always restores the random streams",
        "--no-save-optim": "remove it: the optimizer state is always saved; --no-load-optim leaves it out on loading",
        "--overlap-param-gather": "remove it: the distributed optimizer gathers the weights at the end of the step",
        "--decoupled-lr": "there is one learning rate: use --lr",
        "--log-throughput": "remove it: tokens/s and MFU are always shown",
        "--profile": "use --profile-step-start and --profile-step-end",
        "--use-pytorch-profiler": "use --profile-step-start and --profile-step-end",
        "--wandb-save-dir": "remove it: wandb writes to its own folder",
        "--exit-signal-handler": "remove it: SIGTERM always saves and leaves",
        "--local-rank": "remove it: torchrun passes the rank in the environment",
    }
)
