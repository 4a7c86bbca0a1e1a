"""What each part of DINOv2 buys: the ladder of the paper's Table 1, in small.

    python scripts/ladder.py run                  train what is missing, seed by seed
    python scripts/ladder.py run 'seeds=[0]'      fewer or more seeds
    python scripts/ladder.py draw                 docs/ladder.png, and the table in docs/ladder.md

The ladder climbs from an iBOT-like set-up to DINOv2, on the embedded data set. Every row keeps what
the rows before it have added. (Oquab et al. 2023, Table 1, whose rows about data and patch size are
left out.) A run that is in docs/ladder.jsonl is not done again; one that was interrupted continues.
"""

import functools
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import yaml
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import config
from config import UserError
from dinov2 import build_network
from eval_knn import extract_features
from images import evaluation
from parallel import materialize
from pictures import plot
from weights.load import load_backbone

ROOT = Path(__file__).resolve().parent.parent

# What all rows share beside config.yaml: short runs, a log for the curves, no pictures.
SHORT = {"steps": 200, "precision": "fp32", "optim.freeze_last_layer": 4}
SHORT |= {"log.knn_every": 0, "log.pictures": False}
SHORT |= {"optim.min_lr": 1e-6, "teacher.momentum_end": 1.0}  # to the ends of the paper
SHORT |= {"vit.size": "nano", "crops.local_count": 4, "crops.local_scale": [0.1, 0.32]}


class Row(NamedTuple):
    name: str
    changes: dict  # key of the config: value; from here on upwards
    paper: str  # the step of Table 1 that it stands for, and what that did there to k-NN


LADDER = [
    Row(
        "iBOT-like",
        {
            "vit.layerscale": 0.0,
            "vit.drop_path": 0.0,
            "head.prototypes": 32,
            "loss.koleo": 0.0,
            "vit.ffn": "mlp",
            "teacher.momentum": 0.987,
            "optim.warmup": 10,
            "batch": 32,
            "loss.centering": "softmax",
            "head.separate": False,
        },
        "iBOT, our reproduction: 74.5",
    ),
    Row("+ LayerScale", {"vit.layerscale": 0.1}, "together with the next row: +0.9"),
    Row("+ stochastic depth", {"vit.drop_path": 0.1}, "together with the row above: +0.9"),
    Row("+ more prototypes", {"head.prototypes": 64}, "128k prototypes: +1.2"),
    Row("+ KoLeo", {"loss.koleo": 0.02}, "+2.3"),
    Row("+ SwiGLU", {"vit.ffn": "swiglu"}, "-0.2"),
    Row("+ faster teacher", {"teacher.momentum": 0.98}, "momentum 0.994: +0.5"),
    Row("+ longer warm-up", {"optim.warmup": 30}, "warm-up schedules: +1.1"),
    Row("+ larger batch", {"batch": 48}, "3k instead of 2k: +1.2"),
    Row("+ Sinkhorn-Knopp", {"loss.centering": "sinkhorn"}, "0.0"),
    Row("+ untied heads = DINOv2", {"head.separate": True}, "+0.3"),
]


def changes_up_to(number):
    """All keys that row `number` sets, SHORT included."""
    merged = dict(SHORT)
    for row in LADDER[: number + 1]:
        merged |= row.changes
    return merged


def words(changes):
    """{key: value} as the words of a command line."""
    return [f"{key}={config.shown(value)}" for key, value in changes.items()]


# ---- runs ----------------------------------------------------------------------------------------


def run_all(seeds, rows, results, runs, extra):
    """Do the runs that the results file lacks, seed by seed; one line of json for each."""
    done = read_results(results)
    plan = [(seed, number) for seed in seeds for number in rows]
    for seed, number in tqdm(plan, desc="ladder", unit=" runs", disable=None):
        name, overrides = LADDER[number].name, changes_up_to(number) | extra
        if not find(done, overrides, seed):
            print(f"seed {seed}, {name}", flush=True)
            out = Path(runs, f"{number:02}-seed{seed}")
            result = {"row": name, "seed": seed, "overrides": overrides}
            result |= train(out, [*words(overrides), f"seed={seed}"])
            done.append(result)
            with open(results, "a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            print(f"  k-NN {result['knn']:.1f} %, linear {result['linear']:.1f} %", flush=True)


def train(out, words):
    """One run of train.py, in a process of its own -> what it reached."""
    command = [sys.executable, "train.py", "config.yaml", f"out={out.resolve()}", *words]
    if code := subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
        raise UserError(f"{out}: the run ended with code {code}; the same command continues it")
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    backbone, cfg = load_backbone(out, with_config=True)
    result = {"linear": linear(backbone, cfg), "linear_random": linear(untrained(cfg), cfg)}
    keys = "knn", "knn_random", "knn_pixels", "seconds", "torch"
    return result | {key: summary[key] for key in keys}


def untrained(cfg):
    """The backbone as the run began."""
    with torch.device("meta"):
        network = build_network(cfg, student=False)
    materialize(network, "cpu", cfg.seed)
    return network.backbone.eval()


def linear(backbone, cfg):
    """Accuracy in percent of a logistic regression on frozen [CLS] features."""
    sources = held_out(cfg.data.root)
    known, asked = (extract_features(backbone, source, cfg, "cpu") for source in sources)
    return logistic_regression(*known, *asked)


@functools.cache
def held_out(root):
    """Labelled images and images to classify; drawn once for the whole ladder."""
    return evaluation.evaluation_images(config.load(ROOT / "config.yaml", [f"data.root={root}"]))


def logistic_regression(train_ND, label_N, test_MD, label_M):
    """Percentage of test images that the best linear classifier of the training images gets right.

    Features are brought to mean 0 and variance 1 first, by the training images.
    """
    mean_D, std_D = train_ND.mean(dim=0), train_ND.std(dim=0) + 1e-6
    layer = fit((train_ND - mean_D) / std_D, label_N)
    answer_M = layer((test_MD - mean_D) / std_D).argmax(dim=1)
    return round(100 * (answer_M == label_M).double().mean().item(), 2)


def fit(x_ND, label_N, decay=1e-4):
    """The linear layer with the least loss; it is unique, so there is no learning rate to choose.

    min over W, b   mean_n cross_entropy(W x_n + b, label_n) + decay |W|^2
    """
    layer = torch.nn.Linear(x_ND.shape[1], int(label_N.max()) + 1)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    solver = torch.optim.LBFGS(layer.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def loss():
        solver.zero_grad()
        value = F.cross_entropy(layer(x_ND), label_N) + decay * layer.weight.square().sum()
        value.backward()
        return value

    solver.step(loss)
    return layer


# ---- results -------------------------------------------------------------------------------------


def read_results(path):
    """The objects of the results file; none if there is no such file."""
    if not Path(path).exists():
        return []
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def find(results, overrides, seed):
    """The result of this very run, or None: a row that has been changed since does not count."""
    same = [r for r in results if r["seed"] == seed and r["overrides"] == overrides]
    return same[-1] if same else None


def by_row(results, extra):
    """[(row, its results, those of the row right above)], by seed, of the rows that have any."""
    seeds = sorted({result["seed"] for result in results})
    plan = [changes_up_to(number) | extra for number in range(len(LADDER))]
    found = [[r for seed in seeds if (r := find(results, row, seed))] for row in plan]
    rows = zip(LADDER, found, [[], *found], strict=False)
    return [(row, own, above) for row, own, above in rows if own]


def column(results, key="knn"):
    return [result[key] for result in results]


def verdict(before, now):
    """What a row does: something, only if all its runs lie beyond all runs of the row before.

    If a row did nothing, three runs against three would still look like this once in ten times.
    """
    if min(len(before), len(now)) < 3:
        return "too few seeds"
    if min(now) > max(before):
        return "helps"
    return "harms" if max(now) < min(before) else "no difference"


def shown(values):
    """Mean, and the range from the lowest to the highest seed."""
    spread = f" ({min(values):.1f}-{max(values):.1f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def table(rows):
    """The rows as Markdown."""
    lines = [
        "| | changes | seeds | k-NN, % | linear, % | untrained | k-NN against the row above "
        "| in the paper |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row, results, above in rows:
        knn, change = column(results), ""
        changes = (
            "see below" if row is LADDER[0] else ", ".join(f"`{w}`" for w in words(row.changes))
        )
        if above:
            difference = round(statistics.mean(knn) - statistics.mean(column(above)), 1)
            change = f"{difference + 0:+.1f}: {verdict(column(above), knn)}"  # + 0: no "-0.0"
        floors = (statistics.mean(column(results, f"{key}_random")) for key in ("knn", "linear"))
        cells = (
            row.name, changes, len(knn), shown(knn), shown(column(results, "linear")),
            " and ".join(f"{floor:.1f}" for floor in floors), change, row.paper,
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def conclusion(rows):
    """Which rows help, harm, or do nothing that the seeds can tell, as a list in Markdown."""
    said = {}
    for row, results, above in rows:
        if above:
            word = verdict(column(above), column(results))
            said.setdefault(word, []).append(row.name.removeprefix("+ "))
    return "\n".join(f"- **{word}**: {', '.join(names)}" for word, names in said.items())


def write_between_marks(path, name, text):
    """Replace what stands between <!-- name --> and <!-- end name --> in a document."""
    page = path.read_text(encoding="utf-8")
    begin, end = f"<!-- {name} -->\n", f"\n<!-- end {name} -->"
    before, found, rest = page.partition(begin)
    _, found_too, after = rest.partition(end)
    if not found or not found_too:
        raise UserError(f"{path}: no lines {begin.strip()} and {end.strip()} to write between")
    path.write_text(before + begin + text + end + after, encoding="utf-8")


def draw(rows, path):
    """Every run as a dot, k-NN and linear, row under row; the short line is the mean."""
    height, left, right, top = 32, 210, 700, 78
    page = plot.Page(900, top + height * len(rows) + 46)
    page.text(20, 14, "The ladder from iBOT to DINOv2, on the embedded data set", 17)
    text = "% of 2,000 held-out images; a line is the mean of its dots; pale: the network untrained"
    page.text(20, 40, text, 12, plot.GREY)
    kinds = [("k-NN", "knn", plot.BLUE, -5, 720), ("linear", "linear", plot.ORANGE, 6, 800)]
    everything = [result for _, results, _ in rows for result in results]
    keys = "knn", "linear", "knn_random", "linear_random", "knn_pixels"
    values = [result[key] for result in everything for key in keys]
    low, high = min(values) - 2, max(values) + 2
    bottom = top + height * len(rows)

    def at(value):
        return left + (value - low) / (high - low) * (right - left)

    for value, text in plot.ticks(low, high, 6):
        page.line([(at(value), top), (at(value), bottom)], plot.LIGHT)
        page.text(at(value), bottom + 6, text, 11, plot.GREY, "ma")
    pixels = at(statistics.mean(column(everything, "knn_pixels")))
    page.line([(pixels, top), (pixels, bottom)], plot.BLUE)
    page.text(pixels, bottom + 24, "raw pixels", 11, plot.BLUE, "ma")
    for name, _, colour, _, x in kinds:
        page.text(x, 56, name, 13, colour)
    for number, (row, results, _) in enumerate(rows):
        y = top + height * (number + 0.5)
        page.text(left - 14, y, row.name, 13, plot.INK, "rm")
        for _, key, colour, shift, x in kinds:
            floor = statistics.mean(column(results, f"{key}_random"))
            page.dot(at(floor), y + shift, plot.mix(colour, plot.PAPER, 0.7))
            mean = statistics.mean(column(results, key))
            page.line([(at(mean), y + shift - 6), (at(mean), y + shift + 6)], colour, 2)
            for value in column(results, key):
                page.dot(at(value), y + shift, colour)
            page.text(x, y, f"{mean:.1f}", 13, plot.INK, "lm")
    page.finished().save(path)


# ---- command line --------------------------------------------------------------------------------

USAGE = """
usage: python scripts/ladder.py run|draw [key=value ...]

  run     train the rows that the results lack: seed 0 of all rows, then seed 1, then seed 2
  draw    the picture, and the table in the document, from the results
  seeds=[0,1,2]  rows=[0,1,...]  results=docs/ladder.jsonl  runs=runs/ladder  page=docs/ladder.md
Any other key is one of the config, for all rows: steps=20
"""
DEFAULTS = {
    "seeds": [0, 1, 2],
    "rows": list(range(len(LADDER))),
    "results": ROOT / "docs" / "ladder.jsonl",
    "runs": ROOT / "runs" / "ladder",
    "page": ROOT / "docs" / "ladder.md",
}


@config.report_errors
def main(argv):
    if not argv or argv[0] not in ("run", "draw"):
        print(USAGE.strip())
        sys.exit(0 if {"-h", "--help"} & set(argv) else 2)
    given = dict(DEFAULTS)
    for word in argv[1:]:
        key, equals, text = word.partition("=")
        if not equals:
            raise UserError(f"cannot read {word!r}: write key=value, as in 'seeds=[0]'")
        given[key] = text if key in ("results", "runs", "page") else yaml.safe_load(text)
    extra = {key: value for key, value in given.items() if key not in DEFAULTS}
    if argv[0] == "run":
        run_all(given["seeds"], given["rows"], given["results"], given["runs"], extra)
    rows = by_row(read_results(given["results"]), extra)
    if not rows:
        raise UserError(f"results={given['results']}: no run of this ladder; `run` makes them")
    if argv[0] == "draw":
        draw(rows, Path(given["page"]).with_suffix(".png"))
        write_between_marks(Path(given["page"]), "table", table(rows))
        write_between_marks(Path(given["page"]), "conclusion", conclusion(rows))
    print(table(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
