"""Features of a data set that are computed once, a file for each CHUNK of images.

Used by `python eval_knn.py RUN cache=FOLDER` and by images.curate. What was interrupted goes on.
"""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from config import UserError, writing
from images.held_out import Part
from images.index import stamps
from parallel import dtype_of, lists_of_ranks, ranks

CHUNK = 4096  # images


def cached_features(folder, extract, backbone, source, cfg, device, what, keep=None):
    """(features, labels) of extract(backbone, source, ...), from this folder or put there.

    In it is a folder that is named after everything that they depend on, so that they are never
    used for another network, data set or size. Without a folder they are not kept.
    """
    if not folder:
        return extract(backbone, source, cfg, device, what, keep)
    folder, found = Path(folder, fingerprint(backbone, source, cfg)), []
    for start in range(0, len(source), CHUNK):
        path = folder / f"{start:010}.safetensors"
        if all(lists_of_ranks([path.exists()])):  # ranks agree: extracting is work for all of them
            try:
                parts = load_file(path)
                found.append((parts["features"], parts["labels"]))
            except (OSError, KeyError, SafetensorError) as error:
                raise UserError(f"{path}: cannot be read ({error}); delete this file") from None
            continue
        part = Part(source, range(start, min(start + CHUNK, len(source))))
        title = f"{what} ({start:,} of {len(source):,} done)" if start else what
        features, labels = (x.cpu() for x in extract(backbone, part, cfg, device, title, "cpu"))
        if ranks()[0] == 0:
            aside = path.with_suffix(".part")  # what is interrupted leaves no half file
            with writing(path):
                folder.mkdir(parents=True, exist_ok=True)
                aside.write_bytes(save({"features": features.contiguous(), "labels": labels}))
                os.replace(aside, path)
        found.append((features, labels))
    features, labels = zip(*found, strict=True)
    return tuple(torch.cat(parts).to(keep or device) for parts in (features, labels))


def fingerprint(backbone, source, cfg):
    """A word that differs if weights, network, images, labels, size or precision do."""
    digest = hashlib.sha256()
    for name, value in backbone.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.cpu().contiguous().numpy())
    how = [block.attn.heads for block in backbone.blocks]
    how += [backbone.interpolate_offset, backbone.interpolate_antialias, cfg.crops.global_size]
    how += [backbone.norm.eps, dtype_of(cfg), cfg.data.mean, cfg.data.std]
    digest.update(repr([*how, *source_words(source)]).encode())
    return digest.hexdigest()[:32]


def source_words(source):
    """Whatever changes when the images of a source do: labels, names, sizes and times of files."""
    yield source.classes
    yield hashlib.sha256(np.asarray(source.labels, np.int64).tobytes()).hexdigest()
    if isinstance(source, Part):
        yield hashlib.sha256(np.asarray(source.indices, np.int64).tobytes()).hexdigest()
        yield from source_words(source.source)
    elif hasattr(source, "index"):  # files, or shards of them
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
