"""Which place of one image is which of another: patches that are each other's nearest.

Shapes:  H W rows and columns of a feature map   D channels of a feature   K pairs
A place is the number of a patch on its map: row * W + column.
"""

import random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from pictures import sheets
from pictures.plot import PAPER, Page


def nearest(a, b):
    """For every patch of a (H, W, D) the place (H, W) of the most similar one of b, by cosine."""
    a_ND, b_ND = (F.normalize(x.flatten(0, 1).float(), dim=1) for x in (a, b))
    parts = [(rows @ b_ND.T).argmax(dim=1) for rows in a_ND.split(4096)]  # bounded memory
    return torch.cat(parts).unflatten(0, a.shape[:2])


def mutual_nearest(a, b):
    """Pairs (K, 2) of places in a and in b that are each other's nearest.

    A pair that holds both ways is far more often right than one that does not.
    """
    to_b, to_a = nearest(a, b).flatten(), nearest(b, a).flatten()
    here = torch.arange(len(to_b))
    here = here[to_a[to_b] == here]
    return torch.stack((here, to_b[here]), dim=1)


def draw(images, maps, keep, path, lines=40, side=480):
    """Two images with lines between mutual nearest patches, and the nearest of every patch.

    maps  their features (H, W, D)
    keep  which of their patches to show: bool (H, W)
    """
    pairs = mutual_nearest(*maps)
    pairs = pairs[keep[0].flatten()[pairs[:, 0]] & keep[1].flatten()[pairs[:, 1]]]
    # Places of the left image have colours, and those on the right have that of their nearest.
    left = position_colours(*maps[0].shape[:2])
    colours = left.reshape(-1, 3)
    right = colours[nearest(maps[1], maps[0]).numpy()]
    fields = [c * k.numpy()[:, :, None] for c, k in zip((left, right), keep, strict=True)]
    fields = [tinted(*both) for both in zip(images, fields, strict=True)]
    count = f"{len(pairs):,} of {keep[0].sum():,}, at most {lines} of them drawn"
    field = "every patch on the right has the colour of its nearest on the left"
    rows = [([f"mutual nearest patches: {count}"], images, None), ([field], fields, None)]
    sheet = sheets.bands(rows, side)
    page = Page(*sheet.size)
    page.large.paste(sheet.resize(page.large.size))
    forms = [np.array(image.shape[:2]) / max(image.shape[:2]) * side for image in images]
    middle = sheets.HEAD + max(height for height, _ in forms) / 2
    for pair in random.Random(0).sample(pairs.tolist(), min(lines, len(pairs))):
        ends = []
        for n, (height, width) in enumerate(forms):
            row, column = divmod(pair[n], maps[n].shape[1])
            x = (column + 0.5) / maps[n].shape[1] * width + sheets.GAP + n * (side + sheets.GAP)
            ends.append((x, ((row + 0.5) / maps[n].shape[0] - 0.5) * height + middle))
        colour = tuple(colours[pair[0]].tolist())
        page.line(ends, PAPER, 3)
        page.line(ends, colour, 1.6)
        for x, y in ends:
            page.dot(x, y, colour)
    return sheets.write(page.finished(), path)


def position_colours(rows, columns):
    """uint8 (rows, columns, 3): hue goes with the column, depth with the row."""
    y, x = np.mgrid[0 : 1 : rows * 1j, 0 : 1 : columns * 1j]
    hsv = np.stack([216 * x, 110 + 145 * y, 255 - 110 * y], axis=-1).astype(np.uint8)
    return np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))


def tinted(pixels, colours):
    """An image in the colours (h, w, 3) of its patches: its own light remains, its hue does not."""
    image = sheets.fit(sheets.picture(pixels), 1440)
    colours = np.asarray(Image.fromarray(colours).resize(image.size, Image.Resampling.NEAREST))
    light = np.asarray(image.convert("L"), np.float32)[:, :, None] / 255
    return (colours * (0.55 + 0.45 * light)).astype(np.uint8)
