"""How good are frozen features? Linear classifiers on them, as DINOv2 reports it; and their use.

    python -m evals.linear RUN                                 on the data of the run's config
    python -m evals.linear RUN data.root=/photos save=my.pt    another labelled folder; keep it
    python -m evals.linear predict my.pt FOLDER                label other images with it

Two methods on the same features: the linear probe (probe.py: 52 classifiers at once) and logistic
regression (logistic.py: one for each strength of its penalty). Which of the candidates is best? The
official probe asks the test images, which flatters: of 52 tickets the luckiest. Here images that
are held out of the training set choose; then all training images train it again, and the test
images are looked at once. The official figure stands beside it. (DINOv2 appendix B.3.)

Differs from the official code, beside that choice: features are extracted once, from centre crops,
which a CPU can do; augment=true is the official way, new random crops in every iteration.

Shapes:  N training images   M test images   B batch   H candidates   C classes
         F features, columns: [CLS] after each of the last four blocks, then the mean patch
"""

import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import config
import data
from config import UserError
from evals import classifier as classifiers
from evals import labelled
from evals.classifier import BLOCKS, Classifier, Head, features
from evals.frozen import KEYS, extract, open_network, tally, tell_damaged, untrained
from evals.labelled import augmented_batches
from evals.logistic import logistic_path, penalties
from evals.probe import Candidates, Probe, accuracies
from images import evaluation
from images.held_out import UNKNOWN, divide
from parallel import dtype_of, process_group, progress, ranks


class Setup(NamedTuple):
    """What all methods share: a network, images, what is asked of them, features, options."""

    backbone: torch.nn.Module
    train: object
    test: object
    targets: list
    x_NF: Tensor
    x_MF: Tensor
    cfg: config.Config
    o: object
    device: torch.device


class Result(NamedTuple):
    """What a method reached on one target, in percent, and its classifiers."""

    target: str
    method: str
    held_out: float
    test: float
    chosen: str  # in words
    best: float | None  # of its candidates on the test images: they choose, which is not honest
    head: Head  # trained on all training images


# ---- features -----------------------------------------------------------------------------------


def feature_batches(s, rows):
    """Iterator of (features (B, F), rows (B,)) in an endless shuffle of these rows."""
    order = data.Order(len(rows), s.o.seed)
    for own in labelled.positions(s.o.iterations, s.o.batch, *ranks()):
        row_B = rows[[order[position] for position in own]]
        yield s.x_NF[row_B.to(s.device)], row_B


@torch.no_grad()
def fresh_features(s, rows):
    """The same, of new random crops: the official way, at the price of the backbone each time."""
    o = s.o
    crops = augmented_batches(
        s.train, rows, s.cfg, o.iterations, o.batch, s.device, o.seed, *ranks()
    )
    for image_BCSS, row_B in crops:
        yield features(s.backbone, image_BCSS.to(dtype_of(s.cfg))), row_B


# ---- methods: each trains candidates for every target on some rows ------------------------------


def linear_probe(s, rows, chosen=None):
    """All 52, whichever was chosen: the official figure wants them."""
    blocks, dim = min(BLOCKS, s.backbone.depth), s.backbone.dim
    probes = [Probe(len(t.classes), blocks, dim, s.o.batch, s.o.seed, s.device) for t in s.targets]
    batches = fresh_features(s, rows) if s.o.augment else feature_batches(s, rows)
    bar = progress(batches, desc="linear probe", total=s.o.iterations)
    for step, (x_BF, row_B) in enumerate(bar):
        for target, probe in zip(s.targets, probes, strict=True):
            probe.step(x_BF, target.train_N[row_B].to(s.device), step / s.o.iterations)
    return [probe.heads for probe in probes]


def logistic_regression(s, rows, chosen=None):
    """One for each penalty, or only for the chosen one; on [CLS] of the last block alone."""
    blocks, dim = min(BLOCKS, s.backbone.depth), s.backbone.dim
    last, found = slice((blocks - 1) * dim, blocks * dim), []
    for i, target in enumerate(s.targets):
        values = penalties(s.o.logistic)
        values = values if chosen is None else [values[chosen[i]]]
        own = rows[target.train_N[rows] >= 0]
        weight_HCD, bias_HC = logistic_path(
            s.x_NF[own.to(s.device), last], target.train_N[own], len(target.classes), values
        )
        weight_HCF = s.x_NF.new_zeros(*weight_HCD.shape[:2], s.x_NF.shape[1])
        weight_HCF[..., last] = weight_HCD
        names = [f"last 1 [CLS], C {value:.2g}" for value in values]
        found.append(Candidates(names, weight_HCF, bias_HC.to(s.device)))
    return found


def choose(s, method, train, kept, held):
    """[Result] of a method: held-out images choose, all train, then come the test images."""
    early, results = train(s, kept), []
    held_HT = [
        accuracies(candidates, s.x_NF[held.to(s.device)], target.train_N[held])
        for candidates, target in zip(early, s.targets, strict=True)
    ]
    chosen = [int(held_H.argmax()) for held_H in held_HT]
    late = train(s, torch.cat((kept, held)).sort().values, chosen)
    for i, (t, found) in enumerate(zip(s.targets, late, strict=True)):
        name = early[i].names[chosen[i]]
        at = found.names.index(name)
        test_H = accuracies(found, s.x_MF, t.test_M)
        head = Head(t.name, t.classes, found.weight_HCF[at].clone(), found.bias_HC[at].clone())
        best = test_H.max().item() if len(test_H) > 1 else None
        held_out, test = held_HT[i].max().item(), test_H[at].item()
        results.append(Result(t.name, method, held_out, test, name, best, head))
    return results


def best_heads(targets, results):
    """For each target the result that is best on the held-out images."""
    return [
        max((r for r in results if r.target == target.name), key=lambda r: r.held_out)
        for target in targets
    ]


# ---- the command --------------------------------------------------------------------------------

OPTIONS = {
    "iterations": 12_500, "batch": 128, "augment": False, "logistic": 45, "held_out": 0.1,
    "labels": "", "targets": "", "untrained": False, "save": "", "seed": 0,
}  # fmt: skip
LEAST = {"batch": 1, "iterations": 0, "logistic": 0}

USAGE = """
usage: python -m evals.linear RUN [option=value ...] [key=value ...]
       torchrun --nproc-per-node 8 -m evals.linear RUN ...           several processes
       python -m evals.linear predict CLASSIFIER FOLDER [out=labels.csv]

Trains classifiers on the frozen features of the backbone in RUN (a run folder or a file of weights)
and says how many test images they get right. Options:
  iterations=12500      of the linear probe, as official; 0: no linear probe
  batch=128             images of an iteration, on all processes together (official: on each)
  augment=false         true: a new random crop each time, as official; the backbone then computes
                        2 x iterations x batch images. false: one centre crop for each
  logistic=45           penalties that the logistic regression tries; 0: none
  held_out=0.1          share of the training images that choose the classifier
  labels=cars.csv       a CSV with columns path,make,colour: labels instead of class folders
  targets=make,colour   which of its columns; empty: all
  untrained=false       true: an untrained network of this shape instead, as a floor
  save=                 file for the best classifier, with its backbone
Keys override the config of the run, such as data.root=/photos or precision=fp32:
"""


def prepare(run, words):
    """(backbone, Config, options) of a command line, checked before anything starts."""
    o, words = config.take_options(words, OPTIONS, LEAST)
    backbone, cfg = open_network(run, words, o.batch)
    if not 0 < o.held_out < 1:
        raise UserError(f"held_out={o.held_out} must be above 0 and below 1")
    if o.save and not os.access(Path(o.save).absolute().parent, os.W_OK):
        raise UserError(f"save={o.save}: cannot be written; choose a folder that there is")
    if not o.iterations and not o.logistic:
        raise UserError("iterations=0 and logistic=0 leave nothing to do: set one above 0")
    return untrained(backbone, o.seed) if o.untrained else backbone, cfg, o


def read_setup(backbone, cfg, o, device):
    """The images with their labels and features. Damaged images lose their labels."""
    train, test, targets = labelled.labelled_images(cfg, o.labels, o.targets)
    found = []
    for source, what in (train, "training images"), (test, "test images"):
        x_NF, label_N = extract(lambda x: features(backbone, x), source, cfg, device, what)
        tell_damaged(source, label_N)
        found += [x_NF, label_N.cpu() == evaluation.DAMAGED]
    x_NF, bad_N, x_MF, bad_M = found
    for i, t in enumerate(targets):
        train_N = t.train_N.masked_fill(bad_N, UNKNOWN)
        targets[i] = t._replace(train_N=train_N, test_M=t.test_M.masked_fill(bad_M, UNKNOWN))
        labelled.check(targets[i])
        counts = [int((label >= 0).sum()) for label in targets[i][2:]]
        if ranks()[0] == 0:
            print(f"{t.name}: {tally(*counts, t.classes)}")
    return Setup(backbone, train, test, targets, x_NF, x_MF, cfg, o, device)


def evaluate(s):
    """([Result], the Classifier to keep)."""
    label_NT = torch.stack([target.train_N for target in s.targets], dim=1).numpy()
    kept, held = map(torch.tensor, divide(label_NT, s.o.held_out, s.o.seed))
    if not len(held):
        raise UserError("no class has 3 training images, so none can be held out to choose")
    results = []
    if s.o.iterations:
        results += choose(s, "linear", linear_probe, kept, held)
    if s.o.logistic:
        results += choose(s, "logistic", logistic_regression, kept, held)
    best = best_heads(s.targets, results)
    return results, Classifier(s.backbone, [result.head for result in best])


def print_results(results):
    """The figures, one line for each target and method."""
    print(f"{'target':<14}{'method':<12}{'held out':>9}{'test':>9}   chosen")
    for r in results:
        print(f"{r.target:<14}{r.method:<12}{r.held_out:>7.2f} %{r.test:>7.2f} %   {r.chosen}")
    for r in results:
        if r.method == "linear":
            words = "the best linear one on the test images, as official"
            print(f"{r.target:<14}{words}: {r.best:.2f} %")


@config.report_errors
def main(argv):
    if argv[:1] == ["predict"]:
        return classifiers.predict(argv[1:])
    run, words = config.main_arguments(argv, USAGE, KEYS)
    backbone, cfg, o = prepare(run, words)
    with process_group(cfg) as device:
        s = read_setup(backbone.to(device), cfg, o, device)
        results, classifier = evaluate(s)
        if ranks()[0] == 0:
            print_results(results)
            if o.save:
                classifiers.save(classifier, cfg, o.save)
                print(f"classifier: {o.save}")
            if Path(run).is_dir() and not o.untrained:
                path = Path(run, "linear.json")
                rows = [dict(list(r._asdict().items())[:-1]) for r in results]  # without the head
                with config.writing(path):
                    path.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
