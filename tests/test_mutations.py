"""What the tests notice: each mutation of the package, a mistake that is easy to make, fails the tests named beside it.

Run with `bash launch/test.sh -m mutations`. A new formula gets a line here, so that the test of it is known to bite.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

GATES = "test_gates.py::test_gates_equal_autograd_through_the_loss_and_its_penalties"
MOVEMENT = "test_movement.py::test_movement_equals_autograd_through_an_explicit_mask"
UNSCALED = "test_zero3.py::test_gradients_are_read_unscaled"
GLOBAL = "test_selection.py::test_global_keeps_exactly_the_budget_and_the_highest"
MAGNITUDE = "test_criteria.py::test_magnitude_is_the_norm_of_all_weights_of_a_neuron"
SENSITIVITY = "test_criteria.py::test_sensitivity_is_the_mean_of_absolute_first_order_changes_while_live"
COSINE = "test_similarity.py::test_first_sample_equals_the_loop_over_pairs"
DIVERGENCE = "test_distillation.py::test_it_is_the_mean_over_predicted_tokens"
PLACES = "test_activations.py::test_the_sample_does_not_depend_on_how_the_global_batch_is_cut"
REBUILD = "test_rebuild.py::test_the_smaller_engine_goes_on_where_the_masked_one_was"

IN_ORDER = """\
            with self.seconds.measure("similarity"):
                self.scoring.state = self.observations.take(self.scoring.state, self.masks)
            with self.seconds.measure("scoring"):
                self.scoring.update(self.step, self.masking.live, self.observations.similarity)
"""
SWAPPED = """\
            with self.seconds.measure("scoring"):
                self.scoring.update(self.step, self.masking.live, self.observations.similarity)
            with self.seconds.measure("similarity"):
                self.scoring.state = self.observations.take(self.scoring.state, self.masks)
"""
MASKED_BETWEEN = """self.put_masks_on() if self._reads_back() else self.masking.apply()"""


class Mutation(NamedTuple):
    """A file of the package, a text that it has once, what takes its place, and a test that then fails."""

    file: str
    original: str
    mutated: str
    test: str


# fmt: off
MUTATIONS = [Mutation(*line) for line in (
    # gradients that no step follows
    ("zero3/frozen.py", "(0, -len(whole) % world_size))) / world_size", "(0, -len(whole) % world_size)))",
     "test_frozen.py::test_gradients_are_those_of_the_whole_batch"),
    ("zero3/frozen.py", "gradient.zero_()", "gradient.clone()",
     "test_frozen.py::test_gradients_are_those_of_the_whole_batch"),
    ("pruning/gating.py", "totals.nan_to_num(0.0, 0.0, 0.0)", "totals",
     "test_gates.py::test_a_gate_that_overflows_in_fp16_has_no_gradient"),
    # what calibration text says
    ("run/calibrating.py", "mean_loss * predicted.sum()", 'mean_loss * micro_batch.weight * batch["labels"].numel()',
     "test_writing.py::test_what_a_token_costs_does_not_depend_on_what_is_beside_it"),
    ("run/removal.py", "taken = repaired < without", "taken = True",
     "test_rounds.py::test_masks_are_repaired_where_weights_have_not_learned_to_do_without"),
    ("core/repair.py", "OUTPUT_DAMPING).T.float() @ weight", "OUTPUT_DAMPING).float() @ weight",
     "test_repair.py::test_the_gradients_of_the_output_are_the_metric_of_its_errors"),
    ("core/low_rank.py", "weight.to(root.dtype) @ root", "weight.to(root.dtype) @ root.T",
     "test_low_rank.py::test_whitened_factors_are_the_nearest_in_the_outputs"),
    ("core/selection.py", "(cosine - max(redundancy)) / TEMPERATURE", "(max(redundancy) - cosine) / TEMPERATURE",
     "test_selection.py::test_redundant_layers_lose_most_and_none_loses_all"),
    # gates
    ("criteria/flop.py", "total * slope", "-total * slope", GATES),
    ("criteria/flop.py", "of_budget = -pull *", "of_budget = pull *", GATES),
    ("core/adam.py", "+ rate * step", "- rate * step", GATES),
    ("criteria/flop.py", "moment.noise, free=_is_free(self.config)) / self._unit",
     "moment.noise, free=_is_free(self.config))", GATES),
    ("criteria/flop_agp.py", 'state["gate"] - rate * step', 'state["gate"] + rate * step', GATES),
    ("criteria/flop_agp.py", "total + self.config.gate_l1", "total - self.config.gate_l1", GATES),
    ("core/hard_concrete.py", "(x > 0, 1 - below, below)", "(x > 0, below, 1 - below)",
     "test_hard_concrete.py::test_the_mean_is_that_of_sampling"),
    ("core/hard_concrete.py", "(HIGH - LOW) * s * (1 - s)", "(HIGH - LOW) * s",
     "test_hard_concrete.py::test_the_gradient_is_that_of_autograd"),
    ("pruning/gating.py", "manual_seed(self.seed * 1_000_003 + step)", "manual_seed(self.seed * 1_000_003)",
     "test_gates.py::test_all_ranks_and_a_later_run_draw_the_same_noise_and_every_step_another"),
    ("pruning/gating.py", "(backend.world_size * backend.loss_scale)", "backend.world_size", UNSCALED),
    ("zero3/backend.py", "else gradient / self.loss_scale", "else gradient", UNSCALED),
    # scores
    ("criteria/movement.py", 'state["score"] - rate * step', 'state["score"] + rate * step', MOVEMENT),
    ("criteria/movement.py", 'state["score"] - rate * gradient', 'state["score"] + rate * gradient', MOVEMENT),
    ("criteria/movement.py", "(1 + self.config.uniqueness", "(1 - self.config.uniqueness",
     "test_movement.py::test_the_score_penalty_is_the_derivative_of_the_regulariser"),
    ("core/adam.py", "(mean / (1 - BETAS[0] ** count))", "mean", MOVEMENT),
    ("criteria/sensitivity.py", "(total.abs() - ", "(total - ", SENSITIVITY),
    ("criteria/magnitude.py", "view.weight.square()", "view.weight.abs()", MAGNITUDE),
    ("criteria/magnitude.py", 'state["total"].sqrt()', 'state["total"]', MAGNITUDE),
    ("core/similarity.py", "cosines.diagonal(offset=first).zero_()", "cosines.diagonal(offset=first)", COSINE),
    ("core/similarity.py", "sums[block.stop : stop] += ", "sums[block.stop : stop] -= ",
     "test_similarity.py::test_removed_units_and_the_other_half_of_pairs_need_no_products"),
    ("core/hard_concrete.py", "z.clamp(0, 1) * SLOPE", "SLOPE",
     "test_hard_concrete.py::test_the_gradient_is_that_of_autograd"),
    ("core/similarity.py", "cosines @ live.to(cosines.dtype)", "cosines.sum(1)", COSINE),
    ("pruning/activations.py", "return mask.bool().cpu()", "return torch.ones_like(mask).bool().cpu()",
     "test_activations.py::test_padding_is_left_out"),
    ("pruning/activations.py", "default_rng((*self._seed, first_row + row))", "default_rng((*self._seed, row))",
     PLACES),
    ("pruning/activations.py", "turns[first_row + row]", "turns[row]", PLACES),
    ("pruning/pruner.py", IN_ORDER, SWAPPED,
     "test_pruner.py::test_scores_are_updated_with_the_similarity_of_their_own_step"),
    ("pruning/pruner.py", "if self.backend.step_applied():", "if True:",
     "test_pruner.py::test_a_skipped_step_changes_no_score"),
    # shards, masks, compaction
    ("core/shards.py", "start // inner % num_units", "0",
     "test_shards.py::test_shares_add_up_to_the_sum_of_each_unit"),
    ("core/shards.py", "[skipped : skipped + count]", "[:count]",
     "test_shards.py::test_expanding_gives_each_element_its_unit"),
    ("core/selection.py", "scores.argsort(descending=True, stable=True)[:count]",
     "len(scores) - 1 - scores.flip(0).argsort(descending=True, stable=True)[:count]",
     "test_selection.py::test_among_equals_the_first_are_kept"),
    ("core/selection.py", "<= allowed", "< allowed", GLOBAL),
    ("core/selection.py", "(0.5 if nearest else 0.0)", "0.5",
     "test_selection.py::test_budget"),
    ("core/schedule.py", "1.0 - (1.0 - x) ** 3", "1.0 - (1.0 - x) ** 2",
     "test_schedule.py::test_remaining_by_the_formula"),
    ("core/level_table.py", "(all_spent[order] <= spare)", "(all_spent[order] <= spare // 2)",
     "test_budgets.py::test_the_knapsack_is_as_good_as_trying_everything"),
    ("criteria/ddp.py", "- l1 - 2 * l2 * missing", "+ l1 - 2 * l2 * missing",
     "test_ddp.py::test_an_update_descends_on_the_whole_objective"),
    ("pruning/pruner.py", MASKED_BETWEEN, "self.put_masks_on() if self._reads_back() else None",
     "test_pruner.py::test_after_every_step_exactly_the_masked_units_are_zero_and_the_master_is_dense"),
    ("zero3/rebuild.py", "safe_get_full_optimizer_state(param, kind)",
     "torch.zeros_like(safe_get_full_fp32_param(param))", REBUILD),
    ("zero3/rebuild.py", "    backend.finish_prefetches()\n", "",
     "test_rebuild.py::test_a_loop_of_ones_own_keeps_its_scheduler_or_its_engine"),
    # losses
    ("core/divergence.py", "* temperature**2 / count", "/ count", DIVERGENCE),
    ("core/divergence.py", "chance = wanted.exp()", "chance = found.exp()", DIVERGENCE),
    ("core/divergence.py", "(temperature / count)", "(1 / count)",
     "test_distillation.py::test_its_gradient_is_that_of_the_formula_however_few_tokens_are_taken_at_once"),
    ("zero3/loading.py", "start - first * row :", "0 :",
     "test_loading.py::test_every_rank_has_the_slices_of_the_plain_model"),
    ("zero3/saving.py", "writers[number % len(writers)]", "writers[0]",
     "test_saving.py::test_files_are_written_by_all_ranks_that_see_the_disk_or_by_none"),
    ("core/likelihood.py", "zip(logits, labels[:, 1:], strict=True)", "zip(logits, labels[:, :-1], strict=True)",
     "test_evaluation.py::test_likelihood_is_that_of_the_definition"),
    ("tasks/examples.py", "weight=float(counted[rows].sum()) / mean", "weight=1.0",
     "test_examples.py::test_the_mean_is_over_the_completion_tokens_of_the_global_batch"),
    ("tasks/examples.py", "[torch.full_like(prompt, IGNORED), learned]", "[prompt, learned]",
     "test_examples.py::test_only_the_completion_is_learnt_by_a_mask_made_by_hand"),
)]
# fmt: on


def run_tests(folder: Path, tests: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run tests in a copy of the package, which shadows every other one."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, *(f"tests/{test}" for test in tests)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for part in ("scale_prune", "tests", "ds_configs"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[f"{line.file}: {line.original.strip()}" for line in MUTATIONS])
def test_every_mutation_still_has_its_place(mutation: Mutation) -> None:
    assert (ROOT / "scale_prune" / mutation.file).read_text(encoding="utf-8").count(mutation.original) == 1


@pytest.mark.mutations
def test_without_a_mutation_the_tests_pass(copy: Path) -> None:
    result = run_tests(copy, sorted({mutation.test for mutation in MUTATIONS}))
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.mutations
@pytest.mark.parametrize("mutation", MUTATIONS, ids=[f"{line.file}: {line.mutated.strip()}" for line in MUTATIONS])
def test_a_mutation_is_noticed(mutation: Mutation, copy: Path) -> None:
    path = copy / "scale_prune" / mutation.file
    path.write_text(path.read_text(encoding="utf-8").replace(mutation.original, mutation.mutated), encoding="utf-8")
    result = run_tests(copy, [mutation.test])
    assert result.returncode == pytest.ExitCode.TESTS_FAILED, result.stdout[-3000:]
