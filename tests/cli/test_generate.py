"""Tags in the prompt of `diffpeft generate` do what `--lora` does."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import diffpeft
from diffpeft.cli import cli
from diffpeft.cli.errors import run
from diffpeft.drawing import infotext
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


def invoked(*args):
    """Runs `diffpeft generate` in this process; the files that it names."""
    done = CliRunner().invoke(cli, ["generate", "--steps", "2", *map(str, args)])
    if done.exception is not None:
        raise done.exception
    return done.stdout.split()


@pytest.mark.slow
def test_several_prompts_and_seeds_are_the_pictures_of_the_stock_pipeline(tmp_path):
    prompts = ["an emoji of lemon", "an emoji of a dog"]
    files = invoked("-p", prompts[0], "-p", prompts[1], "--seed", "3,5", "-o", tmp_path / "{n}-{seed}.png")
    assert [file.removeprefix(f"{tmp_path}/") for file in files] == ["1-3.png", "2-5.png", "3-3.png", "4-5.png"]
    pipe = open_pipeline()
    pipe.set_progress_bar_config(disable=True)
    one = torch.Generator("cpu").manual_seed(5)
    want = pipe(prompts[1], num_inference_steps=2, guidance_scale=4.0, generator=one).images[0]
    assert np.abs(np.asarray(Image.open(files[3])).astype(int) - np.asarray(want)).max() <= 1
    assert invoked("-p", "x", "--num", "2", "--seed", "8", "-o", tmp_path / "more") == [
        str(tmp_path / "more" / name) for name in ("0001-8.png", "0002-9.png")
    ]


@pytest.mark.slow
def test_prompts_from_a_file_have_the_flags_of_kohya(tmp_path):
    (tmp_path / "prompts.txt").write_text(
        "# a comment\nan emoji of lemon --n blurry --w 64 --h 96 --d 7 --l 5 --s 3\nan emoji of a dog\n"
    )
    a, b = invoked("--prompts", tmp_path / "prompts.txt", "--seed", "4", "-o", tmp_path / "x.png")
    pipe = open_pipeline()
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 3, "guidance_scale": 5.0, "width": 64, "height": 96, "negative_prompt": "blurry"}
    want = pipe("an emoji of lemon", generator=torch.Generator("cpu").manual_seed(7), **settings).images[0]
    assert (np.asarray(Image.open(a)) == np.asarray(want)).all()
    text = infotext.read(a)
    assert text.startswith(
        "an emoji of lemon\nNegative prompt: blurry\nSteps: 3, Sampler: DDIM, CFG scale: 5, Seed: 7, Size: 64x96"
    )
    assert "Steps: 2, Sampler: DDIM, CFG scale: 4, Seed: 4" in infotext.read(b)


@pytest.mark.slow
def test_a_grid_has_the_pictures_that_are_drawn_alone(folder, tmp_path):
    grid = ("--grid", "strength=0:1:0.5", "x", "lora=style.v1,none")
    common = ("-p", "an emoji of lemon", "--seed", "3", "--lora-dir", folder)
    *singles, sheet = invoked(*common, *grid, "-o", tmp_path / "grid.webp", "--singles", tmp_path / "singles")
    assert len(singles) == 6 and sheet == str(tmp_path / "grid.webp")
    (alone,) = invoked(*common[:-2], "--lora", f"{folder / 'style.v1.safetensors'}:0.5", "-o", tmp_path / "alone.png")
    pictures = [np.asarray(Image.open(file)).astype(int) for file in [*singles, alone]]
    assert np.abs(pictures[1] - pictures[-1]).max() <= 1 and np.abs(pictures[0] - pictures[3]).max() <= 1
    assert np.abs(pictures[1] - pictures[2]).max() > 8
    width, height = Image.open(sheet).size
    assert width > 3 * 64 and height > 2 * 64
    assert infotext.read(singles[1]).startswith("an emoji of lemon <lora:style.v1:0.5>\n")
    assert infotext.lora_hash(folder / "style.v1.safetensors") in infotext.read(singles[1])
    assert "Grid:" in infotext.read(sheet)


@pytest.mark.slow
def test_a_tag_may_begin_late_and_end_early(folder, draw):
    here = ("--lora-dir", folder, "--steps", "4")
    plain, strong = (draw(f"an emoji of lemon <lora:style.v1:0:{w}>", *here) for w in (0, 1))
    late = draw("an emoji of lemon <lora:style.v1:0:1:start=0.5>", *here)
    assert np.array_equal(draw("an emoji of lemon <lora:style.v1:0:1:start=3>", *here), late)
    assert np.array_equal(draw("an emoji of lemon <lora:style.v1:0:1:step=0.0-1.0>", *here), strong)
    assert np.array_equal(draw("an emoji of lemon <lora:style.v1:0:1:stop=1>", *here), plain)
    assert not np.array_equal(late, plain) and not np.array_equal(late, strong)


@pytest.mark.slow
def test_a_picture_is_drawn_over(tmp_path, draw):
    Image.new("RGB", (64, 64), (250, 220, 20)).save(tmp_path / "yellow.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    mask.save(tmp_path / "mask.png")
    over = ("--image", tmp_path / "yellow.png", "--steps", "4")
    little, much = (draw("an emoji of lemon", *over, "--strength", s).astype(int) for s in ("0.25", "1"))
    yellow = np.asarray(Image.open(tmp_path / "yellow.png")).astype(int)
    assert np.abs(little - yellow).mean() < np.abs(much - yellow).mean()
    half = draw("an emoji of lemon", *over, "--mask", tmp_path / "mask.png").astype(int)
    assert np.abs(half - yellow)[:, 40:].mean() < np.abs(half - yellow)[:, :24].mean()


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--offload", "1"), ("--offload", "0.5", "--device", "cpu")])
def test_blocks_on_the_host_change_nothing(options, folder, draw):
    style = ("--lora", folder / "style.v1.safetensors")
    assert np.array_equal(draw("an emoji of lemon", *style, *options), draw("an emoji of lemon", *style))


WRONG_OPTIONS = {
    "no prompt": ((), "nothing says what to draw"),
    "a seed": (("-p", "x", "--seed", "1,b"), "1,2,5-8"),
    "seeds twice": (("-p", "x", "--seed", "1,2", "--num", "2"), "Pass one"),
    "a scheduler": (("-p", "x", "--scheduler", "eular"), "'euler'"),
    "an axis": (("-p", "x", "--grid", "strenght=1"), "'strength'"),
    "strengths of nothing": (("-p", "x", "--grid", "strength=0,1"), "no adapter"),
    "an adapter on an axis": (("-p", "x", "--grid", "lora=stile.v1"), "style.v1"),
    "prompts twice": (("-p", "x", "--grid", "prompt=y|z"), "prompts"),
    "singles of nothing": (("-p", "x", "--singles", "s"), "grid"),
    "a mask of nothing": (("-p", "x", "--mask", "style.v1.safetensors"), "--image"),
    "a strength": (("-p", "x", "--strength", "2"), "at most 1"),
    "a device": (("-p", "x", "--device", "tpu"), "cuda"),
    "a format": (("-p", "x", "-o", "x.bmp"), ".webp"),
    "one name": (("-p", "x", "--num", "2", "-o", "{prompt}.png"), "{n}"),
    "a field": (("-p", "x", "-o", "{sed}.png"), "seed"),
    "a model": (("-p", "x", "-m", "/nowhere/x/y"), "no such model"),
    "no picture": (("-p", "x", "--image", "style.v1.safetensors"), "cannot read an image"),
}


@pytest.mark.parametrize("kind", WRONG_OPTIONS)
def test_a_wrong_option_is_told_before_anything_heavy(kind, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("diffpeft.cli.errors._quieten", lambda: None)
    monkeypatch.setattr("diffpeft.drawing.job.opened", None)
    args, says = WRONG_OPTIONS[kind]
    before = sorted(folder.iterdir())
    assert run(cli, ["generate", *map(str, args)]) in (2, 3, 4)
    said = capsys.readouterr().err
    assert says in said and len(said.splitlines()) <= 6
    assert sorted(folder.iterdir()) == before


@pytest.mark.slow
def test_what_options_say_is_judged_without_torch(folder):
    """In a process of its own."""
    code = (
        "import sys; from diffpeft.cli.errors import run; from diffpeft.cli import cli;"
        "assert run(cli, ['generate', '-p', 'x <lora:style.v1:start=0.5>', '--grid', 'seed=1-4 x style.v1=0,1', '-m', 'no/model/x']);"
        "assert not {'torch', 'diffusers', 'transformers'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
    with pytest.raises(ConfigError, match="takes no strength"):
        draw("a cat", *size, "--image", tmp_path / "red.png", "--strength", "0.5")
