"""examples/train_tiny_base.py: a few steps, on two made-up emoji packages, give a pipeline shaped like the one that is shipped."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "diffpeft/assets/tiny-emoji/model"
WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
ENTRIES = [  # rows of the real emoji.json, without the fields that are not read
    {"name": "HASH KEY", "image": "0023-fe0f-20e3.png", "short_names": ["hash"], "category": "Symbols"},
    {"name": "GRINNING FACE", "image": "1f600.png", "short_names": ["grinning"], "category": "Smileys & Emotion"},
    {"name": "RED APPLE", "image": "1f34e.png", "short_names": ["apple"], "category": "Food & Drink"},
    {
        "name": "WAVING HAND SIGN",
        "image": "1f44b.png",
        "short_names": ["wave"],
        "category": "People & Body",
        "skin_variations": {"1F3FB": {"unified": "1F44B-1F3FB", "image": "1f44b-1f3fb.png"}},
    },
    {"name": "MAN’S SHOE", "image": "1f45e.png", "short_names": ["mans_shoe", "run-shoe"], "category": "Objects"},
    {"name": "GOOGLE ONLY", "image": "e50a.png", "short_names": ["google_only"], "category": "Objects"},
]
ONLY_GOOGLE = "e50a.png"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script as a module, with small batches and short drawings."""
    spec = importlib.util.spec_from_file_location("train_tiny_base", ROOT / "examples/train_tiny_base.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.BATCH, module.DRAWING_STEPS = 2, 1
    return module


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both packages as npm lays them out: emoji.json beside img/STYLE/64/IMAGE."""
    root, random = tmp_path_factory.mktemp("npm"), np.random.default_rng(0)
    images = [row["image"] for entry in ENTRIES for row in (entry, *entry.get("skin_variations", {}).values())]
    for style in ("google", "twitter"):
        folder = root / style / "img" / style / "64"
        folder.mkdir(parents=True)
        (root / style / "emoji.json").write_text(json.dumps(ENTRIES), encoding="utf-8")
        for image in images:
            if style == "google" or image != ONLY_GOOGLE:
                Image.fromarray(random.integers(0, 256, (64, 64, 4), dtype=np.uint8)).save(folder / image)
    return {style: root / style for style in ("google", "twitter")}


@pytest.fixture(scope="module")
def trained(script: ModuleType, packages: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "model"
    options = [
        "--google",
        packages["google"],
        "--twitter",
        packages["twitter"],
        "-o",
        out,
        "--vae-steps",
        2,
        "--unet-steps",
        3,
        "--limit",
        5,
    ]
    result = CliRunner().invoke(script.main, list(map(str, options)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "5 pictures of each style" in result.output
    assert "vae: 2 steps" in result.output and "unet: 3 steps" in result.output
    return out


@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json",
    ],
)
def test_the_folder_has_the_configs_of_the_shipped_model(trained: Path, file: str) -> None:
    made, shipped = (json.loads((folder / file).read_text(encoding="utf-8")) for folder in (trained, SHIPPED))
    versions = {"_diffusers_version", "transformers_version"}
    measured = {"scaling_factor"} if file == "vae/config.json" else set()
    assert made.keys() == shipped.keys()
    assert all(made[key] == shipped[key] for key in made.keys() - versions - measured)


@pytest.mark.parametrize("component", WEIGHTS)
def test_the_folder_has_the_tensors_and_dtypes_of_the_shipped_model(trained: Path, component: str) -> None:
    file = f"{component}/{WEIGHTS[component]}.safetensors"
    made, shipped = (
        {key: (t.shape, t.dtype) for key, t in load_file(folder / file).items()} for folder in (trained, SHIPPED)
    )
    assert made == shipped
    assert {dtype for _, dtype in made.values()} == {torch.float32 if component == "text_encoder" else torch.float16}


def test_the_folder_loads_and_draws(trained: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(trained)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("an emoji of rocket", num_inference_steps=1).images[0].size == (64, 64)
    assert Image.open(trained / "sample.png").size == (1024, 256)


def test_only_emoji_that_both_packages_draw_are_used(script: ModuleType, packages: dict[str, Path]) -> None:
    emoji, noto, twemoji = script.prepare(**packages, limit=None)
    toned = script.Emoji(
        "1f44b-1f3fb.png",
        "waving hand sign, light skin tone",
        ("wave, light skin tone",),
        "People & Body",
        "light skin tone",
    )
    assert [e.name for e in emoji] == [
        "hash key",
        "grinning face",
        "red apple",
        "waving hand sign",
        toned.name,
        "man's shoe",
    ]
    assert emoji[4] == toned
    assert emoji[5].aliases == ("mans shoe", "run shoe")
    assert [e.weight for e in emoji] == [0.35, 1.0, 1.0, 0.6, 0.03, 1.0]
    assert noto.shape == twemoji.shape == (6, 3, 64, 64) and noto.dtype == torch.uint8


def test_a_picture_stands_on_white(script: ModuleType, tmp_path: Path) -> None:
    drawing = np.zeros((64, 64, 4), dtype=np.uint8)
    drawing[:, :32, 3] = 255  # black on the left, nothing on the right
    Image.fromarray(drawing).save(tmp_path / "half.png")
    left, right = script.picture(tmp_path / "half.png").chunk(2, dim=2)
    assert (left == 0).all() and (right == 255).all()


def test_a_folder_that_is_no_package_is_refused(script: ModuleType, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        script.main, ["--google", str(tmp_path), "--twitter", str(tmp_path), "-o", str(tmp_path / "out")]
    )
    assert result.exit_code == 1
    assert "names no picture" in result.output
    assert not (tmp_path / "out").exists()
