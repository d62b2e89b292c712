"""LoftQ: W ~ Q + B A, by turns Q = quantised(W - B A) and B A = the first r singular triplets of W - Q.  Li et al. 2023, arXiv:2310.08659.

A LoRA that starts from A and B makes good part of what quantising the base costs. There are two uses, and neither changes a base in silence:

* The base is quantised already. Q is what it is, and one half-turn finds A and B: `half_turn`, used by `llm.kbit.replace_lora_weights_loftq`.
* The base is not quantised, and `init_lora_weights="loftq"` asks for A and B (`factors`). PEFT then replaces W by Q. Here W stays, and the initial product
  is subtracted as a frozen second term, as for PiSSA: W' = W + s (B A - B0 A0). A fresh adapter changes nothing and without it the model is what
  it was, while training sees W - B0 A0, which is Q but for the part of W - Q that rank r does not hold.

Where the scale s = alpha / r is not 1, A and B hold 1 / sqrt(s) each, so that s B A is the residual. PEFT leaves s out and is off by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffpeft.errors import ConfigError
from diffpeft.methods.config import check_choice, check_whole
from diffpeft.methods.linalg import wide

BLOCK = 64  # numbers that share a scale: of QLoRA, and the default of bitsandbytes


@dataclass
class LoftQConfig:
    """How to quantise. Names, meanings and defaults are PEFT's.

    Args:
        loftq_bits: 4 (NF4) or 8 (LLM.int8), which PEFT has too, or 2 (NormalFloat with four levels).
        loftq_iter: turns, at least 1.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1

    @classmethod
    def of(cls, config: LoftQConfig | Mapping[str, int] | None) -> LoftQConfig:
        """One of these, or the fields of one as a file has them."""
        return config if isinstance(config, LoftQConfig) else cls(**dict(config or {}))

    def to_dict(self) -> dict[str, int]:
        """The fields."""
        return {"loftq_bits": self.loftq_bits, "loftq_iter": self.loftq_iter}

    def validate(self) -> None:
        """Raise ConfigError for a field whose value is not allowed."""
        check_choice("loftq_bits", self.loftq_bits, (2, 4, 8))
        check_whole("loftq_iter", self.loftq_iter, 1)


def loftq(
    W: Tensor, r: int, *, bits: int = 4, iterations: int = 1, method: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Q [o, i] (quantised and dequantised), A [r, i] and B [o, r] with W ~ Q + B A.  W [o, i], in fp32 or better.

    `method` is "uniform" (2^bits evenly spaced levels) or what is usual for so many bits: "nf2", "nf4", "int8". Turns need not all be for the better; the
    best one is kept.
    """
    check_whole("loftq_iter", iterations, 1)
    check_choice("loftq_bits", bits, tuple(NATURAL))
    if W.dim() != 2:
        raise ConfigError(f"LoftQ takes a matrix, not a weight of shape {tuple(W.shape)}", remedy="Use another init.")
    quantised = _quantiser(method or NATURAL[bits], bits)
    W = wide(W.detach())
    best, least, low = None, float("inf"), torch.zeros_like(W)
    for _ in range(iterations):
        Q = quantised(W - low)
        A, B = half_turn(W - Q, r)
        low = B @ A
        error = float(torch.linalg.vector_norm(W - Q - low))
        if best is None or error < least:
            best, least = (Q, A, B), error
    assert best is not None
    return best


def factors(W: Tensor, r: int, scale: float, config: LoftQConfig) -> tuple[Tensor, Tensor]:
    """A [r, i] and B [o, r], fp32, from which a LoRA of this scale starts (the module says how the base is treated).

    Raises ConfigError if W is quantised already: then there is nothing to make good.
    """
    config.validate()
    Q, A, B = loftq(W, r, bits=config.loftq_bits, iterations=config.loftq_iter)
    if torch.linalg.vector_norm(W - Q) <= 1e-6 * torch.linalg.vector_norm(W):
        raise ConfigError(
            "init_lora_weights is 'loftq' and the weight is quantised already",
            remedy="Attach with another init and call replace_lora_weights_loftq, which reads the full weights from their file.",
        )
    return share(A, B, scale)


def share(A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Factors of a product as those of a LoRA with this scale, fp32."""
    if scale <= 0:
        raise ConfigError(f"lora_alpha / r is {scale!r}", remedy="LoftQ needs a scale above 0.")
    return (A / scale**0.5).float(), (B / scale**0.5).float()


def half_turn(residual: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A [r, i] and B [o, r] with B A nearest to `residual` [o, i]. Rows of zeros where r is larger than the matrix."""
    U, S, Vh = torch.linalg.svd(residual, full_matrices=False)
    root = S[:r].sqrt()
    A, B = root[:, None] * Vh[:r], U[:, :r] * root
    more = r - len(root)
    return torch.cat([A, A.new_zeros(max(more, 0), A.shape[1])]), torch.cat([B, B.new_zeros(len(B), max(more, 0))], 1)


def _quantiser(method: str, bits: int) -> Callable[[Tensor], Tensor]:
    if method == "uniform":
        levels = torch.linspace(-1, 1, 2**bits)
        return lambda W: blockwise(W, levels)
    check_choice("method", method, (NATURAL[bits], "uniform"))
    return int8 if method == "int8" else lambda W: blockwise(W, NORMAL[bits])


def blockwise(W: Tensor, levels: Tensor, block: int = BLOCK) -> Tensor:
    """W with each run of `block` numbers rounded to `levels` (rising, in [-1, 1]) times the largest absolute value among them."""
    flat = W.reshape(-1)
    padded = torch.cat([flat, flat.new_zeros(-flat.numel() % block)]).view(-1, block)
    scale = padded.abs().amax(1, keepdim=True)
    levels = levels.to(W)
    places = torch.bucketize(padded / scale.clamp_min(torch.finfo(W.dtype).tiny), (levels[1:] + levels[:-1]) / 2)
    return (levels[places] * scale).view(-1)[: flat.numel()].view(W.shape)


def int8(W: Tensor) -> Tensor:
    """W with each row rounded to 255 levels: LLM.int8's weights (Dettmers et al. 2022, arXiv:2208.07339)."""
    scale = W.abs().amax(1, keepdim=True).clamp_min(1e-30)
    return (W * (127 / scale)).round() * (scale / 127)


def normal_float(bits: int, offset: float = 0.9677083) -> Tensor:
    """The 2^bits levels of NormalFloat [2^bits]: evenly spaced quantiles of N(0, 1), half of them below 0 and one at 0, divided by the largest.

    Dettmers et al. 2023, arXiv:2305.14314; `offset` is the largest quantile, 1 - (1 / 32 + 1 / 30) / 2 for 4 bits.
    """
    half = 2 ** (bits - 1)
    quantile = torch.distributions.Normal(0.0, 1.0).icdf
    above = quantile(torch.linspace(offset, 0.5, half + 1, dtype=torch.float64)[:-1])
    below = -quantile(torch.linspace(offset, 0.5, half, dtype=torch.float64)[:-1])
    levels = torch.cat([above, above.new_zeros(1), below]).sort().values
    return (levels / levels.max()).float()


NATURAL = {2: "nf2", 4: "nf4", 8: "int8"}  # {bits: what is used for them}
NORMAL = {bits: normal_float(bits) for bits in (2, 4)}
