"""Where images come from: the embedded set, a folder, a list, tar shards or an array.

    len(source)        how many images
    source.read(i)     (H, W, C); raises on a damaged image, whatever is wrong with it
    source.label(i)    its class as a number, -1 without one
    source.name(i)     what to call it in a message
    source.classes     names of the classes, [] without labels

data.root (and data.val) names a source; `open_source` tells the kinds apart:
    synthetic          made in memory (images/synthetic.py)
    folder             all images in it and below; its first-level sub-folders are the classes
    folder with *.tar  shards in WebDataset layout; also x.tar or "some/train-*.tar"
    x.txt x.csv x.tsv  a list: path and label of one image a line; paths are relative to the list
    x.npy x.npz        an array (N, H, W, C), left on the disk; labels in x_labels.npy or the .npz
Pixels are uint8, or uint16 or float32 where the files have more than 8 bits. A source knows nothing
of order, crops or ranks: that is data.py.
"""

import functools
import glob
import io
import os
import warnings
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from config import UserError
from images.index import EXTENSIONS, index_folder, index_list, index_shards, make_index, map_npz

# Pillow would try every format it knows whatever a file is called, and hand PostScript to an
# external program. Training images come from strangers: only plain formats are tried.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
LISTS = (".txt", ".csv", ".tsv")
ARRAYS = (".npy", ".npz")

# Pillow itself refuses 179 million pixels and more (a decompression bomb: a file of a few kB that
# fills the memory) and warns from the half of it; large photographs are not worth a warning.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

SYNTHETIC_IMAGES = {"train": 8_000, "test": 2_000}  # drawn anew at each start
GIVE_UP = 100  # damaged images in a row: not an accident, the whole source is out of reach


# ---- one image ----------------------------------------------------------------------------------


def read_image(file, channels=3, dtype=np.uint8):
    """A picture (path or bytes) as (H, W, channels), upright. Raises if it is damaged.

    dtype=None keeps 16 bits where the file has them.
    Differs from the official code, which ignores the EXIF orientation: a photograph taken with a
    turned camera is turned back. The official code also stops the run at a damaged image.
    """
    try:
        image = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS)
    except UnidentifiedImageError:  # its own message holds a memory address
        raise ValueError("not a picture, or in a format that is not read") from None
    with image:
        # Phones write photographs as MPO, with a preview behind the picture: the first one counts.
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
            raise ValueError(f"{image.n_frames} frames in one file; one image is expected")
        image = ImageOps.exif_transpose(image)  # decodes; a truncated file raises here
    if channels not in MODES:
        raise ValueError(f"a {image.mode} picture, but data.channels={channels}: use .npy or .tif")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range: use .npy")
    if image.mode.startswith("I"):  # grey with 16 bits
        grey = np.asarray(image).clip(0, 65535).astype(np.uint16)[:, :, None]
        return as_dtype(np.repeat(grey, channels, axis=2), dtype)
    if image.mode == "P":  # a palette may hold transparency, which only RGBA can express
        image = image.convert("RGBA")
    if image.mode != MODES[channels]:
        image = image.convert(MODES[channels])
    pixels = np.asarray(image)
    return as_dtype(pixels if pixels.ndim == 3 else pixels[:, :, None], dtype)


def decode(data, name, channels, dtype=None):
    """The bytes of a file as (H, W, channels): a picture, an array, or a TIFF of many bands."""
    name = name.lower()
    if name.endswith(".npy"):
        pixels = np.load(io.BytesIO(data), allow_pickle=False)
    elif name.endswith((".tif", ".tiff")) and channels not in MODES:
        try:
            from tifffile import imread
        except ImportError:
            raise ValueError(f"TIFF with {channels} channels needs: pip install tifffile") from None
        pixels = imread(io.BytesIO(data))
        if pixels.ndim == 3 and len(pixels) == channels != pixels.shape[2]:
            pixels = pixels.transpose(1, 2, 0)  # bands are often stored one after the other
    else:
        return read_image(data, channels, dtype)
    pixels = pixels if pixels.ndim == 3 else pixels[:, :, None]
    if pixels.shape[2] != channels:
        raise ValueError(f"{pixels.shape[2]} channels, but data.channels={channels}")
    return as_dtype(pixels, dtype)


def as_dtype(pixels, dtype):
    """8 bits as 16 and back, so that all images of a batch are of one kind."""
    if dtype is None or pixels.dtype == dtype:
        return pixels
    if pixels.dtype == np.uint8 and dtype == np.uint16:
        return pixels * np.uint16(257)  # 255 becomes 65535
    if pixels.dtype == np.uint16 and dtype == np.uint8:
        return (pixels >> 8).astype(np.uint8)
    raise ValueError(f"{pixels.dtype} values, but {np.dtype(dtype)} in the first image")


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
            reason = " ".join(str(error).split())
            skipped.append(f"{source.name(at)}: {type(error).__name__}: {reason}")
    raise UserError(f"{len(skipped)} images in a row cannot be read; the first: {skipped[0]}")


# ---- sources ------------------------------------------------------------------------------------


class Arrays:
    """Images that lie in one array (N, H, W, C)."""

    def __init__(self, images, labels, classes, title):
        self.images, self.labels, self.classes, self.title = images, labels, classes, title

    def __len__(self):
        return len(self.images)

    def read(self, i):
        return self.images[i]

    def label(self, i):
        return int(self.labels[i])

    def name(self, i):
        return f"{self.title}[{i}]"

    # Where workers are not forked (macOS, Windows), they get a pickled copy of the source: of a
    # mapped array only its place, or every worker would hold all images in memory.
    def __getstate__(self):
        x, state = self.images, dict(self.__dict__)
        if isinstance(x, np.memmap):
            order = "C" if x.flags.c_contiguous else "F"
            state["images"] = (x.filename, x.dtype, "r", x.offset, x.shape, order)
        return state

    def __setstate__(self, state):
        self.__dict__ = state
        if isinstance(self.images, tuple):
            self.images = np.memmap(*self.images)


class Files:
    """Files below a folder, or slices of tar shards, found by images/index.py."""

    def __init__(self, root, index, channels):
        self.root, self.index, self.channels = root, index, channels
        self.labels, self.classes = index.labels, index.classes
        self.dtype = None  # then that of the first image
        self.dtype = read_or_next(self, 0)[0].dtype

    def __len__(self):
        return len(self.labels)

    def read(self, i):
        return decode(self.data(i), self.name(i), self.channels, self.dtype)

    def data(self, i):
        """The bytes of one file, as they are."""
        if not self.index.shards:
            return Path(self.root, self.name(i)).read_bytes()
        shard, offset, size = map(int, self.index.slices[i])
        with open(self.index.shards[shard], "rb") as file:
            file.seek(offset)
            return file.read(size)

    def label(self, i):
        return int(self.labels[i])

    def name(self, i):
        return self.index.name(i)


# ---- telling sources apart ----------------------------------------------------------------------


@functools.cache
def open_synthetic(split):
    from images import synthetic

    images, labels = synthetic.make(SYNTHETIC_IMAGES[split], 0, split)
    return Arrays(images, labels, synthetic.CLASSES, f"synthetic {split} ")


def open_array(path):
    """A .npy of images, or an .npz that holds one array of images and maybe one of labels."""
    try:
        if path.suffix.lower() == ".npz":
            arrays = map_npz(path)
        else:
            beside = path.with_name(f"{path.stem}_labels.npy")
            arrays = {path.name: np.load(path, mmap_mode="r", allow_pickle=False)}
            arrays |= {beside.name: np.load(beside, allow_pickle=False)} if beside.exists() else {}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a readable array ({' '.join(str(error).split())})") from None
    images = {name: a for name, a in arrays.items() if a.ndim in (3, 4)}
    if len(images) != 1:
        held = ", ".join(f"{name} {a.shape}" for name, a in arrays.items()) or "nothing"
        raise UserError(f"{path}: holds {held}; expected one array of images (N, H, W, C)")
    (images,) = images.values()
    images = images if images.ndim == 4 else images[..., None]
    if images.dtype.kind not in "uif" or not len(images):
        raise UserError(
            f"{path}: {len(images)} images of {images.dtype}; expected uint8 or float32"
        )
    labels = [a for a in arrays.values() if a.ndim == 1 and a.dtype.kind in "ui"]
    labels = labels[0].tolist() if labels else [-1] * len(images)
    if len(labels) != len(images):
        raise UserError(f"{path}: {len(images)} images but {len(labels)} labels")
    index = make_index([], [str(number) if number >= 0 else "" for number in labels])
    return Arrays(images, index.labels, index.classes, path.name)


def open_files(root, channels, again=False, title=""):
    """A folder, a list or shards. again: whatever is in the cache, search; title: as in `key=`."""
    path = Path(root)
    if path.is_dir():
        tars = sorted(path.glob("*.tar"))
    elif path.is_file():
        tars = [path] if path.suffix == ".tar" else []
    else:
        tars = [Path(tar) for tar in sorted(glob.glob(root)) if tar.endswith(".tar")]
    if tars:
        index = index_shards(tars, again)
    elif path.is_dir():
        index = index_folder(root, again)
    elif path.is_file() and path.suffix.lower() in LISTS:
        index = index_list(path)
    else:
        kinds = " ".join((*LISTS, *ARRAYS, ".tar"))
        what = "one file of another kind" if path.exists() else "no such folder or file"
        raise UserError(f"{title}{root}: {what}; give a folder or one of {kinds}")
    if not len(index.ends):
        where = "this folder or below" if path.is_dir() else "this file"
        raise UserError(f"{root}: no images in {where}; looked for {' '.join(EXTENSIONS)}")
    return Files(path if path.is_dir() else path.parent, index, channels)


def split_folder(root, split):
    """`root` itself, or if it holds train/ beside val/ or test/, the one that is asked for."""
    root = os.path.expanduser(root)
    held_out = [name for name in ("val", "test") if os.path.isdir(os.path.join(root, name))]
    if held_out and os.path.isdir(os.path.join(root, "train")):
        return os.path.join(root, "train" if split == "train" else held_out[0])
    return root


def open_source(root, cfg, split="train", classes=None, again=False, key="data.root"):
    """The source that a key names. classes: those whose numbers the labels shall be."""
    root, channels = os.fspath(root), cfg.data.channels
    if not root:
        raise UserError(f"{key} is empty: set it to a folder of images, or to synthetic")
    if root == "synthetic":
        source = open_synthetic(split)
    else:
        root = split_folder(root, split)
        if root.lower().endswith(ARRAYS):
            source = open_array(Path(root))
        else:
            source = open_files(root, channels, again, f"{key}=")
    if isinstance(source, Arrays) and source.images.shape[3] != channels:
        shape, found = source.images.shape, source.images.shape[3]
        fix = f"set data.channels={found}, with as many numbers in data.mean and data.std"
        if shape[1] == channels:
            fix = "channels come last, save it as images.transpose(0, 2, 3, 1)"
        raise UserError(f"{root}: {found} channels in {shape}, but data.channels={channels}: {fix}")
    if classes is not None:
        unknown = [name for name in source.classes if name not in classes]
        if unknown:
            raise UserError(f"{root}: class {unknown[0]} is not in the training images; rename it")
        table = np.array([classes.index(name) for name in source.classes] + [-1])  # -1 is the last
        source.labels, source.classes = table[source.labels], classes
    return source
