"""nn.Embedding: a linear layer on one-hot rows, so that what acts on its input is looked up."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from diffpeft.layers.sites.base import FeaturesLast, sides
from diffpeft.methods import Geometry, Strength
from diffpeft.methods.forms import Branch, Factors, Form, Hadamard, Kronecker, Pointwise
from diffpeft.methods.linalg import added


class EmbeddingSite(FeaturesLast):
    """nn.Embedding: W [features, rows] is the transposed table."""

    kinds = (nn.Embedding,)

    @staticmethod
    def geometry_of(module: nn.Embedding) -> Geometry:
        return Geometry(module.embedding_dim, module.num_embeddings, lookup=True)

    def canonical(self, weight: Tensor) -> Tensor:
        return weight.t()

    def stored(self, weight: Tensor) -> Tensor:
        return weight.t()

    def positions(self, x: Tensor) -> int:
        return x.numel()

    def op(self, x: Tensor, weight: Tensor, bias: bool) -> Tensor:
        m = self.module
        y = F.embedding(x, weight.t(), m.padding_idx, scale_grad_by_freq=m.scale_grad_by_freq, sparse=m.sparse)
        return self._grown(y)

    def plus(self, y: Tensor, x: Tensor, form: Form, gate: Strength) -> Tensor:
        if isinstance(form, Factors):
            return super().plus(y, x, form, gate)
        assert not isinstance(form, Branch | Pointwise)
        rows = (
            _rows(x, form.first) * _rows(x, form.second)
            if isinstance(form, Hadamard)
            else _of_halves(x, form, self.geometry)
        )
        return added(y, self._grown(rows), gate)

    def down(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._grown(F.embedding(x, weight.t(), self.module.padding_idx))

    def _grown(self, y: Tensor) -> Tensor:
        """Times what transformers' scaled embeddings (Gemma, Bart) multiply their rows by."""
        scale = vars(self.module).get("embed_scale", self.module._buffers.get("embed_scale"))
        if scale is None:
            return y
        return y * (scale.to(y.dtype) if isinstance(scale, Tensor) else scale)


def _rows(x: Tensor, product: tuple[Tensor, ...]) -> Tensor:
    """The columns x of a matrix, or of a product (A, B) = B A of two, as rows.  Indices [*n] -> [*n, out]."""
    inner = F.embedding(x, product[0].T)
    return inner if len(product) == 1 else inner @ product[1].T


def _of_halves(x: Tensor, form: Kronecker, g: Geometry) -> Tensor:
    """The columns x of kron(first, second) as rows.  Indices [*n] -> [*n, out]."""
    d = g.in_ // sides(form.first)[1]
    u, v = _rows(x // d, form.first[::-1]), _rows(x % d, form.second[::-1])
    return (u[..., :, None] * v[..., None, :]).flatten(-2)
