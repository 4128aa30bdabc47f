"""vLLM as the engine: its command, and the whole start, page and stop with a stand-in that answers as vLLM does."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from megatron_llm.convert.model_folders import Folders
from megatron_llm.serve.options import Limits, ModelOptions, ServeOptions
from megatron_llm.serve.server import bind
from megatron_llm.serve.vllm import choose_engine, vllm_command
from megatron_llm.utils.errors import UserError
from tests.rules.sources import ROOT

pytest.importorskip("fastapi", reason="the server needs the extra serve")
STAND_IN = """#!/bin/sh
echo "$*" >"$CALLED"
[ "$1" = serve ] || exit 3
[ -z "${BROKEN:-}" ] || exit 5
model=$2
while [ "$#" -gt 0 ]; do
    case $1 in --host) host=$2 ;; --port) port=$2 ;; --served-model-name) name=$2 ;; esac
    shift
done
set -- --engine transformers --model "$model" --host "$host" --port "$port" --served-model-name "$name"
API_KEY=$VLLM_API_KEY exec "$PYTHON" "$SERVE" "$@"
"""


def serve(model: Path, folder: Path, *arguments: str, **variables: str) -> "subprocess.Popen[str]":
    """tools/serve.py with a stand-in for vLLM on its PATH."""
    program = folder / "bin" / "vllm"
    program.parent.mkdir(exist_ok=True)
    program.write_text(STAND_IN)
    program.chmod(0o755)
    own = {"CALLED": str(folder / "called"), "PYTHON": sys.executable, "SERVE": str(ROOT / "tools" / "serve.py"), "API_KEY": "secret"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **own, **variables, "PATH": f"{program.parent}:{os.environ['PATH']}"}
    command = [sys.executable, own["SERVE"], "--model", str(model), "--engine", "vllm", *arguments]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def test_the_command() -> None:
    folders = Folders(Path("base"), Path("tok"), (Path("lora"),))
    source = ModelOptions(Path("base"), (Path("lora"),), dtype="bfloat16", quantize="int4")
    options = ServeOptions(
        source, host="0.0.0.0", port=9000, limits=Limits(prompt_tokens=3000, new_tokens=1000, running=8), api_key="secret"
    )
    command = " ".join(vllm_command("vllm", options, folders))
    assert command == (
        "vllm serve base --host 0.0.0.0 --port 9000 --tokenizer tok --max-num-seqs 8 --served-model-name lora-base --enable-lora "
        "--lora-modules lora=lora --dtype bfloat16 --quantization bitsandbytes --max-model-len 4000"
    )
    with pytest.raises(UserError, match=r"merge them into the model first with merge\.sh"):
        vllm_command("vllm", options, Folders(Path("base"), Path("tok"), (Path("a"), Path("b"))))
    with pytest.raises(UserError, match="vLLM has no int8"):
        vllm_command("vllm", ServeOptions(ModelOptions(Path("base"), quantize="int8")), Folders(Path("base"), Path("tok"), ()))


def test_the_engine_without_vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("megatron_llm.serve.vllm.vllm_program", lambda: None)
    said: list[str] = []
    assert choose_engine(ServeOptions(ModelOptions(tmp_path)), said.append) == "transformers"
    assert said == ["engine: transformers (vLLM is not installed)"]
    with pytest.raises(UserError, match="--engine vllm needs vLLM"):
        choose_engine(ServeOptions(ModelOptions(tmp_path), engine="vllm"))


@pytest.mark.slow
def test_start_page_and_stop(taught: Path, tmp_path: Path) -> None:
    with bind("127.0.0.1", 0) as one:
        port = one.getsockname()[1]
    child = serve(taught, tmp_path, "--port", str(port))
    assert child.stderr is not None
    lines = []
    for line in child.stderr:
        lines.append(line)
        ready = any(line.startswith("ready: ") for line in lines)  # said by the stand-in, before or after the page's line
        if ready and any("chat page at" in line for line in lines):
            break
    page = next(line for line in lines if "chat page at" in line).split()[-1]
    assert page == f"http://127.0.0.1:{port + 1}/"
    config = json.loads(urllib.request.urlopen(f"{page}page/config.json", timeout=30).read())
    assert config["endpoints"] == [{"name": "this server", "url": f"http://127.0.0.1:{port}/v1"}] and config["key_needed"]
    assert b"chat.js" in urllib.request.urlopen(page, timeout=30).read()
    request = urllib.request.Request(f"{config['endpoints'][0]['url']}/models", headers={"Authorization": "Bearer secret"})
    assert json.loads(urllib.request.urlopen(request, timeout=30).read())["data"][0]["id"] == "taught"
    assert "secret" not in (tmp_path / "called").read_text()
    child.send_signal(signal.SIGTERM)
    assert child.wait(60) == 0, child.stderr.read()


@pytest.mark.slow
def test_check_asks_vllm_too_and_a_failure_is_told(taught: Path, tmp_path: Path) -> None:
    child = serve(taught, tmp_path, "--check", "--check-tokens", "60")
    _, said = child.communicate(timeout=120)
    assert child.returncode == 0 and "check passed" in said, said
    for arguments in (["--port", "0"], ["--check"]):
        child = serve(taught, tmp_path, *arguments, BROKEN="1")
        _, said = child.communicate(timeout=120)
        assert child.returncode == 1 and said.splitlines()[-1].startswith("error: vLLM ended with status 5"), said
