"""Of how many processes a run has this one is one, as the environment tells: by torchrun's names, which accelerate uses too, or MPI's. Imports no torch.

Each process computes its share of the parts of a step and has the same adapter. The main one, number 0, talks to the user and writes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol

from diffpeft.errors import ConfigError


class Processes(Protocol):
    """What the options of a run say of its processes."""

    num_processes: int | None
    fsdp: bool


class Speaker(Protocol):
    """Who knows which process of a run may tell of its end: a Team."""

    def claims(self, code: int) -> bool:
        """Whether this process is the first that ends with an error, of this exit code."""

    def code(self, code: int) -> int:
        """The exit code of the first error; `code`, where that is not known."""


MEETING = "DIFFPEFT_MEETING"  # the file through which the processes that our own command starts find each other
FSDP_BLOCKS = "FSDP_TRANSFORMER_CLS_TO_WRAP"
_NAMES = {
    "rank": ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK"),
    "size": ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"),
    "local": ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "MV2_COMM_WORLD_LOCAL_RANK"),
}
# {what accelerate's config says, as its launcher puts it into the environment: (values that are well, what to do about others)}
_HONOURED: dict[str, tuple[tuple[str, ...], str]] = {
    "ACCELERATE_USE_DEEPSPEED": (
        ("", "false"),
        "DeepSpeed is not used here: choose multi-GPU, or FSDP with fsdp_version 2.",
    ),
    "ACCELERATE_USE_MEGATRON_LM": (
        ("", "false"),
        "Megatron-LM is not used here: choose multi-GPU, or FSDP with fsdp_version 2.",
    ),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (
        ("", "false"),
        "Only whole batches are divided: choose multi-GPU, or FSDP with fsdp_version 2.",
    ),
    "ACCELERATE_USE_TP": (
        ("", "false"),
        "Only whole batches are divided: choose multi-GPU, or FSDP with fsdp_version 2.",
    ),
    "ACCELERATE_DYNAMO_BACKEND": (("", "no"), "Switch it off there, and pass --compile."),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (("", "1"), "Set it to 1 there, and pass --accumulate."),
}
_HONOURED_FSDP: dict[str, tuple[tuple[str, ...], str]] = {
    "FSDP_VERSION": (("2",), "Set fsdp_version: 2; FSDP 1 is not used here."),
    "FSDP_OFFLOAD_PARAMS": (("", "false"), "Set fsdp_offload_params: false; the base's shards stay on the devices."),
    "FSDP_ACTIVATION_CHECKPOINTING": (("", "false"), "Set it to false there, and pass --gradient-checkpointing."),
    "FSDP_AUTO_WRAP_POLICY": (
        ("", "transformer_based_wrap"),
        "Set fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP; units are the model's blocks.",
    ),
}
# {an option of a run: why a sharded base cannot have it}
_WHOLE = {
    "quantize": "shards of weights in 4 or 8 bits are none",
    "offload": "shards stay on the devices, and are gathered there",
}
_PRECISIONS = {"fp16": "fp16", "bf16": "bf16", "no": None, "": None}


@dataclass(frozen=True)
class World:
    """This process among those of a run: its number `rank` of `size`, and its number `local` on its machine."""

    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def main(self) -> bool:
        """Whether it is the one that talks and writes."""
        return self.rank == 0


def world() -> World:
    """What the environment tells; one process, where it tells nothing. Raises ConfigError for what is no number."""
    numbers = {name: _number(names) for name, names in _NAMES.items()}
    size = numbers["size"] or 1
    if size == 1:
        return World()
    rank = numbers["rank"] or 0
    return World(rank, size, rank if numbers["local"] is None else numbers["local"])


def _number(names: tuple[str, ...]) -> int | None:
    name = next((name for name in names if os.environ.get(name)), None)
    if name is None:
        return None
    try:
        return int(os.environ[name])
    except ValueError:
        raise ConfigError(
            f"{name} is {os.environ[name]!r}", where="the environment", remedy="It is a number."
        ) from None


def several() -> int | None:
    """How many processes the run has, if it has several."""
    size = world().size
    return size if size > 1 else None


def sharding(options: Processes) -> bool:
    """Whether the base is sharded over the processes: by --fsdp, or by accelerate's config."""
    return options.fsdp or _said("ACCELERATE_USE_FSDP") == "true"


def reshards() -> bool:
    """Whether a block gives up what it gathered between forward and backward, as accelerate's fsdp_reshard_after_forward says."""
    return _said("FSDP_RESHARD_AFTER_FORWARD") != "false"


def precision() -> str | None:
    """The dtype that accelerate's config asks for, if it does. Raises ConfigError for one that a base cannot have."""
    said = _said("ACCELERATE_MIXED_PRECISION")
    if said not in _PRECISIONS:
        raise ConfigError(
            f"accelerate's mixed_precision is {said}", remedy="It is no, bf16 or fp16; --dtype wins over it."
        )
    return _PRECISIONS[said]


def check(options: Processes) -> None:
    """Raise ConfigError for processes that are not as many as was asked for, and for what accelerate's config asks for and is not done."""
    size = world().size
    if options.num_processes not in (None, size):
        raise ConfigError(
            f"num_processes is {options.num_processes}, and the run has {size}",
            remedy="The command diffpeft starts them itself: leave other launchers away; or leave --num-processes out with them.",
        )
    if size == 1 and os.environ.get("MASTER_PORT") and os.environ.get("ACCELERATE_MIXED_PRECISION"):
        raise ConfigError(
            "accelerate was asked for several processes and started one, as it does on CPUs without mpirun",
            remedy="Pass --multi_gpu to accelerate launch, or use diffpeft's own --num-processes.",
        )
    if options.fsdp and size == 1:
        raise ConfigError(
            "fsdp with one process, and so it would do nothing", remedy="Pass --num-processes, or leave --fsdp out."
        )
    check_shards(options)
    precision()
    for name, (allowed, remedy) in (
        _HONOURED | (_HONOURED_FSDP if _said("ACCELERATE_USE_FSDP") == "true" else {})
    ).items():
        if _said(name) not in allowed:
            raise ConfigError(f"accelerate's config says {name}={os.environ.get(name, '')}", remedy=remedy)


def check_shards(options: Processes) -> None:
    """Raise ConfigError for what a sharded base cannot have."""
    for name, why in _WHOLE.items():
        if getattr(options, name, None) and sharding(options):
            raise ConfigError(
                f"{name} with fsdp: {why}",
                remedy="Leave one of them out; without --fsdp each process holds the whole base.",
            )


def _said(name: str) -> str:
    return os.environ.get(name, "").lower()


# -- who speaks ----------------------------------------------------------------------------------------------------------------

speakers: list[Speaker] = []  # the team that this process has met, once it has


def speaks(code: int) -> bool:
    """Whether this process tells of an error with this exit code: the first of all that had one, and before they have met the main one."""
    return speakers[-1].claims(code) if speakers else world().main


def shared_code(code: int) -> int:
    """The exit code of the run: that of the first error."""
    return speakers[-1].code(code) if speakers else code
