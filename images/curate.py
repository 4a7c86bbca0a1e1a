"""Choose training images from a large pool: DINOv2's data engine in small.

    python -m images.curate POOL backbone=RUN out=FOLDER curated=GOOD [against=EVALUATION] [keep=4]
    torchrun train.py config.yaml data.root=FOLDER/list.txt

  1. every image becomes a feature (normalised [CLS] and mean patch token of the backbone)
  2. of near-copies within the pool one is kept; none of images that an evaluation set shows
  3. the neighbours of GOOD images are kept: a pool of anything becomes a pool of the like
POOL is a folder or a list; GOOD and EVALUATION can be whatever data.root can be, several separated
by commas. DINOv2 section 3, "Data processing", and appendix A.

  backbone   a run folder of train.py, or its teacher.pt; at best one that knows such images
  size       pixels a side at which it sees them; 0: as it was trained
  curated    the images whose like are wanted; empty: only near-copies are removed
  keep       neighbours that each curated image gets; one wanted by two goes to the closer of them
  clusters   above 0: k-means of the pool, and whole clusters are kept instead of neighbours
  votes      curated images that have to fall into a cluster for it to be kept
  against    evaluation sets that the training must not have seen
  neighbours of each image, among which copies are sought
  threshold  least cosine of their features
  likeness   least agreement of their pixels; 0: the features alone decide
  device     auto, cpu, cuda or mps;  workers: processes that read images
The same command again goes on where it was. FOLDER gets list.txt (kept paths), why.csv (what became
of each image), report.json, sheet.png, and the features.

Shapes:  N images of the pool   M other images   D features   k neighbours, or clusters
         C channels   S side of a thumbnail
"""

import contextlib
import csv
import json
import os
import sys
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ImageColor
from torch.utils.data import DataLoader

from config import UserError, report_errors, take_options, writing
from data import centre_crop, normalised, open_source, resize, worker_options
from images.copies import S, components, near_copies, neighbours
from images.sources import Files
from parallel import pick_device, progress
from pictures import sheets
from pictures.plot import PAPER
from weights.load import load_backbone

OPTIONS = {
    "backbone": "", "size": 0, "out": "", "curated": "", "against": "", "keep": 4, "clusters": 0,
    "votes": 3, "neighbours": 64, "threshold": 0.6, "likeness": 0.9, "device": "auto", "workers": 0,
}  # fmt: skip
STRICTER = 0.05  # in likeness, for evaluation sets: there a false alarm costs less than a leak

# ---- retrieval ----------------------------------------------------------------------------------


def kmeans(x_ND, k, rounds=20, seed=0):
    """(centres (k, D), nearest centre of each row (N,)), on the sphere."""
    rng = torch.Generator().manual_seed(seed)
    centre_kD = x_ND[torch.randperm(len(x_ND), generator=rng)[:k]]
    for _ in range(rounds):
        cosine_N, at_N = (t.squeeze(1) for t in neighbours(x_ND, centre_kD, 1))
        sum_kD = torch.zeros_like(centre_kD).index_add_(0, at_N, x_ND)
        empty = at_N.bincount(minlength=len(centre_kD)) == 0
        sum_kD[empty] = x_ND[cosine_N.argsort()[: int(empty.sum())]]  # what fits worst
        centre_kD = F.normalize(sum_kD, dim=1)
    return centre_kD, neighbours(x_ND, centre_kD, 1)[1].squeeze(1)


def retrieve(query_MD, base_ND, keep):
    """{image of the base: (curated image it was chosen for, cosine)}.

    The closest pairs choose first; who comes too late takes the next neighbour.
    """
    cosine_Mk, index_Mk = (t.cpu().numpy() for t in neighbours(query_MD, base_ND, 8 * keep))
    chosen, has = {}, Counter()
    for at in np.argsort(-cosine_Mk, axis=None, kind="stable").tolist():
        query, place = divmod(at, cosine_Mk.shape[1])
        image = int(index_Mk[query, place])
        if has[query] < keep and image not in chosen:
            chosen[image], has[query] = (query, float(cosine_Mk[query, place])), has[query] + 1
    return chosen


def whole_clusters(query_MD, base_ND, clusters, votes):
    """The same, of all images of the clusters into which at least `votes` curated images fall."""
    centre_kD, at_N = kmeans(base_ND, clusters)
    at_M = neighbours(query_MD, centre_kD, 1)[1].squeeze(1)
    wanted = at_M.bincount(minlength=len(centre_kD)) >= votes
    chosen = {}
    for cluster in wanted.nonzero().squeeze(1).tolist():
        queries = (at_M == cluster).nonzero().squeeze(1)
        members = (at_N == cluster).nonzero().squeeze(1)
        cosine, place = neighbours(base_ND[members], query_MD[queries], 1)
        for image, c, p in zip(members.tolist(), cosine[:, 0], place[:, 0], strict=True):
            chosen[image] = int(queries[p]), float(c)
    return chosen


# ---- images -------------------------------------------------------------------------------------


class Pictures:
    """Index -> (normalised crop (C, size, size), thumbnail (S, S, C) uint8, readable)."""

    def __init__(self, source, cfg):
        self.source, self.size, self.data = source, cfg.crops.global_size, cfg.data

    def __len__(self):
        return len(self.source)

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
def embed(source, name, backbone, cfg, o, device):
    """Features (N, D) on the device, thumbnails (N, S, S, C) and which are readable (N,).

    They are written to FOLDER while they are made; what is there already is not made again.
    """
    file, n, C = Path(o.out, name), len(source), cfg.data.channels
    names = "\n".join([str(getattr(source, "root", "")), *map(source.name, range(n))])
    weights = zlib.crc32(b"".join(p.numpy().tobytes() for p in backbone.cpu().parameters()))
    key = [zlib.crc32(os.fsencode(names)), weights, cfg.crops.global_size]
    done, done_file = 0, file.with_suffix(".json")
    with contextlib.suppress(OSError, ValueError):  # there is none, or only half of one
        *before, at = json.loads(done_file.read_text())
        done = at if before == key else 0
    shapes = {"features": ((n, 2 * backbone.dim), "float32"), "thumbs": ((n, S, S, C), "uint8")}
    shapes["readable"] = (n,), "bool"
    arrays = {
        part: np.lib.format.open_memmap(f"{file}.{part}.npy", "r+" if done else "w+", kind, shape)
        for part, (shape, kind) in shapes.items()
    }
    images = DataLoader(Pictures(source, cfg), 128, sampler=range(done, n), **worker_options(cfg))
    backbone.to(device)
    with progress(desc=f"embedding {name}", total=n, initial=done, unit=" images") as bar:
        for crop_BCSS, thumb, readable in images:
            f = backbone.forward_features(crop_BCSS.to(device))
            parts = f["x_norm_clstoken"], f["x_norm_patchtokens"].mean(dim=1)
            feature = F.normalize(torch.cat([F.normalize(x, dim=1) for x in parts], dim=1), dim=1)
            rows = slice(done, done + len(thumb))
            for array, value in zip(arrays.values(), (feature, thumb, readable), strict=True):
                array[rows] = value.cpu().numpy()
                array.flush()
            done += len(thumb)
            done_file.write_text(json.dumps([*key, done]))
            bar.update(len(thumb))
    features = torch.tensor(arrays.pop("features"), device=device)
    return SimpleNamespace(source=source, features=features, **arrays)


# ---- the command --------------------------------------------------------------------------------

KEPT, COPY, SEEN, REJECTED, DAMAGED = "kept", "near-copy", "in evaluation", "rejected", "damaged"


class Fate(NamedTuple):
    """What becomes of an image, and because of which one: image `at` of `images`."""

    kind: str
    images: SimpleNamespace = None
    at: int = 0
    cosine: float = 0

    def why(self):
        return [self.images.source.name(self.at), f"{self.cosine:.3f}"] if self.images else ["", ""]


def curate(pool, curated, against, o):
    """The Fate of each image of the pool."""
    n = len(pool.source)
    fate = [Fate(REJECTED if ok else DAMAGED) for ok in pool.readable]
    limits = o.neighbours, o.threshold, o.likeness
    strict = max(o.likeness - STRICTER, 0)
    group_N = components(n, near_copies(pool, pool, *limits))
    for i in np.flatnonzero(group_N != np.arange(n)).tolist():
        if pool.readable[i]:
            fate[i] = because(COPY, pool, i, pool, group_N[i])
    for evaluation in against:  # the whole group goes, as in the paper
        seen = {group_N[i]: j for i, j in near_copies(pool, evaluation, *limits[:2], strict)}
        for i in range(n):
            if group_N[i] in seen and pool.readable[i]:
                fate[i] = because(SEEN, pool, i, evaluation, seen[group_N[i]])
    left = [i for i in range(n) if fate[i].kind == REJECTED]
    if not curated:
        return [Fate(KEPT) if f.kind == REJECTED else f for f in fate]
    if not left:
        raise UserError(f"nothing of {o.pool} is left to choose from; see {o.out}/why.csv")
    queries = [(c, i) for c in curated for i in np.flatnonzero(c.readable).tolist()]
    query_MD, base_ND = torch.stack([c.features[i] for c, i in queries]), pool.features[left]
    if o.clusters > len(left):
        raise UserError(f"clusters={o.clusters} are more than the {len(left)} images left")
    if o.clusters:
        chosen = whole_clusters(query_MD, base_ND, o.clusters, o.votes)
    else:
        chosen = retrieve(query_MD, base_ND, o.keep)
    for at, (query, cosine) in chosen.items():
        fate[left[at]] = Fate(KEPT, *queries[query], cosine)
    return fate


def because(kind, pool, i, other, j):
    return Fate(kind, other, int(j), float(pool.features[i] @ other.features[int(j)]))


def draw_sheet(pool, fate, path, columns=12):
    """For each fate a row of images, and above each the one because of which it is so."""
    words = {KEPT: "the curated image", COPY: "the one that stays", SEEN: "the evaluation image"}
    blank, rows = np.full((S, S, 3), ImageColor.getrgb(PAPER), np.uint8), []
    for kind in (KEPT, COPY, SEEN, REJECTED):
        found = [i for i, f in enumerate(fate) if f.kind == kind]
        shown = found[:: max(1, len(found) // columns)][:columns]
        rest, title = [blank] * (columns - len(shown)), f"{kind}: {len(found):,} images"
        if found and fate[found[0]].images:
            above = [fate[i].images.thumbs[fate[i].at] for i in shown]
            rows.append((f"{title}, {words[kind]} above", above + rest, None))
            title = ""
        if found:
            rows.append((title, [pool.thumbs[i] for i in shown] + rest, None))
    return sheets.bands(rows, path, side=72, per_row=columns)


def parse(argv):
    """The options, checked, from POOL and key=value words."""
    o, unknown = take_options(argv[1:], OPTIONS)
    if unknown:
        raise UserError(f"{unknown[0]}: unknown; write key=value with one of {', '.join(OPTIONS)}")
    o.pool = argv[0]
    for key in ("backbone", "out"):
        if not getattr(o, key):
            raise UserError(f"{key}= is missing: write images.curate POOL backbone=RUN out=FOLDER")
    if min(o.keep, o.neighbours, o.votes) < 1:
        raise UserError("keep, neighbours and votes must be at least 1")
    if not 0 <= o.likeness <= 1:
        raise UserError(f"likeness={o.likeness} must be from 0 to 1")
    return o


@report_errors
def main(argv):
    if not argv or "-h" in argv or "--help" in argv:
        print(__doc__.partition("\n\n")[2].partition("\n\nShapes")[0])
        sys.exit(0 if argv else 2)
    o = parse(argv)
    device = pick_device(o.device)
    backbone, cfg = load_backbone(o.backbone, with_config=True)
    cfg.data.workers, cfg.crops.global_size = o.workers, o.size or cfg.crops.global_size
    if cfg.crops.global_size % backbone.patch:
        raise UserError(f"size={o.size} is not a multiple of {backbone.patch} px, its patches")
    pool = open_source(o.pool, cfg)
    if not isinstance(pool, Files) or pool.index.shards:
        raise UserError(f"{o.pool}: POOL must be a folder or a list, as list.txt will hold paths")
    given = {
        key: [open_source(root, cfg, key=key) for root in getattr(o, key).split(",") if root]
        for key in ("curated", "against")
    }
    with writing(o.out):
        os.makedirs(o.out, exist_ok=True)
        pool = embed(pool, "pool", backbone, cfg, o, device)
        curated, against = (
            [embed(s, f"{key}{i}", backbone, cfg, o, device) for i, s in enumerate(sources)]
            for key, sources in given.items()
        )
        fate = curate(pool, curated, against, o)
        draw_sheet(pool, fate, Path(o.out, "sheet.png"))
        report(pool, fate, o, sum(len(c.source) for c in curated))


def report(pool, fate, o, curated):
    """Write list.txt, why.csv and report.json, and print how many images met each fate, and why."""
    out, root = Path(o.out), Path(pool.source.root).absolute()
    names = [pool.source.name(i) for i in range(len(fate))]
    kept = [str(root / name) for name, f in zip(names, fate, strict=True) if f.kind == KEPT]
    (out / "list.txt").write_text("".join(f"{p}\n" for p in kept), errors="surrogateescape")
    with open(out / "why.csv", "w", newline="", errors="surrogateescape") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "fate", "because of", "cosine"])
        rows.writerows([name, f.kind, *f.why()] for name, f in zip(names, fate, strict=True))
    how = f"clusters with {o.votes} or more curated images, of {o.clusters}"
    how = how if o.clusters else f"nearest {o.keep} of {curated:,} curated images"
    reasons = {
        KEPT: how if curated else "all that is left",
        COPY: f"cosine above {o.threshold}, likeness above {o.likeness}; one of each group stays",
        SEEN: f"near-copies of {o.against}" if o.against else "no evaluation set was given",
        REJECTED: "not among the neighbours of curated images",
        DAMAGED: "could not be read",
    }
    counts = Counter(f.kind for f in fate)
    result = {"pool": len(fate), **{kind: counts[kind] for kind in reasons}, "options": vars(o)}
    (out / "report.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{len(fate):>9,} images in {o.pool}")
    for kind, reason in reasons.items():
        print(f"{counts[kind]:>9,} {kind:<14}{reason}")
    print(f"see {o.out}/: list.txt for data.root=, why.csv, sheet.png, report.json")


if __name__ == "__main__":
    main(sys.argv[1:])
