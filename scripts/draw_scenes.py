"""The pictures on which README.md shows what visualize.py does: made of the embedded data set.

  python scripts/draw_scenes.py docs

scene_1, scene_2   all twelve classes, twelve new images of them, in another order
scenes.json        the middle of each class in scene 1, and where it is in scene 2
islands_1, _2      round pieces of images on the bare ground: objects and background
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import synthetic

TILE, ROWS, COLUMNS = 48, 3, 4


def scene(order, rng):
    """One image of each class, in this order, as rows of tiles."""
    tiles = synthetic.draw(rng, np.array(order), TILE).reshape(ROWS, COLUMNS, TILE, TILE, 3)
    return tiles.swapaxes(1, 2).reshape(ROWS * TILE, COLUMNS * TILE, 3)


def middles(order):
    """{class: [x, y]} of the tiles."""
    places = {label: divmod(place, COLUMNS) for place, label in enumerate(order)}
    return {c: [(x + 0.5) * TILE, (y + 0.5) * TILE] for c, (y, x) in places.items()}


def islands(labels, centres, rng, height=96, width=144, radius=24):
    """Discs of images of these classes, at these centres (y, x), on ground without glyphs."""
    canvas = synthetic.ground(rng, 1, width)[0, :height].clip(0, 1) * 255
    pieces = synthetic.draw(rng, np.array(labels), 2 * radius)
    y, x = np.mgrid[: 2 * radius, : 2 * radius] + 0.5 - radius
    inside = (radius - np.hypot(y, x)).clip(0, 1)[:, :, None]
    for piece, (top, left) in zip(pieces, np.array(centres) - radius, strict=True):
        spot = canvas[top : top + 2 * radius, left : left + 2 * radius]
        spot += inside * (piece - spot)
    return (canvas + 0.5).astype(np.uint8)


def main(folder):
    folder = Path(folder)
    rng = np.random.default_rng(0)
    orders = np.arange(12).tolist(), rng.permutation(12).tolist()
    for number, order in enumerate(orders, 1):
        Image.fromarray(scene(order, rng)).save(folder / f"scene_{number}.png")
    first, second = map(middles, orders)
    points = {"a": list(first.values()), "b": [second[label] for label in first]}
    (folder / "scenes.json").write_text(json.dumps(points) + "\n")
    for number, (labels, centres) in enumerate(
        [((1, 10), ((40, 36), (56, 104))), ((1, 4, 10), ((34, 110), (60, 30), (64, 84)))], 1
    ):
        Image.fromarray(islands(labels, centres, rng)).save(folder / f"islands_{number}.png")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__.split("\n\n")[1].strip())
    main(sys.argv[1])
