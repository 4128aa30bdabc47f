"""`--check`: does a model that was just trained really serve? The server is started, asked, and every answer must end."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from megatron_llm.convert.model_folders import hf_folders
from megatron_llm.serve.client import Client, Ending
from megatron_llm.serve.options import ServeOptions
from megatron_llm.serve.server import bind, running_server, to_stderr, url_of
from megatron_llm.serve.vllm import choose_engine, vllm_command, vllm_environment, vllm_program
from megatron_llm.utils.errors import UserError

QUESTIONS = ("What can you do?", "Say hello.", "What is a list in Python?")
_START_SECONDS = 600.0


def check(options: ServeOptions, *, tokens: int, questions: tuple[str, ...] = QUESTIONS, report: Callable[[str], None] = to_stderr) -> None:
    """Ask each question greedily; UserError when the template is missing, an answer is empty, or one has no end within `tokens`."""
    if tokens > options.limits.new_tokens:
        raise UserError(f"--check-tokens is {tokens}, but the server generates at most --max-new-tokens {options.limits.new_tokens}")
    engine = choose_engine(options, report)
    with (_vllm if engine == "vllm" else _embedded)(replace(options, port=0, host="127.0.0.1"), report) as url:
        client = Client(f"{url}/v1", options.api_key, timeout=options.limits.seconds)
        card = next((card for card in client.models() if card["id"] == options.source.served_name), None)
        if card is None:
            raise UserError(f"the server does not list the model '{options.source.served_name}'")
        if card.get("chat") is False:
            raise UserError(
                f"{options.source.model} has no chat template, so it cannot chat: train it with one, or give --chat-template FILE"
            )
        if (context := card.get("max_model_len")) and tokens > context // 2:
            tokens = context // 2
            report(f"the model's context is {context} tokens, so an answer must end within {tokens}")
        for question in questions:
            _ask(client, options.source.served_name, question, tokens, report)
    report(f"check passed: {len(questions)} questions, every answer ended by itself within {tokens} tokens")


def _ask(client: Client, model: str, question: str, tokens: int, report: Callable[[str], None]) -> None:
    ending = Ending()
    messages = [{"role": "user", "content": question}]
    text = "".join(client.chat(model, messages, ending, max_tokens=tokens, temperature=0.0))
    report(f"  {question!r} -> {text!r} ({ending.usage.get('completion_tokens', '?')} tokens, {ending.reason})")
    if ending.reason != "stop":
        raise UserError(
            f"the answer to {question!r} did not end within {tokens} tokens ({ending.reason}): "
            "was the end-of-turn token trained, and is it the tokenizer's or the template's?"
        )
    if not text.strip():
        raise UserError(f"the answer to {question!r} is empty: the model ends its turn at once")


@contextmanager
def _embedded(options: ServeOptions, report: Callable[[str], None]) -> Iterator[str]:
    with running_server(options, report) as (url, _):
        yield url


@contextmanager
def _vllm(options: ServeOptions, report: Callable[[str], None]) -> Iterator[str]:
    program = vllm_program()
    assert program is not None  # choose_engine looked
    with bind(options.host, 0) as bound:
        port = bound.getsockname()[1]
        url = url_of(bound)
    with hf_folders(options.source.model, options.source.adapters, report) as folders:
        command = vllm_command(program, replace(options, port=port), folders)
        with subprocess.Popen(command, env=vllm_environment(options), stdout=2 if os.isatty(2) else subprocess.DEVNULL) as child:
            try:
                _wait_for(Client(f"{url}/v1", options.api_key), child)
                yield url
            finally:
                child.terminate()


def _wait_for(client: Client, child: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + _START_SECONDS
    while True:
        try:
            client.models()
            return
        except UserError:
            if child.poll() is not None:
                raise UserError(f"vLLM ended with status {child.returncode} before it answered") from None
            if time.monotonic() > end:
                raise UserError(f"vLLM did not answer within {_START_SECONDS:g} s") from None
        time.sleep(0.5)
