"""Which images there are: a folder, a list, tar shards or an array, searched once.

Millions of Python strings would cost 100 bytes each and, as reading a string changes its reference
count, be copied into every worker. An Index is a handful of arrays, which workers share.

Shards are tar files in WebDataset layout: cat/7.jpg and cat/7.cls lie together, and .cls holds the
class, a number or a word. They are usually streamed, and shuffled through a buffer. Here each
member's place is noted once and read from there, so shards have the same endless order as anything
else: shuffled over the whole set, equal for any number of ranks and workers, and resumed at the
exact image.
"""

import csv
import os
import tarfile
import zipfile
from collections import Counter
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np

from config import UserError
from images.reader import EXTENSIONS, reason
from parallel import progress, warn_once

# Folders that storage and operating systems leave behind: previews, and what was thrown away.
JUNK = {"@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
KINDS = ("uint8", "uint16", "int16", "float16", "float32", "float64")  # of arrays


class Index(NamedTuple):
    """Name, class and place of n images."""

    names: np.ndarray  # (n,) bytes
    labels: np.ndarray  # (n,) number of the class, -1 without one
    classes: list  # their names
    left_out: dict  # {what kind of file is not read: how many of them}
    shards: list  # paths; [] if every image is a file of its own
    slices: np.ndarray  # (n, 3) in shards: number of the shard, offset, size; else (0, 3)

    def name(self, i):
        return os.fsdecode(self.names[i])


def make_index(names, classes_of, left_out=(), shards=(), slices=()):
    """From a name and a class per image ("" without one). Numbers go by value, words by letter."""
    classes = sorted(set(classes_of) - {""}, key=lambda c: (int(c) if c.isdecimal() else -1, c))
    number = {name: i for i, name in enumerate(classes)} | {"": -1}
    return Index(
        np.array([os.fsencode(name) for name in names], bytes),
        np.array([number[c] for c in classes_of], np.int32),
        classes,
        dict(left_out),
        list(shards),
        np.array(slices, np.int64).reshape(-1, 3),
    )


def known(label):
    """A label as text; "" for what programs write where there is none."""
    label = str(label).strip()
    return "" if label.lower() in ("nan", "<na>") else label


def kind_of(name):
    """Under which word a file that is not read is counted."""
    ending = os.path.splitext(name)[1].lower() or "no ending"
    return f"{ending} (pip install pillow-heif)" if ending == ".heic" else ending


def index_folder(root):
    """All images below a folder, always in one order. Classes are its first-level sub-folders."""
    root, found, seen, left_out = os.fspath(root), [], set(), Counter()

    def unreadable(error):
        warn_once(f"{error.filename} is left out: {error.strerror}")
        left_out["unreadable folder"] += 1

    walk = os.walk(root, onerror=unreadable, followlinks=True)
    for path, below, files in progress(walk, desc=f"searching {root}", unit=" folders"):
        status = os.stat(path)
        # Links to folders are followed; one that leads back up would go round for ever.
        if (status.st_dev, status.st_ino) in seen:
            below.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        left_out.update(f"folder {name}" for name in below if name in JUNK)
        below[:] = sorted(n for n in below if n not in JUNK and not n.startswith("."))
        folder = os.path.relpath(path, root) if path != root else ""
        for name in sorted(n for n in files if not n.startswith(".")):  # as macOS leaves behind
            if name.lower().endswith(EXTENSIONS):
                found.append(os.path.join(folder, name))
            else:
                left_out[kind_of(name)] += 1
    classes_of = [name.split(os.sep)[0] if os.sep in name else "" for name in found]
    return make_index(found, classes_of, left_out)


def index_list(path):
    """A .txt (path), .tsv or .csv (path, label) with one image a line; a first line may say so."""
    separator = {".csv": ",", ".tsv": "\t"}.get(path.suffix.lower())
    form = f"path{separator}label" if separator else "path"
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a list in plain text; save it as UTF-8") from None
    rows = csv.reader(lines, delimiter=separator) if separator else ([line] for line in lines)
    names, classes_of, class_of = [], [], {}
    for number, row in enumerate(rows, 1):
        if len(row) > 2:
            raise UserError(f"{path}, line {number}: {len(row)} columns; a line is {form}")
        name, label = (cell.strip() for cell in [*row, "", ""][:2])
        if (name or label) and name.lower() != "path":
            if class_of.setdefault(name, label) != label:
                raise UserError(f"{path}, line {number}: {name} has another label further up")
            names.append(name)
            classes_of.append(known(label))
    for name in names[:1000]:  # asking for each of millions would take minutes on a network disk
        if not os.path.isfile(path.parent / name):
            fix = f"a line is {form}, and paths are relative to {path.parent}/"
            raise UserError(f"{path}: {name} does not exist; {fix}")
    return make_index(names, classes_of)


def index_array(path):
    """(images (N, H, W, C), their Index) of a .npy, or of an .npz with `images` and `labels`."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        arrays = dict(found) if path.suffix.lower() == ".npz" else {"images": found}
        beside = path.with_name(f"{path.stem}_labels.npy")
        if path.suffix.lower() == ".npy" and beside.exists():
            arrays["labels"] = np.load(beside, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        fix = "; save text with .astype(str)" if "Object arrays" in str(error) else ""
        raise UserError(f"{path}: not a readable array ({reason(error)}){fix}") from None
    held = ", ".join(f"{name} {a.dtype} {a.shape}" for name, a in arrays.items()) or "nothing"
    images, labels = arrays.pop("images", np.zeros(0)), arrays.pop("labels", None)
    if arrays or not images.size or images.ndim not in (3, 4) or images.dtype.name not in KINDS:
        form = "`images` (N, H, W, C) of uint8, uint16, int16 or float32, and maybe `labels`"
        raise UserError(f"{path}: holds {held}; expected {form}")
    images = images if images.ndim == 4 else images[..., None]
    if labels is None:
        return images, make_index([], [""] * len(images))
    if labels.shape not in ((len(images),), (len(images), 1)) or labels.dtype.kind not in "biuSU":
        raise UserError(f"{path}: holds {held}; give each image one whole number or word")
    words = map(known, labels.ravel().astype(str))
    signed = labels.dtype.kind == "i"  # below zero: no class
    return images, make_index([], ["" if signed and w.startswith("-") else w for w in words])


def index_shards(paths):
    """One Index of several shards."""
    names, classes_of, left_out, slices = [], [], Counter(), []
    paths = [os.path.abspath(path) for path in paths]
    for number, path in enumerate(progress(paths, desc="indexing", unit=" shards")):
        for name, label, *place in read_shard(path, left_out):
            names.append(name)
            classes_of.append(label)
            slices.append((number, *place))
    return make_index(names, classes_of, left_out, paths, slices)


def read_shard(path, left_out):
    """[(name, class, offset, size)] of the images in one tar file. Nothing is ever extracted.

    A tar can hold members that leave the folder it is extracted to, or that are links and devices.
    They have no business among images: a shard with one is refused as a whole.
    """
    images, class_of, seen = [], {}, set()
    try:
        with tarfile.open(path, "r:") as tar, open(path, "rb") as file:
            while (member := tar.next()) is not None:
                tar.members.clear()  # it would keep a kilobyte for each
                name, parts = member.name, PurePosixPath(member.name)
                if parts.is_absolute() or ".." in parts.parts or "\\" in name:
                    raise UserError(f"{path}: refused, {name!r} leads out of the shard")
                if not (member.isreg() or member.isdir()) or member.issparse():
                    raise UserError(f"{path}: refused, {name!r} is a link or a device")
                if member.isdir() or parts.name.startswith("."):
                    continue
                if name in seen:  # one would take the label of the other
                    raise UserError(f"{path}: {name} is in it twice; give each sample its own name")
                seen.add(name)
                stem, ending = os.path.splitext(name)
                if ending.lower() == ".cls":
                    file.seek(member.offset_data)
                    class_of[stem] = os.fsdecode(file.read(min(member.size, 1000))).strip()
                elif name.lower().endswith(EXTENSIONS):
                    images.append((name, member.offset_data, member.size))
                else:
                    left_out[kind_of(name)] += 1
            file.seek(tar.offset)
            if file.read(512) != bytes(512):  # a whole tar ends in empty blocks
                raise tarfile.ReadError("its end is missing")
    except tarfile.ReadError as error:
        raise UserError(f"{path}: truncated, or not an uncompressed tar ({error})") from None
    return [(name, class_in_shard(name, class_of), *place) for name, *place in images]


def class_in_shard(name, class_of):
    """scan.2024.7.png belongs to scan.2024.7.cls; else, as in WebDataset, 7.left.png to 7.cls."""
    folder, slash, file = name.rpartition("/")
    first_dot = f"{folder}{slash}{file.partition('.')[0]}"
    return class_of.get(os.path.splitext(name)[0], class_of.get(first_dot, ""))
