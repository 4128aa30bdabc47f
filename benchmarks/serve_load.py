"""Load on the server: many requests over many connections, one in five of them wrong, each answer looked at.

Example: python benchmarks/serve_load.py --requests 2000 --connections 32 --peer --peer-flag=--continuous-batching

Prints status codes against the expected ones, throughput, percentiles of the latency and the server's memory over time, and
leaves with status 1 when a code is not the expected one, a stream has no end, or memory grows. With `--peer` the good requests
alone then go to our server and to `transformers serve` over the same model, in turn, `--rounds` times.
"""

import argparse
import http.client
import json
import os
import queue
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_llm.utils.progress import Progress

ROOT = Path(__file__).resolve().parents[1]
KEY = "load-test-key"
BODY_LIMIT = 1 << 16
SHARES, LATENCIES = (50, 90, 99), ("latency", "first_line", "first_text")
RATES = ("requests_per_second", "tokens_per_second", "tokens_per_processor_second")
WORDS = ("list", "holds", "items", "in", "order", "tuple", "cannot", "change", "once", "it", "is", "made", "use", "where", "moves")


@dataclass(frozen=True)
class Request:
    """One request and the status that must come back."""

    kind: str
    method: str
    path: str
    body: bytes
    status: int
    key: str | None = KEY


@dataclass(frozen=True)
class Outcome:
    """What came back: status, seconds, seconds to the first line of a stream and to its first text, tokens, and what is wrong."""

    request: Request
    status: int
    seconds: float
    first: float
    text: float
    tokens: int
    problem: str | None


def good_request(rng: random.Random, model: str) -> Request:
    """A completion or chat of 16 to 48 tokens, streamed or not."""
    text, body = " ".join(rng.choices(WORDS, k=rng.randint(3, 40))), {"model": model, "max_tokens": rng.randint(16, 48)}
    body |= {"temperature": rng.choice([0, 0.8]), "seed": rng.randint(0, 99)}
    chat, body["stream"] = rng.random() < 0.5, rng.random() < 0.5
    if body["stream"]:
        body["stream_options"] = {"include_usage": True}
    body |= {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    return Request(f"{'chat' if chat else 'completion'}{' stream' if body['stream'] else ''}", "POST", path, json.dumps(body).encode(), 200)


def bad_requests(model: str) -> list[Request]:
    """One of each kind of mistake."""
    path = "/v1/completions"
    sound: dict[str, Any] = {"model": model, "prompt": "the list", "max_tokens": 4}

    def post(kind: str, status: int, change: dict[str, Any], key: str | None = KEY) -> Request:
        return Request(kind, "POST", path, json.dumps(sound | change).encode(), status, key)

    return [
        Request("broken JSON", "POST", path, b'{"model": "x", "prompt": ', 400),
        Request("not an object", "POST", path, b"[1, 2]", 400),
        Request("nested too deep", "POST", path, b"[" * 30000, 400),
        Request("body too large", "POST", path, b"x" * (BODY_LIMIT + 1), 413),
        post("prompt too long", 400, {"prompt": "the list " * 2000}),
        post("too many tokens", 400, {"max_tokens": 10**6}),
        post("no key", 401, {}, None),
        post("wrong key", 401, {}, "another"),
        post("unknown model", 404, {"model": "no-such-model"}),
        post("unknown field", 400, {"max_token": 3}),
        post("wrong type", 400, {"temperature": "warm"}),
        post("half a character", 400, {"prompt": "\ud800"}),
        Request("wrong method", "GET", path, b"", 405),
        Request("unknown path", "POST", "/v1/nothing", b"{}", 404),
    ]


def plan(count: int, model: str, seed: int) -> list[Request]:
    """`count` requests in random order, every fifth of them wrong."""
    rng = random.Random(seed)
    wrong = bad_requests(model)
    requests = [wrong[number // 5 % len(wrong)] if number % 5 == 0 else good_request(rng, model) for number in range(count)]
    rng.shuffle(requests)
    return requests


def send(connection: http.client.HTTPConnection, request: Request) -> Outcome:
    """Send one request over a connection that is kept, and read its answer to the end."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {request.key}"} if request.key else {})
    begin = time.perf_counter()
    try:
        connection.request(request.method, request.path, request.body, headers)
        response = connection.getresponse()
        content, first, text = response.readline(), time.perf_counter() - begin, 0.0
        if request.kind.endswith("stream") and response.status == 200:
            line = content
            while line and not shows_text(line):
                line = response.readline()
                content += line
            text = time.perf_counter() - begin
        content += response.read()
    except (OSError, ValueError, http.client.HTTPException) as error:
        connection.close()
        return Outcome(request, 0, time.perf_counter() - begin, 0.0, 0.0, 0, f"no answer: {error!r}")
    seconds = time.perf_counter() - begin
    try:
        tokens, problem = judge(request, response.status, content)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        tokens, problem = 0, f"the answer lacks something ({error!r}): {content[-200:]!r}"
    return Outcome(request, response.status, seconds, first, text, tokens, problem)


def shows_text(line: bytes) -> bool:
    """Whether a line of a stream holds a piece of the answer, and not only its role or end. ValueError for no JSON."""
    if not line.startswith(b"data: {"):
        return False
    return any(choice.get("text") or choice.get("delta", {}).get("content") for choice in json.loads(line[6:]).get("choices", []))


def judge(request: Request, status: int, content: bytes) -> tuple[int, str | None]:
    """Tokens of an answer, and what is wrong with it."""
    if status != request.status:
        return 0, f"status {status}, expected {request.status}: {content[:200]!r}"
    if status != 200:
        return 0, None if json.loads(content)["error"]["message"] else "an error without a message"
    if not request.kind.endswith("stream"):
        answer = json.loads(content)
        reason = answer["choices"][0]["finish_reason"]
        return answer["usage"]["completion_tokens"], None if reason in ("stop", "length") else "no finish_reason"
    lines = [line[6:] for line in content.splitlines() if line.startswith(b"data: ")]
    chunks = [json.loads(line) for line in lines if line != b"[DONE]"]
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"] if choice.get("finish_reason")]
    usage = next((chunk["usage"] for chunk in reversed(chunks) if chunk.get("usage")), None)
    whole = len(reasons) == 1 and usage
    return (usage or {}).get("completion_tokens", 0), None if whole else f"a stream without its end: {content[-200:]!r}"


def drive(port: int, requests: list[Request], connections: int, watch: "Watch") -> tuple[list[Outcome], float]:
    """Send all requests over so many connections at once; outcomes, and the seconds until the last has come."""
    work: queue.SimpleQueue[Request] = queue.SimpleQueue()
    for request in requests:
        work.put(request)
    outcomes, ends = list[Outcome](), list[float]()

    def run() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        with suppress(queue.Empty):
            while True:
                outcomes.append(send(connection, work.get_nowait()))
        ends.append(time.perf_counter())
        connection.close()

    begin = time.perf_counter()
    threads = [threading.Thread(target=run) for _ in range(connections)]
    for thread in threads:
        thread.start()
    with Progress("requests", len(requests)) as progress:
        while any(thread.is_alive() for thread in threads):
            threads[0].join(0.5) if threads[0].is_alive() else time.sleep(0.1)
            progress.update(len(outcomes))
            watch.sample(len(outcomes))
    if len(outcomes) != len(requests):
        raise RuntimeError(f"{len(requests)} requests were to be sent, and {len(outcomes)} were")
    return outcomes, max(ends) - begin


class Watch:
    """A process from outside: resident memory over the number of requests answered, and seconds of processor."""

    def __init__(self, pid: int) -> None:
        self._folder = Path(f"/proc/{pid}")
        self.samples: list[tuple[int, float]] = []
        self._begin = self._ticks()

    def _ticks(self) -> int:
        fields = (self._folder / "stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])  # of the user and of the system; counted from the field behind the name

    def processor_seconds(self) -> float:
        """Since this was made, over all threads."""
        return (self._ticks() - self._begin) / os.sysconf("SC_CLK_TCK")

    def sample(self, done: int) -> None:
        """Look at the memory now."""
        pages = int((self._folder / "statm").read_text().split()[1])
        self.samples.append((done, pages * os.sysconf("SC_PAGE_SIZE") / 1e6))

    def growth(self) -> tuple[float, float]:
        """MB when a third of the requests were answered, and at the end."""
        return next(size for done, size in self.samples if done >= self.samples[-1][0] / 3), self.samples[-1][1]


def describe(name: str, outcomes: list[Outcome], seconds: float, watch: Watch) -> dict[str, Any]:
    """Print and return throughput and latency of the good requests, and the codes of all."""
    good = [outcome for outcome in outcomes if outcome.request.status == 200 and outcome.problem is None]
    streams = [outcome for outcome in good if outcome.request.kind.endswith("stream")]
    tokens = sum(outcome.tokens for outcome in outcomes)
    result: dict[str, Any] = {
        "requests": len(outcomes),
        "seconds": seconds,
        "requests_per_second": len(outcomes) / seconds,
        "tokens_per_second": tokens / seconds,
        "tokens_per_processor_second": tokens / max(watch.processor_seconds(), 0.01),
        "latency_ms": percentiles([outcome.seconds for outcome in good]),
        "first_line_ms": percentiles([outcome.first for outcome in streams]),
        "first_text_ms": percentiles([outcome.text for outcome in streams]),
        "statuses": dict(sorted(Counter(str(outcome.status) for outcome in outcomes).items())),
        "problems": [f"{outcome.request.kind}: {outcome.problem}" for outcome in outcomes if outcome.problem],
    }
    shown = {key: ", ".join(f"{share} {value:.0f}" for share, value in result[f"{key}_ms"].items()) for key in LATENCIES}
    rates = ", ".join(f"{result[key]:.0f} {key.replace('_per_', ' per ').replace('_', ' ')}" for key in RATES)
    print(f"{name}: {len(outcomes)} requests in {seconds:.1f} s, {rates}")
    print(f"  ms of good requests: {shown['latency']}; of streams to the first line: {shown['first_line']}; text: {shown['first_text']}")
    print(f"  statuses: {result['statuses']}")
    for problem in result["problems"][:5]:
        print(f"  WRONG {problem}")
    return result


def percentiles(seconds: list[float]) -> dict[str, float]:
    """p50, p90 and p99 in milliseconds."""
    values = sorted(seconds)
    return {f"p{share}": 1000 * values[min(len(values) - 1, share * len(values) // 100)] if values else float("nan") for share in SHARES}


def compare(ours: list[dict[str, Any]], peer: list[dict[str, Any]]) -> dict[str, Any]:
    """Print and return the medians over the rounds, and how many times better ours are."""
    pairs = [(key, "") for key in RATES] + [(f"{key}_ms", f"p{share}") for key in LATENCIES for share in SHARES]
    found = {}
    for key, share in pairs:
        mine, other = (statistics.median(one[key][share] if share else one[key] for one in side) for side in (ours, peer))
        ratio = other / mine if share else mine / other
        found[f"{key} {share}".strip()] = {"ours": mine, "peer": other, "times_better": ratio}
        print(f"  {f'{key} {share}':28} ours {mine:8.1f}  peer {other:8.1f}  {ratio:6.2f} times better")
    return found


@contextmanager
def process(command: list[str], port: int, path: str, log: Path, **variables: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A server as a process of its own, from when it answers GET `path`; RuntimeError with its last words when it does not."""
    with log.open("wb") as stream, subprocess.Popen(command, env={**os.environ, **variables}, stdout=stream, stderr=stream) as child:
        try:
            end = time.monotonic() + 180
            while not answers(port, path):
                if child.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"{command[0]} did not start: {log.read_text(errors='replace')[-2000:]}")
                time.sleep(0.2)
            yield child
        finally:
            child.terminate()


def answers(port: int, path: str) -> bool:
    """Whether a server answers on a port of this machine."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as connection, suppress(OSError, http.client.HTTPException):
        connection.request("GET", path)
        return connection.getresponse().status == 200
    return False


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def make_model(folder: Path) -> Path:
    """The folder, with a random LLaMA of 4 layers and width 128, a byte-level tokenizer and a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    settings: dict[str, Any] = {"special_tokens": ["<|end|>", "<|im_start|>"], "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), **settings)
    fast.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}<|im_start|>assistant\n"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict.fromkeys(("num_hidden_layers", "num_attention_heads"), 4)
    sizes |= {"hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 512}
    config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=0, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def our_command(model: Path, port: int, args: argparse.Namespace) -> list[str]:
    """tools/serve.py over the model, with the limit that the mixture expects."""
    command = [sys.executable, str(ROOT / "tools" / "serve.py"), "--model", str(model), "--served-model-name", "m"]
    return [*command, "--engine", "transformers", "--port", str(port), "--max-body-bytes", str(BODY_LIMIT), *args.our_flag]


def run_mixture(model: Path, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Good and wrong requests against our server: every code, memory, and its end."""
    port, requests = free_port(), plan(args.requests, "m", args.seed)
    with process(our_command(model, port, args), port, "/health", folder / "ours.log", API_KEY=KEY) as child:
        drive(port, requests[: args.connections], args.connections, Watch(child.pid))  # so that what is made once has been made
        watch = Watch(child.pid)
        outcomes, seconds = drive(port, requests, args.connections, watch)
        watch.sample(len(outcomes))
        alive = child.poll() is None and answers(port, "/health")
        result = describe("megatron_llm, good and wrong requests", outcomes, seconds, watch)
    before, after = watch.growth()
    print(f"  memory: {before:.0f} MB after a third of the requests, {after:.0f} MB at the end; status after SIGTERM {child.returncode}")
    result |= {"memory_mb": [before, after], "alive": alive, "exit_status": child.returncode}
    if after > before * 1.1 + 10:
        result["problems"].append(f"memory grew from {before:.0f} to {after:.0f} MB")
    if not alive or child.returncode != 0:
        result["problems"].append(f"the server was {'' if alive else 'not '}alive at the end and left with status {child.returncode}")
    return result


def run_good(name: str, command: list[str], port: int, model: str, args: argparse.Namespace, log: Path, **variables: str) -> dict[str, Any]:
    """The good requests of the mixture against a server."""
    requests = [request for request in plan(args.requests, model, args.seed) if request.status == 200]
    with process(command, port, "/health", log, **variables) as child:
        drive(port, requests[: args.connections], args.connections, Watch(child.pid))
        watch = Watch(child.pid)
        outcomes, seconds = drive(port, requests, args.connections, watch)
        return describe(f"{name}, good requests", outcomes, seconds, watch)


def run_both(model: Path, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Our server and `transformers serve` in turn; why not, where the peer cannot be started."""
    program = shutil.which("transformers", path=str(Path(sys.executable).parent)) or shutil.which("transformers")
    if program is None:
        return {"not_run": "the program transformers is not installed"}
    ours, peer = [], []
    for number in range(args.rounds):
        port, log = free_port(), folder / f"ours{number}.log"
        ours.append(run_good("megatron_llm", our_command(model, port, args), port, "m", args, log, API_KEY=KEY))
        port, log = free_port(), folder / f"peer{number}.log"
        command = [program, "serve", str(model), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", *args.peer_flag]
        try:
            peer.append(run_good("transformers serve", command, port, str(model), args, log, HF_HUB_OFFLINE="1"))
        except RuntimeError as error:
            return {"ours": ours, "not_run": str(error)}
    return {"ours": ours, "peer": peer, "medians": compare(ours, peer)}


def main() -> None:
    """Read the flags, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--requests", type=int, default=2000, help="how many (default 2000)")
    parser.add_argument("--connections", type=int, default=32, help="how many at once (default 32)")
    parser.add_argument("--model", type=Path, help="model folder (default: a small random one)")
    parser.add_argument("--our-flag", action="append", default=[], help="further flag of our server, as in --our-flag=--max-running=16")
    parser.add_argument("--peer", action="store_true", help="then compare with `transformers serve` on the good requests alone")
    parser.add_argument("--rounds", type=int, default=1, help="how often to compare, in turn (default 1)")
    parser.add_argument("--peer-flag", action="append", default=[], help="of the peer, as in --peer-flag=--continuous-batching")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = args.model or make_model(folder / "model")
        results = {"ours": run_mixture(model, args, folder)}
        if args.peer:
            results["good"] = run_both(model, args, folder)
            if "not_run" in results["good"]:
                print(f"peer not run: {results['good']['not_run']}")
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=2))
    found = [results["ours"], *results.get("good", {}).get("ours", [])]
    raise SystemExit(1 if any(one["problems"] for one in found) else 0)


if __name__ == "__main__":
    main()
