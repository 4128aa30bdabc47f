"""The shell scripts: POSIX sh, nothing named that does not exist, every flag known to the tool it is given to."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_llm.config.flags import parse_run_config
from megatron_llm.config.resolve import resolve
from tests.rules.sources import ROOT

SCRIPTS = sorted([*ROOT.glob("*.sh"), *ROOT.glob("tools/*.sh"), *ROOT.glob("examples/**/*.sh")])
IDS = [str(script.relative_to(ROOT)) for script in SCRIPTS]
DEFINED = re.compile(r"^(\w+)\(\) \{$", re.MULTILINE)
READS_COMMON = '. "$HERE/tools/script_common.sh"'
MENTIONED = re.compile(r"(?<![\w./-])((?:tools|examples|docs|requirements|csrc|tests)/[\w./-]+\.\w+|[\w-]+\.(?:sh|toml|md|py))(?![\w/])")


def tool(name: str) -> str:
    """A program of the environment that runs the tests, or of the PATH; a skip with the reason where there is none."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: it comes with the extra dev")
    return found


def missing_files(text: str) -> list[str]:
    """Files of the project that a text names and that do not exist."""
    return sorted({name for name in MENTIONED.findall(text.replace("$HERE/", " ")) if not (ROOT / name).exists()})


def dry_run(script: str, cwd: Path, *arguments: str, **variables: str) -> list[list[str]]:
    """The commands that a script prints under DRY_RUN, split into words."""
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "DRY_RUN": "1", "DEVICE": "cpu", **variables}
    command = ["sh", str(ROOT / script), *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("script", SCRIPTS, ids=IDS)
def test_posix_sh(script: Path) -> None:
    done = subprocess.run([tool("shellcheck"), "-s", "sh", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    subprocess.run(["sh", "-n", str(script)], check=True)
    assert script.read_text().startswith("#!/bin/sh\n")
    assert "\nset -eu\n" in script.read_text()


def test_the_scripts_share_one_beginning() -> None:
    """What tools/script_common.sh defines, no script that reads it defines again."""
    shared = set(DEFINED.findall((ROOT / "tools" / "script_common.sh").read_text()))
    readers = {script.name: script.read_text() for script in SCRIPTS if f"\n{READS_COMMON}\n" in script.read_text()}
    assert {"run_pretrain_gpt.sh", "run_lora_finetune.sh", "merge.sh", "run_evaluation.sh", "run_deploy.sh"} <= readers.keys()
    assert {"fail", "show", "help_of"} <= shared
    again = {name: sorted(shared & set(DEFINED.findall(text))) for name, text in readers.items()}
    assert not any(again.values()), again


@pytest.mark.parametrize("script", ["run_pretrain_gpt.sh", "run_lora_finetune.sh", "merge.sh", "run_evaluation.sh", "run_deploy.sh"])
def test_help_works_anywhere_and_shows_settings_not_code(script: str, tmp_path: Path) -> None:
    command = ["sh", os.path.relpath(ROOT / script, tmp_path), "--help"]
    done = subprocess.run(command, cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("# ") and "\nDRY_RUN=" in done.stdout and lines[-1].endswith(".py --help")
    assert not [line for line in lines if line.startswith(("set -eu", "HERE=", ". ", "# shellcheck", "# ----"))]
    assert list(tmp_path.iterdir()) == []


def test_a_setting_with_a_quote_is_printed_so_that_it_can_be_pasted(tmp_path: Path) -> None:
    (command,) = dry_run("merge.sh", tmp_path, ADAPTERS="a", SAVE="it's here; really $HOME")
    assert command[command.index("--save") + 1] == "it's here; really $HOME"


def test_shellcheck_sees_a_bashism(tmp_path: Path) -> None:
    script = tmp_path / "x.sh"
    script.write_text("#!/bin/sh\nif [[ $1 == a ]]; then echo a; fi\n")
    assert subprocess.run([tool("shellcheck"), "-s", "sh", str(script)], capture_output=True, check=False).returncode != 0


@pytest.mark.parametrize("script", SCRIPTS, ids=IDS)
def test_what_a_script_names_exists(script: Path) -> None:
    assert missing_files(script.read_text()) == []


def test_the_rule_sees_a_missing_file() -> None:
    assert missing_files('"$python" "$HERE/tools/no_such_tool.py" --help') == ["tools/no_such_tool.py"]
    assert missing_files("see run_pretrain_gtp.sh and README.md") == ["run_pretrain_gtp.sh"]


def test_every_flag_of_the_demo_is_known_to_its_tool(tmp_path: Path) -> None:
    commands = dry_run("run_pretrain_gpt.sh", tmp_path)
    started = [next(word for word in command if "/tools/" in word) for command in commands]
    names = ["make_demo_corpus", "train_tokenizer", "preprocess_data", "pretrain", "convert_checkpoint", "generate"]
    assert [Path(word).stem for word in started] == names
    for command, program in zip(commands, started, strict=True):
        if Path(program).stem == "pretrain":
            continue
        done = subprocess.run([sys.executable, program, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
        for flag in (word for word in command[command.index(program) :] if word.startswith("--")):
            assert re.search(rf"(?<![\w-]){flag}(?![\w-])", done.stdout), f"{program} has no {flag}"


def test_the_settings_of_the_demo_pass_all_rules(tmp_path: Path) -> None:
    command = dry_run("run_pretrain_gpt.sh", tmp_path)[3]
    config = resolve(parse_run_config(command[command.index(str(ROOT / "tools/pretrain.py")) + 1 :]), world_size=4)
    assert config.parallel.tensor_model_parallel_size == config.parallel.pipeline_model_parallel_size == 2
    assert config.train.eval_interval > 0 and config.log.img_log_dir is not None


@pytest.mark.parametrize("script", ["run_install_environment.sh", "run_tests.sh", "run_pretrain_gpt.sh"])
def test_dry_run_works_anywhere_and_writes_nothing(script: str, tmp_path: Path) -> None:
    commands = dry_run(script, tmp_path, VENV=str(tmp_path / "env"))
    assert commands and all(str(tmp_path / "env") in command[0] or "venv" in command for command in commands)
    assert list(tmp_path.iterdir()) == []


def test_the_installer_rejects_arguments() -> None:
    done = subprocess.run(["sh", str(ROOT / "run_install_environment.sh"), "--dev"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: '--dev' was given") and len(done.stderr.splitlines()) == 1
