"""Where images come from: the embedded set or any folder, behind one small interface.

    len(source)        how many images
    source.read(i)     uint8 (H, W, C); raises on a damaged image, whatever is wrong with it
    source.label(i)    its class as a number, -1 without one
    source.name(i)     what to call it in a message
    source.classes     names of the classes, [] without labels

A source does not know about order, crops or ranks: that is data.py. Opening one is cheap, reading
happens in the workers. `read_image` is the only place where a file becomes pixels.
"""

import io
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

import synthetic
from config import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm")

# Pillow would try every format it knows whatever a file is called, and hand PostScript to an
# external program. Training images come from strangers: only plain formats are tried.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}

# Pillow itself refuses 179 million pixels and more (a decompression bomb: a file of a few kB that
# fills the memory) and warns from the half of it; large photographs are not worth a warning.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# The embedded data set: images per split, and pixels of a side.
SYNTHETIC_IMAGES = {"train": 8_000, "test": 2_000}
SYNTHETIC_SIZE = 64


# ---- one image ----------------------------------------------------------------------------------


def read_image(file, channels=3):
    """An image file (path or bytes) as uint8 (H, W, channels), upright. Raises if it is damaged.

    Differs from the official code, which ignores the EXIF orientation: a photograph taken with a
    turned camera is turned back. The official code also stops the run at a damaged image.
    """
    file = io.BytesIO(file) if isinstance(file, bytes) else file
    with Image.open(file, formats=FORMATS) as image:
        # Phones write photographs as MPO, with a preview behind the picture: the first one counts.
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
            raise ValueError(f"{image.n_frames} frames in one file; one image is expected")
        image = ImageOps.exif_transpose(image)  # decodes; a truncated file raises here
    if image.mode in ("I", "I;16", "I;16B", "I;16L"):  # 16-bit grey: keep the upper 8 bits
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode == "P":  # a palette may hold transparency, which only RGBA can express
        image = image.convert("RGBA")
    if image.mode != MODES[channels]:
        image = image.convert(MODES[channels])
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


# ---- sources ------------------------------------------------------------------------------------


class Arrays:
    """Images that lie in one array (N, H, W, C), labels (N,) or None."""

    def __init__(self, images, labels=None, classes=(), title="array"):
        self.images, self.labels, self.classes, self.title = images, labels, list(classes), title

    def __len__(self):
        return len(self.images)

    def read(self, i):
        return self.images[i]

    def label(self, i):
        return -1 if self.labels is None else int(self.labels[i])

    def name(self, i):
        return f"{self.title}[{i}]"


class Files:
    """Image files below a folder, found by `find_images`."""

    def __init__(self, root, names, labels, classes, channels):
        self.root, self.channels, self.classes = Path(root), channels, classes
        # Millions of Python strings would cost 100 bytes each and be copied into every worker, as
        # reading them changes their reference counts. One array of bytes stays shared.
        encoded = [os.fsencode(name) for name in names]
        self.names = np.frombuffer(b"".join(encoded), np.uint8)
        self.ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        self.labels = np.asarray(labels, np.int32)

    def __len__(self):
        return len(self.ends)

    def read(self, i):
        return read_image(self.root / self.name(i), self.channels)

    def label(self, i):
        return int(self.labels[i])

    def name(self, i):
        start = self.ends[i - 1] if i else 0
        return os.fsdecode(self.names[start : self.ends[i]].tobytes())


def find_images(root):
    """Paths of all image files below `root`, relative to it, in an order that never changes."""
    found, seen, waiting = [], set(), [""]
    while waiting:
        folder = waiting.pop()
        status = os.stat(os.path.join(root, folder))
        # Links to folders are followed; one that leads back up would go round for ever.
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        folders = []
        try:
            entries = sorted(os.scandir(os.path.join(root, folder)), key=lambda entry: entry.name)
        except OSError as error:
            warnings.warn(f"{error.filename} is left out: {error.strerror}", stacklevel=1)
            continue
        for entry in entries:
            name = os.path.join(folder, entry.name)
            if entry.name.startswith("."):  # thumbnails and what macOS leaves behind
                continue
            if entry.name.lower().endswith(EXTENSIONS):
                found.append(name)
            elif entry.is_dir():
                folders.append(name)
        waiting += reversed(folders)
    return found


def open_folder(root, channels, classes=None):
    """A folder as a source. Labels are its first-level sub-folders, numbered by name."""
    if not os.path.isdir(root):
        raise UserError(f"{root}: no such folder; set data.root to a folder of images")
    names = find_images(root)
    if not names:
        raise UserError(
            f"{root}: no images in this folder or below; looked for {' '.join(EXTENSIONS)}"
        )
    first = [name.split(os.sep)[0] if os.sep in name else None for name in names]
    own = sorted({folder for folder in first if folder is not None})
    classes = own if classes is None else classes
    unknown = [name for name in own if name not in classes]
    if unknown:
        raise UserError(
            f"{root}: class {unknown[0]} is not among the {len(classes)} of the training images; "
            "use the same sub-folders in both"
        )
    number = {name: i for i, name in enumerate(classes)} | {None: -1}
    return Files(root, names, [number[folder] for folder in first], classes, channels)


def split_folder(root, split):
    """`root` itself, or if it holds train/ beside val/ or test/, the one that is asked for."""
    root = os.path.expanduser(root)
    held_out = [name for name in ("val", "test") if os.path.isdir(os.path.join(root, name))]
    if held_out and os.path.isdir(os.path.join(root, "train")):
        return os.path.join(root, "train" if split == "train" else held_out[0])
    return root


def open_source(root, cfg, split="train", classes=None):
    """The source that data.root (or data.val) names. `classes`: numbers of classes to keep to."""
    if not root:
        raise UserError("data.root is empty: set it to a folder of images, or to synthetic")
    if root == "synthetic":
        if cfg.data.channels != 3:
            raise UserError("data.root=synthetic has 3 channels: set data.channels=3")
        images, labels = synthetic.make(SYNTHETIC_IMAGES[split], 0, split, SYNTHETIC_SIZE)
        return Arrays(images, labels, synthetic.CLASSES, f"synthetic {split} ")
    return open_folder(split_folder(root, split), cfg.data.channels, classes)
