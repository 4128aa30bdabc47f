"""The decoder equals `transformers`: logits and gradients through the mapping tables, cache, packing, recomputation."""

import dataclasses

import pytest
import torch
import transformers
from torch import Tensor

from megatron_llm.config.schema import ModelConfig
from megatron_llm.kernels.dispatch import torch_kernels
from megatron_llm.models.blocks.context import KVCache
from megatron_llm.models.causal_lm import ModelChunk, ModelOptions
from megatron_llm.models.generation import Sampling, candidate_logits, generate
from megatron_llm.models.inputs import MicroBatch
from megatron_llm.models.mapping import parameter_rectangles
from megatron_llm.models.registry import get_family
from megatron_llm.parallel.groups import single_process_groups
from megatron_llm.parallel.random import DropoutKey
from megatron_llm.utils.errors import UserError

VOCAB = 97


@dataclasses.dataclass(frozen=True)
class Packed:
    """A batch by hand."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    document_ids: Tensor | None = None


def model_config(family: str, *, groups: int | None = None, tied: bool = False, **changes: object) -> ModelConfig:
    heads = 4
    config = ModelConfig(
        model=family,
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=88,
        num_attention_heads=heads,
        num_query_groups=groups or heads,
        kv_channels=8,
        max_position_embeddings=48,
        vocab_size=VOCAB,
        tie_word_embeddings=tied,
        init_method_std=0.2,
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def build(config: ModelConfig, **options: object) -> ModelChunk:
    settings = ModelOptions(seed=3, **options)  # type: ignore[arg-type]
    return ModelChunk(get_family(config.model), config, single_process_groups(), torch_kernels(), settings, range(config.num_layers))


def in_hf_names(model: ModelChunk, gradients: bool = False) -> dict[str, Tensor]:
    """Every Hugging Face tensor assembled from the model's rectangles."""
    found: dict[str, Tensor] = {}
    for parameter in model.parameters():
        local = parameter.grad if gradients else parameter.detach()
        assert local is not None
        for r in parameter_rectangles(parameter, model.family.table):
            target = found.setdefault(r.key, torch.full(r.global_shape, float("nan")))
            target[tuple(slice(a, a + n) for a, n in zip(r.global_start, r.shape, strict=True))] = r.view(local)
    return found


def batch_of(rows: int, length: int, seed: int = 0) -> Packed:
    text = torch.randint(0, VOCAB, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    mask = (torch.rand(rows, length, generator=torch.Generator().manual_seed(seed + 1)) < 0.7).float()
    return Packed(text[:, :-1], text[:, 1:], mask, torch.arange(length).expand(rows, length))


VARIANTS = [
    pytest.param(model_config("llama"), id="llama"),
    pytest.param(model_config("llama", groups=2, tied=True), id="llama-grouped-tied"),
    pytest.param(model_config("llama", groups=1, kv_channels=6, rotary_base=5e4), id="llama-multiquery-headsize6"),
    pytest.param(model_config("gpt", tied=True), id="gpt-tied"),
    pytest.param(model_config("gpt"), id="gpt-untied"),
]


@pytest.mark.parametrize("config", VARIANTS)
def test_logits_loss_and_every_gradient_equal_transformers(config: ModelConfig) -> None:
    model = build(config)
    reference = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**model.family.hf_config(config)))
    missing, unexpected = reference.load_state_dict(in_hf_names(model), strict=False)
    assert not unexpected and missing == (["lm_head.weight"] if config.tie_word_embeddings else [])
    reference.tie_weights()
    batch = batch_of(3, 17)
    reference.eval()
    expected = reference(batch.tokens).logits
    torch.testing.assert_close(model.logits(batch.tokens), expected, rtol=1e-4, atol=1e-4)

    losses = torch.nn.functional.cross_entropy(expected.flatten(0, 1), batch.labels.flatten(), reduction="none").view_as(batch.labels)
    expected_loss = (losses * batch.loss_mask).sum() / batch.loss_mask.sum()
    expected_loss.backward()
    loss = model(MicroBatch(batch, loss_weight=1 / batch.loss_mask.sum()), None)
    loss.backward()
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    got, wanted = in_hf_names(model, gradients=True), dict(reference.named_parameters())
    assert set(got) == set(wanted)
    for key, gradient in got.items():
        assert wanted[key].grad is not None
        torch.testing.assert_close(gradient, wanted[key].grad, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("family", ["llama", "gpt"])
def test_cache_gives_the_same_logits(family: str) -> None:
    model = build(model_config(family))
    tokens = batch_of(2, 20).tokens
    cache = KVCache()
    pieces = [model.logits(tokens[:, a:b], cache) for a, b in ((0, 7), (7, 8), (8, 12), (12, 20))]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model.logits(tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt"])
def test_packed_documents_equal_one_document_a_row(family: str) -> None:
    """With document ids and restarted positions nothing leaks: the loss and all gradients are those of separate rows."""
    lengths = (5, 9, 2)
    packed_text = batch_of(1, sum(lengths))
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).unsqueeze(0)
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    packed = dataclasses.replace(packed_text, position_ids=positions, document_ids=ids)
    together = build(model_config(family))
    loss = together(MicroBatch(packed), None)
    loss.backward()
    apart = build(model_config(family))
    total, first = torch.zeros(()), 0
    for length in lengths:
        cut = slice(first, first + length)
        fields = (packed.tokens, packed.labels, packed.loss_mask, packed.position_ids)
        row = apart(MicroBatch(Packed(*(tensor[:, cut] for tensor in fields))), None)
        row.backward()
        total, first = total + row.detach(), first + length
    torch.testing.assert_close(loss.detach(), total, rtol=1e-5, atol=1e-5)
    for (name, one), other in zip(together.named_parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("family", ["llama", "gpt"])
def test_recomputation_changes_nothing_even_with_dropout(family: str, recompute: str) -> None:
    config = model_config(family, hidden_dropout=0.2, attention_dropout=0.3)
    micro_batch = MicroBatch(batch_of(2, 12), dropout=DropoutKey(seed=1, step=2, sample=3))
    models = [build(config, recompute=how) for how in ("none", recompute)]
    losses = [model(micro_batch, None) for model in models]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        assert torch.equal(one.grad, other.grad), name


def test_recomputation_keeps_fewer_activations() -> None:
    """Full recomputation saves one tensor a block for the backward instead of all of them."""
    kept = {}
    for how in ("none", "selective", "full"):
        model, total = build(model_config("llama"), recompute=how), [0]

        def count(tensor: Tensor, total: list[int] = total) -> Tensor:
            total[0] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(MicroBatch(batch_of(2, 40)), None)
        kept[how] = total[0]
    assert kept["selective"] < kept["none"]
    assert kept["full"] < 0.5 * kept["none"]


def test_dropout_is_off_without_a_key_and_in_evaluation() -> None:
    config = model_config("gpt", hidden_dropout=0.5, attention_dropout=0.5)
    model, batch = build(config), batch_of(2, 10)
    plain = model(MicroBatch(batch), None)
    keyed = MicroBatch(batch, dropout=DropoutKey(1, 2, 3))
    assert not torch.equal(model(keyed, None), plain)
    model.eval()
    assert torch.equal(model(keyed, None), plain)


def test_mapping_refuses_names_and_parts_it_does_not_know() -> None:
    model = build(model_config("llama"))
    placement = model.layers["0"].attention.qkv.weight.placement
    table = get_family("gpt").table
    with pytest.raises(KeyError, match="exactly once"):
        get_family("llama").table.rectangles(dataclasses.replace(placement, parts=placement.parts[:2]))
    with pytest.raises(KeyError, match=r"layers\.0\.attention\.gate\.weight has no rule"):
        table.rectangles(dataclasses.replace(placement, logical_name="layers.0.attention.gate.weight"))


def test_sampling_keeps_the_candidates_it_should() -> None:
    logits = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).log()
    kept = lambda **settings: candidate_logits(logits, Sampling(**settings)).isfinite().tolist()  # noqa: E731
    assert kept() == [True] * 5
    assert kept(top_k=2) == [True, True, False, False, False]
    assert kept(top_p=0.6) == [True, True, False, False, False]
    assert kept(top_p=0.1) == [True, False, False, False, False]
    torch.testing.assert_close(candidate_logits(logits, Sampling(temperature=0.5)), logits * 2)


def test_generation_is_greedy_stops_and_repeats_by_seed() -> None:
    model = build(model_config("llama"))
    prompt = [5, 6, 7]
    greedy = list(generate(model, prompt, Sampling(max_new_tokens=6, temperature=0)))
    ids = list(prompt)
    for token in greedy:
        assert token == int(model.logits(torch.tensor([ids]))[0, -1].argmax())
        ids.append(token)
    assert list(generate(model, prompt, Sampling(max_new_tokens=6, temperature=0), stop_id=greedy[3])) == greedy[: greedy.index(greedy[3])]
    warm = [list(generate(model, prompt, Sampling(max_new_tokens=20, seed=seed))) for seed in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2]
    assert len(list(generate(model, prompt, Sampling(max_new_tokens=1000)))) == 48 - len(prompt)
    with pytest.raises(UserError, match="longest sequence is 48"):
        list(generate(model, [1] * 48, Sampling()))
    with pytest.raises(UserError, match="no tokens"):
        list(generate(model, [], Sampling()))
    with pytest.raises(UserError, match="top-p"):
        Sampling(top_p=0.0)


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_positions_are_real_where_they_are_asked_for_though_the_parameters_are_not(family: str) -> None:
    config, groups = model_config(family), single_process_groups()
    meta = dataclasses.replace(groups, device=torch.device("meta"))
    options, layers = ModelOptions(seed=3), range(config.num_layers)
    blank = ModelChunk(get_family(family), config, meta, torch_kernels(), options, layers)
    chunk = ModelChunk(get_family(family), config, meta, torch_kernels(), options, layers, positions_device=groups.device)
    assert all(parameter.is_meta for parameter in chunk.parameters())
    whole, ids = build(config), torch.arange(9).expand(2, 9)
    if family == "bloom":
        assert blank.slopes is not None and blank.slopes.is_meta
        assert chunk.slopes is not None and whole.slopes is not None and torch.equal(chunk.slopes, whole.slopes)
    else:
        assert blank.rotary is not None and blank.rotary.frequencies.is_meta
        assert chunk.rotary is not None and whole.rotary is not None
        assert all(torch.equal(*pair) for pair in zip(chunk.rotary.tables(ids), whole.rotary.tables(ids), strict=True))
    chunk.load_state_dict(whole.state_dict(), assign=True)
    assert torch.equal(chunk.logits(ids), whole.logits(ids))
