"""A folder, a list, shards and arrays are sources, with the values and labels that they hold.

Run: pytest tests/test_images_sources.py       (seconds; files are written to a temporary folder)
"""

import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from config import Config, UserError
from images import sources
from images.sources import open_source


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
    (tmp_path / "1.HEIC").touch()
    with pytest.raises(UserError, match=r"no images in it; left out: 1 \.heic \(pip install"):
        open_source(tmp_path, Config())
    (tmp_path / "a.jpg").touch()
    with pytest.raises(UserError, match=r"a\.jpg: one file of another kind; give a"):
        open_source(tmp_path / "a.jpg", Config())
    with pytest.raises(UserError, match=r"data\.root is empty"):
        open_source("", Config())


def write_tar(path, folder):
    with tarfile.open(path, "w") as tar:
        for file in sorted(folder.iterdir()):
            tar.add(file, file.name)


def test_pictures_and_shards_in_one_folder_are_refused(tmp_path):
    small_folder(tmp_path / "photos", "a/1.png", "a/2.png")
    write_tar(tmp_path / "photos" / "old.tar", tmp_path / "photos" / "a")
    with pytest.raises(UserError, match=r"holds both pictures and shards; move the others away"):
        open_source(tmp_path / "photos", Config())
    assert len(open_source(tmp_path / "photos" / "*.tar", Config())) == 2


def test_shards_of_several_splits_in_one_folder_are_told(tmp_path, capsys):
    photos, shards = small_folder(tmp_path / "photos", "1.png"), tmp_path / "shards"
    shards.mkdir()
    for name in ("my-train-0", "my-train-1", "my-val-0"):
        write_tar(shards / f"{name}.tar", photos)
    assert len(open_source(shards / "my-train-*.tar", Config())) == 2
    assert not capsys.readouterr().err
    open_source(shards, Config())
    assert "shards of several splits; to use some" in capsys.readouterr().err


def test_shards_that_are_not_there_are_one_line_with_the_way_to_name_several(tmp_path):
    for name in ("a-{00..11}.tar", "b-*.tar", "c.tar"):
        with pytest.raises(UserError, match=r"no such folder or file; .* 'some/train-\*\.tar'"):
            open_source(tmp_path / name, Config())


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
    with pytest.raises(ValueError, match=r"uint8 values .* the first image has uint16: save all"):
        source.read(1)


def test_images_of_other_values_than_the_first_are_named_with_their_range(tmp_path):
    picture("L").save(tmp_path / "1.png")
    Image.fromarray(np.array([[7, 4095]], np.uint16)).save(tmp_path / "2.png")
    np.save(tmp_path / "3.npy", np.zeros((2, 2, 1)))
    source = open_source(tmp_path, config_for(1))
    assert source.read(0).dtype == np.uint8
    for i, kind in [(1, "uint16 values from 7 to 4095"), (2, "float32 values from 0.0 to 0.0")]:
        with pytest.raises(ValueError, match=f"{kind}, but the first image has uint8: save all"):
            source.read(i)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_no_numbers_are_damage(tmp_path, bad):
    images = np.full((3, 8, 8, 3), 0.5)
    images[1, 2, 2, 0] = bad
    np.save(tmp_path / "all.npy", images)
    (tmp_path / "each").mkdir()
    for i, image in enumerate(images):
        np.save(tmp_path / "each" / f"{i}.npy", image)
    for name in ("all.npy", "each"):
        source = open_source(tmp_path / name, Config())
        assert source.read(0).dtype == np.float32
        with pytest.raises(ValueError, match="NaN or infinite pixels"):
            source.read(1)
        assert "NaN or infinite" in sources.read_or_next(source, 1)[2][0]


def test_colours_out_of_range_are_warned_of(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.linspace(0, 255, 4 * 8 * 8 * 3).reshape(4, 8, 8, 3))
    cfg = Config()
    open_source(tmp_path / "x.npy", cfg)
    assert "x.npy: values from 0 to 63.5" in capsys.readouterr().err
    cfg.augment.jitter, cfg.augment.solarize = 0, (0, 0, 0)
    open_source(tmp_path / "x.npy", cfg)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("labels", "classes", "numbers"),
    [
        (np.array(["b", "a", "nan", ""]), ["a", "b"], [1, 0, -1, -1]),
        (np.array([b"b", b"a", b"a", b"c"]), ["a", "b", "c"], [1, 0, 0, 2]),
        (np.array([[10], [9], [-1], [9]]), ["9", "10"], [1, 0, -1, 0]),
        (np.array([3, 3, 200, 0], np.uint8), ["0", "3", "200"], [1, 1, 2, 0]),
        (np.array([True, False, True, True]), ["False", "True"], [1, 0, 1, 1]),
    ],
)
def test_labels_of_every_kind_are_understood(tmp_path, labels, classes, numbers):
    images = np.zeros((4, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "y.npz", labels=labels, images=images)
    np.save(tmp_path / "z.npy", images)
    np.save(tmp_path / "z_labels.npy", labels)
    for name in ("y.npz", "z.npy"):
        source = open_source(tmp_path / name, Config())
        assert source.classes == classes and source.labels.tolist() == numbers


FOUR = np.zeros((4, 8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": FOUR.transpose(0, 3, 1, 2)}, r"channels come last: save it as .*transpose"),
        ({"images": FOUR[..., :2]}, r"2\): 2 channels, but data\.channels=3: set data"),
        ({"images": np.zeros((9, 8, 3))}, r"\(9, 8, 3, 1\): 1 channels, but"),
        ({"images": FOUR, "labels": np.zeros(3, int)}, r"labels int64 \(3,\); give each image one"),
        ({"images": FOUR, "labels": np.eye(4)}, r"labels float64 \(4, 4\); give each image one"),
        ({"images": FOUR, "labels": np.ones(4)}, "one whole number or word"),
        ({"images": FOUR, "labels": np.zeros((2, 2), int)}, "one whole number or word"),
        ({"images": FOUR, "labels": np.array(["a"] * 4, object)}, r"\.astype\(str\)"),
        ({"images": FOUR, "y": np.zeros(4)}, "holds images .* y .* expected `images` .* `labels`"),
        ({"x": FOUR}, r"holds x uint8 \(4, 8, 8, 3\); expected `images`"),
        ({}, "holds nothing; expected `images`"),
        ({"images": FOUR[:0]}, "holds images uint8 .0, 8, 8, 3.; expected `images`"),
        ({"images": FOUR.astype(int)}, "holds images int64 .* expected `images` .* of uint8"),
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
    with pytest.raises(UserError, match=r"a\.jpg: 3 channels, but data\.channels=5: set"):
        open_source(small_folder(tmp_path / "rgb", "a.jpg"), config_for(5))


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_worker_is_sent_the_place_of_a_mapped_array(tmp_path, order):
    images = np.random.default_rng(0).integers(256, size=(50, 9, 8, 3), dtype=np.uint8)
    np.save(tmp_path / "x.npy", np.asarray(images, order=order))
    sent = pickle.dumps(open_source(tmp_path / "x.npy", Config()))
    assert len(sent) < 2000 and np.array_equal(pickle.loads(sent).read(7), images[7])


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


def test_the_embedded_set_is_a_source_with_labels():
    cfg = Config()
    cfg.data.synthetic_images = 192  # a fourth of it held out
    source = open_source("synthetic", cfg, "test")
    assert source.read(5).dtype == np.uint8 and source.read(5).shape[2] == 3
    assert {source.label(i) for i in range(len(source))} == set(range(len(source.classes)))
    cfg.data.channels = 1
    with pytest.raises(UserError, match=r"but data\.channels=1: set data\.channels=3"):
        open_source("synthetic", cfg, "test")
