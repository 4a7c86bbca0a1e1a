"""The embedded data set is repeatable, balanced, and not solved by comparing pixels.

pytest tests/test_images_synthetic.py
"""

import numpy as np
import pytest

from images.synthetic import CLASSES, GLYPHS, PALETTES, make


def pixel_knn(bank, bank_label, query, k=20, temp=0.07):
    """Weighted k-NN on raw pixels, each image less the bank's mean and scaled to length one."""
    mean = bank.mean(0)
    bank_ND, query_MD = ((x - mean).reshape(len(x), -1) for x in (bank, query))
    bank_ND = bank_ND / np.linalg.norm(bank_ND, axis=1, keepdims=True)
    query_MD = query_MD / np.linalg.norm(query_MD, axis=1, keepdims=True)
    cosine_MN = query_MD @ bank_ND.T
    nearest_MK = np.argsort(-cosine_MN, axis=1)[:, :k]
    weight_MK = np.exp(np.take_along_axis(cosine_MN, nearest_MK, 1) / temp)
    vote_MKC = weight_MK[..., None] * np.eye(len(CLASSES))[bank_label[nearest_MK]]
    return vote_MKC.sum(1).argmax(1)


def test_images_and_labels_have_the_promised_form():
    images, labels = make(30, seed=0, split="train", size=40)
    assert images.shape == (30, 40, 40, 3) and images.dtype == np.uint8
    assert labels.shape == (30,) and labels.dtype == np.int64


def test_the_same_seed_makes_the_same_images():
    assert np.array_equal(make(30, seed=3)[0], make(30, seed=3)[0])


def test_an_image_does_not_depend_on_how_many_are_made():
    few, many = make(70)[0], make(150)[0]  # more than one chunk, none of them full
    assert np.array_equal(few, many[:70])


def test_another_seed_makes_other_images():
    assert not np.array_equal(make(1, seed=0)[0], make(1, seed=1)[0])


def test_train_and_test_share_no_image():
    images = np.concatenate([make(300, split=split)[0] for split in ("train", "test")])
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError):
        make(1, split="validation")


def test_every_class_is_equally_frequent():
    assert len(CLASSES) == len(PALETTES) * len(GLYPHS) == 12
    assert np.array_equal(np.bincount(make(120, size=16)[1]), [10] * 12)


def test_every_glyph_covers_about_the_same_area():
    """Otherwise brightness alone would give the glyph away."""
    y, x = np.mgrid[-1.5:1.5:300j, -1.5:1.5:300j]
    areas = [9 * (distance(x, y) < 0).mean() for distance in GLYPHS.values()]
    assert max(areas) / min(areas) < 1.2, areas


def test_raw_pixels_hardly_tell_the_classes_apart():
    bank, bank_label = make(1200, split="train", size=32)
    query, query_label = make(300, split="test", size=32)
    guess = pixel_knn(bank / 255, bank_label, query / 255)
    # Chance is 8 %; 300 queries leave an error of about 2 points.
    assert (guess == query_label).mean() < 0.30
