"""Attention of crops that have few tokens: one Triton kernel forward, one backward.

Fused kernels are made for thousands of tokens: they go through the keys in tiles, and correct the
softmax on the way (FlashAttention, Dao et al. 2022). A crop of 224 px has 197 tokens: few enough
for one processor of the GPU to hold all its keys and values at once, so this is plain attention,
line by line. The rest of the gain lies around it: q, k and v are read, and their gradients written,
where the Linear before it has them, without the copies that turn them into (B, H, T, E) and back.

The specification is attention.plain_attention. TRITON_INTERPRET=1 runs both kernels on a CPU.

Shapes:  M tokens of all crops   H heads   E channels per head (16, 32 or 64)
         B crops of one size   T tokens of each, at most 256
"""

import torch
import triton
import triton.language as tl
from triton.language import constexpr


@triton.jit
def short_forward(qkv, out, T, H: constexpr, E: constexpr, TILE: constexpr, KEYS: constexpr):
    """One head of one crop, a tile of queries after the other. KEYS >= T is a power of two."""
    head, crop = tl.program_id(0) % H, (tl.program_id(0) // H).to(tl.int64)
    qkv += crop * T * 3 * H * E + head * E
    out += crop * T * H * E + head * E
    key, e = tl.arange(0, KEYS)[:, None], tl.arange(0, E)[None, :]
    k = tl.load(qkv + (key * 3 + 1) * H * E + e, key < T, 0.0)
    v = tl.load(qkv + (key * 3 + 2) * H * E + e, key < T, 0.0)
    for start in range(0, T, TILE):
        query = start + tl.arange(0, TILE)[:, None]
        q = tl.load(qkv + query * 3 * H * E + e, query < T, 0.0)
        score = tl.where(tl.arange(0, KEYS) < T, tl.dot(q, tl.trans(k)) * E**-0.5, float("-inf"))
        weight = tl.exp(score - tl.max(score, 1)[:, None])
        y = tl.dot(weight.to(v.dtype), v) / tl.sum(weight, 1)[:, None]
        tl.store(out + query * H * E + e, y.to(v.dtype), query < T)


@triton.jit
def short_backward(qkv, dy, dqkv, T, H: constexpr, E: constexpr, TILE: constexpr, KEYS: constexpr):
    """The gradients of all three; scores are computed again."""
    head, crop = tl.program_id(0) % H, (tl.program_id(0) // H).to(tl.int64)
    qkv += crop * T * 3 * H * E + head * E
    dqkv += crop * T * 3 * H * E + head * E
    dy += crop * T * H * E + head * E
    key, e = tl.arange(0, KEYS)[:, None], tl.arange(0, E)[None, :]
    k = tl.load(qkv + (key * 3 + 1) * H * E + e, key < T, 0.0)
    v = tl.load(qkv + (key * 3 + 2) * H * E + e, key < T, 0.0)
    dk, dv = tl.zeros((KEYS, E), tl.float32), tl.zeros((KEYS, E), tl.float32)
    for start in range(0, T, TILE):
        query = start + tl.arange(0, TILE)[:, None]
        q = tl.load(qkv + query * 3 * H * E + e, query < T, 0.0)
        dy_tile = tl.load(dy + query * H * E + e, query < T, 0.0)
        # Transposed, (KEYS, TILE): so all products but that of dq read what is in registers.
        score = tl.where(key < T, tl.dot(k, tl.trans(q)) * E**-0.5, float("-inf"))
        weight = tl.exp(score - tl.max(score, 0))
        weight /= tl.sum(weight, 0)
        dweight = tl.dot(v, tl.trans(dy_tile))
        dscore = weight * (dweight - tl.sum(weight * dweight, 0)) * E**-0.5
        dv += tl.dot(weight.to(v.dtype), dy_tile)
        dk += tl.dot(dscore.to(v.dtype), q)
        dq = tl.dot(tl.trans(dscore.to(v.dtype)), k)
        tl.store(dqkv + query * 3 * H * E + e, dq.to(v.dtype), query < T)
    tl.store(dqkv + (key * 3 + 1) * H * E + e, dk.to(v.dtype), key < T)
    tl.store(dqkv + (key * 3 + 2) * H * E + e, dv.to(v.dtype), key < T)


def short_kernel(kernel, sizes, *tensors):
    """Run it on one group of crops after the other."""
    first, (heads, width) = 0, tensors[0].shape[2:]
    assert all(tensor.is_contiguous() for tensor in tensors)
    for B, T in zip(sizes[::2], sizes[1::2], strict=True):
        parts = [tensor[first : first + B * T] for tensor in tensors]
        keys = max(triton.next_power_of_2(T), 16)
        # The largest tiles that need no memory beside the registers, timed on an H100.
        tile, warps = (64, 4) if kernel is short_forward else (32, 8 if keys > 128 else 4)
        with torch.cuda.device_of(tensors[0]):  # where Triton starts it
            kernel[(B * heads,)](*parts, T, heads, width, min(tile, keys), keys, num_warps=warps)
        first += B * T


# As operators of PyTorch they have a gradient, and torch.compile need not look inside.
@torch.library.custom_op("nanodinov2::attend_short", mutates_args=())
def attend_short(qkv_M3HE: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """plain_attention of each crop; sizes are B and T of one group of crops after the other."""
    out_MHE = like_q(qkv_M3HE, sizes)
    short_kernel(short_forward, sizes, qkv_M3HE.contiguous(), out_MHE)
    return out_MHE


@torch.library.custom_op("nanodinov2::attend_short_backward", mutates_args=())
def attend_short_backward(
    dy_MHE: torch.Tensor, qkv_M3HE: torch.Tensor, sizes: list[int]
) -> torch.Tensor:
    """The gradient of q, k and v."""
    dqkv_M3HE = qkv_M3HE.new_empty(qkv_M3HE.shape)
    short_kernel(short_backward, sizes, qkv_M3HE.contiguous(), dy_MHE.contiguous(), dqkv_M3HE)
    return dqkv_M3HE


def like_q(qkv_M3HE, sizes):
    """Memory for what attention returns."""
    return qkv_M3HE.new_empty(len(qkv_M3HE), *qkv_M3HE.shape[2:])


def keep_qkv(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])
    ctx.sizes = inputs[1]


attend_short.register_fake(like_q)
attend_short_backward.register_fake(lambda dy, qkv, sizes: qkv.new_empty(qkv.shape))
attend_short.register_autograd(
    lambda ctx, dy_MHE: (attend_short_backward(dy_MHE, *ctx.saved_tensors, ctx.sizes), None),
    setup_context=keep_qkv,
)
