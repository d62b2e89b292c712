"""PEFT's classes of tuners: a Tuner for each method, chosen by the config of a model's first adapter."""

from __future__ import annotations

from collections.abc import Mapping

from diffpeft.llm.tuner import Tuner
from diffpeft.methods.layout import TUNED, Layout
from diffpeft.methods.peft_config import PeftConfig, PeftType
from diffpeft.model.resize import refuse_replaced


class MixedModel(Tuner):
    """A model with adapters of several methods; several AdaLoRAs may be trained, for their ranks stay as they are."""

    def _check_beside(self, configs: Mapping[str, PeftConfig]) -> None: ...

    def forward(self, *args: object, **kwargs: object) -> object:
        """The model's."""
        refuse_replaced(self._head)
        return self.model(*args, **kwargs)


class LoraModel(Tuner):
    """A model with LoRAs on it."""

    prefix = "lora_"


class AdaLoraModel(LoraModel):
    """A model with an AdaLoRA on it."""


def _tuner(stem: str, layout: Layout) -> type[Tuner]:
    """PEFT's class of a model with adapters of a method."""
    members = {"prefix": layout.prefix, "__doc__": f"A model with adapters of {stem} on it.", "__module__": __name__}
    return type(f"{stem}Model", (Tuner,), members)


_WRITTEN = {"Lora": LoraModel, "AdaLora": AdaLoraModel}  # those that other classes are made of
_TUNERS = {stem: _WRITTEN.get(stem) or _tuner(stem, row) for stem, row in TUNED.items()}
NAMES = {tuner.__name__: tuner for tuner in _TUNERS.values()}
TUNERS: dict[str, type[Tuner]] = {PeftType(TUNED[stem].peft): tuner for stem, tuner in _TUNERS.items()}


def __getattr__(name: str) -> type[Tuner]:
    if name in NAMES:
        return NAMES[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
