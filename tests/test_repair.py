"""Laws of the repair: choice and repair are separate, and the repair is the best there is."""

from collections.abc import Sequence

import pytest
import torch
from memory_backend import InMemoryBackend
from models import HIDDEN, VOCABULARY, tiny_model
from torch import Tensor

from scale_prune.config import PruningConfig
from scale_prune.core import UnitGroup
from scale_prune.core.repair import (
    OUTPUT_DAMPING,
    UnsolvableError,
    bias_taken_over,
    elimination_scores,
    least_squares,
    mean_takeover,
    taken_over,
)
from scale_prune.models import FAMILIES, unit_groups
from scale_prune.pruning import Calibration, takeovers_of
from scale_prune.pruning.calibration import portions_of
from scale_prune.pruning.solving import gram_scores

TOKENS, UNITS, OUTPUTS = 200, 12, 7
DAMPING = 1e-3
ROWS = torch.randint(3, VOCABULARY, (8, 12), generator=torch.Generator().manual_seed(0))


def activations(*, ones: bool, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(TOKENS, UNITS, generator=generator) @ torch.randn(UNITS, UNITS, generator=generator)
    h = torch.relu(mixed) + 0.1 * torch.randn(TOKENS, UNITS, generator=generator)
    return torch.cat([h, torch.ones(TOKENS, 1)], 1) if ones else h


def a_weight(seed: int = 1) -> Tensor:
    return torch.randn(OUTPUTS, UNITS, generator=torch.Generator().manual_seed(seed))


def repaired_error(h: Tensor, weight: Tensor, keep: Tensor, damping: float) -> float:
    gram = h.T @ h
    takeover = least_squares(gram, keep, damping)
    output = h[:, :UNITS][:, keep] @ taken_over(weight, takeover, keep, 1)[:, keep].T
    if len(takeover) > int(keep.sum()):
        output = output + bias_taken_over(weight, takeover, keep, 1)
    return float((output - h[:, :UNITS] @ weight.T).square().sum())


@pytest.mark.parametrize("ones", [False, True])
def test_least_squares_is_the_minimum(ones: bool) -> None:
    h, weight = activations(ones=ones), a_weight()
    keep = torch.arange(UNITS) % 3 > 0
    kept = torch.cat([keep, torch.ones(h.shape[1] - UNITS, dtype=torch.bool)])
    best = torch.linalg.lstsq(h[:, kept].double(), (h[:, :UNITS] @ weight.T).double()).solution
    least = float((h[:, kept].double() @ best - (h[:, :UNITS] @ weight.T).double()).square().sum())
    assert repaired_error(h, weight, keep, 0.0) == pytest.approx(least, rel=1e-3)
    unrepaired = float((h[:, :UNITS][:, ~keep] @ weight[:, ~keep].T).square().sum())
    assert least < repaired_error(h, weight, keep, DAMPING) < unrepaired


def test_repair_is_exact_where_removed_units_follow_from_kept_ones() -> None:
    h = activations(ones=True)
    keep = torch.arange(UNITS) < UNITS - 3
    h[:, :UNITS][:, ~keep] = h[:, :UNITS][:, keep] @ torch.randn(UNITS - 3, 3) + torch.tensor([1.0, -2.0, 0.5])
    whole = float((h[:, :UNITS] @ a_weight().T).square().sum())
    assert repaired_error(h, a_weight(), keep, 1e-9) < 1e-8 * whole


@pytest.mark.parametrize("ones", [False, True])
def test_one_by_one_in_blocks_and_least_squares_are_the_same_weights(ones: bool) -> None:
    """Optimal brain surgeon's updates, from the inverse alone, against the closed form for the same set."""
    h, weight = activations(ones=ones).double(), a_weight().double()
    gram = h.T @ h
    gram.diagonal()[:UNITS].add_(DAMPING * gram.diagonal()[:UNITS].mean())
    removed = [2, 3, 7, 10]
    one_by_one = _eliminated(gram, weight, [[unit] for unit in removed])
    in_blocks = _eliminated(gram, weight, [removed[:1], removed[1:]])
    keep = torch.ones(UNITS, dtype=torch.bool)
    keep[removed] = False
    takeover = least_squares((h.T @ h).float(), keep, DAMPING)
    closed = taken_over(weight.float(), takeover, keep, 1)[:, keep]
    torch.testing.assert_close(one_by_one[:, keep], in_blocks[:, keep])
    torch.testing.assert_close(closed.double(), in_blocks[:, keep], rtol=1e-4, atol=1e-4)


def _eliminated(gram: Tensor, weight: Tensor, blocks: list[list[int]]) -> Tensor:
    inverse, weight = torch.linalg.inv(gram), weight.clone()
    gone: list[int] = []
    for block in blocks:
        takeover = torch.linalg.solve(inverse[block][:, block], inverse[block])
        weight -= weight[:, block] @ takeover[:, :UNITS]
        inverse = inverse - inverse[:, block] @ takeover
        gone += block
        inverse[gone, :] = inverse[:, gone] = 0
        inverse[gone, gone] = 1
    return weight


def test_costs_add_up_to_the_error_of_the_repair() -> None:
    h, weight = activations(ones=False), a_weight()
    scores = elimination_scores(h.T @ h, weight, damping=0.0, rounds=UNITS)
    for removed in range(1, UNITS - 2):
        keep = torch.ones(UNITS, dtype=torch.bool)
        keep[scores.argsort()[:removed]] = False
        together = repaired_error(h, weight, keep, 0.0)
        assert float(scores.sort().values[:removed].sum()) == pytest.approx(together, rel=2e-2)


def test_elimination_spares_what_the_others_cannot_do_and_drops_copies_and_the_dead_first() -> None:
    h = activations(ones=False)
    h[:, 4] = h[:, 5]
    h[:, 9] = 0
    scores = elimination_scores(h.T @ h, a_weight(), damping=1e-6, rounds=UNITS)
    assert scores.argmin() == 9
    assert scores[9] == 0
    assert set(scores.argsort()[1:2].tolist()) <= {4, 5}


def test_rounds_keep_the_order_of_the_costs_within_the_matrix() -> None:
    h = activations(ones=True)
    coarse = elimination_scores(h.T @ h, a_weight(), damping=DAMPING, rounds=3)
    assert len(coarse.unique()) > 3
    assert (coarse >= 0).all()


@pytest.mark.parametrize("tokens", [40, 60])
def test_few_tokens_repair_other_tokens_better_with_the_usual_damping(tokens: int) -> None:
    """Of activations that have a few large directions and many small ones."""
    generator, units = torch.Generator().manual_seed(0), 60
    directions, _ = torch.linalg.qr(torch.randn(units, units, generator=generator))
    h = torch.randn(4000 + tokens, units, generator=generator) / torch.arange(1, units + 1) @ directions
    keep, errors = torch.arange(units) % 2 > 0, []
    for config in (PruningConfig(calibration_tokens=tokens), PruningConfig(repair_damping=1e-3)):
        takeover = least_squares(h[:tokens].T @ h[:tokens], keep, config.damping_of(units))
        errors.append(float((h[tokens:, ~keep] - h[tokens:, keep] @ takeover.float()).square().mean()))
    assert errors[0] < 0.95 * errors[1]
    assert PruningConfig(calibration_tokens=20 * units).damping_of(units) == PruningConfig().damping_of(units) == 1e-3


def test_mean_repair_keeps_the_mean_of_the_output() -> None:
    h, weight = activations(ones=True), a_weight()
    keep = torch.arange(UNITS) % 2 > 0
    takeover = mean_takeover(h.T @ h, keep)
    torch.testing.assert_close(taken_over(weight, takeover, keep, 1), weight)
    before = (h[:, :UNITS] @ weight.T).mean(0)
    after = (h[:, :UNITS][:, keep] @ weight[:, keep].T).mean(0) + bias_taken_over(weight, takeover, keep, 1)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_weights_that_store_units_as_rows_are_repaired_alike() -> None:
    h, weight = activations(ones=True), a_weight()
    keep = torch.arange(UNITS) % 2 > 0
    takeover = least_squares(h.T @ h, keep, DAMPING)
    torch.testing.assert_close(taken_over(weight.T, takeover, keep, 0), taken_over(weight, takeover, keep, 1).T)
    torch.testing.assert_close(bias_taken_over(weight.T, takeover, keep, 0), bias_taken_over(weight, takeover, keep, 1))


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -1e9])
def test_matrices_that_cannot_be_solved_are_refused(broken: float) -> None:
    gram = activations(ones=False).T @ activations(ones=False)
    gram[0, 0] = broken
    with pytest.raises(UnsolvableError):
        least_squares(gram, torch.arange(UNITS) < 5, DAMPING)


# --- every family ----------------------------------------------------------------------------------------------------


def repair_in_memory(backend: InMemoryBackend, groups: Sequence[UnitGroup], masks: Sequence[Tensor]) -> None:
    """Repair a model in memory, as `repair_weights` does on shards."""
    calibration = Calibration(backend, groups)
    with torch.no_grad(), calibration.watching():
        backend.module(input_ids=ROWS)
    for index, takeover in takeovers_of(calibration, masks, "least_squares", lambda features: DAMPING).items():
        group, keep = groups[index], masks[index]
        member = next(member for member in group.members if member.role == "out")
        weight, bias = backend.parameters[member.name].data, backend.parameters.get(f"{group.output}.bias")
        if bias is not None:
            bias.data += bias_taken_over(weight, takeover, keep, member.dim)
        weight.copy_(taken_over(weight, takeover, keep, member.dim))


@pytest.mark.parametrize("model_type", [name for name, family in FAMILIES.items() if not family.classifies])
def test_every_family_loses_less_in_its_mlps_outputs_when_repaired(model_type: str) -> None:
    """One layer at a time loses half of its neurons, so that its inputs stay what they were."""
    for layer in range(2):
        errors = {}
        for repaired in (False, True):
            backend = InMemoryBackend(tiny_model(model_type))
            groups = unit_groups(backend.module)
            masks = [torch.arange(each.num_units) % 2 > int(each.layer == layer) - 1 for each in groups]
            outputs: list[Tensor] = []
            output = backend.module.get_submodule(groups[layer].output)
            output.register_forward_hook(lambda module, args, found, to=outputs: to.append(found.detach()))
            with torch.no_grad():
                backend.module(input_ids=ROWS)
                if repaired:
                    repair_in_memory(backend, groups, masks)
                for group, mask in zip(groups, masks, strict=True):
                    backend.mask_working_copy(group, mask)
                backend.module(input_ids=ROWS)
            errors[repaired] = float((outputs[-1] - outputs[0]).square().sum())
        assert 0 < errors[True] < errors[False]


@pytest.mark.parametrize("gradients", [False, True])
def test_matrices_of_a_portion_fit_into_memory(gradients: bool) -> None:
    groups = unit_groups(tiny_model("gpt_neo"))
    features = groups[0].num_features + 1
    one = 4 * (features**2 + gradients * HIDDEN**2)
    for number in range(1, len(groups) + 1):
        portions = portions_of(groups, 1, 6 * 4 * features**2 + number * one, gradients=gradients)
        assert max(map(len, portions)) == number
        assert sorted(index for portion in portions for index in portion) == [*range(len(groups))]


def test_padding_is_no_token_of_the_calibration() -> None:
    model = tiny_model("gpt_neo")
    calibration = Calibration(InMemoryBackend(model), unit_groups(model))
    real = torch.ones_like(ROWS)
    real[0, 3:] = 0
    with torch.no_grad(), calibration.watching():
        for _ in range(2):
            model(input_ids=ROWS, attention_mask=real)
    assert calibration.tokens == 2 * int(real.sum())


def output_weight(backend: InMemoryBackend, group: UnitGroup) -> Tensor:
    member = next(member for member in group.members if member.role == "out")
    return backend.gather(member.name).movedim(member.dim, -1)


def test_scores_that_cannot_be_computed_name_the_group() -> None:
    model = tiny_model("gpt_neo")
    backend, groups = InMemoryBackend(model), unit_groups(model)
    calibration = Calibration(backend, groups)
    calibration.grams = {index: torch.eye(group.num_units) for index, group in enumerate(groups)}

    def broken(gram: Tensor, weight: Tensor, block: int) -> Tensor:
        return torch.linalg.eigvalsh(torch.full((3, 3), torch.nan))  # of a weight that is not finite

    with pytest.raises(ValueError, match=groups[0].name):
        gram_scores(calibration, broken)


@pytest.mark.parametrize("model_type", ["gpt_neo", "gpt2"])
def test_the_gradients_of_the_output_are_the_metric_of_its_errors(model_type: str) -> None:
    model = tiny_model(model_type)
    backend, groups = InMemoryBackend(model), unit_groups(model)
    calibration = Calibration(backend, groups)
    gradients = {}
    for index, group in enumerate(groups):
        weight = output_weight(backend, group)
        gradients[index] = torch.randn(20, len(weight), generator=torch.Generator().manual_seed(index))
        calibration.grams[index] = torch.eye(group.num_units)
        calibration.output_grams[index] = gradients[index].T @ gradients[index]
    scores = gram_scores(calibration, lambda gram, weight, block: weight.square().sum(0))
    for index, group in enumerate(groups):
        weight = output_weight(backend, group)
        damping = gradients[index].square().sum(0).mean() * weight.square().sum(0)
        expected = (gradients[index] @ weight).square().sum(0) + OUTPUT_DAMPING * damping
        torch.testing.assert_close(scores[index], expected, rtol=1e-4, atol=1e-5)
