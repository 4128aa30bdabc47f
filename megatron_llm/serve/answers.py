"""Answers as OpenAI's interface writes them: whole ones, chunks of a stream, log-probabilities, usage."""

import json
import time
import uuid
from typing import Any

from megatron_llm.serve.engine import Piece
from megatron_llm.serve.language_model import LanguageModel
from megatron_llm.serve.requests import GenerationRequest
from megatron_llm.serve.sampling import Choice

_MARK = "\0"  # stands for a text; nothing else in an event holds it, names of folders and flags cannot


class AnswerWriter:
    """Turns the pieces of one request into JSON objects, and counts tokens as it goes."""

    def __init__(self, request: GenerationRequest, model: LanguageModel) -> None:
        self._request, self._model = request, model
        count = len(request.prompts) * request.n
        self._texts = [""] * count
        self._choices: list[list[Choice]] = [[] for _ in range(count)]
        self._offsets = [0] * count
        self._finish: list[str | None] = [None] * count
        self._tokens = 0
        self._frames: dict[int, tuple[bytes, bytes]] = {}
        kind = "chatcmpl" if request.chat else "cmpl"
        self._head = {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model.name}

    @property
    def open(self) -> int:
        """Answers that have not ended."""
        return self._finish.count(None)

    def add(self, piece: Piece) -> None:
        """Keep a piece. The end token counts as generated, although it is no text."""
        self._finish[piece.number] = piece.finish
        self._tokens += piece.tokens
        if not self._request.stream:
            self._texts[piece.number] += piece.text
            if self._request.options.logprobs is not None:
                self._choices[piece.number] += piece.choices

    def usage(self) -> dict[str, int]:
        """Tokens of the prompts, each counted once, and of all answers."""
        prompt = sum(map(len, self._request.prompts))
        return {"prompt_tokens": prompt, "completion_tokens": self._tokens, "total_tokens": prompt + self._tokens}

    def whole(self) -> dict[str, Any]:
        """The answer to a request without streaming."""
        choices = []
        for index, text in enumerate(self._texts):
            choice: dict[str, Any] = {"index": index, "logprobs": self._logprobs(self._choices[index], index)}
            choice |= {"message": {"role": "assistant", "content": text, "refusal": None}} if self._request.chat else {"text": text}
            choices.append(choice | {"finish_reason": self._finish[index]})
        kind = "chat.completion" if self._request.chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": self.usage()}

    def first_chunks(self) -> list[bytes]:
        """What a stream begins with: in a chat, the role of each answer."""
        if not self._request.chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [
            self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]) for index in range(len(self._texts))
        ]

    def chunk(self, piece: Piece) -> bytes:
        """A piece as server-sent event; nothing when it shows nothing."""
        logprobs = self._request.options.logprobs is not None and bool(piece.choices)
        if not piece.text and piece.finish is None and not logprobs:
            return b""
        if piece.finish is None and not logprobs:
            before, after = self._frames.get(piece.number) or self._frame(piece.number)
            return before + json.dumps(piece.text, ensure_ascii=False).encode() + after
        return self._render(piece, self._logprobs(list(piece.choices), piece.number) if logprobs else None)

    def _frame(self, index: int) -> tuple[bytes, bytes]:
        """What stands before and after the text in an event that shows nothing else, which is the same for all of an answer."""
        before, _, after = self._render(Piece(index, _MARK, (), 1), None).partition(json.dumps(_MARK).encode())
        self._frames[index] = before, after
        return before, after

    def _render(self, piece: Piece, logprobs: dict[str, Any] | None) -> bytes:
        choice: dict[str, Any] = {"index": piece.number, "logprobs": logprobs, "finish_reason": piece.finish}
        choice |= {"delta": {"content": piece.text} if piece.text else {}} if self._request.chat else {"text": piece.text}
        return self._chunk([choice])

    def last_chunks(self) -> list[bytes]:
        """What a stream ends with: usage where it was asked for, and the mark of the end."""
        usage = [self._chunk([], usage=self.usage())] if self._request.include_usage else []
        return [*usage, b"data: [DONE]\n\n"]

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        kind = "chat.completion.chunk" if self._request.chat else "text_completion"
        extra = {"usage": None, **more} if self._request.include_usage else more
        return event({**self._head, "object": kind, "choices": choices, **extra})

    def _logprobs(self, choices: list[Choice], index: int) -> dict[str, Any] | None:
        if self._request.options.logprobs is None:
            return None
        if self._request.chat:
            return {"content": [self._entry(choice) for choice in choices], "refusal": None}
        tokens = [self._model.token_text(choice.token) for choice in choices]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token)
        tops = [{self._model.token_text(token): logprob for token, logprob in choice.top} for choice in choices]
        return {
            "tokens": tokens,
            "token_logprobs": [choice.logprob for choice in choices],
            "top_logprobs": tops if self._request.options.logprobs else None,
            "text_offset": offsets,
        }

    def _entry(self, choice: Choice) -> dict[str, Any]:
        top = [self._token(token, logprob) for token, logprob in choice.top]
        return {**self._token(choice.token, choice.logprob), "top_logprobs": top}

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._model.token_text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def event(content: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
