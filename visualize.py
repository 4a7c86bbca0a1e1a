"""Pictures of a run: what the network was shown, how it learned, and what its features see.

    python visualize.py curves RUN              losses, k-NN, signs of health -> RUN/curves.png
    python visualize.py pca RUN IMAGE ...       colours of patch features     -> RUN/pca_images.png
RUN is the `out` folder of a training run; `pca` also takes a file of weights.

  curves      one page from RUN/log.jsonl and RUN/summary.json
  crop_sheet  each image, its crops as the network gets them, and the patches that are hidden
  pca_sheet   patch features as colours: patches with like features get like colours, over all
              images of the sheet, so that a part of an object has one colour wherever it is
Drawn with Pillow alone. Arrays are uint8 (H, W, C); a picture of another number of channels than
three shows the first three, or the first one as grey.

Shapes:  H W rows and columns (of pixels, or of patches)   C channels   D features of a patch
         N patches of all images together
"""

import contextlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from config import UserError, report_errors
from plot import BLUE, GREEN, GREY, INK, ORANGE, PAPER, PINK, SKY, Line, Page, font, panel

# ---- curves -----------------------------------------------------------------------------------

# key in the log, name in the legend, colour
LOSSES = [
    ("loss", "total", INK),
    ("dino_global", "DINO global", BLUE),
    ("dino_local", "DINO local", SKY),
    ("ibot", "iBOT", ORANGE),
    ("koleo", "KoLeo", GREEN),
]
HEALTH = [
    ("teacher_entropy", "teacher entropy (nats)", BLUE),
    ("prototypes_used", "share of prototypes used", GREEN),
    ("koleo_distance", "distance to the nearest neighbour", ORANGE),
    ("rankme", "rank of the features (RankMe)", PINK),
]
KNN = [
    ("knn", "DINOv2", BLUE),
    ("knn_random", "random network", GREY),
    ("knn_pixels", "raw pixels", ORANGE),
]


def curves(run_dir, path=None):
    """Draw the log of a run so far; returns where. Works while the run is going on."""
    run = Path(run_dir)
    rows = read_log(run / "log.jsonl")
    last = max(row["step"] for row in rows)
    health = [(name, colour, series(rows, key)) for key, name, colour in HEALTH]
    health = [Line(*line) for line in health if line[2]]
    losses = [Line(name, colour, series(rows, key)) for key, name, colour in LOSSES]

    page = Page(1200, 700 if health else 460)
    images = max(series(rows, "images").values(), default=0)
    page.text(30, 32, run.resolve().name, 20, anchor="lm")
    page.text(1170, 32, f"step {last:,},  {images:,} images", 13, GREY, "rm")
    panel(page, (30, 70, 585, 430), "Losses", [line for line in losses if line.points], last)
    lines = knn_lines(run, rows, last)
    panel(page, (615, 70, 1170, 430), "k-NN accuracy (%)", lines, last, from_zero=True, dots=True)
    for i, line in enumerate(health):
        left = 30 + i * 292.5
        panel(page, (left, 470, left + 262.5, 670), line.name, [line], last, small=True)
    return write(page.finished(), path or run / "curves.png")


def knn_lines(run, rows, last):
    """k-NN over time, and as levels what needs no training: a random network, raw pixels."""
    summary = {}
    with contextlib.suppress(OSError, ValueError):  # only a finished run has a summary
        summary |= json.loads((run / "summary.json").read_text(encoding="utf-8"))
    lines = []
    for key, name, colour in KNN:
        points = series(rows, key) or series([summary | {"step": last}], key)
        if points:
            now = list(points.values())[-1]
            lines.append(Line(f"{name} {now:.1f} %", colour, points, dashed=key != "knn"))
    return lines


def read_log(path):
    """The objects of log.jsonl. The last line may be half written if the run was killed."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        raise UserError(f"{path}: no such log; give the folder train.py wrote (out=)") from None
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    rows = [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]
    if not rows:
        raise UserError(f"{path}: no line with a step yet; train a little longer")
    return rows


def series(rows, key):
    """{step: value}, ascending. A resumed run repeats steps: the later line counts."""
    found = {row["step"]: row[key] for row in rows if isinstance(row.get(key), (int, float))}
    return {step: found[step] for step in sorted(found) if math.isfinite(found[step])}


# ---- sheets of images -------------------------------------------------------------------------


def crop_sheet(images, global_crops, local_crops, masks, mean, std, path):
    """One row per image: the image, its global crops with hidden patches striped, its local crops.

    images        uint8 arrays (H, W, C), of any sizes
    global_crops  per image, its crops: normalised float tensors (C, S, S)
    local_crops   the same; may be empty
    masks         per image, per global crop: bool, True = hidden from the student, as a grid of
                  patches or as one row of them; None = nothing is hidden
    """
    side, gap, head, row = 160, 6, 32, 160 + 14
    half = (side - gap) // 2  # local crops lie in two rows, at half the size
    n_global, n_local = len(global_crops[0]), len(local_crops[0]) if len(local_crops) else 0
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
        for j, crop in enumerate(global_crops[i]):
            pixels = enlarge(denormalise(crop, mean, std), side)
            if masks is not None and masks[i][j] is not None:
                pixels = hide(pixels, as_grid(masks[i][j]))
            paste(sheet, pixels, globals_at + j * (side + gap), y, side)
        for j, crop in enumerate(local_crops[i] if columns else []):
            x, below = locals_at + j % columns * (half + gap), j // columns * (half + gap)
            paste(sheet, denormalise(crop, mean, std), x, y + below, half)
    return write(sheet, path)


def caption(sheet, x, height, words):
    """Small grey words in a strip of this height at the top of the sheet."""
    ImageDraw.Draw(sheet).text((x, height / 2), words, GREY, font(13), "lm")


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


def as_grid(mask):
    """A mask as a bool array (h, w); one row of patches is taken to be a square grid."""
    mask = torch.as_tensor(mask).cpu().numpy()
    return mask.reshape(math.isqrt(mask.size), -1) if mask.ndim == 1 else mask


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


def paste(sheet, pixels, x, y, side):
    """Put uint8 (H, W, C) into the middle of a square of the sheet."""
    image = fit(picture(pixels), side)
    sheet.paste(image, (x + (side - image.width) // 2, y + (side - image.height) // 2))


def pca_sheet(images, columns, path):
    """Images over their patch features in colour, one band per entry of `columns`.

    images   uint8 arrays (H, W, C)
    columns  [(title, features)], features per image (H, W, D), such as before and after training
    """
    side, gap, head = 160, 6, 28
    bands = [("images", images)] + [(t, pca_colours(features)) for t, features in columns]
    size = (gap + len(images) * (side + gap), len(bands) * (head + side) + gap)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (title, pictures) in enumerate(bands):
        y = i * (head + side)
        draw.text((gap, y + head / 2), title, GREY, font(13), "lm")
        for j, pixels in enumerate(pictures):
            paste(sheet, pixels, gap + j * (side + gap), y + head, side)
    return write(sheet, path)


def pca_colours(features):
    """Patch features (H, W, D) per image -> uint8 (H, W, 3) per image.

    The three directions in which the patches of all images differ most become red, green, blue.
    Joint over the images: the same colour means the same feature everywhere.
    """
    x_ND = torch.cat([f.detach().flatten(0, 1) for f in features]).double().cpu()
    x_ND = x_ND - x_ND.mean(dim=0)
    _, axes_DD = torch.linalg.eigh(x_ND.T @ x_ND)  # ascending
    axes_D3 = axes_DD[:, -3:].flip(1)
    # An axis may point either way; the sign of its largest entry makes pictures repeatable.
    largest_3 = axes_D3.gather(0, axes_D3.abs().argmax(dim=0, keepdim=True))
    x_N3 = x_ND @ (axes_D3 * largest_3.sign())
    # Percentiles, because one odd patch would otherwise leave all others in one colour.
    low, high = (x_N3.quantile(q, dim=0) for q in (0.02, 0.98))
    spread = (high - low).clamp(min=1e-6 * x_ND.norm().clamp(min=1e-30) / len(x_ND) ** 0.5)
    colour_N3 = ((x_N3 - (low + high) / 2) / spread + 0.5).clamp(0, 1) * 255
    colour_N3 = torch.nn.functional.pad(colour_N3, (0, 3 - colour_N3.shape[1]), value=127.5)
    sizes = [f.shape[0] * f.shape[1] for f in features]
    parts = colour_N3.round().byte().split(sizes)
    return [part.unflatten(0, f.shape[:2]).numpy() for part, f in zip(parts, features, strict=True)]


@torch.no_grad()
def patch_features(net, image, mean, std):
    """uint8 (H, W, C) -> (h, w, D) of a backbone: a feature for each patch, at least 24 on a side.

    A large picture is reduced to 32 patches on its shorter side. A small one keeps its size, and is
    read several times, each time shifted by a part of a patch; the grids are then interleaved.
    """
    from data import resize

    height, width = image.shape[:2]
    factor = min(1, 32 * net.patch / min(height, width))
    rows, cols = (max(1, round(n * factor / net.patch)) for n in (height, width))
    pixels = torch.tensor(resize(image, rows * net.patch, cols * net.patch)).permute(2, 0, 1)
    mean, std = (torch.tensor(v)[:, None, None] for v in (mean, std))
    pixels = ((pixels / (255 if image.dtype == np.uint8 else 1) - mean) / std)[None]
    shifts = min(-(-24 // min(rows, cols)), net.patch)
    at = [net.patch * i // shifts - net.patch // 2 for i in range(shifts)]
    grids = [torch.stack([shifted_tokens(net, pixels, dy, dx) for dx in at], dim=2) for dy in at]
    grid = torch.stack(grids, dim=1)  # (rows, shifts, cols, shifts, D)
    return grid.flatten(2, 3).flatten(0, 1)


def shifted_tokens(net, pixels, down, right):
    """Patch features (h, w, D) of a picture (1, C, H, W) moved by less than a patch, edges kept."""
    (_, _, H, W), reach = pixels.shape, net.patch
    wide = torch.nn.functional.pad(pixels, [reach] * 4, mode="replicate")
    part = wide[:, :, reach + down : reach + down + H, reach + right : reach + right + W]
    tokens_ND = net.forward_features(part)["x_norm_patchtokens"][0]
    return tokens_ND.unflatten(0, (H // reach, W // reach))


def write(image, path):
    try:
        image.save(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be written ({error}); choose another place") from None
    return Path(path)


# ---- command line -----------------------------------------------------------------------------


def pca(run, files):
    """PCA colours of image files by the backbone of a run; returns where the sheet is."""
    from sources import read_image
    from weights import load_backbone

    net, cfg = load_backbone(run, with_config=True)
    images = []
    for file in files:
        try:
            images.append(read_image(file, cfg.data.channels))
        except Exception as error:  # whatever Pillow raises for a file it cannot read
            raise UserError(f"{file}: not a readable image ({error}); leave it out") from None
    features = [patch_features(net, image, cfg.data.mean, cfg.data.std) for image in images]
    folder = Path(run) if Path(run).is_dir() else Path()
    return pca_sheet(images, [("PCA of patch features", features)], folder / "pca_images.png")


@report_errors
def main(argv):
    command, rest = (argv[0], argv[1:]) if argv else ("", [])
    if not argv or "-h" in argv or "--help" in argv:
        print(__doc__.partition("\n\n")[2].partition("\n\nShapes")[0])
    elif command == "curves" and len(rest) == 1:
        print(f"wrote {curves(rest[0])}")
    elif command == "pca" and len(rest) >= 2:
        print(f"wrote {pca(rest[0], rest[1:])}")
    else:
        raise UserError("write `visualize.py curves RUN` or `visualize.py pca RUN IMAGE ...`")


if __name__ == "__main__":
    main(sys.argv[1:])
