"""Parts of a step alone, as scripts/benchmarks.py measures them: attention, losses, crops.

Shapes:  B images   S all crops   K prototypes   M hidden patches
"""

import io
import random
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from attention import attend, check_backend, pack
from augment import colour, crops
from bench import __main__ as bench
from bench.measure import Work
from config import UserError
from dinov2 import LARGE_CROPS, Output, build_centers, objective
from images.reader import read_image
from optim import schedules
from parallel import dtype_of
from vit import SIZES


def losses(cfg, device):
    """From given scores, in place of networks, to their gradients: targets and all losses."""
    batch, B, K = next(bench.batches(cfg, device)), cfg.batch, cfg.head.prototypes
    S, M = LARGE_CROPS + cfg.crops.local_count, len(batch.mask_indices)

    def noise(*shape):  # of the size of the scores of a trained network
        return (0.2 * torch.randn(shape, device=device)).to(dtype_of(cfg)).requires_grad_()

    # Both views are alike for the teacher: the official code has swapped them before its heads.
    told = Output(None, noise(B, K).detach().repeat(LARGE_CROPS, 1), noise(M, K).detach())
    said = Output(noise(LARGE_CROPS * B, 384), noise(S * B, K), noise(M, K))

    def in_phases(objective):
        def run(clock):
            def student(*_, **__):
                clock.mark("targets")
                return said

            loss = objective(student, lambda *_, **__: told, batch)
            clock.mark("losses")
            grads = torch.autograd.grad(loss, said)
            clock.mark("backward")
            return [x.item() for x in (loss, *(grad[:8].norm() for grad in grads))]

        return run

    centers, temp = build_centers(cfg).to(device), schedules(cfg.steps // 2, cfg).teacher_temp

    def loss_of(student, teacher, batch):
        return objective(student, teacher, centers, batch, temp, cfg.loss)[0]

    title = f"Losses, {cfg.loss.centering}: {B} images, {S} crops, {M} patches, K = {K:,}"
    return Work(f"{title}, {dtype_of(cfg)}", {"ours": in_phases(loss_of)}, B, given=(in_phases,))


def jpeg(height, width, quality):
    """The bytes of a JPEG: smooth structure and fine texture, always the same."""
    rng, pixels = np.random.default_rng(0), 0
    for cells, weight in (4, 0.45), (16, 0.35), (max(height, width), 0.2):
        layer = Image.fromarray(rng.uniform(0, 255, (cells, cells, 3)).astype(np.uint8))
        pixels += weight * np.float32(layer.resize((width, height), Image.Resampling.BICUBIC))
    Image.fromarray(pixels.astype(np.uint8)).save(file := io.BytesIO(), "JPEG", quality=quality)
    return file.getvalue()


def augment(cfg, device):
    """From the bytes of a JPEG to normalised crops, on one core."""
    torch.set_num_threads(1)
    c, mean, std = cfg.crops, cfg.data.mean, cfg.data.std
    small = c.global_size < 100
    height, width, quality, count = (32, 32, 79, 64) if small else (375, 500, 95, 16)
    file = jpeg(height, width, quality)

    def ours(clock):
        rng = random.Random(0)
        images = [read_image(file) for _ in range(count)]
        clock.mark("decode")
        cut, look = zip(*(crops(image, rng, cfg) for image in images), strict=True)
        clock.mark("crops")
        look = torch.stack(look)
        for which in slice(0, LARGE_CROPS), slice(LARGE_CROPS, None):
            pixels = torch.stack([crop for image in cut for crop in image[which]])
            colour(pixels, look[:, which].flatten(0, 1), mean, std)
        clock.mark("colour")

    title = f"Augmentation: {LARGE_CROPS} x {c.global_size} + {c.local_count} x {c.local_size} px"
    title += f" of a {width} x {height} JPEG of {len(file) / 1000:.3g} kB, one core"
    return Work(title, {"ours": ours}, count, given=(file, count))


def attention(cfg, device):
    """The ways of attention.py over the crops of one step, forward and backward."""
    (dim, _, heads, _), extra = SIZES[cfg.vit.size], 1 + cfg.vit.registers
    sizes = (LARGE_CROPS, cfg.crops.global_size), (cfg.crops.local_count, cfg.crops.local_size)
    groups = tuple((n * cfg.batch, (s // cfg.vit.patch) ** 2 + extra) for n, s in sizes if n)
    shape = sum(B * T for B, T in groups), 3, heads, dim // heads
    qkv = torch.randn(shape, device=device).to(dtype_of(cfg)).requires_grad_()

    def run(backend, clock):
        out = attend(qkv, pack(groups, backend, device, qkv.dtype))
        clock.mark("forward")
        torch.autograd.grad(out.sum(), qkv)
        clock.mark("backward")

    contenders = {"ours": partial(run, "auto")}
    for backend in ("plain", "sdpa", "varlen", "xformers"):
        try:
            check_backend(backend, device, dtype_of(cfg))
            contenders[backend] = partial(run, backend)
        except UserError as error:
            print(error)
    return Work(f"Attention of one block: {bench.described(cfg)}", contenders, cfg.batch)
