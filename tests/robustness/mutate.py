"""`python -m tests.robustness.mutate --n 5000 [--seed 0] [--keep FOLDER]`: damaged files through all that reads them.

Each must be refused with a DiffpeftError, or be read, loaded, saved again and unloaded, in two seconds and without much memory; the model is
afterwards what it was. What does otherwise is printed, and kept in FOLDER.
"""

from __future__ import annotations

import argparse
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from diffpeft import PeftModel, converters, get_adapters, load_lora, save_lora, unload
from diffpeft.errors import DiffpeftError
from tests.llm import models
from tests.robustness.damage import damaged
from tests.robustness.seeds import Seed, language_seeds, seeds, unet

SECONDS, PATIENCE, MEMORY = (
    2.0,
    20.0,
    64 << 20,
)  # allowed; until it is taken for hanging; bytes of memory more than before


@dataclass
class Account:
    """What became of damaged files: {outcome of an operation: how often}, and what was wrong."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


class Hang(BaseException):
    """It takes longer than anything should."""


@contextmanager
def _limited() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def peak() -> int:
    """Bytes of memory that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def state(model: torch.nn.Module) -> list[Any]:
    """All by which a change of a model would show."""
    tensors = [(name, t.dtype, t.data_ptr(), t.detach().double().sum().item()) for name, t in model.named_parameters()]
    return [tensors, [type(m).__name__ for m in model.modules()], sorted(get_adapters(model))]


def tried(name: str, operation: Callable[[], Any], account: Account, *, must: bool = False) -> Any:
    """What an operation gives; None if it raised one of our errors, unless it `must` not. Anything else is a fault."""
    before, start = peak(), time.process_time()
    outcome, result = "", None
    try:
        with _limited():
            result = operation()
        outcome = "ok"
    except DiffpeftError as error:
        outcome = type(error).__name__
        if must or len(str(error)) > 6000:
            account.faults.append(f"{name}: {outcome}: {str(error)[:300]}")
    except Hang:
        account.faults.append(f"{name}: hangs")
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        account.faults.append(
            f"{name}: {type(error).__name__}: {str(error)[:150]} @ {Path(at.filename).name}:{at.lineno}"
        )
    used, seconds = peak() - before, time.process_time() - start
    if seconds > SECONDS:
        account.faults.append(f"{name}: {seconds:.1f} s")
    if used > MEMORY:
        account.faults.append(f"{name}: {used >> 20} MiB")
    account.counts[f"{name} {outcome or 'FAULT'}"] += 1
    return result


def examine(path: Path, model: torch.nn.Module, rng: random.Random, folder: Path, account: Account) -> None:
    """One file through everything."""
    tried("detect", lambda: converters.detect(path), account)
    tried("inspect", lambda: converters.inspect(path, norms=rng.random() < 0.3), account)
    tried("read", lambda: converters.read(path), account)
    to = rng.choice(list(converters.FORMATS))
    out = folder / ("out" if to == "peft" else "out.safetensors")
    if tried("convert", lambda: converters.convert(path, out, to=to), account):
        tried("read what was written", lambda: converters.read(out, format=to), account, must=True)
    before = state(model)
    if tried("load", lambda: load_lora(model, path, name="a", strict=rng.random() < 0.7), account):
        if tried("save", lambda: (save_lora(model, folder / "saved.safetensors", name="a"), 1), account):
            tried("load again", lambda: load_lora(model, folder / "saved.safetensors", name="b"), account, must=True)
        tried("unload", lambda: unload(model), account)
    if state(model) != before:
        account.faults.append("the model was left changed")


def examine_language(path: Path, model: torch.nn.Module, rng: random.Random, folder: Path, account: Account) -> None:
    """One PEFT folder of a language model through PEFT's names."""
    before = state(model)
    wrapped = tried("from_pretrained", lambda: PeftModel.from_pretrained(model, path), account)
    if wrapped is not None:
        tried("save_pretrained", lambda: (wrapped.save_pretrained(folder / "saved"), 1), account)
        tried("load_adapter", lambda: wrapped.load_adapter(folder / "saved", "b"), account, must=True)
        tried("unload a PeftModel", lambda: wrapped.unload(), account)
    if wrapped is not None and len(model.model.layers) > 2:  # a stack that an adapter has made deeper stays so
        model.model.layers, model.config.num_hidden_layers = model.model.layers[:2], 2
    if state(model) != before:
        account.faults.append("the model was left changed")


def run(n: int, seed: int, kinds: list[Seed], *, language: bool = False, keep: Path | None = None) -> Account:
    """`n` damaged files, of a language model or not. The same seed gives the same files."""
    account, rng = Account(), random.Random(seed)
    model: Any = models.model("llama") if language else unet()
    one = examine_language if language else examine
    warnings.simplefilter("ignore")
    for number in range(n):
        found, data, done = damaged(rng.choice(kinds), rng)
        with tempfile.TemporaryDirectory() as folder:
            path = found.write(Path(folder), "x", data)
            so_far = len(account.faults)
            one(path, model, rng, Path(folder), account)
            if len(account.faults) > so_far and keep:
                shutil.copytree(folder, keep / f"{seed}-{number}", dirs_exist_ok=True)
            account.faults[so_far:] = [f"{seed}-{number} {found.name}, {done}: {f}" for f in account.faults[so_far:]]
    return account


def main() -> int:
    """What the command line asks for; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    faults = 0
    for language, kinds in ((False, seeds()), (True, language_seeds())):
        n, start = given.n // 5 if language else given.n - given.n // 5, time.perf_counter()
        account = run(n, given.seed, kinds, language=language, keep=given.keep)
        for outcome, count in sorted(account.counts.items()):
            print(f"{count:6} {outcome}")
        print(*account.faults, sep="\n")
        print(
            f"{n} files of {len(kinds)} seeds in {time.perf_counter() - start:.0f} s, {len(account.faults)} faults",
            flush=True,
        )
        faults += len(account.faults)
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
