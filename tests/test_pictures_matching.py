"""Proves the maths of pictures/matching.py against loops and pictures whose answer is known.

Run: pytest tests/test_pictures_matching.py
"""

import numpy as np
import pytest
import torch

from config import UserError
from pictures import matching, patches
from vit import VisionTransformer


def test_mutual_nearest_neighbours_are_those_of_a_double_loop():
    a, b = torch.randn(4, 5, 8), torch.randn(3, 6, 8)
    flat_a, flat_b = a.flatten(0, 1), b.flatten(0, 1)
    cosine = torch.stack([torch.cosine_similarity(row[None], flat_b) for row in flat_a])
    want = []
    for i in range(20):
        for j in range(18):
            if cosine[i, j] == cosine[i].max() and cosine[i, j] == cosine[:, j].max():
                want.append((cosine[i, j].item(), i, j))
    pairs = matching.mutual_nearest(a, b)
    assert [tuple(pair) for pair in pairs.tolist()] == [(i, j) for _, i, j in sorted(want)[::-1]]
    assert 1 < len(want) < 18


def test_nearest_is_that_of_a_loop_however_it_is_cut():
    a, b = torch.randn(70, 70, 4), torch.randn(3, 3, 4)  # more rows than one chunk
    place, cosine = matching.nearest(a, b)
    assert place.shape == cosine.shape == (70, 70)
    for y, x in [(0, 0), (58, 36), (69, 69)]:
        each = torch.cosine_similarity(a[y, x][None], b.flatten(0, 1))
        assert place[y, x] == each.argmax() and torch.isclose(cosine[y, x], each.max())


def test_transfer_finds_the_translation_of_features():
    a = torch.randn(8, 10, 6)
    b = a.roll((2, 3), (0, 1))
    size = (100, 80)  # patches of 10 pixels
    points = torch.tensor([[5.0, 5.0], [45.0, 35.0], [65.0, 55.0]])
    found = matching.transfer(points, a, b, size, size)
    assert torch.allclose(found, points + torch.tensor([30.0, 20.0]))


def test_transfer_finds_the_translation_of_an_image_through_a_network():
    """Without positions attention sees no order: moved patches have the same features, moved."""
    net = VisionTransformer((32, 2, 2, "mlp"), 4, 16, layerscale=0.5, init_std=0).eval()
    torch.nn.init.zeros_(net.pos_embed)
    image = np.random.default_rng(0).integers(256, size=(32, 40, 3), dtype=np.uint8)
    moved = np.roll(image, (8, -4), (0, 1))
    a, b = (
        patches.patch_features(net, i, (0.5,) * 3, (0.2,) * 3, shifts=1) for i in (image, moved)
    )
    points = torch.tensor([[10.0, 6.0], [18.0, 14.0], [38.0, 22.0]])
    found = matching.transfer(points, a, b, (40, 32), (40, 32))
    assert torch.allclose(found, points + torch.tensor([-4.0, 8.0]))


def test_a_point_between_two_patches_has_a_feature_between_them():
    a = torch.zeros(1, 2, 2)
    a[0, 0, 0] = a[0, 1, 1] = 1
    b = torch.tensor([[[1.0, 0], [1, 1], [0, 1]]])
    found = matching.transfer([[5.0, 5.0], [10.0, 5.0], [15.0, 5.0]], a, b, (20, 10), (30, 10))
    assert found.tolist() == [[5, 5], [15, 5], [25, 5]]


def test_pck_of_a_case_counted_by_hand():
    truth = torch.tensor([[10.0, 10], [20, 20], [30, 30], [40, 40]])
    found = truth + torch.tensor([[3.0, 4], [0, 5.1], [0, 0], [60, 0]])  # off by 5, 5.1, 0 and 60
    assert matching.pck(found, truth, 0.1, 50) == 50
    assert matching.pck(found, truth, 0.2, 50) == 75
    assert matching.pck(found, truth, 0.05, 50) == 25


def test_centres_are_the_middles_of_patches():
    got = matching.centres(torch.tensor([0, 5]), torch.zeros(2, 3, 1), (30, 40))
    assert got.tolist() == [[5, 10], [25, 30]]


def test_points_are_read_with_what_they_are_compared_with(tmp_path):
    sizes = (40, 30), (50, 20)
    (tmp_path / "a.json").write_text('{"a": [[1, 2]], "b": [[3, 4]]}')
    (tmp_path / "b.json").write_text('{"a": [[1, 2], [5, 6]]}')
    a, b = matching.read_points(tmp_path / "a.json", sizes)
    assert (a.tolist(), b.tolist()) == ([[1, 2]], [[3, 4]])
    a, b = matching.read_points(tmp_path / "b.json", sizes)
    assert (a.tolist(), b) == ([[1, 2], [5, 6]], None)


@pytest.mark.parametrize(
    "name, text, part",
    [
        ("a.json", '{"a": [[1, 2]], "b": []}', "equally many"),
        ("a.json", '{"b": [[1, 2]]}', "equally many"),
        ("a.json", '{"a": [[1, 2], [3]]}', "write"),
        ("a.json", "[1, 2]", "write"),
        ("a.json", '{"a": [[1, 41]]}', r"\(1, 41\) of a lies outside its image of \(40, 30\)"),
        ("a.json", '{"a": [[1, 2]], "b": [[51, 2]]}', "of b lies outside"),
        ("a.json", '{"a": [[1, "two"]]}', "write"),
        ("a.json", '{"a": {"x": 1}}', "write"),
        ("a.json", '{"a": [[1, 2]], "b": null}', "write"),
        ("a.json", '{"a": [[1, 2]], "box_b": [5, 5, 9, 9]}', "unknown box_b; write"),
        ("a.csv", "x_a,y_a\n1,2\n", "write"),
    ],
)
def test_bad_points_are_refused_with_the_reason(tmp_path, name, text, part):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=part):
        matching.read_points(tmp_path / name, ((40, 30), (50, 20)))


def test_a_missing_file_of_points_is_named():
    with pytest.raises(UserError, match=r"points=none\.json: No such file"):
        matching.read_points("none.json", ((4, 4), (4, 4)))
