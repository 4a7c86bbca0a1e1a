"""Pictures of what a network sees, and of how a run went.

    python -m pictures curves     RUN [RUN ...]    losses, k-NN, signs of health over the run; pale
                                                   beside it, those of other runs or logs (.jsonl)
    python -m pictures neighbours RUN [IMAGE ...]  the images most like these, as similar.png;
                                                   without IMAGE like held-out ones, before and
                                                   after training
    python -m pictures match      RUN IMAGE IMAGE  which places of two images belong together
    python -m pictures pca        RUN IMAGE ...    patch features as colours
    python -m pictures attention  RUN IMAGE ...    what [CLS] and each register look at
    python -m pictures animation  RUN              patch colours while the network learned
RUN is a run folder or a file of weights. Each writes one picture and says where.

Words after these, as key=value:
  out         where the picture goes; otherwise into RUN, or here if RUN is a file
  shifts      times a side that an image is read, moved by parts of a patch, for a finer map;
              0: as many as give 24 rows and columns
  layer       attention: block to look into, from 0, or from the end: -1 is the last
  foreground  pca, match: true finds the objects by the first component, and shows only them
  data        neighbours: data set to search, as data.root; otherwise that of the run
  count       neighbours: how many
"""

import sys
from pathlib import Path

import numpy as np
import torch

from config import UserError, report_errors, take_options
from images.evaluation import labelled_images
from images.reader import read_image, reason
from images.sources import Arrays, open_source
from parallel import pick_device, progress
from pictures import matching, sheets
from pictures.history import animate, draw_curves
from pictures.neighbours import before_and_after, draw
from pictures.patches import attention_maps, foreground, patch_features, pca_colours
from weights.load import load_backbone


class Network:
    """A backbone and what it needs to know of its images."""

    def __init__(self, run):
        net, self.cfg = load_backbone(run, with_config=True)
        self.net = net.to(pick_device(self.cfg.device))
        self.norm = self.cfg.data.mean, self.cfg.data.std

    def read(self, file):
        """A picture or array as (H, W, C) with the channels of the network."""
        channels, (mean, std) = self.cfg.data.channels, map(np.float32, self.norm)
        try:
            image = read_image(file, channels, max_pixels=0)
        except Exception as error:  # a decoder fed with damaged bytes raises anything
            raise UserError(
                f"{file}: {reason(error)} (this network reads images of {channels} channels)"
            ) from None
        if image.dtype.kind == "f" and not (abs(image - mean) < 30 * std).all():
            raise UserError(f"{file}: floats far from data.mean; scale them, or save them as uint8")
        return image

    def features(self, images, shifts):
        bar = progress(images, desc="patch features", unit=" images")
        return [patch_features(self.net, image, *self.norm, shifts) for image in bar]


def pca(run, files, o, path):
    """Patch features as colours, alike over all images."""
    network = Network(run)
    images = [network.read(file) for file in files]
    features = network.features(images, o.shifts)
    rows = [(["images"], images, [Path(file).name for file in files])]
    rows.append((["PCA of patch features"], pca_colours(features), None))
    if o.foreground:
        colours = pca_colours(features, foreground(features))
        rows.append((["PCA of the foreground"], colours, None))
    return sheets.write(sheets.bands(rows, side=240), path)


def attention(run, files, o, path):
    """For each image a row for [CLS] and for each register: the mean of the heads, and each."""
    network = Network(run)
    rows, depth, side = [], network.net.depth, 216
    if not -depth <= o.layer < depth:
        raise UserError(f"layer={o.layer}: the network has blocks 0 to {depth - 1}")
    block = o.layer % depth
    for file in progress(files, desc="attention", unit=" images"):
        image = network.read(file)
        maps = attention_maps(network.net, image, *network.norm, block, o.shifts)
        for token, map_AHW in enumerate(maps):
            title = f"register {token}" if token else "[CLS]"
            title = f"{Path(file).name}: attention of {title}, block {block} (of 0 to {depth - 1})"
            pictures, words = [image], ["image"]
            for head, map_HW in enumerate((map_AHW.mean(dim=0), *map_AHW), start=-1):
                pictures.append(sheets.overlay(image, map_HW, side))
                name = "mean" if head < 0 else f"head {head}"
                words.append(f"{name}, {100 * map_HW.sum():.0f} % on patches")
            rows.append(([title], pictures, words))
    return sheets.write(sheets.bands(rows, side), path)


def match(run, files, o, path):
    """Mutual nearest patches of two images, and the nearest of every patch."""
    network = Network(run)
    images = [network.read(file) for file in files]
    maps = network.features(images, o.shifts)
    keep = foreground(maps) if o.foreground else [torch.ones(m.shape[:2]).bool() for m in maps]
    return matching.draw(images, maps, keep, path)


def unlabelled(network, files):
    """Image files as a source without labels, for the network that they are shown to."""
    source = Arrays([network.read(file) for file in files], [-1] * len(files), [], "")
    source.name = files.__getitem__
    return source


def neighbours(run, files, o, path):
    """The images of a data set whose [CLS] features are most like those of a query."""
    network = Network(run)
    cfg = network.cfg
    if o.data:
        cfg.data.root, cfg.data.val = o.data, ""
    if not cfg.data.root:
        raise UserError("data is empty: name the images to search, as in data=/photos")
    pool = open_source(cfg.data.root, cfg)
    if not files:
        return before_and_after(network.net, labelled_images(cfg), pool, cfg, path, 0, o.count)
    networks = {"most similar of {n} images (cosine of [CLS])": network.net}
    return draw(networks, unlabelled(network, files), pool, cfg, path, o.count)


# Of each command what draws it, what follows it, and its options; `out` all have.
COMMANDS = {
    "curves": (lambda run, others, o, path: draw_curves(run, path, others), "RUN [RUN ...]", {}),
    "neighbours": (neighbours, "RUN [IMAGE ...]", {"data": "", "count": 5}),
    "match": (match, "RUN IMAGE IMAGE", {"shifts": 0, "foreground": False}),
    "pca": (pca, "RUN IMAGE ...", {"shifts": 0, "foreground": False}),
    "attention": (attention, "RUN IMAGE ...", {"shifts": 0, "layer": -1}),
    "animation": (lambda run, files, o, path: animate(run, path), "RUN", {}),
}


@report_errors
def main(argv):
    if not argv or "-h" in argv or "--help" in argv:
        print(__doc__.partition("\n\n")[2].strip())
        sys.exit(0 if argv else 2)
    command, *words = argv
    if command not in COMMANDS:
        raise UserError(f"{command}: unknown picture; use one of {', '.join(COMMANDS)}")
    drawn, usage, options = COMMANDS[command]
    o, words = take_options(words, {"out": ""} | options, least={"shifts": 0, "count": 1})
    least = sum(word.isalpha() for word in usage.split())
    if len(words) < least or (len(words) > least and "..." not in usage):
        raise UserError(f"write `python -m pictures {command} {usage}`; --help says more")
    run, *files = words
    name = f"{command}.{'gif' if command == 'animation' else 'png'}"
    if command == "neighbours" and files:
        name = "similar.png"  # the other is what the run itself has drawn
    path = Path(o.out) if o.out else Path(run if Path(run).is_dir() else "", name)
    print(f"wrote {drawn(run, files, o, path)}")


if __name__ == "__main__":
    main(sys.argv[1:])
