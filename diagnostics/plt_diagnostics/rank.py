"""Effective rank: how many directions a matrix really uses.

    effective_rank(states_SD)     # exp(-sum_i s_i ln s_i), s the singular values divided by their sum

Source: Roy and Vetterli 2007, as in arXiv 2606.18023, equation 4. It is 1 for a matrix of rank 1, and at most
min(S, D), where all singular values are equal.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TOLERANCE = 1e-4
"""Relative error of the effective rank up to which the Gram matrix is believed."""


def effective_rank(matrix: Tensor) -> float:
    """Of a matrix [m, n], in float64; NaN for one that is zero or holds a non-finite value.

    The singular values are the square roots of the eigenvalues of the smaller Gram matrix, three times faster than an
    SVD. Squaring loses the small ones: an eigenvalue is known to within about eps * max(m, n) of the largest. Where
    that could move the result by more than TOLERANCE, an SVD is taken instead. Holds one float64 copy of the matrix.
    """
    low, high = matrix.aminmax()
    scale = float(torch.maximum(-low, high))
    if scale == 0 or not math.isfinite(scale):
        return math.nan
    # A scale does not change the result, but squares could leave float64's range.
    scaled = matrix.to(torch.float64, copy=True).div_(scale)
    if scaled.shape[0] > scaled.shape[1]:
        scaled = scaled.T
    singular = _roots(scaled @ scaled.T)
    if float(_doubt(singular, max(scaled.shape))) > TOLERANCE:
        singular = torch.linalg.svdvals(scaled)
    return float(_of_singular(singular))


def rank_of_gram(gram: Tensor) -> Tensor:
    """Effective rank of a matrix A from A A^T [..., m, m] in float64 -> [...]; NaN as in :func:`effective_rank`.

    On the CPU, wherever `gram` lies: an accelerator takes longer for many small eigenvalue problems.
    """
    flat = gram.reshape(-1, *gram.shape[-2:]).cpu()
    found = torch.full((len(flat),), torch.nan, dtype=torch.float64, device=flat.device)
    sound = flat.isfinite().all((-1, -2)) & (flat.diagonal(dim1=-2, dim2=-1).sum(-1) > 0)
    if sound.any():
        found[sound] = _of_singular(_roots(flat[sound]))
    return found.reshape(gram.shape[:-2]).to(gram.device)


def _roots(gram: Tensor) -> Tensor:
    eigenvalues: Tensor = torch.linalg.eigvalsh(gram)
    return eigenvalues.clamp_min(0).sqrt()


def _doubt(singular: Tensor, size: int) -> Tensor:
    """A bound of the relative error that the Gram matrix leaves, to first order: each s carries an absolute error of
    noise / (2 s), at most sqrt(noise); the entropy changes by |1 + ln(s / total)| / total times that."""
    largest = singular.amax(-1, keepdim=True)
    noise = torch.finfo(torch.float64).eps * size * largest.square()
    error = torch.minimum(noise / (2 * singular).clamp_min(1e-300), noise.sqrt())
    total = singular.sum(-1, keepdim=True)
    share = torch.maximum(singular, noise.sqrt()) / total
    return (error / total * (1 + share.log().abs())).sum(-1)


def _of_singular(singular: Tensor) -> Tensor:
    share = singular / singular.sum(-1, keepdim=True)
    entropy: Tensor = torch.special.entr(share).sum(-1)
    return entropy.exp()
