"""Compiles every Triton kernel ahead of time for the named compute capabilities, without a GPU: down to a cubin.

python -m tests.unit.kernels.triton_compile 80 90 100

Prints one JSON line: for each kernel and capability the size of its cubin, or the error.
"""

import json
import sys

from megatron_llm.kernels.triton import flat, loss, norm, rotary, swiglu
from megatron_llm.kernels.triton.language import require_triton

# Types of the arguments in order; "T" stands for the type of the activations. An argument "=v" is a constant.
NORM_FORWARD = "*T *T *T *T *T *T *fp32 *fp32 i32 i32 i32 i32 fp32"
NORM_BACKWARD = "*T *T *T *T *fp32 *fp32 *T *fp32 *fp32 i32 i32 i32 i32 i32"
CASES = (
    (norm.norm_forward_kernel, f"{NORM_FORWARD} =1 =0 =1 =4096", 8),
    (norm.norm_forward_kernel, f"{NORM_FORWARD} =0 =1 =32 =128", 8),
    (norm.norm_backward_kernel, f"{NORM_BACKWARD} =1 =0 =1 =4096", 8),
    (norm.norm_backward_kernel, f"{NORM_BACKWARD} =0 =1 =32 =128", 8),
    (rotary.rotary_kernel, "*T *fp32 *fp32 *T i32 i32 i32 i32 i32 i32 i32 i32 =0 =0 =32 =64", 8),
    (rotary.rotary_kernel, "*T *fp32 *fp32 *T i32 i32 i32 i32 i32 i32 i32 i32 =1 =1 =32 =64", 8),
    (swiglu.swiglu_forward_kernel, "*T *T *T i32 i32 i32 =1024", 4),
    (swiglu.swiglu_backward_kernel, "*T *T *T *T *T i32 i32 i32 i32 =1024", 4),
    (loss.softmax_statistics_kernel, "*T *i64 *fp32 i32 i32 i32 i32 =4096", 8),
    (loss.softmax_gradient_kernel, "*T *i64 *fp32 *fp32 i32 i32 i32 i32 =4096", 8),
    (flat.adamw_kernel, "*fp32 *fp32 *fp32 *T *T i64 fp32 fp32 fp32 fp32 fp32 fp32 fp32 fp32 fp32 =1 =1024", 4),
    (flat.squares_kernel, "*T *fp64 i32 =8192", 8),
)
TYPES = ("fp32", "bf16", "fp16")


def compile_all(capabilities: list[int]) -> dict[str, int | str]:
    """Bytes of each cubin, or what the compiler said, under "kernel constants type sm_NN"."""
    require_triton()
    # Imported here: the rest of the package has one place for it, which gives the language alone.
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    found: dict[str, int | str] = {}
    for kernel, text, warps in CASES:
        for dtype in TYPES:
            words = text.replace("T", dtype).split()
            names = kernel.arg_names
            assert len(words) == len(names), f"{kernel.fn.__name__} takes {len(names)} arguments, {len(words)} types are given"
            constants = {(i,): int(word[1:]) for i, word in enumerate(words) if word.startswith("=")}
            signature = {name: "constexpr" if word.startswith("=") else word for name, word in zip(names, words, strict=True)}
            for capability in capabilities:
                key = f"{kernel.fn.__name__} {list(constants.values())} {dtype} sm_{capability}"
                source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
                try:
                    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
                    found[key] = len(done.asm["cubin"])
                except (RuntimeError, ValueError, TypeError, triton.CompilationError) as error:
                    found[key] = f"{type(error).__name__}: {error}"
    return found


if __name__ == "__main__":
    print(json.dumps(compile_all([int(word) for word in sys.argv[1:]])))
