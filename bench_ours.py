"""What bench.py can measure: each function makes a Work of our code and of the peers asked for.

Shapes:  B images   T large crops (2)   S all crops   D channels   K prototypes   M hidden patches
         N training features   M test features (k-NN)
"""

import dataclasses
import io
import itertools
import math
import random

import numpy as np
import torch
from PIL import Image

import augment
import bench_official
import bench_peers
import data
from attention import attend, check_backend
from config import UserError
from dinov2 import LARGE_CROPS, ema_update, ibot_prototypes, objective
from eval_knn import NEIGHBOURS, knn_probabilities
from losses import dino_loss, ibot_loss, koleo_loss, sinkhorn_knopp
from measure import Work
from optim import clip_each_part, schedules, set_schedule
from parallel import dtype_of
from sources import read_image
from train import build, to_device
from vit import build_backbone

# ---- how much work a step is --------------------------------------------------------------------


def step_flops(cfg, masked):
    """Floating-point operations of the matrix products of a step; `masked` patches go to the head.

    A multiplication and an addition are two. A backward pass is two forward passes, one for the
    gradient of the input, one for that of the weights. What stochastic depth leaves out does not
    count; nor do attention's softmax, losses, optimiser and EMA.
        block, per token   2 * its weights (12 D^2 with an MLP) + 4 D for every token of the crop
        patch embedding    2 * channels * patch^2 * D; there is no gradient of the pixels
        head, per token    2 * its weights, most of which are the prototypes, bottleneck * K
    """
    with torch.device("meta"):
        net = build_backbone(cfg, cfg.vit.drop_path)
    per_token = 2 * sum(p.numel() for p in net.blocks[0].parameters() if p.ndim == 2)
    kept = sum(1 - rate for rate in net.drop_path)  # of the `depth` blocks
    h, B = cfg.head, cfg.batch

    def backbone(crops, size, blocks, embeddings):
        patches = (size // cfg.vit.patch) ** 2
        tokens = patches + 1 + cfg.vit.registers
        embedding = 2 * patches * cfg.data.channels * cfg.vit.patch**2 * net.dim
        return crops * (
            blocks * tokens * (per_token + 4 * tokens * net.dim) + embeddings * embedding
        )

    def head(rows, prototypes):
        widths = [net.dim] + [h.hidden] * (h.layers - 1) + [h.bottleneck, prototypes]
        return rows * sum(2 * a * b for a, b in itertools.pairwise(widths))

    large, small = LARGE_CROPS * B, cfg.crops.local_count * B
    teacher = backbone(large, cfg.crops.global_size, net.depth, 1)
    student = backbone(large, cfg.crops.global_size, 3 * kept, 2)
    student += backbone(small, cfg.crops.local_size, 3 * kept, 2)
    scores = head(large, h.prototypes) + 3 * head(large + small, h.prototypes)
    patch_scores = 4 * head(masked if cfg.loss.ibot else 0, ibot_prototypes(cfg))
    return teacher + student + scores + patch_scores


# ---- what is measured ---------------------------------------------------------------------------


def described(cfg):
    c = cfg.crops
    return (
        f"ViT {cfg.vit.size}/{cfg.vit.patch}, {LARGE_CROPS} x {c.global_size} + {c.local_count} x "
        f"{c.local_size} px, {cfg.batch} images, K = {cfg.head.prototypes:,}, {precision(cfg)}"
    )


def precision(cfg):
    return str(dtype_of(cfg)).removeprefix("torch.")


def batches(cfg, device):
    """Endless batches on the device, as train.py makes them; each contender has its own."""
    if not cfg.data.root:
        cfg.data.root = "synthetic"
    source = data.open_source(cfg.data.root, cfg)
    for batch in data.loader(dataclasses.replace(cfg, steps=10**9), source):
        yield to_device(batch, cfg, device)


def timed(network, clock, before, after):
    """A network that books the time until it is called under one name, its own under another."""

    def call(*args, **kwargs):
        clock.mark(before)
        said = network(*args, **kwargs)
        clock.mark(after)
        return said

    return call


def our_step(cfg, device, source, waiting="data"):
    """The body of the loop of train.py, with stamps; (run, student)."""
    student, teacher, centers, optimizer = build(cfg, device)
    now = schedules(cfg.steps // 2, cfg)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.precision == "fp16")

    def run(clock):
        batch = next(source)
        clock.mark(waiting)
        set_schedule(optimizer, now)
        loss, _ = objective(
            timed(student, clock, "losses", "student"),
            timed(teacher, clock, "losses", "teacher"),
            centers, batch, now.teacher_temp, cfg.loss,
        )  # fmt: skip
        clock.mark("losses")
        scaler.scale(loss).backward()
        clock.mark("backward")
        scaler.unscale_(optimizer)
        clip_each_part(student, cfg.optim.clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        clock.mark("optimiser")
        ema_update(teacher, student, now.momentum)
        clock.mark("EMA")
        return loss.item()

    return run, student


def step(cfg, device, peers):
    """A training step, from crops on the device to the updated teacher."""
    run, student = our_step(cfg, device, batches(cfg, device))
    contenders = {"ours": run}
    if "official" in peers:
        contenders["official"] = bench_official.step(cfg, device, student, batches(cfg, device))
    if "lightly" in peers:
        contenders["lightly"] = bench_peers.lightly_step(cfg, device, batches(cfg, device))
    masked = len(next(batches(cfg, device)).mask_indices)
    return Work(f"Step: {described(cfg)}", contenders, cfg.batch, step_flops(cfg, masked))


def losses(cfg, device, peers):
    """DINO, iBOT and KoLeo with Sinkhorn-Knopp, forward and backward, from given scores."""
    batch, B, K = next(batches(cfg, device)), cfg.batch, cfg.head.prototypes
    S, M = LARGE_CROPS + cfg.crops.local_count, len(batch.mask_indices)
    dtype, temp = dtype_of(cfg), cfg.teacher.temp

    def noise(*shape, scale=0.2):  # of the size of the scores of a trained network
        return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_()

    told = [noise(LARGE_CROPS * B, K).detach(), noise(M, K).detach()]
    said = [noise(S * B, K), noise(M, K), noise(LARGE_CROPS * B, 384)]

    def ours(clock):
        target = [sinkhorn_knopp(score, temp) for score in told]
        clock.mark("targets")
        dino = sum(dino_loss(said[0].unflatten(0, (S, B)), target[0].unflatten(0, (-1, B))))
        ibot = ibot_loss(said[1], target[1], batch.mask_weights, LARGE_CROPS * B)
        koleo = sum(koleo_loss(x) for x in said[2].chunk(LARGE_CROPS))
        loss = cfg.loss.dino * dino + cfg.loss.ibot * ibot + cfg.loss.koleo * koleo
        clock.mark("losses")
        grads = torch.autograd.grad(loss, said)
        clock.mark("backward")
        return [x.item() for x in (loss, *(grad[:8].norm() for grad in grads))]

    contenders = {"ours": ours}
    if "official" in peers:
        contenders["official"] = bench_official.losses(cfg, told, said, batch)
    title = f"Losses with Sinkhorn: {B} images, {S} crops, {M} patches, K = {K:,}, {precision(cfg)}"
    return Work(title, contenders, B)


def backbone(cfg, device, peers):
    """The student's backbone over all crops, forward and backward."""
    batch = next(batches(cfg, device))
    net = build_backbone(cfg, cfg.vit.drop_path).to(device)
    crops = [batch.global_crops, batch.local_crops]

    def ours(clock):
        out = net(crops, is_training=True)
        clock.mark("forward")
        sum(o["x_prenorm"].float().sum() for o in out).backward()
        clock.mark("backward")

    contenders = {"ours": ours}
    if "timm" in peers:
        contenders["timm"] = bench_peers.backbone(cfg, device, crops)
    return Work(f"Backbone: {described(cfg)}", contenders, cfg.batch)


def attention(cfg, device, peers):
    """The ways of attention.py over the crops of one step, forward and backward."""
    with torch.device("meta"):
        net = build_backbone(cfg)
    dtype, heads = dtype_of(cfg), net.blocks[0].attn.heads
    sizes = (LARGE_CROPS, cfg.crops.global_size), (cfg.crops.local_count, cfg.crops.local_size)
    groups = tuple(
        (n * cfg.batch, (s // cfg.vit.patch) ** 2 + 1 + cfg.vit.registers) for n, s in sizes if n
    )
    shape = sum(B * T for B, T in groups), 3, heads, net.dim // heads
    qkv = torch.randn(shape, device=device).to(dtype).requires_grad_()

    def run(clock, backend):
        out = attend(qkv, groups, backend)
        clock.mark("forward")
        torch.autograd.grad(out.sum(), qkv)
        clock.mark("backward")

    contenders = {"ours": lambda clock: run(clock, "auto")}
    for backend in ("plain", "sdpa", "varlen", "xformers"):
        try:
            check_backend(backend, device, dtype)
            contenders[backend] = lambda clock, backend=backend: run(clock, backend)
        except UserError as error:
            print(error)
    return Work(f"Attention of one block: {described(cfg)}", contenders, cfg.batch)


def jpeg(height, width, target):
    """A JPEG of about `target` bytes: smooth structure and fine texture, always the same."""
    rng, smooth = np.random.default_rng(0), Image.Resampling.BICUBIC
    layers = [rng.uniform(0, 255, (n, n, 3)).astype(np.uint8) for n in (4, 16, max(height, width))]
    layers = [np.float32(Image.fromarray(a).resize((width, height), smooth)) for a in layers]
    pixels = 0.45 * layers[0] + 0.35 * layers[1] + 0.2 * layers[2]
    sizes = {}
    for quality in range(30, 96):
        Image.fromarray(pixels.astype(np.uint8)).save(file := io.BytesIO(), "JPEG", quality=quality)
        sizes[abs(file.tell() - target)] = file.getvalue()
    return sizes[min(sizes)]


def augmentation(cfg, device, peers):
    """From the bytes of a JPEG to normalised crops, on one core."""
    torch.set_num_threads(1)
    small = cfg.crops.global_size < 100
    shape = (32, 32, 1_000) if small else (375, 500, 110_000)
    file, count = jpeg(*shape), 64 if small else 16
    mean, std = cfg.data.mean, cfg.data.std

    def ours(clock):
        rng = random.Random(0)
        images = [read_image(file) for _ in range(count)]
        clock.mark("decode")
        cut, look = zip(*(augment.crops(image, rng, cfg) for image in images), strict=True)
        clock.mark("crops")
        look = torch.stack(look)
        for which in slice(0, LARGE_CROPS), slice(LARGE_CROPS, None):
            crops = torch.stack([crop for crops in cut for crop in crops[which]])
            augment.colour(crops, look[:, which].flatten(0, 1), mean, std)
        clock.mark("colour")

    contenders = {"ours": ours}
    if "official" in peers:
        contenders["official"] = bench_official.augmentation(cfg, file, count)
    c = cfg.crops
    title = f"Augmentation: {LARGE_CROPS} x {c.global_size} + {c.local_count} x {c.local_size} px"
    title += f" of a {shape[1]} x {shape[0]} JPEG of {len(file) / 1000:.3g} kB, one core"
    return Work(title, contenders, count)


def loading(cfg, device, peers):
    """Does the loader keep up? Steps that wait for it, and steps on one and the same batch."""
    source, one = batches(cfg, device), next(batches(cfg, device))

    def alone(clock):
        next(source)
        clock.mark("waiting")

    # "waiting" counts, "data" would not. Workers read ahead, so kinds do not take turns.
    contenders = {
        "ours": our_step(cfg, device, source, waiting="waiting")[0],
        "without loading": our_step(cfg, device, itertools.repeat(one))[0],
        "loading alone": alone,
    }
    return Work(
        f"Loading: {described(cfg)}", contenders, cfg.batch, turns=False, tolerance=math.inf
    )


def knn(cfg, device, peers, train=50_000, test=2_560, D=384, classes=1000):
    """Weighted k-NN of given features; test features go in batches, so their number only scales."""
    train_ND, test_MD = (
        torch.nn.functional.normalize(torch.randn(n, D, device=device), dim=1)
        for n in (train, test)
    )
    label_N = torch.randint(classes, (train,), device=device)

    def ours(clock):
        votes = knn_probabilities(train_ND, label_N, test_MD, classes, NEIGHBOURS)
        return votes[max(NEIGHBOURS)]

    contenders = {"ours": ours}
    if "official" in peers:
        contenders["official"] = bench_official.knn(train_ND, label_N, test_MD, classes)
    title = f"k-NN: {train:,} training and {test:,} test images, {D} channels, {classes} classes"
    return Work(title, contenders, test)
