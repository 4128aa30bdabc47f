"""From text files to an indexed dataset: find the input, encode it in worker processes, write it so that a kill costs seconds.

The main process reads blocks of lines, hands them to workers, and writes their results in the order of the input, so
that the output does not depend on the number of workers or on where a run was interrupted. Nothing grows with the
corpus: blocks in flight are bounded, and lengths and document indices go to the disk.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

from megatron_llm import __version__
from megatron_llm.data import encoder
from megatron_llm.data.chat_template import chat_template_hash, special_token_ids, tokenizer_settings_folder
from megatron_llm.data.encoder import BlockEncoder, EncodedBlock, EncoderRecipe
from megatron_llm.data.indexed import token_dtype
from megatron_llm.data.indexed_writer import Marks
from megatron_llm.data.journal import Counts, Entry
from megatron_llm.data.preprocess_output import WorkFolder
from megatron_llm.data.preprocess_settings import PreprocessSettings
from megatron_llm.data.records import iterate_texts
from megatron_llm.data.sentences import SentenceSplitter, build_splitter
from megatron_llm.data.sidecar import Sidecar
from megatron_llm.data.sources import BLOCK_BYTES, Block, InputFile, Position, describe, find_inputs, read_blocks, sample_blocks
from megatron_llm.data.tokenizer_backends import (
    SAMPLE_FIRST,
    SAMPLE_OTHERS,
    SAMPLE_PLACES,
    BackendRecipe,
    LibraryEncoder,
    gigatoken_candidate,
    hard_block,
)
from megatron_llm.data.tokenizers import Tokenizer, build_tokenizer
from megatron_llm.data.worker_pool import WorkerPool, start_server
from megatron_llm.utils.compressed import is_compressed
from megatron_llm.utils.errors import UserError
from megatron_llm.utils.progress import Progress

BAD_LINES_SHOWN = 20


@dataclass(frozen=True)
class PreprocessSummary:
    """What a run has made: the prefix of each key's dataset with its counts, and what was passed over in all."""

    datasets: dict[str, Marks]
    empty: int
    bad: int


def preprocess(settings: PreprocessSettings) -> PreprocessSummary:
    """Make the datasets, going on where a killed run with the same settings and input stopped."""
    settings.check()
    files = find_inputs(settings.input)
    size = sum(file.size for file in files)
    workers = len(os.sched_getaffinity(0)) if settings.workers is None else settings.workers
    small = size < BLOCK_BYTES and not any(is_compressed(file.path) for file in files)
    if small:
        workers = 0  # a single block: starting processes would take longer than the work
    if workers:
        start_server(encoder.__name__)
    tokenizer = build_tokenizer(*settings.tokenizer)
    if settings.append_eod and tokenizer.eod_id is None:
        raise UserError(
            f"--append-eod: the {tokenizer.kind} {tokenizer.model} has no end-of-document token; leave the flag out or use another"
        )
    with Progress("preprocessing", size, unit="B", every=None if settings.log_interval is None else float("inf")) as progress:
        progress.say(f"input: {describe(files)}; {tokenizer.kind}, vocabulary {tokenizer.vocab_size}; {workers or 'no'} workers")
        splitter = _splitter(settings, files, progress)
        end = tokenizer.eod_id if settings.append_eod else None
        recipe = EncoderRecipe(BackendRecipe(settings.tokenizer), settings.json_keys, tokenizer.vocab_size, end, splitter)
        wanted = "library" if small and settings.tokenizer_backend == "auto" else settings.tokenizer_backend
        with _pool(recipe, workers, wanted, tokenizer, files, progress) as pool:
            return _Run(settings, files, tokenizer, splitter, progress).execute(pool)


def _pool(
    recipe: EncoderRecipe, workers: int, wanted: str, tokenizer: Tokenizer, files: Sequence[InputFile], progress: Progress
) -> WorkerPool[Block, EncodedBlock]:
    """Workers that encode with gigatoken where that comes to the ids of the tokenizer's own library, and with that elsewhere."""
    candidate = gigatoken_candidate(tokenizer, wanted)
    refusal: str | None = candidate.refusal
    if candidate.tokenizer_json is not None:
        quick = replace(recipe, backend=BackendRecipe(recipe.backend.tokenizer, candidate.tokenizer_json))
        pool = WorkerPool[Block, EncodedBlock](quick, workers)
        try:
            pool.start()  # they get ready while the library does its part
            refusal = _difference(pool, BlockEncoder(recipe, LibraryEncoder(tokenizer)), files)
        except UserError as error:
            refusal = str(error)
        finally:
            if refusal is not None:
                pool.close()
        if refusal is None:
            progress.say(f"ids from gigatoken: equal to those of {tokenizer.library} in a sample of the input")
            return pool
    if wanted == "gigatoken":
        raise UserError(f"--tokenizer-backend gigatoken: {refusal}; use auto or library")
    if wanted != "library":
        progress.say(f"ids from {tokenizer.library}: {refusal}")
    return WorkerPool[Block, EncodedBlock](recipe, workers)


def _difference(pool: WorkerPool[Block, EncodedBlock], library: BlockEncoder, files: Sequence[InputFile]) -> str | None:
    """Where what the workers make of a sample differs from what the library makes of it; None where it does not."""
    sample = [hard_block(library.keys), *sample_blocks(files, SAMPLE_FIRST, SAMPLE_OTHERS, SAMPLE_PLACES)]
    expected = [library(block) for block in sample]
    for block, wanted, given in zip(sample, expected, pool.map(sample), strict=True):
        if not wanted.same_ids(given):
            where = block.path or "texts that are hard to cut"
            return f"gigatoken comes to other ids in {where}"
    return None


def _splitter(settings: PreprocessSettings, files: Sequence[InputFile], progress: Progress) -> SentenceSplitter | None:
    if not settings.split_sentences:
        return None
    sample = (text for text, _ in iterate_texts(files, settings.json_keys))
    splitter = build_splitter(settings.lang, settings.nltk_data, settings.keep_newlines, lambda: sample)
    progress.say(f"sentences: {splitter.description}")
    return splitter


@dataclass(frozen=True)
class _Place:
    """How far a run is: in which file and where in it, and the bytes of all files read by then."""

    file: int = 0
    position: Position = field(default_factory=Position)
    consumed: int = 0


class _Run:
    """The state of one run while it goes on."""

    def __init__(
        self,
        settings: PreprocessSettings,
        files: Sequence[InputFile],
        tokenizer: Tokenizer,
        splitter: SentenceSplitter | None,
        progress: Progress,
    ) -> None:
        self._settings, self._files, self._tokenizer, self._progress = settings, files, tokenizer, progress
        self._splitter = splitter
        self._names = {key: settings.dataset_prefix(key) for key in settings.json_keys}
        self._starts = [0, *accumulate(file.size for file in files)]
        self._counts = Counts()
        self._place = _Place()
        self._bad_shown = self._logged = 0

    def execute(self, pool: WorkerPool[Block, EncodedBlock]) -> PreprocessSummary:
        """Read, encode, write, put into place."""
        with WorkFolder(self._settings.output_prefix, self._names, self._tokenizer.vocab_size, self._fingerprint(), self._files) as work:
            entry = work.entry
            if work.stale:
                self._progress.say(f"{work.path} is of other settings or input, or had not got anywhere: starting at the beginning")
            if entry is not None:
                self._go_on(entry)
            if entry is not None and entry.finished:
                work.publish()
                return self._summary(entry.marks)
            self._write(work, pool.map(self._blocks(entry)))
            marks = work.marks
            self._refuse_nothing(work, marks)
            work.finish(self._starts[-1], self._counts, {key: self._sidecar(mark) for key, mark in marks.items()})
            return self._summary(marks)

    def _go_on(self, entry: Entry) -> None:
        self._counts = entry.counts
        self._place = _Place(entry.file, entry.position, entry.consumed)
        self._progress.resume(entry.consumed, documents=entry.counts.documents, tokens=entry.counts.tokens)
        place = f"{self._files[entry.file].path}, {entry.position.line} lines in"
        self._progress.say(f"going on where an earlier run stopped: {entry.counts.documents} documents are there ({place})")

    def _blocks(self, entry: Entry | None) -> Iterator[Block]:
        first = entry.file if entry else 0
        for index in range(first, len(self._files)):
            start = entry.position if entry and index == first else Position()
            yield from read_blocks(self._files[index], index, start)

    def _write(self, work: WorkFolder, results: Iterator[EncodedBlock]) -> None:
        committed = time.monotonic()
        added = False
        try:
            for result in results:
                before = self._place.position.line if result.file == self._place.file else 0
                self._report_bad(result, before)
                work.add(result.texts)
                self._place = _Place(result.file, Position(result.end, before + result.lines), self._starts[result.file] + result.consumed)
                added = True
                self._count(result)
                self._show()
                if time.monotonic() - committed >= self._settings.resume_seconds:
                    self._commit(work)
                    committed = time.monotonic()
        except (UserError, KeyboardInterrupt):
            if added:
                self._commit(work)
            raise

    def _commit(self, work: WorkFolder) -> None:
        work.commit(self._place.file, self._place.position, self._place.consumed, self._counts)

    def _show(self) -> None:
        counts, interval = self._counts, self._settings.log_interval
        self._progress.update(self._place.consumed, documents=counts.documents, tokens=counts.tokens)
        if interval is not None and counts.documents - self._logged >= interval:
            self._logged = counts.documents
            self._progress.show()

    def _count(self, result: EncodedBlock) -> None:
        documents = sum(len(encoded.sequences) for encoded in result.texts.values())
        tokens = sum(encoded.ids.size for encoded in result.texts.values())
        old = self._counts
        self._counts = Counts(old.documents + documents, old.empty + result.empty, old.bad + len(result.bad), old.tokens + tokens)

    def _report_bad(self, result: EncodedBlock, before: int) -> None:
        """Tell or refuse the bad lines of a block that has so many lines of its file before it."""
        for number, reason in result.bad:
            place = f"{result.path}, {result.unit} {before + number}: {reason}"
            if self._settings.on_error == "fatal":
                raise UserError(f"{place}; correct it, or pass over such lines with --on-error skip (what is done so far is kept)")
            if self._bad_shown < BAD_LINES_SHOWN:
                self._progress.say(f"skipped {place}")
            elif self._bad_shown == BAD_LINES_SHOWN:
                self._progress.say("skipped more bad lines, which are only counted from here on")
            self._bad_shown += 1

    def _refuse_nothing(self, work: WorkFolder, marks: dict[str, Marks]) -> None:
        for key, mark in marks.items():
            if mark.documents == 0:
                work.remove()
                raise UserError(
                    f"the input has no document for the key {key!r}: {self._counts.empty} texts were empty,"
                    f" {self._counts.bad} lines were bad; nothing was written"
                )

    def _sidecar(self, marks: Marks) -> Sidecar:
        tokenizer = self._tokenizer
        folder = tokenizer_settings_folder(tokenizer)
        return Sidecar(
            dtype=token_dtype(tokenizer.vocab_size).name,
            vocab_size=tokenizer.vocab_size,
            tokenizer_type=tokenizer.kind,
            tokenizer_fingerprint=tokenizer.fingerprint,
            eod_id=tokenizer.eod_id,
            append_eod=self._settings.append_eod,
            documents=marks.documents,
            sequences=marks.sequences,
            tokens=marks.tokens,
            tokenizer_model=os.path.abspath(tokenizer.model) if tokenizer.model else None,
            bos_id=special_token_ids(folder)["bos"] if folder else None,
            chat_template=chat_template_hash(folder) if folder else None,
        )

    def _summary(self, marks: dict[str, Marks]) -> PreprocessSummary:
        return PreprocessSummary({self._names[key]: mark for key, mark in marks.items()}, self._counts.empty, self._counts.bad)

    def _fingerprint(self) -> str:
        """Of everything that decides the output, the input files apart (the journal knows those one by one)."""
        parts = {
            "version": __version__,
            "keys": self._settings.json_keys,
            "tokenizer": [self._tokenizer.kind, self._tokenizer.fingerprint, self._tokenizer.vocab_size],
            "append_eod": self._settings.append_eod,
            "sentences": self._splitter.fingerprint if self._splitter else None,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
