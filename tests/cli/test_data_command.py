"""`diffpeft data check` says what training would, without a model and without torch."""

import json
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner
from PIL import Image

from diffpeft.cli import cli
from diffpeft.cli.errors import run
from diffpeft.pipeline.open import EMBEDDED


@pytest.fixture
def photos(tmp_path):
    for name, size in {
        "10_sks dog/a.png": (600, 800),
        "10_sks dog/b.jpg": (800, 600),
        "2_zxc cat/c.png": (512, 512),
    }.items():
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (len(name), size[0] % 256, 9)).save(path)
    (tmp_path / "photos" / "notes.md").write_text("words")
    return tmp_path / "photos"


def check(*arguments):
    result = CliRunner().invoke(cli, ["data", "check", *map(str, arguments)], catch_exceptions=False)
    return result.output


def test_the_account_is_printed(photos):
    lines = check(photos, "--resolution", "512", "--batch-size", "2", "--steps", "110").splitlines()
    assert lines == [
        f"3 images of 512x512 to 800x600 in {photos}; captions: 2 from the folder's name 'sks dog', 1 from the folder's name 'zxc cat'",
        "folders: '10_sks dog' 2 images x 10, '2_zxc cat' 1 image x 2",
        "pictures: 1 of 448x576, 1 of 512x512, 1 of 576x448",
        "110 steps of 2 pictures: 10 passes through 22",
        "not used: 1 .md ('notes.md')",
    ]
    assert "steps" not in check(photos) and "448x576" not in check(photos)


def test_several_resolutions_and_folders(photos):
    table = json.loads(check(photos, f"{photos / '2_zxc cat'}:3", "--resolution", "256,512", "--json"))
    assert table["images"] == 4 and table["pictures"] == 2 * (2 * 10 + 2 + 3 * 2) and table["passes"] is None
    assert {b["width"] * b["height"] <= 512**2 for b in table["buckets"]} == {True}


def test_a_model_tells_the_resolution(photos):
    table = json.loads(check(photos, "-m", EMBEDDED, "--no-buckets", "--json"))
    assert table["buckets"] == [{"width": 64, "height": 64, "images": 3}]


@pytest.mark.parametrize(
    "arguments, code, says",
    [
        (["nowhere"], 3, "no such folder"),
        (["photos", "--resolution", "512,x"], 2, "512,x"),
        (["photos", "--resolution", "4"], 2, "at least 8"),
        (["photos", "--mask", "alpha"], 2, "transparent"),
        (["photos", "--trigger", "sks mouse"], 2, "no caption has it"),
        (["photos/notes.md"], 3, "not a folder"),
    ],
)
def test_errors_have_the_codes_of_training(arguments, code, says, photos, monkeypatch, capsys):
    monkeypatch.chdir(photos.parent)
    assert run(cli, ["data", "check", *arguments]) == code
    assert says in capsys.readouterr().err


def test_nothing_large_is_imported_and_all_broken_files_are_named_at_once(photos):
    (photos / "x.png").write_bytes(b"no picture")
    (photos / "y.png").write_bytes(b"")
    code = (
        "import sys; from diffpeft.cli import cli; from diffpeft.cli.errors import run\n"
        f"code = run(cli, ['data', 'check', {str(photos)!r}, '--instance-prompt', 'x', '-m', {str(EMBEDDED)!r}])\n"
        "print(code, sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    start = time.process_time()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "3 []" and "'x.png'" in done.stderr and "'y.png'" in done.stderr
    assert time.process_time() - start < 1
