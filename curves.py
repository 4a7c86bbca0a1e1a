"""The curves of a run: losses, k-NN and signs of health, from RUN/log.jsonl and RUN/summary.json.

    python visualize.py curves RUN      -> RUN/curves.png
Works while the run is going on. train.py draws it at the end of a run.
"""

import contextlib
import json
import math
from pathlib import Path

from config import UserError
from plot import BLUE, GREEN, GREY, INK, ORANGE, PINK, SKY, Line, Page, panel
from sheets import write

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


def draw(run_dir, path=None):
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
