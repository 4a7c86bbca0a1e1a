"""Features of a data set that are computed once: `python eval_knn.py RUN cache=FOLDER`."""

import hashlib
import os
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import data
from config import UserError
from images.index import stamps
from parallel import dtype_of, lists_of_ranks, ranks


def cached_features(folder, extract, backbone, source, cfg, device, what, keep=None):
    """(features, labels) of extract(backbone, source, ...), from this folder or put there.

    The file is named after everything that the features depend on, so that it is never used for
    another network, data set or size.
    """
    if not hasattr(backbone, "blocks"):  # raw pixels: larger than the images that they come from
        return extract(backbone, source, cfg, device, what, keep)
    path = Path(folder, f"{fingerprint(backbone, source, cfg)}.safetensors")
    if all(lists_of_ranks([path.exists()])):  # ranks agree: extracting is work for all of them
        try:
            found = load_file(path)
            return tuple(found[name].to(keep or device) for name in ("features", "labels"))
        except (OSError, KeyError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({error}); delete this file") from None
    features, labels = extract(backbone, source, cfg, device, what, keep)
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
