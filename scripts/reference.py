"""One recipe from its config to its figures: train, probe, keep a small log to compare with.

    python scripts/reference.py configs/cifar10_gpu.yaml /data/cifar10 to=docs/runs
    python scripts/reference.py config.yaml seed=1       the embedded images need no folder
    python scripts/reference.py table                    the table in docs/runs/README.md

usage: python scripts/reference.py CONFIG.yaml [FOLDER] [to=] [commit=] [key=value ...]

Fetches nothing. FOLDER is data.root; out is runs/NAME-SEED where it is not given. Prints a row of
the table, and writes NAME-SEED.jsonl into the folder `to` (where it is not given: out). Its first
line says what was run, and on what; the others are those of log.jsonl, as many as fit into 100 kB.
The same command again goes on where it was interrupted. commit: of the code, where git knows none.
"""

import contextlib
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from ladder import write_between_marks

import config
import train
from config import UserError
from evals import linear
from monitor.report import read_log
from monitor.results import PLACES, REFERENCES, recipe_of
from parallel import dtype_of

ROOT = Path(__file__).resolve().parent.parent
# A tenth of the official iterations, each of four times as many images: seconds on a GPU.
PROBE = ["iterations=1250", "batch=512", "logistic=0"]
LARGEST = 90_000  # bytes of the lines of a log, without the first
COLUMNS = "recipe | seed | k-NN | untrained | linear | minutes | images/s | device | torch | commit"


def arguments(argv):
    """(path of the config, the words for train.py, Config, folder for the log, commit)."""
    path, words = config.main_arguments(argv, __doc__)
    if words and "=" not in words[0] and not words[0].startswith("-"):
        words[0] = f"data.root={words[0]}"
    o, words = config.take_options(words, {"to": "", "commit": ""})
    cfg = config.load(path, words)
    if not any(word.startswith("out=") for word in words):
        cfg.out = f"{cfg.out}-{cfg.seed}"
        words.append(f"out={cfg.out}")
    before = Path(cfg.out, "config.yaml")
    if before.exists() and asked_of(config.load(before)) != asked_of(cfg):
        raise UserError(f"{cfg.out} holds another run; set out= to another place")
    with config.writing(f"to={o.to}"):
        Path(o.to or cfg.out).mkdir(parents=True, exist_ok=True)
    return path, words, cfg, Path(o.to or cfg.out), o.commit or commit_of_code() or "unknown"


def commit_of_code():
    """As git describes it, "-dirty" where files are changed; "" where there is no git."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    with contextlib.suppress(OSError):
        return subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return ""


def asked_of(cfg):
    """What makes two runs the same."""
    return recipe_of(cfg), cfg.seed, cfg.data.root


def name_of(path, words):
    """The recipe in words: its file, and what was changed that is no place."""
    kept = [w for w in words if not w.startswith(PLACES)]
    file = Path(path).resolve()
    file = file.relative_to(ROOT) if file.is_relative_to(ROOT) else file.name
    return " ".join([str(file), *kept])


def thinned(rows):
    """All k-NN evaluations, and of the other lines as many as there is room for."""
    every = math.ceil(sum(len(json.dumps(row)) + 1 for row in rows) / LARGEST)
    kept = [row for row in rows if "loss" in row][::every]
    kept += [row for row in rows if "knn" in row]
    return sorted(kept, key=lambda row: row["step"])


def keep(path, first, run):
    """Write the small log of a run."""
    lines = [json.dumps(row) + "\n" for row in [first, *thinned(read_log(run))]]
    with config.writing(path):
        config.replace_text(path, "".join(lines))


def row(path):
    """The row of a small log in the table."""
    first, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    knn = [line for line in lines if "knn" in line] or [{}]
    rates = [line["images_per_second"] for line in lines if "loss" in line]
    percent = knn[-1].get("knn"), knn[0].get("knn_random"), first["linear"]
    cells = [f"`{first['recipe']}`", first["seed"]]
    cells += ["" if value is None else f"{value:.1f} %" for value in percent]
    cells += [f"{first['minutes']:.1f}", f"{statistics.median(rates):,.0f}"]
    cells += [first[key] for key in ("device", "torch", "commit")]
    return f"| {' | '.join(map(str, cells))} |"


def table(paths):
    head = [f"| log | {COLUMNS} |", "|---" * 11 + "|"]
    return "\n".join(head + [f"| [{p.stem}]({p.name}) {row(p)}" for p in sorted(paths)])


@config.report_errors
def main(argv):
    if argv == ["table"]:
        text = table(REFERENCES.glob("*.jsonl"))
        return write_between_marks(REFERENCES / "README.md", "table", text)
    path, words, cfg, folder, commit = arguments(argv)
    began, out = time.time(), Path(cfg.out)
    train.main([path, *words])
    said = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    first = {
        "recipe": name_of(path, words),
        "seed": cfg.seed,
        "linear": None,
        "minutes": round(max(time.time() - began, said["seconds"]) / 60, 2),
        "device": f"{said['device']}, {str(dtype_of(cfg)).removeprefix('torch.')}",
        "torch": said["torch"],
        "python": platform.python_version(),
        "commit": commit,
        "config": recipe_of(cfg),
    }
    small = folder / f"{out.name}.jsonl"
    keep(small, first, out)  # already, as the probe might be cut off
    if said["knn"] is not None:  # else there are no labels
        linear.main([str(out), *PROBE])
        [probe] = json.loads((out / "linear.json").read_text(encoding="utf-8"))
        first["linear"] = probe["test"]
        keep(small, first, out)
    print(row(small))


if __name__ == "__main__":
    main(sys.argv[1:])
