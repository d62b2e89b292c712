"""`python -m tests.robustness.kills --n 500 [--seed 0]`: writers that are killed, and readers beside writers.

A writer saves versions of an adapter over each other. Version k has the alpha k and tensors full of k, so that old and new ones side by side show.
Wherever it is killed: what is read then is a whole version, and after the next save there is nothing else in the folder.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffpeft import LoraConfig, PeftModel, converters, get_peft_model, io
from diffpeft.bundle import Bundle, Entry
from diffpeft.errors import DiffpeftError

EVENTS = (
    "open",
    "mkdir",
    "replace",
    "rename",
    "unlink",
    "rmdir",
    "fsync",
    "utime",
    "close",
    "scandir",
    "lstat",
    "stat",
)
LAYERS = {
    "unet": "unet.mid_block.attentions.0.proj_in",
    "text_encoder": "text_encoder.text_model.encoder.layers.0.mlp.fc1",
}
SIZE = 64


def _bundle(k: int, components: tuple[str, ...]) -> Bundle:
    shapes = {"lora_A": (4, SIZE), "lora_B": (SIZE, 4)}
    tensors = {role: io.handle(torch.full(shape, float(k))) for role, shape in shapes.items()}
    return Bundle("", "sd15", [Entry("lora", LAYERS[c], tensors, float(k)) for c in components], families=("sd15",))


class Writes:
    """One way to save: a version of an adapter to a place, and what versions are there."""

    def __init__(self, format: str, ending: str = "", components: tuple[str, ...] = ("unet",)):
        self.format, self.ending, self.components = format, ending, components

    def write(self, place: Path, k: int) -> None:
        """Save version k over what is there."""
        converters.write(_bundle(k, self.components), self.path(place), format=self.format)

    def path(self, place: Path) -> Path:
        """Where, in a folder."""
        return place / f"x{self.ending}"

    def versions(self, place: Path) -> set[float]:
        """All numbers that are read: of one version it is one."""
        return _numbers(converters.read(self.path(place), format=self.format, family="sd15"), len(self.components))


def _numbers(bundle: Bundle, entries: int) -> set[float]:
    assert len(bundle.entries) == entries
    found = {io.number(e.alpha) for e in bundle.entries}
    for entry in bundle.entries:
        for tensor in io.load(entry.tensors.values()):
            found |= set(tensor.unique().tolist())
    return found  # type: ignore[return-value]


class Pretrained(Writes):
    """`save_pretrained` of two adapters."""

    def __init__(self) -> None:
        super().__init__("peft")
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["0"])
        self.model: Any = get_peft_model(nn.Sequential(nn.Linear(SIZE, SIZE)), config)
        self.model.add_adapter("second", LoraConfig(r=4, target_modules=["0"]))

    def write(self, place: Path, k: int) -> None:
        for name in ("default", "second"):
            self.model.peft_config[name].lora_alpha = k
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if "lora_" in name or ".adapters." in name:
                    p.fill_(k)
        self.model.save_pretrained(self.path(place))

    def versions(self, place: Path) -> set[float]:
        """Of the first adapter through PEFT's names too."""
        loaded = PeftModel.from_pretrained(nn.Sequential(nn.Linear(SIZE, SIZE)), self.path(place))
        tensors = {v for n, p in loaded.named_parameters() if ".adapters." in n for v in p.unique().tolist()}
        return tensors | {loaded.peft_config["default"].lora_alpha}


WAYS: dict[str, Callable[[], Writes]] = {
    "a file": lambda: Writes("kohya", ".safetensors", ("unet", "text_encoder")),
    "a PEFT folder": lambda: Writes("peft"),
    "several PEFT folders": lambda: Writes("peft", "", ("unet", "text_encoder")),
    "several files": lambda: Writes("lycoris", "", ("unet", "text_encoder")),
    "save_pretrained": Pretrained,
}


def strays(place: Path) -> list[str]:
    """What is left of writers."""
    return [str(p) for p in place.rglob("*") if ".diffpeft-" in p.name]


def check(way: Writes, place: Path, versions: tuple[int, int], k: int) -> list[str]:
    """What is wrong after a writer was killed that saved the second of two versions over the first."""
    wrong = []
    try:
        found = way.versions(place)
        if found not in ({versions[0]}, {versions[1]}):
            wrong.append(f"read {sorted(found)}, which is neither {versions[0]} nor {versions[1]}")
    except DiffpeftError as error:
        wrong.append(f"{type(error).__name__}: {error}")
    way.write(place, k)
    if (found := way.versions(place)) != {k}:
        wrong.append(f"saved {k} and read {sorted(found)}")
    if left := strays(place):
        wrong.append(f"left for good: {left}")
    return wrong


def forked(job: Callable[[], None]) -> int:
    """The id of a process that does a job and ends."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            job()
            code = 0
        finally:
            os._exit(code)
    return pid


def killed_at(way: Writes, place: Path, event: int, k: int) -> bool:
    """Whether a child that saves version k was killed before its event of this number."""

    def job() -> None:
        seen = 0

        def patched(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal seen
                seen += 1
                if seen == event:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return call

        for name in EVENTS:
            setattr(os, name, patched(getattr(os, name)))
        way.write(place, k)

    _, status = os.waitpid(forked(job), 0)
    return os.WIFSIGNALED(status)


def every_event(way: Writes, step: int = 1) -> Iterator[tuple[int, list[str]]]:
    """(number, what is wrong) for a kill before each `step`-th event of a save over an older version."""
    with tempfile.TemporaryDirectory() as folder:
        place, event, k = Path(folder), 1, 1
        way.write(place, k)
        while killed_at(way, place, event, k + 1):
            yield event, check(way, place, (k, k + 1), k + 2)
            event, k = event + step, k + 2


def at_random(way: Writes, n: int, rng: random.Random) -> Iterator[list[str]]:
    """What is wrong after each of `n` kills at any time of a writer that saves one version after the other."""
    with tempfile.TemporaryDirectory() as folder:
        place, start = Path(folder), time.perf_counter()
        way.write(place, 1)
        way.write(place, 1)
        usual = (time.perf_counter() - start) / 2
        for _ in range(n):
            pid = forked(lambda: [way.write(place, k) for k in range(2, 10_000)] and None)
            time.sleep(rng.uniform(0, 10 * usual))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            try:
                found = way.versions(place)
                wrong = [] if len(found) == 1 else [f"read {sorted(found)}"]
            except DiffpeftError as error:
                wrong = [f"{type(error).__name__}: {error}"]
            way.write(place, 1)
            yield wrong + (["not saved again"] if way.versions(place) != {1} else []) + strays(place)


def beside(way: Writes, seconds: float) -> tuple[int, list[str]]:
    """(reads, what was wrong) of a reader beside a writer that saves all the time."""
    with tempfile.TemporaryDirectory() as folder:
        place, reads, wrong = Path(folder), 0, []
        way.write(place, 1)
        pid = forked(lambda: [way.write(place, k) for k in range(2, 1_000_000)] and None)
        try:
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                reads += 1
                try:
                    found = way.versions(place)
                    wrong += [] if len(found) == 1 else [f"read {sorted(found)}"]
                except DiffpeftError as error:
                    wrong.append(f"{type(error).__name__}: {error}")
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        return reads, wrong


def main() -> int:
    """What the command line asks for; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rng, faults = random.Random(given.seed), 0
    for name, make in WAYS.items():
        way = make()
        events = list(every_event(way))
        kills = list(at_random(way, given.n // len(WAYS), rng))
        reads, wrong = beside(way, 5)
        found = [f"before event {n}: {w}" for n, own in events for w in own] + [w for own in kills for w in own] + wrong
        print(
            f"{name}: {len(events)} events, {len(kills)} kills, {reads} reads beside a writer: {len(found)} faults",
            flush=True,
        )
        print(*found[:20], sep="\n")
        faults += len(found)
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
