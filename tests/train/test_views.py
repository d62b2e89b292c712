"""What is shown of an image: the crop, its record, colours by profile, and masks that go with it."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from diffpeft import ConfigError, DataError
from diffpeft.train import data
from diffpeft.train.data.buckets import covering
from diffpeft.train.data.masks import masked
from diffpeft.train.data.read import View, looked_at, numbers, picture

RAMP = np.stack([*np.meshgrid(np.arange(60), np.arange(40)), np.zeros((40, 60))], -1).astype(
    np.uint8
)  # red is x, green is y


@pytest.mark.parametrize("target", [(32, 32), (64, 16), (16, 64), (60, 40)])
@pytest.mark.parametrize("x, y", [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0), (0.3, 0.9)])
@pytest.mark.parametrize("flipped", [False, True])
def test_a_frame_says_where_the_pixels_are_from(target, x, y, flipped):
    size = (60, 40)
    view = View.at(size, target, x, y, flipped)
    original, (top, left), (height, width) = view.frame(size)
    assert original == (40, 60) and (width, height) == target
    scaled = Image.fromarray(RAMP).resize(covering(size, target), Image.Resampling.LANCZOS)
    scaled = scaled.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else scaled
    want = np.asarray(scaled)[top : top + height, left : left + width]
    assert np.array_equal(np.asarray(view.of(Image.fromarray(RAMP))), want)


def test_the_whole_of_an_image_of_the_right_size_is_untouched():
    view = View.centred((60, 40), (60, 40))
    assert view.frame((60, 40)) == ((40, 60), (0, 0), (40, 60))
    torch.testing.assert_close(
        numbers(view.of(Image.fromarray(RAMP))), torch.from_numpy(RAMP / 127.5 - 1).permute(2, 0, 1).float()
    )


# -- colours -------------------------------------------------------------------------------------------------------------


def wide():
    """A profile that is not sRGB: its gamma is 1 (linear light), by hand from the standard."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = int.from_bytes(profile[128:132], "big")
    for row in range(count):
        at = 132 + 12 * row
        tag, offset = bytes(profile[at : at + 4]), int.from_bytes(profile[at + 4 : at + 8], "big")
        if tag in (b"rTRC", b"gTRC", b"bTRC"):
            profile[offset : offset + 12] = b"curv" + bytes(4) + (0).to_bytes(4, "big")  # no entries: the identity
        if tag == b"desc":
            text = profile.find(b"\0s\0R\0G\0B", offset)
            profile[text + 1 : text + 8 : 2] = b"line"
    return bytes(profile)


def srgb(linear):
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_of_another_profile_are_turned_into_srgb(mode, tmp_path):
    values = np.repeat(np.arange(0, 256, 5, dtype=np.uint8)[None, :, None], 3, axis=2)
    Image.fromarray(values).convert(mode).save(tmp_path / "a.png", icc_profile=wide())
    got = np.asarray(picture(tmp_path / "a.png"))[0, :, 0]
    palette = np.asarray(Image.fromarray(values).convert(mode).convert("RGB"))[0, :, 0]
    assert np.abs(got - srgb(palette / 255) * 255).max() <= 1.5
    assert looked_at(tmp_path / "a.png").profiled


def test_a_profile_that_cannot_be_read_is_said(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "a.png", icc_profile=b"no profile at all")
    account = data.survey(tmp_path, "x")
    assert account.unprofiled == ("a.png",) and "profile" in str(account)
    assert np.array_equal(np.asarray(picture(tmp_path / "a.png")), RAMP)


def test_what_says_that_it_is_srgb_keeps_its_values(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(RAMP).save(tmp_path / "a.png", icc_profile=profile)
    assert np.array_equal(np.asarray(picture(tmp_path / "a.png")), RAMP)


# -- masks ---------------------------------------------------------------------------------------------------------------


def half(size=(60, 40), mode="L"):
    """White on the left, black on the right."""
    values = np.zeros((size[1], size[0]), np.uint8)
    values[:, : size[0] // 2] = 255
    return Image.fromarray(values).convert(mode)


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos" / "x").mkdir(parents=True)
    for name in ("a.png", "x/b.png"):
        Image.fromarray(RAMP).save(tmp_path / "photos" / name)
    return tmp_path / "photos"


NAMES = {
    "as the image": "x/b.png",
    "another ending": "x/b.webp",
    "OneTrainer's": "x/b-masklabel.png",
    "by name alone": "b.png",
}


@pytest.mark.parametrize("case", NAMES)
def test_a_mask_is_found_by_the_images_name(case, photos, tmp_path):
    mask = tmp_path / "masks" / NAMES[case]
    mask.parent.mkdir(parents=True)
    half().save(mask, lossless=True)
    account = data.survey(photos, "p", mask=str(tmp_path / "masks"))
    assert {e.name: e.mask for e in account.examples} == {"a.png": None, "x/b.png": mask}
    assert (
        account.unmasked == ("a.png",) and "a.png" in str(account) and "masks weigh the loss of 1 image" in str(account)
    )


def test_masks_inside_the_data_are_no_images(photos):
    (photos / "masks").mkdir()
    half((30, 20)).save(photos / "masks" / "a.png")  # of another size, and the same shape
    account = data.survey(photos, "p", mask=str(photos / "masks"))
    assert [e.name for e in account.examples] == ["a.png", "x/b.png"] and account.folders == {"masks": 1}


def test_a_mask_is_what_the_view_shows_of_it_at_the_size_of_latents(photos, tmp_path):
    (tmp_path / "masks").mkdir()
    half().save(tmp_path / "masks" / "a.png")
    example = data.survey(photos, "p", mask=str(tmp_path / "masks")).examples[0]
    view = View.centred(example.size, (48, 32))
    want = torch.cat([torch.ones(4, 3), torch.zeros(4, 3)], 1)
    torch.testing.assert_close(
        masked(example, view, (4, 6)), want[None], rtol=0, atol=0.01
    )  # where white meets black, scaling rings
    mirrored = View.centred(example.size, (48, 32), flipped=True)
    torch.testing.assert_close(masked(example, mirrored, (4, 6)), want.flip(-1)[None], rtol=0, atol=0.01)
    assert masked(data.Example(example.path, ""), view, (4, 6)) is None


def test_transparency_is_a_mask(photos):
    image = Image.fromarray(RAMP).convert("RGBA")
    image.putalpha(half())
    image.save(photos / "a.png")
    account = data.survey(photos, "p", mask="alpha")
    assert account.unmasked == ("x/b.png",)
    assert masked(account.examples[0], View.centred((60, 40), (60, 40)), (4, 6)).mean() == 0.5


def test_a_mask_of_another_shape_or_that_cannot_be_read_is_named(photos, tmp_path):
    (tmp_path / "masks").mkdir()
    half((40, 60)).save(tmp_path / "masks" / "a.png")
    (tmp_path / "masks" / "b.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"2 files.*a\.png.*shape.*b\.png"):
        data.survey(photos, "p", mask=str(tmp_path / "masks"))


def test_masks_that_would_do_nothing_are_refused_and_a_black_one_is_said(photos, tmp_path):
    with pytest.raises(ConfigError, match="transparent"):
        data.survey(photos, "p", mask="alpha")
    with pytest.raises(DataError, match="photos"):
        data.survey(photos, "p", mask=str(tmp_path / "photo"))
    (tmp_path / "masks").mkdir()
    with pytest.raises(ConfigError, match="no file"):
        data.survey(photos, "p", mask=str(tmp_path / "masks"))
    Image.new("L", (60, 40)).save(tmp_path / "masks" / "a.png")
    assert data.survey(photos, "p", mask=str(tmp_path / "masks")).black == ("a.png",)


def test_a_photo_turned_by_its_camera_has_the_size_of_what_is_seen(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.fromarray(RAMP).save(tmp_path / "a.jpg", exif=exif)
    account = data.survey(tmp_path, "x", data.Sizing((64,)))
    assert account.sizes == {"a.jpg": (40, 60)} and picture(tmp_path / "a.jpg").size == (40, 60)
    assert all(h > w for w, h in account.buckets)
