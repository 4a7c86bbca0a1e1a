"""Is it worth distilling? The table of docs/distill.md: students from scratch and from a teacher.

    python scripts/measure_distill.py TEACHER FOLDER [key=value ...]

TEACHER is a run folder of config.yaml with vit.size=micro (the page says which). For each seed and
100 steps, the same student (ViT nano) learns from scratch by config.yaml, and from the teacher by
configs/distill_small.yaml. The words go to every run. Runs that are complete in FOLDER are not
repeated. Prints k-NN (k = 20) of the last step, no best-of.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SEEDS = 0, 1, 2
SHORT = ["steps=100", "optim.warmup=10", "log.pictures=false", "log.knn_every=0"]
SHORT += ["optim.min_lr=1e-6", "teacher.momentum_end=1.0"]
SHORT += ["vit.size=nano", "crops.local_count=4", "crops.local_scale=[0.1,0.32]"]


def summary(script, card, out, *words):
    """The summary.json of a run, which is made if it is not there."""
    path = out / "summary.json"
    if not path.exists():
        command = [sys.executable, ROOT / script, ROOT / card, f"out={out}", *SHORT, *words]
        subprocess.run(command, check=True)
    return json.loads(path.read_text())


def main(argv):
    teacher, folder, *words = argv
    kinds = {
        "scratch": ("train.py", "config.yaml"),
        "distilled": ("distill.py", "configs/distill_small.yaml", f"distill.teacher={teacher}"),
    }
    lines = ["| student, 100 steps | seeds 0, 1, 2 | mean |", "|---|---|---|"]
    for kind, (script, card, *given) in kinds.items():
        runs = [
            summary(script, card, Path(folder, f"{kind}_{seed}"), f"seed={seed}", *given, *words)
            for seed in SEEDS
        ]
        shown = ", ".join(f"{run['knn']:.1f}" for run in runs)
        mean = sum(run["knn"] for run in runs) / len(runs)
        lines.append(f"| {kind} | {shown} % | {mean:.1f} % |")
    print(f"teacher: {runs[0]['knn_teacher']:.1f} %", *lines, sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
