"""LoHa against PEFT and LyCORIS, in float64."""

import itertools

import pytest
import torch
from oracles import (
    INPUTS,
    LAYERS,
    close,
    fresh,
    geometry_of,
    layer_of,
    op_on,
    peft_layer,
    peft_tensors,
    product,
    random,
    site,
)
from peft import LoHaConfig as PeftConfig

from diffpeft.methods import Geometry, LoHa, LoHaConfig, Spec
from diffpeft.methods.forms import Factors, Hadamard
from diffpeft.methods.linalg import hadamard

EMBEDDING = Geometry(6, 40, lookup=True)
CANONICAL = {  # layers that PEFT has no LoHa for
    "conv3d": Geometry(8, 6, (3, 1, 2)),
    "grouped conv3d": Geometry(8, 6, (2, 2, 2), groups=2),
    "embedding": EMBEDDING,
}


def shapes(p):
    return {role: tuple(t.shape) for role, t in p.items()}


def made(geometry, r=3, tucker=False):
    return random(shapes(fresh(LoHa, LoHaConfig(r=r), geometry, tucker=tucker).tensors))


@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_update_is_pefts(kind, tucker):
    """At a scale that fp32 holds exactly, as PEFT rounds it to fp32."""
    layer = layer_of(kind)
    spec = Spec(geometry_of(layer), alpha=1.5)
    p = made(spec.geometry, tucker=tucker)
    theirs = peft_layer("loha", layer, PeftConfig(r=3, alpha=1.5, use_effective_conv2d=tucker), p)
    close(LoHa.scale(p, spec) * LoHa.delta(p, spec), theirs.get_delta_weight("default"))
    x = torch.randn(*INPUTS[kind], dtype=torch.float64)
    close(layer(x) + LoHa.scale(p, spec) * op_on(layer, x, LoHa.delta(p, spec)), theirs(x))


@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d", "wide kernel", "1x1"])
def test_the_update_is_lycoris(kind, tucker):
    """Its forward pass."""
    from lycoris.modules.loha import LohaModule

    layer = layer_of(kind)
    spec = Spec(geometry_of(layer), alpha=5.0)
    theirs = LohaModule("layer", layer, lora_dim=3, alpha=5.0, use_tucker=tucker).double()
    p = random(shapes({role: t for role, t in theirs.named_parameters() if role in LoHa.roles}))
    theirs.load_state_dict({**theirs.state_dict(), **p})
    x = torch.randn(*INPUTS[kind], dtype=torch.float64)
    bare = layer(x)
    theirs.apply_to()
    assert not LoHa.check(p, spec)
    p = LoHa.adopt(p, spec)
    close(bare + LoHa.scale(p, spec) * op_on(layer, x, LoHa.delta(p, spec)), layer(x))


def test_merging_in_lycoris_applies_the_scale_twice():
    """Why the forward pass is the oracle above: LyCORIS 4.1.3 disagrees with itself."""
    from lycoris.modules.loha import LohaModule

    layer = layer_of("linear")
    spec = Spec(geometry_of(layer), alpha=5.0)
    theirs = LohaModule("layer", layer, lora_dim=3, alpha=5.0).double()
    p = made(spec.geometry)
    theirs.load_state_dict({**theirs.state_dict(), **p})
    scale = LoHa.scale(p, spec)
    close(theirs.get_diff_weight(shape=spec.geometry.shape)[0], scale**2 * LoHa.delta(p, spec), rtol=1e-6)


@pytest.mark.parametrize("init", [True, False])
@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_fresh_loha_has_pefts_tensors(kind, tucker, init):
    """The same names, shapes and, from the same seed, values."""
    layer = LAYERS[kind]()
    chosen = dict(r=4, alpha=2, use_effective_conv2d=tucker, init_weights=init)
    torch.manual_seed(1)
    theirs = peft_tensors(peft_layer("loha", layer, PeftConfig(**chosen)))
    torch.manual_seed(1)
    ours = fresh(LoHa, LoHaConfig(**chosen), geometry_of(layer))
    assert shapes(ours.tensors) == shapes(theirs) and ours.alpha == 2.0 and not ours.options
    for role, t in theirs.items():
        torch.testing.assert_close(ours.tensors[role], t)
    assert LoHa.delta(ours.tensors, Spec(geometry_of(layer))).any() != init


@pytest.mark.parametrize("geometry", CANONICAL.values(), ids=CANONICAL)
@pytest.mark.parametrize("tucker", [False, True])
def test_a_fresh_loha_on_any_other_layer_changes_nothing_and_is_accepted(geometry, tucker):
    f = fresh(LoHa, LoHaConfig(r=2), geometry, tucker=tucker)
    assert ("hada_t1" in f.tensors) == (tucker and not geometry.lookup)
    delta = LoHa.delta(f.tensors, Spec(geometry, f.alpha))
    assert delta.shape == geometry.shape and not delta.any() and not LoHa.check(f.tensors, Spec(geometry))


def test_patterns_dropouts_and_the_generator():
    config = LoHaConfig(rank_pattern={"to_q": 2}, alpha_pattern={"b.to_q": 3}, rank_dropout=0.1, module_dropout=0.2)
    a, b = (fresh(LoHa, config, Geometry(4, 4), name) for name in ("a.b.to_q", "a.to_k"))
    assert (LoHa.rank(a.tensors), a.alpha, LoHa.rank(b.tensors), b.alpha) == (2, 3.0, 8, 8.0)
    assert a.options == {"rank_dropout": 0.1, "module_dropout": 0.2, "rank_dropout_scale": True}

    from diffpeft.methods import Site

    def drawn():
        site = Site("layer", Geometry(4, 4), lambda: None, torch.Generator().manual_seed(3))
        return LoHa.init(config, site).tensors

    for role, t in drawn().items():
        assert torch.equal(t, drawn()[role])


@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("kind", [*LAYERS, *CANONICAL])
def test_factors_multiply_to_the_update(kind, tucker):
    g = CANONICAL.get(kind) or geometry_of(layer_of(kind))
    p = made(g, tucker=tucker)
    A, B = LoHa.factors(p, Spec(g))
    assert A.shape == (9, *g.shape[1:]) and B.shape == (g.out, 9, *(1 for _ in g.kernel))
    close(product(A, B, g), LoHa.delta(p, Spec(g)))


def test_factors_on_a_linear_layer_give_the_updates_output():
    g = Geometry(6, 10)
    p, x, op = made(g), torch.randn(2, 3, 10, dtype=torch.float64), site(g)
    A, B = LoHa.factors(p, Spec(g))
    close(op.add(torch.zeros(2, 3, 6).double(), op.down(x, A), B, 0.5), 0.5 * x @ LoHa.delta(p, Spec(g)).T)


@pytest.mark.parametrize("gate", [0.5, torch.tensor([0.5], dtype=torch.float64)], ids=["number", "tensor"])
def test_rows_are_looked_up_without_the_update(gate):
    p, x, y = made(EMBEDDING), torch.randint(40, (2, 7)), torch.randn(2, 7, 6, dtype=torch.float64)
    delta = LoHa.delta(p, Spec(EMBEDDING))
    close(site(EMBEDDING).plus(y.clone(), x, LoHa.form(p, Spec(EMBEDDING), 14), gate), y + 0.5 * delta.T[x])


def test_gradients_of_both_forms_agree():
    g = Geometry(6, 10, (3,))
    grads = []
    for form in (lambda p: LoHa.delta(p, Spec(g)), lambda p: product(*LoHa.factors(p, Spec(g)), g)):
        torch.manual_seed(0)
        p = {role: t.requires_grad_() for role, t in made(g, tucker=True).items()}
        grads.append(torch.autograd.grad(form(p).square().sum(), list(p.values())))
    for a, b in zip(*grads, strict=True):
        close(a, b)


STORED = [  # of a file, on a layer, as PEFT has them
    (Geometry(6, 5, (3, 2)), False, {"hada_w1_b": (3, 5, 3, 2), "hada_w2_a": (6, 3, 1, 1)}),
    (Geometry(6, 5, (3,)), True, {"hada_t1": (3, 3, 3), "hada_t2": (3, 3, 3, 1)}),
    (Geometry(6, 5, (1, 1)), False, {"hada_w1_b": (3, 5, 1, 1)}),
    (Geometry(6, 5), False, {"hada_w1_b": (3, 5, 1, 1), "hada_w1_a": (6, 3, 1, 1)}),
    (Geometry(6, 5, (3, 2)), True, {"hada_w1_b": (3, 5, 1, 1)}),
]


@pytest.mark.parametrize("geometry, tucker, stored", STORED)
def test_stored_shapes_are_adopted(geometry, tucker, stored):
    p = made(geometry, tucker=tucker)
    file = {role: t.reshape(stored.get(role, t.shape)) for role, t in p.items()}
    assert not LoHa.check(file, Spec(geometry))
    adopted = LoHa.adopt({**file, "another": torch.zeros(1)}, Spec(geometry))
    assert shapes(adopted) == {**shapes(p), "another": (1,)}
    close(LoHa.delta(adopted, Spec(geometry)), LoHa.delta(p, Spec(geometry)))


@pytest.mark.parametrize("tucker", [False, True])
def test_every_shape_that_does_not_fit_is_named(tucker):
    g = Geometry(6, 5, (3, 2))
    p = made(g, tucker=tucker)
    for role, axis in itertools.product(p, (0, 1)):
        larger = p[role].repeat(*(2 if i == axis else 1 for i in range(p[role].dim())))
        assert role in LoHa.check({**p, role: larger}, Spec(g)) or role == "hada_w1_b"
        assert LoHa.check({**p, role: larger}, Spec(g))
        assert LoHa.check({**p, role: torch.zeros(())}, Spec(g)) and LoHa.check({**p, role: torch.zeros(0, 5)}, Spec(g))
        assert f"{role} missing" in LoHa.check({r: t for r, t in p.items() if r != role}, Spec(g)) or "hada_t" in role
    assert LoHa.check(made(Geometry(6, 5, (2, 3))), Spec(g)) == "" and LoHa.check(
        {**p, **{f"hada_t{j}": torch.zeros(3, 3, 2, 3) for j in (1, 2)}}, Spec(g)
    )


ROUTES = [  # measured, forward and backward on one core: see knowledge/performance
    (Geometry(1280, 1280), 16, torch.float32, 1024, "factors"),
    (Geometry(2048, 2048), 16, torch.float32, 1024, "factors"),
    (Geometry(640, 640), 16, torch.float32, 4096, "weight"),
    (Geometry(320, 320, (3, 3)), 16, torch.float32, 1024, "weight"),
    (Geometry(1280, 1280, (3, 3)), 16, torch.bfloat16, 256, "factors"),
    (Geometry(1280, 1280), 16, torch.bfloat16, 1024, "factors"),
    (Geometry(640, 640), 4, torch.float32, 4096, "factors"),
    (Geometry(320, 320, (3, 3)), 4, torch.float32, 1024, "factors"),
    (Geometry(768, 49408, lookup=True), 16, torch.float32, 77, "rows"),
]


@pytest.mark.parametrize("geometry, r, dtype, tokens, route", ROUTES)
def test_the_faster_form_is_chosen(geometry, r, dtype, tokens, route):
    p = {role: t.to(dtype) for role, t in fresh(LoHa, LoHaConfig(r=r), geometry).tensors.items()}
    form = LoHa.form(p, Spec(geometry), tokens)
    assert {Factors: "factors", Hadamard: "rows", type(None): "weight"}[type(form)] == route


def test_no_alpha_is_scale_one():
    p = made(Geometry(4, 4))
    assert (LoHa.scale(p, Spec(Geometry(4, 4))), LoHa.scale(p, Spec(Geometry(4, 4), 6.0))) == (1.0, 2.0)


def test_an_elementwise_product_of_two_is_differentiated_twice_and_keeps_only_its_factors():
    g = torch.Generator().manual_seed(0)
    factors = [
        torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()
        for shape in ((7, 2), (2, 5), (7, 3), (3, 5))
    ]
    up1, down1, up2, down2 = factors
    torch.testing.assert_close(hadamard(*factors), (up1 @ down1) * (up2 @ down2))
    assert torch.autograd.gradcheck(hadamard, factors) and torch.autograd.gradgradcheck(hadamard, factors)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        hadamard(*factors)
    assert sorted(saved) == sorted(f.shape for f in factors)
    for n in range(4):  # one that is frozen
        held = [f.detach() if m == n else f for m, f in enumerate(factors)]
        got = torch.autograd.grad(hadamard(*held).square().sum(), [f for m, f in enumerate(held) if m != n])
        want = torch.autograd.grad(
            ((held[0] @ held[1]) * (held[2] @ held[3])).square().sum(), [f for m, f in enumerate(held) if m != n]
        )
        torch.testing.assert_close(got, want)
