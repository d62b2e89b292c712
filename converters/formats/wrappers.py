"""What programs leave in front of a layer's name or within it: the levels that torch.compile, DistributedDataParallel, FSDP, PEFT and pipelines put
around a module. They say nothing of the layer, so all formats read keys without them.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from diffpeft.bundle import COMPONENTS

PEFT = "base_model.model."
# levels that may stand anywhere
_LEVELS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
# what may stand in front of a model's own names; `pipe.` and a model's name are DiffSynth-Studio's
_FRONT = rf"(?=module\.|pipe\.|base_model\.)(?:module\.|pipe\.(?:dit\.|vace\.)?)*(?:{re.escape(PEFT)})*"
_ANYWHERE = re.compile(rf"(?<![^.])(?:{'|'.join(_LEVELS)})\.")
_DOTTED = re.compile(rf"(?P<component>(?:(?:{'|'.join(COMPONENTS)}|diffusion_model)\.)?)(?P<wrappers>{_FRONT})")
# the same in flat names, which start with the name of a network
_FLAT = re.compile(
    r"(?P<network>(?:lora_unet_|lora_transformer_|oft_unet_|lycoris_|lora_te\d?_))_?"
    rf"(?:(?:{'|'.join(level.lstrip('_') for level in _LEVELS)}|base_model_model|module)_)*"
    r"(?P<layer>[^.]*?)_*(?P<end>\..*)"
)
_FLAT_LEVEL = re.compile(rf"(?:{'|'.join(_LEVELS)})_")
_HINT = re.compile(rf"(?:{'|'.join(_LEVELS)}|module|pipe|base_model)[._]|_\.|__")


def all_unwrapped(keys: Collection[str]) -> dict[str, str]:
    """{key: without the levels of wrappers}. Most files have none, which one search tells."""
    if not _HINT.search("\n".join(keys)):
        return {key: key for key in keys}
    return {key: unwrapped(key) for key in keys}


def unwrapped(key: str) -> str:
    """The key without the levels of wrappers. One `base_model.model.` in front stays: it is PEFT's spelling."""
    if not _HINT.search(key):
        return key
    if flat := _FLAT.fullmatch(key):
        return flat["network"] + _FLAT_LEVEL.sub("", flat["layer"]) + flat["end"]
    key = _ANYWHERE.sub("", key)
    match = _DOTTED.match(key)
    if match is None:
        return key
    prefix = PEFT if PEFT in match["wrappers"] and not match["component"] else ""
    return match["component"] + prefix + key[match.end() :]
