"""Products with an epilogue, as autograd nodes: no pass over an activation that one matrix product does not make anyway.

Each has its plain form beside it for compiled code, where the compiler does this work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from diffpeft.methods.forms import Stage
from diffpeft.methods.linalg import traced

_CACHE = 2**15  # numbers that stay in the cache


def is_small(t: Tensor) -> bool:
    """Whether a pass over an activation costs less than a node in Python. Compiled code, which has none, need not be told sizes apart."""
    return not torch.compiler.is_compiling() and t.numel() < _CACHE


class Context(Protocol):
    """What autograd hands from a node's forward to its backward."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    gate: float
    last: bool

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep tensors."""

    def mark_dirty(self, *tensors: Tensor) -> None:
        """Say which inputs are written into."""


class LoraContext(Context, Protocol):
    """With a gate that may be one for each rank."""

    gate: float | Tensor  # type: ignore[assignment]


class QuantisedContext(Protocol):
    """What a quantised product needs for its gradient."""

    weight: Callable[[], Tensor]
    dtype: torch.dtype


Gradients = tuple[Tensor | None, ...]


def eager(*tensors: Tensor) -> bool:
    """Whether a node may be made of these: nothing is traced, and they are of one dtype."""
    return not traced() and len({t.dtype for t in tensors}) == 1


def _node(function: type[torch.autograd.Function], *inputs: object) -> Tensor:
    """The result of an autograd function."""
    y: Tensor = function.apply(*inputs)
    return y


def _added(y: Tensor, h: Tensor, B: Tensor, gate: float, last: bool, into: bool) -> Tensor:
    """y + gate * B h, with features last (y [*n, o], h [*n, r]) or first (y [n, o, *m], h [n, r, *m]); B [o, r]."""
    if last:
        flat = y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1]), B.t()
        return (flat[0].addmm_(*flat[1:], alpha=gate) if into else torch.addmm(*flat, alpha=gate)).view(y.shape)
    flat = y.flatten(2), B.expand(len(y), -1, -1), h.flatten(2)
    return (flat[0].baddbmm_(*flat[1:], alpha=gate) if into else torch.baddbmm(*flat, alpha=gate)).view(y.shape)


class _Add(torch.autograd.Function):
    """`_added` in place: y's own gradient passes through untouched and uncopied."""

    @staticmethod
    def forward(ctx: Context, y: Tensor, h: Tensor, B: Tensor, gate: float, last: bool) -> Tensor:
        ctx.save_for_backward(h, B)
        ctx.gate, ctx.last = gate, last
        ctx.mark_dirty(y)
        _added(y, h, B, gate, last, into=True)
        return y

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> Gradients:
        h, B = ctx.saved_tensors
        if ctx.last:
            flat = g.reshape(-1, g.shape[-1])
            gh = (flat @ B).view(h.shape)
            gB = flat.t() @ h.reshape(-1, h.shape[-1])
        else:
            flat = g.flatten(2)
            gh = (B.t() @ flat).view(h.shape)
            gB = (flat @ h.flatten(2).mT).sum(0)
        return g, gh.mul_(ctx.gate), gB.mul_(ctx.gate), None, None


def add(y: Tensor, h: Tensor, B: Tensor, gate: float, last: bool, into: bool) -> Tensor:
    """y + gate * B h (see `_added`). `into`: y is a fresh, contiguous result that nothing has saved, and may be written into."""
    if not into or traced() or (torch.is_grad_enabled() and is_small(y)):
        return _added(y, h, B, gate, last, into=False)
    return _node(_Add, y, h, B, gate, last) if torch.is_grad_enabled() else _added(y, h, B, gate, last, into=True)


def _rescaled(y: Tensor, by: Tensor, b: Tensor | None) -> Tensor:
    """y * by + (1 - by) * b: what is not the bias is scaled; exactly y where `by` is 1."""
    return y * by if b is None else torch.addcmul((1 - by) * b.to(by.dtype), y, by)


def _rescaled_backward(g: Tensor, y: Tensor, by: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of y, by and b. On a CPU in pieces that stay in the cache."""
    wide = torch.promote_types(g.dtype, torch.float32)
    rows = g.reshape(-1, g.shape[-1])
    if torch.is_grad_enabled() or g.device.type != "cpu":
        gy, products = g * by, (rows * y.reshape(rows.shape)).sum(0, dtype=wide)
    else:
        gy, products = torch.empty_like(g, memory_format=torch.contiguous_format), by.new_zeros(by.shape, dtype=wide)
        pieces = [t.view(rows.shape).split(max(_CACHE // len(by), 1)) for t in (rows, y.reshape(rows.shape), gy)]
        for part, of_y, of_gy in zip(*pieces, strict=True):
            products += (part * of_y).sum(0, dtype=wide)
            torch.mul(part, by, out=of_gy)
    if b is None:
        return gy, products.to(by.dtype), None
    total = rows.sum(0, dtype=wide)
    return gy, (products - total * b).to(by.dtype), ((1 - by) * total).to(b.dtype)


class _Rescale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, y: Tensor, by: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(y, by, b)
        return _rescaled(y, by, b)

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> Gradients:
        return _rescaled_backward(g, *ctx.saved_tensors)


def rescale(y: Tensor, by: Tensor, b: Tensor | None) -> Tensor:
    """y * by + (1 - by) * b.  y [*n, f], by [f], b [f]."""
    if not eager(y, by):
        return _rescaled(y, by, b)
    return _node(_Rescale, y, by, b)


def _shaped(t: Tensor, shape: Sequence[int]) -> Tensor:
    """A result that nothing else refers to in another shape, and not as a view: autograd adds other gradients into it only then."""
    view: Tensor = torch.ops.aten._unsafe_view(t, shape)
    return view


class _LoraLinear(torch.autograd.Function):
    """`lora_linear` as one node: nothing is saved but x, the rank activations, and what is scaled."""

    @staticmethod
    def parts(
        x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, gate: float | Tensor, by: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The result, the rank activations, and what is scaled."""
        h = x.reshape(-1, x.shape[-1]) @ A.t()
        if isinstance(gate, Tensor):
            h *= gate
        plain = F.linear(x, W, b)
        y = plain if by is None else _rescaled(plain, by, b)
        y.view(-1, y.shape[-1]).addmm_(h, B.t(), alpha=1 if isinstance(gate, Tensor) else gate)
        return y, h, plain

    @staticmethod
    def forward(
        ctx: LoraContext,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        A: Tensor,
        B: Tensor,
        gate: float | Tensor,
        by: Tensor | None,
    ) -> Tensor:
        y, h, plain = _LoraLinear.parts(x, W, b, A, B, gate, by)
        ctx.save_for_backward(x, W, A, B, h, *(() if by is None else (b, by, plain)))
        ctx.gate = gate
        return y

    @staticmethod
    def backward(ctx: LoraContext, g: Tensor) -> Gradients:
        x, W, A, B, h, *scaled = ctx.saved_tensors
        gate, needs, gby = ctx.gate, ctx.needs_input_grad, None
        scalar = 1.0 if isinstance(gate, Tensor) else gate
        flat, x_flat = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        gx = gA = None
        if torch.is_grad_enabled():  # to be differentiated again: what was kept is no function of the inputs then
            h = x_flat @ A.t() * (gate if isinstance(gate, Tensor) else 1)
            scaled = scaled and [*scaled[:2], F.linear(x, W, scaled[0])]
        if needs[0] or needs[3]:
            gh = flat @ B
            if isinstance(gate, Tensor):
                gh *= gate
            gA = torch.mm(gh.t(), x_flat).mul_(scalar) if needs[3] else None
        gB = torch.mm(flat.t(), h).mul_(scalar) if needs[4] else None
        gb = flat.sum(0) if needs[2] else None
        if scaled:
            b, by, plain = scaled
            g, gby, _ = _rescaled_backward(g, plain, by, b)
            flat = g.reshape(flat.shape)
        if needs[0]:
            gx = _shaped((flat @ W.to(flat.dtype)).addmm_(gh, A, alpha=scalar), x.shape)
        gW = flat.t() @ x_flat if needs[1] else None
        return gx, gW, gb, gA, gB, None, gby


def lora_linear(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, gate: float | Tensor, by: Tensor | None = None
) -> Tensor:
    """by * x W^T + b + gate * (x A^T) B^T.  x [*n, i], W [o, i], A [r, i], B [o, r], gate a number or [r], by [o]."""
    if not torch.is_grad_enabled():
        return _LoraLinear.parts(x, W, b, A, B, gate, by)[0]  # a node has its price
    if by is None and is_small(x) and x.is_contiguous():
        return _small_lora_linear(x, W, b, A, B, gate)
    return _node(_LoraLinear, x, W, b, A, B, gate, by)


def _small_lora_linear(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, gate: float | Tensor) -> Tensor:
    """`lora_linear` by torch's own nodes: of so few positions passes cost nothing, and a node in Python does."""
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    h = F.linear(flat, A)
    if isinstance(gate, Tensor):
        h, gate = h * gate, 1.0
    y = torch.addmm(F.linear(flat, W, b), h, B.t(), alpha=gate)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


class _KronLinear(torch.autograd.Function):
    """`kron_linear` as one node. Slices lie outside positions, so that mixing them is one product."""

    @staticmethod
    def mixed(x: Tensor, left: Tensor, down: Tensor | None) -> tuple[Tensor, Tensor]:
        """x in slices, through `down` -> [c, n r], and mixed -> [a, n, r]."""
        a, c = left.shape
        n = math.prod(x.shape[:-1])
        h = x.reshape(n * c, x.shape[-1] // c)
        h = h if down is None else h @ down.t()
        r = h.shape[1]
        h = h.view(n, c, r).transpose(0, 1).reshape(c, n * r)
        return h, (left @ h).view(a, n, r)

    @staticmethod
    def forward(
        ctx: Context,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        left: Tensor,
        down: Tensor | None,
        up: Tensor,
        gate: float,
    ) -> Tensor:
        (a, _), (f, r) = left.shape, up.shape
        h, mixed = _KronLinear.mixed(x, left, down)
        y = F.linear(x, W, b)
        _apart(y, a).baddbmm_(mixed, up.t().expand(a, r, f), alpha=gate)
        ctx.save_for_backward(x, W, left, down, up, h, mixed)
        ctx.gate = gate
        return y

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> Gradients:
        x, W, left, down, up, h, mixed = ctx.saved_tensors
        (a, c), (f, r), needs = left.shape, up.shape, ctx.needs_input_grad
        if torch.is_grad_enabled():
            h, mixed = _KronLinear.mixed(x, left, down)
        flat, blocks = g.reshape(-1, g.shape[-1]), _apart(g, a)
        gx = gfirst = gdown = None
        if needs[0] or needs[3] or needs[4]:
            gmixed = torch.bmm(blocks, (up * ctx.gate).expand(a, f, r)).flatten(1)
            gfirst = gmixed @ h.t() if needs[3] else None
            gh = (left.t() @ gmixed).view(c, -1, r)
            if needs[4]:
                gdown = torch.bmm(gh.mT, _apart(x, c)).sum(0)
            if needs[0]:
                gx = flat @ W.to(flat.dtype)
                if down is None:
                    _apart(gx, c).add_(gh)
                else:
                    _apart(gx, c).baddbmm_(gh, down.expand(c, *down.shape))
                gx = _shaped(gx, x.shape)
        gup = torch.bmm(blocks.mT, mixed).sum(0).mul_(ctx.gate) if needs[5] else None
        gW = flat.t() @ x.reshape(-1, x.shape[-1]) if needs[1] else None
        return gx, gW, flat.sum(0) if needs[2] else None, gfirst, gdown, gup, None


def kron_linear(
    x: Tensor, W: Tensor, b: Tensor | None, left: Tensor, down: Tensor | None, up: Tensor, gate: float
) -> Tensor:
    """x W^T + b + gate * x kron(first, up down)^T.  x [*n, c d], first [a, c], down [r, d] or none, up [f, r]; a f features out."""
    return _node(_KronLinear, x, W, b, left, down, up, gate)


_BLOCK = 32  # the smallest block whose product takes no longer than reading it


class _Blocks(torch.autograd.Function):
    """A batched product that reads and writes blocks of features where they lie."""

    @staticmethod
    def forward(ctx: Context, t: Tensor, M: Tensor) -> Tensor:
        ctx.save_for_backward(t, M)
        y = t.new_empty(*t.shape[:-1], M.shape[0] * M.shape[2])
        torch.bmm(_apart(t, M.shape[0]), M, out=_apart(y, M.shape[0]))
        return y

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> Gradients:
        t, M = ctx.saved_tensors
        gt = _node(_Blocks, g, M.mT) if ctx.needs_input_grad[0] else None
        gM = torch.bmm(_apart(t, M.shape[0]).mT, _apart(g, M.shape[0])) if ctx.needs_input_grad[1] else None
        return gt, gM


def _apart(t: Tensor, k: int) -> Tensor:
    """[*n, k b] -> [k, n, b], without a copy where that can be."""
    return t.reshape(-1, k, t.shape[-1] // k).transpose(0, 1)


def block_product(t: Tensor, M: Tensor) -> Tensor:
    """Each block of features times its matrix.  t [*n, k b], M [k, b, c] -> [*n, k c]."""
    k, b, c = M.shape
    if not eager(t, M):
        return torch.einsum("...kb,kbc->...kc", t.unflatten(-1, (k, b)), M).flatten(-2)
    q = math.gcd(k, _BLOCK // max(b, c)) if max(b, c) < _BLOCK else 1
    if q > 1:  # q neighbours as one block with zeros beside the diagonal
        apart = torch.eye(q, dtype=M.dtype, device=M.device).view(q, 1, q, 1)
        M = (M.reshape(-1, q, b, 1, c) * apart).reshape(-1, q * b, q * c)
    return _node(_Blocks, t, M)


def stages(t: Tensor, sizes: Sequence[int], stages: Sequence[Stage], last: bool) -> Tensor:
    """Features, seen as an array of `sizes`, through stages: each multiplies some axes together by a matrix for every place on the others.

    t [n, f], or with features first [n, f, m]. Between two stages features are copied once.
    """
    shape = t.shape
    t = t.reshape(shape[0], *sizes, *shape[2:])
    for axes, M in stages:
        turned = [1 + a for a in axes]
        others = [1 + a for a in range(len(sizes)) if a not in axes]
        order = [*others, 0, *turned] if last else [0, *others, *turned, *range(len(sizes) + 1, t.dim())]
        t = t.permute(order)
        flat = (
            t.reshape(M.shape[0], shape[0], M.shape[1])
            if last
            else t.reshape(shape[0], M.shape[0], M.shape[1], math.prod(shape[2:]))
        )
        t = (torch.bmm(flat, M) if last else M.mT @ flat).view(t.shape)
        t = t.permute([order.index(a) for a in range(t.dim())])
    return t.reshape(shape)


class _Quantised(torch.autograd.Function):
    """A product that has no gradient of its own: forward as it is, backward by the dequantised weight, which is made then and not kept."""

    @staticmethod
    def forward(
        ctx: QuantisedContext, x: Tensor, product: Callable[[Tensor], Tensor], weight: Callable[[], Tensor]
    ) -> Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        return product(x.detach())

    @staticmethod
    def backward(ctx: QuantisedContext, g: Tensor) -> Gradients:
        return (g @ ctx.weight().to(g.dtype)).to(ctx.dtype), None, None


def quantised_linear(x: Tensor, product: Callable[[Tensor], Tensor], weight: Callable[[], Tensor]) -> Tensor:
    """product(x) = x W^T (+ b), with the gradient of x.  x [*n, i], weight() [o, i]."""
    return _node(_Quantised, x, product, weight)
