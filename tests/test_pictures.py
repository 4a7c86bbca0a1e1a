"""Proves that each command draws what it says and where, and refuses bad input in one line.

Run: pytest tests/test_pictures.py        (helpers that run train.py are in tests/running.py)
"""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from running import ROOT, make_photos, run, tiny

from config import Config, to_dict
from images.sources import Arrays, open_source
from pictures import __main__ as visualize
from pictures import neighbours
from pictures.patches import patch_features
from pictures.plot import BLUE, GREEN
from vit import VisionTransformer


def write_teacher(folder, channels=3, registers=2):
    """A run folder with a random network of 6 blocks and 4 heads; its images are noise."""
    cfg = Config(device="cpu", precision="bf16", attention="varlen")  # a GPU's, here without one
    cfg.vit.size, cfg.vit.patch, cfg.vit.registers, cfg.crops.global_size = "nano", 8, registers, 16
    cfg.vit.init_std, cfg.vit.layerscale, cfg.data.workers = 0, 0.5, 0
    cfg.data.channels = channels
    cfg.data.mean, cfg.data.std = (0.5,) * channels, (0.25,) * channels
    net = VisionTransformer(
        "nano", 8, 16, channels=channels, registers=registers, init_std=0, layerscale=0.5
    )
    folder.mkdir(exist_ok=True)
    state = {"backbone": net.state_dict(), "config": to_dict(cfg), "step": 1}
    torch.save(state, folder / "teacher.pt")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run, a network for five channels, and pictures of several kinds."""
    folder = tmp_path_factory.mktemp("place")
    write_teacher(folder / "run")
    write_teacher(folder / "five", channels=5)
    rng = np.random.default_rng(0)
    for name, (height, width) in {"a.jpg": (64, 90), "b.png": (40, 24)}.items():
        pixels = rng.integers(256, size=(height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    np.save(folder / "five.npy", rng.integers(256, size=(24, 32, 5), dtype=np.uint8))
    (folder / "damaged.jpg").write_bytes((folder / "a.jpg").read_bytes()[:2000])
    (folder / "words.json").write_text("{}")
    np.save(folder / "bright.npy", np.linspace(0, 255, 3072, dtype=np.float32).reshape(32, 32, 3))
    np.save(folder / "nan.npy", np.full((32, 32, 3), np.nan, np.float32))
    return folder


@pytest.fixture
def draw(place, monkeypatch, capsys):
    """pictures/__main__.py, called in that folder; returns what it printed."""
    monkeypatch.chdir(place)

    def call(*words):
        visualize.main([str(word) for word in words])
        return capsys.readouterr().out

    return call


def test_pca_draws_images_and_colours_in_their_proportions(draw):
    assert draw("pca", "run", "a.jpg", "b.png") == "wrote run/pca.png\n"
    assert Image.open("run/pca.png").size == (498, 28 + 240 + 20 + 28 + 240 + 6)
    draw("pca", "run", "a.jpg", "b.png", "foreground=true", "shifts=1", "out=c.png")
    sheet = np.asarray(Image.open("c.png"))
    assert sheet.shape[0] == 562 + 268
    black = (sheet == 0).all(axis=-1)
    assert black[590:].sum() > 400 and not black[316:556].any()  # patches of the background are


def test_a_file_of_weights_serves_as_well_and_writes_here(draw):
    assert draw("pca", "run/teacher.pt", "a.jpg") == "wrote pca.png\n"


def test_attention_has_a_row_for_each_token_and_a_column_for_each_head(draw):
    assert draw("attention", "run", "a.jpg", "layer=0") == "wrote run/attention.png\n"
    width, height = Image.open("run/attention.png").size
    side = 216
    assert (width, height) == (6 + 6 * (side + 6), 3 * (28 + round(side * 64 / 90) + 20) + 6)
    draw("attention", "run", "a.jpg", "layer=-6", "shifts=2", "out=h.png")
    assert Image.open("h.png").size == (width, height)


def test_match_draws_pairs_and_a_field(draw):
    words = ("match", "run", "a.jpg", "b.png", "shifts=1")
    assert draw(*words) == "wrote run/match.png\n"
    whole = np.asarray(Image.open("run/match.png"))
    assert whole.shape == (2 * (28 + 480) + 6, 6 + 2 * 486, 3)
    draw(*words, "foreground=true", "out=m.png")
    black = (np.asarray(Image.open("m.png"))[536:] == 0).all(axis=-1)
    assert black.sum() > 1000 > (whole[536:] == 0).all(axis=-1).sum()


def test_the_field_of_a_moved_image_is_moved_too(draw, monkeypatch):
    """Each patch on the right has the colour of the place on the left that it came from."""
    one = torch.randn(6, 8, 16)
    maps = [one, one.roll((2, 3), (0, 1))]
    monkeypatch.setattr(visualize.Network, "features", lambda *_: maps)
    Image.new("RGB", (80, 60), "white").save("white.png")
    draw("match", "run", "white.png", "white.png", "out=m.png")
    sheet = np.asarray(Image.open("m.png")).astype(int)
    rows, columns = (((np.arange(n) + 0.5) * 60).astype(int) for n in (6, 8))
    left, right = (sheet[28 + 360 + 28 + rows[:, None], x + columns] for x in (6, 492))
    assert abs(np.roll(left, (2, 3), (0, 1)) - right).max() <= 1 and np.ptp(left) > 200


def test_neighbours_find_the_query_itself_first(draw, place):
    photos = make_photos(place / "photos")
    query = sorted(photos.glob("train/dark/*.png"))[3]
    said = draw("neighbours", "run", query, f"data={photos}")
    assert said == "wrote run/similar.png\n"  # the run's own neighbours.png stays as it is
    sheet = np.asarray(Image.open("run/similar.png"))
    assert sheet.shape[1] == 6 + 110 + 18 + 5 * 110
    assert (sheet[28:117, 6:110] == sheet[28:117, 134:238]).all()
    assert (sheet[28:117, 6:110] != sheet[28:117, 244:348]).any()


def green(sheet):
    """Pixels of the frames of images of the query's class."""
    return (abs(sheet.astype(int) - tuple(bytes.fromhex(GREEN[1:]))).max(axis=-1) < 3).sum()


def test_neighbours_before_and_after_are_framed_where_they_are_of_the_class(draw, place):
    photos = make_photos(place / "photos")
    draw("neighbours", "run", f"data={photos}", "out=n.png")  # held-out images ask
    sheet = np.asarray(Image.open("n.png"))
    assert sheet.shape == (28 + 6 * (90 + 20) + 6 * 6, 6 + 11 * 110 + 2 * 18, 3)  # 7 : 6 in all
    frame, most = 104 * 90 - 96 * 82, 6 * 2 * 5  # dark and light are told apart by anything
    assert green(sheet) % frame == 0 and most / 2 < green(sheet) / frame <= most
    bare = place / "bare"
    bare.mkdir(exist_ok=True)
    for i, file in enumerate(sorted(photos.glob("train/*/*.png"))[:8]):
        (bare / f"{i}.png").write_bytes(file.read_bytes())
    draw("neighbours", "run", f"data={bare}", "out=n.png")  # no classes: no frames
    assert green(np.asarray(Image.open("n.png"))) == 0


def test_images_of_one_class_are_not_framed(draw, place):
    folder = make_photos(place / "photos") / "train"
    (place / "album").mkdir(exist_ok=True)
    (folder / "dark").rename(place / "album" / "dark")
    draw("neighbours", "run", f"data={place / 'album'}", "out=n.png")
    (place / "album" / "dark").rename(folder / "dark")
    assert green(np.asarray(Image.open("n.png"))) == 0


@pytest.mark.parametrize("images", [1, 5, 6, 7, 12, 100])
def test_no_image_asks_twice_however_few_there_are(images):
    source = Arrays(np.zeros((images, 4, 4, 3)), [-1] * images, [], "x.npy")
    assert len(set(neighbours.spread(source, 6))) == min(images, 6)


def test_neighbours_of_arrays_have_classes_for_names_and_those_of_files_their_own(place):
    labelled = Arrays(np.zeros((2, 4, 4, 3)), [0, -1], ["dog", "cat"], "x.npy")
    files = open_source(make_photos(place / "photos"), Config())
    assert [neighbours.name_of(labelled, i) for i in (0, 1)] == ["dog", "x.npy[1]"]
    assert neighbours.name_of(files, 0) == files.name(0).split("/")[1]


def test_queries_of_8_and_of_16_bits_are_read_alike(place):
    pixels = np.random.default_rng(0).integers(256, size=(24, 24, 3), dtype=np.uint8)
    np.save(place / "deep.npy", pixels.astype(np.uint16) * 257)
    np.save(place / "flat.npy", pixels)
    network = visualize.Network(place / "run")
    flat, deep = place / "flat.npy", place / "deep.npy"
    pool, asking = (visualize.unlabelled(network, files) for files in ([flat], [flat, deep]))
    [[one], [same]], _ = neighbours.nearest(network.net, asking, pool, network.cfg)
    assert one[0] > 0.999 and same[0] > 0.999


def test_a_damaged_image_is_nobodys_neighbour_and_asks_for_none(place, monkeypatch):
    network = visualize.Network(place / "run")
    source = visualize.unlabelled(network, [str(place / n) for n in ("a.jpg", "b.png") * 3])

    def read(i, images=source.images):
        if i == 2:
            raise OSError("damaged")
        return images[i]

    monkeypatch.setattr(source, "read", read)
    assert 2 not in neighbours.spread(source, 6)
    found, searched = neighbours.nearest(network.net, source, source, network.cfg)
    assert searched == len(found) == 5 and all(len(pairs) == 5 for pairs in found)
    assert 2 not in [i for pairs in found for _, i in pairs]


def test_few_images_with_a_damaged_one_among_them_have_neighbours(draw, place):
    (place / "few").mkdir()
    for name in ("1.jpg", "3.jpg"):
        (place / "few" / name).write_bytes((place / "a.jpg").read_bytes())
    (place / "few" / "2.jpg").write_text("no picture")
    draw("neighbours", "run", f"data={place / 'few'}", "out=n.png")
    assert Image.open("n.png").size[0] == 6 + 110 + 2 * (18 + 2 * 110)  # two, by two networks


def test_images_of_five_channels_are_drawn(draw):
    for command in ("pca", "attention"):
        draw(command, "five", "five.npy", "shifts=1", "out=five.png")
    draw("match", "five", "five.npy", "five.npy", "out=five.png")


# ---- frames and their animation -----------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 5 steps with k-NN before steps 0, 2, 4 and at the end."""
    folder = tmp_path_factory.mktemp("trained")
    photos = make_photos(folder / "photos")
    words = tiny(folder / "run", photos, "steps=5", "log.knn_every=2", "log.pictures=true")
    done = run(folder, words)
    assert done.code == 0, done.err
    return folder


def frame(path):
    with np.load(path) as file:
        return dict(file)


def test_a_run_keeps_features_at_each_evaluation_and_at_the_end(trained):
    files = sorted((trained / "run" / "frames").iterdir())
    assert [file.name for file in files] == [f"000000{i}.npz" for i in (0, 2, 4, 5)]
    first, last = frame(files[0]), frame(files[-1])
    assert set(first) == {f"{k}_{i}" for k in ("image", "features") for i in range(4)}
    assert all((first[f"image_{i}"] == last[f"image_{i}"]).all() for i in range(4))
    assert (first["features_0"] != last["features_0"]).any()
    net = visualize.Network(trained / "run")  # the last frame is of the network that came out
    now = patch_features(net.net, last["image_1"], *net.norm)
    assert np.allclose(now, last["features_1"], atol=2e-2)


def test_the_animation_has_a_frame_for_each_and_shows_how_far_it_is(draw, trained):
    path = trained / "run" / "animation.gif"
    assert draw("animation", trained / "run") == f"wrote {path}\n"
    with Image.open(path) as gif:
        assert gif.n_frames == 4
        blue = []
        for i in range(4):
            gif.seek(i)
            row = np.asarray(gif.convert("RGB"))[3].astype(int)
            blue.append((abs(row - tuple(bytes.fromhex(BLUE[1:]))).max(axis=-1) < 60).sum())
    whole = blue[-1]
    assert np.allclose(np.array(blue) / whole, [0, 0.4, 0.8, 1], atol=0.02) and whole > 500


def test_a_run_without_pictures_keeps_no_frames(tmp_path):
    photos = make_photos(tmp_path / "photos")
    assert run(tmp_path, tiny(tmp_path / "run", photos, "steps=1")).code == 0
    assert not (tmp_path / "run" / "frames").exists()


@pytest.mark.slow
def test_two_ranks_with_sharded_weights_keep_the_frames_of_one(tmp_path):
    photos = make_photos(tmp_path / "photos")
    words = ["steps=2", "log.knn_every=1", "log.pictures=true"]
    assert run(tmp_path, tiny(tmp_path / "one", photos, *words)).code == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    launch += [str(ROOT / "train.py"), *tiny(tmp_path / "two", photos, *words, "parallel=fsdp")]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name in ("0000000.npz", "0000001.npz", "0000002.npz"):
        one, two = (frame(tmp_path / out / "frames" / name) for out in ("one", "two"))
        assert all(np.allclose(one[key], two[key], atol=1e-2) for key in one)


def test_the_first_picture_is_the_one_that_convinces():
    """Neighbours before and after training; PCA colours grow blurred while the network learns."""
    for page in ("README.md", "docs/pictures.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        first = text.partition("![")[2].partition("](")[2].partition(")")[0]
        assert first.endswith("neighbours.png"), page


def test_the_islands_of_the_readme_are_those_that_the_script_draws(tmp_path):
    script = ROOT / "scripts" / "draw_islands.py"
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, timeout=60)
    for name in ("islands_1.png", "islands_2.png"):
        new, old = (np.asarray(Image.open(p / name)).astype(int) for p in (tmp_path, ROOT / "docs"))
        assert abs(new - old).max() <= 2


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, part",
    [
        ("curves none", "none/log.jsonl: no such log"),
        ("curves", "write `python -m pictures curves RUN [RUN ...]`"),
        ("paint x", "paint: unknown picture; use one of curves, neighbours"),
        ("pca run", "write `python -m pictures pca RUN IMAGE ...`"),
        ("match run a.jpg", "write `python -m pictures match RUN IMAGE IMAGE`"),
        ("animation run", "run/frames: 0 frames; train with log.pictures=true"),
        ("pca none a.jpg", "none"),
        ("pca run none.jpg", "none.jpg: No such file or directory\n"),
        ("pca run damaged.jpg", "damaged.jpg: image file is truncated"),
        ("pca run words.json", "words.json: not a picture"),
        ("pca run five.npy", "five.npy: 5 channels"),
        ("pca run five.npy", "(the network reads 3)"),
        ("pca five a.jpg", "(the network reads 5)"),
        ("pca run bright.npy", "bright.npy: floats far from data.mean"),
        ("match run a.jpg nan.npy", "nan.npy: NaN or infinite pixels"),
        ("pca run a.jpg shifts=big", "shifts must be a whole number, got big"),
        ("pca run a.jpg shifts=-8", "shifts=-8 must be at least 0"),
        ("pca run a.jpg foreground=maybe", "foreground must be true or false, got maybe"),
        ("pca run a.jpg layer=1", "layer=1: unknown key layer"),
        ("pca run a.jpg out=no/where.png", "no/where.png: cannot be written"),
        ("pca run a.jpg out=here", "here: cannot be written (unknown file extension"),
        ("attention run a.jpg layer=6", "layer=6: the network has blocks 0 to 5"),
        ("attention run a.jpg layer=-7", "layer=-7: the network has blocks 0 to 5"),
        ("neighbours run a.jpg data=none", "none: no such folder or file"),
        ("neighbours run a.jpg", "data is empty: name the images to search"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(place, monkeypatch, capsys, words, part):
    monkeypatch.chdir(place)
    with pytest.raises(SystemExit) as left:
        visualize.main(words.split())
    said = capsys.readouterr().err
    assert left.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    assert part in said


def test_help_names_every_command_and_option(capsys):
    with pytest.raises(SystemExit) as left:
        visualize.main(["--help"])
    said = capsys.readouterr().out
    assert left.value.code == 0
    for command, (*_, options) in visualize.COMMANDS.items():
        assert f"python -m pictures {command} " in said
        assert all(f"\n  {option} " in said for option in options)


def test_the_command_line_draws_curves(draw, tmp_path):
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 0, "loss": 7.5}) + "\n")
    assert draw("curves", tmp_path) == f"wrote {tmp_path / 'curves.png'}\n"
    assert draw("curves", tmp_path, "out=c.png") == "wrote c.png\n"
