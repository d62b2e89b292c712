"""The registries that the laws run over: every method on every kind of layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from diffpeft.layers.carried import base_class
from diffpeft.layers.site import SITES, site_of
from diffpeft.layers.slot import Piece, Slot
from diffpeft.methods import METHODS, Spec
from diffpeft.model.attach import AttachReport, attach, install, mix_of
from diffpeft.model.mix import Adapter
from diffpeft.model.plan import Plan
from diffpeft.model.target import components

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
}
LINEAR = "linear"

_SCALED = {
    "r": 2,
    "alpha": 3,
}  # where the default config of a method would hide a mistake: the scale is not 1 and fits tiny layers
# what is attached: (method, config fields, keywords of attach). The first of each method is the one that stands for it
FORMS = {
    "lora": ("lora", {"r": 2, "lora_alpha": 3}, {}),
    "lora, rank-stabilised, with biases": (
        "lora",
        {"r": 3, "lora_alpha": 2, "use_rslora": True, "lora_bias": True, "bias": "lora_only"},
        {},
    ),
    "lora, tucker": ("lora", {"r": 2, "lora_alpha": 3}, {"tucker": True}),
    "lora, pissa": ("lora", {"r": 2, "lora_alpha": 3, "init_lora_weights": "pissa"}, {}),
    "lora, olora": ("lora", {"r": 2, "lora_alpha": 3, "init_lora_weights": "olora"}, {}),
    "lora, orthogonal": ("lora", {"r": 2, "lora_alpha": 3, "init_lora_weights": "orthogonal"}, {}),
    "dora": ("dora", {"r": 2, "lora_alpha": 3, "use_dora": True}, {}),
    "dora, in": ("dora", {"r": 2, "lora_alpha": 3}, {"dora": "in"}),
    "dora, tucker": ("dora", {"r": 2, "lora_alpha": 3}, {"dora": "out", "tucker": True}),
    "dora over loha": ("dora", _SCALED, {"dora": "out", "of": "loha"}),
    "dora over loha, in": ("dora", _SCALED, {"dora": "in", "of": "loha"}),
    "dora over lokr": ("dora", _SCALED, {"dora": "out", "of": "lokr"}),
    "dora over lokr, in": ("dora", _SCALED, {"dora": "in", "of": "lokr"}),
    "adalora": ("adalora", {"init_r": 2, "lora_alpha": 3, "total_step": 4}, {}),
    "loha": ("loha", _SCALED, {}),
    "loha, tucker": ("loha", {**_SCALED, "use_effective_conv2d": True}, {}),
    "lokr": ("lokr", {**_SCALED, "r": 1}, {}),
    "lokr, both factored": ("lokr", {**_SCALED, "r": 1, "decompose_both": True}, {}),
    "lokr, both full": ("lokr", {**_SCALED, "r": 9}, {}),
    "lokr, factor 2, tucker": (
        "lokr",
        {**_SCALED, "r": 1, "decompose_factor": 2, "use_effective_conv2d": True},
        {},
    ),
    "oft": ("oft", {"oft_block_size": 2, "use_cayley_neumann": False}, {}),
    "oft, neumann": ("oft", {"oft_block_size": 2}, {}),
    "oft, shared": ("oft", {"oft_block_size": 2, "block_share": True, "use_cayley_neumann": False}, {}),
    "oft, constrained input": ("oft", {"oft_block_size": 2, "coft": True, "eps": 0.3}, {}),
    "oft, output": ("oft", {"oft_block_size": 2}, {"side": "output"}),
    "oft, output, rescaled": (
        "oft",
        {"oft_block_size": 2},
        {"side": "output", "rescale": True, "constraint": 0.05},
    ),
    "boft": ("boft", {"boft_block_size": 2, "boft_n_butterfly_factor": 1}, {}),
    "boft, output": ("boft", {"boft_block_size": 2}, {"side": "output"}),
    "boft, output, rescaled": ("boft", {"boft_block_size": 2}, {"side": "output", "rescale": True, "constraint": 0.1}),
    "hra": ("hra", {"r": 2}, {}),
    "hra, gram-schmidt": ("hra", {"r": 2, "apply_GS": True}, {}),
    "ia3": ("ia3", {}, {}),
    "ia3, feedforward": ("ia3", {"feedforward_modules": ".*"}, {}),
    "ia3, lycoris": ("ia3", {}, {}),
    "ia3, lycoris, on input": ("ia3", {}, {}),
    "glora": ("glora", {}, {}),
    "glora, tucker": ("glora", {}, {}),
    "vera": ("vera", {"r": 3, "d_initial": 0.7}, {}),
    "full": ("full", {}, {}),
    "full, in place": ("full", {}, {}),
}
# what only files hold: the tensors [by role] of a fresh one, as a file gives them
FILES = {
    "ia3, lycoris": lambda op: {"ia3_w": torch.zeros(_vector(op.geometry, "out")), "on_input": torch.tensor(0)},
    "ia3, lycoris, on input": lambda op: {
        "ia3_w": torch.zeros(_vector(op.geometry, "in_")),
        "on_input": torch.tensor(1),
    },
    "glora": lambda op: _glora(op.geometry, core=False),
    "glora, tucker": lambda op: _glora(op.geometry, core=True),
    "full": lambda op: {"diff": torch.zeros(op.geometry.shape[::-1] if op.geometry.lookup else op.geometry.shape)},
    "full, in place": lambda op: {
        "set_weight": (op.weight().t() if op.geometry.lookup else op.weight()).detach().clone()
    },
}
# fresh adapters whose parts cancel instead of being zero: how far their layers may be from the base's, in the dtype of the base; other forms change
# no bit. In float64 the tensors themselves are of float32. STARTS: forms that have no start that changes nothing
FRESH = {
    "lora, orthogonal": {torch.float64: 1e-6},
    "lora, pissa": {torch.float64: 1e-12},
    "lora, olora": {torch.float64: 1e-12},
    # two reflections along one vector: both vectors are rounded alike, the sums over features are not
    "hra": {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 0.05},
}
STARTS = ("hra, gram-schmidt",)
ON_NORMS = ("norm",)  # see test_norms.py
METHOD_FORMS = {m: next(form for form, row in FORMS.items() if row[0] == m) for m in METHODS if m not in ON_NORMS}


def fits(form: str, kind: str) -> bool:
    """Whether a form has something to do on a kind that another form does not do (a core needs a kernel)."""
    module = KINDS[kind][0]()
    if "biases" in form:
        return getattr(module, "bias", None) is not None
    if "glora" in form and getattr(module, "groups", 1) > 1:
        return False
    return "tucker" not in form or bool(set(getattr(module, "kernel_size", ())) - {1})


every_method = pytest.mark.parametrize("form", METHOD_FORMS.values())
every_form = pytest.mark.parametrize("form", FORMS)
every_kind = pytest.mark.parametrize("kind", KINDS)
every_cell = pytest.mark.parametrize(
    ("form", "kind"), [(form, kind) for form in FORMS for kind in KINDS if fits(form, kind)]
)
every_method_cell = pytest.mark.parametrize(
    ("form", "kind"), [(form, kind) for form in METHOD_FORMS.values() for kind in KINDS if fits(form, kind)]
)


def config(form: str, **fields):
    """The config of a form."""
    method, own, keywords = FORMS[form]
    return METHODS[keywords.get("of", method)].config(**{**own, **fields})


def keywords(form: str):
    """The keywords of attach that a form needs."""
    return {k: v for k, v in FORMS[form][2].items() if k != "of"}


def give(model, form="lora", name="default", targets=("0",), **fields) -> AttachReport:
    """A fresh adapter of this form."""
    if form not in FILES:
        return attach(model, config(form, **fields), name, targets=list(targets), **keywords(form))
    return put(model, FORMS[form][0], {layer: FILES[form](_op(model.get_submodule(layer))) for layer in targets}, name)


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


def _vector(g, axis):
    return (1, getattr(g, axis), *(1 for _ in g.kernel)) if g.kernel else (getattr(g, axis),)


def _glora(g, core):
    ones, r = [1] * len(g.kernel), 2
    p = {
        "glora_a1": torch.randn(g.in_, r, *ones),
        "glora_a2": torch.zeros(r, g.in_, *ones),
        "glora_b1": torch.randn(g.out, r, *ones),
        "glora_b2": torch.zeros(r, g.in_, *(ones if core else g.kernel)),
    }
    return {**p, "glora_bm": torch.randn(r, r, *g.kernel)} if core else p


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


def test_every_method_has_a_form():
    assert set(METHOD_FORMS) | set(ON_NORMS) == set(METHODS)


def test_every_site_has_a_kind():
    kinds = {cls for site in SITES if site.targets for cls in site.kinds if isinstance(cls, type)}
    assert kinds <= {type(make()) for make, _ in KINDS.values()}
