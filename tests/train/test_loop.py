import pytest
import torch
from diffusers.optimization import get_scheduler

from diffpeft import DivergedError
from diffpeft.train.loop import LearningRate, fit


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_the_rate_after_the_warmup_is_diffusers(kind):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    theirs = get_scheduler(
        {"constant": "constant_with_warmup"}.get(kind, kind), optimizer, num_warmup_steps=4, num_training_steps=20
    )
    ours = LearningRate(0.1, 20, 4, kind)
    for step in range(20):
        if step >= 4:
            assert ours.at(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        theirs.step()
    assert [ours.at(step) for step in range(4)] == pytest.approx(
        [0.025, 0.05, 0.075, 0.1]
    )  # theirs wastes its first step at rate 0


def test_fit_minimises_and_tells_of_every_step():
    x, seen = torch.nn.Parameter(torch.tensor([3.0])), []
    losses = fit(
        [x],
        lambda step: (x - 1).square().sum(),
        LearningRate(0.1, 200),
        weight_decay=0,
        max_grad_norm=10,
        on_step=lambda done, loss: seen.append((done, loss)),
    )
    assert losses[-1] < 1e-3 * losses[0] and seen == list(enumerate(losses, 1))


def test_a_loss_may_come_in_parts():
    def learnt(loss_at):
        x = torch.nn.Parameter(torch.tensor([3.0, -2.0], dtype=torch.float64))
        return fit([x], loss_at(x), LearningRate(0.1, 5), weight_decay=0, max_grad_norm=1, on_step=lambda *_: None), x

    whole, x = learnt(lambda x: lambda step: x.square().sum())
    parts, y = learnt(lambda x: lambda step: (e.square() for e in x))
    assert parts == pytest.approx(whole, rel=1e-12)
    torch.testing.assert_close(x, y, rtol=1e-12, atol=0)


def test_a_loss_that_is_not_finite_stops_before_it_reaches_the_parameters():
    x = torch.nn.Parameter(torch.tensor([3.0]))
    with pytest.raises(DivergedError, match="step 3"):
        fit(
            [x],
            lambda step: x.sum() * (float("nan") if step == 2 else 1),
            LearningRate(0.1, 5),
            weight_decay=0,
            max_grad_norm=1,
            on_step=lambda *_: None,
        )
    assert x.isfinite().all()
