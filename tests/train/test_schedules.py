import pytest
import torch
from diffusers.optimization import get_scheduler

from diffpeft import ConfigError
from diffpeft.train.schedules import LearningRate

KINDS = {
    "constant": {},
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {"cycles": 3},
    "polynomial": {"power": 2.0},
}
THEIRS = {"cycles": "num_cycles", "power": "power"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_rate_after_the_warmup_is_diffusers(kind):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    options = {THEIRS[name]: value for name, value in KINDS[kind].items()}
    name = {"constant": "constant_with_warmup"}.get(kind, kind)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=4, num_training_steps=20, **options)
    ours = LearningRate(0.1, 20, 4, kind, **KINDS[kind])
    for step in range(20):
        if step >= 4:
            assert ours.at(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        theirs.step()
    # theirs wastes its first step at rate 0
    assert [ours.at(step) for step in range(4)] == pytest.approx([0.025, 0.05, 0.075, 0.1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_warmup_may_take_all_steps(kind):
    ours = LearningRate(0.1, 4, 4, kind, **KINDS[kind])
    assert [ours.at(step) for step in range(4)] == pytest.approx([0.025, 0.05, 0.075, 0.1])


def test_a_rate_that_a_schedule_cannot_have_is_refused():
    with pytest.raises(ConfigError, match="polynomial"):
        LearningRate(1e-8, 10, 0, "polynomial").at(0)
