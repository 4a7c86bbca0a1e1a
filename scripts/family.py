"""DINO, iBOT, DINOv2, registers: one picture of what changes, and runs of all four in small.

    python scripts/family.py run                  train what docs/ladder.jsonl lacks, seed by seed
    python scripts/family.py draw                 docs/family.png, and the table in docs/family.md

The runs are those of scripts/ladder.py: its first row is iBOT-like, its last one DINOv2. Two more
stand at the ends: without masked patches, and with registers.
"""

import json
import statistics
import sys
from typing import NamedTuple

import ladder
from drawing import arrow, box, fill
from ladder import ROOT, changes_up_to, column, find, read_results, shown, verdict, words

import config
from pictures import plot

RESULTS, PAGE = ROOT / "docs" / "ladder.jsonl", ROOT / "docs" / "family.md"
IBOT, DINOV2 = changes_up_to(0), changes_up_to(len(ladder.LADDER) - 1)
DINO = {"loss.ibot": 0.0, "mask.probability": 0.0}
REGISTERS = {"vit.registers": 4, "vit.interpolate_offset": 0.0, "vit.interpolate_antialias": True}


class Member(NamedTuple):
    name: str  # of its runs in the results
    title: str
    paper: str
    news: tuple  # what it brought, in words and keys, as the picture shows it
    overrides: dict  # its runs on the embedded set
    changes: str  # how the table says what they change against the row above


FAMILY = [
    Member(
        "DINO-like", "DINO", "2021, Caron et al.",
        ("a student predicts its own", "moving average, from other", "crops of the same image"),
        IBOT | DINO, "the ladder's first row, with `loss.ibot=0` and `mask.probability=0`",
    ),
    Member(
        "iBOT-like", "iBOT", "2022, Zhou et al.",
        ("loss.ibot: 0 to 1", "mask.probability: 0 to 0.5", "head.prototypes: 65k to 8k",
         "one head for [CLS] and patches"),
        IBOT, "`loss.ibot=0.3`, `mask.probability=0.5`",
    ),
    Member(
        "DINOv2", "DINOv2", "2023, Oquab et al.",
        ("loss.koleo: 0 to 0.1", "loss.centering: sinkhorn", "head.separate: true",
         "vit.layerscale, vit.drop_path", "vit.ffn: swiglu", "batch: 1,024 to 3,072"),
        DINOV2, "the ten changes of [the ladder](ladder.md)",
    ),
    Member(
        "DINOv2 with registers", "+ registers", "2024, Darcet et al.",
        ("vit.registers: 0 to 4", "vit.interpolate_offset: 0", "vit.interpolate_antialias: true"),
        DINOV2 | REGISTERS, "`vit.registers=4`",
    ),
]  # fmt: skip


def run_all(seeds=(0, 1, 2)):
    """Do the runs that the results lack, in the order of the family, seed by seed."""
    for seed in seeds:
        for number, member in enumerate(FAMILY):
            if find(read_results(RESULTS), member.overrides, seed):
                continue
            print(f"seed {seed}, {member.name}", flush=True)
            out = ROOT / "runs" / "family" / f"{number}-seed{seed}"
            result = {"row": member.name, "seed": seed, "overrides": member.overrides}
            result |= ladder.train(out, [*words(member.overrides), f"seed={seed}"])
            with open(RESULTS, "a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")


def by_member(results):
    """[(member, its results by seed)]."""
    seeds = sorted({result["seed"] for result in results})
    return [
        (member, [r for seed in seeds if (r := find(results, member.overrides, seed))])
        for member in FAMILY
    ]


def table(rows):
    """The rows as Markdown."""
    lines = [
        "| | changes | seeds | k-NN, % | linear, % | untrained | k-NN against the row above |",
        "|---|---|---|---|---|---|---|",
    ]
    above = []
    for member, results in rows:
        cells = [member.name, member.changes, len(results), "not measured", "", "", ""]
        if results:
            knn = column(results)
            floors = [
                statistics.mean(column(results, key)) for key in ("knn_random", "linear_random")
            ]
            cells[3:5] = shown(knn), shown(column(results, "linear"))
            cells[5] = " and ".join(f"{floor:.1f}" for floor in floors)
            if above:
                difference = round(statistics.mean(knn) - statistics.mean(above), 1)
                cells[6] = f"{difference + 0:+.1f}: {verdict(above, knn)}"
            above = knn
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


# ---- the picture ---------------------------------------------------------------------------------

LEFT, WIDTH, GAP = 20, 194, 28  # of the four columns
TOP, BOTTOM = 286, 506  # of the axis below them


def draw(rows, path):
    """Four columns from left to right; below each, every run as a dot (pale: untrained)."""
    page = plot.Page(900, BOTTOM + 48)
    page.text(LEFT, 12, "One family, one code: each step is a few keys of the config", 17)
    for number, (member, _) in enumerate(rows):
        draw_member(page, LEFT + number * (WIDTH + GAP), number, member)
    keys = "knn", "linear", "knn_random", "linear_random", "knn_pixels"
    values = [result[key] for _, results in rows for result in results for key in keys]
    low, high = min(values) - 3, max(values) + 3

    def at(value):
        return BOTTOM - (value - low) / (high - low) * (BOTTOM - TOP)

    for value, text in plot.ticks(low, high, 5):
        page.line([(LEFT + 24, at(value)), (900 - LEFT, at(value))], plot.LIGHT)
        page.text(LEFT + 18, at(value), text, 11, plot.GREY, "rm")
    for number, (_, results) in enumerate(rows):
        draw_dots(page, LEFT + number * (WIDTH + GAP) + WIDTH / 2 + 8, results, at)
    page.text(LEFT, TOP - 22, "and what each did on the embedded set: % right", 13, plot.GREY)
    for x, colour, name in ((540, plot.BLUE, "k-NN"), (610, plot.ORANGE, "linear")):
        page.dot(x, TOP - 14, colour)
        page.text(x + 10, TOP - 14, name, 12, plot.INK, "lm")
    page.text(680, TOP - 14, "pale: the network untrained", 12, plot.GREY, "lm")
    text = "200 steps of a ViT with 1.2 M parameters; 2,000 held-out images; a line is the mean"
    page.text(LEFT, BOTTOM + 20, text, 12, plot.GREY)
    page.finished().save(path)


def draw_member(page, x, number, member):
    fill(page, x, 48, WIDTH, 56, plot.mix(plot.BLUE, plot.PAPER, 0.86 - 0.1 * number))
    page.text(x + 12, 66, member.title, 17, plot.INK, "lm")
    page.text(x + 12, 90, member.paper, 12, plot.GREY, "lm")
    if number:
        arrow(page, x - GAP + 5, 76, x - 5, 76)
    box(page, x, 104, WIDTH, 140, plot.LIGHT, 1)
    for line, words_ in enumerate(member.news):
        page.text(x + 12, 122 + 20 * line, words_, 12, plot.INK, "lm")


def draw_dots(page, x, results, at):
    for key, colour, shift in (("knn", plot.BLUE, -26), ("linear", plot.ORANGE, 26)):
        for value in column(results, f"{key}_random"):
            page.dot(x + shift - 16, at(value), plot.mix(colour, plot.PAPER, 0.7))
        if results:
            mean = statistics.mean(column(results, key))
            page.line([(x + shift - 9, at(mean)), (x + shift + 9, at(mean))], colour, 2)
            page.text(x + shift + 13, at(mean), f"{mean:.1f}", 12, plot.INK, "lm")
        for value in column(results, key):
            page.dot(x + shift, at(value), colour)


@config.report_errors
def main(argv):
    if argv not in (["run"], ["draw"]):
        print(__doc__.strip())
        sys.exit(0 if {"-h", "--help"} & set(argv) else 2)
    if argv == ["run"]:
        run_all()
    rows = by_member(read_results(RESULTS))
    if argv == ["draw"]:
        draw(rows, PAGE.with_suffix(".png"))
        ladder.write_between_marks(PAGE, "table", table(rows))
    print(table(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
