"""The two pictures on which README.md shows what pictures/ does, drawn with the embedded data.

  python scripts/draw_islands.py docs

islands_1.png   round pieces of three images, strewn with glyphs, on ground without
islands_2.png   the same pieces moved and turned, on other ground
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from images import synthetic

HEIGHT, WIDTH, RADIUS = 96, 144, 24
# class of each piece; its centre (x, y) in the first picture, and in the second; turned by, degrees
PIECES = [
    (synthetic.CLASSES.index("reef ring"), (34, 36), (112, 62), 20),
    (synthetic.CLASSES.index("dusk bars"), (84, 62), (66, 30), -15),
    (synthetic.CLASSES.index("garden cross"), (116, 32), (30, 64), 30),
]


def picture(pieces, centres, angles, rng):
    """Discs cut out of the pieces, turned, at these centres on ground without glyphs."""
    canvas = synthetic.ground(rng, 1, WIDTH)[0, :HEIGHT].clip(0, 1) * 255
    side = 2 * RADIUS
    y, x = np.mgrid[:side, :side] + 0.5 - RADIUS
    inside = (RADIUS - np.hypot(y, x)).clip(0, 1)[:, :, None]
    for piece, (left, top), angle in zip(pieces, np.array(centres) - RADIUS, angles, strict=True):
        turned = np.asarray(Image.fromarray(piece).rotate(angle, Image.Resampling.BICUBIC))
        spot = canvas[top : top + side, left : left + side]
        spot += inside * (turned - spot)
    return (canvas + 0.5).astype(np.uint8)


def main(folder):
    folder = Path(folder)
    labels, *centres, angles = zip(*PIECES, strict=True)
    rng = np.random.default_rng(0)
    pieces = synthetic.draw(rng, np.array(labels), 2 * RADIUS)
    for number, at, turned in zip("12", centres, [(0, 0, 0), angles], strict=True):
        image = picture(pieces, at, turned, rng)
        Image.fromarray(image).save(folder / f"islands_{number}.png")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__.split("\n\n")[1].strip())
    main(sys.argv[1])
