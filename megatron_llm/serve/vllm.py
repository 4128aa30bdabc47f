"""vLLM as the engine: its command line from our options, its process, and our chat page beside it.

vLLM has its own OpenAI-style server, which listens on the port that was asked for; the page is on the next one. The key is
handed over in the environment, where other users of the machine cannot read it.
"""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_llm.convert.model_folders import Folders, hf_folders
from megatron_llm.serve.app import add_errors
from megatron_llm.serve.options import ServeOptions
from megatron_llm.serve.pages import add_page
from megatron_llm.serve.server import HttpServer, bind, to_stderr, url_of
from megatron_llm.utils.errors import UserError
from megatron_llm.utils.optional import require


def choose_engine(options: ServeOptions, report: Callable[[str], None] = to_stderr) -> str:
    """`vllm` or `transformers`; `auto` takes vLLM where it and a GPU are present. UserError for one that cannot run here."""
    program = vllm_program()
    if options.engine == "vllm" and program is None:
        raise UserError(
            "--engine vllm needs vLLM, which is neither in this environment nor on the PATH: install it, or give --engine transformers"
        )
    if options.engine != "auto":
        return options.engine
    import torch

    if program is None or not torch.cuda.is_available() or options.source.device == "cpu":
        why = "vLLM is not installed" if program is None else "no GPU is used"
        report(f"engine: transformers ({why})")
        return "transformers"
    report("engine: vLLM")
    return "vllm"


def vllm_program() -> str | None:
    """Path of the program `vllm`: of this environment first, then of the PATH; None when there is none."""
    return shutil.which("vllm", path=str(Path(sys.executable).parent)) or shutil.which("vllm")


def vllm_command(program: str, options: ServeOptions, folders: Folders) -> list[str]:
    """The command that starts vLLM's server. UserError for what it cannot do: several adapters on top of each other."""
    if len(folders.adapters) > 1:
        raise UserError("vLLM does not stack adapters: merge them into the model first with merge.sh, and serve the result")
    source, limits = options.source, options.limits
    command = [program, "serve", str(folders.weights), "--host", options.host, "--port", str(options.port)]
    command += ["--tokenizer", str(folders.tokenizer), "--max-num-seqs", str(limits.running)]
    if folders.adapters:
        name = f"{source.served_name}-base"
        command += ["--served-model-name", name, "--enable-lora", "--lora-modules", f"{source.served_name}={folders.adapters[0]}"]
    else:
        command += ["--served-model-name", source.served_name]
    if source.dtype != "auto":
        command += ["--dtype", source.dtype]
    if source.quantize == "int4":
        command += ["--quantization", "bitsandbytes"]
    elif source.quantize == "int8":
        raise UserError("vLLM has no int8 by bitsandbytes: give --quantize int4, a folder quantized to 8 bits, or --engine transformers")
    if limits.prompt_tokens is not None:
        command += ["--max-model-len", str(limits.prompt_tokens + limits.new_tokens)]
    if source.chat_template is not None:
        command += ["--chat-template", str(source.chat_template)]
    return command


def vllm_environment(options: ServeOptions) -> dict[str, str]:
    """The environment of vLLM's process: nothing is reported to others, and the key."""
    key = {} if options.api_key is None else {"VLLM_API_KEY": options.api_key}
    return {**os.environ, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", **key}


def serve_with_vllm(options: ServeOptions, report: Callable[[str], None] = to_stderr) -> None:
    """Run vLLM and the chat page until a SIGTERM, or until vLLM ends. UserError when it ends with an error."""
    program = vllm_program()
    if program is None:
        raise UserError("vLLM is not installed in this environment nor on the PATH")
    bind(options.host, options.port).close()  # a port in use is told now
    source = options.source
    with (
        bind(options.host, options.port + 1 if options.port else 0) as bound,
        hf_folders(source.model, source.adapters, report) as folders,
    ):
        command = vllm_command(program, options, folders)
        report("starting " + " ".join(command))
        with subprocess.Popen(command, env=vllm_environment(options)) as child:
            status = asyncio.run(_beside(child, options, bound, report))
    if status not in (0, -signal.SIGTERM, -signal.SIGINT):
        raise UserError(f"vLLM ended with status {status}; its own messages above say why")


async def _beside(child: "subprocess.Popen[bytes]", options: ServeOptions, bound: Any, report: Callable[[str], None]) -> int:
    fastapi = require("fastapi", extra="serve", purpose="the chat page")
    app = fastapi.FastAPI(docs_url=None, redoc_url=None)
    own = f"http://{options.host}:{options.port}/v1"
    add_page(app, options, own=True, own_url=own)
    add_errors(app)
    http = HttpServer(app, bound, 1.0, lambda: None)
    page = asyncio.ensure_future(
        http.serve(signals=True, ready=lambda: report(f"vLLM will answer at {own}; chat page at {url_of(bound)}/"))
    )
    while child.poll() is None and not page.done():
        await asyncio.sleep(0.1)
    http.stop()
    if child.poll() is None:
        child.terminate()
    try:
        status = await asyncio.to_thread(child.wait, options.shutdown_seconds + 10)
    except subprocess.TimeoutExpired:
        report("vLLM did not end in time and is killed")
        child.kill()
        status = await asyncio.to_thread(child.wait)
    await page
    return status
