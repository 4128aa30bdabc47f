"""Training a byte-level BPE tokenizer on a corpus, saved as a folder that AutoTokenizer opens.

Byte-level: any text has ids and comes back unchanged (no normalisation, no unknown token). The result depends only on
the texts and the vocabulary size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_llm.data.records import iterate_texts
from megatron_llm.data.sources import describe, find_inputs
from megatron_llm.data.tokenizer_export import write_folder
from megatron_llm.data.tokenizers import END_OF_TEXT
from megatron_llm.utils.errors import UserError
from megatron_llm.utils.optional import require
from megatron_llm.utils.progress import Progress

SMALLEST_VOCABULARY = 257  # the bytes and the end token


@dataclass(frozen=True)
class TrainedTokenizer:
    """What was made: the vocabulary size, the texts and characters it was trained on."""

    vocab_size: int
    texts: int
    characters: int


def train_tokenizer(
    inputs: Sequence[str], output: str | Path, vocab_size: int, *, json_keys: Sequence[str] = ("text",), max_megabytes: float = 500.0
) -> TrainedTokenizer:
    """Train on the texts of the inputs (named as for preprocessing) and write the folder `output`.

    `<|endoftext|>` is the last id of the vocabulary and the end-of-document token. At most `max_megabytes` million
    characters are read, from the beginning. A corpus too small for the vocabulary size is a UserError.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(f"--vocab-size {vocab_size} is too small: the 256 bytes and the end token take {SMALLEST_VOCABULARY}")
    tokenizers = require("tokenizers", purpose="training a tokenizer")
    files = find_inputs(inputs)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    with Progress("reading texts", sum(file.size for file in files), unit="B") as progress:
        progress.say(f"input: {describe(files)}; byte-level BPE of {vocab_size} ids")
        reader = _Reader(iterate_texts(files, json_keys), progress, int(max_megabytes * 1e6))
        tokenizer.train_from_iterator(reader.texts(), trainer)
    if reader.count == 0:
        raise UserError(f"the input has no text for the keys {', '.join(json_keys)}: nothing to train a tokenizer on")
    # After training, so that its id is the last and byte ids are the first.
    tokenizer.add_special_tokens([END_OF_TEXT])
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    if size != vocab_size:
        raise UserError(
            f"the corpus ({reader.characters} characters) gives only {size} ids, fewer than --vocab-size {vocab_size}:"
            f" ask for {size} or add text"
        )
    write_folder(Path(output), tokenizer, eos_token=END_OF_TEXT)
    return TrainedTokenizer(size, reader.count, reader.characters)


class _Reader:
    """Hands texts to the trainer, counting them, up to a number of characters."""

    def __init__(self, source: Iterator[tuple[str, int]], progress: Progress, limit: int) -> None:
        self._source, self._progress, self._limit = source, progress, limit
        self.count = self.characters = 0

    def texts(self) -> Iterator[str]:
        for text, consumed in self._source:
            if not text.strip():
                continue
            self.count += 1
            self.characters += len(text)
            self._progress.update(consumed, texts=self.count)
            yield text
            if self.characters >= self._limit:
                self._progress.say(f"stopped reading after {self.characters} characters: that is enough for a vocabulary")
                return
