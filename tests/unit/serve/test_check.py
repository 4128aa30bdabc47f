"""`--check`, the terminal chat and the folders that a server is started with, good and bad."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_llm.convert.model_folders import hf_folders
from megatron_llm.parallel.groups import single_process_groups
from megatron_llm.serve.check import check
from megatron_llm.serve.client import Client, Ending
from megatron_llm.serve.language_model import load_language_model
from megatron_llm.serve.options import Endpoint, Limits, ModelOptions, ServeOptions
from megatron_llm.serve.terminal import Conversation, talk
from megatron_llm.utils.errors import UserError
from tests.checkpoints import save_random_model, small_model
from tests.rules.sources import ROOT
from tests.unit.serve.small_models import DIALOGUES, write_random, write_tokenizer

pytest.importorskip("fastapi", reason="the server needs the extra serve")
QUESTIONS = tuple(question for question, _ in DIALOGUES)


def options(model: Path, **settings: Any) -> ServeOptions:
    """A server on any free port, embedded engine."""
    return ServeOptions(ModelOptions(model, **settings), engine="transformers", port=0, shutdown_seconds=0.1)


def test_a_model_that_ends_its_turns_passes(taught: Path) -> None:
    said: list[str] = []
    check(options(taught), tokens=60, questions=QUESTIONS, report=said.append)
    assert said[-1].startswith("check passed: 3 questions")
    assert any(DIALOGUES[0][1] in line and "stop" in line for line in said)


def test_an_answer_without_end_fails(rambling: Path) -> None:
    with pytest.raises(UserError, match=r"the answer to 'What can you do\?' did not end within 20 tokens \(length\)"):
        check(options(rambling), tokens=20, report=lambda line: None)


def test_a_missing_template_fails_and_a_given_one_is_used(untemplated: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no chat template, so it cannot chat"):
        check(options(untemplated), tokens=20, report=lambda line: None)
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    with pytest.raises(UserError, match="did not end"):
        check(options(untemplated, chat_template=template), tokens=20, report=lambda line: None)
    broken = tmp_path / "broken.jinja"
    broken.write_text("{% for m in messages %}")
    with pytest.raises(UserError, match="cannot render a question and an answer"):
        check(options(untemplated, chat_template=broken), tokens=20, report=lambda line: None)


def test_the_tool_leaves_with_1_and_one_sentence(untemplated: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "serve.py"), "--model", str(untemplated), "--check", "--check-tokens", "9"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and "no chat template" in done.stderr


def test_the_client_tells_what_the_server_says(server: str) -> None:
    ending = Ending()
    pieces = list(Client(server, "secret").chat("taught", [{"role": "user", "content": QUESTIONS[0]}], ending, temperature=0))
    assert "".join(pieces) == DIALOGUES[0][1] and len(pieces) > 3
    assert ending.reason == "stop" and ending.usage["completion_tokens"] > 3
    with pytest.raises(UserError, match="the key is missing"):
        Client(server).models()
    with pytest.raises(UserError, match="no server answers at http://127.0.0.1:9/v1"):
        Client("http://127.0.0.1:9/v1").models()


def test_the_terminal_chat(server: str) -> None:
    output = io.StringIO()
    lines = ["/set temperature 0", "/set", QUESTIONS[0], "/again", "/new", QUESTIONS[1], "/set max_tokens 3", "/new", QUESTIONS[2]]
    lines += ["/model", "/model other", "/sett x", "/set color 3", "/help", "/quit", "never asked"]
    talk(Conversation(Client(server, "secret"), "taught"), lines, output)
    shown = output.getvalue().splitlines()
    assert shown[:4] == ["temperature 0.0", DIALOGUES[0][1], DIALOGUES[0][1], DIALOGUES[1][1]]
    assert shown[5:7] == ["(cut at the limit of tokens)", "taught"]
    assert shown[7] == "error: 'other' is not served there, but taught"
    assert shown[8].startswith("error: /sett is no command; did you mean '/set'?")
    assert shown[9].startswith("error: /set takes a name and a value") and "/quit" in output.getvalue()


def test_the_chat_tool_over_a_folder_and_over_a_pipe(taught: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "chat.py"), "--model", str(taught), "--temperature", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, input=f"{QUESTIONS[0]}\n/new\n{QUESTIONS[2]}\n", capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0 and done.stdout.splitlines() == [DIALOGUES[0][1], DIALOGUES[2][1]], done.stderr
    done = subprocess.run([sys.executable, command[1]], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1 and done.stderr == "error: give either --model FOLDER or --endpoint URL: what answers?\n"


def found(model: Path, **settings: Any) -> Any:
    """The model that a server would serve."""
    chosen = ModelOptions(model, **settings)
    with hf_folders(chosen.model, chosen.adapters, lambda line: None) as folders:
        return load_language_model(chosen, folders, lambda line: None)


def logits(model: Any) -> torch.Tensor:
    """Logits of fixed ids."""
    ids = torch.arange(4, 14)[None]
    result: torch.Tensor = model.forward(ids, model.new_cache(), torch.ones_like(ids), torch.arange(10)[None])
    return result


def make_adapter(base: Path, folder: Path, seed: int) -> Any:
    """A LoRA adapter with weights that are not zero; returns the model of peft that was saved."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(base), settings).eval()
    model.save_pretrained(folder)
    return model


def test_base_and_adapter_compute_what_peft_does(rambling: Path, tmp_path: Path) -> None:
    plain = make_adapter(rambling, tmp_path / "lora", 1)
    expected = plain(torch.arange(4, 14)[None]).logits[:, -1]
    served = found(rambling, adapters=(tmp_path / "lora",))
    assert served.name == "lora"
    torch.testing.assert_close(logits(served), expected, atol=1e-5, rtol=1e-5)
    # The adapter alone, whose base its configuration names.
    torch.testing.assert_close(logits(found(tmp_path / "lora")), expected, atol=1e-5, rtol=1e-5)
    assert (logits(found(rambling)) - expected).abs().max() > 1e-3


def test_two_adapters_add_up(rambling: Path, tmp_path: Path) -> None:
    first, second = make_adapter(rambling, tmp_path / "a", 1), make_adapter(rambling, tmp_path / "b", 2)
    from transformers import LlamaForCausalLM

    plain: Any = LlamaForCausalLM.from_pretrained(rambling)
    base = {key: value.clone() for key, value in plain.state_dict().items()}
    merged = [model.merge_and_unload().state_dict() for model in (first, second)]
    plain.load_state_dict({key: value + sum(one[key] - value for one in merged) for key, value in base.items()})
    served = found(rambling, adapters=(tmp_path / "a", tmp_path / "b"))
    torch.testing.assert_close(logits(served), plain.eval()(torch.arange(4, 14)[None]).logits[:, -1], atol=1e-5, rtol=1e-5)


def test_an_adapter_of_another_model_is_refused(rambling: Path, tmp_path: Path) -> None:
    make_adapter(rambling, tmp_path / "lora", 1)
    settings = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    settings["target_modules"] = ["query_key_value"]
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="does not belong to this model"):
        found(rambling, adapters=(tmp_path / "lora",))
    with pytest.raises(UserError, match="holds no adapter_config.json"):
        found(rambling, adapters=(rambling,))
    settings["base_model_name_or_path"] = "nowhere/at-all"
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="an adapter of the base model 'nowhere/at-all', which is no folder here"):
        found(tmp_path / "lora")


def test_a_checkpoint_serves_in_either_form(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    config = small_model("llama", vocab_size=len(tokenizer))
    models = []
    for form in ("sharded", "hf"):
        step = save_random_model(single_process_groups(), tmp_path / form, config, tokenizer=tmp_path / "tokenizer", form=form)
        models += [found(tmp_path / form), found(step)]
        assert [model.name for model in models[-2:]] == [form, step.name] and models[-1].has_template
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    plain = loader.from_pretrained(step)(torch.arange(4, 14)[None]).logits[:, -1]
    for model in models:
        torch.testing.assert_close(logits(model), plain, atol=1e-5, rtol=1e-5)


def test_folders_that_cannot_be_served(rambling: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(rambling / name, bare)
    with pytest.raises(UserError, match="holds no tokenizer: copy"):
        found(bare)
    with pytest.raises(UserError, match="does not exist"):
        found(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no format that is known"):
        found(tmp_path / "empty")
    damaged = tmp_path / "damaged"
    shutil.copytree(rambling, damaged)
    (damaged / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be loaded by transformers"):
        found(damaged)
    with pytest.raises(UserError, match="--device cuda:77 cannot be used here"):
        found(rambling, device="cuda:77")
    larger = write_random(tmp_path / "larger")
    shutil.copy(rambling / "tokenizer.json", larger)
    settings = json.loads((larger / "tokenizer.json").read_text())
    settings["added_tokens"].append({**settings["added_tokens"][-1], "id": 5000, "content": "<|more|>"})
    (larger / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="entries and the model"):
        found(larger)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantized_loading_answers(rambling: Path, quantize: str) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    served, plain = found(rambling, quantize=quantize, dtype="float32"), logits(found(rambling))
    quantized = logits(served)
    similarity = torch.nn.functional.cosine_similarity(quantized.float(), plain, dim=-1).item()
    assert similarity > 0.9 and not torch.equal(quantized.float(), plain)


@pytest.mark.parametrize(
    ("word", "make"),
    [
        ("--engine is 'fast', but it must be one of", lambda folder: ServeOptions(ModelOptions(folder), engine="fast")),
        ("--port is 70000", lambda folder: ServeOptions(ModelOptions(folder), port=70000)),
        ("API_KEY is empty, or has spaces", lambda folder: ServeOptions(ModelOptions(folder), api_key=" x")),
        ("--max-running is 0, but it must be above 0", lambda folder: Limits(running=0)),
        ("--max-waiting is -1", lambda folder: Limits(waiting=-1)),
        ("--chat-template names the file", lambda folder: ModelOptions(folder, chat_template=folder / "none")),
        ("--endpoint is 'ftp://x'", lambda folder: Endpoint.parse("ftp://x")),
    ],
)
def test_bad_settings_are_one_sentence(tmp_path: Path, word: str, make: Any) -> None:
    with pytest.raises(UserError) as told:
        make(tmp_path)
    assert word in str(told.value)


def test_endpoints() -> None:
    assert Endpoint.parse("mine=http://a:1/v1/") == Endpoint("mine", "http://a:1/v1")
    assert Endpoint.parse("http://a:1/v1?x=2") == Endpoint("http://a:1/v1?x=2", "http://a:1/v1?x=2")
