"""Packed, listed or in an array, images stay the same; stats are those of NumPy.

Run: pytest tests/test_images_tools.py       (seconds; files are written to a temporary folder)
"""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from config import Config
from data import loader
from images import __main__ as prepare
from images.evaluation import evaluation_images
from images.sources import open_source

ROOT = Path(__file__).parent.parent


@pytest.fixture
def photos(tmp_path):
    """24 images of two classes and two formats, below tmp_path/photos."""
    rng = np.random.default_rng(0)
    for i in range(24):
        path = tmp_path / "photos" / ("cat", "dog")[i % 2] / f"{i}.{('jpg', 'png')[i % 3 == 0]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(256, size=(24 + i % 5, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels[:24] if i % 3 else pixels).save(path)
    return tmp_path / "photos"


def run(*words):
    prepare.main([str(word) for word in (*words, "data.workers=0")])


def tiny_config(root):
    cfg = Config(batch=8, steps=5)
    cfg.crops.global_size, cfg.crops.local_size, cfg.crops.local_count = 16, 8, 2
    cfg.vit.patch, cfg.data.workers, cfg.data.root = 4, 0, str(root)
    return cfg


def batches(root, *where):
    cfg = tiny_config(root)
    return list(loader(cfg, open_source(root, cfg), *where))


def equal(batches, expected):
    pairs = zip(batches, expected, strict=True)
    return all(torch.equal(x, y) for a, b in pairs for x, y in zip(a[:-1], b[:-1], strict=True))


def write_list(path, source):
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        for i in range(len(source)):
            rows.writerow([source.root / source.name(i), source.classes[source.label(i)]])
    return path


# ---- one set in many forms ----------------------------------------------------------------------


def test_shards_and_lists_give_the_same_batches_and_labels_as_the_folder(photos, tmp_path):
    source = open_source(photos, Config())
    run("pack", photos, f"to={tmp_path / 'shards'}", "per_shard=7")
    forms = [
        tmp_path / "shards",
        tmp_path / "shards" / "0000*.tar",
        write_list(tmp_path / "list.csv", source),
    ]
    for form in forms:
        other = open_source(form, Config())
        assert other.classes == source.classes == ["cat", "dog"]
        assert np.array_equal(other.labels, source.labels)
        assert equal(batches(form), batches(photos))


def test_arrays_give_the_same_batches_as_the_folder(photos, tmp_path):
    for file in photos.rglob("*.png"):  # an array holds images of one size
        file.unlink()
    source = open_source(photos, Config())
    x, y = np.stack([source.read(i) for i in range(len(source))]), np.asarray(source.labels)
    np.savez(tmp_path / "both.npz", images=x, labels=y)
    np.savez_compressed(tmp_path / "small.npz", labels=y, images=x)
    np.save(tmp_path / "images.npy", x)
    np.save(tmp_path / "images_labels.npy", y)
    for form in ["both.npz", "small.npz", "images.npy"]:
        other = open_source(tmp_path / form, Config())
        assert list(other.classes) == ["0", "1"] and np.array_equal(other.labels, y)
        assert equal(batches(tmp_path / form), batches(photos))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")  # on two cores
def test_shards_resume_exactly_with_two_ranks_and_three_workers(photos, tmp_path):
    run("pack", photos, f"to={tmp_path / 'shards'}", "per_shard=5")
    cfg = tiny_config(tmp_path / "shards")  # 24 images: an epoch is 3 steps
    source = open_source(cfg.data.root, cfg)
    for rank in range(2):
        whole = list(loader(cfg, source, 0, rank, 2))
        cfg.data.workers = 3
        assert equal(list(loader(cfg, source, 2, rank, 2)), whole[2:])
        cfg.data.workers = 0


def test_shards_are_evaluated_with_the_classes_of_the_folder(photos, tmp_path):
    run("pack", photos, f"to={tmp_path / 'shards'}")
    (photos / "cat").rename(photos / "_cat")  # sorts before dog, as cat does
    cfg = tiny_config(tmp_path / "shards")
    cfg.data.val = str(photos / "dog")
    (photos / "dog" / "dog").mkdir()
    for file in (photos / "dog").glob("*.*"):
        file.rename(photos / "dog" / "dog" / file.name)
    train, test = evaluation_images(cfg)
    assert {test.classes[test.label(i)] for i in range(len(test))} == {"dog"}
    assert test.classes == train.classes


# ---- pack ---------------------------------------------------------------------------------------


def test_pack_keeps_the_bytes_and_touches_nothing_that_is_there(photos, tmp_path, capsys):
    shards = tmp_path / "shards"
    run("pack", photos, f"to={shards}", "per_shard=10")
    assert sorted(p.name for p in shards.iterdir()) == ["000000.tar", "000001.tar", "000002.tar"]
    whole, packed = open_source(photos, Config()), open_source(shards, Config())
    assert all(whole.data(i) == packed.data(i) for i in range(24))
    with pytest.raises(SystemExit):
        run("pack", photos, f"to={shards}", "per_shard=10")
    assert "shards: is not empty; give a new folder" in capsys.readouterr().err


def test_names_of_classes_are_packed_whatever_they_are(photos, tmp_path):
    (photos / "cat").rename(photos / os.fsdecode(b"Stra\xdfe"))
    (photos / "dog").rename(photos / "Nan")  # in a list the word for no class
    run("pack", photos, f"to={tmp_path / 'shards'}")
    source = open_source(tmp_path / "shards", Config())
    assert source.classes == ["Nan", os.fsdecode(b"Stra\xdfe")] and min(source.labels) == 0


def test_pack_shrinks_large_images_and_leaves_out_damaged_ones(photos, tmp_path, capsys):
    (photos / "cat" / "0.png").write_text("not a picture")
    Image.new("RGB", (64, 32)).save(photos / "cat" / "2.jpg")
    run("pack", photos, f"to={tmp_path / 'shards'}", "short=26")
    said = capsys.readouterr()
    assert "23 of 24 images in" in said.out and "left out, damaged: cat/0.png" in said.err
    packed = open_source(tmp_path / "shards", Config())
    sizes = {packed.name(i).split("-")[0]: packed.read(i).shape for i in range(len(packed))}
    assert sizes["cat/2"] == (26, 52, 3)
    assert max(min(size[:2]) for size in sizes.values()) == 26


# ---- stats --------------------------------------------------------------------------------------


def test_stats_are_those_of_numpy(photos, tmp_path, capsys):
    source = open_source(photos, Config())
    pixels = [source.read(i).reshape(-1, 3) / 255 for i in range(24)]
    mean = np.mean([x.mean(0) for x in pixels], axis=0)
    std = np.sqrt(np.mean([(x**2).mean(0) for x in pixels], axis=0) - mean**2)
    (photos / "dog" / "999.jpg").write_bytes(b"")
    run("stats", photos)
    said = capsys.readouterr().out
    assert f"data.mean={np.round(mean, 4).tolist()} data.std={np.round(std, 4).tolist()}" in said
    assert "images    25 in" in said and "values    24 uint8\n" in said
    assert "shorter side 24 to 28 px" in said
    assert "damaged   1\n          dog/999.jpg: not a picture" in said


def test_stats_are_exact_where_values_lie_far_from_zero(tmp_path, capsys):
    values = (
        np.random.default_rng(0).random((4, 9, 8, 1)).astype(np.float32) + 5000
    )  # such as metres
    np.save(tmp_path / "x.npy", values)
    run("stats", tmp_path / "x.npy", "data.channels=1")
    said = capsys.readouterr().out
    assert f"data.std=[{values.std(dtype=np.float64):.4f}]" in said  # 0.29


def test_stats_name_what_is_damaged_or_left_out_and_whether_a_run_would_stop(photos, capsys):
    (photos / "film.mov").touch()
    for i in range(12):
        (photos / "dog" / f"x{i:02}.jpg").write_bytes(b"")
    run("stats", photos)
    said = capsys.readouterr().out
    assert "damaged   12\n          dog/x00.jpg: not a picture" in said and "dog/x11.jpg" in said
    assert "left out  1 .mov\n" in said
    assert "a run would stop" not in said  # 12 stop none
    for i in range(12, 21):
        (photos / "dog" / f"x{i:02}.jpg").write_bytes(b"")
    run("stats", photos)
    assert "a run would stop: that is more than data.max_damaged=0.01" in capsys.readouterr().out
    run("stats", photos, "data.max_damaged=0.9")
    assert "a run would stop" not in capsys.readouterr().out


def test_only_files_are_packed_and_only_pictures_of_eight_bits_shrunk(tmp_path, capsys):
    values = np.random.default_rng(0).integers(4096, size=(60, 60), dtype=np.uint16)
    (tmp_path / "photos").mkdir()
    Image.fromarray(values).save(tmp_path / "photos" / "0.png")
    words = "pack", tmp_path / "photos", f"to={tmp_path / 'shards'}", "data.channels=1"
    for more, message in [
        ((*words, "short=30"), "short= shrinks pictures of 8 bits only"),
        (("pack", "synthetic", f"to={tmp_path / 'shards'}"), "synthetic is one array already"),
    ]:
        with pytest.raises(SystemExit):
            run(*more)
        assert message in capsys.readouterr().err
    run(*words)
    cfg = Config()
    cfg.data.channels = 1
    assert np.array_equal(open_source(tmp_path / "shards", cfg).read(0)[:, :, 0], values)


def test_stats_of_a_sample_and_of_sixteen_bits(tmp_path, capsys):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", rng.integers(65536, size=(9, 8, 8, 5), dtype=np.uint16))
    run("stats", tmp_path / "x.npy", "limit=4", "data.channels=5")
    said = capsys.readouterr().out
    assert "4 uint16" in said and "data.channels=5" in said
    mean = eval(said.partition("data.mean=")[2].partition(" data.std")[0])
    assert np.allclose(mean, 0.5, atol=0.1)  # of 256 uniform values each: std of the mean is 0.02


# ---- the command line ---------------------------------------------------------------------------


def test_stats_and_show_say_what_is_there(photos, tmp_path, capsys):
    run("stats", photos)
    said = capsys.readouterr().out
    assert f"images    24 in {photos}\nclasses   2 of 12 to 12 images: cat 12, dog 12\n" in said
    (tmp_path / "all" / "val").mkdir(parents=True)
    (tmp_path / "all" / "train").symlink_to(photos)
    (photos / "cat" / "2.jpg").rename(photos / "2.jpg")
    run("stats", tmp_path / "all")
    said = capsys.readouterr().out
    assert f"images    24 in {tmp_path / 'all' / 'train'}\n" in said
    assert "1 images without a class" in said
    run("show", photos, f"to={tmp_path / 'crops.png'}")
    assert Image.open(tmp_path / "crops.png").width > 500


def test_names_in_any_encoding_are_printed(photos):
    (photos / "cat").rename(photos / os.fsdecode(b"Stra\xdfe"))
    words = [sys.executable, "-m", "images", "stats", str(photos)]
    strict = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=strict)
    assert done.returncode == 0 and r"Stra\udcdfe 12, dog 12" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("stats /no/such/folder", "/no/such/folder: no such folder or file"),
        ("look .", "unknown command look: use one of stats, pack, show"),
        ("pack synthetic", "pack: where to?"),
        ("pack synthetic to=x per_shard=0", "per_shard=0 must be at least 1"),
        ("stats synthetic limit=many", "limit must be a whole number"),
        ("stats synthetic data.chanels=3", "did you mean data.channels"),
    ],
)
def test_wrong_commands_are_one_line_and_exit_code_2(words, message, capsys):
    with pytest.raises(SystemExit) as left:
        prepare.main(words.split())
    said = capsys.readouterr().err
    assert left.value.code == 2 and message in said and len(said.splitlines()) == 1


def test_the_room_is_the_command():
    words = [sys.executable, "-m", "images", "-h"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "python -m images pack" in done.stdout
