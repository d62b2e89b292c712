"""What `diffpeft generate` is asked for, before any model is there: numbers, samplers, grids, names of files, and what is written into pictures."""

from __future__ import annotations

import io
import json
import re

import pytest
from PIL import Image

from diffpeft.drawing import axes, infotext, outputs, samplers
from diffpeft.drawing.grids import on_grid
from diffpeft.drawing.plan import Shelf, shots_of
from diffpeft.drawing.prompts import SamplePrompt
from diffpeft.drawing.ranges import numbers, whole_numbers
from diffpeft.drawing.sheets import Sheet, drawn, pieces
from diffpeft.drawing.shots import Shot
from diffpeft.errors import ConfigError, UnknownNameError
from diffpeft.pipeline.prompt import Tag, parsed


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("7", [7]),
        ("1,2,5-8", [1, 2, 5, 6, 7, 8]),
        (" 3 , 1 ", [3, 1]),
        ("0-0", [0]),
        ("9223372036854775807", [2**63 - 1]),
    ],
)
def test_whole_numbers(text, values):
    assert whole_numbers(text, "--seed") == values


@pytest.mark.parametrize("text", ["", "a", "1.5", "-1", "5-2", "1,,2", "1-", "9223372036854775808", "0-99999999"])
def test_what_are_no_whole_numbers(text):
    with pytest.raises(ConfigError, match="--seed"):
        whole_numbers(text, "--seed")


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0:1.5:0.5", [0, 0.5, 1, 1.5]),
        ("0:1:0.1", [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
        ("1:0:-0.5", [1, 0.5, 0]),
        ("-1,0,1e1", [-1, 0, 10]),
        ("0:1:0.4", [0, 0.4, 0.8]),
        ("2,0:1:1", [2, 0, 1]),
    ],
)
def test_numbers(text, values):
    assert numbers(text, "x") == values


@pytest.mark.parametrize("text", ["", "a", "nan", "inf", "0:1", "0:1:0", "0:1:-1", "0:1:0:1", "0:1e9:0.1"])
def test_what_are_no_numbers(text):
    with pytest.raises(ConfigError):
        numbers(text, "x")


@pytest.mark.parametrize(
    ("name", "label", "spacing"),
    [
        ("euler_a", "Euler a", None),
        ("Euler a", "Euler a", None),
        ("DPM++ 2M Karras", "DPM++ 2M", "karras"),
        ("dpm++_2m_sde_exponential", "DPM++ 2M SDE", "exponential"),
        ("EulerDiscreteScheduler", "Euler", None),
        ("plms", "PLMS", None),
    ],
)
def test_a_sampler_by_what_people_call_it(name, label, spacing):
    choice = samplers.chosen(name)
    assert (choice.sampler.label, choice.spacing) == (label, spacing)


def test_every_sampler_is_a_class_of_diffusers_and_no_other_is_known():
    import diffusers

    for name, row in samplers.SAMPLERS.items():
        assert samplers.chosen(name).sampler is samplers.chosen(row.label).sampler is row
        assert all(hasattr(diffusers, cls) for cls in (row.betas, row.flow) if cls)
    with pytest.raises(UnknownNameError, match="dpm"):
        samplers.chosen("dpm_2m")


def axis_list(text, adapters=(), **standing):
    return [(axis.kind, axis.name, axis.values) for axis in axes.parsed(text, standing, adapters)]


def test_axes_of_a_grid():
    assert axis_list("strength=0:1.5:0.5 x lora=a,b:0.5") == [
        ("strength", "strength", (0.0, 0.5, 1.0, 1.5)),
        ("lora", "lora", ("a", "b:0.5")),
    ]
    assert axis_list("prompt=a cat x 3|a dog, red × seed=1-3") == [
        ("prompt", "prompt", ("a cat x 3", "a dog, red")),
        ("seed", "seed", (1, 2, 3)),
    ]
    assert axis_list("prompt x seed", prompt=["p"], seed=[4]) == [("prompt", "prompt", ("p",)), ("seed", "seed", (4,))]
    assert axis_list("style.v1=0,1 x scheduler=euler_a,DDIM x steps=5 x cfg=2", ["style.v1"]) == [
        ("weight", "style.v1", (0.0, 1.0)),
        ("scheduler", "scheduler", ("euler_a", "DDIM")),
        ("steps", "steps", (5,)),
        ("guidance", "guidance", (2.0,)),
    ]
    assert axes.parsed("strength=0:1:0.5", {}, ())[0].labels == ["strength 0", "strength 0.5", "strength 1"]


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("strengt=0,1", UnknownNameError, "strength"),
        ("strength", ConfigError, "no values"),
        ("strength=", ConfigError, "no values"),
        ("strength=low", ConfigError, "low"),
        ("lora=a,", ConfigError, "empty"),
        ("steps=0", ConfigError, "steps"),
        ("scheduler=euler,ddin", UnknownNameError, "ddim"),
        ("seed=1 x seed=2", ConfigError, "two axes"),
        ("steps=1 x", ConfigError, "steps"),
    ],
)
def test_what_is_no_grid(text, error, says):
    with pytest.raises(error, match=says):
        axis_list(text, seed=[1])


@pytest.fixture
def shelf(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.safetensors").touch()
    return Shelf([("x/c.safetensors", 0.3)], tmp_path)


def test_prompts_name_their_own_adapters(shelf, tmp_path):
    prompts = [SamplePrompt("p <lora:a:0.5>", seed=9, width=64, cfg=3.0), SamplePrompt("q <lora:c:2>", negative="n")]
    shots = shots_of(prompts, [1, 2], shelf, Shot("", guidance=7.0, width=32, steps=5))
    assert [(shot.prompt, shot.seed, shot.negative, shot.width) for shot in shots] == [
        ("p", 9, None, 64),
        ("q", 1, "n", 32),
        ("q", 2, "n", 32),
    ]
    assert shots[0].adapters == (("c", 0.3), ("a", Tag("a", 0.5, 0.5))) and shots[1].adapters == (
        ("c", Tag("c", 2.0, 2.0)),
    )
    assert (shots[0].cfg, shots[0].guidance, shots[1].guidance) == (3.0, None, 7.0)
    assert shelf.files == {"c": "x/c.safetensors", "a": str(tmp_path / "a.safetensors")}
    assert Shelf([("x/a.safetensors", 1), ("y/a.safetensors", 1)], tmp_path).files == {
        "a": "x/a.safetensors",
        "a-2": "y/a.safetensors",
    }


def cells_of(text, shelf, prompts=("p",), seeds=(1,)):
    asked = [SamplePrompt(prompt) for prompt in prompts]
    shots = shots_of(asked, seeds, shelf, Shot("", steps=5))
    grid = axes.parsed(text, {"prompt": prompts, "seed": seeds}, shelf.files)
    by_text = {prompt.prompt: shots_of([prompt], seeds, shelf, Shot("", steps=5))[0] for prompt in asked}
    return on_grid(shots, grid, by_text, shelf)


def test_strengths_lie_across_and_adapters_down(shelf):
    cells, (page,) = cells_of("strength=0:1:0.5 x lora=a,b,none", shelf)
    assert (page.columns, page.rows) == (["strength 0", "strength 0.5", "strength 1"], ["a", "b", "none"])
    got = [[dict(cells[i].adapters) for i in row] for row in page.numbers]
    assert got == [
        [{"c": 0.3, "a": s} for s in (0, 0.5, 1)],
        [{"c": 0.3, "b": s} for s in (0, 0.5, 1)],
        [{"c": 0.3}] * 3,
    ]


def test_a_strength_keeps_what_a_tag_says_of_blocks_and_steps(shelf):
    cells, _ = cells_of("strength=0.5 x c=2", shelf, ["p <lora:a:1:0.2:lbw=OUTALL:start=0.5>"])
    assert dict(cells[0].adapters) == {"c": 2.0, "a": Tag("a", 0.5, 0.5, "OUTALL", 0.5)}


def test_a_grid_for_each_picture_that_no_axis_says(shelf):
    cells, pages = cells_of("steps=1,2 x seed x guidance=3,4", shelf, ("p", "q <lora:a:0.5>"), (1, 2))
    assert [page.title for page in pages] == ["p, guidance 3", "p, guidance 4", "q, guidance 3", "q, guidance 4"]
    assert [(c.prompt, c.seed, c.steps, c.guidance) for c in cells[4:8]] == [
        ("p", 1, 1, 4.0), ("p", 1, 2, 4.0), ("p", 2, 1, 4.0), ("p", 2, 2, 4.0),
    ]  # fmt: skip
    cells, _ = cells_of("prompt x seed", shelf, ("p", "q <lora:a:0.5>"), (1, 2))
    assert [(c.prompt, c.seed, len(c.adapters)) for c in cells] == [("p", 1, 1), ("q", 1, 2), ("p", 2, 1), ("q", 2, 2)]


SHOTS = [Shot("a red/cat", seed) for seed in (3, 4)]


@pytest.mark.parametrize(
    ("out", "names"),
    [
        ("x.png", ["x-1.png", "x-2.png"]),
        ("d/{seed}.webp", ["d/3.webp", "d/4.webp"]),
        ("{prompt}_{n:03}.jpg", ["a_red_cat_001.jpg", "a_red_cat_002.jpg"]),
        ("folder", ["folder/0001-3.png", "folder/0002-4.png"]),
        ("v1.5/", ["v1.5/0001-3.png", "v1.5/0002-4.png"]),
    ],
)
def test_names_of_files(out, names):
    assert [*map(str, outputs.names_for(out, SHOTS))] == names
    assert len(outputs.names_for(out, SHOTS[:1])) == 1
    assert str(outputs.names_for("x.png", SHOTS[:1])[0]) == "x.png"


@pytest.mark.parametrize(
    ("out", "error", "says"),
    [
        ("x.gif", ConfigError, ".png"),
        ("{sed}-{n}.png", UnknownNameError, "seed"),
        ("{n.png", ConfigError, "field"),
        ("{}.png", UnknownNameError, "field"),
        ("{prompt}.png", ConfigError, "{n}"),
        ("{n:x.y}.png", ConfigError, "field"),
    ],
)
def test_what_is_no_name(out, error, says):
    with pytest.raises(error, match=says):
        outputs.names_for(out, SHOTS)


# A1111's rule (modules/infotext_utils.py): the last line are names and values, quoted where a comma, a colon or a new line is in them
_PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def read_as_a1111(text):
    *lines, last = text.strip().split("\n")
    prompt, negative = [], None
    for line in map(str.strip, lines):
        if line.startswith("Negative prompt:"):
            negative = [line[16:].strip()]
        else:
            (prompt if negative is None else negative).append(line)
    pairs = {key: json.loads(v) if v[:1] == v[-1:] == '"' else v for key, v in _PAIR.findall(last)}
    return "\n".join(prompt), "\n".join(negative or []), pairs


SAID = {"Steps": 25, "Sampler": "DPM++ 2M", "CFG scale": 7.0, "Seed": 1, "Size": "64x32", "Model": 'a, "b": c'}


@pytest.mark.parametrize("suffix", infotext.FORMATS)
@pytest.mark.parametrize("prompt", ["a cat <lora:s:0.5>", "a\nb, c: d", "Katze ü 猫", ""])
def test_what_a_picture_says_is_what_a1111_reads(suffix, prompt, tmp_path):
    settings = {**SAID, "Lora hashes": "s: 012345678901, t: 9", "Nothing": None}
    file = tmp_path / f"x{suffix}"
    with file.open("wb") as f:
        infotext.write(Image.new("RGBA", (64, 32), "red"), f, suffix, infotext.infotext(prompt, "no\ndogs", settings))
    text = infotext.read(file)
    if suffix == ".png":
        assert Image.open(file).info["parameters"] == text
    said_prompt, negative, pairs = read_as_a1111(text)
    assert (said_prompt, negative) == (prompt, "no\ndogs")
    assert pairs == {k: f"{v:g}" if isinstance(v, float) else str(v) for k, v in settings.items() if v is not None}


TAGS = [
    Tag("s"),
    Tag("s v1", 0.5, 0.25),
    Tag("s", 1, 1, "OUTALL"),
    Tag("s", -1, 0, (0.0, 0.5, 1.0), 3, 0.75),
    Tag("s", 0.8, 0.8, None, 0.2, 1.0),
]


@pytest.mark.parametrize("tag", TAGS)
def test_a_tag_is_written_as_it_is_read(tag):
    assert parsed(Shot("a cat", adapters=(("s", tag),)).text) == ("a cat", [tag])
    assert parsed(Shot("", adapters=(("s", 0.3),)).text) == ("", [Tag("s", 0.3, 0.3)])


def test_hashes_are_a1111s(tmp_path):
    import hashlib

    data = json.dumps({"x": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}}).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(data).to_bytes(8, "little") + data + b"abc")
    assert infotext.lora_hash(file) == hashlib.sha256(b"abc").hexdigest()[:12]
    assert infotext.model_hash(file) == hashlib.sha256(file.read_bytes()).hexdigest()[:10]


def test_a_sheet_has_its_pictures_where_its_labels_say():
    colours = [["red", "green", "blue"], ["white", "black", "yellow"]]
    cells = [[Image.new("RGB", (40, 30), colour) for colour in row] for row in colours]
    sheet = Sheet(["strength 0", "a_very_long_name_that_is_cut_somewhere", "c"], ["row", "another row"], cells, "title")
    whole = drawn(sheet)
    assert whole.width >= 3 * 40 and whole.height >= 2 * 30
    buffer = io.BytesIO()
    whole.save(buffer, "PNG")
    top, left = (max(size) for size in ((whole.height - 2 * 38 + 8,), (whole.width - 3 * 48 + 8,)))
    for r, row in enumerate(colours):
        for c, colour in enumerate(row):
            spot = (left + c * 48 + 20, top + r * 38 + 15)
            assert whole.getpixel(spot) == Image.new("RGB", (1, 1), colour).getpixel((0, 0)), (r, c)
    parts = list(pieces(sheet, largest=240 + 100))
    assert len(parts) == 2 and all(part.width <= 340 for part in parts)
    assert parts[1].getpixel((parts[1].width - 20, parts[1].height - 15)) == (255, 255, 0)
