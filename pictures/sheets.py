"""Sheets of pictures with captions, drawn with Pillow alone.

Arrays are uint8 (H, W, C); a picture of another number of channels than three shows the first
three, or the first one as grey. Small pictures are enlarged by repeating pixels: none are invented.
"""

import itertools
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from config import UserError
from pictures.plot import GREY, PAPER, font, in_ascii, text_width

GAP, HEAD, FOOT = 6, 28, 20  # pixels between pictures, of a title above them, of words below
HEAT = "#000004", "#fcffa4", "#bc3754"  # black, white and middle, of Inferno (Smith et al. 2015)


def bands(rows, side=160, per_row=8):
    """Bands of pictures one below the other, each under its titles, as a Pillow image.

    rows     [(titles, pictures, words)], as many pictures in each. A title stands above its
             picture and may be long; words stand below theirs, or None.
             A picture is uint8 (H, W, C), or None for an empty place
    side     the longer one of each picture
    per_row  more pictures than this begin a further set of bands
    """
    # An empty place in the first row is a narrow one in all.
    wide = [GAP + (2 * GAP if image is None else side) for image in rows[0][1][:per_row]]
    left = list(itertools.accumulate(wide, initial=GAP))
    ends = [left[i] + text_width(words, 13) + GAP for row in rows for i, words in enumerate(row[0])]
    starts = range(0, len(rows[0][1]), per_row)
    highest = len(starts) * len(rows) * (HEAD + side + FOOT) + GAP
    sheet = Image.new("RGB", (math.ceil(max([left[-1], *ends])), highest), PAPER)
    top = 0
    for start, (titles, pictures, words) in itertools.product(starts, rows):
        top += HEAD if titles else GAP
        for x, title in zip(left, titles, strict=False):
            caption(sheet, x, top - HEAD / 2, title)
        shown = [p if p is None else fit(picture(p), side) for p in pictures[start:][:per_row]]
        height = max(image.height for image in shown if image)
        for x, image in zip(left, shown, strict=False):
            if image:
                sheet.paste(image, (x, top + (height - image.height) // 2))
        top += height
        if words:
            for x, under in zip(left, words[start:][:per_row], strict=False):
                caption(sheet, x, top + FOOT / 2, shortened(under, side))
            top += FOOT
    return sheet.crop((0, 0, sheet.width, top + GAP))


def caption(sheet, x, y, words):
    """Small grey words that begin at x, the middle of their height at y."""
    ImageDraw.Draw(sheet).text((x, y), in_ascii(words), GREY, font(13), "lm")


def shortened(words, width):
    """As many of the words as fit into so many pixels; both ends, as names often begin alike."""
    short, kept = words, len(words)
    while text_width(short, 13) > width:
        kept -= 1
        short = f"{words[: kept // 2]}...{words[kept // 2 - kept :]}"
    return short


def write(image, path, **options):
    """Save a picture; returns where it is."""
    try:
        image.save(path, **options)
    except (OSError, ValueError) as error:  # the latter of an ending that says no format
        raise UserError(f"{path}: cannot be written ({error}); choose another .png") from None
    return Path(path)


def hide(pixels, grid):
    """Darken and stripe the patches of uint8 (H, W, 3) where the bool grid is True."""
    height, width = pixels.shape[:2]
    y, x = np.arange(height)[:, None], np.arange(width)[None]
    hidden = grid[y * grid.shape[0] // height, x * grid.shape[1] // width]
    stripe = (x + y) % 8 < 3
    dark = pixels * 0.22 + np.where(stripe, 92, 28)[:, :, None]
    return np.where(hidden[:, :, None], dark, pixels).astype(np.uint8)


def picture(pixels):
    """(H, W, C) as a Pillow image in colour: three channels, or the first as grey.

    As in augment.py, integers other than uint8 end at their largest value; floats at 1, or above.
    """
    if pixels.dtype != np.uint8:
        kind = pixels.dtype
        most = np.iinfo(kind).max if kind.kind in "iu" else max(1, pixels.max())
        pixels = (pixels.astype(np.float32) / most * 255).round().clip(0, 255).astype(np.uint8)
    if pixels.shape[2] < 3:
        pixels = pixels[:, :, :1].repeat(3, axis=2)
    return Image.fromarray(np.ascontiguousarray(pixels[:, :, :3]))


def fit(image, side):
    """The picture as large as fits into a square, in its proportions."""
    factor = side / max(image.size)
    method = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS
    return image.resize([max(1, round(n * factor)) for n in image.size], method)


def overlay(pixels, values, side):
    """An image, as large as fits into `side`, under a map (H, W) of its own, enlarged smoothly.

    The largest value is brightest; where the map is low, the image shows through, darkened.
    """
    image = fit(picture(pixels), side)
    values = Image.fromarray(np.asarray(values, np.float32))
    values = np.asarray(values.resize(image.size, Image.Resampling.BICUBIC)).clip(0)
    values = (values - values.min()) / max(values.max() - values.min(), 1e-12)
    # As bright as it is high, for any kind of colour vision: black, red, pale yellow.
    heat = ImageOps.colorize(Image.fromarray(np.uint8(255 * values)), *HEAT)
    grey = np.asarray(image.convert("L"), np.float32)[:, :, None]
    share = 0.15 + 0.8 * values[:, :, None]
    return (grey * (1 - share) + np.asarray(heat) * share).astype(np.uint8)


def position_colours(rows, columns):
    """uint8 (rows, columns, 3): hue goes with the column, depth with the row."""
    y, x = np.mgrid[0 : 1 : rows * 1j, 0 : 1 : columns * 1j]
    hsv = np.stack([216 * x, 110 + 145 * y, 255 - 110 * y], axis=-1).astype(np.uint8)
    return np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))


def tinted(pixels, colours):
    """An image in the colours (h, w, 3) of its patches: its own light remains, its hue does not."""
    image = fit(picture(pixels), 1440)
    colours = np.asarray(Image.fromarray(colours).resize(image.size, Image.Resampling.NEAREST))
    light = np.asarray(image.convert("L"), np.float32)[:, :, None] / 255
    return (colours * (0.55 + 0.45 * light)).astype(np.uint8)
