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


def draw(images, maps, keep, path, lines=40):
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
    linked, lefts = beside(images)
    for pair in random.Random(0).sample(pairs.tolist(), min(lines, len(pairs))):
        ends = []
        for place, grid, image, x in zip(pair, maps, images, lefts, strict=True):
            row, column = divmod(place, grid.shape[1])
            width = linked.size[1] * image.shape[1] / image.shape[0]
            x += (column + 0.5) / grid.shape[1] * width
            ends.append((x, (row + 0.5) / grid.shape[0] * linked.size[1]))
        colour = tuple(colours[pair[0]].tolist())
        linked.line(ends, PAPER, 3)
        linked.line(ends, colour, 1.6)
        for x, y in ends:
            linked.dot(x, y, colour)
    fields = [c * k.numpy()[:, :, None] for c, k in zip((left, right), keep, strict=True)]
    field, _ = beside([tinted(*both) for both in zip(images, fields, strict=True)])
    count = f"{len(pairs):,} of {keep[0].sum():,}, at most {lines} of them drawn"
    pages = {
        f"mutual nearest patches: {count}": linked,
        "every patch on the right has the colour of its nearest on the left": field,
    }
    rows = [([title], [np.asarray(page.finished())], None) for title, page in pages.items()]
    return sheets.write(sheets.bands(rows, linked.size[0]), path)


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


def beside(pictures, width=988, highest=420, gap=24):
    """Two pictures of one height side by side on a Page, and where each begins there."""
    forms = [p.shape[1] / p.shape[0] for p in pictures]
    height = min(highest, round((width - gap) / sum(forms)))
    page, lefts = Page(width, height), (0, height * forms[0] + gap)
    for each, left, form in zip(pictures, lefts, forms, strict=True):
        image = sheets.fit(sheets.picture(each), page.zoom * height * max(1, form))
        page.large.paste(image, (round(page.zoom * left), 0))
    return page, lefts
