"""Any pipeline of diffusers from text to one image: its own call is asked for one step, and what it hands its scheduler is the prediction.

So nothing of it stands in a table: templates, masks, packing, time, sign and the latents' normalisation are what the pipeline makes of them. Examples are
asked for one by one, each with the caption and the time that are its own. What cannot be seen that way is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING

from diffpeft.errors import ConfigError, WrongBaseError
from diffpeft.families.base import CaptionReading, Conditions, Frame, Levels, Prompted, Sizes
from diffpeft.families.devices import sent
from diffpeft.families.discrete import Discrete
from diffpeft.families.dit import Transformer
from diffpeft.families.flow import Flow
from diffpeft.families.latents import factor, moments, precise
from diffpeft.families.prompts import refuse_skip, stacked

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffpeft.families.parts import Component, Configs, Parts
    from diffpeft.families.probe import Ask, Lie, StandIn, Told

Note = Callable[[str, tuple[object, ...], Mapping[str, object], object], None]
Recorded = list[object]  # what the pipeline's methods answered for a caption, in the order in which it called them

_FRAMED = ("original_size", "crops_coords_top_left", "target_size")  # that pipelines are told, as SDXL's is
_COUNTS = ("max_sequence_length", "tokenizer_max_length")  # what pipelines call the number of tokens
_VELOCITY = "flow_prediction"  # what the schedulers that can do several things call it
_TOKENS = 512  # that are said to be read, where nobody says how many are
_NEEDED = ("prompt", "height", "width", "num_inference_steps")
_OTHERS = ("strength", "mask_image", "control_image", "audio_length_in_s")  # that tell another kind of pipeline


@dataclass(frozen=True)
class OwnShift(Flow):
    """The levels of a flow whose mu the pipeline computes: `mu_at` latents [b, c, *size] of a shape."""

    mu_at: Callable[[Sequence[int]], float] = lambda _: 0.0

    def factor(self, shape: Sequence[int]) -> float:
        """S for latents [b, c, *size] of this shape."""
        return self.shift if self.shift is not None else self.shifted(self.mu_at(shape))


class Generic(Transformer):
    """The training side of a pipeline that no family knows better. A family whose pipeline says all but names and presets is one of these too.

    `recorded` are the methods of the pipeline that read a caption.
    """

    recorded: tuple[str, ...] = ("encode_prompt",)
    together = True
    name = "this model"
    tokens = 0  # as the pipeline says
    presets: Mapping[str, str] = MappingProxyType({})

    def __init__(self, parts: Parts, reading: CaptionReading):
        refuse_skip(reading, "it is read as its pipeline reads it")
        self.parts, self.pipe = parts, parts.pipe
        self.denoiser = "transformer" if parts.has("transformer") else "unet"
        self._check_kind()
        from diffpeft.families.probe import Probe

        self.presets = self.presets or _in_any_blocks()
        self.levels: Levels = self.levels_of(parts.pipe.scheduler)
        self.probe = Probe(parts, self._stand_in(parts.pipe.scheduler), self.denoiser)
        self.text_encoders = tuple(n for n in parts.pipe.components if self._reads(n) and parts.has(n))
        self.guidance = self._guidance()
        self.max_length = self._length(reading)
        self.resolution, self.multiple = self.sizes(parts.configs, parts.pipe).known()
        kind = type(parts.pipe).__name__.removesuffix("Pipeline")
        self.base_version = self.base_version or kind
        self.architecture = self.architecture or kind
        self._layouts: dict[tuple[int, int], Lie] = {}
        self._orders: dict[tuple[int, ...], Tensor] = {}
        self._mus: dict[tuple[int, ...], float] = {}
        self._template: Recorded | None = None
        self._heard: dict[str, object] = {}

    def _check_kind(self) -> None:
        """Raise WrongBaseError for a pipeline that is not one from text to an image."""
        import inspect

        from diffpeft.families.probe import Probe

        kind = Probe(self.parts, self.pipe.scheduler, self.denoiser)
        others = [name for name in _OTHERS if name in kind.keywords]
        needed = [
            n
            for n, p in kind.keywords.items()
            if p.default is inspect.Parameter.empty and n not in ("self", "prompt", "kwargs")
        ]
        lacking = [name for name in _NEEDED if name not in kind.keywords]
        if others or needed or lacking or not self.parts.has(self.denoiser) or not self.parts.has("vae"):
            raise kind.refused("it is not one from text to an image through latents")
        if self.parts.has(f"{self.denoiser}_2"):
            raise kind.refused("it has two denoisers")

    def _guidance(self) -> Mapping[str, str]:
        """How the pipeline is told a guidance. Where it takes two, one is what the denoiser reads."""
        names = [name for name in ("true_cfg_scale", "guidance_scale") if name in self.probe.keywords]
        return dict(zip(("cfg", "guidance"), names, strict=False))

    @staticmethod
    def _reads(component: str) -> bool:
        return component.startswith("text_encoder") or component == "vision_language_encoder"

    def _length(self, reading: CaptionReading) -> int:
        """How many tokens are read. Raises ConfigError where the pipeline cannot be told."""
        said = self.probe.keywords.get(self._counts())
        usual = said.default if said and isinstance(said.default, int) else self.tokens or _TOKENS
        if reading.max_length not in (None, usual) and said is None:
            raise ConfigError(
                f"max_length is {reading.max_length}", remedy="This pipeline cannot be told: leave --max-length out."
            )
        return reading.max_length or usual

    def _counts(self) -> str:
        """How the pipeline calls the number of tokens that it reads."""
        return next((name for name in _COUNTS if name in self.probe.keywords), _COUNTS[0])

    @classmethod
    def sizes(cls, configs: Configs, pipe: Component | None = None) -> Sizes:
        """Whole tokens of two latent pixels, or of as many as the denoiser says."""
        vae = factor(configs.get("vae", {}))
        read = configs.get("transformer") or configs.get("unet") or {}
        patch = read.get("patch_size")
        size = getattr(pipe, "default_sample_size", None) or read.get("sample_size")
        side = size * vae if isinstance(size, int) and vae else cls.side
        return Sizes(side, vae * max(2, patch if isinstance(patch, int) else 2) if vae else None)

    # -- levels --------------------------------------------------------------------------------------------------------

    def levels_of(self, scheduler: Component) -> Levels:
        """Those of a flow, or of a table of betas. Raises WrongBaseError for others."""
        config = scheduler.config
        if "beta_schedule" in config and not config.get("use_flow_sigmas"):
            levels, table = Discrete(scheduler), getattr(scheduler, "alphas_cumprod", None)
            usual = table is not None and (table.cpu() - levels.alphas).abs().max() <= 1e-5
            return self._checked(levels, usual)
        flow = Flow.of(scheduler, 1)
        usual = not config.get("invert_sigmas") and config.get("prediction_type", _VELOCITY) == _VELOCITY
        return self._checked(OwnShift(flow.shift, exponential=flow.exponential, mu_at=self._mu), usual)

    def _checked(self, levels: Levels, usual: bool) -> Levels:
        """Levels that are what they are taken for. Raises WrongBaseError for those that are not."""
        if not usual:
            raise WrongBaseError(
                "the model has noise levels of its own and cannot be trained",
                where=f"its scheduler, a {type(self.pipe.scheduler).__name__}",
                remedy="Models of a flow towards noise can, and those whose levels are those of their scheduler's betas.",
            )
        return levels

    def _stand_in(self, scheduler: Component) -> Component:
        """A scheduler of the same times that changes nothing beside."""
        from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

        if isinstance(self.levels, Discrete):
            return DDPMScheduler.from_config(scheduler.config)
        if "flow_shift" in scheduler.config:
            return FlowMatchEulerDiscreteScheduler(shift=scheduler.config["flow_shift"])
        return type(scheduler).from_config(scheduler.config)

    def _mu(self, shape: Sequence[int]) -> float:
        """The mu that the pipeline gives its scheduler for latents of a shape, in as many steps as it takes by itself."""
        from diffpeft.families.probe import stop

        key = tuple(shape[1:])
        if key not in self._mus:
            steps = self.probe.keywords["num_inference_steps"].default

            def times(
                num_inference_steps: object = None,
                device: object = None,
                timesteps: object = None,
                sigmas: object = None,
                mu: object = None,
            ) -> object:
                return stop(mu)

            mu, _ = self.probe(self._ask(self._size(shape), times=times, said={"num_inference_steps": steps}))
            if not isinstance(mu, (int, float)):
                raise self.probe.refused("its pipeline says no shift by size")
            self._mus[key] = float(mu)
        return self._mus[key]

    # -- latents -------------------------------------------------------------------------------------------------------

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [b, 3, h, w] in [-1, 1] -> mean and standard deviation of the latents, in the shape of the VAE's."""
        vae, lie = self.parts("vae"), self._layout((pixels.shape[-2], pixels.shape[-1]))
        mean, std = moments(vae, pixels.unsqueeze(2) if len(lie.shape) == pixels.ndim == 4 else pixels)
        if tuple(mean.shape[1:]) != lie.shape:
            raise self.probe.refused(f"its VAE encodes to {tuple(mean.shape[1:])} and decodes {lie.shape}")
        shift, scale = (t.to(mean) for t in (lie.shift, lie.scale))
        return (mean - shift) / scale, std / scale.abs()

    def _size(self, shape: Sequence[int]) -> tuple[int, int]:
        """Height and width of the picture of latents [b, c, *size]."""
        pixels = factor(self.parts.configs["vae"]) or 1
        return shape[-2] * pixels, shape[-1] * pixels

    def _layout(self, size: tuple[int, int]) -> Lie:
        """How the latents of a picture lie."""
        from diffpeft.families.probe import lie_of

        if size not in self._layouts:
            absent = self.pipe.vae is None
            self.parts("vae")  # pipelines read numbers of it
            lie = lie_of(self.probe, self._ask(size))
            if absent:
                self.parts.free("vae")
            if self._size(lie.shape) != size:
                raise self.probe.refused(f"it draws {self._size(lie.shape)} pixels where it is asked for {size}")
            self._layouts[size] = lie
        return self._layouts[size]

    # -- captions ------------------------------------------------------------------------------------------------------

    def embed(self, encoder: str, prompts: Sequence[str], images: Sequence[Tensor] = ()) -> Conditions:
        """What the pipeline reads of prompts, through all text encoders, under the name of the first."""
        if encoder != self.text_encoders[0]:
            return {}
        for name in self.text_encoders:
            self.parts(name)
        return stacked([flattened(prompt, self._record(prompt)) for prompt in prompts])

    def _record(self, prompt: str) -> Recorded:
        """What the pipeline reads of a prompt."""
        import torch

        from diffpeft.families.probe import on_host

        answers: Recorded = []

        def asked() -> Told:
            answers.clear()
            return self._read(lambda name, args, kwargs, answer: answers.append(answer), prompt=prompt)

        with torch.no_grad():
            self.probe.learn_quiet(asked) if self._template is None else asked()
        self._template = self._template or on_host(answers)
        return answers

    def _read(self, note: Note, led: bool = False, **said: object) -> Told:
        """A call with the real text encoders, up to the denoiser: what reads a caption is noted."""
        models = {name: self.parts(name) for name in self.text_encoders}
        encoder, side = models[self.text_encoders[0]], self.resolution // self.multiple * self.multiple
        noted = {name: _noted(name, self._method(name), note) for name in self.recorded}
        ask = self._ask((side, side), lambda: noted, models, encoder.device, encoder.dtype, said=said)
        return self.probe(replace(ask, led=led))

    def _method(self, name: str) -> Callable[..., object]:
        """A method of the pipeline as its class has it."""
        return partial(getattr(type(self.pipe), name), self.pipe)

    def _known(self) -> Recorded:
        """What some caption came to, on the host, where the numbers do not matter."""
        if self._template is None:
            self.embed(self.text_encoders[0], [""])
        assert self._template is not None
        return self._template

    def _know(self, answers: Recorded) -> None:
        """Learn from what a caption came to, if none has been read here."""
        from diffpeft.families.probe import on_host

        if self._template is None:
            self._template = on_host(answers)
            self.probe.learn_quiet(lambda: self.probe(self._ask((self.multiple, self.multiple))))

    def framed(self, frames: Sequence[Frame]) -> Conditions:
        """Original size, crop and target size, each with the height before the width [b, 2], where the pipeline is told of them."""
        import torch

        if not set(_FRAMED) <= self.probe.keywords.keys():
            return {}
        parts = zip(_FRAMED, ("original", "crop", "target"), strict=True)
        return {name: torch.tensor([getattr(frame, part) for frame in frames]) for name, part in parts}

    # -- a step --------------------------------------------------------------------------------------------------------

    def predict(self, x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """What the pipeline hands its scheduler [b, c, *size], of one example after the other."""
        import torch

        model = self.parts(self.denoiser)
        rows = [{name: value[n] for name, value in conditions.items()} for n in range(len(x))]
        return precise(
            torch.stack([self._one(model, *example) for example in zip(x.to(model.dtype), t, rows, strict=True)])
        )

    def _one(self, model: Component, x: Tensor, t: Tensor, row: Conditions) -> Tensor:
        """The prediction for latents x [c, *size] at a time t []."""
        import torch

        from diffpeft.families.probe import StandIn, counted, on_host

        size, answers = self._size(x.shape), restored(row, model.device)
        said = {name: tuple(row[name].tolist()) for name in _FRAMED if name in row}
        self._know(answers)
        lie = self._layout(size)
        ask = self._ask(
            size,
            partial(self._calls, answers),
            {self.denoiser: model},
            model.device,
            model.dtype,
            noise=lambda shape: lie.noise(x).view(*shape),
            times=self._time(torch.zeros(()) if t.is_meta else t.detach().cpu(), (1, *x.shape)),
            said=said,
        )
        with counted(self.probe, model) as seen:
            prediction, *_ = self.probe(ask)
        assert isinstance(prediction, torch.Tensor)
        if x.shape not in self._orders:
            double = StandIn(model, torch.device("cpu"), torch.float64, partial(_answer, on_host(seen[0])))
            self._orders[x.shape] = self._order(ask, answers, double)
        return lie.latents(prediction, self._orders[x.shape])

    def _order(self, ask: Ask, answers: Recorded, denoiser: StandIn) -> Tensor:
        """Where the numbers that the scheduler steps are in the noise, with a denoiser that answers at once."""
        from diffpeft.families.probe import on_host, stepped

        calls, models = partial(self._calls, on_host(answers)), {self.denoiser: denoiser}
        ask = replace(ask, device=denoiser.device, dtype=denoiser.dtype, models=models, calls=calls)
        return stepped(self.probe, ask)

    def _time(self, time: Tensor, shape: Sequence[int]) -> Callable[..., None]:
        """What sets one time of the stand-in's: the number of a level, or of a flow the share of noise, in the scheduler's unit."""
        from diffpeft.families.probe import times_of

        scheduler = self.probe.scheduler
        if isinstance(self.levels, Discrete):
            return times_of(scheduler, lambda early: time[None])
        unit = scheduler.config.get("num_train_timesteps", 1000)

        def times(early: bool) -> Tensor:
            """Times that a pipeline says itself are those before the shift."""
            return unit * (self.levels.place(time, shape) if early else time)[None].float()

        return times_of(scheduler, times, time)

    def _calls(self, answers: Recorded) -> dict[str, Callable[..., object]]:
        """The methods that read a caption, as ones that know what it came to."""
        left = iter(answers)

        def answer(*_: object, **__: object) -> object:
            try:
                return next(left)
            except StopIteration:
                raise RuntimeError("it reads more than the caption") from None

        return dict.fromkeys(self.recorded, answer)

    def _ask(
        self,
        size: tuple[int, int],
        calls: Callable[[], Mapping[str, Callable[..., object]]] | None = None,
        models: Mapping[str, Component] = MappingProxyType({}),
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        noise: Callable[[Sequence[int]], Tensor] | None = None,
        times: Callable[..., object] | None = None,
        said: Mapping[str, object] = MappingProxyType({}),
    ) -> Ask:
        """A call; where nothing else is said, on the host, of no noise, and of a caption that is known."""
        import torch

        from diffpeft.families.probe import Ask, times_of

        return Ask(
            size,
            device or torch.device("cpu"),
            dtype or torch.float64,
            {"prompt": "", self._counts(): self.max_length, **said},
            calls or partial(self._calls, self._known()),
            models,
            noise or (lambda shape: torch.zeros(*shape)),
            times or times_of(self.probe.scheduler, lambda early: torch.ones(1, dtype=torch.long)),
        )

    # -- pictures ------------------------------------------------------------------------------------------------------

    def prompted(self, prompts: Conditions, negative: Conditions, blank: bool = True) -> Prompted:
        """As texts, which the pipeline is taught to know: its text encoders are there for as long as they read them."""
        import torch

        from diffpeft.families.probe import PLAIN

        texts, absent = captions(prompts), [name for name in self.text_encoders if getattr(self.pipe, name) is None]
        said: dict[str, object] = (
            {"prompt": texts} if blank else {"prompt": texts, "negative_prompt": captions(negative)}
        )
        if (key := _key("", (), said)) not in self._heard:
            with torch.no_grad():
                for scale in (1.0, 3.0):
                    self._read(self._hear, scale > 1, **said, **dict.fromkeys(self.guidance.values(), scale))
            self._heard[key] = None
            self.parts.free(*absent)
        for name in self.recorded:
            setattr(self.pipe, name, partial(self._recall, name))
        said |= {self._counts(): self.max_length}
        return self.probe.taken({**PLAIN, **said})

    def _hear(self, name: str, args: tuple[object, ...], kwargs: Mapping[str, object], answer: object) -> None:
        self._heard[_key(name, args, kwargs)] = answer

    def _recall(self, name: str, *args: object, **kwargs: object) -> object:
        """What a method said before, or says now."""
        key = _key(name, args, kwargs)
        if key not in self._heard:
            for encoder in self.text_encoders:
                self.parts(encoder)
            return self._method(name)(*args, **kwargs)
        return self._heard[key]


def _in_any_blocks() -> Mapping[str, str]:
    """The usual presets, of the blocks of any model: outside of these, weights are read by something else than their layers more often."""
    from diffpeft.model.target import PRESETS

    endings = {preset: "|".join(map(re.escape, PRESETS[preset])) for preset in ("attn", "attn-mlp")}
    return {preset: rf"(.+\.)?\w*(blocks|layers)\.\d+\.(.+\.)?({ends})" for preset, ends in endings.items()}


def _answer(answer: object, *_: object, **__: object) -> object:
    """Whatever was asked."""
    return answer


def _key(name: str, args: tuple[object, ...], kwargs: Mapping[str, object]) -> str:
    """A call by what can be told of it: texts and numbers."""
    told = {key: value for key, value in kwargs.items() if isinstance(value, (str, bool, int, list, tuple, type(None)))}
    return f"{name} {[arg for arg in args if isinstance(arg, (str, bool, int, list))]} {sorted(told.items())}"


def _noted(
    name: str,
    method: Callable[..., object],
    note: Note,
) -> Callable[..., object]:
    """A method whose answers are noted."""

    def noted(*args: object, **kwargs: object) -> object:
        answer = method(*args, **kwargs)
        note(name, args, kwargs, answer)
        return answer

    return noted


def flattened(prompt: str, answers: Recorded) -> Conditions:
    """Tensors in lists and tuples as conditions of one prompt, each [n]: of several lengths they can be filled up with zeros."""
    import torch

    tensors: list[Tensor] = []

    def noted(value: object) -> object:
        if isinstance(value, torch.Tensor):
            tensors.append(value)
            return {"tensor": len(tensors) - 1}
        if isinstance(value, (list, tuple)):
            return {type(value).__name__: [noted(one) for one in value]}
        return value

    structure = json.dumps([prompt, noted(answers)]).encode()
    flat = {"structure": torch.tensor(list(structure), dtype=torch.uint8)}
    for n, tensor in enumerate(tensors):
        flat |= {f"{n}": tensor.flatten(), f"{n}.shape": torch.tensor(tensor.shape, dtype=torch.long)}
    return flat


def restored(row: Conditions, device: torch.device) -> Recorded:
    """What was flattened, on a device."""

    def made(value: object) -> object:
        if not isinstance(value, dict):
            return value
        ((kind, of),) = value.items()
        if kind != "tensor":
            values = [made(one) for one in of]
            return values if kind == "list" else tuple(values)
        shape = row[f"{of}.shape"].tolist()
        return sent(row[f"{of}"][: math.prod(shape)], device).view(shape)

    answers = made(_structure(row["structure"])[1])
    assert isinstance(answers, list)
    return answers


def _structure(written: Tensor) -> list[object]:
    """A caption, and what it came to with the numbers of tensors."""
    said: list[object] = json.loads(bytes(written.tolist()).rstrip(b"\0"))
    return said


def captions(conditions: Conditions) -> list[str]:
    """The captions that conditions are of."""
    return [str(_structure(row)[0]) for row in conditions["structure"]]
