"""The paired held-out loss against its definition, its standard error against simulation, and which images are held out."""

import functools
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import diffpeft
from diffpeft import ConfigError, DataError, TrainConfig
from diffpeft.families import open_family
from diffpeft.families.densities import DENSITIES
from diffpeft.model.attach import attach
from diffpeft.pipeline.open import EMBEDDED
from diffpeft.train import data, dreambooth, paired
from diffpeft.train.cache import Latents, Texts
from diffpeft.train.check import account_of, check
from diffpeft.train.data import Example
from diffpeft.train.draw import generator, uniform
from diffpeft.train.heldout import BANDS, Design, chosen, compared, is_noise, ratio_error
from diffpeft.train.levels import Sampling
from diffpeft.train.objective import Objective
from diffpeft.train.paired import HeldoutPictures, Paired, draws_of, interval
from tests.families.pipelines import pipeline
from tests.train.pictures import DATA, photos_in

# -- the statistics --------------------------------------------------------------------------------------------------------


def drawn(rng, n, draws=3, sizes=1):
    """Paired losses of n images: what an image is like is common to all of its pictures, bands and draws."""
    images = np.repeat(np.arange(n), sizes)
    weights = rng.dirichlet(np.ones(BANDS), size=1).repeat(n * sizes, 0)
    before = rng.normal(1, 0.3, (n * sizes, BANDS, draws))
    own = rng.normal(0.05, 0.04, n)[images][:, None, None]
    noise = rng.normal(0, 0.05, before.shape)
    return Design(images, weights, np.linspace(0, 1, 5)), before, before - own - noise


@pytest.mark.parametrize("n, sizes", [(3, 1), (8, 2), (25, 1)])
def test_the_standard_error_is_what_the_mean_varies_by(n, sizes):
    """Of many sets of images the means scatter as the errors say: in squares, whose mean over sets is unbiased. A level by itself would say far less."""
    means, errors, naive = [], [], []
    for seed in range(2000):
        design, before, after = drawn(np.random.default_rng(seed), n, sizes=sizes)
        design = replace(design, weights=np.full_like(design.weights, 0.25))
        summary = design.summary(0, before, after)
        means.append(summary.before - summary.after)
        errors.append(summary.standard_error)
        naive.append((before - after).std(ddof=1) / before.size**0.5)
    assert np.mean(np.square(errors)) == pytest.approx(np.var(means, ddof=1), rel=0.12)
    assert np.mean(np.square(naive)) < 0.5 * np.var(means)


def test_the_numbers_are_those_of_the_definition():
    design, before, after = drawn(np.random.default_rng(0), 4, sizes=2)
    design = replace(design, weights=np.random.default_rng(1).dirichlet(np.ones(BANDS), 8))
    rows = [[], []]
    for image in range(4):
        for losses, row in zip((before, after), rows, strict=True):
            pictures = [p for p in range(8) if design.images[p] == image]
            row.append(
                np.mean([sum(design.weights[p, b] * losses[p, b].mean() for b in range(BANDS)) for p in pictures])
            )
    off, on = map(np.array, rows)
    summary = design.summary(7, before, after)
    assert (summary.step, summary.images) == (7, 4)
    assert (summary.before, summary.after) == pytest.approx((off.mean(), on.mean()), rel=1e-12)
    assert summary.standard_error == pytest.approx(np.std(off - on, ddof=1) / 2, rel=1e-12)
    for b, band in enumerate(summary.bands):
        gap = (before - after)[:, b].mean(1).reshape(4, 2).mean(1)
        assert (band.low, band.high) == (b / 4, (b + 1) / 4)
        assert band.before - band.after == pytest.approx(gap.mean(), rel=1e-9)
        assert band.standard_error == pytest.approx(np.std(gap, ddof=1) / 2, rel=1e-9)


def test_with_one_image_the_error_is_that_of_its_draws():
    """In squares it is what the mean over bands varies by when noise and levels are drawn anew."""
    means, errors = [], []
    for seed in range(3000):
        rng = np.random.default_rng(seed)
        gap = rng.normal([[[0.1], [0.2], [0.3], [0.4]]], [[[0.01], [0.02], [0.03], [0.2]]], (1, BANDS, 4))
        design = Design(np.zeros(1, int), np.array([[0.4, 0.3, 0.2, 0.1]]), np.linspace(0, 1, 5))
        summary = design.summary(0, gap, np.zeros_like(gap))
        means.append(summary.before)
        errors.append(summary.standard_error)
    assert np.mean(np.square(errors)) == pytest.approx(np.var(means, ddof=1), rel=0.1)
    best = chosen(design, gap, {2: gap / 2}, 2, 2)
    assert "One held-out image says nothing of others" in best.reason


def test_the_error_of_a_mean_over_tokens_is_what_it_varies_by():
    """Examples with unlike numbers of tokens, and losses that depend on them."""
    means, errors = [], []
    for seed in range(3000):
        rng = np.random.default_rng(seed)
        sizes = rng.integers(1, 40, 30)
        gaps = sizes * rng.normal(0.2 + 0.01 * sizes, 0.1)
        means.append(gaps.sum() / sizes.sum())
        errors.append(ratio_error(gaps, sizes))
    assert np.mean(np.square(errors)) == pytest.approx(np.var(means, ddof=1), rel=0.12)
    assert ratio_error(np.array([1.0]), np.array([3])) == 0


def test_words_for_a_difference():
    assert compared(0.01, 0.001, 10, "x") == "0.01 below x (standard error 0.001)"
    assert compared(-0.01, 0.02, 10, "x") == "0.01 above x, which is not more than noise (standard error 0.02)"
    assert not is_noise(0.5, 0.1, 10) and is_noise(0.5, 0.1, 2)  # Student's t of one degree is wide
    assert is_noise(0.19, 0.1, 50) and not is_noise(0.21, 0.1, 50) and is_noise(0, 0, 3)


def test_the_reason_names_the_lowest_and_says_what_the_last_would_have_been():
    rng = np.random.default_rng(0)
    design, before, _ = drawn(rng, 6)
    jitter = [rng.normal(0, 0.001, before.shape) for _ in range(3)]
    after = {0: before, 10: before - 0.2 + jitter[0], 20: before - 0.3 + jitter[1], 30: before - 0.1 + jitter[2]}
    best = chosen(design, before, after, 30, 20)
    assert (
        best.step == 20
        and "of the 3 that were measured" in best.reason
        and "below that of the last, 30 (standard" in best.reason
    )
    after[30] = after[20] + rng.normal(0.0002, 0.05, before.shape)
    assert "not more than noise" in chosen(design, before, after, 30, 20).reason.split(";")[0]
    worse = {step: before + 0.1 + jitter[0] for step in (10, 30)}
    assert "above that of the base" in chosen(design, before, worse, 30, 30).reason


# -- what is measured ------------------------------------------------------------------------------------------------------

KINDS = ("sd15", "sdxl, v and zero-terminal SNR", "flux dev")
SAMPLINGS = {
    "the family's": {},
    "logit-normal": {"density": "logit_normal", "parameters": {"mean": 0.5}},
    "shifted": {"density": "uniform", "shift": 3.0},
    "a range": {"density": "uniform", "span": (0.3, 0.9)},
}


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_is_what_the_runs_own_draws_come_to(kind, sampling, monkeypatch):
    """For a loss that is a function of the level alone: the mean over the run's density, by quadrature in float64."""
    levels = levels_of(kind)
    sampling, shapes = Sampling(levels, **sampling), [(1, 4, 64, 64), (1, 4, 128, 64)]
    monkeypatch.setattr(paired, "denoising", lambda family, batch, texts, objective: loss(batch))

    def loss(batch):
        share = levels.sigma(batch.u, batch.latents.shape).double()
        return 1 + share**3 * batch.latents.shape[-2]

    subject = measuring(shapes, sampling)
    design, losses = subject.design(), subject()
    low, high = sampling.span
    for shape in shapes:
        u = (torch.arange(40000, dtype=torch.float64) + 0.5) / 40000
        truth = (1 + levels.sigma(sampling(u, shape), shape).double() ** 3 * shape[-2]).mean().item()
        mine = design.whole(losses)[[i for i, other in enumerate(subject.shapes) if other == shape]]
        assert mine.mean() == pytest.approx(truth, abs=4 * mine.std(ddof=1) / len(mine) ** 0.5 + 2e-3 * truth)
    for band, row in enumerate(np.moveaxis(losses, 1, 0)):
        edges = [low + (high - low) * (band + end) / 4 for end in (0, 1)]
        for at, shape in enumerate(subject.shapes):
            shares = ((row[at] - 1) / shape[-2]) ** (1 / 3)
            assert (shares >= edges[0] - 0.01).all() and (shares <= edges[1] + 0.01).all()  # a table has steps
    assert design.weights.sum(1) == pytest.approx(1) and (design.weights >= 0).all()


@functools.cache
def levels_of(kind):
    return open_family(pipeline(kind)).levels


def measuring(shapes, sampling, n=40):
    """A measurement of n pictures of each shape, without a model."""
    subject = Paired.__new__(Paired)
    subject.shapes = [shape for shape in shapes for _ in range(n)]
    moments = [SimpleNamespace(mean=torch.zeros(shape[1:])) for shape in subject.shapes]
    pictures = [(i, data.View(shape[-2:])) for i, shape in enumerate(subject.shapes)]
    family = SimpleNamespace(denoiser="unet", parts=lambda name: SimpleNamespace(device="cpu"), levels=sampling.levels)
    held = SimpleNamespace(
        pictures=pictures,
        draws=4,
        batches=SimpleNamespace(examples=[*range(len(pictures))], seed=0, shape=lambda index, target: (target,)),
        assembly=SimpleNamespace(latents=lambda example, view: moments[example], batch=lambda places: fake(places)),
        shown=lambda picture, band, number: (picture, band, number),
    )

    def fake(places):
        rows = [place for _, place in places]
        u = torch.tensor([uniform("test", *row) for row in rows])
        return Fake(torch.zeros(len(rows), *subject.shapes[rows[0][0]][1:]), u)

    subject.__init__(family, held, lambda prompts, controls: {}, sampling, Objective(), 64)
    return subject


@dataclass(frozen=True)
class Fake:
    latents: torch.Tensor
    u: torch.Tensor
    prompts: tuple = ()
    controls: tuple = ()

    def to(self, device):
        return self


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_the_definition_in_float64(kind, tmp_path):
    """Two images in two sizes, one of them masked; noise with an offset; every number written out."""
    pipe = pipeline(kind)
    family = open_family(pipe)
    attach(pipe, diffpeft.LoraConfig(r=2, init_lora_weights=False), "a", targets="attn")
    photos = photos_in(tmp_path, ("cat_face", "airplane"))
    mask = photos / "cat_face.png"
    examples = [
        Example(photos / "cat_face.png", "a cat", (64, 64), mask=tmp_path / "mask.png"),
        Example(photos / "airplane.png", "a plane", (64, 64)),
    ]
    half_mask(mask, tmp_path / "mask.png")
    sizing, objective = data.Sizing((16, 32), False, 8), Objective("huber", snr_gamma=2.0)
    pictures = HeldoutPictures(examples, sizing, 5, Latents(family), 0.1)
    sampling = Sampling(family.levels)
    subject = Paired(family, pictures, Texts(family), sampling, objective, 16)
    losses = subject()
    assert losses.shape == (4, BANDS, draws_of(4)) and losses.dtype == np.float64
    assert [index for index, _ in pictures.pictures] == [0, 0, 1, 1]
    texts = Texts(family)
    for p, b, j in [(0, 0, 0), (1, 3, 1), (2, 1, 3), (3, 2, 2)]:
        index, view = pictures.pictures[p]
        example, key = examples[index], (5, "heldout", p, b, j)
        moments = Latents(family)(example, view)
        z = moments.mean + moments.std * torch.randn(moments.mean.shape, generator=generator(*key, "posterior"))
        noise = torch.randn(z.shape, generator=generator(*key, "noise"))
        noise = noise + 0.1 * torch.randn(z.shape[0], 1, 1, generator=generator(*key, "offset"))
        ends = sampling.arguments(torch.tensor([b / 4, (b + 1) / 4], dtype=torch.float64), z[None].shape)
        within = (j + uniform(*key, "level")) / pictures.draws
        u = DENSITIES[family.levels.density]((ends[0] + (ends[1] - ends[0]) * within)[None]).float()
        noised = family.levels.noised(z[None], noise[None], u)
        with torch.no_grad():
            conditions = texts([example.caption]) | family.framed([view.frame(example.size)])
            error = (family.predict(noised.x, noised.t, conditions) - noised.target.float()).double()
        error = 2 * 0.1 * ((error.square() + 0.01).sqrt() - 0.1)
        error = (error if moments.mask is None else error * moments.mask.double()).mean()
        weight = objective.weighted(torch.ones(1), noised).double().item()
        assert losses[p, b, j] == pytest.approx(error.item() * weight, rel=2e-5)
    with diffpeft.adapters(pipe, {"a": 0.0}):
        off = subject()
    assert np.abs(off - losses).min() > 0 and np.array_equal(losses, subject())


def half_mask(image, path):
    from PIL import Image

    grey = Image.new("L", Image.open(image).size, 255)
    grey.paste(0, (0, 0, 32, 64))
    grey.save(path)


def test_how_often_is_measured():
    assert [draws_of(n) for n in (1, 2, 4, 8, 100)] == [8, 8, 4, 2, 2]
    assert interval(1, 1000, 4) == 100  # ten times a run
    assert interval(50, 500, 1) == 667  # 400 predictions are as long as 133 steps: at the end alone


# -- which images are held out ---------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path):
    """Twelve pictures, two of them copies of one, with captions."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in sorted(DATA.glob("*.png"))[:10]:
        (folder / path.name).write_bytes(path.read_bytes())
        (folder / f"{path.stem}.txt").write_text(f"a {path.stem} of sks")
    original = min(folder.glob("*.png"))
    for name in ("copy 1", "copy 2"):
        (folder / f"{name}.png").write_bytes(original.read_bytes())
        (folder / f"{name}.txt").write_text("a copy of sks")
    return folder


def config(photos, **options):
    values = {"model": str(EMBEDDED), "data": str(photos), "out": str(photos.parent / "out"), **options}
    return TrainConfig(
        **{"overwrite": True, "save_every": 0, "rank": 1, "targets": "to_q", "steps": 2, "resolution": 32, **values}
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("said, count", [("0.2", 2), (0.2, 2), (4, 4), ("9", 9), (0.001, 1), (0.99, None)])
def test_a_part_of_the_data_is_held_out_and_copies_go_together(said, count, seed, photos):
    subject = config(photos, heldout=said, seed=seed)
    if count is None:
        with pytest.raises(ConfigError, match="10 different images: none would be left"):
            account_of(subject, False)
        return
    account = account_of(subject, False)
    held, trained = ({e.path.read_bytes() for e in part} for part in (account.heldout, account.examples))
    assert len(held) == len(account.heldout) == count and not held & trained and len(held | trained) == 10
    assert f"measured on and not trained on: {count} image" in str(account)
    assert account.table()["heldout"] == [e.name for e in account.heldout]
    again = account_of(subject, False)
    assert again.heldout == account.heldout


def test_other_seeds_hold_out_others_and_a_new_image_changes_little(photos):
    def held(seed):
        return {e.name for e in account_of(config(photos, heldout=3, seed=seed), False).heldout}

    before = [held(seed) for seed in range(8)]
    assert len(set(map(frozenset, before))) > 4
    (photos / "new.png").write_bytes((DATA / sorted(p.name for p in DATA.glob("*.png"))[20]).read_bytes())
    (photos / "new.txt").write_text("new")
    assert all(len(held(seed) & names) >= 2 for seed, names in enumerate(before))


def test_a_folder_is_read_as_the_data_is_and_copies_in_it_do_not_count(photos):
    inside = photos / "val"
    inside.mkdir()
    others = sorted(DATA.glob("*.png"))[10:13]
    for path in [*others, others[0], min(photos.glob("*.png"))]:
        name = path.name if not (inside / path.name).exists() else "z again.png"
        (inside / name).write_bytes(path.read_bytes())
    (inside / others[0].with_suffix(".txt").name).write_text("words of its own")
    subject = config(photos, heldout=str(inside), instance_prompt="a thing")
    account = account_of(subject, False)
    assert len(account.examples) == 12 and not any("val" in e.path.parts for e in account.examples)
    assert len(account.heldout) == 3 and account.copies == 2
    assert {e.caption for e in account.heldout} == {"words of its own", "a thing"}
    assert "val" not in str(account.folders) and "2 images of" in str(account)
    with pytest.raises(ConfigError, match="every image there is trained on"):
        account_of(config(photos, heldout=str(photos), instance_prompt="a thing"), False)


def test_a_trigger_or_masks_that_no_held_out_image_has_are_no_error(photos):
    (photos.parent / "val").mkdir()
    other = sorted(DATA.glob("*.png"))[15]
    (photos.parent / "val" / other.name).write_bytes(other.read_bytes())
    (photos.parent / "val" / f"{other.stem}.txt").write_text("a thing")
    account = account_of(config(photos, heldout=str(photos.parent / "val"), trigger="sks"), False)
    assert [e.caption for e in account.heldout] == ["a thing"]


@pytest.mark.parametrize("said", [0, "0", -1, 1.5, "1.0", "2.5", "100", 12])
def test_other_numbers_are_refused(said, photos):
    with pytest.raises((ConfigError, DataError), match=r"heldout is|no such folder"):
        check(config(photos, heldout=said))


@pytest.mark.parametrize("options", [{"best": "last"}, {"heldout_every": 2}])
def test_options_without_held_out_images_are_refused(options, photos):
    with pytest.raises(ConfigError, match="without heldout"):
        check(config(photos, **options))


# -- a run -----------------------------------------------------------------------------------------------------------------


def test_off_and_on_agree_at_first_and_a_run_says_what_it_ends_with(photos):
    run = dreambooth.train(config(photos, heldout=3, heldout_every=1, batch_size=8, lr=1e-2, steps=2))
    first, *others = run.heldout
    assert first.step == 0 and first.before == first.after and first.standard_error == 0
    assert [loss.step for loss in others] == [1, 2] and all(loss.before == first.before for loss in others)
    assert run.best.step == min(others, key=lambda loss: loss.after).step == run.step
    assert len(run.losses) == 2 and run.usage.steps == 2 and run.seconds > 0


@pytest.mark.slow
def test_watching_changes_no_byte(photos):
    """Neither held-out losses nor tables do, with dropout in layers, averages and a text encoder that is trained."""
    from diffpeft.train import state
    from diffpeft.train.checkpoints import checkpoints_in

    (photos.parent / "val").mkdir()
    for path in sorted(DATA.glob("*.png"))[10:12]:
        (photos.parent / "val" / path.name).write_bytes(path.read_bytes())
    plain = config(
        photos,
        dropout=0.3,
        ema=0.9,
        train_text_encoder=True,
        steps=2,
        save_every=2,
        batch_size=8,
        instance_prompt="x",
        lr=1e-2,
        log="none",
    )
    watched = replace(
        plain, heldout=str(photos.parent / "val"), heldout_every=1, best="last", log="csv", out=str(photos.parent / "b")
    )
    states = []
    for options in (plain, watched):
        run = dreambooth.train(options)
        parts = state.read(checkpoints_in(run.config.output())[-1].folder / state.FILE)
        states.append({name: tensor for name, tensor in parts.items() if "heldout" not in name})
    assert states[0].keys() == states[1].keys() and all(t.equal(states[1][name]) for name, t in states[0].items())
    assert not (photos.parent / "out" / "metrics.csv").exists()
    assert run.heldout[0].before == run.heldout[0].after and run.heldout[-1].after != run.heldout[0].after
