"""Turn a checkpoint of any layout into a folder that transformers opens, and prove it by comparing logits.

Weights are streamed tensor by tensor: no GPU, no process group, no more memory than one tensor. The proof loads the
model twice; --no-verify leaves it out. The folder appears only when it is complete and proven.
"""

import argparse

from megatron_llm.utils.errors import run_command

EXAMPLE = """example:
  python tools/convert_checkpoint.py --load demo/checkpoint --save demo/hf --to hf

"""


def main() -> None:
    """Read the flags and export."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        description=EXAMPLE + (__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--load", required=True, help="a checkpoint, or a folder of checkpoints (the newest complete one is taken)")
    parser.add_argument("--save", required=True, help="folder to make")
    parser.add_argument("--to", default="hf", choices=("hf",), help="target format (default hf)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="type of the exported weights (default: as saved)")
    parser.add_argument("--max-shard-size", default="5GB", help="size of one safetensors file at most (default 5GB)")
    parser.add_argument("--no-verify", action="store_true", help="do not open the result with transformers and compare logits")
    parser.add_argument("--overwrite", action="store_true", help="replace --save even when it holds something else than an earlier export")
    args = parser.parse_args()

    from megatron_llm.convert.to_hf import ExportOptions, export_to_hf, parse_size  # torch is not needed for --help

    options = ExportOptions(
        dtype=args.dtype, max_shard_bytes=parse_size(args.max_shard_size), verify=not args.no_verify, overwrite=args.overwrite
    )
    export_to_hf(args.load, args.save, options)


if __name__ == "__main__":
    run_command(main)
