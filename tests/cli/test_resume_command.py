"""A run that is stopped and goes on, as a user meets it: in processes of its own."""

import os
import shlex
import signal
import subprocess
import sys

import pytest

from diffpeft.pipeline.open import EMBEDDED
from diffpeft.train.checkpoints import checkpoints_in
from tests.cli.process import quick


@pytest.mark.slow  # whole runs, in processes of their own
def test_a_run_that_is_terminated_says_how_it_goes_on_and_does(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes((EMBEDDED.parent / "demo" / "train" / "airplane.png").read_bytes())
    options = (
        "-m",
        EMBEDDED,
        "-d",
        "photos",
        "-o",
        "out dir",
        "--name",
        "a",
        "--instance-prompt",
        "x",
        "--targets",
        "to_q",
    )
    run = subprocess.Popen(
        [sys.executable, "-m", "diffpeft", "train", *map(str, options), "--rank", "2", "--steps", "3000"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    for line in run.stdout:
        if "step 1/" in line:
            break
    busy = quick("train", *options, cwd=tmp_path)
    assert busy.returncode == 4 and str(run.pid) in busy.stderr, busy.stderr
    run.send_signal(signal.SIGTERM)
    printed, errors = run.communicate()
    assert run.returncode == 143 and "asked to stop" in printed, errors
    assert errors.strip().startswith("interrupted\n") and "Traceback" not in errors
    (command,) = [line.partition(": ")[2] for line in errors.splitlines() if "goes on with" in line]
    step = checkpoints_in(tmp_path / "out dir")[-1].step

    again = quick("train", *options, cwd=tmp_path)
    assert again.returncode == 2 and "--overwrite" in again.stderr and "--resume" in again.stderr
    other = quick(*shlex.split(command)[1:], "--rank", "3", cwd=tmp_path)
    assert other.returncode == 2 and "rank was '2' and is '3'" in other.stderr

    done = quick(*shlex.split(command)[1:], "--steps", step + 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {"a.diffusers.safetensors", "a.kohya.safetensors", "report.html"} <= {
        p.name for p in (tmp_path / "out dir").iterdir()
    }
    assert [c.step for c in checkpoints_in(tmp_path / "out dir")] == [step, step + 2]
    average = quick("average", "out dir", "-o", "averaged", cwd=tmp_path)
    assert average.returncode == 0, average.stderr
    assert sorted(average.stdout.split()) == ["averaged/a.diffusers.safetensors", "averaged/a.kohya.safetensors"]
    finished = quick("train", *options, cwd=tmp_path)
    assert finished.returncode == 2 and "--overwrite" in finished.stderr


def test_the_help_has_headings(tmp_path):
    lines = quick("train", "--help", cwd=tmp_path).stdout.splitlines()
    headings = [line for line in lines if line and not line.startswith(" ") and line.endswith(":")]
    assert headings[:8] == [
        "Model:",
        "Data:",
        "Adapter:",
        "Objective:",
        "Steps:",
        "Watch:",
        "Output and state:",
        "Save:",
    ]
