"""BOFT: W turned by m block-diagonal rotations with butterfly permutations between them.  Liu et al. 2023, arXiv:2311.06243.

M = F_{m-1} .. F_0,  F_i = P_i blockdiag(R_i) P_i^T,  P_i as in `linalg.butterfly`.
Input side (PEFT): flat(W') = boft_s * flat(W) M^T, so W' x = boft_s * W (x M) with x as a row.  R = (I - S)(I + S)^-1, S = (D - D^T) / 2.
Output side (LyCORIS): W' = rescale * M W.  R = (I + q)(I - q)^-1, q = B - B^T clamped as in OFT.
An embedding's features are its output: W' = boft_s * M^T W, so that they are multiplied by M as x is elsewhere.

PEFT has m > 1 only with its CUDA extension (elsewhere it makes m = 1 of it); here any m works anywhere, and no matrix of in x in is made.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffpeft.errors import ConfigError
from diffpeft.methods import config as configs
from diffpeft.methods import costs
from diffpeft.methods.base import Fresh, Geometry, Link, Method, Operation, Shaped, Site, Spec, Strength, Tensors
from diffpeft.methods.forms import Stage
from diffpeft.methods.layout import LAYOUTS
from diffpeft.methods.linalg import added, butterfly, cayley, columns_times, exchange, rows_times, wide
from diffpeft.methods.oft import (
    check_keywords,
    clamped_skew,
    side_of,
    some,
    spare,
    turned_features,
    turns_output,
)
from diffpeft.methods.peft_config import PeftConfig, PeftType

# Numbers in a row of the matrices that several stages become.
WIDEST = 80


@dataclass
class BOFTConfig(PeftConfig):
    """How to make a BOFT. Names, meanings and defaults are PEFT's; `boft_block_num` needs `boft_block_size=0`.

    Args:
        boft_block_size: features in a block; 0 if boft_block_num is given. It has to divide every layer's features.
        boft_block_num: number of blocks; 0 if boft_block_size is given.
        boft_n_butterfly_factor: number of stages m; the number of blocks has to be a multiple of 2^(m-1).
        target_modules, exclude_modules, fan_in_fan_out: as in LoraConfig.
        bias: which biases are trained too: "none", "boft_only", "all".
        boft_dropout: share, in [0, 1), of the blocks of one random stage that do nothing in a training step.
        init_weights: True: the identity. False: small random rotations, and scales near 1.
        layers_to_transform, layers_pattern, modules_to_save: as in LoraConfig.
    """

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    target_modules: str | Collection[str] | None = None
    exclude_modules: str | Collection[str] | None = None
    boft_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None

    TYPE = PeftType(LAYOUTS["boft"].peft)

    def __post_init__(self) -> None:
        super().__post_init__()
        configs.check_either(self, "boft_block_size", "boft_block_num")

    def validate(self) -> None:
        """Raise ConfigError for the first field whose value is not allowed."""
        super().validate()
        configs.check_whole("boft_n_butterfly_factor", self.boft_n_butterfly_factor, 1)
        configs.check_probability("boft_dropout", self.boft_dropout)
        configs.check_choice("init_weights", self.init_weights, (True, False))
        configs.check_choice("bias", self.bias, ("none", "all", "boft_only"))


class Boft(Method):
    """BOFT on any layer. `alpha` is the output side's constraint, as in OFT."""

    name = "boft"
    config = BOFTConfig
    options = frozenset({"side", "constraint", "rescale"})
    precise = frozenset({"R", "scale"})

    @classmethod
    def init(
        cls,
        config: BOFTConfig,
        site: Site,
        *,
        side: str = "input",
        constraint: float | None = None,
        rescale: bool = False,
        **_: object,
    ) -> Fresh:
        """`boft_R [m, n, b, b]` and `boft_s [out, 1]` (convolutions: [1, out]), or `oft_blocks [m, n, b, b]` and `rescale [out, *1]`."""
        check_keywords(site, side, constraint, rescale)
        geometry, m = site.geometry, config.boft_n_butterfly_factor
        turned = turned_features(geometry, side)
        number = config.boft_block_num or config.boft_block_size
        n, b = (number, turned // number) if config.boft_block_num else (turned // number, number)
        if turned % number:
            field = "boft_block_num" if config.boft_block_num else "boft_block_size"
            raise ConfigError(
                f"{field} {number} does not divide {turned}, the {side} features of the layer",
                where=site.name,
                remedy="Choose a divisor, or exclude the layer.",
            )
        if wrong := _unfit(m, n, b, side):
            raise ConfigError(wrong, where=site.name, remedy="Choose other blocks, or fewer stages.")
        blocks, scale = torch.zeros(m, n, b, b), torch.ones(geometry.out)
        if not config.init_weights:
            blocks.normal_(std=0.1, generator=site.generator)
            if side == "input":
                scale += 0.1 * torch.empty_like(scale).normal_(generator=site.generator)
        options = {"side": side, **({"boft_dropout": config.boft_dropout} if config.boft_dropout else {})}
        tensors = {"boft_R": blocks, "boft_s": scale} if side == "input" else {"oft_blocks": blocks}
        if rescale:
            tensors["rescale"] = scale
        return Fresh(cls.adopt(tensors, Spec(geometry)), None if constraint is None else float(constraint), options)

    @classmethod
    def check(cls, p: Mapping[str, Shaped], spec: Spec) -> str:
        if why := super().check(p, spec):
            return why
        m, n, b, _ = next(p[role] for role in ("boft_R", "oft_blocks") if role in p).shape
        return _unfit(m, n, b, side_of(spec))

    @classmethod
    def prepare(cls, p: Tensors, spec: Spec, training: bool) -> dict[str, Tensor]:
        """R [m, n, b, b], by which features are multiplied as rows, in the order of blocks of `linalg.butterfly`, and scale [out]."""
        if "oft_blocks" in p:
            R = _halves_apart(cayley(clamped_skew(wide(p["oft_blocks"]), spec)))
        else:
            D = wide(p["boft_R"])
            R = cayley((D - D.mT) / 2)
        if training and (rate := spec.options.get("boft_dropout", 0)):
            m, n = R.shape[:2]
            stage = torch.arange(m, device=R.device) == torch.randint(m, (1,), device=R.device)
            R = spare(R, stage[:, None] & some(n, rate, R.device))
        scale = p.get("boft_s", p.get("rescale"))
        return {"R": R} if scale is None else {"R": R, "scale": wide(scale).flatten()}

    @classmethod
    def weight(cls, W: Tensor, p: Tensors, spec: Spec) -> Tensor:
        flat, stages = W.flatten(1), _stages(p["R"].to(W.dtype), spec)
        if turns_output(spec):
            flat = butterfly(flat, stages, _exchange(0), lambda t, R: rows_times(R.mT, t))
        else:  # the transposed product of what is done to x
            flat = butterfly(flat, stages[::-1], _exchange(1), lambda t, R: columns_times(t, R.mT))
        return (flat * p["scale"].to(W.dtype)[:, None] if "scale" in p else flat).reshape(W.shape)

    @classmethod
    def apply(cls, before: Link, x: Tensor, p: Tensors, spec: Spec, s: Strength, bias: bool) -> Tensor:
        """W(s) x by turning x, or W x; through the weight where that is cheaper, or a kernel, groups or a strength between forbid it."""
        op, geometry, on_output = before.op, spec.geometry, turns_output(spec)
        whole = not isinstance(s, Tensor) and s == 1
        possible = geometry.groups == 1 if on_output else geometry.pointwise and whole
        if not possible or not cheaper_on_activations(geometry, on_output, op.positions(x), *p["R"].shape[::2]):
            return super().apply(before, x, p, spec, s, bias)
        if not on_output:
            y = before(_turned(op, x, p["R"], spec, before.dtype), bias)
            return op.rescaled(y, p["scale"].to(before.dtype), bias)
        y = before(x, bias)
        plain = op.less_bias(y) if bias else y
        turned = _turned(op, plain, p["R"], spec, before.dtype)
        if "scale" in p:
            turned = op.scaled(turned, p["scale"].to(before.dtype))
        return added(y, turned - plain, s).to(y.dtype)


def cheaper_on_activations(geometry: Geometry, on_output: bool, positions: int, m: int, b: int) -> bool:
    """Whether turning activations costs less than turning the weight, whose gradient is one more product over all positions."""
    features = geometry.out if on_output else geometry.in_
    W = geometry.out * geometry.columns
    passes = 2 * len(spans(m, b // 2)) - 1  # between two products features change places
    ways = {
        "activations": costs.Work(0, activations=passes * positions * features),
        "weight": costs.Work(0 if geometry.lookup else positions * W, elements=m * W),
    }
    return costs.cheapest("butterfly", torch.float32, ways) == "activations"


def _stages(R: Tensor, spec: Spec) -> list[tuple[int, Tensor]]:
    """The stages in the order in which rows of features go through them: LyCORIS's M W from the first, PEFT's x M from the last."""
    stages = list(enumerate(R.unbind()))
    return stages if side_of(spec) == "output" else stages[::-1]


def spans(m: int, half: int) -> list[tuple[int, int]]:
    """The stages from first to last in spans of about equal length, each short enough that its matrices are no wider than WIDEST."""
    most = max(int(math.log2(WIDEST / max(half, 1))), 1)
    number = -(-m // most)
    ends = [m * j // number for j in range(number + 1)]
    return list(itertools.pairwise(ends))


def _turned(op: Operation, t: Tensor, R: Tensor, spec: Spec, dtype: torch.dtype) -> Tensor:
    """Activations through the stages, several at a time: one pass over the activations costs more than wider matrices.

    Stage i mixes index i, from the right, of the features seen as [n, 2, .., 2, 2, b / 2] together with the last one.
    """
    m, n, b, _ = R.shape
    if m == 1:
        return op.blocks(t, R[0].to(dtype))
    taken = spans(m, b // 2)
    sizes = (2 * n >> m, *(2 ** (high - low) for low, high in reversed(taken)), b // 2)
    onward = side_of(spec) == "output"
    last = len(taken) + 1
    stages = [Stage((last - 1 - j, last), _span(R, *span, onward).to(dtype)) for j, span in enumerate(taken)]
    return op.stages(t, sizes, stages if onward else stages[::-1])


def _span(R: Tensor, low: int, high: int, onward: bool) -> Tensor:
    """Stages low to high - 1 as one.  R [m, n, b, b] -> [n b / d, d, d], d = 2^(high - low) b / 2."""
    (_, n, b, _), g = R.shape, high - low
    if g == 1:
        return R[low]
    d = (b << g) // 2
    t = torch.eye(d, dtype=R.dtype, device=R.device).expand(n * b // d, d, d)
    for u in range(g) if onward else reversed(range(g)):
        a, c = 2 ** (g - 1 - u), 2**u
        t = t.reshape(-1, 2**low, d, a, 2, c, b // 2)
        M = R[low + u].reshape(-1, a, c, 2**low, 2, b // 2, 2, b // 2)
        t = torch.einsum("qldaxch,qaclxhyk->qldayck", t, M)
    return t.reshape(-1, d, d)


def _exchange(axis: int) -> Callable[..., Tensor]:
    return lambda t, a, c, tail: exchange(t, axis, a, c, tail)


def _halves_apart(R: Tensor) -> Tensor:
    """LyCORIS's blocks, where the two halves that a stage mixes alternate, for halves one after the other.  [.., b, b] -> [.., b, b]."""
    order = torch.arange(R.shape[-1], device=R.device).view(-1, 2).t().flatten()
    return R[..., order[:, None], order]


def _unfit(m: int, n: int, b: int, side: str) -> str:
    """What keeps m stages of n blocks of b from being a butterfly; empty if nothing does."""
    if b % 2 and (m > 1 or side == "output"):
        return f"blocks of {b} cannot be halved, as {m} stages on the {side} side need"
    return "" if n % 2 ** (m - 1) == 0 else f"{m} stages need a multiple of {2 ** (m - 1)} blocks, not {n}"
