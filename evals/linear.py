"""How good are frozen features? Linear classifiers on them, as DINOv2 reports it; and their use.

    python -m evals.linear RUN                                 on the data of the run's config
    python -m evals.linear RUN data.root=/photos save=my.pt    another labelled folder; keep it
    python -m evals.linear predict my.pt FOLDER                label other images with it
    torchrun --nproc-per-node 8 -m evals.linear RUN            several processes

RUN is a run folder, a file of weights or a released name. Two methods on the same features: the
linear probe (probe.py: 52 classifiers at once) and logistic regression (logistic.py: one for each
strength of its penalty). Which of the candidates is best? The official probe asks the test images,
which flatters: of 52 tickets the luckiest. Here a tenth of the training images is held out and
chooses; then all training images train it again, and the test images are looked at once. The
official figure stands beside it. (DINOv2 appendix B.3.)

Differs from the official code, beside that choice: features are extracted once, from centre crops,
which a CPU can do; augment=true is the official way, new random crops in every iteration.

  iterations=12500   of the linear probe, as official; 0: no linear probe
  batch=128          images of an iteration, on all processes together (official: on each)
  augment=false      true: the backbone then computes 2 x iterations x batch images
  logistic=45        penalties that the logistic regression tries; 0: none
  untrained=false    true: an untrained network of this shape instead, as a floor
  save=              file for the best classifier, with its backbone
  seed=0             of the held-out images, the first weights and the order
Other keys override the config of the run, such as data.root=/photos or precision=fp32.

Shapes:  N training images   M test images   B batch   H candidates   C classes
         F features, columns: [CLS] after each of the last four blocks, then the mean patch
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import config
import data
from config import UserError
from evals import classifier as classifiers
from evals.classifier import BLOCKS, Classifier, features
from evals.crops import augmented_batches, positions
from evals.frozen import (
    KEYS,
    check_place,
    extract,
    labelled_images,
    open_network,
    tally,
    tell_damaged,
    untrained,
)
from evals.logistic import logistic_path, penalties
from evals.probe import Candidates, Probe, accuracies
from images.held_out import divide
from parallel import dtype_of, process_group, progress, ranks


class Setup(NamedTuple):
    """What both methods share: a network, images, features, options. A label below 0 is none."""

    backbone: torch.nn.Module
    train: object
    classes: list
    x_NF: Tensor
    label_N: Tensor
    x_MF: Tensor
    label_M: Tensor
    cfg: config.Config
    o: object
    device: torch.device


class Result(NamedTuple):
    """What a method reached, in percent, and its classifier."""

    method: str
    held_out: float
    test: float
    chosen: str  # in words
    best: float | None  # of its candidates on the test images: they choose, which is not honest
    weight_CF: Tensor  # trained on all training images
    bias_C: Tensor


# ---- features -----------------------------------------------------------------------------------


def feature_batches(s, rows):
    """Iterator of (features (B, F), rows (B,)) in an endless shuffle of these rows."""
    order = data.Order(len(rows), s.o.seed)
    for own in positions(s.o.iterations, s.o.batch, *ranks()):
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


# ---- methods: each trains candidates on some rows -----------------------------------------------


def linear_probe(s, rows, chosen=None):
    """All 52, whichever was chosen: the official figure wants them."""
    blocks, dim = min(BLOCKS, s.backbone.depth), s.backbone.dim
    probe = Probe(len(s.classes), blocks, dim, s.o.batch, s.o.seed, s.device)
    batches = fresh_features(s, rows) if s.o.augment else feature_batches(s, rows)
    bar = progress(batches, desc="linear probe", total=s.o.iterations)
    for step, (x_BF, row_B) in enumerate(bar):
        probe.step(x_BF, s.label_N[row_B.to(s.device)], step / s.o.iterations)
    return probe.heads


def logistic_regression(s, rows, chosen=None):
    """One for each penalty, or only for the chosen one; on [CLS] of the last block alone."""
    blocks, dim = min(BLOCKS, s.backbone.depth), s.backbone.dim
    last, rows = slice((blocks - 1) * dim, blocks * dim), rows.to(s.device)
    values = penalties(s.o.logistic)
    values = values if chosen is None else [values[chosen]]
    weight_HCD, bias_HC = logistic_path(s.x_NF[rows, last], s.label_N[rows], len(s.classes), values)
    weight_HCF = s.x_NF.new_zeros(*weight_HCD.shape[:2], s.x_NF.shape[1])
    weight_HCF[..., last] = weight_HCD
    names = [f"last 1 [CLS], C {value:.2g}" for value in values]
    return Candidates(names, weight_HCF, bias_HC.to(s.device))


def choose(s, method, train, kept, held):
    """The Result of a method: held-out images choose, all train, then come the test images."""
    early, own = train(s, kept), held.to(s.device)
    held_H = accuracies(early, s.x_NF[own], s.label_N[own])
    chosen = int(held_H.argmax())
    late = train(s, torch.cat((kept, held)).sort().values, chosen)
    at = late.names.index(early.names[chosen])
    test_H = accuracies(late, s.x_MF, s.label_M)
    best = test_H.max().item() if len(test_H) > 1 else None
    figures = held_H[chosen].item(), test_H[at].item(), late.names[at], best
    return Result(method, *figures, late.weight_HCF[at].clone(), late.bias_HC[at].clone())


# ---- the command --------------------------------------------------------------------------------

OPTIONS = {
    "iterations": 12_500, "batch": 128, "augment": False, "logistic": 45, "untrained": False,
    "save": "", "seed": 0,
}  # fmt: skip
HELD_OUT = 0.1


def read_setup(backbone, cfg, o, device):
    """The images with their labels and features, counted as eval_knn.py counts them."""
    train, test = labelled_images(cfg)
    found = []
    for source, what in (train, "training images"), (test, "test images"):
        x_NF, label_N = extract(lambda x: features(backbone, x), source, cfg, device, what)
        tell_damaged(source, label_N)
        found += [x_NF, label_N]
    x_NF, label_N, x_MF, label_M = found
    # Damaged images have a negative label. If all training images of a class are damaged, nothing
    # can find its test images.
    known_C = label_N[label_N >= 0].unique()
    asked_M = torch.isin(label_M, known_C)
    if len(known_C) < 2 or not asked_M.any():
        raise UserError("probes need readable images of two classes, and some to test on")
    if ranks()[0] == 0:
        names = [train.classes[c] for c in known_C.tolist()]
        print(tally(int((label_N >= 0).sum()), int(asked_M.sum()), names))
    labelled = train.classes, x_NF, label_N, x_MF[asked_M], label_M[asked_M]
    return Setup(backbone, train, *labelled, cfg, o, device)


def evaluate(s):
    """[Result] of both methods."""
    kept, held = map(torch.tensor, divide(s.label_N.cpu().numpy(), HELD_OUT, s.o.seed))
    if not len(held):
        raise UserError("no class has 3 training images, so none can be held out to choose")
    results = []
    if s.o.iterations:
        results.append(choose(s, "linear", linear_probe, kept, held))
    if s.o.logistic:
        results.append(choose(s, "logistic", logistic_regression, kept, held))
    return results


def print_results(results):
    """The figures, one line for each method."""
    print(f"{'method':<12}{'held out':>9}{'test':>9}   chosen")
    for r in results:
        print(f"{r.method:<12}{r.held_out:>7.2f} %{r.test:>7.2f} %   {r.chosen}")
    if results[0].best is not None:
        print(f"the best linear one on the test images, as official: {results[0].best:.2f} %")


@config.report_errors
def main(argv):
    if argv[:1] == ["predict"]:
        return classifiers.predict(argv[1:])
    run, words = config.main_arguments(argv, __doc__, KEYS)
    o, words = config.take_options(words, OPTIONS, {"batch": 1, "iterations": 0, "logistic": 0})
    if not o.iterations and not o.logistic:
        raise UserError("iterations=0 and logistic=0 leave nothing to do: set one above 0")
    backbone, cfg = open_network(run, words, o.batch)
    check_place("save", o.save)
    backbone = untrained(backbone, o.seed) if o.untrained else backbone
    with process_group(cfg) as device:
        s = read_setup(backbone.to(device), cfg, o, device)
        results = evaluate(s)
        if ranks()[0] == 0:
            print_results(results)
            if o.save:
                best = max(results, key=lambda r: r.held_out)
                classifier = Classifier(s.backbone, s.classes, best.weight_CF, best.bias_C)
                classifiers.save(classifier, cfg, o.save)
            if Path(run).is_dir() and not o.untrained:
                rows = [dict(list(r._asdict().items())[:-2]) for r in results]  # without weights
                config.replace_text(Path(run, "linear.json"), json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
