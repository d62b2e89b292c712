"""safeloras (cloneofsimo/lora): `unet:12:up`, `text_encoder:3:down`, layers by their number in the order in which the model holds them. Only read.

A layer is a linear one inside a module of a class that the metadata list. The order is that of SD1.x and SD2.x in the diffusers of then: the blocks
down, up and in the middle; in a transformer block the first attention, the feed-forward and the second attention. (Later the feed-forward came last;
it has eight rows a column, so shapes tell which it is.) Scales are 1. Embeddings stand under their token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from diffpeft.bundle import Entry, dotted, parted
from diffpeft.converters.families import TABLES, Table
from diffpeft.converters.formats.base import KeyParts
from diffpeft.converters.formats.diffusers import Diffusers
from diffpeft.errors import CheckpointError, listed

_KEY = re.compile(r"(?P<component>unet|text_encoder):(?P<number>\d+):(?P<role>up|down)")
_ROLES = {"down": "lora_A", "up": "lora_B"}
_ATTENTION, _GEGLU = ("to_q", "to_k", "to_v", "to_out.0"), "ff.net.0.proj"
_IN_BLOCK = (*(f"attn1.{n}" for n in _ATTENTION), _GEGLU, *(f"attn2.{n}" for n in _ATTENTION))
_BLOCKS = (
    *(f"down_blocks.{level}.attentions.{n}" for level in (0, 1, 2) for n in (0, 1)),
    *(f"up_blocks.{level}.attentions.{n}" for level in (1, 2, 3) for n in (0, 1, 2)),
    "mid_block.attentions.0",
)
_CLIP = tuple(f"text_model.encoder.layers.{n}.self_attn.{p}_proj" for n in range(32) for p in ("k", "v", "q", "out"))
_MAX_CLASSES = 1000  # characters
_CLASSES = {"unet": {"CrossAttention", "Attention", "GEGLU"}, "text_encoder": {"CLIPAttention"}}


def layers_in(component: str, classes: Collection[str], last: bool = False) -> Iterator[str]:
    """The layers inside modules of some classes, in order; the feed-forward comes last in a block or between the attentions."""
    if component != "unet":
        yield from _CLIP
        return
    inside = sorted(_IN_BLOCK, key=lambda name: name == _GEGLU) if last else _IN_BLOCK
    for block in _BLOCKS:
        for layer in inside:
            if ("GEGLU" if layer == _GEGLU else "Attention") in {c.removeprefix("Cross") for c in classes}:
                yield f"{block}.transformer_blocks.0.{layer}"


_DEFAULT = {component: tuple(layers_in(component, classes)) for component, classes in _CLASSES.items()}


class SafeLoras(Diffusers):
    """Numbers."""

    name, writable = "safeloras", False
    tables: Mapping[str, Table] = {family: TABLES[family] for family in ("sd15", "sd2")}

    def split(self, key: str) -> KeyParts | None:
        """The component and the layer that has the number if the classes are the usual ones; see `configured` for others."""
        match = _KEY.fullmatch(key)
        layers = _DEFAULT[match["component"]] if match else ()
        if match is None or int(match["number"]) >= len(layers):
            return None
        return KeyParts(match["component"], layers[int(match["number"])], _ROLES[match["role"]])

    def configured(self, entries: Sequence[Entry], metadata: Mapping[str, str]) -> list[Entry]:
        """With the names that the layers of the classes in the metadata have, which must be those of a Stable Diffusion."""
        named = {c: list(layers_in(c, _classes(c, metadata), _feed_forward_last(entries))) for c in _CLASSES}
        numbers = {e.layer: int(e.keys[0].split(":")[1]) for e in entries}
        beyond = [e.keys[0] for e in entries if numbers[e.layer] >= len(named[parted(e.layer)[0]])]
        if beyond:
            raise CheckpointError("there are more layers than a Stable Diffusion 1 or 2 has", where=listed(beyond, 3))
        out = []
        for e in entries:
            component = parted(e.layer)[0]
            out.append(replace(e, layer=dotted(component, named[component][numbers[e.layer]])))
        wide = [e for e in out if _wide(e)]
        wrong = [e.keys[0] for e in out if wide and _wide(e) != e.layer.endswith(_GEGLU)]
        if wrong:
            raise CheckpointError(
                "the shapes are not those of the layers with these numbers in a Stable Diffusion 1 or 2",
                where=listed(wrong, 3),
            )
        return out


def _classes(component: str, metadata: Mapping[str, str]) -> set[str]:
    """The classes of the modules that were adapted."""
    try:
        if len(text := metadata.get(component, "[]")) > _MAX_CLASSES:
            raise ValueError(f"it has {len(text)} characters")
        classes = set(json.loads(text)) if component in metadata else _CLASSES[component]
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"the metadata {component!r} is no list of classes ({error})") from error
    if other := classes - _CLASSES[component]:
        raise CheckpointError(
            f"the layers of {listed(sorted(map(str, other)))} have no known order",
            where=component,
            remedy=f"Known: {', '.join(sorted(_CLASSES[component]))}.",
        )
    return classes


def _feed_forward_last(entries: Sequence[Entry]) -> bool:
    """Whether the wide layers of the UNet are each block's last, number 8 of 9, and not number 4."""
    numbers = {int(e.keys[0].split(":")[1]) % 9 for e in entries if e.layer.startswith("unet.") and _wide(e)}
    return numbers == {8}


def _wide(entry: Entry) -> bool:
    return entry.tensors["lora_B"].shape[0] == 8 * entry.tensors["lora_A"].shape[1]
