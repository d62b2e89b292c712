"""The best state stays, a run ends with its adapter, and it is the same however often the run was killed; its table has each row once."""

import contextlib
import csv
import json
import signal

import numpy as np
import pytest
import torch

from diffpeft.train.checkpoints import checkpoints_in
from diffpeft.train.ema import averaged
from diffpeft.train.heldout import Design
from diffpeft.train.journal import BY_BAND, HELDOUT, CsvTable, Logbook
from diffpeft.train.judge import Judge
from diffpeft.train.signals import Interrupted
from tests.train.test_resume import STEPS, Moments, Run, ended, signalling

LOSSES = {0: 9.0, 2: 0.8, 4: 0.5, 6: 0.7, 8: 0.9}  # {step: the held-out loss}
DESIGN = Design(np.array([0, 1, 1]), np.full((3, 4), 0.25), np.linspace(0, 1, 5))


class Judged(Run):
    """A small run that is measured every two steps; what its parameters were then is remembered."""

    def __init__(self, out, losses=LOSSES, chooses=True, save_every=3, log_every=1, **options):
        super().__init__(out, **options)
        self.out, self.by_step, self.strength, self.measured = out, losses, 0.0, {}
        self.keeper.every = save_every
        judge = Judge(self.losses, self.at, lambda: DESIGN, 2, "pictures", chooses)
        self.keeper.judge, self.keeper.facts = judge, {"heldout": judge.key}
        groups = ["adapter"]
        self.loop.events.log = Logbook(
            [CsvTable(out, groups, [*HELDOUT, *BY_BAND])], log_every, self.loop.clock.in_steps
        )
        judge.told = self.loop.events.log.measured

    @contextlib.contextmanager
    def at(self, strength):
        self.strength = strength
        yield

    def losses(self):
        if self.strength == 1:
            self.measured[self.loop.done] = self.parameters()
        level = self.by_step[self.loop.done] if self.strength else self.by_step[0]
        return np.full((3, 4, 2), level) + np.random.default_rng(hash(level) % 97).normal(size=(3, 4, 2)) / 100

    def parameters(self):
        return torch.cat([p.detach().flatten() for p in self.model.parameters()]).clone()

    def run(self):
        super().run()
        self.loop.events.log.close()
        self.verdict = self.keeper.judge.verdict(STEPS)
        return self

    def result(self):
        """All that must not depend on how a run was stopped."""
        rows = [{name: v for name, v in row.items() if name != "it_s"} for row in table(self.out)]
        return {"best": self.verdict.reason, "adapter": self.parameters().tolist(), "rows": rows}


def table(out):
    with open(out / "metrics.csv", newline="") as f:
        return list(csv.DictReader(f))


def steps(out):
    return [c.step for c in checkpoints_in(out)]


@pytest.mark.parametrize("optimizer", ["adamw", "schedulefree", "prodigy"])
def test_a_run_ends_with_the_parameters_that_were_best_and_keeps_their_state_and_the_last(optimizer, tmp_path):
    run = Judged(tmp_path, optimizer=optimizer).run()
    assert run.verdict.step == 4 and "lowest held-out loss of the 4" in run.verdict.reason
    assert run.parameters().equal(run.measured[4]) and not run.parameters().equal(run.measured[8])
    assert steps(tmp_path) == [4, 6, 8]


def test_the_last_step_is_measured_too_and_may_be_the_best(tmp_path):
    run = Judged(tmp_path, LOSSES | {8: 0.1}).run()
    assert run.verdict.step == 8 and run.parameters().equal(run.measured[8]) and steps(tmp_path) == [6, 8]


def test_with_best_last_everything_is_measured_and_nothing_chosen(tmp_path):
    run = Judged(tmp_path, chooses=False).run()
    assert run.verdict.step == 8 and "step 8 was asked for" in run.verdict.reason and "step 4" in run.verdict.reason
    assert run.parameters().equal(run.measured[8]) and steps(tmp_path) == [6, 8]


def test_the_best_state_and_the_last_are_kept_where_no_others_are(tmp_path):
    run = Judged(tmp_path, save_every=0).run()
    assert run.parameters().equal(run.measured[4]) and steps(tmp_path) == [4, 8]


def test_a_loss_that_is_not_finite_is_never_the_lowest(tmp_path):
    run = Judged(tmp_path, LOSSES | {4: float("nan")})
    assert run.run().verdict.step == 6


def test_measuring_changes_no_byte_of_the_state(tmp_path):
    from diffpeft.train import state

    Run(tmp_path / "plain").run()
    Judged(tmp_path / "judged").run()
    plain, judged = (checkpoints_in(tmp_path / name)[-1].folder for name in ("plain", "judged"))
    plain, judged = (state.read(folder / state.FILE) for folder in (plain, judged))
    assert {name for name in judged if name not in plain} == {f"run.heldout.{n}" for n in ("before", "after", "steps")}
    assert all(tensor.equal(judged[name]) for name, tensor in plain.items())


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return Judged(tmp_path_factory.mktemp("straight")).run().result()


@pytest.fixture(scope="module")
def count(tmp_path_factory):
    """How many moments there are in a run at which it may be killed."""
    folder = tmp_path_factory.mktemp("moments")

    def job():
        run = Judged(folder / "out")
        counting = Moments(run)
        run.run()
        (folder / "count.json").write_text(json.dumps(len(counting.names)))

    assert ended(job) == 0
    return json.loads((folder / "count.json").read_text())


@pytest.mark.parametrize("part", [pytest.param(i, marks=() if i % 4 == 1 else pytest.mark.slow) for i in range(24)])
def test_a_run_that_is_killed_anywhere_ends_with_the_same_best_and_the_same_rows(part, straight, count, tmp_path):
    def job(last=None):
        run = Judged(tmp_path / "out")
        if last:
            Moments(run, last)
        (tmp_path / "result.json").write_text(json.dumps(run.run().result()))

    place = 1 + part * (count - 1) // 23
    assert ended(lambda: job(place)) in (-signal.SIGKILL, 0)
    assert ended(job) == 0
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(json.dumps(straight))
    assert steps(tmp_path / "out") == [4, 6, 8]


def test_a_signal_where_it_would_be_measured_is_obeyed_first(straight, tmp_path):
    run = Judged(tmp_path, events=signalling(signal.SIGTERM, 4))
    with pytest.raises(Interrupted):
        run.run()
    assert 4 not in run.measured and steps(tmp_path)[-1] == 4
    assert Judged(tmp_path).run().result() == straight


def test_a_run_that_goes_on_elsewhere_takes_the_best_state_along(straight, tmp_path):
    from diffpeft.train.checkpoints import chosen

    Judged(tmp_path / "a", log_every=8).run()
    other = Judged(tmp_path / "b", LOSSES)
    other.keeper.resume = chosen(str(tmp_path / "a"), None)
    assert other.run().verdict.step == 4 and other.result()["adapter"] == straight["adapter"]
    assert {4, 8} == set(steps(tmp_path / "b")) | {8} and 4 in steps(tmp_path / "b")


def test_what_was_measured_on_other_pictures_is_forgotten(tmp_path):
    Judged(tmp_path).run()
    run = Judged(tmp_path, {8: 0.3, 0: 1.0})
    run.keeper.judge.key, run.keeper.facts = "others", {"heldout": "others"}
    assert run.run().verdict.step == 8 and [loss.step for loss in run.keeper.judge.history] == [8]


def test_a_best_step_whose_state_is_gone_is_passed_over(tmp_path):
    from diffpeft.train.checkpoints import remove, state_at

    Judged(tmp_path).run()
    remove(state_at(tmp_path, 4).folder)
    run = Judged(tmp_path).run()
    assert run.verdict.step == 6 and [loss.step for loss in run.keeper.judge.history] == [0, 2, 4, 6, 8]


# -- metrics.csv -----------------------------------------------------------------------------------------------------------


def test_the_table_has_every_step_once_with_what_was_measured_in_its_row(tmp_path):
    run = Judged(tmp_path).run()
    rows = table(tmp_path)
    assert [int(row["step"]) for row in rows] == list(range(STEPS + 1))
    assert [float(row["loss"]) for row in rows[1:]] == pytest.approx(run.loop.losses, rel=1e-5)
    assert all(float(row["gradient_norm"]) > 0 and float(row["it_s"]) > 0 for row in rows[1:])
    rate = run.loop.job.schedule.at
    assert [float(row["lr"]) for row in rows[1:]] == pytest.approx([rate(step) for step in range(STEPS)], rel=1e-5)
    measured = {int(row["step"]): row for row in rows if row["heldout_loss"]}
    for loss in run.keeper.judge.history:
        row = measured.pop(loss.step)
        assert float(row["heldout_loss"]) == pytest.approx(loss.after, rel=1e-5)
        assert float(row["heldout_base"]) == pytest.approx(loss.before, rel=1e-5)
        assert float(row["heldout_standard_error"]) == pytest.approx(loss.standard_error, rel=1e-5)
        assert float(row["heldout_sigma_3"]) == pytest.approx(loss.bands[3].after, rel=1e-5)
    assert not measured


def test_a_row_of_several_steps_has_their_mean_also_where_a_run_went_on_among_them(tmp_path):
    run = Judged(tmp_path / "a", log_every=4).run()
    rows = [row for row in table(tmp_path / "a") if row["loss"]]
    assert [int(row["step"]) for row in rows] == [4, 8]
    means = [np.mean(run.loop.losses[:4]), np.mean(run.loop.losses[4:])]
    assert [float(row["loss"]) for row in rows] == pytest.approx(means, rel=1e-5)
    with pytest.raises(Interrupted):
        Judged(tmp_path / "b", log_every=4, events=signalling(signal.SIGTERM, 6)).run()
    Judged(tmp_path / "b", log_every=4).run()
    assert [row["loss"] for row in table(tmp_path / "b")] == [row["loss"] for row in table(tmp_path / "a")]


def test_rows_after_the_state_half_rows_and_other_columns(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss,lr,extra\n1,0.5,0.1,x\n2,0.4,0.1,y\n3,0.3,0.1,\n4,0.2")
    sink = CsvTable(tmp_path, ["x1", "x0.5"], [*HELDOUT, *BY_BAND])
    sink.begin(2)
    sink.row(3, {"loss/train": 0.25, "lr/x0.5": 0.05, "loss/heldout": 0.7})
    rows = table(tmp_path)
    assert [row["step"] for row in rows] == ["1", "2", "3"] and [row["loss"] for row in rows] == ["0.5", "0.4", "0.25"]
    assert [row["extra"] for row in rows] == ["x", "y", ""] and rows[0]["lr"] == "0.1" and rows[2]["lr_x0.5"] == "0.05"
    sink.begin(0)
    assert table(tmp_path) == []


def test_numbers_that_are_read_late_have_their_rows_too(straight, tmp_path):
    run = Judged(tmp_path, late=True)
    assert run.run().result() == straight


def test_usage_counts_on(tmp_path):
    with pytest.raises(Interrupted):
        Judged(tmp_path, events=signalling(signal.SIGTERM, 4)).run()
    before = json.loads((checkpoints_in(tmp_path)[-1].folder / "state.json").read_text())["usage"]
    run = Judged(tmp_path).run()
    usage = run.loop.clock.usage()
    assert before["steps"] == 4 and usage.steps == 8 and usage.seconds > before["seconds"] > 0
    assert usage.stepping > before["stepping"] and usage.peak_memory >= before["peak_memory"] > 2**20
    assert usage.table(3)["samples_per_second"] == pytest.approx(3 * usage.steps / usage.stepping, rel=1e-3)


def test_averages_are_in_the_parameters_while_they_are_measured(tmp_path):
    run = Judged(tmp_path)
    seen = {}
    measure = run.keeper.judge.measure

    def checked(step):
        inside = run.parameters()
        with averaged(run.loop.job.parameters, run.loop.job.ema, run.loop.job.optimizer):
            seen[step] = (inside, run.parameters())
        measure(step)

    run.keeper.judge.measure = checked
    run.run()
    assert all(inside.equal(average) for inside, average in seen.values())
