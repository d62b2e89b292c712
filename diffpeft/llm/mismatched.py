"""`ignore_mismatched_sizes`: an adapter's file, or a dict of tensors, some of which are for a model of other sizes; the adapter keeps its plain there."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import Tensor

from diffpeft.converters.formats.peft import PREFIX
from diffpeft.errors import CheckpointWarning

Sizes = tuple[int, ...]
Mismatch = tuple[str, Sizes, Sizes]  # a key, the sizes that it comes with, those of the adapter


def fitting(
    tensors: Mapping[str, Tensor], present: Mapping[str, Tensor], model: str
) -> tuple[dict[str, Tensor], list[Mismatch]]:
    """The tensors, and in the place of those that do not fit what is `present` under their keys; and which these are. Warns of them.

    Args:
        tensors, present: by PEFT's keys, with `base_model.model.` or without.
        model: what the warning calls the model.
    """
    plain = {key.removeprefix(PREFIX): tensor for key, tensor in present.items()}
    mismatched = [
        (key, tuple(tensor.shape), tuple(here.shape))
        for key, tensor in tensors.items()
        if (here := plain.get(key.removeprefix(PREFIX))) is not None and here.shape != tensor.shape
    ]
    if mismatched:
        told = "\n".join(
            f"- {key}: found shape {theirs} in the checkpoint and {ours} in the model instantiated"
            for key, theirs, ours in mismatched
        )
        warnings.warn(
            f"Some weights of {model} were not initialized from the model checkpoint and are being ignored because you passed "
            f"`ignore_mismatched_sizes=True`: {told}.",
            CheckpointWarning,
            stacklevel=5,
        )
    return {**tensors, **{key: plain[key.removeprefix(PREFIX)] for key, _, _ in mismatched}}, mismatched
