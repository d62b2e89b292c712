"""The optimisers that are written here, against the algorithms of their papers in plain numbers, and against the packages where these are installed."""

import math

import pytest
import torch
from torch import nn

from diffpeft.train.optimizers.lion import Lion
from diffpeft.train.optimizers.prodigy import Prodigy
from diffpeft.train.optimizers.schedulefree import AdamWScheduleFree

STEPS = 25
RATES = [0.01 * (1 + math.sin(step)) + 0.002 for step in range(STEPS)]
TARGET = [0.7, -1.5, 0.0]


def gradient(w, step):
    """Of a loss that changes from step to step."""
    return [(1 + i) * (x - t) + 0.3 * math.cos(step + i) for i, (x, t) in enumerate(zip(w, TARGET, strict=True))]


def ours(make, rates, start=(1.0, 2.0, -0.5), mode=False):
    """The parameters by step, as three tensors: matrices of more axes and a parameter that gets no gradient."""
    a, b = (
        nn.Parameter(torch.tensor([start[:2]], dtype=torch.float64)),
        nn.Parameter(torch.tensor(start[2], dtype=torch.float64)),
    )
    optimizer, path = make([{"params": [a, nn.Parameter(torch.ones(2))]}, {"params": [b]}]), []
    for step, rate in enumerate(rates):
        g = gradient([*a.detach().flatten().tolist(), b.item()], step)
        a.grad, b.grad = torch.tensor([g[:2]], dtype=torch.float64), torch.tensor(g[2], dtype=torch.float64)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        path.append([*a.detach().flatten().tolist(), b.item()])
    if mode:
        optimizer.eval()
        path.append([*a.detach().flatten().tolist(), b.item()])
    return torch.tensor(path, dtype=torch.float64)


def same(path, want):
    torch.testing.assert_close(path, torch.tensor(want, dtype=torch.float64), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lion_is_program_one_of_its_paper(decay):
    w, m, want = [1.0, 2.0, -0.5], [0.0] * 3, []
    for step, rate in enumerate(RATES):
        g = gradient(w, step)
        update = [0.9 * mi + 0.1 * gi for mi, gi in zip(m, g, strict=True)]
        w = [x - rate * (math.copysign(1, u) if u else 0) - rate * decay * x for x, u in zip(w, update, strict=True)]
        m = [0.99 * mi + 0.01 * gi for mi, gi in zip(m, g, strict=True)]
        want.append(w)
    same(ours(lambda p: Lion(p, weight_decay=decay), RATES), want)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_schedule_free_is_algorithm_one_of_its_paper(decay):
    b1, b2, eps = 0.9, 0.999, 1e-8
    z, x, v, weights, highest, want = [1.0, 2.0, -0.5], [1.0, 2.0, -0.5], [0.0] * 3, 0.0, 0.0, []
    for step, rate in enumerate(RATES):
        y = [(1 - b1) * zi + b1 * xi for zi, xi in zip(z, x, strict=True)]
        g = gradient(y, step)
        v = [b2 * vi + (1 - b2) * gi * gi for vi, gi in zip(v, g, strict=True)]
        scale = [math.sqrt(vi / (1 - b2 ** (step + 1))) + eps for vi in v]
        z = [zi - rate * (gi / si + decay * yi) for zi, gi, si, yi in zip(z, g, scale, y, strict=True)]
        highest = max(highest, rate)
        weights += highest**2
        c = highest**2 / weights
        x = [(1 - c) * xi + c * zi for xi, zi in zip(x, z, strict=True)]
        want.append([(1 - b1) * zi + b1 * xi for zi, xi in zip(z, x, strict=True)])
    same(ours(lambda p: AdamWScheduleFree(p, weight_decay=decay), RATES, mode=True), [*want, x])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1, "d_coef": 2.0, "use_bias_correction": True, "safeguard_warmup": True},
        {"growth_rate": 1.05, "d0": 1e-3},
    ],
)
def test_prodigy_is_algorithm_four_of_its_paper(options):
    b1, b2, eps = 0.9, 0.999, 1e-8
    d0, coef, growth = options.get("d0", 1e-6), options.get("d_coef", 1.0), options.get("growth_rate", math.inf)
    w0 = w = [1.0, 2.0, -0.5]
    m, v, s, r, d, highest, want = [0.0] * 3, [0.0] * 3, [0.0] * 3, 0.0, d0, d0, []
    rates = [1.0, 0.5, *[1.0] * (STEPS - 2)]
    for step, rate in enumerate(rates):
        g, k = gradient(w, step), step + 1
        correction = math.sqrt(1 - b2**k) / (1 - b1**k) if options.get("use_bias_correction") else 1.0
        own_rate = d * rate * correction
        r = math.sqrt(b2) * r + d / d0 * own_rate * sum(gi * (a - b) for gi, a, b in zip(g, w0, w, strict=True))
        m = [b1 * mi + (1 - b1) * d * gi for mi, gi in zip(m, g, strict=True)]
        v = [b2 * vi + (1 - b2) * d * d * gi * gi for vi, gi in zip(v, g, strict=True)]
        share = d / d0 * (d if options.get("safeguard_warmup") else own_rate)
        s = [math.sqrt(b2) * si + share * gi for si, gi in zip(s, g, strict=True)]
        estimate = coef * r / sum(map(abs, s))
        d = max(d, estimate) if d == d0 else d
        highest = max(highest, estimate)
        d = min(highest, d * growth)
        decay = options.get("weight_decay", 0.0)
        w = [x - own_rate * (mi / (math.sqrt(vi) + d * eps) + decay * x) for x, mi, vi in zip(w, m, v, strict=True)]
        want.append(w)
    assert d > 2 * d0  # it did grow
    same(ours(lambda p: Prodigy(p, **options), rates), want)


PACKAGES = {
    "prodigyopt.Prodigy": (Prodigy, {"weight_decay": 0.1, "use_bias_correction": True}),
    "lion_pytorch.Lion": (Lion, {"weight_decay": 0.1, "betas": (0.9, 0.99)}),
    "schedulefree.AdamWScheduleFree": (AdamWScheduleFree, {"weight_decay": 0.1}),
}


@pytest.mark.parametrize("name", PACKAGES)
def test_the_packages_take_the_same_steps(name):
    package, _, last = name.partition(".")
    theirs, (kind, options) = getattr(pytest.importorskip(package), last), PACKAGES[name]

    def make(parameters):
        optimizer = theirs(parameters, lr=1.0, **options)
        if hasattr(optimizer, "train"):
            optimizer.train()
        return optimizer

    rates = [1.0] * STEPS if kind is Prodigy else RATES
    mode = kind is AdamWScheduleFree
    torch.testing.assert_close(
        ours(lambda p: kind(p, **options), rates, mode=mode), ours(make, rates, mode=mode), rtol=1e-10, atol=1e-13
    )


def test_a_step_on_averages_is_refused():
    x = nn.Parameter(torch.ones(2))
    optimizer = AdamWScheduleFree([x])
    x.grad = torch.ones(2)
    optimizer.step()
    before = x.detach().clone()
    optimizer.eval()
    optimizer.eval()  # again: nothing
    with pytest.raises(RuntimeError, match="averages"):
        optimizer.step()
    optimizer.train()
    torch.testing.assert_close(x.detach(), before, rtol=1e-6, atol=0)
