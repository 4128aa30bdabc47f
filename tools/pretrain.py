"""Pretrain a model under any layout. `run_pretrain_gpt.sh` starts it on every rank.

Example: python -m megatron_llm.training.launch --standalone --nproc-per-node 2 tools/pretrain.py --tp 2 --mock-data --vocab-size 97
"""

from megatron_llm.training.pretrain import main
from megatron_llm.utils.errors import run_command

if __name__ == "__main__":
    run_command(main)
