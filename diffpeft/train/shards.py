"""FSDP 2: a frozen base that each process holds a share of, gathered block by block when a forward or a backward needs it.

The adapter is whole in each process, as without: gradients are added up, averaged, saved and checked by the same code.
"""

from __future__ import annotations

from torch import nn

from diffpeft.model.units import blocks_of
from diffpeft.pipeline.open import default_device
from diffpeft.train import machines
from diffpeft.train.team import team


def shard(model: nn.Module, trained: set[nn.Parameter]) -> None:
    """Leave each process its share of a model's parameters, but for those that are trained. The model's blocks are gathered one at a time."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(default_device(), (team().size,))
    blocks = set(blocks_of(model))
    units = [module for module in model.modules() if type(module) in blocks and module is not model]
    for unit in (*reversed(units), model):  # inner ones first
        fully_shard(unit, mesh=mesh, reshard_after_forward=machines.reshards(), ignored_params=trained)
    team().sharded = True


def local_bytes(model: nn.Module) -> int:
    """The bytes of a model's parameters that this process holds."""
    tensors = [getattr(p, "_local_tensor", p) for p in model.parameters()]
    return sum(t.numel() * t.element_size() for t in tensors)
