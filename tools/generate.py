"""Continue a prompt with a trained checkpoint of any layout, on one device.

Example: python tools/generate.py --load demo/checkpoint --prompt "The list type" --max-new-tokens 60 --temperature 0.8
"""

import argparse
import sys

from megatron_llm.utils.errors import run_command


def main() -> None:
    """Parse the command line, load the newest complete checkpoint, print the prompt and its continuation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--load", required=True, help="a checkpoint, or a folder of checkpoints (the newest complete one is taken)")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=60, help="tokens to generate at most (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 always takes the most likely token (default %(default)s)")
    parser.add_argument("--top-k", type=int, default=0, help="choose among the k most likely tokens; 0 is all (default %(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, help="choose among the likeliest that make up p (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1234, help="equal seeds give equal text (default %(default)s)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto takes a GPU when there is one")
    parser.add_argument("--tokenizer-model", help="tokenizer folder; default: the one saved with the checkpoint")
    args = parser.parse_args()

    from megatron_llm.convert.sample import sample_text
    from megatron_llm.models.generation import Sampling

    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed)
    print(args.prompt, end="", flush=True)
    for text in sample_text(args.load, args.prompt, sampling, device=args.device, tokenizer=args.tokenizer_model):
        print(text, end="", flush=True)
    print()
    sys.stdout.flush()


if __name__ == "__main__":
    run_command(main)
