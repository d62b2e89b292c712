"""Pictures of more than 8 bits are scaled as numpy would, whatever Pillow calls them."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffpeft import DataError
from diffpeft.train import data
from diffpeft.train.data.read import eight_bit, looked_at
from tests.train.pictures import png16, tiff

DEEP = np.random.default_rng(0).integers(0, 2**16, (9, 7), dtype=np.uint16)
DEEP[0, :3] = 0, 65535, 32768
UNIT = (DEEP / 65535).astype(np.float32)
WIDE = DEEP.astype(np.float32)
BYTES = (DEEP >> 8).astype(np.uint8)


def scaled(values, white):
    return np.rint(values.astype(np.float64) * 255 / white).astype(np.uint8)


GREY = {  # {file: (how it is written, its pixels in 8 bits)}
    "png": ("a.png", lambda p: png16(p, DEEP), scaled(DEEP, 65535)),
    "pgm": ("a.pgm", lambda p: Image.fromarray(DEEP).save(p), scaled(DEEP, 65535)),
    "tiff": ("a.tif", lambda p: tiff(p, DEEP), scaled(DEEP, 65535)),
    "tiff, the other byte order": ("a.tif", lambda p: tiff(p, DEEP, order=">"), scaled(DEEP, 65535)),
    "tiff, white is zero": ("a.tif", lambda p: tiff(p, DEEP, white_is_zero=True), 255 - scaled(DEEP, 65535)),
    "tiff with a sign": ("a.tif", lambda p: tiff(p, (DEEP >> 1).astype(np.int16)), scaled(DEEP >> 1, 32767)),
    "dark tiff": ("a.tif", lambda p: tiff(p, DEEP >> 9), scaled(DEEP >> 9, 65535)),
    "dark pgm": ("a.pgm", lambda p: Image.fromarray(DEEP >> 9).save(p), scaled(DEEP >> 9, 65535)),
    "32-bit integers": (
        "a.tif",
        lambda p: tiff(p, DEEP.astype(np.int32) << 15),
        scaled(DEEP.astype(np.int64) << 15, 2**31 - 1),
    ),
    "16 bits in 32": ("a.tif", lambda p: tiff(p, DEEP.astype(np.int32)), scaled(DEEP, 65535)),
    "8 bits in 32": ("a.tif", lambda p: tiff(p, BYTES.astype(np.int32)), BYTES),
    "floats to 1": ("a.tif", lambda p: tiff(p, UNIT), scaled(UNIT, 1)),
    "floats to 255": ("a.tif", lambda p: tiff(p, BYTES.astype(np.float32)), BYTES),
    "floats to 65535": ("a.tif", lambda p: tiff(p, WIDE), scaled(WIDE, 65535)),
}


@pytest.mark.parametrize("kind", GREY)
def test_grey_pictures_are_scaled_and_not_cut_off(kind, tmp_path):
    name, write, want = GREY[kind]
    write(tmp_path / name)
    with Image.open(tmp_path / name) as file:
        got = np.asarray(eight_bit(file).convert("L"))
    assert np.array_equal(got, want)
    assert looked_at(tmp_path / name).error == ""
    square = data.pixels(tmp_path / name, 7)  # 7 x 9: the rows at both ends are cropped
    torch.testing.assert_close(
        square, torch.from_numpy(want[1:8] / 127.5 - 1).float().expand(3, 7, 7), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_colours_and_alpha_of_16_bits_are_read_by_their_upper_bytes(channels, tmp_path):
    values = np.random.default_rng(1).integers(0, 2**16, (8, 8, channels), dtype=np.uint16)
    png16(tmp_path / "a.png", values)
    upper = (values >> 8).astype(np.float64)
    colour = upper[..., :3] if channels > 2 else upper[..., :1].repeat(3, axis=2)
    alpha = upper[..., -1:] / 255 if channels != 3 else 1.0
    want = colour * alpha + 255 * (1 - alpha)
    got = (data.pixels(tmp_path / "a.png", 8).permute(1, 2, 0).numpy() + 1) * 127.5
    assert np.abs(got - want).max() <= 1  # Pillow composes in 8 bits


def test_a_grey_value_that_means_transparency_is_white(tmp_path):
    Image.fromarray(DEEP).save(tmp_path / "a.png", transparency=int(DEEP[4, 4]))
    got = data.pixels(tmp_path / "a.png", 7)[0]
    want = torch.from_numpy(scaled(DEEP, 65535)[1:8] / 127.5 - 1).float()
    want[3, 4] = 1
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_deep_pictures_are_turned_upright_too(orientation, tmp_path):
    tiff(tmp_path / "deep.tif", DEEP, orientation=orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(scaled(DEEP, 65535)).save(tmp_path / "plain.png", exif=exif)
    deep, plain = (data.pixels(tmp_path / name, 7) for name in ("deep.tif", "plain.png"))
    assert torch.equal(deep, plain)
    assert looked_at(tmp_path / "deep.tif").size == ((9, 7) if orientation > 4 else (7, 9))


@pytest.mark.parametrize(
    "values", [UNIT - 0.5, UNIT * 1e6, np.full((9, 7), np.nan, np.float32), DEEP.astype(np.int32) - 9]
)
def test_values_of_which_none_is_known_to_be_white_are_refused_by_name(values, tmp_path):
    tiff(tmp_path / "a.tif", values)
    with pytest.raises(DataError, match=r"a\.tif.*white"):
        data.find(tmp_path, "x")
    with pytest.raises(DataError, match="white"):
        data.pixels(tmp_path / "a.tif", 8)
