"""LoHa: dW = (alpha / r) (W1a W1b) * (W2a W2b), elementwise.  Hyeon-Woo et al. 2022, arXiv:2108.06098 (FedPara).

Tucker, its Proposition 3, for kernels: the two factors are sum_pq T[p, q, *k] Wa[p, o] Wb[q, i] instead.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffpeft import patterns
from diffpeft.methods import config as checks
from diffpeft.methods import costs
from diffpeft.methods.base import Additive, Fresh, Site, Spec, Tensors
from diffpeft.methods.fit import fresh
from diffpeft.methods.forms import Factors, Form, Hadamard
from diffpeft.methods.layout import LAYOUTS
from diffpeft.methods.linalg import hadamard, kaiming, khatri_rao, tucker_factors
from diffpeft.methods.peft_config import PeftConfig, PeftType


@dataclass
class LoHaConfig(PeftConfig):
    """How to make a LoHa. Names, meanings and defaults are PEFT's.

    Args:
        r: rank of each of the two factors, at least 1; their product has up to rank r squared.
        alpha: the scale is alpha / r.
        rank_dropout: probability, in [0, 1), with which a row of the update is dropped while training.
        module_dropout: probability, in [0, 1), with which the whole update is dropped while training.
        use_effective_conv2d: a Tucker core for kernels larger than 1 (the tensors hada_t1 and hada_t2).
        target_modules: a preset (`attn`, `attn-mlp`, `full`), a regular expression that matches whole names, or a list of names or suffixes.
        exclude_modules: like target_modules; these layers are left alone.
        init_weights: True: hada_w2_b zero, the rest kaiming uniform. False: that one too, not the identity.
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
    target_modules: str | Collection[str] | None = None
    exclude_modules: str | Collection[str] | None = None
    init_weights: bool = True
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    modules_to_save: list[str] | None = None

    TYPE = PeftType(LAYOUTS["loha"].peft)

    def validate(self) -> None:
        """Raise ConfigError for the first field whose value is not allowed."""
        super().validate()
        checks.check_product(self, (True, False))


class LoHa(Additive):
    """LoHa on every kind of layer.

    hada_w*_a [out, r], hada_w*_b [r, columns]; with Tucker cores hada_t* [r, r, *k]: hada_w*_a [r, out], hada_w*_b [r, in / groups].
    """

    name = "loha"
    config = LoHaConfig
    options = frozenset({"tucker"})

    @classmethod
    def init(cls, config: LoHaConfig, site: Site, *, tucker: bool = False, **options: object) -> Fresh:
        g, forms = site.geometry, LAYOUTS["loha"].forms
        r = patterns.first(config.rank_pattern, (site.name,), config.r)
        core = (tucker or config.use_effective_conv2d) and not set(g.kernel) <= {1}
        zero = {"hada_w2_b"} if config.init_weights else set()
        tensors = {
            role: torch.zeros(shape) if role in zero else kaiming(*shape, generator=site.generator)
            for role, shape in fresh(forms[core], {"o": g.out, "i": g.shape[1], "r": r}, g.kernel).items()
        }
        dropouts = checks.chosen(config, "rank_dropout", "module_dropout")
        if config.rank_dropout:
            dropouts["rank_dropout_scale"] = True  # as PEFT's LoHa; only its LoKr has a switch for it
        return Fresh(tensors, float(patterns.first(config.alpha_pattern, (site.name,), config.alpha)), dropouts)

    @classmethod
    def delta(cls, p: Tensors, spec: Spec) -> Tensor:
        (down1, up1), (down2, up2) = _pair(p, 1), _pair(p, 2)
        return hadamard(up1, down1.flatten(1), up2, down2.flatten(1)).reshape(spec.geometry.shape)

    @classmethod
    def factors(cls, p: Tensors, spec: Spec) -> Factors:
        """The Khatri-Rao form, of rank r squared: A[ij] = W1b[i] * W2b[j], B[:, ij] = W1a[:, i] * W2a[:, j]."""
        g, (down1, up1), (down2, up2) = spec.geometry, _pair(p, 1), _pair(p, 2)
        A, B = (down1[:, None] * down2).flatten(0, 1), khatri_rao(up1, up2)
        return Factors(A.reshape(-1, *g.shape[1:]), B.reshape(*B.shape, *(1 for _ in g.kernel)))

    @classmethod
    def form(cls, p: Tensors, spec: Spec, positions: int) -> Form | None:
        """Forward and backward: three thin products at rank r squared against the gradient of W and passes over W."""
        g = spec.geometry
        if g.lookup:
            return Hadamard(_pair(p, 1), _pair(p, 2))
        thin = cls.rank(p) ** 2 * (g.groups * g.columns + g.out)
        ways = {
            "weight": costs.Work(positions * g.columns * g.out, elements=g.columns * g.out),
            "factors": costs.Work(3 * positions * thin, elements=thin),
        }
        way = costs.cheapest("hadamard", p["hada_w1_b"].dtype, ways)
        return cls.factors(p, spec) if way == "factors" else None


def _pair(p: Tensors, j: int) -> Factors:
    """Factor j as a product.  -> (down [r, columns] or [r, in / groups, *k], up [out, r])."""
    a, b = p[f"hada_w{j}_a"], p[f"hada_w{j}_b"]
    return Factors(*(tucker_factors(p[f"hada_t{j}"], a, b) if "hada_t1" in p else (b, a)))
