"""Flip every line of the code that is marked `Ablation:`, train briefly, and tabulate what it did.

    python scripts/ablations.py OUT                     run what is missing in OUT, print the table
    python scripts/ablations.py OUT docs/ablations.md              ... and write it into that file
    python scripts/ablations.py OUT docs/ablations.md only=table   of the runs that are there

Each run is `train.py config.yaml` in a copy of the code in which one line is exchanged, on fewer
embedded images, for fewer steps (SHORT). The baseline runs with three seeds, to show how
far figures stray by chance; each change runs once. A run that is complete is not run again, so this
may be interrupted at any time.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
SHORT = ["steps=120", "optim.warmup=30", "log.knn_every=0", "log.pictures=false"]
SHORT += ["data.synthetic_images=3000", "optim.min_lr=1e-6", "teacher.momentum_end=1.0"]
SHORT += ["vit.size=nano", "crops.local_count=4", "crops.local_scale=[0.1,0.32]"]
DROP = ["vit.drop_path=0.3"]
COLOURS = ["augment.jitter=0.8", "augment.grey=0.2", "augment.blur=[0.0,0.9,0.5]"]
COLOURS += ["augment.solarize=[0.0,0.2,0.0]"]


class Change(NamedTuple):
    """One row of the table. `new` replaces `old` in `file`; words are added to the command."""

    name: str
    file: str = ""
    old: str = ""
    new: str = ""
    words: list = ()
    against: str = "baseline"


CHANGES = [
    Change("baseline"),
    Change("baseline, seed 1", words=["seed=1"]),
    Change("baseline, seed 2", words=["seed=2"]),
    Change(
        "no centering",
        "dinov2.py",
        "    return sinkhorn_knopp(score_NK, temp)",
        "    return (score_NK / temp).softmax(dim=1)",
    ),
    Change(
        "nothing is hidden",
        "dinov2.py",
        "said = student(crops, batch.masks, indices, rng=rng, kept=kept)",
        "said = student(crops, None, indices, rng=rng, kept=kept)",
    ),
    Change(
        "the teacher is a copy of the student",
        "dinov2.py",
        "list(student.parameters()), 1 - momentum)",
        "list(student.parameters()), 1.0)",
    ),
    Change(
        "a crop also predicts itself",
        "losses.py",
        "CrossEntropy.apply(score_BK, sum_BK - target_TBK[s], weight_B, temp)",
        "CrossEntropy.apply(score_BK, sum_BK, weight_B, temp)",
    ),
    Change("stochastic depth 0.3", words=DROP),
    Change(
        "drop_path=0.3, but nothing is dropped",
        "vit.py",
        "first, second = kept",
        "first = second = None",
        DROP,
        "stochastic depth 0.3",
    ),
    Change("colours changed as officially", words=COLOURS),
    Change(
        "blur as intended",
        words=[*COLOURS, "augment.blur=[1.0,0.1,0.5]"],
        against="colours changed as officially",
    ),
    Change(
        "colours, without jitter",
        "augment.py",
        '{"jitter": jitter, "grey": grey, "blur": blur, "solarize": solarize}',
        '{"grey": grey, "blur": blur, "solarize": solarize}',
        COLOURS,
        "colours changed as officially",
    ),
    Change("purer palettes", "images/synthetic.py", "TINT = 0.2 ", "TINT = 0.03 "),
    Change("copies spread evenly", "images/synthetic.py", "SCATTER = 0.08 ", "SCATTER = 0.01 "),
]


def patched(text, old, new, file):
    """The text with its one occurrence of `old` exchanged."""
    if text.count(old) != 1:
        sys.exit(f"{file}: {old!r} is there {text.count(old)} times, not once: mend CHANGES")
    return text.replace(old, new)


def folder_of(change, out):
    return out / re.sub(r"\W+", "-", change.name)


def train(change, out):
    """Run one change to its end, unless it is there."""
    folder = folder_of(change, out)
    code, run = folder / "code", folder / "run"
    if (run / "summary.json").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    code.mkdir(parents=True)
    for file in [*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py"), ROOT / "config.yaml"]:
        (code / file.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(file, code / file.relative_to(ROOT))
    if change.file:
        text = (code / change.file).read_text(encoding="utf-8")
        text = patched(text, change.old, change.new, change.file)
        (code / change.file).write_text(text, encoding="utf-8")
    words = ["train.py", "config.yaml", f"out={run}", *SHORT, *change.words]
    with open(folder / "log.txt", "w") as log:
        command = [sys.executable, *words]
        done = subprocess.run(command, cwd=code, stdout=log, stderr=log, env=os.environ)
    if done.returncode:
        print(f"{change.name}: exit code {done.returncode}, see {folder / 'log.txt'}")


def result(change, out):
    """The row of the table, or None where the run is missing."""
    run = folder_of(change, out) / "run"
    if not (run / "summary.json").exists():
        return None
    summary = json.loads((run / "summary.json").read_text())
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return summary | [line for line in lines if "rankme" in line][-1]


COLUMNS = [
    ("k-NN %", "knn", "{:.1f}"),
    ("untrained %", "knn_random", "{:.1f}"),
    ("pixels %", "knn_pixels", "{:.1f}"),
    ("loss", "loss", "{:.2f}"),
    ("teacher entropy", "teacher_entropy", "{:.2f}"),
    ("prototypes used", "prototypes_used", "{:.2f}"),
    ("neighbour distance", "koleo_distance", "{:.2f}"),
    ("RankMe", "rankme", "{:.0f}"),
]


def table(out):
    """The markdown table of all runs that are there."""
    lines = ["| change | " + " | ".join(title for title, _, _ in COLUMNS) + " |"]
    lines.append("|---" * (len(COLUMNS) + 1) + "|")
    for change in CHANGES:
        values = result(change, out)
        cells = [form.format(values[key]) if values else "-" for _, key, form in COLUMNS]
        lines.append(f"| {change.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def insert(path, text):
    """Replace what stands between the two markers of a file."""
    old = path.read_text(encoding="utf-8")
    begin, end = "<!-- measured -->", "<!-- end -->"
    if not old.find(begin) < old.find(end):
        sys.exit(f"{path}: {begin} and {end} must stand in it, in this order")
    before, after = old.partition(begin)[0], old.partition(end)[2]
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def main(argv):
    if not argv or argv[0].startswith("-"):
        sys.exit(__doc__)
    out, targets = Path(argv[0]).resolve(), [w for w in argv[1:] if "=" not in w]
    for change in tqdm(CHANGES if "only=table" not in argv else [], disable=None):
        train(change, out)
    print(table(out))
    for target in targets:
        insert(Path(target), table(out))


if __name__ == "__main__":
    main(sys.argv[1:])
