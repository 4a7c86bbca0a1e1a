"""Features of many images in one file, for whatever you want to do with them.

python -m evals.features RUN /photos out=features.npz

found = numpy.load("features.npz")
found["names"]      (N,) the images; those that cannot be read are left out
found["labels"]     (N,) their classes, as numbers of found["classes"]; -1: none
found["features"]   (N, D) [CLS] after the last norm
found["patches"]    (N, h, w, D) patch tokens after the last norm, with patches=true
"""

import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch

import config
from config import UserError
from evals.cache import chunks
from evals.frozen import KEYS, extract, open_network, tell_damaged
from images.evaluation import DAMAGED
from images.sources import open_source
from parallel import pick_device

OPTIONS = {"out": "features.npz", "patches": False, "float16": False}

USAGE = """
usage: python -m evals.features RUN FOLDER [option=value ...] [key=value ...]

Writes the features of all images in FOLDER (or of a list, shards, an array: what data.root may be)
by the backbone in RUN: a run folder, a file of weights or a released name. Options:
  out=features.npz   names, labels, classes, features (N, D); what was interrupted goes on
  patches=false      true: patches (N, h, w, D) too
  float16=false      true: two bytes a number instead of four
Keys override the config of the run, such as crops.global_size=448 or device=cpu:
"""


def tokens(backbone, patches, half):
    """The function that extracts [CLS] and maybe patches, (N, tokens, D), for chunks()."""

    def network(image_BCHW):
        found = backbone.forward_features(image_BCHW)
        cls_B1D, patch_BND = found["x_norm_clstoken"][:, None], found["x_norm_patchtokens"]
        return torch.cat((cls_B1D, patch_BND), dim=1) if patches else cls_B1D

    def extract_tokens(_, *more):
        x_NTD, label_N = extract(network, *more)
        return x_NTD.half() if half else x_NTD, label_N

    return extract_tokens


def put(archive, name, shape, arrays):
    """Write arrays one after the other as a single one, which may be larger than the memory."""
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        for i, array in enumerate(arrays):
            if i == 0:
                kind = np.lib.format.dtype_to_descr(array.dtype)
                header = {"descr": kind, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(array.tobytes())


@config.report_errors
def main(argv):
    run, words = config.main_arguments(argv, USAGE, KEYS)
    if not words or "=" in words[0]:
        raise UserError("FOLDER is missing: write python -m evals.features RUN FOLDER")
    folder, (o, words) = words[0], config.take_options(words[1:], OPTIONS)
    if not o.out.endswith(".npz"):
        raise UserError(f"out={o.out}: its ending must be .npz")
    backbone, cfg = open_network(run, words)
    device, source = pick_device(cfg.device), open_source(folder, cfg, "", key="FOLDER")
    how = tokens(backbone.to(device), o.patches, o.float16)
    options, waiting = f"{o.patches} {o.float16}", Path(f"{o.out}.parts")

    def found():
        return chunks(waiting, how, backbone, source, cfg, device, "features", options)

    label_N = torch.cat([label_n for _, label_n in found()])
    tell_damaged(source, label_N)
    rows = (label_N != DAMAGED).nonzero().flatten().tolist()
    readable = (x_nTD[label_n != DAMAGED].numpy() for x_nTD, label_n in found())
    side, N, D = cfg.crops.global_size // cfg.vit.patch, len(rows), backbone.dim
    with config.writing(f"out={o.out}"):
        with zipfile.ZipFile(waiting / "whole.npz", "w") as archive:
            put(archive, "names", (N,), [np.array([source.name(i) for i in rows])])
            put(archive, "labels", (N,), [label_N[rows].numpy()])
            put(archive, "classes", (len(source.classes),), [np.array(source.classes, str)])
            put(archive, "features", (N, D), (x_nTD[:, 0] for x_nTD in readable))
            if o.patches:
                readable = (x_nTD[label_n != DAMAGED].numpy() for x_nTD, label_n in found())
                put(archive, "patches", (N, side, side, D), (x_nTD[:, 1:] for x_nTD in readable))
        shutil.move(waiting / "whole.npz", o.out)
        shutil.rmtree(waiting)
    print(f"{N:,} images, {D} channels: {o.out}")


if __name__ == "__main__":
    main(sys.argv[1:])
