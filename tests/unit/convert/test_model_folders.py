"""The folders of a model, from whatever a user names: weights of any format, adapters, the tokenizer that goes with them."""

import json
from pathlib import Path

import pytest

from megatron_llm.convert.model_folders import as_hf_folder, find_folders, hf_folders
from megatron_llm.parallel.groups import single_process_groups
from megatron_llm.utils.errors import UserError
from tests.checkpoints import save_random_model, small_model


def silent(_: str) -> None:
    """Hears nothing."""


def make(folder: Path, *names: str) -> Path:
    """A folder with these empty files."""
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    return folder


def make_adapter(folder: Path, base: str, *names: str) -> Path:
    """A folder that looks like an adapter of this base."""
    make(folder, "adapter_model.safetensors", *names)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    return folder


HF = ("config.json", "model.safetensors", "tokenizer.json")


def test_the_last_adapter_with_a_tokenizer_gives_it(tmp_path: Path) -> None:
    base = make(tmp_path / "base", *HF)
    with_one = make_adapter(tmp_path / "one", "x", "tokenizer.json")
    without = make_adapter(tmp_path / "two", "x")
    found = find_folders(base, [with_one, without], silent)
    assert (found.weights, found.tokenizer, found.adapters) == (base, with_one, (with_one, without))
    assert find_folders(base, [without], silent).tokenizer == base
    with pytest.raises(UserError, match=r"the adapter .*base holds no adapter_config\.json"):
        find_folders(base, [base], silent)


@pytest.mark.parametrize("where", ["absolute", "beside"])
def test_an_adapter_alone_brings_its_base(where: str, tmp_path: Path) -> None:
    base = make(tmp_path / "base", *HF)
    adapter = make_adapter(tmp_path / "lora", str(base) if where == "absolute" else "../base")
    found = find_folders(adapter, [], silent)
    assert found.weights.resolve() == base and found.adapters == (adapter,)
    more = make_adapter(tmp_path / "more", "x")
    assert find_folders(adapter, [more], silent).adapters == (adapter, more)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"base_model_name_or_path": "no/where"}', "is an adapter of the base model 'no/where', which is no folder here"),
        ("{}", "is an adapter of the base model 'None', which is no folder here"),
        ("[]", "adapter_config.json holds a list, expected a JSON object"),
        ("{", "adapter_config.json is not valid JSON"),
    ],
)
def test_an_adapter_whose_base_cannot_be_told(content: str, sentence: str, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "lora", "x")
    (adapter / "adapter_config.json").write_text(content)
    with pytest.raises(UserError, match=sentence):
        find_folders(adapter, [], silent)


def test_what_is_no_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the model folder .*none does not exist"):
        find_folders(tmp_path / "none", [], silent)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="the model folder .*file is a file"):
        find_folders(tmp_path / "file", [], silent)
    with pytest.raises(UserError, match="in no format that is known"):
        find_folders(make(tmp_path / "empty"), [], silent)
    with pytest.raises(UserError, match="bare holds no tokenizer: copy"):
        find_folders(make(tmp_path / "bare", *HF[:2]), [], silent)
    make(tmp_path / "run" / "step_0000003")
    with pytest.raises(UserError, match="no complete checkpoint in .*run"):
        find_folders(tmp_path / "run", [], silent)


def test_the_checkpoints_of_a_megatron_run_share_its_tokenizer(tmp_path: Path) -> None:
    run = make(tmp_path / "run", "tokenizer/tokenizer.json")
    step = make(run / "iter_0000005", "mp_rank_00/model_optim_rng.pt")
    assert find_folders(step, [], silent).tokenizer == run / "tokenizer"


def test_weights_in_another_form_get_a_folder_for_the_time_of_use(tmp_path: Path) -> None:
    step = save_random_model(single_process_groups(), tmp_path / "run", small_model("llama"))
    adapter = make_adapter(tmp_path / "lora", str(tmp_path / "run"), "tokenizer.json")
    said: list[str] = []
    with hf_folders(adapter, [], said.append) as found:
        assert (found.weights / "config.json").is_file() and found.weights != step
        assert (found.tokenizer, found.adapters) == (adapter, (adapter,))
    assert not found.weights.parent.exists()
    assert any(line.startswith(f"{step} is no Hugging Face folder: converting it") for line in said)
    plain = make(tmp_path / "hf", *HF)
    with as_hf_folder(plain, said.append) as folder:
        assert folder == plain
    assert plain.is_dir()
