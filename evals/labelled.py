"""Labelled images for a classifier: what is asked of them, and how they are shown in training.

A target is a question with one answer per image. The folders of the classes are one target; a CSV
can hold several, one a column, to be learned side by side:
    path,make,colour,orientation
    photos/0001.jpg,volvo,red,left          paths are relative to the CSV
    photos/0002.jpg,,blue,front             an empty field: not known, so it counts for nothing

Shapes:  N training images   M test images   T targets   B batch   C channels   S side of a crop
"""

import csv
import os
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import augment
import data
from config import UserError
from evals import frozen
from images import evaluation
from images.held_out import UNKNOWN, Part, divide
from images.sources import Files, by_workers, open_source, read_or_next

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
    """
    if not table:
        train, test = frozen.labelled_images(cfg)
        labels = [torch.tensor(part.labels) for part in (train, test)]
        return train, test, [Target("class", train.classes, *labels)]
    rows, names = read_table(Path(table), columns)
    train, test = open_source(cfg.data.root, cfg, "train"), evaluation.open_held_out(cfg)
    found = [[rows.get(p, {}) for p in places(s)] for s in (train, test) if s is not None]
    if not all(map(any, found)):
        raise UserError(
            f"labels={table}: has no row for the training or the test images; its column `path` "
            f"must lead from {Path(table).parent} to them"
        )
    classes = {n: sorted({row.get(n, "") for part in found for row in part} - {""}) for n in names}

    def numbers(row):
        return [classes[n].index(row[n]) if row.get(n) else UNKNOWN for n in names]

    label_NT, label_MT = (np.array([numbers(row) for row in part]) for part in (found * 2)[:2])
    if test is None:
        kept, held = divide(label_NT, 0.1)
        train, test = Part(train, kept), Part(train, held)
        label_NT, label_MT = label_NT[kept], label_NT[held]
    label_TN, label_TM = torch.tensor(label_NT).T, torch.tensor(label_MT).T
    rows = zip(classes.items(), label_TN, label_TM, strict=True)
    return train, test, [Target(*named, *labels) for named, *labels in rows]


def read_table(path, columns):
    """({absolute path of an image: {column: word}}, the columns that are asked for)."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"labels={path}: cannot be read ({error})") from None
    names = [name for name in (rows[0] if rows else {}) if name and name != "path"]
    if not names or "path" not in rows[0]:
        raise UserError(f"labels={path}: the first line must be like path,make,colour")
    wanted = [name.strip() for name in columns.split(",")] if columns else names
    for name in wanted:
        if name not in names:
            raise UserError(f"targets={name}: no such column in {path}; it has {', '.join(names)}")
    table = {}
    for row in rows:
        words = {name: (row[name] or "").strip() for name in wanted}
        words = {name: "" if word.lower() == "nan" else word for name, word in words.items()}
        if table.setdefault(os.path.abspath(path.parent / row["path"]), words) != words:
            raise UserError(f"labels={path}: {row['path']} is in it twice, with other words")
    return table, wanted


def places(source):
    """The absolute path of every image."""
    if not isinstance(source, Files) or source.index.shards:
        raise UserError("labels= needs images that are files: a folder or a list as data.root")
    return [os.path.abspath(Path(source.root, source.name(i))) for i in range(len(source))]


def check(target):
    """Raise UserError unless there is something to tell apart, to learn it from, and to test."""
    name, classes, train_N, test_M = target
    known, asked = (set(x[x >= 0].tolist()) for x in (train_N, test_M))
    if len(known) < 2:
        raise UserError(f"target {name}: training images of one class only; two are needed")
    if not asked:
        raise UserError(f"target {name}: no labelled test image; set data.val to some")
    if missing := ", ".join(classes[c] for c in sorted(asked - known)):
        raise UserError(
            f"class {missing} ({name}) has no training image: add some, or take its test images "
            "away"
        )


# ---- how they are shown -------------------------------------------------------------------------


class RandomCrops:
    """Position in an endless shuffle of some rows of a source -> (crop (C, S, S), row)."""

    def __init__(self, source, rows, size, seed):
        self.part, self.rows, self.size, self.seed = Part(source, rows), rows, size, seed
        self.order = data.Order(len(rows), seed)

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
    crops = RandomCrops(source, rows.tolist(), cfg.crops.global_size, seed)
    order = list(positions(iterations, batch, rank, world))
    for image_BCSS, row_B in by_workers(crops, cfg, batch_sampler=order):
        image_BCSS = image_BCSS.to(device, non_blocking=True)
        yield evaluation.normalised(image_BCSS, cfg.data.mean, cfg.data.std), row_B
