"""evals/dense.py: masks become labels of patches, scores become IoU, and wrong masks clear words.

Run: pytest tests/test_evals_dense.py        (seconds)
"""

import math
import re
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from test_readme import README, commands

from config import Config, UserError, to_dict
from evals import dense as eval_dense
from evals.frozen import untrained
from vit import VisionTransformer, build_backbone

# ---- masks and patches --------------------------------------------------------------------------


def test_a_patch_has_the_share_of_each_class_that_it_shows():
    rng = np.random.default_rng(0)
    mask = rng.choice([0, 1, 2, 255], size=(12, 20)).astype(np.uint8)
    mask[:4, :4] = 255
    share = eval_dense.patch_classes(mask, 3, 5, classes=3)
    for row in range(3):
        for column in range(5):
            patch = mask[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            counted = max((patch != 255).sum(), 1)
            for c in range(3):
                expected = (patch == c).sum() / counted
                assert share[5 * row + column, c] == pytest.approx(expected)
    assert not share[0].any(), "nothing but ignored pixels"


def test_a_mask_that_does_not_divide_into_patches_is_stretched_over_them():
    mask = np.repeat(np.array([[0, 1]], np.uint8), 15, axis=1).repeat(7, axis=0)  # half and half
    share = eval_dense.patch_classes(mask, 2, 4, classes=2)
    assert share[:, 1].view(2, 4).tolist() == [[0, 0, 1, 1]] * 2


def test_patches_that_show_nothing_that_counts_are_not_learned_from(tmp_path, monkeypatch):
    folder = blocks(tmp_path, 1)
    mask = np.full((16, 16), 255, np.uint8)
    mask[:8] = 1
    Image.fromarray(mask).save(folder / "masks" / "0.png")
    found = eval_dense.checked(folder, 3)
    x, share = eval_dense.gather(found, colours, 2)
    assert len(x) == 8 and share[:, 1].eq(1).all()
    monkeypatch.setattr(eval_dense, "PATCHES", 3)
    assert len(eval_dense.gather(found, colours, 2)[0]) == 3


# ---- scores -------------------------------------------------------------------------------------


def test_iou_is_that_of_the_sets_of_pixels():
    truth, guess = torch.randint(3, (2, 200))
    count = (truth * 4 + guess).bincount(minlength=16).view(4, 4)  # class 3 never occurs
    for c in range(3):
        own, called = (set((x == c).nonzero().flatten().tolist()) for x in (truth, guess))
        expected = 100 * len(own & called) / len(own | called)
        assert eval_dense.ious(count)[c].item() == pytest.approx(expected, rel=1e-5)
    assert math.isnan(eval_dense.ious(count)[3])
    assert eval_dense.mean_iou(count) == pytest.approx(eval_dense.ious(count)[:3].mean().item())


def test_ignored_pixels_are_not_counted(tmp_path):
    folder = blocks(tmp_path, 1)
    mask = np.asarray(Image.open(folder / "masks" / "0.png")).copy()
    mask[:3] = 255
    Image.fromarray(mask).save(folder / "masks" / "0.png")
    always_one = {"one": lambda x: torch.tensor([[0.0, 1]]).expand(len(x), 2)}
    count = eval_dense.confusions(eval_dense.checked(folder, 3), colours, always_one)["one"]
    assert count.sum() == 13 * 16 and not count[:, 0].any()


# ---- the layer -----------------------------------------------------------------------------------


def blocks(folder, count):
    """Images of 16 px, of which a random 4 px grid is light: class 1; dark is class 0."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        mask = rng.integers(2, size=(4, 4), dtype=np.uint8).repeat(4, axis=0).repeat(4, axis=1)
        image = rng.integers(100, size=(16, 16, 3), dtype=np.uint8) + 100 * mask[..., None]
        Image.fromarray(image).save(folder / "images" / f"{i}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{i}.png")
    return folder


def colours(image):
    """A backbone whose features are the mean colours of 4 px patches, and a constant."""
    pixels = torch.tensor(np.asarray(Image.open(image))).float() / 255
    x = pixels.view(4, 4, 4, 4, 3).mean(dim=(1, 3))
    return torch.cat((x, torch.full((4, 4, 1), 0.6)), dim=2)


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """What makes it quick."""
    for name, value in {"PENALTIES": 4, "PATCHES": 300}.items():
        monkeypatch.setattr(eval_dense, name, value)


def test_features_that_know_the_classes_segment_almost_without_fault(tmp_path):
    count, _ = eval_dense.evaluate(colours, blocks(tmp_path, 15))
    # Only the corners where four patches meet are rounded by the bilinear enlargement.
    assert eval_dense.mean_iou(count) > 85


def test_test_images_are_looked_at_once_and_held_out_ones_choose(tmp_path):
    seen = Counter()

    def extract(image):
        seen[image.stem] += 1
        return colours(image)

    eval_dense.evaluate(extract, blocks(tmp_path, 15))
    train, test = eval_dense.splits(tmp_path)
    assert (len(train), len(test)) == (12, 3)
    assert {seen[image.stem] for image, *_ in test} == {1}
    assert {seen[image.stem] for image, *_ in train} == {2}  # learned or chosen from; then learned


def test_large_images_of_ones_own_need_no_key(tmp_path, monkeypatch):
    monkeypatch.setattr("images.reader.read_image.__defaults__", (3, 20))
    assert len(eval_dense.checked(blocks(tmp_path, 5), 3)) == 5


def test_train_and_val_folders_are_kept_apart(tmp_path):
    blocks(tmp_path / "train", 3)
    blocks(tmp_path / "val", 2)
    train, test = eval_dense.splits(tmp_path)
    assert len(train) == 3 and [image.parent.parent.name for image, *_ in test] == ["val"] * 2


def test_no_image_is_held_out_that_alone_shows_a_class():
    found = [(i, i, {i % 7, 7 + i} if i < 12 else {0, 1}) for i in range(20)]  # 7 to 18: one image
    train, test = eval_dense.fifth(found)
    assert len(test) == 4 and sorted(train + test) == found
    assert eval_dense.classes_of(train) == eval_dense.classes_of(found)
    assert min(i for i, *_ in test) >= 12 and [i for i, *_ in test] != sorted(i for i, *_ in test)
    with pytest.raises(UserError, match="12 images are too few to hold a fifth out"):
        eval_dense.fifth(found[:12])


def test_an_image_keeps_its_shape_in_whole_patches(tmp_path):
    backbone = VisionTransformer((8, 1, 2, "mlp"), 8, image_size=16).eval()
    cfg = Config(precision="fp32")
    cfg.vit.patch = 8

    def grid(height, width, size):
        Image.new("RGB", (width, height)).save(tmp_path / "x.png")
        return eval_dense.patch_tokens(backbone, tmp_path / "x.png", size, cfg, "cpu").shape

    assert grid(96, 64, 448) == (12, 8, 8)
    assert grid(96, 64, 32) == (6, 4, 8)
    assert grid(97, 61, 448) == (12, 8, 8)


# ---- the command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A backbone that was never trained, and images with masks."""
    folder = tmp_path_factory.mktemp("dense")
    cfg = Config(precision="fp32", device="cpu")
    cfg.crops.global_size, cfg.vit.patch, cfg.vit.size = 16, 8, "nano"
    cfg.vit.layerscale, cfg.vit.init_std = 0.1, 0
    torch.manual_seed(0)
    state = {"backbone": build_backbone(cfg).state_dict(), "config": to_dict(cfg), "step": 0}
    torch.save(state, folder / "teacher.pt")
    blocks(folder / "blocks", 16)
    return folder


def test_the_command_prints_what_was_reached(place, capsys, monkeypatch):
    words = [str(place / "teacher.pt"), str(place / "blocks"), "size=64"]
    eval_dense.main(words)
    said = capsys.readouterr().out
    figures = [float(x) for x in re.findall(r"^class \d+ +([\d.]+) %$", said, re.MULTILINE)]
    (mean,) = re.findall(r"^mean IoU +([\d.]+) %   \(penalty C ", said, re.MULTILINE)
    assert 0 < float(mean) == pytest.approx(sum(figures) / len(figures), abs=0.01)
    assert "13 training, 3 test images, 2 classes" in said
    monkeypatch.setattr(eval_dense, "untrained", lambda net, seed: untrained(net, seed + 1))
    eval_dense.main([*words, "untrained=true"])
    assert capsys.readouterr().out != said


@pytest.mark.parametrize("words", commands(README, "evals.dense"), ids=" ".join)
def test_a_command_of_the_readme_runs(place, words):
    assert words == ["runs/default", "/photos"]
    eval_dense.main([str(place / "teacher.pt"), str(place / "blocks")])


BAD = [
    (["{run}"], "FOLDER is missing"),
    (["{run}", "{empty}"], "no images; images/x.jpg goes with masks/x.png"),
    (["{run}", "{few}"], "3 images are too few to hold a fifth out"),
    (["{run}", "{good}", "size=0"], "size=0 must be at least 1"),
    (["{run}", "{good}", "sizze=2"], "unknown key sizze; did you mean size?"),
    (["{run}", "{good}", "iterations=20"], "unknown key iterations; --help lists them all"),
    (["{run}", "{good}", "data.channels=1", "data.mean=[0]", "data.std=[1]"], "reads 3: give imag"),
    (["{nowhere}", "{good}"], "no such file; give a run folder"),
]


@pytest.mark.parametrize("words, expected", BAD)
def test_bad_input_is_one_line(place, tmp_path, capsys, words, expected):
    (tmp_path / "empty").mkdir()
    places = {
        "run": place / "teacher.pt", "good": place / "blocks", "empty": tmp_path / "empty",
        "few": blocks(tmp_path / "few", 3), "nowhere": tmp_path / "nowhere.pt",
    }  # fmt: skip
    refused([word.format(**places) for word in words], expected, capsys)


def refused(words, expected, capsys):
    with pytest.raises(SystemExit) as leaving:
        eval_dense.main(words)
    line = capsys.readouterr().err
    assert leaving.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1
    assert re.search(expected, line), line


WRONG = [
    (np.zeros((16, 15), np.uint8), r"0.png: 15 x 16 pixels, but 0.png has 16 x 16: save it"),
    (np.zeros((16, 16, 3), np.uint8), r"0.png: a RGB picture; save classes as palette or"),
]


@pytest.mark.parametrize("mask, expected", WRONG)
def test_a_wrong_mask_is_named(place, tmp_path, capsys, mask, expected):
    folder = blocks(tmp_path, 6)
    Image.fromarray(mask).save(folder / "masks" / "0.png")
    refused([str(place / "teacher.pt"), str(folder)], expected, capsys)


@pytest.mark.parametrize("part", ["", "train", "val"])
def test_one_class_is_no_task_and_255_is_named_as_the_likely_cause(place, tmp_path, capsys, part):
    for name in ["train", "val"] if part else [""]:
        folder = blocks(tmp_path / name, 6)
        for path in (folder / "masks").iterdir() if name == part else ():
            Image.fromarray(np.asarray(Image.open(path)) * np.uint8(255)).save(path)
    expected = "fewer than two classes: nothing to tell apart; 255 is not counted"
    refused([str(place / "teacher.pt"), str(tmp_path)], expected, capsys)


def test_a_damaged_image_is_named(place, tmp_path, capsys):
    folder = blocks(tmp_path, 6)
    (folder / "images" / "2.png").write_bytes(b"no picture")
    refused([str(place / "teacher.pt"), str(folder)], "2.png: cannot be read .*not a", capsys)


def test_images_of_many_bands_are_segmented_too(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    folder = blocks(tmp_path, 6)
    for path in list((folder / "images").iterdir()):
        bands = np.asarray(Image.open(path))[:, :, :1].repeat(12, axis=2)
        tifffile.imwrite(path.with_suffix(".tif"), bands, photometric="minisblack")
        path.unlink()
    backbone = VisionTransformer((8, 1, 2, "mlp"), 4, image_size=16, channels=12).eval()
    cfg = Config(precision="fp32")
    cfg.vit.patch, cfg.data.channels, cfg.data.mean, cfg.data.std = 4, 12, (0.5,) * 12, (0.2,) * 12
    count, _ = eval_dense.evaluate(
        lambda image: eval_dense.patch_tokens(backbone, image, 16, cfg, "cpu"), folder, 12
    )
    assert count.sum() > 0


def test_a_class_that_only_test_masks_show_counts_as_never_found(tmp_path):
    for name, count in ("train", 10), ("val", 5):
        blocks(tmp_path / name, count)
    first = eval_dense.evaluate(colours, tmp_path)[0]
    mask = np.asarray(Image.open(tmp_path / "val" / "masks" / "0.png")).copy()
    mask[:4, :4] = 7
    Image.fromarray(mask).save(tmp_path / "val" / "masks" / "0.png")
    count = eval_dense.evaluate(colours, tmp_path)[0]
    assert count.sum() == first.sum() and count[7].sum() == 16
    assert eval_dense.ious(count)[7] == 0 and eval_dense.mean_iou(count) < 70


def test_a_missing_or_damaged_mask_is_named(place, tmp_path, capsys):
    folder = blocks(tmp_path, 6)
    (folder / "masks" / "3.png").write_bytes(b"no picture")
    refused([str(place / "teacher.pt"), str(folder)], r"masks/3.png: cannot be read", capsys)
    (folder / "masks" / "3.png").unlink()
    refused(
        [str(place / "teacher.pt"), str(folder)],
        r"masks/3.png: cannot be read .*No such file",
        capsys,
    )


def test_palette_masks_hold_numbers_not_colours(tmp_path):
    folder = blocks(tmp_path, 1)
    mask = Image.open(folder / "masks" / "0.png")
    numbers = np.asarray(mask)
    palette = mask.convert("P")
    palette.putpalette([200, 0, 0, 0, 200, 0] + [0] * 762)
    palette.save(folder / "masks" / "0.png")
    assert Image.open(folder / "masks" / "0.png").mode == "P"
    read = eval_dense.read_mask(folder / "masks" / "0.png")
    assert np.array_equal(read, numbers)
