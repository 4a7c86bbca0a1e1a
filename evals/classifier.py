"""A classifier in one file: a backbone, and a linear head on its features.

    classifier = load("birds.pt")
    logits = classifier(images)                 # (B, classes), of normalised images
    python -m evals.linear predict birds.pt FOLDER [out=labels.csv] [key=value ...]

The head comes from `evals.linear RUN save=birds.pt`. The command labels the images of FOLDER (or of
a list, shards, an array) into a CSV: path, class, its probability, and that of every class. Keys
override the config of the classifier, such as device=cpu or data.workers=0.

Shapes:  B images   D width of the backbone   F = (blocks + 1) * D features   N images of a source
"""

import csv
from pathlib import Path

import torch
from torch import nn

import config
from config import UserError
from evals.frozen import check_place, extract, run_and_folder, settle, tell_damaged
from images.evaluation import DAMAGED
from images.sources import open_source
from parallel import counted, pick_device
from weights.export import write_weights
from weights.load import beyond_shapes, contents, evaluation_config, network_of

BLOCKS = 4  # whose [CLS] tokens are features: the last ones


def features(backbone, image_BCHW):
    """(B, F) fp32: [CLS] after each of the last blocks, then the mean patch token of the last."""
    blocks = min(BLOCKS, backbone.depth)
    layers = backbone.get_intermediate_layers(image_BCHW, blocks, return_class_token=True)
    parts = [cls_BD for _, cls_BD in layers] + [layers[-1][0].mean(dim=1)]
    return torch.cat(parts, dim=1).float()


class Classifier(nn.Module):
    """Normalised images (B, C, H, W) -> logits (B, classes), fp32."""

    def __init__(self, backbone, classes, weight_CF, bias_C):
        super().__init__()
        self.backbone, self.classes = backbone, list(classes)
        self.classifier = nn.Linear(*weight_CF.T.shape, device=weight_CF.device)
        self.classifier.load_state_dict({"weight": weight_CF, "bias": bias_C})

    def forward(self, image_BCHW):
        return self.classifier(features(self.backbone, image_BCHW))


# ---- files --------------------------------------------------------------------------------------


def save(classifier, cfg, path):
    """Write a classifier with its backbone, and how its images are prepared, to one file."""
    about = beyond_shapes(classifier.backbone, cfg) | {"classes": classifier.classes}
    state = {name: value.cpu() for name, value in classifier.state_dict().items()}
    with config.writing(f"save={path}"):
        print(f"classifier: {write_weights(state, Path(path), about)}")


def load(path, with_config=False):
    """The Classifier of a file, in eval mode; with_config: and the Config of its images."""
    parts, about = contents(Path(path))
    if "classifier" not in parts or "classes" not in about:
        raise UserError(f"{path}: not a classifier; evals.linear RUN save=FILE writes one")
    backbone, known = network_of(parts["backbone"], path, about)
    weight_CF, bias_C = (parts["classifier"][name] for name in ("weight", "bias"))
    classifier = Classifier(backbone, about["classes"], weight_CF, bias_C).eval()
    cfg = evaluation_config(known, about["images"], path)
    return (classifier, cfg) if with_config else classifier


# ---- use ----------------------------------------------------------------------------------------


def predict(argv):
    """Label the images of a folder with a saved classifier, into a CSV."""
    path, folder, words = run_and_folder(argv, __doc__)
    o, overrides = config.take_options(words, {"out": "labels.csv"})
    check_place("out", o.out)
    classifier, cfg = load(path, with_config=True)
    settle(cfg, overrides, classifier.backbone, path)
    device, source = pick_device(cfg.device), open_source(folder, cfg, "", key="FOLDER")
    classifier.to(device)

    classify = nn.Sequential(classifier, nn.Softmax(dim=1))
    p_NC, label_N = extract(classify, source, cfg, device, "images", "cpu")
    tell_damaged(source, label_N)
    classes, readable = classifier.classes, (label_N != DAMAGED).nonzero().flatten().tolist()
    how = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}
    with config.writing(f"out={o.out}"), open(o.out, "w", **how) as file:
        rows = csv.writer(file)
        rows.writerow(["path", "class", "class probability", *(f"class: {c}" for c in classes)])
        for i in readable:
            words = (f"{p:.4f}" for p in (p_NC[i].max(), *p_NC[i]))
            rows.writerow([source.name(i), classes[int(p_NC[i].argmax())], *words])
    print(f"{counted(len(readable), 'image')} labelled: {o.out}")
