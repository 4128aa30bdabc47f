"""Train a byte-level BPE tokenizer on text files; the output folder opens with AutoTokenizer.from_pretrained.

example:
  python tools/train_tokenizer.py --input corpus.jsonl --vocab-size 4096 --output tokenizer
"""

import argparse

from megatron_llm.utils.errors import run_command


def main() -> None:
    """Train and say what was made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input", nargs="+", required=True, help="files, folders and glob patterns, as for tools/preprocess_data.py")
    add("--vocab-size", type=int, required=True, help="ids in the vocabulary, the end token <|endoftext|> included")
    add("--output", required=True, help="folder to write")
    add("--json-keys", nargs="+", default=["text"], help="keys of a record whose texts are used (default: text)")
    add("--max-megabytes", type=float, default=500.0, help="million characters to read at most (default: 500)")
    values = parser.parse_args()
    from megatron_llm.data.train_tokenizer import train_tokenizer  # brings numpy: help need not wait for it

    made = train_tokenizer(values.input, values.output, values.vocab_size, json_keys=values.json_keys, max_megabytes=values.max_megabytes)
    print(f"{values.output}: {made.vocab_size} ids from {made.texts} texts, {made.characters} characters")


if __name__ == "__main__":
    run_command(main)
