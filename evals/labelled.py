"""Labelled images for a classifier: what is asked of them, which ones choose, how they are shown.

A target is a question with one answer per image. The folders of the classes are one target; a CSV
can hold several, one a column, to be learned side by side:
    path,make,colour,orientation
    photos/0001.jpg,volvo,red,left          paths are relative to the CSV
    photos/0002.jpg,,blue,front             an empty field: not known, so it counts for nothing

Shapes:  N training images   M test images   B batch   C channels   S side of a crop
"""

import csv
import os
import random
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

import augment
import data
from config import UserError
from data import Order, Part
from images.sources import Files, open_source, read_or_next, split_folder

UNKNOWN = -1
SCALE, RATIO, FLIP = (0.08, 1.0), (3 / 4, 4 / 3), 0.5  # of the official random crops for a probe


class Target(NamedTuple):
    """One question: its possible answers, and the number of the right one for every image."""

    name: str
    classes: list
    train_N: Tensor
    test_M: Tensor


# ---- what is asked ------------------------------------------------------------------------------


def labelled_images(cfg, table="", columns=""):
    """(training images, test images, [Target]) of data.root and data.val.

    table    a CSV of labels; empty: the folders of the classes
    columns  of the table, separated by commas; empty: all
    Raises UserError where a class cannot be learned, chosen or tested.
    """
    if table:
        train, test = divided(cfg)
        targets = targets_of_table(Path(table), columns, train, test)
    else:
        train, test = data.evaluation_images(cfg) or missing_labels(cfg)
        labels = [torch.tensor([s.label(i) for i in range(len(s))]) for s in (train, test)]
        targets = [Target("class", train.classes, *labels)]
    for target in targets:
        check(target)
    return train, test, targets


def missing_labels(cfg):
    raise UserError(
        f"data.root={cfg.data.root}: no labelled train and test images; set data.val or labels="
    )


def divided(cfg):
    """Training and test images of a folder whose sub-folders, if any, mean nothing."""
    root, val = cfg.data.root, cfg.data.val
    train = open_source(root, cfg, "train")
    if val or split_folder(root, "train") != split_folder(root, "test"):
        return train, data.open_held_out(cfg)
    return (
        Part(train, [i for i in range(len(train)) if i % 10]),
        Part(train, range(0, len(train), 10)),
    )


def targets_of_table(path, columns, train, test):
    """The columns of a CSV as targets; an image without a row has no label."""
    rows, names = read_table(path)
    wanted = [name.strip() for name in columns.split(",")] if columns else names
    for name in wanted:
        if name not in names:
            raise UserError(f"targets={name}: no such column in {path}; it has {', '.join(names)}")
    found = [[rows.get(place) for place in places(source)] for source in (train, test)]
    for source, title in zip(found, ("training", "test"), strict=True):
        if not any(source):
            raise UserError(
                f"{path}: has none of the {title} images; its column `path` must lead from "
                f"{path.parent} to them"
            )
    return [target_of_column(name, *found) for name in wanted]


def read_table(path):
    """({absolute path of an image: row}, names of the columns of labels)."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"labels={path}: cannot be read ({error})") from None
    names = [name for name in (rows[0] if rows else {}) if name and name != "path"]
    if not names or "path" not in rows[0]:
        raise UserError(f"labels={path}: the first line must be like path,make,colour")
    return {os.path.abspath(path.parent / row["path"]): row for row in rows}, names


def places(source):
    """The absolute path of every image."""
    if isinstance(source, Part):
        everything = places(source.source)
        return [everything[i] for i in source.indices]
    if not isinstance(source, Files) or source.index.shards:
        raise UserError("labels= needs images that are files: a folder or a list as data.root")
    return [os.path.abspath(Path(source.root, source.name(i))) for i in range(len(source))]


def target_of_column(name, train, test):
    words = [[((row or {}).get(name) or "").strip() for row in rows] for rows in (train, test)]
    classes = sorted(set(words[0] + words[1]) - {""})
    number = {word: i for i, word in enumerate(classes)} | {"": UNKNOWN}
    return Target(name, classes, *(torch.tensor([number[w] for w in side]) for side in words))


def check(target):
    """Raise UserError unless every class can be learned and chosen, and something be tested."""
    name, classes, train_N, test_M = target
    if len(classes) < 2:
        raise UserError(f"target {name}: {len(classes)} class; at least two are needed")
    if not (test_M >= 0).any():
        raise UserError(f"target {name}: no labelled test image; set data.val to some")
    for word, count in zip(classes, counts(train_N, len(classes)), strict=True):
        if count == 0:
            raise UserError(
                f"class {word} ({name}) has no training image: add some, or take its test images "
                "away"
            )
        if count == 1:
            raise UserError(
                f"class {word} ({name}) has 1 training image, and needs 2, one to learn from and "
                "one to choose with: add some, or take the class away"
            )


def counts(label_N, classes):
    return label_N[label_N >= 0].bincount(minlength=classes).tolist()


# ---- which images choose ------------------------------------------------------------------------


def hold_out(targets, share, seed=0):
    """(indices to learn from, indices to choose with) of the labelled training images.

    Drawn at random, except that the last image of a class always stays to be learned from.
    """
    label_NT = torch.stack([t.train_N for t in targets], dim=1)
    labelled = (label_NT >= 0).any(dim=1).nonzero().flatten()
    left = [counts(t.train_N, len(t.classes)) for t in targets]
    wanted = max(1, round(share * len(labelled)))
    rng = torch.Generator().manual_seed(seed)
    shuffled = labelled[torch.randperm(len(labelled), generator=rng)]
    kept, held = [], []
    for i, labels in zip(shuffled.tolist(), label_NT[shuffled].tolist(), strict=True):
        own = [(t, label) for t, label in enumerate(labels) if label >= 0]
        if len(held) < wanted and all(left[t][label] > 1 for t, label in own):
            held.append(i)
            for t, label in own:
                left[t][label] -= 1
        else:
            kept.append(i)
    return torch.tensor(sorted(kept)), torch.tensor(sorted(held))


# ---- how they are shown -------------------------------------------------------------------------


class Numbered(Part):
    """A source whose labels are its indices: they tell which image one gets in place of another."""

    def __init__(self, source):
        super().__init__(source, range(len(source)))

    def label(self, i):
        return i


class RandomCrops:
    """Position in an endless shuffle of some rows of a source -> (crop (C, S, S), row)."""

    def __init__(self, source, rows, size, seed):
        self.part, self.rows, self.size, self.seed = Part(source, rows), rows, size, seed
        self.order = Order(len(rows), seed)

    def __getitem__(self, position):
        image, at, _ = read_or_next(self.part, self.order[position])
        rng = random.Random(f"{self.seed} crop {position}")
        box = augment.draw_box(rng, *image.shape[:2], SCALE, RATIO)
        crop_CSS = augment.resized_crop(image, box, self.size)
        crop_CSS = crop_CSS.flip(2) if rng.random() < FLIP else crop_CSS
        return crop_CSS.contiguous(), self.rows[at]


def positions(iterations, batch, rank=0, world=1):
    """The positions of this rank in the endless shuffle, iteration by iteration."""
    for step in range(iterations):
        yield range(step * batch + rank, (step + 1) * batch, world)


def augmented_batches(source, rows, cfg, iterations, batch, device, seed=0, rank=0, world=1):
    """Iterator of (normalised random crops (B, C, S, S) on the device, rows (B,)), endless shuffle.

    The official augmentation of a probe: crops of 8 to 100 % of the area, and flips.
    """
    batches = DataLoader(
        RandomCrops(source, rows.tolist(), cfg.crops.global_size, seed),
        batch_sampler=list(positions(iterations, batch, rank, world)),
        **data.worker_options(cfg),
    )
    for image_BCSS, row_B in data.one_line_errors(batches):
        image_BCSS = image_BCSS.to(device, non_blocking=True)
        yield data.normalised(image_BCSS, cfg.data.mean, cfg.data.std), row_B
