"""The server through OpenAI's own client and through plain HTTP: answers, streams, limits, errors, an orderly end."""

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from megatron_llm.serve.options import Limits, ModelOptions, ServeOptions
from megatron_llm.serve.server import bind, running_server
from megatron_llm.utils.errors import UserError
from tests.rules.sources import ROOT
from tests.unit.serve.small_models import DIALOGUES

pytest.importorskip("fastapi", reason="the server needs the extra serve")


def ask(url: str, path: str, body: Any = None, key: str | None = "secret", method: str = "POST", **headers: str) -> tuple[int, Any]:
    """Status and JSON of a plain request; `body` is sent as it is when it is bytes."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    data = body if isinstance(body, bytes) else json.dumps(body)
    connection.request(method, path, data, headers | ({"Authorization": f"Bearer {key}"} if key else {}))
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, json.loads(content) if content.startswith(b"{") else content


def client(url: str, key: str = "secret") -> Any:
    """OpenAI's client, which gives up at the first error."""
    openai = pytest.importorskip("openai", reason="openai's client is not installed")
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0)


@pytest.mark.parametrize(("question", "answer"), DIALOGUES)
def test_a_chat_answers_and_ends(server: str, question: str, answer: str) -> None:
    found = client(server).chat.completions.create(model="taught", messages=[{"role": "user", "content": question}], temperature=0)
    assert (found.choices[0].message.content, found.choices[0].finish_reason) == (answer, "stop")
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens


def test_a_stream_makes_up_the_whole(server: str) -> None:
    question, answer = DIALOGUES[1]
    messages = [{"role": "user", "content": question}]
    settings = {"model": "taught", "messages": messages, "temperature": 0}
    chunks = list(client(server).chat.completions.create(stream=True, stream_options={"include_usage": True}, **settings))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == answer
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage == client(server).chat.completions.create(**settings).usage


def test_completions_with_stop_n_logprobs_and_ids(server: str) -> None:
    openai = client(server)
    prompt = "<|im_start|>user\nSay hello.<|im_end|>\n<|im_start|>assistant\n"
    found = openai.completions.create(model="taught", prompt=prompt, temperature=0, n=2, logprobs=3, stop=["and"], max_tokens=50)
    assert [choice.text for choice in found.choices] == ["Hello! caf\u00e9 \u4e2d\u6587 "] * 2
    assert {choice.finish_reason for choice in found.choices} == {"stop"}
    logprobs = found.choices[0].logprobs
    assert logprobs.tokens[:2] == ["H", "e"] and len(logprobs.top_logprobs[0]) == 3
    assert logprobs.top_logprobs[0]["H"] == logprobs.token_logprobs[0] > -0.5
    short = openai.completions.create(model="taught", prompt=[[5, 6], [7, 8, 9]], max_tokens=3, extra_body={"top_k": 1, "ignore_eos": True})
    assert [choice.index for choice in short.choices] == [0, 1] and short.usage.prompt_tokens == 5
    assert {choice.finish_reason for choice in short.choices} == {"length"} and short.usage.completion_tokens == 6


def test_seeds_and_parameters_change_the_answer(server: str) -> None:
    def text(**settings: Any) -> str:
        body = {"model": "taught", "prompt": "the", "max_tokens": 30, "temperature": 2.0, "ignore_eos": True, **settings}
        status, found = ask(server, "/v1/completions", body)
        assert status == 200, found
        return str(found["choices"][0]["text"])

    assert text(seed=1) == text(seed=1) != text(seed=2)
    assert text(seed=1, top_k=1) == text(seed=2, top_k=1) == text(seed=3, temperature=0) == text(seed=4, top_p=0.0)


def test_chat_logprobs(server: str) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "Say hello."}]}]
    settings = {"model": "taught", "messages": messages, "temperature": 0, "logprobs": True, "top_logprobs": 2, "max_completion_tokens": 4}
    content = client(server).chat.completions.create(**settings).choices[0].logprobs.content
    streamed = [part.choices[0].logprobs for part in client(server).chat.completions.create(stream=True, **settings) if part.choices]
    assert [entry.token for entry in content] == [entry.token for part in streamed if part for entry in part.content]
    assert len(content) == 4 and content[0].top_logprobs[0].token == content[0].token == "H" and content[0].bytes == [72]


@pytest.mark.parametrize(
    ("status", "word", "change"),
    [
        (400, "messages must be a list", {"messages": "hello"}),
        (400, "messages[0].role is 'robot'", {"messages": [{"role": "robot", "content": "x"}]}),
        (400, "messages[0].content must be", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        (400, "temperature is a text", {"temperature": "hot"}),
        (400, "temperature is -1, but it must be from 0", {"temperature": -1}),
        (400, "top_p is 1.5", {"top_p": 1.5}),
        (400, "n is 99", {"n": 99}),
        (400, "max_tokens is 101, but at most 100", {"max_tokens": 101}),
        (400, "max_tokens is 0", {"max_tokens": 0}),
        (400, "max_token is no field of this request; did you mean 'max_tokens'?", {"max_token": 3}),
        (400, "tools are not supported", {"tools": [{"type": "function"}]}),
        (400, "only text is produced", {"response_format": {"type": "json_object"}}),
        (400, "stream_options must be an object, and goes only with stream", {"stream_options": {"include_usage": True}}),
        (400, "stop must be a text", {"stop": [""]}),
        (400, "logit_bias names a token id outside", {"logit_bias": {"99999": 1}}),
        (400, "half of a surrogate pair", {"messages": [{"role": "user", "content": "\ud800"}]}),
        (400, "the prompt has", {"messages": [{"role": "user", "content": "cat mat hat " * 60}]}),
        (400, "model is missing", {"model": None}),
        (404, "'other' is not served here, only 'taught'", {"model": "other"}),
    ],
)
def test_wrong_requests_are_told(server: str, status: int, word: str, change: dict[str, Any]) -> None:
    body = {"model": "taught", "messages": [{"role": "user", "content": "Say hello."}], **change}
    found, content = ask(server, "/v1/chat/completions", body)
    assert found == status and word in content["error"]["message"], content
    assert set(content["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("status", "path", "body", "key", "method"),
    [
        (401, "/v1/completions", b"{}", None, "POST"),
        (401, "/v1/chat/completions", b"{}", "other", "POST"),
        (401, "/v1/models", b"", None, "GET"),
        (400, "/v1/completions", b"{nothing", "secret", "POST"),
        (400, "/v1/completions", b"[1]", "secret", "POST"),
        (400, "/v1/completions", b"[" * 19_000, "secret", "POST"),
        (400, "/v1/completions", b'{"model": "taught", "prompt": "x", "temperature": NaN}', "secret", "POST"),
        (400, "/v1/completions", b'{"model": "taught", "prompt": []}', "secret", "POST"),
        (400, "/v1/completions", b'{"model": "taught", "prompt": [99999]}', "secret", "POST"),
        (400, "/v1/completions", b'{"model": "taught", "prompt": "x", "echo": true}', "secret", "POST"),
        (413, "/v1/completions", b"x" * 20_001, "secret", "POST"),
        (405, "/v1/completions", b"", "secret", "GET"),
        (404, "/v1/nothing", b"{}", "secret", "POST"),
        (404, "/v1/models/other", b"", "secret", "GET"),
    ],
)
def test_statuses(server: str, status: int, path: str, body: bytes, key: str | None, method: str) -> None:
    found, content = ask(server, path, body, key, method)
    assert found == status and content["error"]["message"], content


def test_a_body_of_unknown_length_is_cut_off_too(server: str) -> None:
    parts = urlsplit(server)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    chunks = (b"x" * 5000 for _ in range(5))
    connection.request("POST", "/v1/completions", chunks, {"Authorization": "Bearer secret"}, encode_chunked=True)
    assert connection.getresponse().status == 413


def test_a_body_that_does_not_come_is_given_up(untemplated: Path) -> None:
    options = ServeOptions(ModelOptions(untemplated), port=0, limits=Limits(body_seconds=0.3), shutdown_seconds=0.1)
    with running_server(options, lambda line: None) as (url, _):
        parts = urlsplit(url)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
        connection.request("POST", "/v1/completions", headers={"Content-Length": "10"})
        response = connection.getresponse()
        assert response.status == 408 and json.loads(response.read())["error"]["code"] == "body_timeout"


def test_models_health_and_metrics(server: str) -> None:
    assert [model.id for model in client(server).models.list()] == ["taught"]
    assert client(server).models.retrieve("taught").id == "taught"
    assert ask(server, "/health", b"", None, "GET") == (200, {"status": "ok"})
    status, text = ask(server, "/metrics", b"", None, "GET")
    lines = dict(line.rsplit(" ", 1) for line in text.decode().splitlines() if not line.startswith("#"))
    assert status == 200 and float(lines["megatron_llm_generated_tokens_total"]) > 0
    assert float(lines['megatron_llm_requests_total{route="/v1/models",status="200"}']) >= 2
    assert lines["megatron_llm_request_seconds_count"] == lines['megatron_llm_request_seconds_bucket{le="+Inf"}']


def test_pages_of_this_machine_may_ask_and_others_may_not(server: str) -> None:
    parts = urlsplit(server)
    for origin, allowed in (("http://localhost:9999", True), ("https://example.org", False)):
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
        connection.request("OPTIONS", "/v1/models", headers={"Origin": origin, "Access-Control-Request-Method": "GET"})
        response = connection.getresponse()
        response.read()
        assert (response.getheader("access-control-allow-origin") == origin) is allowed


@contextmanager
def endless(folder: Path, **settings: Any) -> Iterator[tuple[str, Any]]:
    """A server over a model that rambles on, with one place."""
    limits = Limits(new_tokens=200, running=1, waiting=1, seconds=60)
    options = ServeOptions(ModelOptions(folder), port=0, limits=limits, shutdown_seconds=0.1)
    with running_server(options, lambda line: None) as found:
        yield found


SLOW = {"model": "rambling", "prompt": "the cat", "max_tokens": 200, "ignore_eos": True}


def test_a_client_that_leaves_frees_its_place(rambling: Path, monkeypatch: Any) -> None:
    from megatron_llm.serve.language_model import LanguageModel

    sound = LanguageModel.forward
    monkeypatch.setattr(LanguageModel, "forward", lambda *arguments: (time.sleep(0.03), sound(*arguments))[1])
    with endless(rambling) as (url, engine):
        for stream in (True, False):
            parts = urlsplit(url)
            connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
            connection.request("POST", "/v1/completions", json.dumps({**SLOW, "stream": stream}))
            if stream:
                connection.getresponse().readline()
            wait_for(lambda: engine._active == 1)
            assert connection.sock is not None
            connection.sock.shutdown(socket.SHUT_RDWR)
            connection.close()
            begin = time.monotonic()
            wait_for(lambda: engine._active == 0)
            assert time.monotonic() - begin < 3  # the whole answer takes 6 seconds
        metrics = engine.metrics.text()
        assert 'route="/v1/completions",status="499"} 2' in metrics


def wait_for(condition: Any, seconds: float = 20) -> None:
    """Until it is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def test_a_full_queue_is_429_and_streams_share_the_time(rambling: Path) -> None:
    with endless(rambling) as (url, engine):
        streams = []
        for _ in range(2):
            parts = urlsplit(url)
            connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
            connection.request("POST", "/v1/completions", json.dumps({**SLOW, "stream": True}))
            streams.append(connection)
            wait_for(lambda: engine._active + engine._pending() == len(streams) or engine.metrics.text().count('status="200"'))
        statuses = [ask(url, "/v1/completions", SLOW, None)[0] for _ in range(2)]
        assert set(statuses) <= {200, 429}
        for connection in streams:
            assert connection.getresponse().read().endswith(b"data: [DONE]\n\n")


def test_without_a_template_there_is_no_chat(untemplated: Path) -> None:
    options = ServeOptions(ModelOptions(untemplated), port=0, shutdown_seconds=0.1)
    with running_server(options, lambda line: None) as (url, _):
        status, found = ask(url, "/v1/chat/completions", {"model": "base", "messages": [{"role": "user", "content": "x"}]}, None)
        assert status == 400 and "has no chat template: use /v1/completions" in found["error"]["message"]
        assert ask(url, "/v1/completions", {"model": "base", "prompt": "x"}, None)[0] == 200
        assert ask(url, "/v1/models", b"", None, "GET")[1]["data"][0]["chat"] is False


def test_a_port_in_use_is_one_sentence() -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1 port {port}: address already in use; choose another --port"):
            bind("127.0.0.1", port)
    with pytest.raises(UserError, match="--host no.such.host.invalid is no address"):
        bind("no.such.host.invalid", 1)


def test_what_is_written_is_sent_at_once() -> None:
    """A connection that asyncio accepts from our socket does not hold small packets back."""

    async def option() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            found.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with bind("127.0.0.1", 0) as bound:
            async with await asyncio.start_server(accepted, sock=bound):
                _, writer = await asyncio.open_connection(*bound.getsockname())
                writer.close()
                return await asyncio.wait_for(found, 20)

    assert asyncio.run(option()) != 0


def test_sigterm_lets_a_stream_end_and_leaves_with_0(rambling: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "serve.py"), "--model", str(rambling), "--port", "0", "--engine", "transformers"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert child.stderr is not None
    url = next(line for line in child.stderr if line.startswith("ready: ")).split()[1].removesuffix("/v1")
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    connection.request("POST", "/v1/completions", json.dumps({**SLOW, "stream": True}))
    response = connection.getresponse()
    assert response.readline().startswith(b"data: ")
    child.send_signal(signal.SIGTERM)
    assert response.read().endswith(b"data: [DONE]\n\n")
    assert child.wait(30) == 0
    assert "the server has stopped" in child.stderr.read()


def test_a_stream_that_outlasts_the_shutdown_is_told(rambling: Path, monkeypatch: Any) -> None:
    from megatron_llm.serve.language_model import LanguageModel

    sound = LanguageModel.forward
    monkeypatch.setattr(LanguageModel, "forward", lambda *arguments: (time.sleep(0.05), sound(*arguments))[1])
    with endless(rambling) as (url, engine):
        parts = urlsplit(url)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
        connection.request("POST", "/v1/completions", json.dumps({**SLOW, "stream": True}))
        response = connection.getresponse()
        response.readline()
        engine.close()
        assert "shutting down" in json.loads(response.read().strip().splitlines()[-1][6:])["error"]["message"]
        status, _ = ask(url, "/v1/completions", SLOW, None)
        assert status == 503 and ask(url, "/health", b"", None, "GET")[0] == 503
