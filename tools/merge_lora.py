"""Merge PEFT LoRA adapters into their base, tensor by tensor, and prove it: what changed, and equal logits by peft and transformers.

The base is a Hugging Face folder or one of our checkpoints; adapters are merged in the order given, each with its weight. The
folder appears only when it is complete and proven; merge_report.json in it says what changed, by how much, and made of what.
"""

import argparse
import tempfile
from pathlib import Path

from megatron_llm.utils.command_line import tool_parser
from megatron_llm.utils.errors import UserError, run_command

EXAMPLE = "python tools/merge_lora.py --base demo/hf --adapter runs/assistant/adapter --save runs/assistant/hf_ckpt"


def main() -> None:
    """Read the flags and merge."""
    args = _parser().parse_args()
    if args.weight and len(args.weight) != len(args.adapter):
        raise UserError(f"--weight was given {len(args.weight)} times for {len(args.adapter)} adapters: give one for each, or none")
    from megatron_llm.checkpoint.hf_folder import is_hf_folder  # torch is not needed for --help
    from megatron_llm.convert.memory import return_freed_memory
    from megatron_llm.convert.to_hf import parse_size
    from megatron_llm.convert.tool import ConvertOptions, convert
    from megatron_llm.lora.adapter import find_base
    from megatron_llm.lora.merge import MergeOptions, check_save, merge

    return_freed_memory()
    base = args.base if args.base is not None else find_base(args.adapter[0])
    options = MergeOptions(args.dtype, parse_size(args.max_shard_size), args.verify, args.overwrite, base.resolve().name)
    adapters = list(zip(args.adapter, args.weight or [1.0] * len(args.adapter), strict=True))
    if is_hf_folder(base) or not base.exists():
        merge(base, adapters, args.save, options)
        return
    check_save(args.save, [base, *args.adapter], overwrite=args.overwrite)
    args.save.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{args.save.name}.base-", dir=args.save.parent) as folder:
        convert(base, Path(folder) / "hf", ConvertOptions(verify=args.verify))
        merge(Path(folder) / "hf", adapters, args.save, options)


def _parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__, EXAMPLE)
    add = parser.add_argument
    add("--base", type=Path, help="Hugging Face folder or checkpoint (default: the folder that the first adapter names)")
    add("--adapter", type=Path, required=True, action="append", help="folder of peft; several times: merged in this order")
    add("--weight", type=float, action="append", help="share of the adapter at the same place (default 1)")
    add("--save", type=Path, required=True, help="folder to make")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="type of the written weights (default: as the base's)")
    add("--max-shard-size", default="5GB", help="size of one safetensors file at most (default 5GB)")
    add("--verify", default=True, action=argparse.BooleanOptionalAction, help="compare logits with base and adapters (default: yes)")
    add("--overwrite", action="store_true", help="replace --save even when it holds something else than an earlier merge")
    return parser


if __name__ == "__main__":
    run_command(main)
