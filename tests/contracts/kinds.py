"""The registries that the laws run over: forms of methods, and kinds of layers. Which form meets which kind is in pairs.py."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from diffpeft.layers.carried import base_class
from diffpeft.layers.sites import parameter_names, site_of
from diffpeft.layers.slot import Piece, Slot
from diffpeft.methods import METHODS, Spec
from diffpeft.model.attach import AttachReport, attach, install, mix_of
from diffpeft.model.mix import Adapter
from diffpeft.model.plan import Plan
from diffpeft.model.target import components


class SelfAttention(nn.MultiheadAttention):
    """PyTorch's attention of a sequence to itself."""

    def forward(self, x):
        return super().forward(x, x, x)[0]


# name: how to make the layer, and the shape of an input
KINDS = {
    "linear": (lambda: nn.Linear(6, 6), (2, 3, 6)),
    "linear without bias": (lambda: nn.Linear(6, 6, bias=False), (2, 6)),
    "linear tall": (lambda: nn.Linear(4, 8), (2, 4)),
    "linear wide": (lambda: nn.Linear(8, 4), (1, 2, 2, 8)),
    "gpt-2's Conv1D": (lambda: Conv1D(8, 6), (2, 3, 6)),
    "conv1d padded": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 7)),
    "conv1d circular": (lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), (2, 4, 7)),
    "conv2d 1x1": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 5, 5)),
    "conv2d 1x1 strided": (lambda: nn.Conv2d(4, 6, 1, stride=2, padding=1), (2, 4, 5, 5)),
    "conv2d strided": (lambda: nn.Conv2d(4, 6, 3, stride=(2, 1), padding=1), (2, 4, 6, 7)),
    "conv2d dilated": (lambda: nn.Conv2d(4, 6, 3, dilation=2, padding="same", bias=False), (2, 4, 7, 6)),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 5, 5)),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 8, (3, 2), groups=4), (2, 4, 5, 5)),
    "conv2d non-square": (lambda: nn.Conv2d(4, 6, (1, 3), padding=(0, 1)), (2, 4, 5, 5)),
    "conv2d reflect": (lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect"), (2, 4, 5, 5)),
    "conv2d circular grouped": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2, padding_mode="circular"),
        (2, 4, 6, 6),
    ),
    "conv2d without a batch": (lambda: nn.Conv2d(4, 6, 3), (4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1)), (1, 2, 3, 4, 4)),
    "transposed conv1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 5)),
    "transposed conv2d": (lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=2, padding=1), (2, 4, 5, 5)),
    "transposed conv2d grouped": (lambda: nn.ConvTranspose2d(4, 8, 2, stride=2, groups=2), (2, 4, 4, 4)),
    "transposed conv3d": (lambda: nn.ConvTranspose3d(2, 4, (1, 2, 2), dilation=2), (1, 2, 3, 3, 3)),
    "embedding": (lambda: nn.Embedding(10, 6, padding_idx=0), (2, 5)),
    "attention": (lambda: SelfAttention(6, 2, batch_first=True), (2, 3, 6)),
}
LINEAR = "linear"
# the kinds by what a formula may see of them: each has a path, or an order of axes, of its own somewhere
CLASSES = {
    "matrix": ("linear", "linear without bias", "linear tall", "linear wide"),
    "stored turned": ("gpt-2's Conv1D",),
    "rows looked up": ("embedding",),
    "matrix that is read": ("attention",),
    "1x1 kernel": ("conv2d 1x1", "conv2d 1x1 strided"),
    "kernel of one or three axes": ("conv1d padded", "conv1d circular", "conv3d"),
    "kernel of two axes": (
        "conv2d strided",
        "conv2d dilated",
        "conv2d non-square",
        "conv2d reflect",
        "conv2d without a batch",
    ),
    "groups": ("conv2d grouped", "conv2d depthwise", "conv2d circular grouped", "transposed conv2d grouped"),
    "transposed": ("transposed conv1d", "transposed conv2d", "transposed conv3d"),
}
# float64 keeps 16 digits; the sums here have fewer than 1000 terms of size 1, so the two orders of summation agree to 13
EXACT = dict(rtol=1e-12, atol=1e-12)


def weight_of(module: nn.Module) -> nn.Parameter:
    """A layer's own weight."""
    return module.get_parameter(parameter_names(module)[0])


def has_bias(module: nn.Module) -> bool:
    return _op(module).bias is not None


def has_kernel(module: nn.Module) -> bool:
    """A core has something to do on these only."""
    return bool(set(getattr(module, "kernel_size", ())) - {1})


def ungrouped(module: nn.Module) -> bool:
    return getattr(module, "groups", 1) == 1


@dataclass(frozen=True)
class Form:
    """What is attached, the layers it fits, and what its laws allow it."""

    method: str
    fields: Mapping[str, Any] = field(default_factory=dict)  # of the config
    keywords: Mapping[str, Any] = field(default_factory=dict)  # of attach
    of: str = ""  # the method whose config it is, where that is not the method's own
    tensors: Callable[[Any], dict[str, torch.Tensor]] | None = None  # of a fresh one that only files hold, by its op
    fits: Callable[[nn.Module], bool] = lambda module: True
    # how far a fresh one may be from the base, for its parts cancel instead of being zero: in float64, in float32 (rtol 0); inf: it starts elsewhere
    identity: float = 0.0
    identity_single: float = 0.0
    derivative: bool = True  # whether its gradient is the derivative: DoRA's and COFT's are not, by definition
    dropout: Mapping[str, Any] = field(default_factory=dict)  # fields of the config that drop something in training


def _vector(g, axis):
    return (1, getattr(g, axis), *(1 for _ in g.kernel)) if g.kernel else (getattr(g, axis),)


def _offsets(axis):
    return lambda op: {"ia3_w": torch.zeros(_vector(op.geometry, axis)), "on_input": torch.tensor(int(axis == "in_"))}


def _glora(core):
    def draw(op):
        g, ones, r = op.geometry, [1] * len(op.geometry.kernel), 2
        p = {
            "glora_a1": torch.randn(g.in_, r, *ones),
            "glora_a2": torch.zeros(r, g.in_, *ones),
            "glora_b1": torch.randn(g.out, r, *ones),
            "glora_b2": torch.zeros(r, g.in_, *(ones if core else g.kernel)),
        }
        return {**p, "glora_bm": torch.randn(r, r, *g.kernel)} if core else p

    return draw


def _diff(op):
    return {"diff": torch.zeros(op.geometry.shape[::-1] if op.geometry.lookup else op.geometry.shape)}


def _in_place(op):
    return {"set_weight": (op.weight().t() if op.geometry.lookup else op.weight()).detach().clone()}


# where the default config of a method would hide a mistake: the scale is not 1 and fits tiny layers
_LORA, _SCALED, _PRODUCT = {"r": 2, "lora_alpha": 3}, {"r": 2, "alpha": 3}, {"r": 1, "alpha": 3}
_EXACT_OFT, _OUTPUT = {"oft_block_size": 2, "use_cayley_neumann": False}, {"side": "output"}
_TUCKER, _DORA, _DORA_IN = {"tucker": True}, {"dora": "out"}, {"dora": "in"}
# The first of each method is the one that stands for it
FORMS = {
    "lora": Form("lora", _LORA, dropout={"lora_dropout": 0.5}),
    "lora, rank-stabilised, with biases": Form(
        "lora",
        {"r": 3, "lora_alpha": 2, "use_rslora": True, "lora_bias": True, "bias": "lora_only"},
        fits=has_bias,
    ),
    "lora, tucker": Form("lora", _LORA, _TUCKER, fits=has_kernel),
    "lora, pissa": Form("lora", {**_LORA, "init_lora_weights": "pissa"}, identity=1e-12, identity_single=1e-5),
    "lora, olora": Form("lora", {**_LORA, "init_lora_weights": "olora"}, identity=1e-12, identity_single=1e-5),
    # its tensors are made, and stored, in float32
    "lora, orthogonal": Form("lora", {**_LORA, "init_lora_weights": "orthogonal"}, identity=1e-6, identity_single=1e-5),
    "dora": Form("dora", {**_LORA, "use_dora": True}, derivative=False, dropout={"lora_dropout": 0.5}),
    "dora, in": Form("dora", _LORA, _DORA_IN, derivative=False),
    "dora, tucker": Form("dora", _LORA, {**_DORA, **_TUCKER}, fits=has_kernel, derivative=False),
    "dora over loha": Form("dora", _SCALED, _DORA, of="loha", derivative=False),
    "dora over loha, in": Form("dora", _SCALED, _DORA_IN, of="loha", derivative=False),
    "dora over lokr": Form("dora", _SCALED, _DORA, of="lokr", derivative=False),
    "dora over lokr, in": Form("dora", _SCALED, _DORA_IN, of="lokr", derivative=False),
    "adalora": Form("adalora", {"init_r": 2, "lora_alpha": 3, "total_step": 4}),
    "loha": Form("loha", _SCALED, dropout={"rank_dropout": 0.5}),
    "loha, tucker": Form(
        "loha", {**_SCALED, "use_effective_conv2d": True}, fits=has_kernel, dropout={"module_dropout": 0.5}
    ),
    "lokr": Form("lokr", _PRODUCT, dropout={"rank_dropout": 0.5, "rank_dropout_scale": True}),
    "lokr, both factored": Form("lokr", {**_PRODUCT, "decompose_both": True}),
    "lokr, both full": Form("lokr", {**_PRODUCT, "r": 9}, dropout={"module_dropout": 0.5}),
    "lokr, factor 2, tucker": Form(
        "lokr", {**_PRODUCT, "decompose_factor": 2, "use_effective_conv2d": True}, fits=has_kernel
    ),
    "oft": Form("oft", _EXACT_OFT, dropout={"module_dropout": 0.5}),
    "oft, neumann": Form("oft", {"oft_block_size": 2}),
    "oft, shared": Form("oft", {**_EXACT_OFT, "block_share": True}),
    "oft, constrained input": Form("oft", {"oft_block_size": 2, "coft": True, "eps": 0.3}, derivative=False),
    "oft, output": Form("oft", {"oft_block_size": 2}, _OUTPUT, dropout={"module_dropout": 0.5}),
    "oft, output, rescaled": Form("oft", {"oft_block_size": 2}, {**_OUTPUT, "rescale": True, "constraint": 0.05}),
    "boft": Form("boft", {"boft_block_size": 2, "boft_n_butterfly_factor": 1}, dropout={"boft_dropout": 0.5}),
    "boft, output": Form("boft", {"boft_block_size": 2}, _OUTPUT),
    "boft, output, rescaled": Form("boft", {"boft_block_size": 2}, {**_OUTPUT, "rescale": True, "constraint": 0.1}),
    # two reflections along one vector: the identity in exact arithmetic; by Gram-Schmidt no start is one
    "hra": Form("hra", {"r": 2}, identity=1e-6, identity_single=1e-5),
    "hra, gram-schmidt": Form("hra", {"r": 2, "apply_GS": True}, identity=math.inf, identity_single=math.inf),
    "vera": Form("vera", {"r": 3, "d_initial": 0.7}, dropout={"vera_dropout": 0.5}),
    "c3a": Form("c3a", {"block_size": 2, "init_weights": True}),
    "c3a, random start": Form("c3a", {"block_size": 2}, identity=math.inf, identity_single=math.inf),
    "miss": Form("miss", {"r": 3}, dropout={"miss_dropout": 0.5}),
    "miss, mini": Form("miss", {"r": 2, "init_weights": "mini", "mini_r": 2}),
    "miss, bat": Form("miss", {"r": 2, "init_weights": "bat"}),
    "road": Form("road", {"group_size": 2}),
    "road, 2": Form("road", {"group_size": 2, "variant": "road_2"}),
    "road, 4": Form("road", {"group_size": 2, "variant": "road_4"}),
    "delora": Form("delora", {"r": 4, "delora_lambda": 3}, dropout={"module_dropout": 0.5}),
    "hira": Form("hira", {"r": 2}, dropout={"hira_dropout": 0.5}),
    "ia3": Form("ia3"),
    "ia3, feedforward": Form("ia3", {"feedforward_modules": ".*"}),
    "ia3, lycoris": Form("ia3", tensors=_offsets("out")),
    "ia3, lycoris, on input": Form("ia3", tensors=_offsets("in_")),
    "glora": Form("glora", tensors=_glora(core=False), fits=ungrouped),
    "glora, tucker": Form("glora", tensors=_glora(core=True), fits=lambda m: ungrouped(m) and has_kernel(m)),
    "full": Form("full", tensors=_diff),
    "full, in place": Form("full", tensors=_in_place),
}
ON_NORMS = ("norm",)  # see test_norms.py
METHOD_FORMS = {
    method: next(name for name, form in FORMS.items() if form.method == method)
    for method in METHODS
    if method not in ON_NORMS
}


def fits(form: str, kind: str) -> bool:
    """Whether a form has something to do on a kind that another form does not do."""
    return FORMS[form].fits(example(kind))


@functools.cache
def example(kind: str) -> nn.Module:
    """A layer of this kind, to be looked at."""
    return KINDS[kind][0]()


def config(form: str, **fields):
    """The config of a form."""
    chosen = FORMS[form]
    return METHODS[chosen.of or chosen.method].config(**{**chosen.fields, **fields})


def give(model, form="lora", name="default", targets=("0",), **fields) -> AttachReport:
    """A fresh adapter of this form."""
    chosen = FORMS[form]
    if chosen.tensors is None:
        inside = ["out_proj"]  # of an attention
        return attach(model, config(form, **fields), name, list(targets), inside, **chosen.keywords)
    tensors = {layer: chosen.tensors(_op(model.get_submodule(layer))) for layer in targets}
    return put(model, chosen.method, tensors, name)


def put(model, method, tensors, name="default", alpha=3.0, options=None) -> AttachReport:
    """An adapter of these tensors, {layer: {role: tensor}}, as loading does it."""
    ((component, _),), slots = components(model).items(), {}
    for layer, p in tensors.items():
        spec = Spec(_op(model.get_submodule(layer)).geometry, alpha, options or {})
        assert not METHODS[method].check(p, spec)
        slots[layer] = Slot([Piece(method, METHODS[method].adopt(p, spec), alpha, spec)], trainable=True)
    plan, modules = Plan(), {layer: model.get_submodule(layer) for layer in slots}
    install(plan, component, modules, slots, mix_of(model), Adapter(name, tuple(slots)), 1.0)
    plan.commit()
    own = [p for slot in slots.values() for p in slot.parameters()]
    return AttachReport(name, tuple(slots), sum(p.numel() for p in own), sum(p.numel() * p.element_size() for p in own))


def _op(module):
    return site_of(base_class(module))(module)


def layer(kind: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, torch.Tensor]:
    """A model of one layer, and an input."""
    make, shape = KINDS[kind]
    module = make()
    if isinstance(module, Conv1D):
        nn.init.normal_(module.weight), nn.init.normal_(module.bias)
    x = torch.randint(1, 10, shape) if isinstance(module, nn.Embedding) else torch.randn(shape, dtype=dtype)
    return nn.Sequential(module).to(dtype).requires_grad_(False), x


class Block(nn.Module):
    """A residual block, as repeated in real models."""

    def __init__(self, d: int = 8):
        super().__init__()
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


def blocks(n: int = 3, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    return nn.Sequential(*(Block() for _ in range(n))).to(dtype).requires_grad_(False)
