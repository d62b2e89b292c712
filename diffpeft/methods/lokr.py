"""LoKr: dW = (alpha / r) kron(W1, W2), that is dW[a o2 + b, c i2 + d, *k] = (alpha / r) W1[a, c] W2[b, d, *k].

Yeh et al. 2023, arXiv:2309.14859 (LyCORIS). Either of W1 and W2 is one tensor or a product, W2 also a Tucker product.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffpeft import patterns
from diffpeft.errors import ConfigError
from diffpeft.methods import config as checks
from diffpeft.methods import costs
from diffpeft.methods.base import Additive, Fresh, Geometry, Shaped, Site, Spec, Tensors
from diffpeft.methods.fit import fresh
from diffpeft.methods.forms import Factors, Kronecker
from diffpeft.methods.layout import LAYOUTS
from diffpeft.methods.linalg import kaiming, tucker_factors
from diffpeft.methods.peft_config import PeftConfig, PeftType


@dataclass
class LoKrConfig(PeftConfig):
    """How to make a LoKr. Names, meanings and defaults are PEFT's.

    Args:
        r: rank of the halves that are products, at least 1; a half that it would not make smaller is one tensor.
        alpha: the scale is alpha / r; 1 if both halves are one tensor.
        rank_dropout: probability, in [0, 1), with which a row of the update is dropped while training.
        module_dropout: probability, in [0, 1), with which the whole update is dropped while training.
        rank_dropout_scale: after rank_dropout the rows that are left grow by as much as was lost.
        use_effective_conv2d: a Tucker core for kernels larger than 1 (the tensor lokr_t2).
        decompose_both: the first half may be a product too.
        decompose_factor: the first half's size, or near it if it does not divide; -1: near the square root.
        target_modules: a preset (`attn`, `attn-mlp`, `full`), a regular expression that matches whole names, or a list of names or suffixes.
        exclude_modules: like target_modules; these layers are left alone.
        init_weights: True: the first half zero, the rest kaiming uniform. "lycoris": the second half zero. False: neither, not the identity.
        rank_pattern, alpha_pattern: {regular expression: value} for layers that differ; a pattern matches a name or its end.
        layers_to_transform, layers_pattern, modules_to_save: as in LoraConfig.
    """

    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    target_modules: str | Collection[str] | None = None
    exclude_modules: str | Collection[str] | None = None
    init_weights: bool | str = True
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    modules_to_save: list[str] | None = None

    TYPE = PeftType(LAYOUTS["lokr"].peft)

    def validate(self) -> None:
        """Raise ConfigError for the first field whose value is not allowed."""
        super().validate()
        checks.check_product(self, (True, False, "lycoris"))
        factor = self.decompose_factor
        if isinstance(factor, bool) or not isinstance(factor, int) or (factor < 1 and factor != -1):
            raise ConfigError(f"decompose_factor is {factor!r}", remedy="It is -1 or a whole number of at least 1.")


def factorization(n: int, factor: int = -1) -> tuple[int, int]:
    """(factor, n / factor) if that is whole, else the two divisors nearest sqrt(n) of which the smaller is at most `factor` (-1: any)."""
    if factor > 0 and n % factor == 0:
        return factor, n // factor
    m = max(d for d in range(1, math.isqrt(n) + 1) if n % d == 0 and (factor < 0 or d <= factor))
    return m, n // m


def kron(u: Tensor, v: Tensor) -> Tensor:
    """The Kronecker product at each place of a kernel.  u [a, c], v [b, d, *k] -> [a b, c d, *k]."""
    (a, c), (b, d, *k) = u.shape, v.shape
    return (u[:, None, :, None, None] * v.reshape(1, b, 1, d, -1)).reshape(a * b, c * d, *k)


class LoKr(Additive):
    """LoKr on every kind of layer; the shapes are those of the tensors, however out and in were split.

    First half [o1, i1]: lokr_w1, or lokr_w1_a [o1, r] lokr_w1_b [r, i1].
    Second half [o2, i2, *k]: lokr_w2, or lokr_w2_a [o2, r] lokr_w2_b [r, i2 * prod(k)], or with a Tucker core lokr_t2 [r, r, *k]
    lokr_w2_a [r, o2] and lokr_w2_b [r, i2].
    """

    name = "lokr"
    config = LoKrConfig
    options = frozenset({"tucker"})

    @classmethod
    def init(
        cls, config: LoKrConfig, site: Site, *, tucker: bool = False, scaled: bool = False, **options: object
    ) -> Fresh:
        """`scaled`: two whole halves have a scale too, as PEFT has it."""
        g, r = site.geometry, patterns.first(config.rank_pattern, (site.name,), config.r)
        (o1, o2), (i1, i2) = (factorization(n, config.decompose_factor) for n in g.shape[:2])
        q = r if config.decompose_both and r < max(o1, i1) / 2 else 0
        core = (tucker or config.use_effective_conv2d) and not set(g.kernel) <= {1}
        left = ("lokr_w1_a", "lokr_w1_b") if q else ("lokr_w1",)
        right = ("lokr_w2",) if r >= max(o2, i2) / 2 else ("lokr_w2_a", "lokr_w2_b", *("lokr_t2",) * core)
        sizes = {"o1": o1, "i1": i1, "o2": o2, "i2": i2, "q": q, "r": r}
        shapes = fresh(LAYOUTS["lokr"].form((*left, *right)), sizes, g.kernel)
        zero = {True: {"lokr_w1", "lokr_w1_a"}, "lycoris": {"lokr_w2", "lokr_w2_b"}, False: set()}[config.init_weights]
        tensors = {
            role: torch.zeros(shape) if role in zero else kaiming(*shape, generator=site.generator)
            for role, shape in shapes.items()
        }
        alpha = float(patterns.first(config.alpha_pattern, (site.name,), config.alpha))
        chosen = checks.chosen(config, "rank_dropout", "module_dropout", "rank_dropout_scale")
        whole = scaled and alpha != r and {"lokr_w1", "lokr_w2"} <= shapes.keys()
        return Fresh(tensors, alpha, {**chosen, "scale": alpha / r} if whole else chosen)

    @classmethod
    def rank(cls, p: Mapping[str, Shaped]) -> int:
        """That of the first half if it is a product, else that of the second; of two whole halves the second's smaller side."""
        return next((p[b].shape[0] for b in ("lokr_w1_b", "lokr_w2_b") if b in p), 0) or min(p["lokr_w2"].shape[:2])

    @classmethod
    def scale(cls, p: Mapping[str, Shaped], spec: Spec) -> float:
        """alpha / rank; 1 without an alpha, and for two whole halves whatever alpha is, as every reader of such files but PEFT has it: a file of
        PEFT's has options["scale"] for these.
        """
        return spec.options.get("scale", 1.0) if "lokr_w1" in p and "lokr_w2" in p else super().scale(p, spec)

    @classmethod
    def delta(cls, p: Tensors, spec: Spec) -> Tensor:
        return kron(_first(p), _second(p, spec.geometry))

    @classmethod
    def factors(cls, p: Tensors, spec: Spec) -> Factors:
        """(kron(B1, B2), kron(A1, A2)), where a whole half counts as itself times I. The rank is the product of both halves' ranks."""
        g = spec.geometry
        down1, up1 = _split(p["lokr_w1"]) if "lokr_w1" in p else (p["lokr_w1_b"], p["lokr_w1_a"])
        down2, up2 = _split(p["lokr_w2"]) if "lokr_w2" in p else _second_pair(p, g)
        return Factors(kron(down1, down2), kron(up1, up2).reshape(g.out, -1, *(1 for _ in g.kernel)))

    @classmethod
    def form(cls, p: Tensors, spec: Spec, positions: int) -> Kronecker | None:
        """Forward and backward: thin products and passes over activations against the gradient of W and passes over W."""
        g = spec.geometry
        if not g.lookup and (g.groups > 1 or not _is_cheap(p, g, positions)):
            return None
        return halves(p, g)


def halves(p: Tensors, g: Geometry) -> Kronecker:
    """The update as a product of its halves."""
    left = (p["lokr_w1"],) if "lokr_w1" in p else (p["lokr_w1_a"], p["lokr_w1_b"])
    return Kronecker(left, (p["lokr_w2"],) if "lokr_w2" in p else _second_pair(p, g)[::-1])


def _is_cheap(p: Tensors, g: Geometry, positions: int) -> bool:
    """Whether the two halves in turn cost less than a weight with their product in it."""
    (o1, i1), whole = _first_shape(p), "lokr_w2" in p
    o2, i2k = g.out // o1, g.columns // i1
    f = o2 if whole else p["lokr_w2_b"].shape[0]
    products = f * (i1 * i2k + o1 * i1 + (0 if whole else o1 * o2))
    ways = {
        "weight": costs.Work(positions * g.columns * g.out, elements=g.columns * g.out),
        "halves": costs.Work(3 * positions * products, activations=positions * (g.in_ + g.out)),
    }
    what = "kronecker, second half whole" if whole else "kronecker"
    return costs.cheapest(what, next(iter(p.values())).dtype, ways) == "halves"


def _first_shape(p: Mapping[str, Shaped]) -> tuple[int, int]:
    """(o1, i1)."""
    whole = p.get("lokr_w1")
    return (whole.shape[0], whole.shape[1]) if whole is not None else (p["lokr_w1_a"].shape[0], p["lokr_w1_b"].shape[1])


def _first(p: Tensors) -> Tensor:
    """W1 [o1, i1]."""
    return p["lokr_w1"] if "lokr_w1" in p else p["lokr_w1_a"] @ p["lokr_w1_b"]


def _second_pair(p: Tensors, g: Geometry) -> tuple[Tensor, Tensor]:
    """W2 as a product.  -> (down [r, i2, *k], up [o2, r])."""
    a, b = p["lokr_w2_a"], p["lokr_w2_b"]
    down, up = tucker_factors(p["lokr_t2"], a, b) if "lokr_t2" in p else (b, a)
    return down.reshape(len(b), -1, *g.kernel), up


def _second(p: Tensors, g: Geometry) -> Tensor:
    """W2 [o2, i2, *k]."""
    if "lokr_w2" in p:
        return p["lokr_w2"]
    down, up = _second_pair(p, g)
    return (up @ down.flatten(1)).reshape(-1, *down.shape[1:])


def _split(w: Tensor) -> tuple[Tensor, Tensor]:
    """w [o, i, *k] = up down with an identity as the larger of the two.  -> (down [r, i, *k], up [o, r])."""
    o, columns = w.flatten(1).shape
    eye = torch.eye(min(o, columns), dtype=w.dtype, device=w.device)
    return (w, eye) if o <= columns else (eye.reshape(columns, *w.shape[1:]), w.flatten(1))
