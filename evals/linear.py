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

import copy
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
from eval_knn import untrained
from evals import classifier as classifiers
from evals import labelled
from evals.classifier import BLOCKS, Classifier, Head, extract, features, tokens
from evals.labelled import augmented_batches
from evals.logistic import logistic_path, penalties
from evals.probe import Candidates, Probe, accuracies
from parallel import dtype_of, process_group, progress, ranks, warn
from weights.load import load_backbone


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
    best: float | None  # of all candidates on the test images: they choose, which is not honest
    early: Head  # trained on what was not held out
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
        yield features(tokens(s.backbone, image_BCSS.to(dtype_of(s.cfg)))), row_B


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
    late = train(s, torch.cat((kept, held)).sort().values, chosen) if s.o.refit else early
    for i, target in enumerate(s.targets):
        name = early[i].names[chosen[i]]
        at = late[i].names.index(name)
        test_H = accuracies(late[i], s.x_MF, target.test_M)
        results.append(
            Result(
                target.name, method, held_HT[i].max().item(), test_H[at].item(), name,
                test_H.max().item() if len(test_H) > 1 else None,
                head_of(target, early[i], chosen[i]), head_of(target, late[i], at),
            )
        )  # fmt: skip
    return results


def head_of(target, candidates, at):
    weight_CF, bias_C = candidates.weight_HCF[at], candidates.bias_HC[at]
    return Head(target.name, target.classes, weight_CF.clone(), bias_C.clone())


# ---- fine-tuning --------------------------------------------------------------------------------


def finetuned(s, results, kept, held):
    """([Result], Classifier) of training the last blocks and a neck, from the best heads so far."""
    best = best_heads(s.targets, results)
    labels = [target.train_N for target in s.targets]

    def train(heads, rows):
        torch.manual_seed(s.o.seed)  # the neck begins the same on all ranks
        own = Classifier(copy.deepcopy(s.backbone), heads, s.o.neck).to(s.device)
        return classifiers.finetune(own, s.train, labels, rows, s.cfg, s.o, s.device).eval()

    early = train([result.early for result in best], kept)
    held_T = classifiers.percentages(
        early, data.Part(s.train, held.tolist()), [x[held] for x in labels], s.cfg, s.device
    )
    everything = torch.cat((kept, held)).sort().values
    late = train([result.head for result in best], everything) if s.o.refit else early
    test_T = classifiers.percentages(late, s.test, [t.test_M for t in s.targets], s.cfg, s.device)
    words = f"last {s.o.finetune} blocks" + f", neck {s.o.neck}" * (s.o.neck > 0)
    rows = zip(best, held_T, test_T, strict=True)
    return [
        r._replace(method="fine-tuned", held_out=a, test=b, chosen=words, best=None)
        for r, a, b in rows
    ], late


def best_heads(targets, results):
    """For each target the result that is best on the held-out images."""
    return [
        max((r for r in results if r.target == target.name), key=lambda r: r.held_out)
        for target in targets
    ]


# ---- the command --------------------------------------------------------------------------------

OPTIONS = {
    "iterations": 12_500, "batch": 128, "augment": False, "logistic": 45, "held_out": 0.1,
    "refit": True, "labels": "", "targets": "", "finetune": 0, "neck": 0, "tune_iterations": 1000,
    "tune_lr": 1e-4, "random": False, "save": "", "seed": 0,
}  # fmt: skip

USAGE = """
usage: python -m evals.linear RUN [option=value ...] [key=value ...]
       torchrun --nproc-per-node 8 -m evals.linear RUN ...           several processes
       python -m evals.linear predict CLASSIFIER FOLDER [out=labels.csv]

Trains classifiers on the frozen features of the backbone in RUN (a run folder or a file of weights)
and says how many test images they get right. Options:
  iterations=12500      of the linear probe, as official; 0: no linear probe
  batch=128             images of an iteration, on all processes together (official: on each)
  augment=false         true: a new random crop each time, as official; the backbone then computes
                        iterations x batch images, twice with refit. false: one centre crop for each
  logistic=45           penalties that the logistic regression tries; 0: none
  held_out=0.1          share of the training images that choose the classifier
  refit=true            train again on all training images once the choice is made
  labels=cars.csv       a CSV with columns path,make,colour: labels instead of class folders
  targets=make,colour   which of its columns; empty: all
  finetune=0            last blocks of the backbone to train, starting from the best classifier
  neck=0                channels of a small convolutional neck over the patches (64, say); 0: none
  tune_iterations=1000  tune_lr=1e-4    of these two
  random=false          true: an untrained network of this shape instead, as a floor
  save=                 file for the best classifier, with its backbone
Keys override the config of the run, such as data.root=/photos or precision=fp32:
"""


def check_options(o, cfg):
    """Refuse what cannot work, before anything starts."""
    for key in ("batch", "tune_iterations"):
        if getattr(o, key) < 1:
            raise UserError(f"{key}={getattr(o, key)} must be at least 1")
    for key in ("iterations", "logistic", "finetune", "neck"):
        if getattr(o, key) < 0:
            raise UserError(f"{key}={getattr(o, key)} must be at least 0")
    if not 0 < o.held_out < 1:
        raise UserError(f"held_out={o.held_out} must be above 0 and below 1")
    if o.save and not os.access(Path(o.save).absolute().parent, os.W_OK):
        raise UserError(f"save={o.save}: cannot be written; choose a folder that there is")
    if not o.iterations and not o.logistic:
        raise UserError("iterations=0 and logistic=0 leave nothing to do: set one above 0")
    if (o.finetune or o.neck) and cfg.precision == "fp16":
        raise UserError("finetune and neck need precision=bf16 or fp32: fp16 gradients vanish")


def prepare(run, words):
    """(backbone, Config, options) of a command line, checked."""
    o, words = config.take_options(words, OPTIONS)
    backbone, cfg = load_backbone(run, with_config=True)
    config.override(cfg, words)
    # What else the config of a training run says of its steps and processes is of no use here.
    cfg.batch, cfg.accumulate = o.batch, 1
    cfg.parallel = "ddp" if "RANK" in os.environ else "none"
    config.check(cfg)
    check_options(o, cfg)
    channels = backbone.patch_embed.proj.weight.shape[1]
    if cfg.data.channels != channels:
        raise UserError(
            f"data.channels={cfg.data.channels}, but {run} was trained on images with {channels}"
        )
    if o.finetune > backbone.depth:
        raise UserError(f"finetune={o.finetune}, but the backbone has {backbone.depth} blocks")
    if o.random:
        backbone = untrained(backbone, o.seed)
    return backbone, cfg, o


def read_setup(backbone, cfg, o, device):
    """The images with their labels and features. Damaged images lose their labels."""
    train, test, targets = labelled.labelled_images(cfg, o.labels, o.targets)
    if ranks()[0] == 0:
        for t in targets:
            counts = [int((label >= 0).sum()) for label in (t.train_N, t.test_M)]
            print(f"{t.name}: {len(t.classes)} classes, {counts[0]} training, {counts[1]} test")
    x_NF, bad_N = extract(backbone, train, cfg, device, "training images")
    x_MF, bad_M = extract(backbone, test, cfg, device, "test images")
    if bad := int(bad_N.sum() + bad_M.sum()):
        warn(f"{bad} damaged images are left out")
    targets = [
        t._replace(
            train_N=t.train_N.masked_fill(bad_N, labelled.UNKNOWN),
            test_M=t.test_M.masked_fill(bad_M, labelled.UNKNOWN),
        )
        for t in targets
    ]
    for target in targets:
        labelled.check(target)
    return Setup(backbone, train, test, targets, x_NF, x_MF, cfg, o, device)


def evaluate(s):
    """([Result], the Classifier to keep)."""
    kept, held = labelled.hold_out(s.targets, s.o.held_out, s.o.seed)
    results = []
    if s.o.iterations:
        results += choose(s, "linear", linear_probe, kept, held)
    if s.o.logistic:
        results += choose(s, "logistic", logistic_regression, kept, held)
    if s.o.finetune or s.o.neck:
        tuned, kept_classifier = finetuned(s, results, kept, held)
        return results + tuned, kept_classifier
    best = best_heads(s.targets, results)
    return results, Classifier(s.backbone, [result.head for result in best])


def print_results(results):
    """The figures, one line for each target and method."""
    print(f"{'target':<14}{'method':<12}{'held out':>9}{'test':>9}   chosen")
    for r in results:
        print(f"{r.target:<14}{r.method:<12}{r.held_out:>7.2f} %{r.test:>7.2f} %   {r.chosen}")
    for r in results:
        if r.method == "linear":
            print(f"{r.target:<14}best of all on the test images, as official: {r.best:.2f} %")


@config.report_errors
def main(argv):
    if argv[:1] == ["predict"]:
        return classifiers.predict(argv[1:])
    run, words = config.main_arguments(argv, USAGE)
    backbone, cfg, o = prepare(run, words)
    with process_group(cfg) as device:
        s = read_setup(backbone.to(device), cfg, o, device)
        results, classifier = evaluate(s)
        if ranks()[0] == 0:
            print_results(results)
            if o.save:
                classifiers.save(classifier, cfg, o.save)
                print(f"classifier: {o.save}")
            if Path(run).is_dir() and not o.random:
                write_results(Path(run, "linear.json"), results)


def write_results(path, results):
    keys = ("target", "method", "held_out", "test", "chosen", "best")
    rows = [{key: getattr(r, key) for key in keys} for r in results]
    with config.writing(path):
        path.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
