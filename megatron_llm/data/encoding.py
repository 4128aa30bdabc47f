"""The encoders of a preprocessing run, and the proof that their ids are those of the tokenizer's own library.

gigatoken is proven on the input itself: what it makes of a sample is compared with what the library makes of it. The
library takes longer to load than gigatoken takes for tens of megabytes, so it does its part in a process of its own while
encoding goes on in the belief that they agree. Nothing is final before that has been confirmed: no point to go on from is
noted and no dataset gets its name. Where they do not agree, what was written is thrown away.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from types import TracebackType

from megatron_llm.data.background import Background
from megatron_llm.data.encoder import EncodedBlock, EncodedTexts, EncoderRecipe
from megatron_llm.data.sources import Block, InputFile, sample_blocks
from megatron_llm.data.tokenizer_backends import SAMPLE_FIRST, SAMPLE_OTHERS, SAMPLE_PLACES, BackendRecipe, hard_block
from megatron_llm.data.worker_pool import CannotStartError, WorkerPool
from megatron_llm.utils.errors import UserError


class OtherIdsError(Exception):
    """These encoders cannot make the ids of the run, for the reason in the message; what they made is to be thrown away."""


class Encoding:
    """Encoders made after a recipe, in worker processes (0: in this one). Use as a context manager."""

    def __init__(self, recipe: EncoderRecipe, workers: int) -> None:
        self._pool = WorkerPool[Block, EncodedBlock](recipe, workers)
        self._pool.start()

    def map(self, blocks: Iterable[Block]) -> Iterator[EncodedBlock]:
        """The documents of each block, in order; arrays hold until the next is asked for. To be called once."""
        return self._pool.map(blocks)

    def look(self) -> None:
        """OtherIdsError when it is known by now that the ids are wrong, UserError when it is known that nobody can tell."""

    def confirm(self) -> None:
        """Return once the ids are known to be right; errors as `look`."""

    def close(self) -> None:
        """End the processes."""
        self._pool.close()

    def __enter__(self) -> "Encoding":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class GigatokenEncoding(Encoding):
    """gigatoken on `tokenizer_json`, in place of what the recipe names, as long as both come to the same ids in `sample`.

    `library` is the name of what the recipe names; `say` takes the line that tells the result.
    """

    def __init__(
        self, recipe: EncoderRecipe, tokenizer_json: str, workers: int, sample: Sequence[Block], library: str, say: Callable[[str], None]
    ) -> None:
        super().__init__(replace(recipe, backend=BackendRecipe(recipe.backend.tokenizer, tokenizer_json)), workers)
        self._sample, self._library, self._say = sample, library, say
        self._expect = partial(encode_all, recipe, sample)
        self._expected = Background[list[EncodedBlock]](self._expect, f"check against {library}") if workers else None
        self._given: list[EncodedBlock] = []
        self._known = False
        self._wrong: OtherIdsError | UserError | None = None

    def map(self, blocks: Iterable[Block]) -> Iterator[EncodedBlock]:
        """See Encoding. OtherIdsError when gigatoken cannot read the tokenizer."""
        encoded = self._pool.map(chain(self._sample, blocks))
        try:
            self._given = [_copied(next(encoded)) for _ in self._sample]
        except CannotStartError as error:
            self._known, self._wrong = True, OtherIdsError(str(error))
            raise self._wrong from error
        if self._expected is None:
            self.confirm()
        yield from encoded

    def look(self) -> None:
        """See Encoding."""
        if self._known or self._expected is None or self._expected.ready():
            self.confirm()

    def confirm(self) -> None:
        """See Encoding. To be called after the first result of `map`."""
        if not self._known:
            self._wrong = self._comparison()
            self._known = True
            if self._wrong is None:
                self._say(f"ids from gigatoken: equal to those of {self._library} in a sample of the input")
        if self._wrong is not None:
            raise self._wrong

    def _comparison(self) -> OtherIdsError | UserError | None:
        try:
            expected = self._expect() if self._expected is None else self._expected.result()
        except UserError as error:
            return error
        for block, wanted, given in zip(self._sample, expected, self._given, strict=True):
            if not wanted.same_ids(given):
                return OtherIdsError(f"gigatoken comes to other ids in {block.path or 'texts that are hard to cut'}")
        return None

    def close(self) -> None:
        """See Encoding."""
        super().close()
        if self._expected is not None:
            self._expected.close()


def proof_sample(files: Sequence[InputFile], keys: Sequence[str]) -> list[Block]:
    """What gigatoken is tried on: texts that are hard to cut, and some of the input from places all over it."""
    return [hard_block(keys), *sample_blocks(files, SAMPLE_FIRST, SAMPLE_OTHERS, SAMPLE_PLACES)]


def encode_all(recipe: EncoderRecipe, blocks: Sequence[Block]) -> list[EncodedBlock]:
    """The blocks as encoders of that recipe make them, in this process."""
    encode = recipe()
    return [encode(block) for block in blocks]


def _copied(block: EncodedBlock) -> EncodedBlock:
    """The block with arrays of its own."""
    texts = {key: EncodedTexts(one.ids.copy(), one.lengths.copy(), one.sequences.copy()) for key, one in block.texts.items()}
    return replace(block, texts=texts)
