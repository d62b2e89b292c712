"""The schedulers of diffusers by the names that people know samplers by: `euler_a`, `dpm++_2m_karras`.

The names are those of stable-diffusion-webui in lower case, with underscores. Which class is which sampler is diffusers' own table of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diffpeft.errors import ConfigError, UnknownNameError, known_names

if TYPE_CHECKING:
    from diffpeft.families.parts import Component, Pipeline


@dataclass(frozen=True)
class KnownSampler:
    """A scheduler: its class, for models that learn betas and for those of flows, what is changed of its config, and what A1111 calls it."""

    label: str
    betas: str | None = None
    flow: str | None = None
    changes: Mapping[str, object] = field(default_factory=dict)


_SDE = {"algorithm_type": "sde-dpmsolver++"}
_MULTI, _SINGLE = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
# Pipelines of flows hand schedulers no generator: what draws noise at each step has none there, for it would not follow from the seed.
SAMPLERS = {
    "ddim": KnownSampler("DDIM", "DDIMScheduler"),
    "ddpm": KnownSampler("DDPM", "DDPMScheduler"),
    "deis": KnownSampler("DEIS", "DEISMultistepScheduler", "DEISMultistepScheduler"),
    "dpm++_2m": KnownSampler("DPM++ 2M", _MULTI, _MULTI, {"algorithm_type": "dpmsolver++"}),
    "dpm++_2m_sde": KnownSampler("DPM++ 2M SDE", _MULTI, None, _SDE),
    "dpm++_2s": KnownSampler("DPM++ 2S", _SINGLE, None, {"algorithm_type": "dpmsolver++"}),
    "dpm2": KnownSampler("DPM2", "KDPM2DiscreteScheduler"),
    "dpm2_a": KnownSampler("DPM2 a", "KDPM2AncestralDiscreteScheduler"),
    "euler": KnownSampler("Euler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"),
    "euler_a": KnownSampler("Euler a", "EulerAncestralDiscreteScheduler"),
    "heun": KnownSampler("Heun", "HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
    "lcm": KnownSampler("LCM", "LCMScheduler"),
    "lms": KnownSampler("LMS", "LMSDiscreteScheduler"),
    "pndm": KnownSampler("PLMS", "PNDMScheduler"),
    "tcd": KnownSampler("TCD", "TCDScheduler"),
    "unipc": KnownSampler("UniPC", "UniPCMultistepScheduler", "UniPCMultistepScheduler"),
}
_SPACINGS = {"karras": "Karras", "exponential": "Exponential", "beta": "Beta"}  # {how noise levels lie: A1111's word}
_PACKAGES = ("scipy",)  # that schedulers are computed with
_SPELT = {"plms": "pndm", "euler_ancestral": "euler_a", "dpm2_ancestral": "dpm2_a", "uni_pc": "unipc"}
_BETAS = {sampler.betas for sampler in SAMPLERS.values()}


@dataclass(frozen=True)
class ChosenSampler:
    """A sampler, and how its noise levels lie: `karras`, `exponential`, `beta`, or as the class has them."""

    name: str
    sampler: KnownSampler
    spacing: str | None = None


def chosen(name: str) -> ChosenSampler:
    """The sampler of a name, also as A1111 writes it (`DPM++ 2M Karras`), or of a class of diffusers. Raises UnknownNameError."""
    word = "_".join(name.replace("-", " ").replace("_", " ").lower().split())
    by_class = {
        cls: short for short, row in reversed(SAMPLERS.items()) for cls in (row.betas, row.flow) if cls is not None
    }
    head, _, last = word.rpartition("_")
    spacing = last if last in _SPACINGS else None
    word = head if spacing else word
    word = by_class.get(name, _SPELT.get(word, word))
    if word not in SAMPLERS:
        raise UnknownNameError.of("scheduler", word, SAMPLERS, "the name of a scheduler, after which may stand _karras")
    return ChosenSampler(name, SAMPLERS[word], spacing)


def label_of(scheduler: Component) -> dict[str, str]:
    """A scheduler in A1111's words: the sampler, and how its noise levels lie; the name of its class where there is no such word."""
    cls, config = type(scheduler).__name__, scheduler.config
    alike = [row for row in SAMPLERS.values() if cls in (row.betas, row.flow)]
    exact = [row for row in alike if all(config.get(key) == value for key, value in row.changes.items())]
    label = (exact or alike or [KnownSampler(cls)])[0].label
    spacing = next((word for key, word in _SPACINGS.items() if config.get(f"use_{key}_sigmas")), None)
    return {"Sampler": label} | ({"Schedule type": spacing} if spacing else {})


def scheduler_for(pipe: Pipeline, name: str) -> Component:
    """A new scheduler for a pipeline, which has what the pipeline's own says of the model. `pipe` needs no weights.

    Raises UnknownNameError, or ConfigError for one that the pipeline cannot be drawn with.
    """
    import diffusers

    choice = chosen(name)
    cls = _class_for(pipe, choice.sampler)
    if cls is None:
        fitting = [short for short, row in SAMPLERS.items() if _class_for(pipe, row)]
        raise ConfigError(
            f"a {type(pipe).__name__} cannot be drawn with {choice.name}",
            remedy=f"It can be with {known_names(fitting)}." if fitting else "Leave --scheduler out.",
        )
    kind, config = getattr(diffusers, cls), pipe.scheduler.config
    changes = dict(choice.sampler.changes) | (_flow_changes(kind, config) if is_flow(pipe.scheduler) else {})
    takes = inspect.signature(kind.__init__).parameters
    spacings = {f"use_{key}_sigmas": key == choice.spacing for key in _SPACINGS if f"use_{key}_sigmas" in takes}
    if choice.spacing and f"use_{choice.spacing}_sigmas" not in takes:
        raise ConfigError(
            f"{choice.name}: a {cls} has no such noise levels", remedy=f"Leave _{choice.spacing} out of the name."
        )
    try:
        return kind.from_config(config, **changes, **(spacings if choice.spacing else {}))
    except ImportError as error:
        package = next((name for name in _PACKAGES if name in str(error)), "")
        raise ConfigError(f"{choice.name} needs the package {package}", remedy=f"pip install {package}") from error


def is_flow(scheduler: Component) -> bool:
    """Whether a scheduler is of a model that predicts how data become noise along a straight line."""
    config = scheduler.config
    flows = bool(config.get("use_flow_sigmas")) or config.get("prediction_type") == "flow_prediction"
    return flows or type(scheduler).__name__.startswith("FlowMatch")


def _flow_changes(kind: type[Component], config: Mapping[str, object]) -> dict[str, object]:
    """What a scheduler must be told of a flow: that it is one, and how its noise levels are shifted, which two schedulers call by two names."""
    takes = inspect.signature(kind.__init__).parameters
    shift = config.get("flow_shift", config.get("shift"))
    told = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift, "shift": shift}
    return {key: value for key, value in told.items() if key in takes and value is not None}


def _class_for(pipe: Pipeline, sampler: KnownSampler) -> str | None:
    """The name of the class that draws with a pipeline; None if there is none."""
    import diffusers

    scheduler = pipe.scheduler
    if is_flow(scheduler):
        return sampler.flow if sampler.flow and _takes_all(getattr(diffusers, sampler.flow), pipe) else None
    return sampler.betas if type(scheduler).__name__ in _BETAS else None


def _takes_all(kind: type[Component], pipe: Pipeline) -> bool:
    """Whether a scheduler's steps are set as a pipeline sets those of its own: with noise levels, and with a shift by the picture's size."""
    takes = inspect.signature(kind.set_timesteps).parameters
    sets = {"sigmas": "sigmas" in inspect.signature(type(pipe).__call__).parameters}
    sets["mu"] = bool(pipe.scheduler.config.get("use_dynamic_shifting"))
    return all(name in takes for name, needed in sets.items() if needed)
