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
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

import augment
import config
import data
from config import UserError
from evals import classifier as classifiers
from evals.classifier import BLOCKS, Classifier, features
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
from images.evaluation import Part, divide, normalised
from images.sources import by_workers, read_or_next
from parallel import dtype_of, process_group, progress, ranks

OPTIONS = {
    "iterations": 12_500, "batch": 128, "augment": False, "logistic": 45, "untrained": False,
    "save": "", "seed": 0,
}  # fmt: skip
HELD_OUT = 0.1

# ---- features -----------------------------------------------------------------------------------


def positions(o):
    """The positions of this rank in an endless shuffle of the rows, iteration by iteration."""
    rank, world = ranks()
    return [range(i * o.batch + rank, (i + 1) * o.batch, world) for i in range(o.iterations)]


def feature_batches(s, rows):
    """Iterator of (features (B, F), rows (B,)) in an endless shuffle of these rows."""
    order = data.Order(len(rows), s.o.seed)
    for own in positions(s.o):
        row_B = rows[[order[position] for position in own]]
        yield s.x_NF[row_B.to(s.device)], row_B


@torch.no_grad()
def fresh_features(s, rows):
    """The same, of new random crops: the official way, at the price of the backbone each time."""
    crops = RandomCrops(s.train, rows.tolist(), s.cfg.crops.global_size, s.o.seed)
    for image_BCSS, row_B in by_workers(crops, s.cfg, batch_sampler=positions(s.o)):
        image_BCSS = image_BCSS.to(s.device, non_blocking=True)
        image_BCSS = normalised(image_BCSS, s.cfg.data.mean, s.cfg.data.std)
        yield features(s.backbone, image_BCSS.to(dtype_of(s.cfg))), row_B


class RandomCrops:
    """Position in an endless shuffle of some rows of a source -> (crop (C, S, S), row).

    The official augmentation of a probe: a crop of 8 to 100 % of the area, and flips.
    """

    def __init__(self, source, rows, size, seed):
        self.part, self.rows, self.size, self.seed = Part(source, rows), rows, size, seed
        self.order = data.Order(len(rows), seed)

    def __getitem__(self, position):
        image, at, _ = read_or_next(self.part, self.order[position])
        rng = random.Random(f"{self.seed} crop {position}")
        box = augment.draw_box(rng, *image.shape[:2], scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
        crop_CSS = augment.resized_crop(image, box, self.size)
        crop_CSS = crop_CSS.flip(2) if rng.random() < 0.5 else crop_CSS
        return crop_CSS.contiguous(), self.rows[at]


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
    """(figures in percent, weights (C, F) and biases (C,) of the classifier) of a method.

    Held-out images choose, all train, then come the test images. `best` of the candidates lets the
    test images choose, which is not honest.
    """
    early, own = train(s, kept), held.to(s.device)
    held_H = accuracies(early, s.x_NF[own], s.label_N[own])
    chosen = int(held_H.argmax())
    late = train(s, torch.cat((kept, held)).sort().values, chosen)
    at = late.names.index(early.names[chosen])
    test_H = accuracies(late, s.x_MF, s.label_M)
    figures = {
        "method": method,
        "held_out": held_H[chosen].item(),
        "test": test_H[at].item(),
        "chosen": late.names[at],
        "best": test_H.max().item() if len(test_H) > 1 else None,
    }
    return figures, late.weight_HCF[at].clone(), late.bias_HC[at].clone()


# ---- the command --------------------------------------------------------------------------------


def read_setup(backbone, cfg, o, device):
    """What both methods share: network, options, and features of images, counted as in eval_knn.py.

    A training image without a class, or a damaged one, keeps its row, with a label below 0.
    """
    train, test = labelled_images(cfg)
    found = []
    for source, what in (train, "training images"), (test, "test images"):
        x_NF, label_N = extract(lambda x: features(backbone, x), source, cfg, device, what)
        tell_damaged(source, label_N)
        found += [x_NF, label_N]
    x_NF, label_N, x_MF, label_M = found
    # If all training images of a class are damaged, nothing can find its test images.
    known_C = label_N[label_N >= 0].unique()
    asked_M = torch.isin(label_M, known_C)
    if len(known_C) < 2 or not asked_M.any():
        raise UserError("probes need readable images of two classes, and some to test on")
    if ranks()[0] == 0:
        names = [train.classes[c] for c in known_C.tolist()]
        print(tally(int((label_N >= 0).sum()), int(asked_M.sum()), names))
    return SimpleNamespace(
        backbone=backbone, train=train, classes=train.classes, x_NF=x_NF, label_N=label_N,
        x_MF=x_MF[asked_M], label_M=label_M[asked_M], cfg=cfg, o=o, device=device,
    )  # fmt: skip


def evaluate(s):
    """What `choose` says of each method."""
    kept, held = map(torch.tensor, divide(s.label_N.cpu().numpy(), HELD_OUT, s.o.seed))
    if not len(held):
        raise UserError("no class has 3 training images, so none can be held out to choose")
    methods = [("linear", linear_probe, s.o.iterations)]
    methods += [("logistic", logistic_regression, s.o.logistic)]
    return [choose(s, name, train, kept, held) for name, train, wanted in methods if wanted]


def print_results(results):
    """The figures, one line for each method."""
    print(f"{'method':<12}{'held out':>9}{'test':>9}   chosen")
    for f, *_ in results:
        print(f"{f['method']:<12}{f['held_out']:>7.2f} %{f['test']:>7.2f} %   {f['chosen']}")
    if best := results[0][0]["best"]:
        print(f"the best linear one on the test images, as official: {best:.2f} %")


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
                _, *head = max(results, key=lambda result: result[0]["held_out"])
                classifiers.save(Classifier(s.backbone, s.classes, *head), cfg, o.save)
            if Path(run).is_dir() and not o.untrained:
                text = json.dumps([figures for figures, *_ in results], indent=1)
                config.replace_text(Path(run, "linear.json"), text + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
