"""Console, JSONL, TensorBoard, wandb, profiler and their registry."""

import gzip
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_llm.config.fields import updated
from megatron_llm.training.callbacks.base import Callback, CallbackList, EvalMetrics, TrainSummary
from megatron_llm.training.callbacks.console import ConsoleCallback, header, number
from megatron_llm.training.callbacks.jsonl import JsonlCallback, read_log
from megatron_llm.training.callbacks.profiler import ProfilerCallback
from megatron_llm.training.callbacks.registry import build_callbacks
from megatron_llm.utils.errors import UserError
from tests.unit.training.samples import CONFIG, INFO, info, metrics

END = TrainSummary(step=10, finished=True, reason="", seconds=100.0, tokens=10_000)


class Console:
    """A console callback that writes to a list and whose clock moves 2 s a step."""

    def __init__(self, interval: int) -> None:
        self.lines: list[str] = []
        self.now = 0.0
        self.callback = ConsoleCallback(interval, self.lines.append, lambda: self.now)
        self.callback.on_train_start(INFO)
        self.lines.clear()

    def step(self, step: int, **changes: Any) -> None:
        """Take a step."""
        self.now += 2.0
        self.callback.on_step_end(metrics(step, **changes))


def test_header_says_model_layout_batch_steps_and_learning_rate() -> None:
    text = "\n".join(header(INFO))
    assert "llama, 1.23 M parameters in fp32: 4 layers, hidden 256, 4 heads (2 key/value), MLP 704, vocabulary 97" in text
    assert "TP 1 x PP 1 x DP 2 on 2 ranks (cpu, gloo)" in text
    assert "8 sequences x 256 tokens = 2.05 k tokens a step: micro-batch 4 x DP 2 x 1 accumulated" in text
    assert "steps    10, 20.5 k tokens" in text
    assert "lr       0 at step 1, 0.0003 at step 3 (cosine)" in text
    assert "note     numpy index builder" in text
    assert "steps    5 to 10, 12.3 k tokens" in "\n".join(header(info(start_step=4)))


def test_console_prints_first_every_nth_and_last_step() -> None:
    console = Console(interval=4)
    for step in range(1, 11):
        console.step(step)
    assert [line.split("|")[0].strip() for line in console.lines] == ["step  1/10", "step  4/10", "step  8/10", "step 10/10"]


def test_console_line() -> None:
    console = Console(interval=2)
    console.step(1)
    console.step(2, seconds=1.5, tokens=3000, mfu=0.05)
    console.step(3, seconds=0.25)
    console.step(4, seconds=0.75, loss_scale=1024.0, skipped=True)
    assert (
        console.lines[0]
        == "step  1/10 | loss  4.900 | lr 1.00e-03 | grad norm 1.250 | 2 k tokens/s | MFU 25.0 % | 500 ms/step | data wait 2 ms"
    )
    assert console.lines[1].endswith("| 2 k tokens/s | MFU 5.0 % | 1.50 s/step | data wait 2 ms | ETA 16.0 s")
    assert console.lines[2].endswith(
        "| 2 k tokens/s | MFU 25.0 % | 500 ms/step | data wait 2 ms | loss scale 1024 | 1 skipped (overflow) | ETA 12.0 s"
    )


def test_an_unknown_loss_is_never_a_number() -> None:
    console = Console(interval=1)
    console.step(1, loss=None, mfu=None)
    assert "| loss      - |" in console.lines[0]
    assert "MFU" not in console.lines[0]
    console.callback.on_evaluation(EvalMetrics(1, None, None))
    assert console.lines[1] == "evaluation after step 1: loss -, perplexity -"
    assert (number(None), number(0.0), number(12345.6), number(math.nan)) == ("-", "0.000", "1.235e+04", "nan")


def test_console_evaluation_checkpoint_and_end() -> None:
    console = Console(interval=1)
    console.callback.on_evaluation(EvalMetrics(5, 4.2, math.exp(4.2)))
    console.callback.on_checkpoint(5, "out/step_0000005")
    console.callback.on_train_end(END)
    console.callback.on_train_end(TrainSummary(7, False, "SIGTERM received", 65.0, 650))
    assert console.lines == [
        "evaluation after step 5: loss 4.200, perplexity 66.69",
        "checkpoint of step 5 saved: out/step_0000005",
        "training finished at step 10: 10 k tokens in 1:40, 100 tokens/s",
        "leaving early (SIGTERM received) at step 7: 650 tokens in 1:05, 10 tokens/s",
    ]


def log_steps(path: Path, start: int, stop: int, end: bool = True) -> None:
    """A run from step `start` + 1 to `stop` that evaluates at step 4 and saves at step 5."""
    callback = JsonlCallback(path)
    callback.on_train_start(info(start))
    for step in range(start + 1, stop + 1):
        callback.on_step_end(metrics(step, loss=1 / 3 + step))
        if step == 4:
            callback.on_evaluation(EvalMetrics(4, 3.0, math.exp(3.0)))
        if step == 5:
            callback.on_checkpoint(5, "out/5")
    if end:
        callback.on_train_end(TrainSummary(stop, False, "why", 1.0, 1))


def events(path: Path, kind: str) -> list[int]:
    """Steps of the log's lines of one kind."""
    return [line["step"] for line in read_log(path) if line["event"] == kind]


def test_jsonl_holds_every_step_in_full_precision(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "log.jsonl"
    log_steps(path, 0, 6)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", *["step"] * 4, "evaluation", "step", "checkpoint", "step", "end"]
    assert [line["loss"] for line in lines if line["event"] == "step"] == [1 / 3 + step for step in range(1, 7)]
    assert lines[0]["parameter_count"] == 1_234_567
    assert lines[-1]["reason"] == "why"


def test_jsonl_resume_leaves_no_step_twice(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log_steps(path, 0, 8)
    log_steps(path, 5, 10)
    assert events(path, "step") == list(range(1, 11))
    assert (events(path, "evaluation"), events(path, "checkpoint")) == ([4], [5])
    assert (events(path, "start"), events(path, "end")) == ([0, 5], [10])


def test_jsonl_resume_after_a_kill_drops_the_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log_steps(path, 0, 6, end=False)
    with open(path, "a") as stream:
        stream.write('{"event": "step", "step": 7, "lo')
    assert events(path, "step") == [1, 2, 3, 4, 5, 6]
    log_steps(path, 5, 7)
    assert events(path, "step") == [1, 2, 3, 4, 5, 6, 7]


def test_jsonl_of_a_fresh_run_moves_the_old_log_aside(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for stop in (3, 4, 5):
        log_steps(path, 0, stop)
    assert events(path, "step") == [1, 2, 3, 4, 5]
    assert events(tmp_path / "log.jsonl.1", "step") == [1, 2, 3]
    assert events(tmp_path / "log.jsonl.2", "step") == [1, 2, 3, 4]


def test_jsonl_is_strict_json_also_for_infinite_numbers(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    callback = JsonlCallback(path)
    callback.on_train_start(INFO)
    callback.on_step_end(metrics(1, loss=math.nan, grad_norm=math.inf, loss_scale=None))

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    raw = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert (raw[1]["loss"], raw[1]["grad_norm"], raw[1]["loss_scale"]) == ("nan", "inf", None)
    read = list(read_log(path))[1]
    assert math.isnan(read["loss"]) and read["grad_norm"] == math.inf
    log_steps(path, 1, 2)  # rewriting keeps them
    assert math.isnan(list(read_log(path))[1]["loss"])


def test_jsonl_in_a_place_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        JsonlCallback(tmp_path / "file" / "log.jsonl").on_train_start(INFO)


def test_tensorboard_holds_the_scalars_and_a_resume_replaces_later_ones(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed")
    from megatron_llm.training.callbacks.tensorboard import TensorBoardCallback

    for start, stop, loss in ((0, 6, 1.0), (4, 8, 2.0)):
        callback = TensorBoardCallback(str(tmp_path))
        callback.on_train_start(info(start))
        for step in range(start + 1, stop + 1):
            callback.on_step_end(metrics(step, loss=None if step == 2 else loss))
        callback.on_evaluation(EvalMetrics(stop, 3.0, 20.0))
        callback.on_train_end(END)
    reader = accumulator.EventAccumulator(str(tmp_path))
    reader.Reload()
    assert [(event.step, event.value) for event in reader.Scalars("train/loss")] == [
        (1, 1.0), (3, 1.0), (4, 1.0), (5, 2.0), (6, 2.0), (7, 2.0), (8, 2.0)
    ]  # fmt: skip
    assert [event.step for event in reader.Scalars("validation/perplexity")] == [8]
    assert "train/loss_scale" not in reader.Tags()["scalars"]


class FakeWandb(types.ModuleType):
    """Stands in for the wandb package and notes what it is told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls: list[tuple[str, Any]] = []

    def init(self, **arguments: Any) -> "FakeWandb":
        self.calls.append(("init", arguments))
        self.id = arguments["id"] or "new-id"
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.calls.append(("log", (step, values)))

    def finish(self, exit_code: int) -> None:
        self.calls.append(("finish", exit_code))


def test_wandb_continues_the_run_of_the_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_llm.training.callbacks.wandb import WandbCallback

    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    first = WandbCallback("project", "name")
    assert first.state_dict() == {}
    first.on_train_start(INFO)
    first.on_step_end(metrics(1, loss=None))
    first.on_evaluation(EvalMetrics(1, 3.0, 20.0))
    second = WandbCallback("project", "name")
    second.load_state_dict(first.state_dict())
    second.on_train_start(info(5))
    second.on_train_end(END)
    starts = [arguments for kind, arguments in fake.calls if kind == "init"]
    assert [(start["project"], start["id"], start["resume"]) for start in starts] == [
        ("project", None, None),
        ("project", "new-id", "allow"),
    ]
    assert starts[0]["config"]["model"]["num_layers"] == 4
    logged = [values for kind, values in fake.calls if kind == "log"]
    assert logged[0][0] == 1 and logged[0][1]["train/grad_norm"] == 1.25 and "train/loss" not in logged[0][1]
    assert logged[1] == (1, {"validation/loss": 3.0, "validation/perplexity": 20.0})
    assert fake.calls[-1] == ("finish", 0)


@pytest.mark.parametrize(("module", "option"), [("wandb", {"wandb_project": "p"}), ("tensorboard", {"tensorboard_dir": "d"})])
def test_a_missing_package_says_what_to_install(module: str, option: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"--{next(iter(option)).replace('_', '-')} needs {module}.*pip install"):
        build_callbacks(updated(CONFIG, **option), rank=0)


def profiled_steps(path: Path) -> int:
    """Matrix products in a trace: the test does one a step."""
    with gzip.open(path, "rt") as stream:
        return sum(event.get("name") == "aten::mm" for event in json.load(stream)["traceEvents"])


@pytest.mark.parametrize(
    ("start", "stop_at", "file", "steps"),
    [(0, 6, "steps_2_to_4_rank_3.json.gz", 3), (3, 6, "steps_4_to_4_rank_3.json.gz", 1), (0, 3, "steps_2_to_3_rank_3.json.gz", 2)],
    ids=["whole", "resumed-inside", "ends-inside"],
)
def test_profiler_records_the_steps_asked_for(start: int, stop_at: int, file: str, steps: int, tmp_path: Path) -> None:
    callback = ProfilerCallback(2, 5, tmp_path, rank=3)
    callback.on_train_start(info(start))
    for step in range(start + 1, stop_at + 1):
        torch.mm(torch.ones(4, 4), torch.ones(4, 4))
        callback.on_step_end(metrics(step))
    callback.on_train_end(TrainSummary(stop_at, True, "", 1.0, 1))
    assert [path.name for path in tmp_path.iterdir()] == [file]
    assert profiled_steps(tmp_path / file) == steps


def test_profiler_resumed_after_its_steps_does_nothing(tmp_path: Path) -> None:
    callback = ProfilerCallback(2, 5, tmp_path, rank=0)
    callback.on_train_start(info(4))
    callback.on_step_end(metrics(5))
    callback.on_train_end(END)
    assert list(tmp_path.iterdir()) == []


def names(callbacks: list[Callback]) -> list[str]:
    """Names of callbacks."""
    return [callback.name for callback in callbacks]


def test_registry_builds_what_the_configuration_asks_for(tmp_path: Path) -> None:
    assert names(build_callbacks(CONFIG, rank=0)) == ["console"]
    full = updated(
        CONFIG,
        log_jsonl=str(tmp_path / "log.jsonl"),
        img_log_dir=str(tmp_path),
        profile_step_start=1,
        profile_step_end=2,
        profile_ranks=[1],
    )
    assert names(build_callbacks(full, rank=0)) == ["console", "jsonl", "plot"]
    assert names(build_callbacks(full, rank=1)) == ["profiler"]
    assert names(build_callbacks(full, rank=2)) == []


class Counter(Callback):
    """Counts what it is told, and keeps the count."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.told: list[str] = []

    def on_train_start(self, info: object) -> None:
        self.told.append("start")

    def on_step_end(self, metrics: object) -> None:
        self.told.append("step")

    def on_evaluation(self, metrics: object) -> None:
        self.told.append("evaluation")

    def on_checkpoint(self, step: int, path: str) -> None:
        self.told.append("checkpoint")

    def on_train_end(self, summary: object) -> None:
        self.told.append("end")

    def state_dict(self) -> dict[str, Any]:
        return {"told": list(self.told)} if self.told else {}

    def load_state_dict(self, state: Any) -> None:
        self.told = list(state["told"])


def test_a_list_tells_every_callback_and_keeps_each_state() -> None:
    first, second, base = Counter("first"), Counter("second"), Callback()
    both = CallbackList([first, second, base])
    both.on_train_start(INFO)
    both.on_step_end(metrics(1))
    both.on_evaluation(EvalMetrics(1, 1.0, 1.0))
    both.on_checkpoint(1, "x")
    both.on_train_end(END)
    assert first.told == second.told == ["start", "step", "evaluation", "checkpoint", "end"]
    state = json.loads(json.dumps(both.state_dict()))
    assert set(state) == {"first", "second"}
    fresh, other = Counter("first"), Counter("third")
    CallbackList([fresh, other]).load_state_dict(state)
    assert fresh.told == first.told and other.told == []
    with pytest.raises(ValueError, match="share a name"):
        CallbackList([Counter("a"), Counter("a")])
