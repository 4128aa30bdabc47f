"""Show what a checkpoint, a folder of checkpoints or a Hugging Face folder holds: step, layout, vocabulary, keys, shapes."""

import argparse

from megatron_llm.utils.errors import run_command

EXAMPLE = """example:
  python tools/inspect_checkpoint.py demo/checkpoint

"""


def main() -> None:
    """Read the flags and print the description."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        description=EXAMPLE + (__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("path", help="a checkpoint, a folder of checkpoints, or a Hugging Face folder")
    parser.add_argument("--optimizer", action="store_true", help="list the optimizer's tensors too")
    parser.add_argument("--state", action="store_true", help="print the saved state: configuration, position, counters")
    parser.add_argument("--verify", action="store_true", help="also read every file of a checkpoint and compare its digest")
    args = parser.parse_args()

    from megatron_llm.convert.describe import describe, verify_digests  # torch is not needed for --help

    for line in describe(args.path, optimizer=args.optimizer, state=args.state):
        print(line)
    if args.verify:
        print(verify_digests(args.path))


if __name__ == "__main__":
    run_command(main)
