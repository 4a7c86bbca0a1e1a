"""Pictures of what a network sees, and of how a run went.

    python -m pictures curves     RUN              losses, k-NN, signs of health over the run
    python -m pictures pca        RUN IMAGE ...    patch features as colours
    python -m pictures attention  RUN IMAGE ...    what [CLS] and each register look at
    python -m pictures match      RUN IMAGE IMAGE  which places of two images belong together
    python -m pictures neighbours RUN [IMAGE ...]  the most similar images of a data set
    python -m pictures animation  RUN              patch colours while the network learned
RUN is a run folder or a file of weights. Each writes one picture and says where.

Words after these, as key=value:
  out         where the picture goes; otherwise into RUN, or here if RUN is a file
  size        pixels of the shorter side as the network gets it; 0: its own, at most 32 patches
  shifts      times a side that an image is read, moved by parts of a patch, for a finer map;
              0: as many as give 24 rows and columns
  window      pixels a side read in one pass, larger images in overlapping windows; 0: 64 patches
  layer       block to look into, from 0, or from the end: -1 is the last
  foreground  pca, match: true finds the objects by the first component, and shows only them
  head        attention: only this head, from 0; otherwise all, and their mean
  points      match: keypoints in the first image, .json or .csv (see matching.py); if they are
              known in the second too, the share that is found (PCK) is measured
  alpha       match: how near counts as found, as a share of the longer side
  extra       match: features of another network, .npz of a and b, to be joined with these
  weight      match: share of the extra features, 0 to 1
  save        match: write the features of this network as such an .npz
  data        neighbours: data set to search, as data.root; otherwise that of the run
  count       neighbours: how many
"""

import sys
from pathlib import Path

import numpy as np
import torch

import eval_knn
from config import UserError, report_errors, take_options, writing
from data import Part, evaluation_images, open_source
from images.sources import decode, read_or_next
from parallel import pick_device, progress
from pictures import history, matching, sheets
from pictures.patches import attention_maps, foreground, patch_features, pca_colours
from weights.load import load_backbone

READING = {"size": 0, "shifts": 0, "layer": -1}
OPTIONS = {
    "curves": {"out": ""},
    "pca": {"out": "", **READING, "window": 0, "foreground": False},
    "attention": {"out": "", **READING, "head": -1},
    "match": {"out": "", **READING, "window": 0, "points": "", "alpha": 0.1, "extra": "",
              "weight": 0.5, "save": "", "foreground": False},
    "neighbours": {"out": "", "data": "", "count": 8},
    "animation": {"out": ""},
}  # fmt: skip
LEAST = {"size": 0, "shifts": 0, "window": 0, "alpha": 0, "weight": 0, "count": 1, "head": 0}


# ---- reading ------------------------------------------------------------------------------------


class Network:
    """A backbone and what it needs to know of its images."""

    def __init__(self, run):
        net, self.cfg = load_backbone(run, with_config=True)
        self.net = net.to(pick_device(self.cfg.device))
        self.norm = self.cfg.data.mean, self.cfg.data.std

    def read(self, file):
        """A picture or array as (H, W, C) with the channels of the network."""
        channels, patch = self.cfg.data.channels, self.net.patch
        try:
            image = decode(Path(file).read_bytes(), str(file), channels)
        except Exception as error:  # a decoder fed with damaged bytes raises anything
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"{file}: {reason}; give a readable picture of {channels} channels, or an .npy"
            ) from None
        if min(image.shape[:2]) < patch:
            raise UserError(
                f"{file}: {image.shape[1]} x {image.shape[0]} pixels are less than a patch of "
                f"{patch}; enlarge the picture"
            )
        return image

    def features(self, images, o):
        more = o.size, o.shifts, o.window, o.layer
        bar = progress(images, desc="patch features", unit=" images")
        return [patch_features(self.net, image, *self.norm, *more) for image in bar]

    def check(self, o):
        """Options that depend on the network, refused or completed."""
        patch, depth = self.net.patch, self.net.depth
        for key in ("size", "window"):
            value = getattr(o, key, 0)
            if value and value < patch:
                raise UserError(f"{key}={value} is less than a patch: use {patch} or more")
        if o.shifts > patch:
            raise UserError(f"shifts={o.shifts}: a patch has {patch} pixels, use at most {patch}")
        if not -depth <= o.layer < depth:
            raise UserError(f"layer={o.layer}: the network has blocks 0 to {depth - 1}")
        o.layer %= depth
        heads = self.net.blocks[0].attn.heads
        if not -1 <= getattr(o, "head", -1) < heads:
            raise UserError(f"head={o.head}: the network has heads 0 to {heads - 1}")


# ---- PCA and attention --------------------------------------------------------------------------


def pca(network, files, o, path):
    """Patch features as colours, alike over all images."""
    network.check(o)
    images = [network.read(file) for file in files]
    features = network.features(images, o)
    rows = [("images", images, [Path(file).name for file in files])]
    rows.append(("PCA of patch features", pca_colours(features), None))
    if o.foreground:
        colours = pca_colours(features, foreground(features))
        rows.append(("PCA of the foreground", colours, None))
    return sheets.bands(rows, path, side=min(max(1200 // len(files), 160), 240))


def attention(network, files, o, path):
    """For each image a row for [CLS] and for each register: the mean of the heads, and each."""
    network.check(o)
    depth, rows = network.net.depth, []
    heads = range(network.net.blocks[0].attn.heads) if o.head < 0 else [o.head]
    columns = len(heads) + (2 if o.head < 0 else 1)
    columns = columns if columns <= 14 else -(-columns // 2)
    side = min(max(1300 // columns, 140), 260)
    for file in progress(files, desc="attention", unit=" images"):
        image = network.read(file)
        maps, shares = attention_maps(network.net, image, *network.norm, o.layer, o.size, o.shifts)
        for token, (map_AHW, share_A) in enumerate(zip(maps, shares, strict=True)):
            name = f"register {token}" if token else "[CLS]"
            title = f"{Path(file).name}: attention of {name}, block {o.layer} (of 0 to {depth - 1})"
            pictures = [sheets.overlay(image, map_AHW[head], side) for head in heads]
            words = [f"head {head}, {100 * share_A[head]:.0f} % on patches" for head in heads]
            if o.head < 0:
                pictures.insert(0, sheets.overlay(image, map_AHW.mean(dim=0), side))
                words.insert(0, f"mean, {100 * share_A.mean():.0f} % on patches")
            rows.append((title, [image, *pictures], ["image", *words]))
    return sheets.bands(rows, path, side, columns)


# ---- matching -----------------------------------------------------------------------------------


def match(network, files, o, path):
    """Mutual nearest patches, the dense field, and keypoints with PCK, of two images."""
    network.check(o)
    images = [network.read(file) for file in files]
    sizes = [(image.shape[1], image.shape[0]) for image in images]
    points = matching.read_points(o.points, sizes) if o.points else None
    maps = network.features(images, o)
    if o.save:
        save_features(o.save, maps)
    if o.extra:
        extra = matching.read_features(o.extra, [m.shape[:2] for m in maps])
        maps = [matching.fuse(*both, o.weight) for both in zip(maps, extra, strict=True)]
    pairs, _ = matching.mutual_nearest(*maps)
    keep = foreground(maps) if o.foreground else [torch.ones(m.shape[:2]).bool() for m in maps]
    pairs = pairs[keep[0].flatten()[pairs[:, 0]] & keep[1].flatten()[pairs[:, 1]]]
    place, _ = matching.nearest(maps[1], maps[0])
    wheel = sheets.position_colours(*maps[0].shape[:2])
    fields = [wheel, wheel.reshape(-1, 3)[place.numpy()]]
    fields = [f * k.numpy()[:, :, None] for f, k in zip(fields, keep, strict=True)]
    page = sheets.Pair(images, 3 if points else 2)
    count = f"{len(pairs):,} of {keep[0].sum():,}"
    page.title(f"mutual nearest patches: {count}, of which the best of each region")
    page.show(*images)
    for i, j in best_of_regions(pairs, maps[0].shape):
        ends = [matching.centres(p, m, s) for p, m, s in zip((i, j), maps, sizes, strict=True)]
        page.connect(*ends, colour="#{:02x}{:02x}{:02x}".format(*wheel.reshape(-1, 3)[i]))
    page.title("every patch on the right has the colour of its nearest on the left")
    page.show(*(sheets.tinted(*both) for both in zip(images, fields, strict=True)))
    if points:
        found, _ = matching.transfer(points[0], *maps, *sizes)
        page.title(keypoint_title(found, points, sizes[1], o.alpha))
        page.show(*images)
        page.keypoints(points[0], found, points[1])
    return sheets.write(page.finished(), path)


def keypoint_title(found, points, size, alpha):
    """The words over the keypoints, with PCK where the truth is known; they are printed too."""
    _, truth, box = points
    if truth is None:
        return f"{len(found)} keypoints of the left image, found in the right one"
    extent = max(size) if box is None else (box[2:] - box[:2]).max().item()
    share = matching.pck(found, truth, alpha, extent)
    side = "image" if box is None else "box"
    words = f"PCK@{alpha:g} = {share:.1f} % of {len(found)} keypoints"
    print(f"{words} (within {alpha * extent:.1f} pixels, {alpha:g} of the {side}'s longer side)")
    return words + "; a cross is where one belongs, a line how far it is off"


def save_features(file, maps):
    with writing(f"save={file}"), open(file, "wb") as out:
        np.savez(out, a=maps[0].numpy(), b=maps[1].numpy())


def best_of_regions(pairs, grid, regions=6):
    """Of the pairs, best first, one for each of regions x regions parts of the first image."""
    chosen = {}
    for i, j in pairs.tolist():
        row, column = divmod(i, grid[1])
        chosen.setdefault((row * regions // grid[0], column * regions // grid[1]), (i, j))
    return torch.tensor(list(chosen.values()), dtype=torch.long).reshape(-1, 2)


# ---- neighbours ---------------------------------------------------------------------------------


class Pictures:
    """Image files as a source without labels, for the network that they are shown to."""

    classes = ()

    def __init__(self, network, files):
        self.files, self.images = files, [network.read(file) for file in files]

    def __len__(self):
        return len(self.files)

    def read(self, i):
        return self.images[i]

    def label(self, i):
        return -1

    def name(self, i):
        return self.files[i]


def neighbours(network, files, o, path):
    """A row for each query: the images of a data set whose [CLS] features are most like its own.

    Without files, some held-out images of the data set ask for their neighbours in the others.
    """
    cfg, device = network.cfg, next(network.net.parameters()).device
    cfg.data.root, cfg.precision = o.data or cfg.data.root, "fp32"
    if files:
        pool, queries = open_source(cfg.data.root, cfg), Pictures(network, files)
    else:
        sources = evaluation_images(cfg)
        if sources is None:
            raise UserError(f"{cfg.data.root}: has no held-out images; name some to search for")
        pool, test = sources
        count = min(6, len(test))
        queries = Part(test, [(i * len(test) // count + i) % len(test) for i in range(count)])
    features_ND, _ = eval_knn.extract_features(network.net, pool, cfg, device, "data set")
    query_QD, _ = eval_knn.extract_features(network.net, queries, cfg, device, "queries")
    cosines, nearest = (query_QD @ features_ND.T).topk(min(o.count, len(pool)), dim=1)
    title = f"query, and the most similar of {len(pool):,} images (cosine of [CLS] features)"
    rows = []
    for query, (values, places) in enumerate(zip(cosines.tolist(), nearest.tolist(), strict=True)):
        shown = [read_or_next(queries, query), *(read_or_next(pool, i) for i in places)]
        first, *others = (image for image, _, _ in shown)
        name = Path(files[query]).name if files else words_of(queries, query)
        words = [f"{c:.2f} {words_of(pool, i)}" for c, i in zip(values, places, strict=True)]
        rows.append(("" if rows else title, [first, None, *others], [name, "", *words]))
    return sheets.bands(rows, path, side=112, per_row=len(rows[0][1]))


def words_of(source, i):
    """The class of an image, or its file where there are no classes."""
    return source.classes[source.label(i)] if source.label(i) >= 0 else Path(source.name(i)).name


# ---- command line -------------------------------------------------------------------------------

NAMES = {"pca": "pca_images.png", "animation": "animation.gif"}  # others: <command>.png
WORDS = {  # what follows the command, and how many words that may be
    "curves": ("RUN", 1, 1),
    "pca": ("RUN IMAGE ...", 2, 999),
    "attention": ("RUN IMAGE ...", 2, 999),
    "match": ("RUN IMAGE IMAGE", 3, 3),
    "neighbours": ("RUN [IMAGE ...]", 1, 999),
    "animation": ("RUN", 1, 1),
}


def parse(argv):
    """(command, run, image files, options) from the words of the command line."""
    command, *words = argv
    if command not in OPTIONS:
        raise UserError(f"{command}: unknown picture; use one of {', '.join(OPTIONS)}")
    o, files = take_options(words, OPTIONS[command])
    for word in files:
        if "=" in word and not Path(word).exists():
            raise UserError(f"{word}: {command} takes {', '.join(OPTIONS[command])}")
    for key, value in vars(o).items():
        if value != OPTIONS[command][key] and value < LEAST.get(key, value):
            raise UserError(f"{key}={value}: must be {LEAST[key]} or more")
    if getattr(o, "weight", 0) > 1:
        raise UserError(f"weight={o.weight}: must be at most 1")
    usage, least, most = WORDS[command]
    if not least <= len(files) <= most:
        raise UserError(f"write `python -m pictures {command} {usage}`; --help says more")
    return command, files[0], files[1:], o


@report_errors
def main(argv):
    if not argv or "-h" in argv or "--help" in argv:
        print(__doc__.partition("\n\n")[2].strip())
        sys.exit(0 if argv else 2)
    command, run, files, o = parse(argv)
    name = NAMES.get(command, f"{command}.png")
    path = Path(o.out) if o.out else Path(run if Path(run).is_dir() else "", name)
    of_run = {"curves": history.draw_curves, "animation": history.animate}
    of_network = {"pca": pca, "attention": attention, "match": match, "neighbours": neighbours}
    if command in of_run:
        where = of_run[command](run, path)
    else:
        where = of_network[command](Network(run), files, o, path)
    print(f"wrote {where}")


if __name__ == "__main__":
    main(sys.argv[1:])
