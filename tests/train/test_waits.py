"""No step waits for the device: whole runs, whose models are on one that has no numbers (meta). Whoever asks it for a number gets an error.

Copies to the device that wait are counted besides. What may wait is the readout of the step before.
"""

import contextlib

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffpeft import TrainConfig
from diffpeft.train import dreambooth, loop
from diffpeft.train.loop import Loop
from diffpeft.train.method import ADAPTERS, TRAINED
from tests.families import pipelines
from tests.train.pictures import photos_in, shown_beside

AWAY = torch.device("meta")
KINDS = {family: kind for kind, (family, _) in reversed(pipelines.KINDS.items())}  # the first of each family
QUICK_KINDS = ("sd15", "flux dev")
OPTIONS = {
    "plain": {},
    "weights": {"snr_gamma": 5.0, "noise_offset": 0.05, "density": "logit_normal", "shift": 2.0},
    "huber": {"loss": "huber", "huber_schedule": "snr", "debiased": True, "sigma_range": "0.2,0.9"},
    "base prior": {"prior": "base", "class_prompt": "a face", "ema": 0.9},
    "text encoders": {"train_text_encoder": True, "accumulate": 2, "gradient_checkpointing": True},
    "prodigy": {"optimizer": "prodigy"},
    "lion": {"optimizer": "lion"},
    "schedulefree": {"optimizer": "schedulefree"},
}
DROPPING = {method for method in ADAPTERS if "dropout" in TRAINED[method].fields.values()}
OPTIONS |= {method: {"method": method} | ({"dropout": 0.1} if method in DROPPING else {}) for method in ADAPTERS}
FOREACH = "fused=False foreach=True"  # fused kernels are of real devices


class Done(Exception):
    """The steps that are asked about are done."""


class Copies(TorchDispatchMode):
    """Notes the copies to the device for which the host waits."""

    def __init__(self):
        super().__init__()
        self.waiting = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function._schema.name.partition("::")[2]
        if name == "_to_copy" and args[0].device.type == "cpu" and kwargs.get("device", torch.device("cpu")) == AWAY:
            self._noted(kwargs.get("non_blocking"), args[0])
        if name == "copy_" and args[0].device == AWAY and args[1].device.type == "cpu":
            self._noted(len(args) > 2 and args[2], args[1])
        return function(*args, **kwargs)

    def _noted(self, non_blocking, tensor):
        if not non_blocking:
            self.waiting.append(tuple(tensor.shape))


class Unread:
    """A readout whose numbers never come: ones stand for them."""

    def __init__(self, step, values, late):
        assert late and values.device == AWAY
        self.step, self.count = step, len(values)

    def numbers(self):
        return np.ones(self.count)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folders of tiny models, by kind, made when they are first asked for."""
    folder, made = tmp_path_factory.mktemp("models"), {}

    def model(kind):
        if kind not in made:
            made[kind] = folder / str(len(made))
            pipelines.pipeline(kind, torch.float32).save_pretrained(made[kind])
        return made[kind]

    return model


@pytest.fixture
def steps(monkeypatch):
    """Runs whose steps are taken on the device: (config) -> the copies that waited."""
    texts = []

    class Known(dreambooth.Texts):
        def __init__(self, *args):
            super().__init__(*args)
            texts.append(self)

    def away(pipe, *_):
        """Send all there is to the device, as soon as the adapter is on the model."""
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.to(AWAY)
        for known in texts:
            known.device = AWAY
            for store in known.stores.values():
                for row in store.entries.values():
                    row.update(
                        {name: t.to(AWAY) for name, t in row.items() if t.is_floating_point()}
                    )  # numbers of tokens stay

    def fit(job, keeper, events, clock):
        run = Loop(job, reads_late=True)
        run._step(0)  # what is made once may wait
        with Copies() as copies:
            run._step(1)
            run._step(2)
        raise Done(copies.waiting)

    autocast = torch.autocast

    def cast(device_type, *args, **kwargs):
        """torch has none for the device without numbers."""
        return contextlib.nullcontext() if device_type == AWAY.type else autocast(device_type, *args, **kwargs)

    monkeypatch.setattr(torch, "autocast", cast)
    monkeypatch.setattr(dreambooth, "Texts", Known)
    monkeypatch.setattr(dreambooth, "assist", away)
    monkeypatch.setattr(dreambooth, "fit", fit)
    monkeypatch.setattr(loop, "Readout", Unread)

    def taken(config):
        with pytest.raises(Done) as done:
            dreambooth.train(config)
        return done.value.args[0]

    return taken


# Each option on one kind of model, and the kinds with what is plain: what an option does, it does whatever the model.
QUICK = ("prodigy",)
# {kind: for what a step waits}, all of it in diffusers' own models
WAITING = {
    **dict.fromkeys(
        ("easyanimate", "kandinsky5 video", "kandinsky5 edit", "mochi", "ltx2", "hunyuan_video15"),
        "masks, places or lengths of texts are made anew on the host in each step",
    ),
    "chroma": "numbers of its modulation are made on the host",
    "cogview4": "places are made on the host",
    "lumina2": "lengths of texts are read from their mask",
    "hidream": "which tokens go to each expert is read",
}


def marks_of(kind):
    slow = [] if kind in QUICK_KINDS else [pytest.mark.slow]
    return [*slow, pytest.mark.xfail(reason=WAITING[kind], strict=True)] if kind in WAITING else slow


CELLS = [pytest.param(kind, "plain", marks=marks_of(kind)) for kind in KINDS.values()]
CELLS += [
    pytest.param("sd15", name, marks=() if name in QUICK else pytest.mark.slow) for name in OPTIONS if name != "plain"
]
CELLS += [
    pytest.param("flux dev", "weights", marks=pytest.mark.slow),
    pytest.param("sdxl", "text encoders", marks=pytest.mark.slow),
    ("flux dev", "text encoders"),
]


@pytest.mark.parametrize("kind, name", CELLS)
def test_no_step_waits_for_the_device(kind, name, models, steps, tmp_path):
    photos = photos_in(tmp_path)
    config = TrainConfig(
        model=str(models(kind)),
        data=str(photos),
        out=str(tmp_path / "out"),
        instance_prompt="a face",
        resolution=32,
        rank=2,
        steps=4,
        sample_every=0,
        save_every=0,
        max_length=40 if kind == "hidream" else None,
        **shown_beside(kind, photos),
        **{"optimizer_args": None if "optimizer" in OPTIONS[name] else FOREACH, **OPTIONS[name]},
    )
    assert steps(config) == []


def test_the_device_notices():
    x = torch.zeros(2, device=AWAY)
    for ask in (lambda: x.sum().item(), lambda: bool(x.any()), lambda: x.cpu(), lambda: x.tolist(), lambda: x[x > 0]):
        with pytest.raises((RuntimeError, NotImplementedError)):
            ask()
    with Copies() as copies:
        torch.ones(3).to(AWAY)
        torch.ones(2).to(AWAY, non_blocking=True)
        x.copy_(torch.ones(2))
    assert copies.waiting == [(3,), (2,)]
