"""What PEFT has in `peft.optimizers`."""

from diffpeft.model.loraplus import create_loraplus_optimizer

__all__ = ["create_loraplus_optimizer"]
