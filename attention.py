"""Attention over crops of several sizes packed into one row of tokens, behind one switch.

DINOv2 (section 5, "Sequence packing") runs large and small crops together: every linear layer
sees all tokens at once, and only attention must keep each crop to itself. Four ways to do that,
one result:

    plain     softmax(Q K^T / sqrt(E)) V, written out, one product per crop size; the specification
    sdpa      PyTorch's fused kernel, one call per crop size
    varlen    PyTorch's variable-length kernel, one call for all crops (CUDA, bf16 or fp16)
    xformers  xFormers' kernel with a block-diagonal mask, one call for all crops (CUDA)

Shapes:  M tokens of all crops   H heads   E channels per head
         B crops of one size   T tokens of each
`groups` lists (B, T) for each crop size, in the order in which the tokens are packed.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F

from config import UserError


def attend(qkv_M3HE, groups, backend):
    """Softmax attention of every token to the tokens of its own crop: (M, 3, H, E) -> (M, H, E)."""
    if backend == "auto":
        backend = fastest(qkv_M3HE.device, qkv_M3HE.dtype)
    if backend == "varlen":
        return attend_varlen(qkv_M3HE, groups)
    if backend == "xformers":
        return attend_xformers(qkv_M3HE, groups)
    out = []
    for qkv, (B, T) in zip(qkv_M3HE.split([B * T for B, T in groups]), groups, strict=True):
        q, k, v = qkv.unflatten(0, (B, T)).permute(2, 0, 3, 1, 4)  # 3 x (B, H, T, E)
        one_size = plain_attention if backend == "plain" else F.scaled_dot_product_attention
        out.append(one_size(q, k, v).transpose(1, 2).flatten(0, 1))
    return out[0] if len(out) == 1 else torch.cat(out)


def plain_attention(q, k, v):
    """Attention written out: softmax(Q K^T / sqrt(E)) V over (B, H, T, E)."""
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return weights.softmax(dim=-1) @ v


def attend_varlen(qkv_M3HE, groups):
    """One call of PyTorch's flash kernel; cumulative lengths tell it where each crop begins."""
    from torch.nn.attention.varlen import varlen_attn

    starts, longest = crop_starts(groups, qkv_M3HE.device)
    q, k, v = qkv_M3HE.unbind(1)
    return varlen_attn(q, k, v, starts, starts, longest, longest)


def attend_xformers(qkv_M3HE, groups):
    """One call of xFormers' kernel; the block-diagonal mask keeps each crop to itself."""
    from xformers.ops import memory_efficient_attention

    q, k, v = qkv_M3HE.unsqueeze(0).unbind(2)  # (1, M, H, E): one long sequence
    return memory_efficient_attention(q, k, v, attn_bias=block_diagonal(groups, q.device))[0]


# Both are made once for each combination of crops rather than in each of 40 blocks. The caches are
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
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    return BlockDiagonalMask.from_seqlens([T for B, T in groups for _ in range(B)], device=device)


def fastest(device, dtype):
    """The backend that `auto` stands for; `python -m bench attention` measures them all.

    In bf16 on a CPU, forward and backward of the fused kernel took 2 to 12 times as long as plain
    attention for 17 to 785 tokens (AMD Zen 5, PyTorch 2.13); in fp32 plain attention took up to 1.3
    times as long. On a GPU nothing was measured yet: the fused kernel runs on all of them.
    """
    return "plain" if device.type == "cpu" and dtype == torch.bfloat16 else "sdpa"


def check_backend(name, device, dtype):
    """Refuse a backend that a device cannot run; the UserError names the way out."""
    if name in ("varlen", "xformers"):
        if device.type != "cuda":
            raise UserError(f"attention={name} has no kernel for {device.type}: use attention=auto")
        if dtype == torch.float32 and name == "varlen":
            raise UserError("attention=varlen needs precision=bf16 or fp16, or use attention=auto")
    if name == "xformers":
        try:
            import xformers.ops  # noqa: F401
        except ImportError as error:
            raise UserError(f"attention=xformers: {error}; pip install xformers") from None
