"""Numbers that go to trackers: accelerate's classes get them by name and step, and nothing that a tracker does ends a run."""

import sys
from importlib.util import find_spec

import pytest
from accelerate import tracking
from PIL import Image

from diffpeft import ConfigError, UnknownNameError
from diffpeft.pipeline.open import EMBEDDED
from diffpeft.train import trackers
from diffpeft.train.config import Options
from diffpeft.train.heldout import Band, HeldoutLoss
from diffpeft.train.journal import BY_BAND, HELDOUT, CsvTable, Logbook, StepNumbers
from diffpeft.train.trackers import PACKAGES, TrackerLog, logs_of


class Memory(tracking.GeneralTracker):
    """A tracker that remembers what it was told."""

    name = "memory_of_tests"
    requires_logging_directory = True
    last = None

    def __init__(self, run_name, logging_dir, **keywords):
        super().__init__()
        self.told, self.pictures, self.ended, self.place = [], [], False, (run_name, logging_dir, keywords)
        self.broken_at, Memory.last = None, self

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.values = values

    def log(self, values, step=None, **keywords):
        if step == self.broken_at:
            raise RuntimeError("no network")
        self.told.append((step, values))

    def log_images(self, values, step=None, **keywords):
        self.pictures.append((step, {name: array.shape for name, array in values.items()}, keywords))

    def finish(self):
        self.ended = True


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, Memory.name, Memory)
    return Memory.name


def test_the_table_of_packages_is_accelerates():
    assert PACKAGES.keys() == tracking.LOGGER_TYPE_TO_CLASS.keys()


def test_which_logs_there_are(memory, monkeypatch):
    assert logs_of(Options()) == ["csv"] and logs_of(Options(log="none")) == []
    assert logs_of(Options(log=f"{memory}, csv")) == [memory, "csv"] == logs_of(Options(log=[memory, "csv"]))
    with pytest.raises(UnknownNameError, match="tensorboard"):
        logs_of(Options(log="tensorbord"))
    with pytest.raises(ConfigError, match="none"):
        logs_of(Options(log="none,csv"))
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    for name, (package, *_) in PACKAGES.items():
        with pytest.raises(ConfigError, match=f"{name}, which is not installed") as raised:
            logs_of(Options(log=f"csv,{name}"))
        assert raised.value.remedy == f"pip install {package}"


def test_a_tracker_that_is_not_there_is_told_before_torch_is_loaded(tmp_path):
    from tests.cli.process import quick

    (tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "a.png")
    missing = next(name for name, packages in PACKAGES.items() if not any(map(find_spec, packages)))
    done = quick(
        "train",
        "-m",
        str(EMBEDDED),
        "-d",
        "photos",
        "-o",
        "out",
        "--instance-prompt",
        "x",
        "--log",
        missing,
        cwd=tmp_path,
    )
    assert done.returncode == 2 and "pip install" in done.stderr and not (tmp_path / "out" / "config.toml").exists()


def numbers(done, loss=0.5):
    return StepNumbers(done, loss, 0.25, {"adapter": 1e-4})


MEASURED = HeldoutLoss(2, 0.9, 0.8, 0.01, tuple(Band(i / 4, (i + 1) / 4, 0.9, 0.1 * i, 0.01) for i in range(4)), 3)


def test_a_tracker_is_told_every_number_by_its_name_at_its_step(memory, tmp_path):
    sink = TrackerLog(
        memory, "style", tmp_path, 0, {"rank": 4, "lr": None, "data": ["a", "b"], "flip": True, "out": "x"}
    )
    clock = iter(range(100))
    book = Logbook([sink, CsvTable(tmp_path, ["adapter"], [*HELDOUT, *BY_BAND])], seconds=lambda: float(next(clock)))
    book.begin(0, [])
    for step in (1, 2, 3):
        book.told(numbers(step))
        if step == 2:
            book.measured(MEASURED)
    Image.new("RGB", (6, 4)).save(tmp_path / "a.png")
    book.images(3, {"samples/0": tmp_path / "a.png"})
    book.close()
    told = Memory.last
    assert told.place == ("style", str(tmp_path / "log"), {}) and told.ended
    assert told.values == {"rank": 4, "lr": "", "data": "a,b", "flip": True, "out": "x"}
    step = {"loss/train": 0.5, "norm/grad": 0.25, "lr/adapter": 1e-4, "perf/it_s": 1.0}
    heldout = {"loss/heldout": 0.8, "loss/heldout_base": 0.9, "loss/heldout_error": 0.01}
    heldout |= {f"loss/heldout_sigma_{i}": pytest.approx(0.1 * i) for i in range(4)}
    assert told.told == [(1, step), (2, step | heldout), (3, step)]
    assert told.pictures == [(3, {"samples/0": (1, 4, 6, 3)}, {})]
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 4


def test_a_tracker_that_fails_is_left_out_and_said_and_the_others_go_on(memory, tmp_path):
    notes = []
    sink = TrackerLog(memory, "style", tmp_path, 0, {})
    sink.tracker.broken_at = 2
    book = Logbook([sink, CsvTable(tmp_path, ["adapter"])], note=notes.append)
    book.begin(0, [])
    for step in range(1, 5):
        book.told(numbers(step))
    book.close()
    assert [step for step, _ in Memory.last.told] == [1] and len(
        (tmp_path / "metrics.csv").read_text().splitlines()
    ) == 5
    assert len(notes) == 1 and memory in notes[0] and "no network" in notes[0]


def test_a_tracker_that_cannot_begin_is_an_error_of_the_options(memory, tmp_path, monkeypatch):
    def start(self):
        raise OSError("no account")

    monkeypatch.setattr(Memory, "start", start)
    with pytest.raises(ConfigError, match="no account"):
        TrackerLog(memory, "style", tmp_path, 0, {})


@pytest.mark.slow
def test_a_whole_run_tells_its_tracker(memory, tmp_path):
    from diffpeft import TrainConfig
    from diffpeft.train import dreambooth
    from tests.train.pictures import photos_in

    photos = photos_in(tmp_path)
    run = dreambooth.train(
        TrainConfig(
            model=str(EMBEDDED), data=str(photos), out=str(tmp_path / "out"), name="a", instance_prompt="an emoji", targets="to_q",
            rank=1, steps=3, heldout=1, batch_size=8, save_every=0, log=memory, lr_pattern="down_blocks=0.5", resolution=32,
        )
    )  # fmt: skip
    rows = dict(Memory.last.told)
    assert [*rows] == [0, 1, 2, 3] and not (tmp_path / "out" / "metrics.csv").exists()
    assert [rows[step]["loss/train"] for step in (1, 2, 3)] == run.losses
    assert rows[3]["loss/heldout"] == run.heldout[-1].after and rows[1]["lr/x0.5"] == pytest.approx(
        rows[1]["lr/x1"] / 2
    )
    assert Memory.last.values["rank"] == 1 and Memory.last.ended


@pytest.mark.skipif(not find_spec("tensorboard"), reason="tensorboard is not installed")
def test_tensorboard_shows_what_it_was_told_and_nothing_after_the_state(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for done, last, loss in ((0, 4, 0.5), (2, 5, 0.25)):
        sink = TrackerLog("tensorboard", "style", tmp_path, done, {"rank": 4, "mask": None})
        book = Logbook([sink])
        book.begin(done, [0.5] * done)
        for step in range(done + 1, last + 1):
            book.told(numbers(step, loss))
        Image.new("RGB", (6, 4)).save(tmp_path / "a.png")
        book.images(last, {"samples/0": tmp_path / "a.png"})
        book.close()
    events = EventAccumulator(str(tmp_path / "log" / "style"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/train")] == [
        (1, 0.5),
        (2, 0.5),
        (3, 0.25),
        (4, 0.25),
        (5, 0.25),
    ]
    assert events.Images("samples/0")


@pytest.mark.skipif(not find_spec("wandb"), reason="wandb is not installed")
def test_wandb_works_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    book = Logbook([TrackerLog("wandb", "style", tmp_path, 0, {"rank": 4})])
    book.begin(0, [])
    book.told(numbers(1))
    Image.new("RGB", (6, 4)).save(tmp_path / "a.png")
    book.images(1, {"samples/0": tmp_path / "a.png"})
    book.close()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb")) and "wandb" in sys.modules
