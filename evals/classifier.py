"""A classifier in one file: a backbone, and a linear head for each target.

    classifier = load("birds.pt")
    logits = classifier(images)                 # [(B, classes of the target)], normalised images
    python -m evals.linear predict birds.pt FOLDER

Heads come from a linear probe. Files are read with weights_only: they hold no code.

Shapes:  B images   D width of the backbone   F = (blocks + 1) * D features   N images of a source
"""

import csv
import os
from typing import NamedTuple

import torch
from torch import Tensor, nn

import config
from config import UserError
from evals.frozen import KEYS, extract, settle, tell_damaged
from images.evaluation import DAMAGED
from images.sources import open_source
from parallel import counted, pick_device
from vit import VisionTransformer
from weights import checkpoint
from weights.load import architecture, beyond_shapes

BLOCKS = 4  # whose [CLS] tokens are features: the last ones
KIND = "nanoDINOv2 classifier 1"


class Head(NamedTuple):
    """A linear classifier on the F features."""

    target: str
    classes: list
    weight_CF: Tensor
    bias_C: Tensor


def features(backbone, image_BCHW):
    """(B, F) fp32: [CLS] after each of the last blocks, then the mean patch token of the last."""
    blocks = min(BLOCKS, backbone.depth)
    layers = backbone.get_intermediate_layers(image_BCHW, blocks, return_class_token=True)
    parts = [cls_BD for _, cls_BD in layers] + [layers[-1][0].mean(dim=1)]
    return torch.cat(parts, dim=1).float()


class Classifier(nn.Module):
    """Normalised images (B, C, H, W) -> one (B, classes) fp32 tensor of logits for each head."""

    def __init__(self, backbone, heads):
        super().__init__()
        self.backbone = backbone
        self.targets = [(head.target, head.classes) for head in heads]
        self.heads = nn.ModuleList()
        for head in heads:
            classes, wide = head.weight_CF.shape
            linear = nn.Linear(wide, classes, device=head.weight_CF.device)
            with torch.no_grad():
                linear.weight.copy_(head.weight_CF)
                linear.bias.copy_(head.bias_C)
            self.heads.append(linear)

    def forward(self, image_BCHW):
        x_BF = features(self.backbone, image_BCHW)
        return [head(x_BF) for head in self.heads]


# ---- files --------------------------------------------------------------------------------------


def save(classifier, cfg, path):
    """Write a classifier with its backbone, and how its images are prepared, to one file."""
    state = {
        "kind": KIND,
        "config": config.to_dict(cfg),
        "backbone": beyond_shapes(classifier.backbone),
        "targets": [[name, list(classes)] for name, classes in classifier.targets],
        "state": {name: value.cpu() for name, value in classifier.state_dict().items()},
    }
    try:
        checkpoint.write_file(path, lambda file: torch.save(state, file))
    except (OSError, RuntimeError) as error:
        raise UserError(f"save={path}: cannot be written ({checkpoint.reason(error)})") from None


def load(path, with_config=False):
    """The Classifier of a file, in eval mode; with_config: and the Config of its images."""
    found = {} if os.path.isdir(path) else checkpoint.read(path)
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise UserError(f"{path}: not a classifier; evals.linear RUN save=FILE writes one")
    cfg = config.from_dict(found["config"], str(path))
    parts = {name.partition(".")[::2]: value for name, value in found["state"].items()}
    state = {name: value for (part, name), value in parts.items() if part == "backbone"}
    backbone = VisionTransformer(**architecture(state, path, found["backbone"]))
    for module in backbone.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = found["backbone"].get("eps", module.eps)
    wide = backbone.dim * (min(BLOCKS, backbone.depth) + 1)
    heads = [
        Head(name, classes, torch.zeros(len(classes), wide), torch.zeros(len(classes)))
        for name, classes in found["targets"]
    ]
    classifier = Classifier(backbone, heads)
    try:
        classifier.load_state_dict(found["state"])
    except RuntimeError as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    classifier.eval()
    return (classifier, cfg) if with_config else classifier


# ---- use ----------------------------------------------------------------------------------------

PREDICT_USAGE = """
usage: python -m evals.linear predict CLASSIFIER FOLDER [out=labels.csv] [key=value ...]

Labels the images of FOLDER (or of a list, shards or an array) with a classifier that evals.linear
has saved. Writes a CSV: path, class and probability for each target, and that of each class.
Keys override the config of the classifier, such as device=cpu or data.workers=0:
"""


def predict(argv):
    """Label the images of a folder with a saved classifier, into a CSV."""
    path, words = config.main_arguments(argv, PREDICT_USAGE, KEYS)
    if not words or "=" in words[0]:
        raise UserError("FOLDER is missing: write evals.linear predict CLASSIFIER FOLDER")
    o, overrides = config.take_options(words[1:], {"out": "labels.csv"})
    classifier, cfg = load(path, with_config=True)
    settle(cfg, overrides, classifier.backbone, path)
    device, source = pick_device(cfg.device), open_source(words[0], cfg, "", key="FOLDER")
    classifier.to(device)

    def probabilities(image_BCHW):
        return torch.cat([logit_BC.softmax(dim=1) for logit_BC in classifier(image_BCHW)], dim=1)

    p_NC, label_N = extract(probabilities, source, cfg, device, "images", "cpu")
    tell_damaged(source, label_N)
    head = ["path"]
    for name, classes in classifier.targets:
        head += [name, f"{name} probability", *(f"{name}: {word}" for word in classes)]
    readable = (label_N != DAMAGED).nonzero().flatten().tolist()
    how = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}
    with config.writing(f"out={o.out}"), open(o.out, "w", **how) as file:
        rows = csv.writer(file)
        rows.writerow(head)
        for i in readable:
            rows.writerow([source.name(i), *answers(classifier.targets, p_NC[i])])
    print(f"{counted(len(readable), 'image')} labelled: {o.out}")


def answers(targets, p_C):
    """For each target the class, its probability, and that of every class."""
    words = []
    for (_, classes), own in zip(targets, p_C.split([len(c) for _, c in targets]), strict=True):
        words += [classes[int(own.argmax())], f"{own.max():.4f}", *(f"{p:.4f}" for p in own)]
    return words
