"""`diffpeft fuse` as a user meets it."""

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

import diffpeft
from diffpeft.cli import cli
from diffpeft.pipeline.open import EMBEDDED, open_pipeline
from tests.cli.process import diffpeft as run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuse")
    torch.manual_seed(0)
    pipe = open_pipeline()
    for name, targets in (("a", ["attn1.to_q", "q_proj"]), ("b", ["attn1.to_q", "conv_in"])):
        diffpeft.attach(pipe, diffpeft.LoraConfig(r=2), name=name, targets=targets)
        for component in (pipe.unet, pipe.text_encoder):
            for key, p in component.named_parameters():
                if key.endswith("lora_B") and name in key.split("."):
                    torch.nn.init.normal_(p, std=0.05)
        diffpeft.save_lora(pipe, folder / f"{name}.safetensors", name=name, format="kohya")
    pair = {"lora_down.weight": torch.zeros(2, 5), "lora_up.weight": torch.zeros(5, 2)}
    save_file({f"lora_unet_input_blocks_4_1_proj_in.{k}": v for k, v in pair.items()}, folder / "sdxl.safetensors")
    (folder / "full").mkdir()
    (folder / "full" / "x").touch()
    return folder


@pytest.mark.slow
def test_the_folder_draws_in_stock_diffusers_what_the_adapters_draw(folder, image):
    done = run("fuse", "--lora", "a.safetensors:0.8", "--lora", "b.safetensors", "-o", "out", cwd=folder)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.splitlines()[-2:] == ["2 fused into 8 layers of unet, 4 layers of text_encoder", "out"]
    from diffusers import DiffusionPipeline

    got = DiffusionPipeline.from_pretrained(folder / "out")
    want = open_pipeline()
    want.unet.to(torch.float16)  # as it is stored
    diffpeft.load_lora(want, folder / "a.safetensors", weight=0.8)
    diffpeft.load_lora(want, folder / "b.safetensors")
    diffpeft.fuse(want)
    want.unet.to(torch.float32)
    for pipe in (got, want):
        pipe.set_progress_bar_config(disable=True)
    assert torch.equal(image(got), image(want)) and not torch.equal(image(got), image(open_pipeline()))


def test_help_has_an_example(tmp_path):
    done = run("fuse", "--help", cwd=tmp_path)
    assert done.returncode == 0 and "Example: diffpeft fuse" in done.stdout


MISTAKES = {
    "no adapter": (("-o", "new"), 2, "--lora"),
    "a full folder": (("--lora", "a.safetensors", "-o", "full"), 2, "already"),
    "the model itself": (("--lora", "a.safetensors", "-o", EMBEDDED), 2, "model itself"),
    "a missing model": (("-m", "modle", "--lora", "a.safetensors", "-o", "new"), 4, "modle"),
    "a single file": (("-m", "a.safetensors", "--lora", "a.safetensors", "-o", "new"), 4, "save_pretrained"),
    "a missing adapter": (("--lora", "c.safetensors", "-o", "new"), 4, "c.safetensors"),
    "another family": (("--lora", "a.safetensors", "--lora", "sdxl.safetensors", "-o", "new"), 4, "sdxl"),
    "another variant": (("--lora", "a.safetensors", "--variant", "fp16", "-o", "new"), 4, "fp16"),
}


def test_a_mistake_is_one_short_message(folder):
    args, code, says = MISTAKES["another family"]
    done = run("fuse", *args, cwd=folder)
    assert done.returncode == code and says in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert 1 <= len(done.stderr.strip().splitlines()) <= 6


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_has_its_exit_code_and_writes_nothing(mistake, folder, monkeypatch):
    args, code, says = MISTAKES[mistake]
    before = sorted(folder.rglob("*"))
    monkeypatch.chdir(folder)
    done = CliRunner().invoke(cli, ["fuse", *map(str, args)])
    error = done.exception
    if isinstance(error, diffpeft.DiffpeftError):
        assert error.exit_code == code and says in str(error)
    else:
        assert done.exit_code == code and says in done.output
    assert sorted(folder.rglob("*")) == before
