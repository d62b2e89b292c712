"""Several processes of one run end where one ends: the loop, whatever ends it, and what the environment says of them."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffpeft import ConfigError, DivergedError
from diffpeft.cli.launch import run_all
from diffpeft.errors import LostProcessError
from diffpeft.train import checkpoints, draw, machines, state
from diffpeft.train.checkpoints import checkpoints_in, chosen, sha256
from diffpeft.train.config import Options, TrainConfig
from diffpeft.train.job import job_of
from diffpeft.train.lock import occupied
from diffpeft.train.loop import Events, Keeper, Loop
from diffpeft.train.machines import World
from diffpeft.train.resume import check_same
from diffpeft.train.signals import Interrupted
from diffpeft.train.team import ALONE, team
from tests.train.together import processes

STEPS, EVERY, BATCH, EXAMPLES, NAME = 6, 4, 3, 5, "sks"
OPTIMIZERS = ("adamw", "lion", "prodigy", "schedulefree", "adafactor")


class Run:
    """A small run with all that is random: order, noise, dropout in layers; with accumulation, averages and a schedule. A step has four passes."""

    def __init__(self, out, optimizer="adamw", events=None, late=None, **options):
        torch.manual_seed(1 + team().rank)  # what each begins with is the main one's
        self.model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.3), nn.Linear(6, 4)).double()
        self.expert = nn.Linear(4, 4, bias=False).double()  # that only one pass reads
        parameters = dict(self.model.named_parameters()) | {"expert.weight": self.expert.weight}
        values = {"optimizer": optimizer, "accumulate": 4 // team().size, "lr_scheduler": "cosine", "warmup": 2}
        averages = {} if optimizer == "schedulefree" else {"ema": 0.9}
        self.options = Options(**{**values, **averages, "steps": STEPS, "seed": 7, **options})
        resume = chosen("latest", out) if checkpoints_in(out) else None
        self.keeper = Keeper(out, NAME, EVERY, 2, {"options": {}}, lambda folder, step: None, resume, "diffpeft train")
        self.loop = Loop(job_of(self.options, parameters, self.loss), self.keeper, events or Events(), late)

    def loss(self, step, part):
        rows = draw.order(EXAMPLES, step * 4 * BATCH + part * BATCH, BATCH, 7, "rows")
        x = torch.stack([torch.full((4,), float(row), dtype=torch.float64) for row in rows])
        noise = torch.stack([torch.randn(4, generator=draw.generator(7, step, part, i)) for i in range(BATCH)])
        y = self.model(x + noise)
        return F.mse_loss(self.expert(y) if (step, part) == (2, 3) else y, x) / 4

    def run(self):
        with team().together(), occupied(self.keeper.out):
            return self.loop.run()


def state_of(out, step=STEPS):
    return sha256(checkpoints.place_of(out, NAME, step) / state.FILE)


def parameters_of(out, step=STEPS):
    return state.read_parts(checkpoints.place_of(out, NAME, step) / state.FILE)


def close(out, other):
    """Two runs whose sums were made in another order: fp64 keeps 1e-16 of each term, over six steps of Adam."""
    first, second = parameters_of(out), parameters_of(other)
    for part in (state.ADAPTER, state.RUN):
        for name, t in first[part].items():
            torch.testing.assert_close(t, second[part][name], rtol=1e-9, atol=1e-11)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of each optimiser's run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    for optimizer in OPTIMIZERS:
        Run(folder / optimizer, optimizer).run()
    return folder


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What two processes do, in one life: (folder of their runs, [what each noted])."""
    folder = tmp_path_factory.mktemp("both")

    def job():
        noted, here = {}, team()
        for optimizer in OPTIMIZERS:
            Run(folder / optimizer, optimizer).run()
        Run(folder / "late", late=True).run()
        noted["agreed"] = here.agreed([here.rank, 5 - here.rank, 3])
        noted["gathered"] = here.gathered({"rank": here.rank})
        computed = []
        noted["divided"] = list(here.divided([3, 1, 4, 1, 5], lambda x: computed.append(x) or x * x))
        noted["computed"] = computed
        seen = []
        Run(folder / "watched", events=Events(at=[(2, seen.append)])).run()
        noted["watched"] = list(seen)
        here.sharded = True
        Run(folder / "sharded", events=Events(at=[(2, seen.append)])).run()
        here.sharded, noted["sharded"] = False, seen[len(noted["watched"]) :]
        stopped = Run(folder / "stopped")
        original = stopped.loop.job.loss

        def loss(step, part):
            if (step, part) == (1, 2):  # of the second process
                os.kill(os.getpid(), signal.SIGTERM)
            return original(step, part)

        stopped.loop.job.loss = loss
        try:
            stopped.run()
        except Interrupted as error:
            noted["stopped"] = [error.exit_code, *error.notes]
        noted["resumed"] = Run(folder / "stopped").run()
        try:
            here.check_same("data", here.rank)
        except ConfigError as error:
            noted["other"] = str(error)
        here.check_same("data", 1.5)
        (folder / f"noted-{here.rank}.json").write_text(json.dumps(noted))

    assert processes(folder, job) == [0, 0], [p.read_text() for p in folder.glob("error-*")]
    return folder, [json.loads((folder / f"noted-{rank}.json").read_text()) for rank in (0, 1)]


# The sum over two processes is (g0 + g1) + (g2 + g3), one process has ((g0 + g1) + g2) + g3: close; with one pass each they are equal (below).
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_two_processes_end_where_one_ends(optimizer, alone, both):
    close(alone / optimizer, both[0] / optimizer)


def test_with_a_pass_each_it_is_the_same_bytes(tmp_path, both):
    Run(tmp_path / "one", accumulate=2).run()

    def job():
        Run(tmp_path / "two", accumulate=1).run()

    assert processes(tmp_path / "pair", job) == [0, 0]
    assert state_of(tmp_path / "one") == state_of(tmp_path / "two")


def test_numbers_that_are_read_late_are_the_same(both):
    assert state_of(both[0] / "late") == state_of(both[0] / "adamw")


def test_processes_agree_and_share(both):
    for rank, noted in enumerate(both[1]):
        assert noted["agreed"] == [1, 5, 3] and noted["gathered"] == [{"rank": 0}, {"rank": 1}]
        assert noted["divided"] == [9, 1, 16, 1, 25] and noted["computed"] == [[3, 4, 5], [1, 1]][rank]
        assert "other options" in noted["other"]


def test_the_main_process_watches_and_all_where_forwards_need_all(both):
    first, second = both[1]
    assert first["watched"] == [0, 2, 4, 6] and second["watched"] == []
    assert first["sharded"] == second["sharded"] == [0, 2, 4, 6]
    assert state_of(both[0] / "watched") == state_of(both[0] / "sharded") == state_of(both[0] / "adamw")


def test_a_signal_to_one_process_stops_all_after_the_same_step(both):
    folder, (first, second) = both
    assert first["stopped"] == second["stopped"] and first["stopped"][0] == 143
    assert "after step 2 of 6" in first["stopped"][1]
    assert first["resumed"] == second["resumed"] and state_of(folder / "stopped") == state_of(folder / "adamw")


# -- what ends a run -------------------------------------------------------------------------------------------------------


def ended(folder, at, what, rank=1, **options):
    """The exit codes of two processes, one of which does `what` in its loss at a step; and what each raised."""

    def job():
        run, here = Run(folder / "run", **options), team()
        original = run.loop.job.loss

        def loss(step, part):
            number = original(step, part)
            return what(number) if (step, here.rank) == (at, rank) else number

        run.loop.job.loss = loss
        try:
            run.run()
        except Exception as error:
            told = {"first": machines.speaks(getattr(error, "exit_code", 1)), "notes": getattr(error, "__notes__", [])}
            told |= {"error": type(error).__name__, "text": str(error), "code": machines.shared_code(1)}
            (folder / f"told-{here.rank}.json").write_text(json.dumps(told))

    codes = processes(folder, job, seconds=30)
    paths = [folder / f"told-{rank}.json" for rank in (0, 1)]
    return codes, [json.loads(path.read_text()) if path.exists() else None for path in paths]


def broken(number):
    raise ValueError("a broken file")


def killed(number):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_loss_that_is_not_finite_in_one_process_is_an_error_of_all_told_once(tmp_path):
    codes, told = ended(tmp_path, 2, lambda number: number * math.nan)
    assert codes == [0, 0] and sum(each["first"] for each in told) == 1
    for each in told:
        assert (each["error"], each["code"]) == (DivergedError.__name__, DivergedError.exit_code)
        assert "step 3" in each["text"]
    assert any("after step 2" in note for each in told if each["first"] for note in each["notes"])
    (checkpoint,) = checkpoints_in(tmp_path / "run")
    assert checkpoint.step == 2 and not checkpoint.damage()


def test_an_error_of_one_process_is_told_by_it_alone(tmp_path):
    start = time.monotonic()
    codes, (other, first) = ended(tmp_path, 3, broken)
    assert codes == [0, 0] and time.monotonic() - start < 10
    assert (first["error"], first["first"]) == ("ValueError", True) and "after step 3" in first["notes"][0]
    assert (other["error"], other["first"], other["notes"]) == (LostProcessError.__name__, False, [])


@pytest.mark.parametrize("rank", [0, 1])
def test_when_a_process_is_killed_the_other_ends_within_seconds_and_keeps_the_state(rank, tmp_path):
    start = time.monotonic()
    codes, told = ended(tmp_path, 3, killed, rank)
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 0 and time.monotonic() - start < 10
    survivor = told[1 - rank]
    assert (survivor["error"], survivor["first"]) == (LostProcessError.__name__, True)
    assert "after step 3 of 6" in survivor["notes"][0]
    Run(tmp_path / "run").run()  # one goes on with what two began
    Run(tmp_path / "alone").run()
    close(tmp_path / "run", tmp_path / "alone")


def test_one_process_goes_on_to_the_bytes_of_two(tmp_path):
    codes, _ = ended(tmp_path, 3, killed, accumulate=1)
    assert codes == [0, -signal.SIGKILL]
    Run(tmp_path / "run", accumulate=2).run()
    Run(tmp_path / "alone", accumulate=2).run()
    assert state_of(tmp_path / "run") == state_of(tmp_path / "alone")


# -- options and environment -----------------------------------------------------------------------------------------------


def test_a_run_goes_on_with_as_many_passes_by_however_many_processes():
    before = {"accumulate": 1, "num_processes": 2, "batch_size": 2}
    check_same(Options(accumulate=2), before, {"accumulate": 2, "num_processes": 1, "batch_size": 2})
    check_same(Options(), {"accumulate": 2}, {"accumulate": 1, "num_processes": 2})
    with pytest.raises(ConfigError, match=r"accumulate was '2' and is '1'.*one with --accumulate 2 goes on"):
        check_same(Options(), before, {"accumulate": 1, "num_processes": 1, "batch_size": 2})


@pytest.fixture
def environment(monkeypatch):
    """Sets what launchers say, and nothing else."""
    for name in [name for names in machines._NAMES.values() for name in names] + ["MASTER_PORT"]:
        monkeypatch.delenv(name, raising=False)
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        monkeypatch.delenv(name)

    def says(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return says


def test_launchers_say_which_process_this_is(environment):
    assert machines.world() == World() and ALONE.main
    environment(RANK="3", WORLD_SIZE="8", LOCAL_RANK="1")
    assert machines.world() == World(3, 8, 1) and not machines.world().main
    environment(WORLD_SIZE="1")
    assert machines.world() == World()
    environment(WORLD_SIZE="two")
    with pytest.raises(ConfigError, match="WORLD_SIZE"):
        machines.world()


def test_mpi_says_so_too(environment):
    environment(OMPI_COMM_WORLD_RANK="1", OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_LOCAL_RANK="1")
    assert machines.world() == World(1, 2, 1)


PAIR = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
FSDP = {**PAIR, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    "says, named",
    [
        ({**PAIR, "ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({**PAIR, "ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron"),
        ({**PAIR, "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "PARALLELISM"),
        ({**PAIR, "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "--compile"),
        ({**PAIR, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "--accumulate"),
        ({**PAIR, "ACCELERATE_MIXED_PRECISION": "fp8"}, "fp8"),
        ({**FSDP, "FSDP_VERSION": "1"}, "fsdp_version: 2"),
        ({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, "offload"),
        ({**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "--gradient-checkpointing"),
        ({**FSDP, "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "TRANSFORMER_BASED_WRAP"),
        ({"MASTER_PORT": "29500", "ACCELERATE_MIXED_PRECISION": "no"}, "started one"),
    ],
)
def test_what_accelerates_config_asks_for_and_is_not_done_is_refused_by_name(says, named, environment):
    environment(**says)
    with pytest.raises(ConfigError, match=named):
        machines.check(Options())


def test_what_is_done_is_not(environment):
    environment(
        **FSDP,
        FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
        FSDP_RESHARD_AFTER_FORWARD="true",
        ACCELERATE_DYNAMO_BACKEND="NO",
        ACCELERATE_MIXED_PRECISION="bf16",
        MASTER_PORT="29500",
    )
    machines.check(Options())
    assert machines.sharding(Options()) and machines.reshards() and machines.precision() == "bf16"
    assert Options(accumulate=3).parts() == 6


def test_processes_that_nobody_started_are_refused(environment):
    with pytest.raises(ConfigError, match="num_processes is 2, and the run has 1"):
        machines.check(TrainConfig(num_processes=2))
    with pytest.raises(ConfigError, match="fsdp with one process"):
        machines.check(TrainConfig(fsdp=True))
    environment(**PAIR)
    machines.check(TrainConfig(num_processes=2, fsdp=True))


# -- the launcher: any command, as one ---------------------------------------------------------------------------------------


def command(text):
    return [sys.executable, "-c", f"import os, sys, time, signal\nrank = int(os.environ['RANK'])\n{text}"]


@pytest.mark.parametrize(
    "text, code",
    [
        ("assert os.environ['WORLD_SIZE'] == '2'", 0),
        ("sys.exit(5)", 5),
        ("sys.exit(3 if rank else 0)", 3),
        ("os.kill(os.getpid(), 9) if rank else sys.exit(7)", 7),
        ("os.kill(os.getpid(), 9)", 137),
        ("time.sleep(60 * (1 - rank)); sys.exit(4)", 4),  # one hangs
    ],
)
def test_several_processes_end_as_the_first_that_failed(text, code, monkeypatch):
    monkeypatch.setattr("diffpeft.cli.launch.GRACE", 0.5)
    assert run_all(command(text), 2) == code


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_all_once(number, tmp_path):
    text = f"""
got = []
for n in (signal.SIGINT, signal.SIGTERM): signal.signal(n, lambda n, f: got.append(n))
open({str(tmp_path)!r} + f"/ready-{{rank}}", "w").close()
while not got: time.sleep(0.01)
time.sleep(0.3)
print(rank, got, flush=True)
sys.exit(128 + got[0])
"""
    launcher = f"import sys; from diffpeft.cli.launch import run_all; sys.exit(run_all({command(text)!r}, 2))"
    process = subprocess.Popen([sys.executable, "-c", launcher], stdout=subprocess.PIPE, text=True)
    while len(list(tmp_path.glob("ready-*"))) < 2:
        time.sleep(0.01)
    process.send_signal(number)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert sorted(out.splitlines()) == [f"{rank} [{int(number)}]" for rank in (0, 1)]


def test_processes_end_when_their_launcher_is_killed(tmp_path):
    text = f"""
from diffpeft.cli.launch import follow_launcher
follow_launcher()
open({str(tmp_path)!r} + f"/ready-{{rank}}", "w").write(str(os.getpid()))
time.sleep(60)
"""
    launcher = f"import sys; from diffpeft.cli.launch import run_all; sys.exit(run_all({command(text)!r}, 2))"
    process = subprocess.Popen([sys.executable, "-c", launcher])
    while len([p for p in tmp_path.glob("ready-*") if p.read_text()]) < 2:
        time.sleep(0.01)
    process.kill()
    process.wait()
    pids = [int(path.read_text()) for path in tmp_path.glob("ready-*")]
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
