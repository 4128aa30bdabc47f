"""Serve a model folder: OpenAI-style completions and chat, a chat page in the browser, health and metrics.

The model is a Hugging Face folder, a checkpoint of this project, or a base model with LoRA adapters. vLLM computes where it
and a GPU are present, otherwise transformers, on the CPU too. A key is asked for when the variable API_KEY is set.
"""

import argparse

from megatron_llm.serve.flags import add_limit_flags, add_model_flags, add_server_flags, serve_options
from megatron_llm.utils.command_line import tool_parser
from megatron_llm.utils.errors import run_command

EXAMPLE = "python tools/serve.py --model demo/hf --port 8000"


def main() -> None:
    """Read the flags and serve, or check."""
    args = _parser().parse_args()
    options = serve_options(args)
    if args.check:
        from megatron_llm.serve.check import check  # torch is not needed for --help

        check(options, tokens=args.check_tokens)
        return
    from megatron_llm.serve.vllm import choose_engine, serve_with_vllm

    if choose_engine(options) == "vllm":
        serve_with_vllm(options)
    else:
        from megatron_llm.serve.server import serve

        serve(options)


def _parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__, EXAMPLE)
    add_model_flags(parser, required=True)
    add_server_flags(parser)
    add_limit_flags(parser)
    parser.add_argument("--check", action="store_true", help="start, ask, stop: fails when an answer never ends or the template is missing")
    parser.add_argument("--check-tokens", type=int, default=256, metavar="N", help="tokens within which an answer must end (default 256)")
    return parser


if __name__ == "__main__":
    run_command(main)
