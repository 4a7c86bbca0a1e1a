"""Proves that sheets show what they say: hidden patches, exact colours, whole pictures.

Run: pytest tests/test_pictures_sheets.py
"""

import numpy as np
import pytest
from PIL import Image

from config import Config, UserError
from images.sources import Arrays
from pictures import history, plot, sheets

WORDS = {  # and how they are written
    "plain ASCII, 84.0 %": "plain ASCII, 84.0 %",
    "Urlaub S\u00fcd": "Urlaub Sud",
    "u\u0308ber": "uber",  # as macOS stores it: a letter and a mark
    "Stra\u00dfe \u0141\u00f3d\u017a \u00d8re": r"Stra\xdfe \u0141odz \xd8re",
    "\u4e2d.jpg": r"\u4e2d.jpg",
    "a\U0001f389.jpg": r"a\U0001f389.jpg",
    "two\nlines\x00": r"two\nlines\x00",
    "\udcfc of Latin-1": r"\udcfc of Latin-1",  # a file name that is not UTF-8
}


def test_letters_that_the_font_has_not_are_written_with_those_it_has():
    assert [plot.in_ascii(words) for words in WORDS] == list(WORDS.values())
    box = bytes(plot.font(13).getmask("\U0010ffff"))  # what stands for a letter that is missing
    assert all(bytes(plot.font(13).getmask(chr(n))) != box for n in range(33, 127))


def test_words_of_any_script_do_not_stop_a_picture(tmp_path):
    picture = np.zeros((8, 8, 3), np.uint8)
    rows = [([words], [picture], [words]) for words in WORDS]
    assert Image.open(sheets.write(sheets.bands(rows, side=60), tmp_path / "a.png")).size[0] > 60


def test_hiding_darkens_exactly_the_masked_patches():
    white = np.full((160, 160, 3), 255, np.uint8)
    grid = np.random.rand(7, 5) < 0.4  # cells of 22.9 x 32 pixels: not whole ones
    dark = (sheets.hide(white, grid) < 255).all(axis=-1)
    row, column = np.arange(160) * 7 // 160, np.arange(160) * 5 // 160
    assert (dark == grid[row[:, None], column]).all()


@pytest.mark.parametrize("channels, local_count", [(1, 2), (2, 2), (3, 2), (3, 0), (5, 2)])
def test_crops_are_shown_in_their_own_colours_whatever_their_number(
    tmp_path, channels, local_count
):
    cfg = Config(batch=4)
    cfg.data.channels, cfg.data.mean, cfg.data.std = channels, (0.5,) * channels, (0.2,) * channels
    cfg.augment.jitter = cfg.augment.grey = 0
    cfg.augment.blur = cfg.augment.solarize = (0, 0, 0)
    cfg.crops.global_size, cfg.crops.local_size, cfg.crops.local_count = 32, 16, local_count
    cfg.vit.patch = 8
    images = np.full((8, 40, 40, channels), 90, np.uint8)
    path = history.draw_crops(Arrays(images, [-1] * 8, [], "x"), cfg, tmp_path / "a.png")
    sheet = np.asarray(Image.open(path)).astype(int)
    assert (sheet[28:188, 6:166] == 90).all()  # the first image
    crops = [sheet[y : y + 160, x : x + 160] for y in range(28, 600, 166) for x in (190, 356)]
    plain = [(crop == 90).all() for crop in crops]
    assert len(plain) == 8 and sum(plain) == 4  # the others have hidden patches
    assert all((crop[crop != 90] < 160).all() for crop in crops)
    small = [sheet[28:188, x : x + 160] for x in range(540, sheet.shape[1] - 6, 166)]
    assert len(small) == local_count and all((crop == 90).all() for crop in small)


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
    assert words.startswith("a ver") and "..." in words and words.endswith("e.jpg")
    assert 80 < sheets.text_width(words, 13) <= 100
    alike = [sheets.shortened(f"ILSVRC2012_val_{i:08}.JPEG", 100) for i in range(293, 296)]
    assert len(set(alike)) == 3


def test_an_overlay_rises_in_brightness_from_black():
    shown = sheets.overlay(np.zeros((8, 80, 3), np.uint8), np.linspace(0, 1, 80)[None], 80)
    light = shown[4] @ [0.299, 0.587, 0.114]
    assert (np.diff(light[::4]) > 0).all() and light[0] < 1 and light[-1] > 225


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


def test_position_colours_of_different_places_differ():
    wheel = sheets.position_colours(12, 16).reshape(-1, 3).astype(int)
    apart = abs(wheel[:, None] - wheel[None]).sum(axis=-1) + 99 * np.eye(len(wheel))
    assert apart.min() > 3
