"""Each rule is broken by the configuration it is about, kept by its nearest valid neighbour, and never raises by itself."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llm.config.bounds import COUNT, PROBABILITY, SEED, Bounds
from megatron_llm.config.fields import all_fields, updated
from megatron_llm.config.layout_rules import data_parallel_size, micro_batches
from megatron_llm.config.resolve import resolve, with_defaults
from megatron_llm.config.rules import RULES, violations
from megatron_llm.config.schema import RunConfig
from megatron_llm.utils.errors import UserError

VALID = updated(RunConfig(), data_path=["some/prefix"])


def broken(world: int = 1, **values: Any) -> list[str]:
    """The violations of the valid configuration with some values changed."""
    return violations(with_defaults(updated(VALID, **values), world), world)


CASES: list[tuple[str, int, dict[str, Any], list[str], dict[str, Any]]] = [
    # name of the rule, world, values that break it, parts of the sentence, change that mends it
    ("world_divides", 6, {"tensor_model_parallel_size": 4}, ["6 processes", "TP 4 x PP 1 = 4", "start 4 or 8"],
     {"tensor_model_parallel_size": 2}),
    ("batch_divides", 2, {"global_batch_size": 10}, ["global_batch_size 10", "4 x data-parallel size 2 = 8", "8 or 16", "micro-batch of 1"],
     {"global_batch_size": 16}),
    ("batch_divides", 2, {"global_batch_size": 10}, [], {"micro_batch_size": 1}),
    ("batch_divides", 1, {"global_batch_size": 3}, ["a global batch of 4", "micro-batch of 3"], {"micro_batch_size": 3}),
    ("batch_divides", 3, {"global_batch_size": 12, "micro_batch_size": 3}, ["9 or 18", "micro-batch of 2"], {"micro_batch_size": 2}),
    ("heads_divide_hidden", 1, {"num_attention_heads": 3}, ["hidden_size 256", "255 or 258"], {"kv_channels": 64}),
    ("groups_divide_heads", 1, {"num_query_groups": 3}, ["1, 2 or 4 groups"], {"num_query_groups": 2}),
    ("heads_over_tp", 8, {"tensor_model_parallel_size": 8, "num_query_groups": 1}, ["1, 2 or 4"], {"num_attention_heads": 8}),
    ("groups_over_tp", 4, {"tensor_model_parallel_size": 4, "num_attention_heads": 24, "num_query_groups": 6, "hidden_size": 768},
     ["num_query_groups 6", "size 4"], {"num_query_groups": 2}),
    ("ffn_over_tp", 2, {"tensor_model_parallel_size": 2, "ffn_hidden_size": 101}, ["100 or 102"], {"ffn_hidden_size": 102}),
    ("layers_over_stages", 3, {"pipeline_model_parallel_size": 3}, ["num_layers 4", "3 x 1 chunks".replace("3 x", "3 pipeline stages x"),
                                                                    "3 or 6 layers"], {"num_layers": 6}),
    ("layers_over_stages", 2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 3}, ["use 6 layers"],
     {"num_layers": 12}),
    ("layers_over_stages", 2, {"pipeline_model_parallel_size": 2, "decoder_last_pipeline_num_layers": 4}, ["leave 0 of 4 layers"],
     {"decoder_last_pipeline_num_layers": 1}),
    ("layers_over_stages", 2, {"pipeline_model_parallel_size": 2, "decoder_first_pipeline_num_layers": 2,
                               "decoder_last_pipeline_num_layers": 1}, ["must add up to num_layers"],
     {"decoder_last_pipeline_num_layers": 2}),
    ("layers_over_stages", 1, {"decoder_first_pipeline_num_layers": 2}, ["at least 2 pipeline stages"],
     {"decoder_first_pipeline_num_layers": None}),
    ("sequence_over_tp", 2, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "seq_length": 33}, ["32 or 34"],
     {"sequence_parallel": False}),
    ("sequence_within_positions", 1, {"max_position_embeddings": 128}, ["256", "128"], {"seq_length": 128}),
    ("virtual_stages_need_pipeline", 1, {"virtual_pipeline_model_parallel_size": 2}, ["above 1"],
     {"virtual_pipeline_model_parallel_size": 1}),
    ("adapters_need_weights", 1, {"lora_rank": 8}, ["set load"], {"load": "folder"}),
    ("adapters_need_weights", 1, {"lora_rslora": True}, ["only with lora_rank"], {"lora_rslora": False}),
    ("clex_needs_one_chunk", 2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2,
                                 "rope_scaling_type": "clex"}, ["size 1, got 2"], {"virtual_pipeline_model_parallel_size": 1}),
    ("schedule_fits_chunks", 2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2,
                                 "pipeline_schedule": "1f1b"}, ["use interleaved"], {"pipeline_schedule": "auto"}),
    ("schedule_fits_chunks", 2, {"pipeline_model_parallel_size": 2, "pipeline_schedule": "interleaved"}, ["at least 2"],
     {"virtual_pipeline_model_parallel_size": 2}),
    ("zero_bubble_needs_pipeline", 1, {"pipeline_schedule": "zero-bubble"}, ["above 1", "use auto"], {"pipeline_schedule": "auto"}),
    ("zero_bubble_needs_eager", 2, {"pipeline_model_parallel_size": 2, "pipeline_schedule": "zero-bubble", "compile": True},
     ["turn compile off", "1f1b"], {"compile": False}),
    ("compile_mode_needs_compile", 1, {"compile_mode": "reduce-overhead"}, ["reduce-overhead", "turn compile on"], {"compile": True}),
    ("cuda_graphs_need_one_stage", 2, {"pipeline_model_parallel_size": 2, "compile": True, "compile_mode": "max-autotune"},
     ["max-autotune records", "2 pipeline stages"], {"compile_mode": "max-autotune-no-cudagraphs"}),
    ("cuda_graphs_need_no_dropout", 1, {"hidden_dropout": 0.1, "compile": True, "compile_mode": "reduce-overhead"},
     ["new seed"], {"compile_mode": "default"}),
    ("cuda_graphs_need_no_dropout", 1, {"attention_dropout": 0.1, "compile": True, "compile_mode": "reduce-overhead"}, [],
     {"attention_dropout": 0.0}),
    ("backend_fits_device", 1, {"distributed_backend": "nccl", "device": "cpu"}, ["gloo"], {"device": "auto"}),
    ("one_half_precision", 1, {"bf16": True, "fp16": True}, ["bf16 and fp16"], {"fp16": False}),
    ("loss_scale_needs_fp16", 1, {"loss_scale": 128}, ["128"], {"fp16": True}),
    ("loss_scale_range", 1, {"initial_loss_scale": 0.5}, ["0.5", "1"], {"min_loss_scale": 0.25}),
    ("one_warmup", 1, {"lr_warmup_iters": 5, "lr_warmup_fraction": 0.1}, ["5", "0.1"], {"lr_warmup_iters": 0}),
    ("warmup_within_decay", 1, {"lr_warmup_iters": 100}, ["100 steps", "step 100"], {"train_iters": 101}),
    ("min_lr_below_lr", 1, {"min_lr": 1}, ["min_lr 1", "lr 0.0003"], {"min_lr": 3e-4}),
    ("wsd_decay_belongs_to_wsd", 1, {"lr_wsd_decay_iters": 5}, ["cosine"], {"lr_decay_style": "WSD"}),
    ("wsd_decay_after_warmup", 1, {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 60, "lr_warmup_iters": 50}, ["at most 50"],
     {"lr_warmup_iters": 40}),
    ("wsd_decay_after_warmup", 1, {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 60, "lr_warmup_fraction": 0.5}, ["at most 50"],
     {"lr_warmup_fraction": 0.4}),
    ("evaluation_has_batches", 1, {"eval_interval": 5, "eval_iters": 0}, ["eval_interval 5"], {"eval_iters": 1}),
    ("split_is_valid", 1, {"split": "9,x"}, ["'9,x'"], {"split": "9,1"}),
    ("split_is_valid", 1, {"split": "0,1,1"}, ["above 0"], {"split": "1"}),
    ("split_is_valid", 1, {"split": "1,1,1,1"}, [], {"split": "1,1,1"}),
    ("evaluation_has_documents", 1, {"eval_interval": 5, "split": "1,0,1"}, ["no validation documents"], {"split": "1,1"}),
    ("data_is_given", 1, {"data_path": []}, ["data_path is missing"], {"data_path": ["x"]}),
    ("data_is_given", 1, {"mock_data": True, "vocab_size": 9}, ["keep one"], {"mock_data": False}),
    ("mock_data_needs_vocabulary", 1, {"mock_data": True, "data_path": []}, ["set vocab_size"], {"vocab_size": 97}),
    ("tokenizer_needs_model", 1, {"tokenizer_type": "HuggingFaceTokenizer"}, ["tokenizer_model"], {"tokenizer_type": "ByteTokenizer"}),
    ("saving_needs_folder", 1, {"save_interval": 5, "async_save": True}, ["save_interval 5, async_save: need save"], {"save": "x"}),
    ("finetune_needs_load", 1, {"finetune": True}, ["set load"], {"load": "x"}),
    ("wandb_name_needs_project", 1, {"wandb_exp_name": "a"}, ["wandb_project"], {"wandb_project": "p"}),
    ("profile_range", 1, {"profile_step_start": 5}, ["both"], {"profile_step_end": 6}),
    ("profile_range", 1, {"profile_step_start": 5, "profile_step_end": 5}, ["below"], {"profile_step_end": 6}),
    ("profile_range", 1, {"profile_step_start": 101, "profile_step_end": 105}, ["train_iters 100"], {"train_iters": 101}),
    ("profile_ranks_exist", 2, {"profile_step_start": 1, "profile_step_end": 2, "profile_ranks": [0, 2]}, ["profile_ranks 2", "0 to 1"],
     {"profile_ranks": [1]}),
]  # fmt: skip


def test_the_valid_configuration_breaks_no_rule() -> None:
    assert broken() == []


@pytest.mark.parametrize(("name", "world", "values", "parts", "mend"), CASES, ids=[f"{case[0]}-{n}" for n, case in enumerate(CASES)])
def test_rule(name: str, world: int, values: dict[str, Any], parts: list[str], mend: dict[str, Any]) -> None:
    rule = next(rule for rule in RULES if rule.__name__ == name)
    config = with_defaults(updated(VALID, **values), world)
    sentence = rule(config, world)
    assert sentence is not None
    assert broken(world, **values) == [sentence], "this fault alone is named, and once"
    for part in parts:
        assert part in sentence
    assert broken(world, **{**values, **mend}) == [], "the advice works"


def test_every_rule_has_a_case_and_a_summary() -> None:
    assert {rule.__name__ for rule in RULES} == {case[0] for case in CASES}
    assert all(rule.__doc__ for rule in RULES)


def test_copied_key_value_heads_are_allowed() -> None:
    assert broken(4, tensor_model_parallel_size=4, num_query_groups=1) == []
    assert broken(4, tensor_model_parallel_size=4, num_query_groups=2) == []


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"micro_batch_size": -4}, "micro_batch_size must be at least 1, got -4"),
        ({"lr": 0}, "lr must be more than 0, got 0.0"),
        ({"lr": float("nan")}, "lr must be more than 0, got nan"),
        ({"rotary_base": float("inf")}, "rotary_base must be more than 0, got inf"),
        ({"hidden_dropout": 1}, "hidden_dropout must be at least 0 and less than 1, got 1.0"),
        ({"adam_beta2": 1}, "adam_beta2 must be at least 0 and less than 1, got 1.0"),
        ({"keep_last": -1}, "keep_last must be at least 0, got -1"),
        ({"seed": 2**32}, "seed must be at least 0 and at most 4294967295, got 4294967296"),
        ({"profile_ranks": [0, -1]}, "profile_ranks must be at least 0, got -1"),
        ({"lr_warmup_fraction": 1.5}, "lr_warmup_fraction must be at least 0 and less than 1, got 1.5"),
    ],
)
def test_single_values_out_of_range(values: dict[str, Any], sentence: str) -> None:
    assert broken(**values) == [sentence]


def test_every_size_of_the_schema_has_a_range() -> None:
    unbounded = {spec.name for spec in all_fields() if spec.kind in (int, float) and spec.bounds == Bounds()}
    assert unbounded == set()


def test_bounds() -> None:
    assert COUNT.contains(1) and not COUNT.contains(0)
    assert PROBABILITY.contains(0) and not PROBABILITY.contains(1)
    assert SEED.contains(2**32 - 1) and not SEED.contains(2**32)
    assert not Bounds().contains(float("nan")) and not Bounds().contains(float("inf"))
    assert Bounds(low=0.5, high=2, high_open=True).text() == "at least 0.5 and less than 2"
    assert Bounds().text() == "a finite number"


def test_all_violations_are_shown_at_once_and_numbered() -> None:
    with pytest.raises(UserError) as error:
        resolve(updated(VALID, num_layers=0, bf16=True, fp16=True, global_batch_size=5), 1)
    lines = str(error.value).splitlines()
    assert lines[0] == "the configuration cannot run, 3 things are wrong:"
    assert [line.split(". ")[0] for line in lines[1:]] == ["  1", "  2", "  3"]


def test_one_violation_is_one_sentence() -> None:
    with pytest.raises(UserError) as error:
        resolve(updated(VALID, min_lr=1), 1)
    assert str(error.value) == "the configuration cannot run: min_lr 1 is above lr 0.0003: the learning rate would grow, lower the first"


def test_violations_of_the_family_join_the_list() -> None:
    with pytest.raises(UserError, match="2 things are wrong") as error:
        resolve(updated(VALID, min_lr=1), 1, lambda model: [f"family says {model.kv_channels}"])
    assert "family says 64" in str(error.value)


SMALL = st.integers(-1, 9)
ANY_CONFIG = st.fixed_dictionaries(
    {
        spec.name: st.one_of(SMALL, st.none()) if spec.optional else SMALL
        for spec in all_fields()
        if spec.kind is int and not spec.is_list and spec.name != "seed"
    }
)


@settings(max_examples=40, deadline=None)
@given(ANY_CONFIG, st.integers(-1, 13), st.sampled_from(["llama", "gpt"]))
def test_rules_never_raise(values: dict[str, Any], world: int, model: str) -> None:
    found = violations(with_defaults(updated(VALID, model=model, **values), world), world)
    assert all(isinstance(sentence, str) and sentence for sentence in found)


POWERS = st.sampled_from([1, 2, 4])


@settings(max_examples=60, deadline=None)
@given(POWERS, POWERS, POWERS, POWERS, POWERS, st.sampled_from([4, 6, 8]), st.sampled_from([4, 8, 12]))
def test_a_configuration_without_violations_has_whole_parts(
    tp: int, pp: int, vpp: int, dp: int, micro: int, layers: int, batch: int
) -> None:
    config = updated(
        VALID,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        micro_batch_size=micro,
        num_layers=layers,
        global_batch_size=batch,
    )
    config = with_defaults(config, tp * pp * dp)
    fits = layers % (pp * vpp) == 0 and batch % (micro * dp) == 0 and (vpp == 1 or pp > 1)
    assert (violations(config, tp * pp * dp) == []) == fits
    if fits:
        assert data_parallel_size(config, tp * pp * dp) == dp
        assert micro_batches(config, tp * pp * dp) == batch // (micro * dp)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 9))
def test_the_batches_that_the_batch_rule_offers_are_valid(total: int, micro: int, world: int) -> None:
    sentences = broken(world, global_batch_size=total, micro_batch_size=micro)
    assert bool(sentences) == (total % (micro * world) != 0)
    if sentences:
        offer = sentences[0].split("use a global batch of ")[1]
        batches = [int(word) for word in offer.split(",")[0].split(" or ")]
        assert all(broken(world, global_batch_size=batch, micro_batch_size=micro) == [] for batch in batches)
        if "micro-batch of " in offer:
            assert broken(world, global_batch_size=total, micro_batch_size=int(offer.split("micro-batch of ")[1])) == []
