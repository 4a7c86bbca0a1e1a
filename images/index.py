"""Which images there are: a folder, a list or tar shards, searched once, as a few arrays.

Millions of Python strings would cost 100 bytes each and, as reading a string changes its reference
count, be copied into every worker. An Index is a handful of arrays, which workers share. One that
took long to make is kept in a cache file (~/.cache/nanodinov2) and checked at the next start.

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
import tarfile
import time
import zipfile
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from config import UserError
from images.reader import EXTENSIONS
from parallel import progress, warn

# Folders that storage and operating systems leave behind: previews, and what was thrown away.
JUNK = {"@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
NEEDS = dict.fromkeys((".heic", ".heif", ".hif"), "pillow-heif")  # packages that read more
BESIDE = (".json", ".txt")  # what shards hold beside images and classes

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


# ---- cache --------------------------------------------------------------------------------------


def cached(key, build, again=False):
    """build(), or the Index it returned last time if nothing has changed since.

    build() -> (Index, paths it depends on). Adding, removing or renaming a file changes the
    modification time of its folder, so to check millions of files it is enough to look at the
    folders.
    """
    file = CACHE / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"
    with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        with np.load(file) as stored:
            *arrays, text = stored.values()
        *rest, watched, before = json.loads(text.tobytes())
        if not again and stamps(watched) == before:
            return Index(*arrays, *rest)
    start = time.time()
    index, watched = build()
    now = stamps(watched)
    # A change within the resolution of the clock goes unnoticed: what is fresh is not stored.
    settled = all(modified < (start - 2) * 1e9 for modified, _ in now)
    if settled and (again or time.time() - start >= SLOW):
        text = json.dumps([*index[4:], watched, now]).encode()
        aside = file.with_name(f"{file.stem}.{os.getpid()}.npz")  # other processes write it too
        with contextlib.suppress(OSError):  # no room for a cache: the next start takes as long
            file.parent.mkdir(parents=True, exist_ok=True)
            np.savez(aside, *index[:4], np.frombuffer(text, np.uint8))
            os.replace(aside, file)
    return index


def stamps(paths):
    """Time of change and size of each file; zeros for one that is not there."""
    found = []
    for path in paths:
        try:
            status = os.stat(path)
            found.append([status.st_mtime_ns, status.st_size])
        except OSError:
            found.append([0, 0])
    return found


# ---- folders ------------------------------------------------------------------------------------


def index_folder(root, again=False):
    """All images below a folder. Their classes are its first-level sub-folders."""

    def build():
        names, folders, left_out = find_images(root)
        classes_of = [name.split(os.sep)[0] if os.sep in name else "" for name in names]
        return make_index(names, classes_of, left_out=left_out), folders

    return cached(f"folder {os.path.abspath(root)} {EXTENSIONS}", build, again)


def find_images(root):
    """(paths of images relative to root, all folders, what is left out), always in one order."""
    root, found, folders, seen, left_out = os.fspath(root), [], [], set(), Counter()

    def unreadable(error):
        warn(f"{error.filename} is left out: {error.strerror}")
        left_out["unreadable folder"] += 1

    walk = os.walk(root, onerror=unreadable, followlinks=True)
    for path, below, files in progress(walk, desc=f"searching {root}", unit=" folders"):
        status = os.stat(path)
        # Links to folders are followed; one that leads back up would go round for ever.
        if (status.st_dev, status.st_ino) in seen:
            below.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.append(path)
        left_out += Counter(f"folder {name}" for name in below if name in JUNK)
        below[:] = sorted(n for n in below if n not in JUNK and not n.startswith("."))
        folder = os.path.relpath(path, root) if path != root else ""
        for name in sorted(n for n in files if not n.startswith(".")):  # as macOS leaves behind
            if name.lower().endswith(EXTENSIONS):
                found.append(os.path.join(folder, name))
            else:
                left_out[kind_of(name)] += 1
    return found, folders, left_out


# ---- lists --------------------------------------------------------------------------------------


def index_list(path):
    """A .txt (path), .tsv or .csv (path, label) with one image a line.

    A first line that says `path` names the columns, of which `path` and `label` are used.
    """
    path = Path(path)
    separator = {".csv": ",", ".tsv": "\t"}.get(path.suffix.lower())
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))  # "Unicode text" of Windows
    if not utf16 and b"\0" in data:
        raise UserError(f"{path}: not a list in plain text; save it as UTF-8")
    lines = data.decode("utf-16" if utf16 else "utf-8-sig", "surrogateescape").splitlines()
    rows = csv.reader(lines, delimiter=separator) if separator else ([line] for line in lines)
    names, classes_of, columns = [], [], (0, 1)
    for number, row in enumerate(rows, 1):
        row = [cell.strip() for cell in row]
        if number == 1 and "path" in row:
            columns = row.index("path"), row.index("label") if "label" in row else len(row)
        elif any(row):
            name, label = ((row[c] if c < len(row) else "") for c in columns)
            if not name:
                raise UserError(f"{path}, line {number}: a label without an image")
            names.append(name)
            classes_of.append(known(label))
    for name in names[:1000]:  # asking for each of millions would take minutes on a network disk
        if not os.path.exists(path.parent / name):
            raise UserError(f"{path}: {name} does not exist; paths are relative to {path.parent}/")
    return make_index(names, classes_of)


# ---- shards -------------------------------------------------------------------------------------


def index_shards(paths, again=False):
    """One Index of several shards."""
    paths = [os.fspath(path) for path in paths]

    def build():
        names, classes_of, places, left_out = [], [], [], Counter()
        for number, path in enumerate(progress(paths, desc="indexing", unit=" shards")):
            for name, label, *place in read_shard(path, left_out):
                names.append(name)
                classes_of.append(label)
                places.append((number, *place))
        return make_index(names, classes_of, paths, places, left_out), paths

    key = "\n".join(map(os.path.abspath, paths))
    index = cached(f"shards {key} {EXTENSIONS}", build, again)
    return with_class_names(index, Path(paths[0]).with_name("classes.txt"))


def with_class_names(index, path):
    """`pack` writes the names of the classes beside the shards, one a line: .cls holds numbers."""
    if not path.exists() or not index.classes:
        return index
    names = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    if not all(c.isdecimal() and int(c) < len(names) for c in index.classes):
        raise UserError(f"{path}: {len(names)} names do not fit the .cls of the shards")
    table = np.array([*map(int, index.classes), -1], np.int32)  # -1 is the last
    return index._replace(labels=table[index.labels], classes=names)


def read_shard(path, left_out):
    """[(name, class, offset, size)] of the images in one tar file. Nothing is ever extracted."""
    images, class_of, seen = [], {}, set()
    for name, offset, size in members(path):
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


def members(path):
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
        warn(f"{path} is truncated or not an uncompressed tar ({error}): what comes before is used")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
