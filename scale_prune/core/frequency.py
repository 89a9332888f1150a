"""Tokens by how often they occur, in clusters.

Shape letters: V tokens of the vocabulary.
"""

from itertools import pairwise

import torch
from torch import Tensor


def frequency_clusters(counts: Tensor, num_clusters: int) -> list[Tensor]:
    """Cut the vocabulary into clusters that hold about the same share of a text, frequent tokens first.

    Args:
        counts: (V,) how often each token occurs; of equals the first one comes first.
        num_clusters: at least 1; fewer come back where the vocabulary is smaller.

    Returns:
        The tokens of each cluster, int64; together every token once. The last cluster has the rarest ones, and all that
        never occur.

    Source: the adaptive embeddings of arXiv 1809.10853, whose clusters are given by hand there.
    """
    order = counts.argsort(descending=True, stable=True)
    share = counts[order].double().cumsum(0) / counts.sum().clamp(min=1)
    ends = [int((share < (cluster + 1) / num_clusters).sum()) + 1 for cluster in range(num_clusters - 1)]
    bounds = sorted({0, *(min(end, len(order)) for end in ends), len(order)})
    return [order[first:last] for first, last in pairwise(bounds)]


def zipf_counts(size: int) -> Tensor:
    """Return (V,) counts in proportion to 1 / rank, for a text that is not known yet."""
    return (1e9 / torch.arange(1, size + 1)).long()
