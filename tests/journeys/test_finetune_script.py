"""run_lora_finetune.sh and its guide: real runs on small models, every command of docs/guide/finetune.md, bad values, signals."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_llm.finetune.arguments import parse_finetune_config
from tests.rules.sources import ROOT
from tests.rules.test_docs import BLOCK
from tests.small_tokenizers import byte_level
from tests.unit.finetune.runs import base_folder, step_losses, write_pairs
from tests.unit.lora.tiny import make_adapter

pytest.importorskip("peft", reason="peft is not installed: it comes with the extra finetune")
pytest.importorskip("accelerate", reason="accelerate is not installed: it comes with the extra finetune")

GUIDE = ROOT / "docs" / "guide" / "finetune.md"
SMALL = {"DEVICE": "cpu", "MAX_LENGTH": "32", "MICRO_BATCH": "2", "GLOBAL_BATCH": "4", "TRAIN_ITERS": "4", "SAVE_INTERVAL": "2"}
FEW = ("--max-length", "24", "--global-batch-size", "8", "--train-iters", "3", "--precision", "bf16", "--lora-dropout", "0")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A checkout with a small model in `models/llama`, the demo's checkpoint, pairs, texts and a larger tokenizer."""
    for name in ("run_lora_finetune.sh", "merge.sh", "tools", "megatron_llm", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "run_lora_finetune.sh", tmp_path / "copy.sh")
    (tmp_path / "run_lora_finetune.sh").unlink()
    (tmp_path / "copy.sh").rename(tmp_path / "run_lora_finetune.sh")
    (tmp_path / "run_install_environment.sh").write_text("exit 0\n")
    (tmp_path / ".venv").symlink_to(Path(sys.prefix))
    base_folder(tmp_path / "models" / "llama")
    write_pairs(tmp_path / "pairs.jsonl")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("the cat sat on the mat and the hat\n" * 20)
    return tmp_path


def start(line: str, folder: Path, **variables: str) -> "subprocess.Popen[str]":
    """One line of shell, with small sizes."""
    path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
    environment = {
        "PATH": path,
        "HOME": str(folder),
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
        **SMALL,
        **variables,
    }
    pipe = subprocess.PIPE
    return subprocess.Popen(["sh", "-c", line], cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def run(line: str, folder: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    """The same, to its end."""
    process = start(line, folder, **variables)
    out, err = process.communicate(timeout=280)
    return subprocess.CompletedProcess(line, process.returncode, out, err)


def dry(folder: Path, *arguments: str, **variables: str) -> list[str]:
    """The words of the command of a dry run."""
    line = shlex.join(["sh", "run_lora_finetune.sh", *arguments])
    done = run(line, folder, DRY_RUN="1", MAX_LENGTH="", **variables)
    assert done.returncode == 0, done.stderr
    (command,) = done.stdout.splitlines()
    return shlex.split(command)


def test_a_run_and_the_same_again(place: Path) -> None:
    line = "MODEL=models/llama DATA=pairs.jsonl OUTPUT=out sh run_lora_finetune.sh"
    done = run(line, place)
    assert done.returncode == 0, done.stderr
    assert "batch    2 sequences x 1 process x 2 accumulated = 4 a step" in done.stdout
    assert (place / "out/adapter/adapter_model.safetensors").is_file() and (place / "out/curves/finetune.png").is_file()
    assert json.loads((place / "out/report.json").read_text())["steps"] == 4
    again = run(line, place, TRAIN_ITERS="6")
    assert again.returncode == 0, again.stderr
    assert "checkpoint-4, step 4" in again.stdout and "step 6/6" in again.stdout


def test_two_processes_give_the_losses_of_one(place: Path) -> None:
    line = "MODEL=models/llama DATA=pairs.jsonl sh run_lora_finetune.sh --lora-dropout 0"
    for name, variables in (("one", {"MICRO_BATCH": "2"}), ("two", {"NPROC": "2", "MICRO_BATCH": "1"})):
        done = run(f"OUTPUT={name} {line}", place, **variables)
        assert done.returncode == 0, done.stderr
    assert step_losses(place / "two") == pytest.approx(step_losses(place / "one"), abs=1e-5)


def test_a_signal_saves_and_the_run_goes_on(place: Path) -> None:
    line = "exec sh run_lora_finetune.sh"
    variables = {"MODEL": "models/llama", "DATA": "pairs.jsonl", "OUTPUT": "out", "TRAIN_ITERS": "3000", "SAVE_INTERVAL": "5000"}
    process = start(line, place, **variables, EVAL_INTERVAL="3000")
    deadline = time.monotonic() + 120
    while not (place / "out/log.jsonl").exists() or len((place / "out/log.jsonl").read_text().splitlines()) < 4:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1, out + err
    assert "after a checkpoint was saved: the same command goes on from there" in err and "Traceback" not in err
    (checkpoint,) = (place / "out/checkpoints").iterdir()
    stopped = int(checkpoint.name.removeprefix("checkpoint-"))
    again = run(line, place, **{**variables, "TRAIN_ITERS": str(stopped + 2)})
    assert again.returncode == 0, again.stderr
    assert f"step {stopped}" in again.stdout


def test_dry_run_names_every_launcher(place: Path) -> None:
    some = {"MODEL": "m", "DATA": "a.jsonl b.jsonl"}
    one = dry(place, **some)
    assert one[1].endswith("tools/finetune.py")
    config = parse_finetune_config(one[2:])
    assert config.data.train_data == ["a.jsonl", "b.jsonl"] and config.output.save == f"{place}/runs/m-lora-sft"
    two = dry(place, "--lr", "1e-3", **some, NPROC="2")
    assert two[1:3] == ["-m", "megatron_llm.training.launch"] and two[-2:] == ["--lr", "1e-3"]
    assert dry(place, **some, PARALLEL="zero3", NPROC="8")[2:5] == [
        "accelerate.commands.launch",
        "--config_file",
        f"{place}/examples/finetune/zero3.yaml",
    ]
    many = dry(place, **some, NNODES="2", NODE_RANK="1", MASTER_ADDR="node0", NPROC="8")
    assert "--node-rank" in many and "node0" in many
    assert not (place / "runs").exists()


@pytest.mark.parametrize("file", sorted(path.name for path in (ROOT / "examples/finetune").glob("*.yaml")))
def test_examples_can_be_read(file: str, place: Path) -> None:
    path = ROOT / "examples" / "finetune" / file
    if "distributed_type" in path.read_text():
        from accelerate.commands.config.config_args import load_config_from_file

        kind = str(load_config_from_file(str(path)).distributed_type).rpartition(".")[2]
        assert kind in ("MULTI_GPU", "FSDP", "DEEPSPEED")
        return
    command = dry(place, CONFIG=str(path), MODEL="m", DATA="d", GLOBAL_BATCH="", MICRO_BATCH="", TRAIN_ITERS="")
    config = parse_finetune_config(command[2:])
    assert config.base.model == "m" and config.output.save == f"{place}/runs/m-{path.stem}"


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({}, "MODEL is not set and there is no demo model: run sh run_pretrain_gpt.sh first"),
        ({"MODEL": "models/llama"}, "DATA is not set"),
        ({"MODEL": "models/none", "DATA": "pairs.jsonl"}, "--model models/none is no folder"),
        ({"MODEL": "texts", "DATA": "pairs.jsonl"}, "--model texts holds no model"),
        ({"MODEL": "models/llama", "DATA": "none.jsonl"}, "none.jsonl"),
        ({"METHOD": "lroa"}, "METHOD is 'lroa', but it must be one of: "),
        ({"NPROC": "two"}, "NPROC is 'two', but it must be a whole number, at least 1"),
        ({"MODEL": "models/llama", "DATA": "pairs.jsonl", "PARALLEL": "fsdp"}, "PARALLEL is 'fsdp', which needs GPUs"),
        ({"MODEL": "models/llama", "DATA": "pairs.jsonl", "PARALLEL": "zero9"}, "PARALLEL is 'zero9', but it must be one of"),
        ({"MODEL": "models/llama", "DATA": "pairs.jsonl", "OUTPUT": "models/llama"}, "is the folder of the base"),
    ],
)
def test_bad_values(place: Path, variables: dict[str, str], sentence: str) -> None:
    done = run("sh run_lora_finetune.sh", place, **variables)
    assert done.returncode == 1
    assert sentence in done.stderr and "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error:")]) == 1


@pytest.mark.parametrize(
    ("variable", "sentence"),
    [("ACCELERATE_USE_FSDP", "FSDP was asked for, but accelerate runs NO here: it needs GPUs"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")],
)
def test_sharding_that_is_not_done_is_an_error(place: Path, variable: str, sentence: str) -> None:
    """accelerate alone would train without it, silently."""
    if variable == "ACCELERATE_USE_DEEPSPEED" and importlib.util.find_spec("deepspeed") is not None:
        pytest.skip("deepspeed is installed, so it is used")
    line = "MODEL=models/llama DATA=pairs.jsonl OUTPUT=out sh run_lora_finetune.sh"
    done = run(line, place, **{variable: "true"})
    assert done.returncode == 1 and sentence in done.stderr and "Traceback" not in done.stderr
    assert not (place / "out" / "adapter").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed_on_two_processes(place: Path, stage: int) -> None:
    """The script asks for GPUs; its file of accelerate also works where there are none."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: it comes with the extra deepspeed")
    tool = f"tools/finetune.py --model models/llama --train-data pairs.jsonl --device cpu {' '.join(FEW)}"
    start = f"-m accelerate.commands.launch --config_file examples/finetune/zero{stage}.yaml --num_processes 2"
    done = run(f".venv/bin/python {start} {tool} --micro-batch-size 2 --save out", place, DS_ACCELERATOR="cpu")
    assert done.returncode == 0, done.stderr
    one = run(f".venv/bin/python {tool} --micro-batch-size 4 --save one", place)
    assert one.returncode == 0, one.stderr
    assert step_losses(place / "out") == pytest.approx(step_losses(place / "one"), rel=0.02)  # ZeRO computes all in bf16
    assert (place / "out/adapter/adapter_model.safetensors").stat().st_size > 5000


def test_help_starts_with_a_command(place: Path) -> None:
    done = run("sh run_lora_finetune.sh --help", place)
    assert done.returncode == 0 and "DATA=pairs.jsonl sh run_lora_finetune.sh" in done.stdout
    tool = run(".venv/bin/python tools/finetune.py --help", place)
    assert tool.returncode == 0 and tool.stdout.startswith("example:")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_command_of_the_guide(place: Path) -> None:
    from transformers import AutoTokenizer

    byte_level(place / "tokenizers" / "larger", size=283, extra=["zebra", "lowlow", "newes"])
    base_folder(place / "demo" / "checkpoint")
    base_folder(place / "models" / "old", vocab_size=284)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (place / "models" / "old" / name).unlink()  # they have the tokens of a template
    byte_level(place / "models" / "old", size=283).save_pretrained(place / "models" / "old")
    for folder in (place / "tokenizers" / "larger", place / "models" / "old"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.eos_token = "<|endoftext|>"
        tokenizer.save_pretrained(folder)
    for name in ("a", "b"):  # those that the guide merges
        make_adapter(place / "runs" / name / "adapter", place / "models" / "llama", seed=ord(name))
    commands = [
        line for block in BLOCK.findall(GUIDE.read_text(encoding="utf-8")) for line in block.replace("\\\n", " ").splitlines() if line
    ]
    assert len(commands) >= 8
    for command in commands:
        gpus = re.search(r"PARALLEL=|NPROC=8", command)
        done = run(command, place, **({"DRY_RUN": "1"} if gpus else {}), EPOCHS="1")
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
