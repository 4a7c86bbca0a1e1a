"""What do single patches know? Segmentation from frozen patch tokens, with mean IoU.

    python -m evals.dense RUN FOLDER        FOLDER/images/x.jpg and FOLDER/masks/x.png

RUN is a run folder, a file of weights or a released name. A mask is a PNG whose pixels (palette or
grey) are numbers of classes; 255 is not counted. FOLDER may hold train/ and val/ with images/ and
masks/ each; else a random fifth is tested.
A logistic regression on patch tokens is the layer; held-out images choose its penalty. Its scores
are enlarged to the size of the mask (bilinear), and the class with the highest one wins.
    IoU of a class = pixels that are it and are called it / pixels that are it or are called it
counted over all test images together; the mean is over the classes that occur.
(DINOv2 section 7.4. Differs from the official code, which trains batch norm and a linear layer for
40,000 steps of mmsegmentation: here the same kind of layer is brought to its optimum.)

  size=448          px, to which the shorter side of larger images is reduced
  untrained=false   true: an untrained network of this shape instead, as a floor
Other keys override the config of the run, such as precision=fp32.

Shapes:  H W pixels of a mask   h w patches   N patches   D channels   C classes
"""

import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import config
from config import UserError
from evals.frozen import open_network, run_and_folder, untrained
from evals.logistic import logistic_path, penalties
from images import evaluation
from images.reader import EXTENSIONS, read_image
from parallel import dtype_of, pick_device, progress

IGNORED = 255
PENALTIES = 12  # that are tried
PATCHES = 100_000  # to learn from, at most; drawn evenly from all images

# ---- images and masks ---------------------------------------------------------------------------


def splits(folder, channels=3):
    """(what to learn from, what to test with), each [(image, mask, its classes)]."""
    folder = Path(folder)
    if (folder / "train").is_dir():
        train, test = (checked(folder / part, channels) for part in ("train", "val"))
    else:
        train, test = fifth(checked(folder, channels))
    for part in train, test:
        if len(classes_of(part)) < 2:
            raise UserError(
                f"{folder}: the masks to learn from or to test with show fewer than two classes: "
                f"nothing to tell apart; {IGNORED} is not counted: save what it marks as 1"
            )
    return train, test


def fifth(found):
    """(the others, a random fifth of the images); no image goes that alone shows a class."""
    left, kept, held = Counter(c for *_, shown in found for c in shown), [], []
    for i in np.random.default_rng(0).permutation(len(found)):
        *_, shown = found[i]
        if len(held) < len(found) // 5 and all(left[c] > 1 for c in shown):
            held.append(found[i])
            left.subtract(shown)
        else:
            kept.append(found[i])
    if not held:
        raise UserError(f"{len(found)} images are too few to hold a fifth out: add some")
    return kept, held


def classes_of(found):
    return set().union(*(shown for _, _, shown in found))


def checked(folder, channels):
    """[(image, mask, its classes)] of a folder with images/ and masks/, by name."""
    found = []
    images = [p for p in (folder / "images").glob("*") if p.suffix.lower() in EXTENSIONS]
    if not images:
        raise UserError(f"{folder / 'images'}: no images; images/x.jpg goes with masks/x.png")
    for image in progress(sorted(images), desc="masks"):
        mask = folder / "masks" / f"{image.stem}.png"
        classes_HW = read_mask(mask)
        try:
            height, width = read_image(image, channels, max_pixels=0).shape[:2]
        except Exception as error:  # of a decoder that was fed with anything
            raise UserError(f"{image}: cannot be read ({error}); take it away") from None
        if classes_HW.shape != (height, width):
            rows, columns = classes_HW.shape
            raise UserError(
                f"{mask}: {columns} x {rows} pixels, but {image.name} has {width} x {height}: "
                "save it in the size of its image"
            )
        found.append((image, mask, set(np.unique(classes_HW).tolist()) - {IGNORED}))
    return found


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


def gather(found, extract, classes):
    """Patch tokens (N, D) and shares of classes (N, C) of some images."""
    rng, tokens, shares = torch.Generator().manual_seed(0), [], []
    for image, mask, _ in progress(found, desc="training images"):
        x_hwD = extract(image)
        share_NC = patch_classes(read_mask(mask), *x_hwD.shape[:2], classes)
        known = share_NC.any(dim=1).nonzero().flatten()
        known = known[torch.randperm(len(known), generator=rng)[: max(PATCHES // len(found), 1)]]
        tokens.append(x_hwD.flatten(0, 1)[known.to(x_hwD.device)])
        shares.append(share_NC[known])
    return torch.cat(tokens), torch.cat(shares).to(tokens[0].device)


# ---- the layer ----------------------------------------------------------------------------------


def linear(x_ND, share_NC, values):
    """{penalty: patches (M, D) -> scores (M, C)}; a patch of two classes is learned as such."""
    found = zip(values, *logistic_path(x_ND, share_NC, share_NC.shape[1], values), strict=True)
    device = x_ND.device
    return {v: partial(F.linear, weight=w.to(device), bias=b.to(device)) for v, w, b in found}


def confusions(found, extract, models):
    """{penalty: (C, C) pixels of class (row) that are called class (column)} of such models.

    C is every number that a mask can hold: a class that was never learned has an IoU of 0.
    """
    counts = {value: torch.zeros(IGNORED, IGNORED, dtype=torch.long) for value in models}
    for image, mask, _ in progress(found, desc="test images"):
        x_hwD, truth_HW = extract(image), torch.tensor(read_mask(mask)).long()
        known = truth_HW != IGNORED
        for value, model in models.items():
            score_hwC = model(x_hwD.flatten(0, 1)).unflatten(0, x_hwD.shape[:2])
            score_1Chw, size = score_hwC.permute(2, 0, 1)[None], truth_HW.shape
            guess_1HW = F.interpolate(score_1Chw, size, mode="bilinear").argmax(dim=1).cpu()
            pair = truth_HW[known] * IGNORED + guess_1HW[0][known]
            counts[value] += pair.bincount(minlength=IGNORED**2).view(IGNORED, IGNORED)
    return counts


def ious(count_CC):
    """IoU of each class in percent, (C,); nan where there is nothing of it and none was claimed."""
    right, union = count_CC.diag(), count_CC.sum(dim=0) + count_CC.sum(dim=1) - count_CC.diag()
    return 100 * right / union  # 0 / 0 is nan


def mean_iou(count_CC):
    return ious(count_CC).nanmean().item()


# ---- the command --------------------------------------------------------------------------------


def evaluate(extract, folder, channels=3):
    """((C, C) pixels of the test images, the penalty that was chosen)."""
    train, test = splits(folder, channels)
    shown = classes_of(train)
    classes = max(shown) + 1
    print(f"{len(train)} training, {len(test)} test images, {len(shown)} classes")
    kept, held = fifth(train)
    early = linear(*gather(kept, extract, classes), penalties(PENALTIES))
    scores = confusions(held, extract, early)
    chosen = max(scores, key=lambda value: mean_iou(scores[value]))
    late = linear(*gather(train, extract, classes), [chosen])
    return confusions(test, extract, late)[chosen], chosen


@config.report_errors
def main(argv):
    run, folder, words = run_and_folder(argv, __doc__)
    o, words = config.take_options(words, {"size": 448, "untrained": False}, {"size": 1})
    backbone, cfg = open_network(run, words)
    device = pick_device(cfg.device)
    backbone = (untrained(backbone, 0) if o.untrained else backbone).to(device)
    extract = partial(patch_tokens, backbone, size=o.size, cfg=cfg, device=device)
    show(*evaluate(extract, folder, cfg.data.channels))


def show(count_CC, chosen):
    """IoU of every class that occurs, their mean, and the share of pixels that are right."""
    for number, value in enumerate(ious(count_CC).tolist()):
        if value == value:  # nan is not
            print(f"class {number:<4}{value:10.2f} %")
    right = 100 * count_CC.diag().sum() / count_CC.sum()
    print(f"mean IoU  {mean_iou(count_CC):10.2f} %   (penalty C {chosen:.2g})")
    print(f"pixels    {right:10.2f} %")


if __name__ == "__main__":
    main(sys.argv[1:])
