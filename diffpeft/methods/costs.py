"""Which way costs least: one function and one table. How it was measured, and what it rules out: docs/decisions/013-one-cost-model.md."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

from diffpeft.methods.linalg import traced

log = logging.getLogger("diffpeft.costs")


class Work(NamedTuple):
    """What a way does: multiply-adds in matrix products, numbers of activations it passes over, and numbers of a weight it builds or copies."""

    products: float
    activations: float = 0
    elements: float = 0


class Price(NamedTuple):
    """How many multiply-adds take as long as a pass over one number of an activation, and as one number of a weight."""

    activation: float
    element: float


# {what is done: {bytes of a number: its price}}; 4 stands for more too. Measured on one core with 320 to 10240 features; forward and backward, but for
# `inference`. A weight that is differentiated is passed over more often than one that is copied.
PRICES: Mapping[str, Mapping[int, Price]] = {
    "hadamard": {4: Price(0, 600), 2: Price(0, 3000)},
    "kronecker": {4: Price(150, 260), 2: Price(1000, 2000)},
    "kronecker, second half whole": {4: Price(200, 260), 2: Price(2000, 2000)},
    "butterfly": {4: Price(450, 350), 2: Price(450, 350)},
    # 16-bit weights would round a small update away, so there it is never added to them
    "inference": {4: Price(0, 40), 2: Price(0, math.inf)},
}


def cheapest(what: str, dtype: torch.dtype, ways: Mapping[str, Work]) -> str:
    """The name of the way that costs least, of equal ones the first. What was decided is said on the logger `diffpeft.costs`, at DEBUG."""
    price = PRICES[what][2 if dtype.itemsize == 2 else 4]
    costs = {
        # an infinite price of nothing is nothing
        way: work.products
        + price.activation * work.activations
        + (price.element * work.elements if work.elements else 0)
        for way, work in ways.items()
    }
    best = min(costs, key=lambda way: costs[way])
    if not traced() and log.isEnabledFor(logging.DEBUG):
        log.debug("%s in %s: %s (%s)", what, dtype, best, ", ".join(f"{way} {cost:.3g}" for way, cost in costs.items()))
    return best
