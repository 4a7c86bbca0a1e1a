"""How good are frozen features? Weighted k-nearest-neighbour classification, as DINOv2 reports it.

    python eval_knn.py RUN                        a run of ours on the data of its config
    python eval_knn.py RUN data.root=/photos      on another labelled folder

A test image is classified by the labelled training images nearest to it: nothing is trained, so the
number speaks for the features alone. (DINOv2 section 7.1 and appendix B.3; Wu et al. 2018.)

Shapes:  N training images   M test images   D channels   C classes   k neighbours
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import config
import data
from config import UserError
from parallel import dtype_of, gather_from_ranks, pick_device, ranks
from weights import load_backbone

NEIGHBOURS = (10, 20, 100, 200)
TEMPERATURE = 0.07


@torch.no_grad()
def extract_features(backbone, source, cfg, device, what="features"):
    """L2-normalised [CLS] of every image of a source, (N, D) fp32, and labels (N,), on device.

    Each rank works on its share of the images; all of them get all features.
    """
    # no_grad, not inference_mode: sharded weights are gathered into tensors that training uses too.
    features, labels = [], []
    rank, world = ranks()
    batches = data.evaluation_batches(source, cfg, device=device, rank=rank, world=world)
    show = None if rank == 0 else True  # None: if this is a terminal
    with tqdm(total=len(source), desc=what, unit=" images", leave=False, disable=show) as bar:
        for image_BCHW, label_B in batches:
            cls_BD = backbone(image_BCHW.to(dtype_of(cfg)))
            features.append(F.normalize(cls_BD.float(), dim=1))
            labels.append(label_B.to(device))
            bar.update(len(label_B) * world)
    return in_order(torch.cat(features), len(source)), in_order(torch.cat(labels), len(source))


def in_order(own, total):
    """The rows of all ranks, each of which has every `world`-th, as the source has them."""
    rows, _ = gather_from_ranks(own)
    return rows.unflatten(0, (ranks()[1], -1)).transpose(0, 1).flatten(0, 1)[:total]


class RawPixels(torch.nn.Module):
    """The floor: an image, standardised as the network gets it, is its own feature vector.

    A harder floor than the bare values in [0, 1]: on CIFAR-10 45.9 % against 36.3 % (k = 20).
    """

    def forward(self, image_BCHW):
        return image_BCHW.flatten(1)


@torch.inference_mode()
def knn_probabilities(train_ND, label_N, test_MD, classes, neighbours=NEIGHBOURS, temp=TEMPERATURE):
    """Votes of the k nearest training images for each class: {k: (M, C)}.

        vote_c = sum over the k nearest i of class c:  softmax_i(cos(test, train_i) / temp)

    The softmax runs over the largest k for every k, as in the official code, so smaller k sum to
    less than one; the winner is the same. Features are L2-normalised. Test images go in chunks, so
    the M x N similarities never exist at once.
    """
    largest = max(neighbours)
    if largest > len(train_ND):
        raise UserError(
            f"k={largest} neighbours, but only {len(train_ND)} training images: lower k"
        )
    votes = {k: [] for k in neighbours}
    chunk = max(1, 2**26 // len(train_ND))  # 256 MB of similarities
    for test_mD in test_MD.split(chunk):
        similarity_mk, nearest_mk = (test_mD @ train_ND.T).topk(largest, dim=1)  # nearest first
        weight_mk = (similarity_mk / temp).softmax(dim=1)
        label_mk = label_N[nearest_mk]
        for k in neighbours:
            vote_mC = torch.zeros(len(test_mD), classes, device=test_mD.device)
            votes[k].append(vote_mC.scatter_add_(1, label_mk[:, :k], weight_mk[:, :k]))
    return {k: torch.cat(chunks) for k, chunks in votes.items()}


def top_accuracy(vote_MC, label_M, top=1):
    """Percentage of test images whose class is among the `top` with most votes."""
    best = vote_MC.topk(min(top, vote_MC.shape[1]), dim=1).indices
    return 100 * (best == label_M.unsqueeze(1)).any(dim=1).sum().item() / len(label_M)


def labelled(features, labels):
    """Without the images that lie beside the folders of the classes."""
    return features[labels >= 0], labels[labels >= 0]


def evaluate(backbone, sources, cfg, device, neighbours=NEIGHBOURS):
    """k-NN accuracy in percent: {"knn_10": .., "knn_20": .., "knn_10_top5": .., ...}."""
    training = backbone.training
    backbone.eval()
    train, test = sources
    train_ND, label_N = labelled(
        *extract_features(backbone, train, cfg, device, "k-NN, training images")
    )
    test_MD, label_M = labelled(*extract_features(backbone, test, cfg, device, "k-NN, test images"))
    backbone.train(training)
    if not len(label_M):
        raise UserError("no labelled test image: data.val needs a sub-folder for each class")
    missing = set(label_M.tolist()) - set(label_N.tolist())
    if missing:
        names = ", ".join(train.classes[c] for c in sorted(missing))
        raise UserError(f"no training image of class {names}: k-NN cannot find it")
    neighbours = [k for k in neighbours if k <= len(train_ND)] or [len(train_ND)]
    votes = knn_probabilities(train_ND, label_N, test_MD, len(train.classes), neighbours)
    top1 = {f"knn_{k}": top_accuracy(vote, label_M) for k, vote in votes.items()}
    return top1 | {f"knn_{k}_top5": top_accuracy(vote, label_M, 5) for k, vote in votes.items()}


USAGE = """
usage: python eval_knn.py RUN [key=value ...]

Classifies the test images of a labelled data set by their nearest training images, with the frozen
backbone in RUN (a run folder or a checkpoint file). Keys override the config of the run:
  python eval_knn.py runs/default
  python eval_knn.py runs/default data.root=/photos data.val=/other/photos precision=fp32
"""


@config.report_errors
def main(argv):
    run, overrides = config.main_arguments(argv, USAGE)
    backbone, cfg = load_backbone(run, with_config=True)
    for word in overrides:
        config.override(cfg, word)
    config.check(cfg)
    device = pick_device(cfg.device)
    sources = data.evaluation_images(cfg)
    if sources is None:
        data.open_source(cfg.data.root, cfg)  # if it is missing, it says so itself
        raise UserError(
            f"data.root={cfg.data.root}: no labelled train and test images; set data.val"
        )
    train, test = sources
    print(f"{len(train)} training, {len(test)} test images, {len(train.classes)} classes")
    result = evaluate(backbone.to(device), sources, cfg, device)
    for name, value in result.items():
        print(f"{name:<16}{value:6.2f} %")
    if Path(run).is_dir():
        try:
            Path(run, "knn.json").write_text(json.dumps(result, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"{run}/knn.json: cannot be written ({error.strerror})") from None


if __name__ == "__main__":
    main(sys.argv[1:])
