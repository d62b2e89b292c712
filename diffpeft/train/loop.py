"""The training loop, one for images and texts. It knows parameters, a loss by step and part, an optimiser and a place for its state, and no model.

Everything random in a step is a function of (seed, step, sample), dropout in layers of (seed, step, part): a run that was killed goes on from its last
checkpoint to the same bytes.

No step waits for an accelerator: loss and norms are copied without waiting and read one step later. What is not finite cannot reach the parameters
meanwhile, for such gradients become zeros on the device. On a CPU, and with a loss scale, they are read at once, before the optimiser's step.

Of several processes each computes its share of the parts, and all take the same step from the sum of the gradients. The main one keeps the state.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from diffpeft.errors import DivergedError, NothingLearntError
from diffpeft.files import Json
from diffpeft.train import checkpoints, draw, state
from diffpeft.train.checkpoints import SavedState
from diffpeft.train.ema import Ema, average, averaged
from diffpeft.train.gradients import LossScale, Readout, clip, norms_of
from diffpeft.train.groups import factors_of
from diffpeft.train.journal import Logbook, StepNumbers
from diffpeft.train.judge import Judge
from diffpeft.train.outcome import check_any_gradient, check_every_gradient
from diffpeft.train.schedules import LearningRate
from diffpeft.train.signals import Interrupted, Stop, stopping
from diffpeft.train.team import Team, team
from diffpeft.train.usage import Stopwatch
from diffpeft.train.watch import Watch

_LOWER = "Lower --lr, or use --dtype fp32."


@dataclass
class Job:
    """What is trained.

    Args:
        parameters: by name; a name ends with the role of the tensor in its layer: layer.lora_A.
        loss: (step, part) -> a number []. The loss of a step is the sum of its parts', and so are its gradients.
        parts: of all processes; they are divided evenly.
        schedule: the rate by step; a group of the optimiser may have a `factor` for it.
        strict: {tensor: the first two steps that it is trained in}, of those that must get a gradient in them, else the run is refused.
    """

    parameters: Mapping[str, nn.Parameter]
    loss: Callable[[int, int], Tensor]
    optimizer: torch.optim.Optimizer
    schedule: LearningRate
    parts: int = 1
    seed: int = 0
    max_grad_norm: float = 1.0
    ema: Ema | None = None
    scale: LossScale | None = None
    strict: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass
class Keeper:
    """Where the state of a run is kept.

    Args:
        name: the adapter's, which begins the names of the states.
        every: steps between two states; 0: one only when the run is stopped.
        keep: how many of them stay.
        facts: what is written beside: options, what the run reads.
        export: writes the adapter as it is after so many steps into a folder, in the formats of the run.
        resume: the state to go on from.
        command: what a user types to go on.
        judge: who measures the adapter, and says which state is best: that one stays too, and the run ends with its adapter.
    """

    out: Path
    name: str
    every: int
    keep: int
    facts: Mapping[str, object] = field(default_factory=dict)
    export: Callable[[Path, int], object] = lambda folder, step: None
    resume: SavedState | None = None
    command: str = ""
    judge: Judge | None = None

    @property
    def best(self) -> int | None:
        """The step whose adapter is best until now, if somebody says so."""
        return None if self.judge is None else self.judge.best


@dataclass
class Events:
    """Who is told: of each step (steps done, its loss), of what people should know, and every so many steps of the adapter as it would be saved.

    `log` makes a table of each step's numbers. Where the base is sharded over several processes, all of them make the calls of `at`, for each forward needs
    all, and only the main one may write then (`machines.world().main`); elsewhere only the main one makes them.
    """

    step: Callable[[int, float], None] = lambda done, loss: None
    note: Callable[[str], None] = lambda text: None
    at: Sequence[tuple[int, Callable[[int], None]]] = ()
    log: Logbook = field(default_factory=Logbook)

    @classmethod
    def of(cls, watch: Watch, steps: int) -> Events:
        """What a Watch is told of a run of so many steps."""
        return cls(step=lambda done, loss: watch.step(done, steps, loss), note=watch.note)


@dataclass
class Loop:
    """A run under way. `done` steps are in the parameters; `losses` are those that were read."""

    job: Job
    keeper: Keeper | None = None
    events: Events = field(default_factory=Events)
    reads_late: bool | None = None  # whether numbers are read one step late; None: as the device likes
    team: Team = field(default_factory=team)
    losses: list[float] = field(default_factory=list)
    done: int = 0
    clock: Stopwatch = field(default_factory=Stopwatch)

    def __post_init__(self) -> None:
        self.parameters = list(self.job.parameters.values())
        self.device = self.parameters[0].device
        late = self.device.type != "cpu" if self.reads_late is None else self.reads_late
        self.late = late and self.job.scale is None
        self.largest = np.zeros(len(self.parameters))  # the gradients' norms, the largest of all steps
        self.readings: list[Readout] = []
        self.saved: Path | None = None
        self.good = True  # whether the parameters are those of `done` steps

    def run(self) -> list[float]:
        """All steps that are left; the losses by step. Afterwards the parameters are the averages, if there are such.

        Raises DivergedError for a loss or a gradient that is not finite, NothingLearntError where none reached the parameters, Interrupted after a
        signal. What is raised says in a note where the last good state is.
        """
        with _own_randomness(self.device), stopping(self.events.note) as stop, self._explained():
            self._restore()
            self.events.log.begin(self.done, self.losses)
            self._measure()
            self._tell()
            self._stopped(self._signal(stop))
            while self.done < self.job.schedule.steps:
                with self.clock.step():
                    self._step(self.done)
                self._between(stop)
            self._conclude()
        return self.losses

    def _conclude(self) -> None:
        """Leave the states that shall stay, and the parameters as the run ends with them."""
        keeper = self.keeper
        if keeper is not None and self.saved is not None:
            if self.team.main:
                checkpoints.prune(keeper.out, keeper.keep, self.done, keeper.best)
            best = checkpoints.state_at(keeper.out, keeper.best)
            if best is not None and best.step != self.done:
                self._load(best)
        average(self.job.parameters, self.job.ema, self.job.optimizer)

    def _step(self, step: int) -> None:
        """The gradients of a step, and the parameters after it."""
        job = self.job
        job.optimizer.zero_grad(set_to_none=True)
        shares = [self._share(step, part) for part in self.team.share(job.parts)]
        loss = self.team.summed(self.parameters, torch.stack(shares).sum())
        if job.scale is not None:
            torch._foreach_div_([p.grad for p in self.parameters if p.grad is not None], job.scale.value)
        norms = norms_of(self.parameters)
        total = torch.linalg.vector_norm(norms)
        self.readings.append(
            Readout(step, torch.cat([loss.to(norms.device).reshape(1), total.reshape(1), norms]), self.late)
        )
        if job.scale is None or self._fits(job.scale):
            self._read(self.readings[:-1] if self.late else self.readings[:])
            clip(self.parameters, total, job.max_grad_norm, guarded=self.late)
            self._update(step)
        self.done = step + 1

    def _share(self, step: int, part: int) -> Tensor:
        """The loss [] of a part of a step, whose gradients are added to the others'."""
        job = self.job
        draw.reseed(job.seed, step, part, "layers")
        loss = job.loss(step, part)
        (loss if job.scale is None else loss * job.scale.value).backward()
        return loss.detach()

    def _fits(self, scale: LossScale) -> bool:
        """Whether a step can be taken whose gradients passed through fp16; one that overflowed is read, and left out."""
        loss, total = self.readings[-1].numbers()[:2]
        if scale.fits(float(loss), float(total)):
            return True
        self.readings[-1].host[1:] = 0
        self._read(self.readings[:])
        return False

    def _update(self, step: int) -> None:
        """Take the optimiser's step, and let the averages follow."""
        job, factor = self.job, self.job.schedule.factor(step)
        self.good = False
        for group in job.optimizer.param_groups:
            group["lr"] = job.schedule.lr * group.get("factor", 1.0) * factor
        job.optimizer.step()
        if job.ema is not None:
            job.ema.update(step + 1)
        self.good = True

    def _read(self, readings: Sequence[Readout]) -> None:
        """Look at what has come from the device. Raises DivergedError or NothingLearntError."""
        for reading in readings:
            self.readings.remove(reading)
            loss, total, *_ = numbers = reading.numbers()
            for what, number in (("loss", loss), ("gradient", total)):
                if not math.isfinite(number):
                    self.good = self.good and not self.late
                    raise DivergedError(f"the {what} is {number} at step {reading.step + 1}", remedy=_LOWER)
            self.largest = np.maximum(self.largest, numbers[2:])
            self._check_reached(reading.step)
            self.losses.append(float(loss))
            self.events.log.told(StepNumbers(reading.step + 1, float(loss), float(total), self._rates(reading.step)))
            self.events.step(reading.step + 1, float(loss))

    def _check_reached(self, step: int) -> None:
        """Raise NothingLearntError for tensors without a gradient in a step that is one of the first two which train them."""
        norms = dict(zip(self.job.parameters, self.largest, strict=True)) if self.job.strict else {}
        for time in (0, 1):
            due = {name: norms[name] for name, steps in self.job.strict.items() if steps[time] == step}
            if due:
                check_every_gradient(due, time)

    def _rates(self, step: int) -> dict[str, float]:
        """{group: its learning rate} in a step."""
        rate = self.job.schedule.at(step)
        return {name: rate * factor for name, factor in factors_of(self.job.optimizer).items()}

    # Between two steps

    def _between(self, stop: Stop) -> None:
        """Save and tell where it is time. Raises Interrupted after a signal."""
        keeper, last = self.keeper, self.done == self.job.schedule.steps
        number = self._signal(stop)
        if last:
            self._read(self.readings[:])
            check_any_gradient(self.largest)
        if not number:
            self._measure()
        if keeper is not None:
            if self.done == 1 or (keeper.resume and self.done == keeper.resume.step + 1):
                state.optimizer_state(self.job.optimizer)  # one that cannot be saved is told at once
            if number or self._saves(keeper, last):
                self._save(keeper)
        self._tell()
        self._stopped(self._signal(stop))

    def _signal(self, stop: Stop) -> int:
        """The number of the signal that any of the processes was sent, 0 if none was."""
        return self.team.agreed([stop.number or 0])[0]

    def _stopped(self, number: int) -> None:
        """Raise Interrupted after a signal of this number, with the state saved: one that came while somebody was shown the adapter too."""
        if not number:
            return
        if (
            self.keeper is not None
            and self.done
            and self.saved != checkpoints.place_of(self.keeper.out, self.keeper.name, self.done)
        ):
            self._save(self.keeper)
        raise Interrupted(number, *self._where())

    def _saves(self, keeper: Keeper, last: bool) -> bool:
        """Whether the state is one to keep: it is time, it is the best, or the last beside a best one."""
        due = keeper.every and (last or self.done % keeper.every == 0)
        return bool(due) or keeper.best == self.done or (last and keeper.best is not None)

    def _measure(self) -> None:
        """Have the adapter measured as it would be saved, if that is due."""
        judge, last = self.keeper.judge if self.keeper else None, self.done == self.job.schedule.steps
        if judge is not None and judge.due(self.done, last):
            self._read(self.readings[:])
            with averaged(self.job.parameters, self.job.ema, self.job.optimizer):
                judge.measure(self.done)

    def _tell(self) -> None:
        """Show the adapter as it would be saved to whom it is due."""
        due = [call for every, call in self.events.at if self.done % every == 0]
        if due and (self.team.main or self.team.sharded):
            with averaged(self.job.parameters, self.job.ema, self.job.optimizer):
                for call in due:
                    call(self.done)
        if due:
            self.team.wait()

    # The state on disk

    def _save(self, keeper: Keeper) -> None:
        """Keep the state, which the main process writes. Raises OSError, and DivergedError if it is none to keep."""
        self._read(self.readings[:])
        if self.team.main:
            self._write(keeper)
        self.team.wait()
        self.saved = checkpoints.place_of(keeper.out, keeper.name, self.done)

    def _write(self, keeper: Keeper) -> None:
        """Write the state. Raises OSError."""
        self.events.log.flush()
        job = self.job
        table, tensors = state.optimizer_state(job.optimizer)
        facts = {
            **keeper.facts,
            "step": self.done,
            "optimizer": table,
            "scale": None if job.scale is None else asdict(job.scale),
            "usage": self.clock.facts(),
        }
        parts = {
            state.ADAPTER: job.parameters,
            state.OPTIMIZER: tensors,
            state.EMA: {} if job.ema is None else job.ema.shadow,
            state.RUN: self._numbers(),
        }
        with checkpoints.writing(keeper.out, keeper.name, self.done) as folder:
            state.write_parts(folder / state.FILE, parts)
            checkpoints.write_facts(folder, facts)
            with averaged(job.parameters, job.ema, job.optimizer):
                keeper.export(folder, self.done)
        self.saved = checkpoints.place_of(keeper.out, keeper.name, self.done)
        checkpoints.prune(keeper.out, keeper.keep, self.done, keeper.best)

    def _numbers(self) -> dict[str, Tensor]:
        """The losses, the gradients' largest norms, and what was measured."""
        numbers = {"losses": self.losses[: self.done], "largest": self.largest}
        measured = self.keeper.judge.tensors() if self.keeper and self.keeper.judge else {}
        return {n: torch.tensor(column, dtype=torch.float64) for n, column in numbers.items()} | measured

    def _restore(self) -> None:
        """Go on from the keeper's checkpoint, if there is one."""
        if self.keeper is None:
            return
        if self.keeper.resume is None:
            if self.team.main:
                checkpoints.prune(self.keeper.out, 0)  # those of a run that is overwritten
            return
        keeper, resume = self.keeper, self.keeper.resume
        facts, numbers = self._load(resume)
        if self.job.scale is not None and facts["scale"]:
            self.job.scale = LossScale(**facts["scale"])
        self.losses, self.largest = numbers["losses"].tolist(), numbers["largest"].numpy()
        self.done, self.saved = facts["step"], resume.folder
        self.clock.restore(facts.get("usage", {}))
        if keeper.judge is not None:
            states = {checkpoint.step for checkpoint in checkpoints.checkpoints_in(resume.run)}
            keeper.judge.restore(numbers, facts.get("heldout", ""), states)
            if self.team.main:
                checkpoints.bring(resume.run, keeper.out, keeper.best)
            self.team.wait()

    def _load(self, saved: SavedState) -> tuple[Json, dict[str, Tensor]]:
        """Give parameters, optimiser and averages the values of a state; its facts, and its other numbers."""
        facts, job, path = saved.facts(), self.job, saved.folder / state.FILE
        parts = state.read_parts(path)
        state.restore(job.parameters, parts[state.ADAPTER], path)
        state.restore_optimizer(job.optimizer, facts["optimizer"], parts[state.OPTIMIZER])
        if job.ema is not None:
            state.restore(job.ema.shadow, parts[state.EMA], path)
        return facts, parts[state.RUN]

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """An error keeps the state of the last good step, and says where it is: the first of those that several processes have."""
        try:
            yield
        except Exception as error:
            speaks = self.team.claims(getattr(error, "exit_code", 1))
            if self.keeper is not None and not isinstance(error, NothingLearntError) and speaks:
                self._rescue(self.keeper)
                for note in self._where():
                    error.add_note(note)
            raise

    def _rescue(self, keeper: Keeper) -> None:
        """Save the state, if it is good and not saved yet. What cannot be saved is left."""
        saved_already = self.saved == checkpoints.place_of(keeper.out, keeper.name, self.done)
        if self.good and self.done and self.largest.any() and not saved_already:
            with contextlib.suppress(Exception):
                self._read(self.readings[:])
                self._write(keeper)

    def _where(self) -> tuple[str, ...]:
        """Where the last state is, and how the run goes on; a line each."""
        if self.keeper is None or self.saved is None:
            return ()
        step = checkpoints.step_of(self.saved)
        where = f"The state after step {step} of {self.job.schedule.steps} is in {self.saved}."
        return (where, f"It goes on with: {self.keeper.command}") if self.keeper.command else (where,)


@contextlib.contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    """What torch's default generators do in this block changes nothing outside it."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def fit(
    job: Job, keeper: Keeper | None = None, events: Events | None = None, clock: Stopwatch | None = None
) -> list[float]:
    """Minimise: see `Loop.run`."""
    return Loop(job, keeper, events or Events(), clock=clock or Stopwatch()).run()
