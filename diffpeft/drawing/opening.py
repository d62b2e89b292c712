"""A model to draw with: on a device, some of it on the host, or in few bits."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import TYPE_CHECKING

from diffpeft.errors import ConfigError, shown

if TYPE_CHECKING:
    from torch import nn

    from diffpeft.families.parts import Parts

DEVICES = ("cuda", "mps", "cpu")
QUANTIZED = ("nf4", "int8", "fp8")
_DEVICE = re.compile(r"cpu|mps|cuda(:\d+)?")


def check_device(device: str | None, quantize: str | None) -> None:
    """Raise ConfigError for a device that is none, and for few bits that nothing here computes with. Imports no torch."""
    if device is not None and not _DEVICE.fullmatch(device):
        raise ConfigError(f"the device is {shown(device)}", remedy="It is cuda, cuda:1, mps or cpu.")
    if quantize == "nf4" and not find_spec("bitsandbytes"):
        raise ConfigError(
            "quantize nf4 is computed by bitsandbytes, which is not installed",
            remedy="pip install bitsandbytes, or pass int8 or fp8, which need nothing.",
        )


def there(device: str) -> str:
    """A device, by its name. Raises ConfigError if this machine has none."""
    import torch

    kind, _, number = device.partition(":")
    counts = {"cuda": torch.cuda.device_count, "mps": lambda: int(torch.backends.mps.is_available())}
    count = counts[kind]() if kind in counts else 1
    if int(number or 0) >= count:
        raise ConfigError(f"there is no device {device} here", remedy="Leave --device out: the best one is taken.")
    return device


def opened(
    model: str | None, base: str | None, *, dtype: str, device: str, quantize: str | None = None, offload: float = 0.0
) -> Parts:
    """The pipeline of a model, none of it loaded yet. `quantize` and `offload` (a share of the blocks) are of its denoisers.

    Where some of these are on the host, so are text encoders. Raises CheckpointError and its kin.
    """
    from diffpeft.model.placing import Placing
    from diffpeft.pipeline.open import denoises, open_parts

    placing = Placing(device, quantize, offload)

    def placed(name: str, part: nn.Module) -> nn.Module:
        if denoises(name):
            return placing(part)
        return Placing(device, offload=float(offload > 0 and name.startswith("text_encoder")))(part)

    return open_parts(model, base, dtype=dtype, device=device, placed=placed)
