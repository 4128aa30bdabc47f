"""Defaults that depend on other values or on the number of processes."""

import pytest

from megatron_llm.config.fields import updated
from megatron_llm.config.resolve import advice, feed_forward_size, resolve, with_defaults
from megatron_llm.config.schema import RunConfig
from megatron_llm.config.serialize import from_dict, to_dict
from megatron_llm.utils.errors import UserError

VALID = updated(RunConfig(), data_path=["some/prefix"])


def test_llama_defaults() -> None:
    model = resolve(VALID, 1).model
    assert (model.ffn_hidden_size, model.num_query_groups, model.kv_channels) == (704, 4, 64)
    assert (model.max_position_embeddings, model.tie_word_embeddings, model.vocab_size) == (256, False, None)


def test_gpt_defaults() -> None:
    model = resolve(updated(VALID, model="gpt", seq_length=64), 1).model
    assert (model.ffn_hidden_size, model.max_position_embeddings, model.tie_word_embeddings) == (1024, 64, True)


@pytest.mark.parametrize(("hidden", "size"), [(1, 32), (12, 32), (13, 64), (96, 256), (4096, 10944), (768, 2048)])
def test_gated_mlp_is_eight_thirds_rounded_up_to_32(hidden: int, size: int) -> None:
    assert feed_forward_size("llama", hidden) == size
    assert size % 32 == 0 and size - 32 < 8 * hidden / 3 <= size


@pytest.mark.parametrize(("world", "batch"), [(1, 4), (2, 8), (6, 24)])
def test_global_batch_is_one_micro_batch_a_replica(world: int, batch: int) -> None:
    assert resolve(VALID, world).train.global_batch_size == batch


def test_schedule_and_learning_rate_defaults() -> None:
    config = updated(VALID, pipeline_model_parallel_size=2, lr_decay_style="WSD", train_iters=50)
    assert resolve(config, 2).parallel.pipeline_schedule == "1f1b"
    assert resolve(updated(config, virtual_pipeline_model_parallel_size=2), 2).parallel.pipeline_schedule == "interleaved"
    optimizer = resolve(config, 2).optimizer
    assert (optimizer.lr_decay_iters, optimizer.lr_wsd_decay_iters) == (50, 5)
    assert resolve(VALID, 1).optimizer.lr_wsd_decay_iters is None


def test_the_log_lies_beside_the_checkpoints() -> None:
    assert resolve(updated(VALID, save="out/run/"), 1).log.log_jsonl == "out/run/log.jsonl"
    assert resolve(updated(VALID, save="out", log_jsonl="mine.jsonl"), 1).log.log_jsonl == "mine.jsonl"
    assert resolve(VALID, 1).log.log_jsonl is None


def test_what_is_given_is_kept() -> None:
    given = updated(
        VALID, ffn_hidden_size=100, num_query_groups=2, kv_channels=10, tie_word_embeddings=True, global_batch_size=12, lr_decay_iters=7
    )
    filled = resolve(given, 1)
    assert (filled.model.ffn_hidden_size, filled.model.num_query_groups, filled.model.kv_channels) == (100, 2, 10)
    assert filled.model.tie_word_embeddings is True
    assert (filled.train.global_batch_size, filled.optimizer.lr_decay_iters) == (12, 7)


def test_resolving_twice_and_through_json_changes_nothing() -> None:
    for config in (VALID, updated(VALID, model="gpt", lr_warmup_fraction=0.1, save="x", lr_decay_style="WSD")):
        once = resolve(config, 2)
        assert resolve(once, 2) == once
        assert resolve(from_dict(to_dict(once)), 2) == once


def test_resolve_does_not_change_its_argument() -> None:
    before = to_dict(VALID)
    resolve(VALID, 2)
    assert to_dict(VALID) == before


def test_filling_alone_checks_nothing() -> None:
    assert with_defaults(RunConfig(), 1).model.ffn_hidden_size == 704
    with pytest.raises(UserError, match="data_path is missing"):
        resolve(RunConfig(), 1)


def test_advice() -> None:
    quiet = resolve(updated(VALID, save="x"), 1)
    assert advice(quiet, 1) == []
    assert "weights will be lost" in " ".join(advice(resolve(VALID, 1), 1))
    assert "before the learning rate reaches" in " ".join(advice(resolve(updated(quiet, lr_decay_iters=1000), 1), 1))
    idle = resolve(updated(quiet, pipeline_model_parallel_size=4, global_batch_size=8), 4)
    assert "2 micro-batches a step keep 4 pipeline stages" in " ".join(advice(idle, 4))
    interleaved = resolve(
        updated(
            quiet, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2, pipeline_schedule="auto", global_batch_size=12
        ),
        2,
    )
    assert "3 micro-batches a step are not a multiple of 2" in " ".join(advice(interleaved, 2))
