"""How good are frozen features? Weighted k-nearest-neighbour classification, as DINOv2 reports it.

    python eval_knn.py RUN                          a run of ours on the data of its config
    python eval_knn.py RUN data.root=/photos        on another labelled folder, list, shards, array
    python eval_knn.py dinov2_vits14 data.root=...  released weights by name, or a file of them
    python eval_knn.py RUN per_class=1,5 --floors   few-shot; what needs no training
    torchrun --nproc_per_node=8 eval_knn.py RUN     the same figures, sooner

A test image is classified by the labelled training images nearest to it: nothing is trained, so the
number speaks for the features alone. (DINOv2 section 7.1; Wu et al. 2018.)

Shapes:  N training images   M test images   D channels   C classes   k neighbours
         lower-case n, m: a chunk of them
"""

import json
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import config
from config import UserError
from evals import frozen
from parallel import process_group, ranks, without_tf32

NEIGHBOURS = (10, 20, 100, 200)
TEMPERATURE = 0.07
CHUNK_M, CHUNK_N = 4096, 16384  # similarities worked out at once: 256 MB


# ---- features -----------------------------------------------------------------------------------


def extract_features(backbone, *more, **options):
    """(features (N, D), labels (N,)): L2-normalised [CLS] of every image; see extract."""
    return frozen.extract(lambda x: F.normalize(backbone(x).float(), dim=1), *more, **options)


class RawPixels(torch.nn.Module):
    """The floor: an image, standardised as the network gets it, is its own feature vector.

    A harder floor than the bare values in [0, 1]: on CIFAR-10 45.9 % against 36.3 % (k = 20).
    """

    def forward(self, image_BCHW):
        return image_BCHW.flatten(1)


# ---- neighbours ---------------------------------------------------------------------------------


@without_tf32()  # as in the official evaluation; near neighbours differ by less than TF32 resolves
@torch.inference_mode()
def knn_probabilities(
    train_ND, label_N, test_MD, classes, neighbours=NEIGHBOURS, temp=TEMPERATURE, device=None
):
    """Votes of the k nearest training images for each class: {k: (M, C)}.

        vote_c = sum over the k nearest i of class c:  softmax_i(cos(test, train_i) / temp)

    The softmax runs over the largest k for every k, as in the official code, so smaller k sum to
    less than one; the winner is the same. Features are L2-normalised. They are compared in chunks,
    on `device` (default: where the test features are), so that neither the M x N similarities nor
    all training features need to be there at once.
    """
    largest, N, device = max(neighbours), len(train_ND), device or test_MD.device
    if largest > N:
        raise UserError(f"k={largest} neighbours, but only {N} training images: lower k")
    votes = {k: [] for k in neighbours}
    for test_mD in test_MD.split(CHUNK_M):
        similarity_mk, label_mk = nearest(test_mD.to(device), train_ND, label_N, largest)
        weight_mk = (similarity_mk / temp).softmax(dim=1)
        for k in neighbours:
            vote_mC = torch.zeros(len(test_mD), classes, device=device)
            votes[k].append(vote_mC.scatter_add_(1, label_mk[:, :k], weight_mk[:, :k]))
    return {k: torch.cat(chunks) for k, chunks in votes.items()}


def nearest(test_mD, train_ND, label_N, k):
    """Similarity and label of the k nearest training images, nearest first: (m, k) each."""
    similarity_mk = test_mD.new_empty(len(test_mD), 0)
    label_mk = label_N.new_empty(len(test_mD), 0, device=test_mD.device)
    for train_nD, label_n in zip(train_ND.split(CHUNK_N), label_N.split(CHUNK_N), strict=True):
        similarity_mn = test_mD @ train_nD.to(test_mD.device).T
        found_mk, index_mk = similarity_mn.topk(min(k, len(train_nD)), dim=1)
        # The best of the chunks so far and of this one.
        similarity_mk = torch.cat((similarity_mk, found_mk), dim=1)
        label_mk = torch.cat((label_mk, label_n.to(test_mD.device)[index_mk]), dim=1)
        similarity_mk, order_mk = similarity_mk.topk(min(k, similarity_mk.shape[1]), dim=1)
        label_mk = label_mk.gather(1, order_mk)
    return similarity_mk, label_mk


def top_accuracy(vote_MC, label_M, top=1):
    """Percentage of test images whose class is among the `top` with most votes.

    Differs from the official code, where classes without a vote fill up the best five, as chance
    has it: with k=1 that makes a top-5 of 54 % out of noise.
    """
    votes, best = vote_MC.topk(min(top, vote_MC.shape[1]), dim=1)
    right = (best == label_M.unsqueeze(1)) & (votes > 0)
    return 100 * right.any(dim=1).sum().item() / len(label_M)


def accuracies(train, test, classes, neighbours, device):
    """{"knn_10": .., "knn_20": .., "knn_10_top5": .., ...} from (features, labels) of both.

    Top-5 where it says something: for k of 5 or more, and of more than 5 classes.
    """
    votes = knn_probabilities(*train, test[0], classes, neighbours, device=device)
    label_M = test[1].to(device)
    top1 = {f"knn_{k}": top_accuracy(vote, label_M) for k, vote in votes.items()}
    fives = {k: vote for k, vote in votes.items() if k >= 5 and classes > 5}
    return top1 | {f"knn_{k}_top5": top_accuracy(vote, label_M, 5) for k, vote in fives.items()}


def few_shot(train, test, classes, neighbours, n, tries, device):
    """Accuracies with n training images of each class, drawn anew `tries` times.

    Returns {"knn_5_per_class_5": mean, "knn_5_per_class_5_std": spread over the tries, ...} for k
    up to n and for n itself. Classes, images and k are those of the official protocol.
    """
    neighbours = sorted(k for k in {*neighbours, n} if k <= n)
    results = [
        accuracies([x[rows] for x in train], test, classes, neighbours, device)
        for rows in (draw(train[1], n, seed) for seed in range(tries))
    ]
    scores = {}
    for name in results[0]:
        values = [result[name] for result in results]
        scores[f"{name}_per_class_{n}"] = statistics.fmean(values)
        scores[f"{name}_per_class_{n}_std"] = statistics.stdev(values) if tries > 1 else 0.0
    return scores


def draw(label_N, n, seed):
    """Rows of n random images of each class, or of all it has if these are fewer."""
    generator = torch.Generator().manual_seed(seed)
    rows = [(label_N == c).nonzero().flatten() for c in label_N.unique()]
    rows = [r[torch.randperm(len(r), generator=generator)[:n].to(r.device)] for r in rows]
    return torch.cat(rows)


def evaluate(backbone, sources, cfg, device, neighbours=(), per_class=(), tries=5, say=None):
    """k-NN accuracy in percent: {"knn_10": .., "knn_20": .., "knn_10_top5": .., ...}.

    sources     (labelled training images, test images)
    neighbours  (): those of the official protocol of which there are so many training images
    per_class   also few-shot with so many images of each class, and `tries` draws
    say         is told the number of images: damaged ones are left out
    Raises UserError with fewer than two classes, or if k is larger than the number of images.
    """

    def features(source, what):
        x_ND, label_N = extract_features(backbone, source, cfg, device, f"k-NN, {what} images")
        frozen.tell_damaged(source, label_N)
        return x_ND[label_N >= 0], label_N[label_N >= 0]

    training = backbone.training
    backbone.eval()
    train, test = features(sources[0], "training"), features(sources[1], "test")
    backbone.train(training)
    # If all training images of a class are damaged, nothing can find its test images.
    test = [x[torch.isin(test[1], train[1])] for x in test]
    per_label = train[1].bincount()
    if (per_label > 0).sum() < 2 or not len(test[1]):
        raise UserError("k-NN needs readable images of two classes, and some to test on")
    names, count = sources[0].classes, len(train[1])
    if say:
        say(frozen.tally(count, len(test[1]), [names[c] for c in per_label.nonzero().flatten()]))
    if per_class and max(per_class) > (most := int(per_label.max())):
        raise UserError(f"per_class={max(per_class)}, but no class has more than {most} images")
    k = neighbours or [k for k in NEIGHBOURS if k <= count] or [count]
    result = accuracies(train, test, len(names), k, device)
    for n in per_class:
        result |= few_shot(train, test, len(names), neighbours or NEIGHBOURS, n, tries, device)
    return result


# ---- command line -------------------------------------------------------------------------------

USAGE = """
usage: python eval_knn.py RUN [--floors] [option=value ...] [key=value ...]
       torchrun --nproc_per_node=8 eval_knn.py RUN ...         the same figures by 8 processes

Classifies the test images of a labelled data set by their nearest training images, with the frozen
backbone in RUN: a run folder, a file (.pt, .pth, .safetensors), or a released name (dinov2_vits14,
dinov2_vitb14_reg, ...). Options:
  k=10,20          neighbours; default 10,20,100,200
  per_class=1,5    few-shot: also with so many training images of each class,
  tries=5          drawn anew so often: mean and standard deviation
  --floors         also an untrained network, and the raw pixels, normalised as for a network
Keys override the config of the run (a released network has crops.global_size=224, precision=fp32):
  python eval_knn.py runs/default data.root=/photos data.val=/other/photos precision=fp32
"""
OPTIONS = {"k": "", "per_class": "", "tries": 5}
FLOORS = {"this network": "", "untrained network": "_random", "raw pixels": "_pixels"}


def numbers(key, text):
    """The numbers of `1,5`; none of an option that was not given."""
    words = text.split(",") if text else []
    if not all(n.isdecimal() and int(n) for n in words):
        raise UserError(f"{key}={text}: write whole numbers above 0, as in {key}=5")
    return [int(n) for n in words]


def table(columns):
    """The figures of {title: scores} as lines, one column for each title."""
    first = next(iter(columns.values()))
    width = max(16, *map(len, first))
    if len(columns) > 1:
        yield " " * width + "".join(f"{title:>20}" for title in columns)
    for name in first:
        if not name.endswith("_std"):
            yield f"{name:<{width}}" + "".join(cell(scores, name) for scores in columns.values())


def cell(scores, name):
    spread = scores.get(f"{name}_std")
    return f"{scores[name]:10.2f} %" + ("" if spread is None else f" ± {spread:5.2f}").ljust(8)


@config.report_errors
def main(argv):
    run, words = config.main_arguments(argv, USAGE, frozen.KEYS)
    floors, words = "--floors" in words, [word for word in words if word != "--floors"]
    o, words = config.take_options(words, OPTIONS, {"tries": 1})
    options = {"neighbours": numbers("k", o.k), "per_class": numbers("per_class", o.per_class)}
    backbone, cfg = frozen.open_network(run, words)
    sources, columns = frozen.labelled_images(cfg), {}
    with process_group(cfg) as device:
        first = ranks()[0] == 0
        networks = backbone.to(device), frozen.untrained(backbone, cfg.seed), RawPixels()
        for title, network in list(zip(FLOORS, networks, strict=True))[: 3 if floors else 1]:
            options["say"] = print if first and not columns else None
            columns[title] = evaluate(network, sources, cfg, device, tries=o.tries, **options)
    if first:
        print("\n".join(line.rstrip() for line in table(columns)))
        if Path(run).is_dir():
            scores = {n + FLOORS[t]: v for t, column in columns.items() for n, v in column.items()}
            with config.writing(Path(run, "knn.json")):
                Path(run, "knn.json").write_text(json.dumps(scores, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
