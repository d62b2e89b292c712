"""OneTrainer: flat names in diffusers' words, `lora_transformer_single_transformer_blocks_0_attn_to_q.lora_down.weight`, alphas as tensors.

That is what it saves by default; text encoders are numbered (Flux's T5 is `lora_te2_`) unless there is one. The families that it learnt later have
dotted names, `transformer.layers.0.attention.to_q.lora_down.weight`. Also read are the standard that it wrote for some time (OMI), which numbers the
parts of the original's fused layers: `transformer.single_blocks.0.linear1.3.lora_up.weight`, and what it writes in other programs' names.

Its rotations are PEFT's with five terms. Those marked `oft_R.scaled_oft` are divided by 2 sqrt(b - 1), and convolutions are turned the other way.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

from diffpeft import io
from diffpeft.bundle import COMPONENTS, Entry, Handle
from diffpeft.converters.families import TABLES, Table
from diffpeft.converters.formats.base import Answer, KeyParts, denoiser, dotted_role
from diffpeft.converters.formats.config import ranks_of
from diffpeft.converters.formats.fields import blocks_of
from diffpeft.converters.formats.kohya import TRANSFORMER, UNET, Kohya
from diffpeft.converters.formats.schema import number
from diffpeft.errors import CheckpointError, CheckpointWarning, listed
from diffpeft.files import parsed
from diffpeft.handles import Cast
from diffpeft.methods.layout import PRODUCTS, ROLES

TERMS = 5
_AS_ITS = {"side": "input", "neumann": TERMS, "neumann_last": 1, "coft": None}  # the options of a rotation of its
# the families with flat names that have no UNet
_FLAT = tuple(TABLES[family] for family in ("sd3", "flux", "flux2", "chroma", "pixart", "hunyuan_video"))
_ENCODERS = ("clip_l", "clip_g", "t5", "llama", "gemma", "qwen")
_WORD = re.compile(rf"(?:{'|'.join((*COMPONENTS, *_ENCODERS, 'diffusion_model'))})\.")
_PART = re.compile(r"(?P<layer>.+[._](?:qkv|kv_linear|linear1))\.(?P<part>\d)")
_ROTATION, _MARKER = ".oft_R.weight", ".oft_R.scaled_oft"
_CORES = ("hada_t1", "hada_t2", "lokr_t2")  # of Tucker's decomposition, which it does not have
_PRODUCTS = tuple(role for method in ("loha", "lokr") for role in ROLES[method] if role not in _CORES)
_ROLES = ("lora_A", "lora_B", "dora_scale", *_PRODUCTS, "oft_R", "alpha")
_SPELT = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight", "oft_R": "oft_R.weight"}
# the convolutions of all families by their names, and UNets' layers that are convolutions in SD1.x
_CONVOLUTION = re.compile(r"(.+\.)?(conv[^.]*|(pos|patch)_embed\.proj|x_embedder\.proj)")
_POINTWISE = re.compile(r"unet\..+\.attentions\.\d+\.proj_(in|out)")
_CROSS = re.compile(r"unet\..+\.attn2\.to_[kv]")


class OneTrainer(Kohya):
    """Flat or dotted names, by the family."""

    owned = frozenset({"ot_branch", "ot_revision", "ot_config"})
    suffixes: Mapping[str, str] = {role: _SPELT.get(role, role) for role in _ROLES}

    def __init__(self) -> None:
        super().__init__("onetrainer", originals=False)

    def split(self, key: str) -> KeyParts | None:
        """Flat or dotted; the mark of a scaled rotation stands where other methods have their alpha."""
        marked = key.endswith(_MARKER)
        key = key.removesuffix(_MARKER) + ".alpha" if marked else key
        word = _WORD.match(key)
        if word is None and key.endswith(_ROTATION):
            flat = super().split(key.removesuffix(_ROTATION) + ".alpha")
            return replace(flat, role="oft_R") if flat else None
        if word is None:
            return super().split(key)
        layer_role = dotted_role(key[word.end() :])
        if layer_role is None:
            return None
        layer, role = layer_role
        part = _PART.fullmatch(layer)
        layer = (part["layer"] if part else layer).replace(".", "_")
        return KeyParts(word[0], layer, role, int(part["part"]) if part else None)

    def component(self, word: str, table: Table) -> str:
        """By sd-scripts' numbers, a component's own name, or the standard's names of text encoders."""
        if not word.endswith("."):
            return super().component(word, table)
        name = word[:-1]
        if name in table.components or name.startswith("text_encoder"):
            return name
        if name not in _ENCODERS:
            return denoiser(table)
        components = (c for c, e in table.encoders.items() if e.comfyui.startswith(f"text_encoders.{name}"))
        return next(components, next(iter(table.encoders), "text_encoder"))

    def word(self, component: str, table: Table) -> str | None:
        """Dotted names have the component's. A text encoder that is alone has no number."""
        if component not in table.components:
            return None
        if denoiser(table) != "unet" and not any(table is flat for flat in _FLAT):
            return f"{component}."
        if component in table.encoders:
            number = component.removeprefix("text_encoder").removeprefix("_") or "1"
            return f"lora_te{number if len(table.encoders) > 1 else ''}_"
        return UNET if component == "unet" else TRANSFORMER

    def join(self, part: KeyParts, entry: Entry) -> str:
        """Flat or dotted, as the word is."""
        layer = part.layer if part.word.endswith(".") else part.layer.replace(".", "_")
        return f"{part.word}{layer}.{self.suffixes[part.role]}"

    def configured(self, entries: Sequence[Entry], metadata: Mapping[str, str]) -> list[Entry]:
        """With its rotations as PEFT would have them."""
        rotations = [e for e in entries if "oft_R" in e.tensors]
        if scaled := [e.layer for e in rotations if e.alpha is not None]:
            warnings.warn(
                f"the scale of {len(scaled)} rotations went into oft_R: {listed(scaled, 3)}",
                CheckpointWarning,
                stacklevel=2,
            )
        kinds = {e.layer: _is_convolution(e, entries) for e in rotations}
        if unknown := [layer for layer, kind in kinds.items() if kind is None]:
            raise CheckpointError(
                "OneTrainer turns convolutions the other way, and the names do not tell whether these layers are some",
                where=listed(unknown, 3),
                remedy="With a rotation of a cross-attention (attn2.to_k) the file would tell the model.",
            )
        coft = _coft(metadata)
        return [
            _as_peft(e, coft, bool(kinds[e.layer])) if "oft_R" in e.tensors else e
            for e in super().configured(entries, metadata)
        ]

    def holds(self, entries: Sequence[Entry]) -> Answer:
        """As for all; rotations are a series of five terms, of layers that are known to be convolutions or none."""
        nested = [e.layer for e in entries if len(e.methods) > 1]
        rotations = [e for e in entries if "oft_R" in e.tensors]
        other = [
            e.layer
            for e in rotations
            if "neumann" not in e.options or not _AS_ITS.items() <= {**_AS_ITS, **e.options}.items()
        ]
        unknown = [e.layer for e in rotations if _is_convolution(e) is None]
        return (
            Answer.unless(nested, "OneTrainer knows DoRA over LoRA alone")
            and Answer.unless(other, f"OneTrainer's rotations are a series of {TERMS} terms without a bound")
            and Answer.unless(
                unknown, "it turns convolutions the other way, and no name tells whether these layers are some"
            )
            and super().holds(entries)
        )

    def stored(self, entry: Entry) -> dict[str, Handle]:
        """LyCORIS's tensors, and rotations of convolutions the other way round: only signs change."""
        turn = -1.0 if "oft_R" in entry.tensors and _is_convolution(entry) else 1.0
        return {role: io.scaled(h, turn) if role == "oft_R" else h for role, h in super().stored(entry).items()}

    def alphas(self, entries: Sequence[Entry]) -> dict[str, Handle | float]:
        """It writes one for each layer; without one the scale is 1."""
        added = {e.layer: e for e in entries if e.method in PRODUCTS}
        ranks = ranks_of(added.values())
        return {
            layer: float(ranks[layer]) if e.alpha is None else e.alpha
            for layer, e in added.items()
            if ranks[layer] or e.alpha is not None
        }

    def metadata(self, entries: Sequence[Entry], earlier: Mapping[str, str]) -> dict[str, str]:
        """What it said of itself."""
        return {key: earlier[key] for key in self.owned if key in earlier}


def _is_convolution(entry: Entry, others: Sequence[Entry] = ()) -> bool | None:
    """Whether a layer is a convolution, as its shape or its name tells, or the cross-attentions beside it; None if nothing does."""
    if entry.shape is not None:
        return len(entry.shape) > 2
    if not _POINTWISE.fullmatch(entry.layer):
        return _CONVOLUTION.fullmatch(entry.layer) is not None
    widths = {math.prod(blocks_of(e)) for e in others if "oft_R" in e.tensors and _CROSS.fullmatch(e.layer)}
    return None if not widths else not widths & {1024, 1280, 2048}  # all models but SD1.x have linear layers there


def _as_peft(entry: Entry, coft: float | None, convolution: bool) -> Entry:
    """A rotation by PEFT's rule: transposed for a convolution, that is of the other sign, and with the scale in the numbers."""
    h, scale = entry.tensors["oft_R"], -1.0 if convolution else 1.0
    if entry.alpha is not None:
        b = blocks_of(entry)[1]
        divisor = 2 * math.sqrt(b - 1)
        h = Handle("F32", h.shape, parts=(h,), how=Cast(entry.layer)) if h.dtype in ("F16", "BF16") else h
        scale, coft = scale / divisor, None if coft is None else coft / divisor
    options = {"side": "input", "neumann": TERMS, "coft": coft}
    return replace(entry, tensors={**entry.tensors, "oft_R": io.scaled(h, scale)}, alpha=None, options=options)


def _coft(metadata: Mapping[str, str]) -> float | None:
    """The bound of the rotations, which stands only in the training's options."""
    try:
        config = parsed(metadata.get("ot_config", "{}"))
    except ValueError:
        return None
    eps = config.get("coft_eps")
    return float(eps) if config.get("oft_coft") and eps is not None and number(0, 1).holds(eps) else None
