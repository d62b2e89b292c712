"""What PEFT has in `peft.tuners.tuners_utils`, as far as users and libraries ask for it."""

from diffpeft.functional import cast_adapter_dtype, delete_adapter, set_adapter, set_requires_grad
from diffpeft.layers.kinds import BaseTunerLayer
from diffpeft.llm.tuner import Tuner as BaseTuner

__all__ = ["BaseTuner", "BaseTunerLayer", "cast_adapter_dtype", "delete_adapter", "set_adapter", "set_requires_grad"]
