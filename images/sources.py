"""Where images come from: the embedded set, a folder, a list, tar shards or an array.

    len(source)        how many images
    source.read(i)     (H, W, C); raises on a damaged image, whatever is wrong with it
    source.label(i)    its class as a number, -1 without one
    source.name(i)     what to call it in a message
    source.classes     names of the classes, [] without labels
    source.left_out    {kind of file that is not read: how many}

data.root (and data.val) names a source; `open_source` tells the kinds apart:
    synthetic          made in memory (images/synthetic.py)
    folder             all images in it and below; its first-level sub-folders are the classes
    folder of *.tar    shards in WebDataset layout; also x.tar, "some/train-*.tar"
    x.txt x.csv x.tsv  a list: path and label of one image a line; paths are relative to the list
    x.npy              an array (N, H, W, C), left on the disk; labels in x_labels.npy
    x.npz              the same as `images` and `labels`, read into memory
Pixels are of the kind of the first image: uint8, uint16, int16 or float32. A source knows nothing
of order, crops or ranks: that is data.py.
"""

import copyreg
import functools
import glob
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from config import UserError
from images.reader import other_channels, plain, read_image, reason
from parallel import warn_once

LISTS = (".txt", ".csv", ".tsv")
ARRAYS = (".npy", ".npz")
GIVE_UP = 100  # damaged images in a row: not an accident, the whole source is out of reach


def most_damaged(cfg, images):
    """So many damaged images may be met; with more, a run stops. 20 stop none, of however few."""
    return max(20, cfg.data.max_damaged * images)


def read_or_next(source, index):
    """(image, its index, names and reasons of damaged images on the way).

    A damaged image is replaced by the next one of the source that can be read: which one it is
    depends on nothing else, so all runs over the same files see the same images.
    """
    skipped = []
    for i in range(min(len(source), GIVE_UP)):
        at = (index + i) % len(source)
        try:
            return source.read(at), at, skipped
        # A decoder fed with damaged bytes raises anything, from OSError to struct.error.
        except Exception as error:
            skipped.append(f"{source.name(at)}: {reason(error)}")
    many = f"{len(skipped)} images in a row cannot be read; the first: " if skipped[1:] else ""
    raise UserError(many + skipped[0])


def counts(left_out):
    """`3 .mov, 1 .heic (pip install pillow-heif)`."""
    return ", ".join(f"{n:,} {kind}" for kind, n in left_out.items())


class Source:
    """What arrays and files share."""

    def __init__(self, labels, classes, left_out=()):
        self.labels, self.classes, self.left_out = labels, classes, dict(left_out)

    def __len__(self):
        return len(self.labels)

    def label(self, i):
        return int(self.labels[i])

    def data(self, i):
        """The bytes of its file, as they are; None without one."""


class Arrays(Source):
    """Images that lie in one array (N, H, W, C)."""

    def __init__(self, images, labels, classes, title):
        super().__init__(labels, classes)
        self.images, self.title = images, title

    def read(self, i):
        return plain(self.images[i])

    def name(self, i):
        return f"{self.title}[{i}]"


# Workers that are not forked (macOS, Windows) are sent of a mapped array only its place.
def place(x):
    order = "C" if x.flags.c_contiguous else "F"
    return np.memmap, (x.filename, x.dtype, "r", x.offset, x.shape, order)


copyreg.pickle(np.memmap, place)


class Files(Source):
    """Files below a folder, or slices of tar shards, found by images/index.py."""

    def __init__(self, root, index, channels, max_pixels):
        super().__init__(index.labels, index.classes, index.left_out)
        self.root, self.index, self.channels, self.max_pixels = root, index, channels, max_pixels
        self.dtype = None  # then that of the first image
        self.dtype = read_or_next(self, 0)[0].dtype

    def read(self, i):
        pixels = read_image(self.data(i), self.channels, self.max_pixels)
        if self.dtype in (None, pixels.dtype):
            return pixels
        raise ValueError(
            f"{pixels.dtype} values from {pixels.min()} to {pixels.max()}, but the first image has "
            f"{self.dtype}: save all in one kind"
        )

    def data(self, i):
        if not self.index.shards:
            return Path(self.root, self.name(i)).read_bytes()
        shard, offset, size = map(int, self.index.slices[i])
        with open(self.index.shards[shard], "rb") as file:
            file.seek(offset)
            return file.read(size)

    def name(self, i):
        return self.index.name(i)


# ---- telling sources apart ----------------------------------------------------------------------


@functools.cache
def open_synthetic(split, count):
    from images import synthetic

    images, labels = synthetic.make(count if split == "train" else count // 4, 0, split)
    return Arrays(images, labels, synthetic.CLASSES, f"synthetic {split} ")


def open_files(root, cfg, key):
    """A folder, a list, shards or an array."""
    from images.index import index_array, index_folder, index_list, index_shards

    path = Path(root)
    if path.suffix.lower() in ARRAYS:
        images, index = index_array(path)
        return Arrays(images, index.labels, index.classes, path.name)
    if path.is_dir():
        index, shards = index_folder(path), sorted(path.glob("*.tar"))
        if shards and len(index.labels):
            fix = f"move the others away, or give {root}/*.tar"
            raise UserError(f"{key}={root}: holds both pictures and shards; {fix}")
    else:
        shards = sorted(Path(file) for file in glob.glob(root) if file.endswith(".tar"))
    if shards:
        index = index_shards(shards)
        words = {word for path in shards for word in path.stem.lower().replace("_", "-").split("-")}
        if "train" in words and words & {"val", "validation", "test"}:
            warn_once(f"{root}: shards of several splits; to use some: {root}/*train*.tar")
    elif path.is_file() and path.suffix.lower() in LISTS:
        index = index_list(path)
    elif not path.is_dir():
        kinds = " ".join((*LISTS, *ARRAYS, "or shards as 'some/train-*.tar'"))
        what = "one file of another kind" if path.exists() else "no such folder or file"
        raise UserError(f"{key}={root}: {what}; give a folder or one of {kinds}")
    if not len(index.labels):
        raise UserError(f"{root}: no images in it; left out: {counts(index.left_out) or 'nothing'}")
    folder = path if path.is_dir() else path.parent
    return Files(folder, index, cfg.data.channels, cfg.data.max_pixels)


def split_folder(root, split):
    """`root` itself; of one that holds train/ beside val/ or test/, the part asked for, if any."""
    root = os.path.expanduser(root)
    held_out = [name for name in ("val", "test") if os.path.isdir(os.path.join(root, name))]
    if split and held_out and os.path.isdir(os.path.join(root, "train")):
        return os.path.join(root, "train" if split == "train" else held_out[0])
    return root


def open_source(root, cfg, split="train", key="data.root"):
    """The source that a key names. split: train, test, or "" for all that lies there."""
    root, channels = os.fspath(root), cfg.data.channels
    if not root:
        raise UserError(f"{key} is empty: set it to a folder of images, or to synthetic")
    if root == "synthetic":
        source = open_synthetic(split or "train", cfg.data.synthetic_images)
    else:
        source = open_files(split_folder(root, split), cfg, key)
    if isinstance(source, Arrays) and (shape := source.images.shape)[3] != channels:
        last = "channels come last: save it as images.transpose(0, 2, 3, 1)"
        fix = last if shape[1] == channels else other_channels(shape[3], channels)
        raise UserError(f"{root}: {shape}: {fix}")
    if channels == 3 and (cfg.augment.jitter or any(cfg.augment.solarize)):
        pixels, *_ = read_or_next(source, 0)
        low, high = pixels.min(), pixels.max()
        if low < 0 or (high > 1 and pixels.dtype.kind == "f"):
            found = f"values from {low:g} to {high:g}, of which changes of colour keep 0 to 1"
            fix = "divide them, or set augment.jitter=0 and augment.solarize=[0,0,0]"
            warn_once(f"{root}: {found}: {fix}")
    return source


# ---- worker processes that read them -------------------------------------------------------------

# More workers than cores are no mistake where images come over a network: they wait side by side.
warnings.filterwarnings("ignore", message="This DataLoader will create")


def start_worker(_):
    # Ctrl-C and `timeout` signal a whole process group. The training process saves and then ends
    # its workers; in a group of their own, they do not die before it under its hands.
    if hasattr(os, "setpgrp"):
        os.setpgrp()


def by_workers(dataset, cfg, **options):
    """Iterator over what a DataLoader of these options gives, read by cfg.data.workers processes.

    Raises a UserError of a worker as if it were our own.
    """
    # Forked workers share the names of millions of images. Python 3.14 would start them afresh and
    # give each a copy, as must be where forking is not safe (macOS, Windows).
    fork = cfg.data.workers > 0 and sys.platform == "linux"
    batches = DataLoader(
        dataset,
        num_workers=cfg.data.workers,
        multiprocessing_context="fork" if fork else None,
        pin_memory=torch.cuda.is_available() and cfg.device != "cpu",
        worker_init_fn=start_worker,
        # Without a generator of its own, the DataLoader would draw from the global one, and a
        # resumed run would no longer be equal bit for bit.
        generator=torch.Generator(),
        **options,
    )
    message = ""
    try:
        yield from batches
    except UserError as error:
        # It arrives with the worker's traceback as its text, of which the last line is our own.
        message = str(error).strip().splitlines()[-1].removeprefix("config.UserError: ")
        error.__traceback__ = None  # it would keep the DataLoader, and so the workers, alive
    if message:
        raise UserError(message)
