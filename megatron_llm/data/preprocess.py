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
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate

from megatron_llm import __version__
from megatron_llm.data.chat_template import begin_id, chat_template_hash, tokenizer_settings_folder
from megatron_llm.data.encoder import EncodedBlock, EncoderRecipe
from megatron_llm.data.encoding import Encoding, GigatokenEncoding, OtherIdsError, proof_sample
from megatron_llm.data.indexed import token_dtype
from megatron_llm.data.indexed_writer import Marks
from megatron_llm.data.journal import Counts, Entry
from megatron_llm.data.preprocess_output import WorkFolder
from megatron_llm.data.preprocess_plan import WorkPlan, plan_work
from megatron_llm.data.preprocess_settings import PreprocessSettings
from megatron_llm.data.records import iterate_texts
from megatron_llm.data.sentences import SentenceSplitter, build_splitter
from megatron_llm.data.sidecar import Sidecar
from megatron_llm.data.sources import Block, InputFile, Position, block_size, describe, read_blocks
from megatron_llm.data.tokenizer_backends import BackendRecipe, gigatoken_candidate
from megatron_llm.data.tokenizers import Tokenizer, build_tokenizer
from megatron_llm.utils.errors import UserError
from megatron_llm.utils.progress import Progress

BAD_LINES_SHOWN = 20


@dataclass(frozen=True)
class PreprocessSummary:
    """What a run has made: the prefix of each key's dataset with its counts, and what was passed over in all."""

    datasets: dict[str, Marks]
    empty: int
    bad: int


def preprocess(settings: PreprocessSettings, plan: WorkPlan | None = None) -> PreprocessSummary:
    """Make the datasets, going on where a killed run with the same settings and input stopped.

    `plan` is what `plan_work` gave for the settings, when that has been asked already.
    """
    plan = plan if plan is not None else plan_work(settings)
    tokenizer = build_tokenizer(*settings.tokenizer)
    if settings.append_eod and tokenizer.eod_id is None:
        raise UserError(
            f"--append-eod: the {tokenizer.kind} {tokenizer.model} has no end-of-document token; leave the flag out or use another"
        )
    with Progress("preprocessing", plan.size, unit="B", every=None if settings.log_interval is None else float("inf")) as progress:
        workers = f"{plan.workers or 'no'} workers"
        progress.say(f"input: {describe(plan.files)}; {tokenizer.kind}, vocabulary {tokenizer.vocab_size}; {workers}")
        splitter = _splitter(settings, plan.files, progress)
        return _encode(settings, plan, tokenizer, splitter, progress)


def _encode(
    settings: PreprocessSettings, plan: WorkPlan, tokenizer: Tokenizer, splitter: SentenceSplitter | None, progress: Progress
) -> PreprocessSummary:
    """With gigatoken where that comes to the ids of the tokenizer's own library, and with that elsewhere."""
    wanted = "library" if plan.small and settings.tokenizer_backend == "auto" else settings.tokenizer_backend
    end = tokenizer.eod_id if settings.append_eod else None
    recipe = EncoderRecipe(BackendRecipe(settings.tokenizer), settings.json_keys, tokenizer.vocab_size, end, splitter)
    candidate = gigatoken_candidate(tokenizer, wanted)
    refusal = candidate.refusal
    if candidate.tokenizer_json is not None:
        sample = proof_sample(plan.files, settings.json_keys)
        try:
            with GigatokenEncoding(recipe, candidate.tokenizer_json, plan.workers, sample, tokenizer.library, progress.say) as encoding:
                return _Run(settings, plan.files, tokenizer, splitter, progress).execute(encoding)
        except OtherIdsError as error:
            refusal = str(error)
    if wanted == "gigatoken":
        raise UserError(f"--tokenizer-backend gigatoken: {refusal}; use auto or library")
    if wanted != "library":
        progress.say(f"ids from {tokenizer.library}: {refusal}")
    with Encoding(recipe, plan.workers) as encoding:
        return _Run(settings, plan.files, tokenizer, splitter, progress).execute(encoding)


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

    def execute(self, encoding: Encoding) -> PreprocessSummary:
        """Read, encode, write, put into place. OtherIdsError, with nothing left of this run, when `encoding` proves to be wrong."""
        with WorkFolder(self._settings.output_prefix, self._names, self._tokenizer.vocab_size, self._fingerprint(), self._files) as work:
            entry = work.entry
            if work.stale:
                self._progress.say(f"{work.path} is of other settings or input, or had not got anywhere: starting at the beginning")
            if entry is not None:
                self._go_on(entry)
            if entry is not None and entry.finished:
                work.publish()
                return self._summary(entry.marks)
            stamp = self._stamp()
            try:
                self._write(work, encoding, entry)
                encoding.confirm()
            except OtherIdsError:
                if entry is None:
                    work.remove()
                raise
            marks = work.marks
            self._refuse_nothing(work, marks)
            work.finish(self._starts[-1], self._counts, {key: replace(stamp, **asdict(mark)) for key, mark in marks.items()})
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
            yield from read_blocks(self._files[index], index, start, block_size(self._starts[-1]))

    def _write(self, work: WorkFolder, encoding: Encoding, entry: Entry | None) -> None:
        committed = time.monotonic()
        added = False
        try:
            for result in encoding.map(self._blocks(entry)):
                encoding.look()
                before = self._place.position.line if result.file == self._place.file else 0
                self._report_bad(result, before)
                work.add(result.texts)
                self._place = _Place(result.file, Position(result.end, before + result.lines), self._starts[result.file] + result.consumed)
                added = True
                self._count(result)
                self._show()
                if time.monotonic() - committed >= self._settings.resume_seconds:
                    encoding.confirm()
                    self._commit(work)
                    committed = time.monotonic()
        except (UserError, KeyboardInterrupt):
            if added and self._confirmed(encoding):
                self._commit(work)
            raise

    def _confirmed(self, encoding: Encoding) -> bool:
        try:
            encoding.confirm()
        except (OtherIdsError, UserError):
            return False
        return True

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

    def _stamp(self) -> Sidecar:
        """The sidecar but for its counts."""
        tokenizer = self._tokenizer
        folder = tokenizer_settings_folder(tokenizer)
        return Sidecar(
            dtype=token_dtype(tokenizer.vocab_size).name,
            vocab_size=tokenizer.vocab_size,
            tokenizer_type=tokenizer.kind,
            tokenizer_fingerprint=tokenizer.fingerprint,
            eod_id=tokenizer.eod_id,
            append_eod=self._settings.append_eod,
            documents=0,
            sequences=0,
            tokens=0,
            tokenizer_model=os.path.abspath(tokenizer.model) if tokenizer.model else None,
            bos_id=begin_id(tokenizer),
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
