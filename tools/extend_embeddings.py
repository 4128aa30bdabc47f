"""Give a model a larger tokenizer: rows for the new tokens, the old rows as they are, and a folder with the new tokenizer.

Each new row of the embedding and of the output layer is the mean of the rows of the pieces that the old tokenizer cuts
the token's text into. Rows follow their tokens, whatever numbers the new tokenizer gives them. The sizes of model and
tokenizers are printed and must go together; --dry-run stops after that.
"""

import argparse

from megatron_llm.utils.command_line import tool_parser
from megatron_llm.utils.errors import UserError, run_command

EXAMPLE = "python tools/extend_embeddings.py --load models/llama --new-tokenizer tokenizers/chinese-llama --save models/chinese-llama"


def _parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__, EXAMPLE)
    parser.add_argument("--load", required=True, help="weights in any format: a Hugging Face folder, a checkpoint, ...")
    parser.add_argument("--save", help="folder to make")
    parser.add_argument("--old-tokenizer", help="folder or file of the model's tokenizer (default: the one that came with the weights)")
    parser.add_argument("--new-tokenizer", required=True, help="folder or file of the tokenizer the model shall have")
    parser.add_argument(
        "--init",
        default="mean-of-pieces",
        choices=("mean-of-pieces", "mean", "noise"),
        help="new rows: mean of the pieces' rows (default), mean of all rows, or noise",
    )
    parser.add_argument("--noise-std", type=float, default=0.02, help="standard deviation of the noise (default 0.02)")
    parser.add_argument("--seed", type=int, default=1234, help="seed of the noise (default 1234)")
    parser.add_argument("--to", default="hf", choices=("hf", "native"), help="format of the result (default hf)")
    parser.add_argument("--max-shard-size", default="5GB", help="size of one safetensors file at most (default 5GB)")
    parser.add_argument(
        "--verify", default=True, action=argparse.BooleanOptionalAction, help="compare logits of the result with its source (default: yes)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --save even when it holds something else")
    parser.add_argument("--dry-run", action="store_true", help="print what would happen, and the counts, and stop")
    parser.add_argument(
        "--allow-mismatch",
        nargs="+",
        default=[],
        choices=("model-rows", "old-tokenizer"),
        metavar="NAME",
        help="go on although the model has rows that neither tokenizer explains (model-rows), "
        "or although --old-tokenizer is not the one that came with the weights (old-tokenizer)",
    )
    return parser


def main() -> None:
    """Read the flags and extend."""
    args = _parser().parse_args()
    if args.save is None and not args.dry_run:
        raise UserError("--save is missing: name the folder to make, or give --dry-run to see only what would happen")
    if args.noise_std < 0:
        raise UserError(f"--noise-std {args.noise_std} is negative: give a standard deviation such as 0.02")

    from pathlib import Path

    from megatron_llm.convert.to_hf import parse_size
    from megatron_llm.convert.tool import ConvertOptions
    from megatron_llm.convert.vocabulary_extend import ExtendOptions, extend_vocabulary, preview_extension
    from megatron_llm.convert.vocabulary_source import RowInit  # torch is not needed for --help

    options = ExtendOptions(
        new_tokenizer=Path(args.new_tokenizer),
        old_tokenizer=Path(args.old_tokenizer) if args.old_tokenizer else None,
        init=RowInit(args.init, args.noise_std, args.seed),
        allow=frozenset(args.allow_mismatch),
        output=ConvertOptions(to=args.to, max_shard_bytes=parse_size(args.max_shard_size), verify=args.verify, overwrite=args.overwrite),
    )
    if args.dry_run:
        preview_extension(args.load, options)
    else:
        extend_vocabulary(args.load, args.save, options)


if __name__ == "__main__":
    run_command(main)
