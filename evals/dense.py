"""What do single patches know? Segmentation from frozen patch tokens, with mean IoU.

    python -m evals.dense RUN FOLDER        FOLDER/images/x.jpg and FOLDER/masks/x.png
    python -m evals.dense draw FOLDER       such a folder to try it on, drawn by the program

A mask is a PNG whose pixels (palette or grey) are numbers of classes; 255 is not counted. FOLDER
may hold train/ and val/ with images/ and masks/ each; else a fifth, drawn by seed, is tested.
  k-NN     a patch is what the training patches most like it are
  linear   logistic regression on the patch tokens; held-out images choose the penalty
Scores of patches are enlarged to the size of the mask (bilinear); the class with the highest wins.
    IoU of a class = pixels that are it and are called it / pixels that are it or are called it
counted over all test images together; the mean is over the classes that occur.
(DINOv2 section 7.4. Differs from the official code, which trains batch norm and a linear layer for
40,000 steps of mmsegmentation: here the same kind of layer is brought to its optimum.)

Shapes:  H W pixels of a mask   h w patches   N patches   D channels   C classes
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import config
from config import UserError
from eval_knn import knn_probabilities
from evals.frozen import KEYS, open_network, untrained
from evals.logistic import logistic_path, penalties
from images import evaluation, synthetic
from images.held_out import divide
from images.reader import EXTENSIONS, read_image
from parallel import counted, dtype_of, pick_device, progress, warn

IGNORED = 255

# ---- images and masks ---------------------------------------------------------------------------


def splits(folder, channels=3):
    """(pairs to learn from, classes that each shows (N, C); the same of the pairs to test with)."""
    folder = Path(folder)
    if (folder / "train").is_dir():
        held_out = folder / ("val" if (folder / "val").is_dir() else "test")
        train, test = checked(folder / "train", channels), checked(held_out, channels)
    else:
        found, shown_NC = checked(folder, channels)
        kept, held = fifth(shown_NC, folder)
        train, test = (([found[i] for i in rows], shown_NC[rows]) for rows in (kept, held))
    known_C, asked_C = train[1].any(axis=0), test[1].any(axis=0)
    if min(known_C.sum(), asked_C.sum()) < 2:
        raise UserError(
            f"{folder}: the masks to learn from or to test with show fewer than two classes: "
            f"nothing to tell apart; {IGNORED} is not counted: save what it marks as 1"
        )
    if (missing := (asked_C & ~known_C).nonzero()[0]).size:
        raise UserError(
            f"class {missing[0]} is in the test masks but in no training mask: add images "
            f"that show it, or call it {IGNORED}"
        )
    return *train, *test


def fifth(shown_NC, where, seed=0):
    """(rows that stay, a fifth to be held out), such that classes are on both sides if they can."""
    kept, held = divide(np.where(shown_NC, 0, -1), 0.2, seed)
    if len(shown_NC) < 5 or not len(held):
        count = counted(len(shown_NC), "image")
        raise UserError(f"{where}: {count}, too few to hold some out; at least 5 are needed")
    return kept, held


def checked(folder, channels):
    """([(image, mask)] of a folder with images/ and masks/, by name; classes that each shows)."""
    for name in ("images", "masks"):
        if not (folder / name).is_dir():
            raise UserError(f"{folder / name}: no such folder; images/x.jpg goes with masks/x.png")
    found, shown, damaged = [], [], []
    images = [p for p in (folder / "images").iterdir() if p.suffix.lower() in EXTENSIONS]
    for image in progress(sorted(images), desc="masks"):
        mask = folder / "masks" / f"{image.stem}.png"
        if not mask.exists():
            raise UserError(f"{mask}: no such file; {image.name} needs a mask, or must go")
        classes_HW = read_mask(mask)
        try:
            height, width = read_image(image, channels, max_pixels=0).shape[:2]
        except Exception as error:  # of a decoder that was fed with anything
            damaged.append(f"{image}: {' '.join(str(error).split())}")
            continue
        if classes_HW.shape != (height, width):
            rows, columns = classes_HW.shape
            raise UserError(
                f"{mask}: {columns} x {rows} pixels, but {image.name} has {width} x {height}: "
                "save it in the size of its image"
            )
        found.append((image, mask))
        shown.append(np.bincount(classes_HW.flatten(), minlength=256)[:IGNORED] > 0)
    if not found:
        raise UserError(f"{folder / 'images'}: no images that can be read {' '.join(damaged[:1])}")
    if damaged:
        words = counted(len(damaged), "damaged image")
        warn(f"{words} left out, the first: {damaged[0]}")
    return found, np.array(shown)


def read_mask(mask):
    """Numbers of classes (H, W) uint8. Raises UserError if it is no mask."""
    try:
        with Image.open(mask, formats=["PNG"]) as picture:
            if picture.mode not in ("P", "L", "1"):
                raise UserError(
                    f"{mask}: a {picture.mode} picture; save classes as palette or 8-bit grey"
                )
            return np.asarray(picture).astype(np.uint8)
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{mask}: cannot be read ({error})") from None


# ---- patches ------------------------------------------------------------------------------------


@torch.no_grad()
def patch_tokens(backbone, image, size, cfg, device):
    """Patch tokens (h, w, D) fp32 of an image whose shorter side is reduced to `size` px.

    Both sides are rounded to whole patches.
    """
    pixels_HWC = read_image(image, cfg.data.channels, max_pixels=0)
    patch, short = cfg.vit.patch, min(pixels_HWC.shape[:2])
    scale = min(size / short, 1)
    h, w = (max(round(side * scale / patch), 1) for side in pixels_HWC.shape[:2])
    x_CHW = torch.tensor(evaluation.resize(pixels_HWC, h * patch, w * patch)).permute(2, 0, 1)
    x_CHW = evaluation.normalised(x_CHW, cfg.data.mean, cfg.data.std).to(device, dtype_of(cfg))
    (x_ND,) = backbone.forward_features(x_CHW[None])["x_norm_patchtokens"]
    return x_ND.float().unflatten(0, (h, w))


def patch_classes(classes_HW, h, w, classes, fine=16):
    """The share of each class in each patch, (h * w, C); of an ignored patch all are zero."""
    resized = Image.fromarray(classes_HW).resize((w * fine, h * fine), Image.Resampling.NEAREST)
    class_Nf = torch.tensor(np.asarray(resized)).long().view(h, fine, w, fine)
    class_Nf = class_Nf.transpose(1, 2).flatten(2).flatten(0, 1)  # fine * fine points of a patch
    share_NC = F.one_hot(class_Nf.clamp(max=classes), classes + 1).sum(dim=1)[:, :classes].float()
    return share_NC / share_NC.sum(dim=1, keepdim=True).clamp(min=1)


def gather(found, extract, classes, most, seed):
    """Patch tokens (N, D) and shares of classes (N, C) of some images; at most `most` patches."""
    rng, tokens, shares = torch.Generator().manual_seed(seed), [], []
    for image, mask in progress(found, desc="training images"):
        x_hwD = extract(image)
        share_NC = patch_classes(read_mask(mask), *x_hwD.shape[:2], classes)
        known = share_NC.any(dim=1).nonzero().flatten()
        known = known[torch.randperm(len(known), generator=rng)[: max(most // len(found), 1)]]
        tokens.append(x_hwD.flatten(0, 1)[known.to(x_hwD.device)])
        shares.append(share_NC[known])
    return torch.cat(tokens), torch.cat(shares).to(tokens[0].device)


# ---- two ways to name a patch -------------------------------------------------------------------


def nearest(x_ND, share_NC, neighbours):
    """Patches (M, D) -> scores (M, C): weighted votes of the training patches most like them."""
    x_ND, label_N = F.normalize(x_ND, dim=1), share_NC.argmax(dim=1)
    k = min(neighbours, len(x_ND))

    def name(x_MD):
        x_MD = F.normalize(x_MD, dim=1)
        return knn_probabilities(x_ND, label_N, x_MD, share_NC.shape[1], (k,))[k]

    return name


def linear(x_ND, share_NC, values):
    """{penalty: patches (M, D) -> scores (M, C)}; a patch of two classes is learned as such."""
    weight_KCD, bias_KC = logistic_path(x_ND, share_NC, share_NC.shape[1], values)
    weights = zip(values, weight_KCD.to(x_ND.device), bias_KC.to(x_ND.device), strict=True)
    return {
        value: lambda x_MD, w=weight_CD, b=bias_C: F.linear(x_MD, w, b)
        for value, weight_CD, bias_C in weights
    }


def confusions(found, extract, models, classes):
    """{name of the model: (C, C) pixels of class (row) that are called class (column)}."""
    counts = {name: torch.zeros(classes, classes, dtype=torch.long) for name in models}
    for image, mask in progress(found, desc="test images"):
        x_hwD, truth_HW = extract(image), torch.tensor(read_mask(mask)).long()
        known = truth_HW != IGNORED
        for name, model in models.items():
            score_hwC = model(x_hwD.flatten(0, 1)).unflatten(0, x_hwD.shape[:2])
            score_CHW = F.interpolate(
                score_hwC.permute(2, 0, 1)[None], truth_HW.shape, mode="bilinear"
            )[0]
            guess_HW = score_CHW.argmax(dim=0).cpu()
            pair = truth_HW[known] * classes + guess_HW[known]
            counts[name] += pair.bincount(minlength=classes**2).view(classes, classes)
    return counts


def ious(count_CC):
    """IoU of each class in percent, (C,); nan where there is nothing of it and none was claimed."""
    right, union = count_CC.diag(), count_CC.sum(dim=0) + count_CC.sum(dim=1) - count_CC.diag()
    return 100 * right / union  # 0 / 0 is nan


def mean_iou(count_CC):
    return ious(count_CC).nanmean().item()


def floor(count_CC):
    """The confusion of calling every pixel what most pixels are."""
    always_CC = torch.zeros_like(count_CC)
    truth_C = count_CC.sum(dim=1)
    always_CC[:, truth_C.argmax()] = truth_C
    return always_CC


# ---- the command --------------------------------------------------------------------------------

OPTIONS = {
    "size": 448, "neighbours": 20, "values": 12, "patches": 100_000, "untrained": False, "seed": 0,
}  # fmt: skip
LEAST = {"size": 1, "neighbours": 1, "values": 1, "patches": 1}

USAGE = """
usage: python -m evals.dense RUN FOLDER [option=value ...] [key=value ...]
       python -m evals.dense draw FOLDER

Segments the images in FOLDER/images with the patch tokens of the backbone in RUN (a run folder or a
file of weights), compares with FOLDER/masks (PNG, pixels are numbers of classes, 255 not counted)
and says the mean IoU. `draw` writes such a folder to try it on. Options:
  size=448         px, to which the shorter side of larger images is reduced
  neighbours=20    training patches that vote
  values=12        penalties that the linear layer tries
  patches=100000   training patches, at most; drawn evenly from all images
  untrained=false  true: an untrained network of this shape instead, as a floor
Keys override the config of the run, such as precision=fp32:
"""


def evaluate(extract, folder, o, channels=3):
    """({method: (C, C) pixels of the test images}, the penalty that was chosen)."""
    train, shown_NC, test, _ = splits(folder, channels)
    classes = int(shown_NC.any(axis=0).nonzero()[0].max()) + 1
    print(f"{len(train)} training, {len(test)} test images, {classes} classes")
    kept, held = ([train[i] for i in rows] for rows in fifth(shown_NC, folder, o.seed))
    early = linear(*gather(kept, extract, classes, o.patches, o.seed), penalties(o.values))
    scores = confusions(held, extract, early, classes)
    chosen = max(scores, key=lambda value: mean_iou(scores[value]))
    x_ND, share_NC = gather(train, extract, classes, o.patches, o.seed)
    models = {"k-NN": nearest(x_ND, share_NC, o.neighbours)}
    models["linear"] = linear(x_ND, share_NC, [chosen])[chosen]
    counts = confusions(test, extract, models, classes)
    return counts | {"largest class": floor(counts["linear"])}, chosen


def draw(folder, count=60, side=96, cells=4):
    """Mosaics of the embedded images: each cell shows one class, and the mask says which."""
    rng, classes = np.random.default_rng(0), len(synthetic.CLASSES)
    y, x = np.mgrid[:side, :side]
    for name in ("images", "masks"):
        Path(folder, name).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        centre = rng.uniform(0, side, (cells, 2))
        cell = np.hypot(y[..., None] - centre[:, 0], x[..., None] - centre[:, 1]).argmin(axis=2)
        label = rng.choice(classes, cells, replace=False)
        tiles = np.tile(synthetic.draw(rng, label, side // 2), (1, 2, 2, 1))
        Image.fromarray(tiles[cell, y, x]).save(Path(folder, "images", f"{i:03}.png"))
        mask = Image.fromarray(label[cell].astype(np.uint8))
        mask.save(Path(folder, "masks", f"{i:03}.png"))
    print(f"{count} drawn mosaics of {classes} classes: {folder}/images, {folder}/masks")


@config.report_errors
def main(argv):
    run, words = config.main_arguments(argv, USAGE, KEYS)
    if not words or "=" in words[0]:
        raise UserError("FOLDER is missing: write evals.dense RUN FOLDER")
    folder, (o, words) = words[0], config.take_options(words[1:], OPTIONS, LEAST)
    if run == "draw":
        with config.writing(folder):
            return draw(folder)
    backbone, cfg = open_network(run, words)
    device = pick_device(cfg.device)
    if o.untrained:
        backbone = untrained(backbone, o.seed)
    backbone.to(device)
    counts, chosen = evaluate(
        lambda image: patch_tokens(backbone, image, o.size, cfg, device),
        folder, o, cfg.data.channels,
    )  # fmt: skip
    show(counts, chosen)


def show(counts, chosen):
    """IoU of every class that occurs, and the figures of each method."""
    print("class" + "".join(f"{name:>15}" for name in counts))
    for number, row in enumerate(torch.stack([ious(c) for c in counts.values()], dim=1)):
        if not row.isnan().all():
            words = ["-" if value.isnan() else f"{value:.2f} %" for value in row]
            print(f"{number:<5}" + "".join(f"{word:>15}" for word in words))
    for name, count_CC in counts.items():
        extra = f"   (C {chosen:.2g})" if name == "linear" else ""
        right = 100 * count_CC.diag().sum() / count_CC.sum()
        print(f"{name:<15}{mean_iou(count_CC):6.2f} % mean IoU,{right:7.2f} % of pixels{extra}")


if __name__ == "__main__":
    main(sys.argv[1:])
