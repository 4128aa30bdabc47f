"""Tokens of an answer to text, piece by piece: no half characters, nothing of a stop string, nothing shown twice."""

from collections.abc import Callable, Sequence

_TAIL = 6  # tokens of the prompt that are decoded along: whether a space comes first depends on what stood before
_BROKEN = "\ufffd"


class TextStream:
    """Feeds on token ids and gives out the text that can no longer change.

    `decode` turns ids into text. Text is held back while it may be the beginning of a stop string or of a character
    that is spread over several tokens. With `whole` nothing is given out before the end, which then is decoded at once:
    for answers that nobody watches growing. A stop string must be seen when it comes, so it takes precedence.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int], stop: Sequence[str] = (), *, whole: bool = False
    ) -> None:
        self._decode, self._stop = decode, tuple(stop)
        self._ids = list(prompt[-_TAIL:])
        self._read = len(self._ids)  # so many of the ids have been given out; they are kept as context
        self._before: str | None = None  # their text, once it was needed
        self._held = ""
        self._wait = whole and not self._stop
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that `token` makes certain. After a stop string `stopped` is set and nothing more comes."""
        self._ids.append(token)
        if self._wait:
            return ""
        fresh = self._fresh()
        return self._release(fresh, last=False) if self._stop else fresh

    def finish(self) -> str:
        """What was held back, at the end of the answer."""
        return self._release(self._fresh(last=True), last=True)

    def _fresh(self, last: bool = False) -> str:
        """Text of the ids that were not read yet; empty while it ends in half a character."""
        if len(self._ids) == self._read:
            return ""
        if self._before is None:
            self._before = self._decode(self._ids[: self._read])
        now = self._decode(self._ids)
        if (now.endswith(_BROKEN) and not last) or len(now) <= len(self._before):
            return ""
        fresh = now[len(self._before) :]
        # Context is only what came with the last piece: work for a token does not grow with the answer.
        del self._ids[: self._read]
        self._read, self._before = len(self._ids), None
        return fresh

    def _release(self, fresh: str, last: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + fresh
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = 0 if last else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
