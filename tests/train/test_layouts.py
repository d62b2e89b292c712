"""Data sets as people have them: flat, nested, sd-scripts' folders, tables of captions, several at once."""

import json
import os

import pytest

from diffpeft import ConfigError, DataError
from diffpeft.train import data
from tests.train.test_account import folder, jpeg  # noqa: F401

DOG, CAT = jpeg(colour=(1, 2, 3)), jpeg(colour=(9, 8, 7))

LAYOUTS = {  # {case: (files, prompt, {image: (caption, repeats)})}
    "flat": ({"a.png": DOG, "a.txt": "dog"}, None, {"a.png": ("dog", 1)}),
    "nested": ({"x/a.png": DOG, "x/y/b.png": CAT, "x/y/b.txt": "cat"}, "sks", {"x/a.png": ("sks", 1), "x/y/b.png": ("cat", 1)}),
    "sd-scripts": (
        {"10_sks dog/a.png": DOG, "3_zxc cat/b.png": CAT, "3_zxc cat/c.png": CAT, "3_zxc cat/c.caption": "c"}, None,
        {"10_sks dog/a.png": ("sks dog", 10), "3_zxc cat/b.png": ("zxc cat", 3), "3_zxc cat/c.png": ("c", 3)},
    ),
    "sd-scripts, but the prompt was typed": ({"10_sks dog/a.png": DOG}, "a photo", {"10_sks dog/a.png": ("a photo", 10)}),
    "the nearest name counts": ({"10_sks dog/2_hat/a.png": DOG}, None, {"10_sks dog/2_hat/a.png": ("hat", 2)}),
    "years are no repeats": ({"2023_trip/a.png": DOG, "0_x/b.png": CAT}, "p", {"2023_trip/a.png": ("p", 1), "0_x/b.png": ("p", 1)}),
    "jsonl": (
        {"a.png": DOG, "b.png": CAT, "metadata.jsonl": '\ufeff{"file_name": "a.png", "text": " dog "}\r\n\n{"file_name": "b.png", "text": ""}\n'}, None,
        {"a.png": ("dog", 1), "b.png": ("", 1)},
    ),
    "jsonl of folders below": (
        {"x/a.png": DOG, "metadata.jsonl": json.dumps({"file_name": "x\\a.png", "caption": "döggö"}, ensure_ascii=False)}, "p", {"x/a.png": ("döggö", 1)},
    ),
    "the inner table wins": (
        {"x/a.png": DOG, "metadata.jsonl": '{"file_name": "x/a.png", "text": "outer"}', "x/metadata.jsonl": '{"file_name": "a.png", "text": "inner"}'},
        None, {"x/a.png": ("inner", 1)},
    ),
    "csv": ({"a.png": DOG, "b.png": CAT, "metadata.csv": 'file_name,text\na.png,"a dog, ""big"""\nb.png,"two\nlines"\n'}, None,
            {"a.png": ('a dog, "big"', 1), "b.png": ("two\nlines", 1)}),
    "a file beside the image wins over a table": ({"a.png": DOG, "a.txt": "file", "metadata.csv": "file_name,text\na.png,table"}, None, {"a.png": ("file", 1)}),
    "a row without a caption": ({"a.png": DOG, "metadata.jsonl": '{"file_name": "a.png", "text": null}'}, "p", {"a.png": ("p", 1)}),
    "class images of ours are not entered": ({"a.png": DOG, "class/class.json": "{}", "class/b.png": CAT}, "p", {"a.png": ("p", 1)}),
    "masks beside images are none": ({"a.png": DOG, "a-masklabel.png": CAT, "b-masklabel.png": CAT}, "p", {"a.png": ("p", 1), "b-masklabel.png": ("p", 1)}),
}  # fmt: skip


def told(account):
    return {example.name: (example.caption, example.repeats) for example in account.examples}


@pytest.mark.parametrize("case", LAYOUTS)
def test_a_layout_is_read_as_it_is_meant(case, folder):  # noqa: F811
    files, prompt, want = LAYOUTS[case]
    account = data.survey(folder(files), prompt)
    assert told(account) == want and sum(account.captions.values()) == len(want)
    images = sum(name.endswith(".png") for name in files)
    passed_over = sum(map(len, account.unread.values())) + sum(account.folders.values())
    assert len(want) + sum(n for n in (len(account.unread.get(".png", ())), *account.folders.values())) == images, (
        passed_over
    )


def test_a_folder_may_be_named_by_itself_or_by_its_parent(folder):  # noqa: F811
    root = folder({"10_sks dog/a.png": DOG})
    assert told(data.survey(root / "10_sks dog", None)) == {"a.png": ("sks dog", 10)}
    assert data.survey(root, None).captions == {"the folder's name 'sks dog'": 1}


def test_a_table_may_be_the_data(folder):  # noqa: F811
    root = folder(
        {"x/a.png": DOG, "x/b.png": CAT, "rows.jsonl": '{"image": "x/b.png", "prompt": "b"}\n{"image": "x/a.png"}'}
    )
    assert told(data.survey(root / "rows.jsonl", "p")) == {"x/b.png": ("b", 1), "x/a.png": ("p", 1)}


def test_several_folders_have_repeats_of_their_own(folder):  # noqa: F811
    root = folder({"dogs/a.png": DOG, "cats/10_x/a.png": CAT, "odd:3/a.png": CAT})
    account = data.survey([root / "dogs", f"{root / 'cats'}:3", root / "odd:3"], "p")
    assert told(account) == {"dogs/a.png": ("p", 1), "cats/10_x/a.png": ("p", 30), "odd:3/a.png": ("p", 1)}
    assert account.pictures == 32 and "(3 times)" in account.summary()
    with pytest.raises(ConfigError, match="would not be used"):
        data.survey(f"{root / 'dogs'}:0", "p")


BROKEN = {  # {case: (files, what the error names)}
    "no JSON": ({"metadata.jsonl": '{"file_name": "a.png", "text": "x"}\n{'}, "line 2"),
    "no table": ({"metadata.jsonl": "[1]"}, "line 1"),
    "no file name": ({"metadata.csv": "name,text\na.png,x"}, "line 2 has no file_name"),
    "a caption that is a number": ({"metadata.jsonl": '{"file_name": "a.png", "text": 3}'}, "no text"),
    "an image that is not there": ({"metadata.csv": "file_name,text\nA.png,x\nzz.png,y"}, "zz.png"),
    "no image": ({"metadata.csv": "file_name,text\nb.txt,x", "b.txt": "x"}, "no image"),
    "no UTF-8": ({"metadata.csv": "file_name,text\na.png,\xe9".encode("latin-1")}, "UTF-8"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_with_a_table_is_said_with_its_line(case, folder):  # noqa: F811
    files, says = BROKEN[case]
    with pytest.raises(DataError, match=says):
        data.survey(folder({"a.png": DOG, **files}), "p")


def test_links_are_followed_once(folder):  # noqa: F811
    root = folder({"x/a.png": DOG, "elsewhere/b.png": CAT})
    os.symlink(root / "elsewhere", root / "x" / "more", target_is_directory=True)
    os.symlink(root / "x", root / "x" / "again", target_is_directory=True)
    assert set(told(data.survey(root / "x", "p"))) == {"a.png", "more/b.png"}


def test_the_trigger_stands_for_its_mark(folder):  # noqa: F811
    root = folder({"a.png": DOG, "a.txt": "[trigger] on grass", "b.png": CAT})
    assert told(data.survey(root, "a photo of [trigger]", trigger="sks")) == {
        "a.png": ("sks on grass", 1),
        "b.png": ("a photo of sks", 1),
    }
    with pytest.raises(DataError, match=r"2 captions hold \[trigger\]"):
        data.survey(root, "a photo of [trigger]")
    (root / "a.txt").write_text("no such word: sksy")
    with pytest.raises(ConfigError, match="no caption has it"):
        data.survey(root, "x", trigger="sks")
    (root / "a.txt").write_text("a sks, here")  # the word itself will do
    data.survey(root, "x", trigger="sks")


def test_each_of_several_must_have_images(folder):  # noqa: F811
    root = folder({"dogs/a.png": DOG, "cats/notes.md": "words"})
    with pytest.raises(DataError, match=r"no images.*\.md.*cats"):
        data.survey([root / "dogs", root / "cats"], "p")


def test_nothing_that_is_not_entered_goes_unsaid(folder):  # noqa: F811
    root = folder({"a.png": DOG, "out/b.png": CAT, "class/class.json": "{}", "class/c.png": CAT})
    account = data.survey(root, "p", skip=[root / "out"])
    assert account.folders == {"class": 1, "out": 1} and "nothing is used: class (1 image), out (1 image)" in str(
        account
    ).replace("'", "")


def test_a_pass_is_counted_in_pictures_steps_and_buckets(folder):  # noqa: F811
    root = folder({"2_x/a.png": jpeg((600, 800)), "2_x/b.png": jpeg((800, 600)), "c.png": jpeg((600, 600))})
    account = data.survey(root, "p", data.Sizing((512, 576)))
    assert account.buckets == {(448, 576): 1, (512, 512): 1, (512, 640): 1, (576, 448): 1, (576, 576): 1, (640, 512): 1}
    assert account.pictures == 2 * 2 + 2 * 2 + 1 * 2
    assert "1 of 448x576" in str(account)
