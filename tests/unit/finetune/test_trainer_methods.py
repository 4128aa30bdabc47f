"""What is trained and what is written by each method, on every family; the base in 8 and 4 bits; larger vocabularies."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_llm.finetune.arguments import parse_finetune_config
from megatron_llm.utils.errors import UserError
from tests.families import CASES
from tests.small_tokenizers import byte_level
from tests.unit.finetune.runs import base_folder, log, run, step_losses, write_pairs

peft = pytest.importorskip("peft", reason="peft is not installed: it comes with the extra finetune")
pytest.importorskip("accelerate", reason="accelerate is not installed: it comes with the extra finetune")

SHORT = ("--train-iters", "3", "--lr", "1e-2", "--validation-split", "0")
TARGETS = {"gpt": {"c_attn"}, "bloom": {"query_key_value"}, "gpt_neox": {"query_key_value"}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama in `m` and pairs in `p.jsonl`."""
    folder = tmp_path_factory.mktemp("methods")
    base_folder(folder / "m")
    write_pairs(folder / "p.jsonl", 12)
    return folder


def load(folder: Path, rows: int | None = None) -> Any:
    """A folder's model in fp32, grown to a number of rows."""
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    model = loader.from_pretrained(folder, dtype=torch.float32).eval()
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def logits(model: Any) -> torch.Tensor:
    """Logits of fixed ids."""
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 17)[None]).logits


def changed(before: Path, after: Path) -> set[str]:
    """Names of the weights that training changed."""
    old, new = load(before).state_dict(), load(after).state_dict()
    return {name for name in old if not torch.equal(old[name], new[name])}


def adapter_tensors(save: Path) -> dict[str, torch.Tensor]:
    """What an adapter folder holds."""
    return load_file(save / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("family", sorted({case.family for case in CASES if case.native}))
def test_lora_on_every_family(family: str, place: Path, tmp_path: Path) -> None:
    base = base_folder(tmp_path / "m", family)
    run(base, place / "p.jsonl", tmp_path / "r", *SHORT)
    settings = json.loads((tmp_path / "r" / "adapter" / "adapter_config.json").read_text())
    assert set(settings["target_modules"]) == TARGETS.get(family, {"q_proj", "v_proj"})
    assert settings["base_model_name_or_path"] == str(base.resolve())
    model = load(base)
    before = logits(model)
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "r" / "adapter").eval()
    assert not torch.allclose(logits(loaded), before, atol=1e-4)
    assert len({entry["loss"] for entry in log(tmp_path / "r")}) == 3


def test_freeze_trains_the_last_layers_only(place: Path, tmp_path: Path) -> None:
    run(place / "m", place / "p.jsonl", tmp_path / "a", *SHORT, "--method", "freeze", "--trainable-layers", "1")
    names = changed(place / "m", tmp_path / "a" / "model")
    assert names and all(name.startswith("model.layers.1.") for name in names)
    run(
        *(place / "m", place / "p.jsonl", tmp_path / "b", *SHORT, "--method", "freeze"),
        *("--trainable-layers", "2", "--trainable-modules", "mlp"),
    )
    names = changed(place / "m", tmp_path / "b" / "model")
    assert len(names) == 6 and all(".mlp." in name for name in names)


def test_embeddings_only(place: Path, tmp_path: Path) -> None:
    run(place / "m", place / "p.jsonl", tmp_path / "r", *SHORT, "--method", "embeddings")
    assert changed(place / "m", tmp_path / "r" / "model") == {"model.embed_tokens.weight", "lm_head.weight"}
    assert (tmp_path / "r" / "model" / "chat_template.jinja").is_file()
    ends = json.loads((tmp_path / "r" / "model" / "generation_config.json").read_text())["eos_token_id"]
    assert len(ends) == 2  # the end of a text and the end of an answer


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("llama", True), ("bloom", True), ("gpt", True)])
def test_modules_to_save_have_no_duplicates_and_stay_tied(family: str, tied: bool, place: Path, tmp_path: Path) -> None:
    base = base_folder(tmp_path / "m", family, tie_word_embeddings=tied)
    run(base, place / "p.jsonl", tmp_path / "r", *SHORT, "--modules-to-save", "embed_tokens,lm_head")
    # peft alone writes each of them up to three times; of a tied pair it writes, and reads, both.
    big = [value for value in adapter_tensors(tmp_path / "r").values() if value.shape[0] == 286]
    assert len(big) == 2 and torch.equal(*big) == tied
    model = load(base)
    before = logits(model)
    merged = peft.PeftModel.from_pretrained(model, tmp_path / "r" / "adapter").merge_and_unload().eval()
    assert not torch.allclose(logits(merged), before, atol=1e-4)
    same = torch.equal(merged.get_input_embeddings().weight, merged.get_output_embeddings().weight)
    assert same == tied


def test_a_template_with_new_tokens_trains_their_rows(place: Path, tmp_path: Path) -> None:
    said: list[str] = []
    run(place / "m", place / "p.jsonl", tmp_path / "r", *SHORT, "--template", "chatml", said=said)
    assert any("4 new special tokens" in line for line in said) and any("are trained too" in line for line in said)
    rows = 286 + 4
    tensors = adapter_tensors(tmp_path / "r")
    assert [value.shape[0] for value in tensors.values() if value.shape[0] > 200] == [rows, rows]
    loaded = peft.PeftModel.from_pretrained(load(place / "m", rows), tmp_path / "r" / "adapter")
    assert torch.isfinite(logits(loaded)).all()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_continued_pretraining_with_another_tokenizer(method: str, place: Path, tmp_path: Path) -> None:
    new = byte_level(tmp_path / "larger", size=283, extra=["zebra", "lowlow"])
    new.save_pretrained(tmp_path / "larger")
    settings = json.loads((tmp_path / "larger" / "tokenizer_config.json").read_text())
    (tmp_path / "larger" / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<|endoftext|>"}))
    base_folder(tmp_path / "old")
    small = base_folder(tmp_path / "m", vocab_size=284)
    byte_level(small, size=283).save_pretrained(small)
    (small / "chat_template.jinja").unlink(missing_ok=True)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("the zebra sat low lowlow on the mat\n" * 30)
    said: list[str] = []
    run(
        *(small, tmp_path / "texts", tmp_path / "r", "--train-iters", "3", "--stage", "pt", "--method", method),
        *("--tokenizer", str(tmp_path / "larger"), "--max-length", "16"),
        said=said,
    )
    assert "vocabulary: extend by 2: 284 -> 286" in said
    if method == "full":
        assert load(tmp_path / "r" / "model").get_input_embeddings().weight.shape[0] == 286
    else:
        assert sum(value.shape[0] == 286 for value in adapter_tensors(tmp_path / "r").values()) == 2
    assert any("blocks of 16 tokens" in line for line in said)


@pytest.mark.parametrize("kind", ["int8", "nf4", "fp4"])
def test_lora_over_a_quantised_base_on_the_cpu(kind: str, place: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: it comes with the extra quant")
    flags = ("--train-iters", "12", "--lr", "1e-2", "--valid-data", str(place / "p.jsonl"), "--lora-targets", "all-linear")
    run(place / "m", place / "p.jsonl", tmp_path / "r", *flags, "--quantize", kind)
    run(place / "m", place / "p.jsonl", tmp_path / "whole", *flags)
    losses, whole = step_losses(tmp_path / "r"), step_losses(tmp_path / "whole")
    assert losses[0] == pytest.approx(whole[0], rel=0.02 if kind == "int8" else 0.1) and losses[0] != whole[0]
    evaluations = [entry["loss"] for entry in log(tmp_path / "r") if entry["event"] == "evaluation"]
    assert evaluations[-1] < evaluations[0] - 0.1 and len(losses) == 12
    before = logits(load(place / "m"))
    loaded = peft.PeftModel.from_pretrained(load(place / "m"), tmp_path / "r" / "adapter").eval()
    assert not torch.allclose(logits(loaded), before, atol=1e-3)


@pytest.mark.parametrize("flag", ["--use-dora", "--use-rslora", "--use-pissa"])
def test_kinds_of_adapters_load_in_peft(flag: str, place: Path, tmp_path: Path) -> None:
    run(place / "m", place / "p.jsonl", tmp_path / "r", *SHORT, flag)
    settings = json.loads((tmp_path / "r" / "adapter" / "adapter_config.json").read_text())
    assert settings["use_dora"] == (flag == "--use-dora") and settings["use_rslora"] == (flag == "--use-rslora")
    model = load(place / "m")
    before = logits(model)
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "r" / "adapter").eval()
    apart = (logits(loaded) - before).abs().max()
    assert 1e-4 < apart < 20


def test_pissa_becomes_a_plain_adapter_of_the_whole_base(place: Path, tmp_path: Path) -> None:
    """With a learning rate of nearly 0 the result must be the base, which it is not without the conversion."""
    run(place / "m", place / "p.jsonl", tmp_path / "r", "--train-iters", "1", "--lr", "1e-9", "--use-pissa")
    settings = json.loads((tmp_path / "r" / "adapter" / "adapter_config.json").read_text())
    assert settings["init_lora_weights"] is True and settings["r"] == 16
    model = load(place / "m")
    before = logits(model)
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "r" / "adapter").eval()
    assert torch.allclose(logits(loaded), before, atol=1e-4)
    assert not (tmp_path / "r" / "pissa_start").exists()


def test_an_adapter_is_continued(place: Path, tmp_path: Path) -> None:
    run(place / "m", place / "p.jsonl", tmp_path / "a", *SHORT)
    run(
        *(place / "m", place / "p.jsonl", tmp_path / "b", "--validation-split", "0", "--train-iters", "1", "--lr", "1e-9"),
        *("--adapter", str(tmp_path / "a" / "adapter")),
    )
    one, other = adapter_tensors(tmp_path / "a"), adapter_tensors(tmp_path / "b")
    assert set(one) == set(other) and all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


def test_neftune_and_bf16_change_the_losses_a_little(place: Path, tmp_path: Path) -> None:
    run(place / "m", place / "p.jsonl", tmp_path / "plain", *SHORT)
    for name, flags in (("neftune", ("--neftune-alpha", "5")), ("bf16", ("--precision", "bf16"))):
        run(place / "m", place / "p.jsonl", tmp_path / name, *SHORT, *flags)
        first, plain = step_losses(tmp_path / name)[0], step_losses(tmp_path / "plain")[0]
        assert first != plain and first == pytest.approx(plain, rel=0.3)
    assert all(value.dtype == torch.float32 for value in adapter_tensors(tmp_path / "bf16").values())


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--lora-targets", "q_porj"), "the model has no matrix 'q_porj'; did you mean 'q_proj'"),
        (("--modules-to-save", "embed_toks"), "the model has no module 'embed_toks'; did you mean 'embed_tokens'"),
        (("--method", "freeze", "--trainable-layers", "3"), "trainable_layers is 3, but the model has 2 layers"),
        (("--method", "freeze", "--trainable-layers", "1", "--trainable-modules", "mpl"), "no module 'mpl'; did you mean 'mlp'"),
        (("--method", "full", "--quantize", "int8"), "quantize int8 freezes the base"),
        (("--method", "full", "--use-dora"), "use_dora belong to method lora"),
        (("--global-batch-size", "5"), "global_batch_size 5 is no multiple of micro_batch_size 2 x 1 processes = 2: take 4"),
        (("--precision", "fp16"), "fp16 needs a GPU"),
        (("--max-length", "2"), "no usable conversation"),
        (("--adapter", "nowhere"), "--adapter nowhere holds no adapter_config.json"),
        (("--tokenizer", "nowhere"), "the tokenizer folder nowhere does not exist"),
        (("--train-data", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--lora-rank", "0", "--lr", "-1"), "2 things are wrong"),
        (("--min-lr", "1"), "min_lr 1 is not below the peak lr"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_no_result(flags: tuple[str, ...], sentence: str, place: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        run(place / "m", place / "p.jsonl", tmp_path / "r", "--validation-split", "0", "--train-iters", "1", *flags)
    assert sentence in str(error.value)
    assert not (tmp_path / "r" / "adapter").exists() and not (tmp_path / "r" / "model").exists()


def test_unknown_flags_and_missing_ones() -> None:
    with pytest.raises(UserError, match="unknown flag --lora-rnk: did you mean --lora-rank"):
        parse_finetune_config(["--lora-rnk", "8"])
    with pytest.raises(UserError, match="missing: --model .the base., --train-data, --save"):
        parse_finetune_config([])


def test_a_diverging_run_ends_with_a_sentence(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the loss is nan at step"):
        run(
            *(place / "m", place / "p.jsonl", tmp_path / "r", "--method", "full", "--lr", "1e30", "--clip-grad", "0"),
            *("--train-iters", "8", "--no-eval-on-start", "--eval-interval", "100", "--warmup-ratio", "0"),
        )
    assert not (tmp_path / "r" / "model").exists()
