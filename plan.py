"""What a run will need, before it is started: memory, communication, arithmetic, time. No GPU.

    python plan.py configs/vitg14.yaml gpus=128                  on 128 GPUs
    python plan.py configs/vitl16.yaml gpus=8 gpu=h100 batch=512 parallel=fsdp accumulate=2

The training step of train.py really runs, on tensors that have a shape but no data (PyTorch's
FakeTensorMode), as the first of `gpus` ranks in a group that sends nothing (its "fake" backend).
Every tensor is counted while it is alive and every collective when it is called, so what is said
here is what the code does. Only the time is an estimate, from the peak rates below.

Compared with the memory that two CPU ranks really took (test_plan.py): see ERROR. Not counted: the
CUDA context, NCCL's buffers, kernels' own scratch memory, gaps in the allocator's blocks.

Shapes:  B images of this rank   T large crops of each   N patches of a large crop
"""

import random
import sys
import weakref
from collections import Counter

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import augment
import config
from config import UserError
from data import Batch
from dinov2 import LARGE_CROPS, ema_update
from optim import clip_each_part, schedules, set_schedule
from parallel import DTYPES, whole
from train import backward, build, outline, seeded

# name:  TFLOP/s of dense bf16, GB/s of NVLink one way, GB of memory: data sheets, SXM versions
GPUS = {
    "a100": (312, 300, 80),
    "h100": (989, 450, 80),
    "h200": (989, 450, 141),
    "b200": (2250, 900, 180),
}
NETWORK = 25  # GB/s for each GPU between machines of 8: 200 Gbit/s
# Of the peak. What the published times of the official code imply on A100s: ViT-L/16 0.34,
# ViT-g/14 0.39.
UTILISATION = 0.35
aten = torch.ops.aten


class Ledger(TorchDispatchMode):
    """Books every byte: `alive` and at the `peak` by kind, and `moved` between ranks by collective.

    A storage is booked as `kind` when it first appears and struck off when Python forgets it.
    """

    def __init__(self):
        super().__init__()
        self.kind, self.booked = "activations", {}
        self.alive, self.peak, self.moved = Counter(), Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its parts come by one at a time
        out = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            self.count(func.__name__, tree_leaves((args, out)))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.book(tensor.untyped_storage())
        return out

    def count(self, name, leaves):
        """What a rank sends: an all-reduce is a reduce-scatter and an all-gather of the result."""
        size = max((x.nbytes for x in leaves if isinstance(x, torch.Tensor)), default=0)
        ranks = dist.get_world_size()
        for word, times in {"gather": 1, "scatter": 1, "reduce": 2}.items():
            if word in name and "wait" not in name:
                self.moved[word] += times * size * (ranks - 1) / ranks
                return

    def book(self, storage, kind=None):
        """Note the present size of a storage; `kind` renames it."""
        key = storage._cdata
        if key not in self.booked:
            weakref.finalize(storage, self.strike, key)
        old_kind, old_size = self.booked.get(key, (kind or self.kind, 0))
        self.booked[key] = (kind or old_kind, storage.nbytes())
        self.alive[old_kind] -= old_size
        self.alive[kind or old_kind] += storage.nbytes()
        if self.alive.total() > self.peak.total():
            self.peak = self.alive.copy()

    def strike(self, key):
        kind, size = self.booked.pop(key)
        self.alive[kind] -= size

    def rename(self, tensors, kind):
        """Put what has a role of its own under that name."""
        for tensor in tensors:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            self.book(local.untyped_storage(), kind)

    def __enter__(self):
        # FSDP2 frees and takes back the memory of gathered weights by resizing their storage, which
        # is no operator that would come by here.
        self.resize = resize = torch.UntypedStorage.resize_

        def resize_and_book(storage, size):
            resize(storage, size)
            self.book(storage, "gathered weights")

        torch.UntypedStorage.resize_ = resize_and_book
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self.resize
        return super().__exit__(*error)


def shapes_of_batch(cfg, B):
    """A Batch without data, with as many hidden patches as a first step may have."""
    C, size, L, small = cfg.data.channels, cfg.crops.global_size, cfg.crops.local_count, cfg.crops.local_size
    dtype, grid, rng = DTYPES[cfg.precision], size // cfg.vit.patch, random.Random(0)
    rows = LARGE_CROPS * B
    masks = augment.batch_masks(rows, grid, grid, cfg.mask.probability, cfg.mask.ratio, rng)
    M = int(masks.sum())
    return Batch(
        global_crops=torch.empty(rows, C, size, size, dtype=dtype),
        local_crops=torch.empty(L * B, C, small, small, dtype=dtype),
        # Colours were changed before; split() only wants something with these numbers of rows.
        global_colour=torch.empty(rows, 0),
        local_colour=torch.empty(L * B, 0),
        masks=torch.empty(masks.shape, dtype=torch.bool),
        mask_indices=torch.empty(M, dtype=torch.long),
        mask_weights=torch.empty(M),
        skipped=[],
    )


def run_step(cfg, ranks):
    """One step of the first of `ranks`; returns (parameters by part, Ledger, FLOPs of the rank)."""
    start_fake_group(ranks)
    networks, ledger = outline(cfg), Ledger()
    with FakeTensorMode(allow_non_fake_inputs=True), ledger:
        student, teacher, centers, optimizer = build(cfg, torch.device("cpu"), networks)
        parameters = list(student.parameters())
        ledger.rename(parameters, "weights")
        ledger.rename(teacher.parameters(), "teacher")
        for p in parameters:  # a step before the one that counts makes the moments
            p.grad = torch.zeros_like(p)
        optimizer.step()
        moments = [x for state in optimizer.state.values() for x in state.values()]
        ledger.rename(moments, "moments")
        # DDP does not run without data. Its buckets are gradients that stay in memory, which is
        # what keeping them does; its all-reduce of them is added below.
        optimizer.zero_grad(set_to_none=cfg.parallel != "ddp")
        ledger.rename([p.grad for p in parameters if p.grad is not None], "gradients")
        batch = shapes_of_batch(cfg, cfg.batch // ranks)
        ledger.start()
        with FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as counter:
            scaler = torch.amp.GradScaler("cpu", enabled=False)
            now = schedules(0, cfg)
            set_schedule(optimizer, now)
            backward(
                student, teacher, centers, batch, now.teacher_temp, cfg, scaler, seeded("plan"), False
            )
            ledger.rename([p.grad for p in parameters], "gradients")
            for norm in clip_each_part(student, cfg.optim.clip).values():
                whole(norm)
            optimizer.step()
            ema_update(teacher, student, now.momentum)
    if cfg.parallel == "ddp":
        ledger.send(2 * sum(p.nbytes for p in parameters), "gradients: all-reduce")
    sizes = {name: sum(p.numel() for p in m.parameters()) for name, m in student.named_children()}
    return sizes, ledger, counter.get_total_flops()
