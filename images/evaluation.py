"""Images as they are evaluated: labelled ones in two parts, centre crops, nothing random.

The transform is the official one for evaluation. A damaged image is marked and never replaced.

Shapes:  B images of a batch   C channels   S side of a crop
"""

import numpy as np
import torch
from PIL import Image

from config import UserError
from images.sources import Source, by_workers, open_source, read_or_next, split_folder
from parallel import counted, warn_once

UNKNOWN = -1  # the label of an image without a class
DAMAGED = -2  # in place of the label of an image that cannot be read
# Names of folders that, side by side, would pass for classes: k-NN would then tell training images
# from test images. (train/ beside val/ or test/ never comes so far.)
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "unlabeled"}


def evaluation_images(cfg):
    """What k-NN during training compares, at most log.knn_images of each part; None: no k-NN."""
    if not cfg.log.knn:
        return None
    try:
        parts = labelled_images(cfg)
    except UserError as error:
        if cfg.data.val:
            raise  # what was named must fit; else measuring is optional
        warn_once(f"no k-NN during training: {error}")
        return None
    return some(*parts, cfg.log.knn_images) if parts and cfg.log.knn_images else parts


def labelled_images(cfg):
    """(images with known labels, images to classify) of data.root and data.val; see pair()."""
    root, val, test = cfg.data.root, cfg.data.val, None
    if val:
        test = open_source(val, cfg, "test", key="data.val")
    elif root == "synthetic" or split_folder(root, "train") != split_folder(root, "test"):
        test = open_source(root, cfg, "test")
    where = f"data.val={val}" if val else f"data.root={root}"
    return pair(open_source(root, cfg, "train"), test, where)


class Part(Source):
    """Some images of a source, as a source; `labels` and `classes` in place of its own."""

    def __init__(self, source, indices, labels=None, classes=None):
        labels = np.asarray(source.labels if labels is None else labels)[indices]
        super().__init__(labels, classes or source.classes)
        self.source, self.indices = source, indices

    def read(self, i):
        return self.source.read(self.indices[i])

    def name(self, i):
        return self.source.name(self.indices[i])


def pair(train, test, where):
    """(images with known labels, images to classify); None with fewer than two classes.

    test   the source of held-out images. None: a tenth of each class of `train` is classified by
           the others. Training has seen them all, though never their labels.
    where  of the held-out images, for messages
    Raises UserError where the classes of the two do not fit together.
    """
    train_N = np.asarray(train.labels)
    number = {train.classes[c]: c for c in np.unique(train_N[train_N >= 0])}
    if len(number) < 2:
        return None
    strays = (train_N < 0).sum()
    if test is None:
        if SPLITS.issuperset(map(str.lower, number)):
            fix = "name them train and val, or set data.root= to one and data.val= to the other"
            raise UserError(f"{where}: {' and '.join(number)} are parts of a data set; {fix}")
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


def centre_crop(image, size):
    """(H, W, C) -> (C, size, size): the shorter side becomes 256/224 of size, then the centre.

    The official evaluation transform. An image whose shorter side is `size` already is not resized:
    enlarging small pictures such as CIFAR's only to cut off their borders loses information.
    """
    height, width = image.shape[:2]
    short = min(height, width)
    target = size if short == size else round(size * 256 / 224)
    image = resize(image, int(target * height / short), int(target * width / short))
    top, left = round((image.shape[0] - size) / 2), round((image.shape[1] - size) / 2)
    return torch.tensor(image[top : top + size, left : left + size]).permute(2, 0, 1)


def resize(image, height, width):
    """Pillow's antialiased bicubic. Integers of more than 8 bits become float32 in 0..1."""
    if image.dtype != np.uint8:
        scale = np.iinfo(image.dtype).max if image.dtype.kind in "ui" else 1
        image = np.float32(image) / np.float32(scale)
    if image.shape[:2] == (height, width):
        return image
    size, bicubic = (width, height), Image.Resampling.BICUBIC
    if image.dtype == np.uint8 and image.shape[2] == 3:  # at once: the same in half the time
        return np.array(Image.fromarray(image).resize(size, bicubic))
    planes = [Image.fromarray(plane) for plane in np.ascontiguousarray(image.transpose(2, 0, 1))]
    return np.stack([plane.resize(size, bicubic) for plane in planes], axis=2)


class Evaluation:
    """Index -> (crop (C, size, size), label); a damaged image is marked, and counts nowhere.

    A rank has every `world`-th image. All have equally many, for which the last begin again: with
    sharded weights, each forward pass is an appointment of all ranks.
    """

    def __init__(self, source, size, rank=0, world=1):
        self.source, self.size, self.rank, self.world = source, size, rank, world

    def __len__(self):
        return -(-len(self.source) // self.world)

    def __getitem__(self, index):
        index = (index * self.world + self.rank) % len(self.source)
        image, at, _ = read_or_next(self.source, index)
        # In place of a damaged image lies the next one, as batches of all ranks are equally large.
        return centre_crop(image, self.size), self.source.label(at) if at == index else DAMAGED


def evaluation_batches(source, cfg, batch=256, device="cpu", rank=0, world=1):
    """Iterator of (normalised images (B, C, size, size) on `device`, labels (B,) on the CPU)."""
    images = Evaluation(source, cfg.crops.global_size, rank, world)
    for image_BCSS, label_B in by_workers(images, cfg, batch_size=batch):
        image_BCSS = image_BCSS.to(device, non_blocking=True)
        yield normalised(image_BCSS, cfg.data.mean, cfg.data.std), label_B


def normalised(pixels, mean, std):
    """Pixels (.., C, H, W), uint8 or in 0..1, brought to the given mean and std of each channel."""
    mean, std = (torch.tensor(v, device=pixels.device)[:, None, None] for v in (mean, std))
    return (pixels / (255 if pixels.dtype == torch.uint8 else 1) - mean) / std
