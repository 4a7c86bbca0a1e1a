"""Half a default run again and again, changed a little each time: what helps it, what does not.

    python scripts/recipes.py run [JOBS]     train what docs/recipes.jsonl lacks, so many at a time
    python scripts/recipes.py draw           the table in docs/recipes.md

Every try is `train.py config.yaml` with the words of BASE, then its own; each is one line of json.
To train a recipe whole and keep its log: scripts/reference.py.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ladder import write_between_marks
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "docs" / "recipes.jsonl", ROOT / "docs" / "recipes.md"
SEEDS = (0, 1)
BASE = "steps=450 optim.lr=8e-3 optim.warmup=45 optim.freeze_last_layer=10 precision=fp32"
BASE += " optim.min_lr=1e-6 teacher.momentum_end=1.0 vit.size=nano"
BASE += " crops.local_count=4 crops.local_scale=[0.1,0.32]"
QUIET = "log.pictures=false log.knn_every=0 log.save_every=10000 log.every=50"
LONGER = "steps=700 optim.warmup=100 optim.freeze_last_layer=20"
LIFTED = "optim.freeze_last_layer=15 optim.min_lr=4e-4 teacher.momentum_end=0.996"
PICO = f"steps=600 optim.warmup=90 {LIFTED} crops.local_count=3 vit.size=pico"
TRIES = [
    "",
    "optim.lr=3e-3 optim.warmup=60",
    "optim.lr=4e-3 optim.warmup=90",
    "optim.lr=4e-3 optim.warmup=90 head.prototypes=128",
    "optim.lr=6e-3",
    "optim.lr=6e-3 optim.warmup=90",
    "optim.lr=1.2e-2",
    "optim.warmup=20",
    "optim.min_lr=1e-4",
    "optim.weight_decay=0.02 optim.weight_decay_end=0.02",
    "batch=48 steps=600 optim.warmup=60",
    "batch=32 steps=900 optim.warmup=90",
    "teacher.momentum=0.97",
    "teacher.momentum=0.99",
    "teacher.momentum=0.95 teacher.momentum_end=0.995",
    "teacher.temp=0.04 teacher.temp_start=0.04",
    "loss.student_temp=0.07",
    "loss.koleo=0.05",
    "loss.ibot=0",
    "crops.local_count=3",
    "crops.local_count=6",
    "crops.local_scale=[0.15,0.4]",
    "crops.global_scale=[0.3,1.0]",
    "crops.global_scale=[0.25,1.0]",
    "head.prototypes=128",
    "head.hidden=256",
    "vit.layerscale=1.0",
    "optim.lr=4e-3 optim.warmup=90 crops.local_scale=[0.07,0.25]",
    "optim.lr=4e-3 optim.warmup=90 crops.local_count=2",
    "optim.lr=4e-3 optim.warmup=90 head.hidden=1024",
    "optim.lr=4e-3 optim.warmup=90 crops.global_scale=[0.5,1.0]",
    "optim.lr=4e-3 optim.warmup=90 crops.local_count=3",
    "optim.lr=4e-3 optim.warmup=90 crops.global_size=24",
    "optim.lr=4e-3 optim.warmup=90 mask.probability=0.2",
    "optim.lr=4e-3 optim.warmup=90 teacher.momentum_end=0.99",
    "optim.lr=4e-3 optim.warmup=90 augment.flip=0",
    LONGER,
    f"{LONGER} optim.lr=4e-3",
    f"{LONGER} optim.min_lr=4e-4 teacher.momentum_end=0.996",
    PICO,
    f"{PICO} crops.ratio=[0.9,1.1]",
    f"{PICO} crops.ratio=[0.9,1.1] optim.lr=5e-3",
    f"{PICO} teacher.temp=0.025 teacher.temp_start=0.025",
    f"{PICO} crops.local_scale=[0.07,0.25]",
    f"{PICO} crops.local_scale=[0.07,0.25] crops.ratio=[0.9,1.1]",
    f"{PICO} crops.local_scale=[0.05,0.18]",
    f"{PICO} crops.local_scale=[0.03,0.12]",
    f"steps=420 optim.warmup=70 {LIFTED} crops.local_count=3 crops.local_scale=[0.07,0.25]",
]


def results():
    """What has been measured so far."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    return [json.loads(line) for line in lines]


def run(jobs):
    """Train what is missing; a process has its share of the cores."""
    done = {(r["words"], r["seed"]) for r in results()}
    todo = [(words, seed) for seed in SEEDS for words in TRIES if (words, seed) not in done]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}

    def one(words, seed):
        with tempfile.TemporaryDirectory() as out:
            command = [sys.executable, "train.py", "config.yaml", f"seed={seed}", f"out={out}"]
            command += f"{BASE} {QUIET} {words}".split()
            env = os.environ | threads
            subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
            said = json.loads(Path(out, "summary.json").read_text(encoding="utf-8"))
        keys = "knn", "knn_random", "seconds", "device", "torch"
        return {"words": words, "seed": seed} | {key: said[key] for key in keys}

    with ThreadPoolExecutor(jobs) as pool:
        for result in tqdm(pool.map(one, *zip(*todo, strict=True)), total=len(todo), unit=" runs"):
            with open(RESULTS, "a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")


def table(found):
    """The tries as a markdown table, the best first."""
    by_words = {}
    for result in sorted(found, key=lambda r: r["seed"]):
        by_words.setdefault(result["words"], []).append(result["knn"])
    base = statistics.mean(by_words[""])
    lines = ["| changed | k-NN of each seed | mean | gain |", "|---|---|---|---|"]
    for words, knn in sorted(by_words.items(), key=lambda item: -statistics.mean(item[1])):
        mean, each = statistics.mean(knn), ", ".join(f"{value:.1f}" for value in knn)
        name = f"`{words.replace(PICO, 'PICO')}`" if words else "the base"
        lines.append(f"| {name} | {each} | {mean:.1f} | {mean - base:+.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        run(int(sys.argv[2]) if sys.argv[2:] else 1)
    elif sys.argv[1:] == ["draw"]:
        write_between_marks(PAGE, "table", table(results()))
    else:
        sys.exit(__doc__)
