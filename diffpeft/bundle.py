"""Bundle: an adapter between file and model. Every file becomes one, every adapted model becomes one.

It holds tensors as stored (dtype, shape and where the bytes are), under canonical names, and never does arithmetic.
A canonical layer name is diffusers' own: `component.dotted.path`, for example `unet.mid_block.attentions.0.proj_in`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffpeft.errors import ConfigError, shown

if TYPE_CHECKING:
    import torch

COMPONENTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3")


def dotted(component: str, layer: str) -> str:
    """`component.layer`, or the layer alone where the component has no name (a bare module)."""
    return f"{component}.{layer}" if component else layer


def parted(name: str) -> tuple[str, str]:
    """A layer's canonical name as (component, layer): the inverse of `dotted`. The component is empty for a bare module's layer."""
    component, _, layer = name.partition(".")
    return (component, layer) if component in COMPONENTS else ("", name)


def canonical(component: str, layer: str) -> str:
    """A layer's canonical name. Text encoders are spelt with `text_model.`, the level of CLIP's names that transformers 5 dropped."""
    if component.startswith("text_encoder") and layer.startswith("encoder.layers."):
        layer = f"text_model.{layer}"
    return dotted(component, layer)


@dataclass(frozen=True)
class Handle:
    """One stored tensor, not yet read: safetensors dtype name, shape, and either bytes [start, end) of `path` or the tensor itself."""

    dtype: str
    shape: tuple[int, ...]
    path: Path | None = None
    start: int = 0
    end: int = 0
    tensor: Any = None


@dataclass(frozen=True)
class Entry:
    """One method on one layer: its tensors by role (PEFT's parameter names), and the alpha as the file gives it."""

    method: str
    layer: str
    tensors: Mapping[str, Handle]
    alpha: Handle | float | None = None  # a stored tensor, a number from a config, or absent: then the scale is 1
    keys: tuple[str, ...] = ()  # the keys in the file that this entry was read from
    options: Mapping[str, Any] = field(
        default_factory=dict
    )  # what the method must know beside tensors and alpha: plain values
    shape: tuple[int, ...] | None = None  # of the layer's canonical weight, where a model told it

    @property
    def methods(self) -> frozenset[str]:
        """The method's name, and for a DoRA over something else than LoRA also that."""
        return named(self.method, self.tensors)


def named(method: str, roles: Collection[str]) -> frozenset[str]:
    """A method's name, and the name of what a DoRA is over unless that is LoRA."""
    over = {"loha": "hada_", "lokr": "lokr_"} if method == "dora" else {}
    return frozenset({method, *(m for m, start in over.items() if any(role.startswith(start) for role in roles))})


@dataclass
class Bundle:
    """A whole adapter: entries in file order, tensors that are no adapter's under their original keys, and the file's metadata."""

    format: str
    family: str
    entries: list[Entry]
    carried: dict[str, Handle] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    source: str = "a dict of tensors"
    families: tuple[str, ...] = ()  # every family the names fit, the likeliest first

    @property
    def methods(self) -> set[str]:
        """Names of the methods in use."""
        return {method for entry in self.entries for method in entry.methods}

    @property
    def trigger_words(self) -> tuple[str, ...]:
        """What the file says must stand in a prompt, from `modelspec.trigger_phrase` or `trained_words`."""
        return trigger_words(self.metadata)

    def deltas(self, base: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """{canonical layer: f(W) - W in float64}, by each method's definition. `base` {layer: W} is for methods that need W, such as DoRA and OFT.

        Raises ConfigError if W is needed and not there.
        """
        out: dict[str, torch.Tensor] = {}
        for entry in self.entries:
            W, before = (base or {}).get(entry.layer), out.get(entry.layer)
            delta = _delta(entry, W if W is None or before is None else W.double() + before)
            out[entry.layer] = delta if before is None else before + delta
        return out


def trigger_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """What a file says must stand in a prompt."""
    text = metadata.get("modelspec.trigger_phrase") or metadata.get("trained_words") or ""
    return tuple(word for word in (part.strip(" []\"'") for part in text.split(",")) if word)


def _delta(entry: Entry, W: torch.Tensor | None) -> torch.Tensor:
    """f(W) - W in float64; where f is additive W is not needed."""
    from diffpeft.methods import Additive

    method, p, spec = definition_of(entry, W)
    if issubclass(method, Additive):
        return method.scale(p, spec) * method.delta(p, spec)
    assert W is not None
    return method.weight(W.double(), p, spec) - W.double()


def definition_of(entry: Entry, W: torch.Tensor | None = None) -> tuple[Any, dict[str, torch.Tensor], Any]:
    """An entry's method, its prepared tensors in float64, and its spec: what the method's functions take.

    Without W the layer's shape is what the tensors show. Raises ConfigError if the method needs W.
    """
    from diffpeft import io
    from diffpeft.methods import METHODS, Additive, Geometry, Spec

    method: Any = METHODS[entry.method]
    roles = [role for role in entry.tensors if role in method.roles]
    p = {role: t.double() for role, t in zip(roles, io.load(entry.tensors[role] for role in roles), strict=True)}
    if W is None and not issubclass(method, Additive):
        raise ConfigError(
            f"{entry.method} on {shown(entry.layer)} changes what is there", remedy="Pass base={layer: W}."
        )
    o, i, *kernel = (entry.shape or _shown_shape(p)) if W is None else W.shape
    geometry = Geometry(o, i, tuple(kernel), lookup=any("_embedding_" in role for role in roles))
    spec = Spec(geometry, io.number(entry.alpha), entry.options)
    return method, method.prepare(method.adopt(p, spec), spec, False), spec


def _shown_shape(p: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
    """The shape of the weight that an additive method's tensors are for, as far as they show it: a kernel may be hidden in the columns."""
    first = [p[role].shape for role in ("lokr_w1", "lokr_w1_a", "lokr_w1_b") if role in p]
    down = next(p[role] for role in ("lora_A", "lora_embedding_A", "hada_w1_b", "lokr_w2_b", "lokr_w2") if role in p)
    up = next(p[role] for role in ("lora_B", "lora_embedding_B", "hada_w1_a", "lokr_w2_a", "lokr_w2") if role in p)
    core = next((p[role] for role in ("lora_mid", "hada_t1", "lokr_t2") if role in p), None)
    turned = core is not None and "lora_mid" not in p  # LyCORIS's Tucker factors are [r, out] and [r, in]
    o1, i1 = (first[0][0], first[-1][1]) if first else (1, 1)
    return (o1 * up.shape[int(turned)], i1 * down.shape[1], *(down if core is None else core).shape[2:])
