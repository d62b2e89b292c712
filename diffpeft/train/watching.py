"""What a run is watched with: the held-out loss, the tables and trackers of its numbers, and its final figures."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch.optim import Optimizer

import diffpeft
from diffpeft.families.parts import Pipeline
from diffpeft.io import replacing
from diffpeft.model.state import slots_of
from diffpeft.train import machines
from diffpeft.train.cache import Texts
from diffpeft.train.config import Options, TrainConfig
from diffpeft.train.data import Account
from diffpeft.train.groups import factors_of
from diffpeft.train.heldout import HeldoutLoss
from diffpeft.train.journal import CsvTable, Logbook
from diffpeft.train.judge import Judge
from diffpeft.train.levels import Sampling
from diffpeft.train.objective import Objective
from diffpeft.train.outputs import METRICS
from diffpeft.train.paired import HeldoutPictures, Paired, interval
from diffpeft.train.run import TrainRun
from diffpeft.train.state import fingerprint
from diffpeft.train.team import team
from diffpeft.train.trackers import CSV, TrackerLog, logs_of
from diffpeft.train.usage import Stopwatch
from diffpeft.train.watch import Watch


def logbook_of(options: Options, name: str, done: int, clock: Stopwatch, watch: Watch) -> Logbook:
    """Who logs the numbers of a run that goes on after `done` steps, 0 for one that begins. Raises ConfigError for a tracker that cannot begin."""
    if not machines.world().main:
        return Logbook()
    trackers = [log for log in logs_of(options) if log != CSV]
    sinks = [TrackerLog(log, name, options.output(), done, options.resolved()) for log in trackers]
    return Logbook(sinks, options.log_every, clock.in_steps, watch.note, watch.figures)


def tabulated(logbook: Logbook, options: Options, optimizer: Optimizer, measured: Iterable[str]) -> Logbook:
    """The same, with metrics.csv if it is asked for. `measured`: the numbers that held-out losses have."""
    if CSV in logs_of(options) and machines.world().main:
        logbook.add(CsvTable(options.output(), list(factors_of(optimizer)), measured))
    return logbook


def with_measuring(config: TrainConfig, account: Account) -> TrainConfig:
    """The options with what is measured, and what for, where that is not said."""
    if not account.heldout or account.sizing is None:
        return config
    pictures = sum(len(account.sizing.targets(example.size)) for example in account.heldout)
    every = interval(pictures, config.steps, config.examples())
    return replace(config, heldout_every=config.heldout_every or every, best=config.best or "heldout")


def judge_of(
    run: TrainRun,
    pictures: HeldoutPictures | None,
    texts: Texts,
    sampling: Sampling,
    objective: Objective,
    log: Logbook,
    watch: Watch,
) -> Judge | None:
    """Who measures a run on its held-out pictures; None without such."""
    if pictures is None:
        return None
    config, pipe = run.config, run.family.pipe
    paired = Paired(run.family, pictures, texts, sampling, objective, config.batch_size, watch.tick)
    seen = [(e.name, e.caption, e.size, e.digest, *(c.digest for c in e.controls)) for e in pictures.batches.examples]

    def tell(loss: HeldoutLoss) -> None:
        log.measured(loss)
        watch.figures(heldout=loss.after)
        watch.note(f"step {loss.step}: held-out loss {loss}")

    return Judge(
        lambda: team().gathered(paired())[0],  # of several processes the main one's, so that all choose the same
        partial(alone, pipe, run.name),
        paired.design,
        config.heldout_every or config.steps,
        fingerprint(
            seen,
            pictures.pictures,
            pictures.draws,
            objective,
            sampling.density,
            sampling.parameters,
            sampling.shift,
            sampling.span,
        ),
        config.best != "last",
        tell,
        run.heldout,
    )


@contextlib.contextmanager
def alone(pipe: Pipeline, name: str, strength: float, others: Mapping[str, float] | None = None) -> Iterator[None]:
    """In this block an adapter is the only one besides others, at a strength, and drops no features."""
    dropping = [slot for slot in slots_of(pipe, name).values() if slot.training]
    for slot in dropping:
        slot.eval()
    try:
        with diffpeft.adapters(pipe, {**(others or {}), name: strength}):
            yield
    finally:
        for slot in dropping:
            slot.train()


def figures(run: TrainRun) -> dict[str, object]:
    """The final figures of a run: the held-out loss of the adapter that it ends with, and what it took."""
    config, step = run.config, run.step
    measured = {loss.step: loss.table() for loss in run.heldout}
    return {
        "heldout_loss": measured.get(step),
        "heldout": {str(number): table for number, table in measured.items()},
        "best": run.best and {"step": run.best.step, "reason": run.best.reason},
        "steps": len(run.losses),
        **run.usage.table(config.examples()),
        "method": config.method,
    }


def write_metrics(run: TrainRun) -> Path:
    """Write the final figures into metrics.json of the output folder."""
    path = run.config.output() / METRICS
    with replacing(path) as f:
        f.write(json.dumps(figures(run), indent=1).encode())
    return path
