"""Write a real corpus without a download: the documentation that ships with Python, about 2 MB of jsonl.

example:
  python tools/make_demo_corpus.py --output demo/corpus.jsonl
"""

import argparse

from megatron_llm.data.demo_corpus import write_demo_corpus
from megatron_llm.utils.errors import run_command


def main() -> None:
    """Write the corpus and say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="the .jsonl file to write")
    output = parser.parse_args().output
    documents, characters = write_demo_corpus(output)
    print(f"{output}: {documents} documents, {characters / 1e6:.2f} million characters")


if __name__ == "__main__":
    run_command(main)
