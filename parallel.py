"""Everything that knows how many processes and devices there are: start, collectives, wrapping.

The model and the loop are written for one process. Each collective here is the identity for one
process, so code above it has no `if`; wrapping happens from outside, in one commented order.

Numbers do not depend on the ranks: every rank has B of the G images of a step, takes means over its
own B, and gradients are averaged, which is the mean over G. Sinkhorn, centres and (on request)
KoLeo look beyond the rank by themselves. Two things do change: KoLeo per rank (the default, as
official) seeks neighbours among B images, and stochastic depth is drawn for each rank.

COLLECTIVE_TIMEOUT (environment, seconds, 600) is how long ranks wait for each other.
"""

import contextlib
import ctypes
import functools
import os
import sys
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from tqdm import tqdm

from attention import check_backend
from config import RankError, UserError
from vit import size_of

# ---- collectives --------------------------------------------------------------------------------


def ranks():
    """(rank, number of processes) of this process; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_ranks(x):
    """Sum a tensor over every process, in place; the identity when there is only one."""
    if ranks()[1] > 1:
        dist.all_reduce(x)
    return x


def max_over_ranks(x):
    """Maximum of a tensor over every process, in place; the identity when there is only one."""
    if ranks()[1] > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


def whole(x):
    """A tensor that may be sharded, in one piece; all ranks call it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def gather_from_ranks(x_BD):
    """Rows of all processes (G, D) with gradient, and where this process' own rows begin."""
    rank, world = ranks()
    return (x_BD, 0) if world == 1 else (GatherRows.apply(x_BD), rank * len(x_BD))


class GatherRows(torch.autograd.Function):
    """The rows of all processes; the gradient of a row is the sum of what all of them say of it."""

    @staticmethod
    def forward(ctx, x_BD):
        x_BD = x_BD.contiguous()
        parts = [torch.empty_like(x_BD) for _ in range(ranks()[1])]
        dist.all_gather(parts, x_BD)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad_GD):
        rank, world = ranks()
        return sum_over_ranks(grad_GD.clone()).chunk(world)[rank]


def lists_of_ranks(items, group=None):
    """The items of the lists of all processes; all ranks call it, and wait for each other."""
    if ranks()[1] == 1:
        return items
    lists = [None] * ranks()[1]
    dist.all_gather_object(lists, items, group=group)
    return [item for own in lists for item in own]


# ---- words of the first process -----------------------------------------------------------------


def first_process():
    """Whether this is the process that speaks for all (workers of a loader have its number)."""
    return os.environ.get("RANK", "0") == "0"


def warn(text):
    """One line on stderr, from the first process only."""
    if first_process():
        print(f"warning: {text}", file=sys.stderr)


warn_once = functools.cache(warn)


def counted(n, noun):
    """`1 image`, `2 images`, `1,000 images`."""
    return f"{n:,} {noun}" + "s" * (n != 1)


def progress(items=None, **kwargs):
    """A bar of the first process, in a terminal only, and if it takes more than two seconds."""
    hidden = None if first_process() else True  # None: unless this is a terminal
    return tqdm(items, delay=2, disable=hidden, leave=False, **kwargs)


# ---- start --------------------------------------------------------------------------------------


def pick_device(name):
    """The torch.device of this process: `auto` takes CUDA, then Apple's MPS, then the CPU."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but PyTorch sees no CUDA device: use device=cpu or auto")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("device=mps, but PyTorch sees no Apple GPU: use device=cpu or auto")
    index = int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None
    if name == "cuda" and index >= (n := torch.cuda.device_count()):
        raise UserError(f"process {index} has no GPU, there are {n}: torchrun --nproc_per_node={n}")
    if name == "cpu":
        keep_memory()
    return torch.device(name, index)


def keep_memory():
    """Let glibc keep freed memory, as PyTorch does on a GPU: a step of ViT-S/16 takes 7 % less.

    By default what is large goes back to the system, which clears each page before its next use.
    """
    if mallopt := os.name == "posix" and getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


@contextlib.contextmanager
def without_tf32():
    """fp32 matrix products in fp32, although process_group allows TF32; also a decorator."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def multiplies_bf16(device):
    """Whether a device has instructions for bf16 matrix products.

    Most processors of laptops and desktops have none. PyTorch then computes the products by way of
    fp32, and takes up to 100 times as long as with fp32 itself.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    has = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def dtype_of(cfg):
    """The torch.dtype of activations; precision=auto is bf16 where the device multiplies it."""
    precision = cfg.precision
    if precision == "auto":
        precision = "bf16" if multiplies_bf16(pick_device(cfg.device)) else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def check_batch(cfg, world):
    """Raise UserError if so many processes cannot share a step."""
    if world > 1 and cfg.parallel == "none":
        raise UserError(f"{world} processes with parallel=none: use parallel=ddp or parallel=fsdp")
    parts = world * cfg.accumulate
    if cfg.batch % parts:
        raise UserError(
            f"batch={cfg.batch} does not divide into {world} processes x {cfg.accumulate} "
            f"micro-batches: use batch={max(cfg.batch // parts, 1) * parts}"
        )


def check_launch(cfg, device, world):
    """Raise UserError when launch line, machine and config do not fit together."""
    check_batch(cfg, world)
    if cfg.parallel != "none" and "RANK" not in os.environ:
        raise UserError(f"parallel={cfg.parallel} needs a launcher: torchrun train.py, not python")
    if cfg.precision == "fp16" and device.type != "cuda":
        fix = f"this is {device.type}: use precision=auto"
        raise UserError(f"precision=fp16 needs a CUDA device, {fix}")
    dim, _, heads, _ = size_of(cfg.vit.size)
    check_backend(cfg.attention, device, dtype_of(cfg), dim // heads)
    compiles(cfg)


def compiles(cfg):
    """Whether a run compiles: compile=auto does on a CUDA device, if torch.compile can work.

    Raises UserError when it is asked for where it cannot.
    """
    from kernels.build import can_build

    cuda = pick_device(cfg.device).type == "cuda"
    possible = can_build(cuda)
    if cfg.compile is True and not possible:
        needs = f"{'gcc' if cuda else 'g++'} and Python.h (python3-dev)" + ", and triton" * cuda
        raise UserError(f"compile=true needs {needs}: install them, or use compile=false")
    return possible and cfg.compile in ((True, "auto") if cuda else (True,))


def own_store():
    """The store in which ranks find each other: of this attempt only.

    torchrun (PyTorch 2.13) keeps one store over restarts, and a new rank may find the address of a
    dead one there. Several machines count restarts each for itself, so there the launch script has
    to set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 instead.
    """
    store, rank, world = next(rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    return {"store": store, "rank": rank, "world_size": world}


@contextlib.contextmanager
def process_group(cfg):
    """Join the processes that torchrun started, and yield the device of this one.

    Raises UserError when launch line and config do not fit together, RankError when another
    process died or does not answer.
    """
    world, device = int(os.environ.get("WORLD_SIZE", 1)), pick_device(cfg.device)
    check_launch(cfg, device, world)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where fp32 is asked, as official
        if not compiles(cfg):  # losses.py would
            torch.compiler.set_stance("force_eager")
    seconds = float(os.environ.get("COLLECTIVE_TIMEOUT", 600))
    try:
        if cfg.parallel != "none":
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=seconds), **own_store())
        yield device
    except RuntimeError as error:  # of which gloo's have no class of their own
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise RankError(
            f"rank {os.environ['RANK']} of {world}: another process died or did not answer within "
            f"{seconds:g} s ({str(error).splitlines()[0]}); with torchrun --max-restarts=3 the run "
            "continues from its last checkpoint by itself"
        ) from None
    # After an exception the process ends anyhow, and a thread may still be writing a checkpoint.
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- wrapping -----------------------------------------------------------------------------------


def wrap(network, cfg, train):
    """Prepare a Network that was built on the meta device; returns what is to be called.

    The order matters: activations are checkpointed inside what is compiled, compilation stays
    within a block so that sharding can gather its weights around it, and sharding comes last.
    """
    for block in network.backbone.blocks if train else ():
        checkpoint_activations(block, cfg.activation_checkpointing)
    # The last block has other numbers of rows in each step, and would be compiled anew for these.
    for block in network.backbone.blocks[:-1] if compiles(cfg) else ():
        block.compile()  # in place: parameter names stay clean, which torch.compile() would change
    if cfg.parallel == "fsdp":
        shard(network, cfg, train)
    return network


def checkpoint_activations(block, mode):
    """Recompute a block's activations in the backward pass instead of storing them.

    full keeps only the block's input. selective also keeps the results of matrix products and of
    PyTorch's attention, so that little is computed twice.
    """
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    if mode == "none":
        return
    aten = torch.ops.aten
    expensive = [
        aten.mm.default,
        aten.addmm.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
    ]
    context = {"context_fn": lambda: create_selective_checkpoint_contexts(expensive)}
    extra = context if mode == "selective" else {}
    forward = block.forward
    # Stochastic depth is drawn outside the block, so recomputing needs no random state.
    block.forward = lambda *args: checkpoint(
        forward, *args, use_reentrant=False, preserve_rng_state=False, **extra
    )


def shard(network, cfg, train):
    """FSDP2: each rank stores 1/world of every parameter, and gathers one block at a time."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # What the backbone returns are views; nobody writes into them, which is what it warns of.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    # fp32 shards are the master weights; what is gathered and computed is of cfg.precision, and
    # gradients are summed in fp32. (The official code sums those of the backbone in fp16.)
    precision = MixedPrecisionPolicy(dtype_of(cfg), torch.float32, cast_forward_inputs=False)
    # As official: the student keeps gathered weights until its backward pass is over, the teacher,
    # who has none, gives them back at once; so does a backbone that is frozen.
    trained = {name: train for name, _ in network.named_children()}
    trained["backbone"] = train and not cfg.optim.freeze_backbone
    options = {"mp_policy": precision, "shard_placement_fn": cut}
    for block in network.backbone.blocks:
        fully_shard(block, reshard_after_forward=not trained["backbone"], **options)
    # Backbone and heads are roots of their own, so that a backbone can be called alone (k-NN).
    for name, part in network.named_children():
        fully_shard(part, reshard_after_forward=not trained[name], **options)


def cut(parameter):
    """The dimension along which FSDP cuts a parameter: the first, but of a single row the last.

    Tokens and positions have one row. The first rank would get all of it, and every other one as
    much padding: with 256 ranks, 8 % of what ViT-g sends.
    """
    if len(parameter) == 1 and parameter.shape[-1] % ranks()[1] == 0:
        return Shard(parameter.dim() - 1)


@torch.no_grad()
def materialize(network, device, seed):
    """Give a network on the meta device its memory and its initial values.

    One parameter exists whole at a time, and a shard keeps its part: ViT-g never exists whole on
    any rank. Values come from one generator on the CPU, so they do not depend on device or ranks.
    """
    network.to_empty(device=device)
    parameters = dict(network.named_parameters())
    for name, value in network.initial_values(torch.Generator().manual_seed(seed)):
        put(parameters[name], value)


@torch.no_grad()
def put(parameter, value):
    """Copy a whole value into a parameter, or this rank's part of it into a shard."""
    if isinstance(parameter, DTensor):
        value = value.to(parameter.device)
        value = distribute_tensor(
            value, parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    parameter.copy_(value)


def replicate(network, cfg):
    """DDP: every rank has the whole network; gradients are averaged while backward runs."""
    if cfg.parallel != "ddp":
        return network
    return nn.parallel.DistributedDataParallel(network, gradient_as_bucket_view=True)


def synchronized(model, now):
    """Context for a micro-batch: whether the ranks average their gradients in its backward pass."""
    if isinstance(model, nn.parallel.DistributedDataParallel) and not now:
        return model.no_sync()
    for part in model.children():
        if hasattr(part, "set_requires_gradient_sync"):  # FSDP2
            part.set_requires_gradient_sync(now)
    return contextlib.nullcontext()
