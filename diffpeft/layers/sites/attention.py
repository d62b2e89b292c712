"""nn.MultiheadAttention: the projection of queries, keys and values, one matrix [3 features, features] that its forward reads as a parameter."""

from __future__ import annotations

from torch import nn

from diffpeft.layers.sites.base import LayerSite
from diffpeft.methods import Geometry


class AttentionSite(LayerSite):
    """PyTorch's attention: W [3 features, features]. Its output projection is a layer inside, whose weight it reads too (layers/readers.py)."""

    kinds = (nn.MultiheadAttention,)
    in_order = True
    weight_name, bias_name = "in_proj_weight", "in_proj_bias"
    along = ("out_proj",)

    @staticmethod
    def geometry_of(module: nn.MultiheadAttention) -> Geometry:
        return Geometry(3 * module.embed_dim, module.embed_dim)

    @staticmethod
    def unfit(module: nn.Module) -> str:
        assert isinstance(module, nn.MultiheadAttention)
        if module.in_proj_weight is None:
            return "Only same embed for query/key/value is supported as of now for MultiheadAttention"
        if not isinstance(module.out_proj, nn.Linear):
            return "out_proj must be an instance of nn.Linear for MultiheadAttention"
        return ""
