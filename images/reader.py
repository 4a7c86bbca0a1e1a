"""One file becomes pixels (H, W, C): a picture, a TIFF of any bands, a .npy.

What the file holds decides how it is read; data.channels is compared with it afterwards. Values
stay what they are: uint8, uint16, int16 or float32. Where that cannot be, an error says why, and
nothing is rounded in silence. (AVIF and HEIC of 10 bits are 8 here, as on a screen.)
"""

import io
import logging
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
EXTENSIONS = tuple(e for e, kind in Image.registered_extensions().items() if kind in FORMATS)
EXTENSIONS += (".npy",)  # an array (H, W, C) holds what no picture format can
FORMATS = tuple(kind for kind in FORMATS if kind in Image.OPEN)  # MPO is opened as JPEG
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
BITS, PHOTOMETRIC, EXTRA, SIGN = 258, 262, 338, 339  # tags of a TIFF

# A file of a few kB can fill the memory (a decompression bomb). Pillow refuses from this size on,
# in a way that cannot be set for one data set: it is done below.
MAX_PIXELS = 178_956_970
Image.MAX_IMAGE_PIXELS = None
for library in ("PIL.TiffImagePlugin", "tifffile"):  # their complaints become our errors
    logging.getLogger(library).setLevel(logging.CRITICAL)


def read_image(file, channels=3, max_pixels=MAX_PIXELS):
    """A file (path or bytes) as (H, W, channels), upright. Raises if it is damaged.

    max_pixels  of a picture, above which it is refused; 0: no limit
    Differs from the official code, which ignores the EXIF orientation: a photograph taken with a
    turned camera is turned back. The official code also stops the run at a damaged image.
    """
    data = file if isinstance(file, bytes) else Path(file).read_bytes()
    if data.startswith(np.lib.format.MAGIC_PREFIX):
        return fit(plain(np.load(io.BytesIO(data), allow_pickle=False)), channels)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:  # its own message holds a memory address
        image = None
    is_tiff = data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
    if is_tiff and not (image and is_plain_tiff(image)):
        return fit(plain(read_tiff(data, channels, max_pixels)), channels)
    if image is None:
        raise ValueError("not a picture, or in a format that is not read")
    # Phones write MPO or HEIF, with a preview or a series behind the picture: the first counts.
    if getattr(image, "n_frames", 1) > 1 and image.format not in ("MPO", "HEIF"):
        raise ValueError(f"{image.n_frames} frames in one file; one image is expected")
    check_size(*image.size, max_pixels)
    if rounds(image, data):
        raise ValueError(f"{image.format} colours of more than 8 bits; save it as TIFF or .npy")
    image = ImageOps.exif_transpose(image)  # decodes; a truncated file raises here
    if image.mode[0] in "FI":  # grey of 16 bits, or floats
        kind = np.float32 if image.mode == "F" else np.uint16
        return fit(plain(np.asarray(image).astype(kind)), channels)
    if image.mode == "P":  # a palette may hold transparency, which only RGBA can express
        image = image.convert("RGBA")
    found = len(image.getbands())
    # A band that the file does not have is not made up, except full opacity for pictures.
    if channels not in ((found, 1, 3) if is_tiff else (found, 1, 3, 4)):
        raise ValueError(other_channels(found, channels))
    pixels = np.asarray(image.convert(MODES[channels]))
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def reason(error):
    """Why an image cannot be read, in one line."""
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__


def other_channels(found, channels):
    """What to say of an image that has `found` channels."""
    fix = f"set data.channels={found}, with as many numbers in data.mean and data.std"
    return f"{found} channels, but data.channels={channels}: {fix}"


def check_size(width, height, max_pixels):
    if max_pixels and width * height > max_pixels:
        raise ValueError(
            f"{width} x {height} pixels are more than data.max_pixels={max_pixels}; raise it, or "
            "0 for no limit, if you trust the files"
        )


def plain(pixels):
    """Values of a kind that all the rest understands, in the byte order of the machine."""
    kind = pixels.dtype.newbyteorder("=")
    if kind.kind == "f":
        kind = np.float32
        if not np.isfinite(pixels).all():
            raise ValueError("NaN or infinite pixels")
    elif kind not in (np.uint8, np.uint16, np.int16):
        found = f"{kind} values from {pixels.min()} to {pixels.max()}"
        raise ValueError(f"{found}; save them as uint8, uint16, int16 or float32")
    return pixels.astype(kind, copy=False)


def fit(pixels, channels):
    """(H, W, C) with the wanted channels: one band becomes three, all else stays what it is."""
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    if pixels.ndim != 3 or not pixels.size:
        raise ValueError(f"shape {pixels.shape}; one image (H, W, C) is expected")
    found = pixels.shape[2]
    if found != channels and (found, channels) != (1, 3):
        raise ValueError(other_channels(found, channels))
    return pixels if found == channels else pixels.repeat(3, axis=2)


def rounds(image, data):
    """Whether Pillow would keep 8 bits of deeper colours. (Of grey it keeps all.)"""
    if image.mode[0] in "FI":
        return False
    if image.format == "PNG":
        return data[24] == 16
    if image.format == "PPM":
        largest = image.tile[0].args  # (mode, largest value); the mode alone where that is 255
        return isinstance(largest, tuple) and largest[1] > 255
    start = data.find(b"\xff\x4f\xff\x51")  # the header of a coded JPEG 2000; bits stand behind it
    return image.format == "JPEG2000" and (data[start + 42] & 127) > 7


def is_plain_tiff(image):
    """Whether Pillow reads all of a TIFF: one page of 8-bit grey or colours, or of deeper grey."""
    tags = image.tag_v2
    bits, sign = max(tags.get(BITS, (1,))), tags.get(SIGN, (1,))[0]
    extra = (2,) if image.mode == "RGBA" else ()  # 2 is opacity
    known = image.mode in ("1", "L", "P", "RGB", "RGBA", "YCbCr")
    picture = known and bits <= 8 and sign == 1 and tags.get(EXTRA, ()) == extra
    deep = image.mode in ("I;16", "I;16B", "F") and tags.get(PHOTOMETRIC) == 1  # 1: 0 is black
    return image.n_frames == 1 and (picture or deep)


def read_tiff(data, channels, max_pixels):
    """The pixels of a TIFF of any bands and bits, (H, W) or (H, W, C)."""
    try:
        import tifffile  # optional
    except ImportError:
        needs = "a TIFF of these bands, bits or pages needs: pip install tifffile"
        raise ValueError(needs) from None
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        series, page = tiff.series[0], tiff.pages[0]
        if len(tiff.series) > 1 or len(series.shape) > 3:
            raise ValueError(f"{len(tiff.pages)} pages in one file; one image is expected")
        if page.photometric not in (0, 1, 2, 5):  # two of grey, RGB, inks
            raise ValueError("a TIFF of another kind of colours; save it as RGB")
        check_size(page.imagewidth, page.imagelength, max_pixels)
        pixels = series.asarray()
    # Bands lie one after the other, or are pages; unless (H, W, C) was written as H pages.
    first = pixels.shape[0] in (channels, min(pixels.shape))
    if first and pixels.ndim == 3 and series.axes[-1] != "S" and pixels.shape[2] != channels:
        pixels = pixels.transpose(1, 2, 0)
    if page.photometric == 0 and pixels.dtype.kind == "u":  # 0 is white
        pixels = np.iinfo(pixels.dtype).max - pixels
    return np.ascontiguousarray(pixels)
