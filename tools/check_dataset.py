"""Look at fine-tuning data before training: format, counts, what is left out and why, lengths, and what is trained on.

Nothing is written. Files may be .json, .jsonl or .csv (each also .gz or .zst), folders or patterns; with --registry
they are names of data sets in a dataset_info.json.
"""

from megatron_llm.utils.command_line import tool_parser
from megatron_llm.utils.errors import UserError, run_command

EXAMPLE = "python tools/check_dataset.py data/alpaca.json --template chatml --tokenizer demo/hf --show 3"


def main() -> None:
    """Read the flags, load, encode, print."""
    parser = tool_parser(__doc__, EXAMPLE)
    parser.add_argument("data", nargs="+", metavar="FILES", help="files, folders, patterns, or names with --registry")
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="folder of a Hugging Face model or tokenizer")
    parser.add_argument("--template", default="chatml", help="chatml (default), alpaca, llama, llama3, qwen, or tokenizer for its own")
    parser.add_argument("--format", help="take records as this format instead of recognising it")
    parser.add_argument("--registry", metavar="FILE", help="dataset_info.json that names the data sets")
    parser.add_argument("--max-length", type=int, help="tokens at which a sample is cut (default: not at all)")
    parser.add_argument("--show", type=int, default=1, help="samples to show, the trained tokens marked (default 1)")
    args = parser.parse_args()
    if args.registry and args.format:
        raise UserError("--format and --registry exclude each other: the registry says the format")

    from megatron_llm.finetune.data.describe import describe  # torch is not needed for --help
    from megatron_llm.finetune.data.load import load_conversations
    from megatron_llm.finetune.data.registry import load_registered
    from megatron_llm.finetune.templates.install import add_template, open_tokenizer

    tokenizer = open_tokenizer(args.tokenizer)
    print(add_template(tokenizer, args.template).line())
    loaded = load_registered(args.data, args.registry) if args.registry else load_conversations(args.data, format=args.format)
    print("\n".join(describe(loaded, tokenizer, max_length=args.max_length, show=args.show)))


if __name__ == "__main__":
    run_command(main)
