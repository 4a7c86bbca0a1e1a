"""Everything that knows how many processes and devices there are: start, collectives, wrapping.

The model and the loop are written for one process. Each collective here is the identity for one
process, so code above it has no `if`; wrapping happens from outside, in one commented order.
"""

import contextlib
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_gather
from torch.distributed.tensor import DTensor, distribute_tensor

from attention import check_backend
from config import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# ---- collectives ---------------------------------------------------------------------------------


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


def gather_from_ranks(x_BD):
    """Rows of all processes (G, D) with gradient, and where this process' own rows begin."""
    rank, world = ranks()
    if world == 1:
        return x_BD, 0
    return torch.cat(all_gather(x_BD)), rank * len(x_BD)


# ---- start ---------------------------------------------------------------------------------------


def pick_device(name):
    """The torch.device of this process: `auto` takes CUDA, then Apple's MPS, then the CPU."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but PyTorch sees no CUDA device: use device=cpu or auto")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("device=mps, but PyTorch sees no Apple GPU: use device=cpu or auto")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)


@contextlib.contextmanager
def process_group(cfg):
    """Join the processes that torchrun started, and yield (device, rank, world).

    Raises UserError when launch line and config do not fit together.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(cfg.device)
    if world > 1 and cfg.parallel == "none":
        raise UserError(f"{world} processes with parallel=none: use parallel=ddp or parallel=fsdp")
    if cfg.parallel != "none" and "RANK" not in os.environ:
        raise UserError(f"parallel={cfg.parallel} needs a launcher: torchrun train.py ...")
    if cfg.precision == "fp16" and device.type != "cuda":
        raise UserError(
            f"precision=fp16 needs a CUDA device, this is {device.type}: use bf16 or fp32"
        )
    check_backend(cfg.attention, device, DTYPES[cfg.precision])
    if cfg.batch % (world * cfg.accumulate):
        raise UserError(
            f"batch={cfg.batch} does not divide into {world} processes x {cfg.accumulate} "
            f"micro-batches: use a multiple of {world * cfg.accumulate}"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where fp32 is asked, as official
    if cfg.parallel != "none":
        backend = "nccl" if device.type == "cuda" else "gloo"
        # Ranks wait for each other at most this long; then the hung collective is named and the
        # job ends, instead of burning GPUs in silence.
        dist.init_process_group(backend, timeout=timedelta(minutes=10))
    try:
        yield device, *ranks()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ---- wrapping ------------------------------------------------------------------------------------


def wrap(network, cfg, train):
    """Prepare a Network that was built on the meta device; returns what is to be called.

    The order matters: activations are checkpointed inside what is compiled, compilation stays
    within a block so that sharding can gather its weights around it, and sharding comes last.
    """
    for block in network.backbone.blocks if train else ():
        checkpoint_activations(block, cfg.activation_checkpointing)
    for block in network.backbone.blocks if cfg.compile else ():
        block.compile()  # in place: parameter names stay clean, which torch.compile() would change
    if cfg.parallel == "fsdp":
        shard(network, cfg, train)
    return network


def checkpoint_activations(block, mode):
    """Recompute a block's activations in the backward pass instead of storing them.

    full keeps only the block's input. selective also keeps the results of matrix products and
    attention, so that little is computed twice.
    """
    from torch.utils.checkpoint import (
        CheckpointPolicy,
        checkpoint,
        create_selective_checkpoint_contexts,
    )

    if mode == "none":
        return
    aten = torch.ops.aten
    expensive = {
        aten.mm.default,
        aten.addmm.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
    }

    def keep_expensive(ctx, op, *args, **kwargs):
        keep = op in expensive
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    context = {"context_fn": lambda: create_selective_checkpoint_contexts(keep_expensive)}
    extra = context if mode == "selective" else {}
    forward = block.forward
    # Stochastic depth is drawn outside the block, so recomputing needs no random state.
    block.forward = lambda *args: checkpoint(
        forward, *args, use_reentrant=False, preserve_rng_state=False, **extra
    )


def shard(network, cfg, train):
    """FSDP2: each rank stores 1/world of every parameter, and gathers one block at a time."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # fp32 shards are the master weights; what is gathered and computed is cfg.precision, and
    # gradients are summed in fp32. (The official code sums those of the backbone in fp16.)
    precision = MixedPrecisionPolicy(
        DTYPES[cfg.precision], torch.float32, cast_forward_inputs=False
    )
    # As official: the student keeps gathered weights until its backward pass is over, the teacher,
    # who has none, gives them back at once.
    options = {"mp_policy": precision, "reshard_after_forward": not train}
    for block in network.backbone.blocks:
        fully_shard(block, **options)
    for part in network.children():
        fully_shard(part, **options)
    fully_shard(network, **options)


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
    return nn.parallel.DistributedDataParallel(
        network, broadcast_buffers=False, gradient_as_bucket_view=True
    )


def synchronized(model, now):
    """Context for a micro-batch: whether the ranks average their gradients in its backward pass."""
    if isinstance(model, nn.parallel.DistributedDataParallel) and not now:
        return model.no_sync()
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP2
        model.set_requires_gradient_sync(now)
    return contextlib.nullcontext()
