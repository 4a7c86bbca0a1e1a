"""Proves that pictures show what they say: every series, the hidden patches, like features alike.

Run: pytest tests/test_visualize.py
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import plot
import visualize
from config import Config, UserError, to_dict
from vit import VisionTransformer

ROOT = Path(visualize.__file__).parent
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def write_log(folder, steps=30, **more):
    keys = [key for key, _, _ in visualize.LOSSES + visualize.HEALTH]
    rows = [{"step": s, "images": 8 * s, **{k: i + 1 / (s + 1) for i, k in enumerate(keys)}}
            for s in range(steps)]  # fmt: skip
    rows += [{"step": 0, "knn": 10}, {"step": steps - 1, "knn": 50.0}, more or {"step": 0}]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def count(image, colour, box):
    """Pixels of this colour; 40 of 255 away from it is still nearer than any other colour is."""
    pixels = np.asarray(image.crop(box)).astype(int)
    return (abs(pixels - tuple(bytes.fromhex(colour[1:]))).max(axis=-1) < 40).sum()


def test_curves_draw_every_series_of_the_log(tmp_path):
    write_log(tmp_path, knn_random=20, knn_pixels=30, step=0)
    image = Image.open(visualize.curves(tmp_path))
    assert image.size == (1200, 700)
    for _, name, colour in visualize.LOSSES:  # 135: below the legend
        assert count(image, colour, (72, 135, 585, 405)) > 50, name
    for _, name, colour in visualize.KNN:
        assert count(image, colour, (657, 135, 1170, 405)) > 50, name
    for i, (_, name, colour) in enumerate(visualize.HEALTH):
        assert count(image, colour, (round(30 + 292.5 * i), 500, round(292 + 292.5 * i), 646)), name


def test_curves_need_nothing_but_a_first_line(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 0, "loss": 7.5}\n')
    assert Image.open(visualize.curves(tmp_path)).size == (1200, 460)


def test_a_log_may_be_cut_off_repeat_steps_and_hold_bad_numbers(tmp_path):
    text = (
        '{"step": 0, "a": 1}\n{"step": 2, "a": NaN}\n{"step": 1, "a": 5}\n{"step": 1, "a": 3}\n{"st'
    )
    (tmp_path / "log.jsonl").write_text(text)
    rows = visualize.read_log(tmp_path / "log.jsonl")
    assert visualize.series(rows, "a") == {0: 1, 1: 3}


def test_floors_come_from_the_summary_when_the_log_has_none(tmp_path):
    write_log(tmp_path)
    (tmp_path / "summary.json").write_text('{"knn": 50, "knn_random": 15, "knn_pixels": null}')
    lines = visualize.knn_lines(tmp_path, visualize.read_log(tmp_path / "log.jsonl"), 29)
    assert [line.name for line in lines] == ["DINOv2 50.0 %", "random network 15.0 %"]
    assert [line.dashed for line in lines] == [False, True]


def test_hiding_darkens_exactly_the_masked_patches():
    white = np.full((160, 160, 3), 255, np.uint8)
    grid = np.random.rand(7, 5) < 0.4  # cells of 22.9 x 32 pixels: not whole ones
    dark = (visualize.hide(white, grid) < 255).all(axis=-1)
    row, column = np.arange(160) * 7 // 160, np.arange(160) * 5 // 160
    assert (dark == grid[row[:, None], column]).all()


def test_denormalising_undoes_normalising_exactly():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).expand(3, -1, -1)
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    back = visualize.denormalise((pixels / 255 - mean) / std, MEAN, STD)
    assert (torch.tensor(back).permute(2, 0, 1) == pixels).all()


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_a_crop_sheet_takes_any_number_of_channels(tmp_path, channels):
    images = [np.full((20, 40, channels), 90, np.uint8)] * 2
    crops = torch.zeros(2, 2, channels, 32, 32)
    masks = torch.zeros(2, 2, 16, dtype=torch.bool)
    masks[0, 1] = True
    mean, std = [0.5] * channels, [0.2] * channels
    path = visualize.crop_sheet(
        images, crops, crops[:, :, :, :16, :16], masks, mean, std, tmp_path / "a.png"
    )
    sheet = np.asarray(Image.open(path)).astype(int)
    assert (sheet[112, 86] == 90).all()  # the middle of the first image
    assert (sheet[40:190, 180:320] == 128).all()  # a crop of zeros is the mean
    assert (sheet[40:190, 350:490] < 128).all()  # the hidden one


def test_a_crop_sheet_works_without_local_crops_and_masks(tmp_path):
    images, crops = [np.zeros((8, 8, 3), np.uint8)], torch.zeros(1, 2, 3, 8, 8)
    path = visualize.crop_sheet(images, crops, [], None, MEAN, STD, tmp_path / "a.png")
    assert Image.open(path).size == (504, 206)


def two_kinds(sizes=((4, 6), (5, 5)), dim=16):
    """Feature maps whose left columns are of one kind and whose others are of another."""
    kinds = torch.randn(2, dim)
    return [kinds[(torch.arange(w) >= 2).long()].expand(h, w, dim) + 0.01 * torch.randn(h, w, dim)
            for h, w in sizes]  # fmt: skip


def test_pca_gives_one_kind_of_patch_one_colour_in_all_images():
    features = two_kinds()
    colours = visualize.pca_colours(features)
    assert [c.shape for c in colours] == [(4, 6, 3), (5, 5, 3)]
    red = [c[:, :, 0].astype(int) for c in colours]  # red is the strongest direction
    left, right = [np.concatenate([part.ravel() for part in parts])
                   for parts in ([r[:, :2] for r in red], [r[:, 2:] for r in red])]  # fmt: skip
    assert abs(left.mean() - right.mean()) > 200
    assert max(np.ptp(left), np.ptp(right)) < 40


def test_pca_colours_are_the_same_every_time_and_for_turned_features():
    features = two_kinds()
    turn = torch.linalg.qr(torch.randn(16, 16))[0]
    first, again = visualize.pca_colours(features), visualize.pca_colours(features)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    turned = visualize.pca_colours([f @ turn for f in features])
    for a, b in zip(first, turned, strict=True):  # up to the direction of each axis
        a, b = a.astype(int), b.astype(int)
        same = [min(abs(a - b)[:, :, c].max(), abs(a + b - 255)[:, :, c].max()) for c in range(3)]
        assert max(same) <= 2


@pytest.mark.parametrize(
    "features", [torch.ones(3, 3, 8), torch.rand(3, 3, 2), torch.rand(1, 1, 4)]
)
def test_pca_of_equal_or_few_features_is_still_a_picture(features):
    [colours] = visualize.pca_colours([features])
    assert colours.shape == (*features.shape[:2], 3)
    if features.shape[:2] == (1, 1) or (features == 1).all():
        assert (colours == 128).all()


def test_ticks_are_round_and_inside():
    assert [words for _, words in plot.ticks(0, 1600, 6)] == [str(n) for n in range(0, 1601, 200)]
    assert [words for _, words in plot.ticks(-0.61, 0.3, 4)] == [
        "-0.6",
        "-0.4",
        "-0.2",
        "0.0",
        "0.2",
    ]
    assert [words for _, words in plot.ticks(0, 125_000, 6)] == [
        "0",
        "20k",
        "40k",
        "60k",
        "80k",
        "100k",
        "120k",
    ]
    assert [words for _, words in plot.ticks(0, 3, 6, least=1)] == ["0", "1", "2", "3"]
    for low, high in np.random.rand(50, 2) * [[1, 1000]] + [[0, 1.01]]:
        values = [value for value, _ in plot.ticks(low, high, 6)]
        assert 3 <= len(values) <= 10 and low <= min(values) and max(values) <= high


def test_a_trend_follows_a_level_and_does_not_lag():
    assert np.allclose(plot.trend([3.0] * 5, 2), 3)
    line = np.arange(50.0)
    assert np.allclose(plot.trend(line, 3)[10:-10], line[10:-10])


def test_the_command_line_draws_pca_colours(tmp_path, capsys):
    cfg = Config()
    cfg.vit.size, cfg.vit.patch, cfg.crops.global_size = "nano", 8, 32
    net = VisionTransformer("nano", patch=8, image_size=32)
    state = {"backbone": net.state_dict(), "config": to_dict(cfg), "step": 1}
    torch.save(state, tmp_path / "teacher.pt")
    Image.new("RGB", (90, 64), "red").save(tmp_path / "a.jpg")
    visualize.main(["pca", str(tmp_path), str(tmp_path / "a.jpg")])
    assert capsys.readouterr().out == f"wrote {tmp_path / 'pca_images.png'}\n"
    # Twice the side and the caption: the picture, and 11 x 8 patches in the same proportions.
    pixels = np.asarray(Image.open(tmp_path / "pca_images.png"))
    assert pixels.shape == (382, 172, 3) and (pixels[282, 86] != 255).any()


def test_the_command_line_draws_curves(tmp_path):
    write_log(tmp_path)
    command = [sys.executable, str(ROOT / "visualize.py"), "curves", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "wrote curves.png\n", "")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "words, part",
    [
        (["curves", "none"], "none/log.jsonl: no such log"),
        (["curves"], "write `visualize.py curves RUN`"),
        (["paint", "x"], "write `visualize.py curves RUN`"),
        (["pca", "none", "a.jpg"], "none"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, words, part):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        visualize.main(words)
    said = capsys.readouterr().err
    assert left.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    assert part in said


def test_an_empty_log_and_an_unwritable_place_get_one_line(tmp_path):
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(UserError, match="no line with a step yet"):
        visualize.curves(tmp_path)
    with pytest.raises(UserError, match="cannot be written"):
        visualize.write(Image.new("RGB", (4, 4)), tmp_path / "none" / "a.png")


def test_pictures_of_other_number_types_are_shown_in_their_range():
    wide = np.full((2, 2, 1), 65535, np.uint16)
    for pixels in [wide, np.ones((2, 2, 3)), np.full((2, 2, 4), 255, np.uint8)]:
        assert (np.asarray(visualize.picture(pixels)) == np.full((2, 2, 3), 255)).all()
