"""Root: the module that a pipeline calls. It tells its layers what they cannot know: the step, the number of rows, the scale that the call asks for.

Like an adapted layer (docs/decisions/001) it gets a subclass of its class; here that overrides `__call__`, which runs before anything compiled.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffpeft.errors import AdapterStateError, ShapeMismatchError, listed
from diffpeft.layers.mixed import watched
from diffpeft.layers.sites import site_of
from diffpeft.layers.swap import subclass
from diffpeft.methods.peft_config import is_served
from diffpeft.model.call import asked_scale, for_diffusers, rows_asked, takes_scale
from diffpeft.model.mix import Choice, Chosen, Mix, Moment, forced, in_force, show_compiled
from diffpeft.model.scope import Block
from diffpeft.model.target import COMPILED, within_pefts

ROOT = "_diffpeft_root"
TAKEN = "_diffpeft_taken"  # the attribute of a class that was taken over with the class that it was
_REASON = (
    "the strengths of adapters depend on the call; compile the model that set_adapters is given and not what calls it"
)
_lock = threading.RLock()
_models: weakref.WeakValueDictionary[str, nn.Module] = weakref.WeakValueDictionary()  # by mix key
_classes: dict[type, type] = {}


def settle(model: nn.Module, mix: Mix) -> None:
    """Make `model` a root if strengths of `mix` may depend on the call, and what it was if not. Plain assignments: it cannot fail."""
    with _lock:
        if mix.adapters:
            _models[mix.key] = model
        else:  # the last one went
            _models.pop(mix.key, None)
        want = _depends_on_the_call(model, mix)
        inner = model._modules.get(COMPILED)  # may have become a root before it was compiled
        for module in (model,) if want or inner is None else (model, inner):
            marks = {
                ROOT in module.__dict__,
                hasattr(type(module), "_diffpeft_called"),
            }  # both, if an interrupt came between
            if marks == {want} or (want and site_of(type(module)) is not None):
                continue
            base: Any = getattr(type(module), "_diffpeft_called", type(module))
            # past a compiled module's own __setattr__, which would reach the module inside
            object.__setattr__(module, "__class__", _root_class(base) if want else base)
            if want:
                module.__dict__[ROOT] = mix
            else:
                module.__dict__.pop(ROOT, None)


def class_under(model: nn.Module) -> type[nn.Module]:
    """The class that a model has when it is no root."""
    cls: type[nn.Module] = getattr(type(model), "_diffpeft_called", type(model))
    return cls


def put_class_under(model: nn.Module, cls: type[nn.Module]) -> None:
    """Give a model another class, which it keeps when it becomes a root or ceases to be one."""
    with _lock:
        object.__setattr__(model, "__class__", _root_class(cls) if hasattr(type(model), "_diffpeft_called") else cls)


def model_of(mix: Mix) -> nn.Module | None:
    """The model whose strengths a mix holds; None for one that was copied or unpickled and had no operation since."""
    return _models.get(mix.key)


def _depends_on_the_call(model: nn.Module, mix: Mix) -> bool:
    """Whether strengths change with the step or the row, with a scale among the arguments, or with the asyncio task that calls."""
    if mix.adapters and takes_scale(getattr(model, COMPILED, model), mix.component):
        return True
    return mix.choice.live or any(block.in_task or block.value[mix.key].live for block in mix.blocks())


@contextlib.contextmanager
def rooted(parts: Mapping[str, nn.Module], mixes: Mapping[str, Mix], block: Block[Chosen]) -> Iterator[None]:
    """The choices of `block` hold inside this one, with the roots that they need."""
    models = [(parts[component], mix) for component, mix in mixes.items()]
    try:
        with forced(block):
            for model, mix in models:
                settle(model, mix)
            yield
    finally:
        try:
            for model, mix in models:
                settle(model, mix)
        except BaseException:  # an interrupt
            for model, mix in models:
                settle(model, mix)
            raise


def _root_class(base: type[nn.Module]) -> type:
    if base not in _classes:

        def call(self: nn.Module, *args: object, **kwargs: Any) -> Any:
            mix = self.__dict__.get(ROOT)
            if mix is None:
                return base.__call__(self, *args, **kwargs)
            with in_force(lambda: _for_call(mix, args, kwargs)), watched(self, mix.divided):
                return base.__call__(self, *args, **for_diffusers(kwargs))

        _classes[base] = subclass(
            base,
            _root_class,
            "_diffpeft_called",
            alike=True,  # `from_pipe` looks whether it is one of the classes that the other pipeline takes
            pickles=not (hasattr(base, "_torchdynamo_orig_callable") or "__reduce__" in vars(base)),
            # skipped by dynamo, the model's own forward is not: the step is looked up outside of every graph
            __call__=torch.compiler.disable(call, recursive=False, reason=_REASON),
        )
        for name, method in _guards(base).items():
            setattr(_classes[base], name, method)
    return _classes[base]


# methods of diffusers' models that do nothing, and say nothing, where there are no layers of peft's
_PEFTS = ("disable_lora", "enable_lora", "fuse_lora", "unfuse_lora", "unload_lora", "delete_adapters")


def _guards(base: type[nn.Module]) -> dict[str, object]:
    """These methods of a class, so that they refuse to do nothing. Those of a model that was taken over act."""
    names = () if hasattr(base, TAKEN) else _PEFTS
    return {name: _guarded(base, name) for name in names if hasattr(base, name)}


def _guarded(base: type[nn.Module], name: str) -> Callable[..., object]:
    method: Callable[..., object] = getattr(base, name)

    @functools.wraps(method)
    def guarded(self: nn.Module, *args: object, **kwargs: object) -> object:
        mix = self.__dict__.get(ROOT)
        if mix is not None and mix.adapters and not is_served() and not within_pefts(self):
            raise AdapterStateError(
                f"{name} is for adapters of peft, and {listed(mix.adapters)} on this {base.__name__} are diffpeft's",
                remedy="Call diffpeft.take_over(pipe), and it acts on them; or use diffpeft's set_adapters, fuse and unload.",
            )
        return method(self, *args, **kwargs)

    return guarded


def _for_call(mix: Mix, args: tuple[object, ...], kwargs: dict[str, object]) -> dict[str, Moment]:
    """{mix key: moment} of what holds in one call alone; empty if nothing depends on it. Raises AdapterStateError for a scale on what is fused."""
    show_compiled()
    choice, early = mix.standing(), mix.component.startswith("text_encoder")
    if mix.is_called():  # the model inside a compiled one: it is done
        return {}
    scale = asked_scale(early, kwargs)
    if scale == 1 and not choice.live:
        return {}
    if scale != 1 and mix.fused:
        raise AdapterStateError(
            f"a scale of {scale:g} was asked for, and {listed(mix.fused)} are fused into {mix.component or 'the model'}",
            remedy="Call unfuse first, or leave out the scale.",
        )
    choice, fraction = choice.scaled(scale), None
    if choice.clock is not None:
        names = [name for name in ("timestep", "timesteps", "t") if name in kwargs]
        fraction = choice.clock.fraction(kwargs[names[0]] if names else args[1] if len(args) > 1 else None)
    rows = _rows(choice, early, (*args, *kwargs.values())) if choice.rows else 0
    return {mix.key: choice.moment(fraction, rows)}


def _rows(choice: Choice, early: bool, arguments: tuple[Any, ...]) -> int:
    """How many rows the batch has. Raises ShapeMismatchError unless the prompts of the pipeline's call are those that the mixes are for.

    Guidance repeats the batch, or calls the model again; outside of a pipeline any number of repetitions may be meant.
    """
    sizes = [len(v) for v in arguments if (isinstance(v, Tensor) and v.dim()) or _is_batch(v)]
    n, m, asked = len(choice.rows), choice.images, rows_asked(early)
    what = "prompts" if early else "images"
    if asked is not None and asked != n * m:
        raise ShapeMismatchError(
            f"the pipeline draws {asked} {what}, and {n} mixes with {m} images a prompt are for {n * m}",
            remedy="Give one prompt a mix, and set_adapters(..., images_per_prompt=) the pipeline's num_images_per_prompt.",
        )
    if not sizes or sizes[0] % (n * m):
        raise ShapeMismatchError(
            f"the batch has {sizes[0] if sizes else 'no'} rows, and {n} mixes with {m} images a prompt take {n * m} or a multiple",
            remedy="Give one prompt a mix, and set_adapters(..., images_per_prompt=) the pipeline's num_images_per_prompt.",
        )
    return sizes[0]


def _is_batch(value: object) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(v, Tensor) for v in value)
