"""Chat in the terminal, with a model folder or with any OpenAI-style server.

Answers appear as they are computed; Ctrl-C stops one; /help lists the commands. A key is taken from the variable API_KEY.
Lines that come through a pipe are asked one after the other.
"""

import argparse

from megatron_llm.serve.flags import add_model_flags
from megatron_llm.utils.command_line import tool_parser
from megatron_llm.utils.errors import UserError, run_command

EXAMPLES = (
    "python tools/chat.py --model demo/hf",
    'python tools/chat.py --endpoint http://127.0.0.1:8000/v1 --ask "What is a list?"',
)


def main() -> None:
    """Read the flags and chat."""
    args = _parser().parse_args()
    if (args.model is None) == (args.endpoint is None):
        raise UserError("give either --model FOLDER or --endpoint URL: what answers?")
    from megatron_llm.serve.chat import run_chat  # torch is not needed for --help

    run_chat(args)


def _parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__, *EXAMPLES)
    parser.add_argument("--endpoint", metavar="URL", help="server to talk to, up to and including /v1")
    parser.add_argument("--name", help="model of that server (default: its first)")
    add_model_flags(parser, required=False)
    parser.add_argument("--system", help="system prompt")
    parser.add_argument("--ask", metavar="TEXT", help="one question: print the answer and leave")
    parser.add_argument("--temperature", type=float, help="0 always takes the likeliest token")
    parser.add_argument("--top-p", type=float, help="choose among the likeliest that make up this share")
    parser.add_argument("--top-k", type=int, help="choose among the k likeliest; 0 is all")
    parser.add_argument("--max-tokens", type=int, help="longest answer (default: what fits; 64 without a chat template)")
    parser.add_argument("--seed", type=int, help="equal seeds give equal answers")
    return parser


if __name__ == "__main__":
    run_command(main)
