"""How a run went: its curves, its first crops, and its features again and again, as an animation.

Curves and animation can be drawn while the run is going on. train.py draws the curves at its end,
and calls keep_frame() at each k-NN evaluation. Features are kept rather than pictures, because only
at the end it is known which colours the frames have to share, and rather than checkpoints, because
those are large.

    RUN/frames/0000200.npz     image_0, ... (uint8) and features_0, ... (H, W, D float16)
"""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import data
from augment import colour
from config import UserError, writing
from images.sources import read_or_next
from monitor.report import FLOORS, read_log
from parallel import dtype_of, ranks
from pictures import plot, sheets
from pictures.neighbours import spread
from pictures.patches import patch_features, steady_colours
from pictures.plot import Line, Page, panel

# key in the log, name in the legend, colour
LOSSES = [
    ("loss", "total", plot.INK),
    ("dino_global", "DINO global", plot.BLUE),
    ("dino_local", "DINO local", plot.SKY),
    ("ibot", "iBOT", plot.ORANGE),
    ("koleo", "KoLeo", plot.GREEN),
]
HEALTH = [
    ("teacher_entropy", "teacher entropy (nats)", plot.BLUE),
    ("prototypes_used", "share of prototypes used", plot.GREEN),
    ("koleo_distance", "distance to the nearest neighbour", plot.ORANGE),
    ("rankme", "rank of the features (RankMe)", plot.PINK),
]
# Of FLOORS: what needs no training, or came before it.
FLOOR_COLOURS = (plot.PINK, plot.GREY, plot.ORANGE, plot.SKY)


def draw_curves(run, path=None, others=()):
    """Draw the log of a run (a folder or .jsonl), and pale beside it those of others."""
    rows, *logs = [read_log(each) for each in (run, *others)]
    last = max(row["step"] for log in (rows, *logs) for row in log)

    def lines_of(key, name, hue):
        pale = plot.mix(hue, plot.PAPER, 0.5)
        lines = [Line("", pale, series(log, key), thin=True) for log in logs]
        return [line for line in (*lines, Line(name, hue, series(rows, key))) if line.points]

    knn = lines_of("knn", "DINOv2", plot.BLUE)
    for (key, name), hue in zip(FLOORS.items(), FLOOR_COLOURS, strict=True):
        for value in [*series(rows, key).values()][-1:]:
            knn.append(Line(f"{name} {value:.1f} %", hue, {0: value, last: value}, thin=True))

    page = Page(1200, 700)
    page.text(30, 28, name_of(run, rows), 20, anchor="lm")
    if others:
        pale = ";  ".join(map(name_of, others, logs))
        page.text(30, 52, f"pale: {pale}", 12, plot.GREY, "lm")
    losses = [line for each in LOSSES for line in lines_of(*each)]
    panel(page, (30, 70, 585, 430), "Losses", losses, last)
    panel(page, (615, 70, 1170, 430), "k-NN accuracy (%)", knn, last, from_zero=True)
    for i, (key, name, hue) in enumerate(HEALTH):
        left = 30 + i * 292.5
        panel(page, (left, 470, left + 262.5, 670), name, lines_of(key, "", hue), last)
    return sheets.write(page.finished(), path or Path(run, "curves.png"))


def name_of(run, rows):
    """`default, step 700, k-NN 81.5 %`"""
    knn = [f", k-NN {value:.1f} %" for value in series(rows, "knn").values()]
    name = Path(run).resolve().name.removesuffix(".jsonl")
    return f"{name}, step {max(row['step'] for row in rows):,}{''.join(knn[-1:])}"


def series(rows, key):
    """{step: value}, ascending. A resumed run repeats steps: the later line counts."""
    found = {row["step"]: row[key] for row in rows if row.get(key) is not None}
    return dict(sorted(found.items()))


def keep_frame(step, backbone, source, cfg):
    """Write RUN/frames/<step>.npz: patch features of a few images at this step.

    All ranks compute, because weights may be sharded; the first one writes.
    """
    if not cfg.log.pictures:
        return
    images = [source.read(i) for i in spread(source, 4)]
    mean, std, dtype = cfg.data.mean, cfg.data.std, dtype_of(cfg)
    features = [patch_features(backbone, i, mean, std, dtype=dtype) for i in images]
    if ranks()[0]:
        return
    images = [sheets.fit(sheets.picture(x), min(320, max(x.shape[:2]))) for x in images]
    arrays = {f"image_{i}": np.asarray(x) for i, x in enumerate(images)}
    arrays |= {f"features_{i}": f.half().numpy() for i, f in enumerate(features)}
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
        wanted = "train with log.pictures=true and log.knn_every= of a fraction of steps="
        raise UserError(f"{run}/frames: {len(files)} frames; {wanted}")
    frames = []
    for file in files:
        arrays = dict(np.load(file))
        images = [arrays[f"image_{i}"] for i in range(len(arrays) // 2)]
        frames.append([torch.tensor(arrays[f"features_{i}"]).float() for i in range(len(images))])
    steps, pictures = [int(file.stem) for file in files], []
    knn = series(read_log(run), "knn")
    for step, colours in zip(steps, steady_colours(frames), strict=True):
        words = f"step {step:,}" + (f",  k-NN {knn[step]:.1f} %" if step in knn else "")
        sheet = sheets.bands([([words], images, None), ([], colours, None)], side)
        draw, end = ImageDraw.Draw(sheet), sheet.width - 6
        draw.line([(6, 3), (end, 3)], plot.LIGHT, 4)  # how far the run is
        draw.line([(6, 3), (6 + (end - 6) * step / steps[-1], 3)], plot.BLUE, 4)
        pictures.append(sheet.quantize(dither=Image.Dither.NONE))
    lasting = [milliseconds] * (len(files) - 1) + [5 * milliseconds]
    more = {"save_all": True, "append_images": pictures[1:], "duration": lasting, "loop": 0}
    return sheets.write(pictures[0], path, **more)


def draw_crops(source, cfg, path):
    """The first images of the run, as the network will see them.

    A row for each: the image, its global crops with the patches striped that are hidden from the
    student, its local crops.
    """
    count = max(n for n in (1, 2, 3, 4) if cfg.batch % n == 0)
    dataset = data.Dataset(source, cfg)
    # As if every process had `count` images: the masks are those of the step, without its images.
    samples = [dataset[position] for position in range(count)]
    batch = data.collate(samples, cfg, rank=0, world=cfg.batch // count)
    kinds, grid = cfg.crops.local_count, cfg.crops.global_size // cfg.vit.patch
    zero, one = [0.0] * cfg.data.channels, [1.0] * cfg.data.channels  # colours as they are, 0..1
    large = colour(batch.global_crops, batch.global_colour, zero, one).unflatten(0, (2, count))
    small = colour(batch.local_crops, batch.local_colour, zero, one).unflatten(0, (kinds, count))
    large, small = (x.movedim(2, -1).numpy() for x in (large, small))
    masks = batch.masks.view(2, count, grid, grid).numpy()
    titles = ["image", "", "global crops, hidden patches striped", "", ""]
    titles += ["local crops"] if kinds else []
    side, rows = min(160, 1200 // (3 + kinds)), []
    for i in range(count):
        image, _, _ = read_or_next(source, dataset.order[i])
        crops = [np.asarray(sheets.fit(sheets.picture(crop), side)) for crop in large[:, i]]
        hidden = map(sheets.hide, crops, masks[:, i])
        rows.append(([] if rows else titles, [image, None, *hidden, None, *small[:, i]], None))
    return sheets.write(sheets.bands(rows, side, per_row=len(rows[0][1])), path)
