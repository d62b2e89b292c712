"""The command line as a user meets it: in a process of its own."""

import json
import os
import subprocess
import sys

import click
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffpeft.cli import cli
from diffpeft.cli.groups import HEADINGS
from diffpeft.pipeline.open import EMBEDDED, open_pipeline
from tests.cli.process import diffpeft, quick
from tests.single_file import original

IMAGES = EMBEDDED.parent / "demo" / "train"
PHOTO = IMAGES / "cat_face.png"


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.png").write_bytes(PHOTO.read_bytes())
    return folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    done = diffpeft(
        "demo", "--steps", 3, "-o", "out", cwd=folder, before="from diffpeft.train import demo; demo.STEPS = 5"
    )
    assert done.returncode == 0, done.stderr
    return folder / "out", done


TRAIN = (
    "train",
    "-m",
    EMBEDDED,
    "-d",
    "photos",
    "-o",
    "out",
    "--instance-prompt",
    "x",
    "--steps",
    1,
    "--sample-every",
    0,
)
MISTAKES = {
    "an unknown command": (("trian",), 2, "train"),
    "an unknown option": (("demo", "--metod", "lora"), 2, "--method"),
    "an unknown method": (("demo", "--method", "lorra"), 2, "lora"),
    "a missing option": (("train", "-d", "photos", "-o", "out"), 2, "--model"),
    "a bad value": ((*TRAIN, "--rank", 0), 2, "rank"),
    "a missing config file": (("train", "no.toml"), 2, "no.toml"),
    "targets that match nothing": ((*TRAIN, "--targets", "to_qq"), 2, "to_q"),
    "a rank above every layer's": ((*TRAIN, "--rank", 100000), 2, "rank"),
    "a missing folder": ((*TRAIN, "-d", "photo"), 3, "photos"),
    "a folder without images": ((*TRAIN, "-d", "."), 3, "photos"),
    "an unreadable image": ((*TRAIN, "-d", "broken"), 3, "b.png"),
    "a missing model": ((*TRAIN, "-m", "modle"), 4, "modle"),
    "a folder that is no model": ((*TRAIN, "-m", "photos"), 4, "photos"),
    "a single file without its base": ((*TRAIN, "-m", "some.safetensors"), 4, "--base"),
    "a missing adapter": (("generate", "-p", "x", "--lora", "no.safetensors"), 4, "no.safetensors"),
    "a model instead of an adapter": (
        ("generate", "-p", "x", "--lora", EMBEDDED / "unet" / "diffusion_pytorch_model.safetensors"),
        4,
        "no adapter",
    ),
    "an adapter for another family": (("generate", "-p", "x", "--lora", "sdxl.safetensors"), 4, "sdxl"),
    "an adapter for another model": (("generate", "-p", "x", "--lora", "other.safetensors"), 4, "size mismatch"),
    "a pickle": (("generate", "-p", "x", "--lora", "x.bin"), 4, "pickle"),
    "an output that is no picture": (("generate", "-p", "x", "-o", "x.bmp"), 2, ".png"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_short_message_an_exit_code_and_no_trace(mistake, photos, tmp_path):
    args, code, says = MISTAKES[mistake]
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "b.png").write_bytes(b"no picture")
    (tmp_path / "x.bin").write_bytes(b"\x80\x02}q\x00.")
    pair = {"lora_down.weight": torch.zeros(2, 5), "lora_up.weight": torch.zeros(5, 2)}
    save_file({f"lora_unet_input_blocks_4_1_proj_in.{k}": v for k, v in pair.items()}, tmp_path / "sdxl.safetensors")
    save_file(
        {f"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.{k}": v for k, v in pair.items()},
        tmp_path / "other.safetensors",
    )
    save_file(pair, tmp_path / "some.safetensors")
    before = sorted(tmp_path.rglob("*"))
    done = quick(*args, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert says in done.stderr and "Traceback" not in done.stderr and 1 <= len(done.stderr.strip().splitlines()) <= 6
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_debug_after_the_subcommand_shows_the_traceback(tmp_path):
    done = diffpeft("demo", "--method", "lorra", "--debug", cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" in done.stderr


def test_help_and_import_load_nothing_heavy():
    code = "import sys, diffpeft, converters, diffpeft.cli; print({'torch', 'diffusers', 'transformers', 'rich', 'numpy', 'PIL'} & set(sys.modules))"
    assert (
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        ).stdout.strip()
        == "set()"
    )


@pytest.mark.parametrize("command", ["demo", "train", "generate"])
def test_every_command_has_help_with_an_example(command, tmp_path):
    done = diffpeft(command, "--help", cwd=tmp_path)
    assert done.returncode == 0 and f"Example: diffpeft {command}" in done.stdout


def test_the_demo_writes_and_names_its_files(demo):
    out, done = demo
    names = {
        "openmoji.diffusers.safetensors",
        "openmoji.kohya.safetensors",
        "before_after.png",
        "metrics.json",
        "report.html",
    }
    others = {"samples", "config.toml", "account.json", "metrics.csv", "README.md"}
    assert {p.name for p in out.iterdir()} == names | others
    assert [line for line in done.stdout.splitlines() if not line.startswith("[")] == [
        f"out/{n}"
        for n in (
            "openmoji.diffusers.safetensors",
            "openmoji.kohya.safetensors",
            "before_after.png",
            "metrics.json",
            "report.html",
        )
    ]
    assert done.stderr == ""
    progress = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert progress and all("loss " in line and "step " in line for line in progress)


def test_the_demos_metrics_and_picture_agree(demo):
    out, _ = demo
    metrics = json.loads((out / "metrics.json").read_text())
    for name in ("distance_to_target", "distance_to_original", "heldout_loss"):
        assert set(metrics[name]) == {"before", "after"} and all(np.isfinite(v) for v in metrics[name].values())
    assert metrics["steps"] == 3 and metrics["method"] == "lora" and metrics["seconds"] > 0
    assert 0.5 < metrics["shape_kept"] < 1  # after three steps nearly all, but not all
    assert metrics["grid"]["strengths"] == [0, 0.5, 1]
    picture = np.asarray(Image.open(out / "before_after.png")).astype(int)
    cells = [[picture[t:b, l:r] for l, t, r, b in row] for row in metrics["grid"]["boxes"]]
    assert len(cells) >= 3 and all(len({cell.shape for cell in row}) == 1 and len(row) == 3 for row in cells)
    assert all(cell.std() > 0 for row in cells for cell in row)


def test_the_report_is_one_file_with_pictures_options_and_file_names(demo):
    page = (demo[0] / "report.html").read_text()
    assert page.count("data:image/webp;base64,") >= 16 * 4
    assert all(
        word in page
        for word in ("openmoji.kohya.safetensors", "metrics.json", "caption_dropout", "snr_gamma", "distance_to_target")
    )
    assert 'src="http' not in page and "<script" not in page and "<link" not in page


def test_generate_draws_what_the_stock_pipeline_draws(demo, tmp_path):
    file = demo[0] / "openmoji.kohya.safetensors"
    done = diffpeft(
        "generate",
        "-p",
        "an emoji of lemon",
        "--seed",
        7,
        "--steps",
        3,
        "--guidance",
        3,
        "--lora",
        f"{file}:0.5",
        "-o",
        "a.png",
        cwd=tmp_path,
    )
    assert done.returncode == 0 and done.stdout == "a.png\n", done.stderr
    pipe = open_pipeline()
    pipe.load_lora_weights(str(file))
    pipe.set_adapters("default_0", 0.5)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    want = pipe(
        "an emoji of lemon", num_inference_steps=3, guidance_scale=3.0, generator=torch.Generator("cpu").manual_seed(7)
    ).images[0]
    torch.set_num_threads(threads)
    # both add the same product in another order of fp32 operations: at most one grey level apart after rounding
    assert np.abs(np.asarray(Image.open(tmp_path / "a.png")).astype(int) - np.asarray(want)).max() <= 1


def test_train_says_what_it_found_and_who_reads_its_files_on_one_display(photos, tmp_path):
    (photos / "a.caption").write_text("an emoji of sks")
    (photos / "b.heic").write_bytes(b"x")
    (photos / "10_sks").mkdir()
    options = (
        "--class-prompt",
        "an emoji",
        "--num-class-images",
        2,
        "--method",
        "loha",
        "--rank",
        2,
        "--targets",
        "to_q,to_v",
    )
    done = quick(*TRAIN, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    said = [line.partition("] ")[2] for line in lines]
    assert said[0] == "1 image of 64x64 in photos; captions: 1 from .caption"
    assert said[1:4] == [
        "1 step of 1 picture: 1 pass through 1",
        "not used: 1 .heic ('b.heic')",
        "folders of which nothing is used: '10_sks'",
    ]
    assert any(line.startswith("out.kohya.safetensors: read by A1111") for line in said)
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(text in page for text in ("1 image of 64x64 in photos", "b.heic", "10_sks", "read by A1111"))
    assert "%|" not in done.stdout + done.stderr  # no bar of another library
    assert {p.name for p in (tmp_path / "out" / "class").iterdir()} == {
        "class-0000.png",
        "class-0001.png",
        "class.json",
    }


def test_train_on_a_single_file_with_its_base_and_a_toml(photos, tmp_path):
    save_file(original(open_pipeline()), tmp_path / "model.safetensors")
    (tmp_path / "run.toml").write_text(
        f'model = "model.safetensors"\nbase = "{EMBEDDED}"\ndata = "photos"\nout = "out"\ninstance_prompt = "an emoji of sks"\nsteps = 50\n'
    )
    done = quick("train", "run.toml", "--steps", "2", "--rank", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = ["out.diffusers.safetensors", "out.kohya.safetensors", "metrics.json", "report.html", "README.md"]
    assert [line for line in done.stdout.splitlines() if not line.startswith("[")] == [f"out/{n}" for n in names]
    assert "step 2/2" in done.stdout and "<td>2</td>" in (tmp_path / "out" / "report.html").read_text()
    drawn = quick(
        "generate",
        "-m",
        "model.safetensors",
        "--base",
        EMBEDDED,
        "-p",
        "sks",
        "--lora",
        "out/out.diffusers.safetensors",
        "--steps",
        2,
        cwd=tmp_path,
    )
    assert drawn.returncode == 0 and Image.open(tmp_path / "out.png").size == (64, 64), drawn.stderr


@pytest.mark.parametrize("name", ["train", "slider", "sft"])
def test_every_option_stands_under_a_heading(name):
    command = cli.get_command(click.Context(cli), name)
    options = {p.name for p in command.params if isinstance(p, click.Option) and not p.hidden}
    options -= {"debug"}  # every command has it, last
    assert len(options) > 30 and options <= HEADINGS.keys()
