"""Low-rank factors of a matrix: W = up @ down, a sum of rank-1 components.

Shape letters: C components, D_in and D_out the sides of W.
"""

import math
from hashlib import sha256

import torch
from torch import Tensor


def svd_factors(weight: Tensor, num_components: int) -> tuple[Tensor, Tensor]:
    """Return factors of the matrix of that rank nearest to `weight`, largest components first.

    Both factors of a component have the same norm, the root of its singular value.

    Args:
        weight: (D_out, D_in), any floating type; computed in float32.
        num_components: C, in [1, min(D_out, D_in)].

    Returns:
        down (C, D_in) and up (D_out, C), float32; up @ down is `weight` where C is the full rank.

    Source: methods of Eckart and Young, 1936. arXiv 1910.04732 starts from random factors.
    """
    left, values, right = torch.linalg.svd(weight.float(), full_matrices=False)
    root = values[:num_components].sqrt()
    down, up = root[:, None] * right[:num_components], left[:, :num_components] * root
    return down.contiguous(), up.contiguous()


def whitened_factors(weight: Tensor, root: Tensor, num_components: int) -> tuple[Tensor, Tensor]:
    """Return the factors of that rank whose outputs are nearest to the weight's, over the tokens of a Gram matrix.

    The components are in order of what they add to the outputs. Both factors of one have the same norm, the root of its
    norm as a matrix, however many tokens there are.

    Args:
        weight: (D_out, D_in), any floating type.
        root: (D_in, D_in) float, lower triangular: root @ root.T is the Gram matrix of the inputs.
        num_components: C, in [1, min(D_out, D_in)].

    Returns:
        down (C, D_in) and up (D_out, C), float32; up @ down is `weight` where C is the full rank.

    Source: DRONE (Chen et al., NeurIPS 2021), SVD-LLM (arXiv 2403.07378).
    """
    left, values, right = torch.linalg.svd(weight.to(root.dtype) @ root, full_matrices=False)
    whole = values[:num_components, None] * right[:num_components]
    down = torch.linalg.solve_triangular(root, whole, upper=False, left=False)
    size = down.norm(dim=1).sqrt()  # 0 of a component of 0
    down = down / size.clamp(min=torch.finfo(size.dtype).tiny)[:, None]
    return down.float().contiguous(), (left[:, :num_components] * size).float().contiguous()


def random_factors(weight: Tensor, num_components: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return random factors whose product has the size of `weight`'s elements, and nothing else of it.

    Args:
        weight: (D_out, D_in).
        num_components: C, at least 1.
        generator: of the CPU.

    Returns:
        down (C, D_in) and up (D_out, C), float32.
    """
    rows, columns = weight.shape
    size = float(weight.float().square().mean())
    scale = (size / num_components) ** 0.25
    down = torch.randn(num_components, columns, generator=generator) * scale
    return down, torch.randn(rows, num_components, generator=generator) * scale


def saves(num_components: int, shape: tuple[int, int]) -> bool:
    """Tell whether the factors have fewer elements than the (D_out, D_in) matrix they stand for."""
    return num_components * sum(shape) < math.prod(shape)


def generator_of(seed: int, name: str) -> torch.Generator:
    """Return a generator that depends on a seed and a name alone, not on ranks or on what was drawn before."""
    digest = sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
