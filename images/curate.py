"""Choose training images from a large pool: DINOv2's data engine in small.

    python -m images.curate POOL backbone=RUN out=FOLDER curated=GOOD [against=EVALUATION] [keep=4]
    torchrun train.py config.yaml data.root=FOLDER/list.txt

  1. every image becomes a feature (normalised [CLS] and mean patch token of the backbone)
  2. of near-copies within the pool one is kept; none of images that an evaluation set shows
  3. the neighbours of GOOD images are kept: a pool of anything becomes a pool of the like
POOL is a folder or a list; GOOD and EVALUATION can be whatever data.root can be. DINOv2 section 3,
"Data processing", and appendix A.

  backbone   a run folder of train.py, or its teacher.pt; at best one that knows such images
  size       pixels a side at which it sees them; 0: as it was trained
  curated    the images whose like are wanted; empty: only near-copies are removed
  keep       neighbours that each curated image gets; one wanted by two goes to the closer of them
  against    an evaluation set that the training must not have seen
  threshold  of near-copies: least cosine of their features
  likeness   of near-copies: least agreement of their pixels; 0: the features alone decide
  device     auto, cpu, cuda or mps;  workers: processes that read images
FOLDER gets list.txt (kept paths), why.csv (what became of each image) and sheet.png.

Shapes:  N images of the pool   M other images   D features   k neighbours
         C channels   S side of a thumbnail
"""

import csv
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from config import UserError, replace_text, report_errors, take_options, writing
from images.copies import S, components, near_copies, neighbours
from images.evaluation import centre_crop, normalised, resize
from images.sources import Files, by_workers, open_source
from parallel import pick_device, progress
from pictures import sheets
from weights.load import load_backbone

OPTIONS = {
    "backbone": "", "size": 0, "out": "", "curated": "", "against": "", "keep": 4,
    "threshold": 0.6, "likeness": 0.9, "device": "auto", "workers": 0,
}  # fmt: skip


def retrieve(query_MD, base_ND, keep):
    """{image of the base: the curated image that it was chosen for}.

    The closest pairs choose first; who comes too late takes the next neighbour.
    """
    cosine_Mk, index_Mk = (t.cpu().numpy() for t in neighbours(query_MD, base_ND, 8 * keep))
    chosen, has = {}, Counter()
    for at in np.argsort(-cosine_Mk, axis=None, kind="stable").tolist():
        query, place = divmod(at, cosine_Mk.shape[1])
        image = int(index_Mk[query, place])
        if has[query] < keep and image not in chosen:
            chosen[image], has[query] = query, has[query] + 1
    return chosen


class Pictures:
    """Index -> (normalised crop (C, size, size), thumbnail (S, S, C) uint8, readable)."""

    def __init__(self, source, cfg):
        self.source, self.size, self.data = source, cfg.crops.global_size, cfg.data

    def __getitem__(self, i):
        try:
            image, readable = self.source.read(i), True
        except Exception:  # whatever a decoder raises; the image will be listed as damaged
            image, readable = np.zeros((S, S, self.data.channels), np.uint8), False
        crop = normalised(centre_crop(image, self.size), self.data.mean, self.data.std)
        thumb = np.array(resize(image, S, S))
        if thumb.dtype != np.uint8:  # of any range; likeness does not depend on it
            thumb = thumb - thumb.min()
            thumb = (thumb * (255 / max(thumb.max(), 1e-12))).astype(np.uint8)
        return crop, thumb, readable


@torch.no_grad()
def embedded(source, key, backbone, cfg, device):
    """A source with its features (N, D), all zeros where an image is damaged; and thumbnails."""
    N, features, thumbs = len(source), [], []
    batches = by_workers(Pictures(source, cfg), cfg, batch_size=128, sampler=range(N))
    for crop_BCSS, thumb, readable_B in progress(batches, total=-(-N // 128), desc=key):
        f = backbone.forward_features(crop_BCSS.to(device))
        both = f["x_norm_clstoken"], f["x_norm_patchtokens"].mean(dim=1)
        feature_BD = F.normalize(torch.cat([F.normalize(x, dim=1) for x in both], dim=1), dim=1)
        features.append(feature_BD * readable_B[:, None].to(device))
        thumbs.append(thumb)
    features, thumbs = torch.cat(features), torch.cat(thumbs).numpy()
    readable = features.any(dim=1).cpu().numpy()
    return SimpleNamespace(source=source, features=features, thumbs=thumbs, readable=readable)


# ---- the command --------------------------------------------------------------------------------

FATES = "kept", "near-copy", "in evaluation", "rejected", "damaged"
KEPT, COPY, SEEN, REJECTED, DAMAGED = FATES


class Fate(NamedTuple):
    """What becomes of an image, and because of which one: image `at` of `images`."""

    kind: str
    images: SimpleNamespace = None
    at: int = 0


def curate(pool, curated, against, o):
    """The Fate of each image of the pool."""
    n = len(pool.source)
    fate = [Fate(REJECTED if ok else DAMAGED) for ok in pool.readable]
    group_N = components(n, near_copies(pool, pool, o.threshold, o.likeness))
    seen = {}
    if against:  # the whole group goes, as in the paper
        pairs = near_copies(pool, against, o.threshold, o.likeness)
        seen = {group_N[i]: j for i, j in pairs}
    for i in np.flatnonzero(pool.readable).tolist():
        if group_N[i] in seen:
            fate[i] = Fate(SEEN, against, seen[group_N[i]])
        elif group_N[i] != i:
            fate[i] = Fate(COPY, pool, group_N[i])
    left = [i for i in range(n) if fate[i].kind == REJECTED]
    if not curated:
        return [Fate(KEPT) if f.kind == REJECTED else f for f in fate]
    if not left:
        raise UserError(f"{o.pool}: nothing left to choose from: against={o.against} shows it all")
    good = np.flatnonzero(curated.readable)
    for at, query in retrieve(curated.features[good], pool.features[left], o.keep).items():
        fate[left[at]] = Fate(KEPT, curated, good[query])
    return fate


def draw_sheet(pool, fate, path, columns=12):
    """For each fate a row of images, and above each the one because of which it is so."""
    blank, rows = np.full((S, S, 3), 255, np.uint8), []
    for kind in FATES[:-1]:  # the damaged cannot be shown
        found = [i for i, f in enumerate(fate) if f.kind == kind]
        shown = found[:: max(1, len(found) // columns)][:columns]
        rest, title = [blank] * (columns - len(shown)), f"{kind}: {len(found):,} images"
        if found and fate[found[0]].images:
            above = [fate[i].images.thumbs[fate[i].at] for i in shown]
            rows.append(([f"{title}, because of those above"], above + rest, None))
            title = ""
        if found:
            rows.append(([title], [pool.thumbs[i] for i in shown] + rest, None))
    sheets.write(sheets.bands(rows, side=72, per_row=columns), path)


def parse(argv):
    """The options, checked, from POOL and key=value words."""
    o, unknown = take_options(argv[1:], OPTIONS, {"keep": 1, "likeness": 0})
    if unknown:
        raise UserError(f"{unknown[0]}: unknown; write key=value with one of {', '.join(OPTIONS)}")
    if max(o.threshold, o.likeness) > 1:
        raise UserError("threshold= and likeness= are at most 1")
    o.pool = argv[0]
    for key in ("backbone", "out"):
        if not getattr(o, key):
            raise UserError(f"{key}= is missing: write images.curate POOL backbone=RUN out=FOLDER")
    return o


@report_errors
def main(argv):
    if not argv or "-h" in argv or "--help" in argv:
        print(__doc__.partition("\n\n")[2].partition("\n\nShapes")[0])
        sys.exit(0 if argv else 2)
    o = parse(argv)
    device = pick_device(o.device)
    backbone, cfg = load_backbone(o.backbone, with_config=True)
    backbone.to(device)
    cfg.data.workers, cfg.crops.global_size = o.workers, o.size or cfg.crops.global_size
    if cfg.crops.global_size % backbone.patch:
        raise UserError(f"size={o.size} is not a multiple of {backbone.patch} px, its patches")
    pool = open_source(o.pool, cfg)
    if not isinstance(pool, Files) or pool.index.shards:
        raise UserError(f"{o.pool}: POOL must be a folder or a list, as list.txt will hold paths")
    sources = {"pool": pool}
    for key in ("curated", "against"):
        if root := getattr(o, key):
            sources[key] = open_source(root, cfg, key=key)
    with writing(o.out):
        Path(o.out).mkdir(parents=True, exist_ok=True)
        sets = {k: embedded(source, k, backbone, cfg, device) for k, source in sources.items()}
        fate = curate(sets["pool"], sets.get("curated"), sets.get("against"), o)
        draw_sheet(sets["pool"], fate, Path(o.out, "sheet.png"))
        report(pool, fate, o)


def report(pool, fate, o):
    """Write list.txt and why.csv, and print how many images met each fate."""
    out, root, paths = Path(o.out), Path(pool.root).absolute(), []
    with open(out / "why.csv", "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "fate", "because of"])
        for i, f in enumerate(fate):
            rows.writerow([pool.name(i), f.kind, f.images.source.name(f.at) if f.images else ""])
            if f.kind == KEPT:
                paths.append(f"{root / pool.name(i)}\n")
    replace_text(out / "list.txt", "".join(paths))
    print(f"{len(fate):>9,} images in {o.pool}")
    counts = Counter(f.kind for f in fate)
    for kind in FATES:
        print(f"{counts[kind]:>9,} {kind}")
    print(f"see {o.out}/: list.txt for data.root=, why.csv, sheet.png")


if __name__ == "__main__":
    main(sys.argv[1:])
