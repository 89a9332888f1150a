"""Tokens by how often they occur, in clusters.

Shape letters: V tokens of the vocabulary.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, pairwise

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
    return list(order.split(_sizes(counts[order].tolist(), num_clusters)))


def zipf_clusters(size: int, num_clusters: int) -> list[Tensor]:
    """Cut the vocabulary into clusters for a text that is not known yet: counts in proportion to 1 / (token + 1).

    Nothing is read from tensors, so fake ones will do.
    """
    return list(torch.arange(size).split(_sizes([1e9 // (token + 1) for token in range(size)], num_clusters)))


def _sizes(counts: Sequence[float], num_clusters: int) -> list[int]:
    """Return the sizes of clusters that add up to about the same count each, for counts in descending order."""
    sums, total = list(accumulate(counts)), max(sum(counts), 1)
    ends = [bisect_left(sums, total * (cluster + 1) / num_clusters) + 1 for cluster in range(num_clusters - 1)]
    bounds = sorted({0, *(min(end, len(counts)) for end in ends), len(counts)})
    return [last - first for first, last in pairwise(bounds)]
