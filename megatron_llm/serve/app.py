"""The HTTP side: routes, key, limits, streams, errors. It knows nothing of tensors; the engine does the work."""

import asyncio
import hmac
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from megatron_llm.serve.answers import AnswerWriter, event
from megatron_llm.serve.engine import Engine, Failed, Job, Piece
from megatron_llm.serve.fields import parse_object
from megatron_llm.serve.metrics import Metrics
from megatron_llm.serve.options import ServeOptions
from megatron_llm.serve.pages import add_page
from megatron_llm.serve.post import Gone, Inbox, Post
from megatron_llm.serve.refusals import Refusal
from megatron_llm.serve.requests import read_chat, read_completion
from megatron_llm.utils.optional import require

log = logging.getLogger(__name__)
_STREAM = "text/event-stream"
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_READ_ON = 8 << 20
_READ_HERE = 4096  # bytes; a larger body is taken apart in another thread, so that others need not wait for its tokens
LOCAL_PAGES = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"


def build_app(engine: Engine, options: ServeOptions, metrics: Metrics) -> Any:
    """The FastAPI application over an engine."""
    fastapi = require("fastapi", extra="serve", purpose="the server")
    app = fastapi.FastAPI(title="megatron_llm", docs_url=None, redoc_url=None)  # those pages load scripts from elsewhere
    routes = _Routes(engine, options, metrics)
    for path, endpoint in (("/v1/completions", routes.completions), ("/v1/chat/completions", routes.chat)):
        app.router.add_route(path, routes.watched(path, endpoint), methods=["POST"])
    app.router.add_route("/v1/models", routes.watched("/v1/models", routes.models), methods=["GET"])
    app.router.add_route("/v1/models/{name:path}", routes.watched("/v1/models", routes.model), methods=["GET"])
    app.router.add_route("/health", routes.health, methods=["GET"])
    app.router.add_route("/metrics", routes.metrics_page, methods=["GET"])
    add_page(app, options, own=True)
    add_errors(app)
    add_origins(app, options)
    return app


def add_errors(app: Any) -> None:
    """Unknown routes and wrong methods get the same error body as everything else."""
    from starlette.exceptions import HTTPException

    async def tell(request: Any, error: Any) -> Any:
        return _refused(
            Refusal(error.status_code, f"{request.method} {request.url.path}: {error.detail}", headers=dict(error.headers or {}))
        )

    app.add_exception_handler(HTTPException, tell)


def add_origins(app: Any, options: ServeOptions) -> None:
    """Pages of this machine, and those named, may talk to the server from a browser."""
    from starlette.middleware.cors import CORSMiddleware

    allowed = list(options.origins)
    app.add_middleware(CORSMiddleware, allow_origins=allowed, allow_origin_regex=LOCAL_PAGES, allow_methods=["*"], allow_headers=["*"])


def _refused(refusal: Refusal) -> Any:
    from starlette.responses import JSONResponse

    return JSONResponse(refusal.body(), status_code=refusal.status, headers=refusal.headers)


class _Routes:
    def __init__(self, engine: Engine, options: ServeOptions, metrics: Metrics) -> None:
        self.engine, self.counters = engine, metrics
        self._options, self._post = options, Post()

    def watched(self, route: str, endpoint: Callable[[Any], Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
        """The endpoint behind the key, with refusals turned into responses, and counted."""

        async def handle(request: Any) -> Any:
            start = request.state.start = time.monotonic()
            try:
                self._check_key(request)
                response = await endpoint(request)
            except Refusal as refusal:
                response = _refused(refusal)
            except asyncio.CancelledError:
                self.counters.count_request(route, 499, time.monotonic() - start)
                raise
            except Exception:
                log.exception("%s failed", route)
                response = _refused(Refusal(500, "the server failed; its log says more", code="internal_error"))
            if response.media_type != _STREAM:  # those are counted at their end
                self.counters.count_request(route, response.status_code, time.monotonic() - start)
            return response

        return handle

    def _check_key(self, request: Any) -> None:
        key = self._options.api_key
        if key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), key.encode()):
            what = "the key is not the right one" if given else "the key is missing"
            raise Refusal(
                401, f"{what}: send the header 'Authorization: Bearer KEY'", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
            )

    async def completions(self, request: Any) -> Any:
        return await self._generate(request, chat=False)

    async def chat(self, request: Any) -> Any:
        return await self._generate(request, chat=True)

    async def models(self, request: Any) -> Any:
        from starlette.responses import JSONResponse

        return JSONResponse({"object": "list", "data": [self._model_card()]})

    async def model(self, request: Any) -> Any:
        from starlette.responses import JSONResponse

        name = request.path_params["name"]
        if name != self.engine.model.name:
            raise Refusal(404, f"the model '{name[:200]}' is not served here", param="model", code="model_not_found")
        return JSONResponse(self._model_card())

    def _model_card(self) -> dict[str, Any]:
        model = self.engine.model
        card = {"id": model.name, "object": "model", "created": model.created, "owned_by": "megatron_llm"}
        return {**card, "max_model_len": model.context, "chat": model.has_template}

    async def health(self, request: Any) -> Any:
        from starlette.responses import JSONResponse

        alive = self.engine.alive
        return JSONResponse({"status": "ok" if alive else "engine stopped"}, status_code=200 if alive else 503)

    async def metrics_page(self, request: Any) -> Any:
        from starlette.responses import PlainTextResponse

        return PlainTextResponse(self.counters.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _generate(self, request: Any, chat: bool) -> Any:
        body = await self._body(request)
        arguments = (parse_object(body), self.engine.model, self._options.limits)
        read = read_chat if chat else read_completion
        here = len(body) <= _READ_HERE and not self.engine.model.tokenizing
        wanted = read(*arguments) if here else await asyncio.to_thread(read, *arguments)
        inbox = self._post.inbox()
        job = self.engine.submit(wanted.prompts, wanted.n, wanted.options, inbox.put, whole=not wanted.stream)
        writer = AnswerWriter(wanted, self.engine.model)
        watcher = asyncio.ensure_future(_tell_when_gone(request, inbox))
        answer = _Stream(self, request, job, inbox, writer, watcher)
        handed_over = False
        try:
            if wanted.stream:
                answer.first = await inbox.take()  # a refusal now still gets its own HTTP status
                _raise_refusal(answer.first)
                handed_over = True
                return answer
            return await _whole(inbox, writer)
        finally:
            if not handed_over:
                answer.end()

    async def _body(self, request: Any) -> bytes:
        limits = self._options.limits
        body, size = bytearray(), 0
        try:
            async with asyncio.timeout(limits.body_seconds):
                # What is too large is read on a little, and dropped: a client that is still sending would not see the answer.
                async for part in request.stream():
                    size += len(part)
                    if size > limits.body_bytes + _READ_ON:
                        break
                    if size <= limits.body_bytes:
                        body += part
        except TimeoutError:
            raise Refusal(408, f"the body did not arrive within {limits.body_seconds:g} s", code="body_timeout") from None
        if size > limits.body_bytes:
            message = f"the body is larger than {limits.body_bytes} bytes"
            raise Refusal(413, message, code="body_too_large", headers={"Connection": "close"})
        return bytes(body)


class _Stream:
    """A response that grows: server-sent events as the pieces come."""

    media_type, status_code = _STREAM, 200

    def __init__(self, routes: _Routes, request: Any, job: Job, inbox: Inbox, writer: AnswerWriter, watcher: Any) -> None:
        self._routes, self._request, self._job = routes, request, job
        self._inbox, self._writer, self._watcher = inbox, writer, watcher
        self.first: list[Piece | Failed | Gone] = []

    def end(self) -> None:
        """The engine need not go on; it does nothing when it has ended."""
        self._watcher.cancel()
        self._routes.engine.cancel(self._job)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the events; whatever happens, the request is counted and its places are freed."""
        status = 499  # until it ends otherwise
        try:
            await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
            chunks, pieces = self._writer.first_chunks(), self.first
            while (ended := self._write(pieces, chunks)) is None:
                if chunks:
                    await send({"type": "http.response.body", "body": b"".join(chunks), "more_body": True})
                chunks, pieces = [], await self._inbox.take()
            status = ended
            await send({"type": "http.response.body", "body": b"".join(chunks), "more_body": False})
        finally:
            self.end()
            seconds = time.monotonic() - self._request.state.start
            self._routes.counters.count_request(self._request.url.path, status, seconds)

    def _write(self, pieces: "list[Piece | Failed | Gone]", chunks: list[bytes]) -> int | None:
        """Put the events of pieces behind `chunks`; the status with which the stream has now ended, None while it goes on."""
        for piece in pieces:
            if isinstance(piece, Gone):
                return 499
            if isinstance(piece, Failed):
                chunks.append(event(piece.refusal.body()))
                return piece.refusal.status
            self._writer.add(piece)
            if shown := self._writer.chunk(piece):
                chunks.append(shown)
        if self._writer.open:
            return None
        chunks += self._writer.last_chunks()
        return 200


async def _whole(inbox: Inbox, writer: AnswerWriter) -> Any:
    """The response to a request without streaming, when all its answers have ended."""
    from starlette.responses import JSONResponse

    while writer.open:
        pieces = await inbox.take()
        _raise_refusal(pieces)
        for piece in pieces:
            if isinstance(piece, Piece):
                writer.add(piece)
    return JSONResponse(writer.whole())


def _raise_refusal(pieces: "list[Piece | Failed | Gone]") -> None:
    for piece in pieces:
        if isinstance(piece, Failed):
            raise piece.refusal
        if isinstance(piece, Gone):
            raise Refusal(499, "the client closed the connection")


async def _tell_when_gone(request: Any, inbox: Inbox) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    inbox.put_here(Gone())
