"""The official augmentation of a linear probe: random crops of 8 to 100 % of the area, and flips.

Shapes:  B batch   C channels   S side of a crop
"""

import random

import augment
import data
from images.evaluation import normalised
from images.held_out import Part
from images.sources import by_workers, read_or_next

SCALE, RATIO, FLIP = (0.08, 1.0), (3 / 4, 4 / 3), 0.5


class RandomCrops:
    """Position in an endless shuffle of some rows of a source -> (crop (C, S, S), row)."""

    def __init__(self, source, rows, size, seed):
        self.part, self.rows, self.size, self.seed = Part(source, rows), rows, size, seed
        self.order = data.Order(len(rows), seed)

    def __getitem__(self, position):
        image, at, _ = read_or_next(self.part, self.order[position])
        rng = random.Random(f"{self.seed} crop {position}")
        box = augment.draw_box(rng, *image.shape[:2], SCALE, RATIO)
        crop_CSS = augment.resized_crop(image, box, self.size)
        crop_CSS = crop_CSS.flip(2) if rng.random() < FLIP else crop_CSS
        return crop_CSS.contiguous(), self.rows[at]


def positions(iterations, batch, rank=0, world=1):
    """The positions of this rank in the endless shuffle, iteration by iteration."""
    for step in range(iterations):
        yield range(step * batch + rank, (step + 1) * batch, world)


def augmented_batches(source, rows, cfg, iterations, batch, device, seed=0, rank=0, world=1):
    """Iterator of (normalised random crops (B, C, S, S) on the device, rows (B,)), shuffled."""
    crops = RandomCrops(source, rows.tolist(), cfg.crops.global_size, seed)
    order = list(positions(iterations, batch, rank, world))
    for image_BCSS, row_B in by_workers(crops, cfg, batch_sampler=order):
        image_BCSS = image_BCSS.to(device, non_blocking=True)
        yield normalised(image_BCSS, cfg.data.mean, cfg.data.std), row_B
