"""Pictures of more than 8 bits, and TIFF of any bands: what Pillow alone would cut down.

Only files that need it come here, so data sets of ordinary pictures never load it.
"""

import io

import numpy as np
from PIL import Image, ImageOps

try:  # optional: pip install tifffile
    import tifffile
except ImportError:
    tifffile = None

BITS, PHOTOMETRIC, SAMPLES, EXTRA, SIGN = 258, 262, 277, 338, 339  # tags of a TIFF


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
    if image.mode.startswith("I"):
        return False
    if image.format == "PPM":
        largest = image.tile[0].args
        return (largest[1] if isinstance(largest, tuple) else largest) in range(256, 65536)
    start = data.find(b"\xff\x4f\xff\x51")  # the header of the coded image; bits stand behind it
    return start >= 0 and (data[start + 42] & 127) > 7


def keeps_all(image):
    """Whether Pillow reads all bands and all bits of a TIFF."""
    tags = image.tag_v2
    bits, samples, sign = max(tags.get(BITS, (1,))), tags.get(SAMPLES, 1), tags.get(SIGN, (1,))[0]
    if samples == 1 and tags.get(PHOTOMETRIC) != 0:
        return (bits, sign) in ((16, 1), (16, 2), (32, 3)) or (bits <= 8 and sign == 1)
    known = all(kind in (1, 2) for kind in tags.get(EXTRA, ()))  # alpha; 0 is a band of its own
    return bits <= 8 and sign == 1 and samples == len(image.getbands()) and known


def read_tiff(data, channels, check_size):
    """(pixels, how many of the channels are the colours of a picture) of a TIFF, of any bands.

    check_size(width, height) is asked before anything is decoded.
    """
    if tifffile is None:
        raise ValueError("a TIFF of these bands, bits or pages needs: pip install tifffile")
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        series, page = tiff.series[0], tiff.pages[0]
        if len(tiff.series) > 1 or len(series.shape) > 3:
            raise ValueError(f"{len(tiff.pages)} pages in one file; one image is expected")
        check_size(page.imagewidth, page.imagelength)
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
