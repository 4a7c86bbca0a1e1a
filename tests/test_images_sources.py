"""Every kind of image becomes uint8 (H, W, C), any folder is a source, damage raises.

Run: pytest tests/test_images_sources.py       (seconds; files are written to a temporary folder)
"""

import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from config import Config, UserError
from images import sources
from images.sources import open_source, read_image


def picture(mode="RGB", width=6, height=4):
    pixels = np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def small_folder(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture().save(root / name)
    return root


def names_of(source):
    return [source.name(i) for i in range(len(source))]


# ---- one image ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "CMYK", "1", "I;16"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_kind_of_pixel_becomes_the_wanted_channels(tmp_path, mode, channels):
    file = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image = picture("L") if mode == "I;16" else picture(mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) << 8)
    image.save(file)
    pixels = read_image(file, channels)
    assert pixels.shape == (4, 6, channels) and pixels.dtype == np.uint8
    if mode in ("L", "I;16"):
        assert np.array_equal(pixels[:, :, 0], np.asarray(picture("L")))
    if mode == "RGB" and channels == 3:
        assert np.array_equal(pixels, np.asarray(picture()))


def test_a_photograph_taken_sideways_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees to see it"
    picture().save(tmp_path / "x.png", exif=exif)
    expected = np.asarray(picture().rotate(-90, expand=True))
    assert np.array_equal(read_image(tmp_path / "x.png"), expected)


def png_header(width, height):
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    )
    return data + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


def damaged_files(tmp_path):
    picture(width=60, height=40).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    picture().save(
        tmp_path / "film.gif", save_all=True, append_images=[picture("L")], loop=0, duration=9
    )
    return {
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"this is not a picture",
        "bomb": png_header(20_000, 20_000),
        "film": (tmp_path / "film.gif").read_bytes(),
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
    }


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "bomb", "film", "postscript"])
def test_damaged_files_raise(tmp_path, kind):
    (tmp_path / "x.jpg").write_bytes(damaged_files(tmp_path)[kind])
    with pytest.raises(Exception, match=r"truncated|not a picture|exceeds limit|2 frames"):
        read_image(tmp_path / "x.jpg")


# ---- folders ------------------------------------------------------------------------------------


def test_labels_are_the_first_level_of_sub_folders(tmp_path):
    source = open_source(
        small_folder(tmp_path, "dog/1.jpg", "cat/deep/2.PNG", "cat/1.webp"), Config()
    )
    assert names_of(source) == ["cat/1.webp", "cat/deep/2.PNG", "dog/1.jpg"]
    assert source.classes == ["cat", "dog"]
    assert [source.label(i) for i in range(3)] == [0, 0, 1]
    assert source.read(1).shape == (4, 6, 3)


def test_a_flat_folder_has_no_labels(tmp_path):
    source = open_source(small_folder(tmp_path, "b.jpg", "a.jpg", ".hidden.jpg"), Config())
    assert names_of(source) == ["a.jpg", "b.jpg"]
    assert source.classes == [] and source.label(0) == -1


def test_names_need_not_be_ascii(tmp_path):
    source = open_source(small_folder(tmp_path, "Übung/été 1.jpg"), Config())
    assert names_of(source) == ["Übung/été 1.jpg"]
    assert source.read(0).shape == (4, 6, 3)


def test_a_loop_of_links_ends(tmp_path):
    small_folder(tmp_path, "a/1.jpg", "b/2.jpg")
    (tmp_path / "a" / "up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "c").symlink_to(tmp_path / "nowhere")
    assert names_of(open_source(tmp_path, Config())) == ["a/1.jpg", "b/2.jpg"]


def test_a_missing_or_empty_folder_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"data\.root=.*missing: no such folder or file; give a"):
        open_source(tmp_path / "missing", Config())
    with pytest.raises(UserError, match=r"no images in this folder or below; looked for \.jpg"):
        open_source(tmp_path, Config())
    (tmp_path / "a.jpg").touch()
    with pytest.raises(UserError, match=r"a\.jpg: one file of another kind; give a"):
        open_source(tmp_path / "a.jpg", Config())
    with pytest.raises(UserError, match=r"data\.root is empty"):
        open_source("", Config())


# ---- more than 8 bits, more than 3 channels -----------------------------------------------------


def many_channels(root, channels=5, dtype=np.uint8, count=4):
    rng = np.random.default_rng(0)
    images = rng.integers(np.iinfo(dtype).max + 1, size=(count, 12, 10, channels), dtype=dtype)
    for i, image in enumerate(images):
        np.save(root / f"{i}.npy", image)
    return images


def config_for(channels):
    cfg = Config()
    cfg.data.channels, cfg.data.mean, cfg.data.std = channels, (0.5,) * channels, (0.5,) * channels
    return cfg


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_files_of_five_channels_are_read_as_they_are(tmp_path, dtype):
    images = many_channels(tmp_path, 5, dtype)
    source = open_source(tmp_path, config_for(5))
    assert source.dtype == dtype
    assert all(np.array_equal(source.read(i), images[i]) for i in range(4))


def test_tiff_files_of_five_bands_are_read(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    image = many_channels(tmp_path, 5, np.uint16, count=1)[0]
    tifffile.imwrite(tmp_path / "0.tif", image.transpose(2, 0, 1))
    (tmp_path / "0.npy").unlink()
    assert np.array_equal(open_source(tmp_path, config_for(5)).read(0), image)


def test_sixteen_bit_pictures_keep_their_bits(tmp_path):
    values = np.arange(24, dtype=np.uint16).reshape(4, 6) * 2500
    Image.fromarray(values).save(tmp_path / "1.png")
    picture("L").save(tmp_path / "2.png")
    source = open_source(tmp_path, config_for(1))
    assert np.array_equal(source.read(0)[:, :, 0], values)
    assert np.array_equal(source.read(1)[:, :, 0] // 257, np.asarray(picture("L")))  # one kind


def test_a_mapped_array_is_not_copied_to_the_workers(tmp_path):
    images = np.zeros((100, 20, 20, 3), np.uint8)
    images[7] = 7
    np.save(tmp_path / "x.npy", images)
    source = open_source(tmp_path / "x.npy", Config())
    sent = pickle.dumps(source)
    assert len(sent) < 2000 and np.array_equal(pickle.loads(sent).read(7), images[7])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((4, 3, 8, 8), np.uint8)}, r"channels come last, save it as .*transpose"),
        ({"x": np.zeros((4, 8, 8, 5), np.uint8)}, r"5 channels .* but data\.channels=3: set data"),
        ({"x": np.zeros((4, 8, 8, 3)), "y": np.zeros(3, int)}, "4 images but 3 labels"),
        (
            {"a": np.zeros((4, 8, 8, 3)), "b": np.zeros((4, 8, 8, 3))},
            "expected one array of images",
        ),
        ({"y": np.zeros(3, int)}, "expected one array of images"),
        ({"x": np.zeros((0, 8, 8, 3))}, "0 images of float64"),
    ],
)
def test_an_array_that_cannot_be_used_is_one_line(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=message) as error:
        open_source(tmp_path / "x.npz", Config())
    assert "\n" not in str(error.value)


def test_files_of_other_channels_are_one_line(tmp_path):
    many_channels(tmp_path, 5)
    with pytest.raises(UserError, match=r"5 channels, but data\.channels=3"):
        open_source(tmp_path, Config())
    with pytest.raises(UserError, match=r"RGB picture, but data\.channels=5"):
        open_source(small_folder(tmp_path / "rgb", "a.jpg"), config_for(5))


def test_an_unreadable_array_or_an_empty_list_is_one_line(tmp_path):
    (tmp_path / "x.npy").write_text("not an array")
    (tmp_path / "x.npz").write_text("not an archive")
    (tmp_path / "x.csv").write_text("path,label\n")
    for name, message in [
        ("x.npy", "not a readable"),
        ("x.npz", "not a readable"),
        ("x.csv", "no im"),
    ]:
        with pytest.raises(UserError, match=message):
            open_source(tmp_path / name, Config())


# ---- embedded -----------------------------------------------------------------------------------


def test_the_embedded_set_is_a_source_with_labels(monkeypatch):
    monkeypatch.setitem(sources.SYNTHETIC_IMAGES, "test", 48)
    monkeypatch.setattr(sources, "open_synthetic", sources.open_synthetic.__wrapped__)  # not cached
    cfg = Config()
    source = open_source("synthetic", cfg, "test")
    assert source.read(5).dtype == np.uint8 and source.read(5).shape[2] == 3
    assert {source.label(i) for i in range(len(source))} == set(range(len(source.classes)))
    cfg.data.channels = 1
    with pytest.raises(UserError, match=r"but data\.channels=1: set data\.channels=3"):
        open_source("synthetic", cfg, "test")
