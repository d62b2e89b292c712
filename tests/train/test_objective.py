import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from diffpeft.errors import ConfigError, WrongBaseError
from diffpeft.families.base import Noised
from diffpeft.families.discrete import Discrete
from diffpeft.train.objective import min_snr, with_prior

LEVELS = torch.tensor([0.0, 0.3, 0.999])


def scheduler(kind):
    return DDPMScheduler(prediction_type=kind, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_noise_and_target_are_the_papers(kind):
    levels, noise = Discrete(scheduler(kind)), scheduler(kind)
    z, n = torch.randn(3, 4, 5, 6, dtype=torch.float64), torch.randn(3, 4, 5, 6, dtype=torch.float64)
    out = levels.noised(z, n, LEVELS)
    assert out.t.tolist() == [0, 300, 999]
    a = noise.alphas_cumprod[out.t].double().view(3, 1, 1, 1)
    # diffusers keeps alphas_cumprod in fp32 and takes roots there: 1e-6 is its rounding
    torch.testing.assert_close(out.x, a.sqrt() * z + (1 - a).sqrt() * n, rtol=0, atol=1e-6)
    want = {"epsilon": n, "v_prediction": a.sqrt() * n - (1 - a).sqrt() * z, "sample": z}[kind]
    torch.testing.assert_close(out.target, want, rtol=0, atol=1e-6)
    torch.testing.assert_close(out.snr, compute_snr(noise, out.t), rtol=1e-4, atol=0)  # fp32: 1 - a cancels


@pytest.mark.parametrize(
    "kind, over",
    [("epsilon", lambda s: s), ("v_prediction", lambda s: s + 1), ("sample", lambda s: torch.ones_like(s))],
)
def test_min_snr_is_min_of_snr_and_gamma_over_the_kinds_own_weight(kind, over):
    snr = torch.tensor([0.01, 1.0, 5.0, 700.0], dtype=torch.float64)
    noised = Noised(snr, snr, snr, snr, kind)
    assert torch.equal(min_snr(noised, 5.0), torch.minimum(snr, torch.tensor(5.0, dtype=torch.float64)) / over(snr))


@pytest.mark.parametrize("kind", ["flow", "flow_prediction", "trigflow", ""])
def test_what_min_snr_has_no_weight_for_is_refused_by_name_with_a_remedy(kind):
    snr = torch.ones(2)
    with pytest.raises(ConfigError, match="min-SNR") as raised:
        min_snr(Noised(snr, snr, snr, snr, kind), 5.0)
    assert repr(kind) in raised.value.what and "--snr-gamma" in raised.value.remedy


def test_a_model_whose_target_is_not_known_is_not_trained_on_another():
    with pytest.raises(WrongBaseError, match="flow_prediction"):
        Discrete(scheduler("flow_prediction"))


def test_the_prior_weighs_the_same_however_many_class_images_there_are():
    losses, is_class = torch.tensor([1.0, 3.0, 10.0]), torch.tensor([False, False, True])
    assert with_prior(losses, is_class, 0.5) == 2.0 + 0.5 * 10.0
    assert with_prior(losses.repeat(2), torch.tensor([False, False, True, False, False, True]), 0.5) == 7.0
    assert with_prior(losses, torch.zeros(3, dtype=torch.bool), 0.5) == losses.mean()
