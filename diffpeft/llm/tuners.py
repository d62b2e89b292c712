"""PEFT's classes of tuners: a Tuner for each method, chosen by the config of a model's first adapter."""

from __future__ import annotations

from collections.abc import Mapping

from diffpeft.llm.tuner import Tuner
from diffpeft.methods.peft_config import PeftConfig, PeftType
from diffpeft.model.resize import refuse_replaced


class LoraModel(Tuner):
    """A model with LoRAs on it."""

    prefix = "lora_"


class AdaLoraModel(LoraModel):
    """A model with an AdaLoRA on it."""


class LoHaModel(Tuner):
    """A model with LoHas on it."""

    prefix = "hada_"


class LoKrModel(Tuner):
    """A model with LoKrs on it."""

    prefix = "lokr_"


class OFTModel(Tuner):
    """A model with OFTs on it."""

    prefix = "oft_"


class BOFTModel(Tuner):
    """A model with BOFTs on it."""

    prefix = "boft_"


class IA3Model(Tuner):
    """A model with (IA)^3 on it."""

    prefix = "ia3_"


class HRAModel(Tuner):
    """A model with HRAs on it."""

    prefix = "hra_"


class VeraModel(Tuner):
    """A model with VeRAs on it."""

    prefix = "vera_lambda_"


class MixedModel(Tuner):
    """A model with adapters of several methods; several AdaLoRAs may be trained, for their ranks stay as they are."""

    def _check_beside(self, configs: Mapping[str, PeftConfig]) -> None: ...

    def forward(self, *args: object, **kwargs: object) -> object:
        """The model's."""
        refuse_replaced(self._head)
        return self.model(*args, **kwargs)


TUNERS: dict[str, type[Tuner]] = {
    PeftType.LORA: LoraModel,
    PeftType.ADALORA: AdaLoraModel,
    PeftType.LOHA: LoHaModel,
    PeftType.LOKR: LoKrModel,
    PeftType.OFT: OFTModel,
    PeftType.BOFT: BOFTModel,
    PeftType.IA3: IA3Model,
    PeftType.HRA: HRAModel,
    PeftType.VERA: VeraModel,
}
