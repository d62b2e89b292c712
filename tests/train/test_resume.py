"""A run that is stopped anywhere, by anything, goes on to the same bytes."""

import json
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffpeft import AdapterStateError, CheckpointError, ConfigError, DivergedError
from diffpeft.train import checkpoints, draw, state
from diffpeft.train.checkpoints import checkpoints_in, chosen, sha256
from diffpeft.train.config import Options
from diffpeft.train.job import job_of
from diffpeft.train.lock import NAME, occupied
from diffpeft.train.loop import Events, Keeper, Loop
from diffpeft.train.signals import Interrupted
from tests.robustness.kills import EVENTS, forked

STEPS, EVERY, BATCH, EXAMPLES = 8, 3, 3, 5


class Run:
    """A small run with all that is random: order, noise, dropout in layers; with accumulation, averages, a schedule and a loss scale."""

    def __init__(self, out, optimizer="adamw", events=None, late=None, **options):
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.3), nn.Linear(6, 4)).double()
        parameters = dict(self.model.named_parameters())
        values = {"optimizer": optimizer, "accumulate": 2, "ema": 0.9, "lr_scheduler": "cosine", "warmup": 2}
        self.options = Options(**{**values, "steps": STEPS, "seed": 7, **options})
        resume = chosen("latest", out) if checkpoints_in(out) else None
        self.keeper = Keeper(out, "a", EVERY, 2, {"options": {}}, self.export, resume, "diffpeft train")
        self.loop = Loop(job_of(self.options, parameters, self.loss), self.keeper, events or Events(), late)

    def loss(self, step, part):
        at = step * 2 * BATCH + part * BATCH
        rows = draw.order(EXAMPLES, at, BATCH, 7, "rows")
        x = torch.stack([torch.full((4,), float(row), dtype=torch.float64) for row in rows])
        noise = torch.stack([torch.randn(4, generator=draw.generator(7, step, part, i)) for i in range(BATCH)])
        return F.mse_loss(self.model(x + noise), x) / 2

    def export(self, folder, step):
        (folder / "adapter.txt").write_text(str(self.model[0].weight.sum().item()))

    def run(self):
        return self.loop.run()


def digests(out, step=STEPS):
    folder = checkpoints.place_of(out, "a", step)
    return {name: sha256(folder / name) for name in (state.FILE, "adapter.txt")}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The hashes of a run that nobody stops."""
    out = tmp_path_factory.mktemp("straight")
    Run(out).run()
    return digests(out)


def ended(job):
    """The signal or the exit code with which a process ends that does a job."""
    _, status = os.waitpid(forked(job), 0)
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


class Moments:
    """The moments of a run at which it may be killed: its calls of the system, its losses, and its optimiser's steps. At the `last` it is killed."""

    def __init__(self, run, last=None):
        self.names, self.last = [], last
        for name in EVENTS:
            setattr(os, name, self.counted(name, getattr(os, name)))
        run.loop.job.loss = self.counted("loss", run.loop.job.loss)
        run.loop.job.optimizer.step = self.counted("step", run.loop.job.optimizer.step)

    def counted(self, name, function):
        def call(*args, **keywords):
            self.names.append(name)
            if len(self.names) == self.last:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **keywords)

        return call


@pytest.fixture(scope="module")
def moments(tmp_path_factory):
    """The names of all moments of a run, in their order."""
    folder = tmp_path_factory.mktemp("moments")

    def job():
        run = Run(folder / "out")
        counting = Moments(run)
        run.run()
        (folder / "names.json").write_text(json.dumps(counting.names))

    assert ended(job) == 0
    return json.loads((folder / "names.json").read_text())


def killed_and_resumed(out, places):
    """Kill one run after the other, each later than where it began, and let the last one go on to its end."""
    for place in places:

        def job(place=place):
            run = Run(out)
            Moments(run, place)
            run.run()

        assert ended(job) in (-signal.SIGKILL, 0)
    assert ended(lambda: Run(out).run()) == 0


# Of 20 places, these stand for the others: within accumulation, during a save, between its files, at its rename, and after it.
STANDING = (1, 5, 9, 14, 18)


@pytest.mark.parametrize("part", [pytest.param(i, marks=() if i in STANDING else pytest.mark.slow) for i in range(20)])
def test_a_run_that_is_killed_anywhere_goes_on_to_the_same_bytes(part, straight, moments, tmp_path):
    assert {"loss", "step", "fsync", "rename"} <= set(moments)
    place = 1 + part * (len(moments) - 1) // 19
    killed_and_resumed(tmp_path, [place])
    assert digests(tmp_path) == straight
    assert len(checkpoints_in(tmp_path)) == 2 and not [p for p in tmp_path.rglob("*") if ".tmp" in p.name]


def test_a_run_may_be_killed_several_times(straight, moments, tmp_path):
    renames = [i for i, name in enumerate(moments, 1) if name == "rename"]
    killed_and_resumed(tmp_path, [renames[0], renames[0] + 1, 3, renames[1] - renames[0]])
    assert digests(tmp_path) == straight


OTHERS = ("adamw8bit", "adafactor", "prodigy", "lion", "schedulefree", "torch.optim.SGD", "torch.optim.NAdam")


@pytest.mark.parametrize("optimizer", OTHERS)
def test_every_optimiser_goes_on_to_the_same_bytes(optimizer, tmp_path):
    Run(tmp_path / "straight", optimizer).run()

    class Enough(Exception):
        pass

    def stop(done, loss):
        if done == 5:
            raise Enough

    with pytest.raises(Enough):
        Run(tmp_path / "other", optimizer, Events(step=stop)).run()
    Run(tmp_path / "other", optimizer).run()
    assert digests(tmp_path / "straight") == digests(tmp_path / "other")


def test_numbers_that_are_read_late_are_in_the_state_too(straight, tmp_path):
    with pytest.raises(Interrupted):
        Run(tmp_path, events=signalling(signal.SIGTERM, 4), late=True).run()
    Run(tmp_path, late=True).run()
    assert digests(tmp_path) == straight


# -- signals and errors ----------------------------------------------------------------------------------------------------


def signalling(number, at, notes=None):
    """Events that send this process a signal in the middle of a step."""

    def step(done, loss):
        if done == at:
            os.kill(os.getpid(), number)

    return Events(step=step, note=(notes if notes is not None else []).append)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(number, code, straight, tmp_path):
    notes, before = [], signal.getsignal(number)
    with pytest.raises(Interrupted) as raised:
        Run(tmp_path, events=signalling(number, 4, notes)).run()
    assert raised.value.exit_code == code and signal.getsignal(number) == before
    assert notes and "step 4 of 8" in raised.value.notes[0] and "diffpeft train" in raised.value.notes[1]
    assert [c.step for c in checkpoints_in(tmp_path)] == [3, 4]
    Run(tmp_path).run()
    assert digests(tmp_path) == straight


def test_a_second_signal_stops_at_once(tmp_path):
    def step(done, loss):
        if done == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        Run(tmp_path, events=Events(step=step)).run()
    assert [c.step for c in checkpoints_in(tmp_path)] == [3]


def test_a_run_in_a_thread_gets_no_signals_and_runs(straight, tmp_path):
    thread = threading.Thread(target=lambda: Run(tmp_path).run())
    thread.start()
    thread.join()
    assert digests(tmp_path) == straight


def failing(error, at):
    def draw_samples(done):
        if done == at:
            raise error

    return Events(at=[(1, draw_samples)])


def test_an_error_while_sampling_keeps_the_step_before_it(straight, tmp_path):
    with pytest.raises(RuntimeError) as raised:
        Run(tmp_path, events=failing(RuntimeError("out of memory"), 5)).run()
    assert "step 5 of 8" in raised.value.__notes__[0] and "diffpeft train" in raised.value.__notes__[1]
    Run(tmp_path).run()
    assert digests(tmp_path) == straight


@pytest.mark.parametrize("late, kept", [(False, 4), (True, 3)])
def test_a_loss_that_is_not_finite_keeps_the_last_good_state(late, kept, straight, tmp_path):
    run = Run(tmp_path, late=late)
    loss, run.loop.job.loss = (
        run.loop.job.loss,
        lambda step, part: loss(step, part) * (float("nan") if step == 4 else 1),
    )
    with pytest.raises(DivergedError, match="step 5") as raised:
        run.run()
    assert checkpoints_in(tmp_path)[-1].step == kept and f"step {kept} of 8" in raised.value.__notes__[0]
    Run(tmp_path).run()
    assert digests(tmp_path) == straight


def test_a_full_disk_keeps_the_state_before(straight, tmp_path, monkeypatch):
    run, write = Run(tmp_path), state.write

    def full(path, tensors):
        if run.loop.done == 6:
            raise OSError(28, "No space left on device", str(path))
        write(path, tensors)

    monkeypatch.setattr(state, "write", full)
    with pytest.raises(OSError, match="No space") as raised:
        run.run()
    assert "step 3 of 8" in raised.value.__notes__[0] and [c.step for c in checkpoints_in(tmp_path)] == [3]
    monkeypatch.undo()
    Run(tmp_path).run()
    assert digests(tmp_path) == straight


# -- what a state is -------------------------------------------------------------------------------------------------------


def test_a_state_is_tensors_and_json(tmp_path):
    Run(tmp_path).run()
    files = sorted(p.name for p in checkpoints_in(tmp_path)[-1].folder.iterdir())
    assert files == sorted([state.FILE, "adapter.txt", "manifest.json", "state.json"])


class Odd(torch.optim.SGD):
    """An optimiser with something in its state that is neither a tensor nor a number."""

    def step(self, closure=None):
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            self.state[p]["callback"] = print


def test_an_optimiser_whose_state_cannot_be_saved_is_refused_by_name_after_the_first_step(tmp_path):
    run = Run(tmp_path, f"{__name__}.Odd")
    with pytest.raises(ConfigError, match=r"Odd.*callback"):
        run.run()
    assert run.loop.done == 1


VALUES = {
    "numbers": [1, 2.5, float("inf"), True, None, "a"],
    "keys": {0: {"a": (1, 2)}, "b": {}},
    "tensors": [
        torch.arange(3, dtype=torch.uint8),
        torch.tensor(2.0),
        torch.ones(2, dtype=torch.bfloat16),
        torch.empty(0),
    ],
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_what_is_split_is_joined_to_the_same(value, tmp_path):
    tensors = {}
    table = json.loads(json.dumps(state.split(value, tensors, "x")))
    state.write(tmp_path / "a.safetensors", tensors)
    again = state.joined(table, state.read(tmp_path / "a.safetensors"), torch.device("cpu"))
    assert repr(again) == repr(value)


@pytest.mark.parametrize("value", [{1.5: 1}, {"a": {1, 2}}, [print], torch.Size([1]), b"a", torch.float32])
def test_what_is_neither_is_refused(value):
    with pytest.raises(ConfigError):
        state.split(value, {}, "x")


def test_a_damaged_state_is_passed_over_for_the_one_before(tmp_path):
    Run(tmp_path).run()
    older, newest = checkpoints_in(tmp_path)
    path = newest.folder / state.FILE
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert chosen("latest", tmp_path) == older == chosen(str(tmp_path), None) == chosen(str(older.folder), None)
    with pytest.raises(CheckpointError, match=r"state\.safetensors"):
        chosen(str(newest.folder), None)
    (older.folder / state.FILE).unlink()
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        chosen("latest", tmp_path)


def test_a_state_of_another_adapter_is_refused(tmp_path):
    Run(tmp_path).run()
    run = Run(tmp_path)
    run.loop.job.parameters = {"other": next(iter(run.loop.job.parameters.values()))}
    with pytest.raises(CheckpointError, match="another adapter"):
        run.run()
    run = Run(tmp_path, "torch.optim.SGD")
    run.loop.job.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    with pytest.raises(CheckpointError, match="SGD"):
        run.run()


# -- one run in a folder ---------------------------------------------------------------------------------------------------


def test_a_second_run_in_a_folder_is_refused_and_a_dead_ones_lock_taken_over(tmp_path):
    def second():
        try:
            with occupied(tmp_path):
                pass
        except AdapterStateError as error:
            assert str(os.getppid()) in error.what
            os._exit(7)

    with occupied(tmp_path), occupied(tmp_path):  # within a run it may be asked for again
        assert ended(second) == 7
        refused = []
        thread = threading.Thread(target=lambda: refused.append(_refused(tmp_path)))
        thread.start()
        thread.join()
        assert refused == [True]
    assert ended(second) == 0 and not (tmp_path / NAME).exists()

    def dies():
        with occupied(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)

    assert ended(dies) == -signal.SIGKILL and (tmp_path / NAME).exists()
    with occupied(tmp_path):
        pass


def _refused(path):
    try:
        with occupied(path):
            return False
    except AdapterStateError:
        return True


def test_another_machines_lock_counts_for_an_hour(tmp_path):
    path = tmp_path / NAME
    path.write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    with pytest.raises(AdapterStateError, match="process 1 on elsewhere"), occupied(tmp_path):
        pass
    os.utime(path, (0, 0))
    with occupied(tmp_path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_run_that_wrote_nothing_leaves_nothing(tmp_path):
    with occupied(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / NAME).exists()
    assert list(tmp_path.iterdir()) == []
    assert Path(tmp_path).exists()
