"""Features of many images in one file, for whatever you want to do with them.

    python -m evals.features RUN FOLDER [out=features.npz] [patches=true] [key=value ...]

    found = numpy.load("features.npz")
    found["names"]      (N,) the images; those that cannot be read are left out
    found["labels"]     (N,) their classes, as numbers of found["classes"]; -1: none
    found["features"]   (N, D) [CLS] after the last norm
    found["patches"]    (N, h, w, D) patch tokens after the last norm, with patches=true

RUN is a run folder, a file of weights or a released name; FOLDER whatever data.root may be. All
features must fit in memory. Other keys override the config of the run, such as
crops.global_size=448 or device=cpu.
"""

import sys

import numpy as np
import torch

import config
from evals.frozen import check_place, extract, open_network, run_and_folder, tell_damaged
from images.evaluation import DAMAGED
from images.sources import open_source
from parallel import pick_device


@config.report_errors
def main(argv):
    run, folder, words = run_and_folder(argv, __doc__)
    o, words = config.take_options(words, {"out": "features.npz", "patches": False})
    check_place("out", o.out)
    backbone, cfg = open_network(run, words)
    device, source = pick_device(cfg.device), open_source(folder, cfg, "", key="FOLDER")
    backbone.to(device)

    def tokens(image_BCHW):
        """[CLS] and maybe patches, one above the other: (B, tokens, D)."""
        found = backbone.forward_features(image_BCHW)
        cls_B1D, patch_BND = found["x_norm_clstoken"][:, None], found["x_norm_patchtokens"]
        return torch.cat((cls_B1D, patch_BND), dim=1) if o.patches else cls_B1D

    x_NTD, label_N = extract(tokens, source, cfg, device, keep="cpu")
    tell_damaged(source, label_N)
    rows = (label_N != DAMAGED).nonzero().flatten()
    x_NTD, side = x_NTD[rows].numpy(), cfg.crops.global_size // cfg.vit.patch
    found = {
        "names": np.array([source.name(i) for i in rows.tolist()]),
        "labels": label_N[rows].numpy(),
        "classes": np.array(source.classes, str),
        "features": x_NTD[:, 0],
    }
    if o.patches:
        found["patches"] = x_NTD[:, 1:].reshape(len(rows), side, side, -1)
    with config.writing(f"out={o.out}"), open(o.out, "wb") as file:
        np.savez(file, **found)
    print(f"{len(rows):,} images, {backbone.dim} channels: {o.out}")


if __name__ == "__main__":
    main(sys.argv[1:])
