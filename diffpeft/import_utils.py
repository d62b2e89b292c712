"""What PEFT has in `peft.import_utils`: which libraries are here."""

from __future__ import annotations

import functools
import importlib.util

import torch

__all__ = [
    "is_bnb_4bit_available",
    "is_bnb_available",
    "is_diffusers_available",
    "is_gptqmodel_available",
    "is_hqq_available",
    "is_torchao_available",
    "is_xpu_available",
]


@functools.cache
def _is_here(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def is_bnb_available() -> bool:
    """Whether bitsandbytes is installed."""
    return _is_here("bitsandbytes")


def is_bnb_4bit_available() -> bool:
    """Whether bitsandbytes is installed, all versions of which that are supported have layers of 4 bits."""
    return _is_here("bitsandbytes")


def is_gptqmodel_available() -> bool:
    """Whether GPT-QModel is installed."""
    return _is_here("gptqmodel")


def is_hqq_available() -> bool:
    """Whether HQQ is installed."""
    return _is_here("hqq")


def is_torchao_available() -> bool:
    """Whether torchao is installed."""
    return _is_here("torchao")


def is_diffusers_available() -> bool:
    """Whether diffusers is installed."""
    return _is_here("diffusers")


def is_xpu_available(check_device: bool = False) -> bool:
    """Whether there is an XPU. `check_device` changes nothing."""
    return torch.xpu.is_available()
