"""Images as they are evaluated: labelled ones in two parts, centre crops, nothing random.

The transform is the official one for evaluation. A damaged image is marked and never replaced.

Shapes:  B images of a batch   C channels   S side of a crop
"""

import numpy as np
import torch
from PIL import Image

from config import UserError
from images.held_out import pair, some
from images.sources import by_workers, open_source, read_or_next, split_folder
from parallel import warn_once

DAMAGED = -2  # in place of the label of an image that cannot be read (one without a class has -1)


def evaluation_images(cfg):
    """What k-NN during training compares, at most log.knn_images of each part; None: no k-NN."""
    if not cfg.log.knn:
        return None
    train, test = open_source(cfg.data.root, cfg, "train"), open_held_out(cfg)
    try:
        parts = pair(train, test, cfg)
    except UserError as error:  # labels are optional in training
        warn_once(f"no k-NN during training: {error}")
        return None
    return some(*parts, cfg.log.knn_images) if parts and cfg.log.knn_images else parts


def labelled_images(cfg):
    """(images with known labels, images to classify) of data.root and data.val; see pair()."""
    return pair(open_source(cfg.data.root, cfg, "train"), open_held_out(cfg), cfg)


def open_held_out(cfg):
    """The images to classify: those of data.val, or else of val/ or test/ in data.root; or None."""
    root, val = cfg.data.root, cfg.data.val
    if val:
        return open_source(val, cfg, "test", key="data.val")
    if root == "synthetic" or split_folder(root, "train") != split_folder(root, "test"):
        return open_source(root, cfg, "test")
    return None


def centre_crop(image, size):
    """(H, W, C) -> (C, size, size): the shorter side becomes 256/224 of size, then the centre.

    The official evaluation transform. An image whose shorter side is `size` already is not resized:
    enlarging small pictures such as CIFAR's only to cut off their borders loses information.
    """
    height, width = image.shape[:2]
    short = min(height, width)
    target = size if short == size else round(size * 256 / 224)
    image = resize(image, int(target * height / short), int(target * width / short))
    top, left = round((image.shape[0] - size) / 2), round((image.shape[1] - size) / 2)
    return torch.tensor(image[top : top + size, left : left + size]).permute(2, 0, 1)


def resize(image, height, width):
    """Pillow's antialiased bicubic, one channel at a time: there can be any number of them.

    As in augment.resized_crop, integers of more than 8 bits become float32 in 0..1.
    """
    if image.dtype != np.uint8:
        scale = np.iinfo(image.dtype).max if image.dtype.kind in "ui" else 1
        image = np.float32(image) / np.float32(scale)
    if image.shape[:2] == (height, width):
        return image
    planes = [Image.fromarray(plane) for plane in np.ascontiguousarray(image.transpose(2, 0, 1))]
    return np.stack([p.resize((width, height), Image.Resampling.BICUBIC) for p in planes], axis=2)


class Evaluation:
    """Index -> (crop (C, size, size), label); a damaged image is marked, and counts nowhere.

    A rank has every `world`-th image. All have equally many, for which the last begin again: with
    sharded weights, each forward pass is an appointment of all ranks.
    """

    def __init__(self, source, size, rank=0, world=1):
        self.source, self.size, self.rank, self.world = source, size, rank, world

    def __len__(self):
        return -(-len(self.source) // self.world)

    def __getitem__(self, index):
        index = (index * self.world + self.rank) % len(self.source)
        image, at, _ = read_or_next(self.source, index)
        # In place of a damaged image lies the next one, as batches of all ranks are equally large.
        return centre_crop(image, self.size), self.source.label(at) if at == index else DAMAGED


def evaluation_batches(source, cfg, batch=256, device="cpu", rank=0, world=1):
    """Iterator of (normalised images (B, C, size, size) on `device`, labels (B,) on the CPU)."""
    images = Evaluation(source, cfg.crops.global_size, rank, world)
    for image_BCSS, label_B in by_workers(images, cfg, batch_size=batch):
        image_BCSS = image_BCSS.to(device, non_blocking=True)
        yield normalised(image_BCSS, cfg.data.mean, cfg.data.std), label_B


def normalised(pixels, mean, std):
    """Pixels (.., C, H, W), uint8 or in 0..1, brought to the given mean and std of each channel."""
    mean, std = (torch.tensor(v, device=pixels.device)[:, None, None] for v in (mean, std))
    return (pixels / (255 if pixels.dtype == torch.uint8 else 1) - mean) / std
