"""Tags in the prompt of `diffpeft generate` do what `--lora` does."""

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import diffpeft
from diffpeft.cli import cli
from diffpeft.errors import ConfigError
from diffpeft.pipeline.open import open_pipeline
from tests.cli import process
from tests.families.pipelines import pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with an adapter of the embedded base's UNet and text encoder."""
    folder = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    pipe = open_pipeline()
    diffpeft.attach(pipe, diffpeft.LoraConfig(r=2), targets="attn")
    for component in (pipe.unet, pipe.text_encoder):
        for name, p in component.named_parameters():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(p, std=0.05)
    diffpeft.save_lora(pipe, folder / "style.v1.safetensors", format="kohya")
    return folder


@pytest.fixture
def draw(folder, tmp_path):
    """Runs `diffpeft generate` in this process; its picture."""

    def run(prompt, *args):
        out = tmp_path / "out.png"
        args = ("generate", "-p", prompt, "--steps", "2", "--guidance", "3", "-o", out, "--overwrite", *args)
        done = CliRunner().invoke(cli, [*map(str, args)])
        if done.exception is not None:
            raise done.exception
        return np.asarray(Image.open(out))

    return run


def test_a_tag_is_the_same_as_the_option(folder, draw, monkeypatch):
    file = folder / "style.v1.safetensors"
    want = draw("an emoji of lemon", "--lora", f"{file}:0.8")
    assert not np.array_equal(want, draw("an emoji of lemon"))
    here = ("--lora-dir", folder)
    assert np.array_equal(draw("an emoji of <lora:style.v1:0.8> lemon", *here), want)
    assert np.array_equal(draw("an emoji of lemon<lyco:style.v1:0.8:0.8>", *here), want)
    assert np.array_equal(draw("an emoji of lemon <lora:style.v1:0.8>", "--lora", f"{file}:0.1"), want)
    monkeypatch.chdir(folder)
    assert np.array_equal(draw("an emoji of lemon <lora:style.v1:0.8>"), want)


def test_two_numbers_and_block_weights(folder, draw):
    here = ("--lora-dir", folder)
    plain = draw("an emoji of lemon")
    assert np.array_equal(draw("an emoji of lemon <lora:style.v1:0:0>", *here), plain)
    assert np.array_equal(draw("an emoji of lemon <lora:style.v1:1:1:lbw=NONE>", *here), plain)
    text, unet = (draw(f"an emoji of lemon <lora:style.v1:{w}>", *here) for w in ("1:0", "0:1"))
    assert not np.array_equal(text, plain) and not np.array_equal(unet, plain) and not np.array_equal(text, unet)
    base = ",".join(["1"] + ["0"] * 16)
    assert np.array_equal(draw(f"an emoji of lemon <lora:style.v1:1:1:lbw={base}>", *here), text)
    rest = ",".join(["0"] + ["1"] * 25)
    assert np.array_equal(draw(f"an emoji of lemon <lora:style.v1:1:1:lbw={rest}>", *here), unet)
    pipe = open_pipeline()
    pipe.set_progress_bar_config(disable=True)
    diffpeft.load_lora(pipe, folder / "style.v1.safetensors", name="s")
    diffpeft.set_adapters(pipe, {"s": {"text_encoder": 0.5, "unet": 0.0, "unet.mid_block": 2.0}})
    one = torch.Generator("cpu").manual_seed(0)
    want = pipe("an emoji of lemon", num_inference_steps=2, guidance_scale=3.0, generator=one).images[0]
    middle = ",".join(["0.5", *"000000", "2", *"000000000"])
    got = draw(f"an emoji of lemon <lora:style.v1:lbw={middle}>", *here)
    assert np.array_equal(got, np.asarray(want))


MISTAKES = {
    "an unknown name": ("x <lora:style.v2:1>", 2, "style.v1"),
    "a number that is none": ("x <lora:style.v1:much>", 2, "much"),
    "an unknown preset": ("x <lora:style.v1:lbw=OUTAL>", 2, "OUTALL"),
    "another number of weights": ("x <lora:style.v1:lbw=1,1,1>", 2, "17 or 26"),
    "a tag twice": ("x <lora:style.v1:1> <lora:style.v1:2>", 2, "two tags"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_tag_has_its_exit_code(mistake, folder, tmp_path, draw):
    prompt, code, says = MISTAKES[mistake]
    with pytest.raises(diffpeft.DiffpeftError) as caught:
        draw(prompt, "--lora-dir", folder)
    error = caught.value
    assert error.exit_code == code and says in str(error)
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_in_a_tag_is_one_short_message(folder, tmp_path):
    prompt, code, says = MISTAKES["an unknown name"]
    args = ("generate", "-p", prompt, "--lora-dir", folder)
    done = process.diffpeft(*args, cwd=tmp_path)
    assert done.returncode == code and says in done.stderr and len(done.stderr.splitlines()) <= 6, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ltx", "hunyuan_video15", "ltx2"])
def test_of_a_model_of_clips_a_picture_is_one_frame(kind, tmp_path, draw):
    """Guided by a keyword of the pipeline, or by its guider."""
    pipeline(kind, torch.float32).save_pretrained(tmp_path / "model")
    size = ("-m", tmp_path / "model", "--width", 64, "--height", 32)
    picture = draw("a red cat", *size)
    assert picture.shape == (32, 64, 3)
    assert not np.array_equal(picture, draw("a red cat", *size, "--guidance", 5))


@pytest.mark.slow
def test_what_a_model_of_edits_is_shown(tmp_path, draw):
    pipeline("flux control", torch.float32).save_pretrained(tmp_path / "model")
    for name, colour in (("red", (250, 0, 0)), ("blue", (0, 0, 250))):
        Image.new("RGB", (64, 32), colour).save(tmp_path / f"{name}.png")
    size = ("-m", tmp_path / "model", "--width", 64, "--height", 32)
    red, blue = (draw("a cat", *size, "--image", tmp_path / f"{name}.png") for name in ("red", "blue"))
    assert red.shape == (32, 64, 3) and not np.array_equal(red, blue)
    with pytest.raises(ConfigError, match="takes no picture"):
        draw("a cat", "--image", tmp_path / "red.png")
