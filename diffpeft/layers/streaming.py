"""Blocks of a model whose frozen weights live on the host, and come to the device when they are needed. They are never copied back: nothing changes them.

Two blocks are on the device at once: the one that computes, and the one that will be next, which is on its way meanwhile. Which that is has been seen
before: after a block came from another, the next was this one (forwards and backwards, computed twice or not). Who needs a block that is not there waits.

Backwards reads the weights again. Autograd would hold on to them, and all blocks would stay; so what it keeps of a block is a note where that was
(`remembered`). What somebody holds all the same stays as it is: memory is given up, not written over, so that nothing is ever computed from other numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from diffpeft.layers.packed import Packed

STREAMED, STREAM = (
    "_diffpeft_streamed",
    "_diffpeft_stream",
)  # where a module keeps the block it belongs to, and a model what streams its blocks
_STEP = 256  # bytes: parameters in a block's memory begin at multiples of it, as kernels like it


class Carrier(Protocol):
    """Brings a block's memory to the device."""

    def bring(self, host: Tensor) -> tuple[Tensor, object]:
        """Memory [n] on the device, with the numbers of `host` [n] as soon as what is returned with it has come to pass."""

    def wait(self, arrival: object) -> None:
        """Let what is computed from now on come after an arrival."""


@dataclass
class Direct:
    """A carrier that is done when it returns."""

    device: torch.device

    def bring(self, host: Tensor) -> tuple[Tensor, object]:
        """A copy."""
        return host.to(self.device, copy=True), None

    def wait(self, arrival: object) -> None:
        """Nothing is on its way."""


class BesideComputing:
    """A carrier for CUDA, whose copies run in a stream of their own, while the device computes. The host's memory is pinned.

    Memory is taken in the stream that computes, and what it held before is read there: the copy begins when all that has been told it so far is done.
    """

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)

    def bring(self, host: Tensor) -> tuple[Tensor, object]:
        """Begin to copy."""
        memory = torch.empty_like(host, device=self.device, pin_memory=False)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            memory.copy_(host, non_blocking=True)
            arrival = torch.cuda.Event()
            arrival.record(self.stream)
        return memory, arrival

    def wait(self, arrival: object) -> None:
        """Let the device wait, and not the host."""
        assert isinstance(arrival, torch.cuda.Event)
        torch.cuda.current_stream(self.device).wait_event(arrival)


def carrier_for(device: torch.device) -> Carrier:
    """What brings memory to a device."""
    return BesideComputing(device) if device.type == "cuda" else Direct(device)


class HostBlock:
    """The frozen parameters of a block as one piece of memory on the host."""

    def __init__(self, name: str, parameters: Iterable[nn.Parameter], pinned: bool):
        self.name, self.parameters, places, size = name, list(parameters), [], 0
        for p in self.parameters:
            places.append((size, p.dtype, p.shape))
            size += -(-p.numel() * p.element_size() // _STEP) * _STEP
        self.places = places
        self.host = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        for p, view in zip(self.parameters, self.views(self.host), strict=True):
            view.copy_(p.detach())
        self.put(self.host)

    def views(self, memory: Tensor) -> list[Tensor]:
        """The parameters in a memory [n]."""
        return [
            memory[start : start + dtype.itemsize * shape.numel()].view(dtype).view(shape)
            for start, dtype, shape in self.places
        ]

    def put(self, memory: Tensor) -> None:
        """Let the parameters be those in this memory."""
        for p, view in zip(self.parameters, self.views(memory), strict=True):
            p.data = view


@dataclass(frozen=True)
class Note:
    """What is kept of a tensor that lies in a block's memory: how to have it again."""

    stream: Stream
    block: HostBlock
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt

    def again(self) -> Tensor:
        """The tensor, where the block is now."""
        return self.stream.need(self.block).view(self.dtype).as_strided(self.size, self.stride, self.offset)


class Stream:
    """The blocks of a model that are streamed to a device."""

    def __init__(self, blocks: Iterable[HostBlock], device: torch.device, carrier: Carrier | None = None):
        self.blocks, self.device, self.carrier = list(blocks), device, carrier or carrier_for(device)
        self.there: dict[HostBlock, tuple[Tensor, object]] = {}  # on the device or on the way: (memory, arrival)
        self.before: HostBlock | None = None
        self.now: HostBlock | None = None  # the one whose parameters are on the device
        self.followed: dict[tuple[HostBlock | None, HostBlock], HostBlock] = {}  # {(before, now): what came next}

    def need(self, block: HostBlock) -> Tensor:
        """A block's memory on the device, which its parameters are in from now on; the next one is sent for."""
        if block is not self.now:
            if self.now is not None:
                self.followed[self.before, self.now] = block
            self.before, self.now = self.now, block
            self._have(block)
            memory, arrival = self.there[block]
            self.carrier.wait(arrival)
            block.put(memory)
            following = self.followed.get((self.before, block))
            if following is not None:
                self._have(following)
        return self.there[block][0]

    def _have(self, block: HostBlock) -> None:
        """Send for a block if it is not there; of two others the one that does not compute now gives way."""
        if block in self.there:
            return
        for other in [b for b in self.there if b is not self.now]:
            other.put(other.host)
            self.carrier.wait(self.there.pop(other)[1])  # who was sent for in vain is still being written
        self.there[block] = self.carrier.bring(block.host)

    def note(self, tensor: Tensor) -> Note | None:
        """What is to be kept of a tensor in the memory of a block that is there; None of any other."""
        storage = tensor.untyped_storage()._cdata
        for block, (memory, _) in self.there.items():
            if memory.untyped_storage()._cdata == storage:
                return Note(self, block, tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset())
        return None


def remembered(streams: Sequence[Stream]) -> AbstractContextManager[object]:
    """In this context autograd keeps notes of what lies in the memory of blocks, instead of the memory.

    One for all models: of two contexts only the inner one counts.
    """

    def noted(tensor: Tensor) -> Tensor | Note:
        return next((note for streaming in streams if (note := streaming.note(tensor)) is not None), tensor)

    def again(saved: Tensor | Note) -> Tensor:
        return saved.again() if isinstance(saved, Note) else saved

    return torch.autograd.graph.saved_tensors_hooks(noted, again)


@dataclass(frozen=True)
class Streamed:
    """What a module knows of the block that it belongs to."""

    stream: Stream
    block: HostBlock

    def bring(self) -> None:
        """Have the module's weights on the device."""
        self.stream.need(self.block)

    def __call__(self, module: nn.Module, inputs: object) -> None:
        """A hook before the module's forward."""
        self.stream.need(self.block)


def stream(
    model: nn.Module, blocks: Mapping[str, nn.Module], device: torch.device, carrier: Carrier | None = None
) -> Stream:
    """Keep the weights of some of a model's blocks on the host, and have all else on the device.

    Weights that are not a block's alone, the model's first (which tells where a model is) and those that other libraries hold in few bits are on the
    device for good.
    """
    chosen, pinned = streamed_parameters(model, blocks), device.type == "cuda"
    streaming = Stream((HostBlock(name, parameters, pinned) for name, parameters in chosen.items()), device, carrier)
    owners = {p: block for block in streaming.blocks for p in block.parameters}
    model.__dict__[STREAM] = streaming
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
        _settle(module, owners, streaming)
    return streaming


def _settle(module: nn.Module, owners: Mapping[nn.Parameter, HostBlock], streaming: Stream) -> None:
    """Have a module's own parameters where they belong, and bring those of a block before its forward."""
    for p in module._parameters.values():
        if p is None:
            continue
        if p not in owners:
            p.data = p.data.to(streaming.device)
        elif STREAMED not in vars(module):
            module.__dict__[STREAMED] = known = Streamed(streaming, owners[p])
            module.register_forward_pre_hook(known)


def streamed_parameters(model: nn.Module, blocks: Mapping[str, nn.Module]) -> dict[str, list[nn.Parameter]]:
    """{block: those of its parameters that live on the host}, of blocks that have such."""
    stay = _not_alone(model, blocks.values()) | {next(model.parameters())}
    chosen = {
        name: [p for p in block.parameters() if p not in stay and type(p) in (nn.Parameter, Packed)]
        for name, block in blocks.items()
    }
    return {name: parameters for name, parameters in chosen.items() if parameters}


def size_in_memory(parameters: Iterable[nn.Parameter]) -> int:
    """The bytes of a block with these parameters."""
    return sum(-(-p.numel() * p.element_size() // _STEP) * _STEP for p in parameters)


def stream_of(model: nn.Module) -> Stream | None:
    """What streams a model's blocks; None for a model that is on its device as a whole."""
    streaming: Stream | None = vars(model).get(STREAM)
    return streaming


def _not_alone(model: nn.Module, blocks: Iterable[nn.Module]) -> set[nn.Parameter]:
    """The parameters of blocks that others, or what is in no block, have too."""
    inside = [set(block.modules()) for block in blocks]
    homes: dict[nn.Parameter, set[int]] = {}
    for module in model.modules():
        home = next((i for i, modules in enumerate(inside) if module in modules), -1)
        for p in module._parameters.values():
            if p is not None:
                homes.setdefault(p, set()).add(home)
    return {p for p, places in homes.items() if len(places) > 1}
