"""What a run has reached: k-NN on the way, and at the end summary.json and the pictures.

    knn          accuracy of k-NN (k = 20) on held-out images, by the teacher's features
    knn_random   the same of the untrained network   } what training has to beat
    knn_pixels   the same of the pixels themselves   }
    knn_teacher  of the teacher of a distillation
    knn_start    of the network that init_from gave, before the first step: what must not get worse

All in percent.
"""

import contextlib
import json
from pathlib import Path

import torch

import eval_knn
from config import Config, documented, lookup, replace_text, writing
from monitor.report import ELSEWHERE, device_name
from pictures.history import draw_curves, keep_frame
from pictures.neighbours import before_and_after
from weights.load import load_backbone

MOST_PIXELS = 2**31  # 8 GB of fp32 features; ImageNet at 224 px has 90 times as many
REFERENCES = Path(__file__).resolve().parent.parent / "docs" / "runs"
# How the keys begin that say where a run happens and what it tells: no part of its recipe.
PLACES = ("out", "seed", "device", "compile", "parallel", "log.")
PLACES += ("data.root", "data.val", "data.workers")


def evaluate(network, held_out, cfg, device):
    """k-NN accuracy with each k, and as `knn` that of k = 20, or of what so few images allow."""
    scores = eval_knn.evaluate(network, held_out, cfg, device)
    return {"knn": scores.get("knn_20", next(iter(scores.values())))} | scores


def evaluate_run(run, step):
    """k-NN of a run's teacher before a step, and at step 0 of raw pixels if they fit, in its log.

    Keeps features of a few images for the animation. Returns the scores of all k.
    """
    cfg, backbone, held_out = run.cfg, run.teacher.backbone, run.held_out
    if step == 0 and run.report.rank == 0 and (ref := next(references(cfg), None)):
        run.report.say(f"reference {ref[0]}: {ref[1]['minutes']:.1f} minutes on {ref[1]['device']}")
    keep_frame(step, backbone, held_out[1] if held_out else run.source, cfg)
    if not held_out:
        return {}
    scores = evaluate(backbone, held_out, cfg, run.device)
    found = {"knn": scores["knn"]}
    if step == 0:
        found |= run.known | {"knn_start" if cfg.init_from else "knn_random": scores["knn"]}
        if len(held_out[0]) * cfg.data.channels * cfg.crops.global_size**2 < MOST_PIXELS:
            pixels = evaluate(eval_knn.RawPixels(), held_out, cfg, run.device)
            found["knn_pixels"] = pixels["knn"]
    run.report.evaluation(step, found)
    return scores


def recipe_of(cfg):
    """{key: value} of all keys but PLACES, as json has them."""
    keys = [key for key, _ in documented() if not key.startswith(PLACES)]
    return json.loads(json.dumps({key: lookup(cfg, key) for key in keys}))


def references(cfg):
    """(name, first line, k-NN of raw pixels, of the end) of each reference run of this recipe."""
    for path in sorted(REFERENCES.glob("*.jsonl")):
        with contextlib.suppress(LookupError, ValueError):  # a file that is no reference
            first, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            known = [line for line in lines if "knn" in line]
            if recipe_of(Config()) | first["config"] == recipe_of(cfg):
                yield f"docs/runs/{path.name}", first, known[0]["knn_pixels"], known[-1]["knn"]


def compared(cfg, knn, floors):
    """What reference runs of this recipe reached on these images, in words, or ""."""
    # The same images: k-NN of raw pixels is equal, but for the rounding of bf16.
    same = [run for run in references(cfg) if abs(run[2] - floors.get("knn_pixels", -9)) < 1]
    said = [f"{name}: {reached:.1f} %" for name, _, _, reached in same]
    return f"k-NN {knn:.1f} %; reference run {', '.join(said)}\n" if said else ""


def final_report(run):
    """After the last step: k-NN with every k, the pictures of the run, and summary.json."""
    cfg, report, held_out = run.cfg, run.report, run.held_out
    scores = evaluate_run(run, cfg.steps)
    if report.rank:
        return
    seconds = report.seconds()
    summary = {"knn": None, "knn_random": None, "knn_pixels": None, **report.floors, **scores}
    summary |= {"images": cfg.steps * cfg.batch, "seconds": seconds, "steps": cfg.steps}
    summary |= {"skipped_images": len(report.bad), "torch": torch.__version__}
    summary |= {"device": f"{run.device} ({device_name(run.device)})"}
    if cfg.log.pictures:
        draw_curves(report.out)
        trained = load_backbone(cfg.out).to(run.device)
        before_and_after(trained, held_out, run.source, cfg, report.out / "neighbours.png")
    with writing(report.out, ELSEWHERE):
        replace_text(report.out / "summary.json", json.dumps(summary, indent=1) + "\n")
    said = compared(cfg, summary["knn"], report.floors)
    report.close(f"{said}done: {summary['images']:,} images in {seconds:.0f} s, see {report.out}/")
