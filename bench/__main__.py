"""How fast is it, compared with whom, and where does the time go? Anyone can run this.

    python -m bench WHAT [CONFIG.yaml] [key=value ...] [--official PATH] [lightly] [--to FOLDER]
                    [profile]
    python -m bench step config.yaml lightly --official ~/dinov2
    python -m bench losses configs/vitl16.yaml batch=16
    python -m bench gpu --official ~/dinov2 --to docs        all rows for one GPU, see rows.py

WHAT is step, data, losses, attention or augment: functions of these names make the work
below, and measure.py times it. Images are made in memory unless data.root=... is given; only
"data", which measures loading too, reads those of the config. Peers that are named run in the same
process, in turns with ours (peers.py): a checkout of the official code, and pip install lightly.
--to is the folder of benchmarks.json and benchmarks.md, to which results are added (runs).
"profile" also writes profile.txt there: the operations that took longest.

Shapes:  B images   T large crops (2)   S all crops   K prototypes   M hidden patches
"""

import atexit
import dataclasses
import io
import random
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import config
from attention import attend, check_backend, pack
from augment import colour, crops
from bench import peers as bench_peers
from bench import rows
from bench.measure import Work, longest, measure, save, table
from bench.plan import plan_step
from config import UserError
from data import loader
from dinov2 import LARGE_CROPS, Output, build_centers, ema_update, objective
from images.reader import read_image
from images.sources import open_source
from optim import clip_each_part, schedules, set_schedule
from parallel import check_launch, dtype_of, pick_device
from train import build, to_device
from vit import SIZES

# ---- a training step ----------------------------------------------------------------------------


def step_flops(cfg):
    """Floating-point operations of the matrix products of a step, counted by the plan.

    Without what stochastic depth leaves out, and nothing twice: with plain attention, nothing
    computed again.
    """
    own = {"attention": "plain", "compile": False, "activation_checkpointing": "none"}
    return plan_step(dataclasses.replace(cfg, parallel="none", **own), 1).flops


def described(cfg):
    c = cfg.crops
    return (
        f"ViT {cfg.vit.size}/{cfg.vit.patch}, {LARGE_CROPS} x {c.global_size} + {c.local_count} x "
        f"{c.local_size} px, {cfg.batch} images, K = {cfg.head.prototypes:,}, {dtype_of(cfg)}"
    )


def batches(cfg, device):
    """Endless batches on the device, as train.py makes them; each contender has its own."""
    endless = dataclasses.replace(cfg, steps=10**9)
    source = loader(endless, open_source(cfg.data.root, cfg))
    atexit.register(source.close)  # after an error too, while its threads can still end quietly
    for batch in source:
        yield to_device(batch, cfg, device)


def timed(network, clock, name):
    """A network that books the time until it is called under "losses", its own under `name`."""

    def call(*args, **kwargs):
        clock.mark("losses")
        said = network(*args, **kwargs)
        clock.mark(name)
        return said

    return call


def step_in_phases(cfg, device, student, teacher, objective, optimizer, ema):
    """The body of the loop of train.py, with stamps: a run(clock) that returns the loss.

    objective(student, teacher, batch) -> loss; ema(teacher, student, momentum).
    """
    source, momentum = batches(cfg, device), schedules(cfg.steps // 2, cfg).momentum
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.precision == "fp16")

    def run(clock):
        batch = next(source)
        clock.mark("data")
        loss = objective(timed(student, clock, "student"), timed(teacher, clock, "teacher"), batch)
        clock.mark("losses")
        scaler.scale(loss).backward()
        clock.mark("backward")
        scaler.unscale_(optimizer)
        clip_each_part(student, cfg.optim.clip, cfg.optim.clip_by)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        clock.mark("optimiser")
        ema(teacher, student, momentum)
        clock.mark("EMA")
        return loss.item()

    return run


def our_objective(cfg, centers):
    """objective(student, teacher, batch) -> loss, half-way through the schedules."""
    temp = schedules(cfg.steps // 2, cfg).teacher_temp

    def loss_of(student, teacher, batch):
        return objective(student, teacher, centers, batch, temp, cfg.loss)[0]

    return loss_of


def step(cfg, device):
    """From crops on the device to the updated teacher."""
    student, teacher, centers, optimizer = build(cfg, device)
    set_schedule(optimizer, schedules(cfg.steps // 2, cfg))
    parts = student, teacher, our_objective(cfg, centers), optimizer, ema_update
    run = step_in_phases(cfg, device, *parts)
    given, flops = (partial(step_in_phases, cfg, device), student), step_flops(cfg)
    # All contenders get crops from our loader, so that time is left out.
    return Work(f"Step: {described(cfg)}", {"ours": run}, cfg.batch, flops, given, leave_out="data")


def data(cfg, device):
    """The same step, where the time that it waits for the loader counts."""
    title = f"Step with loading: {described(cfg)}"
    return dataclasses.replace(step(cfg, device), title=title, leave_out="")


# ---- parts of it --------------------------------------------------------------------------------


def losses(cfg, device):
    """From given scores, in place of networks, to their gradients: targets and all losses."""
    batch, B, K = next(batches(cfg, device)), cfg.batch, cfg.head.prototypes
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

    ours = in_phases(our_objective(cfg, build_centers(cfg).to(device)))
    title = f"Losses, {cfg.loss.centering}: {B} images, {S} crops, {M} patches, K = {K:,}"
    return Work(f"{title}, {dtype_of(cfg)}", {"ours": ours}, B, given=(in_phases,))


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
    return Work(f"Attention of one block: {described(cfg)}", contenders, cfg.batch)


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


# ---- command line -------------------------------------------------------------------------------

WHAT = {work.__name__: work for work in (step, data, losses, attention, augment)}


def arguments(argv):
    """(what, config, peers, folder, whether to profile) from the command line."""
    what, words = config.main_arguments(argv, __doc__)
    if what not in WHAT:
        raise UserError(f"{what}: cannot be measured; use one of {', '.join([*WHAT, 'gpu'])}")
    folder, checkout = rows.take(words, "--to") or "runs", rows.take(words, "--official")
    peers = [word for word in words if word == "lightly"]
    if checkout:
        bench_peers.find_official(checkout)
        peers.insert(0, "official")
    wants_profile = "profile" in words
    words = [word for word in words if word not in ("lightly", "profile")]
    path = words.pop(0) if words and "=" not in words[0] else "config.yaml"
    cfg = config.load(path, words)
    cfg.parallel = "none"  # one process is measured
    if what != "data" and not any(word.startswith("data.root=") for word in words):
        cfg.data.root = "synthetic"
    return what, cfg, peers, folder, wants_profile


@config.report_errors
def main(argv):
    if argv and argv[0] == "gpu":
        return rows.main(argv[1:])
    what, cfg, peers, folder, wants_profile = arguments(argv)
    with config.writing(f"--to {folder}", "choose another folder"):  # not after minutes of work
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    device = pick_device(cfg.device)
    check_launch(cfg, device, 1)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as train.py
    torch.manual_seed(0)
    work = WHAT[what](cfg, device)
    for name in peers:
        peer = getattr(bench_peers, f"{name}_{what}", None)
        if peer is None:
            raise UserError(f"{name}: has nothing to compare with {what}")
        work.contenders[name] = peer(cfg, device, *work.given)
    record = measure(work, device, dtype_of(cfg))
    record["command"] = " ".join(["python -m bench", *argv])
    print(f"{record['title']}\n{record['device']}, {record['setting']}\n\n{table(record)}")
    save(record, folder)
    if wants_profile:
        Path(folder, "profile.txt").write_text(record["command"] + "\n" + longest(work, device))


if __name__ == "__main__":
    main(sys.argv[1:])
