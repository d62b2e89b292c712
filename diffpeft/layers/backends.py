"""Quantised layers: one row a backend. A linear layer whose weight a library holds in few bits, which adapters act beside, or on its dequantised copy.

To add one: a row in BACKENDS and a function that dequantises. Everything else (reports, merging, preparing for training) reads the row.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Kind = tuple[str, str]  # (module, name) of a class in a library that may not be there


@dataclass(frozen=True)
class Backend:
    """What the house knows of one backend."""

    name: str  # as reports say it: PEFT's names
    layer: Kind | None  # the class of its layers; None: any linear layer whose weight is of the kind
    weight: Kind  # the class of their weights
    dequantised: Callable[[nn.Module], Tensor]  # a layer's weight as plain numbers [out, in]: a copy
    dtype: Callable[[Any], torch.dtype]  # what a layer computes in, from its weight, where the layer does not say it
    differentiable: Callable[[nn.Module], bool] = lambda module: (
        True
    )  # whether the layer's own product has a gradient for its input
    count: Callable[[Any], int] = Tensor.numel  # how many numbers a weight stands for
    packed: bool = False  # whether a weight's dtype is only that of its storage
    skipped: str = "modules_to_not_convert"  # the field of transformers' quantisation config that names plain layers
    loaded: Mapping[str, Callable[[torch.dtype], object]] = field(
        default_factory=dict
    )  # {option: transformers' config to load a model so}

    def plain(self, module: Any, dtype: torch.dtype, device: torch.device) -> Any:
        """An empty layer of the class that a quantised one was made from: nn.Linear, or GPT-2's Conv1D, so that a saved model has its weights the right way."""
        source = getattr(module, "source_cls", None)
        if source is not None and source.__name__ == "Conv1D":
            with torch.device("meta"):
                plain = source(module.out_features, module.in_features)
        else:
            plain = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
        plain.to_empty(device=device).to(dtype).train(module.training)
        for name in vars(plain):
            if name.startswith(("_forward", "_backward")) and name in vars(module):  # other libraries' hooks
                plain.__dict__[name] = vars(module)[name]
        return plain

    def computes_in(self, module: Any) -> torch.dtype:
        """The dtype in which a quantised layer computes, as far as it knows."""
        told: torch.dtype | None = getattr(module, "compute_dtype", None)
        bias = None if module.bias is None else module.bias.dtype
        return told or bias or self.dtype(module.weight)


def _dequantised_8_bits(module: Any) -> Tensor:
    """Rows of 8-bit numbers times their scales. Before the first forward the parameter holds the scales, afterwards the matrix-product state does."""
    import bitsandbytes.functional as bnb

    weight = module.weight
    scales = weight.SCB if weight.SCB is not None else module.state.SCB
    W: Tensor = bnb.int8_vectorwise_dequant(weight.data if weight.CB is None else weight.CB, scales)
    return W


def _is_packed(module: nn.Module) -> bool:
    """Whether 4-bit numbers lie as bitsandbytes' product for inference wants them, on CPUs that have it; it knows no gradients."""
    return bool(getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False))


def _dequantised_4_bits(module: Any) -> Tensor:
    import bitsandbytes.functional as bnb

    data, state = module.weight.data, module.weight.quant_state
    if _is_packed(module):
        data, state = bnb._convert_weight_packed_for_cpu_inverse(data, copy.copy(state))
    return bnb.dequantize_4bit(data, state)


def _dequantised_gguf(module: nn.Module) -> Tensor:
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    return dequantize_gguf_tensor(module.weight).to(module.compute_dtype)  # type: ignore[no-any-return]


def _dequantised_torchao(module: Any) -> Tensor:
    """The weight as torchao says it; of a layout that it cannot read back, what the layer makes of the identity."""
    weight = module.weight.detach()
    try:
        return weight.dequantize()  # type: ignore[no-any-return]
    except NotImplementedError:
        with torch.no_grad():
            eye = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
            return nn.functional.linear(eye, weight).t().contiguous()


def _has_gradient(module: nn.Module) -> bool:
    """Whether torch knows the derivative of a weight's product: not of those that torchao has packed for a CPU."""
    return "Opaque" not in type(module.weight).__name__


def _bits(**fields: object) -> Callable[[torch.dtype], object]:
    """bitsandbytes' config of transformers, with what it computes in."""

    def config(dtype: torch.dtype) -> object:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(**fields, **({"bnb_4bit_compute_dtype": dtype} if "load_in_4bit" in fields else {}))

    return config


_BNB = "bitsandbytes.nn.modules"
FOUR_BITS = Backend(
    "bnb 4bit",
    (_BNB, "Linear4bit"),
    (_BNB, "Params4bit"),
    _dequantised_4_bits,
    dtype=lambda weight: weight.quant_state.dtype,
    differentiable=lambda module: not _is_packed(module),
    count=lambda weight: 2 * weight.numel() * weight.element_size(),
    packed=True,
    skipped="llm_int8_skip_modules",
    loaded={"nf4": _bits(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)},
)
BACKENDS = (
    FOUR_BITS,
    Backend(
        "bnb 8bit",
        (_BNB, "Linear8bitLt"),
        (_BNB, "Int8Params"),
        _dequantised_8_bits,
        dtype=lambda weight: torch.float16,
        skipped="llm_int8_skip_modules",
        loaded={"int8": _bits(load_in_8bit=True)},
    ),
    Backend(
        "gguf",
        ("diffusers.quantizers.gguf.utils", "GGUFLinear"),
        ("diffusers.quantizers.gguf.utils", "GGUFParameter"),
        _dequantised_gguf,
        dtype=lambda weight: torch.float16,
        count=lambda weight: int(torch.Size(weight.quant_shape).numel()),
        packed=True,
    ),
    Backend(
        "torchao",
        None,
        ("torchao.utils", "TorchAOBaseTensor"),
        _dequantised_torchao,
        dtype=lambda weight: weight.dtype,
        differentiable=_has_gradient,
    ),
    Backend(
        "diffpeft",
        ("diffpeft.layers.packed", "PackedLinear"),
        ("diffpeft.layers.packed", "Packed"),
        lambda module: module.unpacked(),  # type: ignore[operator]
        dtype=lambda weight: torch.float32,  # the layer says it
        count=lambda weight: int(weight.numbers),
        packed=True,
    ),
)


KNOWN = "_diffpeft_backend"  # where a class of ours keeps `backend_of_class`: compiled code would see a table grow


def backend_of(module: nn.Module) -> Backend | None:
    """The backend that holds a layer's weight; None for a layer that is not quantised."""
    cls = type(module)
    backend: Backend | None = getattr(cls, KNOWN) if hasattr(cls, KNOWN) else backend_of_class(cls)
    if backend is not None or not isinstance(module, nn.Linear):
        return backend
    weight = module._parameters.get("weight")
    backend = None if weight is None else backend_of_weight(weight)
    return backend if backend is not None and backend.layer is None else None


def backend_of_class(cls: type) -> Backend | None:
    """The backend whose layers are of a class."""
    if cls not in _layers:
        _layers[cls] = next((b for b in BACKENDS if b.layer in _names(cls)), None)
    return _layers[cls]


def backend_of_weight(weight: Tensor) -> Backend | None:
    """The backend whose kind a parameter is."""
    cls = type(weight)
    if cls is nn.Parameter or cls is Tensor:
        return None
    if cls not in _weights:
        _weights[cls] = next((b for b in BACKENDS if b.weight in _names(cls)), None)
    return _weights[cls]


_layers: dict[type, Backend | None] = {}
_weights: dict[type, Backend | None] = {}


def _names(cls: type) -> set[Kind]:
    return {(c.__module__, c.__name__) for c in cls.__mro__}


def numbers(weight: Tensor) -> int:
    """How many numbers a parameter stands for, whatever holds them."""
    backend = backend_of_weight(weight)
    return weight.numel() if backend is None else backend.count(weight)
