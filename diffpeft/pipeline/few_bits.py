"""Denoisers in files of few bits, read as they are and held so: 8-bit numbers with or without scales beside them, as ComfyUI has them, and GGUF.

A layer `x` of ComfyUI's files is `x.weight` in 8 bits, times `x.scale_weight` or `x.weight_scale` (a number, or one for each row). What is for
products in 8 bits (`x.scale_input`, `x.input_scale`) is for faster ones than ours; `x.comfy_quant` holds JSON whose `format` says how it is meant.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffpeft import io
from diffpeft.errors import CheckpointError, listed
from diffpeft.families.parts import Component

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from diffpeft.layers.packed import Bytes, Packing

GGUF = ".gguf"
_SCALES, _ASIDE = (".scale_weight", ".weight_scale"), (".scale_input", ".input_scale", ".comfy_quant")
_MARK = "scaled_fp8"  # a tensor without meaning in older files
_8_BITS = {"F8_E4M3", "F8_E5M2", "I8"}
_FORMATS = {"float8_e4m3fn", "float8_e5m2", "int8_tensorwise"}  # that are numbers times scales
_PREFIX = "model.diffusion_model."


def in_few_bits(file: str | Path) -> bool:
    """Whether a file has weights in few bits. Raises as `io.header`."""
    return Path(file).suffix == GGUF or any(
        (h.dtype in _8_BITS and len(h.shape) > 1) or name.endswith(".comfy_quant")
        for name, h in io.header(file)[0].items()
    )


def has_scales(file: str | Path) -> bool:
    """Whether numbers in a file stand for others, so that who casts them gets the wrong ones. Raises as `io.header`."""
    return Path(file).suffix == GGUF or any(name.endswith((*_SCALES, ".comfy_quant")) for name in io.header(file)[0])


@dataclass(frozen=True)
class FewBits:
    """What a file has: tensors by name, and for those in 8 bits their scales [o, 1]. Tensors of GGUF know themselves what they are."""

    tensors: Mapping[str, Tensor]
    scales: Mapping[str, Tensor]

    def plain(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """All tensors as the numbers that they stand for."""
        return {name: number(t, self.scales.get(name), dtype) for name, t in self.tensors.items()}


def number(t: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A tensor as the numbers it stands for; integers that are no weights stay."""
    if hasattr(t, "quant_type"):
        from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

        t = dequantize_gguf_tensor(t)
    elif scale is not None:
        return t.to(dtype).mul_(scale.view(-1, *[1] * (t.dim() - 1)))
    return t.to(dtype) if t.is_floating_point() else t


def read(file: str | Path) -> FewBits:
    """What a file has. Raises CheckpointError for formats that are not known here."""
    if Path(file).suffix == GGUF:
        from diffusers.models.model_loading_utils import load_gguf_checkpoint

        return FewBits(load_gguf_checkpoint(str(file)), {})
    from safetensors.torch import load_file

    tensors = load_file(file)
    _check_formats(tensors, file)
    beside = {name.removesuffix(end): t for name, t in tensors.items() for end in _SCALES if name.endswith(end)}
    plain = {name: t for name, t in tensors.items() if not name.endswith((*_SCALES, *_ASIDE)) and name != _MARK}
    scales = {
        name: _rows(t, beside.get(name.removesuffix(".weight")))
        for name, t in plain.items()
        if t.itemsize == 1 and t.dim() > 1
    }
    return FewBits(plain, scales)


def _rows(weight: Tensor, scale: Tensor | None) -> Tensor:
    """The scale of each row [o, 1] of a weight [o, ...], which may have one for all, or none."""
    import torch

    scale = torch.ones(()) if scale is None else scale.float()
    if scale.numel() not in (1, len(weight)):
        raise CheckpointError(
            f"a weight {list(weight.shape)} has scales {list(scale.shape)}",
            remedy="One for the weight or one for each row can be read; take the file in bf16.",
        )
    return scale.reshape(-1, 1).expand(len(weight), 1).contiguous()


def _check_formats(tensors: Mapping[str, Tensor], file: str | Path) -> None:
    """Raise CheckpointError for layers in formats that are not known here."""
    foreign = {}
    for name, t in tensors.items():
        if name.endswith(".comfy_quant"):
            said = json.loads(bytes(t.tolist()))
            if said.get("format") not in _FORMATS or said.get("convrot"):
                foreign[name] = str(said.get("format")) + (" with rotations" if said.get("convrot") else "")
    if foreign:
        raise CheckpointError(
            f"{len(foreign)} layers are in a format that cannot be read: {listed(sorted(set(foreign.values())))}",
            where=file,
            remedy=f"Take a file in bf16 or {', '.join(sorted(_FORMATS))}.",
        )


def opened(skeleton: nn.Module, few: FewBits, dtype: torch.dtype, where: str | Path) -> nn.Module:
    """A denoiser like `skeleton`, which has no numbers: linear layers that are in few bits stay so, all else is plain.

    Raises CheckpointError where nobody knows the names of a file.
    """
    names = set(skeleton.state_dict())
    tensors = _named(skeleton, few.tensors, names, where)
    columns = (
        _named(skeleton, {n: few.scales.get(n, t) for n, t in few.tensors.items()}, names, where) if few.scales else {}
    )
    scales = {
        name: t for name, t in columns.items() if name in tensors and tensors[name].itemsize == 1 and t.itemsize > 1
    }
    model = _empty(skeleton)
    layers = dict(model.named_modules())
    plain = {}
    for name, t in tensors.items():
        layer, _, last = name.rpartition(".")
        held = _held(t, scales.get(name)) if last == "weight" and _is_linear(layers.get(layer)) else None
        if held is None:
            plain[name] = number(t, scales.get(name), dtype)
        else:
            _replace(model, layer, *held, dtype)
    model.load_state_dict(plain, strict=False, assign=True)
    return model


def _named(
    skeleton: Component, tensors: Mapping[str, Tensor], names: Iterable[str], where: str | Path
) -> dict[str, Tensor]:
    """Tensors under a model's own names: they have them already, or diffusers knows how they are called originally."""
    bare = {name.removeprefix(_PREFIX): t for name, t in tensors.items()}
    if bare.keys() >= set(names):
        return bare
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    kinds = [
        SINGLE_FILE_LOADABLE_CLASSES[c.__name__]
        for c in type(skeleton).__mro__
        if c.__name__ in SINGLE_FILE_LOADABLE_CLASSES
    ]
    if not kinds:
        lacking = sorted(set(names) - bare.keys())
        raise CheckpointError(
            f"the file lacks {len(lacking)} of the weights of {type(skeleton).__name__}: {listed(lacking, 3)}",
            where=where,
        )
    convert: Callable[..., dict[str, Tensor]] = kinds[0]["checkpoint_mapping_fn"]  # type: ignore[index]
    return convert(config=dict(skeleton.config), checkpoint=dict(tensors))


def _empty(skeleton: Component) -> nn.Module:
    """A model like another without numbers, and with the buffers that no file has."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model: nn.Module = type(skeleton).from_config(skeleton.config)
    return model


def _is_linear(module: nn.Module | None) -> bool:
    import torch

    return type(module) is torch.nn.Linear


def _held(t: Tensor, scale: Tensor | None) -> tuple[Packing, Bytes] | None:
    """How a linear layer's weight is held, and in which bytes; None for a plain one."""
    from diffpeft.layers.packed import EIGHT_BITS, Gguf

    if hasattr(t, "quant_type"):
        return Gguf(int(t.quant_type)), {"weight": t.as_tensor()}  # type: ignore[attr-defined]
    if scale is None:
        return None
    packing = EIGHT_BITS[t.dtype]
    return packing, packing.held(t, scale)


def _replace(model: nn.Module, name: str, packing: Packing, held: Bytes, dtype: torch.dtype) -> None:
    from diffpeft.layers.packed import made

    parent, _, last = name.rpartition(".")
    holder = model.get_submodule(parent)
    setattr(holder, last, made(getattr(holder, last), packing, held, dtype))
