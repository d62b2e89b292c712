"""What the processes of a run do together: they add up gradients, agree on what to do next, share what they computed, and end together.

Gradients are added up in one flat buffer on the device. Everything else goes over gloo between the hosts, and waits for no device.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffpeft.errors import ConfigError, LostProcessError
from diffpeft.pipeline.open import default_device
from diffpeft.train import machines
from diffpeft.train.machines import World
from diffpeft.train.signals import handled

PATIENCE = timedelta(
    hours=2
)  # the others wait so long for the main process: while it reads the data, draws samples, writes
Item = TypeVar("Item")
Result = TypeVar("Result")
# What the libraries say where another process is gone; their type is RuntimeError.
_GONE = (
    "gloo",
    "Connection closed",
    "Connection reset",
    "Broken pipe",
    "NCCL",
    "recvValue",
    "failed to recv",
    "Timed out",
)


class Team:
    """The processes of a run, seen from one. Alone, all of this costs nothing.

    Args:
        world: which of how many it is.
        store: where they leave words for each other.
        hosts: the group over which they agree.
    """

    def __init__(self, world: World, store: dist.Store | None = None, hosts: dist.ProcessGroup | None = None):
        self.world, self.store, self.hosts = world, store, hosts
        self.size, self.rank, self.main = world.size, world.rank, world.main
        self.sharded = False  # whether forwards need all processes
        self._first: bool | None = None

    def share(self, parts: int) -> range:
        """Which parts of a step this process computes."""
        each = parts // self.size
        return range(self.rank * each, (self.rank + 1) * each)

    # Tensors

    def summed(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
        """Add up the gradients of all processes; the sum [] of their losses. A gradient that no process has stays None."""
        if self.size == 1:
            return loss
        there = self.agreed([p.grad is not None for p in parameters])
        gradients = []
        for p in (p for p, is_there in zip(parameters, there, strict=True) if is_there):
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            gradients.append(p.grad)
        total, *sums = self._added([loss.reshape(1), *gradients])
        torch._foreach_copy_(gradients, sums)
        return total.reshape(()).to(loss)

    def _added(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums of tensors over all processes, in the widest of their dtypes."""
        flat = torch.cat([t.detach().to(tensors[-1].device).flatten() for t in tensors])
        dist.all_reduce(flat)
        pieces = flat.split([t.numel() for t in tensors])
        return [piece.view_as(t) for piece, t in zip(pieces, tensors, strict=True)]

    @torch.no_grad()
    def as_main(self, tensors: Sequence[Tensor]) -> None:
        """Make these tensors what they are in the main process."""
        for t in tensors if self.size > 1 else ():
            whole = t.detach().contiguous()
            dist.broadcast(whole, 0)
            t.copy_(whole)

    # Words

    def agreed(self, numbers: Sequence[int]) -> list[int]:
        """The largest that any process has of each of these numbers."""
        if self.size == 1:
            return list(numbers)
        largest = torch.tensor([int(n) for n in numbers], dtype=torch.int32)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.hosts)
        return largest.tolist()

    def any(self, holds: bool) -> bool:
        """Whether something holds here; where all compute together, whether it does in any process."""
        return bool(self.agreed([holds])[0]) if self.sharded else holds

    def as_said_by_main(self, content: Result) -> Result:
        """What this process has; where all compute together, what the main one has."""
        return self.gathered(content)[0] if self.sharded else content

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier(group=self.hosts)

    def gathered(self, content: Result) -> list[Result]:
        """What each process has here, on all of them."""
        if self.size == 1:
            return [content]
        contents = [content] * self.size
        dist.all_gather_object(contents, content, group=self.hosts)
        return contents

    def divided(self, items: Sequence[Item], compute: Callable[[Item], Result]) -> Iterator[Result]:
        """`compute` of every item, in their order, on all processes: each is computed by one of them."""
        for start in range(0, len(items), self.size):
            place = start + self.rank
            results = self.gathered(compute(items[place]) if place < len(items) else None)
            yield from (result for result in results[: len(items) - start] if result is not None)

    def check_same(self, *facts: object) -> None:
        """Raise ConfigError if not all processes have the same facts: options, and fingerprints of what they read."""
        if len({repr(each) for each in self.gathered(facts)}) > 1:
            raise ConfigError(
                "the processes of the run have other options, or read other data",
                remedy="Start all of them with the same command, on machines that share the data and the output folder.",
            )

    # The end

    def claims(self, code: int) -> bool:
        """Whether this process is the first that has an error; the exit code of the run is then `code`."""
        if self._first is None:
            self._first = self.store is None or self._is_first(self.store, code)
        return self._first

    @staticmethod
    def _is_first(store: dist.Store, code: int) -> bool:
        try:
            if store.add("failed", 1) > 1:
                return False
            store.set("code", str(code))
        except RuntimeError:  # it went with the process that had it
            pass
        return True

    def code(self, code: int) -> int:
        """The exit code of the first error; `code`, where that is not known."""
        with contextlib.suppress(RuntimeError, ValueError):
            if self.store is not None and self.store.check(["code"]):
                return int(self.store.get("code"))
        return code

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What the libraries raise in this block because another process is gone is a LostProcessError, with the same notes."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not any(words in str(error) for words in _GONE):
                raise
            told = LostProcessError(
                "another process of the run has ended",
                remedy="What it said is above; if that is nothing, it was killed.",
            )
            for note in getattr(error, "__notes__", ()):
                told.add_note(note)
            raise told from error


ALONE = Team(World())
_met: list[Team] = []


def team() -> Team:
    """The processes that this one has met; itself, if it has met none."""
    return _met[-1] if _met else ALONE


def meet() -> Team:
    """Wait until all processes of the run are there, once: the others until the main one begins.

    Raises ConfigError if there are fewer GPUs than processes on this machine.
    """
    world = machines.world()
    if world.size == 1 or _met:
        return team()
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = (
        "false"  # or transformers would load no weights but in the main process
    )
    cuda = default_device() == "cuda"
    if cuda:
        if world.local >= torch.cuda.device_count():
            raise ConfigError(
                f"there are {torch.cuda.device_count()} GPUs, and this is process {world.local + 1} on the machine",
                remedy="Start as many processes as there are GPUs.",
            )
        torch.cuda.set_device(world.local)
    with contextlib.nullcontext() if world.main else handled(signal.SIG_DFL):  # who only waits ends at once
        store = _store(world)
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=dist.PrefixStore("group", store),
            rank=world.rank,
            world_size=world.size,
            timeout=PATIENCE,
        )
        hosts = dist.new_group(backend="gloo", timeout=PATIENCE)
    _met.append(Team(world, dist.PrefixStore("words", store), hosts))
    machines.speakers[:] = _met
    return team()


def _store(world: World) -> dist.Store:
    """Where the processes find each other: a file, if our command started them, else what the launcher says."""
    if machines.MEETING in os.environ:
        store: dist.Store = dist.FileStore(os.environ[machines.MEETING], world.size)
        store.set_timeout(PATIENCE)
        return store
    os.environ |= {"RANK": str(world.rank), "WORLD_SIZE": str(world.size)}
    return next(iter(dist.rendezvous("env://", timeout=PATIENCE)))[0]
