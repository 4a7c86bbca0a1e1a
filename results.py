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

import data
import eval_knn
import history
import sheets
from augment import colour
from features import untrained
from history import keep_frame, spread_images
from patches import patch_features, pca_colours
from weights import load_backbone

K_REPORTED = 20  # the `knn` of log and summary; the other k are in the summary
MOST_PIXELS = 2**31  # 8 GB of fp32 features; ImageNet at 224 px has 90 times as many
FLOORS = {
    "knn_start": "before the first step",
    "knn_random": "untrained network",
    "knn_pixels": "raw pixels",
    "knn_teacher": "its teacher",
}


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


def final_report(report, backbone, source, held_out, cfg, device):
    """After the last step: k-NN with every k, the pictures of the run, and summary.json."""
    scores = eval_knn.evaluate(backbone, held_out, cfg, device) if held_out else {}
    source = held_out[1] if held_out else source
    keep_frame(cfg.steps, backbone, source, cfg)
    if report.rank:
        return
    knn, seconds = headline(scores), report.seconds()
    report.evaluation(cfg.steps, {"knn": knn} if held_out else {})
    summary = {"knn": knn, "knn_random": None, "knn_pixels": None, **report.floors, **scores}
    summary |= {"images": cfg.steps * cfg.batch, "seconds": seconds, "steps": cfg.steps}
    if cfg.log.pictures:
        history.draw_curves(report.out)
        draw_pca(source, cfg, report.out / "pca.png", device)
    report.summary(summary)
    text = f"done: {summary['images']:,} images in {seconds:.0f} s"
    if held_out:
        text += f"; k-NN {knn:.1f} %{report.to_beat()}"
    pictures = "curves.png, crops.png, pca.png, " if cfg.log.pictures else ""
    report.close(f"{text}\nsee {report.out}/: {pictures}summary.json, log.jsonl, teacher.pt")


def finished(cfg):
    """What to say of a run that is complete already, or "" for one that is not."""
    path = Path(cfg.out, "summary.json")
    with contextlib.suppress(OSError, ValueError):
        summary = json.loads(path.read_text(encoding="utf-8"))
        knn = f", k-NN {summary['knn']:.1f} %" if summary.get("knn") is not None else ""
        return (
            f"{cfg.out} is finished ({cfg.steps:,} steps{knn}): nothing to do; "
            "set out= for a new run"
        )
    return ""


def draw_crops(source, cfg, path):
    """The first images of the run, as the network will see them."""
    count = max(n for n in (1, 2, 3, 4) if cfg.batch % n == 0)
    dataset = data.Dataset(source, cfg)
    # As if every process had `count` images: the masks are those of the step, without its images.
    samples = [dataset[position] for position in range(count)]
    batch = data.collate(samples, cfg, rank=0, world=cfg.batch // count)
    images = [data.read_or_next(source, dataset.order[i])[0] for i in range(count)]
    mean, std = cfg.data.mean, cfg.data.std
    large = colour(batch.global_crops, batch.global_colour, mean, std).unflatten(0, (2, count))
    small = colour(batch.local_crops, batch.local_colour, mean, std)
    small = small.unflatten(0, (cfg.crops.local_count, count))
    masks = batch.masks.unflatten(0, (2, count))
    rows = [[x[:, i] for i in range(count)] for x in (large, small, masks)]
    sheets.crop_sheet(images, *rows, mean, std, path)


def draw_pca(source, cfg, path, device):
    """PCA colours of images spread over a source, by the network before and after training."""
    trained = load_backbone(cfg.out).to(device)
    networks = {"untrained network": untrained(trained, cfg.seed), "trained": trained}
    images = spread_images(source, 8)
    rows = [("images", images, None)]
    for name, net in networks.items():
        features = [patch_features(net, i, cfg.data.mean, cfg.data.std) for i in images]
        rows.append((f"PCA of patch features, {name}", pca_colours(features), None))
    sheets.bands(rows, path)
