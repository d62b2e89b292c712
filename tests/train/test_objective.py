import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_snr

from diffpeft.errors import ConfigError, WrongBaseError
from diffpeft.families.base import Noised
from diffpeft.families.discrete import Discrete
from diffpeft.families.flow import Flow
from diffpeft.train.assembly import Assembly
from diffpeft.train.config import TrainConfig
from diffpeft.train.levels import Sampling, inverse
from diffpeft.train.objective import LOSSES, Objective, debiased, min_snr, with_prior

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
    [
        ("epsilon", lambda s: s),
        ("v_prediction", lambda s: s + 1),
        ("sample", lambda s: torch.ones_like(s)),
        ("flow", lambda s: (1 + s.sqrt()).square()),
    ],
)
def test_min_snr_is_min_of_snr_and_gamma_over_the_kinds_own_weight(kind, over):
    snr = torch.tensor([0.01, 1.0, 5.0, 700.0], dtype=torch.float64)
    noised = Noised(snr, snr, snr, snr, kind)
    assert torch.equal(min_snr(noised, 5.0), torch.minimum(snr, torch.tensor(5.0, dtype=torch.float64)) / over(snr))


@pytest.mark.parametrize("kind", ["flow_prediction", "trigflow", ""])
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


# -- weights: what they weigh is the error of the clean image, whatever is predicted ---------------------------------------------

KINDS = ("epsilon", "v_prediction", "sample", "flow")


def levels_of(kind):
    return Flow() if kind == "flow" else Discrete(scheduler(kind))


def clean(kind, x, prediction, signal, noise):
    """The clean image that a prediction comes to, and the noise, from x = signal z + noise n alone."""
    if kind == "epsilon":
        return (x - noise * prediction) / signal, prediction
    if kind == "sample":
        return prediction, (x - signal * prediction) / noise
    if kind == "v_prediction":  # v = signal n - noise z, and signal^2 + noise^2 = 1
        return signal * x - noise * prediction, noise * x + signal * prediction
    return x - noise * prediction, x + signal * prediction  # v = n - z, and signal + noise = 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_is_one_of_the_clean_images_error(kind):
    z, n, wrong = (torch.randn(3, 4, 2, 2, dtype=torch.float64) for _ in range(3))
    levels = levels_of(kind)
    noised = levels.noised(z, n, torch.tensor([0.05, 0.4, 0.9], dtype=torch.float64))
    share = noised.sigma.double().view(-1, 1, 1, 1)
    signal = 1 - share if kind == "flow" else (1 - share.square()).sqrt()
    image, noise = clean(kind, noised.x, noised.target + wrong, signal, share)
    error, snr = wrong.square().flatten(1).mean(1), (signal / share).square().flatten()
    of_image, of_noise = ((a - b).square().flatten(1).mean(1) for a, b in ((image, z), (noise, n)))
    tolerance = {
        "rtol": 1e-9 if kind == "flow" else 1e-4,
        "atol": 0,
    }  # diffusers' table of alphas is fp32, and 1 - a cancels
    torch.testing.assert_close(min_snr(noised, 5.0) * error, snr.clamp(max=5.0) * of_image, **tolerance)
    below = snr < 1000
    torch.testing.assert_close((debiased(noised) * error)[below], (of_noise / snr.sqrt())[below], **tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_finite_on_a_clean_image_and_on_pure_noise(kind):
    snr = torch.tensor([0.0, torch.inf])
    noised = Noised(snr, snr, snr, snr, kind)
    assert min_snr(noised, 5.0).isfinite().all() and debiased(noised).isfinite().all()


def test_an_objective_weights_as_it_says():
    snr, losses = torch.tensor([0.5, 20.0]), torch.tensor([2.0, 3.0])
    noised = Noised(snr, snr, snr, snr, "epsilon")
    assert torch.equal(Objective().weighted(losses, noised), losses)
    assert torch.equal(Objective(snr_gamma=5.0).weighted(losses, noised), losses * min_snr(noised, 5.0))
    assert torch.equal(Objective(debiased=True).weighted(losses, noised), losses * debiased(noised))


# -- losses ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [0.05, 0.7])
def test_hubers_losses_are_squares_near_zero_and_lines_far_from_it(c):
    e, c = torch.tensor([1e-5, 0.3, 2.0, 1e5], dtype=torch.float64), torch.tensor(c, dtype=torch.float64)
    huber, smooth = (LOSSES[name](e, c) for name in ("huber", "smooth_l1"))
    torch.testing.assert_close(huber, 2 * c * ((e**2 + c**2) ** 0.5 - c), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(smooth, 2 * ((e**2 + c**2) ** 0.5 - c), rtol=1e-12, atol=1e-15)
    ends = torch.stack([huber, smooth])[:, [0, 3]]  # of a number near zero, and of one far from it
    want = torch.stack([torch.stack([e[0] ** 2, 2 * c * e[3]]), torch.stack([e[0] ** 2 / c, 2 * e[3]])])
    torch.testing.assert_close(ends, want, rtol=1e-4, atol=0)
    assert torch.equal(LOSSES["l2"](e, c), e**2)


def test_hubers_schedule_goes_from_one_to_c_with_the_noise():
    snr = torch.tensor([0.0, 1.0, 1e8], dtype=torch.float64)
    c = Objective("huber", 0.1, "snr")._c(snr)
    noise = snr.clamp(min=1e-8).rsqrt()
    torch.testing.assert_close(c, 0.9 / (1 + noise) ** 2 + 0.1, rtol=1e-12, atol=0)
    assert c[0] == pytest.approx(0.1, abs=1e-6) and c[2] == pytest.approx(1, abs=1e-3)
    e = torch.full((3, 1, 2, 2), 0.4, dtype=torch.float64)
    want = torch.stack([LOSSES["huber"](e[0], one) for one in c])
    torch.testing.assert_close(Objective("huber", 0.1, "snr").distance(e, snr), want, rtol=1e-12, atol=0)


# -- levels ----------------------------------------------------------------------------------------------------------------

SHAPE = (1, 4, 32, 32)
UNIFORM = torch.linspace(0, 1, 4001, dtype=torch.float64)[:-1]


@pytest.mark.parametrize(
    "name, said", [("logit_normal", {"mean": 0.4, "std": 0.8}), ("mode", {"scale": 1.29}), ("mode", {"scale": -0.8})]
)
def test_densities_are_those_that_diffusers_draws(name, said):
    theirs = {"logit_mean": said.get("mean", 0), "logit_std": said.get("std", 1), "mode_scale": said.get("scale")}
    drawn = compute_density_for_timestep_sampling(
        name, 20000, **theirs, generator=torch.Generator().manual_seed(0)
    ).double()
    ours = Sampling(Flow(), name, said)(UNIFORM, SHAPE)
    assert (ours.diff() >= 0).all() and ours.min() >= 0 and ours.max() < 1
    quantiles = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    torch.testing.assert_close(torch.quantile(ours, quantiles), torch.quantile(drawn, quantiles), rtol=0, atol=0.01)


@pytest.mark.parametrize("levels", [Flow(), Flow(shift=3.0), Flow(shift=None)])
def test_a_shift_takes_the_place_of_the_models_own(levels):
    theirs = FlowMatchEulerDiscreteScheduler(shift=2.5)
    sigma = levels.sigma(Sampling(levels, "uniform", {}, 2.5)(UNIFORM, SHAPE), SHAPE)
    table = theirs.sigmas.flip(0).double()  # at 1/1000, 2/1000 ... of the way
    torch.testing.assert_close(sigma[4::4], table[:-1], rtol=0, atol=1e-6)
    discrete = Sampling(Discrete(scheduler("epsilon")), None, {}, 2.5)(UNIFORM, SHAPE)
    torch.testing.assert_close(discrete, 2.5 * UNIFORM / (1 + 1.5 * UNIFORM), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["flow", "epsilon"])
@pytest.mark.parametrize("density, said", [("uniform", {}), ("logit_normal", {"mean": -0.3}), ("mode", {})])
@pytest.mark.parametrize("shift", [None, 3.0])
def test_a_range_keeps_the_density_within_it(kind, density, said, shift):
    levels = Flow(shift=2.0) if kind == "flow" else Discrete(scheduler(kind))
    whole, part = (Sampling(levels, density, said, shift, span) for span in ((0.0, 1.0), (0.3, 0.8)))
    sigma = levels.sigma(whole(UNIFORM, SHAPE), SHAPE)
    within = sigma[(sigma >= 0.3) & (sigma <= 0.8)].double()
    ours = levels.sigma(part(UNIFORM, SHAPE), SHAPE).double()
    step = 0 if kind == "flow" else 2e-3  # between two levels of the table
    assert ours.min() >= 0.3 - 1e-6 - step and ours.max() <= 0.8 + 1e-6 + step
    quantiles = torch.linspace(0.02, 0.98, 9, dtype=torch.float64)
    torch.testing.assert_close(torch.quantile(ours, quantiles), torch.quantile(within, quantiles), rtol=0, atol=4e-3)


def test_the_inverse_of_a_quantile():
    levels = torch.tensor([0.0, 0.2, 1.0], dtype=torch.float64)
    torch.testing.assert_close(inverse(lambda u: u**3, levels), levels ** (1 / 3), rtol=0, atol=1e-12)


def test_offset_noise_has_a_mean_for_each_channel():
    noise = torch.stack([Assembly([], None, 0.5)._noise((4, 64, 64), (0, step, "instance", 0)) for step in range(200)])
    plain = torch.stack([Assembly([], None)._noise((4, 64, 64), (0, step, "instance", 0)) for step in range(200)])
    offset = noise - plain
    assert offset.var((2, 3)).max() < 1e-10  # one number a channel
    assert offset[:, :, 0, 0].std().item() == pytest.approx(0.5, rel=0.1)  # of 800 numbers
    assert plain.mean((2, 3)).std() < 0.02


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"huber_c": 0.2}, "huber_c with loss l2"),
        ({"huber_schedule": "snr"}, "huber_schedule with loss l2"),
        ({"density": "mode", "density_mean": 1.0}, "density_mean with density mode"),
        ({"density_std": 1.0}, "density"),
        ({"density": "logit_normal", "density_scale": 1.0}, "density_scale"),
        ({"debiased": True, "snr_gamma": 5.0}, "both"),
        ({"sigma_range": "0.5"}, "sigma_range"),
        ({"sigma_range": "0.9,0.5"}, "sigma_range"),
        ({"sigma_range": [0.5, 1.5]}, "sigma_range"),
        ({"sigma_range": "a,b"}, "sigma_range"),
    ],
)
def test_options_of_the_objective_that_would_do_nothing_are_refused(wrong, says):
    with pytest.raises(ConfigError, match=says):
        TrainConfig(model="m", data="d", out="o", **wrong).validate()


def test_a_range_is_two_numbers():
    said = {"model": "m", "data": "d", "out": "o"}
    assert (
        TrainConfig(**said, sigma_range="0.5, 1").span()
        == (0.5, 1.0)
        == TrainConfig(**said, sigma_range=[0.5, 1.0]).span()
    )
    assert TrainConfig(**said).span() == (0.0, 1.0)
