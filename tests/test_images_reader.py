"""Every kind of image becomes (H, W, C) with the values that the file holds, or raises.

Run: pytest tests/test_images_reader.py        (seconds; files are made in memory)
"""

import io
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from images.reader import read_image

SHAPE = 20, 16  # rows, columns


def picture(mode="RGB", width=6, height=4):
    pixels = np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def saved(image, kind, **more):
    file = io.BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()


def tiff(pixels, **more):
    file = io.BytesIO()
    pytest.importorskip("tifffile").imwrite(file, pixels, **more)
    return file.getvalue()


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def deep_png(pixels):
    """A PNG of 16 bits whose rows are stored as differences of neighbours (filter Sub)."""
    height, width, channels = pixels.shape
    rows = pixels.astype(">u2").reshape(height, -1).view(np.uint8)
    rows = np.hstack((rows[:, : 2 * channels], rows[:, 2 * channels :] - rows[:, : -2 * channels]))
    rows = np.hstack((np.ones((height, 1), np.uint8), rows))
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(rows.tobytes()))
    return b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b"")


def values(dtype, channels, largest=None):
    rng = np.random.default_rng(0)
    if dtype == np.float32:
        return rng.normal(size=(*SHAPE, channels)).astype(dtype)
    low, high = np.iinfo(dtype).min, largest or np.iinfo(dtype).max
    return rng.integers(low, high, size=(*SHAPE, channels), dtype=dtype)


# ---- pictures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "CMYK", "1"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_kind_of_picture_becomes_the_wanted_channels(mode, channels):
    pixels = read_image(saved(picture(mode), "JPEG" if mode == "CMYK" else "PNG"), channels)
    assert pixels.shape == (4, 6, channels) and pixels.dtype == np.uint8
    if mode == "L":
        assert np.array_equal(pixels[:, :, 0], np.asarray(picture("L")))
    if mode == "RGB" and channels == 3:
        assert np.array_equal(pixels, np.asarray(picture()))


@pytest.mark.parametrize("kind", ["AVIF", "BMP", "JPEG2000", "PCX", "PPM", "QOI", "TGA", "WEBP"])
def test_what_pillow_reads_is_read(kind):
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {kind}")
    lossless = {"AVIF": {"quality": 100}, "WEBP": {"lossless": True}}.get(kind, {})
    pixels = read_image(saved(picture(width=64, height=48), kind, **lossless))
    exact = np.asarray(picture(width=64, height=48), int)
    assert pixels.shape == (48, 64, 3) and np.abs(pixels - exact).mean() < (kind == "AVIF") * 60 + 1


def test_a_photograph_taken_sideways_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees to see it"
    expected = np.asarray(picture().rotate(-90, expand=True))
    assert np.array_equal(read_image(saved(picture(), "PNG", exif=exif)), expected)


FILM = {"save_all": True, "append_images": [picture("L")], "loop": 0, "duration": 9}
BOMB = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
DAMAGED = {
    "truncated": saved(picture(width=60, height=40), "JPEG")[:700],
    "empty": b"",
    "text": b"this is not a picture",
    "bomb": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", BOMB) + chunk(b"IDAT", b""),
    "film": saved(picture(), "GIF", **FILM),
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_files_raise(tmp_path, kind):
    (tmp_path / "x.jpg").write_bytes(DAMAGED[kind])
    with pytest.raises(Exception, match=r"truncated|not a picture|data\.max_pixels|2 frames"):
        read_image(tmp_path / "x.jpg")


@pytest.mark.parametrize("make", [lambda x: saved(Image.fromarray(x), "PNG"), tiff])
def test_a_large_picture_is_refused_until_the_key_allows_it(make):
    data = make(np.zeros((30, 40, 3), np.uint16 if make is tiff else np.uint8))
    with pytest.raises(ValueError, match=r"40 x 30 pixels .* data\.max_pixels=1199; raise it"):
        read_image(data, 3, max_pixels=1199)
    assert read_image(data, 3, 1200).shape == read_image(data, 3, 0).shape == (30, 40, 3)


# ---- more bits, more bands ----------------------------------------------------------------------


def test_grey_of_sixteen_bits_keeps_them_and_becomes_three_channels():
    grey = values(np.uint16, 1)
    for data in (deep_png(grey), b"P5 16 20 65535\n" + grey.astype(">u2").tobytes()):
        assert np.array_equal(read_image(data, 1), grey)
        assert np.array_equal(read_image(data, 3), np.broadcast_to(grey, (*SHAPE, 3)))


def jpeg2000(bits):
    """The first bytes of a JPEG 2000 say how many bits its colours have."""
    data = saved(picture(width=64, height=48), "JPEG2000", no_jp2=True)
    return data[:42] + bytes([bits - 1]) + data[43:]


@pytest.mark.parametrize(
    "data",
    [
        *(deep_png(values(np.uint16, channels)) for channels in (2, 3, 4)),
        b"P6 1 1 65535\n" + bytes(6),
        b"P3 1 1 1023\n0 0 1023\n",
        jpeg2000(12),
    ],
)
def test_colours_that_would_be_rounded_are_refused(data):
    with pytest.raises(ValueError, match=r"colours of more than 8 bits; save it as TIFF or \.npy"):
        read_image(data)
    assert read_image(b"P3 1 1 99\n0 0 99\n").tolist() == [[[0, 0, 255]]]  # fewer are no loss
    assert read_image(jpeg2000(8)).shape == (48, 64, 3)


RGBX = {"photometric": "rgb", "extrasamples": ["unspecified"]}
GREY = {"photometric": "minisblack", "planarconfig": "contig"}
PLANES = {"photometric": "rgb", "planarconfig": "separate"}


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 12])
def test_a_tiff_gives_all_bands_and_values(dtype, channels):
    pixels = values(dtype, channels)
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    forms = [tiff(planes, photometric="minisblack")]
    forms += [tiff(pixels, **GREY)] if channels > 1 else []
    forms += [tiff(pixels, **RGBX)] if channels == 4 else []
    forms += [tiff(pixels, photometric="rgb"), tiff(planes, **PLANES)] if channels == 3 else []
    for data in forms:
        read = read_image(data, channels)
        assert read.dtype == dtype and np.array_equal(read, pixels)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(
    "more",
    [{"photometric": "separated"}, *({"photometric": "rgb", "extrasamples": [kind]}
                                     for kind in ("unspecified", "unassalpha", "assocalpha"))],
)  # fmt: skip
def test_the_fourth_band_stays_whatever_a_tiff_calls_it(dtype, more):
    pixels = values(dtype, 4)
    assert np.array_equal(read_image(tiff(pixels, **more), 4), pixels)


def test_bands_are_neither_made_up_nor_dropped():
    rows = {"photometric": "minisblack"}  # without a word on where bands are: H pages of W x C
    for pixels, more, wanted in [(4, RGBX, 3), (3, {}, 4), (12, GREY, 3), (3, {}, 5), (4, rows, 3)]:
        with pytest.raises(ValueError, match=f"{pixels} channels, but data.channels={wanted}: set"):
            read_image(tiff(values(np.uint8, pixels), **more), wanted)


def test_values_without_a_place_are_named_with_their_range():
    with pytest.raises(ValueError, match=r"int8 values from -\d+ to \d+; save them as uint8"):
        read_image(tiff(values(np.int8, 1)[:, :, 0]), 1)
    with pytest.raises(ValueError, match="2 pages in one file"):
        read_image(tiff(np.zeros((2, 8, 9, 3), np.uint8), photometric="rgb"))
    with pytest.raises(ValueError, match="another kind of colours; save it as RGB"):
        read_image(saved(Image.new("LAB", (5, 5)), "TIFF"))
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="NaN or infinite pixels"):
            read_image(tiff(np.full(SHAPE, bad, np.float32)), 1)


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3), (4, 5, 6, 3), (3,)])
def test_an_array_that_is_no_image_is_damage(shape):
    file = io.BytesIO()
    np.save(file, np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match=r"one image .* is expected"):
        read_image(file.getvalue())


def test_where_zero_is_white_it_is_turned_round():
    pixels = values(np.uint16, 1)
    read = read_image(tiff(pixels[:, :, 0], photometric="miniswhite"), 1)
    assert np.array_equal(read, 65535 - pixels)


def test_without_tifffile_the_error_says_what_to_install(monkeypatch):
    data = tiff(values(np.uint16, 3))
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ValueError, match="needs: pip install tifffile"):
        read_image(data)
