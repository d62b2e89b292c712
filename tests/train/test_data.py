import numpy as np
import pytest
import torch
from PIL import Image

from diffpeft import DataError
from diffpeft.train import data


def save(path, size=(8, 8), mode="RGB", colour=(255, 0, 0)):
    Image.new(mode, size, colour).save(path)


def test_a_caption_file_wins_over_the_prompt(tmp_path):
    save(tmp_path / "b.png")
    save(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text(" a dog \n")
    assert [(e.path.name, e.caption) for e in data.find(tmp_path, "sks")] == [("a.jpg", "a dog"), ("b.png", "sks")]


@pytest.mark.parametrize(
    "prepare, says",
    [
        (lambda d: None, "no images"),
        (lambda d: (d / "10_sks dog").mkdir(), "10_sks dog"),
        (lambda d: save(d / "a.png"), "no caption"),
    ],
)
def test_a_folder_that_cannot_be_trained_on_says_what_it_holds(tmp_path, prepare, says):
    prepare(tmp_path)
    with pytest.raises(DataError, match=says):
        data.find(tmp_path, None)


def test_a_missing_folder_names_its_neighbour(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match="photos"):
        data.find(tmp_path / "photo", "x")


def test_an_unreadable_image_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"a\.png"):
        data.pixels(tmp_path / "a.png", 8)


def test_pixels_are_upright_white_behind_and_cropped_at_the_centre(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rows are columns
    half = Image.new("RGB", (16, 16), "white")
    half.paste((0, 0, 0), (0, 0, 16, 8))
    half.save(tmp_path / "turned.png", exif=exif)
    x = data.pixels(tmp_path / "turned.png", 16)
    assert x[:, :, :8].mean() == 1 and x[:, :, 8:].mean() == -1  # the black top is on the right
    save(tmp_path / "clear.png", mode="RGBA", colour=(0, 0, 0, 0))
    assert torch.equal(data.pixels(tmp_path / "clear.png", 8), torch.ones(3, 8, 8))
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert data.pixels(tmp_path / "wide.png", 8).mean() == 1
