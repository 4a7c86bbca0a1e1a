"""From images to a `Batch`: an endless seeded order, crops, masks, and who gets which rows.

The one idea: everything is a function of the position in an endless stream of images.
    image    at position p   permutation(seed, epoch = p // n)[p % n]
    crops    of position p   drawn with random.Random("<seed> crops <p>")
    masks    of step s       drawn with random.Random("<seed> masks <s>")
    step s   of rank r       positions s * G + r * B up to s * G + (r + 1) * B,  B = G / ranks
So the number of ranks and workers changes nothing, each epoch has each image once, and to resume it
is enough to know the step. Where the images come from is images/sources.py.

Crops are uint8 here; their colours are changed on the training device (augment.py).

Shapes:  n images of the source   G images of a step   B of them on this rank   T = 2 global crops
         L local crops   C channels   P parameters of a crop's colours   N patches of a global crop
         M masked patches.  Crop-major: row = crop * B + image.
"""

import random
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import augment
from config import UserError
from images.sources import by_workers, read_or_next

# ---- order --------------------------------------------------------------------------------------


class Order:
    """The endless shuffle: the image at any position, in any order of asking."""

    def __init__(self, n, seed):
        self.n, self.seed, self.epoch = n, seed, None

    def __getitem__(self, position):
        epoch, place = divmod(position, self.n)
        if epoch != self.epoch:  # positions ascend, so one permutation is kept: 4 bytes an image
            self.permutation = np.arange(self.n, dtype=np.uint32)
            np.random.default_rng([self.seed, epoch]).shuffle(self.permutation)
            self.epoch = epoch
        return int(self.permutation[place])


# ---- training -----------------------------------------------------------------------------------


class Sample(NamedTuple):
    """One image as it leaves the Dataset."""

    position: int
    global_crops: Tensor  # (T, C, S, S) uint8
    local_crops: Tensor  # (L, C, s, s) uint8
    colour: Tensor  # (T + L, P)
    skipped: list  # damaged images that it stands for, "name: reason"


class Batch(NamedTuple):
    """What one rank works on in one step."""

    global_crops: Tensor  # (T * B, C, S, S) uint8
    local_crops: Tensor  # (L * B, C, s, s) uint8
    global_colour: Tensor  # (T * B, P) what augment.colour will do to each crop
    local_colour: Tensor  # (L * B, P)
    masks: Tensor  # (T * B, N) bool, True = hidden from the student
    mask_indices: Tensor  # (M,) where masks is True in the flattened (T * B * N)
    mask_weights: Tensor  # (M,) 1 / masked patches of its crop: one crop, one vote
    skipped: list  # damaged images of these positions, "name: reason"


class Dataset:
    """Position in the endless stream -> Sample."""

    def __init__(self, source, cfg):
        self.source, self.cfg = source, cfg
        self.order = Order(len(source), cfg.seed)

    def __getitem__(self, position):
        image, _, skipped = read_or_next(self.source, self.order[position])
        rng = random.Random(f"{self.cfg.seed} crops {position}")
        crops, colour = augment.crops(image, rng, self.cfg)
        large, size = torch.stack(crops[:2]), self.cfg.crops.local_size
        none = large.new_empty(0, large.shape[1], size, size)  # there may be no small crops
        small = torch.cat([none, *(crop[None] for crop in crops[2:])])
        return Sample(position, large, small, colour, skipped)


def collate(samples, cfg, rank=0, world=1):
    """The samples of one rank and step -> Batch."""
    positions, global_crops, local_crops, colour, skipped = zip(*samples, strict=True)
    colour_SBP = torch.stack(colour, dim=1)
    # The masks of the whole step are drawn, of which each rank keeps its rows: the mask ratios are
    # spread evenly over all crops of the step, as if one process did it all.
    rng = random.Random(f"{cfg.seed} masks {positions[0] // cfg.batch}")
    grid, m = cfg.crops.global_size // cfg.vit.patch, cfg.mask
    masks = augment.batch_masks(2 * cfg.batch, grid, grid, m.probability, m.ratio, rng)
    masks_TRBN = torch.from_numpy(masks).unflatten(0, (2, world, len(samples)))
    return Batch(
        torch.stack(global_crops, dim=1).flatten(0, 1),
        torch.stack(local_crops, dim=1).flatten(0, 1),
        colour_SBP[:2].flatten(0, 1),
        colour_SBP[2:].flatten(0, 1),
        *index_masks(masks_TRBN[:, rank].flatten(0, 1)),
        skipped=[name for names in skipped for name in names],
    )


def index_masks(masks):
    """(masks, mask_indices, mask_weights). On the CPU: on a GPU, nonzero() waits for all work."""
    per_crop = 1 / masks.sum(1).clamp(min=1)
    return masks, masks.flatten().nonzero().flatten(), per_crop.unsqueeze(1).expand_as(masks)[masks]


def split(batch, parts):
    """The micro-batches of a Batch: each has its share of the images with all their crops."""
    if parts == 1:
        return [batch]
    B = len(batch.global_crops) // 2
    rows = [x.unflatten(0, (-1 if len(x) else 0, B)).chunk(parts, dim=1) for x in batch[:5]]
    return [
        Batch(*(x.flatten(0, 1) for x in part[:4]), *index_masks(part[4].flatten(0, 1)), skipped=[])
        for part in zip(*rows, strict=True)
    ]


def positions(cfg, start_step, rank, world):
    """The positions of this rank, step by step to the end of the run."""
    B = cfg.batch // world
    for step in range(start_step, cfg.steps):
        yield range(step * cfg.batch + rank * B, step * cfg.batch + (rank + 1) * B)


def loader(cfg, source, start_step=0, rank=0, world=1):
    """Iterator over the Batches of steps start_step, start_step + 1, ... up to cfg.steps."""
    if (n := len(source)) < cfg.batch:
        fix = f"use batch={n} or less, or more images"
        raise UserError(f"{n} images are fewer than batch={cfg.batch}: {fix}")
    return by_workers(
        Dataset(source, cfg),
        cfg,
        batch_sampler=positions(cfg, start_step, rank, world),
        collate_fn=partial(collate, cfg=cfg, rank=rank, world=world),
    )
