"""The examples and the README's commands run, or at least say what the code understands."""

import importlib.util
import re
import shlex
from pathlib import Path

import click
import pytest
import torch
from PIL import Image

import diffpeft
from diffpeft.cli import cli
from diffpeft.llm.sft_config import SftConfig
from diffpeft.pipeline.open import open_pipeline
from diffpeft.train.config import TrainConfig
from diffpeft.train.config_files import from_toml
from diffpeft.train.slider_config import SliderConfig
from tests.llm.models import model

ROOT = Path(__file__).parent.parent


def module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.toml")), ids=lambda p: p.name)
def test_a_config_is_one_that_its_command_takes_which_stands_first(path):
    _, program, name, file = path.read_text().splitlines()[0].split()
    assert (program, file) == ("diffpeft", f"examples/{path.name}")
    options = from_toml(path, {}, {"train": TrainConfig, "sft": SftConfig, "slider": SliderConfig}[name])
    options.validate()
    for data in (options.data, getattr(options, "heldout", None)):
        assert data is None or not data.endswith(".jsonl") or (ROOT / data).is_file()


def test_the_mix_of_two_adapters_is_base_where_both_are_off(tmp_path):
    pipe = open_pipeline()
    for name in ("a", "b"):
        diffpeft.attach(pipe.unet, diffpeft.LoraConfig(r=2, init_lora_weights=False), name, targets="attn")
        diffpeft.save_lora(pipe, tmp_path / f"{name}.safetensors", name=name)
        diffpeft.unload(pipe)
    module(ROOT / "examples" / "mix_adapters.py").main(
        [*(str(tmp_path / f"{n}.safetensors") for n in "ab"), "a cat", "--steps", "2", "-o", str(tmp_path / "m.png")]
    )
    picture = Image.open(tmp_path / "m.png")
    cells = {picture.crop((64 * c, 64 * r, 64 * c + 64, 64 * r + 64)).tobytes() for r in range(3) for c in range(3)}
    assert picture.size == (192, 192) and len(cells) == 9


def commands():
    blocks = re.findall(r"```\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    return [line for block in blocks for line in block.splitlines() if line.startswith("diffpeft ")]


@pytest.mark.parametrize("line", commands())
def test_the_readmes_commands_parse(line):
    name, *args = shlex.split(line)[1:]
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    command.make_context(name, args)


def test_the_readme_has_the_two_commands_alone_on_a_line_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    assert "\nmake demo\n" in text and "\nmake test\n" in text
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / link).exists(), link


def snippets():
    for page in ("README.md", "docs/methods.md", "docs/adapters.md", "docs/diffusers.md"):
        for i, block in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)):
            yield pytest.param(block, id=f"{page}-{i}")


@pytest.mark.parametrize("block", snippets())
def test_the_pages_python_runs(block, fresh, tmp_path, monkeypatch):
    """Each block on a pipeline of its own, on which the adapters that it speaks of are loaded unless it loads them itself."""
    monkeypatch.chdir(tmp_path)
    pipe = fresh(torch.float32)
    for name in ("style", "person"):
        config = diffpeft.LoraConfig(r=2, init_lora_weights=False)
        diffpeft.attach(pipe, config, name, targets=["attn1.to_q", "up_blocks.0.attentions.0.proj_in", "fc1"])
        diffpeft.save_lora(pipe, f"{name}.safetensors", name=name)
        if "load_lora" in block:
            diffpeft.unload(pipe)
    quick = block.replace('pipe("a castle")', 'pipe("a castle", num_inference_steps=1)')
    names = {"pipe": pipe, "unet": pipe.unet, "diffpeft": diffpeft, "torch": torch}
    exec(quick, names | ({"base_model": model()} if "base_model" in block else {}))
