"""The pages do what they say: commands and tables run, methods have a page each, notebooks run from top to bottom."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
from pathlib import Path

import click
import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image
from torch import nn

import diffpeft
from diffpeft.cli import cli
from diffpeft.llm.sft_config import SftConfig
from diffpeft.pipeline.open import EMBEDDED, open_pipeline
from diffpeft.train import demo
from diffpeft.train.config import TrainConfig
from diffpeft.train.method import ADAPTERS
from tests.families.pipelines import pipeline
from tests.llm.models import model

ROOT = Path(diffpeft.__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
METHODS = sorted((DOCS / "methods").glob("*.md"))
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
ELSEWHERE = {"files.md", "merging.md"}  # whose commands tests/tools runs
MODELS = {  # {a model that a page names: a tiny one of its kind}
    "black-forest-labs/FLUX.1-Kontext-dev": "flux kontext",
    "Wan2.2-T2V-A14B-Diffusers": "wan, two experts",
}
FEW = {"train": 2, "slider": 2, "demo": 2, "generate": 2}  # steps, for commands that do not say how many


def path_of(page: str) -> Path:
    return ROOT / page if page == "README.md" else DOCS / page


def commands(page: Path) -> list[list[str]]:
    """Each `diffpeft ...` line of a fence that is no Python, and of the last column of a table, in its words."""
    text = page.read_text()
    fences = re.findall(r"^```(?:sh|bash)?\n(.*?)^```", text, re.S | re.M)
    lines = [line for fence in fences for line in fence.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"\| `(diffpeft [a-z]+ [^`]+)` \|$", text, re.M)
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("diffpeft ")]


def cells(page: Path) -> list[tuple[str, str]]:
    """(left, right) of each row of a page's tables of two columns, where the left one is code; without ticks."""
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", page.read_text(), re.M)
    return [(left.strip("`"), right.strip("`")) for left, right in rows if "`" in left + right]


RUN = [page.name for page in PAGES if page.name not in ELSEWHERE and commands(page)]


# -- commands ----------------------------------------------------------------------------------------------------------


def test_commands_are_ones_that_the_program_takes(tmp_path, monkeypatch):
    """Of every page, its files and folders aside."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(click.Path, "convert", lambda self, value, param, ctx: value)  # whether there is such a file
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for page in PAGES:
        for name, *args in commands(page):
            command = cli.get_command(click.Context(cli), name)
            if not name.startswith("-"):
                assert command is not None, (page.name, name)
                for word in args:
                    if re.fullmatch(r"[\w-]+\.(toml|txt|jsonl)", word):
                        Path(word).touch()
                assert command.make_context(name, args), (page.name, args)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the commands of a page find what they speak of: photos, pairs, clips, MODEL, files of two adapters, TOML files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "STEPS", 1)  # of drawing
    monkeypatch.setattr(demo, "SEEDS", demo.SEEDS[:1])
    for data in (tmp_path / "photos", tmp_path / "DATA" / "10_sks dog"):
        data.mkdir(parents=True)
        for path in sorted((EMBEDDED.parent / "demo" / "train").glob("*.png"))[:4]:
            shutil.copy(path, data)
    shutil.copytree(tmp_path / "photos", tmp_path / "pairs" / "target")
    shutil.copytree(tmp_path / "photos", tmp_path / "pairs" / "control")
    shutil.copy(next((tmp_path / "photos").glob("*.png")), "room.jpg")
    for blue, clip in enumerate(("one", "two", "three")):
        (tmp_path / "shots" / clip).mkdir(parents=True)
        for n in range(33):
            Image.new("RGB", (64, 64), (7 * n, 90, 40 * blue)).save(tmp_path / "shots" / clip / f"{n:03}.png")
    (tmp_path / "MODEL").symlink_to(EMBEDDED)
    for part in ("examples", "diffpeft"):
        (tmp_path / part).symlink_to(ROOT / part)
    (tmp_path / "loras").mkdir()
    pipe = open_pipeline()
    for name in ("style", "person", "FILE"):
        config = diffpeft.LoraConfig(r=2, init_lora_weights=False)
        diffpeft.attach(pipe.unet, config, name, targets=["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"])
        diffpeft.save_lora(pipe, f"{name}.safetensors", name=name)
        diffpeft.unload(pipe)
    Path("FILE.safetensors").rename("FILE")
    Path("run.toml").write_text(
        'pretrained_model_name_or_path = "MODEL"\ntrain_data_dir = "DATA"\noutput_dir = "OUT3"\nnetwork_dim = 4\nmax_train_steps = 2\n'
        'resolution = "64,64"\n'
    )
    return tmp_path


def quicker(name: str, args: list[str]) -> list[str]:
    """A command's words with few steps where the page does not say how many, small pictures, and names of files that are there."""
    args = [re.sub(r"^FILE(?=$|:)", "FILE.safetensors", word) for word in args]
    for large in {*args} & MODELS.keys():
        pipeline(MODELS[large], torch.float32).save_pretrained(large)
        args = [re.sub(r"--f \d+ --w \d+ --h \d+", "--f 5 --w 64 --h 64", word) for word in args]
        args = ["5,9" if word == "17,33" else word for word in args]  # frames
        args += ["--resolution", "64", "--instance-prompt", "x", "--rank", "4"]
    if args == ["run.toml"]:
        return args
    if name == "demo" and "--steps" in args:
        args[args.index("--steps") + 1] = "2"
    if name in FEW and not any(word.startswith(("--steps", "--max_train_steps")) for word in args):
        args += ["--steps", str(FEW[name])]
    if name in ("train", "slider"):
        said = any(word.startswith("--sample") or word.endswith("heart.toml") for word in args)
        args += ["--sample-steps", "1"] if said else ["--sample-every", "0"]
        args += ["--overwrite"] if Path("out").exists() else []
    return args


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN)
def test_commands_run(page, folder):
    """One after the other, in a folder."""
    for name, *args in commands(path_of(page)):
        if Path("FILE").exists():
            Path("FILE").rename("FILE.safetensors")
        if "demo-out" in args and name == "generate":
            Path("demo-out").mkdir()
            shutil.copy("style.safetensors", "demo-out/openmoji.kohya.safetensors")
        result = CliRunner().invoke(cli, [name, *quicker(name, args)], catch_exceptions=False)
        assert result.exit_code == 0, (name, args, result.output)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["start.md", "gallery.md"])
def test_python_on_the_first_pages_runs(page, folder):
    """With adapters where the pages' commands put theirs, and one step of drawing."""
    pipe = open_pipeline()
    diffpeft.attach(
        pipe.unet, diffpeft.LoraConfig(r=2, init_lora_weights=False), targets=["attn1.to_q"]
    )  # in all blocks
    for path in ("first/openmoji", "demo-out/openmoji", "heart/heart"):
        Path(path).parent.mkdir(exist_ok=True)
        diffpeft.save_lora(pipe, f"{path}.diffusers.safetensors")
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", path_of(page).read_text(), re.S):
        exec(re.sub(r"(STEPS = |num_inference_steps=)\d+", r"\g<1>1", block), names)
    assert [*folder.glob("*.png")]


# -- methods -----------------------------------------------------------------------------------------------------------


def test_each_method_has_a_page_with_its_equation_and_when_to_take_it():
    assert {page.stem for page in METHODS} == {*diffpeft.METHODS}
    for page in METHODS:
        text = page.read_text()
        assert "\n```math\n" in text and "\n**When to take it.** " in text, page.name
        assert f"(methods/{page.name})" in (DOCS / "methods.md").read_text()


def test_methods_on_the_pages_can_be_asked_for_where_the_pages_say():
    for page in METHODS:
        for command, name in re.findall(r"`diffpeft (train|sft) --method (\w+)", page.read_text()):
            config = {"train": TrainConfig, "sft": SftConfig}[command]
            assert name == page.stem and (name in ADAPTERS or config is SftConfig), page.name


def test_sizes_on_the_pages_are_those_of_a_fresh_adapter():
    sizes = 0
    for page in METHODS:
        for size, rank in re.findall(r"([\d,]+) on 768 to 768 at rank (\d+)", page.read_text()):
            layer = nn.Sequential(nn.Linear(768, 768, bias=False))
            config = diffpeft.METHODS[page.stem].config(r=int(rank))
            diffpeft.attach(layer, config, "a", targets=["0"])
            layer[0].weight.requires_grad_(False)
            assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == int(size.replace(",", "")), (
                page.name
            )
            sizes += 1
    assert sizes == 3


# -- from PEFT ---------------------------------------------------------------------------------------------------------


def numbers(target: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return target(ids).logits


def test_pefts_lines_do_here_what_they_do_there(tmp_path, monkeypatch):
    """Row after row in both: PEFT's by peft, ours by diffpeft, from the same seed; after each the model computes the same."""
    theirs, ours = {"base": model(), "here": tmp_path / "theirs"}, {"base": model(), "here": tmp_path / "ours"}
    ids = torch.tensor([[3, 4, 5, 6]])
    rows = [row for row in cells(DOCS / "from-peft.md") if re.match(r"from peft|model", row[0])]
    assert len(rows) >= 12
    for left, right in rows:
        for names, code in ((theirs, left), (ours, left.replace("from peft", "from diffpeft"))):
            names["here"].mkdir(exist_ok=True)
            monkeypatch.chdir(names["here"])
            torch.manual_seed(1)
            exec(code, names)
        assert right.startswith(("the same", "from diffpeft"))
        if "model" in ours:
            torch.testing.assert_close(numbers(ours["model"], ids), numbers(theirs["model"], ids), rtol=1e-5, atol=1e-6)


def test_what_peft_has_no_line_for_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"diffpeft": diffpeft, "model": nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))}
    for name in ("style", "person"):
        diffpeft.attach(names["model"], diffpeft.LoraConfig(r=2, init_lora_weights=False), name, targets=["0", "1"])
    rows = [right for _, right in cells(DOCS / "from-peft.md") if "diffpeft." in right]
    assert len(rows) == 7
    for code in rows:
        exec(code, names)
    assert not diffpeft.get_adapters(names["model"])


# -- kohya -------------------------------------------------------------------------------------------------------------


def test_kohyas_options_stand_behind_our_command_as_they_are():
    (pair,) = [row for row in cells(DOCS / "from-kohya.md") if row[0].startswith("accelerate launch")]
    assert pair[0].partition("train_network.py ")[2] == pair[1].partition("diffpeft train ")[2]


# -- notebooks ---------------------------------------------------------------------------------------------------------


def code_of(path: Path) -> list[str]:
    notebook = json.loads(path.read_text())
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_has_no_outputs_and_is_plain_python(path):
    notebook = json.loads(path.read_text())
    assert notebook["nbformat"] == 4 and len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    for cell in notebook["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"] == [] and cell["execution_count"] is None)
    for code in code_of(path):
        ast.parse(code)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    """With few steps, which two of its names say."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    few = 0
    for code in code_of(path):
        exec(code, names)
        for name, most in (("STEPS", 2), ("TRAINING_STEPS", 4)):
            if re.search(rf"\b{name}\b.*=", code) and name in names:
                names[name], few = most, few + 1
    assert few >= 1


# -- the site ----------------------------------------------------------------------------------------------------------


def test_the_navigation_is_the_index_and_nothing_is_fetched():
    """docs/hooks.py makes one of the other; `make docs` refuses a page that is not in it."""
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert "nav" not in config and config["hooks"] == ["docs/hooks.py"]
    assert config["validation"]["nav"]["omitted_files"] == "warn" and config["theme"]["font"] is False
    headings = re.findall(r"^## (.+)$", (DOCS / "README.md").read_text(), re.M)
    assert len(headings) >= 3
