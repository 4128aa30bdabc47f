"""Pieces of answers on their way from the engine's thread to the event loop.

Waking the event loop costs a system call and a change of threads, so it is woken once for all pieces that have come until it
looks, not once for each.
"""

import asyncio
import threading

from megatron_llm.serve.engine import Failed, Piece


class Gone:
    """The client has closed its connection."""


class Post:
    """Brings pieces to inboxes. Made in any thread; its inboxes are made and read in the event loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bag: list[tuple[Inbox, Piece | Failed]] = []

    def inbox(self) -> "Inbox":
        """A new inbox of the running event loop."""
        return Inbox(self, asyncio.get_running_loop())

    def send(self, inbox: "Inbox", piece: Piece | Failed) -> None:
        """Called from another thread: the piece will be in the inbox soon. Nothing happens when the loop is closed."""
        with self._lock:
            first = not self._bag
            self._bag.append((inbox, piece))
        if first:
            try:
                inbox.loop.call_soon_threadsafe(self._bring)
            except RuntimeError:  # the loop is closed: nobody listens any more
                self._bag.clear()

    def _bring(self) -> None:
        with self._lock:
            bag, self._bag = self._bag, []
        for inbox, piece in bag:
            inbox.put_here(piece)


class Inbox:
    """What has come for one request and was not taken yet."""

    def __init__(self, post: Post, loop: asyncio.AbstractEventLoop) -> None:
        self._post, self.loop = post, loop
        self._pieces: list[Piece | Failed | Gone] = []
        self._reader: asyncio.Future[None] | None = None

    def put(self, piece: Piece | Failed) -> None:
        """Called from another thread."""
        self._post.send(self, piece)

    def put_here(self, piece: Piece | Failed | Gone) -> None:
        """Called in the event loop."""
        self._pieces.append(piece)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def take(self) -> list[Piece | Failed | Gone]:
        """All that has come, at least one; only one task may wait."""
        if not self._pieces:
            self._reader = self.loop.create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        pieces, self._pieces = self._pieces, []
        return pieces
