"""OFT: W turned by a block-diagonal rotation R.  Qiu et al. 2023, arXiv:2306.07280; the Neumann series: Qiu et al. 2025, arXiv:2506.19847.

Input side (PEFT since 0.16): flat(W') = flat(W) R^T, so W' x = W (x R) with x as a row.  R = (I - Q)(I + Q)^-1, or about its transpose by a series.
Output side (LyCORIS diag-oft, Kohya): W' = rescale * R^T W, so W' x = (W x) R * rescale.  R = (I + q)(I - q)^-1, q = B - B^T clamped to a norm.
The features of an embedding are its output: there PEFT's `oft_embedding_R` turns them, W' = R^T W, with R as on the input side.

flat(W) is [out, in / groups * prod(kernel)], input channels outside, kernel inside. PEFT's forward is something else for a kernel above 1: it folds
overlapping patches and is no identity for R = I. Its merge is this definition.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from diffpeft.errors import ConfigError
from diffpeft.methods import config as configs
from diffpeft.methods.axes import triangle
from diffpeft.methods.base import Fresh, Geometry, Link, Method, Site, Spec, Strength, Tensors
from diffpeft.methods.layout import LAYOUTS
from diffpeft.methods.linalg import cayley, cayley_neumann, columns_times, rows_times, skew, wide
from diffpeft.methods.peft_config import PeftConfig, PeftType


@dataclass
class OFTConfig(PeftConfig):
    """How to make an OFT. Names, meanings and defaults are PEFT's; `r` needs `oft_block_size=0`.

    Args:
        r: number of blocks; 0 if oft_block_size is given.
        oft_block_size: features in a block; 0 if r is given. What does not divide a layer's features becomes the nearest divisor.
        module_dropout: share, in [0, 1), of the blocks that do nothing in a training step. (PEFT has the field and ignores it since 0.16.)
        target_modules, exclude_modules, fan_in_fan_out: as in LoraConfig.
        bias: which biases are trained too: "none", "oft_only", "all".
        init_weights: True: the identity. False: small random rotations.
        coft: no block may turn further than eps / sqrt(blocks), the Frobenius norm of its Q. Input side only.
        eps: see coft.
        block_share: one rotation for all blocks of a layer.
        use_cayley_neumann: R by a truncated series, about the transpose of the exact R. Input side only; the output side is always exact.
        num_cayley_neumann_terms: terms of the series.
        layers_to_transform, layers_pattern, modules_to_save: as in LoraConfig.
    """

    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    target_modules: str | Collection[str] | None = None
    fan_in_fan_out: bool = False
    bias: str = "none"
    exclude_modules: str | Collection[str] | None = None
    init_weights: bool = True
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    TYPE = PeftType(LAYOUTS["oft"].peft)

    def __post_init__(self) -> None:
        super().__post_init__()
        configs.check_either(self, "r", "oft_block_size")

    def validate(self) -> None:
        """Raise ConfigError for the first field whose value is not allowed."""
        super().validate()
        configs.check_probability("module_dropout", self.module_dropout)
        configs.check_choice("init_weights", self.init_weights, (True, False))
        configs.check_choice("bias", self.bias, ("none", "all", "oft_only"))
        configs.check_alpha("eps", self.eps)
        if self.eps <= 0:
            raise ConfigError(f"eps is {self.eps!r}", remedy="It is above 0.")
        configs.check_whole("num_cayley_neumann_terms", self.num_cayley_neumann_terms, 1)


class Oft(Method):
    """OFT on any layer. `alpha` is the output side's constraint: the norm of q over all blocks, divided by out."""

    name = "oft"
    config = OFTConfig
    options = frozenset({"side", "constraint", "rescale"})
    precise = frozenset({"R", "rescale"})

    @classmethod
    def init(
        cls,
        config: OFTConfig,
        site: Site,
        *,
        side: str = "input",
        constraint: float | None = None,
        rescale: bool = False,
        **_: object,
    ) -> Fresh:
        """Tensors of shape `oft_R [n, b (b - 1) / 2]` or `oft_blocks [n, b, b]`, `rescale [out, *1]`; n is 1 if shared.

        Options: side, neumann (terms, 0: exact), coft (eps or None), module_dropout, and adjusted (asked for, used) if the config's block does not divide.
        """
        check_keywords(site, side, constraint, rescale)
        if side == "output" and config.coft:
            raise ConfigError(
                "coft bounds the input side", where=site.name, remedy="On the output side use constraint=."
            )
        turned = turned_features(site.geometry, side)
        asked = config.r or config.oft_block_size
        used = nearest_divisor(turned, asked)
        n, b = (used, turned // used) if config.r else (turned // used, used)
        n = 1 if config.block_share else n
        blocks = torch.zeros(n, b, b) if side == "output" else torch.zeros(n, b * (b - 1) // 2)
        if not config.init_weights:
            blocks.normal_(std=0.1, generator=site.generator)
        options = _options(config, side)
        if used != asked:
            options["adjusted"] = (asked, used)
        tensors = {_role(site.geometry, side): blocks}
        if rescale:
            tensors["rescale"] = torch.ones(site.geometry.out, *(1 for _ in site.geometry.shape[1:]))
        return Fresh(tensors, None if constraint is None else float(constraint), options)

    @classmethod
    def prepare(cls, p: Tensors, spec: Spec, training: bool) -> dict[str, Tensor]:
        """R [n or 1, b, b], by which features are multiplied as rows, and rescale."""
        R = _rotation(p, spec)
        rate = spec.options.get("module_dropout", 0) if training else 0
        if rate and len(R) > 1:
            R = spare(R, some(len(R), rate, R.device))
        return {"R": R, **({"rescale": wide(p["rescale"])} if "rescale" in p else {})}

    @classmethod
    def weight(cls, W: Tensor, p: Tensors, spec: Spec) -> Tensor:
        R = p["R"].mT.to(W.dtype)
        if not turns_output(spec):
            return columns_times(W.flatten(1), R).reshape(W.shape)
        turned = rows_times(R, W.flatten(1)).reshape(W.shape)
        return turned * p["rescale"].to(W.dtype) if "rescale" in p else turned

    @classmethod
    def apply(cls, before: Link, x: Tensor, p: Tensors, spec: Spec, s: Strength, bias: bool) -> Tensor:
        """W(s) x by turning x, or W x, with R(s) = I + s (R - I): as W(s) is linear in R. Through the weight where a kernel or groups forbid it."""
        on_output, out_of_group = turns_output(spec), spec.geometry.out // spec.geometry.groups % p["R"].shape[-1]
        if (
            out_of_group if on_output else not spec.geometry.pointwise
        ):  # activations of two groups cannot stand for their weights
            return super().apply(before, x, p, spec, s, bias)
        R = p["R"]
        n, b = turned_features(spec.geometry, side_of(spec)) // R.shape[-1], R.shape[-1]
        eye = torch.eye(b, dtype=R.dtype, device=R.device)
        if not on_output:
            turn = (eye + s * (R - eye)).to(before.dtype).expand(n, b, b)
            return before(before.op.blocks(x, turn), bias)
        if "rescale" in p:
            R = R * p["rescale"].view(n, 1, b)
        change = (s * (R - eye)).to(before.dtype).expand(n, b, b)
        y = before(x, bias)
        return y + before.op.blocks(before.op.less_bias(y) if bias else y, change)


def _options(config: OFTConfig, side: str) -> dict[str, object]:
    """What the adapter must know of its config."""
    options: dict[str, object] = {"side": side, **configs.chosen(config, "module_dropout")}
    if side == "input":
        options["neumann"] = config.num_cayley_neumann_terms if config.use_cayley_neumann else 0
        options["coft"] = config.eps if config.coft else None
    return options


def _rotation(p: Tensors, spec: Spec) -> Tensor:
    """R [n or 1, b, b] in fp32 or better."""
    if "oft_blocks" in p:
        return cayley(-clamped_skew(wide(p["oft_blocks"]), spec))
    v = p[_role(spec.geometry, "input")]
    b, v = triangle(v.shape[1]), wide(v)
    if spec.options.get("coft"):
        v = projected(v, spec.options["coft"])
    terms = spec.options.get("neumann", 0)
    return cayley_neumann(skew(v, b), terms, spec.options.get("neumann_last", 1)) if terms else cayley(skew(v, b))


def projected(v: Tensor, eps: float) -> Tensor:
    """v scaled so that no block's Q is longer than eps / sqrt(n); the gradient passes as if it were not. v [n, b (b - 1) / 2], |Q|_F = sqrt(2) |v|.

    PEFT writes the result into its parameter on every forward; here the parameter stays as it is.
    """
    u = v.detach()
    norm = math.sqrt(2) * torch.linalg.vector_norm(u, dim=1, keepdim=True)
    return u * (eps / math.sqrt(len(u)) / norm).clamp(max=1) + (v - u)


def clamped_skew(B: Tensor, spec: Spec) -> Tensor:
    """q = B - B^T with its norm over all blocks at most alpha * out.  B [.., b, b] -> [.., b, b].

    LyCORIS takes 0 for no limit, Kohya (options["clamp"] is "kohya") for no rotation.
    """
    q = B - B.mT
    if spec.alpha is None:
        return q
    limit, norm = spec.alpha * spec.geometry.out, torch.linalg.vector_norm(q)
    if spec.options.get("clamp") == "kohya":
        return q * ((norm.clamp(max=limit) + 1e-8) / (norm + 1e-8))
    return q * (limit / (norm + 1e-8)).clamp(max=1) if limit > 0 else q


def _role(geometry: Geometry, side: str) -> str:
    """PEFT's, or on the output side LyCORIS's, name of the tensor."""
    return "oft_blocks" if side == "output" else "oft_embedding_R" if geometry.lookup else "oft_R"


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` nearest to `wanted`, of two the lower: PEFT's rule."""
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: (abs(d - wanted), d))


# What OFT and BOFT share


def side_of(spec: Spec) -> str:
    """Whose features the adapter was made to turn: `input` (PEFT) or `output` (LyCORIS, Kohya)."""
    return spec.options.get("side", "input")


def turns_output(spec: Spec) -> bool:
    """Whether the layer's output is turned (the rows of W): on the output side, and for embeddings, whose input has no features."""
    return spec.geometry.lookup or side_of(spec) == "output"


def turned_features(geometry: Geometry, side: str) -> int:
    """How many features are turned: out, or the columns of flat(W)."""
    return geometry.out if geometry.lookup or side == "output" else geometry.columns


def some(n: int, share: float, device: torch.device) -> Tensor:
    """int(share * n) of n, at random.  -> [n], bool."""
    return torch.randperm(n, device=device) < int(share * n)


def spare(R: Tensor, which: Tensor) -> Tensor:
    """R with the identity in the blocks `which`.  R [.., b, b], which [..] -> [.., b, b]."""
    return torch.where(which[..., None, None], torch.eye(R.shape[-1], dtype=R.dtype, device=R.device), R)


def check_keywords(site: Site, side: str, constraint: float | None, rescale: bool) -> None:
    """Raise ConfigError for keywords of `attach` that do not go together."""
    configs.check_choice("side", side, ("input", "output"))
    if side == "input" and (constraint is not None or rescale):
        raise ConfigError(
            f"{'rescale' if constraint is None else 'constraint'} belongs to the output side",
            where=site.name,
            remedy="Give side='output' too.",
        )
    if constraint is not None:
        configs.check_alpha("constraint", constraint)
        if constraint < 0:
            raise ConfigError(f"constraint is {constraint!r}", where=site.name, remedy="It is at least 0: 0 is none.")
