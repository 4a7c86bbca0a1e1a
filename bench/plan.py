"""What a run will need, before anyone pays for it: memory, communication, FLOPs and time of a step.

    python -m bench.plan configs/vitg14.yaml gpus=256
    python -m bench.plan configs/vitl16.yaml gpus=32 gpu=h200 mfu=0.45 batch=4096 parallel=fsdp

No GPU is needed, and no memory: one real training step, by the code of train.py, is run as one rank
of `gpus`, with PyTorch's fake tensors (which have shapes, but no values) and its fake process group
(whose collectives send nothing). Every allocation, matrix product and collective is counted as it
happens, so what this says is what the code does.

    weights ... moments   what stays from step to step; under FSDP this rank's part
    activations           the rest of the peak: what forward keeps for backward, gathered weights,
                          targets, casts
    FLOPs                 2 for each multiply-add of a matrix product; skipped work (stochastic
                          depth) is not counted, recomputed work (activation checkpointing) is
    communication         bytes that a rank sends in a ring: (n - 1) / n of what is gathered or
                          scattered, twice that of what is reduced to all
    step                  FLOPs / (peak rate * mfu), and communication / bandwidth, which overlaps

Not counted: the colour work on the crops, what the allocator loses to fragments, and what NCCL and
CUDA take for themselves (1 to 2 GB on a GPU). The plan is for PyTorch's fused attention, without
torch.compile. docs/plan.md compares it with real steps.
"""

import contextlib
import gc
import itertools
import math
import os
import random
import sys
import weakref
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.weak import WeakIdKeyDictionary

import config
import data
import train
from augment import batch_masks
from config import UserError
from dinov2 import ema_update
from optim import clip_each_part, schedules, set_schedule
from parallel import check_batch, dtype_of, process_group, ranks, replicate


class GPU(NamedTuple):
    """What data sheets say."""

    tflops: float  # bf16 matrix products
    memory: float  # GB
    network: float  # GB/s to other machines: a port of 200 (A100) or 400 Gbit/s for each GPU


GPUS = {
    "a100": GPU(312, 80, 25),
    "h100": GPU(989, 80, 50),
    "h200": GPU(989, 141, 50),
}


# ---- counting ------------------------------------------------------------------------------------


class Counter(TorchDispatchMode):
    """Watches every operation: bytes that are alive, bytes that go through collectives.

    alive, peak  bytes now and at most
    moved        {"all-gather": .., "reduce-scatter": .., "all-reduce": ..}, bytes of the whole
                 tensor, of which a rank holds a part before or after
    """

    def __init__(self):
        super().__init__()
        self.cells = WeakIdKeyDictionary()  # storage -> [its bytes]
        self.alive = 0
        self.restart()

    def restart(self):
        """Count the peak and what is moved from here on."""
        self.peak = self.alive
        self.moved = {"all-gather": 0, "reduce-scatter": 0, "all-reduce": 0}

    def __enter__(self):
        # FSDP frees gathered weights by shrinking their storage, which is no operation.
        resize, counter = torch.UntypedStorage.resize_, self

        def resize_and_count(storage, size):
            result = resize(storage, size)
            if storage in counter.cells:
                counter.resize(counter.cells[storage], storage.nbytes())
            return result

        self.patch = mock.patch.object(torch.UntypedStorage, "resize_", resize_and_count)
        self.patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.stop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:  # comes again with the shard of this rank
            return NotImplemented
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_iter(result) if isinstance(x, torch.Tensor)]
        for tensor in tensors:
            if not tensor.is_meta:
                self.follow(tensor.untyped_storage())
        if function.namespace in ("c10d", "_c10d_functional"):
            tensors += [x for x in tree_iter(args) if isinstance(x, torch.Tensor)]
            name = function.name().replace("_", "")
            for kind in self.moved:
                if kind.replace("-", "") in name:
                    self.moved[kind] += max(x.nbytes for x in tensors)
        return result

    def follow(self, storage):
        """Count this memory until nothing refers to it any more."""
        if storage not in self.cells:
            self.cells[storage] = cell = [0]
            self.resize(cell, storage.nbytes())
            weakref.finalize(storage, self.resize, cell, 0)

    def resize(self, cell, size):
        self.alive += size - cell[0]
        self.peak = max(self.peak, self.alive)
        cell[0] = size


@contextlib.contextmanager
def fake_group(world):
    """A process group of which only rank 0 exists, and whose collectives send nothing."""
    dist.init_process_group("fake", rank=0, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def attention_flops(query, key, value, *args, **kwargs):
    return sdpa_flop_count(query, key, value)


def attention_backward_flops(grad, query, key, value, *args, **kwargs):
    return sdpa_backward_flop_count(grad, query, key, value)


# PyTorch's FLOP counter knows the fused attention of GPUs, but not that of a CPU.
aten = torch.ops.aten
CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


# ---- one step ------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What a training step of one rank takes, in bytes unless it says otherwise."""

    parameters: dict  # how many, in each part of the network
    images: int  # in this rank's share of a step
    student: int
    gradients: int
    moments: int
    teacher: int
    peak: int
    moved: dict  # Counter.moved
    flops: int


def empty_parts(cfg, images):
    """The micro-batches of a rank: without pixels, but with real masks, whose size matters."""
    crops, grid = cfg.crops, cfg.crops.global_size // cfg.vit.patch
    rng = random.Random(cfg.seed)
    masks = batch_masks(2 * images, grid, grid, cfg.mask.probability, cfg.mask.ratio, rng)

    def pixels(count, size):
        shape = count, cfg.data.channels, size, size
        return torch.empty(shape, dtype=dtype_of(cfg), device="meta")

    batch = data.Batch(
        pixels(2 * images, crops.global_size),
        pixels(crops.local_count * images, crops.local_size),
        torch.empty(2 * images, 0),  # as if the colours were done
        torch.empty(crops.local_count * images, 0),
        *data.index_masks(torch.from_numpy(masks)),
        skipped=[],
    )
    return data.split(batch, cfg.accumulate)


def filled(parts, device):
    """The micro-batches with (black) pixels, on a device."""
    return [
        part._replace(
            global_crops=torch.zeros_like(part.global_crops, device=device),
            local_crops=torch.zeros_like(part.local_crops, device=device),
            masks=part.masks.to(device, copy=True),
            mask_indices=part.mask_indices.to(device, copy=True),
            mask_weights=part.mask_weights.to(device, copy=True),
        )
        for part in parts
    ]


def take_step(cfg, model, teacher, centers, optimizer, parts, student):
    """The first step of train.py, without what is only for people to see."""
    now = schedules(0, cfg)
    set_schedule(optimizer, now)
    rng, scaler = torch.Generator(), torch.amp.GradScaler("cpu", enabled=False)
    run = SimpleNamespace(model=model, teacher=teacher, centers=centers, cfg=cfg, scaler=scaler)
    train.backward([run], train.own_teacher(run), parts, now, rng, False)
    clip_each_part(student, cfg.optim.clip, cfg.optim.clip_by)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    ema_update(teacher, student, now.momentum)


def plan_step(cfg, world):
    """Run train.py's step as rank 0 of `world`, on tensors without memory -> Plan."""
    check_batch(cfg, world)
    fake, counter = FakeTensorMode(allow_non_fake_inputs=True), Counter()
    flops = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    with fake_group(world) if cfg.parallel != "none" else contextlib.nullcontext():
        networks, parts = train.outline(cfg), empty_parts(cfg, cfg.batch // world)
        with fake, counter:
            student, teacher, centers, optimizer = train.build(cfg, "cpu", networks)
            buckets = []
            if cfg.parallel == "ddp":
                # DDP cannot run without values. What it adds are the buckets in which gradients
                # travel; they stay, and gradients are views of them.
                buckets = [torch.zeros_like(p) for p in student.parameters()]
            parts = filled(parts, "cpu")

            def step():
                for parameter, bucket in zip(student.parameters(), buckets, strict=False):
                    parameter.grad = bucket
                take_step(cfg, student, teacher, centers, optimizer, parts, student)

            # The first step makes the optimiser's moments, and DTensor asks for the shapes of whole
            # tensors, which in a real step take no memory. FLOPs have a step of their own, because
            # PyTorch's FLOP counter holds on to tensors.
            step()
            gc.collect()
            counter.restart()
            step()
            peak, moved = counter.peak, dict(counter.moved)
            with flops:
                step()
        return Plan(
            {name: sum(p.numel() for p in m.parameters()) for name, m in student.named_children()},
            cfg.batch // world,
            student=size(student.parameters()),
            gradients=size(p for p in student.parameters() if p.requires_grad),
            moments=size(x for state in optimizer.state.values() for x in state.values()),
            teacher=size(teacher.parameters()),
            peak=peak,
            moved=moved | {"all-reduce": moved["all-reduce"] + size(buckets)},
            flops=flops.get_total_flops(),
        )


def size(tensors):
    """Bytes of tensors on this rank; of a sharded one, this rank's part."""
    return sum((x.to_local() if isinstance(x, DTensor) else x).nbytes for x in tensors)


# ---- the same for real ---------------------------------------------------------------------------


def real_peak(cfg, device):
    """Take two steps and return the most bytes that PyTorch's allocator had given out."""
    with profile(profile_memory=True) if device.type == "cpu" else contextlib.nullcontext() as seen:
        student, *others = train.build(cfg, device)
        images = cfg.batch // ranks()[1]
        model, parts = replicate(student, cfg), filled(empty_parts(cfg, images), device)
        for _ in range(2):
            take_step(cfg, model, *others, parts, student)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    changes = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = sorted((e.start_ns(), e.nbytes()) for e in changes)
    return max(itertools.accumulate(change for _, change in changes))


# ---- what it prints ------------------------------------------------------------------------------


def readable(count, unit="B"):
    """A number with three digits and a prefix; bytes by 1,024, as memory is sold."""
    base = 1024 if unit == "B" else 1000
    power = min(int(math.log(max(count, 1), base)), 5)
    return f"{count / base**power:.3g} {' kMGTP'[power].strip()}{unit}"


def describe(plan, cfg, world, gpu, mfu):
    """The plan as text."""
    stays = plan.student + plan.gradients + plan.moments + plan.teacher
    ring = (world - 1) / world
    sent = {k: v * ring * (2 if k == "all-reduce" else 1) for k, v in plan.moved.items()}
    compute = plan.flops / (gpu.tflops * 1e12 * mfu)
    network = sum(sent.values()) / (gpu.network * 1e9)
    step = max(compute, network)
    fits = "fits" if plan.peak < 0.9 * gpu.memory * 2**30 else "DOES NOT FIT"
    rows = {
        "parameters": ", ".join(f"{k} {v / 1e6:,.2f} M" for k, v in plan.parameters.items()),
        "images": f"{plan.images} a GPU and step",
        "student": readable(plan.student),
        "gradients": readable(plan.gradients),
        "moments": readable(plan.moments),
        "teacher": readable(plan.teacher),
        "activations": f"{readable(plan.peak - stays)}, and what else is there at the peak",
        "peak": f"{readable(plan.peak)} of {gpu.memory} GB: {fits}",
        "sends": ", ".join(f"{k} {readable(v)}" for k, v in sent.items() if v) or "nothing",
        "FLOPs": f"{readable(plan.flops / plan.images, 'FLOP')} an image, "
        f"{readable(plan.flops, 'FLOP')} a GPU and step",
        "step": f"{step:.3g} s; matrix products {compute:.3g} s at {mfu:.0%} of {gpu.tflops} "
        f"TFLOP/s, meanwhile network {network:.3g} s at {gpu.network} GB/s",
        "run": f"{cfg.batch / step:,.0f} images/s, {cfg.steps:,} steps in "
        f"{cfg.steps * step / 3600:,.1f} hours",
    }
    return "\n".join(f"  {name:<13}{text}" for name, text in rows.items())


USAGE = """
usage: python -m bench.plan CONFIG.yaml [gpus=N] [gpu=a100|h100|h200] [mfu=0.35] [key=value ...]

Says what a run needs, without a GPU. gpus is the number of processes, mfu the share of the peak
rate that matrix products reach (the official code: 0.34 for ViT-L/16 on A100s). Started by
torchrun, it also takes the step for real on the processes there are, and prints how far the plan is
from the memory that this took.
"""


@config.report_errors
def main(argv):
    path, words = config.main_arguments(argv, USAGE)
    o, words = config.take_options(words, {"gpus": 1, "gpu": "a100", "mfu": 0.35})
    cfg = config.load(path, words)
    cfg.attention, cfg.compile = "sdpa", False
    if cfg.precision == "auto" and "RANK" not in os.environ:
        cfg.precision = "bf16"  # what it is on these GPUs
    for key in ("gpus", "mfu"):
        if getattr(o, key) <= 0:
            raise UserError(f"{key}={getattr(o, key)} must be above 0")
    if o.mfu > 1:
        raise UserError(f"mfu={o.mfu:g} is a share of the peak rate, from 0 to 1: 45 % is mfu=0.45")
    if o.gpu not in GPUS:
        raise UserError(f"gpu={o.gpu} is unknown: use one of {', '.join(GPUS)}")
    real = None
    if "RANK" in os.environ:
        with process_group(cfg) as device:
            o.gpus, real = ranks()[1], real_peak(cfg, device)
    if os.environ.get("RANK", "0") == "0":
        print(
            f"{cfg.vit.size}/{cfg.vit.patch}, {o.gpus} x {o.gpu}, parallel={cfg.parallel}, "
            f"{cfg.precision}, activation_checkpointing={cfg.activation_checkpointing}"
        )
        plan = plan_step(cfg, o.gpus)
        print(describe(plan, cfg, o.gpus, GPUS[o.gpu], o.mfu))
        if real:
            print(f"  for real     {readable(real)}: the plan says {plan.peak / real - 1:+.1%}")


if __name__ == "__main__":
    main(sys.argv[1:])
