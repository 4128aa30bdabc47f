"""Fine-tune a model: LoRA, whole, its last layers or its embeddings. `run_lora_finetune.sh` starts it on every process.

Example: python tools/finetune.py --model demo/hf --train-data pairs.jsonl --save runs/assistant
"""

from megatron_llm.finetune.arguments import parse_finetune_config
from megatron_llm.utils.errors import run_command


def main() -> None:
    """Answer --help and wrong settings before torch is imported, then fine-tune."""
    parse_finetune_config()
    from megatron_llm.finetune.run import main as finetune

    finetune()


if __name__ == "__main__":
    run_command(main)
