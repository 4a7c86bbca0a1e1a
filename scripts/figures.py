"""The pictures of the lessons, drawn from embedded images and from the functions they explain.

    python scripts/figures.py                 all that need no training -> docs/lessons/*.png
    python scripts/figures.py runs/default    and those of a trained network (lesson 10)

Shapes:  H W rows and columns of a picture   N images (or rows of scores)   K prototypes
         D features
"""

import math
import random
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from drawing import ROOT, VIEWS, arrow, box, fill, picture, put, save, shades

import augment
import config
import data
import losses
from attention import plain_attention
from dinov2 import build_network
from images import evaluation
from optim import schedules
from pictures.plot import BLUE, GREEN, GREY, INK, LIGHT, ORANGE, PAPER, Line, Page, mix, panel
from pictures.sheets import hide

# ---- one figure for each lesson -----------------------------------------------------------------


def pixels_to_tokens():
    page, image, patch = Page(900, 250), picture(1, 32), 8
    put(page, image, 20, 40, 160)
    page.text(20, 14, "image, 32 x 32 pixels", 13, GREY)
    page.text(230, 14, "16 patches of 8 x 8", 13, GREY)
    page.text(480, 14, "a row of 17 tokens: [CLS], then the patches in reading order", 13, GREY)
    arrow(page, 190, 120, 218, 120)
    arrow(page, 436, 120, 464, 120)
    for i in range(16):
        row, column = divmod(i, 4)
        part = image[row * patch :, column * patch :][:patch, :patch]
        put(page, part, 230 + column * 50, 24 + row * 50 + 16, 44)
        x = 502 + i * 23
        put(page, part, x, 60, 19)
        bar = np.abs(np.random.default_rng(i).normal(size=(8, 1)))
        arrow(page, x + 9.5, 84, x + 9.5, 102, head=4)
        put(page, shades(bar), x, 106, 19, 80, LIGHT)
    fill(page, 478, 106, 19, 80, ORANGE)
    page.text(478, 94, "[CLS]", 10, INK, "lm")
    page.text(
        478, 198, "each column: D numbers, W . (192 pixel values) + bias + position", 13, GREY
    )
    save(page, "01-pixels-to-tokens")


def attention():
    """Colours as queries and keys: nothing is learnt, yet patches find their like."""
    page, image = Page(900, 245), picture(20)
    grid = torch.tensor(image).float().unflatten(0, (24, 2)).unflatten(2, (24, 2)).mean((1, 3))
    colour_ND = F.normalize(grid.flatten(0, 1) / 255 - 0.35, dim=1)
    at = (17, 20)  # on a green disc
    query = at[0] * 24 + at[1]
    put(page, image, 20, 40, 180)
    box(page, 20 + at[1] * 7.5, 40 + at[0] * 7.5, 7.5, 7.5, PAPER)
    page.text(20, 14, "the patch that asks (white)", 13, GREY)
    for i, sharpness in enumerate([1, 4, 16]):
        q = colour_ND[None, None] * sharpness**0.5 * 3**0.25  # the function divides by sqrt(3)
        weight_NN = plain_attention(q, q, torch.eye(len(colour_ND))[None, None])[0, 0]
        row = weight_NN[query].unflatten(0, (24, 24))
        x = 240 + i * 220
        put(page, shades(row), x, 40, 180, frame=LIGHT)
        page.text(x, 14, f"its attention, queries x {sharpness}", 13, GREY)
        page.text(x, 232, f"largest weight {row.max():.3f}", 12, INK, "lm")
    save(page, "02-attention")


def two_views():
    cfg = config.load(ROOT / "config.yaml")
    page, image = Page(900, 330), picture(1)
    rng = random.Random(3)
    kinds = (augment.GLOBAL_1, augment.GLOBAL_2) + (augment.LOCAL,) * 4
    views = [augment.draw_view(rng, 48, 48, cfg, kind) for kind in kinds]
    put(page, image, 20, 40, 240)
    page.text(20, 14, "one image, six random boxes", 13, GREY)
    for view, colour in zip(views, VIEWS, strict=True):
        top, left, height, width = (n * 5 for n in view.box)
        box(page, 20 + left, 40 + top, width, height, colour, 3)
    page.text(310, 14, "the crops (flipped by chance)", 13, GREY)
    for i, (view, kind) in enumerate(zip(views, kinds, strict=True)):
        size = 16 if kind == augment.LOCAL else 32
        crop = augment.resized_crop(image, view.box, size).permute(1, 2, 0).numpy()
        crop = crop[:, ::-1] if view.flip else crop
        if i < 2:
            put(page, crop, 310 + i * 126, 40, 116, frame=VIEWS[i])
        else:
            put(page, crop, 310 + (i - 2) * 63, 176, 53, frame=VIEWS[i])
    page.text(310, 250, "large: 32 x 32, seen by both", 12, INK)
    page.text(310, 268, "small: 16 x 16, seen by the student", 12, INK)
    page.text(600, 14, "who predicts whom", 13, GREY)
    page.text(760, 48, "teacher", 12, INK, "mm")
    for t in range(2):
        fill(page, 706 + t * 60, 62, 50, 8, VIEWS[t])
    for s in range(6):
        y = 78 + s * 34
        fill(page, 688, y, 8, 26, VIEWS[s])
        for t in range(2):
            x = 706 + t * 60
            fill(page, x, y, 50, 26, LIGHT if s == t else mix(BLUE, PAPER, 0.75))
            words = "itself" if s == t else "yes"
            page.text(x + 25, y + 13, words, 12, GREY if s == t else INK, "mm")
    page.text(676, 180, "student", 12, INK, "rm")
    save(page, "03-two-views")


def sinkhorn():
    """48 rows of scores that like a few prototypes too much, and four ways to make targets."""
    page, temp = Page(900, 300), 0.1
    torch.manual_seed(0)
    score_NK = 0.12 * torch.randn(48, 16) + 0.25 * (torch.arange(16) == 5) - 0.1
    softmax = (score_NK / temp).softmax(dim=1)
    centred = ((score_NK - score_NK.mean(0)) / temp).softmax(dim=1)
    panels = [("softmax alone", softmax), ("softmax, centred", centred)]
    for n in (1, 3):
        words = f"Sinkhorn, {n} round{'s' * (n > 1)}"
        panels.append((words, losses.sinkhorn_knopp(score_NK, temp, n)))
    for i, (title, target_NK) in enumerate(panels):
        x = 20 + i * 222
        page.text(x, 14, title, 13, INK)
        put(page, shades(target_NK, BLUE, 0.8), x, 36, 192, 160, LIGHT)
        share_K = target_NK.mean(0)
        for k, share in enumerate(share_K.tolist()):
            height = min(share * 160, 60)
            fill(page, x + k * 12 + 1, 270 - height, 10, height, ORANGE if k == 5 else GREY)
        page.line([(x, 270 - 10), (x + 192, 270 - 10)], INK)  # 1 / 16
        page.text(x, 276, f"largest share {share_K.max():.3f}", 12, INK)
    page.text(20, 200, "rows: images, columns: prototypes; bars: share of each prototype", 11, GREY)
    save(page, "04-sinkhorn")


def masks():
    page, rng = Page(900, 262), random.Random(1)
    image = np.kron(picture(4, 112), np.ones((2, 2, 1), np.uint8))  # stripes need room
    page.text(20, 14, "blocks, as DINOv2 hides them", 13, GREY)
    page.text(690, 14, "the same number, one by one", 13, GREY)
    for i, share in enumerate([0.1, 0.23, 0.37, 0.5]):
        mask = augment.block_mask(14, 14, int(196 * share), rng)
        put(page, hide(image, mask), 20 + i * 160, 40, 150)
        page.text(20 + i * 160, 200, f"{mask.sum()} of 196 hidden", 12, INK)
    single = np.random.default_rng(0).permutation(196).reshape(14, 14) < 98
    put(page, hide(image, single), 690, 40, 150)
    page.text(690, 200, "98 of 196: neighbours give it away", 12, INK)
    page.text(
        20, 228, "The teacher sees the whole crop. The student has to say about each", 12, GREY
    )
    page.text(20, 244, "striped patch what the teacher says about it.", 12, GREY)
    save(page, "05-masks")


def koleo():
    """Forty points on a circle, pushed apart by the loss itself."""
    page = Page(900, 280)
    torch.manual_seed(0)
    angle = (0.5 * torch.randn(40) - 1).requires_grad_()
    optimizer, shown = torch.optim.SGD([angle], lr=0.02), {0: None, 20: None, 400: None}
    for step in range(401):
        x_BD = torch.stack((angle.cos(), angle.sin()), dim=1)
        loss = losses.koleo_loss(x_BD)
        if step in shown:
            nearest = torch.cdist(x_BD, x_BD).fill_diagonal_(9).amin(1).mean()
            shown[step] = x_BD.detach(), loss.item(), nearest.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for i, (step, (x_BD, loss, nearest)) in enumerate(shown.items()):
        x, y = 160 + i * 290, 140
        circle = [(x + 90 * math.cos(a), y + 90 * math.sin(a)) for a in np.linspace(0, 6.3, 90)]
        page.line(circle, LIGHT)
        for a, b in x_BD.tolist():
            page.dot(x + 90 * a, y + 90 * b, BLUE)
        page.text(x, y - 120, f"after {step} steps" if step else "at first", 13, INK, "mm")
        page.text(x, y - 8, f"loss {loss:.2f}", 13, INK, "mm")
        page.text(x, y + 10, f"mean distance {nearest:.3f}", 11, GREY, "mm")
    save(page, "06-koleo")


def schedule_curves():
    cfg = config.load(ROOT / "configs" / "vitl16.yaml")
    page = Page(900, 460)
    titles = {
        "lr": "learning rate",
        "last_layer_lr": "of the prototypes (first 5,000 steps)",
        "weight_decay": "weight decay",
        "momentum": "teacher momentum",
        "teacher_temp": "teacher temperature",
    }
    for i, (key, title) in enumerate(titles.items()):
        last = 5000 if key == "last_layer_lr" else cfg.steps
        steps = sorted({*range(0, last + 1, last // 100), 1249})
        points = [(step, getattr(schedules(step, cfg), key)) for step in steps]
        # In pieces, because panel() smooths long lines, and these have corners.
        lines = [Line("", VIEWS[i], dict(points[n : n + 40])) for n in range(0, len(points), 39)]
        row, column = divmod(i, 3)
        left, top = 20 + column * 295, 20 + row * 225
        panel(page, (left, top, left + 270, top + 200), title, lines, last)
    page.text(615, 300, "configs/vitl16.yaml, 125,000 steps", 13, GREY)
    save(page, "07-schedules")


def packing():
    """Which token may look at which, and which images a branch computes."""
    page = Page(900, 330)
    groups = [(2, 17), (4, 5)]  # two large crops of 32 px and four small ones of 16, patches of 8
    lengths = [T for B, T in groups for _ in range(B)]
    crop_M = np.repeat(np.arange(len(lengths)), lengths)
    allowed_MM = crop_M[:, None] == crop_M[None]
    page.text(20, 14, f"{len(crop_M)} tokens in one row: who looks at whom", 13, GREY)
    pixels = np.full((*allowed_MM.shape, 3), 240, np.uint8)
    for crop, colour in enumerate(VIEWS):
        here = allowed_MM & (crop_M[:, None] == crop)
        pixels[here] = list(bytes.fromhex(colour[1:]))
    put(page, pixels, 20, 40, 250, frame=LIGHT)
    share = allowed_MM.mean()
    page.text(20, 300, f"only {100 * share:.0f} % of all pairs are computed", 12, INK)
    page.text(
        330, 14, "stochastic depth 0.5, eight images: each branch draws its own four", 13, GREY
    )
    generator = torch.Generator().manual_seed(4)
    for branch in range(8):
        kept = set(torch.randperm(8, generator=generator)[:4].tolist())
        name = ("attention", "feed-forward")[branch % 2]
        page.text(440, 56 + branch * 30, f"block {branch // 2 + 1}, {name}", 12, INK, "rm")
        for image in range(8):
            colour = BLUE if image in kept else LIGHT
            fill(page, 456 + image * 48, 44 + branch * 30, 42, 22, colour)
            if image in kept:
                page.text(477 + image * 48, 55 + branch * 30, "x 2", 12, PAPER, "mm")
    page.text(456, 290, "Grey: not computed; the image passes unchanged.", 12, INK)
    save(page, "08-packing")


def many_gpus():
    """Who reads which image, and what each GPU stores of ViT-g's training."""
    page, cfg = Page(900, 300), config.load(ROOT / "config.yaml", ["batch=8"])
    page.text(20, 14, "8 images a step, on 1, 2 and 4 processes: the same images", 13, GREY)
    for i, world in enumerate((1, 2, 4)):
        for rank in range(world):
            for step, places in zip(range(3), data.positions(cfg, 0, rank, world), strict=False):
                for place in places:
                    x, y = 20 + step * 142 + place % 8 * 16, 62 + i * 74
                    fill(page, x, y, 14, 34, VIEWS[rank])
                    page.text(x + 7, y + 17, str(place), 9, PAPER, "mm")
        page.text(20, 52 + i * 74, f"{world} process{'es' * (world > 1)}", 12, INK, "lm")
    for step in range(3):
        page.text(20 + step * 142, 270, f"step {step}", 12, GREY)
    page.text(490, 14, "weights and moments of ViT-g in training, GiB a GPU", 13, GREY)
    parts = [("student, fp32", 4), ("gradient", 4), ("AdamW moments", 8), ("teacher", 4)]
    with torch.device("meta"):
        network = build_network(config.load(ROOT / "configs" / "vitg14.yaml"), student=True)
    gib = sum(p.numel() for p in network.parameters()) / 2**30  # of one byte per parameter
    for row, (title, share) in enumerate([("ddp, or 1 GPU", 1), ("fsdp, 8 GPUs", 8)]):
        x, y = 590, 60 + row * 70
        page.text(580, y + 15, title, 12, INK, "rm")
        for (_, size), colour in zip(parts, VIEWS, strict=False):
            width = 10 * size * gib / share
            fill(page, x, y, width, 30, colour)
            x += width
        page.text(x + 6, y + 15, f"{20 * gib / share:.1f}", 12, INK, "lm")
    for i, (title, size) in enumerate(parts):
        fill(page, 500 + i % 2 * 190, 210 + i // 2 * 26, 14, 14, VIEWS[i])
        page.text(520 + i % 2 * 190, 217 + i // 2 * 26, f"{title}: {size} bytes", 12, INK, "lm")
    save(page, "09-many-gpus")


@torch.no_grad()
def neighbours(run):
    """The nearest training images of a few test images: by pixels, untrained, trained."""
    from eval_knn import RawPixels, extract_features
    from images.evaluation import Part
    from parallel import materialize
    from weights.load import load_backbone

    trained, cfg = load_backbone(run, with_config=True)
    with torch.device("meta"):
        untrained = build_network(cfg, student=False)
    materialize(untrained, "cpu", cfg.seed)
    train, test = evaluation.labelled_images(cfg)
    train, test = Part(train, range(2000)), Part(test, [1, 6, 8])
    nets = {"pixels": RawPixels(), "untrained": untrained.backbone.eval(), "trained": trained}
    page = Page(900, 380)
    for n, (title, net) in enumerate(nets.items()):
        train_ND, _ = extract_features(net, train, cfg, torch.device("cpu"))
        test_MD, _ = extract_features(net, test, cfg, torch.device("cpu"))
        nearest_Mk = (test_MD @ train_ND.T).topk(4, dim=1).indices.tolist()
        page.text(140 + n * 255, 16, f"nearest by {title}", 13, GREY, "lm")
        for m, nearest in enumerate(nearest_Mk):
            y = 40 + m * 104
            put(page, test.read(m), 20, y, 84)
            for j, i in enumerate(nearest):
                right = train.label(i) == test.label(m)
                x, below = 140 + n * 255 + j * 60, y
                put(page, train.read(i), x, below, 54)
                fill(page, x, below + 58, 54, 6, GREEN if right else ORANGE)
    page.text(20, 16, "test image", 13, GREY, "lm")
    page.text(20, 360, "green: the same class (palette and glyph); orange: another", 12, INK, "lm")
    save(page, "10-neighbours")


FREE = [pixels_to_tokens, attention, two_views, sinkhorn, masks, koleo, schedule_curves, packing]
FREE += [many_gpus]

if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        sys.exit(__doc__)
    for figure in FREE:
        figure()
    for run in sys.argv[1:]:
        neighbours(run)
