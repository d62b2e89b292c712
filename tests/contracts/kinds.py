"""The registries that the laws run over: every method on every kind of layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffpeft.layers.site import SITES
from diffpeft.methods import METHODS

# name: how to make the layer, and the shape of an input
KINDS = {
    "linear": (lambda: nn.Linear(6, 6), (2, 3, 6)),
    "linear without bias": (lambda: nn.Linear(6, 6, bias=False), (2, 6)),
    "linear tall": (lambda: nn.Linear(3, 8), (2, 3)),
    "linear wide": (lambda: nn.Linear(8, 3), (1, 2, 2, 8)),
    "conv1d padded": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 7)),
    "conv1d circular": (lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), (2, 4, 7)),
    "conv2d 1x1": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 5, 5)),
    "conv2d strided": (lambda: nn.Conv2d(4, 6, 3, stride=(2, 1), padding=1), (2, 4, 6, 7)),
    "conv2d dilated": (lambda: nn.Conv2d(4, 6, 3, dilation=2, padding="same", bias=False), (2, 4, 7, 6)),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 5, 5)),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 5, 5)),
    "conv2d non-square": (lambda: nn.Conv2d(4, 6, (1, 3), padding=(0, 1)), (2, 4, 5, 5)),
    "conv2d reflect": (lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect"), (2, 4, 5, 5)),
    "conv2d circular grouped": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2, padding_mode="circular"),
        (2, 4, 6, 6),
    ),
    "conv2d without a batch": (lambda: nn.Conv2d(4, 6, 3), (4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1)), (1, 2, 3, 4, 4)),
}
LINEAR = "linear"

# where the default config of a method would hide a mistake: here the scale is not 1 and fits tiny layers
CONFIGS = {"lora": {"r": 2, "lora_alpha": 3}}

every_method = pytest.mark.parametrize("method", METHODS)
every_kind = pytest.mark.parametrize("kind", KINDS)


def config(method: str, **fields):
    return METHODS[method].config(**{**CONFIGS.get(method, {}), **fields})


def layer(kind: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, torch.Tensor]:
    """A model of one layer, and an input."""
    make, shape = KINDS[kind]
    return nn.Sequential(make()).to(dtype).requires_grad_(False), torch.randn(shape, dtype=dtype)


class Block(nn.Module):
    """A residual block, as repeated in real models."""

    def __init__(self, d: int = 8):
        super().__init__()
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


def blocks(n: int = 3, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    return nn.Sequential(*(Block() for _ in range(n))).to(dtype).requires_grad_(False)


def test_every_site_has_a_kind():
    assert {cls for site in SITES for cls in site.kinds} == {type(make()) for make, _ in KINDS.values()}
