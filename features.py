"""From images to feature vectors, once: the [CLS] token of a frozen backbone for a whole data set.

    features_ND, label_N = extract_features(backbone, source, cfg, device)
    features_ND, label_N = cached_features(folder, backbone, source, cfg, device, "features")

The transform is the official one for evaluation (data.centre_crop). Beside it the two floors that a
trained backbone has to beat: a network without training, and the pixels themselves.

Shapes:  N images of a source   B of them in a batch   D channels of a feature
"""

import copy
import hashlib
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import data
from config import UserError
from index import progress, stamps
from parallel import dtype_of, in_order, lists_of_ranks, ranks
from vit import assign


@torch.no_grad()
def extract_features(backbone, source, cfg, device, what="features", keep=None):
    """L2-normalised [CLS] of every image of a source, (N, D) fp32, and labels (N,).

    Each rank works on its share of the images; all of them get all features. They stay on
    `device`, or go to `keep`: "cpu" if there are too many for the GPU.
    """
    # no_grad, not inference_mode: sharded weights are gathered into tensors that training uses too.
    features, labels = [], []
    rank, world = ranks()
    batches = data.evaluation_batches(source, cfg, device=device, rank=rank, world=world)
    with progress(total=len(source), desc=what, unit=" images") as bar:
        for image_BCHW, label_B in batches:
            cls_BD = backbone(image_BCHW.to(dtype_of(cfg)))
            features.append(in_order(F.normalize(cls_BD.float(), dim=1)).to(keep or device))
            labels.append(in_order(label_B.to(device)).to(keep or device))
            bar.update(len(label_B) * world)
    # With several ranks the first images come again at the end, to fill the last batch.
    return torch.cat(features)[: len(source)], torch.cat(labels)[: len(source)]


# ---- cache ---------------------------------------------------------------------------------------


def cached_features(folder, backbone, source, cfg, device, what, keep=None):
    """What extract_features returns, from a file of this folder if they are in it, else put there.

    The file is named after everything that the features depend on, so that it is never used for
    another network, data set or size.
    """
    if not hasattr(backbone, "blocks"):  # raw pixels: larger than the images that they come from
        return extract_features(backbone, source, cfg, device, what, keep)
    path = Path(folder, f"{fingerprint(backbone, source, cfg)}.safetensors")
    if all(lists_of_ranks([path.exists()])):  # ranks agree: extracting is work for all of them
        try:
            found = load_file(path)
            return tuple(found[name].to(keep or device) for name in ("features", "labels"))
        except (OSError, KeyError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({error}); delete this file") from None
    features, labels = extract_features(backbone, source, cfg, device, what, keep)
    if ranks()[0] == 0:
        aside = path.with_suffix(".part")
        try:
            aside.parent.mkdir(parents=True, exist_ok=True)
            save_file({"features": features, "labels": labels}, aside)
            os.replace(aside, path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be written ({error}); set cache=FOLDER") from None
    return features, labels


def fingerprint(backbone, source, cfg):
    """A word that differs if weights, network, images, labels, size or precision do."""
    digest = hashlib.sha256()
    for name, value in backbone.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.cpu().contiguous().numpy())
    heads = [block.attn.heads for block in backbone.blocks]
    digest.update(
        repr([heads, backbone.interpolate_offset, backbone.interpolate_antialias]).encode()
    )
    how = [cfg.crops.global_size, dtype_of(cfg), cfg.data.mean, cfg.data.std]
    digest.update(repr([*how, *source_words(source)]).encode())
    return digest.hexdigest()[:32]


def source_words(source):
    """Whatever changes when the images of a source do: labels, names, sizes and times of files."""
    if isinstance(source, data.Part):
        yield from source_words(source.source)
        yield list(source.indices)
        return
    yield source.classes
    yield hashlib.sha256(np.asarray(source.labels, np.int64).tobytes()).hexdigest()
    if hasattr(source, "index"):  # files, or shards of them
        yield hashlib.sha256(source.index.names.tobytes()).hexdigest()
        yield hashlib.sha256(source.index.slices.tobytes()).hexdigest()
        names = [str(Path(source.root, source.name(i))) for i in range(len(source))]
        paths = source.index.shards or names
        yield [paths, stamps(paths)]
    elif getattr(source.images, "filename", None):  # an array that is left on the disk
        file = source.images.filename
        yield [str(file), stamps([file]), source.images.offset, source.images.shape]
    else:
        yield hashlib.sha256(np.ascontiguousarray(source.images)).hexdigest()


# ---- floors --------------------------------------------------------------------------------------


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
