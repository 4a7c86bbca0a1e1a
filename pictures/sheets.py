"""Sheets of pictures with captions, drawn with Pillow alone.

  crop_sheet  each image, its crops as the network gets them, and the patches that are hidden
  bands       rows of pictures one below the other, each row under its title
  Pair        a page of two images side by side, with lines and points from one to the other
  overlay     a map over its image;  heat: numbers as colours
Arrays are uint8 (H, W, C); a picture of another number of channels than three shows the first
three, or the first one as grey. Small pictures are enlarged by repeating pixels: none are invented.
"""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from config import UserError
from pictures.plot import BLUE, GREEN, GREY, INK, ORANGE, PAPER, Page, font


def crop_sheet(images, global_crops, local_crops, masks, mean, std, path):
    """One row per image: the image, its global crops with hidden patches striped, its local crops.

    images        uint8 arrays (H, W, C), of any sizes
    global_crops  per image, its crops: normalised float tensors (C, S, S)
    local_crops   the same, and there may be none
    masks         per image, per global crop: its square grid of patches as one row of bool (N,),
                  True = hidden from the student
    """
    side, gap, head, row = 160, 6, 32, 160 + 14
    half = (side - gap) // 2  # local crops lie in two rows, at half the size
    n_global, n_local = len(global_crops[0]), len(local_crops[0])
    columns = (n_local + 1) // 2
    globals_at = 2 * gap + side
    locals_at = globals_at + n_global * (side + gap) + (2 * gap if columns else 0)
    size = (locals_at + columns * (half + gap), head + len(images) * row)
    sheet = Image.new("RGB", size, PAPER)
    caption(sheet, gap, head, "image")
    caption(sheet, globals_at, head, "global crops, hidden patches striped")
    caption(sheet, locals_at, head, "local crops" if columns else "")
    for i, image in enumerate(images):
        y = head + i * row
        paste(sheet, image, gap, y, side)
        for j, (crop, mask_N) in enumerate(zip(global_crops[i], masks[i], strict=True)):
            grid = mask_N.numpy().reshape(math.isqrt(len(mask_N)), -1)
            pixels = hide(enlarge(denormalise(crop, mean, std), side), grid)
            paste(sheet, pixels, globals_at + j * (side + gap), y, side)
        for j, crop in enumerate(local_crops[i]):
            x, below = locals_at + j % columns * (half + gap), j // columns * (half + gap)
            paste(sheet, denormalise(crop, mean, std), x, y + below, half)
    return write(sheet, path)


def caption(sheet, x, height, words, top=0):
    """Small grey words in a strip of this height, by default at the top of the sheet."""
    ImageDraw.Draw(sheet).text((x, top + height / 2), words, GREY, font(13), "lm")


def denormalise(crop, mean, std):
    """Normalised float (C, H, W) -> uint8 (H, W, C), undoing what augment.py does last."""
    mean, std = (torch.as_tensor(v, dtype=torch.float32)[:, None, None] for v in (mean, std))
    pixels = (crop.detach().float().cpu() * std + mean) * 255
    return pixels.round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def enlarge(pixels, side):
    """uint8 (H, W, C) to (side, side, 3): small pictures by repeating pixels, none are invented."""
    return np.asarray(fit(picture(pixels), side))


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

    As in augment.py, integers other than uint8 end at their largest value and floats at 1.
    """
    if pixels.dtype != np.uint8:
        most = np.iinfo(pixels.dtype).max if pixels.dtype.kind in "iu" else 1
        pixels = (pixels.astype(np.float32) / most * 255).round().clip(0, 255).astype(np.uint8)
    if pixels.shape[2] < 3:
        pixels = pixels[:, :, :1].repeat(3, axis=2)
    return Image.fromarray(np.ascontiguousarray(pixels[:, :, :3]))


def fit(image, side):
    """The picture as large as fits into a square, in its proportions."""
    factor = side / max(image.size)
    method = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS
    return image.resize([max(1, round(n * factor)) for n in image.size], method)


def thumbnail(pixels, side=320):
    """A large picture made smaller to fit into a square; a small one as it is."""
    image = picture(pixels)
    return fit(image, side) if max(image.size) > side else image


def paste(sheet, pixels, x, y, side):
    """Put uint8 (H, W, C) into the middle of a square of the sheet."""
    image = fit(picture(pixels), side)
    sheet.paste(image, (x + (side - image.width) // 2, y + (side - image.height) // 2))


def bands(rows, path, side=160, per_row=8):
    """Bands of pictures one below the other, each under its title.

    rows     [(title, pictures, words)], as many pictures in each; words stand below them, or None.
             A picture is uint8 (H, W, C), or None for an empty place
    side     the longer one of each picture
    per_row  more pictures than this begin a further set of bands
    """
    gap, head, foot = 6, 28, 20
    count = len(rows[0][1])
    # An empty place in the first row is a narrow one in all.
    wide = [gap + (2 * gap if image is None else side) for image in rows[0][1][:per_row]]
    left = [gap + sum(wide[:i]) for i in range(len(wide) + 1)]
    width = max([left[-1]] + [math.ceil(2 * gap + font(13).getlength(row[0])) for row in rows])
    parts = []
    for start in range(0, count, per_row):
        for title, pictures, words in rows:
            shown = [p if p is None else fit(picture(p), side) for p in pictures[start:][:per_row]]
            height = max(image.height for image in shown if image)
            above, below = head if title else gap, foot if words else 0
            band = Image.new("RGB", (width, above + height + below), PAPER)
            caption(band, gap, head, title)
            for i, image in enumerate(shown):
                x = left[i]
                if image:
                    band.paste(image, (x, above + (height - image.height) // 2))
                if words:
                    caption(band, x, foot, shortened(words[start + i], side), above + height)
            parts.append(band)
    sheet = Image.new("RGB", (width, sum(band.height for band in parts) + gap), PAPER)
    for i, band in enumerate(parts):
        sheet.paste(band, (0, sum(above.height for above in parts[:i])))
    return write(sheet, path)


def shortened(words, width):
    """As many of the words as fit into so many pixels."""
    if font(13).getlength(words) <= width:
        return words
    while words and font(13).getlength(words + "…") > width:
        words = words[:-1]
    return words + "…"


# Inferno (Smith and van der Walt 2015): as bright as it is high, for any kind of colour vision.
HEAT = ["#000004", "#420a68", "#932667", "#dd513a", "#fca50a", "#fcffa4"]


def heat(values):
    """Numbers 0..1 (H, W) -> uint8 (H, W, 3), from black over red to pale yellow."""
    stops = np.array([list(bytes.fromhex(code[1:])) for code in HEAT])
    at = np.linspace(0, 1, len(stops))
    channels = [np.interp(values, at, stops[:, c]) for c in range(3)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def overlay(pixels, values, side):
    """An image, as large as fits into `side`, under a map (H, W) of its own, enlarged smoothly.

    The largest value is brightest; where the map is low, the image shows through, darkened.
    """
    image = fit(picture(pixels), side)
    values = Image.fromarray(np.asarray(values, np.float32))
    values = np.asarray(values.resize(image.size, Image.Resampling.BICUBIC)).clip(0)
    values = (values - values.min()) / max(values.max() - values.min(), 1e-12)
    grey = np.asarray(image.convert("L"), np.float32)[:, :, None]
    share = 0.15 + 0.8 * values[:, :, None]
    return (grey * (1 - share) + heat(values) * share).clip(0, 255).astype(np.uint8)


def tinted(pixels, colours):
    """An image in the colours (h, w, 3) of its patches: its own light remains, its hue does not."""
    image = picture(pixels)
    image = image.resize([n * max(1, -(-400 // min(image.size))) for n in image.size], 0)
    colours = np.asarray(picture(colours).resize(image.size, Image.Resampling.NEAREST))
    light = np.asarray(image.convert("L"), np.float32)[:, :, None] / 255
    return (colours * (0.55 + 0.45 * light)).astype(np.uint8)


def position_colours(rows, columns):
    """uint8 (rows, columns, 3): hue goes with the column, depth with the row."""
    y, x = np.mgrid[0 : 1 : rows * 1j, 0 : 1 : columns * 1j]
    hsv = np.stack([216 * x, 110 + 145 * y, 255 - 110 * y], axis=-1).astype(np.uint8)
    return np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))


class Pair:
    """A page of bands, each with two pictures side by side and what is drawn over them."""

    gap, head, width = 24, 34, 1000

    def __init__(self, images, count):
        proportions = [image.shape[1] / image.shape[0] for image in images]
        self.height = min(420, round((self.width - 3 * self.gap) / sum(proportions)))
        widths = [max(1, round(p * self.height)) for p in proportions]
        room = (self.width - self.gap - sum(widths)) // 2  # to the left and right of both
        self.lefts = room, room + widths[0] + self.gap
        self.sizes = [(width, self.height) for width in widths]
        self.scales = [w / image.shape[1] for w, image in zip(widths, images, strict=True)]
        self.page = Page(self.width, count * (self.head + self.height) + self.gap)
        self.top = -self.height

    def title(self, words):
        self.page.text(self.lefts[0], self.top + self.height + self.head / 2, words, 14, GREY, "lm")

    def show(self, *pictures):
        """Begin the next band with two pictures, of any resolution."""
        self.top += self.head + self.height
        zoom = self.page.zoom
        for pixels, left, size in zip(pictures, self.lefts, self.sizes, strict=True):
            # Small pictures keep their pixels visible, as everywhere here.
            method = Image.Resampling.NEAREST if pixels.shape[1] < size[0] else Image.Resampling.BOX
            image = picture(pixels).resize([n * zoom for n in size], method)
            self.page.large.paste(image, (left * zoom, self.top * zoom))

    def at(self, side, point):
        """A pixel of the left (0) or right (1) image on the page."""
        x, y = (float(n) * self.scales[side] for n in point)
        return self.lefts[side] + x, self.top + y

    def connect(self, a, b, colour):
        ends = [self.at(0, a), self.at(1, b)]
        self.page.line(ends, PAPER, 3)
        self.page.line(ends, colour, 1.6)
        for x, y in ends:
            self.page.dot(x, y, colour)

    def keypoints(self, points, found, truth):
        """Numbered points left, where they were found right, and how far that is from the truth."""
        for i, (a, b) in enumerate(zip(points.tolist(), found.tolist(), strict=True)):
            colour = (BLUE, ORANGE, GREEN)[i % 3]
            if truth is not None:
                x, y = self.at(1, truth[i])
                self.page.line([(x, y), self.at(1, b)], PAPER, 2)
                for colour_of, wide in ((PAPER, 4), (INK, 2)):
                    for dy in (-5, 5):
                        self.page.line([(x - 5, y - dy), (x + 5, y + dy)], colour_of, wide)
            for x, y in (self.at(0, a), self.at(1, b)):
                self.page.disc(x, y, 10, PAPER)
                self.page.disc(x, y, 8.6, colour)
                self.page.text(x, y, str(i), 11, PAPER, "mm")

    def finished(self):
        return self.page.finished()


def write(image, path, **options):
    """Save a picture; returns where it is."""
    try:
        image.save(path, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be written ({error}); choose another place") from None
    return Path(path)
