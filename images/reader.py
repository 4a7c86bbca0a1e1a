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
PICTURES = tuple(sorted(e for e, kind in Image.registered_extensions().items() if kind in FORMATS))
FORMATS = tuple(kind for kind in FORMATS if kind in Image.OPEN)  # MPO is opened as JPEG
EXTENSIONS = (*PICTURES, ".npy")  # an array (H, W, C) holds what no picture format can
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
BITS, PHOTOMETRIC, SAMPLES, EXTRA, SIGN = 258, 262, 277, 338, 339  # tags of a TIFF

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
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:  # its own message holds a memory address
        if not is_tiff:
            raise ValueError("not a picture, or in a format that is not read") from None
        image = None
    frames = getattr(image, "n_frames", 1)
    if is_tiff and (image is None or frames > 1 or not keeps_all(image, channels)):
        pixels, colours = read_tiff(data, channels, max_pixels)
        return fit(plain(pixels), channels, colours)
    # Phones write photographs as MPO or HEIF, with a preview or a series behind the picture: the
    # first one counts.
    if frames > 1 and image.format not in ("MPO", "HEIF"):
        raise ValueError(f"{frames} frames in one file; one image is expected")
    check_size(*image.size, max_pixels)
    if image.format == "PNG" and data[24] == 16 and data[25] != 0:
        return fit(deep_png(data), channels, colours=1 if data[25] == 4 else 3, opacity=True)
    if rounds(image, data):
        raise ValueError(f"{image.format} colours of more than 8 bits; save it as PNG or TIFF")
    image = ImageOps.exif_transpose(image)  # decodes; a truncated file raises here
    if image.mode[0] in "FI":  # grey of 16 bits, or of 32
        kind = np.int16 if is_tiff and image.mode == "I" else np.uint16
        pixels = np.asarray(image).astype(np.float32 if image.mode == "F" else kind)
        return fit(plain(pixels), channels, colours=1, opacity=not is_tiff)
    if image.mode == "P":  # a palette may hold transparency, which only RGBA can express
        image = image.convert("RGBA")
    found = len(image.getbands())
    channels = channels or found
    # A band that the file does not have is not made up, except full opacity for pictures.
    if channels not in MODES or (is_tiff and channels > max(found, 3)) or channels == 2 != found:
        raise ValueError(other_channels(found, channels))
    inks = is_tiff and image.mode == "CMYK" and channels == 4  # as opacity they would be made up
    mode = "CMYK" if inks else MODES[channels]
    pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def reason(error):
    """Why an image cannot be read, in one line."""
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__


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
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    if pixels.ndim != 3 or not pixels.size:
        raise ValueError(f"shape {pixels.shape}; one image (H, W, C) is expected")
    found = pixels.shape[2]
    if channels in (None, found):
        return pixels
    if not colours or channels not in (1, 3, 4) or (channels == 4 and not opacity):
        raise ValueError(other_channels(found, channels))
    colour = pixels[:, :, :colours]
    if colours == 3 and channels == 1:
        grey = colour @ np.array([[0.299], [0.587], [0.114]])  # as Pillow weighs them
        return (grey if grey.dtype.kind == pixels.dtype.kind else grey.round()).astype(pixels.dtype)
    if colours == 1 and channels > 1:
        colour = np.repeat(colour, 3, axis=2)
    if channels == 4:  # grey may have an opacity of its own
        full = np.full_like(pixels[:, :, :1], np.iinfo(pixels.dtype).max)
        colour = np.dstack((colour, pixels[:, :, 1:] if found == 2 else full))
    return colour


# ---- what Pillow alone would cut down -----------------------------------------------------------


def deep_png(data):
    """A PNG in colour (or with alpha) of 16 bits as (H, W, C) uint16.

    Pillow knows no such pixels and keeps the high bytes. Told that the low byte comes first, it
    keeps the low ones: both together are the values.
    """

    def decode(layout):
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            image.tile = [image.tile[0]._replace(args=layout)]
            return np.asarray(ImageOps.exif_transpose(image), np.uint16)

    if data[25] == 4:  # grey and alpha: four bytes, read as those of RGBA
        four = decode("RGBA")
        return four[:, :, ::2] << 8 | four[:, :, 1::2]
    mode = "RGB" if data[25] == 2 else "RGBA"
    return decode(f"{mode};16B") << 8 | decode(f"{mode};16L")


def rounds(image, data):
    """Whether Pillow would keep 8 bits of deeper colours in a PPM or a JPEG 2000."""
    if image.format not in ("PPM", "JPEG2000") or image.mode[0] == "I":
        return False
    if image.format == "PPM":
        largest = image.tile[0].args
        return (largest[1] if isinstance(largest, tuple) else largest) in range(256, 65536)
    start = data.find(b"\xff\x4f\xff\x51")  # the header of the coded image; bits stand behind it
    return start >= 0 and (data[start + 42] & 127) > 7


def keeps_all(image, channels):
    """Whether Pillow reads all bands and all bits of a TIFF, and as they are."""
    tags = image.tag_v2
    bits, samples, sign = max(tags.get(BITS, (1,))), tags.get(SAMPLES, 1), tags.get(SIGN, (1,))[0]
    if samples == 1 and tags.get(PHOTOMETRIC) != 0:
        return (bits, sign) in ((16, 1), (16, 2), (32, 3)) or (bits <= 8 and sign == 1)
    # Extra bands are 0 anything, 2 opacity, 1 opacity by which Pillow divides the colours.
    kinds = (1, 2) if channels in (1, 3) else (2,)
    known = all(kind in kinds for kind in tags.get(EXTRA, ()))
    return bits <= 8 and sign == 1 and samples == len(image.getbands()) and known


def read_tiff(data, channels, max_pixels):
    """(pixels, how many of the channels are the colours of a picture) of a TIFF, of any bands."""
    try:
        import tifffile  # optional
    except ImportError:
        needs = "a TIFF of these bands, bits or pages needs: pip install tifffile"
        raise ValueError(needs) from None
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        series, page = tiff.series[0], tiff.pages[0]
        if len(tiff.series) > 1 or len(series.shape) > 3:
            raise ValueError(f"{len(tiff.pages)} pages in one file; one image is expected")
        check_size(page.imagewidth, page.imagelength, max_pixels)
        pixels, axes = series.asarray(), series.axes
        alpha = [int(kind) for kind in page.extrasamples] in ([1], [2])
        colours, white = 3 if page.photometric == 2 else 1, page.photometric == 0
    if pixels.ndim == 3 and axes[-1] != "S":  # bands lie one after the other, or are pages
        first, _, last = pixels.shape
        if not (last == channels != first if channels else last < first):
            pixels = pixels.transpose(1, 2, 0)
    if white and pixels.dtype.kind == "u":  # 0 is white
        pixels = np.iinfo(pixels.dtype).max - pixels
    found = pixels.shape[2] if pixels.ndim == 3 else 1
    return np.ascontiguousarray(pixels), colours if found == colours + alpha else 0
