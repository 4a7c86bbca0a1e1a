"""Which images are held out to be classified, and by which others."""

import numpy as np

from config import UserError
from parallel import counted, warn_once

UNKNOWN = -1  # the label of an image without a class
# Names of folders that, side by side, would pass for classes: k-NN would then tell training images
# from test images. (train/ beside val/ or test/ never comes so far.)
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "unlabeled"}


class Part:
    """Some images of a source, as a source; `labels` and `classes` in place of its own."""

    def __init__(self, source, indices, labels=None, classes=None):
        self.source, self.indices = source, indices
        self.labels = np.asarray(source.labels if labels is None else labels)[indices]
        self.classes = classes or source.classes

    def __len__(self):
        return len(self.indices)

    def read(self, i):
        return self.source.read(self.indices[i])

    def label(self, i):
        return int(self.labels[i])

    def name(self, i):
        return self.source.name(self.indices[i])


def pair(train, test, cfg):
    """(images with known labels, images to classify); None with fewer than two classes.

    test   the source of held-out images. None: a tenth of each class of `train` is classified by
           the others. Training has seen them all, though never their labels.
    Raises UserError where the classes of the two do not fit together.
    """
    where = f"data.val={cfg.data.val}" if cfg.data.val else f"data.root={cfg.data.root}"
    train_N = np.asarray(train.labels)
    number = {train.classes[c]: c for c in np.unique(train_N[train_N >= 0])}
    if len(number) < 2:
        return None
    strays = (train_N < 0).sum()
    if test is None:
        if SPLITS.issuperset(map(str.lower, number)):
            raise UserError(
                f"{where}: {' and '.join(number)} are parts of a data set, not classes; name them "
                "train and val, or set data.root= to one and data.val= to the other"
            )
        rest, held = divide(train_N, 0.1)
        if not len(held):
            raise UserError(f"{where}: no class has 3 images, to hold one out; set data.val")
        test, train = Part(train, held), Part(train, rest)
    else:
        train, test_M = Part(train, (train_N >= 0).nonzero()[0]), np.asarray(test.labels)
        asked = [test.classes[c] for c in np.unique(test_M[test_M >= 0])]
        missing = [name for name in asked if name not in number]
        if missing or not asked:
            what = f"no training image of class {missing[0]}" if asked else "no labelled test image"
            fix = "it needs a folder for each class, named as among the training images"
            raise UserError(f"{where}: {what}; {fix}")
        # Its classes may have other numbers; UNKNOWN looks up the last row.
        table = np.array([number.get(name, UNKNOWN) for name in test.classes] + [UNKNOWN])
        test = Part(test, (test_M >= 0).nonzero()[0], table[test_M], train.classes)
        strays += (test_M < 0).sum()
    if strays:
        warn_once(f"{counted(int(strays), 'image')} without a class left out of the evaluation")
    return train, test


def some(train, test, most):
    """At most so many images of each, drawn by a fixed seed; test has no class that train lacks."""
    rng = np.random.default_rng(0)
    train = Part(train, np.sort(rng.permutation(len(train))[:most]))
    findable = np.isin(test.labels, train.labels).nonzero()[0]
    return train, Part(test, np.sort(rng.permutation(findable)[:most]))


def divide(label_N, share, seed=0):
    """(rows that stay, rows held out): `share` of each class, drawn by seed; both ascending.

    label_N  (N,): the class of each image; negative: not known, and in neither
    Data often lie in an order, so every tenth image could miss whole classes. Here one image at
    least of each class is held out, if it has three; the last one always stays.
    """
    order_N, held = np.random.default_rng(seed).permutation(len(label_N)), []
    for c in np.unique(label_N[label_N >= 0]):
        own = order_N[label_N[order_N] == c]
        count = min(max(1, round(share * len(own))), len(own) - 1)
        held.extend(own[: count if len(own) > 2 else 0])
    held_N = np.isin(np.arange(len(label_N)), held)
    return ((label_N >= 0) & ~held_N).nonzero()[0], held_N.nonzero()[0]
