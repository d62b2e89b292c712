"""diffpeft sft as a user meets it: in a process of its own."""

import json
import subprocess
import sys

import pytest

from tests.cli.process import diffpeft, quick
from tests.llm import chat


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return chat.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def rows(tmp_path):
    return chat.write_rows(tmp_path / "rows.jsonl")


def test_a_config_file_is_followed_and_what_is_typed_wins(model, rows, tmp_path):
    (tmp_path / "run.toml").write_text(
        f'model = "{model}"\ndata = "rows.jsonl"\nheldout = "rows.jsonl"\nout = "out"\nsteps = 9\nmax-length = 64\nlr = 1e-2\n'
    )
    done = diffpeft("sft", "run.toml", "--steps", 3, "--batch_size", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert [line.split("/")[-1] for line in lines[-4:]] == [
        "adapter_model.safetensors",
        "adapter_config.json",
        "metrics.json",
        "report.html",
    ]
    assert all((tmp_path / line).is_file() for line in lines[-4:])
    assert "training: step 1/3  loss " in done.stdout and "step 3/3  loss " in done.stdout
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["steps"] == 3 and metrics["heldout_loss"]["after"] < metrics["heldout_loss"]["before"]


SFT = ("sft", "-d", "rows.jsonl", "-o", "out", "--steps", 1)
MISTAKES = {
    "a missing option": (SFT, 2, "--model"),
    "a bad value": ((*SFT, "-m", "MODEL", "--quantize", "nf5"), 2, "nf4"),
    "a mistake in the file": (("sft", "bad.toml"), 2, "max_length"),
    "an unknown method": ((*SFT, "-m", "MODEL", "--method", "lorra"), 2, "lora"),
    "targets that match nothing": ((*SFT, "-m", "MODEL", "--targets", "qq_proj"), 2, "q_proj"),
    "a missing file": ((*SFT, "-m", "MODEL", "-d", "rwos.jsonl"), 3, "rows.jsonl"),
    "a row that is none": ((*SFT, "-m", "MODEL", "--heldout", "bad.jsonl"), 3, "line 2"),
    "a folder that is no model": ((*SFT, "-m", "."), 4, "config.json"),
    "a model that is none": ((*SFT, "-m", "broken"), 4, "broken"),
    "training that diverges": (
        (*SFT, "-m", "MODEL", "--lr", 1e30, "--max-grad-norm", 1e30, "--steps", 9),
        5,
        "--lr",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_short_message_an_exit_code_and_no_trace(mistake, model, rows, tmp_path):
    args, code, says = MISTAKES[mistake]
    (tmp_path / "bad.toml").write_text("max_lenght = 4\n")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    given = (model if a == "MODEL" else a for a in args)
    done = quick(*given, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert says in done.stderr and "Traceback" not in done.stderr and 1 <= len(done.stderr.strip().splitlines()) <= 6
    if code == 5:  # the last good state is kept, and named
        assert {p.name for p in (tmp_path / "out").iterdir()} == {
            "checkpoints",
            "metrics.csv",
            "report.html",
        } and "checkpoints" in done.stderr
    else:
        assert sorted(tmp_path.rglob("*")) == before


def test_the_help_names_every_option_without_loading_torch(tmp_path):
    code = "import sys; from diffpeft.cli import cli; cli.main(['sft', '--help'], standalone_mode=False); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--packing" in done.stdout and "Example:" in done.stdout
