"""Start the server on a model, ask it one question with the OpenAI client, print the answer, stop the server.

python examples/laptop_assistant/ask.py --model demo/assistant/hf_ckpt "What does abc.abstractmethod do?"
"""

import argparse
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from megatron_llm.utils.errors import UserError, run_command
from megatron_llm.utils.optional import require

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 120.0  # seconds until the server must answer


def wait_for(server: "subprocess.Popen[bytes]", url: str) -> None:
    """Return when the server is healthy; UserError when it ends or takes too long."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise UserError(f"the server ended with status {server.returncode} before it answered: see what it printed above")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:  # refused, reset, or (on a busy machine) no answer within the five seconds
            time.sleep(0.3)
    raise UserError(f"the server did not answer at {url} within {PATIENCE:.0f} seconds")


def main() -> None:
    """Serve, ask, stop."""
    parser = argparse.ArgumentParser(description="Ask a model through its server. Example: --model demo/assistant/hf_ckpt 'Hello?'")
    parser.add_argument("question")
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--port", type=int, default=8411, help="port of the server (default: 8411)")
    options = parser.parse_args()
    openai = require("openai", purpose="asking the server")
    command = ["sh", str(ROOT / "run_deploy.sh")]
    environment = {**os.environ, "MODEL": str(options.model), "NAME": "assistant", "PORT": str(options.port), "DEVICE": "cpu"}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        wait_for(server, f"http://127.0.0.1:{options.port}/health")
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{options.port}/v1", api_key=os.environ.get("API_KEY", "none"))
        answer = client.chat.completions.create(
            model="assistant", messages=[{"role": "user", "content": options.question}], temperature=0, max_tokens=64
        )
        print(f"> {options.question}\n{answer.choices[0].message.content}")
        print(f"({answer.usage.completion_tokens} tokens, finish reason {answer.choices[0].finish_reason})", file=sys.stderr)
    finally:
        server.terminate()
        server.wait(timeout=60)


if __name__ == "__main__":
    run_command(main)
