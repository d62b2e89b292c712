"""Quantised layers of every backend, by a short name: the same plain linear layer in each."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

try:
    import torchao.quantization as torchao
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
except ImportError:
    torchao = None


def _bits(make):
    """A layer of bitsandbytes with a plain one's numbers."""

    def quantised(plain):
        layer = make(plain.in_features, plain.out_features, bias=plain.bias is not None)
        layer.load_state_dict(plain.state_dict())
        return layer.to("cpu")

    return quantised


def _torchao(config):
    """A plain layer whose weight torchao has quantised. 4-bit ones lie as they do on CPUs, where torch has no derivative and torchao no way back."""

    def quantised(plain):
        model = nn.Sequential(plain)
        torchao.quantize_(model, config())
        return model[0]

    return quantised


FORMATS = {
    "nf4": _bits(lambda i, o, **k: bnb.nn.Linear4bit(i, o, quant_type="nf4", compute_dtype=torch.float32, **k)),
    "nf4 twice": _bits(
        lambda i, o, **k: bnb.nn.Linear4bit(
            i, o, quant_type="nf4", compress_statistics=True, compute_dtype=torch.float32, **k
        )
    ),
    "fp4": _bits(lambda i, o, **k: bnb.nn.Linear4bit(i, o, quant_type="fp4", compute_dtype=torch.float32, **k)),
    "8 bit": _bits(lambda i, o, **k: bnb.nn.Linear8bitLt(i, o, has_fp16_weights=False, **k)),
    "torchao int8": _torchao(lambda: torchao.Int8WeightOnlyConfig()),
    "torchao int4": _torchao(lambda: PrototypeInt4WeightOnlyConfig(group_size=32)),
    "torchao intx": _torchao(lambda: torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4)),
}
BACKENDS = {"nf4": "bnb 4bit", "nf4 twice": "bnb 4bit", "fp4": "bnb 4bit", "8 bit": "bnb 8bit"}
exact = frozenset(FORMATS) - {"8 bit"}  # they multiply by exactly the dequantised weight
_absent = pytest.mark.skipif(torchao is None, reason="torchao is not installed (pip install diffpeft[test])")
every_format = pytest.mark.parametrize(
    "format", [pytest.param(f, marks=_absent) if f.startswith("torchao") else f for f in FORMATS]
)


def quantised_layer(format, i=64, o=32, bias=True):
    """A quantised layer and the plain one that it was made from."""
    plain = nn.Linear(i, o, bias=bias)
    copy = nn.Linear(i, o, bias=bias)
    copy.load_state_dict(plain.state_dict())
    return FORMATS[format](copy), plain


def backend_name(format):
    """What reports call the backend."""
    return BACKENDS.get(format, "torchao")
