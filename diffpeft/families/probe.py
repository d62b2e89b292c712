"""A pipeline's own call, cut short: what it does before, around and after its denoiser, while other models and the scheduler are stood in for.

A pipeline is asked for one step and stopped where what is wanted can be seen. So what it does is known without a table: how it lays latents out, what it
hands the denoiser and makes of the answer, and what it hands the VAE.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from diffpeft.errors import WrongBaseError
from diffpeft.families.packages import check_installed
from diffpeft.families.parts import Component, Parts

Told = tuple[object, ...]
Value = TypeVar("Value")
Time = Callable[[bool], Tensor]
# what a pipeline is told where it takes it, so that it draws one picture of the size that it is asked for, of the text as it is
PLAIN: Mapping[str, object] = {
    "use_resolution_binning": False,
    "num_frames": 1,
    "use_pe": False,
    "enable_prompt_rewrite": False,
    "guidance_schedule": None,
    "use_kv_cache": False,
}
# how pipelines are told to be led by nothing, the first of which works: each says one or the other of its keywords
_QUIET: tuple[Mapping[str, float], ...] = tuple(
    dict.fromkeys(("guidance_scale", "true_cfg_scale", "distilled_guidance_scale"), scale) for scale in (1.0, 0.0)
)


_ERRORS = (ArithmeticError, AttributeError, ImportError, LookupError, NameError, RuntimeError, TypeError, ValueError)
_DRAW = "randn_tensor"  # diffusers' function for noise, by its name in the modules of pipelines


class Reached(Exception):
    """The place where the call was to stop."""

    def __init__(self, *values: object):
        super().__init__()
        self.values = values


class Stepped(NamedTuple):
    """What a scheduler answers, as a tuple and by name."""

    prev_sample: Tensor


class StandIn(nn.Module):
    """In the place of a model: it has what the model has beside numbers, on a device of its own, and answers as it is told."""

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype, answer: Callable[..., object]):
        super().__init__()
        self.__dict__.update(_model=model, device=device, dtype=dtype, decode=answer, forward=answer)

    def __getattr__(self, name: str) -> Component:
        return getattr(self.__dict__["_model"], name)


def stop(*values: object, **named: object) -> object:
    """Stop here."""
    raise Reached(*values, named)


@dataclass(frozen=True)
class Ask:
    """One call.

    Args:
        size: height and width of the picture.
        device, dtype: of the models that are stood in for.
        said: more keywords.
        calls: makes {method of the pipeline: what is called instead}.
        models: {component: what is there instead}; every other model is stood in for, and stops the call when it is asked.
        noise: the latents that it begins with, in the shape that the pipeline draws.
        times: instead of the scheduler's `set_timesteps`; it may stop the call.
        step: instead of the scheduler's `step`.
        led: whether the pipeline's guider is on, if it has one.
    """

    size: tuple[int, int]
    device: torch.device
    dtype: torch.dtype
    said: Mapping[str, object]
    calls: Callable[[], Mapping[str, Callable[..., object]]]
    models: Mapping[str, object]
    noise: Callable[[Sequence[int]], Tensor]
    times: Callable[..., object]
    step: Callable[..., object] = stop
    led: bool = False


class Probe:
    """A pipeline that is asked.

    Args:
        scheduler: takes the place of the pipeline's, so that it stays as it is.
        denoiser: its component, which alone, beside the VAE, may be asked without being there: that ends a call.
    """

    def __init__(self, parts: Parts, scheduler: Component, denoiser: str):
        self._ends = (denoiser, "vae")
        self.parts, self.pipe, self.scheduler = parts, parts.pipe, scheduler
        self._call = inspect.unwrap(type(parts.pipe).__call__)
        self.keywords = inspect.signature(self._call).parameters
        self.quiet: Mapping[str, float] = _QUIET[0]

    def learn_quiet(self, asked: Callable[[], Told]) -> None:
        """Learn how the denoiser is asked for a prompt alone, from a call that stops there.

        Raises WrongBaseError if the pipeline always asks for more.
        """
        for self.quiet in _QUIET:
            if _one(asked()) and not self._leads():
                return
        raise self.refused("its pipeline asks the denoiser for more than the prompt, whatever the guidance")

    def taken(self, said: Mapping[str, object]) -> dict[str, object]:
        """The keywords that the pipeline takes."""
        return {name: value for name, value in said.items() if name in self.keywords}

    def _leads(self) -> bool:
        return bool(getattr(self.pipe, "do_classifier_free_guidance", False))

    def __call__(self, ask: Ask) -> Told:
        """What the call came to where it was stopped. Raises WrongBaseError if it came to an end by itself, or ended with an error of its own;
        ConfigError if it lacks a package.
        """
        height, width = ask.size
        said = {
            "height": height,
            "width": width,
            "num_inference_steps": 2,  # some divide by how many
            "output_type": "pt",
            **PLAIN,
            **self.quiet,
            **ask.said,
        }
        said = self.taken(said)
        with self._prepared(ask):
            try:
                self._call(self.pipe, **said)
            except Reached as reached:
                return reached.values
            except _ERRORS as error:
                check_installed(type(self.pipe), error)
                raise self.refused(f"its pipeline could not be followed: {type(error).__name__}: {error}") from error
        raise self.refused("its pipeline draws without what others of diffusers have")

    @contextlib.contextmanager
    def _prepared(self, ask: Ask) -> Iterator[None]:
        """Everything stands in its place."""
        modules = {base.__module__: sys.modules[base.__module__] for base in type(self.pipe).__mro__}
        drawing = [module for module in modules.values() if hasattr(module, _DRAW)]
        if not drawing:
            raise self.refused("its pipeline draws no noise as others of diffusers do")

        def drawn(
            shape: Sequence[int],
            generator: object = None,
            device: torch.device | None = None,
            dtype: torch.dtype | None = None,
            layout: object = None,
        ) -> Tensor:
            x = ask.noise(shape)
            return x.to(device, x.dtype if x.dtype == torch.float64 else dtype)

        guiders = [part for part in self.pipe.components.values() if getattr(part, "_enabled", False) is True]
        models = {**self._stood_in(ask), **ask.models}
        scheduler = {"set_timesteps": ask.times, "step": ask.step}
        with contextlib.ExitStack() as stack:
            stack.enter_context(replaced(self.pipe, {**models, "scheduler": self.scheduler}))
            stack.enter_context(replaced(self.pipe, ask.calls()))
            stack.enter_context(replaced(self.scheduler, scheduler))
            for module in drawing:
                stack.enter_context(replaced(module, {_DRAW: drawn}))
            for guider in () if ask.led else guiders:
                stack.enter_context(replaced(guider, {"_enabled": False}))
            yield

    def _stood_in(self, ask: Ask) -> dict[str, object]:
        """{model: what is in its place}."""
        models: dict[str, object] = {}
        for name, part in self.pipe.components.items():
            if part is None and self.parts.has(name):
                part = self.parts.outline(name)
            if isinstance(part, nn.Module):
                models[name] = StandIn(part, ask.device, ask.dtype, stop if name in self._ends else _no_end(name))
        return models

    def numbers(self, seen: object) -> Tensor:
        """A tensor that was seen, on the host in fp64. Raises WrongBaseError for anything else."""
        if not isinstance(seen, Tensor):
            raise self.refused("its pipeline does not go its steps as others of diffusers do")
        return seen.double().cpu()

    def refused(self, why: str) -> WrongBaseError:
        """The error of a pipeline that cannot be followed."""
        return WrongBaseError(
            f"this {type(self.pipe).__name__} cannot be trained: {why}",
            remedy="Pipelines from text to one image, which have encode_prompt and a scheduler of diffusers, can.",
        )


def _no_end(component: str) -> Callable[..., object]:
    """What a model that is not there answers."""

    def answer(*_: object, **__: object) -> object:
        raise RuntimeError(f"it asks {component} for more than a caption")

    return answer


@contextlib.contextmanager
def counted(probe: Probe, model: nn.Module) -> Iterator[list[object]]:
    """What a denoiser answers meanwhile. Raises WrongBaseError when it is asked twice."""
    answers: list[object] = []

    def note(module: nn.Module, args: object, answer: object) -> None:
        if answers:
            raise probe.refused("its pipeline asks the denoiser more than once a step")
        answers.append(on_host(answer))

    handle = model.register_forward_hook(note)
    try:
        yield answers
    finally:
        handle.remove()


def mapped(value: Value, change: Callable[[Tensor], Tensor]) -> Value:
    """Lists, tuples and outputs of models with their tensors changed."""
    from torch.utils._pytree import tree_map

    changed: Value = tree_map(lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, value)
    return changed


def on_host(value: Value) -> Value:
    """What has the same shapes on the host; floats are ones, in fp64."""

    def host(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return torch.ones(tensor.shape, dtype=torch.float64)
        return torch.ones(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor.cpu()

    return mapped(value, host)


def _one(seen: Told) -> bool:
    """Whether a denoiser was asked for one example. `seen`: its arguments, the latents first or the first of a name."""
    *args, named = seen
    values = [*args, *(named.values() if isinstance(named, dict) else ())]
    latents = next((value for value in values if isinstance(value, (Tensor, list))), None)
    return latents is not None and len(latents) == 1


@contextlib.contextmanager
def replaced(owner: object, values: Mapping[str, object]) -> Iterator[None]:
    """Other attributes of an object for a while, past what it does when they are set."""
    space, absent = owner.__dict__, object()
    before = {name: space.get(name, absent) for name in values}
    space.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is absent:
                space.pop(name, None)
            else:
                space[name] = value


# -- how latents lie -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lie:
    """How the latents of one size lie where noise is drawn, and where the VAE decodes. Those that are trained lie as the VAE's do.

    Args:
        shape: of the VAE's latents, without the batch's axis: `scale` times those that are trained, and `shift`.
        scale, shift: fp64, of that shape.
        places: for each number of the VAE's latents, its place in the noise.
    """

    shape: tuple[int, ...]
    scale: Tensor
    shift: Tensor
    places: Tensor

    def noise(self, x: Tensor) -> Tensor:
        """Latents [*shape] in the order of the noise, flat."""
        return x.flatten()[self.places.argsort().to(x.device)]

    def latents(self, stepped: Tensor, places: Tensor) -> Tensor:
        """What the scheduler is told, as latents [*shape]. `places`: for each number of it, its place in the noise."""
        order = places.argsort()[self.places]
        return stepped.flatten()[order.to(stepped.device)].view(self.shape)


_DIGIT = 1024  # numbers of places are told in two digits: pipelines may compute in less than fp64


def lie_of(probe: Probe, ask: Ask) -> Lie:
    """How latents lie: what the VAE is handed by a call that takes no steps. Raises WrongBaseError for what is no order."""

    def decoded(noise: Callable[[Sequence[int]], Tensor]) -> Tensor:
        z, *_ = probe(replace(ask, noise=noise, times=times_of(probe.scheduler)))
        return probe.numbers(z)

    shift = decoded(lambda shape: torch.zeros(*shape, dtype=torch.float64))
    scale = decoded(lambda shape: torch.ones(*shape, dtype=torch.float64)) - shift
    if (scale == 0).any():
        raise probe.refused("what it decodes is no multiple of the noise")
    places = _places([(decoded(_digits(digit)) - shift) / scale for digit in (0, 1)], probe)
    return Lie(tuple(shift.shape[1:]), scale[0], shift[0], places)


def stepped(probe: Probe, ask: Ask) -> Tensor:
    """For each number of what the scheduler steps, its place in the noise, flat. `ask` has a denoiser that answers.

    Raises WrongBaseError for what is no order: a scheduler with levels of its own.
    """

    def sample(digit: int) -> Tensor:
        seen = probe(replace(ask, noise=_digits(digit)))
        return probe.numbers(seen[2] if len(seen) > 3 else None)

    return _places([sample(0), sample(1)], probe)


def times_of(scheduler: Component, time: Time | None = None, sigma: Tensor | None = None) -> Callable[..., None]:
    """What sets one time of a scheduler, or none. `sigma`, of a flow: the share of noise that it is of.

    `time` [1] depends on whether the pipeline says times itself: those are from before the shift.
    """

    def set_timesteps(
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: object = None,
        sigmas: object = None,
        mu: float | None = None,
        **_: object,
    ) -> None:
        times = torch.empty(0) if time is None else time(timesteps is not None)
        shares = torch.zeros(1) if sigma is None else torch.stack([sigma.float(), torch.zeros(())])
        scheduler.timesteps, scheduler.sigmas, scheduler.num_inference_steps = times.to(device), shares, len(times)

    return set_timesteps


def _digits(digit: int) -> Callable[[Sequence[int]], Tensor]:
    """Noise of one of both digits of the numbers of places."""

    def noise(shape: Sequence[int]) -> Tensor:
        places = torch.arange(torch.Size(shape).numel())
        return (places // _DIGIT if digit else places % _DIGIT).double().view(*shape)

    return noise


def _places(digits: Sequence[Tensor], probe: Probe) -> Tensor:
    """The numbers of places, flat. Raises WrongBaseError if not each is there once."""
    low, high = (digit.flatten() for digit in digits)
    places = (low.round() + _DIGIT * high.round()).long()
    exact = max(float((part - part.round()).abs().max()) for part in (low, high)) < 0.1
    if not exact or not torch.equal(places.sort().values, torch.arange(len(places))):
        raise probe.refused("its latents are more than another order of the noise")
    return places
