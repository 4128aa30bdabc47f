"""Turn weights of any known format into another, streamed tensor by tensor, and prove it by comparing logits.

Read are Hugging Face folders (safetensors or pytorch_model.bin), checkpoints of this project under any layout, Megatron-core
distributed checkpoints, Megatron-LM's mp_rank_XX folders, and DeepSpeed's; the format is recognised. No GPU and no process
group are needed, and no more memory than one tensor. The folder appears only when it is complete and proven.
"""

import argparse
from pathlib import Path

from megatron_llm.utils.command_line import tool_parser
from megatron_llm.utils.errors import run_command

EXAMPLE = "python tools/convert_checkpoint.py --load demo/checkpoint --save demo/hf --to hf"


def main() -> None:
    """Read the flags and convert."""
    args = _parser().parse_args()

    from megatron_llm.convert.memory import return_freed_memory
    from megatron_llm.convert.to_hf import parse_size  # torch is not needed for --help
    from megatron_llm.convert.tool import ConvertOptions, convert

    return_freed_memory()
    options = ConvertOptions(
        to=args.to,
        dtype=args.dtype,
        max_shard_bytes=parse_size(args.max_shard_size),
        verify=args.verify,
        overwrite=args.overwrite,
        tensor_parallel=args.target_tensor_parallel_size,
        pipeline_parallel=args.target_pipeline_parallel_size,
        vocab_size=args.vocab_size,
        hf_config=args.hf_config,
        tokenizer=args.tokenizer,
        hf_architecture=args.hf_architecture,
        allow=frozenset(args.allow_mismatch),
    )
    convert(args.load, args.save, options)


def _parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__, EXAMPLE)
    add = parser.add_argument
    add("--load", required=True, help="folder of weights; of a folder of checkpoints the newest complete one is taken")
    add("--save", required=True, help="folder to make")
    add("--to", default="hf", choices=("hf", "native", "megatron-core", "megatron-legacy"), help="target format (default hf)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="type of the written weights (default: as saved)")
    add("--max-shard-size", default="5GB", help="size of one safetensors file at most (default 5GB)")
    add("--verify", default=True, action=argparse.BooleanOptionalAction, help="compare logits of source and target (default: yes)")
    add("--overwrite", action="store_true", help="replace --save even when it holds something else than an earlier conversion")
    add("--target-tensor-parallel-size", type=int, default=1, metavar="N", help="layout of a megatron-legacy target (default 1)")
    add("--target-pipeline-parallel-size", type=int, default=1, metavar="N", help="layout of a megatron-legacy target (default 1)")
    add("--vocab-size", type=int, metavar="N", help="true vocabulary, where the source records only the padded one")
    add("--hf-config", type=Path, metavar="PATH", help="config.json (or its folder), where the source has none (DeepSpeed)")
    add("--tokenizer", type=Path, metavar="PATH", help="tokenizer to write instead of the source's own")
    add("--hf-architecture", choices=("llama",), help="with --to hf: write a Baichuan 7B as the LLaMA it is")
    add("--allow-mismatch", nargs="+", default=[], choices=("nan",), help="go on although: nan, weights are not finite")
    return parser


if __name__ == "__main__":
    run_command(main)
