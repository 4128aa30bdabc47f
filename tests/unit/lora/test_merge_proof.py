"""The proof layer by layer is the proof on whole models, holds no weights, knows a damaged merge, and says when it cannot be."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_llm.checkpoint.streamed import stream_weights
from megatron_llm.lora import merge_proof, merge_proof_streamed
from megatron_llm.lora.adapter import Adapter
from megatron_llm.lora.base import Base
from megatron_llm.lora.merge import REPORT, MergeOptions, merge
from megatron_llm.lora.merge_proof_streamed import expected_streamed, folder_logits
from megatron_llm.lora.merge_proof_weights import CannotStream
from megatron_llm.lora.merge_proof_whole import expected_whole, open_whole
from megatron_llm.utils.errors import UserError
from tests.unit.lora.tiny import EMBEDDING, TARGET, make_adapter, make_base, quiet, some_ids

# name of the case, families, the adapters' settings, their weights
FAMILIES = ("llama", "llama tied", "llama grouped", "gpt2", "bloom")
CASES: list[tuple[str, tuple[str, ...], list[dict[str, Any]], list[float]]] = [
    ("lora", FAMILIES, [{}], [1.0]),
    ("rslora", ("llama grouped",), [{"use_rslora": True, "r": 3}], [1.0]),
    ("all linear", ("llama", "gpt2"), [{"target_modules": "all-linear"}], [1.0]),
    ("dora", FAMILIES, [{"use_dora": True}], [1.0]),
    ("two with weights", FAMILIES, [{}, {"r": 3}], [0.5, -2.0]),
    ("two, the last as it is", ("llama", "gpt2"), [{}, {"target_modules": ["TARGET", "c_fc", "up_proj"]}], [0.7, 1.0]),
    ("a chain of dora", ("llama", "bloom"), [{"use_dora": True}, {"use_dora": True}, {}], [1.0, 0.5, 1.0]),
    ("pissa", ("llama", "gpt2"), [{"init_lora_weights": "pissa"}, {"init_lora_weights": "pissa"}], [1.0, 1.0]),
    ("olora", ("llama",), [{"init_lora_weights": "olora"}], [1.0]),
    ("biases", ("gpt2",), [{"bias": "all"}], [0.5]),
    ("bias of B", ("gpt2",), [{"lora_bias": True}], [1.0]),
    ("larger, saved", FAMILIES, [{"rows": 61, "modules_to_save": ["EMBEDDING", "lm_head"]}], [1.0]),
    ("larger, half", ("llama", "bloom"), [{"rows": 61, "modules_to_save": ["EMBEDDING", "lm_head"]}], [0.5]),
    ("smaller", ("llama tied",), [{"rows": 40, "target_modules": ["EMBEDDING", "lm_head"]}], [1.0]),
    ("saved head", ("llama tied", "gpt2"), [{"modules_to_save": ["lm_head"]}, {}], [1.0, 1.0]),
    ("kept tied", ("llama tied",), [{"modules_to_save": ["EMBEDDING", "lm_head"], "ensure_weight_tying": True}], [1.0]),
    ("both ends", ("llama", "llama tied", "gpt2"), [{"target_modules": ["EMBEDDING", "lm_head"]}], [1.0]),
    ("embedding dora", ("llama tied",), [{"target_modules": ["EMBEDDING"], "use_dora": True}], [1.0]),
    ("tokens", ("llama", "gpt2"), [{"trainable_token_indices": [3, 49]}], [1.0]),
    ("larger and tokens", ("llama tied",), [{"rows": 57, "trainable_token_indices": [50, 56]}], [1.0]),
]
PARAMETERS = [
    pytest.param(family, settings, weights, id=f"{name}-{family}") for name, families, settings, weights in CASES for family in families
]


def quietly(line: str) -> None:
    """No output."""


def base_of(folder: Path, family: str, **options: Any) -> Path:
    """A base of a family, perhaps tied or grouped."""
    name, _, kind = family.partition(" ")
    return make_base(folder, name, tied=True if kind == "tied" else None, groups=1 if kind == "grouped" else None, **options)


def adapter_of(folder: Path, base: Path, family: str, settings: dict[str, Any], **options: Any) -> Path:
    """An adapter, with words for the names of modules of the family."""
    name = family.partition(" ")[0]
    text = json.dumps({"target_modules": [TARGET[name]], **settings})
    return make_adapter(folder, base, **json.loads(text.replace("EMBEDDING", EMBEDDING[name]).replace("TARGET", TARGET[name])), **options)


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny matrices are read as large ones are."""
    monkeypatch.setattr(stream_weights, "__kwdefaults__", {"small": 20, "large": 300})
    monkeypatch.setattr(merge_proof, "_OPENED_WHOLE", 0)


@pytest.mark.parametrize(("family", "settings", "weights"), PARAMETERS)
def test_streamed_logits_are_those_of_whole_models(
    tmp_path: Path, family: str, settings: list[dict[str, Any]], weights: list[float]
) -> None:
    base = Base(base_of(tmp_path / "base", family))
    folders = [adapter_of(tmp_path / f"a{number}", base.folder, family, each, seed=number + 1) for number, each in enumerate(settings)]
    adapters = [Adapter(folder, weight) for folder, weight in zip(folders, weights, strict=True)]
    rows = settings[0].get("rows")
    ids, dtypes = some_ids(rows or 50), dict.fromkeys(base.tensors.specs, torch.bfloat16)
    with quiet(), torch.no_grad():
        streamed = expected_streamed(base, adapters, ids, dtypes, vocab_size=rows)
        whole = expected_whole(base, adapters, ids, dtypes, same_vocabulary=rows is None)
    assert (streamed.plain is None) == (whole.plain is None) == (rows is not None)
    assert whole.rounded is not None and not torch.equal(whole.adapted, whole.rounded)
    for found, expected in zip(streamed, whole, strict=True):
        if found is not None and expected is not None:
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_layer_by_layer(tmp_path: Path, family: str) -> None:
    base, ids = base_of(tmp_path / "base", family, dtype=torch.bfloat16), some_ids()
    with quiet(), torch.no_grad():
        found, expected = folder_logits(base, ids), open_whole(base)(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def test_no_weight_of_the_base_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before, not after, and while it runs those of one layer."""
    base = Base(base_of(tmp_path / "base", "llama"))
    folder = adapter_of(tmp_path / "adapter", base.folder, "llama", {"target_modules": "all-linear"})
    with quiet(), torch.no_grad():
        model = merge_proof_streamed._AdaptedModel(base, [Adapter(folder)], {}, None)
        weights = [module for name, module in model._adapted.named_modules() if name.endswith("base_layer")]
        assert len(weights) == 14
        held: list[int] = []
        for module in weights:
            module.register_forward_hook(lambda *_: held.append(sum(not each.weight.is_meta for each in weights)))
        model.logits(some_ids(), applied=1, unmerged=True)
    assert held == [1] * 14
    names = [name for name, value in model._adapted.named_parameters() if value.dim() == 2 and "lora_" not in name and not value.is_meta]
    assert names == [], "only norms and factors are real"


@pytest.mark.parametrize(
    ("tensor", "dtype"),
    [
        ("model.layers.1.mlp.down_proj.weight", "float32"),
        ("model.layers.0.self_attn.q_proj.weight", "bfloat16"),
        ("model.norm.weight", "bfloat16"),
    ],
)
def test_a_damaged_merge_is_known(tmp_path: Path, tensor: str, dtype: str) -> None:
    """One column of one matrix, changed or not by the adapter, is a fifth larger than it should be."""
    base = base_of(tmp_path / "base", "llama")
    adapter = adapter_of(tmp_path / "adapter", base, "llama", {})
    merge(base, [(adapter, 1.0)], tmp_path / "out", MergeOptions(dtype=dtype), quietly)
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    assert report["comparison"]["way"] == "layer by layer" and "layer by layer" in report["comparison"]["judges"][1]
    opened, dtypes = Base(base), dict.fromkeys(Base(base).tensors.specs, getattr(torch, dtype))
    compared = merge_proof.compare_merged(opened, [Adapter(adapter)], tmp_path / "out", dtypes, 50)
    assert compared.passed and compared.largest_difference == report["comparison"]["largest_difference"]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    stored[tensor][..., :1] *= 1.2
    save_file(stored, tmp_path / "out" / "model.safetensors")
    damaged = merge_proof.compare_merged(opened, [Adapter(adapter)], tmp_path / "out", dtypes, 50)
    assert not damaged.passed and damaged.largest_difference > damaged.tolerance


def test_factors_that_are_not_the_files_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """peft that loads nothing, or one factor wrongly, leaves others than the file holds: at their start, where B is zero."""
    base = Base(base_of(tmp_path / "base", "llama"))
    adapters = [Adapter(adapter_of(tmp_path / "adapter", base.folder, "llama", {}))]

    def run() -> None:
        with quiet(), torch.no_grad():
            expected_streamed(base, adapters, some_ids(), {}, vocab_size=None)

    run()
    load = peft.set_peft_model_state_dict
    monkeypatch.setattr(peft, "set_peft_model_state_dict", lambda *_, **__: None)
    with pytest.raises(CannotStream, match="peft has other factors than .*adapter: base_model.model.model.layers.0.self_attn.q_proj.lora_"):
        run()

    def one_missing(model: Any, tensors: dict[str, torch.Tensor], **words: Any) -> None:
        load(model, dict(list(tensors.items())[1:]), **words)

    monkeypatch.setattr(peft, "set_peft_model_state_dict", one_missing)
    with pytest.raises(CannotStream, match="peft has other factors"):
        run()


def test_what_cannot_be_streamed_is_proven_on_whole_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary that grows twice, and a merged folder that is refused; the report and the last line say so."""

    def refuse(folder: Path, ids: torch.Tensor) -> torch.Tensor:
        raise CannotStream("other names")

    monkeypatch.setattr(merge_proof, "folder_logits", refuse)
    base = base_of(tmp_path / "base", "llama")
    saved = {"modules_to_save": ["EMBEDDING", "lm_head"]}
    adapters = [adapter_of(tmp_path / f"a{rows}", base, "llama", {"rows": rows, **saved}) for rows in (57, 61)]
    lines: list[str] = []
    report = merge(base, [(folder, 1.0) for folder in adapters], tmp_path / "out", MergeOptions(), lines.append)
    assert report["verified"] and report["vocab_size"]["merged"] == 61
    assert report["comparison"]["way"].startswith("on whole models (") and "in another size than the merged model" in lines[-1]
    judges = report["comparison"]["judges"]
    assert judges[0].endswith(report["comparison"]["way"]) and judges[1].endswith("on the merged folder, from_pretrained (other names)")


def test_a_base_with_weights_that_its_class_does_not_know(tmp_path: Path) -> None:
    """Neither way runs a model of which a part is not used."""
    base = base_of(tmp_path / "base", "llama")
    save_file({"model.extra.weight": torch.zeros(2, 2)}, base / "model-extra.safetensors")
    index = json.loads((base / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.extra.weight"] = "model-extra.safetensors"
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with quiet(), torch.no_grad(), pytest.raises(CannotStream, match="names its weights otherwise than .*, which has model.extra.weight"):
        folder_logits(base, some_ids())
    adapter = adapter_of(tmp_path / "adapter", make_base(tmp_path / "other", "llama"), "llama", {})
    with pytest.raises(UserError, match="could not check: transformers does not use .* as it is"):
        merge(base, [(adapter, 1.0)], tmp_path / "out", MergeOptions(), quietly)
