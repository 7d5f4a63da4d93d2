"""One image or mask: odd and broken files, masks of any coding, to the network's square and back."""

from __future__ import annotations

import struct
import zlib

import cv2
import numpy as np
import pytest
import tifffile
from conftest import damaged_files, picture, save
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from skimage.transform import downscale_local_mean

import config
import image_files
import image_folders

# --------------------------------------------------------------------------------------- reading one file


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp"])
def test_lossless_formats_come_back_exactly(tmp_path, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(tmp_path / f"image.{suffix}", **options)
    read = image_files.read_image(path)
    assert read.dtype == np.uint8 and np.array_equal(read, picture())


@pytest.mark.parametrize("name", ["rgb.png", "grey.png", "palette.png", "rgb.jpg", "grey.jpg", "progressive.jpg"])
def test_fast_and_slow_path_agree(tmp_path, name):
    pixels = picture()[..., 0] if name.startswith("grey") else picture()
    path = save(tmp_path / name, pixels, **({"progressive": True} if name.startswith("prog") else {}))
    if name.startswith("palette"):
        Image.fromarray(pixels).quantize(200).save(path)
    data = path.read_bytes()
    assert (image_files._plain_png_size(data) or image_files._plain_jpeg_size(data)) == (48, 64), (
        "this file must take the fast path"
    )
    slow = image_files._decode(path, data, image_files._to_rgb, image_files._check_size)
    assert np.abs(image_files.read_image(path).astype(int) - slow).max() <= (0 if name.endswith("png") else 3)


def test_a_palette_png_with_colours_missing_is_read_or_refused_without_noise(tmp_path, capfd):
    Image.fromarray(picture()).quantize(200).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    at = data.index(b"PLTE") - 4
    size = struct.unpack(">I", data[at : at + 4])[0]
    short = b"PLTE" + data[at + 8 : at + 8 + 30]  # ten colours for two hundred indices
    chunk = struct.pack(">I", 30) + short + struct.pack(">I", zlib.crc32(short))
    for name, palette in (("short.png", chunk), ("none.png", b"")):
        (tmp_path / name).write_bytes(data[:at] + palette + data[at + 12 + size :])
        try:
            assert image_files.read_image(tmp_path / name).shape == (48, 64, 3)
        except image_files.ImageError as error:
            assert "damaged" in error.reason
    assert not capfd.readouterr().err


def test_a_gamma_chunk_changes_nothing(tmp_path):
    data = save(tmp_path / "plain.png").read_bytes()
    chunk = b"gAMA" + struct.pack(">I", 30000)
    extra = struct.pack(">I", 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path = tmp_path / "gamma.png"
    path.write_bytes(data[:33] + extra + data[33:])
    assert np.array_equal(image_files.read_image(path), picture())


def test_grey_palette_and_bilevel_become_rgb(tmp_path):
    grey = picture()[..., 0]
    assert np.array_equal(image_files.read_image(save(tmp_path / "grey.png", grey)), np.repeat(grey[..., None], 3, 2))
    Image.fromarray(picture()).quantize(32).save(tmp_path / "palette.png")
    expected = np.array(Image.fromarray(picture()).quantize(32).convert("RGB"))
    assert np.array_equal(image_files.read_image(tmp_path / "palette.png"), expected)
    Image.fromarray(grey > 100).save(tmp_path / "bilevel.png")
    assert np.array_equal(image_files.read_image(tmp_path / "bilevel.png")[..., 1], (grey > 100) * np.uint8(255))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_by_their_depth(tmp_path, suffix):
    deep = np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype(np.uint16)
    cv2.imwrite(str(tmp_path / f"deep.{suffix}"), deep)
    read = image_files.read_image(tmp_path / f"deep.{suffix}")
    assert np.abs(read[..., 0] - deep / 257.0).max() <= 0.5 + 1e-9 and read.max() == 255
    colour = np.stack([deep, deep[::-1], deep // 2], 2)
    cv2.imwrite(str(tmp_path / f"deep_colour.{suffix}"), colour[..., ::-1])
    assert np.abs(image_files.read_image(tmp_path / f"deep_colour.{suffix}") - colour / 257.0).max() <= 1.0


def test_float_tiff_is_read_in_the_unit_range_only(tmp_path):
    unit = np.linspace(0, 1, 32 * 32, dtype=np.float32).reshape(32, 32)
    Image.fromarray(unit).save(tmp_path / "unit.tif")
    assert np.abs(image_files.read_image(tmp_path / "unit.tif")[..., 0] - unit * 255).max() <= 0.51
    Image.fromarray(unit * 1000).save(tmp_path / "wild.tif")
    with pytest.raises(config.InputError, match=r"wild\.tif holds grey values from .*expected 0 to 1"):
        image_files.read_image(tmp_path / "wild.tif")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_grey_tiff_whose_zero_is_white_is_read_so(tmp_path, dtype):
    dark = np.linspace(0, np.iinfo(dtype).max // 4, 48 * 64).reshape(48, 64).astype(dtype)
    tifffile.imwrite(tmp_path / "dark.tif", np.iinfo(dtype).max - dark, photometric="miniswhite")
    assert (
        np.abs(image_files.read_image(tmp_path / "dark.tif")[..., 0] * (np.iinfo(dtype).max / 255) - dark).max()
        <= np.iinfo(dtype).max / 255
    )


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_planes_of_a_tiff_are_read_rightly_or_refused(tmp_path, dtype, compression):
    colour = picture().astype(dtype) * (np.iinfo(dtype).max // 255)
    tifffile.imwrite(
        tmp_path / "planes.tif",
        colour.transpose(2, 0, 1),
        photometric="rgb",
        planarconfig="separate",
        compression=compression,
    )
    if dtype is np.uint16 and not compression:
        with pytest.raises(
            config.InputError,
            match=r"planes\.tif holds uncompressed 16-bit colours in planes of their own; expected .*\.$",
        ):
            image_files.read_image(tmp_path / "planes.tif")
    else:
        assert (image_files.read_image(tmp_path / "planes.tif") == picture()).all()


def test_cmyk_is_converted(tmp_path):
    Image.fromarray(picture()).convert("CMYK").save(tmp_path / "print.jpg", quality=95)
    Image.fromarray(picture()).convert("CMYK").save(tmp_path / "print.tif")
    for name in ("print.jpg", "print.tif"):
        assert np.abs(image_files.read_image(tmp_path / name).astype(int) - picture()).mean() < 4


def test_alpha_is_laid_on_white(tmp_path):
    alpha = np.zeros((48, 64), np.uint8)
    alpha[:, :20], alpha[:, 20:40] = 255, 128
    path = save(tmp_path / "alpha.png", np.dstack([picture(), alpha]))
    expected = picture() * (alpha[..., None] / 255.0) + 255.0 * (1 - alpha[..., None] / 255.0)
    assert np.abs(image_files.read_image(path) - expected).max() <= 1.0
    Image.fromarray(np.array(picture())).save(tmp_path / "key.png", transparency=tuple(int(v) for v in picture()[0, 0]))
    assert image_files.read_image(tmp_path / "key.png")[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
@pytest.mark.parametrize(
    ("orientation", "turn"), [(3, lambda a: a[::-1, ::-1]), (6, lambda a: np.rot90(a, -1)), (2, lambda a: a[:, ::-1])]
)
def test_exif_orientation_is_applied(tmp_path, suffix, orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    Image.fromarray(picture()).save(path, exif=exif, **({"quality": 98} if suffix == "jpg" else {}))
    expected = turn(picture()).astype(int)
    read = image_files.read_image(path)
    assert read.shape == expected.shape and np.abs(read - expected).mean() < 3


def test_the_orientation_that_old_writers_keep_in_a_png_as_text_is_applied(tmp_path):
    exif, text = Image.Exif(), PngInfo()
    exif[0x0112] = 3
    text.add_text("Raw profile type exif", f"\nexif\n{len(exif.tobytes()):8d}\n{exif.tobytes().hex()}\n", zip=True)
    Image.fromarray(picture()).save(tmp_path / "turned.png", pnginfo=text)
    assert np.array_equal(image_files.read_image(tmp_path / "turned.png"), picture()[::-1, ::-1])


def test_unusable_files_name_file_and_reason(tmp_path, capfd):
    for name, reason in damaged_files(tmp_path).items():
        with pytest.raises(config.InputError) as caught:
            image_files.read_image(tmp_path / name)
        message = str(caught.value)
        assert name in message and reason in message and message.endswith(".") and "\n" not in message
    assert capfd.readouterr().err == "", "no decoder speaks for itself"
    for name in ("absent.png", "."):
        with pytest.raises(config.InputError, match="cannot be read"):
            image_files.read_image(tmp_path / name)


def test_a_bomb_in_another_format_is_refused_too(tmp_path):
    Image.new("1", (14000, 14000)).save(tmp_path / "bomb.tif", compression="group4")
    with pytest.raises(config.InputError, match=r"bomb\.tif is (too large|14000 x 14000 px); expected 89 megapixels"):
        image_files.read_image(tmp_path / "bomb.tif")


def test_the_limits_of_shape_are_inclusive(tmp_path):
    assert image_files.read_image(save(tmp_path / "a.png", np.zeros((8, 400, 3), np.uint8))).shape == (8, 400, 3)
    with pytest.raises(config.InputError):
        image_files.read_image(save(tmp_path / "b.png", np.zeros((8, 401, 3), np.uint8)))


@pytest.mark.parametrize(
    ("name", "format", "off"),
    [("a.jfif", "JPEG", 2), ("a.GIF", "GIF", 4), ("a.jp2", "JPEG2000", 0), ("a.avif", "AVIF", 3)],
)
def test_pictures_of_rarer_kinds_are_found_and_read(tmp_path, name, format, off):
    path = save(tmp_path / name, format=format)
    assert image_folders.files_under(tmp_path) == [path]
    assert np.abs(image_files.read_image(path) - picture().astype(float)).mean() <= off


@pytest.mark.parametrize(("name", "kind"), [("a.HEIC", "HEIC"), ("b.dng", "DNG"), ("c.Arw", "ARW"), ("d.heif", "HEIF")])
def test_pictures_of_kinds_that_are_not_read_are_found_and_refused(tmp_path, name, kind):
    path = save(tmp_path / name, format="TIFF")  # as the thumbnail in a raw photograph
    assert image_folders.find_images(tmp_path) == image_folders.find_images(str(tmp_path / "*")) == [path]
    assert image_folders.files_under(tmp_path) == []
    with pytest.raises(
        image_files.ImageError,
        match=f"{name} is a picture in {kind} format, which is not read; expected it exported as JPEG or PNG.",
    ):
        image_files.read_image(path)


@pytest.mark.parametrize("name", ["a b.png", 'it\'s "so".png', "деталь №5.png", "部品.png", "[x]*.png", "-n.png"])
def test_any_file_name(tmp_path, name):
    path = save(tmp_path / name)
    assert np.array_equal(image_files.read_image(path), picture())
    assert image_folders.find_images(tmp_path) == [path] and image_folders.find_images([str(path)]) == [path]


@pytest.mark.parametrize(
    ("values", "suffix", "expected"),
    [((0, 255), "png", 255), ((0, 1), "png", 1), ((0, 3), "png", 3), ((0, 255), "jpg", 255), ((0, 255), "bmp", 255)],
)
def test_masks_of_any_coding(tmp_path, values, suffix, expected):
    mask = np.full((32, 32), values[0], np.uint8)
    mask[8:16, 8:24] = values[1]
    read = image_files.read_mask(save(tmp_path / f"mask.{suffix}", mask))
    assert read.dtype == bool and np.array_equal(read, mask == expected)


@pytest.mark.parametrize("levels", [(100, 200), (127, 255), (60, 180, 255)])
def test_every_label_of_a_mask_counts_beside_brighter_ones_but_no_soft_rim_of_these(tmp_path, levels):
    labelled, rim = np.zeros((48, 48), np.uint8), np.zeros((48, 48), bool)
    for number, level in enumerate(levels):
        labelled[2 + 16 * number : 8 + 16 * number, 8:24] = level
    expected = labelled > 0
    labelled[-9, 30:40], rim[-8, 29:41] = 255, True
    expected |= labelled == 255
    labelled[rim] = 90
    labelled[40, 4] = 9  # noise
    assert np.array_equal(image_files.read_mask(save(tmp_path / "mask.png", labelled)), expected)


def test_what_a_jpeg_left_around_a_mask_is_no_label(tmp_path):
    mask = np.zeros((200, 200), np.uint8)
    cv2.circle(mask, (90, 90), 40, 255, -1)
    cv2.line(mask, (150, 20), (180, 180), 255, 3)
    for quality in (75, 50, 30, 15):
        blurred = cv2.imdecode(cv2.imencode(".jpg", mask, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], 0)
        read = image_files.read_mask(save(tmp_path / f"{quality}.png", blurred))
        assert cv2.connectedComponents(read.astype(np.uint8))[0] == 3, quality


def test_masks_of_fractions_and_in_the_alpha_channel_count(tmp_path):
    marked = np.zeros((32, 32), bool)
    marked[8:16, 8:24] = True
    drawn = np.dstack([np.full((32, 32, 3), 200, np.uint8), np.where(marked, 255, 0).astype(np.uint8)])
    assert np.array_equal(image_files.read_mask(save(tmp_path / "float.tif", marked * np.float32(0.9))), marked)
    assert np.array_equal(image_files.read_mask(save(tmp_path / "alpha.png", drawn)), marked)
    opaque = np.dstack([np.where(marked, 255, 0).astype(np.uint8)] * 3 + [np.full((32, 32), 255, np.uint8)])
    assert np.array_equal(image_files.read_mask(save(tmp_path / "opaque.png", opaque)), marked)
    assert not image_files.read_mask(save(tmp_path / "black.png", opaque * np.array([0, 0, 0, 1], np.uint8))).any()


def test_what_is_transparent_is_not_marked_whatever_its_colour(tmp_path):
    marked = np.zeros((32, 32), bool)
    marked[8:16, 8:24] = True
    grey, alpha = (
        np.where(marked, 200 + np.arange(32) % 56, 255).astype(np.uint8),
        np.where(marked, 255, 0).astype(np.uint8),
    )
    for name, pixels in (
        ("rgba", np.dstack([grey] * 3 + [alpha])),
        ("la", np.dstack([grey, alpha])),
        ("label", np.dstack([np.where(marked, 3, 255).astype(np.uint8)] * 3 + [alpha])),
    ):
        assert np.array_equal(image_files.read_mask(save(tmp_path / f"{name}.png", pixels)), marked), name
    palette = Image.fromarray(marked.astype(np.uint8))
    palette.putpalette([255, 255, 255, 255, 0, 0])
    palette.save(tmp_path / "palette.png", transparency=0)
    assert np.array_equal(image_files.read_mask(tmp_path / "palette.png"), marked)


def test_an_almost_black_jpeg_mask_is_empty(tmp_path):
    assert not image_files.read_mask(save(tmp_path / "mask.jpg", np.full((32, 32), 3, np.uint8))).any()


# ---------------------------------------------------------------------------- to the network's square, back


def test_shrinking_averages():
    image = np.random.default_rng(0).integers(0, 256, (128, 192, 3), dtype=np.uint8)
    expected = downscale_local_mean(image.astype(float), (2, 3, 1))
    assert np.abs(image_files.fit_image(image, 64, "stretch") - expected).max() <= 0.51


@pytest.mark.parametrize(
    ("shape", "box"), [((40, 80), (16, 48, 0, 64)), ((80, 40), (0, 64, 16, 48)), ((10, 20), (16, 48, 0, 64))]
)
def test_letterbox_keeps_the_aspect_and_fills_with_grey(shape, box):
    image = np.full((*shape, 3), 250, np.uint8)
    square = image_files.fit_image(image, 64, "letterbox")
    inside = np.zeros((64, 64), bool)
    inside[box[0] : box[1], box[2] : box[3]] = True
    assert (
        square.shape == (64, 64, 3)
        and (square[inside] == 250).all()
        and (square[~inside] == image_files.LETTERBOX_GREY).all()
    )
    mask = image_files.fit_mask(np.ones(shape, bool), 64, "letterbox")
    assert np.array_equal(mask, inside)


def test_shrinking_one_axis_and_enlarging_the_other():
    image = np.repeat(np.random.default_rng(0).integers(0, 256, (32, 256, 1), dtype=np.uint8), 3, 2)
    fitted = image_files.fit_image(image, 64, "stretch")
    expected = image.reshape(32, 64, 4, 3).astype(float).mean(2)
    assert np.abs(fitted.astype(float).mean((0, 1)) - expected.mean((0, 1))).max() < 1.5
    assert fitted.astype(float).std() < 0.8 * image.std(), "the long axis must be averaged, not sampled"


def test_mask_stays_binary_and_thin_defects_survive():
    mask = np.zeros((512, 512), bool)
    mask[100, 50:300] = True  # a scratch one pixel wide
    mask[400, 400] = True  # one pixel
    mask[203:297, 323:417] = True  # a block
    small = image_files.fit_mask(mask, 64, "stretch")
    assert small.dtype == bool and small.shape == (64, 64)
    assert small[100 // 8, 7:37].all() and small[50, 50]
    block = small[22:42, 38:56]
    assert abs(block.sum() * 64 - 94 * 94) < 0.1 * 94 * 94, "a block keeps its area"
    assert not image_files.fit_mask(np.zeros((512, 512), bool), 64, "stretch").any()
    assert image_files.fit_mask(mask, 1024, "stretch").sum() == 4 * mask.sum()


def test_a_pixel_that_a_mask_covers_by_half_counts():
    mask = np.zeros((8, 8), bool)
    mask[:, :3] = True
    assert image_files.fit_mask(mask, 4, "stretch").tolist() == [[True, True, False, False]] * 4


@pytest.mark.parametrize(("side", "wanted"), [(300, 448), (200, 384), (256, 448)])
def test_an_enlarged_mask_lies_where_its_image_does(side, wanted):
    rng = np.random.default_rng(0)
    shifts = []
    for _ in range(20):
        mask = np.zeros((side, side), np.uint8)
        cv2.circle(mask, rng.integers(20, side - 20, 2).tolist(), int(rng.integers(1, 5)), 1, -1)
        enlarged = image_files.fit_image(np.repeat(255 * mask[..., None], 3, 2), wanted, "stretch")[..., 0] > 127
        found = image_files.fit_mask(mask > 0, wanted, "stretch")
        shifts.append([np.argwhere(each).mean(0) for each in (found, enlarged)])
    assert np.abs(np.mean([found - expected for found, expected in shifts], 0)).max() < 0.15


@pytest.mark.parametrize("resize", ["stretch", "letterbox"])
@pytest.mark.parametrize("shape", [(100, 300), (300, 100), (40, 50)])
def test_a_map_goes_back_to_where_it_came_from(shape, resize):
    image = np.zeros((*shape, 3), np.uint8)
    cv2.circle(image, (shape[1] // 3, shape[0] // 4), min(shape) // 6, (255, 255, 255), -1)
    back = image_files.unfit_map(image_files.fit_image(image, 64, resize)[..., 0] / np.float32(255), shape, resize)
    assert back.shape == shape and back.dtype == np.float32
    truth = image[..., 0] > 127
    overlap = (truth & (back > 0.5)).sum() / (truth | (back > 0.5)).sum()
    assert overlap > 0.75
