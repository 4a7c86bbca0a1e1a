"""Attention over crops of several sizes packed into one row of tokens, behind one switch.

DINOv2 (section 5, "Sequence packing") runs large and small crops together: every linear layer
sees all tokens at once, and only attention must keep each crop to itself. Five ways, one result:

    plain     softmax(Q K^T / sqrt(E)) V, written out, one product per crop size; the specification
    sdpa      PyTorch's fused kernel, one call per crop size
    short     our kernel for crops of few tokens (kernels/short.py; CUDA, bf16 or fp16): what `auto`
              takes where it can, and no name in a config
    varlen    PyTorch's variable-length kernel, one call for all crops (CUDA, bf16 or fp16)
    xformers  xFormers' kernel with a block-diagonal mask, one call for all crops (CUDA)

Shapes:  M tokens of all crops   H heads   E channels per head
         B crops of one size   T tokens of each
"""

import contextlib
import ctypes
import importlib.metadata
import logging
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from config import UserError


class Packing(NamedTuple):
    """How crops lie in the row of tokens: made once for a batch, outside of what is compiled."""

    groups: tuple  # (B, T) for each crop size, in the order in which the tokens are packed
    backend: str
    borders: Any = None  # of the crops: what crop_starts or block_diagonal returns


def pack(groups, backend, device, dtype=None):
    """The Packing for these groups of crops, attended to by `backend`."""
    if backend == "auto":
        backend = fastest(device, dtype, max(T for _, T in groups))
    make = {"varlen": crop_starts, "xformers": block_diagonal}.get(backend)
    return Packing(tuple(groups), backend, make and make(tuple(groups), device))


def attend(qkv_M3HE, packing):
    """Softmax attention of every token to the tokens of its own crop: (M, 3, H, E) -> (M, H, E)."""
    if packing.backend == "short" and qkv_M3HE.shape[-1] in (16, 32, 64):  # else sdpa
        from kernels.short import attend_short  # needs Triton, which comes with PyTorch for CUDA

        return attend_short(qkv_M3HE, [n for group in packing.groups for n in group])
    if packing.backend == "varlen":
        return attend_varlen(qkv_M3HE, *packing.borders)
    if packing.backend == "xformers":
        return attend_xformers(qkv_M3HE, packing.borders)
    one_size = plain_attention if packing.backend == "plain" else F.scaled_dot_product_attention
    qkv = SplitCrops.apply(qkv_M3HE, packing.groups)
    out = [one_size(*qkv[i : i + 3]).transpose(1, 2).flatten(0, 1) for i in range(0, len(qkv), 3)]
    return out[0] if len(out) == 1 else torch.cat(out)


def split_crops(qkv_M3HE, groups):
    """Views of q, k and v of one crop size after the other, (B, H, T, E) each."""
    parts = qkv_M3HE.split([B * T for B, T in groups])
    parts = [x.unflatten(0, g).permute(2, 0, 3, 1, 4) for x, g in zip(parts, groups, strict=True)]
    return tuple(x for part in parts for x in part.unbind(0))


class SplitCrops(torch.autograd.Function):
    """split_crops, whose gradients are written to their places in one copy.

    PyTorch's own would stack q, k and v, turn them, and join the crop sizes: three copies.
    """

    @staticmethod
    def forward(ctx, qkv_M3HE, groups):
        ctx.shape, ctx.groups = qkv_M3HE.shape, groups
        return split_crops(qkv_M3HE, groups)

    @staticmethod
    def backward(ctx, *grads):
        grad_M3HE = grads[0].new_empty(ctx.shape)
        for place, grad in zip(split_crops(grad_M3HE, ctx.groups), grads, strict=True):
            place.copy_(grad)
        return grad_M3HE, None


def plain_attention(q, k, v):
    """Attention written out: softmax(Q K^T / sqrt(E)) V over (B, H, T, E)."""
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return weights.softmax(dim=-1) @ v


def attend_varlen(qkv_M3HE, starts, longest):
    """One call of PyTorch's flash kernel; cumulative lengths tell it where each crop begins."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = qkv_M3HE.unbind(1)
    return varlen_attn(q, k, v, starts, starts, longest, longest)


def attend_xformers(qkv_M3HE, mask):
    """One call of xFormers' kernel; the block-diagonal mask keeps each crop to itself."""
    from xformers.ops import memory_efficient_attention

    q, k, v = qkv_M3HE.unsqueeze(0).unbind(2)  # (1, M, H, E): one long sequence
    return memory_efficient_attention(q, k, v, attn_bias=mask)[0]


# Both are kept for some combinations of crops: another batch mostly has the same. The caches are
# bounded, so a run over many resolutions does not fill the memory.
@lru_cache(maxsize=64)
def crop_starts(groups, device):
    """Cumulative lengths (number of crops + 1,) int32 on the device, and the longest crop."""
    lengths = torch.tensor([T for B, T in groups for _ in range(B)])
    starts = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return starts.to(device), max(T for _, T in groups)


@lru_cache(maxsize=64)
def block_diagonal(groups, device):
    """xFormers' mask for the packed crops."""
    open_cuda_12()
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    return BlockDiagonalMask.from_seqlens([T for B, T in groups for _ in range(B)], device=device)


@lru_cache(maxsize=64)
def fastest(device, dtype, longest):
    """The backend that `auto` stands for, where crops have up to `longest` tokens.

    `scripts/benchmarks.py attention` measures them all. The fused kernel took, on a CPU in bf16, 2
    to 12 times as long as plain attention for 17 to 785 tokens (AMD Zen 5), in fp32 2 times for 17,
    1.3 for 37, 1 for 50 (AMD EPYC, AVX2); on an H100 1.4 to 1.6 times as long as short.
    """
    from kernels.build import can_build

    half = dtype in (torch.bfloat16, torch.float16)
    if device.type == "cuda" and half and longest <= 256 and can_build(cuda=True):
        return "short"  # its keys, values and their gradients fit into registers
    few = longest <= 40 or dtype == torch.bfloat16
    return "plain" if device.type == "cpu" and few else "sdpa"


def check_backend(name, device, dtype, width=64):
    """Refuse a backend without a kernel for this device, dtype and head width (in channels).

    Whether there is one shows when it is used. The UserError names the way out.
    """
    if name not in ("varlen", "xformers"):
        return
    if device.type != "cuda":
        raise UserError(f"attention={name} has no kernel for {device.type}: use attention=auto")
    logging.getLogger("xformers").setLevel(logging.ERROR)  # what it warns of is said below
    try:
        packing = pack(((1, 2),), name, device)
        qkv = torch.zeros(2, 3, 1, width, device=device, dtype=dtype, requires_grad=True)
        attend(qkv, packing).sum().backward()
    except ImportError as error:
        raise UserError(f"attention={name}: {error}; pip install {name}") from None
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split("because:")[-1].split())[:200]
        kind = f"{str(dtype)[6:]} and heads of {width} channels ({reason})"
        raise UserError(f"attention={name} has no kernel for {kind}: use attention=auto") from None


def open_cuda_12():
    """Load libcudart.so.12 of the package nvidia-cuda-runtime-cu12, for xFormers' kernels.

    PyTorch may have brought another CUDA. What is loaded already needs no LD_LIBRARY_PATH.
    """
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("nvidia-cuda-runtime-cu12") or ():
            if file.name == "libcudart.so.12":
                ctypes.CDLL(str(file.locate()))
