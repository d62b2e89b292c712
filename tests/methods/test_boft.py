"""BOFT against its equations, PEFT and LyCORIS."""

import itertools

import peft
import pytest
import torch
from dense import Dense
from lycoris.functional import boft as lycoris
from torch import nn

from diffpeft.errors import ConfigError
from diffpeft.methods import boft
from diffpeft.methods.base import Geometry, Site, Spec
from diffpeft.methods.boft import Boft, BOFTConfig

LINEAR, CONV, EMBEDDING = Geometry(16, 32), Geometry(16, 8, (2, 2)), Geometry(32, 20, lookup=True)
GROUPED, POINTWISE = Geometry(16, 32, (2,), groups=2), Geometry(16, 32, (1, 1))
GEOMETRIES = pytest.mark.parametrize("geometry", [LINEAR, CONV, EMBEDDING, GROUPED, POINTWISE], ids=str)
SIDES = pytest.mark.parametrize("side", ["input", "output"])
STAGES = pytest.mark.parametrize("m", [1, 2, 3])


def site(geometry, generator=None):
    return Site("layer", geometry, lambda: torch.zeros(geometry.shape), generator)


def fresh(geometry, side="input", m=1, keywords=None, **fields):
    """(tensors in float64, spec) of a fresh adapter with blocks of 4."""
    config = BOFTConfig(boft_n_butterfly_factor=m, **fields)
    made = Boft.init(config, site(geometry), side=side, **(keywords or {}))
    return {k: t.double() for k, t in made.tensors.items()}, Spec(geometry, made.alpha, made.options)


def random(geometry, side="input", m=1, keywords=None, **fields):
    p, spec = fresh(geometry, side, m, keywords, **fields)
    return {k: t + 0.3 * torch.randn_like(t) for k, t in p.items()}, spec


def changed(W, p, spec, training=False):
    return Boft.weight(W, Boft.prepare(p, spec, training), spec)


def cayley(D):
    """(I - S)(I + S)^-1 of S = (D - D^T) / 2."""
    S, eye = (D - D.mT) / 2, torch.eye(D.shape[-1]).double()
    return (eye - S) @ torch.linalg.inv(eye + S)


def butterfly(R):
    """M = F_{m-1} .. F_0, every F_i = P_i blockdiag(R_i) P_i^T written out.  R [m, n, b, b] -> [n b, n b]."""
    m, n, b, _ = R.shape
    M = torch.eye(n * b).double()
    for i in range(m):
        chunk, half = b * 2**i, b // 2
        halves = [list(range(k, k + half)) for k in range(0, chunk, half)]
        order = [
            j for pick in (halves[::2], halves[1::2]) for h in pick for j in h
        ]  # even halves of a chunk, then odd ones
        P = torch.eye(n * b).double()[[start + j for start in range(0, n * b, chunk) for j in order]]
        M = P @ torch.block_diag(*R[i]) @ P.T @ M
    return M


# The definition


@GEOMETRIES
@SIDES
@STAGES
def test_a_fresh_adapter_changes_no_bit(geometry, side, m):
    keywords = {"rescale": True} if side == "output" else {}
    p, spec = fresh(geometry, side, m, keywords)
    W = torch.randn(geometry.shape, dtype=torch.float64)
    assert torch.equal(changed(W, p, spec), W)


@GEOMETRIES
@STAGES
def test_the_input_side_is_the_butterfly_written_out(geometry, m):
    for b in (2, 4, 8):
        p, spec = random(geometry, m=m, boft_block_size=b)
        M, s = butterfly(cayley(p["boft_R"])), p["boft_s"].view(-1, 1)
        torch.testing.assert_close(M @ M.T, torch.eye(len(M)).double())
        W = torch.randn(geometry.shape, dtype=torch.float64)
        expected = s * (M.T @ W if geometry.lookup else W.flatten(1) @ M.T)
        torch.testing.assert_close(changed(W, p, spec), expected.view(W.shape))


def test_odd_blocks_do_without_a_permutation():
    p, spec = random(Geometry(6, 15), boft_block_size=5)
    W = torch.randn(6, 15, dtype=torch.float64)
    torch.testing.assert_close(
        changed(W, p, spec), p["boft_s"] * (W @ torch.block_diag(*cayley(p["boft_R"])[0]).T), rtol=1e-10, atol=1e-10
    )


@SIDES
@pytest.mark.parametrize("m", [1, 3])
def test_gradients(side, m):
    geometry = Geometry(8, 8)
    keywords = {"constraint": 0.1, "rescale": True} if side == "output" else {}
    p, spec = random(geometry, side, m, keywords, boft_block_size=2)
    W, names = torch.randn(geometry.shape, dtype=torch.float64), list(p)

    def f(*tensors):
        return changed(W, dict(zip(names, tensors, strict=True)), spec)

    assert torch.autograd.gradcheck(f, [t.requires_grad_() for t in p.values()])


@SIDES
def test_rotations_of_half_precision_tensors_are_computed_in_single_precision(side):
    p, spec = random(LINEAR, side, 2)
    R = Boft.prepare({k: t.to(torch.bfloat16) for k, t in p.items()}, spec, False)["R"]
    assert R.dtype == torch.float32
    torch.testing.assert_close(R @ R.mT, torch.eye(4).expand_as(R), rtol=0, atol=1e-5)


@SIDES
def test_dropout_spares_its_share_of_one_stage_while_training(side):
    p, spec = random(LINEAR, side, 3, boft_dropout=0.6)
    assert not spared(Boft.prepare(p, spec, False)["R"]).any()
    stages = set()
    for _ in range(30):
        counts = spared(Boft.prepare(p, spec, True)["R"]).sum(1)
        assert sorted(counts.tolist()) == [0, 0, int(0.6 * p[next(iter(p))].shape[1])]
        stages.add(int(counts.argmax()))
    assert stages == {0, 1, 2}


def spared(R):
    return (torch.eye(R.shape[-1]).double() == R).all(-1).all(-1)


# The fast path


@pytest.mark.parametrize("geometry", [LINEAR, EMBEDDING], ids=str)
@SIDES
@STAGES
@pytest.mark.parametrize("cheaper", [True, False])
def test_turning_activations_is_turning_the_weight(geometry, side, m, cheaper, monkeypatch):
    monkeypatch.setattr(boft, "cheaper_on_activations", lambda *_: cheaper)
    layer = Dense(geometry)
    p, spec = random(geometry, side, m, {"rescale": True} if side == "output" else {})
    p, x = Boft.prepare(p, spec, False), layer.inputs()
    strengths = (1.0, 0.5, -0.7, torch.tensor([0.3], dtype=torch.float64))
    for s, bias in itertools.product(strengths, (True, False)):
        W = layer.W + s * (Boft.weight(layer.W, p, spec) - layer.W)
        torch.testing.assert_close(Boft.apply(layer, x, p, spec, s, bias), layer.op.op(x, W, bias))


@pytest.mark.parametrize("geometry", [LINEAR, EMBEDDING], ids=str)
@SIDES
@pytest.mark.parametrize("s", [1.0, 0.3])
@pytest.mark.parametrize("cheaper", [True, False])
def test_a_fresh_adapter_changes_no_bit_of_the_output(geometry, side, s, cheaper, monkeypatch):
    monkeypatch.setattr(boft, "cheaper_on_activations", lambda *_: cheaper)
    layer = Dense(geometry)
    p, spec = fresh(geometry, side, 3, {"rescale": True} if side == "output" else {})
    x = layer.inputs()
    assert torch.equal(Boft.apply(layer, x, Boft.prepare(p, spec, False), spec, s, True), layer(x))


def test_few_positions_turn_activations_and_many_the_weight():
    narrow = Geometry(640, 64)
    assert boft.cheaper_on_activations(narrow, True, 64, 2, 8)
    assert not boft.cheaper_on_activations(narrow, True, 4096, 2, 8)
    assert boft.cheaper_on_activations(Geometry(640, 640), True, 4096, 2, 8)
    assert boft.cheaper_on_activations(Geometry(768, 49408, lookup=True), True, 77, 2, 8)


# PEFT


def peft_layer(base, p, **fields):
    """The layer that PEFT makes of `base`, with our tensors in it."""
    model = peft.get_peft_model(nn.Sequential(base), peft.BOFTConfig(target_modules=["0"], **fields)).double()
    layer = model.base_model.model[0]
    for role, t in p.items():
        assert getattr(layer, role)["default"].shape == t.shape
        getattr(layer, role)["default"].data.copy_(t)
    return layer.eval()


@pytest.fixture
def without_extension(monkeypatch):
    """PEFT as it is where its CUDA extension cannot be built, without the attempt."""
    monkeypatch.setattr(peft.tuners.boft.layer, "get_fbd_cuda", lambda: None)


@pytest.mark.parametrize("blocks", [{}, {"boft_block_size": 8}, {"boft_block_size": 0, "boft_block_num": 4}])
def test_peft_linear(without_extension, blocks):
    p, spec = random(LINEAR, **blocks)
    base = nn.Linear(32, 16).double()
    W, x = base.weight.detach().clone(), torch.randn(5, 32, dtype=torch.float64)
    layer = peft_layer(base, p, **blocks)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, changed(W, p, spec), base.bias), rtol=1e-5, atol=1e-5)
    layer.merge()
    torch.testing.assert_close(base.weight.detach(), changed(W, p, spec), rtol=1e-5, atol=1e-5)


def test_peft_convolution(without_extension):
    p, spec = random(CONV)
    base = nn.Conv2d(8, 16, 2).double()
    W, x = base.weight.detach().clone(), torch.randn(1, 8, 5, 5, dtype=torch.float64)
    layer = peft_layer(base, p)
    torch.testing.assert_close(layer(x), nn.functional.conv2d(x, changed(W, p, spec), base.bias), rtol=1e-5, atol=1e-5)
    layer.merge()
    torch.testing.assert_close(base.weight.detach(), changed(W, p, spec), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("b", [2, 4, 8])
@STAGES
def test_peft_permutations(b, m):
    """PEFT's own permutation matrices, which it uses with its extension only, give the same butterfly."""
    make = peft.tuners.boft.layer.BOFTLayer.block_butterfly_perm
    R, n = cayley(torch.randn(m, 32 // b, b, b).double()), 32 // b
    M = torch.eye(32).double()
    for i in range(m):
        P = torch.eye(32).double()[make(None, 32, n // 2**i, b // 2, m - 1)]
        M = P @ torch.block_diag(*R[i]) @ P.T @ M
    torch.testing.assert_close(butterfly(R), M)


def test_peft_makes_one_stage_of_any_number_without_its_extension(without_extension):
    p, _ = random(LINEAR, m=3)
    layer = peft.get_peft_model(
        nn.Sequential(nn.Linear(32, 16)), peft.BOFTConfig(target_modules=["0"], boft_n_butterfly_factor=3)
    ).base_model.model[0]
    assert layer.boft_R["default"].shape == (1, 8, 4, 4)
    assert p["boft_R"].shape == (3, 8, 4, 4)


# LyCORIS


@pytest.mark.parametrize("geometry", [LINEAR, CONV, GROUPED, POINTWISE], ids=str)
@STAGES
def test_lycoris_boft(geometry, m):
    for constraint, rescale, b in itertools.product((None, 0, 0.01, 100.0), (True, False), (2, 4)):
        is_lycoris(geometry, m, constraint, rescale, b)


def is_lycoris(geometry, m, constraint, rescale, b):
    keywords = {"constraint": constraint, "rescale": rescale}
    p, spec = random(geometry, "output", m, keywords, boft_block_size=b)
    W = torch.randn(geometry.shape).double()
    delta = lycoris._diff_weight(
        W.float(),
        p["oft_blocks"].float(),
        p["rescale"].float() if rescale else None,
        (constraint or 0) * geometry.out,
        1,
    )
    torch.testing.assert_close(changed(W, p, spec) - W, delta.double(), rtol=0, atol=5e-6)


def test_lycoris_puts_a_strength_into_every_stage():
    """R_i(s) = I + s (R_i - I) in each stage; here W(s) = W + s (f(W) - W) for all methods. They differ unless m or s is 1."""
    p, spec = random(LINEAR, "output", 3)
    W = torch.randn(LINEAR.shape).double()
    ours = 0.5 * (changed(W, p, spec) - W)
    theirs = lycoris._diff_weight(W.float(), p["oft_blocks"].float(), None, 0, 0.5).double()
    assert (ours - theirs).abs().max() > 0.01


# Making, checking and adopting


def test_shapes_are_pefts():
    p, _ = fresh(LINEAR, m=2)
    assert (p["boft_R"].shape, p["boft_s"].shape) == ((2, 8, 4, 4), (16, 1))
    p, _ = fresh(CONV, boft_block_size=0, boft_block_num=2)
    assert (p["boft_R"].shape, p["boft_s"].shape) == ((1, 2, 16, 16), (1, 16))
    p, _ = fresh(CONV, "output", 3, {"rescale": True, "constraint": 2})
    assert (p["oft_blocks"].shape, p["rescale"].shape) == ((3, 4, 4, 4), (16, 1, 1, 1))


def test_random_blocks_come_from_the_generator():
    config = BOFTConfig(init_weights=False)
    a, b = (Boft.init(config, site(LINEAR, torch.Generator().manual_seed(3))).tensors for _ in range(2))
    assert all(torch.equal(a[role], b[role]) for role in a)
    assert 0.03 < a["boft_R"].std() < 0.3 and 0 < (a["boft_s"] - 1).abs().max() < 1


@GEOMETRIES
@SIDES
@STAGES
def test_fresh_tensors_fit_and_tell_their_block(geometry, side, m):
    p, spec = fresh(geometry, side, m)
    assert Boft.check(p, spec) == "" and Boft.rank(p) == 4
    assert all(torch.equal(Boft.adopt(p, spec)[role], p[role]) for role in p)


@pytest.mark.parametrize(
    ("side", "shapes", "told"),
    [
        ("input", {"boft_R": (2, 8, 4, 4)}, "boft_s missing"),
        ("input", {"boft_R": (8, 4, 4), "boft_s": (16, 1)}, "not (m, n, b, b)"),
        ("input", {"boft_R": (2, 8, 4, 5), "boft_s": (16, 1)}, "not (m, n, b, b)"),
        ("input", {"boft_R": (0, 8, 4, 4), "boft_s": (16, 1)}, "not (m, n, b, b)"),
        ("input", {"boft_R": (2, 4, 4, 4), "boft_s": (16, 1)}, "turns 16 features"),
        ("input", {"boft_R": (2, 8, 4, 4), "boft_s": (32, 1)}, "boft_s (16, 1), not (32, 1)"),
        ("input", {"boft_R": (2, 32, 1, 1), "boft_s": (16, 1)}, "cannot be halved"),
        ("input", {"boft_R": (5, 8, 4, 4), "boft_s": (16, 1)}, "multiple of 16"),
        ("output", {"oft_blocks": (1, 16, 1, 1)}, "cannot be halved"),
        ("output", {"oft_blocks": (1, 4, 4, 4), "rescale": (4, 1)}, "rescale (16, 1), not (4, 1)"),
    ],
)
def test_shapes_that_do_not_fit_are_told(side, shapes, told):
    p = {role: torch.zeros(shape) for role, shape in shapes.items()}
    assert told in Boft.check(p, Spec(LINEAR, None, {"side": side}))


@pytest.mark.parametrize(("geometry", "shape"), [(LINEAR, (16, 1)), (CONV, (1, 16)), (POINTWISE, (1, 16))], ids=str)
def test_scales_are_adopted_in_either_shape(geometry, shape):
    spec = Spec(geometry, None, {"side": "input"})
    for stored in [(16, 1), (1, 16)]:
        p = {"boft_R": torch.zeros(1, 8, 4, 4), "boft_s": torch.ones(stored)}
        assert Boft.check(p, spec) == "" and Boft.adopt(p, spec)["boft_s"].shape == shape


@pytest.mark.parametrize(
    "fields",
    [
        {"boft_block_num": 4},
        {"boft_block_size": 0},
        {"boft_block_size": -4},
        {"boft_n_butterfly_factor": 0},
        {"boft_dropout": 1.0},
        {"init_weights": None},
    ],
    ids=str,
)
def test_settings_that_are_not_allowed_are_refused(fields):
    with pytest.raises(ConfigError):
        BOFTConfig(**fields).validate()


@pytest.mark.parametrize(
    ("fields", "keywords", "told"),
    [
        ({"boft_block_size": 5}, {}, "boft_block_size 5 does not divide 32"),
        ({"boft_block_size": 0, "boft_block_num": 7}, {}, "boft_block_num 7 does not divide 32"),
        ({"boft_n_butterfly_factor": 5}, {}, "multiple of 16 blocks, not 8"),
        ({"boft_block_size": 1, "boft_n_butterfly_factor": 2}, {}, "cannot be halved"),
        ({}, {"side": "left"}, "side is 'left'"),
        ({}, {"constraint": 1.0}, "output side"),
    ],
    ids=str,
)
def test_what_a_layer_cannot_take_is_refused(fields, keywords, told):
    with pytest.raises(ConfigError, match=told):
        Boft.init(BOFTConfig(**fields), site(LINEAR), **keywords)


def test_a_refusal_names_the_layer():
    with pytest.raises(ConfigError) as caught:
        Boft.init(BOFTConfig(boft_block_size=5), site(LINEAR))
    assert "layer" in str(caught.value)


def test_defaults_are_pefts():
    ours, theirs = BOFTConfig(), peft.BOFTConfig()
    ours.validate()
    assert all(getattr(theirs, name) == value for name, value in vars(ours).items())
