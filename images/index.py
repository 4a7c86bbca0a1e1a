"""Which images there are: a folder, a list or tar shards, searched once, as a few arrays.

Millions of Python strings would cost 100 bytes each and, as reading a string changes its reference
count, be copied into every worker. An Index is a handful of arrays, which processes share. One that
took long to make is kept in a cache file (~/.cache/nanodinov2) and checked at the next start.

Shards are tar files in WebDataset layout: members of one sample lie together and share their name
up to the first dot, as in cat/7.jpg and cat/7.cls; .cls holds the number of the class. They are
usually streamed, and shuffled through a buffer. Here each member's place is noted once and read
from there, so shards have the same endless order as anything else: shuffled over the whole set,
equal for any number of ranks and workers, and resumed at the exact image.
"""

import contextlib
import csv
import hashlib
import json
import os
import struct
import tarfile
import time
import zipfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from config import UserError
from parallel import progress, warn

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm")
EXTENSIONS = (*PICTURES, ".npy")  # an array (H, W, C) holds what no picture format can

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanodinov2"
SLOW = 0.5  # seconds; an index that is made more quickly is not worth a file


class Index(NamedTuple):
    """Name, class and place of n images."""

    names: np.ndarray  # uint8: all names, one after the other
    ends: np.ndarray  # (n,) where each name ends
    labels: np.ndarray  # (n,) number of the class, -1 without one
    slices: np.ndarray  # (n, 3) in shards: number of the shard, offset, size; else (0, 3)
    classes: list  # their names
    shards: list  # paths; [] if every image is a file of its own

    def name(self, i):
        start = self.ends[i - 1] if i else 0
        return os.fsdecode(self.names[start : self.ends[i]].tobytes())


def make_index(names, classes_of, shards=(), slices=()):
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
    )


# ---- cache --------------------------------------------------------------------------------------


def cached(key, build, again=False):
    """build(), or the Index it returned last time if nothing has changed since.

    build() -> (Index, paths it depends on). Adding, removing or renaming a file changes the
    modification time of its folder, so to check millions of files it is enough to look at the
    folders.
    """
    file = CACHE / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"
    with contextlib.suppress(OSError, ValueError, KeyError, struct.error, zipfile.BadZipFile):
        *arrays, text = map_npz(file).values()
        classes, shards, watched, before = json.loads(text.tobytes())
        if not again and stamps(watched) == before:
            return Index(*arrays, classes, shards)
    start = time.time()
    index, watched = build()
    now = stamps(watched)
    # A change within the resolution of the clock goes unnoticed: what is fresh is not stored.
    settled = all(modified < (start - 2) * 1e9 for modified, _ in now)
    if settled and (again or time.time() - start >= SLOW):
        text = json.dumps([index.classes, index.shards, watched, now]).encode()
        aside = file.with_name(f"{file.stem}.{os.getpid()}.npz")  # other processes write it too
        with contextlib.suppress(OSError):  # no room for a cache: the next start takes as long
            file.parent.mkdir(parents=True, exist_ok=True)
            np.savez(aside, *index[:4], np.frombuffer(text, np.uint8))
            os.replace(aside, file)
    return index


def stamps(paths):
    status = [os.stat(path) for path in paths]
    return [[s.st_mtime_ns, s.st_size] for s in status]


def map_npz(path):
    """The arrays of an .npz by name, left on the disk until they are used.

    NumPy maps .npy only. But an .npz is a zip, and savez (not savez_compressed) stores its .npy
    files in it as they are: it is enough to find out where. Compressed ones are read as a whole.
    """
    arrays = {}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if member.compress_type != zipfile.ZIP_STORED:
                with np.load(path, allow_pickle=False) as whole:
                    arrays[name] = whole[name]
                continue
            file.seek(member.header_offset)
            name_size, extra_size = struct.unpack("<26x2H", file.read(30))
            file.seek(name_size + extra_size, os.SEEK_CUR)
            version = np.lib.format.read_magic(file)
            read_header = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
            shape, fortran, dtype = read_header(file)
            if dtype.hasobject:
                raise ValueError(f"{name} holds Python objects, which are not loaded")
            order = "F" if fortran else "C"
            arrays[name] = (
                np.memmap(path, dtype, "r", file.tell(), shape, order)
                if 0 not in shape
                else np.empty(shape, dtype)
            )
    return arrays


# ---- folders ------------------------------------------------------------------------------------


def index_folder(root, again=False):
    """All images below a folder. Their classes are its first-level sub-folders."""

    def build():
        names, folders = find_images(root)
        classes_of = [name.split(os.sep)[0] if os.sep in name else "" for name in names]
        return make_index(names, classes_of), folders

    return cached(f"folder {os.path.abspath(root)} {EXTENSIONS}", build, again)


def find_images(root):
    """(paths of image files relative to root, all folders), always in the same order."""
    found, folders, seen, waiting = [], [], set(), [""]
    with progress(desc=f"searching {root}", unit=" images") as bar:
        while waiting:
            folder = waiting.pop()
            path = os.path.join(root, folder)
            try:
                status = os.stat(path)
                # Links to folders are followed; one that leads back up would go round for ever.
                if (status.st_dev, status.st_ino) in seen:
                    continue
                seen.add((status.st_dev, status.st_ino))
                entries = sorted(os.scandir(path), key=lambda entry: entry.name)
            except OSError as error:
                warn(f"{path} is left out: {error.strerror}")
                continue
            folders.append(path)
            below, before = [], len(found)
            for entry in entries:
                if entry.name.startswith("."):  # thumbnails, and what macOS leaves behind
                    continue
                if entry.name.lower().endswith(EXTENSIONS):
                    found.append(os.path.join(folder, entry.name))
                elif entry.is_dir():
                    below.append(os.path.join(folder, entry.name))
            waiting += reversed(below)
            bar.update(len(found) - before)
    return found, folders


# ---- lists --------------------------------------------------------------------------------------


def index_list(path):
    """A .txt (path), .tsv or .csv (path, label) with one image a line.

    A first line that says `path` names the columns, of which `path` and `label` are used.
    """
    path = Path(path)
    separator = {".csv": ",", ".tsv": "\t"}.get(path.suffix.lower())
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    lines = text.splitlines()
    rows = csv.reader(lines, delimiter=separator) if separator else ([line] for line in lines)
    names, classes_of, columns = [], [], (0, 1)
    for number, row in enumerate(rows, 1):
        row = [cell.strip() for cell in row]
        if number == 1 and "path" in row:
            columns = row.index("path"), row.index("label") if "label" in row else len(row)
            continue
        if not any(row):
            continue
        name, label = ((row[c] if c < len(row) else "") for c in columns)
        if not name:
            raise UserError(f"{path}, line {number}: a label without an image; write path,label")
        names.append(name)
        classes_of.append(label)
    for name in names[:1000]:  # asking for each of millions would take minutes on a network disk
        if not os.path.exists(path.parent / name):
            raise UserError(f"{path}: {name} does not exist; paths are relative to {path.parent}/")
    return make_index(names, classes_of)


# ---- shards -------------------------------------------------------------------------------------


def index_shards(paths, again=False):
    """One Index of several shards. Each has a cache file of its own, so new ones can be added."""
    paths = [os.fspath(path) for path in paths]
    parts = [
        cached(f"shard {os.path.abspath(p)}", lambda p=p: (index_shard(p), [p]), again)
        for p in progress(paths, desc="indexing", unit=" shards")
    ]
    classes = make_index([], [c for part in parts for c in part.classes]).classes
    number = {name: i for i, name in enumerate(classes)}
    labels, ends, slices, start = [], [], [], 0
    for i, part in enumerate(parts):
        table = np.array([number[c] for c in part.classes] + [-1], np.int32)  # -1 is the last
        labels.append(table[part.labels])
        ends.append(part.ends + start)
        slices.append(part.slices + np.array([i, 0, 0]))
        start += len(part.names)
    index = Index(
        *map(np.concatenate, ([part.names for part in parts], ends, labels, slices)),
        classes,
        paths,
    )
    return with_class_names(index, Path(paths[0]).with_name("classes.txt"))


def with_class_names(index, path):
    """`pack` writes the names of the classes beside the shards, one a line: .cls holds numbers."""
    if not path.exists() or not index.classes:
        return index
    names = path.read_text(encoding="utf-8").splitlines()
    if not all(c.isdecimal() and int(c) < len(names) for c in index.classes):
        raise UserError(f"{path}: {len(names)} names do not fit the .cls of the shards")
    table = np.array([*map(int, index.classes), -1], np.int32)  # -1 is the last
    return index._replace(labels=table[index.labels], classes=names)


def index_shard(path):
    """The images of one tar file and where they lie in it. Nothing is ever extracted."""
    names, places, class_of = [], [], {}
    for name, offset, size in members(path):
        folder, _, base = name.rpartition("/")
        key, low = f"{folder}/{base.partition('.')[0]}", base.lower()
        if low.endswith(".cls"):
            with open(path, "rb") as file:
                file.seek(offset)
                class_of[key] = file.read(min(size, 1000)).decode(errors="replace").strip()
        elif low.endswith(EXTENSIONS) and not base.startswith("."):
            names.append((name, key))
            places.append((0, offset, size))
    classes_of = [class_of.get(key, "") for _, key in names]
    return make_index([name for name, _ in names], classes_of, [path], places)


def members(path):
    """(name, offset, size) of the files in a tar; those after a truncation are missing, with a
    warning.

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
                    warn(f"{path} is truncated in {member.name}: what comes before is used")
                    return
                yield member.name, member.offset_data, member.size
            file.seek(tar.offset)
            if file.read(512) != bytes(512):  # a whole tar ends in empty blocks
                warn(f"{path} is truncated or damaged: what comes before is used")
    except tarfile.ReadError as error:
        warn(f"{path} is truncated or not an uncompressed tar ({error}): what comes before is used")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
