"""The laws on normalising layers: `norm` and `full` on every class that carries one weight a feature."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from diffusers.models.normalization import FP32LayerNorm, RMSNorm
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

import diffpeft
from diffpeft import AdapterStateError, LoraConfig, attach, combine, detach, set_adapters, to_lora
from diffpeft.layers.sites import SITES, site_of
from diffpeft.layers.slot import Piece, Slot
from diffpeft.methods import METHODS, Geometry, Spec
from diffpeft.model.state import entries_of, parameters_of, slots_of
from diffpeft.model.target import targets_of
from tests.contracts.kinds import EXACT, put
from tests.pairwise import params

KINDS = {
    "layer norm": (lambda: nn.LayerNorm(6), (2, 3, 6)),
    "layer norm of two axes": (lambda: nn.LayerNorm((2, 3)), (4, 2, 3)),
    "layer norm without bias": (lambda: nn.LayerNorm(6, bias=False), (2, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 6), (2, 6, 3, 4)),
    "rms norm": (lambda: nn.RMSNorm(6), (2, 3, 6)),
    "batch norm": (lambda: nn.BatchNorm2d(6).eval(), (2, 6, 3, 3)),
    "instance norm": (lambda: nn.InstanceNorm1d(6, affine=True), (2, 6, 5)),
    "diffusers' rms norm": (lambda: RMSNorm(6, eps=1e-6), (2, 3, 6)),
    "diffusers' rms norm with bias": (lambda: RMSNorm(6, eps=1e-6, bias=True), (2, 3, 6)),
    "diffusers' fp32 layer norm": (lambda: FP32LayerNorm(6), (2, 3, 6)),
    "t5": (lambda: T5LayerNorm(6), (2, 3, 6)),
    "qwen2": (lambda: Qwen2RMSNorm(6), (2, 3, 6)),
    "gemma2": (lambda: Gemma2RMSNorm(6), (2, 3, 6)),  # multiplies by 1 + w
}
SINGLE = ("diffusers", "t5", "qwen2", "gemma2")  # they compute in fp32 whatever they are given
every_kind = pytest.mark.parametrize("kind", KINDS)
FORMS = {
    "norm": ("norm", ("w_norm",)),
    "norm, with bias": ("norm", ("w_norm", "b_norm")),
    "norm, bias alone": ("norm", ("b_norm",)),
    "full": ("full", ("diff",)),
    "full, in place": ("full", ("set_weight",)),
}
every_cell = pytest.mark.parametrize(
    ("form", "kind"),
    [
        (form, kind)
        for form in FORMS
        for kind, (make, _) in KINDS.items()
        if "bias" not in form or getattr(make(), "bias", None) is not None
    ],
)


def layer(kind, dtype=torch.float64):
    make, shape = KINDS[kind]
    module = make()
    for p in module.parameters():
        nn.init.normal_(p, 1.0, 0.5)
    return nn.Sequential(module).to(dtype).requires_grad_(False), torch.randn(shape, dtype=dtype)


def give(model, form, name="default", fresh=False, dtype=torch.float64):
    method, roles = FORMS[form]
    n = model[0].weight.numel()
    shape = (n, 1) if method == "full" else (n,)
    p = {role: torch.zeros(shape, dtype=dtype) if fresh else torch.randn(shape, dtype=dtype) for role in roles}
    if fresh and "set_weight" in p:
        p["set_weight"] = model[0].weight.detach().clone().view(shape)
    return put(model, method, {"0": p}, name)


def defined(model, order):
    """The layer with the weight and bias that the definition gives."""
    plain = copy.deepcopy(model)
    diffpeft.unload(plain)
    m = plain[0]
    for name, s in order:
        slot = slots_of(model, name)["0"]
        p = {role: t.detach() for role, t in slot.tensors.items()}
        change = p.get("w_norm", p.get("diff", torch.zeros(m.weight.numel(), dtype=m.weight.dtype)))
        if "set_weight" in p:
            change = p["set_weight"].view(-1) - m.weight.view(-1)
        m.weight.data += s * change.view(m.weight.shape).to(m.weight.dtype)
        if "b_norm" in p:
            m.bias.data += s * p["b_norm"].view(m.bias.shape).to(m.bias.dtype)
    return plain


def near(kind):
    # classes that cast to fp32 keep 7 digits, wherever they are given the same weight
    return dict(rtol=1e-5, atol=1e-5) if kind.startswith(SINGLE) else EXACT


@every_cell
def test_a_fresh_one_and_strength_0_change_nothing(form, kind):
    model, x = layer(kind)
    plain = model(x)
    give(model, form, fresh=True)
    assert torch.equal(model(x), plain)
    give(model, form, "other")
    assert not torch.equal(model(x), plain)
    set_adapters(model, {"other": 0.0})
    assert torch.equal(model(x), plain)


@every_cell
def test_strength_is_linear_in_the_weight_and_fusing_is_exact(form, kind, trace):
    model, x = layer(kind)
    plain, before = model(x), trace(model)
    give(model, form)
    for s in (1.0, 0.5, -0.7, 2.5):
        set_adapters(model, {"default": s})
        want, bytes_ = model(x), model[0].weight.clone()
        torch.testing.assert_close(want, defined(model, [("default", s)])(x), **near(kind))
        diffpeft.fuse(model)
        torch.testing.assert_close(model(x), want, **near(kind))
        diffpeft.unfuse(model)
        assert torch.equal(model[0].weight, bytes_) and torch.equal(model(x), want)
    detach(model, "default")
    assert trace(model) == before and torch.equal(model(x), plain)


@every_kind
def test_they_act_in_order(kind):
    model, x = layer(kind)
    order = []
    for i, form in enumerate(f for f in FORMS if "bias" not in f or getattr(model[0], "bias", None) is not None):
        give(model, form, f"a{i}")
        order.append((f"a{i}", (-1) ** i * (0.4 + i / 10)))
    for mix in (order, order[::-1]):
        set_adapters(model, dict(mix))
        torch.testing.assert_close(model(x), defined(model, mix)(x), **near(kind))


@every_cell
def test_gradients_are_those_of_the_definition(form, kind):
    model, x = layer(kind)
    give(model, form)
    set_adapters(model, {"default": 0.7})
    (own,) = [p for role, p in slots_of(model, "default")["0"].tensors.items() if role == FORMS[form][1][-1]]
    direction = torch.randn_like(model(x))
    (g,) = torch.autograd.grad((model(x) * direction).sum(), own)
    twin = defined(model, [("default", 0.7)])
    target = (twin[0].bias if "bias" in form else twin[0].weight).requires_grad_()
    (want,) = torch.autograd.grad((twin(x) * direction).sum(), target)
    torch.testing.assert_close(g.flatten(), 0.7 * want.flatten(), **near(kind))


@every_cell
def test_in_half_precision_the_weight_is_rounded_once(form, kind):
    for dtype in (torch.bfloat16, torch.float16):
        model, x = layer(kind, dtype)
        give(model, form, dtype=torch.float32)
        y = model(x)
        assert y.dtype == model.__class__(diffpeft_free(model))(x).dtype and y.isfinite().all()
        diffpeft.fuse(model)
        fused = model(x)
        # without a bias the two are the same computation; with one the forward rounds its change apart
        bound = 8 * max(fused.abs().max().item(), 1) * torch.finfo(dtype).eps if "bias" in form else 0
        torch.testing.assert_close(y, fused, rtol=0, atol=bound)


def diffpeft_free(model):
    plain = copy.deepcopy(model)
    diffpeft.unload(plain)
    return plain[0]


@every_kind
def test_autocast_does_to_it_what_it_does_to_the_layer(kind):
    model, x = layer(kind, torch.float32)
    give(model, "norm", dtype=torch.float32)
    twin = defined(model, [("default", 1.0)])
    with torch.autocast("cpu", torch.bfloat16):
        y, want = model(x), twin(x)
    assert y.dtype == want.dtype
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)


# classes of torch, of diffusers and of transformers; the others are compiled as these are
@pytest.mark.parametrize(
    "kind",
    params([(kind,) for kind in KINDS], [("layer norm",), ("group norm",), ("diffusers' rms norm",), ("gemma2",)]),
)
def test_compiled_equals_eager_and_strengths_do_not_compile_anew(kind):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, x = layer(kind, torch.float32)
    give(model, "norm", dtype=torch.float32)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for s in (1.0, 0.3, -2.0):
        set_adapters(model, {"default": s})
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@every_kind
def test_a_copy_is_one_of_its_own(kind):
    model, x = layer(kind)
    plain = model(x)
    give(model, "norm")
    want = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), want)
        diffpeft.unload(twin)
        assert torch.equal(twin(x), plain) and torch.equal(model(x), want)


def test_a_bias_that_the_layer_has_no_place_for_acts_and_is_not_fused():
    model, x = layer("layer norm without bias")
    plain, b = model(x), torch.randn(6, dtype=torch.float64)
    put(model, "norm", {"0": {"b_norm": b}})
    torch.testing.assert_close(model(x), plain + b, **EXACT)
    with pytest.raises(AdapterStateError, match="adds a bias"):
        diffpeft.fuse(model)


def test_attach_chooses_no_norm():
    model = nn.Sequential(nn.Linear(6, 6), *(make() for make, _ in KINDS.values()))
    assert set(targets_of(model)) == {"0"}
    assert attach(model, LoraConfig(r=1), targets="full").layers == ("0",)


def test_every_class_is_here():
    kinds = {cls for site in SITES if not site.targets for cls in site.kinds}
    assert all(any(isinstance(make(), cls) for make, _ in KINDS.values()) for cls in kinds)
    assert all(not site_of(type(make())).targets for make, _ in KINDS.values())


def test_becoming_a_lora_leaves_a_norm_a_norm(randomize):
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.LayerNorm(6)).double().requires_grad_(False)
    x = torch.randn(4, 6, dtype=torch.float64)
    attach(model, LoraConfig(r=2, bias="all"), targets=["0"])
    randomize(model)
    put(model, "norm", {"1": {"w_norm": torch.randn(6).double(), "b_norm": torch.randn(6).double()}}, "n")
    set_adapters(model, {"default": 1.0, "n": 1.0})
    want = model(x)
    combine(model, {"default": 1.0, "n": 1.0}, name="both")
    assert {layer: slot.methods for layer, slot in slots_of(model, "both").items()} == {
        "0": ("lora",),
        "1": ("norm",),
        "2": ("full",),
    }
    set_adapters(model, {"both": 1.0})
    torch.testing.assert_close(model(x), want, **EXACT)
    for name in ("default", "n"):
        to_lora(model, name, energy=0.9999)
    assert slots_of(model, "n")["1"].methods == ("norm",) and slots_of(model, "default")["1"].methods == ("full",)
    set_adapters(model, {"default": 1.0, "n": 1.0})
    torch.testing.assert_close(model(x), want, rtol=0.1, atol=0.5)


def test_a_change_of_the_bias_alone_is_an_entry_and_a_piece_of_its_own(randomize):
    model = nn.Sequential(nn.Linear(6, 6), nn.GroupNorm(2, 6)).requires_grad_(False)
    attach(model, LoraConfig(r=2, bias="all"), targets=["0"])
    randomize(model)
    slot = slots_of(model, "default")["1"]
    (entry,) = entries_of("1", slot)
    assert entry.method == "full" and list(entry.tensors) == ["diff_b"]
    assert (
        METHODS["full"].check({}, Spec(Geometry(6, 1))) == "" and METHODS["full"].adopt({}, Spec(Geometry(6, 1))) == {}
    )
    again = Slot([Piece("full", {}, None, Spec(Geometry(6, 1)))], {"diff_b": slot.diff_b.detach()}, trainable=False)
    assert (again.methods, again.parts, again.rank, again.scale) == (("full",), (), 0, 1.0)
    (back,) = entries_of("1", again)
    assert (back.method, list(back.tensors), back.options) == ("full", ["diff_b"], {})
    assert len(parameters_of(model, "default")) == 4
