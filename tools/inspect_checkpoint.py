"""Show what a folder of weights holds, in any format: layout, family, true vocabulary, step, keys, shapes, types.

Reads Hugging Face folders (safetensors or pytorch_model.bin), native checkpoints and folders of them, megatron-core and
Megatron-LM checkpoints, DeepSpeed folders. With --diff two of them are compared, whatever their formats; the exit status
is then 0 when they hold the same model, 1 when they differ, 2 when that cannot be told. With --nan it is 0 when all weights
are finite, 1 when some are not, 2 when that cannot be told.
"""

import argparse
import sys
from contextlib import ExitStack, closing

from megatron_llm.utils.command_line import tool_parser
from megatron_llm.utils.errors import UserError, run_command

EXAMPLES = (
    "python tools/inspect_checkpoint.py demo/checkpoint",
    "python tools/inspect_checkpoint.py demo/checkpoint --diff demo/hf",
)


def main() -> None:
    """Read the flags and print the description, the differences, or the weights that are not finite."""
    parser = tool_parser(__doc__, *EXAMPLES)
    parser.add_argument("path", help="a folder of weights in any format, or a folder of native checkpoints")
    parser.add_argument("--diff", metavar="OTHER", help="compare with another folder, one tensor at a time")
    parser.add_argument("--nan", action="store_true", help="read all weights and list those with NaN or Inf")
    parser.add_argument("--optimizer", action="store_true", help="list the optimizer's tensors too (native)")
    parser.add_argument("--state", action="store_true", help="print the saved state: configuration, position, counters (native)")
    parser.add_argument("--verify", action="store_true", help="also read every file and compare its digest or checksums")
    parser.add_argument("--vocab-size", type=int, help="true vocabulary, where a Megatron or DeepSpeed checkpoint does not record it")
    parser.add_argument("--hf-config", help="config.json of the model, where a DeepSpeed folder has none")
    args = parser.parse_args()
    if args.diff is not None or args.nan:
        raise SystemExit(_examined(args))

    from megatron_llm.convert.describe import describe, verify_digests  # torch is not needed for --help

    for line in describe(args.path, optimizer=args.optimizer, state=args.state, vocab_size=args.vocab_size, hf_config=args.hf_config):
        print(line)
    if args.verify:
        print(verify_digests(args.path))


def _examined(args: argparse.Namespace) -> int:
    """The exit status of --diff or --nan: 0 nothing found, 1 something found, 2 an error, told in one line."""
    try:
        return int(_diff(args) if args.diff is not None else _nan(args))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


def _diff(args: argparse.Namespace) -> bool:
    from megatron_llm.convert.compare import compare, info_bytes
    from megatron_llm.convert.open import open_source
    from megatron_llm.utils.progress import Progress

    if args.nan or args.optimizer or args.state or args.verify:
        raise UserError("--diff compares weights alone: leave out --nan, --optimizer, --state and --verify")
    with ExitStack() as stack:
        one = stack.enter_context(closing(open_source(args.path, vocab_size=args.vocab_size, hf_config=args.hf_config)))
        other = stack.enter_context(closing(open_source(args.diff, vocab_size=args.vocab_size, hf_config=args.hf_config)))
        progress = stack.enter_context(Progress("compared", sum(map(info_bytes, one.tensors.values())), unit="B"))
        differences = 0
        for line in compare(one, other, progress.advance):
            differences += 1
            print(line, flush=True)
    print(f"{differences} differences" if differences else f"no difference in {len(one.tensors)} tensors")
    return bool(differences)


def _nan(args: argparse.Namespace) -> bool:
    from megatron_llm.convert.compare import info_bytes, not_finite
    from megatron_llm.convert.open import open_source
    from megatron_llm.utils.progress import Progress

    with ExitStack() as stack:
        source = stack.enter_context(closing(open_source(args.path, vocab_size=args.vocab_size, hf_config=args.hf_config)))
        progress = stack.enter_context(Progress("read", sum(map(info_bytes, source.tensors.values())), unit="B"))
        found = 0
        for line in not_finite(source, progress.advance):
            found += 1
            print(line, flush=True)
    print(f"{found} of {len(source.tensors)} weights are not finite" if found else f"all {len(source.tensors)} weights are finite")
    return bool(found)


if __name__ == "__main__":
    run_command(main)
