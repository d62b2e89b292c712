"""PeftMixedModel: PEFT's class for adapters of several methods on one model, any number of them active.

Here every PeftModel may have them. This one has PEFT's words and checks, and is chosen by `get_peft_model(..., mixed=True)`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from torch import nn

from diffpeft.errors import ConfigError, UnknownNameError
from diffpeft.llm.peft_model import PeftModel
from diffpeft.llm.tuner import Tuner, named
from diffpeft.methods.peft_config import PeftConfig
from diffpeft.model.resize import refuse_replaced


class MixedModel(Tuner):
    """The tuner of a PeftMixedModel: several AdaLoRAs may be trained, for their ranks stay as they are."""

    def _check_beside(self, configs: Mapping[str, PeftConfig]) -> None: ...

    def forward(self, *args: object, **kwargs: Any) -> Any:
        """The model's."""
        refuse_replaced(self._head)
        return self.model(*args, **kwargs)


class NoStatusError(ConfigError, TypeError):
    """A report that PEFT's class has not: it raises a TypeError."""


class PeftMixedModel(PeftModel):
    """A model with adapters of several methods. `set_adapter` and `delete_adapter` take lists.

    Raises ConfigError for a prompt method; no head is trained by itself, whatever the task. It can be saved, which PEFT's cannot.
    """

    def _adopt(self, model: nn.Module, config: PeftConfig) -> None:
        self.__dict__["_prompts"] = None
        _check_compatible(config)
        self.base_model = MixedModel(model, {})

    @classmethod
    def _class_for(cls, config: PeftConfig) -> type[PeftModel]:
        return cls

    def add_adapter(self, adapter_name: str, peft_config: object = None, *args: Any, **kwargs: Any) -> None:
        """As PeftModel's. Raises ConfigError for a prompt method."""
        if peft_config is not None:
            _check_compatible(PeftConfig.of(peft_config))
        super().add_adapter(adapter_name, peft_config, *args, **kwargs)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these adapters active, in this order, and the only ones that are trained."""
        self._check_known(adapter_name)
        super().set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Remove adapters, all or none. If none is active then, the first that is left becomes so, with a warning."""
        self._check_known(adapter_name)
        super().delete_adapter(adapter_name)

    def _check_known(self, names: str | Sequence[str]) -> None:
        if unknown := sorted({*named(names)} - {*self.peft_config}):
            raise UnknownNameError(f"Adapter(s) {unknown} not found, available adapters: {sorted(self.peft_config)}")

    def load_adapter(self, model_id: str | os.PathLike[str], adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """As PeftModel's. Raises ConfigError for a prompt method."""
        return super().load_adapter(model_id, adapter_name, *args, **kwargs)

    def get_layer_status(self) -> NoReturn:
        """Raises a TypeError, as PEFT's: `diffpeft.get_layer_status(model.get_base_model())` knows."""
        raise NoStatusError(
            f"get_layer_status is not supported for {type(self).__name__}",
            remedy="Ask diffpeft.get_layer_status(model.get_base_model()).",
        )

    def get_model_status(self) -> NoReturn:
        """Raises a TypeError, as PEFT's: `diffpeft.get_model_status(model.get_base_model())` knows."""
        raise NoStatusError(
            f"get_model_status is not supported for {type(self).__name__}",
            remedy="Ask diffpeft.get_model_status(model.get_base_model()).",
        )


def _check_compatible(config: PeftConfig) -> None:
    """Raise ConfigError for a method that is not for layers."""
    if config.is_prompt_learning:
        kinds = ", ".join(kind for kind, made in PeftConfig.types.items() if not made().is_prompt_learning)
        raise ConfigError(
            f"The provided `peft_type` '{config.peft_type}' is not compatible with the `PeftMixedModel`.",
            remedy=f"Compatible types are: {kinds}",
        )
