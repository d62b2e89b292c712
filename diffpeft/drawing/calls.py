"""How pipelines are called that differ in what they are told and in what they answer."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence

from diffpeft.families.parts import Component, Pipeline


def watched(pipe: Pipeline, told: Callable[..., dict[str, object]]) -> dict[str, object]:
    """How a pipeline is asked to tell of its steps; nothing for one that does not."""
    tells = "callback_on_step_end" in inspect.signature(pipe.__call__).parameters
    return {"callback_on_step_end": told} if tells else {}


@contextlib.contextmanager
def led(pipe: Pipeline, keywords: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    """How much a pipeline is to be led, in keywords that it takes. Others are set in a guider of its own until the end, if it has one."""
    takes, guider = inspect.signature(pipe.__call__).parameters, getattr(pipe, "guider", None)
    elsewhere = {} if guider is None else {name: value for name, value in keywords.items() if name not in takes}
    before = {name: getattr(guider, name) for name in elsewhere}
    try:
        for name, value in elsewhere.items():
            setattr(guider, name, value)
        yield {name: value for name, value in keywords.items() if name in takes}
    finally:
        for name, value in before.items():
            setattr(guider, name, value)


def images_of(drawn: Component) -> Sequence[Component]:
    """The images that a pipeline gives, the first ones of clips."""
    name = next((name for name in ("images", "image") if name in drawn), None)
    return drawn[name] if name else [clip[0] for clip in drawn.frames]
