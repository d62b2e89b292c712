"""Weighted sums of updates, and what is left out of them: TIES (arXiv:2306.01708), DARE (arXiv:2311.03099), magnitude pruning.

All functions take deltas of one layer, a weight each, and the share `density` of entries that is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def weighted(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i d_i."""
    return sum(w * d for w, d in zip(weights, deltas, strict=True))  # type: ignore[return-value]


def largest(delta: Tensor, density: float) -> Tensor:
    """The density * n entries of largest magnitude; zeros elsewhere."""
    flat = delta.flatten()
    places = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy(0, places, flat[places]).view(delta.shape)


def drawn(delta: Tensor, density: float) -> Tensor:
    """Each entry with probability `density`, divided by it; zeros elsewhere. Draws from torch's default generator."""
    return delta * torch.bernoulli(torch.full_like(delta, density)) / density


def elected(deltas: Sequence[Tensor], weights: Sequence[float], by: str) -> Tensor:
    """At each place the mean of w d over those that have the majority's sign: of the sums ("total") or of the signs ("frequency")."""
    stack = torch.stack(list(deltas))
    votes = stack if by == "total" else stack.sign()
    agrees = stack.sign() == torch.where(votes.sum(0) >= 0, 1, -1)
    w = torch.tensor(weights, dtype=stack.dtype, device=stack.device).view(-1, *(1 for _ in deltas[0].shape))
    return (stack * w * agrees).sum(0) / agrees.sum(0).clamp_min(1)


# how: (what is kept of each delta, whether signs are elected)
HOW: dict[str, tuple[Callable[[Tensor, float], Tensor] | None, bool]] = {
    "linear": (None, False),
    "svd": (None, False),
    "ties": (largest, True),
    "dare": (drawn, False),
    "dare_ties": (drawn, True),
    "magnitude": (largest, False),
}


def merged(how: str, deltas: Sequence[Tensor], weights: Sequence[float], density: float, majority_sign: str) -> Tensor:
    """The deltas of one layer as one."""
    keep, elect = HOW[how]
    if keep is not None and density < 1:
        deltas = [keep(delta, density) for delta in deltas]
    return elected(deltas, weights, majority_sign) if elect else weighted(deltas, weights)
