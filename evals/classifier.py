"""A classifier in one file: a backbone, an optional small neck, and a linear head for each target.

    classifier = load("birds.pt")
    logits = classifier(images)                 # [(B, classes of the target)], normalised images
    python -m evals.linear predict birds.pt FOLDER

Heads come from a linear probe. They can be trained further together with the last blocks of the
backbone, and with a neck: two convolutions over the patch tokens, for what is too fine or too local
for [CLS]. Heads that come from the probe do not tear at good features, as new ones would (Kumar et
al. 2022, "Fine-Tuning can Distort Pretrained Features"). Files are read with weights_only: they
hold no code.

Shapes:  B images   D width of the backbone   F = (blocks + 1) * D features   K channels of the neck
         N patches   h, w of them in a column, in a row
"""

import csv
import math
import os
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import config
import data
from config import UserError
from evals.labelled import Numbered, augmented_batches
from images.sources import open_files
from parallel import dtype_of, in_order, pick_device, progress, ranks, sum_over_ranks, warn
from vit import VisionTransformer
from weights import checkpoint

BLOCKS = 4  # whose [CLS] tokens are features: the last ones
NEW = 10  # learning rate of heads and neck, as a multiple of that of the backbone
KIND = "nanoDINOv2 classifier 1"


class Head(NamedTuple):
    """A linear classifier on the F features."""

    target: str
    classes: list
    weight_CF: Tensor
    bias_C: Tensor


def tokens(backbone, image_BCHW):
    """[(patches (B, N, D), [CLS] (B, D))] after each of the last blocks, normalised."""
    blocks = min(BLOCKS, backbone.depth)
    return backbone.get_intermediate_layers(image_BCHW, blocks, return_class_token=True)


def features(layers):
    """(B, F) fp32: [CLS] after each of these blocks, then the mean patch token of the last."""
    parts = [cls_BD for _, cls_BD in layers] + [layers[-1][0].mean(dim=1)]
    return torch.cat(parts, dim=1).float()


@torch.no_grad()
def extract(backbone, source, cfg, device, what):
    """Features (N, F) fp32 of the centre crops of a source, and which images are damaged (N,).

    Each rank works on its share; all of them get all. A damaged image has the features of another.
    """
    rank, world = ranks()
    found, rows = [], []
    batches = data.evaluation_batches(Numbered(source), cfg, device=device, rank=rank, world=world)
    with progress(total=len(source), desc=what, unit=" images") as bar:
        for image_BCHW, row_B in batches:
            found.append(features(tokens(backbone, image_BCHW.to(dtype_of(cfg)))))
            rows.append(row_B.to(device))
            bar.update(len(row_B) * world)
    x_NF, row_N = (in_order(torch.cat(parts))[: len(source)] for parts in (found, rows))
    return x_NF, row_N.cpu() != torch.arange(len(source))


class Neck(nn.Module):
    """Patch tokens -> (B, K): two convolutions, then for each channel the strongest place."""

    def __init__(self, dim, channels):
        super().__init__()
        self.first = nn.Conv2d(dim, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, patch_BDhw):
        x = F.gelu(self.first(patch_BDhw))
        # The maximum, as a mean over all patches would drown what is small.
        return self.second(x).amax(dim=(2, 3))


class Classifier(nn.Module):
    """Normalised images (B, C, H, W) -> one (B, classes) fp32 tensor of logits for each head."""

    def __init__(self, backbone, heads, neck=0):
        super().__init__()
        self.backbone = backbone
        self.neck = Neck(backbone.dim, neck) if neck else None
        self.targets = [(head.target, head.classes) for head in heads]
        self.heads = nn.ModuleList()
        for head in heads:
            wide, classes = head.weight_CF.shape[1] + neck, len(head.classes)
            linear = nn.Linear(wide, classes, device=head.weight_CF.device)
            with torch.no_grad():  # the neck starts without a say
                linear.weight.copy_(F.pad(head.weight_CF, (0, neck)))
                linear.bias.copy_(head.bias_C)
            self.heads.append(linear)

    def forward(self, image_BCHW):
        layers = tokens(self.backbone, image_BCHW)
        x_BF = features(layers)
        if self.neck is not None:
            rows = image_BCHW.shape[2] // self.backbone.patch
            patch_BDhw = layers[-1][0].float().transpose(1, 2).unflatten(2, (rows, -1))
            x_BF = torch.cat((x_BF, self.neck(patch_BDhw)), dim=1)
        return [head(x_BF) for head in self.heads]


# ---- training -----------------------------------------------------------------------------------


def finetune(classifier, source, labels, rows, cfg, o, device):
    """Train heads, neck and the last `o.finetune` blocks on random crops of some rows; in place.

    labels  (N,) for each head; -1 counts for nothing
    AdamW with a cosine to zero; the backbone learns at o.tune_lr, what is new ten times as fast.
    """
    rank, world = ranks()
    groups = trainable(classifier, o.finetune, o.tune_lr)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    parameters = [p for group in groups for p in group["params"]]
    batches = augmented_batches(
        source, rows, cfg, o.tune_iterations, o.batch, device, o.seed, rank, world
    )
    bar = progress(batches, desc="fine-tuning", total=o.tune_iterations)
    for step, (image_BCSS, row_B) in enumerate(bar):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * (1 + math.cos(math.pi * step / o.tune_iterations)) / 2
        logits = classifier(image_BCSS.to(dtype_of(cfg)))
        loss = sum(
            mean_over_ranks(logit_BC, label_N[row_B].to(device))
            for logit_BC, label_N in zip(logits, labels, strict=True)
        )
        optimizer.zero_grad()
        loss.backward()
        for p in parameters:
            sum_over_ranks(p.grad)
        optimizer.step()
    return classifier


def mean_over_ranks(logit_BC, label_B):
    """Cross-entropy of the labelled images, as this rank's part of the mean over all ranks."""
    count = sum_over_ranks((label_B >= 0).sum()).clamp(min=1)
    return F.cross_entropy(logit_BC, label_B, ignore_index=-1, reduction="sum") / count


def trainable(classifier, blocks, lr):
    """Freeze everything but heads, neck, and the last blocks with the final norm; the groups."""
    backbone = classifier.backbone.requires_grad_(False)
    last = [*backbone.blocks[len(backbone.blocks) - blocks :], backbone.norm] if blocks else []
    new = [classifier.heads] + ([classifier.neck] if classifier.neck is not None else [])
    groups = []
    for modules, peak in (last, lr), (new, NEW * lr):
        own = [p for module in modules for p in module.requires_grad_(True).parameters()]
        groups.append({"params": own, "peak": peak})
    return groups


@torch.no_grad()
def percentages(classifier, source, labels, cfg, device):
    """How many of the labelled images (centre crops) it gets right, for each target: [percent]."""
    rank, world = ranks()
    batches = data.evaluation_batches(source, cfg, device=device, rank=rank, world=world)
    guesses = []
    for image_BCSS, _ in batches:
        logits = classifier(image_BCSS.to(dtype_of(cfg)))
        guesses.append(torch.stack([logit_BC.argmax(dim=1) for logit_BC in logits], dim=1))
    guess_NT = in_order(torch.cat(guesses))[: len(source)].cpu()
    right = [guess_N[x >= 0] == x[x >= 0] for guess_N, x in zip(guess_NT.T, labels, strict=True)]
    return [100 * own.float().mean().item() for own in right]


# ---- files --------------------------------------------------------------------------------------


def save(classifier, cfg, path):
    """Write a classifier with its backbone, and how its images are prepared, to one file."""
    state = {
        "kind": KIND,
        "config": config.to_dict(cfg),
        "backbone": architecture(classifier.backbone),
        "neck": classifier.neck.first.out_channels if classifier.neck is not None else 0,
        "targets": [[name, list(classes)] for name, classes in classifier.targets],
        "state": {name: value.cpu() for name, value in classifier.state_dict().items()},
    }
    try:
        checkpoint.write_file(path, lambda file: torch.save(state, file))
    except (OSError, RuntimeError) as error:
        raise UserError(f"save={path}: cannot be written ({checkpoint.reason(error)})") from None


def architecture(backbone):
    """Arguments of VisionTransformer that give this network, whatever file it came from."""
    block = backbone.blocks[0]
    ffn = "swiglu" if hasattr(block.mlp, "w12") else "mlp"
    return {
        "size": [backbone.dim, backbone.depth, block.attn.heads, ffn],
        "patch": backbone.patch,
        "image_size": round((backbone.pos_embed.shape[1] - 1) ** 0.5) * backbone.patch,
        "channels": backbone.patch_embed.proj.in_channels,
        "registers": backbone.registers,
        "layerscale": backbone.layerscale,
        "interpolate_offset": backbone.interpolate_offset,
        "interpolate_antialias": backbone.interpolate_antialias,
    }


def load(path, with_config=False):
    """The Classifier of a file, in eval mode; with_config: and the Config of its images."""
    found = {} if os.path.isdir(path) else checkpoint.read(path)
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise UserError(f"{path}: not a classifier; evals.linear RUN save=FILE writes one")
    cfg = config.from_dict(found["config"], str(path))
    backbone = VisionTransformer(**found["backbone"])
    wide = backbone.dim * (min(BLOCKS, backbone.depth) + 1)
    heads = [
        Head(name, classes, torch.zeros(len(classes), wide), torch.zeros(len(classes)))
        for name, classes in found["targets"]
    ]
    classifier = Classifier(backbone, heads, found["neck"])
    try:
        classifier.load_state_dict(found["state"])
    except RuntimeError as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    classifier.eval()
    return (classifier, cfg) if with_config else classifier


# ---- use ----------------------------------------------------------------------------------------


@torch.no_grad()
def predictions(classifier, source, cfg, device):
    """For every image in order: a tensor of probabilities for each target, or None if damaged."""
    at = 0
    for image_BCSS, row_B in data.evaluation_batches(Numbered(source), cfg, device=device):
        logits = classifier(image_BCSS.to(dtype_of(cfg)))
        probabilities = [logit_BC.softmax(dim=1).cpu() for logit_BC in logits]
        for i, row in enumerate(row_B.tolist()):
            yield [p_BC[i] for p_BC in probabilities] if row == at else None
            at += 1


def csv_row(name, targets, probabilities):
    """path, then for each target the class, its probability, and that of every class."""
    row = [name]
    for (_, classes), p_C in zip(targets, probabilities, strict=True):
        row += [classes[int(p_C.argmax())], f"{p_C.max():.4f}", *(f"{p:.4f}" for p in p_C)]
    return row


PREDICT_USAGE = """
usage: python -m evals.linear predict CLASSIFIER FOLDER [out=labels.csv] [key=value ...]

Labels the images of FOLDER (or of a list or tar shards) with a classifier that evals/linear.py has
saved. Writes a CSV: path, class and probability for each target, and the probability of each class.
Keys override the config of the classifier, such as device=cpu or data.workers=0:
"""


def predict(argv):
    """Label the images of a folder with a saved classifier, into a CSV."""
    path, words = config.main_arguments(argv, PREDICT_USAGE)
    if not words or "=" in words[0]:
        raise UserError("FOLDER is missing: write evals/linear.py predict CLASSIFIER FOLDER")
    o, overrides = config.take_options(words[1:], {"out": "labels.csv"})
    classifier, cfg = load(path, with_config=True)
    config.override(cfg, overrides)
    config.check(cfg)
    device = pick_device(cfg.device)
    source = open_files(words[0], cfg.data.channels)
    head = ["path"]
    for name, classes in classifier.targets:
        head += [name, f"{name} probability", *(f"{name}: {word}" for word in classes)]
    damaged = 0
    how = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}
    with config.writing(f"out={o.out}"), open(o.out, "w", **how) as file:
        rows = csv.writer(file)
        rows.writerow(head)
        found = predictions(classifier.to(device), source, cfg, device)
        for i, probabilities in enumerate(progress(found, desc="images", total=len(source))):
            damaged += probabilities is None
            if probabilities is not None:
                rows.writerow(csv_row(source.name(i), classifier.targets, probabilities))
    if damaged:
        warn(f"{damaged} damaged images are left out")
    print(f"{len(source) - damaged} images labelled: {o.out}")
