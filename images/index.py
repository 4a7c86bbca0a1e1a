"""Which images there are: a folder, a list, tar shards or an array, searched once.

Millions of Python strings would cost 100 bytes each and, as reading a string changes its reference
count, be copied into every worker. An Index is a handful of arrays, which workers share.

Shards are tar files in WebDataset layout: cat/7.jpg and cat/7.cls lie together, and .cls holds the
class. They are usually streamed, and shuffled through a buffer. Here each member's place is noted
once and read from there, so shards have the same endless order as anything else: shuffled over the
whole set, equal for any number of ranks and workers, and resumed at the exact image.
"""

import contextlib
import csv
import hashlib
import json
import os
import re
import tarfile
import time
import zipfile
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from config import UserError, replace_text
from images.reader import EXTENSIONS, reason
from parallel import progress, warn_once

# Folders that storage and operating systems leave behind: previews, and what was thrown away.
JUNK = {"@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
NEEDS = dict.fromkeys((".heic", ".heif", ".hif"), "pillow-heif")  # packages that read more
BESIDE = (".json", ".txt")  # what shards hold beside images and classes
KINDS = ("uint8", "uint16", "int16", "float16", "float32", "float64")  # of arrays
LABELS = ("labels", "label", "y", "targets", "target")  # names of them in an .npz

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanodinov2"
MANY = 10_000  # images in shards; the places of fewer are found in less than a second


class Index(NamedTuple):
    """Name, class and place of n images."""

    names: np.ndarray  # uint8: all names, one after the other
    ends: np.ndarray  # (n,) where each name ends
    labels: np.ndarray  # (n,) number of the class, -1 without one
    slices: np.ndarray  # (n, 3) in shards: number of the shard, offset, size; else (0, 3)
    classes: list  # their names
    shards: list  # paths; [] if every image is a file of its own
    left_out: dict  # {what kind of file is not read: how many of them}

    def name(self, i):
        start = self.ends[i - 1] if i else 0
        return os.fsdecode(self.names[start : self.ends[i]].tobytes())


def make_index(names, classes_of, shards=(), slices=(), left_out=()):
    """From a name and a class per image ("" without one). Numbers go by value, words by letter."""
    encoded = [os.fsencode(name) for name in names]
    classes = sorted(set(classes_of) - {""}, key=lambda c: (int(c) if c.isdecimal() else -1, c))
    number = {name: i for i, name in enumerate(classes)} | {"": -1}
    return Index(
        np.frombuffer(b"".join(encoded), np.uint8),
        np.cumsum([len(name) for name in encoded], dtype=np.int64),
        np.array([number[c] for c in classes_of], np.int32),
        np.array(slices, np.int64).reshape(-1, 3),
        classes,
        list(shards),
        dict(left_out),
    )


def known(label):
    """A label as text; "" for what programs write where there is none."""
    label = str(label).strip()
    return "" if label.lower() in ("nan", "<na>") else label


def kind_of(name):
    """Under which word a file that is not read is counted: its ending, and what would read it."""
    ending = os.path.splitext(name)[1].lower() or "no ending"
    return f"{ending} (pip install {NEEDS[ending]})" if ending in NEEDS else ending


# ---- folders ------------------------------------------------------------------------------------


def index_folder(root):
    """All images below a folder. Their classes are its first-level sub-folders."""
    names, left_out = find_images(os.fspath(root))
    classes_of = [name.split(os.sep)[0] if os.sep in name else "" for name in names]
    return make_index(names, classes_of, left_out=left_out)


def find_images(root):
    """(paths of images relative to root, what is left out), always in one order."""
    found, seen, left_out = [], set(), Counter()

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
        left_out += Counter(f"folder {name}" for name in below if name in JUNK)
        below[:] = sorted(n for n in below if n not in JUNK and not n.startswith("."))
        folder = os.path.relpath(path, root) if path != root else ""
        for name in sorted(n for n in files if not n.startswith(".")):  # as macOS leaves behind
            if name.lower().endswith(EXTENSIONS):
                found.append(os.path.join(folder, name))
            else:
                left_out[kind_of(name)] += 1
    return found, left_out


# ---- lists --------------------------------------------------------------------------------------


def index_list(path):
    """A .txt (path), .tsv or .csv (path, label) with one image a line.

    A first line that says `path` names the columns, of which `path` and `label` are used.
    """
    separator = {".csv": ",", ".tsv": "\t"}.get(path.suffix.lower())
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))  # "Unicode text" of Windows
    if not utf16 and b"\0" in data:
        raise UserError(f"{path}: not a list in plain text; save it as UTF-8")
    text = data.decode("utf-16" if utf16 else "utf-8-sig", "surrogateescape")
    lines = re.split("\r\n?|\n", text)  # splitlines() cuts at other letters too
    rows = csv.reader(lines, delimiter=separator) if separator else ([line] for line in lines)
    names, classes_of, class_of, columns = [], [], {}, (0, 1)
    for number, row in enumerate(rows, 1):
        row = [cell.strip() for cell in row]
        if number == 1 and "path" in (titles := [cell.lower() for cell in row]):
            columns = [titles.index(t) if t in titles else len(row) for t in ("path", "label")]
            if len(row) > 1 and "label" not in titles:
                warn_once(f"{path}: no column is called `label`, so no image has a class")
        elif any(row):
            name, label = (row[c] if c < len(row) else "" for c in columns)
            if not name:
                raise UserError(f"{path}, line {number}: a label without an image")
            if class_of.setdefault(name, label) != label:
                raise UserError(f"{path}, line {number}: {name} has another label further up")
            names.append(name)
            classes_of.append(known(label))
    for name in names[:1000]:  # asking for each of millions would take minutes on a network disk
        if not os.path.exists(path.parent / name):
            line = "path" if separator is None else f"path{separator}label"
            fix = f"a line is {line}, and paths are relative to {path.parent}/"
            raise UserError(f"{path}: {name} does not exist; {fix}")
    return make_index(names, classes_of)


# ---- arrays -------------------------------------------------------------------------------------


def index_array(path):
    """(images (N, H, W, C), their Index) of a .npy, or of an .npz that holds labels too, maybe."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        arrays = dict(found) if path.suffix.lower() == ".npz" else {path.name: found}
        beside = path.with_name(f"{path.stem}_labels.npy")
        if path.suffix.lower() == ".npy" and beside.exists():
            arrays["labels"] = np.load(beside, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        fix = "; save text with .astype(str)" if "Object arrays" in str(error) else ""
        raise UserError(f"{path}: not a readable array ({reason(error)}){fix}") from None
    images = [name for name, a in arrays.items() if a.ndim in (3, 4) and name not in LABELS]
    if len(images) != 1:
        held = ", ".join(f"{name} {a.shape}" for name, a in arrays.items()) or "nothing"
        raise UserError(f"{path}: holds {held}; expected one array of images (N, H, W, C)")
    images = arrays.pop(images[0])
    if not images.size or images.dtype.name not in KINDS:
        found = f"{len(images)} images of {images.dtype}"
        raise UserError(f"{path}: {found}; save them as uint8, uint16, int16 or float32")
    images = images if images.ndim == 4 else images[..., None]
    return images, make_index([], labels_of(arrays, len(images), path))


def labels_of(arrays, n, path):
    """The class of each of n images as text, "" without one, from the arrays beside the images."""
    names = [name for name in arrays if name in LABELS] or list(arrays)
    if not names:
        return [""] * n
    labels = arrays[names[0]]
    whole = labels.dtype.kind != "f" or np.array_equal(labels, labels.round(), equal_nan=True)
    if len(names) > 1 or labels.shape not in ((n,), (n, 1)) or not whole:
        held = ", ".join(f"{name} {arrays[name].shape}" for name in names)
        fix = "give one array `labels`, with a whole number or a word for each image"
        raise UserError(f"{path}: {n} images but {labels.size} labels in {held}; {fix}")
    if labels.dtype.kind == "f":
        labels = np.nan_to_num(labels, nan=-1).astype(int)
    words = map(known, labels.ravel().astype(str))
    return ["" if labels.dtype.kind == "i" and word.startswith("-") else word for word in words]


# ---- shards -------------------------------------------------------------------------------------


def index_shards(paths):
    """One Index of several shards.

    To find the places in a thousand shards takes minutes. They are kept in a file (~/.cache/
    nanodinov2), which is named after everything that they depend on.
    """
    paths = [os.path.abspath(path) for path in paths]
    key, before = repr([paths, stamps(paths), EXTENSIONS]), time.time()
    cache = CACHE / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
    try:
        names, classes_of, slices, left_out = json.loads(cache.read_text())
    except (OSError, ValueError):
        names, classes_of, slices, left_out = [], [], [], Counter()
        for number, path in enumerate(progress(paths, desc="indexing", unit=" shards")):
            for name, label, *place in read_shard(path, left_out):
                names.append(name)
                classes_of.append(label)
                slices.append((number, *place))
        # A change within the resolution of a clock goes unnoticed: what is fresh is not kept.
        settled = all(changed < before - 2 for changed, _ in stamps(paths))
        if settled and len(names) > MANY:
            with contextlib.suppress(OSError):  # no room: the next start takes as long
                CACHE.mkdir(parents=True, exist_ok=True)
                replace_text(cache, json.dumps([names, classes_of, slices, left_out]))
    index = make_index(names, classes_of, paths, slices, left_out)
    return with_class_names(index, Path(paths[0]).with_name("classes.txt"))


def stamps(paths):
    """Time of change and size of each file; zeros for one that is not there."""
    about = os.path.getmtime, os.path.getsize
    return [[f(p) for f in about] if os.path.exists(p) else [0, 0] for p in paths]


def with_class_names(index, path):
    """`pack` writes the names of the classes beside the shards, one a line: .cls holds numbers."""
    if not path.exists() or not index.classes:
        return index
    names = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    if not all(c.isdecimal() and int(c) < len(names) for c in index.classes):
        raise UserError(f"{path}: {len(names)} names do not fit the .cls of the shards")
    if again := Counter(names) - Counter(set(names)):  # evaluation sets are compared by name
        raise UserError(f"{path}: {min(again)} is in it twice; give every class its own name")
    table = np.array([*map(int, index.classes), -1], np.int32)  # -1 is the last
    return index._replace(labels=table[index.labels], classes=names)


def read_shard(path, left_out):
    """[(name, class, offset, size)] of the images in one tar file. Nothing is ever extracted."""
    images, class_of, seen = [], {}, set()
    for name, offset, size in members(path, left_out):
        if name in seen:  # one would take the label of the other
            raise UserError(f"{path}: {name} is in it twice; give every sample a name of its own")
        seen.add(name)
        stem, ending = os.path.splitext(name)
        if ending.lower() == ".cls":
            with open(path, "rb") as file:
                file.seek(offset)
                class_of[stem] = known(file.read(min(size, 1000)).decode(errors="replace"))
        elif name.rpartition("/")[2].startswith("."):
            continue
        elif name.lower().endswith(EXTENSIONS):
            images.append((name, offset, size))
        elif ending.lower() not in BESIDE:
            left_out[kind_of(name)] += 1
    return [(name, class_in_shard(name, class_of), *place) for name, *place in images]


def class_in_shard(name, class_of):
    """The class of a member: what lies in the .cls of the longest name that it begins with.

    So scan.2024.7.png belongs to scan.2024.7.cls. In WebDataset the name of a sample ends at the
    first dot: 7.left.png belongs to 7.cls, as there is no 7.left.cls.
    """
    while "." in name.rpartition("/")[2]:
        name = name.rpartition(".")[0]
        if name in class_of:
            return class_of[name]
    return ""


def members(path, left_out):
    """(name, offset, size) of the files in a tar; of a truncated one, with a warning, what is left.

    A tar can hold members that leave the folder it is extracted to, or that are links and devices.
    They have no business among images: a shard with one is refused as a whole.
    """
    try:
        with tarfile.open(path, "r:") as tar, open(path, "rb") as file:
            total = os.fstat(file.fileno()).st_size
            while (member := tar.next()) is not None:
                tar.members.clear()  # it would keep a kilobyte for each
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts or "\\" in member.name:
                    raise UserError(f"{path}: refused, {member.name!r} leads out of the shard")
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise UserError(f"{path}: refused, {member.name!r} is a link or a device")
                if member.offset_data + member.size > total:
                    raise tarfile.ReadError(f"it ends within {member.name}")
                yield member.name, member.offset_data, member.size
            file.seek(tar.offset)
            if file.read(512) != bytes(512):  # a whole tar ends in empty blocks
                raise tarfile.ReadError("its end is missing")
    except tarfile.ReadError as error:
        warn_once(
            f"{path} is truncated or not an uncompressed tar ({error}): what comes before is used"
        )
        left_out["truncated shard"] += 1
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
