"""LoRA: dW = (alpha / r) B A.  Hu et al. 2021, arXiv:2106.09685.

rsLoRA divides alpha by sqrt(r) instead (Kalajdzievski 2023, arXiv:2312.03732). On a convolution A [r, in / groups, *k] filters and B mixes;
with groups, A is shared by them and the same equation holds for every row of W; PEFT's A sees all groups, in a branch beside the layer (`Branch`).
LoCon's Tucker form puts a core between: dW = B (core) A (Yeh et al. 2023, arXiv:2309.14859). PiSSA (arXiv:2404.02948) and OLoRA (arXiv:2406.01775)
start from factors of W: the base keeps W, and their initial product is subtracted as a frozen second term.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from diffpeft import patterns
from diffpeft.errors import ConfigError, ConfigWarning, NoWeightError, WrongKindError
from diffpeft.methods import config as checks
from diffpeft.methods import loftq, shapes
from diffpeft.methods.base import Additive, Alpha, Fresh, Shaped, Site, Spec, Tensors
from diffpeft.methods.forms import Branch, Factors
from diffpeft.methods.layout import LAYOUTS
from diffpeft.methods.linalg import kaiming, tucker_factors
from diffpeft.methods.peft_config import PeftConfig, PeftType

INITS = (True, False, "gaussian", "orthogonal", "pissa", "pissa_niter_N", "olora", "loftq")


# marks that peft looks for, to choose another kind of LoRA, when it builds from one of these configs
_VARIANT, _INITS = {"is_lora_variant": True}, {"lora_variants": ("mica",)}


@dataclass
class LoraRuntimeConfig:
    """What holds for a run and is not in the file. There is nothing to choose here: slots are where their layer computes."""

    ephemeral_gpu_offload: bool = False


@dataclass
class LoraConfig(PeftConfig):
    """How to make a LoRA. Names, meanings and defaults are PEFT's.

    Args:
        r: rank, at least 1.
        lora_alpha: the scale is lora_alpha / r.
        target_modules: a preset (`attn`, `attn-mlp`, `full`), a regular expression that matches whole names, or a list of names or suffixes.
        exclude_modules: like target_modules; these layers are left alone.
        lora_dropout: probability, in [0, 1), with which an input feature of A is dropped while training.
        bias: which biases are trained too: "none", "lora_only" (of adapted layers), "all" (also those of other layers in the model).
        lora_bias: B has a bias of its own.
        use_rslora: the scale is lora_alpha / sqrt(r).
        use_dora: W' = m V / |V| with V = W + dW and a trained magnitude m for each output (DoRA, arXiv:2402.09353).
        init_lora_weights: True: A kaiming uniform, B zero. "gaussian": A ~ N(0, 1 / r), B zero. "orthogonal": both orthogonal to each other, B A = 0.
            "pissa", "pissa_niter_N" (N steps of a randomised SVD), "olora": factors of W; "loftq": of what its quantisation loses, as `loftq_config` says
            (arXiv:2310.08659); the output is unchanged. False: both random, not the identity.
        rank_pattern, alpha_pattern: {regular expression: value} for layers that differ; a pattern matches a name or its end.
        fan_in_fan_out: PEFT has to be told that GPT-2's Conv1D stores its weight transposed; here the layer's class tells, and this changes nothing.
        layers_to_transform, layers_pattern: only layers of these numbers in a list of blocks, and what that list is called.
        modules_to_save: modules that are trained and saved whole, in a copy for each adapter (get_peft_model).
    """

    r: int = 8
    target_modules: str | Collection[str] | None = None
    exclude_modules: str | Collection[str] | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = field(default=True, metadata=_INITS)
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    megatron_config: dict[str, object] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: loftq.LoftQConfig | dict[str, int] | None = field(default_factory=dict)
    eva_config: object = None
    corda_config: object = None
    lora_ga_config: object = None
    use_dora: bool = field(default=False, metadata=_VARIANT)
    velora_config: object = field(default=None, metadata=_VARIANT)
    alora_invocation_tokens: list[int] | None = field(default=None, metadata=_VARIANT)
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: object = field(default=None, metadata=_VARIANT)
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: object = field(default=None, metadata=_VARIANT)
    arrow_config: object = field(default=None, metadata=_VARIANT)
    kasa_config: object = field(default=None, metadata=_VARIANT)
    ensure_weight_tying: bool = False

    TYPE = PeftType(LAYOUTS["lora"].peft)
    UNSUPPORTED = frozenset(
        (
            "megatron_config",
            "eva_config",
            "corda_config",
            "lora_ga_config",
            "velora_config",
            "alora_invocation_tokens",
            "use_qalora",
            "monteclora_config",
            "use_bdlora",
            "arrow_config",
            "kasa_config",
        )
    )

    _custom_modules = cast("dict[type, type] | None", None)  # peft asks for it when it builds from one of these

    def _register_custom_module(self, mapping: Mapping[type, type]) -> None:
        """PEFT's experimental way to say {class of modules: class of LoRA layers}; what that means here is in `diffpeft/llm/custom.py`. Of no file."""
        if not all(isinstance(cls, type) for pair in mapping.items() for cls in pair):
            raise ConfigError("custom modules are {class: class}", remedy="For example {MyLayer: MyLora}.")
        self._custom_modules = {**(self._custom_modules or {}), **mapping}

    def __post_init__(self) -> None:
        if isinstance(self.target_parameters, str):
            raise WrongKindError(
                "`target_parameters` must be a list of strings or None.", remedy=f"Give [{self.target_parameters!r}]."
            )
        super().__post_init__()
        init = self.init_lora_weights
        if isinstance(init, str) and init.lower() in ("gaussian", "olora"):  # PEFT takes these two in any case
            init = self.init_lora_weights = init.lower()
        if self.loftq_config and init != "loftq":
            warnings.warn(
                "`loftq_config` specified but will be ignored when `init_lora_weights` is not 'loftq'.",
                ConfigWarning,
                stacklevel=3,
            )
            self.loftq_config = {}
        if isinstance(self.loftq_config, loftq.LoftQConfig):
            self.loftq_config = self.loftq_config.to_dict()
        self._check_together()

    def _check_together(self) -> None:
        """Raise ConfigError for two settings that exclude each other."""
        if self.use_dora and self.megatron_config:
            raise ConfigError("DoRA does not support megatron_core, please set `use_dora=False`.")
        if not self.lora_bias:
            return
        if self.init_lora_weights not in (True, False):
            raise ConfigError(
                "The argument lora_bias=True is only supported with init_lora_weights=True or False, "
                f"got init_lora_weights={self.init_lora_weights!r}",
                remedy="Leave one of the two out.",
            )
        if self.use_dora:
            raise ConfigError(
                "The argument lora_bias=True is not supported for DoRA",
                remedy="Pass use_dora=False, or lora_bias=False.",
            )

    def validate(self) -> None:
        """Raise ConfigError for the first field whose value is not allowed."""
        super().validate()
        checks.check_rank("r", self.r)
        checks.check_alpha("lora_alpha", self.lora_alpha)
        checks.check_patterns("rank_pattern", self.rank_pattern, checks.check_rank)
        checks.check_patterns("alpha_pattern", self.alpha_pattern, checks.check_alpha)
        checks.check_probability("lora_dropout", self.lora_dropout)
        checks.check_choice("bias", self.bias, ("none", "all", "lora_only"))
        init = self.init_lora_weights
        if isinstance(init, str) and re.fullmatch(r"pissa_niter_[1-9]\d?", init):
            return
        checks.check_choice("init_lora_weights", init, INITS)
        if init == "orthogonal" and any(r % 2 for r in (self.r, *self.rank_pattern.values())):
            odd = next(r for r in (self.r, *self.rank_pattern.values()) if r % 2)
            raise ConfigError(
                f"Orthogonal initialization requires the LoRA rank to be even, got {odd} instead.",
                remedy="Choose an even rank.",
            )


class Lora(Additive):
    """LoRA on any layer with a weight."""

    name = "lora"
    config = LoraConfig
    roles = (*LAYOUTS["lora"].roles, "initial_A", "initial_B")  # the last two are frozen, and of no file
    options = frozenset({"tucker", "across"})
    thin = True
    shifts = frozenset({"lora_B_bias"})

    @classmethod
    def init(cls, config: LoraConfig, site: Site, *, tucker: bool = False, across: bool = False, **_: object) -> Fresh:
        """`across`: on a convolution with groups PEFT's form."""
        r = patterns.first(config.rank_pattern, (site.name,), config.r)
        alpha = float(patterns.first(config.alpha_pattern, (site.name,), config.lora_alpha))
        if config.use_rslora:
            alpha *= math.sqrt(r)  # so that the scale is alpha / r in every file
        g, init = site.geometry, config.init_lora_weights
        o, i, *k = g.shape
        frozen: dict[str, Tensor] = {}
        if tucker and set(k) - {1}:
            ones = [1] * len(k)
            tensors = {
                "lora_A": kaiming(r, i, *ones, generator=site.generator),
                "lora_mid": kaiming(r, r, *k, generator=site.generator),
                "lora_B": torch.zeros(o, r, *ones),
            }
            if init is False:
                tensors["lora_B"] = kaiming(o, r, *ones, generator=site.generator)
        elif across:
            tensors = dict(zip(("lora_A", "lora_B"), _initial_branch(config, site, r), strict=True))
        else:
            A, B = _initial(config, site, r, alpha / r)
            names = ("lora_embedding_A", "lora_embedding_B") if g.lookup else ("lora_A", "lora_B")
            tensors = dict(zip(names, (A, B), strict=True))
            if _from_weight(init):
                frozen = {"initial_A": A.clone(), "initial_B": B.clone()}
        if config.lora_bias:
            if g.lookup:
                raise ConfigError(
                    "lora_bias=True is not supported for Embedding", where=site.name, remedy="It has no bias."
                )
            tensors["lora_B_bias"] = torch.zeros(o)
        options = {"dropout": config.lora_dropout} if config.lora_dropout else {}
        return Fresh(tensors, alpha, options, frozen)

    @classmethod
    def stored(cls, p: dict[str, Tensor], alpha: Alpha) -> tuple[dict[str, Tensor], Alpha]:
        """A LoRA less its initial product is a LoRA of twice the rank (and so of twice the alpha)."""
        if "initial_A" not in p:
            return p, alpha
        a, b = (role for role in p if role in PAIR)
        double = {a: torch.cat([p[a], p["initial_A"]]), b: torch.cat([p[b], -p["initial_B"]], 1)}
        others = {role: t for role, t in p.items() if role not in (a, b, "initial_A", "initial_B")}
        return {**double, **others}, None if alpha is None else 2 * float(alpha)

    @classmethod
    def factors(cls, p: Tensors, spec: Spec) -> Factors:
        A, B = _factors(p)
        if is_across(p):
            raise NoWeightError(
                "Merging is not supported for _ConvNd layers with groups > 1! PEFT's LoRA of one is a branch beside it",
                where=f"a convolution with {spec.geometry.groups} groups",
                remedy="Leave the adapter unmerged: it acts all the same. diffpeft.attach makes one that can be merged.",
            )
        if "lora_mid" in p:
            A, _ = tucker_factors(p["lora_mid"], B.flatten(1).T, A.flatten(1))
        if "initial_A" in p:
            A, B = torch.cat([A, p["initial_A"]]), torch.cat([B, -p["initial_B"]], 1)
        return Factors(A, B)

    @classmethod
    def form(cls, p: Tensors, spec: Spec, positions: int) -> Factors | Branch:
        return Branch(*_factors(p)) if is_across(p) else cls.factors(p, spec)

    @classmethod
    def bias(cls, b: Tensor | None, p: Tensors, spec: Spec) -> Tensor | None:
        return cls.scale(p, spec) * p["lora_B_bias"] if "lora_B_bias" in p else None


PAIR = (*LAYOUTS["lora"].twins, *LAYOUTS["lora"].twins.values())  # A and B, under PEFT's two names for them


def _factors(p: Tensors) -> tuple[Tensor, Tensor]:
    """A and B, under PEFT's two names for them."""
    return (p["lora_A"], p["lora_B"]) if "lora_A" in p else (p["lora_embedding_A"], p["lora_embedding_B"])


def is_across(p: Mapping[str, Shaped]) -> bool:
    """Whether tensors are PEFT's for a convolution with groups: B [out, r / groups, *1] mixes the ranks by group."""
    return shapes.is_across({role: p[role].shape for role in ("lora_A", "lora_B", "lora_mid") if role in p})


def _initial_branch(config: LoraConfig, site: Site, r: int) -> tuple[Tensor, Tensor]:
    """A [r, in, *k] and B [o, r / groups, *1] of a convolution with groups, as PEFT draws them."""
    g, init = site.geometry, config.init_lora_weights
    if r % g.groups:
        raise ConfigError(
            f"Targeting a Conv{len(g.kernel)}d with groups={g.groups} and rank {r}. Currently, support is limited to conv layers "
            "where the rank is divisible by groups. Either choose a different rank or do not target this specific layer.",
            where=site.name,
        )
    checks.check_choice("init_lora_weights", init, (True, False, "gaussian"))
    shape, up = (r, g.in_, *g.kernel), (g.out, r // g.groups, *(1 for _ in g.kernel))
    normal = torch.empty(shape).normal_(std=1 / r, generator=site.generator) if init == "gaussian" else None
    A = kaiming(*shape, generator=site.generator) if normal is None else normal
    return A, torch.zeros(up) if init else kaiming(*up, generator=site.generator)


def _from_weight(init: bool | str) -> bool:
    return isinstance(init, str) and init.startswith(("pissa", "olora", "loftq"))


def _initial(config: LoraConfig, site: Site, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """A [r, i, *k] and B [o, r, *1]."""
    g, init = site.geometry, config.init_lora_weights
    ones = [1] * len(g.kernel)
    make: dict[object, Callable[[], tuple[Tensor, Tensor]]] = {
        True: lambda: (kaiming(r, *g.shape[1:], generator=site.generator), torch.zeros(g.out, r)),
        False: lambda: (
            kaiming(r, *g.shape[1:], generator=site.generator),
            kaiming(g.out, r, generator=site.generator),
        ),
        "gaussian": lambda: (
            torch.empty(r, *g.shape[1:]).normal_(std=1 / r, generator=site.generator),
            torch.zeros(g.out, r),
        ),
        "orthogonal": lambda: _orthogonal(site, r),
        "olora": lambda: _olora(site, r),
        "loftq": lambda: loftq.factors(_matrix(site), r, scale, loftq.LoftQConfig.of(config.loftq_config)),
    }
    if init is True and g.lookup:  # PEFT: A zero, B normal
        A, B = torch.zeros(r, g.in_), torch.empty(g.out, r).normal_(generator=site.generator)
    elif isinstance(init, str) and init.startswith("pissa"):
        A, B = _pissa(site, r, scale, int(init.rpartition("_")[2]) if init != "pissa" else None)
    else:
        A, B = make[init]()
    return A.reshape(r, *g.shape[1:]).contiguous(), B.reshape(g.out, r, *ones).contiguous()


def _matrix(site: Site) -> Tensor:
    return site.weight().detach().flatten(1)


def _orthogonal(site: Site, r: int) -> tuple[Tensor, Tensor]:
    """Odd and even rows of a random rotation between, so that B A = 0."""
    rand = lambda *shape: torch.randn(*shape, generator=site.generator)  # noqa: E731
    Q = torch.linalg.qr(rand(r, r))[0]
    A = (rand(site.geometry.columns, r // 2) @ Q[0::2]).t() / 10
    return A, rand(site.geometry.out, r // 2) @ Q[1::2] / 10


def _pissa(site: Site, r: int, scale: float, niter: int | None) -> tuple[Tensor, Tensor]:
    """The r largest singular triplets of W; `niter` steps of a randomised SVD instead of a full one."""
    W = _matrix(site)
    if niter is None:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        U, S, Vh = U[:, :r], S[:r], Vh[:r]
    else:
        with torch.random.fork_rng(enabled=site.generator is not None):
            if site.generator is not None:
                torch.manual_seed(int(torch.randint(2**31, (1,), generator=site.generator)))
            U, S, V = torch.svd_lowrank(W, min(r, *W.shape), niter=niter)
        Vh = V.t()
    root = (S / scale).sqrt()
    return _padded(root[:, None] * Vh, r).float(), _padded((U * root).t(), r).t().float()


def _olora(site: Site, r: int) -> tuple[Tensor, Tensor]:
    """The first r columns of Q and rows of R of W = Q R."""
    Q, R = torch.linalg.qr(_matrix(site))
    return _padded(R[:r], r).float(), _padded(Q[:, :r].t(), r).t().float()


def _padded(t: Tensor, rows: int) -> Tensor:
    """Rows of zeros below, where the rank is larger than the layer."""
    return torch.cat([t, t.new_zeros(rows - t.shape[0], t.shape[1])]) if t.shape[0] < rows else t
