"""The settings of a preprocessing run and what can be said against them before anything is loaded.

No library is imported here, so that `--help` and a wrong flag are answered at once.
"""

from dataclasses import dataclass

from megatron_llm.utils.errors import UserError

TOKENIZER_TYPES = ("HuggingFaceTokenizer", "SentencePieceTokenizer", "GPT2BPETokenizer", "ByteTokenizer")
# Who turns texts into ids: the library that a tokenizer's files were made for, or gigatoken where it comes to the same ids.
TOKENIZER_BACKENDS = ("auto", "gigatoken", "library")


@dataclass(frozen=True)
class PreprocessSettings:
    """One run of preprocessing; the fields are the flags of tools/preprocess_data.py, where they are explained."""

    input: tuple[str, ...]
    output_prefix: str
    tokenizer_type: str
    tokenizer_model: str | None = None
    vocab_file: str | None = None
    merge_file: str | None = None
    tokenizer_backend: str = "auto"
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    split_sentences: bool = False
    keep_newlines: bool = False
    lang: str = "english"
    nltk_data: str | None = None
    on_error: str = "fatal"
    workers: int | None = None
    log_interval: int | None = None
    resume_seconds: float = 5.0

    @property
    def tokenizer(self) -> tuple[str, str | None, str | None, str | None]:
        """The arguments of `build_tokenizer`."""
        return self.tokenizer_type, self.tokenizer_model, self.vocab_file, self.merge_file

    def dataset_prefix(self, key: str) -> str:
        """The prefix of the dataset of one key: `<output prefix>_<key>_document` (or `_sentence`)."""
        return f"{self.output_prefix}_{key}_{'sentence' if self.split_sentences else 'document'}"

    def check(self) -> None:
        """UserError for what cannot be, whatever the input holds."""
        if not self.json_keys or len(set(self.json_keys)) != len(self.json_keys):
            raise UserError(f"--json-keys should be one or more different keys, not {list(self.json_keys)}")
        bad = next((key for key in self.json_keys if "/" in key or not key), None)
        if bad is not None:
            raise UserError(f"--json-keys: {bad!r} cannot be part of a file name")
        if self.workers is not None and self.workers < 0:
            raise UserError(f"--workers should be 0 (everything in one process) or more, not {self.workers}")
        if self.keep_newlines and not self.split_sentences:
            raise UserError("--keep-newlines says how to cut sentences: it needs --split-sentences")
        if self.tokenizer_backend not in TOKENIZER_BACKENDS:
            raise UserError(f"--tokenizer-backend should be one of {', '.join(TOKENIZER_BACKENDS)}, not {self.tokenizer_backend!r}")
