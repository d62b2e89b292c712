"""The model card of a run: what the Hub reads of it, that it says nothing of the machine, and that another's is kept."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from diffpeft.train import dreambooth
from diffpeft.train.card import write_card
from diffpeft.train.data import survey
from diffpeft.train.data.buckets import Sizing
from diffpeft.train.gallery import Gallery, Spot
from diffpeft.train.sample_prompts import SamplePrompt
from tests.families.pipelines import FIRST_FRAMES, KINDS
from tests.families.pipelines import made as pipe_of
from tests.train.pictures import photos_in
from tests.train.test_saving import run_of

PRIVATE = "very-private"


def made(tmp_path, kind="sd15", **options):
    """A run in a folder that nobody need know of."""
    home = tmp_path / PRIVATE
    home.mkdir(exist_ok=True)
    run = run_of(
        pipe_of(KINDS | FIRST_FRAMES, kind, torch.float32), home / "out", **{"model": str(home / "base"), **options}
    )
    photos = home / "photos" if (home / "photos").exists() else photos_in(home)
    return replace(run, account=survey(str(photos), "a photo of sks dog", Sizing((64,), multiple=8)))


def card_of(run):
    dreambooth.save(run)
    return ModelCard.load(run.files[-1])


@pytest.mark.parametrize("method", ["lora", "lokr"])
@pytest.mark.parametrize("kind", ["sd15", "flux dev"])
def test_the_head_says_what_the_hub_wants_to_know(kind, method, tmp_path):
    run = made(tmp_path, kind, method=method, instance_prompt="a photo of [trigger]", trigger="sks dog", license="mit")
    card = card_of(run)
    head = card.data.to_dict()
    assert head["library_name"] == "diffusers" and head["pipeline_tag"] == "text-to-image" and head["license"] == "mit"
    assert head["instance_prompt"] == "a photo of sks dog" and "base_model" not in head
    assert {"text-to-image", "diffusers", "diffpeft", method} <= {*head["tags"]}
    assert ("lora" in head["tags"]) == (method == "lora") and ("flux" in head["tags"]) == (kind == "flux dev")
    assert PRIVATE not in str(card) and "/tmp" not in str(card) and "None" not in str(card)
    assert all(f"`{path.name}`" in card.text for path in run.files[:-1])
    assert ("load_lora_weights" in card.text) == (method == "lora")  # diffusers reads no LoKr
    assert "diffpeft.load_lora" in card.text and "ComfyUI" in card.text and "3 images" in card.text
    for block in re.findall(r"```python\n(.*?)```", card.text, re.S):
        compile(block, "card", "exec")


TASKS = {  # {kind: the task of its pipeline, what its pictures are handed over as, what is drawn}
    "flux control": ("image-to-image", "control_image=load_image(", ".images[0]"),
    "wan": ("text-to-video", "pipe('a photo')", "export_to_video("),
    "wan i2v, in its place": ("image-to-video", "image=load_image(", "export_to_video("),
}


@pytest.mark.parametrize(
    "kind", [kind if kind == "wan" else pytest.param(kind, marks=pytest.mark.slow) for kind in TASKS]
)
def test_the_card_says_how_the_models_own_pipeline_is_used(kind, tmp_path):
    task, handed, drawn = TASKS[kind]
    card = card_of(made(tmp_path, kind))
    assert card.data.to_dict()["pipeline_tag"] == task and task in card.data.tags
    codes = re.findall(r"```python\n(.*?)```", card.text, re.S)
    assert len(codes) == 2 and all(handed in code and drawn in code for code in codes)
    for code in codes:
        compile(code, "card", "exec")
        imported = (
            re.search("from diffusers.utils import (.*)", code)[1].split(", ") if "diffusers.utils" in code else []
        )
        assert {*imported} == {name for name in ("export_to_video", "load_image") if f"{name}(" in code}


@pytest.mark.parametrize("experts", ["both", pytest.param("high", marks=pytest.mark.slow), "low"])
def test_each_of_two_denoisers_is_handed_its_own_file(experts, tmp_path):
    run = made(tmp_path, "wan, two experts", experts=experts)
    card, halves = card_of(run), {"both": ("high", "low")}.get(experts, (experts,))
    named = "a" if experts == "high" else "a.{half}"  # it is the first, and needs no other name
    loads = [f"weight_name='{named.format(half=half)}.diffusers.safetensors'" for half in halves]
    for half, load in zip(halves, loads, strict=True):
        assert f"{load}{', load_into_transformer_2=True' if half == 'low' else ''})" in card.text
    assert card.text.count("load_lora_weights") == len(halves)
    kohya = [path.name for path in run.files if ".kohya." in path.name]
    assert kohya == [f"{named.format(half=half)}.kohya.safetensors" for half in halves]
    assert "of little noise" in card.text or experts == "high"


def test_a_base_of_the_hub_is_linked(tmp_path):
    card = card_of(made(tmp_path, model="stabilityai/sd-turbo"))
    assert card.data.base_model == "stabilityai/sd-turbo" and card.data.to_dict()["base_model_relation"] == "adapter"
    assert "'stabilityai/sd-turbo'" in card.text


def test_words_with_quotes_and_marks_break_nothing(tmp_path):
    words = """sks "dog": 'x' | `y` #1 \\ [z]"""
    card = card_of(made(tmp_path, instance_prompt=words, description="---\nbase_model: evil\n---"))
    assert card.data.to_dict()["instance_prompt"] == words and "base_model" not in card.data.to_dict()
    for block in re.findall(r"```python\n(.*?)```", card.text, re.S):
        compile(block, "card", "exec")


def test_the_newest_pictures_are_shown_with_what_they_were_drawn_for(tmp_path):
    """As they are written: pictures, and clips of several frames."""
    run = made(tmp_path, instance_prompt="a photo of sks dog")
    for step, still, moving in ((0, "old", "old"), (3, "new", "moves")):
        prompts = (
            SamplePrompt(still, seed=1, width=8, height=8),
            SamplePrompt(moving, seed=7, width=8, height=8, frames=2),
        )
        gallery = Gallery(tmp_path / PRIVATE / "out", tuple(replace(p, where="x") for p in prompts), "m")
        for number, strength in ((0, 1.0), (0, 0.0), (0, 0.5), (1, 1.0)):
            gallery.write(
                step, Spot(number, strength), [Image.new("RGB", (8, 8), (9 * n, 0, 0)) for n in range(1 + number)]
            )
    unsaid = tmp_path / PRIVATE / "out/samples/step00000003/p2_s7.png"
    Image.new("RGB", (8, 8)).save(unsaid)
    assert card_of(run).data.to_dict()["widget"] == [
        {"text": "new", "output": {"url": "samples/step00000003/p0_s1.png"}},
        {"text": "moves", "output": {"url": "samples/step00000003/p1_s7.webp"}},
        {"text": "a photo of sks dog", "output": {"url": "samples/step00000003/p2_s7.png"}},
    ]


def test_our_card_is_replaced_and_anothers_is_kept_and_completed(tmp_path):
    run = made(tmp_path, license="mit")
    first = card_of(run)
    run.config.description = "A dog that I know."
    second = card_of(run)
    assert "A dog that I know." in second.text and len(second.text) < len(first.text) + 40

    path = run.files[-1]
    path.write_text("---\ntags: [mine]\nlanguage: en\n---\n\n# My own words\n")
    for _ in range(2):
        card = card_of(run)
    assert "# My own words" in card.text and "## Files" not in card.text and card.text.count("- diffpeft ") == 1
    assert {"mine", "text-to-image"} <= {*card.data.tags} and card.data.to_dict()["language"] == "en"

    path.write_bytes(b"---\n{: no yaml\n---\n\xff")
    with pytest.warns(UserWarning, match="stays as it is"):
        write_card(run, path.parent, {"a.safetensors": ["diffusers"]})
    assert path.read_bytes().startswith(b"---\n{: no yaml")
