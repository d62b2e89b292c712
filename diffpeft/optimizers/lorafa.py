"""LoRA-FA: A stays as it is, and B follows the gradient of the whole weight as closely as it can.  Zhang et al. 2023, arXiv:2308.03303.

g_B <- (r / alpha)^2 g_B (A A^T)^-1, then Adam with decoupled weight decay. Other parameters get plain AdamW, those of embeddings too: their A begins as
zero, and learns nothing if it is frozen, as in PEFT.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from diffpeft.errors import ConfigError, OutdatedWarning, listed
from diffpeft.methods.linalg import wide_dtype
from diffpeft.optimizers.pairs import pairs_of

_DAMPING = 1e-8
Group = Mapping[str, Any]  # as torch.optim has it


class LoraFAOptimizer(Optimizer):
    """AdamW that projects the gradients of LoRAs' B.

    Args:
        params: parameters, or groups of them. A group may have `names` and `scaling_factors`, one a parameter: those of a LoRA have its alpha / r, and a
            name that ends in lora_B is of a B, the A of which stands before it. `create_lorafa_optimizer` makes such groups.
        lr, betas, eps, weight_decay: AdamW's.
        correct_bias: whether the averages are corrected for having begun at zero.

    Raises ConfigError.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, object]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ):
        for name, value, most in (("learning rate", lr, math.inf), ("epsilon value", eps, math.inf)):
            if not 0 <= value < most:
                raise ConfigError(f"Invalid {name}: {value} - should be >= 0.0", remedy="Give another.")
        for value in betas:
            if not 0 <= value < 1:
                raise ConfigError(f"Invalid beta parameter: {value} - should be in [0.0, 1.0)", remedy="Give another.")
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, correct_bias=correct_bias)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; `closure` computes the loss anew before it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            before = None
            for p, scale in zip(group["params"], _scales(group), strict=True):
                if p.grad is not None:
                    self._adam(p, p.grad if scale is None else _projected(p.grad, before, scale), group)
                before = p
        return loss

    def _adam(self, p: Tensor, grad: Tensor, group: Group) -> None:
        """One step of AdamW for one parameter with this gradient."""
        state, (beta1, beta2) = self.state[p], group["betas"]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        state["step"] += 1
        mean = state["exp_avg"].mul_(beta1).add_(grad, alpha=1 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        size = group["lr"]
        if group["correct_bias"]:
            size *= math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
        p.addcdiv_(mean, square.sqrt().add_(group["eps"]), value=-size)
        if group["weight_decay"] > 0:
            p.add_(p, alpha=-group["lr"] * group["weight_decay"])


def _scales(group: Group) -> list[float | None]:
    """For each parameter of a group the scale of the LoRA whose B it is, otherwise None. PEFT has `.weight` behind the role."""
    nothing = [None] * len(group["params"])
    named = zip(group.get("names") or [""] * len(nothing), group.get("scaling_factors") or nothing, strict=True)
    return [scale if name.removesuffix(".weight").endswith("lora_B") else None for name, scale in named]


def _projected(grad: Tensor, A: Tensor | None, scale: float) -> Tensor:
    """(1 / scale)^2 g (A A^T)^-1: g [out, r, ...], A [r, in, ...]."""
    assert A is not None
    A = A.to(wide_dtype(A.dtype)).flatten(1)
    inverse = torch.linalg.pinv(A @ A.T + _DAMPING * torch.eye(len(A), device=A.device, dtype=A.dtype))
    projected = (grad.to(A.dtype).flatten(1) @ inverse) / scale**2
    return projected.view(grad.shape).to(grad.dtype)


def create_lorafa_optimizer(
    model: nn.Module, r: int, lora_alpha: float, lr: float, weight_decay: float = 0.0, use_rslora: bool | None = None
) -> LoraFAOptimizer:
    """A LoRA-FA optimizer for a model with LoRAs, whose A is frozen. Each layer's own rank and alpha count.

    Args:
        model: a PeftModel, or any module with LoRAs on it.
        r, lora_alpha: PEFT's arguments; the layers know theirs.
        lr, weight_decay: as AdamW's.
        use_rslora: PEFT's old argument; it has to say what the config says.

    Raises ConfigError if it does not.
    """
    _check_rslora(model, use_rslora)
    pairs = pairs_of(model)
    scales = {id(p): pair.scale for pair in pairs for p in (pair.A, pair.B)}
    names = {id(p): name for name, p in model.named_parameters()}
    params = [p for p in model.parameters() if id(p) not in scales]
    for pair in pairs:
        params += [pair.A, pair.B]
        if not pair.lookup:
            pair.A.requires_grad_(False)
    group = {
        "params": params,
        "names": [names[id(p)] for p in params],
        "scaling_factors": [scales.get(id(p)) for p in params],
        "lr": lr,
        "weight_decay": weight_decay,
    }
    return LoraFAOptimizer([group])


def _check_rslora(model: nn.Module, use_rslora: bool | None) -> None:
    """Raise ConfigError for an argument that contradicts the config of an active adapter; it is no longer needed."""
    if use_rslora is None:
        return
    configs = getattr(model, "peft_config", {})
    wrong = [
        n
        for n in getattr(model, "active_adapters", configs)
        if getattr(configs.get(n), "use_rslora", False) != use_rslora
    ]
    if wrong:
        raise ConfigError(
            f"`use_rslora={use_rslora}` was passed to create_lorafa_optimizer, but the following active adapters have it set differently: {listed(wrong)}",
            remedy="Leave it out: the config says it.",
        )
    warnings.warn(
        "`use_rslora` of create_lorafa_optimizer is deprecated: the config says it", OutdatedWarning, stacklevel=3
    )
