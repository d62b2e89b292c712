"""doctor: what is installed here, what it runs on, and what of it is in the way."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import diffpeft
from diffpeft.readable import Readable

if TYPE_CHECKING:
    from packaging.requirements import Requirement

BESIDE = ("peft", "xformers", "torchao", "optimum-quanto", "deepspeed", "gguf", "av", "prodigyopt", "wandb")
# {package: what it is good for}, of those that no extra of ours brings
WORTH = {"torchao": "int8 and fp8 bases", "xformers": "attention on older GPUs", "wandb": "train --log wandb"}
_EXTRA = re.compile(r"extra\s*==\s*['\"]([\w.-]+)['\"]")
_FOR_PEOPLE = ("llm", "video")  # the extras that are not for who works on the package


@dataclass(frozen=True, repr=False)
class Diagnosis(Readable):
    """What `doctor` found.

    Args:
        versions: {package: version}, of what is needed and what is known to matter; empty where it is not installed.
        device: {what: value} of the machine.
        extras: {extra: the packages that it lacks}; none where it is all there.
        problems: what keeps something from working, each with the remedy.
        notes: what is worth knowing.
    """

    versions: Mapping[str, str]
    device: Mapping[str, str]
    extras: Mapping[str, tuple[str, ...]]
    problems: tuple[str, ...] = field(default=())
    notes: tuple[str, ...] = field(default=())


def doctor() -> Diagnosis:
    """What is installed, what it runs on, and what is in the way: packages that are missing or too old."""
    needed, by_extra = _requirements()
    versions = {"python": platform.python_version(), "diffpeft": diffpeft.__version__}
    versions |= {name: _version(name) for name in dict.fromkeys([*(r.name for r in needed), *BESIDE])}
    extras = {name: tuple(r.name for r in of if not _is_met(r)) for name, of in by_extra.items()}
    problems = _unmet(needed)
    return Diagnosis(versions, _device(problems), extras, tuple(problems), (*_shadowed(), *_notes(versions)))


def _requirements() -> tuple[list[Requirement], dict[str, list[Requirement]]]:
    """What the package needs, and what its extras for people bring; nothing where it is not installed but only on the path."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("diffpeft") or []
    except metadata.PackageNotFoundError:
        lines = []
    needed: list[Requirement] = []
    by_extra: dict[str, list[Requirement]] = {}
    for line in lines:
        extra = _EXTRA.search(line)
        if extra is None:
            needed.append(Requirement(line))
        elif extra[1] in _FOR_PEOPLE:
            by_extra.setdefault(extra[1], []).append(Requirement(line))
    return needed, by_extra


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _is_met(requirement: Requirement) -> bool:
    version = _version(requirement.name)
    return bool(version) and requirement.specifier.contains(version, prereleases=True)


def _unmet(needed: list[Requirement]) -> list[str]:
    """What is missing or too old, in words."""
    return [
        f"{r.name} is {_version(r.name) or 'missing'}, and {r.specifier} is needed: pip install '{r.name}{r.specifier}'"
        for r in needed
        if not _is_met(r)
    ]


def _shadowed() -> list[str]:
    """Another module that is found where ours is meant: a user's own file called `converters.py`, or somebody's package."""
    home = Path(diffpeft.__file__).parent.parent
    loaded = getattr(sys.modules.get("converters"), "__file__", None)
    spec = None if loaded else find_spec("converters")
    place = loaded or (spec.origin if spec else None)
    ours = {(home / name).resolve() for name in ("converters", "alias/converters", "diffpeft/converters")}
    if place is None or Path(place).resolve().parent in ours:
        return []
    return [f"`import converters` finds {place}, not diffpeft's: write `from diffpeft import converters`"]


def _device(problems: list[str]) -> dict[str, str]:
    """The machine as torch sees it; a torch that cannot be loaded is a problem."""
    machine = {"system": f"{platform.system()} {platform.machine()}", "cores": str(os.cpu_count())}
    try:
        import torch
    except Exception as error:  # a broken installation raises all kinds
        problems.append(f"torch cannot be loaded ({type(error).__name__}: {str(error)[:200]}): install it anew")
        return machine
    machine["threads"] = str(torch.get_num_threads())
    if torch.cuda.is_available():
        for n in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(n)
            machine[f"cuda:{n}"] = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB"
        machine["cuda"] = str(torch.version.cuda)
        machine["bf16"] = "yes" if torch.cuda.is_bf16_supported() else "no"
    elif torch.backends.mps.is_available():
        machine["mps"] = "yes"
    else:
        machine["accelerator"] = "none: everything runs on the CPU"
    return machine


def _notes(versions: Mapping[str, str]) -> list[str]:
    """What is worth knowing of packages beside ours."""
    notes = []
    if versions.get("peft"):
        notes.append(
            f"peft {versions['peft']} is installed: diffusers' own LoRA methods use it; adapters of diffpeft are diffpeft's to change"
        )
    notes += [f"{name} is not installed: {use}" for name, use in WORTH.items() if not versions.get(name)]
    if "+cpu" in versions.get("torch", "") or not _has_cuda_build():
        notes.append(
            "this torch is built for CPUs alone: for a GPU take the one that pytorch.org names for your driver"
        )
    return notes


def _has_cuda_build() -> bool:
    torch = sys.modules.get("torch")
    build = getattr(torch, "version", None)
    return bool(getattr(build, "cuda", None) or getattr(build, "hip", None) or platform.system() == "Darwin")
