"""What the pipeline that is running says of its call: which one it is, how many prompts it draws, and the scale that diffusers' arguments ask for.

A model that a pipeline calls is given rows of numbers and no more; the rest stands in the frame of the pipeline's `__call__`, which is on the stack.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

import torch
from torch import nn

from diffpeft.errors import ConfigError, shown
from diffpeft.methods.config import is_fp32
from diffpeft.methods.peft_config import is_served

# the arguments in which diffusers' pipelines and models take {"scale": s}
ATTENTION_KWARGS = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")
_ENCODING = ("encode_prompt", "_encode_prompt", "_encode_prompt_free_noise")  # methods that take `lora_scale`
_PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def pipeline_frame() -> FrameType | None:
    """The frame of the call of a pipeline that this thread is in, if it is in one. Several pipelines may share a model."""
    for frame in _frames():
        if frame.f_code.co_name == "__call__":
            caller = frame.f_locals.get("self")
            if not isinstance(caller, nn.Module) and hasattr(caller, "scheduler") and hasattr(caller, "components"):
                return frame
    return None


def running_pipeline() -> Any:
    """The pipeline whose call this thread is in, or None."""
    frame = pipeline_frame()
    return None if frame is None else frame.f_locals["self"]


def rows_asked(early: bool) -> int | None:
    """How many rows the running pipeline asks for without guidance: one an image, or (`early`, in text encoders) one a prompt.

    None outside of pipelines, and where a pipeline does not say.
    """
    frame = pipeline_frame()
    if frame is None:
        return None
    values = frame.f_locals
    latents, prompts = values.get("latents"), values.get("batch_size")
    if not early and isinstance(latents, torch.Tensor) and latents.dim():
        return len(latents)
    if isinstance(prompts, bool) or not isinstance(prompts, int):
        return None
    images = 1 if early else next((values[name] for name in _PER_PROMPT if isinstance(values.get(name), int)), 1)
    return prompts * images


def asked_scale(early: bool, arguments: Mapping[str, object]) -> float:
    """The scale that `attention_kwargs={"scale": s}` asks for, in any of diffusers' spellings; 1 if nothing does.

    Args:
        early: for a text encoder, which its pipeline tells the scale in other ways.
        arguments: those by name of the model's call.

    Raises ConfigError for a scale that is no finite number.
    """
    if early and is_served():  # diffusers has scaled its layers
        return 1.0
    scale = _encoders_scale() if early else _scale_in(arguments)
    if scale is None:
        return 1.0
    if not is_fp32(scale):
        raise ConfigError(f"the scale in the attention arguments is {shown(scale)}", remedy="It is a finite number.")
    return float(scale)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def for_diffusers(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a model's call without a scale, where diffusers could do nothing with it but warn, or do again what is done: it scales peft's layers."""
    if _scale_in(arguments) is None:
        return arguments
    from diffusers.utils import USE_PEFT_BACKEND

    if USE_PEFT_BACKEND and not is_served():
        return arguments
    scaled = {name: arguments[name] for name in ATTENTION_KWARGS if isinstance(arguments.get(name), Mapping)}
    return {**arguments, **{name: {k: v for k, v in told.items() if k != "scale"} for name, told in scaled.items()}}


def _encoders_scale() -> Any:
    """What `encode_prompt` was given as `lora_scale`, else what its pipeline was called with."""
    for frame in _frames():
        if frame.f_code.co_name in _ENCODING and frame.f_locals.get("lora_scale") is not None:
            return frame.f_locals["lora_scale"]
    call = pipeline_frame()
    return None if call is None else _scale_in(call.f_locals)


def _scale_in(arguments: Mapping[str, object]) -> Any:
    for name in ATTENTION_KWARGS:  # no generator: a compiled model is called from here, and dynamo does not trace them
        told = arguments.get(name)
        if isinstance(told, Mapping) and "scale" in told:
            return told["scale"]
    return None


def takes_scale(model: nn.Module, component: str) -> bool:
    """Whether a model is one that diffusers scales adapters of: its forward takes attention arguments, or it is a pipeline's text encoder."""
    return component.startswith("text_encoder") or _takes_attention_kwargs(type(model).forward)


@functools.cache
def _takes_attention_kwargs(forward: Callable[..., object]) -> bool:
    try:
        return bool({*ATTENTION_KWARGS} & {*inspect.signature(forward).parameters})
    except (TypeError, ValueError):
        return False
