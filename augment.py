"""Everything random that happens to an image: crops, flips, colour, blur, solarise, block masks.

From one image, DINOv2 cuts two large and several small crops, changes the colours of each, and
learns that they show the same thing. Here this has two halves:
  - chance: a View, ten or so numbers per crop, drawn from a python random.Random. The same random
    state gives the same crops, in whatever process and order they are made.
  - work: given the View, nothing is random. The data workers cut the crops (uint8); colour() treats
    a whole batch of them on the device that trains, each crop with its own numbers.

Sources: the official DataAugmentationDINO; SimCLR (Chen et al. 2020); BYOL (Grill et al. 2020)
for blur and solarise per kind of crop; BEiT (Bao et al. 2022) for the block masks.

Shapes:  H, W sides of the image   C channels   S side of the crop   X = S * S pixels   N crops
         P numbers of a Colour   K taps of the blur
"""

import itertools
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

# ---- chance: what will happen to a crop ---------------------------------------------------------

KINDS = GLOBAL_1, GLOBAL_2, LOCAL = 0, 1, 2  # they differ in size, blur and solarise

# The four jitter operations go by number, and their 24 orders too. The orders are sorted by the
# place of hue, because jitter() wants the crops with hue at one place side by side.
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
ORDERS = sorted(itertools.permutations(range(4)), key=lambda order: order.index(HUE))


class Colour(NamedTuple):
    """What happens to the colours of one crop; all crops of a batch are the rows of a tensor."""

    brightness: float  # factors around 1
    contrast: float
    saturation: float
    hue: float  # shift, as a share of the colour circle
    order: float  # of these four: index into ORDERS
    jitter: float  # 1: they happen, 0: they do not
    grey: float  # 1: colour is taken out
    blur: float  # sigma in pixels, 0: none
    solarize: float  # 1: bright pixels are inverted


class View(NamedTuple):
    """All random draws of one crop."""

    box: tuple  # top, left, height, width
    flip: bool
    colour: Colour


def draw_view(rng, height, width, cfg, kind):
    """One crop of an image of this size; kind is one of KINDS."""
    scale = cfg.crops.local_scale if kind == LOCAL else cfg.crops.global_scale
    box = draw_box(rng, height, width, scale, cfg.crops.ratio)
    return View(box, rng.random() < cfg.augment.flip, draw_colour(rng, cfg.augment, kind))


def draw_box(rng, height, width, scale, ratio):
    """(top, left, height, width): `scale` of the area, sides in a log-uniform `ratio` (w / h).

    A shape that does not fit is drawn again, up to ten times; then comes the largest box in the
    centre whose ratio is allowed. The rule is that of torchvision's RandomResizedCrop.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def draw_colour(rng, strength, kind):
    """Every number is drawn, used or not: a changed probability leaves the other draws alone."""

    def factor(amount):
        return rng.uniform(max(0, 1 - amount), 1 + amount)

    sigma = rng.uniform(*strength.blur_sigma)
    return Colour(
        brightness=factor(strength.brightness),
        contrast=factor(strength.contrast),
        saturation=factor(strength.saturation),
        hue=rng.uniform(-strength.hue, strength.hue),
        order=rng.randrange(len(ORDERS)),
        jitter=rng.random() < strength.jitter,
        grey=rng.random() < strength.grey,
        # The official configuration reads 1.0, 0.1, 0.5, but its code applies the complement. What
        # took effect, and trained the released models, is 0.0, 0.9, 0.5: our defaults.
        # Ablation: `augment.blur=[1.0,0.1,0.5]` is what was intended.
        blur=sigma * (rng.random() < strength.blur[kind]),
        solarize=rng.random() < strength.solarize[kind],
    )


# ---- work on one image: crops -------------------------------------------------------------------


def resized_crop(image_HWC, box, size):
    """The box of an image, resized to a tensor (C, size, size) with an antialiased bicubic filter.

    uint8, also as a tensor, stays uint8. Other integers become float32 divided by their largest
    value, floats are float32 with the values they had (the filter may overshoot them a little).

    Differs from the official code, which has Pillow resize its uint8 images: PyTorch's kernel for
    the same filter takes a fifth of the time. It keeps fewer bits of the weights, which changes one
    value in 200 by 1 of 255 levels, in pure noise now and then by 2; both clip between the passes,
    rows first. (Pillow 13 may begin with the columns, which in noise makes 30 levels.)
    """
    top, left, height, width = box
    part_HWC = image_HWC[top : top + height, left : left + width]  # first cut: no pixel outside
    part_HWC = torch.tensor(part_HWC) if part_HWC.dtype == np.uint8 else part_HWC
    if torch.is_tensor(part_HWC):
        part_1CHW = part_HWC.permute(2, 0, 1)[None]
        return F.interpolate(part_1CHW, (size, size), mode="bicubic", antialias=True)[0]
    integer = np.issubdtype(part_HWC.dtype, np.integer)
    part_HWC = np.float32(part_HWC) / (np.iinfo(part_HWC.dtype).max if integer else 1)
    planes = [Image.fromarray(plane) for plane in part_HWC.transpose(2, 0, 1)]
    planes = [plane.resize((size, size), Image.Resampling.BICUBIC) for plane in planes]
    return torch.from_numpy(np.stack(planes))


def crops(image_HWC, rng, cfg):
    """(crops, colours) of one image: uint8 tensors (C, S, S), two large ones first; (crops, P)."""
    height, width = image_HWC.shape[:2]
    kinds = (GLOBAL_1, GLOBAL_2) + (LOCAL,) * cfg.crops.local_count
    views = [draw_view(rng, height, width, cfg, kind) for kind in kinds]
    image_HWC = torch.tensor(image_HWC) if image_HWC.dtype == np.uint8 else image_HWC  # once
    cut = []
    for kind, view in zip(kinds, views, strict=True):
        size = cfg.crops.local_size if kind == LOCAL else cfg.crops.global_size
        crop_CSS = resized_crop(image_HWC, view.box, size)
        cut.append((crop_CSS.flip(2) if view.flip else crop_CSS).contiguous())
    return cut, torch.tensor([view.colour for view in views], dtype=torch.float32)


# ---- work on a batch: colour --------------------------------------------------------------------
#
# The functions change x in place: on a CPU, memory for every intermediate result takes longer than
# the arithmetic.

# What makes 24 orders cheap: hue is the only operation that is not a blend (below), so all crops of
# a batch are lined up at their hue. Seven moments, NONE where a crop waits for the others:
#     contrast, hue, brightness, saturation   ->   NONE NONE contrast HUE brightness saturation NONE
NONE = -1
MOMENTS = torch.tensor(
    [[NONE] * (3 - o.index(HUE)) + list(o) + [NONE] * o.index(HUE) for o in ORDERS]
)


def send(x, device):
    """A small CPU tensor to the device, without waiting for what the device is doing."""
    return x.to(device, non_blocking=True)


def luma(x):
    """Grey of each pixel (ITU-R BT.601): the eye is most sensitive to green, least to blue."""
    red, green, blue = x.unbind(1)
    return torch.mul(red, 0.299).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def blend(x_NCX, operation_N, factor_N):
    """Brightness, contrast and saturation: one formula with three targets, in place.

        x <- clamp(target + factor * (x - target))      target = black                   brightness
                                                                 mean grey of the crop   contrast
                                                                 grey of the pixel       saturation
    Each crop has its own operation and factor (on the CPU).
    """
    rest_N = 1 - factor_N
    rest_2N = [rest_N * (operation_N == operation) for operation in (CONTRAST, SATURATION)]
    factor_N1, mean_N1, pixel_N1 = send(torch.stack([factor_N, *rest_2N])[..., None], x_NCX.device)
    grey_NX = luma(x_NCX)
    mean_N1 = mean_N1 * grey_NX.mean(1, keepdim=True)
    target_NX = grey_NX.mul_(pixel_N1).add_(mean_N1)  # times 1 - factor
    torch.addcmul(target_NX[:, None], x_NCX, factor_N1[..., None], out=x_NCX).clamp_(0, 1)


def turn_hue(x_NCX, shift_N):
    """Turn the colour circle by `shift` rounds; the largest and smallest channel keep their values.

    On a circle of six steps, red at 0, green at 2, blue at -2, a channel is at its maximum within
    one step of its own colour, at its minimum beyond two steps, and linear between. Read backwards,
    that gives the hue of a pixel; read forwards with another hue, the new channels:
        hue     = (1 + (g + b - r - min) / (max - min)) * sign(g - b)                  in [-3, 3]
        channel = min + (max - min) * clamp(2 - steps from hue to its colour, 0, 1)
    """
    red, green, blue = x_NCX.unbind(1)
    low_NX = torch.minimum(red, green)
    torch.minimum(low_NX, blue, out=low_NX)
    range_NX = torch.maximum(red, green)
    torch.maximum(range_NX, blue, out=range_NX).sub_(low_NX)

    hue_NX = (green + blue).sub_(red).sub_(low_NX).div_(range_NX.clamp(min=1e-8)).add_(1)
    hue_NX.copysign_(green - blue).add_(send(6 * shift_N, x_NCX.device)[:, None])
    hue_NX.sub_((hue_NX / 6).round_(), alpha=6)  # back into [-3, 3]

    for channel_NX, at in zip((red, green, blue), (0, 2, -2), strict=True):
        # Steps on the circle are min(d, 6 - d) = 3 - |d - 3|, so 2 - steps is |d - 3| - 1.
        torch.sub(hue_NX, at, out=channel_NX).abs_().sub_(3).abs_().sub_(1).clamp_(0, 1)
        torch.addcmul(low_NX, channel_NX, range_NX, out=channel_NX)


def jitter(x_NCSS, look):
    """The four operations, each crop in its own order. The crops come sorted by order."""
    x_NCX = x_NCSS.flatten(2)
    moments_N7 = MOMENTS[look.order.long()]
    factor_N4 = torch.stack(look[:4], dim=1)
    for moment, operation_N in enumerate(moments_N7.unbind(1)):
        if moment == 3:
            turn_hue(x_NCX, look.hue)
        elif due := int((operation_N != NONE).sum()):
            # Sorted by the place of hue, the crops with something due are neighbours: a view of x.
            rows = slice(-due, None) if moment < 3 else slice(due)
            operation_N = operation_N[rows]
            blend(x_NCX[rows], operation_N, factor_N4[rows].gather(1, operation_N[:, None])[:, 0])
    return x_NCSS


def grey(x_NCSS, look):
    return x_NCSS.copy_(luma(x_NCSS)[:, None])


def blur(x_NCSS, look, taps=9):
    """Gaussian blur, a sigma for each crop: along rows, then columns, mirrored at the border.

    Nine taps whatever the size of the crop, as in the released code.
    """
    reach = taps // 2
    kernel_NK = (-0.5 * (torch.arange(-reach, reach + 1) / look.blur[:, None]) ** 2).exp()
    kernel_NK = send(kernel_NK / kernel_NK.sum(1, keepdim=True), x_NCSS.device)
    weight_KN111 = kernel_NK.T[..., None, None, None]
    for dim, border in (3, (reach, reach, 0, 0)), (2, (0, 0, reach, reach)):
        S = x_NCSS.shape[dim]
        wide = F.pad(x_NCSS, border, mode="reflect")
        torch.mul(wide.narrow(dim, reach, S), weight_KN111[reach], out=x_NCSS)
        for k in range(reach):  # the two pixels at one distance share their weight
            pair = wide.narrow(dim, k, S) + wide.narrow(dim, taps - 1 - k, S)
            x_NCSS.addcmul_(pair, weight_KN111[k])
    return x_NCSS


def solarize(x_NCSS, look):
    return torch.where(x_NCSS < 128 / 255, x_NCSS, 1 - x_NCSS)


# In this order; the names are those of Colour.
# Ablation: `OPERATIONS = {"grey": grey, "blur": blur, "solarize": solarize}`, without jitter.
OPERATIONS = {"jitter": jitter, "grey": grey, "blur": blur, "solarize": solarize}


def recolour(x_NCSS, colour_NP):
    """Each operation on the crops that want it, in place. colour_NP is on the CPU."""
    look = Colour(*colour_NP.unbind(1))
    by_order_N = look.order.argsort()
    for name, operation in OPERATIONS.items():
        rows = by_order_N[getattr(look, name)[by_order_N] > 0]
        # Jitter, grey and solarise are about how colours look to us. In an X-ray or a satellite's
        # infrared a value is a measurement.
        if len(rows) and (x_NCSS.shape[1] == 3 or operation is blur):
            at = send(rows, x_NCSS.device)
            changed = operation(x_NCSS.index_select(0, at), Colour(*colour_NP[rows].unbind(1)))
            x_NCSS.index_copy_(0, at, changed)


def colour(crops_NCSS, colour_NP, mean, std):
    """What each row of colour_NP says, on crops from `crops`; then normalised float32 (N, C, S, S).

    uint8 crops are brought to [0, 1], others are taken as they are. Keep colour_NP on the CPU: then
    no step waits for the device. If the images are not RGB, jitter, grey and solarise are skipped.

    Differs from the official code, which rounds to uint8 after each operation and turns the hue of
    8-bit HSV pixels: this stays in float32. Of 255 levels, one operation differs by at most 1, but
    hue by up to 10 (1 on average), six operations in a row by up to 7 (1.5 on average).
    """
    device, colour_NP = crops_NCSS.device, colour_NP.cpu()
    mean_C11, std_C11 = send(torch.tensor([mean, std])[..., None, None], device)
    x_NCSS = crops_NCSS.to(torch.float32, copy=True)
    if not crops_NCSS.is_floating_point():
        x_NCSS.div_(255)
    recolour(x_NCSS, colour_NP)
    return x_NCSS.sub_(mean_C11).div_(std_C11)


# ---- block masks --------------------------------------------------------------------------------


def block_mask(height, width, n, rng, smallest=4, aspect=(0.3, 1 / 0.3)):
    """A (height, width) bool grid in which at most n patches are hidden, by a few rectangles.

    Rectangles, because a single hidden patch can be guessed from its neighbours. Each takes up to
    what the earlier ones left of n, and at most half the grid. When ten tries in a row do not fit,
    the mask is finished: about one in ten hides a patch or two less than n.

    Draw by draw, this is the official MaskingGenerator.
    """
    mask = np.zeros((height, width), dtype=bool)
    log_aspect = math.log(aspect[0]), math.log(aspect[1])
    hidden = tries = 0
    while hidden < n and tries < 10:
        # Half the grid is written 0.5 * size // patch * size // patch in the official code, which
        # from left to right is this: 666 of 37 x 37 patches, not 684.
        most = min(n - hidden, height // 2 * width)
        area = rng.uniform(smallest, most)
        shape = math.exp(rng.uniform(*log_aspect))
        h, w = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        tries += 1
        if h < height and w < width:
            top, left = rng.randint(0, height - h), rng.randint(0, width - w)
            block = mask[top : top + h, left : left + w]
            new = h * w - np.count_nonzero(block)
            if 0 < new <= most:
                block[:] = True
                hidden, tries = hidden + new, 0
    return mask


def batch_masks(n_crops, height, width, probability, ratio, rng):
    """(n_crops, height * width) bool: a share `probability` of the crops, by chance, is masked.

    The share of hidden patches is spread evenly over the masked crops: `ratio` is cut into as many
    equal intervals, and each crop draws from its own. So every batch hides about the same number.
    """
    masked = int(n_crops * probability)
    # float32 as in the official code, since int() below would show a difference in the last bit.
    edges = torch.linspace(*ratio, masked + 1).numpy()
    masks = np.zeros((n_crops, height * width), dtype=bool)
    for i in range(masked):
        n = int(height * width * rng.uniform(edges[i], edges[i + 1]))
        masks[i] = block_mask(height, width, n, rng).flatten()
    order = list(range(n_crops))
    rng.shuffle(order)
    return masks[order]
