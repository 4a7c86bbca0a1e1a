"""How it dies: five short runs that collapse or diverge on purpose, beside a healthy one.

    python scripts/collapse.py                    train what is missing, then draw
    python scripts/collapse.py steps=20           any key of the config, for all runs

Writes docs/collapse.png (the four signs of health of each run), and into docs/collapse.md a table
of how each run ended and the words that train.py itself printed. Runs are in runs/collapse/.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from ladder import write_between_marks

import config
from images import synthetic
from pictures import plot
from pictures.history import read_log, series

ROOT = Path(__file__).resolve().parent.parent

# The healthy run, which each of the others changes at one point. Softmax centering, because
# Sinkhorn has no centre to leave out.
SHORT = {
    "steps": 160,
    "batch": 32,
    "precision": "fp32",
    "vit.size": "nano",
    "crops.local_count": 4,
    "crops.local_scale": [0.1, 0.32],
    "optim.warmup": 20,
    "optim.min_lr": 1e-6,
    "optim.freeze_last_layer": 4,
    "loss.centering": "softmax",
    "teacher.momentum_end": 1.0,
    "log.every": 2,
    "log.knn_every": 0,
    "log.pictures": "false",
}


class Death(NamedTuple):
    title: str
    changes: dict


DEATHS = {
    "healthy": Death("healthy", {}),
    "no_centering": Death("no centering", {"loss.center_momentum": 1.0}),  # it stays 0
    "no_sharpening": Death("no sharpening", {"teacher.temp": 1.0, "teacher.temp_start": 1.0}),
    "fast_ema": Death("EMA too fast", {"teacher.momentum": 0.0, "teacher.momentum_end": 0.0}),
    "high_lr": Death("learning rate too high", {"optim.lr": 4.0, "optim.clip": 0.0}),
    "duplicates": Death("KoLeo on duplicates", {"loss.koleo": 0.1}),
}
SIGNS = ("teacher_entropy", "prototypes_used", "koleo_distance", "rankme")


def words(name):
    """A run as the words of a command line."""
    return [f"{key}={value}" for key, value in (SHORT | DEATHS[name].changes).items()]


def blank_images(folder, count=8_000):
    """The embedded training set in which every second picture is plain white: words for a config.

    White tiles of a slide, black frames of a film, a placeholder picture: each crop of them equals
    each crop of the others, so their features are equal too, to the last bit.
    """
    train, test = folder / "train.npz", folder / "test.npz"
    if not test.exists():
        folder.mkdir(parents=True, exist_ok=True)
        images, labels = synthetic.make(count)
        images[::2] = 255
        np.savez(train, images=images, labels=labels)
        images, labels = synthetic.make(count // 4, split="test")
        np.savez(test, images=images, labels=labels)
    return [f"data.root={train.resolve()}", f"data.val={test.resolve()}"]


def run(name, runs, extra):
    """One run; what it printed stays in printed.txt. A run that ended is not done again."""
    out = runs / name
    printed = out / "printed.txt"
    if printed.exists():
        return
    given = words(name) + extra
    if name == "duplicates":
        given += blank_images(runs / "blank")
    command = [sys.executable, "train.py", "config.yaml", f"out={out.resolve()}", *given]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode not in (0, 2):  # 2: it ended itself, with one line that says why
        sys.exit(done.stderr)
    printed.write_text(done.stdout + done.stderr, encoding="utf-8")
    shutil.rmtree(out / "checkpoints", ignore_errors=True)


def words_printed(run):
    """The warnings and the error that the program itself printed."""
    text = (run / "printed.txt").read_text(encoding="utf-8")
    return re.findall(r"^(?:warning: collapse|error:).*$", text, re.MULTILINE)


def table(runs):
    """Last signs of health, k-NN, and the words of the program, of each run."""
    lines = ["| run | changed | " + " | ".join(SIGNS) + " | k-NN, % (untrained) |"]
    lines.append("|---|---|" + "---|" * (len(SIGNS) + 1))
    for name, death in DEATHS.items():
        rows = read_log(runs / name / "log.jsonl")
        last = [list(series(rows, sign).values())[-1] for sign in SIGNS]
        summary = runs / name / "summary.json"
        knn = "stopped"
        if summary.exists():
            reached = json.loads(summary.read_text(encoding="utf-8"))
            knn = f"{reached['knn']:.1f} ({reached['knn_random']:.1f})"
        changed = ", ".join(f"`{k}={v}`" for k, v in death.changes.items())
        cells = [number(value) for value in last]
        lines.append(f"| {death.title} | {changed} | " + " | ".join(cells) + f" | {knn} |")
    return "\n".join(lines)


def number(value):
    """Three digits; what is as good as nothing is 0."""
    return f"{value:.3g}" if value >= 1e-3 else "0"


def quotes(runs):
    """What the program said of each run, word for word."""
    said = {death.title: words_printed(runs / name) for name, death in DEATHS.items()}
    return "\n".join(
        f"- {title}: " + ("; ".join(f"`{words}`" for words in all_words) or "nothing")
        for title, all_words in said.items()
    )


def draw(runs, path, steps):
    """A row for each death, a panel for each sign; the healthy run is grey in all of them."""
    width, height = 250, 150
    page = plot.Page(40 + width * len(SIGNS), 70 + height * (len(DEATHS) - 1))
    page.text(20, 14, "How it dies: signs of health against steps (grey: the healthy run)", 17)
    logs = {name: read_log(runs / name / "log.jsonl") for name in DEATHS}
    for i, (name, death) in enumerate(list(DEATHS.items())[1:]):
        for j, sign in enumerate(SIGNS):
            lines = [
                plot.Line("", "#BBBBBB", series(logs["healthy"], sign)),
                plot.Line("", plot.ORANGE, series(logs[name], sign)),
            ]
            left, top = 20 + j * width, 50 + i * height
            box = (left, top, left + width - 20, top + height - 10)
            heading = f"{death.title}: {sign}" if j == 0 else sign
            plot.panel(page, box, heading, lines, steps, from_zero=True)
    page.finished().save(path)


USAGE = """
usage: python scripts/collapse.py [runs=runs/collapse] [page=docs/collapse.md] [key=value ...]

Trains the runs that are missing, then draws them beside the page and writes the page's table.
Other words are keys of the config, for all runs: steps=20
"""


@config.report_errors
def main(argv):
    if {"-h", "--help"} & set(argv):
        return print(USAGE.strip())
    given = {"runs": "runs/collapse", "page": str(ROOT / "docs" / "collapse.md")}
    given |= dict(word.split("=", 1) for word in argv if word.startswith(("runs=", "page=")))
    extra = [word for word in argv if not word.startswith(("runs=", "page="))]
    runs, page = Path(given["runs"]), Path(given["page"])
    for name in tqdm(DEATHS, desc="collapse", unit=" runs", disable=None):
        run(name, runs, extra)
    steps = config.load(runs / "healthy" / "config.yaml").steps
    draw(runs, page.with_suffix(".png"), steps)
    write_between_marks(page, "table", table(runs))
    write_between_marks(page, "words", quotes(runs))
    print(table(runs), quotes(runs), sep="\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])
