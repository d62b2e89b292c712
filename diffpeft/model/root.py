"""Root: the module that a pipeline calls. While strengths depend on the step or the row, it tells its layers which step it is and how many rows there are.

Like an adapted layer (docs/decisions/001) it gets a subclass of its class; here that overrides `__call__`, which runs before anything compiled.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffpeft.errors import ShapeMismatchError
from diffpeft.layers.mixed import watched
from diffpeft.layers.site import site_of
from diffpeft.layers.swap import subclass
from diffpeft.model.mix import Choice, Mix, forced, in_force
from diffpeft.model.target import COMPILED

ROOT = "_diffpeft_root"
_REASON = (
    "the strengths of adapters depend on the step; compile the model that set_adapters is given and not what calls it"
)
_lock = threading.RLock()
_classes: dict[type, type] = {}


def settle(model: nn.Module, mix: Mix) -> None:
    """Make `model` a root if strengths of `mix` depend on the call, and what it was if not. Plain assignments: it cannot fail."""
    with _lock:
        want = mix.choice.live or any(choice.live for choice in mix.running())
        inner = model._modules.get(COMPILED)  # may have become a root before it was compiled
        for module in (model,) if want or inner is None else (model, inner):
            found = {
                ROOT in module.__dict__,
                hasattr(type(module), "_diffpeft_called"),
            }  # both, if an interrupt came between
            if found == {want} or (want and site_of(type(module)) is not None):
                continue
            base: Any = getattr(type(module), "_diffpeft_called", type(module))
            # past a compiled module's own __setattr__, which would reach the module inside
            object.__setattr__(module, "__class__", _root_class(base) if want else base)
            if want:
                module.__dict__[ROOT] = mix
            else:
                module.__dict__.pop(ROOT, None)


@contextlib.contextmanager
def rooted(parts: Mapping[str, nn.Module], mixes: Mapping[str, Mix], choices: Mapping[str, Choice]) -> Iterator[None]:
    """These choices, by mix key, in this thread inside this block, with the roots that they need."""
    live = [(parts[component], mix) for component, mix in mixes.items() if choices[mix.key].live]
    try:
        with forced(choices):
            for model, mix in live:
                settle(model, mix)
            yield
    finally:
        try:
            for model, mix in live:
                settle(model, mix)
        except BaseException:  # an interrupt
            for model, mix in live:
                settle(model, mix)
            raise


def _root_class(base: Any) -> type:
    if base not in _classes:
        moment = torch.compiler.disable(_moment)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            mix = self.__dict__.get(ROOT)
            choice = None if mix is None else mix.standing()
            if choice is None or not choice.live or choice.of is not None:
                return base.__call__(self, *args, **kwargs)
            now = moment(choice, args, kwargs)
            with in_force(mix.key, now), watched(self, mix.whole_modules if choice.rows else ()):
                return base.__call__(self, *args, **kwargs)

        _classes[base] = subclass(
            base,
            _root_class,
            "_diffpeft_called",
            pickles=not (hasattr(base, "_torchdynamo_orig_callable") or "__reduce__" in vars(base)),
            # skipped by dynamo, the model's own forward is not: the step is looked up outside of every graph
            __call__=torch.compiler.disable(call, recursive=False, reason=_REASON),
        )
    return _classes[base]


def _moment(choice: Choice, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Choice:
    """The choice for one call."""
    fraction = None
    if choice.clock is not None:
        names = [name for name in ("timestep", "timesteps", "t") if name in kwargs]
        fraction = choice.clock.fraction(kwargs[names[0]] if names else args[1] if len(args) > 1 else None)
    return choice.moment(fraction, _rows(choice, (*args, *kwargs.values())) if choice.rows else 0)


def _rows(choice: Choice, given: tuple[Any, ...]) -> int:
    """How many rows the batch has. Raises ShapeMismatchError if that is no multiple of what the mixes are for."""
    sizes = [len(v) for v in given if (isinstance(v, Tensor) and v.dim()) or _is_batch(v)]
    n, m = len(choice.rows), choice.images
    if not sizes or sizes[0] % (n * m):
        raise ShapeMismatchError(
            f"the batch has {sizes[0] if sizes else 'no'} rows, and {n} mixes with {m} images a prompt take {n * m} or a multiple",
            remedy="Give one prompt a mix, and set_adapters(..., images_per_prompt=) the pipeline's num_images_per_prompt.",
        )
    return sizes[0]


def _is_batch(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(v, Tensor) for v in value)
