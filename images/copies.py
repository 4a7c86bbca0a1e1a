"""Find near-copies: images that show the same pixels, cropped, mirrored or compressed.

    1. features propose: the NEAREST neighbours of each image above a cosine
    2. thumbnails decide: is one image, or its mirror image, seen in a part of the other?
    3. pairs that hold together are a group (connected components)
Differs from the paper (DINOv2, appendix A), which trusts the cosine of features made for copy
detection (SSCD). Those of DINOv2 are trained to be equal for crops and flips, but they are also
alike for images of like content; measured in scripts/measure_curate.py.

Shapes:  N M images of two sets   D features   k neighbours   P pairs of images   C channels
         S side of a thumbnail   B boxes in it   g side of what a box shows   E = C * g * g
"""

import numpy as np
import torch
import torch.nn.functional as F

from parallel import progress

NEAREST = 64

# ---- neighbours and groups ----------------------------------------------------------------------


def neighbours(query_MD, base_ND, k):
    """(cosine, index) of the k nearest, (M, k) each, nearest first; exact. Rows are normalised."""
    k, chunk = min(k, len(base_ND)), max(1, 2**26 // len(base_ND))  # 256 MB of cosines
    found = [(q @ base_ND.T).topk(k) for q in progress(query_MD.split(chunk), desc="neighbours")]
    return tuple(torch.cat(part) for part in zip(*found, strict=True))


def components(n, pairs):
    """The group of each of n images, as its smallest number, where pairs hold together."""
    group_N, before_N = np.arange(n), None
    a_P, b_P = np.array(pairs, np.int64).reshape(-1, 2).T
    while not np.array_equal(group_N, before_N):  # until no pair lowers a number any more
        before_N = group_N[group_N]
        group_N = before_N.copy()
        np.minimum.at(group_N, a_P, before_N[b_P])
        np.minimum.at(group_N, b_P, before_N[a_P])
    return group_N


# ---- pixels -------------------------------------------------------------------------------------

S, g, STEP = 64, 16, 0.04
SIDES = range(8)  # steps by which a box is smaller: crops down to 0.72 of a side, half the area


def resampling(start, side):
    """(g, S): the part from `start` of a line of S pixels as g pixels, antialiased (triangles)."""
    width = side * S / g
    centre_g = start * S + (torch.arange(g) + 0.5) * width
    weight_gS = (1 - (torch.arange(S) + 0.5 - centre_g[:, None]).abs() / width).clamp(min=0)
    return weight_gS / weight_gS.sum(dim=1, keepdim=True)


# For each side of a box, all its places along a line: n of (g, S).
PLACES = [torch.stack([resampling(i * STEP, 1 - n * STEP) for i in range(n + 1)]) for n in SIDES]


def details(image_BCgg):
    """Unit vectors (B, E) of what is left without the coarse light and dark.

    Two photographs of sky agree in their gradients, by 0.95 and more; in their details they do not.
    """
    padded = F.pad(image_BCgg, (2, 2, 2, 2), mode="replicate")
    return F.normalize((image_BCgg - F.avg_pool2d(padded, 5, 1)).flatten(1), dim=1)


def boxes(thumb):
    """Thumbnail (S, S, C) -> details of all its boxes (B, E)."""
    image_CSS = torch.tensor(thumb).float().permute(2, 0, 1)
    return details(torch.cat([
        torch.einsum("ags,cst,bht->abcgh", place, image_CSS, place).flatten(0, 1)
        for place in PLACES
    ]))  # fmt: skip


def likeness(whole, part, pairs):
    """For pairs (P, 2): how well image part[j], or its mirror image, is seen in whole[i].

    whole, part  thumbnails (N, S, S, C) uint8. The best correlation over all boxes, at most 1.
    """
    score_P, order = torch.empty(len(pairs)), pairs[:, 0].argsort()
    images, counts = pairs[order, 0].unique_consecutive(return_counts=True)
    groups = zip(images.tolist(), order.split(counts.tolist()), strict=True)
    full_gS = PLACES[0][0]
    for i, at in progress(groups, desc="comparing pixels", total=len(images), unit=" images"):
        other = torch.tensor(part[pairs[at, 1].numpy()]).float()
        other_pCgg = torch.einsum("gs,pstc,ht->pcgh", full_gS, other, full_gS)
        both_2pE = torch.stack((details(other_pCgg), details(other_pCgg.flip(3))))
        score_P[at] = (both_2pE @ boxes(whole[i]).T).amax(dim=(0, 2))
    return score_P


def near_copies(query, base, threshold, least):
    """Pairs (i of query, j of base) of near-copies, each once.

    query, base  two sets with .features (N, D) and .thumbs, or twice the same one
    least        likeness of the pixels from which a pair counts; 0: the cosine alone decides
    """
    cosine_Mk, index_Mk = neighbours(query.features, base.features, NEAREST + 1)
    near = cosine_Mk > threshold
    pairs = torch.stack((near.nonzero()[:, 0], index_Mk[near]), dim=1).cpu()
    if query is base:
        pairs = pairs[pairs[:, 0] != pairs[:, 1]].sort(dim=1).values.unique(dim=0)
    if not least or not len(pairs):
        return pairs.tolist()
    score_P = likeness(query.thumbs, base.thumbs, pairs)
    score_P = torch.maximum(score_P, likeness(base.thumbs, query.thumbs, pairs.flip(1)))
    return pairs[score_P > least].tolist()
