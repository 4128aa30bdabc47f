"""Turn text files into the indexed datasets that training reads (files, formats, resuming: docs/guide/data.md)."""

from megatron_llm.data.preprocess_settings import TOKENIZER_BACKENDS, TOKENIZER_TYPES, PreprocessSettings
from megatron_llm.utils.command_line import tool_parser
from megatron_llm.utils.errors import run_command

EXAMPLE = "python tools/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus --tokenizer-type ByteTokenizer --append-eod"


def parse_arguments(arguments: list[str] | None = None) -> PreprocessSettings:
    """The settings that the command line gives."""
    parser = tool_parser(__doc__, EXAMPLE)
    add = parser.add_argument
    kinds = ".jsonl (a JSON object a line), .json (an array of objects, or as .jsonl), .txt (a document a line), each also .gz or .zst"
    add("--input", nargs="+", required=True, help=f"files, folders and glob patterns: {kinds}")
    add(
        "--output-prefix",
        required=True,
        help="start of the output's names: PREFIX_KEY_document.bin/.idx/.meta.json (_sentence with --split-sentences)",
    )
    add("--json-keys", nargs="+", default=["text"], help="keys of a record to make datasets of, one each (default: text)")
    add("--tokenizer-type", required=True, choices=TOKENIZER_TYPES, help="kind of tokenizer")
    add("--tokenizer-model", help="HuggingFaceTokenizer: folder with tokenizer.json; SentencePieceTokenizer: .model file")
    add("--vocab-file", help="GPT2BPETokenizer: vocab.json")
    add("--merge-file", help="GPT2BPETokenizer: merges.txt")
    add(
        "--tokenizer-backend",
        choices=TOKENIZER_BACKENDS,
        default="auto",
        help="who makes the ids: gigatoken, the tokenizer's own library, or (default: auto) the first where it gives the ids of the second",
    )
    add("--append-eod", action="store_true", help="end each document with the tokenizer's end-of-document id")
    add("--split-sentences", action="store_true", help="make each sentence a sequence")
    add("--keep-newlines", action="store_true", help="keep the white space between sentences, at the end of the first")
    add("--lang", default="english", help="language of the sentences: english, german, chinese, ... (default: english)")
    add(
        "--nltk-data",
        help="folder with NLTK's punkt parameters for --split-sentences (default: installed ones, else nupunkt, else trained)",
    )
    add("--workers", type=int, help="worker processes (default: one a core; 0: everything in one process)")
    add("--on-error", choices=("fatal", "skip"), default="fatal", help="stop at the first bad line, or pass over bad lines and count them")
    add("--log-interval", type=int, help="documents between progress lines (default: a line every ten seconds)")
    add("--resume-seconds", type=float, default=5.0, help="seconds between the points a killed run can go on from (default: 5)")
    values = vars(parser.parse_args(arguments))
    values["input"], values["json_keys"] = tuple(values["input"]), tuple(values["json_keys"])
    return PreprocessSettings(**values)


def main() -> None:
    """Preprocess, then say what was made."""
    settings = parse_arguments()
    settings.check()
    from megatron_llm.data.preprocess_plan import plan_work

    plan = plan_work(settings)  # the other processes start
    from megatron_llm.data.preprocess import preprocess  # brings numpy: help, wrong flags and the other processes need not wait for it

    summary = preprocess(settings, plan)
    for prefix, marks in summary.datasets.items():
        print(f"{prefix}.bin/.idx: {marks.documents} documents, {marks.sequences} sequences, {marks.tokens} tokens")
    print(f"passed over: {summary.empty} empty texts, {summary.bad} bad lines")


if __name__ == "__main__":
    run_command(main)
