"""Families are data: the laws hold for every registered one."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import HIDDEN, LAYERS, WIDTH, logits, mask_units, own_registrations, random_keep, tiny_model, tokens
from torch import Tensor, nn
from transformers import AutoConfig, BloomConfig
from transformers.pytorch_utils import Conv1D

from scale_prune.export.layouts import check_width_key
from scale_prune.models.families import FAMILIES, Family, classifies, family_of, register, stock_class
from scale_prune.models.layer_units import linear_names, unit_groups

# No key of the config is the width: it is four times, or half of, another one.
BLOOM = Family(
    model_types=("bloom",),
    layers="transformer.h",
    mlp="mlp",
    inputs=("dense_h_to_4h",),
    output="dense_4h_to_h",
    width_key="n_inner",
)
PIECES = {"phi3": 2, "glm": 2, "glm4": 2}
RECURRENT_GEMMA = replace(FAMILIES["llama"], model_types=("recurrent_gemma",), mlp="mlp_block")


@pytest.fixture
def registry() -> Iterator[dict[str, Family]]:
    with own_registrations() as families:
        yield families


@pytest.mark.parametrize("model_type", FAMILIES)
def test_groups_cover_every_mlp_parameter_once_except_the_output_bias(model_type: str) -> None:
    model = tiny_model(model_type)
    groups = unit_groups(model)
    members = [member.name for group in groups for member in group.members]
    # No other size of the tiny models is WIDTH or twice that; the output's bias has none of that size.
    sizes = {WIDTH, PIECES.get(model_type, 1) * WIDTH}
    assert sorted(members) == sorted(name for name, stored in model.named_parameters() if sizes & {*stored.shape})
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
            counted = member.pieces * WIDTH
            assert sorted(member.shape) == [counted] if member.role == "bias" else [model.config.hidden_size, counted]
            assert member.shape[member.dim] == counted
            assert member.pieces == (1 if member.role == "out" else PIECES.get(model_type, 1))


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
    assert after[:, masked].abs().max() < 1e-5  # not 0: Apertus' activation makes -1e-6 of it


@pytest.mark.parametrize("model_type", FAMILIES)
def test_linear_modules_of_a_layer_are_those_of_mlp_and_attention(model_type: str) -> None:
    model = tiny_model(model_type)
    layers = f"{FAMILIES[model_type].layers}."
    linear = [name for name, each in model.named_modules() if isinstance(each, nn.Linear | Conv1D)]
    assert sorted(linear_names(model, ("mlp", "attention"))) == sorted(n for n in linear if n.startswith(layers))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_config_key_decides_about_the_width(model_type: str) -> None:
    check_width_key(tiny_model(model_type))


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (
            BLOOM,
            r'a pruned bloom could .* 61 as "n_inner", MLPs have \[44\] neurons; .* neurons cannot',
        ),
        (RECURRENT_GEMMA, r'61 as "intermediate_size", MLPs have \[30\] neurons'),
    ],
)
def test_a_family_whose_pruned_models_cannot_be_built_is_refused(
    registry: dict[str, Family], family: Family, message: str
) -> None:
    register(family)
    with pytest.raises(ValueError, match=message):
        check_width_key(tiny_model(family.model_types[0]))


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
    with pytest.raises(ValueError, match=r"'bloom'; known are .*, scale_prune\.register_family\(") as error:
        family_of(BloomConfig())
    assert all(known in str(error.value) for known in FAMILIES)


def test_a_new_family_takes_one_description(registry: dict[str, Family]) -> None:
    config = AutoConfig.for_model("persimmon")
    with pytest.raises(ValueError, match="persimmon"):
        family_of(config)
    register(
        Family(
            model_types=("persimmon",),
            layers="model.layers",
            mlp="mlp",
            inputs=("dense_h_to_4h",),
            output="dense_4h_to_h",
            width_key="intermediate_size",
        )
    )
    model = tiny_model("persimmon")
    assert family_of(config) is registry["persimmon"]
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


def test_what_an_unknown_model_is_for_stands_in_its_folder() -> None:
    encoder = AutoConfig.for_model("distilbert", architectures=["DistilBertForSequenceClassification"])
    assert classifies(encoder)
    assert stock_class(encoder).__name__ == "DistilBertForSequenceClassification"
    assert not classifies(AutoConfig.for_model("persimmon"))
