"""What do single patches know? Segmentation from frozen patch tokens, with mean IoU.

    python -m evals.dense RUN FOLDER        FOLDER/images/x.jpg and FOLDER/masks/x.png
    python -m evals.dense draw FOLDER       such a folder to try it on, drawn by the program

A mask is a PNG whose pixels (palette or grey) are numbers of classes; 255 is not counted. FOLDER
may hold train/ and val/ with images/ and masks/ each; otherwise every fifth image is a test image.
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
import data
from config import UserError
from eval_knn import knn_probabilities, untrained
from evals.logistic import logistic_path, penalties
from images import synthetic
from images.reader import PICTURES, read_image
from parallel import dtype_of, pick_device, progress
from weights.load import load_backbone

IGNORED = 255

# ---- images and masks ---------------------------------------------------------------------------


def splits(folder):
    """([(image, mask)] to learn from, [(image, mask)] to test with), paths."""
    folder = Path(folder)
    if (folder / "train").is_dir():
        held_out = folder / ("val" if (folder / "val").is_dir() else "test")
        return pairs(folder / "train"), pairs(held_out)
    found = pairs(folder)
    if len(found) < 5:
        raise UserError(f"{folder}: {len(found)} images; at least 5 are needed to test on one")
    return [p for i, p in enumerate(found) if i % 5], found[::5]


def pairs(folder):
    """[(image, mask)] of a folder with images/ and masks/, by name without the ending."""
    for name in ("images", "masks"):
        if not (folder / name).is_dir():
            raise UserError(f"{folder / name}: no such folder; images/x.jpg goes with masks/x.png")
    images = sorted(p for p in (folder / "images").iterdir() if p.suffix.lower() in PICTURES)
    if not images:
        raise UserError(f"{folder / 'images'}: no images")
    found = [(image, folder / "masks" / f"{image.stem}.png") for image in images]
    for image, mask in found:
        if not mask.exists():
            raise UserError(f"{mask}: no such file; {image.name} needs a mask, or must go")
    return found


def read_mask(image, mask):
    """Numbers of classes (H, W) uint8. Raises UserError if it is no mask of this image."""
    try:
        with Image.open(mask, formats=["PNG"]) as picture:
            if picture.mode not in ("P", "L", "1"):
                raise UserError(
                    f"{mask}: a {picture.mode} picture; save classes as palette or 8-bit grey"
                )
            classes_HW = np.asarray(picture).astype(np.uint8)
        height, width = read_image(image, None).shape[:2]
    except (OSError, ValueError) as error:
        raise UserError(f"{mask} or {image}: cannot be read ({error})") from None
    if classes_HW.shape != (height, width):
        rows, columns = classes_HW.shape
        raise UserError(
            f"{mask}: {columns} x {rows} pixels, but {image.name} has {width} x {height}: "
            "save it in the size of its image"
        )
    return classes_HW


def count_classes(train, test):
    """How many classes there are. Raises UserError if one is to be found that is never shown."""
    train, test = (
        set().union(*(np.unique(read_mask(*pair)).tolist() for pair in part)) - {IGNORED}
        for part in (train, test)
    )
    if test - train:
        raise UserError(
            f"class {min(test - train)} is in the test masks but in no training mask: add images "
            f"that show it, or call it {IGNORED}"
        )
    return max(train) + 1


# ---- patches ------------------------------------------------------------------------------------


@torch.no_grad()
def patch_tokens(backbone, image, size, cfg, device):
    """Patch tokens (h, w, D) fp32 of an image whose shorter side is reduced to `size` px.

    Both sides are rounded to whole patches.
    """
    pixels_HWC = read_image(image, cfg.data.channels)
    patch, short = cfg.vit.patch, min(pixels_HWC.shape[:2])
    scale = min(size / short, 1)
    h, w = (max(round(side * scale / patch), 1) for side in pixels_HWC.shape[:2])
    x_CHW = torch.tensor(data.resize(pixels_HWC, h * patch, w * patch)).permute(2, 0, 1)
    x_CHW = data.normalised(x_CHW, cfg.data.mean, cfg.data.std)
    x_BCHW = x_CHW[None].to(device, dtype_of(cfg))
    return backbone.forward_features(x_BCHW)["x_norm_patchtokens"][0].float().unflatten(0, (h, w))


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
        share_NC = patch_classes(read_mask(image, mask), *x_hwD.shape[:2], classes)
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
        x_hwD, truth_HW = extract(image), torch.tensor(read_mask(image, mask)).long()
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
    "size": 448, "neighbours": 20, "values": 12, "patches": 100_000, "random": False, "seed": 0,
}  # fmt: skip

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
  random=false     true: an untrained network of this shape instead, as a floor
Keys override the config of the run, such as precision=fp32:
"""


def evaluate(extract, folder, o):
    """({method: (C, C) pixels of the test images}, the penalty that was chosen)."""
    train, test = splits(folder)
    classes = count_classes(train, test)
    print(f"{len(train)} training, {len(test)} test images, {classes} classes")
    held = train[::5]
    kept = [pair for i, pair in enumerate(train) if i % 5]
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
    run, words = config.main_arguments(argv, USAGE)
    if not words or "=" in words[0]:
        raise UserError("FOLDER is missing: write evals/dense.py RUN FOLDER")
    folder, (o, words) = words[0], config.take_options(words[1:], OPTIONS)
    if run == "draw":
        with config.writing(folder):
            return draw(folder)
    for key in ("size", "neighbours", "values", "patches"):
        if getattr(o, key) < 1:
            raise UserError(f"{key}={getattr(o, key)} must be at least 1")
    backbone, cfg = load_backbone(run, with_config=True)
    config.override(cfg, words)
    config.check(cfg)
    device = pick_device(cfg.device)
    if o.random:
        backbone = untrained(backbone, o.seed)
    backbone.to(device)
    counts, chosen = evaluate(
        lambda image: patch_tokens(backbone, image, o.size, cfg, device), folder, o
    )
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
