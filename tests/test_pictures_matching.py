"""Proves the maths of pictures/matching.py against loops and pictures whose answer is known.

Run: pytest tests/test_pictures_matching.py
"""

import numpy as np
import torch
from PIL import Image

from pictures import matching


def test_mutual_nearest_neighbours_are_those_of_a_double_loop():
    a, b = torch.randn(4, 5, 8), torch.randn(3, 6, 8)
    flat_a, flat_b = a.flatten(0, 1), b.flatten(0, 1)
    cosine = torch.stack([torch.cosine_similarity(row[None], flat_b) for row in flat_a])
    want = []
    for i in range(20):
        for j in range(18):
            if cosine[i, j] == cosine[i].max() and cosine[i, j] == cosine[:, j].max():
                want.append([i, j])
    assert matching.mutual_nearest(a, b).tolist() == want
    assert 1 < len(want) < 18


def test_nearest_is_that_of_a_loop_however_it_is_cut():
    a, b = torch.randn(70, 70, 4), torch.randn(3, 3, 4)  # more rows than one chunk
    place = matching.nearest(a, b)
    assert place.shape == (70, 70)
    for y, x in [(0, 0), (58, 36), (69, 69)]:
        assert place[y, x] == torch.cosine_similarity(a[y, x][None], b.flatten(0, 1)).argmax()


def test_the_field_of_a_moved_image_is_moved_too(tmp_path):
    """Each patch on the right has the colour of the place on the left that it came from."""
    maps = torch.randn(6, 8, 16)
    maps = maps, maps.roll((2, 3), (0, 1))
    white = [np.full((60, 80, 3), 255, np.uint8)] * 2
    keep = [torch.ones(6, 8, dtype=torch.bool)] * 2
    path = matching.draw(white, maps, keep, tmp_path / "a.png")
    sheet = np.asarray(Image.open(path)).astype(int)
    side, top = 480 / 8, sheet.shape[0] - 6 - 360
    rows, columns = (((np.arange(n) + 0.5) * side).astype(int) for n in (6, 8))
    left, right = (sheet[top + rows[:, None], x + columns] for x in (6, 492))
    assert abs(np.roll(left, (2, 3), (0, 1)) - right).max() <= 1 and np.ptp(left) > 200


def test_position_colours_of_different_places_differ():
    wheel = matching.position_colours(12, 16).reshape(-1, 3).astype(int)
    apart = abs(wheel[:, None] - wheel[None]).sum(axis=-1) + 99 * np.eye(len(wheel))
    assert apart.min() > 3
