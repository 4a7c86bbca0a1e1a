"""What a run will need, before anyone pays for it: memory, communication and time of a step.

usage: python -m bench.plan CONFIG.yaml [gpus=N] [gpu=a100|h100|h200|b200|4090] [key=value ...]

    python -m bench.plan configs/vitg14.yaml gpus=256

gpus is the number of processes, one for each GPU. Another card is a line of GPUS below.

No GPU is needed, and no memory: one real training step, by the code of train.py, is run as one rank
of `gpus`, with PyTorch's fake tensors (which have shapes, but no values) and its fake process group
(whose collectives send nothing). Each operation is counted as it happens (count.py), so what this
says is what the code does. It takes 5 to 40 seconds.

    weights ... moments   what stays from step to step; under FSDP this rank's part
    activations           the rest of the peak: what forward keeps for backward, gathered weights,
                          targets, casts
    sends                 bytes that a rank sends in a ring: (n - 1) / n of what is gathered or
                          scattered, twice that of what is reduced to all
    step                  each kernel takes at least the longer of its bytes / bandwidth and FLOPs /
                          rate; real ones took 1.4 times that; what is sent overlaps with them

Not counted: the colour work on the crops, waiting for images, what the allocator loses to
fragments, and what NCCL and CUDA take for themselves (1 to 2 GiB). The plan is for PyTorch's fused
attention without torch.compile, which would move less. docs/plan.md compares it with real steps.
"""

import contextlib
import math
import random
import sys
from collections import Counter as Tally
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

import config
import data
import losses
import train
from augment import batch_masks
from bench.count import Counter
from config import UserError
from dinov2 import ema_update
from optim import clip_each_part, schedules
from parallel import check_batch, dtype_of


class GPU(NamedTuple):
    """What data sheets say."""

    tflops: float  # bf16 matrix products; fp32 ones run as TF32, at half that rate
    memory: float  # GiB
    bandwidth: float  # TB/s of its memory
    network: float  # GB/s to other GPUs: a port of 200 or 400 Gbit/s for each, or PCIe (4090)


GPUS = {
    "a100": GPU(312, 80, 2.04, 25),
    "h100": GPU(989, 80, 3.35, 50),
    "h200": GPU(989, 141, 4.8, 50),
    "b200": GPU(2250, 180, 8.0, 50),
    "4090": GPU(165, 24, 1.01, 25),
}
# What the best kernels reach of that: on an H100 775 TFLOP/s and 3.0 TB/s. All kernels of an eager
# step together took 1.36 times as long as this allows for ViT-L/16, 1.39 times for ViT-g/14, more
# for small networks, which wait for launches (docs/plan.md). Other cards are taken to be alike.
RATE_REACHED, BANDWIDTH_REACHED, SLOWER = 775 / 989, 3.0 / 3.35, 1.4


# ---- one step ------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What a training step of one rank takes, in bytes unless it says otherwise."""

    parameters: dict  # how many, in each part of the network
    stays: dict  # student, gradients, moments, teacher
    peak: int
    sent: dict  # Counter.sent
    operations: list  # Counter.operations

    @property
    def flops(self):
        return sum(operation.flops for operation in self.operations)


def empty_parts(cfg, images):
    """The micro-batches of a rank: without pixels, but with real masks, whose size matters."""
    c, m, grid = cfg.crops, cfg.mask, cfg.crops.global_size // cfg.vit.patch
    large, small = 2 * images, c.local_count * images
    masks = batch_masks(large, grid, grid, m.probability, m.ratio, random.Random(cfg.seed))
    pixels = partial(torch.empty, dtype=dtype_of(cfg), device="meta")
    batch = data.Batch(
        pixels(large, cfg.data.channels, c.global_size, c.global_size),
        pixels(small, cfg.data.channels, c.local_size, c.local_size),
        torch.empty(large, 0),  # as if the colours were done
        torch.empty(small, 0),
        *data.index_masks(torch.from_numpy(masks)),
        skipped=[],
    )
    return data.split(batch, cfg.accumulate)


def filled(parts, device):
    """The micro-batches with (black) pixels, on a device."""

    def put(x):
        return torch.zeros_like(x, device=device) if x.is_meta else x.to(device, copy=True)

    return tree_map_only(torch.Tensor, put, parts)


UNSCALED = torch.amp.GradScaler("cpu", enabled=False)


def compute_gradients(cfg, model, teacher, centers, parts):
    """Forward and backward pass of the first step of train.py, without signs of health."""
    run = SimpleNamespace(model=model, teacher=teacher, centers=centers, cfg=cfg, scaler=UNSCALED)
    ask, now = train.own_teacher(run), schedules(0, cfg)
    train.backward([run], ask, parts, now, torch.Generator(), health=False)


def update(cfg, student, teacher, optimizer, mark, scaler=UNSCALED, average=ema_update):
    """What follows it, without what is only for people to see; mark(name) ends each phase."""
    scaler.unscale_(optimizer)
    clip_each_part(student, cfg.optim.clip, cfg.optim.clip_by)
    mark("clipping")
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    mark("optimiser")
    average(teacher, student, schedules(cfg.steps // 2, cfg).momentum)
    mark("EMA")


def plan_step(cfg, world, device="cuda", by_part=True):
    """Run train.py's step as rank 0 of `world`, on tensors without memory -> Plan.

    by_part   what Counter says of it: with activation checkpointing the peak is counted apart
    """
    check_batch(cfg, world)
    parts = empty_parts(cfg, cfg.batch // world)
    with contextlib.ExitStack() as stack:
        if cfg.parallel != "none":  # of these processes only the first exists
            dist.init_process_group("fake", rank=0, world_size=world)
            stack.callback(dist.destroy_process_group)
        stack.enter_context(mock.patch.dict(losses.SLICE, cpu=losses.SLICE[device]))
        networks = train.outline(cfg)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        counter = stack.enter_context(Counter(by_part))
        with mock.patch.object(train, "materialize", lambda net, cpu, _: net.to_empty(device=cpu)):
            student, teacher, centers, optimizer = train.build(cfg, "cpu", networks)
        # A first update makes the optimiser's moments, and DTensor asks once for the shapes of
        # whole tensors, which in a real step take no memory.
        give_gradients(student)
        update(cfg, student, teacher, optimizer, counter.mark)
        # DDP cannot run without values. What it adds are the buckets in which gradients travel:
        # they stay, and gradients lie in them.
        buckets = give_gradients(student) if cfg.parallel == "ddp" else []
        parts = filled(parts, "cpu")
        counter.restart()
        compute_gradients(cfg, student, teacher, centers, parts)
        counter.mark("losses")
        update(cfg, student, teacher, optimizer, counter.mark)
        counter.sent["all-reduce"] += size(buckets)
        stays = {
            "student": size(student.parameters()),
            "gradients": size(p for p in student.parameters() if p.requires_grad),
            "moments": size(x for state in optimizer.state.values() for x in state.values()),
            "teacher": size(teacher.parameters()),
        }
        counts = {n: sum(p.numel() for p in m.parameters()) for n, m in student.named_children()}
    peak = counter.peak
    if by_part and cfg.activation_checkpointing != "none":
        peak = plan_step(cfg, world, device, by_part=False).peak
    return Plan(counts, stays, peak, counter.sent, counter.operations)


def give_gradients(network):
    """Gradients of zero for all that is trained; returns them."""
    trained = [p for p in network.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    return [parameter.grad for parameter in trained]


def size(tensors):
    """Bytes of tensors on this rank; of a sharded one, this rank's part."""
    return sum((x.to_local() if isinstance(x, DTensor) else x).nbytes for x in tensors)


# ---- what it prints ------------------------------------------------------------------------------


def seconds(operation, gpu):
    """Roofline: a kernel waits for its memory or for its matrix products, whichever is longer."""
    rate = gpu.tflops * 1e12 * RATE_REACHED * (1 if operation.half else 0.5)
    bandwidth = gpu.bandwidth * 1e12 * BANDWIDTH_REACHED
    return max(operation.bytes / bandwidth, operation.flops / rate)


def by_part(operations, gpu):
    """{part: (bytes, FLOPs, seconds)} of a step, the longest first, and their sum as "all"."""
    moved, flops, time = Tally(), Tally(), Tally()
    for operation in operations:
        for part in (operation.part, "all"):
            moved[part] += operation.bytes
            flops[part] += operation.flops
            time[part] += seconds(operation, gpu)
    return {part: (moved[part], flops[part], time[part]) for part, _ in time.most_common()}


def readable(count, unit):
    """A number with three digits and a prefix, powers of 1,000."""
    power = min(int(math.log(max(count, 1), 1000)), 5)
    return f"{count / 1000**power:.3g} {' kMGTP'[power].strip()}{unit}"


def gib(size):
    return f"{size / 2**30:.3g} GiB"


def describe(plan, cfg, world, gpu):
    """The plan as text."""
    images, ring = cfg.batch // world, (world - 1) / world
    sent = {k: v * ring * (2 if k == "all-reduce" else 1) for k, v in plan.sent.items()}
    parts = by_part(plan.operations, gpu)
    network = sum(sent.values()) / (gpu.network * 1e9)
    least = parts["all"][2]
    step = max(least * SLOWER, network)
    fits = "fits" if plan.peak < 0.9 * gpu.memory * 2**30 else "DOES NOT FIT"
    rows = {
        "parameters": ", ".join(f"{k} {v / 1e6:,.2f} M" for k, v in plan.parameters.items()),
        **{name: gib(size) for name, size in plan.stays.items()},
        "activations": f"{gib(plan.peak - sum(plan.stays.values()))}, and the rest of the peak",
        "peak": f"{gib(plan.peak)} of {gpu.memory:g} GiB: {fits}",
        "sends": ", ".join(f"{k} {readable(v, 'B')}" for k, v in sent.items() if v) or "nothing",
        "FLOPs": f"{readable(plan.flops / images, 'FLOP')} an image, "
        f"{readable(plan.flops, 'FLOP')} a GPU and step of {images} images",
        "step": f"{step:.3g} s; kernels at least {least:.3g} s, x {SLOWER} as measured on an H100, "
        f"meanwhile network {network:.3g} s at {gpu.network:g} GB/s",
        "run": f"{cfg.batch / step:,.0f} images/s, {cfg.steps:,} steps in "
        f"{cfg.steps * step / 3600:,.1f} hours",
    }
    rate, bandwidth = gpu.tflops * RATE_REACHED, gpu.bandwidth * BANDWIDTH_REACHED
    lines = [f"  {name:<13}{text}" for name, text in rows.items()]
    lines += ["", f"  Least time of eager kernels at {rate:.0f} TFLOP/s and {bandwidth:.2g} TB/s"]
    lines += [f"  {'kernels of':<18}{'memory traffic':>14}{'FLOPs':>14}{'at least':>12}"]
    for part, (moved, flops, time) in parts.items():
        flops = readable(flops, "FLOP") if flops else ""
        lines.append(f"  {part:<18}{readable(moved, 'B'):>14}{flops:>14}{1000 * time:>9.3g} ms")
    return "\n".join(lines)


def arguments(argv):
    """(config, number of GPUs, name of the GPU) from the command line."""
    path, words = config.main_arguments(argv, __doc__)
    o, words = config.take_options(words, {"gpus": 1, "gpu": "a100"}, least={"gpus": 1})
    if o.gpu not in GPUS:
        raise UserError(f"gpu={o.gpu}: use one of {', '.join(GPUS)}, or add a line to GPUS")
    cfg = config.load(path, words)
    cfg.attention, cfg.compile = "sdpa", False
    if cfg.precision == "auto":
        cfg.precision = "bf16"  # what it is on these GPUs
    return cfg, o.gpus, o.gpu


@config.report_errors
def main(argv):
    cfg, world, gpu = arguments(argv)
    print(
        f"{cfg.vit.size}/{cfg.vit.patch}, {world} x {gpu}, parallel={cfg.parallel}, "
        f"{cfg.precision}, activation_checkpointing={cfg.activation_checkpointing}",
        flush=True,
    )
    print(describe(plan_step(cfg, world), cfg, world, GPUS[gpu]))


if __name__ == "__main__":
    main(sys.argv[1:])
