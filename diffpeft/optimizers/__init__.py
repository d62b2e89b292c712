"""What PEFT has in `peft.optimizers`."""

from diffpeft.model.loraplus import create_loraplus_optimizer
from diffpeft.optimizers.lorafa import LoraFAOptimizer, create_lorafa_optimizer
from diffpeft.optimizers.riemannian import create_riemannian_optimizer

__all__ = ["LoraFAOptimizer", "create_lorafa_optimizer", "create_loraplus_optimizer", "create_riemannian_optimizer"]
