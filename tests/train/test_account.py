"""What a folder holds is trained on, or said not to be."""

import io
import json
import unicodedata
import warnings

import numpy as np
import pytest
from PIL import Image

from diffpeft import DataError, TrainConfig
from diffpeft.pipeline.open import EMBEDDED
from diffpeft.train import data
from diffpeft.train.check import account_of, check
from diffpeft.train.data.tokens import tokenizers_of, too_long

SQUARE = data.Sizing((64,), buckets=False)


def jpeg(size=(8, 8), colour=(255, 0, 0), format="JPEG"):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Fills a folder: {name: bytes, or a text}."""

    def fill(files):
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return tmp_path

    return fill


def captions(account):
    return {example.path.name: example.caption for example in account.examples}


CAPTIONS = {  # {case: (image, {caption files}, the caption, where it is from)}
    "txt": ("a.png", {"a.txt": " a dog \n"}, "a dog", ".txt"),
    "caption": ("a.png", {"a.caption": "a dog"}, "a dog", ".caption"),
    "the whole name": ("a.png", {"a.png.txt": "a dog"}, "a dog", "NAME.png.txt"),
    "the whole name, caption": ("a.png", {"a.png.caption": "a dog"}, "a dog", "NAME.png.caption"),
    "txt before caption": ("a.png", {"a.caption": "a cat", "a.txt": "a dog"}, "a dog", ".txt"),
    "an ending in capitals": ("a.PNG", {"a.TXT": "a dog"}, "a dog", ".txt"),
    "a byte order mark": ("a.png", {"a.txt": b"\xef\xbb\xbfa dog\r\n"}, "a dog", ".txt"),
    "a byte order mark, caption": ("a.png", {"a.caption": b"\xef\xbb\xbfa dog"}, "a dog", ".caption"),
    "nothing but a byte order mark": ("a.png", {"a.txt": b"\xef\xbb\xbf"}, "", ".txt"),
    "dots in the name": ("a.b.png", {"a.b.txt": "a dog"}, "a dog", ".txt"),
    "none": ("a.png", {}, "sks", "the prompt"),
    **{
        f"{image} beside {text}": (
            unicodedata.normalize(image, "café 猫.png"),
            {unicodedata.normalize(text, "café 猫" + ending): "a dog"},
            "a dog",
            ending if ending in (".txt", ".caption") else "NAME.png.txt",
        )
        for image, text in (("NFD", "NFC"), ("NFC", "NFD"), ("NFD", "NFD"))
        for ending in (".txt", ".caption", ".png.txt")
    },
}


@pytest.mark.parametrize("case", CAPTIONS)
def test_a_caption_is_read_from_the_file_beside_the_image(case, folder):
    image, texts, caption, source = CAPTIONS[case]
    account = data.survey(folder({image: jpeg(), **texts}), "sks")
    assert captions(account) == {image: caption} and account.captions == {source: 1}
    assert account.empty == ((image,) if not caption else ())


@pytest.mark.parametrize("ending", [".jpg", ".JPG", ".jpeg", ".jfif", ".jpe"])
def test_a_jpeg_is_read_whatever_its_ending(ending, folder):
    account = data.survey(folder({f"a{ending}": jpeg()}), "x")
    assert [e.path.name for e in account.examples] == [f"a{ending}"] and not account.unread


UNREAD = {
    "d.heic": b"\0\0\0\x18ftypheic", "e.HEIC": b"", "f.jxl": b"\xff\x0a", "g.psd": b"8BPS", "h.cr2": b"II",
    "rows.jsonl": "{}", "captions.csv": "a,b", "other.txt": "a dog", "a.caption": "a cat", "README": "words",
}  # fmt: skip
JUNK = {".DS_Store": "x", "Thumbs.db": "x", "desktop.ini": "x", "._a.png": b"\0", ".ipynb_checkpoints/a.png": jpeg()}


def test_what_is_not_used_is_counted_by_ending_and_junk_is_not(folder):
    account = data.survey(folder({"a.png": jpeg(), "a.txt": "a dog", **UNREAD, **JUNK}), None)
    assert {ending: len(names) for ending, names in account.unread.items()} == {
        ".heic": 2, ".jxl": 1, ".psd": 1, ".cr2": 1, ".jsonl": 1, ".csv": 1, ".txt": 1, ".caption": 1, "without an ending": 1,
    }  # fmt: skip
    text = str(account)
    assert all(name in text for name in UNREAD) and not any(name in text for name in ("DS_Store", "._a", "ipynb"))


def test_folders_are_entered_and_named_with_their_images(folder):
    root = folder(
        {"a.png": jpeg(), "10_sks dog/b.png": jpeg(), "10_sks dog/deep/c.png": jpeg(), "e/f": "", "out/d.png": jpeg()}
    )
    account = data.survey(root, "x", skip=[root / "out"])
    assert [(e.name, e.repeats) for e in account.examples] == [
        ("a.png", 1),
        ("10_sks dog/b.png", 10),
        ("10_sks dog/deep/c.png", 10),
    ]
    assert account.folders == {"out": 1, "e": 0} and account.unread == {"without an ending": ["f"]}
    assert "'10_sks dog' 1 image x 10" in str(account) and "out (1 image)" in str(account)


def test_copies_are_told_by_what_they_show(folder):
    picture = Image.effect_noise((40, 30), 60).convert("RGB")
    saved = {}
    for name, image, options in (
        ("a.png", picture, {}),
        ("b.png", picture, {"compress_level": 1}),
        ("c.png", picture.convert("RGBA"), {}),
        ("d.tiff", picture, {}),
        ("e.png", picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT), {}),
        ("f.png", picture.resize((20, 15)), {}),
    ):
        buffer = io.BytesIO()
        image.save(buffer, name.partition(".")[2], **options)
        saved[name] = buffer.getvalue()
    account = data.survey(folder(saved), "x", SQUARE)
    assert account.duplicates == (("a.png", "b.png", "c.png", "d.tiff"),)


def test_small_extreme_and_animated_pictures_and_copies_are_named(folder):
    frames = [Image.new("RGB", (80, 80), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    same = jpeg((80, 80), (1, 2, 3))
    root = folder({
        "dot.png": jpeg((1, 1)), "half.png": jpeg((32, 40)), "strip.png": jpeg((400, 80), (0, 9, 9)), "small.png": jpeg((80, 31)),
        "move.gif": buffer.getvalue(), "x.png": same, "y.png": same, "z.png": jpeg((80, 80), (3, 2, 1)),
    })  # fmt: skip
    account = data.survey(root, "x", SQUARE)
    assert account.small == ("dot.png", "small.png") and account.extreme == ("strip.png",)
    assert account.animated == ("move.gif",) and account.duplicates == (("x.png", "y.png"),)
    assert data.survey(root, "x").small == ()  # what is small is not known yet
    assert all(name in str(account) for name in ("dot.png", "small.png", "strip.png", "move.gif", "x.png = y.png"))
    assert np.allclose(data.pixels(root / "move.gif", 8)[0], 1, atol=0.02)  # the first frame, which is red


def test_a_folder_that_is_wholly_used_has_nothing_to_note(folder):
    account = data.survey(folder({"a.png": jpeg((64, 64)), "a.txt": "a dog", "b.jpg": jpeg((70, 80))}), "sks", SQUARE)
    assert account.lines() == [
        f"2 images of 64x64 to 70x80 in {account.folder}; captions: 1 from .txt, 1 from the prompt"
    ]


def test_find_warns_of_what_the_account_notes(folder):
    root = folder({"a.png": jpeg(), "d.heic": b"x"})
    with pytest.warns(UserWarning, match="heic"):
        data.find(root, "x")
    (root / "d.heic").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.find(root, "x")


def test_every_file_that_cannot_be_read_is_named_at_once(folder):
    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(noise, "PNG")
    half = noise.getvalue()[: len(noise.getvalue()) // 2]
    large = jpeg((640, 480), (9, 9, 9))
    root = folder({
        "good.png": jpeg(), "half.png": half, "half.jpg": large[:-200], "none.png": b"", "text.webp": "words",
        "cp.png": jpeg(), "cp.txt": "the dog’s".encode("cp1252"), "wide.png": jpeg(), "wide.caption": "a dog".encode("utf-16"),
    })  # fmt: skip
    with pytest.raises(DataError, match="UTF-8") as caught:
        data.survey(root, "x")
    broken = ("half.png", "half.jpg", "none.png", "text.webp", "cp.txt", "wide.caption")
    assert all(f"'{name}'" in caught.value.what for name in broken) and "good.png" not in caught.value.what
    assert caught.value.what.startswith("6 files")


def test_the_counts_are_data(folder):
    table = data.survey(
        folder({"a.png": jpeg(), "a.txt": "", "b.heic": "x", "c/d.png": jpeg(), "c/d.png.txt": "d"}), None, SQUARE
    ).table()
    assert table == {
        "images": 2, "pictures": 2, "captions": {".txt": 1, "NAME.png.txt": 1}, "unread": {".heic": 1}, "folders": {}, "duplicates": [["a.png", "c/d.png"]],
        "empty": ["a.png"], "small": ["a.png", "c/d.png"], "extreme": [], "animated": [], "unprofiled": [], "unmasked": [], "black": [], "cut": None,
        "groups": [{"folder": ".", "images": 1, "repeats": 1}, {"folder": "c", "images": 1, "repeats": 1}],
        "buckets": [{"width": 64, "height": 64, "images": 2}], "heldout": [], "masks": 0, "passes": None,
        "controls": 0, "reshaped": [], "fewer_controls": [], "stray_controls": [],
    }  # fmt: skip


# -- captions that are too long ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flux_like(tmp_path_factory):
    """A folder with two tokenizers, CLIP's and one without a beginning that takes more, like T5's."""
    from transformers import AutoTokenizer, T5Tokenizer

    root = tmp_path_factory.mktemp("flux")
    AutoTokenizer.from_pretrained(EMBEDDED / "tokenizer").save_pretrained(root / "tokenizer")
    T5Tokenizer(
        vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁dog", -1.0)], model_max_length=100, extra_ids=0
    ).save_pretrained(root / "tokenizer_2")
    kinds = {
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5Tokenizer"],
        "vae": ["diffusers", "X"],
    }
    (root / "model_index.json").write_text(json.dumps(kinds))
    return root


@pytest.mark.parametrize(
    "most, words, cut",
    [(None, 30, False), (None, 31, True), (60, 31, False), (60, 60, False), (60, 61, True)],
)
def test_captions_that_clip_would_cut_are_counted(most, words, cut):
    (tokenizer,) = tokenizers_of(str(EMBEDDED))
    assert too_long(["x", " ".join(["a"] * words)], [tokenizer], most) == (
        [False, cut],
        most or 30,
    )  # its CLIP has room for 32


@pytest.mark.parametrize(
    "most, words, cut", [(None, 76, False), (None, 99, False), (None, 100, True), (50, 49, False), (50, 51, True)]
)
def test_what_one_of_several_tokenizers_reads_is_not_cut(most, words, cut, flux_like):
    tokenizers = tokenizers_of(str(flux_like))
    assert len(tokenizers) == 2
    assert too_long([" ".join(["dog"] * words)], tokenizers, most)[0] == [cut]


def test_a_cut_caption_is_said_before_training(folder, tmp_path):
    root = folder({"a.png": jpeg(), "a.txt": "tag, " * 200, "b.png": jpeg(colour=(0, 9, 9)), "b.txt": "a dog"})
    options = {"model": str(EMBEDDED), "data": str(root), "out": str(tmp_path / "out")}
    account = check(TrainConfig(**options)).account
    assert account.cut == ("a.png",) and "1 image with captions longer than 30 tokens" in str(account)
    assert check(TrainConfig(**options, max_length=3000)).account.cut == ()
    assert account_of(TrainConfig(data=str(root)), steps=False).cut is None  # no model, no tokenizer
