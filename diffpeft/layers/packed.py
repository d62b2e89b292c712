"""Linear layers whose weight is held in few bits, and is made of them where it is used: forwards, and again backwards, since nothing of it is kept.

What holds a weight are bytes, whatever they mean: so no change of a model's dtype touches them, and who asks a model for its dtype does not hear of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffpeft.methods.linalg import traced

Bytes = dict[str, Tensor]  # what holds a weight, by name, uint8; one of them is `weight`
Shape = tuple[int, int]  # of a weight: [out, in]


class Packing(Protocol):
    """How numbers are held."""

    @property
    def name(self) -> str:
        """As options and reports say it."""

    def unpacked(self, held: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] in a dtype."""


class Packed(nn.Parameter):
    """Bytes that hold a frozen weight. `numbers`: how many numbers they are, where they hold the weight itself."""

    numbers: int

    def __new__(cls, data: Tensor, numbers: int = 0) -> Packed:
        """Without a gradient."""
        packed: Packed = super().__new__(cls, data, requires_grad=False)
        packed.numbers = numbers
        return packed


class PackedLinear(nn.Linear):
    """A frozen linear layer whose weight is held in few bits. `dtype` is what it computes in where its input does not say."""

    def __init__(self, shape: Shape, bias: nn.Parameter | None, packing: Packing, held: Bytes, dtype: torch.dtype):
        nn.Module.__init__(self)
        self.out_features, self.in_features = shape
        self.packing, self.names, self.compute_dtype = packing, tuple(held), dtype
        for name, data in held.items():
            self.register_parameter(name, Packed(data, shape[0] * shape[1] if name == "weight" else 0))
        self.register_parameter("bias", bias)

    def unpacked(self, *held: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [out, in] of these bytes, which stand in the order of `names`; by default of the layer's own."""
        held = held or self.held
        return self.packing.unpacked(
            dict(zip(self.names, held, strict=True)), (self.out_features, self.in_features), dtype or self.compute_dtype
        )

    @property
    def held(self) -> tuple[Tensor, ...]:
        """What holds the weight."""
        return tuple(self.get_parameter(name) for name in self.names)

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + b.  x [*n, i] -> [*n, o]."""
        if traced() or not torch.is_grad_enabled():
            return F.linear(x, self.unpacked(dtype=x.dtype), self.bias)
        y: Tensor = _Product.apply(x, self.bias, self.unpacked, *self.held)  # type: ignore[no-untyped-call]
        return y

    def extra_repr(self) -> str:
        """With how the weight is held."""
        return f"{super().extra_repr()}, packing={self.packing.name}"


class _Product(torch.autograd.Function):
    """x W^T + b, of which autograd keeps what holds W: bytes, wherever they are when they are asked for again."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, b: Tensor | None, unpacked: Callable[..., Tensor], *held: Tensor) -> Tensor:
        ctx.save_for_backward(*held)
        ctx.unpacked = unpacked
        return F.linear(x, unpacked(*held, dtype=x.dtype), b)

    @staticmethod
    def backward(ctx: _Context, g: Tensor) -> tuple[Tensor | None, ...]:
        held = ctx.saved_tensors  # asked for once: recomputation gives them once
        gx = g @ ctx.unpacked(*held, dtype=g.dtype) if ctx.needs_input_grad[0] else None
        gb = g.reshape(-1, g.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return (gx, gb, None, *(None for _ in held))


class _Context(Protocol):
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    unpacked: Callable[..., Tensor]

    def save_for_backward(self, *tensors: Tensor) -> None:
        """Keep tensors."""


# -- kinds ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScaledBytes:
    """Numbers of 8 bits times a scale for each row of the weight."""

    name: str
    kind: torch.dtype
    largest: float

    def packed(self, W: Tensor) -> Bytes:
        """A weight [o, i] in 8 bits: each row is scaled to what they reach."""
        scale = W.float().abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / self.largest
        units = W.float() / scale
        return self.held(units.to(self.kind) if self.kind.is_floating_point else units.round().to(self.kind), scale)

    def held(self, units: Tensor, scale: Tensor) -> Bytes:
        """Numbers [o, i] that are in 8 bits already, and their scales [o, 1], as bytes."""
        return {"weight": units.contiguous().view(torch.uint8), "scale": scale.float().contiguous().view(torch.uint8)}

    def unpacked(self, held: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype) -> Tensor:
        """Multiplied in fp32, and rounded once: 8 bits are exact in every dtype."""
        return held["weight"].view(self.kind).to(dtype).mul_(held["scale"].view(torch.float32))


@dataclass(frozen=True)
class NormalFloat:
    """NF4 of QLoRA (Dettmers et al. 2023, arXiv:2305.14314) as bitsandbytes computes it: blocks of 64, whose scales are held in 8 bits in turn."""

    name: str = "nf4"
    block: int = 64
    scales: int = 256  # in a block of theirs

    def packed(self, W: Tensor) -> Bytes:
        """A weight in 4 bits."""
        if W.is_meta:
            return {name: W.new_empty(size, dtype=torch.uint8) for name, size in self.sizes(W.numel()).items()}
        bnb = _bitsandbytes()
        codes, state = bnb.quantize_4bit(W, blocksize=self.block, compress_statistics=True, quant_type="nf4")
        held = {"weight": codes, "absmax": state.absmax, "scale": state.state2.absmax, "offset": state.offset}
        return {name: t.contiguous().view(-1).view(torch.uint8) for name, t in held.items()}

    def sizes(self, numbers: int) -> dict[str, int]:
        """The bytes that so many numbers take."""
        blocks = -(-numbers // self.block)
        return {"weight": -(-numbers // 2), "absmax": blocks, "scale": -(-blocks // self.scales) * 4, "offset": 4}

    def unpacked(self, held: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype) -> Tensor:
        """As bitsandbytes does it."""
        codes = held["weight"]
        if codes.is_meta:
            return codes.new_empty(shape, dtype=dtype)
        bnb = _bitsandbytes()
        scales = bnb.QuantState(
            absmax=held["scale"].view(torch.float32),
            code=_dynamic_map(codes.device),
            blocksize=self.scales,
            dtype=torch.float32,
        )
        state = bnb.QuantState(
            absmax=held["absmax"],
            shape=torch.Size(shape),
            code=bnb.get_4bit_type("nf4", device=codes.device),
            blocksize=self.block,
            quant_type="nf4",
            dtype=dtype,
            offset=held["offset"].view(torch.float32)[0],
            state2=scales,
        )
        W: Tensor = bnb.dequantize_4bit(codes.view(-1, 1), state)
        return W


def _bitsandbytes() -> ModuleType:
    import bitsandbytes.functional

    return bitsandbytes.functional


@cache
def _dynamic_map(device: torch.device) -> Tensor:
    """The 256 levels in which bitsandbytes holds scales."""
    levels: Tensor = _bitsandbytes().create_dynamic_map().to(device)
    return levels


FP8 = ScaledBytes("fp8", torch.float8_e4m3fn, torch.finfo(torch.float8_e4m3fn).max)
INT8 = ScaledBytes("int8", torch.int8, 127)
PACKINGS: dict[str, ScaledBytes | NormalFloat] = {"nf4": NormalFloat(), "int8": INT8, "fp8": FP8}


EIGHT_BITS = {row.kind: row for row in (FP8, INT8, ScaledBytes("fp8 (e5m2)", torch.float8_e5m2, 57344))}


@dataclass(frozen=True)
class Gguf:
    """Blocks of llama.cpp's kinds, as diffusers reads them. `kind`: a number of gguf's GGMLQuantizationType."""

    kind: int

    @property
    def name(self) -> str:
        """With the kind: gguf Q4_K."""
        import gguf

        return f"gguf {gguf.GGMLQuantizationType(self.kind).name}"

    def unpacked(self, held: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype) -> Tensor:
        """As diffusers does it."""
        import gguf
        from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor

        bytes_ = GGUFParameter(held["weight"].data, quant_type=gguf.GGMLQuantizationType(self.kind))
        return dequantize_gguf_tensor(bytes_).view(shape).to(dtype)  # type: ignore[no-any-return]


def packed(layer: nn.Linear, kind: str, device: torch.device) -> PackedLinear:
    """A linear layer in few bits, computed on a device, and held where the layer is."""
    packing, W = PACKINGS[kind], layer.weight.detach()
    held = packing.packed(W.to(device))
    return made(layer, packing, {name: t.to(W.device) for name, t in held.items()}, W.dtype)


def made(layer: nn.Linear, packing: Packing, held: Bytes, dtype: torch.dtype) -> PackedLinear:
    """What takes a linear layer's place: its shape and bias, and a weight that bytes hold."""
    layer.requires_grad_(False)
    shape = (layer.out_features, layer.in_features)
    return PackedLinear(shape, layer.bias, packing, held, dtype).train(layer.training)
