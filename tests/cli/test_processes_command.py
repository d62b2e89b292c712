"""A run of two processes as a user meets it: one command, its signals, its last lines and its exit code."""

import os
import signal
import subprocess
import sys

import pytest

from diffpeft.pipeline.open import EMBEDDED
from diffpeft.train import state
from diffpeft.train.checkpoints import checkpoints_in, sha256
from tests.cli.process import diffpeft

PICTURE = EMBEDDED.parent / "demo" / "train" / "airplane.png"
COMMON = ("-m", EMBEDDED, "--instance-prompt", "x", "--targets", "to_q", "--rank", "2", "--sample-every", "0")


@pytest.fixture
def place(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(PICTURE.read_bytes())
    return tmp_path


def started(place, *args):
    return subprocess.Popen(
        [sys.executable, "-m", "diffpeft", "train", *map(str, (*COMMON, "-d", "photos", *args))],
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )


def digest(place, out):
    return sha256(checkpoints_in(place / out)[-1].folder / state.FILE)


def test_what_is_wrong_before_a_process_starts_is_told_once(place):
    told = diffpeft("train", *COMMON, "-d", "nothing", "-o", "out", "--num-processes", "2", "--rank", "x", cwd=place)
    assert told.returncode == 2 and told.stderr.count("Error") == 1 and "--rank" in told.stderr
    options = ("-d", "nothing", "-o", "out", "--num-processes", "2", "--fsdp", "--quantize", "int8")
    told = diffpeft("train", *COMMON, *options, cwd=place)  # processes would miss the data first
    assert told.returncode == 2 and "quantize with fsdp" in told.stderr


@pytest.mark.slow  # whole runs, in processes of their own
def test_errors_of_two_processes_are_those_of_one(place):
    told = diffpeft("train", *COMMON, "-d", "nothing", "-o", "out", "--num-processes", "2", cwd=place)
    assert told.returncode == 3 and told.stderr.count("Error:") == 1 and "Traceback" not in told.stderr
    options = ("-d", "photos", "-o", "out", "--num-processes", "2", "--lr", "1e30", "--max-grad-norm", "1e30")
    told = diffpeft("train", *COMMON, *options, "--steps", "5", cwd=place)
    assert told.returncode == 5 and told.stderr.count("Error:") == 1 and "Traceback" not in told.stderr
    assert "goes on with" in told.stderr and told.stdout.count("1 image of") == 1


@pytest.mark.slow
def test_a_signal_to_the_command_stops_both_and_one_goes_on_to_the_same_bytes(place):
    run = started(place, "-o", "out", "--num-processes", "2", "--steps", "3000")
    for line in run.stdout:
        if "step 1/" in line:
            break
    run.send_signal(signal.SIGINT)
    printed, errors = run.communicate(timeout=60)
    assert run.returncode == 130 and printed.count("asked to stop") == 1, errors
    assert errors.strip().startswith("interrupted\n") and errors.count("goes on with") == 1
    assert "Traceback" not in errors
    step = checkpoints_in(place / "out")[-1].step
    one = ("--num-processes", "1", "--accumulate", "2", "--steps", step + 2)
    refused = diffpeft("train", "--resume", "out", "--num-processes", "1", cwd=place)
    assert refused.returncode == 2 and "accumulate was '2' and is '1'" in refused.stderr
    gone_on = diffpeft("train", "--resume", "out", *one, cwd=place)
    assert gone_on.returncode == 0, gone_on.stderr
    alone = diffpeft("train", *COMMON, "-d", "photos", "-o", "alone", "--name", "out", *one, cwd=place)
    assert alone.returncode == 0, alone.stderr
    assert digest(place, "out") == digest(place, "alone")


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--multi_gpu",), ("--use_fsdp", "--fsdp_version", "2")])
def test_accelerates_launcher_does_as_well(options, place):
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *options, "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    if "--use_fsdp" in options:
        launch += ["--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
    run = subprocess.run(
        [*launch, "-m", "diffpeft", "train", *map(str, (*COMMON, "-d", "photos", "-o", "out", "--steps", "2"))],
        cwd=place,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("out.diffusers.safetensors: read by") == 1 and run.stdout.count("training: step 1/2") == 1
    fsdp = ("--fsdp",) if "--use_fsdp" in options else ()
    own = diffpeft(
        "train",
        *COMMON,
        "-d",
        "photos",
        "-o",
        "own",
        "--name",
        "out",
        "--steps",
        "2",
        "--num-processes",
        "2",
        *fsdp,
        cwd=place,
    )
    assert own.returncode == 0, own.stderr
    assert digest(place, "out") == digest(place, "own")
