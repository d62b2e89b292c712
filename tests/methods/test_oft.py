"""OFT against its equations, PEFT and LyCORIS."""

import math

import peft
import pytest
import torch
from dense import Dense
from lycoris.functional import diag_oft as lycoris
from torch import nn

from diffpeft.errors import ConfigError
from diffpeft.methods.base import Geometry, Site, Spec
from diffpeft.methods.oft import Oft, OFTConfig, nearest_divisor

LINEAR, CONV, EMBEDDING = Geometry(6, 12), Geometry(6, 4, (3, 3)), Geometry(12, 20, lookup=True)
GROUPED = Geometry(6, 8, (3,), groups=2)
GEOMETRIES = pytest.mark.parametrize("geometry", [LINEAR, CONV, EMBEDDING, GROUPED], ids=str)
SIDES = pytest.mark.parametrize("side", ["input", "output"])


def site(geometry, generator=None):
    return Site("layer", geometry, lambda: torch.zeros(geometry.shape), generator)


def fresh(geometry, side="input", keywords=None, **fields):
    """(tensors in float64, spec) of a fresh adapter."""
    made = Oft.init(OFTConfig(**fields), site(geometry), side=side, **(keywords or {}))
    return {k: t.double() for k, t in made.tensors.items()}, Spec(geometry, made.alpha, made.options)


def random(geometry, side="input", std=0.2, keywords=None, **fields):
    p, spec = fresh(geometry, side, keywords, **fields)
    return {k: t + std * torch.randn_like(t) for k, t in p.items()}, spec


def changed(W, p, spec, training=False):
    return Oft.weight(W, Oft.prepare(p, spec, training), spec)


def peft_layer(base, p, config):
    """The layer that PEFT makes of `base`, with our tensor in it."""
    model = peft.get_peft_model(nn.Sequential(base), peft.OFTConfig(target_modules=["0"], **config)).double()
    layer = model.base_model.model[0]
    role = "oft_embedding_R" if isinstance(base, nn.Embedding) else "oft_R"
    layer_tensor = getattr(layer, role)["default"].weight
    assert layer_tensor.shape == p[role].shape
    layer_tensor.data.copy_(p[role])
    return layer.eval()


# The definition


@GEOMETRIES
@SIDES
@pytest.mark.parametrize("exact", [True, False])
def test_a_fresh_adapter_changes_no_bit(geometry, side, exact):
    p, spec = fresh(geometry, side, oft_block_size=3, use_cayley_neumann=not exact)
    W = torch.randn(geometry.shape, dtype=torch.float64)
    assert torch.equal(changed(W, p, spec), W)


@GEOMETRIES
@SIDES
@pytest.mark.parametrize("share", [True, False])
def test_the_weight_is_turned_by_a_block_diagonal_orthogonal_matrix(geometry, side, share):
    p, spec = random(geometry, side, oft_block_size=3, use_cayley_neumann=False, block_share=share)
    R = Oft.prepare(p, spec, False)["R"]
    torch.testing.assert_close(R @ R.mT, torch.eye(3).expand_as(R).double())
    W = torch.randn(geometry.shape, dtype=torch.float64)
    turns_rows = geometry.lookup or side == "output"
    n = (geometry.out if turns_rows else geometry.columns) // 3
    whole = torch.block_diag(*R.expand(n, 3, 3))
    expected = whole.T @ W.flatten(1) if turns_rows else W.flatten(1) @ whole.T
    torch.testing.assert_close(changed(W, p, spec), expected.view(W.shape))


@SIDES
def test_gradients(side):
    p, spec = random(
        CONV,
        side,
        oft_block_size=3,
        use_cayley_neumann=False,
        keywords={"constraint": 0.1, "rescale": True} if side == "output" else {},
    )
    W = torch.randn(CONV.shape, dtype=torch.float64)
    names = list(p)

    def f(*tensors):
        return changed(W, dict(zip(names, tensors, strict=True)), spec)

    assert torch.autograd.gradcheck(f, [t.requires_grad_() for t in p.values()])


def test_gradients_of_the_series():
    p, spec = random(LINEAR, oft_block_size=3)
    W = torch.randn(LINEAR.shape, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v: changed(W, {"oft_R": v}, spec), [p["oft_R"].requires_grad_()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@SIDES
def test_rotations_of_half_precision_tensors_are_computed_in_single_precision(dtype, side):
    p, spec = random(LINEAR, side, oft_block_size=3)
    R = Oft.prepare({k: t.to(dtype) for k, t in p.items()}, spec, False)["R"]
    assert R.dtype == torch.float32
    rounded = Oft.prepare({k: t.to(dtype).double() for k, t in p.items()}, spec, False)["R"]
    torch.testing.assert_close(R.double(), rounded, rtol=0, atol=1e-6)


@GEOMETRIES
@SIDES
def test_module_dropout_spares_its_share_of_blocks_while_training(geometry, side):
    p, spec = random(geometry, side, oft_block_size=3, module_dropout=0.6)
    n = len(Oft.prepare(p, spec, False)["R"])
    R = Oft.prepare(p, spec, True)["R"]
    spared = [torch.equal(block, torch.eye(3).double()) for block in R]
    assert sum(spared) == int(0.6 * n)
    assert len({tuple(Oft.prepare(p, spec, True)["R"].flatten().tolist()) for _ in range(20)}) > 1
    assert not any(torch.equal(block, torch.eye(3).double()) for block in Oft.prepare(p, spec, False)["R"])


def test_a_shared_block_is_never_dropped():
    p, spec = random(LINEAR, oft_block_size=3, module_dropout=0.9, block_share=True)
    assert torch.equal(Oft.prepare(p, spec, True)["R"], Oft.prepare(p, spec, False)["R"])


# The fast path


@pytest.mark.parametrize("geometry", [LINEAR, EMBEDDING], ids=str)
@SIDES
@pytest.mark.parametrize("s", [1.0, 0.5, -0.7, torch.tensor([0.3], dtype=torch.float64)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("share", [True, False])
def test_turning_activations_is_turning_the_weight(geometry, side, s, bias, share):
    layer = Dense(geometry)
    keywords = {"rescale": True} if side == "output" else {}
    p, spec = random(geometry, side, oft_block_size=3, block_share=share, keywords=keywords)
    p, x = Oft.prepare(p, spec, False), layer.inputs()
    W = layer.W + s * (Oft.weight(layer.W, p, spec) - layer.W)
    torch.testing.assert_close(Oft.apply(layer, x, p, spec, s, bias), layer.op.op(x, W, bias))


@pytest.mark.parametrize("geometry", [LINEAR, EMBEDDING], ids=str)
@SIDES
@pytest.mark.parametrize("s", [1.0, 0.3])
def test_a_fresh_adapter_changes_no_bit_of_the_output(geometry, side, s):
    layer, keywords = Dense(geometry), {"rescale": True} if side == "output" else {}
    p, spec = fresh(geometry, side, oft_block_size=3, keywords=keywords)
    x = layer.inputs()
    assert torch.equal(Oft.apply(layer, x, Oft.prepare(p, spec, False), spec, s, True), layer(x))


# PEFT


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("blocks", [{"oft_block_size": 4}, {"r": 3, "oft_block_size": 0}, {"oft_block_size": 5}])
def test_peft_linear(exact, share, blocks):
    fields = {"use_cayley_neumann": not exact, "block_share": share, **blocks}
    p, spec = random(LINEAR, **fields)
    base = nn.Linear(12, 6).double()
    W, x = base.weight.detach().clone(), torch.randn(5, 12, dtype=torch.float64)
    layer = peft_layer(base, p, fields)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, changed(W, p, spec), base.bias))
    layer.merge()
    torch.testing.assert_close(base.weight.detach(), changed(W, p, spec))


@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5, 6, 9])
def test_peft_series_of_any_length(terms):
    fields = {"oft_block_size": 4, "num_cayley_neumann_terms": terms}
    p, spec = random(LINEAR, **fields)
    base = nn.Linear(12, 6).double()
    W = base.weight.detach().clone()
    peft_layer(base, p, fields).merge()
    torch.testing.assert_close(base.weight.detach(), changed(W, p, spec))


@pytest.mark.parametrize("exact", [True, False])
def test_peft_embedding(exact):
    fields = {"oft_block_size": 4, "use_cayley_neumann": not exact}
    p, spec = random(EMBEDDING, **fields)
    base = nn.Embedding(20, 12).double()
    table, x = base.weight.detach().clone(), torch.arange(20)
    layer = peft_layer(base, p, fields)
    torch.testing.assert_close(layer(x), changed(table.t(), p, spec).t()[x])
    layer.merge()
    torch.testing.assert_close(base.weight.detach(), changed(table.t(), p, spec).t())


@pytest.mark.parametrize("std", [1e-6, 0.1])  # shorter than the bound, and longer
@pytest.mark.parametrize("share", [True, False])
def test_peft_coft(std, share):
    fields = {"oft_block_size": 4, "coft": True, "eps": 1e-3, "block_share": share}
    p, spec = random(LINEAR, std=std, **fields)
    base = nn.Linear(12, 6).double()
    W, x = base.weight.detach().clone(), torch.randn(5, 12, dtype=torch.float64)
    layer = peft_layer(base, p, fields)
    v = p["oft_R"].requires_grad_()
    y = nn.functional.linear(x, changed(W, {"oft_R": v}, spec), base.bias)
    torch.testing.assert_close(layer(x), y)
    layer(x).square().sum().backward()
    y.square().sum().backward()
    torch.testing.assert_close(layer.oft_R["default"].weight.grad, v.grad)


def test_peft_convolution_agrees_when_merged():
    fields = {"oft_block_size": 4}
    p, spec = random(CONV, **fields)
    base = nn.Conv2d(4, 6, 3).double()
    W = base.weight.detach().clone()
    peft_layer(base, p, fields).merge()
    torch.testing.assert_close(base.weight.detach(), changed(W, p, spec))


def test_peft_convolution_disagrees_with_itself_until_merged():
    """PEFT unfolds x, turns the patches and folds them again, which adds up overlaps: R = I changes the output."""
    p, spec = fresh(CONV, oft_block_size=4)
    base = nn.Conv2d(4, 6, 3).double()
    x = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    y, W = base(x), base.weight.detach().clone()
    assert not torch.allclose(peft_layer(base, p, {"oft_block_size": 4})(x), y, rtol=0.5)
    assert torch.equal(changed(W, p, spec), W)


def test_peft_ignores_module_dropout():
    """Since 0.16 PEFT makes the dropout layer and never calls it; here it drops, as the field says."""
    fields = {"oft_block_size": 4, "module_dropout": 0.9}
    p, spec = random(LINEAR, **fields)
    base = nn.Linear(12, 6).double()
    W, x = base.weight.detach().clone(), torch.randn(5, 12, dtype=torch.float64)
    layer = peft_layer(base, p, fields).train()
    torch.testing.assert_close(layer(x), nn.functional.linear(x, changed(W, p, spec), base.bias))
    assert not torch.allclose(changed(W, p, spec, training=True), changed(W, p, spec))


@pytest.mark.parametrize("number", [1, 7, 12, 30, 320])
def test_peft_adjusts_blocks_to_the_same_divisor(number):
    adjust = peft.tuners.oft.layer.OFTLayer.adjust_oft_parameters
    assert all(nearest_divisor(number, w) == adjust(None, number, w) for w in range(1, 400))


# LyCORIS and Kohya


@pytest.mark.parametrize("geometry", [LINEAR, CONV, GROUPED], ids=str)
@pytest.mark.parametrize("constraint", [None, 0, 0.01, 100.0])
@pytest.mark.parametrize("rescale", [True, False])
def test_lycoris_diag_oft(geometry, constraint, rescale):
    keywords = {"constraint": constraint, "rescale": rescale}
    p, spec = random(geometry, "output", oft_block_size=3, keywords=keywords)
    W = torch.randn(geometry.shape).double()
    delta = lycoris._diff_weight(
        W.float(), p["oft_blocks"].float(), p["rescale"].float() if rescale else None, (constraint or 0) * geometry.out
    )
    torch.testing.assert_close(changed(W, p, spec) - W, delta.double(), rtol=0, atol=5e-6)


def kohya(W, B, alpha):
    """sd-scripts' networks/oft.py: the norm is clamped whatever alpha is."""
    q = B - B.mT
    norm = q.norm()
    q = q * ((norm.clamp(max=alpha * len(W)) + 1e-8) / (norm + 1e-8))
    eye = torch.eye(q.shape[-1]).double()
    R = (eye + q) @ torch.linalg.inv(eye - q)
    return torch.einsum("knm,knp->kmp", R, W.unflatten(0, (len(B), -1))).flatten(0, 1)


@pytest.mark.parametrize("alpha", [0.0, 0.01, 100.0])
def test_kohya_clamps_always(alpha):
    p, spec = random(LINEAR, "output", oft_block_size=3)
    spec = Spec(LINEAR, alpha, {**spec.options, "clamp": "kohya"})
    W = torch.randn(LINEAR.shape, dtype=torch.float64)
    torch.testing.assert_close(changed(W, p, spec), kohya(W, p["oft_blocks"], alpha))
    if alpha == 0:
        torch.testing.assert_close(changed(W, p, spec), W, rtol=0, atol=1e-7)


# Making, checking and adopting


def test_shapes_are_pefts():
    assert fresh(LINEAR, oft_block_size=4)[0]["oft_R"].shape == (3, 6)
    assert fresh(LINEAR, r=3, oft_block_size=0)[0]["oft_R"].shape == (3, 6)
    assert fresh(LINEAR, oft_block_size=4, block_share=True)[0]["oft_R"].shape == (1, 6)
    assert fresh(CONV, oft_block_size=4)[0]["oft_R"].shape == (9, 6)
    assert fresh(EMBEDDING, oft_block_size=4)[0]["oft_embedding_R"].shape == (3, 6)
    p, _ = fresh(CONV, "output", oft_block_size=3, keywords={"rescale": True})
    assert (p["oft_blocks"].shape, p["rescale"].shape) == ((2, 3, 3), (6, 1, 1, 1))


def test_an_adjusted_block_is_told():
    assert fresh(LINEAR, oft_block_size=5)[1].options["adjusted"] == (5, 4)
    assert fresh(LINEAR, r=8, oft_block_size=0)[1].options["adjusted"] == (8, 6)
    assert fresh(LINEAR)[1].options["adjusted"] == (32, 12)
    assert "adjusted" not in fresh(LINEAR, oft_block_size=4)[1].options


def test_random_blocks_come_from_the_generator():
    config = OFTConfig(oft_block_size=4, init_weights=False)
    a, b = (Oft.init(config, site(LINEAR, torch.Generator().manual_seed(3))).tensors["oft_R"] for _ in range(2))
    assert torch.equal(a, b) and 0.03 < a.std() < 0.3


@GEOMETRIES
@SIDES
@pytest.mark.parametrize("share", [True, False])
def test_fresh_tensors_fit_and_tell_their_block(geometry, side, share):
    p, spec = fresh(geometry, side, oft_block_size=3, block_share=share)
    assert Oft.check(p, spec) == "" and Oft.rank(p) == 3
    assert Oft.adopt(p, spec).keys() == p.keys()


@pytest.mark.parametrize(
    ("side", "shapes", "told"),
    [
        ("input", {"oft_R": (3, 5)}, "not (n, b (b - 1) / 2)"),
        ("input", {"oft_R": (3, 4, 5)}, "not (n, b (b - 1) / 2)"),
        ("input", {"oft_R": (2, 6)}, "2 blocks of 4"),
        ("input", {"oft_R": (2, 10)}, "2 blocks of 5"),
        ("input", {"oft_blocks": (2, 3, 3)}, "oft_blocks is for the output side"),
        ("input", {"oft_R": (3, 6), "rescale": (6, 1)}, "oft_R, rescale are parts of several"),
        ("output", {"oft_blocks": (2, 3, 4)}, "not (n, b, b)"),
        ("output", {"oft_blocks": (3, 3, 3)}, "3 blocks of 3"),
        ("output", {"oft_R": (3, 6)}, "oft_R is for the input side"),
        ("output", {"oft_blocks": (2, 3, 3), "rescale": (5, 1)}, "rescale (6, 1), not (5, 1)"),
        ("output", {"oft_blocks": (2, 3, 3), "rescale": (6, 2)}, "rescale is (6, 2)"),
    ],
)
def test_shapes_that_do_not_fit_are_told(side, shapes, told):
    p = {role: torch.zeros(shape) for role, shape in shapes.items()}
    assert told in Oft.check(p, Spec(LINEAR, None, {"side": side}))


def test_rescale_is_adopted_in_any_of_its_shapes():
    spec = Spec(CONV, None, {"side": "output"})
    for shape in [(6,), (6, 1), (6, 1, 1, 1)]:
        p = {"oft_blocks": torch.zeros(2, 3, 3), "rescale": torch.ones(shape)}
        assert Oft.check(p, spec) == "" and Oft.adopt(p, spec)["rescale"].shape == (6, 1, 1, 1)


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 2},
        {"oft_block_size": 0},
        {"r": -1},
        {"oft_block_size": 2.0},
        {"oft_block_size": True},
        {"module_dropout": 1},
        {"init_weights": "gaussian"},
        {"eps": 0},
        {"eps": math.nan},
        {"num_cayley_neumann_terms": 0},
    ],
    ids=str,
)
def test_settings_that_are_not_allowed_are_refused(fields):
    with pytest.raises(ConfigError):
        OFTConfig(**fields).validate()


@pytest.mark.parametrize(
    ("fields", "keywords"),
    [
        ({}, {"side": "left"}),
        ({}, {"constraint": 0.1}),
        ({}, {"rescale": True}),
        ({}, {"side": "output", "constraint": -1}),
        ({}, {"side": "output", "constraint": math.inf}),
        ({"coft": True}, {"side": "output"}),
    ],
    ids=str,
)
def test_keywords_that_do_not_go_together_are_refused(fields, keywords):
    with pytest.raises(ConfigError):
        Oft.init(OFTConfig(**fields), site(LINEAR), **keywords)


def test_defaults_are_pefts():
    ours, theirs = OFTConfig(), peft.OFTConfig()
    ours.validate()
    assert all(getattr(theirs, name) == value for name, value in vars(ours).items())
