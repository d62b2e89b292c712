"""Linear maps written so that they can be applied without being built: methods say what they are, layers choose the kernel for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Factors(NamedTuple):
    """B A.  A [r, in / groups, *kernel], B [out, r, *1]."""

    A: Tensor
    B: Tensor


class Kronecker(NamedTuple):
    """kron(first, second), each of them one tensor or a product of two.

    first: ([a, c],) or ([a, q], [q, c]). second: ([b, d, *kernel],) or (up [b, r], down [r, d, *kernel]). The layer has c d features in and a b out.
    """

    first: tuple[Tensor, ...]
    second: tuple[Tensor, ...]


class Hadamard(NamedTuple):
    """first * second, elementwise, both products: down [r, in / groups, *kernel] as A, up [out, r] as B."""

    first: Factors
    second: Factors


class Branch(NamedTuple):
    """A path beside a convolution with groups, PEFT's LoRA of one: A [r, in, *kernel] sees the channels of all groups, B [out, r / groups, *1] mixes by group.

    What it adds is no change of the layer's weight, in which no output sees another group's channels.
    """

    A: Tensor
    B: Tensor


class Pointwise(NamedTuple):
    """A linear map of the features at each position, as the function that applies it: [*, in] -> [*, out]. For layers with features in the last axis."""

    of: Callable[[Tensor], Tensor]


Form = Factors | Kronecker | Hadamard | Branch | Pointwise


class Stage(NamedTuple):
    """One stage of a product on features that are seen as an array.

    `axes` of that array together are multiplied as a row vector, by one matrix for each place on the other axes.  matrices [places, d, d].
    """

    axes: tuple[int, ...]
    matrices: Tensor
