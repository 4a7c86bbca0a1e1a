"""Proves that words in pictures have no boxes in place of letters, whatever fonts there are.

Run: pytest tests/test_pictures_letters.py
"""

import numpy as np
import pytest
from PIL import Image

from pictures import letters, plot, sheets

WORDS = {  # and how they are written where there is no font but Pillow's own
    "plain ASCII, 84.0 %": "plain ASCII, 84.0 %",
    "Urlaub S\u00fcd": "Urlaub Sud",
    "u\u0308ber": "uber",  # as macOS stores it: a letter and a mark
    "Stra\u00dfe \u0141\u00f3d\u017a \u00d8re \u00c6": r"Stra\xdfe \u0141odz \xd8re \xc6",
    "\u0434\u043e\u043c": r"\u0434\u043e\u043c",
    "\u304b\u306a \uac15": r"\u304b\u306a \uac15",
    "\u4e2d.jpg": r"\u4e2d.jpg",
    "a\U0001f389.jpg": r"a\U0001f389.jpg",
    "two\nlines\x00": r"two\nlines\x00",
    "\udcfc of Latin-1": r"\udcfc of Latin-1",  # a file name that is not UTF-8
}


@pytest.fixture(params=["fonts of this machine", "no fonts"])
def fonts(request, monkeypatch):
    letters.fonts.cache_clear()
    if request.param == "no fonts":
        monkeypatch.setattr(letters, "FONTS", ())
    yield request.param
    letters.fonts.cache_clear()


def box(font):
    return bytes(font.getmask("\U0010ffff"))


@pytest.mark.parametrize("words", WORDS)
def test_no_letter_is_drawn_as_a_box(fonts, words):
    written, font = letters.lettering(words, 13)
    assert all(bytes(font.getmask(letter)) != box(font) for letter in set(written))
    if fonts == "no fonts":
        assert written == WORDS[words]


def test_the_box_itself_is_known_for_every_font():
    for font in letters.fonts(13):
        assert not letters.has(font, "\U0010fffe") and letters.has(font, "a")
        assert letters.has(font, " ")


def test_a_font_that_has_more_is_taken_only_where_it_is_needed():
    own, *more = letters.fonts(13)
    assert letters.lettering("Sud", 13)[1].getname() == own.getname()
    if any(letters.has(font, "\u00fc") for font in more):
        words, font = letters.lettering("S\u00fcd", 13)
        assert words == "S\u00fcd" and font in more


def test_a_caption_of_a_sheet_shows_its_letters(fonts):
    picture = np.zeros((8, 8, 3), np.uint8)
    drawn = [
        np.asarray(sheets.bands([([], [picture], [words])], side=60))
        for words in ("S\u00fcd", "S\U0010ffffd", "\u00fc" * 40)
    ]
    assert (drawn[0] != drawn[1]).any()  # not the box
    assert drawn[2].shape == drawn[0].shape  # shortened


def test_a_title_of_a_chart_shows_its_letters(fonts):
    drawn = []
    for words in ("S\u00fcd", "S\U0010ffffd"):
        page = plot.Page(80, 20)
        page.text(2, 2, words)
        drawn.append(np.asarray(page.finished()))
    assert (drawn[0] != drawn[1]).any() and (drawn[0] < 128).any()


def test_words_of_any_script_do_not_stop_a_picture(fonts, tmp_path):
    picture = np.zeros((8, 8, 3), np.uint8)
    rows = [([words], [picture], [words]) for words in WORDS]
    assert Image.open(sheets.write(sheets.bands(rows, side=60), tmp_path / "a.png")).size[0] > 60
