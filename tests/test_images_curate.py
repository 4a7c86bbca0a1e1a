"""Near-copies go, the like of the curated images stays, and why is told.

Run: pytest tests/test_images_curate.py        (seconds; the figures on photographs: docs/curate.md)
"""

import csv
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from config import Config, to_dict
from images import copies, curate
from images.sources import open_source
from vit import build_backbone


def photo(seed, size=64):
    """Something with coarse and fine parts, as photographs have."""
    rng = np.random.default_rng(seed)
    layers = [
        np.asarray(
            Image.fromarray(rng.integers(256, size=(n, n, 3), dtype=np.uint8)).resize(
                (size, size), Image.Resampling.BICUBIC
            ),
            dtype=np.float32,
        )
        for n in (4, 8, 16, 32)
    ]
    return Image.fromarray(np.mean(layers, axis=0).astype(np.uint8))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """An untrained one: the tests are about what is done with its features."""
    cfg = Config()
    cfg.vit.size, cfg.vit.patch, cfg.crops.global_size, cfg.vit.init_std = "nano", 8, 32, 0
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("backbone") / "teacher.pt"
    state = build_backbone(cfg).state_dict()
    torch.save({"backbone": state, "config": to_dict(cfg), "step": 0}, path)
    return path


@pytest.fixture
def pool(tmp_path):
    """Twelve photographs, three near-copies of the first ones, and a damaged file."""
    folder = tmp_path / "pool"
    folder.mkdir()
    for i in range(12):
        photo(i).save(folder / f"a{i:02}.png")
    photo(0).crop((6, 4, 60, 58)).resize((64, 64)).save(folder / "crop.png")
    photo(1).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "flip.png")
    photo(2).save(folder / "jpeg.jpg", quality=30)
    (folder / "zero.jpg").write_bytes(b"")
    return folder


def command(pool, backbone, *words):
    out = pool.parent / "out"
    curate.main([str(pool), f"backbone={backbone}", f"out={out}", "threshold=-1", "device=cpu",
                 *words])  # fmt: skip
    with open(out / "why.csv", newline="") as file:
        fates = {row["path"]: row for row in csv.DictReader(file)}
    return fates, out


def kept(fates):
    return {name for name, row in fates.items() if row["fate"] == "kept"}


# ---- parts --------------------------------------------------------------------------------------


def test_groups_are_what_pairs_hold_together():
    assert copies.components(7, [(1, 2), (5, 6), (2, 4)]).tolist() == [0, 1, 1, 3, 1, 5, 5]
    chain = [(i + 1, i) for i in reversed(range(4999))]
    assert not copies.components(5000, chain).any()


def thumbs(*images):
    return np.stack([np.asarray(image.resize((copies.S, copies.S))) for image in images])


@pytest.mark.parametrize("side", [1.0, 0.95, 0.85, 0.75])
@pytest.mark.parametrize("flip", [False, True])
def test_a_part_is_seen_in_the_whole_wherever_it_was_cut(side, flip):
    whole, n = photo(3, 128), round(128 * side)
    part = whole.crop((128 - n, (128 - n) // 3, 128, (128 - n) // 3 + n))
    part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else part
    score = copies.likeness(thumbs(whole), thumbs(part, photo(4)), torch.tensor([[0, 0], [0, 1]]))
    # The true box lies at most half a step of 4 % beside one that is tried.
    assert score[0] > 0.85 > 0.6 > score[1]


def test_retrieval_gives_each_query_its_share_and_no_image_twice():
    pool = F.normalize(torch.randn(40, 8), dim=1)
    query = F.normalize(pool[:1] + 0.01 * torch.randn(3, 8), dim=1)  # all want the same images
    chosen = curate.retrieve(query, pool, 4)
    shares = np.bincount(list(chosen.values()))
    assert shares.tolist() == [4, 4, 4]
    assert set(chosen) == set((query.mean(0) @ pool.T).topk(12).indices.tolist())


# ---- the command --------------------------------------------------------------------------------


def test_one_of_each_group_of_near_copies_stays(pool, backbone):
    fates, out = command(pool, backbone)
    expected = {"crop.png": "a00.png", "flip.png": "a01.png", "jpeg.jpg": "a02.png"}
    found = {n: r["because of"] for n, r in fates.items() if r["fate"] == "near-copy"}
    assert found == expected
    assert fates["zero.jpg"]["fate"] == "damaged"
    assert len(fates) == 16 and kept(fates) == {f"a{i:02}.png" for i in range(12)}
    sheet = np.asarray(Image.open(out / "sheet.png").convert("L")) < 250
    # Titles and pictures: one row of kept images, which have no other above, and two of copies.
    empty = np.flatnonzero(~sheet.any(axis=1))
    assert sheet.shape[1] > 800 and np.diff(empty).max() > 60
    assert (np.diff(empty) > 60).sum() == 3


def test_the_list_can_be_trained_on(pool, backbone):
    _, out = command(pool, backbone)
    cfg = Config()
    source = open_source(out / "list.txt", cfg)
    assert len(source) == 12 and source.read(0).shape == (64, 64, 3)


def test_what_an_evaluation_set_shows_goes_with_all_its_copies(pool, backbone, tmp_path):
    (tmp_path / "test").mkdir()
    photo(1).crop((0, 0, 58, 58)).save(tmp_path / "test" / "x.png")
    fates, _ = command(pool, backbone, f"against={tmp_path / 'test'}")
    assert {n for n, r in fates.items() if r["fate"] == "in evaluation"} == {"a01.png", "flip.png"}
    assert fates["flip.png"]["because of"] == "x.png" and len(kept(fates)) == 11


def test_each_image_has_one_fate_and_the_list_holds_the_kept_ones(pool, backbone, tmp_path):
    (tmp_path / "good").mkdir()
    photo(50).save(tmp_path / "good" / "g.png")
    fates, out = command(pool, backbone, f"curated={tmp_path / 'good'}", "keep=2")
    listed = {os.path.basename(p) for p in (out / "list.txt").read_text().split()}
    assert len(fates) == 16 and len(listed) == 2 and listed == kept(fates)
    assert all(fates[n]["because of"] == "g.png" for n in listed)


BAD = [
    ([], "backbone= is missing"),
    (["backbone=/nowhere", "out=x"], "/nowhere: no such file"),
    (["backbone={b}"], "out= is missing"),
    (["backbone={b}", "out={o}", "curated=/nowhere"], "curated=/nowhere: no such folder"),
    (["backbone={b}", "out={o}", "kept=3"], "kept=3: unknown"),
    (["backbone={b}", "out={o}", "keep=many"], "keep must be a whole number, got many"),
    (["backbone={b}", "out={o}", "likeness=90"], "threshold= and likeness= are at most 1"),
    (["backbone={b}", "out={o}", "threshold=60"], "threshold= and likeness= are at most 1"),
    (["backbone={b}", "out={o}", "size=50"], "size=50 is not a multiple of 8 px"),
    (["backbone={b}", "out={o}", "curated={p}", "against={p}"], "pool shows it all"),
    (["backbone={b}", "out={p}/a00.png/x"], "cannot be written"),
]


@pytest.mark.parametrize("words, expected", BAD)
def test_bad_input_is_one_line(pool, backbone, tmp_path, capsys, words, expected):
    words = [word.format(b=backbone, o=tmp_path / "out", p=pool) for word in words]
    with pytest.raises(SystemExit) as leaving:
        curate.main([str(pool), *words])
    line = capsys.readouterr().err
    assert leaving.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1
    assert expected in line


def test_a_pool_without_paths_is_refused(tmp_path, backbone, capsys):
    np.save(tmp_path / "x.npy", np.zeros((4, 8, 8, 3), np.uint8))
    with pytest.raises(SystemExit):
        curate.main([str(tmp_path / "x.npy"), f"backbone={backbone}", f"out={tmp_path / 'o'}"])
    assert "must be a folder or a list" in capsys.readouterr().err
