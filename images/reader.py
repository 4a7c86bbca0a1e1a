"""One file becomes pixels (H, W, C): a picture, a TIFF of any bands, a .npy.

What the file holds decides how it is read; data.channels is compared with it afterwards. Values
stay what they are: uint8, uint16, int16 or float32. Where that cannot be, an error says why, and
nothing is rounded in silence. (AVIF and HEIC of 10 bits are 8 here, as on a screen.)
"""

import io
import logging
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

try:  # optional, for .heic: pip install pillow-heif
    import pillow_heif

    pillow_heif.register_heif_opener()
except ImportError:
    pass
# Pillow would try every format it knows whatever a file is called, and hand PostScript to an
# external program. Training images come from strangers: only plain formats are tried.
FORMATS = (
    "JPEG", "MPO", "PNG", "WEBP", "TIFF", "BMP", "DIB", "GIF", "PPM", "JPEG2000", "AVIF", "HEIF",
    "QOI", "PCX", "TGA",
)  # fmt: skip
PICTURES = tuple(sorted(e for e, kind in Image.registered_extensions().items() if kind in FORMATS))
FORMATS = tuple(kind for kind in FORMATS if kind in Image.OPEN)  # MPO is opened as JPEG
EXTENSIONS = (*PICTURES, ".npy")  # an array (H, W, C) holds what no picture format can
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}

# A file of a few kB can fill the memory (a decompression bomb). Pillow refuses from this size on,
# in a way that cannot be set for one data set: it is done below.
MAX_PIXELS = 178_956_970
Image.MAX_IMAGE_PIXELS = None
for library in ("PIL.TiffImagePlugin", "tifffile"):  # their complaints become our errors
    logging.getLogger(library).setLevel(logging.CRITICAL)


def read_image(file, channels=3, max_pixels=MAX_PIXELS):
    """A file (path or bytes) as (H, W, channels), upright. Raises if it is damaged.

    channels    None: as many as the file has
    max_pixels  of a picture, above which it is refused; 0: no limit
    Differs from the official code, which ignores the EXIF orientation: a photograph taken with a
    turned camera is turned back. The official code also stops the run at a damaged image.
    """
    data = file if isinstance(file, bytes) else Path(file).read_bytes()
    if data.startswith(np.lib.format.MAGIC_PREFIX):
        return fit(plain(np.load(io.BytesIO(data), allow_pickle=False)), channels)
    is_tiff = data[:2] in (b"II", b"MM") and data[2:4] in (b"*\0", b"\0*", b"+\0", b"\0+")
    check = partial(check_size, max_pixels=max_pixels)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:  # its own message holds a memory address
        if not is_tiff:
            raise ValueError("not a picture, or in a format that is not read") from None
        image = None
    frames = getattr(image, "n_frames", 1)
    if is_tiff:
        from images import deep

        if image is None or frames > 1 or not deep.keeps_all(image):
            pixels, colours = deep.read_tiff(data, channels, check)
            return fit(plain(pixels), channels, colours)
    # Phones write photographs as MPO or HEIF, with a preview or a series behind the picture: the
    # first one counts.
    if frames > 1 and image.format not in ("MPO", "HEIF"):
        raise ValueError(f"{frames} frames in one file; one image is expected")
    check(*image.size)
    if image.format == "PNG" and data[24] == 16 and data[25] != 0:
        from images import deep

        return fit(deep.deep_png(data), channels, colours=1 if data[25] == 4 else 3, opacity=True)
    if image.format in ("PPM", "JPEG2000"):
        from images import deep

        if deep.rounds(image, data):
            raise ValueError(f"{image.format} colours of more than 8 bits; save it as PNG or TIFF")
    image = ImageOps.exif_transpose(image)  # decodes; a truncated file raises here
    if image.mode in ("F", "I") or image.mode.startswith("I;"):  # grey of 16 bits, or of 32
        pixels = np.asarray(image)
        if image.mode != "F":
            pixels = pixels.astype(np.int16 if is_tiff and image.mode == "I" else np.uint16)
        return fit(plain(pixels), channels, colours=1, opacity=not is_tiff)
    if image.mode == "P":  # a palette may hold transparency, which only RGBA can express
        image = image.convert("RGBA")
    found = len(image.getbands())
    channels = channels or found
    # A band that the file does not have is not made up, except full opacity for pictures.
    if channels not in MODES or (is_tiff and channels > max(found, 3)) or channels == 2 != found:
        raise ValueError(other_channels(found, channels))
    pixels = np.asarray(image if image.mode == MODES[channels] else image.convert(MODES[channels]))
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def other_channels(found, channels, where=""):
    """What to say of an image that has `found` channels."""
    fix = f"set data.channels={found}, with as many numbers in data.mean and data.std"
    return f"{found} channels{where}, but data.channels={channels}: {fix}"


def check_size(width, height, max_pixels):
    if max_pixels and width * height > max_pixels:
        raise ValueError(
            f"{width} x {height} pixels are more than data.max_pixels={max_pixels}; raise it, or "
            "0 for no limit, if you trust the files"
        )


def plain(pixels):
    """Values of a kind that all the rest understands, in the byte order of the machine."""
    if pixels.dtype.kind == "f":
        pixels = pixels.astype(np.float32, copy=False)
        if not np.isfinite(pixels).all():
            raise ValueError("NaN or infinite pixels")
        return pixels
    if pixels.dtype.newbyteorder("=") not in (np.uint8, np.uint16, np.int16):
        raise ValueError(
            f"{pixels.dtype} values from {pixels.min()} to {pixels.max()}; save them as uint8, "
            "uint16, int16 or float32"
        )
    return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)


def fit(pixels, channels, colours=0, opacity=False):
    """(H, W, C) with the wanted channels.

    colours  how many of the first are the colours of a picture, 1 or 3; 0: bands, taken as they are
    opacity  may be added, as full
    """
    pixels = pixels if pixels.ndim != 2 else pixels[:, :, None]
    if pixels.ndim != 3:
        raise ValueError(f"shape {pixels.shape}; one image (H, W, C) is expected")
    found = pixels.shape[2]
    if channels in (None, found):
        return pixels
    if not colours or channels not in (1, 3, 4) or (channels == 4 and not opacity):
        raise ValueError(other_channels(found, channels))
    pixels = pixels[:, :, :colours]
    if colours == 3 and channels == 1:
        grey = pixels @ np.array([[0.299], [0.587], [0.114]])  # as Pillow weighs them
        return (grey if grey.dtype.kind == pixels.dtype.kind else grey.round()).astype(pixels.dtype)
    if colours == 1 and channels > 1:
        pixels = np.repeat(pixels, 3, axis=2)
    if channels == 4:
        pixels = np.dstack((pixels, np.full_like(pixels[:, :, 0], np.iinfo(pixels.dtype).max)))
    return pixels
