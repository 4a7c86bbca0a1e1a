"""Which place of one image is which of another: nearest patches, keypoints, and how often right.

Shapes:  H W rows and columns of a feature map   D channels of a feature   K pairs, or points
Points are (x, y) in pixels from the upper left corner of the image; sizes are (width, height).
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F

from config import UserError


def unit(features):
    """(H, W, D) -> (H * W, D), each row of length 1: products of rows are cosines."""
    return F.normalize(features.flatten(0, 1).float(), dim=1)


def nearest(a, b):
    """For every patch of a (H, W, D) the most similar one of b: place (H, W) as row * W_b + column,
    and cosine (H, W)."""
    parts = [(rows @ unit(b).T).max(dim=1) for rows in unit(a).split(4096)]  # bounded memory
    cosine, place = (torch.cat(x).unflatten(0, a.shape[:2]) for x in zip(*parts, strict=True))
    return place, cosine


def mutual_nearest(a, b):
    """Pairs (K, 2) of places in a and in b that are each other's nearest.

    The best first. A pair that holds both ways is far more often right than one that does not.
    """
    (to_b, cosine), (to_a, _) = nearest(a, b), nearest(b, a)
    to_b, to_a, cosine = to_b.flatten(), to_a.flatten(), cosine.flatten()
    here = torch.arange(len(to_b))
    mutual = here[to_a[to_b] == here]
    mutual = mutual[cosine[mutual].argsort(descending=True, stable=True)]
    return torch.stack((mutual, to_b[mutual]), dim=1)


def centres(place, grid, size):
    """Places (row * W + column) on a grid (H, W, ...) -> the middles of these patches, pixels"""
    row, column = place // grid.shape[1], place % grid.shape[1]
    x = (column + 0.5) * size[0] / grid.shape[1]
    y = (row + 0.5) * size[1] / grid.shape[0]
    return torch.stack((x, y), dim=-1)


def transfer(points, a, b, size_a, size_b):
    """Where points (K, 2) of image a lie in image b: pixels (K, 2).

    The feature at a point is interpolated between the patches around it, and the most similar patch
    of b is the answer: it is as exact as the map of b is fine.
    """
    at = (2 * torch.as_tensor(points) / torch.tensor(size_a) - 1).float()  # -1..1, as grid_sample
    map_a = F.normalize(a.float(), dim=2).permute(2, 0, 1)[None]
    feature = F.grid_sample(map_a, at[None, None], padding_mode="border", align_corners=False)
    place = (feature[0, :, 0].T @ unit(b).T).argmax(dim=1)
    return centres(place, b, size_b)


def pck(found, truth, alpha, extent):
    """Percentage of correct keypoints: found (K, 2) within alpha * extent pixels of truth (K, 2).

    extent  the longer side of the image where they are searched, or of the object's box there
            (SPair-71k, PF-Pascal)
    """
    distance = (torch.as_tensor(found) - torch.as_tensor(truth)).double().norm(dim=1)
    return 100 * (distance <= alpha * extent).double().mean().item()


def best_of_regions(pairs, grid, regions=6):
    """Of the pairs, best first, one for each of regions x regions parts of the first image."""
    chosen = {}
    for i, j in pairs.tolist():
        row, column = divmod(i, grid[1])
        chosen.setdefault((row * regions // grid[0], column * regions // grid[1]), (i, j))
    return torch.tensor(list(chosen.values()), dtype=torch.long).reshape(-1, 2)


# ---- files --------------------------------------------------------------------------------------


def read_points(path, sizes):
    """Keypoints of a file: (points of a (K, 2), points of b (K, 2) or None).

    {"a": [[x, y], ...], "b": [[x, y], ...]}
    b, with which PCK is measured, may be left out. sizes are those of the two images.
    """
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
        a = torch.tensor(given.get("a", []), dtype=torch.float64)
        b = torch.tensor(given["b"], dtype=torch.float64) if "b" in given else None
        if more := given.keys() - {"a", "b"}:
            raise ValueError(f"unknown {', '.join(more)}")
        if a.shape[1:] != (2,) or (b is not None and b.shape != a.shape):
            raise ValueError("a and b must be equally many pairs [x, y]")
        for name, points, size in zip("ab", (a, b), sizes, strict=True):
            for x, y in points.tolist() if points is not None else []:
                if not (0 <= x <= size[0] and 0 <= y <= size[1]):
                    raise ValueError(f"({x:g}, {y:g}) of {name} lies outside its image of {size}")
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f'points={path}: {reason}; write {{"a": [[x, y], ...], "b": [[x, y], ...]}}, in pixels '
            "from the upper left corners"
        ) from None
    return a, b
