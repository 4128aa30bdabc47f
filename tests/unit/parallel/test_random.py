"""Weights and dropout do not depend on the layout, nor on what was drawn before."""

import torch

from megatron_llm.parallel.groups import Group, single_group
from megatron_llm.parallel.placement import Part
from megatron_llm.parallel.random import Dropout, DropoutKey, derive_seed, fill_normal_


def test_any_rectangle_is_cut_from_the_same_tensor() -> None:
    shape = (1031, 1500)  # several blocks of rows, the last one short
    whole = torch.zeros(shape)
    fill_normal_(whole, Part("", shape, (0, 0), 0, shape), 0.5, 7, "a.weight")
    for start, size in (((0, 0), (700, 1500)), ((699, 0), (332, 1500)), ((0, 3), (1031, 500)), ((1030, 1499), (1, 1))):
        piece = torch.zeros(size[0] + 2, size[1])
        fill_normal_(piece, Part("", shape, start, 1, size), 0.5, 7, "a.weight")
        assert torch.equal(piece[1:-1], whole[start[0] : start[0] + size[0], start[1] : start[1] + size[1]])
        assert not piece[0].any() and not piece[-1].any()
    assert abs(whole.std().item() - 0.5) < 0.005 and abs(whole.mean().item()) < 0.005


def test_names_parts_and_seeds_give_different_values() -> None:
    def drawn(seed: int, name: str, part: str) -> torch.Tensor:
        local = torch.zeros(4, 4)
        fill_normal_(local, Part(part, (4, 4), (0, 0), 0, (4, 4)), 1.0, seed, name)
        return local

    first = drawn(1, "a", "q")
    assert torch.equal(first, drawn(1, "a", "q"))
    for other in (drawn(2, "a", "q"), drawn(1, "b", "q"), drawn(1, "a", "k")):
        assert not torch.equal(first, other)


def test_seed_is_the_same_on_every_machine() -> None:
    assert derive_seed(1234, "layers.0.mlp.up.weight", "gate", 0) == 2450794717456187859


def masks(dropout: Dropout, key: DropoutKey) -> torch.Tensor:
    return dropout(torch.ones(64, 32), key)


def test_dropout_mask_depends_on_its_key_alone() -> None:
    key = DropoutKey(seed=1, step=3, sample=40)
    dropout = Dropout(0.25, 2, "mlp", single_group(), sharded=False)
    first = masks(dropout, key)
    torch.rand(100)  # whatever else is drawn in between
    assert torch.equal(first, masks(dropout, key))
    assert torch.equal(first.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert abs((first == 0).float().mean().item() - 0.25) < 0.05
    for other in (
        masks(dropout, DropoutKey(1, 4, 40)),
        masks(dropout, DropoutKey(1, 3, 44)),
        masks(dropout, DropoutKey(2, 3, 40)),
        masks(Dropout(0.25, 3, "mlp", single_group(), sharded=False), key),
        masks(Dropout(0.25, 2, "attention", single_group(), sharded=False), key),
    ):
        assert not torch.equal(first, other)
    assert torch.equal(dropout(first, None), first)


def test_replicated_activations_share_masks_over_tp_and_sharded_ones_do_not() -> None:
    key = DropoutKey(1, 1, 0)
    ranks = [Group(ranks=(0, 1), rank=rank) for rank in (0, 1)]
    shared = [masks(Dropout(0.5, 0, "x", group, sharded=False), key) for group in ranks]
    split = [masks(Dropout(0.5, 0, "x", group, sharded=True), key) for group in ranks]
    assert torch.equal(*shared)
    assert not torch.equal(*split)
