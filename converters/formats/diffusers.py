"""diffusers: `unet.down_blocks.0.attentions.0.proj_in.lora_A.weight`, alphas in the metadata as PEFT's config (`lora_adapter_metadata`).

Read are also files of one component without its name in front (`UNet.save_lora_adapter`), and the older suffixes
(`.lora.down.weight`, `.lora_linear_layer.down.weight`) that diffusers' scripts write for UNets and text encoders.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from converters.formats.base import Part
from converters.roles import FOREIGN
from diffpeft import io
from diffpeft.bundle import Entry
from diffpeft.errors import CheckpointError, UnsafeFileError, shown

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
_BARE = {
    "down_blocks": "unet",
    "mid_block": "unet",
    "up_blocks": "unet",
    "conv_in": "unet",
    "conv_out": "unet",
    "time_embedding": "unet",
    "text_model": "text_encoder",
    "encoder": "text_encoder",
    "transformer_blocks": "transformer",
    "single_transformer_blocks": "transformer",
}
SUFFIXES = {
    "lora_linear_layer.down.weight": "lora_A",
    "lora_linear_layer.up.weight": "lora_B",
    "lora.down.weight": "lora_A",
    "lora.up.weight": "lora_B",
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "alpha": "alpha",
}
_SUFFIX_OF = {role: suffix for suffix, role in SUFFIXES.items()}
_ADAPTER_NAME = re.compile(r"\.(lora_[AB])\.[^.]+\.weight$")
METADATA = "lora_adapter_metadata"


class Diffusers:
    """Dotted names."""

    name, flat, alpha_is_tensor = "diffusers", False, False

    def split(self, key: str) -> Part | None:
        component, dot, rest = key.partition(".")
        if component in _BARE:
            component, rest = _BARE[component], key
        elif component not in COMPONENTS or not dot:
            return None
        rest = _ADAPTER_NAME.sub(r".\1.weight", rest)
        for suffix, role in SUFFIXES.items():
            if rest.endswith("." + suffix):
                return Part(component, rest.removesuffix("." + suffix), role)
        foreign = next(
            (m for start in FOREIGN if (m := re.search(rf"\.({re.escape(start)}[^.]*(\.weight)?)$", rest))), None
        )
        return Part(component, rest[: foreign.start()], foreign[1]) if foreign else None

    def join(self, part: Part) -> str:
        return f"{part.component}.{part.layer}.{_SUFFIX_OF[part.role]}"

    def alphas(self, metadata: Mapping[str, str], ranks: Mapping[str, int]) -> dict[str, float]:
        if METADATA not in metadata:
            return {}
        try:
            config = json.loads(metadata[METADATA])
            return {
                layer: alpha
                for layer, rank in ranks.items()
                if (alpha := _alpha(_of_component(config, layer), layer, rank)) is not None
            }
        except (ValueError, TypeError, AttributeError, re.error) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"the metadata {METADATA!r} cannot be read ({error})") from error

    def metadata(self, entries: Sequence[Entry], ranks: Mapping[str, int]) -> dict[str, str]:
        config: dict[str, Any] = {}
        for component in dict.fromkeys(e.layer.partition(".")[0] for e in entries):
            config |= {
                f"{component}.{field}": value
                for field, value in _config([e for e in entries if e.layer.startswith(component + ".")], ranks).items()
            }
        return {METADATA: json.dumps(config, indent=2, sort_keys=True)}


def _config(entries: Sequence[Entry], ranks: Mapping[str, int]) -> dict[str, Any]:
    """PEFT's fields for one component. Names start below `text_model.`: stock diffusers strips that level from keys, not from the config."""
    names = {e.layer: e.layer.partition(".")[2].removeprefix("text_model.") for e in entries}
    alphas = {e.layer: float(ranks[e.layer]) if e.alpha is None else io.number(e.alpha) for e in entries}
    r, alpha = (Counter(values).most_common(1)[0][0] for values in ([ranks[e.layer] for e in entries], alphas.values()))
    return {
        "r": r,
        "lora_alpha": alpha,
        "target_modules": sorted(names.values()),
        "peft_type": "LORA",
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "rank_pattern": {f"^{names[e.layer]}": ranks[e.layer] for e in entries if ranks[e.layer] != r},
        "alpha_pattern": {f"^{names[e.layer]}": alphas[e.layer] for e in entries if alphas[e.layer] != alpha},
    }


def _of_component(config: Mapping[str, Any], layer: str) -> dict[str, Any]:
    """The fields for the layer's component; a file of one component has them without its name in front."""
    prefix = layer.partition(".")[0] + "."
    own = {k.removeprefix(prefix): v for k, v in config.items() if k.startswith(prefix)}
    return own or {k: v for k, v in config.items() if k.partition(".")[0] not in COMPONENTS}


def _alpha(config: Mapping[str, Any], layer: str, rank: int) -> float | None:
    name = layer.partition(".")[2]
    names = {name, name.removeprefix("text_model.")}
    alpha = next(
        (a for pattern, a in (config.get("alpha_pattern") or {}).items() if any(_matches(pattern, n) for n in names)),
        config.get("lora_alpha"),
    )
    if alpha is None:
        return None
    return float(alpha) * rank**0.5 if config.get("use_rslora") else float(alpha)


def _matches(pattern: str, name: str) -> bool:
    """PEFT's rule: the pattern matches the name or its end at a dot. A pattern that could take very long is refused."""
    plain = pattern.removeprefix("^").replace("\\.", ".")
    if re.fullmatch(r"[\w.]+", plain):
        return name == plain or (name.endswith("." + plain) and not pattern.startswith("^"))
    if len(pattern) > 500 or len(re.findall(r"[*+{]", pattern)) > 3 or re.search(r"\)[*+{?]", pattern):
        raise UnsafeFileError(f"the pattern {shown(pattern)} in the metadata could take very long to match")
    return re.match(rf"(.*\.)?({pattern})$", name) is not None
