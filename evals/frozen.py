"""What every evaluation shares: labelled images, a frozen network, and its features of them.

Used by eval_knn.py and the programs of this folder.

Shapes:  N images   B images of a batch   D features of an image   C, H, W an image
"""

import copy
import os

import torch

import config
from config import UserError
from images import evaluation
from images.sources import read_or_next
from parallel import counted, dtype_of, gather_from_ranks, progress, ranks, warn_once
from vit import SIZES, assign
from weights.load import load_backbone

FEW = 100  # test images; below, one of them is more than a point
KEYS = ("data.", "crops.global_size", "precision", "device")  # what --help explains of a config


# ---- what is evaluated ---------------------------------------------------------------------------


def run_and_folder(argv, usage):
    """(RUN, FOLDER, the other words) of a command line."""
    run, words = config.main_arguments(argv, usage, KEYS)
    if not words or "=" in words[0]:
        raise UserError("FOLDER is missing: it comes second; --help shows how")
    return run, os.path.expanduser(words[0]), words[1:]


def check_place(key, path):
    """Raise UserError if no file can be written there, before the work and not after it."""
    folder = os.path.dirname(os.path.abspath(path))
    if path and (os.path.isdir(path) or not os.access(folder, os.W_OK)):
        raise UserError(f"{key}={path}: cannot be written; choose a file in a folder that there is")


def open_network(run, words, batch=0):
    """(backbone, Config) of a run, file or released name, to evaluate with these overrides."""
    backbone, cfg = load_backbone(run, with_config=True)
    settle(cfg, words, backbone, run, batch)
    return backbone, cfg


def settle(cfg, words, backbone, title, batch=0):
    """Apply overrides to the config of a network, and refuse those that it cannot follow."""
    before = copy.deepcopy(cfg.vit)
    config.override(cfg, words)
    # Those of the training are of no use here: ranks only share out the images.
    world = int(os.environ.get("WORLD_SIZE", 1))
    cfg.parallel, cfg.batch, cfg.accumulate = "ddp" if world > 1 else "none", batch or world, 1
    if cfg.vit != before:
        raise UserError(f"{title} says what its network is: leave out the keys of vit.*")
    if cfg.vit.size not in SIZES:  # a file of others; nothing is built from this key here
        cfg.vit.size = "nano"
    config.check(cfg)
    if cfg.data.channels != (reads := backbone.patch_embed.proj.in_channels):
        raise UserError(f"data.channels={cfg.data.channels}, but {title} reads {reads}: "
                        f"give images of {reads} channels")  # fmt: skip


def labelled_images(cfg):
    """(training images, test images); UserError if there are no labels."""
    sources = evaluation.labelled_images(cfg)
    if sources is None:
        raise UserError(
            f"data.root={cfg.data.root}: fewer than two classes; give a folder with a sub-folder "
            "for each, and if held-out images lie elsewhere, set data.val"
        )
    return sources


def untrained(backbone, seed):
    """A network like this one with the weights that training with this seed begins with."""
    fresh = copy.deepcopy(backbone)
    assign(fresh, fresh.initial_values(torch.Generator().manual_seed(seed)))
    return fresh


# ---- features ------------------------------------------------------------------------------------


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


def in_order(own):
    """The rows of all processes, each of which has every `world`-th, in the order of the whole."""
    rows, _ = gather_from_ranks(own)
    return rows.unflatten(0, (ranks()[1], -1)).transpose(0, 1).flatten(0, 1)


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
