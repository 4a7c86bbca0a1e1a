"""Proves that sheets show what they say: hidden patches, exact colours, whole pictures.

Run: pytest tests/test_pictures_sheets.py
"""

import numpy as np
import pytest
import torch
from PIL import Image

from config import UserError
from pictures import sheets

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def test_hiding_darkens_exactly_the_masked_patches():
    white = np.full((160, 160, 3), 255, np.uint8)
    grid = np.random.rand(7, 5) < 0.4  # cells of 22.9 x 32 pixels: not whole ones
    dark = (sheets.hide(white, grid) < 255).all(axis=-1)
    row, column = np.arange(160) * 7 // 160, np.arange(160) * 5 // 160
    assert (dark == grid[row[:, None], column]).all()


def test_denormalising_undoes_normalising_exactly():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).expand(3, -1, -1)
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    back = sheets.denormalise((pixels / 255 - mean) / std, MEAN, STD)
    assert (torch.tensor(back).permute(2, 0, 1) == pixels).all()


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_a_crop_sheet_takes_any_number_of_channels(tmp_path, channels):
    images = [np.full((20, 40, channels), 90, np.uint8)] * 2
    crops = torch.zeros(2, 2, channels, 32, 32)
    masks = torch.zeros(2, 2, 16, dtype=torch.bool)
    masks[0, 1] = True
    mean, std = [0.5] * channels, [0.2] * channels
    path = sheets.crop_sheet(
        images, crops, crops[:, :, :, :16, :16], masks, mean, std, tmp_path / "a.png"
    )
    sheet = np.asarray(Image.open(path)).astype(int)
    assert (sheet[108, 86] == 90).all()  # the middle of the first image
    assert (sheet[34:180, 196:340] == 128).all()  # a crop of zeros is the mean
    assert (sheet[34:180, 360:500] < 128).all()  # the hidden one


def test_a_crop_sheet_works_without_local_crops(tmp_path):
    images, crops = [np.zeros((8, 8, 3), np.uint8)], torch.zeros(1, 2, 3, 8, 8)
    masks = torch.zeros(1, 2, 4, dtype=torch.bool)
    path = sheets.crop_sheet(images, crops, crops[:, :0], masks, MEAN, STD, tmp_path / "a.png")
    seen = np.asarray(Image.open(path))
    assert [(seen[100, x] < 255).any() for x in (86, 270, 430)] == [True] * 3


def test_pictures_of_other_number_types_are_shown_in_their_range():
    wide = np.full((2, 2, 1), 65535, np.uint16)
    bright = np.full((2, 2, 3), 3000, np.float32)
    for pixels in [wide, np.ones((2, 2, 3)), bright, np.full((2, 2, 4), 255, np.uint8)]:
        assert (np.asarray(sheets.picture(pixels)) == np.full((2, 2, 3), 255)).all()


def test_a_sheet_shows_every_picture_whole_whatever_its_form():
    shapes = [(10, 40), (40, 10), (300, 200), (1, 1)]
    pictures = [np.full((*shape, 3), 10 + i, np.uint8) for i, shape in enumerate(shapes)]
    long = "a title longer than the sheet is wide " * 3
    rows = [(["a"], pictures, None), ([long], pictures, "wxyz")]
    sheet = np.asarray(sheets.bands(rows, side=80, per_row=3))
    for i, (h, w) in enumerate(shapes):
        seen = (sheet == 10 + i).all(axis=-1).sum()
        factor = 80 / max(h, w)
        assert seen == 2 * round(h * factor) * round(w * factor), i
    assert (sheet[:, -6:] == 255).all()  # no title is cut off


def test_an_empty_place_stays_empty():
    rows = [([], [np.zeros((9, 9, 3), np.uint8), None], ["a", ""])]
    sheet = np.asarray(sheets.bands(rows, side=30))
    assert (sheet[6:36, 6:36] == 0).all() and (sheet[:, 42:] == 255).all()
    assert sheet.shape[1] == 60  # and narrow


def test_words_are_shortened_to_the_width_they_have():
    assert sheets.shortened("short", 100) == "short"
    words = sheets.shortened("a very long name of an image.jpg", 100)
    assert words.startswith("a very") and words.endswith("…")
    assert 80 < sheets.text_width(words, 13) <= 100


def test_heat_rises_in_brightness_from_black():
    colours = sheets.heat(np.linspace(0, 1, 50)[None]).astype(int)[0]
    light = colours @ [0.299, 0.587, 0.114]
    assert (np.diff(light) > 0).all() and light[0] < 1 and light[-1] > 240


def test_an_overlay_is_brightest_where_the_map_is_largest():
    values = np.zeros((4, 6))
    values[1, 4] = 0.01  # attention is small numbers: each map has a scale of its own
    shown = sheets.overlay(np.full((40, 60, 3), 128, np.uint8), values, 120)
    assert shown.shape == (80, 120, 3)
    row, column = np.unravel_index(shown.astype(int).sum(axis=-1).argmax(), (80, 120))
    assert (row // 20, column // 20) == (1, 4)


def test_an_unwritable_place_gets_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        sheets.write(Image.new("RGB", (4, 4)), tmp_path / "none" / "a.png")
