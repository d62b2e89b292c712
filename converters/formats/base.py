"""What a format is: a way to take keys apart and to put them together, what it can hold, and a place for alphas and options."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from diffpeft.bundle import Entry, Handle
from diffpeft.converters.families import Table
from diffpeft.converters.roles import FOREIGN, OLD_OFT
from diffpeft.methods.layout import KNOWN

NO_KEYS: Mapping[str, str] = MappingProxyType({})  # of a format without a place for an adapter's shared tensors


@dataclass(frozen=True)
class KeyParts:
    """A key taken apart: what says the component, the layer as the format spells it, and the role of the tensor (`alpha` among them).

    An empty `word` says no component. `part` is the number of a fused layer's part that the tensor is for, where the key tells one.
    """

    word: str
    layer: str
    role: str
    part: int | None = None


@dataclass(frozen=True)
class Answer:
    """Whether a format holds entries: true, or else why not, and the layers that are to blame."""

    why: str = ""
    layers: Sequence[str] = ()

    def __bool__(self) -> bool:
        return not self.why

    @classmethod
    def unless(cls, layers: Sequence[str], why: str) -> Answer:
        """No, for these layers, if there are any."""
        return cls(why, layers) if layers else cls()

    @classmethod
    def first(cls, answers: Iterable[Answer]) -> Answer:
        """The first no, after which nothing more is asked; yes if there is none."""
        return next((answer for answer in answers if not answer), cls())


class Format(Protocol):
    """How files spell things. `flat` formats write a layer's dots as underscores; a `folder` is a file of tensors and a config.

    A `single` one holds one component. One that is not `writable` is only read.
    """

    name: str
    flat: bool
    folder: bool
    single: bool
    writable: bool
    tables: Mapping[str, Table]  # the families that it is for, with their tables as it sees them
    shared_keys: Mapping[str, str]  # {role: key} of the tensors of a whole adapter
    owned: frozenset[str]  # the keys of the metadata that only this format writes

    def split(self, key: str) -> KeyParts | None:
        """The parts of a key, or None if the key is not of this format."""

    def component(self, word: str, table: Table) -> str:
        """The component that a part's word means in a family; empty if it says none."""

    def word(self, component: str, table: Table) -> str | None:
        """What says the component in a key; None if the format has no name for it in this family."""

    def original(self, table: Table) -> bool:
        """Whether the layers of a family's denoiser have the original program's names, not diffusers'."""

    def join(self, part: KeyParts, entry: Entry) -> str:
        """The key that `split` takes apart into `part`, a tensor of `entry`; `part.layer` has dots."""

    def configured(self, entries: Sequence[Entry], metadata: Mapping[str, str]) -> list[Entry]:
        """The entries with the alphas and options that the format and the metadata give them."""

    def holds(self, entries: Sequence[Entry]) -> Answer:
        """Whether this format can hold these entries."""

    def stored(self, entry: Entry) -> dict[str, Handle]:
        """The tensors by role as this format has them. Nothing is computed: only names and axes of 1 may change."""

    def alphas(self, entries: Sequence[Entry]) -> dict[str, Handle | float]:
        """{canonical layer: alpha} of the alphas that stand beside the tensors; the others are the metadata's."""

    def metadata(self, entries: Sequence[Entry], earlier: Mapping[str, str]) -> dict[str, str]:
        """What this format says about the entries in the metadata; `earlier` is the adapter's own."""


class OneModel:
    """What formats of one of diffusers' models have in common: keys that do not name the component."""

    def component(self, word: str, table: Table) -> str:
        """It says none."""
        return ""

    def word(self, component: str, table: Table) -> str | None:
        """It says none."""
        return ""

    def original(self, table: Table) -> bool:
        """The model is diffusers'."""
        return False


# LyCORIS's and sd-scripts' spellings of what is not simply called by its role
LYCORIS = {
    "lora_down.weight": "lora_A",
    "lora_up.weight": "lora_B",
    "lora_mid.weight": "lora_mid",
    **{f"{role}.weight": f"glora_{role}" for role in ("a1", "a2", "b1", "b2", "bm")},
}
# other programs' and older spellings, which are only read
_OTHER = {
    "lora_linear_layer.down.weight": "lora_A",
    "lora_linear_layer.up.weight": "lora_B",
    "lora.down.weight": "lora_A",
    "lora.up.weight": "lora_B",
    "magnitude": "lora_magnitude_vector",  # ai-toolkit's
}
_WEIGHTS = ("lora_A", "lora_B", "lora_mid", "oft_R", "oft_embedding_R")
_SPELT = {**LYCORIS, **_OTHER, "alpha": "alpha"}
_ENDING = re.compile(rf"(?P<layer>.+)\.(?P<role>{'|'.join(map(re.escape, sorted(_SPELT, key=len, reverse=True)))})")
_DOTTED = re.compile(
    rf"(?P<layer>.+)\.(?P<role>{'|'.join(sorted({*KNOWN, *OLD_OFT}, key=len, reverse=True))})"
    r"(?:\.(?!(?:weight|bias)$)[^.]+)?(?P<end>\.weight|\.bias)?"
)
_USUAL = (".lora_A.weight", ".lora_B.weight")
_FOREIGN = re.compile(rf"(?P<layer>.+)\.(?P<role>(?:{'|'.join(map(re.escape, FOREIGN))})[^.]*(?:\.weight)?)")


def suffix(role: str, method: str = "lora") -> str:
    """What stands behind the layer's name in PEFT's spelling. AdaLoRA's tensors are parameters, not weights of layers."""
    if role == "lora_B_bias":
        return "lora_B.bias"
    return f"{role}.weight" if role in _WEIGHTS and method != "adalora" else role


def dotted_role(key: str) -> tuple[str, str] | None:
    """(layer, role) of `layer.role`, in any spelling: PEFT's of any version (`layer.role[.adapter's name][.weight]`), LyCORIS's, others'."""
    if key[:-14] and key.endswith(_USUAL) and "\n" not in key:  # most files have no others
        return key[:-14], key[-13:-7]
    if match := _ENDING.fullmatch(key):
        return match["layer"], _SPELT[match["role"]]
    match = _DOTTED.fullmatch(key)
    if match and (match["end"] != ".bias" or match["role"] == "lora_B"):
        return match["layer"], "lora_B_bias" if match["end"] == ".bias" else match["role"]
    match = None if match else _FOREIGN.fullmatch(key)
    return (match["layer"], match["role"]) if match else None


def magnitude_axis(entry: Entry) -> int | None:
    """0 if a DoRA's magnitude is for outputs, 1 if for inputs; None if there is none."""
    if entry.method != "dora" or "lora_magnitude_vector" in entry.tensors:
        return 0 if entry.method == "dora" else None
    shape = entry.tensors["dora_scale"].shape
    up = next((entry.tensors[role].shape for role in ("lora_B", "lora_embedding_B") if role in entry.tensors), (0,))
    return int(shape[0] == 1 != up[0])


def table_of(fmt: Format, family: str) -> Table:
    """A family's names as a format sees them; an empty table for a family that is not known, or that the format is not for."""
    return fmt.tables.get(family) or Table({})


def shares_word(fmt: Format, table: Table, components: Iterable[str]) -> bool:
    """Whether a format has one word for several of these components, as for Wan 2.2's two denoisers: a file then holds one of them."""
    words = [word for component in components if (word := fmt.word(component, table))]
    return len({*words}) < len(words)


def denoiser(table: Table) -> str:
    """The component that a file of one denoiser is for; of a family that is not known a transformer."""
    return next((name for name in table.components if name not in table.encoders), "transformer")
