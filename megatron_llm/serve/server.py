"""Starting, running and stopping a server: the port first, then the model, then requests, and an orderly end.

A port that is in use is told before minutes are spent on loading. After a SIGTERM no new requests are taken, running
answers may finish for `shutdown_seconds`, what is left is told so, and the process ends with status 0.
"""

import asyncio
import gc
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from megatron_llm.convert.model_folders import hf_folders
from megatron_llm.serve.app import build_app
from megatron_llm.serve.engine import Engine
from megatron_llm.serve.language_model import load_language_model
from megatron_llm.serve.metrics import Metrics
from megatron_llm.serve.options import ServeOptions
from megatron_llm.utils.errors import UserError
from megatron_llm.utils.optional import require


def to_stderr(line: str) -> None:
    """Tell a person something."""
    print(line, file=sys.stderr, flush=True)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; UserError when the port is in use, not allowed, or the host is not of this machine."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # The protocol is named, as asyncio switches TCP_NODELAY on only for sockets that tell it. Without it each answer would
        # wait for its head to be acknowledged, which the other side delays by some 40 ms.
        bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    except OSError as error:
        raise UserError(f"--host {host} is no address: {error.strerror or error}") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen(512)
    except OSError as error:
        bound.close()
        raise UserError(
            f"cannot listen on {host} port {port}: {(error.strerror or str(error)).lower()}; choose another --port or --host"
        ) from error
    return bound


def url_of(bound: socket.socket) -> str:
    """`http://host:port` of a socket, as another program on this machine reaches it."""
    host, port = bound.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class HttpServer:
    """uvicorn around an application, on a socket that is bound already. `stop` may be called from any thread or handler."""

    def __init__(self, app: Any, bound: socket.socket, shutdown_seconds: float, at_end: Callable[[], None]) -> None:
        uvicorn = require("uvicorn", extra="serve", purpose="the server")
        # uvicorn closes after its own patience; until then `at_end` has ended what was still running.
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=int(shutdown_seconds) + 5, lifespan="off")
        self._server = uvicorn.Server(config)
        self._server.capture_signals = nullcontext  # signals are handled below, and the exit status is ours
        self._bound, self._patience, self._at_end = bound, shutdown_seconds, at_end
        self._stopping = threading.Event()

    @property
    def started(self) -> bool:
        """Whether requests are answered."""
        return bool(self._server.started)

    def stop(self) -> None:
        """Take no more requests; end the running ones when they had their time. A second call ends them now."""
        self._server.should_exit = True
        if self._stopping.is_set():
            self._server.force_exit = True
        self._stopping.set()

    async def serve(self, *, signals: bool, ready: Callable[[], None]) -> None:
        """Answer requests until `stop`, or until a SIGTERM or SIGINT where `signals` is true."""
        if signals:
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, self.stop)
        watcher = asyncio.ensure_future(self._watch(ready))
        try:
            await self._server.serve(sockets=[self._bound])
        finally:
            watcher.cancel()

    async def _watch(self, ready: Callable[[], None]) -> None:
        while not self._server.started:
            await asyncio.sleep(0.01)
        ready()
        while not self._stopping.is_set():
            await asyncio.sleep(0.05)
        await asyncio.sleep(self._patience)
        await asyncio.to_thread(self._at_end)


@contextmanager
def _loaded(options: ServeOptions, report: Callable[[str], None]) -> Iterator[Engine]:
    created = int(time.time())
    with hf_folders(options.source.model, options.source.adapters, report) as folders:
        model = load_language_model(options.source, folders, report, created)
        model.choose_threads(options.limits.running)
        engine = Engine(model, options.limits, Metrics())
        try:
            yield engine
        finally:
            engine.close()


def serve(options: ServeOptions, report: Callable[[str], None] = to_stderr) -> None:
    """Load the model and answer requests until a SIGTERM or Ctrl-C. UserError for what cannot start."""
    for name in ("fastapi", "uvicorn"):
        require(name, extra="serve", purpose="the server")
    bound = bind(options.host, options.port)
    with bound, _loaded(options, report) as engine:
        http = HttpServer(build_app(engine, options, engine.metrics), bound, options.shutdown_seconds, engine.close)
        gc.collect()
        gc.freeze()  # what has been loaded stays: a collection need not look at it, which would stop all answers
        asyncio.run(http.serve(signals=True, ready=lambda: _announce(options, url_of(bound), report)))
    report("the server has stopped")


def _announce(options: ServeOptions, url: str, report: Callable[[str], None]) -> None:
    key = "with the key in API_KEY" if options.api_key is not None else "without a key (set API_KEY to ask for one)"
    report(f"ready: {url}/v1 for OpenAI clients, model '{options.source.served_name}', {key}; chat page at {url}/")
    if options.api_key is None and options.host not in ("127.0.0.1", "localhost", "::1"):
        report(f"warning: everybody who reaches {options.host} can use this server: set API_KEY")


@contextmanager
def running_server(options: ServeOptions, report: Callable[[str], None] = to_stderr) -> Iterator[tuple[str, Engine]]:
    """The embedded engine's server in a thread of this process; yields its URL and engine, and stops it at the end."""
    bound = bind(options.host, options.port)
    with bound, _loaded(options, report) as engine:
        http = HttpServer(build_app(engine, options, engine.metrics), bound, options.shutdown_seconds, engine.close)
        ready = threading.Event()
        thread = threading.Thread(target=lambda: asyncio.run(http.serve(signals=False, ready=ready.set)), name="server")
        thread.start()
        try:
            while not ready.wait(0.05):
                if not thread.is_alive():
                    raise RuntimeError("the server ended before it answered")
            yield url_of(bound), engine
        finally:
            http.stop()
            http.stop()
            thread.join()
