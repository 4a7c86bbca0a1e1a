"""How features came to be: a few images, seen again and again while a run goes on.

train.py calls keep_frame() at each k-NN evaluation and at the end; `python visualize.py animation
RUN` makes a GIF of it. Features are kept rather than pictures, because only at the end it is known
which colours the frames have to share, and rather than checkpoints, because those are large.

    RUN/frames/0000200.npz     image_0, ... (uint8) and features_0, ... (H, W, D float16)
"""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import curves
import data
import sheets
from config import UserError, writing
from parallel import dtype_of, ranks
from patches import patch_features, steady_colours
from plot import BLUE, INK, LIGHT, Page


def spread_images(source, count):
    """A few images from all over a source."""
    count = min(count, len(source))
    # One further each time: labels that take turns are all met.
    places = [(i * len(source) // count + i) % len(source) for i in range(count)]
    return [data.read_or_next(source, place)[0] for place in places]


def keep_frame(step, backbone, source, cfg, count=4):
    """What the animation of visualize.py is made of: patch features of a few images at this step.

    RUN/frames/<step>.npz holds image_0, ... (uint8) and features_0, ... (H, W, D float16). All
    ranks compute, because weights may be sharded; the first one writes.
    """
    if not cfg.log.pictures:
        return
    images = spread_images(source, count)
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
    steps, log = [int(file.stem) for file in files], curves.read_log(Path(run, "log.jsonl"))
    knn = curves.series(log, "knn")
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
