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

import copy
import json
import os
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import config
from config import UserError
from images import evaluation
from images.sources import read_or_next
from parallel import (
    counted,
    dtype_of,
    in_order,
    process_group,
    progress,
    ranks,
    warn_once,
    without_tf32,
)
from vit import assign

NEIGHBOURS = (10, 20, 100, 200)
TEMPERATURE = 0.07
CHUNK_M, CHUNK_N = 4096, 16384  # similarities worked out at once: 256 MB
FEW = 100  # test images; below, one of them is more than a point


# ---- features -----------------------------------------------------------------------------------


@torch.no_grad()
def extract(network, source, cfg, device, what="features", keep=None):
    """network(images) of every image of a source, (N, ...) fp32, and labels (N,).

    Each rank works on its share of the images; all of them get all features. They stay on
    `device`, or go to `keep`: "cpu" if there are too many for the GPU. An image that cannot be read
    has the label DAMAGED, and features of another one: it must not count.
    """
    # no_grad, not inference_mode: sharded weights are gathered into tensors that training uses too.
    features, labels = [], []
    rank, world = ranks()
    batches = evaluation.evaluation_batches(source, cfg, device=device, rank=rank, world=world)
    with progress(total=len(source), desc=what, unit=" images") as bar:
        for image_BCHW, label_B in batches:
            x_BD = network(image_BCHW.to(dtype_of(cfg)))
            features.append(in_order(x_BD.float()).to(keep or device))
            labels.append(in_order(label_B.to(device)).to(keep or device))
            bar.update(len(label_B) * world)
    # With several ranks the first images come again at the end, to fill the last batch.
    return torch.cat(features)[: len(source)], torch.cat(labels)[: len(source)]


def extract_features(backbone, *more, **options):
    """The same for k-NN: L2-normalised [CLS] of every image, (N, D)."""
    return extract(lambda x: F.normalize(backbone(x).float(), dim=1), *more, **options)


def tell_damaged(source, label_N):
    """Say how many images cannot be read, and name the first with the reason."""
    rows = (label_N == evaluation.DAMAGED).nonzero().flatten().tolist()
    if rows:
        first, *_ = [*read_or_next(source, rows[0])[2], source.name(rows[0])]
        warn_once(f"{counted(len(rows), 'damaged image')} left out, the first: {first}")


def tally(train, test, classes):
    """The count of an evaluation in words, the same in all programs; warns if few are tested."""
    if test < FEW:
        warn_once(f"only {counted(test, 'test image')}: each is worth {100 / test:.1f} points")
    names = ", ".join(classes[:6]) + ", ..." * (len(classes) > 6)
    return f"{train:,} training, {test:,} test images, {len(classes)} classes ({names})"


class RawPixels(torch.nn.Module):
    """The floor: an image, standardised as the network gets it, is its own feature vector.

    A harder floor than the bare values in [0, 1]: on CIFAR-10 45.9 % against 36.3 % (k = 20).
    """

    def forward(self, image_BCHW):
        return image_BCHW.flatten(1)


def untrained(backbone, seed):
    """A network like this one with the weights that training with this seed begins with."""
    fresh = copy.deepcopy(backbone)
    assign(fresh, fresh.initial_values(torch.Generator().manual_seed(seed)))
    return fresh


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
    largest, device = max(neighbours), device or test_MD.device
    if largest > len(train_ND):
        raise UserError(
            f"k={largest} neighbours, but only {len(train_ND)} training images: lower k"
        )
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
    return torch.cat(
        [r[torch.randperm(len(r), generator=generator)[:n].to(r.device)] for r in rows]
    )


def evaluate(
    backbone, sources, cfg, device, neighbours=(), per_class=(), tries=5, cache="", say=None
):
    """k-NN accuracy in percent: {"knn_10": .., "knn_20": .., "knn_10_top5": .., ...}.

    sources     (labelled training images, test images)
    neighbours  (): those of the official protocol of which there are so many training images
    per_class   also few-shot with so many images of each class, and `tries` draws
    cache       folder that keeps the features
    say         is told the number of images: damaged ones are left out
    Raises UserError with fewer than two classes, or if k is larger than the number of images.
    """

    def features(source, what):
        more = backbone, source, cfg, device, f"k-NN, {what} images"
        if cache and hasattr(backbone, "blocks"):  # pixels take more space than their images
            from evals.cache import cached_features

            x_ND, label_N = cached_features(cache, extract_features, *more)
        else:
            x_ND, label_N = extract_features(*more)
        tell_damaged(source, label_N)
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
        say(tally(count, len(test[1]), [names[c] for c in per_label.nonzero().flatten()]))
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
  cache=FOLDER     keep the features there, and use them again
  --floors         also an untrained network, and the raw pixels, normalised as for a network
Keys override the config of the run (a released network has crops.global_size=224, precision=fp32):
  python eval_knn.py runs/default data.root=/photos data.val=/other/photos precision=fp32
"""
# What of a config concerns an evaluation: the keys that --help explains.
KEYS = ("data.", "crops.global_size", "precision", "device")

OPTIONS = {"k": "", "per_class": "", "tries": 5, "cache": ""}
FLOORS = {"this network": "", "untrained network": "_random", "raw pixels": "_pixels"}


def numbers(key, text):
    """The numbers of `1,5`; none of an option that was not given."""
    words = text.split(",") if text else []
    if not all(n.isdecimal() and int(n) for n in words):
        raise UserError(f"{key}={text}: write whole numbers above 0, as in {key}=5")
    return [int(n) for n in words]


def open_network(run, words, batch=0):
    """(backbone, Config) of a run, file or released name, to evaluate with these overrides."""
    from weights.load import load_backbone

    backbone, cfg = load_backbone(run, with_config=True)
    settle(cfg, words, backbone, run, batch)
    return backbone, cfg


def settle(cfg, words, backbone, title, batch=0):
    """Apply overrides to the config of a network, and refuse those that it cannot follow."""
    before = config.to_dict(cfg)["vit"]
    config.override(cfg, words)
    # Those of the training are of no use here: ranks only share out the images.
    world = int(os.environ.get("WORLD_SIZE", 1))
    cfg.parallel, cfg.batch, cfg.accumulate = "ddp" if world > 1 else "none", batch or world, 1
    config.check(cfg)
    for key, value in config.to_dict(cfg)["vit"].items():
        if value != before[key]:
            raise UserError(f"vit.{key}={value}, but {title} has {before[key]}: leave the key out")
    channels = backbone.patch_embed.proj.in_channels
    if cfg.data.channels != channels:
        raise UserError(
            f"data.channels={cfg.data.channels}, but {title} reads {channels}: "
            f"give images of {channels} channels"
        )


def labelled_images(cfg):
    """(training images, test images); UserError if there are no labels."""
    sources = evaluation.labelled_images(cfg)
    if sources is None:
        raise UserError(
            f"data.root={cfg.data.root}: fewer than two classes; give a folder with a sub-folder "
            "for each, and if held-out images lie elsewhere, set data.val"
        )
    return sources


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
    run, words = config.main_arguments(argv, USAGE, KEYS)
    floors, words = "--floors" in words, [word for word in words if word != "--floors"]
    o, words = config.take_options(words, OPTIONS, {"tries": 1})
    options = {"neighbours": numbers("k", o.k), "per_class": numbers("per_class", o.per_class)}
    backbone, cfg = open_network(run, words)
    sources, columns = labelled_images(cfg), {}
    with process_group(cfg) as device:
        first = ranks()[0] == 0
        networks = backbone.to(device), untrained(backbone, cfg.seed), RawPixels()
        for title, network in list(zip(FLOORS, networks, strict=True))[: 3 if floors else 1]:
            options["say"] = print if first and not columns else None
            columns[title] = evaluate(
                network, sources, cfg, device, tries=o.tries, cache=o.cache, **options
            )
    if first:
        print("\n".join(line.rstrip() for line in table(columns)))
        if Path(run).is_dir():
            scores = {n + FLOORS[t]: v for t, column in columns.items() for n, v in column.items()}
            with config.writing(Path(run, "knn.json")):
                Path(run, "knn.json").write_text(json.dumps(scores, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
