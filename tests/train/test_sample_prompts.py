"""Prompts that are drawn while training: sd-scripts' lines, tables, and what is said of those that mean nothing."""

import json

import pytest

from diffpeft import ConfigError, TrainConfig, UnknownNameError
from diffpeft.drawing.prompts import FLAGS, SamplePrompt, check_sizes, of_line, read
from diffpeft.train.sample_prompts import prompts_of, typed_prompts

WHOLE = "a cat -- in a hat --n dog, low quality --w 512 --h 768 --d 7 --l 7.5 --g 3.5 --s 30"
SETTINGS = SamplePrompt("a cat -- in a hat", "dog, low quality", 512, 768, 7, 7.5, 3.5, 30)


def config(**options):
    return TrainConfig(model="m", data="d", out="o", **options)


def plain(prompt):
    return {**vars(prompt), "where": ""}


def test_a_line_is_a_prompt_with_sd_scripts_flags_in_any_order():
    assert plain(of_line(WHOLE, "")) == plain(SETTINGS)
    assert plain(of_line("x --s 3 --n a --w 64", "")) == plain(SamplePrompt("x", "a", width=64, steps=3))
    assert plain(of_line("a well-known--thing", "")) == plain(SamplePrompt("a well-known--thing"))
    assert {setting.field for setting in FLAGS.values()} | {"prompt", "where"} == set(vars(SETTINGS))


def test_files_of_lines_and_tables_say_the_same(tmp_path):
    table = {
        "prompt": "a cat -- in a hat",
        "negative_prompt": "dog, low quality",
        "width": 512,
        "height": 768,
        "seed": 7,
    }
    table |= {"scale": 7.5, "guidance_scale": 3.5, "sample_steps": 30}
    rows = "\n".join(f"{name} = {json.dumps(value)}" for name, value in table.items())
    common = "\n".join(f"{name} = {json.dumps(value)}" for name, value in table.items() if name != "prompt")
    files = {
        "a.txt": f"\ufeff# mine\n\n{WHOLE}\r\n  # more\nplain\n",
        "a.json": json.dumps([table, "plain"]),
        "a.toml": f'[[prompt]]\n{rows}\n[[prompt]]\nprompt = "plain"\n',
        "b.toml": f'[prompt]\n{common}\n[[prompt.subset]]\nprompt = "a cat -- in a hat"\n',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        prompts = [plain(prompt) for prompt in read(tmp_path / name)]
        assert prompts == [plain(SETTINGS), plain(SamplePrompt("plain"))][: len(prompts)] and prompts
        assert all(name in prompt.where for prompt in read(tmp_path / name))


@pytest.mark.parametrize(
    "text, error, says",
    [
        ("ok\nx --q 3", UnknownNameError, ["line 2", "'--q'"]),
        ("x --W 3", UnknownNameError, ["line 1", "--w"]),
        ("x --width 64", UnknownNameError, ["--w"]),
        ("x --negative_prompt y", UnknownNameError, ["--n"]),
        ("x --ss euler_a", UnknownNameError, ["own sampler"]),
        ("\n\n--w 3", ConfigError, ["line 3", "no prompt"]),
        ("x --w", ConfigError, ["--w", "whole number"]),
        ("x --w 3.5", ConfigError, ["3.5"]),
        ("x --h 0", ConfigError, ["from 8"]),
        ("x --s 0", ConfigError, ["from 1"]),
        ("x --l nan", ConfigError, ["--l", "number"]),
        ("x --d -1", ConfigError, ["--d"]),
        ("# nothing\n", ConfigError, ["no prompt is in"]),
    ],
)
def test_a_line_that_means_nothing_is_named_with_its_file_and_number(text, error, says, tmp_path):
    (tmp_path / "prompts.txt").write_text(text)
    with pytest.raises(error) as raised:
        read(tmp_path / "prompts.txt")
    assert "prompts.txt" in str(raised.value) and all(word in str(raised.value) for word in says), raised.value


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("a.json", "{", "no JSON"),
        ("a.json", '{"prompt": "x"}', "no list"),
        ("a.json", '["a", {"prompt": "x", "widht": 64}]', "prompt 2"),
        ("a.json", '[{"prompt": "x", "width": true}]', "whole number"),
        ("a.json", "[3]", "no prompt"),
        ("a.toml", "prompt = 3", "no list"),
        ("a.toml", "[prompt", "no TOML"),
        ("a.toml", '[prompt]\nsubset = ["x"]', "no list"),
        ("a.txt", None, "cannot read"),
    ],
)
def test_a_file_that_holds_no_prompts_is_named(name, text, says, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises((ConfigError, UnknownNameError), match=says) as raised:
        typed_prompts(config(sample_prompts=str(tmp_path / name)))
    assert name in str(raised.value)


def texts(captions=(), **options):
    return [prompt.prompt for prompt in prompts_of(config(**options), captions)]


def test_the_instance_prompt_or_else_a_caption_is_drawn_first():
    assert texts(instance_prompt="a [trigger] dog", trigger="sks") == ["a sks dog"]
    assert texts(["", "a cat"]) == ["a cat"]
    assert texts(["a cat"], sample_prompt=("x", "y --w 64")) == ["x", "y"]
    assert texts(["a cat"], instance_prompt="i", sample_prompt="x") == ["i", "x"]
    assert texts(instance_prompt="i", sample_prompt=("x", "i --d 3")) == ["i", "x"]
    assert prompts_of(config(instance_prompt="i", sample_prompt="i --d 3"), [])[0].seed == 3
    assert texts(["a"], sample_prompt="[trigger]", trigger="sks") == ["sks"]
    assert texts(["a cat"], sample_every=0) == []
    assert typed_prompts(config(sample_prompt="x --n [trigger] y", trigger="sks"))[0].negative == "sks y"
    for line in ("a [trigger] dog", "x --n [trigger]"):
        with pytest.raises(ConfigError, match="trigger"):
            texts(sample_prompt=line)


def test_what_is_said_of_samples_that_are_never_drawn_is_refused():
    config(sample_every=0).check_values()
    for options in ({"sample_prompt": "x"}, {"sample_steps": 3}, {"sample_first": False}, {"sample_model": "m"}):
        with pytest.raises(ConfigError, match="do nothing"):
            config(sample_every=0, **options).check_values()


def test_sizes_that_the_model_cannot_draw_are_named():
    check_sizes([SETTINGS], 64)
    check_sizes([SamplePrompt("x", width=65)], None)
    with pytest.raises(ConfigError, match="512 or 576"):
        check_sizes([SamplePrompt("x", width=520, where="prompts.txt, line 3")], 64)
    with pytest.raises(ConfigError, match="line 3"):
        check_sizes([SamplePrompt("x", height=9, where="prompts.txt, line 3")], 64)
