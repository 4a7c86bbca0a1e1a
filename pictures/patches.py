"""What a backbone says about places of images: features, attention, PCA colours, what matches.

    features = [patch_features(net, image, mean, std) for image in images]   # (H, W, D) each
    colours = pca_colours(features)                                          # (H, W, 3) each

An image of any size and proportions is read with interpolated positions. The map can be finer than
the patches: the picture is read several times, each time moved by a part of a patch, and the grids
are interleaved; nothing is smoothed or made up.

Shapes:  H W rows and columns of the map   D features of a patch   N patches of all images together
         S shifts along each side, so S * S views of a picture   A attention heads
         T = 1 + R + patches: the tokens ([CLS], registers, patches)   C channels of an image
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from attention import pack
from images.evaluation import normalised, resize

SHORT_SIDE = 32  # patches along the shorter side: what a larger picture is reduced to
FINE = 24  # rows and columns that a map has at least, if need be by shifts


# ---- reading an image ---------------------------------------------------------------------------


def to_pixels(image, patch, mean, std):
    """uint8 (H, W, C) -> normalised (1, C, height, width), both multiples of the patch."""
    short = min(image.shape[:2])
    factor = min(max(short, patch), SHORT_SIDE * patch) / short
    height, width = (max(1, round(n * factor / patch)) * patch for n in image.shape[:2])
    pixels = torch.tensor(resize(image, height, width)).permute(2, 0, 1)
    return normalised(pixels, mean, std)[None]


def shifted(pixels, patch, shifts=0):
    """(1, C, height, width) -> (S * S, C, height, width): moved by parts of a patch, edges kept.

    View s is centred on the s-th of S equal parts of each patch; with one shift nothing moves.
    shifts  S, at most the pixels of a patch; 0: as many as give a map of FINE rows and columns
    """
    height, width = pixels.shape[2:]
    shifts = min(shifts or math.ceil(FINE * patch / min(height, width)), patch)
    wide = F.pad(pixels, [patch] * 4, mode="replicate")
    at = [patch + (2 * i + 1) * patch // (2 * shifts) - patch // 2 for i in range(shifts)]
    return torch.cat([wide[:, :, y : y + height, x : x + width] for y in at for x in at])


def interleave(grids):
    """(S * S, h, w, ...) of the shifted views -> (h * S, w * S, ...) of the picture."""
    shifts = math.isqrt(len(grids))
    grids = grids.unflatten(0, (shifts, shifts)).movedim((2, 3), (0, 2))  # (h, S, w, S, ...)
    return grids.flatten(2, 3).flatten(0, 1)


@torch.no_grad()
def patch_features(net, image, mean, std, shifts=0, dtype=torch.float32):
    """uint8 image of any size -> its patch features (H, W, D), fp32, on the CPU.

    shifts  S; 0: see shifted
    dtype   of the images, and so of what is computed
    """
    pixels = to_pixels(image, net.patch, mean, std).to(net.pos_embed.device)
    tokens = []
    for views in shifted(pixels, net.patch, shifts).to(dtype).split(16):  # bounded memory
        # Called, not one of its methods: the call gathers sharded weights.
        tokens.append(net(views, is_training=True)["x_norm_patchtokens"].float().cpu())
    return interleave(torch.cat(tokens).unflatten(1, (pixels.shape[2] // net.patch, -1)))


# ---- attention ----------------------------------------------------------------------------------


@torch.no_grad()
def attention_weights(net, pixels, layer):
    """How much [CLS] and each register take from every token: (B, A, 1 + R, T), rows sum to one.

        softmax(Q K^T / sqrt(E))   of block `layer`, with its own weights, E channels per head

    Computed here a second time, so that vit.py needs no way to hand out what fast kernels never
    write down.
    """
    tokens = net.prepare_tokens(pixels)
    packing = pack((tokens.shape[:2],), net.attention, pixels.device, pixels.dtype)
    x = tokens.flatten(0, 1)
    for block in net.blocks[:layer]:
        x = block(x, packing)
    block = net.blocks[layer]
    qkv = block.attn.qkv(block.norm1(x)).unflatten(1, (3, block.attn.heads, -1))
    q, k, _ = qkv.unflatten(0, tokens.shape[:2]).permute(2, 0, 3, 1, 4)  # (B, A, T, E) each
    scores = q[:, :, : 1 + net.registers] @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    return scores.float().softmax(dim=-1)


def attention_maps(net, image, mean, std, layer, shifts=0):
    """Attention of [CLS] and registers to each place: (1 + R, A, H, W).

    A map's sum, at most one, is the share that goes to patches; [CLS] and registers get the rest.
    """
    pixels = to_pixels(image, net.patch, mean, std).to(net.pos_embed.device)
    views = shifted(pixels, net.patch, shifts)
    weights = attention_weights(net, views, layer)[..., 1 + net.registers :].cpu()
    grids = weights.movedim(3, 1).unflatten(1, (pixels.shape[2] // net.patch, -1))
    return interleave(grids / len(views)).movedim((2, 3), (1, 0))  # from (H, W, A, 1 + R)


# ---- colours ------------------------------------------------------------------------------------


def flat(maps):
    """One map (H, W, ...) per image as the rows (N, ...) of all."""
    return torch.cat([m.flatten(0, 1) for m in maps])


def as_maps(rows, features):
    """Cut rows (N, ...) of all patches into one map (H, W, ...) per image."""
    parts = rows.split([f.shape[0] * f.shape[1] for f in features])
    return [part.unflatten(0, f.shape[:2]) for part, f in zip(parts, features, strict=True)]


def components(features, keep_N=slice(None), count=3):
    """Each patch along the `count` directions in which those to keep differ most: (N, count).

    A direction may point either way: the one is taken in which its largest entry is positive, so
    that pictures are repeatable.
    """
    x_ND = flat(features).double()
    x_ND = x_ND - x_ND[keep_N].mean(dim=0)
    _, axes_DD = torch.linalg.eigh(x_ND[keep_N].T @ x_ND[keep_N])  # ascending
    axes = axes_DD[:, -count:].flip(1)
    return x_ND @ (axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign())


def pca_colours(features, keep=None):
    """Patch features (H, W, D) per image -> uint8 (H, W, 3) per image.

    The three directions in which the patches of all images differ most become red, green, blue.
    Joint over the images: the same colour means the same feature everywhere.
    keep  bool (H, W) per image: the others neither count nor have a colour, they stay black
    """
    keep_N = flat(keep or [torch.ones(f.shape[:2]) for f in features]).bool()
    colour_N3 = stretched(components(features, keep_N), keep_N) * keep_N[:, None]
    return [m.numpy() for m in as_maps(colour_N3, features)]


def stretched(x_N3, keep_N=slice(None)):
    """Each column from its 2nd to its 98th percentile, over the rows to keep, as uint8.

    Percentiles, because one odd patch would otherwise leave all others in one colour.
    """
    kept = x_N3[keep_N]
    low, high = (torch.tensor(np.quantile(kept.numpy(), q, axis=0)) for q in (0.02, 0.98))
    least = 1e-6 * kept.norm().clamp(min=1e-30) / len(kept) ** 0.5  # where all patches are alike
    colour = ((x_N3 - (low + high) / 2) / (high - low).clamp(min=least) + 0.5).clamp(0, 1)
    return (255 * colour).round().byte()


def foreground(features):
    """Which patches show the objects: bool (H, W) per image, jointly over the images.

    The first principal direction separates objects from what is around them (DINOv2, section 7.5).
    The foreground is the side of its mean that is rarer along the borders of images than inside.
    """
    above = as_maps(components(features, count=1)[:, 0] > 0, features)
    border = torch.cat([torch.cat((a[0], a[-1], a[:, 0], a[:, -1])) for a in above])
    turned = border.double().mean() > flat(above).double().mean()
    return [a != turned for a in above]


def steady_colours(frames):
    """Colours of the same images at several times, which change only as the features do.

    frames  per time, features (H, W, D) per image. Each time has PCA colours of its own, but axes
    may turn from one time to the next: going back from the last, each is turned (an orthogonal
    matrix, Schoenemann 1966) so that its patches come as close as possible to those of the next.
    """
    coloured, after_N3 = [], None
    for features in reversed(frames):
        x_N3 = components(features)
        if after_N3 is not None:
            left, _, right = torch.linalg.svd(x_N3.T @ after_N3)
            x_N3 = x_N3 @ (left @ right)
        after_N3 = x_N3 / x_N3.norm().clamp(min=1e-30)
        coloured.append([m.numpy() for m in as_maps(stretched(x_N3), features)])
    return coloured[::-1]


def nearest(a, b):
    """For every patch of a (H, W, D) the most similar one of b, by cosine: row * W_b + column."""
    a_ND, b_ND = (F.normalize(x.flatten(0, 1).float(), dim=1) for x in (a, b))
    parts = [(rows @ b_ND.T).argmax(dim=1) for rows in a_ND.split(4096)]  # bounded memory
    return torch.cat(parts).unflatten(0, a.shape[:2])


def mutual_nearest(a, b):
    """Pairs (K, 2) of patches of a and of b that are each other's nearest, row * W + column.

    A pair that holds both ways is far more often right than one that does not.
    """
    to_b, to_a = nearest(a, b).flatten(), nearest(b, a).flatten()
    here = torch.arange(len(to_b))
    here = here[to_a[to_b] == here]
    return torch.stack((here, to_b[here]), dim=1)
