"""A run's job for the loop, from its options, its parameters and its loss; and the keeper of its state."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from torch import Tensor, nn

from diffpeft.errors import ConfigError
from diffpeft.train import optimizers
from diffpeft.train.checkpoints import SavedState
from diffpeft.train.config import Options
from diffpeft.train.ema import Ema
from diffpeft.train.gradients import LossScale
from diffpeft.train.groups import groups_of
from diffpeft.train.loop import Job, Keeper
from diffpeft.train.resume import FREE, check_same, plain
from diffpeft.train.schedules import LearningRate
from diffpeft.train.team import team


def job_of(
    options: Options,
    parameters: Mapping[str, nn.Parameter],
    loss: Callable[[int, int], Tensor],
    *,
    strict: Mapping[str, tuple[int, int]] = MappingProxyType({}),
) -> Job:
    """What the loop needs. Raises ConfigError or UnknownNameError for options that do not fit the parameters."""
    team().as_main(list(parameters.values()))
    rate = optimizers.rate_of(options)
    schedule = LearningRate(
        rate, options.steps, options.warmup, options.lr_scheduler, options.lr_cycles or 1, options.lr_power or 1.0
    )
    return Job(
        parameters,
        loss,
        optimizers.make(options, groups_of(options, parameters, rate)),
        schedule,
        parts=options.parts(),
        seed=options.seed,
        max_grad_norm=options.max_grad_norm,
        ema=None if options.ema is None else Ema(parameters, options.ema),
        scale=LossScale() if options.dtype == "fp16" else None,
        strict=strict,
    )


def keeper_of(
    typed: Options,
    resolved: Options,
    name: str,
    reads: Mapping[str, str],
    export: Callable[[Path, int], object],
    checkpoint: SavedState | None,
    command: str,
) -> Keeper:
    """Who keeps the state of a run in its output folder.

    Args:
        typed, resolved: its options, and what their defaults came to.
        name: the adapter's.
        reads: {what it reads: a fingerprint}; a run that goes on must read the same.
        command: train or sft.

    Raises ConfigError if options or what is read are not those of the run that goes on.
    """
    now = plain(resolved.resolved())
    team().check_same({name: value for name, value in now.items() if name not in FREE}, dict(reads))
    if checkpoint is not None:
        facts = checkpoint.facts()
        check_same(resolved, facts["resolved"], now)
        changed = [what for what, mark in reads.items() if facts["reads"].get(what) != mark]
        if changed and "data" not in (resolved.allow or ""):
            raise ConfigError(
                f"the {' and the '.join(changed)} changed since the run was started",
                where=checkpoint.folder,
                remedy="Begin anew with another --out, or say that you mean it: --allow data.",
            )
    out = typed.output()
    facts = {"command": command, "options": plain(typed.resolved()), "resolved": now, "reads": dict(reads)}
    line = f"diffpeft {command} --resume {shlex.quote(str(out))}"
    return Keeper(out, name, typed.save_every, typed.keep, facts, export, checkpoint, line)


def checked_dtype(dtype: str, device: str) -> str:
    """The dtype of the base. Raises ConfigError for fp16 on a CPU, where it is slower than fp32 and less exact."""
    if dtype == "fp16" and device == "cpu":
        raise ConfigError("dtype is fp16, and there is no GPU", remedy="On a CPU use fp32, or bf16 for less memory.")
    return dtype
