"""Mixed batches where each prompt gets several rows (beams, sequences): an encoder sees the prompts before they are copied."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from torch import nn


@contextmanager
def encoder_inside(model: nn.Module, block: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """In this thread, the encoder of a model, if it has one, runs inside a `block` of its own."""
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        yield
        return
    encoder: nn.Module = getattr(model, "get_encoder")()  # noqa: B009
    here, open_blocks = threading.get_ident(), list[ExitStack]()

    def enter(*_: object) -> None:
        if threading.get_ident() == here:
            stack = ExitStack()
            stack.enter_context(block())
            open_blocks.append(stack)

    def leave(*_: object) -> None:
        if threading.get_ident() == here and open_blocks:
            open_blocks.pop().close()

    hooks = (
        encoder.register_forward_pre_hook(enter, prepend=True),
        encoder.register_forward_hook(leave, always_call=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        while open_blocks:
            open_blocks.pop().close()
