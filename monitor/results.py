"""What a run has reached: k-NN on the way, and at the end summary.json and the pictures.

    knn          accuracy of k-NN (k = 20) on held-out images, by the teacher's features
    knn_random   the same of the untrained network   } what training has to beat
    knn_pixels   the same of the pixels themselves   }
    knn_teacher  of the teacher of a distillation
    knn_start    of the network that init_from gave, before the first step: what must not get worse

All in percent.
"""

import eval_knn
from pictures.history import draw_curves, keep_frame
from pictures.neighbours import before_and_after
from weights.load import load_backbone

K_REPORTED = 20  # the `knn` of log and summary; the other k are in the summary
MOST_PIXELS = 2**31  # 8 GB of fp32 features; ImageNet at 224 px has 90 times as many


def evaluate(backbone, held_out, cfg, device, floors=False):
    """k-NN accuracy of the backbone; with floors (at step 0) also of raw pixels, if they fit.

    At step 0 the backbone is what the run starts with, which is the other floor.
    """
    if held_out is None:
        return {}
    result = {"knn": headline(eval_knn.evaluate(backbone, held_out, cfg, device))}
    if floors:
        result["knn_start" if cfg.init_from else "knn_random"] = result["knn"]
        numbers = len(held_out[0]) * cfg.data.channels * cfg.crops.global_size**2
        if numbers < MOST_PIXELS:
            pixels = eval_knn.evaluate(eval_knn.RawPixels(), held_out, cfg, device)
            result["knn_pixels"] = headline(pixels)
    return result


def headline(scores):
    """The one figure to report of many k: of 20, or of what so few training images allow."""
    return scores.get(f"knn_{K_REPORTED}", next(iter(scores.values()), None))


def evaluate_run(run, step):
    """k-NN of a run before a step, in its log; and features of a few images for the animation."""
    backbone, first = run.teacher.backbone, step == 0
    scores = evaluate(backbone, run.held_out, run.cfg, run.device, floors=first)
    keep_frame(step, backbone, run.held_out[1] if run.held_out else run.source, run.cfg)
    run.report.evaluation(step, scores | (run.known if first else {}))


def final_report(run):
    """After the last step: k-NN with every k, the pictures of the run, and summary.json."""
    cfg, report, backbone, held_out = run.cfg, run.report, run.teacher.backbone, run.held_out
    scores = eval_knn.evaluate(backbone, held_out, cfg, run.device) if held_out else {}
    shown = held_out[1] if held_out else run.source
    keep_frame(cfg.steps, backbone, shown, cfg)
    if report.rank:
        return
    knn, seconds = headline(scores), report.seconds()
    report.evaluation(cfg.steps, {"knn": knn} if held_out else {})
    summary = {"knn": knn, "knn_random": None, "knn_pixels": None, **report.floors, **scores}
    summary |= {"images": cfg.steps * cfg.batch, "seconds": seconds, "steps": cfg.steps}
    if cfg.log.pictures:
        draw_curves(report.out)
        trained = load_backbone(cfg.out).to(run.device)
        before_and_after(trained, held_out, shown, cfg, report.out / "neighbours.png")
    report.summary(summary)
    pictures = "curves.png, crops.png, neighbours.png, " if cfg.log.pictures else ""
    report.close(
        f"done: {summary['images']:,} images in {seconds:.0f} s\n"
        f"see {report.out}/: {pictures}summary.json, log.jsonl, teacher.pt"
    )
