"""Merging adapters: equal logits by peft for every kind of adapter, exact weights, what is carried along, and running it twice."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_llm.checkpoint.hf_folder import list_tensors
from megatron_llm.lora import merge_weights
from megatron_llm.lora.merge import REPORT, MergeOptions, merge
from megatron_llm.utils.errors import UserError
from tests.small_tokenizers import byte_level
from tests.unit.lora.tiny import (
    EMBEDDING,
    TARGET,
    adapter_logits,
    contents,
    folder_logits,
    make_adapter,
    make_base,
    make_model,
    some_ids,
)

FAMILIES = ["llama", "gpt2", "bloom"]


def quietly(line: str) -> None:
    """No output."""


def read(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dictionary
    return found


def check(base: Path, adapters: list[Path], merged: Path, rows: int | None = None) -> None:
    """The merged folder, by transformers, computes what base and adapters do, by peft, and not what the base does."""
    ids = some_ids(rows or 50)
    expected, found = adapter_logits(base, adapters, ids, rows), folder_logits(merged, ids)
    scale = expected.abs().max().item()
    assert scale > 1.0
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * scale)
    if rows is None:
        assert (found - folder_logits(base, ids)).abs().max() > 0.05 * scale


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("extended", [False, True], ids=["", "extended"])
def test_logits_are_those_of_base_and_adapters(tmp_path: Path, family: str, count: int, extended: bool) -> None:
    base = make_base(tmp_path / "base", family)
    rows = 61 if extended else None
    more = {"modules_to_save": [EMBEDDING[family], "lm_head"]} if extended else {}
    adapters = [
        make_adapter(tmp_path / f"a{number}", base, seed=number, rows=rows, target_modules=[TARGET[family]], **more)
        for number in range(1, count + 1)
    ]
    report = merge(base, [(folder, 1.0) for folder in adapters], tmp_path / "out", MergeOptions(max_shard_bytes=5000), quietly)
    check(base, adapters, tmp_path / "out", rows)
    assert report["verified"] and report["comparison"]["largest_difference"] <= report["comparison"]["tolerance"]
    assert report["vocab_size"] == {"base": 50, "merged": rows or 50}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == (rows or 50)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2


KINDS: list[tuple[str, dict[str, Any]]] = [
    ("rslora", {"use_rslora": True, "r": 3}),
    ("dora", {"use_dora": True}),
    ("all linear", {"target_modules": "all-linear"}),
    ("pissa", {"init_lora_weights": "pissa"}),
    ("gaussian", {"init_lora_weights": "gaussian"}),
    ("head dora", {"target_modules": ["lm_head"], "use_dora": True}),
    ("embedding", {"target_modules": ["EMBEDDING"]}),
    ("embedding dora", {"target_modules": ["EMBEDDING"], "use_dora": True}),
    ("both ends", {"target_modules": ["EMBEDDING", "lm_head"]}),
    ("saved embedding", {"modules_to_save": ["EMBEDDING"]}),
    ("saved head", {"modules_to_save": ["lm_head"]}),
    ("saved and tied", {"modules_to_save": ["EMBEDDING", "lm_head"], "ensure_weight_tying": True}),
    ("tokens", {"trainable_token_indices": [3, 49]}),
    ("one layer", {"layers_to_transform": [1]}),
    ("patterns", {"rank_pattern": {"TARGET": 3}, "alpha_pattern": {r".*\.1\..*": 9}, "target_modules": ["TARGET", "dense", "o_proj"]}),
    ("larger", {"rows": 57}),
    ("larger and tokens", {"rows": 57, "trainable_token_indices": [50, 56]}),
    ("larger, all saved", {"rows": 57, "modules_to_save": ["EMBEDDING", "lm_head"], "save_embeddings": False}),
    ("smaller", {"rows": 40}),
]


@pytest.mark.parametrize("family", ["llama", "llama tied", "gpt2", "bloom"])
@pytest.mark.parametrize(("name", "settings"), KINDS, ids=[name for name, _ in KINDS])
def test_every_kind_of_adapter(tmp_path: Path, family: str, name: str, settings: dict[str, Any]) -> None:
    family, _, tied = family.partition(" ")
    words = {"EMBEDDING": EMBEDDING[family], "TARGET": TARGET[family]}
    text = json.dumps({"target_modules": [TARGET[family]], **settings})
    for word, meant in words.items():
        text = text.replace(word, meant)
    given = json.loads(text)
    base = make_base(tmp_path / "base", family, tied=True if tied else None)
    adapter = make_adapter(tmp_path / "adapter", base, **given)
    report = merge(base, [(adapter, 1.0)], tmp_path / "out", MergeOptions(), quietly)
    assert report["verified"] and report["comparison"]["way"] == "layer by layer"
    check(base, [adapter], tmp_path / "out", given.get("rows"))


BLOCKWISE: list[dict[str, Any]] = [
    {"use_dora": True, "target_modules": ["TARGET", "dense", "c_proj", "o_proj"]},
    {"rows": 57, "trainable_token_indices": [50, 56]},
    {"rows": 57, "modules_to_save": ["EMBEDDING", "lm_head"]},
    {"rows": 40, "target_modules": ["EMBEDDING", "lm_head"]},
    {"trainable_token_indices": [0, 3, 4, 49]},
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", BLOCKWISE, ids=lambda value: "-".join(value))
def test_blocks_of_rows_fit_together(tmp_path: Path, family: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_weights, "_BLOCK", 70)  # four rows of the embedding
    text = json.dumps({"target_modules": [TARGET[family]], **settings})
    given = json.loads(text.replace("EMBEDDING", EMBEDDING[family]).replace("TARGET", TARGET[family]))
    base = make_base(tmp_path / "base", family)
    adapter = make_adapter(tmp_path / "adapter", base, **given)
    assert merge(base, [(adapter, 1.0)], tmp_path / "out", MergeOptions(), quietly)["verified"]
    check(base, [adapter], tmp_path / "out", given.get("rows"))


@pytest.mark.parametrize("settings", [{"bias": "lora_only"}, {"bias": "all"}, {"lora_bias": True}], ids=str)
def test_biases(tmp_path: Path, settings: dict[str, Any]) -> None:
    base = make_base(tmp_path / "base", "gpt2")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["c_attn"], **settings)
    merge(base, [(adapter, 1.0)], tmp_path / "out", MergeOptions(), quietly)
    check(base, [adapter], tmp_path / "out")


def test_modules_that_are_stored_transposed_are_saved_whole(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "gpt2")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["c_attn"], modules_to_save=["c_fc", "attn.c_proj"])
    merge(base, [(adapter, 1.0)], tmp_path / "out", MergeOptions(), quietly)
    check(base, [adapter], tmp_path / "out")


def test_weights_of_adapters_scale_what_they_add(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    adapters = [make_adapter(tmp_path / f"a{number}", base, seed=number, target_modules=["q_proj"]) for number in (1, 2)]
    report = merge(base, [(adapters[0], 0.5), (adapters[1], -2.0)], tmp_path / "out", MergeOptions(), quietly)
    before, after = read(base), read(tmp_path / "out")
    for name in before:
        expected = before[name].double()
        if "q_proj" in name:
            for folder, weight in zip(adapters, (0.5, -2.0), strict=True):
                factors = load_file(folder / "adapter_model.safetensors")
                module = "base_model.model." + name.removesuffix(".weight")
                up, down = (factors[f"{module}.lora_{letter}.weight"].double() for letter in "BA")
                expected = expected + weight * 5 / 2 * up @ down
            (entry,) = [change for change in report["changed"] if change["tensor"] == name]
            assert entry["norm"] == pytest.approx((after[name].double() - before[name].double()).norm().item(), rel=1e-6)
            assert entry["relative"] == pytest.approx(entry["norm"] / before[name].double().norm().item(), rel=1e-6)
            assert entry["elements"] == int((after[name] != before[name]).sum())
            torch.testing.assert_close(after[name].double(), expected, rtol=0, atol=1e-6)
        else:
            assert torch.equal(after[name], before[name])
    assert len(report["changed"]) == 2 and report["unchanged"] == len(before) - 2
    assert [adapter["modules"] for adapter in report["adapters"]] == [2, 2]


@pytest.mark.parametrize(
    "kind", [{"use_dora": True}, {"modules_to_save": ["embed_tokens", "lm_head"], "rows": 60}], ids=["dora", "vocabulary"]
)
def test_a_weight_goes_part_of_the_way(tmp_path: Path, kind: dict[str, Any]) -> None:
    base = make_base(tmp_path / "base", "llama")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], **kind)
    for name, weight in (("whole", 1.0), ("half", 0.5)):
        assert merge(base, [(adapter, weight)], tmp_path / name, MergeOptions(), quietly)["verified"]
    before, whole, half = (read(tmp_path / name) for name in ("base", "whole", "half"))
    for name, tensor in half.items():
        rows = len(before[name])
        torch.testing.assert_close(tensor[:rows], (before[name] + whole[name][:rows]) / 2, rtol=0, atol=1e-6)
        assert torch.equal(tensor[rows:], whole[name][rows:])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_are_rounded_once(tmp_path: Path, family: str, dtype: str) -> None:
    base = make_base(tmp_path / "base", family, dtype=torch.bfloat16)
    adapters = [make_adapter(tmp_path / f"a{number}", base, seed=number, target_modules=[TARGET[family]]) for number in (1, 2)]
    exact = merge(base, [(folder, 1.0) for folder in adapters], tmp_path / "exact", MergeOptions(dtype="float32"), quietly)
    short = merge(base, [(folder, 1.0) for folder in adapters], tmp_path / "short", MergeOptions(dtype=dtype), quietly)
    one, other = read(tmp_path / "exact"), read(tmp_path / "short")
    assert exact["dtype"] == "float32" and short["dtype"] == dtype and short["comparison"]["rounding"] > 0
    assert all(torch.equal(one[name].to(getattr(torch, dtype)), other[name]) for name in one)
    assert json.loads((tmp_path / "short" / "config.json").read_text())["dtype"] == dtype
    as_saved = merge(base, [(folder, 1.0) for folder in adapters], tmp_path / "as_saved", MergeOptions(), quietly)
    assert as_saved["dtype"] == "bfloat16"


def test_a_base_in_older_files_and_an_adapter_in_older_files(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    merge(base, [(adapter, 1.0)], tmp_path / "new", MergeOptions(), quietly)
    torch.save(read(base), base / "pytorch_model.bin")
    for file in [*base.glob("*.safetensors"), base / "model.safetensors.index.json"]:
        file.unlink()
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    merge(base, [(adapter, 1.0)], tmp_path / "old", MergeOptions(), quietly)
    one, other = read(tmp_path / "new"), read(tmp_path / "old")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_names_without_the_prefix_of_the_inner_model(tmp_path: Path) -> None:
    """Published GPT-2 and Bloom folders are saved without `transformer.`."""
    model = make_model("gpt2")
    model.transformer.save_pretrained(tmp_path / "base")
    assert "h.0.attn.c_attn.weight" in list_tensors(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base", target_modules=["c_attn"])
    merge(tmp_path / "base", [(adapter, 1.0)], tmp_path / "out", MergeOptions(), quietly)
    check(tmp_path / "base", [adapter], tmp_path / "out")


def test_the_same_inputs_give_the_same_bytes_and_inputs_are_not_touched(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "bloom")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["query_key_value"])
    before = contents(tmp_path)
    lines: list[str] = []
    first = merge(base, [(adapter, 1.0)], tmp_path / "one", MergeOptions(), lines.append)
    merge(base, [(adapter, 1.0)], tmp_path / "two", MergeOptions(), lines.append)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert {name: data for name, data in contents(tmp_path).items() if not name.startswith(("one", "two"))} == before
    stamp = (tmp_path / "one" / REPORT).stat().st_mtime_ns
    assert merge(base, [(adapter, 1.0)], tmp_path / "one", MergeOptions(), lines.append) == first
    assert "up to date" in lines[-1] and (tmp_path / "one" / REPORT).stat().st_mtime_ns == stamp


def test_what_differs_is_merged_again(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    merge(base, [(adapter, 1.0)], tmp_path / "out", MergeOptions(), quietly)
    good = contents(tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    merge(base, [(adapter, 1.0)], tmp_path / "out", MergeOptions(), quietly)
    assert contents(tmp_path / "out") == good, "a damaged file is written anew"
    merge(base, [(adapter, 0.5)], tmp_path / "out", MergeOptions(verify=False), quietly)
    unproven = json.loads((tmp_path / "out" / REPORT).read_text())
    assert contents(tmp_path / "out") != good and not unproven["verified"]
    assert merge(base, [(adapter, 0.5)], tmp_path / "out", MergeOptions(), quietly)["verified"], "an unproven folder is proven when asked"


def test_tokenizer_and_template_of_the_adapter_go_along(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    adapter = make_adapter(tmp_path / "adapter", base, rows=330, target_modules=["q_proj"])
    byte_level(base, size=300)
    (base / "chat_template.jinja").write_text("base")
    byte_level(adapter, extra=["<|im_end|>"], size=300)
    (adapter / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    (adapter / "chat_template.jinja").write_text("adapter")
    (adapter / "trainer_state.json").write_text("{}")
    merge(base, [(adapter, 1.0)], tmp_path / "out", MergeOptions(), quietly)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (adapter / name).read_bytes()
    assert not (tmp_path / "out" / "trainer_state.json").exists() and not (tmp_path / "out" / "adapter_config.json").exists()
    end = json.loads((adapter / "tokenizer.json").read_text())["model"]["vocab"]["<|im_end|>"]
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == end


def test_a_template_alone_and_no_tokenizer_in_the_adapter(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama", seed=3)
    adapter = make_adapter(tmp_path / "adapter", base, rows=330, target_modules=["q_proj"])
    byte_level(base, size=300)
    (adapter / "chat_template.jinja").write_text("adapter")
    merge(base, [(adapter, 1.0)], tmp_path / "out", MergeOptions(), quietly)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "adapter"


def test_a_tokenizer_that_is_larger_than_the_model(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    byte_level(adapter, size=300)
    with pytest.raises(UserError, match=r"has \d+ entries, the merged model 50: the rows of the new tokens were not saved"):
        merge(base, [(adapter, 1.0)], tmp_path / "out", MergeOptions(), quietly)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.rejected").exists()


def test_notes_tell_of_another_base_name_and_of_lost_training(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama", dtype=torch.bfloat16)
    adapter = make_adapter(tmp_path / "adapter", base, scale=0.0005, target_modules=["q_proj"])
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "someone/model-7b"}))
    lines: list[str] = []
    report = merge(base, [(adapter, 1.0)], tmp_path / "out", MergeOptions(), lines.append)
    assert any("trained on model-7b, the base is base" in line for line in lines)
    assert any("rounding the merged weights moves a logit" in note for note in report["notes"])
    assert math.isfinite(report["comparison"]["effect"])
