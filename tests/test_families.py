"""Families are data: the laws hold for every registered one."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import HIDDEN, LAYERS, WIDTH, logits, mask_units, own_registrations, random_keep, tiny_model, tokens
from torch import Tensor, nn
from transformers import AutoConfig, BloomConfig

from scale_prune.families import FAMILIES, Family, family_of, register, unit_groups


@pytest.fixture
def registry() -> Iterator[dict[str, Family]]:
    with own_registrations() as families:
        yield families


@pytest.mark.parametrize("model_type", FAMILIES)
def test_groups_cover_every_mlp_parameter_once_except_the_output_bias(model_type: str) -> None:
    model = tiny_model(model_type)
    groups = unit_groups(model)
    members = [member.name for group in groups for member in group.members]
    # No other size of the tiny models is WIDTH; the output's bias has none of that size.
    assert sorted(members) == sorted(name for name, stored in model.named_parameters() if WIDTH in stored.shape)
    assert all(group.output.startswith(group.name) and f"{group.output}.weight" in members for group in groups)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_groups_describe_the_stored_tensors(model_type: str) -> None:
    model = tiny_model(model_type)
    groups = unit_groups(model)
    assert [group.layer for group in groups] == list(range(LAYERS))
    assert len({group.name for group in groups}) == LAYERS
    for group in groups:
        assert group.num_units == WIDTH
        for member in group.members:
            assert member.shape == tuple(model.get_parameter(member.name).shape)
            assert sorted(member.shape) == [WIDTH] if member.role == "bias" else [HIDDEN, WIDTH]
            assert member.shape[member.dim] == WIDTH


@pytest.mark.parametrize("model_type", FAMILIES)
def test_output_reads_the_activations_of_the_units(model_type: str) -> None:
    model = tiny_model(model_type)
    seen: list[Tensor] = []
    group = unit_groups(model)[0]
    model.get_submodule(group.output).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    keep = random_keep([group], [5])
    for _ in range(2):
        logits(model, tokens())
        mask_units(model, [group], keep)
    before, after = (h.reshape(-1, WIDTH) for h in seen)
    masked = torch.ones(WIDTH, dtype=torch.bool)
    masked[keep[group.name]] = False
    assert torch.equal(before[:, ~masked], after[:, ~masked])
    assert before[:, masked].abs().sum() > 0
    assert torch.count_nonzero(after[:, masked]) == 0


def test_full_shapes_are_read_from_partitioned_parameters() -> None:
    model = tiny_model("gpt2")
    expected = unit_groups(model)
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape  # type: ignore[attr-defined]
        parameter.data = torch.empty(0)
    assert unit_groups(model) == expected


def test_projections_without_bias_have_no_bias_member() -> None:
    groups = unit_groups(tiny_model("opt", enable_bias=False))
    assert [member.role for member in groups[0].members] == ["in", "out"]


def test_unknown_model_type_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'bloom'; known are .*; describe another .*register\(Family") as error:
        family_of(BloomConfig())
    assert all(known in str(error.value) for known in FAMILIES)


def test_a_new_family_takes_one_description(registry: dict[str, Family]) -> None:
    config = AutoConfig.for_model("starcoder2")
    with pytest.raises(ValueError, match="starcoder2"):
        family_of(config)
    register(
        Family(
            model_types=("starcoder2",),
            layers="model.layers",
            mlp="mlp",
            inputs=("c_fc",),
            output="c_proj",
            width_key="intermediate_size",
        )
    )
    model = tiny_model("starcoder2", num_key_value_heads=1)
    assert family_of(config) is registry["starcoder2"]
    assert [group.num_units for group in unit_groups(model)] == [WIDTH] * LAYERS


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"layers": "transformer.layers"}, "has no attribute `layers`"),
        ({"inputs": ("fc_in",)}, "has no attribute `fc_in`"),
        ({"transposed": False}, r"counted as .*c_fc.weight': 11.*c_fc.bias': 17"),
    ],
)
def test_a_description_that_does_not_fit_says_what_is_missing(
    registry: dict[str, Family], wrong: dict[str, Any], message: str
) -> None:
    model = tiny_model("gpt2")
    register(replace(FAMILIES["gpt2"], **wrong))
    with pytest.raises(ValueError, match=message):
        unit_groups(model)


def test_layers_of_different_widths_are_counted_each() -> None:
    model = tiny_model("gpt_neo")
    mlp = model.get_submodule("transformer.h.1.mlp")
    mlp.c_fc, mlp.c_proj = nn.Linear(HIDDEN, 5), nn.Linear(5, HIDDEN)
    assert [group.num_units for group in unit_groups(model)] == [WIDTH, 5, WIDTH]
