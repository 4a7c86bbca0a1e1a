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
"""

import random
import sys
from pathlib import Path

import numpy as np
import torch

from config import UserError, report_errors, take_options
from images.evaluation import labelled_images
from images.reader import read_image, reason
from images.sources import Arrays, open_source
from parallel import pick_device, progress
from pictures import patches, sheets
from pictures.history import animate, draw_curves
from pictures.neighbours import before_and_after, draw
from pictures.plot import PAPER, Page
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
            note = f" (the network reads {channels})" * ("data.channels" in (why := reason(error)))
            raise UserError(f"{file}: {why}{note}") from None
        if image.dtype.kind == "f" and not (abs(image - mean) < 30 * std).all():
            raise UserError(f"{file}: floats far from data.mean; scale them, or save them as uint8")
        return image

    def features(self, images, shifts):
        bar = progress(images, desc="patch features", unit=" images")
        return [patches.patch_features(self.net, image, *self.norm, shifts) for image in bar]


def pca(run, files, o, path):
    """Patch features as colours, alike over all images."""
    network = Network(run)
    images = [network.read(file) for file in files]
    features = network.features(images, o.shifts)
    rows = [(["images"], images, [Path(file).name for file in files])]
    rows.append((["PCA of patch features"], patches.pca_colours(features), None))
    if o.foreground:
        colours = patches.pca_colours(features, patches.foreground(features))
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
        tokens = patches.attention_maps(network.net, image, *network.norm, block, o.shifts)
        for token, map_AHW in enumerate(tokens):
            title = f"register {token}" if token else "[CLS]"
            title = f"{Path(file).name}: attention of {title}, block {block} (of 0 to {depth - 1})"
            maps = {"mean": map_AHW.mean(dim=0)}
            maps |= {f"head {n}": map_HW for n, map_HW in enumerate(map_AHW)}
            shown = [sheets.overlay(image, map_HW, side) for map_HW in maps.values()]
            words = [f"{name}, {100 * m.sum():.0f} % on patches" for name, m in maps.items()]
            rows.append(([title], [image, *shown], ["image", *words]))
    return sheets.write(sheets.bands(rows, side), path)


def match(run, files, o, path, lines=40, side=480):
    """Two images with lines between mutual nearest patches, and the nearest of every patch."""
    network = Network(run)
    images = [network.read(file) for file in files]
    maps = network.features(images, o.shifts)
    keep = [torch.ones(m.shape[:2]).bool() for m in maps]
    if o.foreground:
        keep = patches.foreground(maps)
    pairs = patches.mutual_nearest(*maps)
    pairs = pairs[keep[0].flatten()[pairs[:, 0]] & keep[1].flatten()[pairs[:, 1]]]
    # Places of the left image have colours, and those on the right have that of their nearest.
    left = sheets.position_colours(*maps[0].shape[:2])
    colours = left.reshape(-1, 3)
    right = colours[patches.nearest(maps[1], maps[0]).numpy()]
    fields = [c * k.numpy()[:, :, None] for c, k in zip((left, right), keep, strict=True)]
    fields = [sheets.tinted(*both) for both in zip(images, fields, strict=True)]
    count = f"{len(pairs):,} of {keep[0].sum():,}, at most {lines} of them drawn"
    field = "every patch on the right has the colour of its nearest on the left"
    rows = [([f"mutual nearest patches: {count}"], images, None), ([field], fields, None)]
    sheet = sheets.bands(rows, side)
    page = Page(*sheet.size)
    page.large.paste(sheet.resize(page.large.size))
    forms = [np.array(image.shape[:2]) / max(image.shape[:2]) * side for image in images]
    middle = sheets.HEAD + max(height for height, _ in forms) / 2
    for pair in random.Random(0).sample(pairs.tolist(), min(lines, len(pairs))):
        ends = []
        for n, (height, width) in enumerate(forms):
            row, column = divmod(pair[n], maps[n].shape[1])
            x = (column + 0.5) / maps[n].shape[1] * width + sheets.GAP + n * (side + sheets.GAP)
            ends.append((x, ((row + 0.5) / maps[n].shape[0] - 0.5) * height + middle))
        colour = tuple(colours[pair[0]].tolist())
        page.line(ends, PAPER, 3)
        page.line(ends, colour, 1.6)
        for x, y in ends:
            page.dot(x, y, colour)
    return sheets.write(page.finished(), path)


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
        return before_and_after(network.net, labelled_images(cfg), pool, cfg, path, len(pool))
    networks = {"most similar of {n} images (cosine of [CLS])": network.net}
    return draw(networks, unlabelled(network, files), pool, cfg, path)


# Of each command what draws it, what follows it, and its options; `out` all have.
COMMANDS = {
    "curves": (lambda run, others, o, path: draw_curves(run, path, others), "RUN [RUN ...]", {}),
    "neighbours": (neighbours, "RUN [IMAGE ...]", {"data": ""}),
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
    o, words = take_options(words, {"out": ""} | options, least={"shifts": 0})
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
