"""Pretrain a model under any layout. `run_pretrain_gpt.sh` starts it on every rank.

Example: python -m megatron_llm.training.launch --standalone --nproc-per-node 2 tools/pretrain.py --tp 2 --mock-data --vocab-size 97
"""

import os

from megatron_llm.config.flags import make_parser, read_arguments
from megatron_llm.utils.errors import run_command


def main() -> None:
    """Answer --help and wrong flags before torch is imported, then train."""
    if os.environ.get("LOCAL_RANK", "0") == "0":  # the other ranks of a machine keep quiet about what the first one says
        read_arguments(make_parser())
    from megatron_llm.training.pretrain import main as pretrain

    pretrain()


if __name__ == "__main__":
    run_command(main)
