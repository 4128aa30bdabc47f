"""Every file under examples/ does what its first lines say."""

import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_llm.config.flags import parse_run_config
from megatron_llm.config.resolve import advice, resolve
from megatron_llm.config.schema import ModelConfig, OptimizerConfig, RunConfig
from megatron_llm.models.registry import get_family
from megatron_llm.optim.lr_schedule import warmup_iters
from tests.rules.sources import ROOT

CONFIGS = sorted((ROOT / "examples" / "pretrain_gpt").glob("*.yaml"))
VOCABULARY = {"gpt2-124m": 50257, "llama-7b": 32000, "llama-13b": 32000}  # of the published models of these sizes


def load(path: Path, world_size: int) -> RunConfig:
    """The configuration through the parser and all rules, as training reads it."""
    config = parse_run_config(["--config", str(path), "--data-path", "data/corpus_text_document", "--save", "run"])
    return resolve(config, world_size, get_family(config.model.model).violations)


def world_size(path: Path) -> int:
    """The number of processes that the file's first lines name."""
    found = re.search(r"^# world size: (\d+)$", path.read_text(), re.MULTILINE)
    assert found is not None, f"{path.name} does not say for how many processes it is"
    return int(found[1])


def parameters(model: ModelConfig, vocabulary: int) -> int:
    """Parameters by the formula of the family, for models without grouped heads."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size or 0
    if model.model == "gpt":
        layer = 4 * hidden * hidden + 4 * hidden + 2 * hidden * ffn + ffn + hidden + 4 * hidden
        return model.num_layers * layer + (vocabulary + (model.max_position_embeddings or 0)) * hidden + 2 * hidden
    return model.num_layers * (4 * hidden * hidden + 3 * hidden * ffn + 2 * hidden) + 2 * vocabulary * hidden + hidden


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_passes_all_rules(path: Path) -> None:
    world = world_size(path)
    assert advice(load(path, world), world) == []


@pytest.mark.parametrize("name", VOCABULARY)
def test_config_has_the_size_in_its_name(name: str) -> None:
    path = ROOT / "examples" / "pretrain_gpt" / f"{name}.yaml"
    millions = parameters(load(path, world_size(path)).model, VOCABULARY[name]) / 1e6
    number, unit = re.findall(r"(\d+)([mb])$", name)[0]
    assert millions == pytest.approx(int(number) * (1000 if unit == "b" else 1), rel=0.05)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_command_in_the_config_starts_as_many_processes(path: Path, tmp_path: Path) -> None:
    line = next(line for line in path.read_text().splitlines() if line.endswith("sh run_pretrain_gpt.sh")).lstrip("# ")
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nfor i in 0 1 2 3 4 5 6 7; do echo GPU $i; done\n")
    smi.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/local/bin:/usr/bin:/bin", "DRY_RUN": "1", "VENV": str(tmp_path / "none")}
    if "NNODES" not in line and world_size(path) == 1:
        environment["CUDA_VISIBLE_DEVICES"] = "0"
    done = subprocess.run(line, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    words = shlex.split(done.stdout)
    nodes, processes = (int(words[words.index(flag) + 1]) for flag in ("--nnodes", "--nproc-per-node"))
    assert nodes * processes == world_size(path)
    config = parse_run_config(words[words.index(str(ROOT / "tools" / "pretrain.py")) + 1 :])
    assert resolve(config, world_size(path)).model == load(path, world_size(path)).model and config.data.data_path


def test_slurm_job_starts_one_task_a_node(tmp_path: Path) -> None:
    """srun and scontrol are stand-ins; the script between them is the real one."""
    programs = {
        "scontrol": 'echo "node7\nnode8"',
        "srun": 'shift; for id in 0 1; do SLURM_NODEID=$id "$@"; done',
        "nvidia-smi": "echo GPU 0; echo GPU 1",
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/local/bin:/usr/bin:/bin",
        **{"DRY_RUN": "1", "VENV": str(tmp_path / "none"), "DATA_PATH": "x/y", "TP": "2"},
        **{"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "40123"},
    }
    command = ["sh", str(ROOT / "examples" / "slurm" / "pretrain.sh"), "--lr", "1e-5"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert [line[line.index("--node-rank") + 1] for line in lines] == ["0", "1"]
    for line in lines:
        assert line[line.index("--master-addr") + 1] == "node7" and line[line.index("--master-port") + 1] == "20123"
        assert line[-2:] == ["--lr", "1e-5"]


def warm_up_in_steps(config: RunConfig) -> OptimizerConfig:
    """The optimizer's settings with a warm-up given as a fraction turned into steps, as the script gives it."""
    steps = round(warmup_iters(config.optimizer, config.train.train_iters))
    return replace(config.optimizer, lr_warmup_iters=steps, lr_warmup_fraction=None)


def test_the_laptop_config_is_what_the_script_runs_without_settings(tmp_path: Path) -> None:
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "DRY_RUN": "1", "DEVICE": "cpu", "VENV": str(tmp_path)}
    command = ["sh", str(ROOT / "run_pretrain_gpt.sh")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    words = next(shlex.split(line) for line in done.stdout.splitlines() if "tools/pretrain.py" in line)
    script = resolve(parse_run_config(words[words.index(str(ROOT / "tools" / "pretrain.py")) + 1 :]), 4)
    config = load(ROOT / "examples" / "pretrain_gpt" / "laptop-demo.yaml", 4)
    assert (script.model, script.train) == (config.model, config.train)
    assert warm_up_in_steps(script) == warm_up_in_steps(config)
