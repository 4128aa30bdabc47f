"""run_pretrain_gpt.sh itself, with stand-ins for Python and the GPUs: layouts, steps, bad values, signals.

The real demo is run by test_readme.py; here a shell script takes the place of the interpreter, writes down how it was
called and makes the file that the step should make.
"""

import os
import shlex
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.rules.sources import ROOT

PYTHON = """#!/bin/sh
echo "$*" >>"$CALLS"
case " $* " in
*" {failing} "*) echo "error: told to fail" >&2; exit 7 ;;
esac
make() { mkdir -p "$(dirname "$1")"; : >"$1"; }
case "$*" in
*make_demo_corpus.py*) make "$OUTPUT/corpus.jsonl" ;;
*train_tokenizer.py*) make "$OUTPUT/tokenizer/tokenizer.json" ;;
*preprocess_data.py*) make "$OUTPUT/data/corpus_text_document.idx" ;;
*megatron_llm.training.launch*)
    if [ -n "${SLEEP:-}" ]; then trap 'echo saved >"$OUTPUT/saved"; exit 3' TERM; make "$OUTPUT/ready"; sleep 30 & wait; fi
    mkdir -p "$OUTPUT/checkpoint/step_0000240" ;;
*convert_checkpoint.py*) make "$OUTPUT/hf/conversion_report.json" ;;
esac
"""


@dataclass
class Place:
    """A copy of the script in a folder of its own, with a stand-in environment that needs no installation."""

    folder: Path
    variables: dict[str, str] = field(default_factory=dict)

    def set_up(self, failing: str = "nothing") -> "Place":
        """Lay out the folder; `failing` is a word of the command that shall fail."""
        shutil.copy(ROOT / "run_pretrain_gpt.sh", self.folder)
        (self.folder / "tools").mkdir(exist_ok=True)
        shutil.copy(ROOT / "tools" / "script_common.sh", self.folder / "tools")
        (self.folder / "run_install_environment.sh").write_text("exit 0\n")
        python = self.folder / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True, exist_ok=True)
        python.write_text(PYTHON.replace("{failing}", failing))
        python.chmod(0o755)
        return self

    def gpus(self, count: int) -> None:
        """Let nvidia-smi list this many GPUs."""
        listing = "".join(f"GPU {number}: a stand-in\n" for number in range(count))
        program = self.folder / "bin" / "nvidia-smi"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\ncat <<END\n{listing}END\n")
        program.chmod(0o755)

    def environment(self, **variables: str) -> dict[str, str]:
        """What the script is started with: nothing of the caller's but the variables that a test sets."""
        path = f"{self.folder / 'bin'}:/usr/local/bin:/usr/bin:/bin"
        stubs = {"CALLS": str(self.folder / "calls"), "OUTPUT": str(self.folder / "demo")}
        return {"PATH": path, **stubs, **self.variables, **variables}

    def run(self, *arguments: str, folder: Path | None = None, **variables: str) -> "subprocess.CompletedProcess[str]":
        """Run the script to its end, in `folder` or its own."""
        command = ["sh", str(self.folder / "run_pretrain_gpt.sh"), *arguments]
        cwd = folder or self.folder
        return subprocess.run(command, env=self.environment(**variables), capture_output=True, text=True, check=False, cwd=cwd)

    def calls(self) -> list[str]:
        """Names of the programs that were started since the last look."""
        log = self.folder / "calls"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return [next(Path(word).stem for word in line.split() if word.endswith(".py")) for line in lines]

    def training(self, *arguments: str, **variables: str) -> list[str]:
        """Words of the training command that a dry run prints."""
        done = self.run(*arguments, DRY_RUN="1", **variables)
        assert done.returncode == 0, done.stderr
        return shlex.split(next(line for line in done.stdout.splitlines() if "megatron_llm.training.launch" in line))


def value(command: list[str], flag: str) -> str:
    """The word after the last occurrence of a flag."""
    return command[len(command) - command[::-1].index(flag)]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A folder without GPUs."""
    return Place(tmp_path).set_up()


WHOLE_DEMO = ["check_config", "make_demo_corpus", "train_tokenizer", "preprocess_data", "pretrain", "convert_checkpoint", "generate"]


def test_the_demo_runs_every_step_once(place: Place) -> None:
    done = place.run(DEVICE="cpu")
    assert done.returncode == 0, done.stderr
    assert place.calls() == WHOLE_DEMO
    assert "Done in" in done.stdout and "What to type next" in done.stdout
    again = place.run(DEVICE="cpu")
    assert again.returncode == 0
    assert place.calls() == ["check_config", "generate"]
    assert "== training: " in again.stdout and "is there" in again.stdout


def test_the_end_shows_paths_from_the_folder_it_is_run_in(place: Place, tmp_path_factory: pytest.TempPathFactory) -> None:
    here = place.run(DEVICE="cpu")
    elsewhere = place.run(DEVICE="cpu", folder=tmp_path_factory.mktemp("elsewhere"))
    assert here.returncode == elsewhere.returncode == 0, elsewhere.stderr
    shown, whole = (done.stdout.partition("What lies where")[2] for done in (here, elsewhere))
    assert "  demo/checkpoint " in shown and str(place.folder / "demo") not in shown
    assert f"  {place.folder}/demo/checkpoint " in whole


def test_another_setting_repeats_the_steps_that_depend_on_it(place: Place) -> None:
    place.run(DEVICE="cpu")
    place.calls()
    assert place.run(DEVICE="cpu", VOCAB_SIZE="999").returncode == 0
    assert place.calls() == ["check_config", "train_tokenizer", "preprocess_data", "pretrain", "convert_checkpoint", "generate"]
    assert place.run(DEVICE="cpu", VOCAB_SIZE="999", TRAIN_ITERS="480").returncode == 0
    assert place.calls() == ["check_config", "pretrain", "convert_checkpoint", "generate"]


def test_a_failing_step_ends_the_script_with_its_status(tmp_path: Path) -> None:
    place = Place(tmp_path).set_up(failing="--output-prefix")
    done = place.run(DEVICE="cpu")
    assert done.returncode == 7
    assert place.calls() == WHOLE_DEMO[:4]
    place.set_up()
    assert place.run(DEVICE="cpu").returncode == 0
    assert place.calls() == ["check_config", *WHOLE_DEMO[3:]]


def test_sigterm_reaches_the_training(place: Place) -> None:
    command = ["sh", str(place.folder / "run_pretrain_gpt.sh")]
    with subprocess.Popen(command, env=place.environment(DEVICE="cpu", SLEEP="1"), stdout=subprocess.DEVNULL) as script:
        deadline = time.monotonic() + 60
        while not (place.folder / "demo" / "ready").exists():
            assert time.monotonic() < deadline, "the training was not started"
            time.sleep(0.05)
        os.kill(script.pid, signal.SIGTERM)
        assert script.wait(timeout=60) == 3
    assert (place.folder / "demo" / "saved").exists()
    assert place.calls()[-1] == "pretrain"


@pytest.mark.parametrize(
    ("gpus", "layout"), [(1, ("1", "1", "1")), (2, ("2", "2", "1")), (3, ("3", "1", "1")), (4, ("4", "2", "2")), (8, ("8", "2", "2"))]
)
def test_the_demo_uses_the_gpus_it_finds(place: Place, gpus: int, layout: tuple[str, str, str]) -> None:
    place.gpus(gpus)
    command = place.training()
    found = tuple(value(command, flag) for flag in ("--nproc-per-node", "--tensor-model-parallel-size", "--pipeline-model-parallel-size"))
    assert found == layout and "--bf16" in command
    assert value(place.training(DEVICE="cpu"), "--nproc-per-node") == "4"
    assert value(place.training(CUDA_VISIBLE_DEVICES="3"), "--nproc-per-node") == "1"


def test_without_gpus_four_processes_on_this_machine(place: Place) -> None:
    command = place.training()
    assert value(command, "--nproc-per-node") == "4" and "--standalone" in command and "--bf16" not in command
    assert value(command, "--global-batch-size") == "16"


def test_a_node_of_many(place: Place) -> None:
    place.gpus(8)
    command = place.training(
        NNODES="4", NODE_RANK="3", MASTER_ADDR="node0", MASTER_PORT="1234", DATA_PATH="0.3 a/b 0.7 c/d", TP="8", PP="2"
    )
    found = {flag: value(command, flag) for flag in ("--nnodes", "--node-rank", "--master-addr", "--master-port", "--global-batch-size")}
    assert found == {"--nnodes": "4", "--node-rank": "3", "--master-addr": "node0", "--master-port": "1234", "--global-batch-size": "16"}
    assert "--standalone" not in command
    start = command.index("--data-path")
    assert command[start + 1 : start + 5] == ["0.3", "a/b", "0.7", "c/d"]
    assert value(place.training(DATA_PATH="x/y"), "--save") == str(place.folder / "demo" / "checkpoint")


def test_other_data_goes_to_another_folder(place: Place) -> None:
    place.variables["OUTPUT"] = ""
    assert value(place.training(DATA_PATH="data/news_text_document"), "--save") == f"{place.folder}/runs/news_text_document/checkpoint"
    assert value(place.training(), "--save") == f"{place.folder}/demo/checkpoint"


def test_a_config_file_gets_only_the_settings_that_were_given(place: Place) -> None:
    (place.folder / "big.yaml").write_text("num_layers: 3\n")
    command = place.training("--clip-grad", "0.5", CONFIG="big.yaml", GPUS_PER_NODE="2", LR="1e-5", OUTPUT="o")
    given = command[command.index("--config") :]
    assert given == [
        "--config",
        "big.yaml",
        "--lr",
        "1e-5",
        "--save",
        "o/checkpoint",
        "--auto-resume",
        "--img-log-dir",
        "o/curves",
        "--clip-grad",
        "0.5",
    ]


@pytest.mark.parametrize("by_flag", [True, False], ids=["flag", "variable"])
def test_a_run_from_weights_takes_the_model_from_their_folder(place: Place, by_flag: bool) -> None:
    arguments, variables = (("--load", "hf"), {}) if by_flag else ((), {"LOAD": "hf"})
    command = place.training(*arguments, DATA_PATH="x", NUM_HEADS="8", **variables)
    assert value(command, "--load") == "hf" and value(command, "--num-attention-heads") == "8"
    assert not {"--model", "--num-layers", "--hidden-size"} & set(command)
    assert value(command, "--lr") == "2e-5" and value(command, "--min-lr") == "2e-6" and value(command, "--seq-length") == "128"
    assert place.run(*arguments, DRY_RUN="1", **variables).stdout.count("make_demo_corpus") == 0


def test_the_last_of_two_flags_is_the_users(place: Place) -> None:
    command = place.training("--lr", "7", "--wandb-project", "it's mine")
    assert value(command, "--lr") == "7" and command[-1] == "it's mine"


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"TP": "two"}, "TP is 'two'"),
        ({"TRAIN_ITERS": "0"}, "TRAIN_ITERS is '0'"),
        ({"GPUS_PER_NODE": "-1"}, "GPUS_PER_NODE is '-1'"),
        ({"PRECISION": "fp8"}, "must be one of"),
        ({"DEVICE": "tpu"}, "must be one of"),
        ({"DEVICE": "cuda"}, "lists no GPU"),
        ({"NNODES": "2", "DATA_PATH": "x"}, "MASTER_ADDR"),
        ({"NNODES": "2", "MASTER_ADDR": "a"}, "the demo runs on one machine"),
        ({"NODE_RANK": "1"}, "from 0 to 0"),
        ({"DATA_PATH": "x", "TP": "2", "GPUS_PER_NODE": "3"}, "multiple of 2"),
        ({"CONFIG": "none.yaml"}, "does not exist"),
        ({"DRY_RUN": "yes"}, "must be one of"),
    ],
)
def test_a_bad_value_is_one_sentence(place: Place, variables: dict[str, str], words: str) -> None:
    done = place.run(**{"DRY_RUN": "1", **variables})
    assert done.returncode == 1 and place.calls() == []
    assert done.stderr.startswith("error: ") and words in done.stderr and len(done.stderr.splitlines()) == 1


def test_help_lists_every_setting_and_starts_nothing(place: Place) -> None:
    done = place.run("--help")
    assert done.returncode == 0 and place.calls() == []
    for name in (
        "NNODES",
        "NODE_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "GPUS_PER_NODE",
        "DEVICE",
        "TP",
        "PP",
        "VPP",
        "DATA_PATH",
        "TOKENIZER_MODEL",
    ):
        assert f"\n{name}=" in done.stdout
    assert "setting MICRO_BATCH" in done.stdout and "forwarding" not in done.stdout
