"""What the pictures of the lessons are put together from, on a Page of pictures/plot.py.

Coordinates are pixels of the finished page, from its upper left corner; pictures are uint8
(H, W, 3).
"""

import math
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from images import synthetic
from pictures.plot import BLUE, GREEN, GREY, ORANGE, PAPER, PINK, SKY

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "lessons"
VIEWS = [BLUE, ORANGE, GREEN, PINK, SKY, GREY]  # a colour for each crop, large ones first


def put(page, pixels, x, y, width, height=None, frame=None):
    """Paste uint8 (H, W, 3) as a picture of this width, pixels repeated; maybe with a frame."""
    height, zoom = height or width, page.zoom
    size = round(width * zoom), round(height * zoom)
    image = Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.NEAREST)
    page.large.paste(image, (round(x * zoom), round(y * zoom)))
    if frame:
        box(page, x, y, width, height, frame)


def box(page, x, y, width, height, colour, line=2):
    corners = [(x, y), (x + width, y), (x + width, y + height), (x, y + height), (x, y), (x + 1, y)]
    page.line(corners, colour, line)


def fill(page, x, y, width, height, colour):
    corners = [(x * page.zoom, y * page.zoom), ((x + width) * page.zoom, (y + height) * page.zoom)]
    page.draw.rectangle(corners, colour)


def arrow(page, x0, y0, x1, y1, colour=GREY, head=6):
    page.line([(x0, y0), (x1, y1)], colour, 1.6)
    angle = math.atan2(y1 - y0, x1 - x0)
    tips = [(x1 - head * math.cos(angle + a), y1 - head * math.sin(angle + a)) for a in (0.5, -0.5)]
    page.line([tips[0], (x1, y1), tips[1]], colour, 1.6)


def shades(values, colour=BLUE, most=None):
    """Numbers (H, W) as pixels from white (0) to a colour (`most`)."""
    values = np.asarray(values, dtype=np.float32)
    share = (values / (most or values.max())).clip(0, 1)[..., None]
    rgb = np.array([list(bytes.fromhex(c[1:])) for c in (PAPER, colour)], np.float32)
    return (rgb[0] + (rgb[1] - rgb[0]) * share).round().astype(np.uint8)


def picture(number=1, size=48):
    return synthetic.make(number + 1, size=size)[0][number]


def save(page, name):
    path = FOLDER / f"{name}.png"
    page.finished().quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"wrote {path}")
