"""Compare models: single choice, generation, perplexity, BLEU and ROUGE, a judge, lm-eval; one table for all.

The YAML file names models and tasks (docs/guide/evaluation.md); flags win over it. A second run computes only what is
new. A model or task that fails is named at the end, with a nonzero exit; the others' results are written all the same.
"""

import argparse

from megatron_llm.utils.command_line import tool_parser
from megatron_llm.utils.errors import run_command

EXAMPLE = "python tools/evaluate.py --config examples/evaluation.yaml --model demo=demo/hf --output runs/evaluation"


def main() -> None:
    """Read the flags and evaluate."""
    args = _parser().parse_args()

    from megatron_llm.evaluate.start import start  # torch is not needed for --help

    start(args)


def _parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__, EXAMPLE)
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="YAML with models and tasks")
    add("--model", action="append", default=[], metavar="NAME=DIR[+ADAPTER]", help="in place of the file's models; may be repeated")
    add("--tasks", nargs="+", metavar="NAME", help="only these of the file's tasks")
    add("--output", metavar="DIR", help="folder of the results")
    add("--device", help="auto, cpu, cuda, cuda:1, ...")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="of the weights while they are evaluated")
    add("--batch-size", type=int, metavar="N", help="sequences in one pass")
    add("--limit", type=int, metavar="N", help="only the first N records of each task, to try it out")
    add("--check", action="store_true", help="look at models and data, load nothing, compute nothing")
    return parser


if __name__ == "__main__":
    run_command(main)
