"""How a run went: its curves, and its features again and again, as an animation.

    python -m pictures curves RUN         RUN/curves.png, from RUN/log.jsonl and RUN/summary.json
    python -m pictures animation RUN      RUN/animation.gif, from RUN/frames

Both work while the run is going on. train.py draws the curves at its end, and calls keep_frame() at
each k-NN evaluation. Features are kept rather than pictures, because only at the end it is known
which colours the frames have to share, and rather than checkpoints, because those are large.

    RUN/frames/0000200.npz     image_0, ... (uint8) and features_0, ... (H, W, D float16)
"""

import contextlib
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
from augment import colour
from config import UserError, writing
from eval_knn import untrained
from monitor.report import read_log
from parallel import dtype_of, ranks
from pictures import sheets
from pictures.patches import patch_features, pca_colours, steady_colours
from pictures.plot import BLUE, GREEN, GREY, INK, LIGHT, ORANGE, PINK, SKY, Line, Page, panel
from weights.load import load_backbone

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


def draw_curves(run_dir, path=None):
    """Draw the log of a run so far; returns where."""
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
    return sheets.write(page.finished(), path or run / "curves.png")


def knn_lines(run, rows, last):
    """k-NN over time, and as levels what needs no training: a random network, raw pixels."""
    summary = {}
    with contextlib.suppress(OSError, ValueError):  # only a finished run has a summary
        summary |= json.loads((run / "summary.json").read_text(encoding="utf-8"))
    lines = []
    for key, name, hue in KNN:
        points = series(rows, key) or series([summary | {"step": last}], key)
        if points:
            now = list(points.values())[-1]
            lines.append(Line(f"{name} {now:.1f} %", hue, points, dashed=key != "knn"))
    return lines


def series(rows, key):
    """{step: value}, ascending. A resumed run repeats steps: the later line counts."""
    found = {row["step"]: row[key] for row in rows if isinstance(row.get(key), (int, float))}
    return {step: found[step] for step in sorted(found) if math.isfinite(found[step])}


# ---- frames -----------------------------------------------------------------------------------


def spread_images(source, count):
    """A few images from all over a source."""
    count = min(count, len(source))
    # One further each time: labels that take turns are all met.
    places = [(i * len(source) // count + i) % len(source) for i in range(count)]
    return [data.read_or_next(source, place)[0] for place in places]


def keep_frame(step, backbone, source, cfg):
    """Write RUN/frames/<step>.npz: patch features of a few images at this step.

    All ranks compute, because weights may be sharded; the first one writes.
    """
    if not cfg.log.pictures:
        return
    images = spread_images(source, 4)
    mean, std, dtype = cfg.data.mean, cfg.data.std, dtype_of(cfg)
    features = [patch_features(backbone, i, mean, std, dtype=dtype) for i in images]
    if ranks()[0]:
        return
    arrays = {f"features_{i}": f.half().numpy() for i, f in enumerate(features)}
    arrays |= {f"image_{i}": np.asarray(sheets.thumbnail(x)) for i, x in enumerate(images)}
    folder = Path(cfg.out, "frames")
    with writing(folder, "set log.pictures=false to do without"):
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("*.npz") if step == 0 else ():  # of a run that was here before
            stale.unlink()
        with open(folder / "frame.part", "wb") as file:
            np.savez(file, **arrays)
        os.replace(folder / "frame.part", folder / f"{step:07d}.npz")


def animate(run, path, milliseconds=500, side=160):
    """PCA colours of the images in RUN/frames, which train.py kept at each k-NN evaluation."""
    files = sorted(Path(run, "frames").glob("*.npz"))
    if len(files) < 2:
        raise UserError(
            f"{run}/frames: {len(files)} frames; train with log.pictures=true and log.knn_every= "
            "of a fraction of steps="
        )
    frames = []
    for file in files:
        try:
            with np.load(file, allow_pickle=False) as arrays:
                count = sum(name.startswith("image") for name in arrays)
                images = [arrays[f"image_{i}"] for i in range(count)]
                frames.append([torch.tensor(arrays[f"features_{i}"]).float() for i in range(count)])
        except Exception as error:
            raise UserError(f"{file}: cannot be read ({error}); delete it") from None
    steps = [int(file.stem) for file in files]
    knn = series(read_log(Path(run, "log.jsonl")), "knn")
    pictures = [
        page_of(images, colours, step, steps[-1], knn.get(step), side)
        for step, colours in zip(steps, steady_colours(frames), strict=True)
    ]
    first, *rest = [p.quantize(dither=Image.Dither.NONE) for p in pictures]
    lasting = [milliseconds] * (len(files) - 1) + [5 * milliseconds]
    more = {"save_all": True, "append_images": rest, "duration": lasting, "loop": 0}
    return sheets.write(first, path, **more)


def page_of(images, colours, step, last, knn, side, gap=8):
    """One frame: the images over their colours, how far the run is, and how good."""
    page = Page(gap + len(images) * (side + gap), 2 * (side + gap) + 52)
    words = f"step {step:,}" + (f"   k-NN {knn:.1f} %" if knn is not None else "")
    page.text(gap, 20, words, 16, INK, "lm")
    right = page.size[0] - gap
    page.line([(gap, 40), (right, 40)], LIGHT, 4)
    page.line([(gap, 40), (gap + (right - gap) * step / last, 40)], BLUE, 4)
    sheet = page.finished()
    for i, pair in enumerate(zip(images, colours, strict=True)):
        for row, pixels in enumerate(pair):
            sheets.paste(sheet, pixels, gap + i * (side + gap), 52 + row * (side + gap), side)
    return sheet


def draw_crops(source, cfg, path):
    """The first images of the run, as the network will see them."""
    count = max(n for n in (1, 2, 3, 4) if cfg.batch % n == 0)
    dataset = data.Dataset(source, cfg)
    # As if every process had `count` images: the masks are those of the step, without its images.
    samples = [dataset[position] for position in range(count)]
    batch = data.collate(samples, cfg, rank=0, world=cfg.batch // count)
    images = [data.read_or_next(source, dataset.order[i])[0] for i in range(count)]
    mean, std = cfg.data.mean, cfg.data.std
    large = colour(batch.global_crops, batch.global_colour, mean, std).unflatten(0, (2, count))
    small = colour(batch.local_crops, batch.local_colour, mean, std)
    small = small.unflatten(0, (cfg.crops.local_count, count))
    masks = batch.masks.unflatten(0, (2, count))
    rows = [[x[:, i] for i in range(count)] for x in (large, small, masks)]
    sheets.crop_sheet(images, *rows, mean, std, path)


def draw_pca(source, cfg, path, device):
    """PCA colours of images spread over a source, by the network before and after training."""
    trained = load_backbone(cfg.out).to(device)
    networks = {"untrained network": untrained(trained, cfg.seed), "trained": trained}
    images = spread_images(source, 8)
    rows = [("images", images, None)]
    for name, net in networks.items():
        features = [patch_features(net, i, cfg.data.mean, cfg.data.std) for i in images]
        rows.append((f"PCA of patch features, {name}", pca_colours(features), None))
    sheets.bands(rows, path)
