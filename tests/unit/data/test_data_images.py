"""Pictures of every kind come out upright, 8-bit, sRGB, without transparency; damaged ones are named."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from diffsynth.core.data import MAX_PIXELS, ImageCropAndResize, LoadImage, RandomFlip, default_image_operator
from diffsynth.core.data.image_file import read_image, read_size
from diffsynth.core.errors import UserError

# what turns the stored picture upright (TIFF 6.0 / EXIF 2.3, tag 0x0112), and its inverse
_T = Image.Transpose
UPRIGHT = {
    1: None,
    2: _T.FLIP_LEFT_RIGHT,
    3: _T.ROTATE_180,
    4: _T.FLIP_TOP_BOTTOM,
    5: _T.TRANSPOSE,
    6: _T.ROTATE_270,
    7: _T.TRANSVERSE,
    8: _T.ROTATE_90,
}
INVERSE = {_T.ROTATE_270: _T.ROTATE_90, _T.ROTATE_90: _T.ROTATE_270}


def max_difference(a: Image.Image, b: Image.Image) -> int:
    assert a.size == b.size
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max())


def mean_difference(a: Image.Image, b: Image.Image) -> float:
    assert a.size == b.size
    return float(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).mean())


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_to_pixels_and_header(
    tmp_path: Path, quadrants: Image.Image, suffix: str, orientation: int
) -> None:
    turn = UPRIGHT[orientation]
    stored = quadrants if turn is None else quadrants.transpose(INVERSE.get(turn, turn))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"picture.{suffix}"
    options = {"jpg": {"quality": 95, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    stored.save(path, exif=exif, **options)

    image = read_image(path)

    assert mean_difference(image, quadrants) < 4
    assert read_size(path) == (32, 48)
    assert image.getexif().get(0x0112) is None


def test_transparency_is_composited_on_white(tmp_path: Path) -> None:
    rgba = np.zeros((4, 6, 4), np.uint8)
    rgba[..., 0] = 200
    rgba[:, 2:4, 3] = 128
    rgba[:, 4:, 3] = 255
    Image.fromarray(rgba).save(tmp_path / "a.png")
    pixels = np.asarray(read_image(tmp_path / "a.png"))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert np.abs(pixels[0, 2].astype(int) - [227, 127, 127]).max() <= 1
    assert pixels[0, 5].tolist() == [200, 0, 0]


def test_transparent_grey_and_palette_become_rgb_on_white(tmp_path: Path) -> None:
    grey = np.zeros((4, 4, 2), np.uint8)
    grey[..., 0] = 80
    grey[2:, :, 1] = 255
    Image.fromarray(grey).save(tmp_path / "la.png")
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 200, 30, 90, 90, 250])
    palette.paste(1, (0, 2, 4, 4))
    palette.save(tmp_path / "p.png", transparency=0)
    Image.new("P", (4, 4), 0).quantize().save(tmp_path / "opaque.png")

    la, p = np.asarray(read_image(tmp_path / "la.png")), np.asarray(read_image(tmp_path / "p.png"))

    assert la[0, 0].tolist() == [255] * 3
    assert la[3, 0].tolist() == [80] * 3
    assert p[0, 0].tolist() == [255] * 3
    assert p[3, 0].tolist() == [90, 90, 250]
    assert read_image(tmp_path / "opaque.png").mode == "RGB"


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "red.jpg", quality=100)
    red, green, blue = read_image(tmp_path / "red.jpg").getpixel((4, 4))
    assert red > 240
    assert green < 15
    assert blue < 15


def test_sixteen_bits_keep_their_brightness(tmp_path: Path) -> None:
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "grey.png")
    Image.fromarray(values).save(tmp_path / "grey.tif")
    for name in ("grey.png", "grey.tif"):
        assert np.asarray(read_image(tmp_path / name))[0, :, 0].tolist() == [0, 1, 128, 255]
    # 16 bits for each of three channels, written by hand: Pillow cannot
    _write_png(
        tmp_path / "rgb.png", 1, 1, bit_depth=16, colour_type=2, scanlines=b"\0" + struct.pack(">3H", 51400, 0, 65535)
    )
    assert read_image(tmp_path / "rgb.png").getpixel((0, 0)) == (200, 0, 255)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("F", (2, 2), 0.5), "floating-point"),
        (Image.new("I", (2, 2), 1 << 20), "32-bit pixels"),
        (Image.new("LAB", (2, 2)), "Lab colours"),
    ],
)
def test_pixels_of_unknown_meaning_are_refused(tmp_path: Path, image: Image.Image, expected: str) -> None:
    image.save(tmp_path / "f.tif")
    with pytest.raises(UserError, match=rf"f\.tif has {expected}"):
        read_image(tmp_path / "f.tif")


def _write_png(path: Path, width: int, height: int, bit_depth: int, colour_type: int, scanlines: bytes) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(scanlines)) + chunk(b"IEND", b"")
    )


def _swapped_profile() -> bytes:
    """An sRGB profile whose red and green primaries are exchanged: what it calls red is green."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack(">I", profile[128:132])[0]
    for tag in range(count):
        at = 132 + 12 * tag
        name = bytes(profile[at : at + 4])
        profile[at : at + 4] = {b"rXYZ": b"gXYZ", b"gXYZ": b"rXYZ"}.get(name, name)
    return bytes(profile).replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be"))


def test_colour_profile_is_converted_to_srgb(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "swapped.png", icc_profile=_swapped_profile())
    rgba = Image.new("RGBA", (4, 4), (255, 0, 0, 255))
    rgba.putpixel((0, 0), (255, 0, 0, 0))
    rgba.save(tmp_path / "alpha.png", icc_profile=_swapped_profile())

    image, with_alpha = read_image(tmp_path / "swapped.png"), read_image(tmp_path / "alpha.png")

    red, green, blue = image.getpixel((1, 1))
    assert (red < 10, green > 245, blue < 10) == (True, True, True)
    assert "icc_profile" not in image.info
    assert with_alpha.getpixel((0, 0)) == (255, 255, 255)
    assert with_alpha.getpixel((1, 1)) == (red, green, blue)


def test_srgb_profile_leaves_pixels_alone(tmp_path: Path, quadrants: Image.Image) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    quadrants.save(tmp_path / "a.png", icc_profile=profile)
    assert max_difference(read_image(tmp_path / "a.png"), quadrants) == 0


@pytest.mark.parametrize("profile", [b"not a profile", "grey"])
def test_unusable_profile_is_reported_and_ignored(
    tmp_path: Path, quadrants: Image.Image, profile: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    if profile == "grey":  # a profile of another colour model than the pixels
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    quadrants.save(tmp_path / "a.png", icc_profile=profile)
    assert max_difference(read_image(tmp_path / "a.png"), quadrants) == 0
    assert "colour profile cannot be applied" in caplog.text


def test_animation_gives_its_first_frame(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    for suffix in ("gif", "webp", "png"):
        first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=[second])
        red, green, blue = read_image(tmp_path / f"a.{suffix}").getpixel((4, 4))
        assert (red > 245, green < 10, blue < 10) == (True, True, True)


@pytest.mark.parametrize("kind", ["missing", "folder", "zero", "noise", "truncated", "text", "eps", "bad_crc"])
def test_unusable_file_is_named(tmp_path: Path, quadrants: Image.Image, kind: str) -> None:
    path = tmp_path / f"{kind}.png"
    quadrants.resize((200, 200)).save(tmp_path / "good.png")
    good = (tmp_path / "good.png").read_bytes()
    content = {
        "zero": b"",
        "noise": os.urandom(500),
        "truncated": good[: len(good) // 2],
        "text": b"<html>404 not found</html>",
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n",
        "bad_crc": good[:60] + bytes([good[60] ^ 0xFF]) + good[61:],
    }
    if kind == "folder":
        path.mkdir()
    elif kind in content:
        path.write_bytes(content[kind])
    with pytest.raises(UserError) as caught:
        read_image(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_huge_picture_is_refused_before_decoding(tmp_path: Path) -> None:
    side = int(MAX_PIXELS**0.5) + 2
    _write_png(tmp_path / "huge.png", side, side, bit_depth=8, colour_type=2, scanlines=b"")
    for read in (read_image, read_size):
        with pytest.raises(UserError, match=r"huge\.png has more than 178,956,970 pixels"):
            read(tmp_path / "huge.png")


def test_pixel_limit_holds_when_pillow_is_told_to_accept_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    _write_png(tmp_path / "huge.png", 20_000, 20_000, bit_depth=8, colour_type=2, scanlines=b"")
    with pytest.raises(UserError, match="more than"):
        read_image(tmp_path / "huge.png")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
@pytest.mark.parametrize("exif", [b"garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff garbage"])
def test_damaged_exif_does_not_lose_the_picture(tmp_path: Path, quadrants: Image.Image, name: str, exif: bytes) -> None:
    quadrants.save(tmp_path / name, exif=exif)
    assert read_image(tmp_path / name).size == (48, 32)
    assert read_size(tmp_path / name) == (32, 48)


def test_fixed_size_covers_and_crops_the_middle() -> None:
    # left and right quarters red, middle half blue: a square crop of the middle sees blue alone
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:] = (0, 0, 255)
    pixels[:, :28] = pixels[:, -28:] = (255, 0, 0)
    image = Image.fromarray(pixels)
    out = ImageCropAndResize(height=32, width=32).apply(image)
    assert out.size == (32, 32)
    assert np.asarray(out)[:, :, 0].max() < 30
    wide = ImageCropAndResize(height=16, width=96).apply(image)
    assert wide.size == (96, 16)
    assert np.asarray(wide)[8, 0].tolist() == [255, 0, 0]


def test_fixed_size_enlarges_a_small_picture_and_leaves_an_exact_one_alone(quadrants: Image.Image) -> None:
    assert ImageCropAndResize(height=64, width=64).apply(quadrants).size == (64, 64)
    exact = ImageCropAndResize(height=32, width=48).apply(quadrants)
    assert max_difference(exact, quadrants) == 0


def test_same_proportions_are_not_distorted(quadrants: Image.Image) -> None:
    out = ImageCropAndResize(height=64, width=96, center_crop=False).apply_random(quadrants, 0, torch.Generator())
    assert max_difference(out, quadrants.resize((96, 64), Image.Resampling.LANCZOS)) == 0


@pytest.mark.parametrize(
    ("size", "max_pixels", "expected"),
    [
        ((48, 32), None, (32, 48)),
        ((50, 39), None, (32, 48)),
        ((50, 39), 100 * 100, (32, 48)),
        ((200, 100), 5000, (48, 96)),
        ((1024, 1024), 512 * 512, (512, 512)),
        ((3000, 2000), 1024 * 1024, (832, 1248)),
        ((1000, 20), 10_000, (0, 0)),
    ],
)
def test_dynamic_size(size: tuple[int, int], max_pixels: int | None, expected: tuple[int, int]) -> None:
    operator = ImageCropAndResize(max_pixels=max_pixels, height_division_factor=16, width_division_factor=16)
    width, height = size
    if expected == (0, 0):
        with pytest.raises(UserError, match="height 20 and width 1000 cannot be cropped"):
            operator.output_size(height, width)
        return
    assert operator.output_size(height, width) == expected
    out = operator.apply(Image.new("RGB", size))
    assert (out.height, out.width) == expected
    assert max_pixels is None or out.height * out.width <= max_pixels


def test_dynamic_size_does_not_resample_small_pictures(quadrants: Image.Image) -> None:
    operator = ImageCropAndResize(max_pixels=10**6, height_division_factor=10, width_division_factor=10)
    assert max_difference(operator.apply(quadrants), quadrants.crop((4, 1, 44, 31))) == 0


def test_random_crop_reaches_all_of_the_picture() -> None:
    row = np.tile(np.arange(64, dtype=np.uint8), (16, 1))
    image = Image.fromarray(np.stack([row] * 3, axis=-1))
    operator = ImageCropAndResize(height=16, width=16, center_crop=False)
    lefts = set()
    for seed in range(300):
        out = np.asarray(operator.apply_random(image, 0, torch.Generator().manual_seed(seed)))
        assert out.shape == (16, 16, 3)
        lefts.add(int(out[0, 0, 0]))
    assert min(lefts) == 0
    assert max(lefts) == 48


def test_flip_mirrors_left_to_right(quadrants: Image.Image) -> None:
    assert RandomFlip().apply_random(quadrants, 0, None) is quadrants
    flipped = RandomFlip().apply_random(quadrants, 1, None)
    assert flipped.getpixel((0, 0)) == quadrants.getpixel((47, 0))
    assert flipped.getpixel((0, 31)) == quadrants.getpixel((47, 31))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 500, "width": 512}, "height 500 is not divisible by 16; the nearest that is: 496."),
        ({"height": 512, "width": 505}, "width 505 is not divisible by 16; the nearest that is: 512."),
        ({"height": 512, "width": 3}, "width 3 is not divisible by 16; the nearest that is: 16."),
        ({"height": 512, "width": 0}, "width must be at least 16, got 0."),
        ({"height": 512}, "height is given without width"),
        ({"width": 512}, "width is given without height"),
        ({"max_pixels": 100}, "max_pixels must be at least 256"),
    ],
)
def test_impossible_sizes_are_refused_at_once(options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError) as caught:
        default_image_operator(**options)
    assert message in str(caught.value)


def test_default_operator_without_a_folder_reads_from_the_working_directory(
    tmp_path: Path, quadrants: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    quadrants.save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    assert default_image_operator(height=32, width=48)("a.png").size == (48, 32)
    assert LoadImage()("a.png").size == (48, 32)
