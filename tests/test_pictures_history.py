"""Proves that the curves show every series of a log, also of one that is cut off.

Run: pytest tests/test_pictures_history.py
"""

import json

import numpy as np
import pytest
from PIL import Image

from config import UserError
from pictures import history, plot


def write_log(folder, steps=30, **more):
    keys = [key for key, _, _ in history.LOSSES + history.HEALTH]
    rows = [{"step": s, "images": 8 * s, **{k: i + 1 / (s + 1) for i, k in enumerate(keys)}}
            for s in range(steps)]  # fmt: skip
    rows += [{"step": 0, "knn": 10}, {"step": steps - 1, "knn": 50.0}, more or {"step": 0}]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def count(image, colour, box, away=40):
    """Pixels of this colour; 40 of 255 away from it is still nearer than any other colour is."""
    pixels = np.asarray(image.crop(box)).astype(int)
    return (abs(pixels - tuple(bytes.fromhex(colour[1:]))).max(axis=-1) < away).sum()


def test_curves_draw_every_series_of_the_log(tmp_path):
    write_log(tmp_path, knn_random=20, knn_pixels=30, step=0)
    image = Image.open(history.draw_curves(tmp_path))
    assert image.size == (1200, 700)
    for _, name, colour in history.LOSSES:  # 135: below the legend
        assert count(image, colour, (72, 135, 585, 405)) > 50, name
    for colour in (plot.BLUE, plot.GREY, plot.ORANGE):  # k-NN and its two floors
        assert count(image, colour, (657, 135, 1170, 405), away=80) > 50
    for i, (_, name, colour) in enumerate(history.HEALTH):
        assert count(image, colour, (round(30 + 292.5 * i), 500, round(292 + 292.5 * i), 646)), name


def test_curves_need_nothing_but_a_first_line(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 0, "loss": 7.5}\n')
    assert Image.open(history.draw_curves(tmp_path)).size == (1200, 700)


def test_a_log_may_be_cut_off_repeat_steps_and_hold_bad_numbers(tmp_path):
    text = '{"step": 0, "a": 1}\n{"step": 2}\n{"step": 1, "a": 5}\n{"step": 1, "a": 3}\n{'
    (tmp_path / "log.jsonl").write_text(text)
    rows = history.read_log(tmp_path / "log.jsonl")
    assert history.series(rows, "a") == {0: 1, 1: 3}


def test_other_logs_lie_pale_beside_the_own_one(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "reference-0").mkdir()
    write_log(tmp_path / "mine", steps=15)
    write_log(tmp_path / "reference-0", steps=60)
    other = tmp_path / "reference-0.jsonl"
    (tmp_path / "reference-0" / "log.jsonl").rename(other)
    alone, beside = (
        Image.open(history.draw_curves(tmp_path / "mine", tmp_path / "a.png", others)).copy()
        for others in ([], [other])
    )
    # The axis reaches to the end of the longer run, so the own one ends after a quarter.
    for key, hue, box in [
        ("loss", plot.INK, (230, 135, 585, 405)),
        ("knn", plot.BLUE, (815, 135, 1160, 405)),
    ]:
        pale = plot.mix(hue, plot.PAPER, 0.5)
        assert count(alone, hue, box) > 50 and count(beside, hue, box) < 10, key
        assert count(alone, pale, box) < count(beside, pale, box) > 100, key
    assert (
        count(alone, plot.GREY, (50, 40, 400, 64))
        == 0
        < count(beside, plot.GREY, (50, 40, 400, 64))
    )  # its name


def test_ticks_are_round_and_inside():
    assert [words for _, words in plot.ticks(0, 1600, 6)] == [f"{n:,}" for n in range(0, 1601, 200)]
    assert [words for _, words in plot.ticks(-0.61, 0.3, 4)] == [
        "-0.6",
        "-0.4",
        "-0.2",
        "0.0",
        "0.2",
    ]
    assert [words for _, words in plot.ticks(0, 125_000, 6)] == [
        "0",
        "20,000",
        "40,000",
        "60,000",
        "80,000",
        "100,000",
        "120,000",
    ]
    assert [words for _, words in plot.ticks(0, 3, 6, least=1)] == ["0", "1", "2", "3"]
    for low, high in np.random.rand(50, 2) * [[1, 1000]] + [[0, 1.01]]:
        values = [value for value, _ in plot.ticks(low, high, 6)]
        assert 3 <= len(values) <= 10 and low <= min(values) and max(values) <= high


def test_a_trend_follows_a_level_and_does_not_lag():
    assert np.allclose(plot.trend([3.0] * 5, 2), 3)
    line = np.arange(50.0)
    assert np.allclose(plot.trend(line, 3)[10:-10], line[10:-10])


def test_an_empty_log_gets_one_line(tmp_path):
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(UserError, match="no line with a step yet"):
        history.draw_curves(tmp_path)
