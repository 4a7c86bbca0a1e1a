"""The embedded data set: small labelled pictures strewn with glyphs, drawn from a seed in memory.

Every image holds many copies of ONE glyph in the colours of ONE palette; that pair is its class.
The rest is chance: each copy has its own shade, size, angle and place, on softly clouded ink.

DINO learns whatever all crops of an image have in common, so the class is all they have in common,
on two rungs of about equal height:
  - the palette: two complementary colours. All palettes have about the same mean, so pixels hardly
    tell them apart, yet every crop that holds a few copies shows them
  - the glyph:   all four cover about the same area, so only their form tells them apart
The glyph distances are from Quilez, "2D distance functions".

Shapes:  N images   K copies in an image   S side of a stamp, pixels   C red, green, blue
"""

import numpy as np

SPLITS = ("train", "test")
CHUNK = 64  # images drawn together, always all: image i depends on (seed, split, i) alone

# Two shades of a warm colour, two of its complement. Palettes with means of their own (warm, cool,
# green) are a rung too high: random weights see them at once, DINO's loss stops at ln K - ln 3, and
# the glyphs are never found.
PALETTES = {
    "reef": ("#ff6b6b", "#ff8f70", "#2ec4b6", "#1fa3b0"),  # coral and teal
    "dusk": ("#ffb627", "#ffd166", "#5a5ee0", "#7b6cf6"),  # amber and indigo
    "garden": ("#e05fd0", "#c86bf0", "#8fd14f", "#5fbf5a"),  # orchid and leaf
}
COPIES = 14
RADIUS = (0.12, 0.155)  # of the image's side: shown at 32 pixels, a glyph is 8 to 10 wide
LIGHT = (0.8, 1.1)  # brightness of a copy
# Ablation: `TINT = 0.03` makes purer palettes: the untrained network reaches 55 % instead of 38.
TINT = 0.2  # colour noise of a copy
# Ablation: `SCATTER = 0.01` spreads copies evenly: raw pixels reach 60 %.
SCATTER = 0.08  # how far a copy strays from an even spread
GROUND = (0.12, 0.12, 0.20)  # ink blue
CLOUDS, GRAIN = 0.06, 0.012  # how much the ground drifts, and how much single pixels do


# ---- glyphs -------------------------------------------------------------------------------------
# Distance to the edge of the form, negative inside, where a copy fills the square from -1 to 1.


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


# ---- the parts of a picture ---------------------------------------------------------------------


def ground(rng, n, side, cells=6):
    """Clouds: coarse noise, enlarged smoothly.

    Their colour drifts within the image. One colour per image would be the same in all its crops,
    and DINO would learn to tell images apart by it.
    """
    coarse = rng.standard_normal((n, cells + 1, 3, cells + 1), np.float32)
    coarse += rng.standard_normal((n, cells + 1, 1, cells + 1), np.float32)  # light and dark
    cell, part = np.divmod(np.arange(side) * cells / side, 1)
    part = part * part * (3 - 2 * part)  # level at the cells' corners: no creases
    blend = np.zeros((side, cells + 1), np.float32)  # a pixel is a mix of its two nearest corners
    blend[np.arange(side), cell.astype(int)] = 1 - part
    blend[np.arange(side), cell.astype(int) + 1] = part
    rows = (coarse @ blend.T).swapaxes(2, 3)  # (n, cells + 1, side, 3)
    clouds = (blend @ rows.reshape(n, cells + 1, -1)).reshape(n, side, side, 3)
    grain = rng.standard_normal(clouds.shape, np.float32)
    return np.float32(GROUND) + CLOUDS * clouds + GRAIN * grain


def colours(rng, palette_N):
    """Each copy's own colour: a shade of the palette, lighter or darker, tinted by chance."""
    codes = [[bytes.fromhex(code[1:]) for code in palette] for palette in PALETTES.values()]
    table = np.array([[list(code) for code in palette] for palette in codes], np.float32) / 255
    shade_NK = rng.integers(table.shape[1], size=(len(palette_N), COPIES))
    colour_NKC = table[palette_N[:, None], shade_NK]
    light_NK1 = rng.uniform(*LIGHT, (*shade_NK.shape, 1))
    return (colour_NKC * light_NK1 + rng.normal(0, TINT, colour_NKC.shape)).clip(0, 1)


def places(rng, n):
    """Centres (y, x) in [0, 1): an even spread (the R2 sequence, Roberts 2018), then disturbed."""
    even_K2 = np.arange(COPIES)[:, None] * (0.7548776662, 0.5698402910)
    stray_NK2 = rng.normal(0, SCATTER, (n, COPIES, 2))
    return (even_K2 + rng.uniform(size=(n, 1, 2)) + stray_NK2) % 1


def stamps(glyph_N, centre_NK2, radius_NK, angle_NK, side):
    """How much of each pixel of a small square a copy covers, from 0 to 1."""
    pixel_S = np.arange(side, dtype=np.float32) + 0.5
    y = pixel_S[:, None] - centre_NK2[..., :1, None]
    x = pixel_S - centre_NK2[..., 1:, None]
    radius, angle = radius_NK[..., None, None], angle_NK[..., None, None]
    cos, sin = np.cos(angle) / radius, np.sin(angle) / radius
    x, y = cos * x + sin * y, cos * y - sin * x
    cover_NKSS = np.empty_like(x)
    for number, distance in enumerate(GLYPHS.values()):
        mine = glyph_N == number
        cover_NKSS[mine] = 0.5 - radius[mine] * distance(x[mine], y[mine])  # soft over one pixel
    return cover_NKSS.clip(0, 1)


# ---- pictures -----------------------------------------------------------------------------------


def draw(rng, label_N, size):
    """One image per label: (N, size, size, 3) uint8."""
    n = len(label_N)
    palette_N, glyph_N = np.divmod(label_N, len(GLYPHS))
    side = int(np.ceil(2 * RADIUS[1] * size)) + 2
    margin = side // 2 + 1  # room for copies that reach over the border
    canvas = ground(rng, n, size + 2 * margin)

    colour_NKC = colours(rng, palette_N).astype(np.float32)
    radius_NK = rng.uniform(*RADIUS, (n, COPIES)).astype(np.float32) * size
    angle_NK = rng.uniform(0, 2 * np.pi, (n, COPIES)).astype(np.float32)
    centre_NK2 = places(rng, n) * size + margin
    corner_NK2 = np.floor(centre_NK2 - side / 2 + 0.5).astype(int)
    within_NK2 = (centre_NK2 - corner_NK2).astype(np.float32)
    cover_NKSS = stamps(glyph_N, within_NK2, radius_NK, angle_NK, side)

    for i in range(n):
        for k, (top, left) in enumerate(corner_NK2[i]):  # later copies lie on top of earlier ones
            spot = canvas[i, top : top + side, left : left + side]
            spot += cover_NKSS[i, k, :, :, None] * (colour_NKC[i, k] - spot)
    image = canvas[:, margin:-margin, margin:-margin]
    return (image.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def make(n, seed=0, split="train", size=48):
    """n images (n, size, size, 3) uint8 and their labels (n,) int64; the classes take turns."""
    label_N = np.arange(n) % len(CLASSES)
    images = np.empty((n, size, size, 3), np.uint8)
    for chunk, start in enumerate(range(0, n, CHUNK)):
        rng = np.random.default_rng([seed, SPLITS.index(split), chunk])
        labels = np.arange(start, start + CHUNK) % len(CLASSES)
        images[start : start + CHUNK] = draw(rng, labels, size)[: n - start]
    return images, label_N
