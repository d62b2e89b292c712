"""The loop alone: what it minimises, when it reads numbers, what it refuses. Everything it needs of a model is a loss by step and part."""

import itertools

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from diffpeft import DivergedError, NothingLearntError
from diffpeft.train.config import Options
from diffpeft.train.ema import Ema
from diffpeft.train.gradients import LossScale
from diffpeft.train.job import job_of
from diffpeft.train.loop import Events, Job, Loop, fit
from diffpeft.train.schedules import LearningRate


def job(loss, x=None, *, steps=5, lr=0.1, make=torch.optim.AdamW, **options):
    """A job over one parameter, with the loss (x, step, part) -> number."""
    x = nn.Parameter(torch.tensor([3.0])) if x is None else x
    optimizer = make([x], lr=lr, weight_decay=0)
    return x, Job({"layer.x": x}, lambda step, part: loss(x, step, part), optimizer, LearningRate(lr, steps), **options)


def test_fit_minimises_and_tells_of_every_step():
    told = []
    _, run = job(lambda x, step, part: (x - 1).square().sum(), steps=200, max_grad_norm=10)
    losses = fit(run, events=Events(step=lambda done, loss: told.append((done, loss))))
    assert losses[-1] < 1e-3 * losses[0] and told == list(enumerate(losses, 1))


@pytest.mark.parametrize("late", [False, True])
def test_numbers_that_are_read_late_are_the_same_numbers(late):
    told = []
    x, run = job(lambda x, step, part: (x - 1).square().sum() * (step + 1))
    losses = Loop(run, events=Events(step=lambda done, loss: told.append(done)), reads_late=late).run()
    y, other = job(lambda x, step, part: (x - 1).square().sum() * (step + 1))
    assert losses == fit(other) and torch.equal(x, y) and told == [1, 2, 3, 4, 5]


def test_a_loss_may_come_in_parts():
    def learnt(loss, parts):
        x, run = job(loss, nn.Parameter(torch.tensor([3.0, -2.0], dtype=torch.float64)), parts=parts)
        return fit(run), x

    whole, x = learnt(lambda x, step, part: x.square().sum(), 1)
    parts, y = learnt(lambda x, step, part: x[part].square(), 2)
    assert parts == pytest.approx(whole, rel=1e-12)
    torch.testing.assert_close(x, y, rtol=1e-12, atol=0)


class Counts(TorchDispatchMode):
    """A device that counts how often somebody waits for a number of its own: what is a number in Python, or an answer to a question."""

    WAITS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select")

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name.partition("::")[2] in self.WAITS:
            self.waits.append(function._schema.name)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("name", ["adamw", "lion", "prodigy", "schedulefree"])
def test_no_step_waits_for_the_device(name):
    layer, images = nn.Linear(4, 4), torch.randn(3, 4)
    parameters = {"layer.weight": layer.weight, "layer.bias": layer.bias}
    options = Options(optimizer=name, steps=6, accumulate=2, ema=0.9)
    run = job_of(options, parameters, lambda step, part: F.mse_loss(layer(images), images) / 2)
    loop = Loop(run, reads_late=True)
    loop._step(0)  # what is made once may wait
    with Counts() as device:
        for step in range(1, 5):
            loop._step(step)
    assert device.waits == []
    with Counts() as device:
        layer.weight.sum().item()
    assert device.waits  # the device does count


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_before_it_reaches_the_parameters(what, late):
    def loss(x, step, part):
        if step != 2:
            return x.sum()
        return x.sum() * float("nan") if what == "loss" else (x * 0).sqrt().sum()  # the root's slope at 0

    x, run = job(loss)
    with pytest.raises(DivergedError, match=f"{what} .*step 3"):
        Loop(run, reads_late=late).run()
    assert x.isfinite().all()


def test_a_loss_without_a_gradient_teaches_nothing():
    with pytest.raises(NothingLearntError, match="gradient"):
        fit(job(lambda x, step, part: (x * 0).sum())[1])
    fit(job(lambda x, step, part: (x * (step == 1)).sum())[1])  # one step is enough


def layers(**factors):
    return {
        f"{layer}.{role}": nn.Parameter(torch.full((2,), value))
        for layer, row in factors.items()
        for role, value in row.items()
    }


@pytest.mark.parametrize(
    "loss, names",
    [
        (
            lambda p, step: (p["a.A"] * p["a.B"]).sum() + (p["b.A"] * p["b.B"]).sum(),
            None,
        ),  # A has none in the first step
        (lambda p, step: (p["a.A"] * p["a.B"]).sum(), "'b'"),  # not in the graph
        (lambda p, step: (p["a.A"] * p["a.B"]).sum() + 0 * p["b.B"].sum(), "'b'"),  # in it, and zero
        (lambda p, step: (p["a.A"] * p["a.B"]).sum() + p["b.B"].sum(), "1 of 4 tensors: 'b.A'"),
    ],
)
def test_in_the_first_steps_every_tensor_gets_a_gradient(loss, names):
    p = layers(a={"A": 1.0, "B": 0.0}, b={"A": 1.0, "B": 0.0})
    run = Job(
        p,
        lambda step, part: loss(p, step),
        torch.optim.SGD(p.values(), lr=0.1),
        LearningRate(0.1, 4),
        strict=dict.fromkeys(p, (0, 1)),
    )
    if names is None:
        fit(run)
    else:
        with pytest.raises(NothingLearntError, match=names):
            fit(run)


def test_what_a_run_draws_changes_no_other_randomness():
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    fit(job(lambda x, step, part: F.dropout(x, 0.5).square().sum() + x.sum(), steps=2)[1])
    assert torch.equal(torch.rand(2), want)


def test_dropout_is_a_function_of_seed_step_and_part():
    drawn = []

    def loss(x, step, part):
        drawn.append((step, part, torch.rand(()).item()))
        return x.sum()

    for seed in (0, 0, 1):
        torch.manual_seed(len(drawn))
        fit(job(loss, steps=3, parts=2, seed=seed)[1])
    numbers = [n for *_, n in drawn]
    assert drawn[:6] == drawn[6:12] and len({*numbers[:6], *numbers[12:]}) == 12


# -- fp16 ------------------------------------------------------------------------------------------------------------------


def test_a_loss_scale_saves_gradients_that_fp16_has_no_numbers_for():
    small = 1e-8  # below the smallest number of fp16, 6e-8

    _, run = job(lambda x, step, part: _Half.apply(x).sum() * small, make=torch.optim.SGD, steps=1, max_grad_norm=1e9)
    with pytest.raises(NothingLearntError):
        fit(run)
    _, run = job(
        lambda x, step, part: _Half.apply(x).sum() * small,
        make=torch.optim.SGD,
        steps=1,
        scale=LossScale(),
        max_grad_norm=1e9,
    )
    fit(run)
    assert run.parameters["layer.x"].grad.item() == pytest.approx(small, rel=1e-2)


class _Half(torch.autograd.Function):
    """A layer whose gradients pass through fp16."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.half().float()


def test_a_step_that_overflows_is_left_out_and_the_scale_halved():
    _, run = job(
        lambda x, step, part: _Half.apply(x).sum() * 4, make=torch.optim.SGD, steps=6, scale=LossScale(patience=3)
    )
    losses = fit(run)
    moved = [a - b for a, b in itertools.pairwise(losses)]
    assert moved[:3] == [0, 0, 0] and all(m > 0 for m in moved[3:])  # 65536 * 4, / 2, / 4: 65536 is no number of fp16
    assert (run.scale.value, run.scale.good) == (8192 * 2, 0)
    with pytest.raises(DivergedError, match="loss"):
        fit(job(lambda x, step, part: x.sum() * float("inf"), scale=LossScale())[1])


def test_gradients_are_clipped_at_what_they_are_without_the_scale():
    def learnt(scale):
        x, run = job(lambda x, step, part: (x * 3).sum(), make=torch.optim.SGD, scale=scale, max_grad_norm=0.5)
        return fit(run), x

    (losses, x), (others, y) = learnt(None), learnt(LossScale(8.0))
    assert losses == others and torch.equal(x, y) and x.item() == pytest.approx(3 - 5 * 0.1 * 0.5, rel=1e-5)


# -- averages --------------------------------------------------------------------------------------------------------------


def test_ema_is_the_average_that_diffusers_keeps():
    x = nn.Parameter(torch.tensor([3.0, -1.0], dtype=torch.float64))
    _, run = job(lambda x, step, part: (x - 1).square().sum(), x, steps=30)
    theirs = EMAModel([x], decay=0.8)
    run.ema, step = Ema(run.parameters, 0.8), run.optimizer.step

    def stepped():
        step()
        theirs.step([x])

    run.optimizer.step = stepped
    fit(run)
    torch.testing.assert_close(run.parameters["layer.x"].detach(), theirs.shadow_params[0], rtol=1e-12, atol=0)
