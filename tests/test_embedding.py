"""The token table in clusters of tokens of like frequency."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import VOCABULARY, logits, tiny_model, tokens
from torch import nn

from scale_prune.config.settings import PruningConfig
from scale_prune.core.frequency import frequency_clusters, zipf_clusters
from scale_prune.core.low_rank import svd_factors
from scale_prune.export import multiplies_out
from scale_prune.inspection.latency import describe
from scale_prune.models.embedding import Cluster, cluster_groups, cluster_sizes, put_clusters
from scale_prune.pruning.units import embedding_names, sketch_units

COUNTS = torch.tensor([5, 0, 9, 1, 1, 30, 2, 0])
ZIPF = torch.tensor([10**9 // (token + 1) for token in range(101)])


@pytest.mark.parametrize(
    ("num_clusters", "expected"),
    [
        (1, [[5, 2, 0, 6, 3, 4, 1, 7]]),
        (2, [[5], [2, 0, 6, 3, 4, 1, 7]]),
        (3, [[5], [2], [0, 6, 3, 4, 1, 7]]),
        (20, [[5], [2], [0], [6], [3, 4, 1, 7]]),
    ],
)
def test_clusters_hold_like_shares_of_the_text_frequent_tokens_first(
    num_clusters: int, expected: list[list[int]]
) -> None:
    assert [each.tolist() for each in frequency_clusters(COUNTS, num_clusters)] == expected


@pytest.mark.parametrize("num_clusters", [1, 2, 5, 50])
@pytest.mark.parametrize("counts", [COUNTS, ZIPF, torch.zeros(7, dtype=torch.int64)])
def test_every_token_is_in_one_cluster(counts: torch.Tensor, num_clusters: int) -> None:
    clusters = frequency_clusters(counts, num_clusters)
    assert 1 <= len(clusters) <= num_clusters
    assert torch.cat(clusters).sort().values.tolist() == list(range(len(counts)))
    assert all(len(each) for each in clusters)


@pytest.mark.parametrize("num_clusters", [1, 3, 8, 500])
def test_an_unknown_text_is_taken_to_have_tokens_in_the_order_of_their_frequency(num_clusters: int) -> None:
    expected = [each.tolist() for each in frequency_clusters(ZIPF, num_clusters)]
    assert [each.tolist() for each in zipf_clusters(len(ZIPF), num_clusters)] == expected


def clustered(model: Any, counts: torch.Tensor) -> Any:
    """Put a model's table into clusters of full rank."""
    table, found = model.get_input_embeddings().weight.detach(), frequency_clusters(counts, 3)
    factors = [svd_factors(table[each], min(len(each), table.shape[1])) for each in found]
    clusters = [Cluster(nn.Parameter(down), nn.Parameter(up)) for down, up in factors]
    put_clusters(model, embedding_names(model), clusters, found)
    return model


@pytest.mark.parametrize("model_type", ["gpt_neo", "gpt2", "gptj", "llama", "gpt_neox", "opt", "gemma2"])
def test_clusters_of_full_rank_change_nothing(model_type: str) -> None:
    counts = torch.bincount(tokens(7, 11).flatten(), minlength=VOCABULARY)
    expected = logits(tiny_model(model_type), tokens())
    model = clustered(tiny_model(model_type), counts)
    torch.testing.assert_close(logits(model, tokens()), expected, rtol=1e-4, atol=1e-4)
    groups = cluster_groups(model)
    assert sum(group.members[1].shape[0] for group in groups) == VOCABULARY
    sizes = cluster_sizes(groups, [1] * len(groups))
    assert [size["parameters_after"] for size in sizes] == [group.cost for group in groups]


def test_a_cluster_without_a_token_in_the_batch_takes_part_all_the_same() -> None:
    model = clustered(tiny_model("gpt_neo"), ZIPF[:VOCABULARY])
    ids = torch.zeros(1, 5, dtype=torch.int64)
    model(ids).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_tying_that_a_model_does_not_have_is_refused() -> None:
    asked = PruningConfig(criterion="flop", targets="embedding", tie_embeddings=True)
    with pytest.raises(ValueError, match=r"--tie_embeddings: the output .* not tied to its embedding transformer\.wte"):
        sketch_units(tiny_model("gptj"), asked)
    assert sketch_units(tiny_model("gpt_neo"), asked)


def test_a_tied_output_with_a_bias_is_refused() -> None:
    asked = PruningConfig(criterion="flop", targets="embedding")
    with pytest.raises(ValueError, match="the output lm_head, which is tied to the embedding, has a bias"):
        sketch_units(tiny_model("gptj", tie_word_embeddings=True), asked)


def test_a_rank_above_every_full_one_is_refused() -> None:
    asked = PruningConfig(criterion="flop", initial_rank=12)
    with pytest.raises(ValueError, match=r"--initial_rank 12 .* full rank of any weight, 11 at most; give at most"):
        sketch_units(tiny_model("gpt2"), asked)


def test_clusters_smaller_than_the_rank_at_the_start_have_their_full_rank() -> None:
    asked = PruningConfig(criterion="flop", targets="mlp,embedding", initial_rank=9, embedding_clusters=8)
    groups = sketch_units(tiny_model("gpt_neo"), asked)
    full = [min(up.shape[0], down.shape[1]) for down, up in (group.members for group in groups)]
    assert [group.num_units for group in groups] == [min(9, each) for each in full]
    assert min(full) < 9 < max(full)


def test_what_an_export_multiplies_out_is_known() -> None:
    full, small = (
        sketch_units(tiny_model("gpt_neo"), PruningConfig(criterion="flop", targets="mlp,embedding", initial_rank=rank))
        for rank in (None, 1)
    )
    assert multiplies_out("per_layer", full)
    assert not multiplies_out("per_layer", small)
    assert multiplies_out("uniform", small)


def test_what_is_factorized_already_is_refused(tmp_path: Path) -> None:
    model = tiny_model("gpt_neo")
    model.config.factorized = {"transformer.h.0.mlp.c_fc": 3}
    with pytest.raises(ValueError, match="factorized weights already, which cannot be pruned again"):
        sketch_units(model, PruningConfig())


def test_a_table_in_clusters_counts_what_it_multiplies() -> None:
    dense, model = tiny_model("gpt_neo"), clustered(tiny_model("gpt_neo"), ZIPF[:VOCABULARY])
    groups = cluster_groups(model)
    table = sum(group.num_units * group.cost for group in groups)
    first = frequency_clusters(ZIPF[:VOCABULARY], 3)
    (own,) = (group for group, tokens_of in zip(groups, first, strict=True) if 0 in tokens_of)
    others = describe(dense).flops_per_token - 2 * dense.lm_head.weight.numel()
    looked_up = 2 * own.num_units * dense.config.hidden_size
    assert describe(model).flops_per_token == others + 2 * table + looked_up
