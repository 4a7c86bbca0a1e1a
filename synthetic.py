"""The embedded data set: little confetti pictures, drawn in memory from a seed, with labels.

Every image is strewn with many copies of ONE glyph in colours of ONE palette; the pair is its class. All else is chance:
each copy has its own colour, size, angle and place, and the ground drifts softly between shades.

DINO learns what all crops of an image share, so the shared things are put on a ladder, as in photographs:
  - the palette: even an untrained network sees it, so learning starts at once
  - the glyph:   hidden from pixels and untrained networks, so there is something left to discover
and nothing else is shared by the crops: whatever marks one single image (the colour of its ground, say) would be
learnt instead of the classes.

Glyphs are signed distance functions (Quilez, "2D distance functions"): negative inside, positive outside, so that
`0.5 - distance in pixels`, cut to [0, 1], is a clean antialiased edge.

Shapes:  N images   K copies in an image   S pixels of a stamp's side   H, W image sides   C red, green, blue
"""

import numpy as np

CHUNK = 256  # images drawn from one random stream: image i depends on (seed, split, i) alone, never on n

# name:     five colours; every copy takes one and shifts it a little
PALETTES = {
    "reef": ["#ff6b6b", "#ff8a70", "#2ec4b6", "#1fa3b0"],      # coral and teal
    "dusk": ["#ffb627", "#ffd166", "#5a5ee0", "#7b6cf6"],      # amber and indigo
    "garden": ["#e05fd0", "#c86bf0", "#8fd14f", "#5fbf5a"],    # orchid and leaf
}


def disc(x, y):
    return np.hypot(x, y) - 0.80


def ring(x, y):
    return np.abs(np.hypot(x, y) - 0.75) - 0.20


def cross(x, y):
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - 0.95, np.minimum(x, y) - 0.27)


def bars(x, y):
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.minimum(x, np.abs(x - 0.66)) - 0.19, y - 0.85)


GLYPHS = {"disc": disc, "ring": ring, "cross": cross, "bars": bars}
CLASSES = [f"{palette} {glyph}" for palette in PALETTES for glyph in GLYPHS]
GROUND = np.array((0.12, 0.12, 0.20), np.float32)
COPIES, RADIUS = 40, (0.085, 0.11)
JITTER = 0.05
CLOUDS = 0.035


def _colours(rng, palette_N, copies):
    table = np.array([[[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in p] for p in PALETTES.values()]) / 255
    pick_NK = rng.integers(table.shape[1], size=(len(palette_N), copies))
    colour_NKC = table[palette_N[:, None], pick_NK]
    light = rng.uniform(0.8, 1.1, (len(palette_N), copies, 1))
    return colour_NKC * light + rng.normal(0, 0.03, colour_NKC.shape)


def _ground(rng, n, side):
    """Soft clouds: coarse noise, enlarged linearly. Its colour drifts within the image, so it names no image."""
    coarse = rng.standard_normal((n, 7, 7, 3), np.float32) + rng.standard_normal((n, 7, 7, 1), np.float32)
    at = np.linspace(0, 5.999, side)
    t = (at % 1).astype(np.float32)
    t = t * t * (3 - 2 * t)
    blend = np.zeros((side, 7), np.float32)
    blend[np.arange(side), at.astype(int)] = 1 - t
    blend[np.arange(side), at.astype(int) + 1] = t
    clouds = blend @ coarse.reshape(n, 7, 21)                                    # rows: (n, side, 7 * 3)
    clouds = blend @ clouds.reshape(n, side, 7, 3)                               # columns: (n, side, side, 3)
    return GROUND + CLOUDS * clouds + 0.012 * rng.standard_normal(clouds.shape, np.float32)


def _draw(rng, label_N, size):
    n, k = len(label_N), COPIES
    palette_N, glyph_N = label_N // len(GLYPHS), label_N % len(GLYPHS)
    stamp = int(np.ceil(2 * RADIUS[1] * size)) + 2
    pad = stamp
    canvas = _ground(rng, n, size + 2 * pad)

    colour_NKC = _colours(rng, palette_N, k).astype(np.float32)
    radius_NK = (rng.uniform(*RADIUS, (n, k)) * size).astype(np.float32)
    angle_NK = rng.uniform(0, 2 * np.pi, (n, k)).astype(np.float32)
    # Places: the R2 sequence (Roberts 2018) covers a square evenly with any number of points
    walk = np.arange(k)[:, None] * np.array([0.7548776662, 0.5698402910])
    place = (walk + rng.uniform(size=(n, 1, 2)) + rng.normal(0, JITTER, (n, k, 2))) % 1
    flip = rng.uniform(size=n) < 0.5
    place[flip] = place[flip][..., ::-1]
    reach = size + stamp
    place = place * reach + pad - stamp / 2  # centres, in canvas pixels; some glyphs run over the border
    corner = np.floor(place - stamp / 2 + 0.5).astype(int)
    offset = (place - corner).astype(np.float32)

    grid = np.arange(stamp, dtype=np.float32) + 0.5
    dy = grid[:, None] - offset[:, :, 0, None, None]
    dx = grid[None, :] - offset[:, :, 1, None, None]
    cos, sin, r = np.cos(angle_NK)[..., None, None], np.sin(angle_NK)[..., None, None], radius_NK[..., None, None]
    x, y = (cos * dx + sin * dy) / r, (cos * dy - sin * dx) / r
    alpha = np.empty_like(x)
    for g, sdf in enumerate(GLYPHS.values()):
        mine = glyph_N == g
        alpha[mine] = np.clip(0.5 - sdf(x[mine], y[mine]) * r[mine], 0, 1)

    alpha = alpha[..., None]
    for i in range(n):
        for c in range(k):
            y0, x0 = corner[i, c]
            spot = canvas[i, y0 : y0 + stamp, x0 : x0 + stamp]
            spot += alpha[i, c] * (colour_NKC[i, c] - spot)
    image = canvas[:, pad:-pad, pad:-pad]
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def make(n, seed=0, split="train", size=64):
    label = np.arange(n, dtype=np.int64) % len(CLASSES)
    images = np.empty((n, size, size, 3), np.uint8)
    for start in range(0, n, CHUNK):
        rng = np.random.default_rng([seed, ("train", "test").index(split), start // CHUNK])
        part = images[start : start + CHUNK]
        part[:] = _draw(rng, (start + np.arange(CHUNK)) % len(CLASSES), size)[: len(part)]
    return images, label
