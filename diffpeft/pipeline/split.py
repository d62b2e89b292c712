"""Text encoders in files of their own, with transformers' names: as ComfyUI keeps a model's parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from diffpeft import io
from diffpeft.errors import CheckpointError, listed
from diffpeft.families.parts import Component
from diffpeft.pipeline import few_bits

if TYPE_CHECKING:
    import torch
    from torch import nn

_OLD_LEVELS = (
    "text_model.",
    "model.",
)  # that older versions of transformers have around a CLIP, and a head's around a language model


def assigned(files: Sequence[str], encoders: Mapping[str, nn.Module]) -> dict[str, str]:
    """{text encoder: the file that has all its weights, by names and shapes}. `encoders` may be without numbers.

    Raises CheckpointError for a file that is none's.
    """
    owners = {}
    for file in files:
        handles, _ = io.header(file)
        shapes = {_plain(name): tuple(handle.shape) for name, handle in handles.items()}
        fitting = [name for name, model in encoders.items() if _holds(shapes, model)]
        owner = max(fitting, key=lambda name: len(encoders[name].state_dict()), default=None)
        if owner is None:
            raise CheckpointError(
                "this is none of the model's text encoders, or not with all weights",
                where=file,
                remedy=f"It has {listed([f'{k} ({type(m).__name__})' for k, m in encoders.items()])}, in transformers' names.",
            )
        owners[owner] = file
    return owners


def _plain(name: str) -> str:
    return next((name.removeprefix(level) for level in _OLD_LEVELS if name.startswith(level)), name)


def _holds(shapes: Mapping[str, Sequence[int]], model: nn.Module) -> bool:
    """Whether each of a model's weights is there in its shape, tied ones under any of their names."""
    names: dict[int, list[tuple[str, tuple[int, ...]]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append((_plain(name), tuple(parameter.shape)))
    return all(any(shapes.get(name) == shape for name, shape in tied) for tied in names.values())


def filled(skeleton: nn.Module, file: str, dtype: torch.dtype) -> nn.Module:
    """A model like `skeleton`, which has no numbers, with those of a file under its names."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        made_of = getattr(type(skeleton), "from_config", type(skeleton))  # diffusers' way, or transformers'
        model: Component = made_of(skeleton.config)
    names = {_plain(name): name for name in model.state_dict()}
    tensors = {
        names[plain]: t for name, t in few_bits.read(file).plain(dtype).items() if (plain := _plain(name)) in names
    }
    model.load_state_dict(tensors, strict=False, assign=True)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model
