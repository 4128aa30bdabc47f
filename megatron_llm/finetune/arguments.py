"""The command line of fine-tuning. Nothing heavy is imported, so that --help and wrong flags are answered at once."""

from collections.abc import Sequence

from megatron_llm.config.finetune_schema import FinetuneConfig
from megatron_llm.config.flags import make_parser, read_config
from megatron_llm.finetune.rules import check

EXAMPLE = "%(prog)s --model demo/hf --train-data pairs.jsonl --save runs/assistant"
_DESCRIPTION = "Fine-tune a model with LoRA or whole. All settings may also come from --config FILE.yaml."


def parse_finetune_config(argv: Sequence[str] | None = None) -> FinetuneConfig:
    """The configuration that a command line asks for; UserError for what is unknown or cannot be."""
    parser = make_parser(example=EXAMPLE, description=_DESCRIPTION, root=FinetuneConfig)
    config, _ = read_config(parser, argv, FinetuneConfig())
    check(config)
    return config
