"""Adapted models on several devices: what FSDP may shard by itself.

DDP, FSDP 2 (`fully_shard`) and DeepSpeed ZeRO leave modules in place, and hooks on them gather what a layer or a slot needs: nothing has to be done. FSDP 1
puts each unit into a module of its own and, unless `use_orig_params` is set, wants all parameters of a unit to be trained or none. Slots are
therefore units, and layers have to call what they were put into.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator

from torch import nn

from diffpeft.llm.prompt import VirtualTokens
from diffpeft.model.target import COMPILED, FSDP_UNIT
from diffpeft.model.units import blocks_of, follow_units

# {class that training puts around a model: where it has the model}
_WRAPPERS = {
    "OptimizedModule": COMPILED,
    "FullyShardedDataParallel": FSDP_UNIT,
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "DeepSpeedEngine": "module",
}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside all that training has put around it: torch.compile, DDP, FSDP 1, DeepSpeed, one in another."""
    names = (_WRAPPERS[kind.__name__] for kind in type(model).__mro__ if kind.__name__ in _WRAPPERS)
    inner = getattr(model, next(names, ""), None)
    return unwrapped(inner) if isinstance(inner, nn.Module) else model


def in_units(model: nn.Module) -> bool:
    """Whether FSDP 1 has shards of a model, or of a part of it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(isinstance(m, fsdp.FullyShardedDataParallel) for m in model.modules())


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[bool]:
    """A block in which the tensors of all units of FSDP 1 in a model are whole, if it has any (yields whether); all processes have to enter it."""
    if not in_units(model):
        yield False
        return
    from torch.distributed.fsdp import FullyShardedDataParallel

    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        yield True


def fsdp_auto_wrap_policy(model: nn.Module) -> Callable[..., bool]:
    """The units that FSDP 1 may shard an adapted model by: transformer blocks, slots, prompt encoders, and other leaves that are trained.

    For `FullyShardedDataParallel(model, auto_wrap_policy=...)` or the `fsdp_plugin` of accelerate. Blocks are the model's `_no_split_modules`, or the classes
    named in the environment variable FSDP_TRANSFORMER_CLS_TO_WRAP (with commas between). Call it when all adapters are attached.
    """
    from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

    blocks: set[type[nn.Module]] = {VirtualTokens, *blocks_of(model)}
    follow_units(model)
    trained = functools.partial(lambda_auto_wrap_policy, lambda_fn=_trained_leaf)
    by_class = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=blocks)
    return functools.partial(_or_policy, policies=[trained, by_class])


def _trained_leaf(module: nn.Module) -> bool:
    """Whether a module without others has parameters, and all of them are trained. One that is never called, as the rows of a table, is gathered with
    what it is in.
    """
    if type(module) is nn.Module:
        return False
    parameters = list(module.parameters(recurse=False))
    return not module._modules and bool(parameters) and all(p.requires_grad for p in parameters)
