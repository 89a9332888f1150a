"""Compaction: smaller tensors that compute the same as masked ones."""

from dataclasses import replace

import pytest
import torch
from models import LAYERS, compact_model, logits, mask_units, random_keep, tiny_model, tokens
from torch import nn

from scale_prune.core import Member
from scale_prune.core.compaction import pad_units, resize_group, select_units, set_members
from scale_prune.models.families import FAMILIES
from scale_prune.models.layer_units import unit_groups

WIDTHS = (5, 13, 1)


@pytest.mark.parametrize(
    ("dim", "kept"),
    [(0, [[4, 5, 6, 7], [12, 13, 14, 15]]), (1, [[1, 3], [5, 7], [9, 11], [13, 15], [17, 19]])],
)
def test_select_units_keeps_the_indices_along_the_axis(dim: int, kept: list[list[int]]) -> None:
    tensor = torch.arange(20).view(5, 4)
    member = Member(name="weight", shape=(5, 4), dim=dim, role="in")
    assert select_units(tensor, torch.tensor([1, 3]), member).tolist() == kept


def test_a_unit_may_own_several_indices_of_several_pieces() -> None:
    member = Member(name="weight", shape=(2, 12), dim=1, role="in", block=2, pieces=2)
    tensor = torch.arange(24).view(2, 12)
    kept = select_units(tensor, torch.tensor([0, 2]), member)
    assert (member.num_units, kept.tolist()[0]) == (3, [0, 1, 4, 5, 6, 7, 10, 11])
    padded = pad_units(kept, 3, replace(member, shape=(2, 8)))
    assert padded.tolist()[0] == [0, 1, 4, 5, 0, 0, 6, 7, 10, 11, 0, 0]


@pytest.mark.parametrize("shape", [(7,), (7, 3), (3, 7), (2, 7, 3)])
def test_padding_is_undone_by_selecting_and_adds_only_zeros(shape: tuple[int, ...]) -> None:
    tensor, dim = torch.randn(shape), shape.index(7)
    member = Member(name="weight", shape=shape, dim=dim, role="in")
    padded = pad_units(tensor, 11, member)
    wider = replace(member, shape=tuple(padded.shape))
    assert wider.num_units == 11
    assert torch.equal(select_units(padded, torch.arange(7), wider), tensor)
    assert torch.count_nonzero(select_units(padded, torch.arange(7, 11), wider)) == 0


@pytest.mark.parametrize("model_type", FAMILIES)
def test_compacted_forward_equals_masked_forward(model_type: str) -> None:
    model, ids = tiny_model(model_type), tokens()
    groups = unit_groups(model)
    keep = random_keep(groups, WIDTHS)
    dense = logits(model, ids)
    mask_units(model, groups, keep)
    masked = logits(model, ids)
    compacted = compact_model(model, groups, keep)

    assert (dense - masked).abs().max() > 1e-3
    torch.testing.assert_close(logits(model, ids), masked, rtol=0, atol=1e-5)
    assert compacted == unit_groups(model)
    assert [group.num_units for group in compacted] == list(WIDTHS)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_modules_know_their_new_size(model_type: str) -> None:
    model = tiny_model(model_type)
    groups = unit_groups(model)
    compact_model(model, groups, random_keep(groups, (5,) * LAYERS))
    for group in groups:
        for member in group.members:
            module = model.get_submodule(member.name.rpartition(".")[0])
            names = ("in_features", "out_features") if isinstance(module, nn.Linear) else ("nx", "nf")
            assert sorted(getattr(module, name) for name in names) == sorted(
                [5 * member.pieces, model.config.hidden_size]
            )


def test_compaction_can_be_repeated_and_keeps_frozen_parameters_frozen() -> None:
    model, twice = tiny_model("llama"), tiny_model("llama")
    model.get_parameter("model.layers.0.mlp.up_proj.weight").requires_grad_(False)
    groups = unit_groups(model)
    keep = {group.name: torch.tensor([2, 7, 16]) for group in groups}
    first = {group.name: torch.tensor([1, 2, 7, 11, 16]) for group in groups}
    second = {group.name: torch.tensor([1, 2, 4]) for group in groups}
    assert compact_model(model, groups, keep) == compact_model(twice, compact_model(twice, groups, first), second)
    assert torch.equal(logits(model, tokens()), logits(twice, tokens()))
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.layers.0.mlp.up_proj.weight"]


def test_set_members_reads_the_number_of_units_and_not_the_parameters() -> None:
    model = tiny_model("gpt2")
    group = unit_groups(model)[1]
    partitioned = {member.name: nn.Parameter(torch.empty(0)) for member in group.members}
    assert set_members(model, group, partitioned, 5) == resize_group(group, 5)
    mlp = model.get_submodule(group.name)
    assert (mlp.get_submodule("c_fc").nf, mlp.get_submodule("c_proj").nx) == (5, 5)
    assert all(model.get_parameter(name) is parameter for name, parameter in partitioned.items())
    assert [member.shape for member in resize_group(group, 5).members] == [(11, 5), (5,), (5, 11)]
