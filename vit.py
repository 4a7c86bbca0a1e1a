"""A Vision Transformer that reads crops of several sizes in one pass.

An image becomes a row of patch tokens, a [CLS] token goes in front, registers (if any) behind it,
and every block does
    x = x + gamma * attention(norm(x))
    x = x + gamma * mlp(norm(x))
Four things differ from the original ViT (Dosovitskiy et al. 2021):
  - LayerScale: gamma starts almost at zero, so that deep networks train    (Touvron et al. 2021)
  - registers: extra tokens in which the network may keep global notes      (Darcet et al. 2024)
  - SwiGLU instead of GELU for the giant model                              (Shazeer 2020)
  - stochastic depth drops whole images, so the dropped work is saved       (DINOv2, section 5)
Parameter names are those of the released DINOv2 checkpoints, which load with strict=True.

Precision is that of the images put in. Weights stay in fp32 and are cast where they are used, so
with bf16 images everything (the residual stream too) is bf16, as in the official mixed precision.

Shapes:  B images of one crop size   N patches   T = 1 + registers + N tokens   D channels
         H heads   E channels per head   M = sum of B * T, the tokens of all crops packed in one row
"""

from dataclasses import asdict
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from attention import attend, pack
from config import UserError

# name:        dim  depth  heads  ffn        The first four are ours, for small images; the others
SIZES = {  #                                 are the released ones, with 64 channels a head.
    "pico":    (128,   4,     4, "mlp"),
    "nano":    (128,   6,     4, "mlp"),
    "micro":   (192,   6,     3, "mlp"),
    "tiny":    (192,  12,     3, "mlp"),
    "small":   (384,  12,     6, "mlp"),
    "base":    (768,  12,    12, "mlp"),
    "large":   (1024, 24,    16, "mlp"),
    "giant2":  (1536, 40,    24, "swiglu"),
}  # fmt: skip


def size_of(size):
    """(dim, depth, heads, ffn) of a name in SIZES; four such values stay what they are."""
    if isinstance(size, str) and size not in SIZES:
        raise UserError(f"vit.size={size} is unknown: choose one of {', '.join(SIZES)}")
    return SIZES[size] if isinstance(size, str) else size


class Linear(nn.Linear):
    """nn.Linear that computes in the precision of its input: fp32 weights are cast at use.

    gamma * (W x + b), for a LayerScale behind it, is (gamma W) x + gamma b: that scales D x D
    numbers instead of tokens x D, forward and backward.
    """

    def forward(self, x, gamma=None):
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        if gamma is None:
            return F.linear(x, weight, bias)
        gamma = gamma.to(x.dtype)
        if x.dtype == torch.float16:  # which has no 1e-5 * 0.02
            return F.linear(x, weight, bias) * gamma
        return F.linear(x, gamma.unsqueeze(1) * weight, gamma * bias)


def scaled(linear, x, gamma):
    """linear(x), times the gamma of a LayerScale; without one, any nn.Linear will do."""
    return linear(x) if gamma is None else linear(x, gamma)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm in the precision of its input; statistics are fp32 inside the kernel."""

    def forward(self, x):
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class PatchEmbed(nn.Module):
    """Cut an image into patches and map each to a token: (B, C, H, W) -> (B, N, D).

    The weights have the shape of a convolution with stride = kernel = patch, as released. Patches
    do not overlap, so it is a matrix product over the pixels of each patch.
    """

    def __init__(self, channels, dim, patch):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch, stride=patch)

    def forward(self, x):
        p = self.proj.kernel_size[0]
        x = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, C, H/p, p, W/p, p)
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, N, C * p * p)
        return F.linear(x, self.proj.weight.to(x.dtype).flatten(1), self.proj.bias.to(x.dtype))


class Attention(nn.Module):
    """Multi-head self-attention within each crop of a packed row of tokens."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x, packing, gamma=None):
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (M, 3, H, E)
        return scaled(self.proj, attend(qkv, packing).flatten(1), gamma)


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x, gamma=None):
        return scaled(self.fc2, F.gelu(self.fc1(x)), gamma)


class SwiGLU(nn.Module):
    """Gated feed-forward layer, w3(silu(x1) * x2) with (x1, x2) = w12(x).

    A third matrix costs half as much again, so hidden is cut to 2/3 and rounded up to a multiple
    of 8: as many parameters as the plain MLP. "SwiGLU" and "fused SwiGLU" are the same function.
    """

    def __init__(self, dim, hidden):
        super().__init__()
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        self.w12 = Linear(dim, 2 * hidden)
        self.w3 = Linear(hidden, dim)

    def forward(self, x, gamma=None):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return scaled(self.w3, F.silu(gate) * value, gamma)


class LayerScale(nn.Module):
    """A trainable factor for each channel of a residual branch; its last Linear applies it."""

    def __init__(self, dim, start):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(start))) if start else None

    def forward(self, x):
        """The factor written out, as hub networks apply it (weights/plain.py)."""
        return x if self.gamma is None else x * self.gamma.to(x.dtype)


class Block(nn.Module):
    """One transformer block over packed tokens: x + gamma * attn(norm(x)), then the same with mlp.

    kept    which images stochastic depth keeps, for each of the two branches; None is all
    wanted  (W,) different rows: after the attention branch only these tokens go on
    """

    def __init__(self, dim, heads, hidden, ffn, layerscale):
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.ls1 = LayerScale(dim, layerscale)
        self.norm2 = LayerNorm(dim, eps=1e-6)
        self.mlp = {"mlp": Mlp, "swiglu": SwiGLU}[ffn](dim, hidden)
        self.ls2 = LayerScale(dim, layerscale)

    def attention_branch(self, x, packing):
        return self.attn(self.norm1(x), packing, self.ls1.gamma)

    def feed_forward_branch(self, x, packing):
        return self.mlp(self.norm2(x), self.ls2.gamma)

    def forward(self, x, packing, kept=(None, None), wanted=None):
        # Ablation: `first = second = None` trains without stochastic depth.
        first, second = kept
        x = add_branch(x, self.attention_branch, packing, first)
        # Tokens meet in attention only. Behind the last one, those that no loss reads are dead.
        if wanted is not None:
            x = x.index_select(0, wanted)
            scale = second[-1].index_select(0, wanted) if second else 1  # 0: a dropped image
            return (x + scale * self.feed_forward_branch(x, packing)).to(x.dtype)
        return add_branch(x, self.feed_forward_branch, packing, second)


def add_branch(x_MD, branch, packing, kept=None):
    """x + branch(x) on packed tokens; with stochastic depth only for the kept images.

    kept  (packing, rows, place, scale) of the images to compute: rows (m,) are those of their
          tokens; place (M,) says where a token is among these, scale (M, 1) is batch / kept, or 0
          if it is dropped. Dropped images are not computed at all: their rows stay as they are
          (DINOv2 section 5, "Efficient stochastic depth").
    """
    if kept is None:
        return x_MD + branch(x_MD, packing)
    kept_packing, *indices = kept
    x_mD, x_MD = TakeRows.apply(x_MD, *indices)
    return AddRows.apply(x_MD, branch(x_mD, kept_packing), *indices)


# Kept rows are all different, so nothing has to be summed up: forward and backward are gathers,
# without the atomic additions of PyTorch's gradient of a gather, and always give the same bits.
class TakeRows(torch.autograd.Function):
    """(x[rows], x). Handing x through lets the backward pass add both gradients at once."""

    @staticmethod
    def forward(ctx, x_MD, rows_m, place_M, scale_M1):
        ctx.save_for_backward(place_M, scale_M1)
        return x_MD.index_select(0, rows_m), x_MD.view_as(x_MD)

    @staticmethod
    def backward(ctx, grad_mD, grad_MD):
        place_M, scale_M1 = ctx.saved_tensors
        spread_MD, kept_M1 = grad_mD.index_select(0, place_M), (scale_M1 > 0).to(grad_mD.dtype)
        return torch.addcmul(grad_MD, spread_MD, kept_M1), None, None, None


class AddRows(torch.autograd.Function):
    """x + scale * branch[place]: what the branch says of the kept rows, added to these."""

    @staticmethod
    def forward(ctx, x_MD, branch_mD, rows_m, place_M, scale_M1):
        ctx.save_for_backward(rows_m, scale_M1)
        # scale is fp32, and so is the sum before it is rounded. Written with `out=`, or with a
        # `.to` that changes nothing, PyTorch 2.11 compiles it to a function without a gradient.
        sum_MD = torch.addcmul(x_MD, branch_mD.index_select(0, place_M), scale_M1)
        return sum_MD if sum_MD.dtype == x_MD.dtype else sum_MD.to(x_MD.dtype)

    @staticmethod
    def backward(ctx, grad_MD):
        rows_m, scale_M1 = ctx.saved_tensors
        grad_mD = grad_MD.index_select(0, rows_m).mul_(scale_M1.index_select(0, rows_m))
        return grad_MD, grad_mD, None, None, None


def resize_positions(pos_embed, rows, columns, offset=0.1, antialias=False):
    """Positions (1, 1 + side * side, D) -> (1, 1 + rows * columns, D): bicubic, in fp32."""
    side = int((pos_embed.shape[1] - 1) ** 0.5)
    if (rows, columns) == (side, side):
        return pos_embed
    cls, grid = pos_embed[:, :1], pos_embed[:, 1:].float()
    grid = grid.unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, D, side, side)
    # The offset was once added against rounding of the scale. It is kept because it moves every
    # sampling point: size= instead changes the result by up to 30 %, and released weights were
    # trained with it (0.1; register models: 0 with antialias).
    if offset:
        scale = ((rows + offset) / side, (columns + offset) / side)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic", antialias=antialias)
    else:
        grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", antialias=antialias)
    assert grid.shape[-2:] == (rows, columns), "offset too large for this grid"
    return torch.cat((cls, grid.flatten(2).transpose(1, 2).to(cls.dtype)), dim=1)


class VisionTransformer(nn.Module):
    """The backbone: images (B, C, H, W) to [CLS], register and patch tokens of width D.

    size       a row of SIZES, or (dim, depth, heads, ffn)
    image_size pixels a side of the images that `pos_embed` is stored for; other sizes interpolate
    init_std   of the linear layers; 0 takes 1 / sqrt(inputs) for each layer instead
    drop_path  share of images that each residual branch skips in training
    Raises UserError for an unknown size or an image size that does not divide into patches.
    """

    def __init__(
        self,
        size="small",
        patch=14,
        image_size=518,
        channels=3,
        registers=0,
        ffn="",
        drop_path=0.0,
        drop_path_uniform=True,
        layerscale=1e-5,
        interpolate_offset=0.1,
        interpolate_antialias=False,
        init_std=0.02,
        attention="auto",
    ):
        super().__init__()
        if image_size % patch:
            raise UserError(f"image size {image_size} is not a multiple of vit.patch={patch}")
        dim, depth, heads, own_ffn = size_of(size)
        self.dim = self.embed_dim = dim
        self.depth, self.patch, self.registers = depth, patch, registers
        self.interpolate_offset = interpolate_offset
        self.interpolate_antialias = interpolate_antialias
        self.init_std, self.layerscale, self.attention = init_std, layerscale, attention
        self.drop_path = [
            drop_path if drop_path_uniform else drop_path * i / max(depth - 1, 1)
            for i in range(depth)
        ]

        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (image_size // patch) ** 2, dim))
        # None keeps the name out of the state dict, as in the released files without registers.
        self.register_tokens = nn.Parameter(torch.empty(1, registers, dim)) if registers else None
        self.mask_token = nn.Parameter(torch.empty(1, dim))
        self.patch_embed = PatchEmbed(channels, dim, patch)
        self.blocks = nn.ModuleList(
            Block(dim, heads, 4 * dim, ffn or own_ffn, layerscale) for _ in range(depth)
        )
        self.norm = LayerNorm(dim, eps=1e-6)
        if not self.cls_token.is_meta:
            assign(self, self.initial_values())

    def initial_values(self, generator=None):
        """Yield (name, fp32 value) for every parameter, one at a time.

        Linear weights     normal, std 0.02, bias 0. Right for widths of 384 and more; a 128-wide
                           network hardly lets its input through, so init_std=0 scales by width.
        pos_embed          normal, std 0.02
        cls, registers     normal, std 1e-6;  mask_token 0
        patch convolution  PyTorch's own: uniform, +-1 / sqrt(C * patch * patch)
        norms              weight 1, bias 0;  LayerScale gamma `layerscale`
        """
        # Official: trunc_normal with bounds +-2, that is 100 standard deviations: a plain normal.
        normal = partial(torch.randn, generator=generator)
        for name, parameter in self.named_parameters():
            shape = parameter.shape
            if name.startswith("patch_embed"):
                limit = self.patch_embed.proj.weight[0].numel() ** -0.5
                value = torch.rand(shape, generator=generator) * 2 * limit - limit
            elif name in ("cls_token", "register_tokens"):
                value = normal(shape) * 1e-6
            elif name == "pos_embed":
                value = normal(shape) * 0.02
            elif name == "mask_token" or name.endswith("bias"):
                value = torch.zeros(shape)
            elif name.endswith("gamma"):
                value = torch.full(shape, float(self.layerscale))
            elif "norm" in name:
                value = torch.ones(shape)
            else:
                value = normal(shape) * (self.init_std or shape[1] ** -0.5)
            yield name, value

    def interpolate_pos_encoding(self, rows, columns):
        """Positions for a grid of patches, bicubic in fp32: (1, 1 + rows * columns, D)."""
        offset, antialias = self.interpolate_offset, self.interpolate_antialias
        return resize_positions(self.pos_embed, rows, columns, offset, antialias)

    def prepare_tokens(self, x, mask=None):
        """Images (B, C, H, W), mask (B, N) bool -> tokens (B, T, D): [CLS], registers, patches."""
        B, _, height, width = x.shape
        if height % self.patch or width % self.patch:
            raise UserError(
                f"a {height} x {width} image does not divide into {self.patch} px patches"
            )
        pos = self.interpolate_pos_encoding(height // self.patch, width // self.patch)
        x = self.patch_embed(x)
        if mask is not None:
            # Before positions are added, so that a hidden patch still knows where it is.
            x = torch.where(mask.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        x = torch.cat((self.cls_token.to(x.dtype).expand(B, -1, -1), x), dim=1) + pos.to(x.dtype)
        if self.registers:  # after: registers have no position
            registers = self.register_tokens.to(x.dtype).expand(B, -1, -1)
            x = torch.cat((x[:, :1], registers, x[:, 1:]), dim=1)
        return x

    def draw_kept(self, groups, rng=None):
        """Draw the images that each residual branch computes in this step (stochastic depth).

        Returns [block][branch][crop size] -> (k,) indices, k = max(int(B * (1 - rate)), 1). Subsets
        are independent in each branch and crop size. `rng` is a CPU torch.Generator: indices made
        on the CPU cost the GPU no wait.
        """
        return [
            [
                [torch.randperm(B, generator=rng)[: max(int(B * (1 - rate)), 1)] for B, _ in groups]
                for _ in ("attention", "feed-forward")
            ]
            for rate in self.drop_path
        ]

    def forward_features(self, x, masks=None, rng=None, kept=None, patches=None):
        """One crop size, or a list of them in one packed pass.

        x, masks   (B, C, H, W) and (B, N) bool or None; or a list of each
        rng, kept  training with drop_path only: a CPU torch.Generator for stochastic depth, or the
                   subsets themselves, as `draw_kept` returns them
        patches    (P,) different rows of the flattened (B * N) patches of the first crop size. With
                   it, return less for less work: the normalised [CLS] of all crops, one row each,
                   and these patches (P, D).
        Returns a dict (a list of dicts for a list) with x_norm_clstoken (B, D), x_norm_regtokens
        (B, R, D), x_norm_patchtokens (B, N, D), x_prenorm (B, T, D) and masks.
        """
        crops = x if isinstance(x, list) else [x]
        masks = masks if isinstance(masks, list) else [masks] * len(crops)
        tokens = [self.prepare_tokens(c, m) for c, m in zip(crops, masks, strict=True)]
        groups = tuple(t.shape[:2] for t in tokens)
        x_MD = torch.cat([t.flatten(0, 1) for t in tokens])
        packing = pack(groups, self.attention, x_MD.device, x_MD.dtype)
        if kept is None and self.training and any(self.drop_path):
            kept = self.draw_kept(groups, rng)
        kept = kept and packed_rows(kept, packing, x_MD.device)
        wanted = None
        if patches is not None:  # number the tokens, and pick numbers as one would pick tokens
            numbers = unpacked(torch.arange(len(x_MD), device=x_MD.device), groups)
            rows = numbers[0][:, 1 + self.registers :].flatten()[patches]
            wanted = torch.cat((*(number_BT[:, 0] for number_BT in numbers), rows))
        for i, block in enumerate(self.blocks):
            # A rate of 0 needs no gathering: the plain path gives the same.
            keep = kept[i] if kept and self.drop_path[i] else (None, None)
            x_MD = block(x_MD, packing, keep, wanted if i == self.depth - 1 else None)
        if patches is not None:
            return self.norm(x_MD).split((len(x_MD) - len(patches), len(patches)))
        norms, prenorms = unpacked(self.norm(x_MD), groups), unpacked(x_MD, groups)
        outputs = [self.split_tokens(*each) for each in zip(norms, prenorms, masks, strict=True)]
        return outputs if isinstance(x, list) else outputs[0]

    def split_tokens(self, norm, prenorm, mask):
        """Name the tokens of one crop size, (B, T, D) each, by their roles."""
        first_patch = 1 + self.registers
        return {
            "x_norm_clstoken": norm[:, 0],
            "x_norm_regtokens": norm[:, 1:first_patch],
            "x_norm_patchtokens": norm[:, first_patch:],
            "x_prenorm": prenorm,
            "masks": mask,
        }

    def forward(self, x, masks=None, is_training=False, rng=None, kept=None, patches=None):
        """The normalised [CLS] token (B, D); with is_training, what `forward_features` returns."""
        features = self.forward_features(x, masks, rng, kept, patches)
        return features if is_training else features["x_norm_clstoken"]

    def get_intermediate_layers(self, x, n=1, reshape=False, return_class_token=False, norm=True):
        """Patch tokens after the last n blocks, or after the blocks listed in n, in block order.

        Each is (B, N, D), or (B, D, H / patch, W / patch) with reshape; with return_class_token
        each is a pair (patches, [CLS]). Registers are left out; the final norm is applied to each.
        """
        wanted = range(self.depth - n, self.depth) if isinstance(n, int) else n
        tokens = self.prepare_tokens(x)
        packing = pack((tokens.shape[:2],), self.attention, x.device, x.dtype)
        x_MD, layers, rows = tokens.flatten(0, 1), [], x.shape[2] // self.patch
        for i, block in enumerate(self.blocks):
            x_MD = block(x_MD, packing)
            if i in wanted:
                out = (self.norm(x_MD) if norm else x_MD).unflatten(0, tokens.shape[:2])
                patches = out[:, 1 + self.registers :]
                if reshape:
                    patches = patches.transpose(1, 2).unflatten(2, (rows, -1)).contiguous()
                layers.append((patches, out[:, 0]) if return_class_token else patches)
        assert len(layers) == len(wanted), f"blocks {list(wanted)} do not all exist"
        return tuple(layers)


def unpacked(x_M, groups):
    """Views of each crop size's tokens in a packed row: (M, ..) -> (B, T, ..) of each."""
    parts = x_M.split([B * T for B, T in groups])
    return [part.unflatten(0, group) for part, group in zip(parts, groups, strict=True)]


def packed_rows(kept, packing, device):
    """Kept images as rows of tokens: what add_branch takes as `kept`, for all blocks and branches.

    Branches that keep equally many images, mostly all of them, are made together.
    """
    branches = [branch for block in kept for branch in block]
    counts = [tuple(len(images) for images in branch) for branch in branches]
    made = {}
    for count in dict.fromkeys(counts):
        alike = [b for b, c in zip(branches, counts, strict=True) if c == count]
        made[count] = iter(rows_of_branches(alike, packing, device))
    given = iter([next(made[count]) for count in counts])
    return [[next(given) for _ in block] for block in kept]


def rows_of_branches(branches, packing, device):
    """packed_rows for b branches that keep equally many images; indices are moved together."""
    M = sum(B * T for B, T in packing.groups)
    rows, groups, numbers = [], [], unpacked(torch.arange(M, device=device), packing.groups)
    scale_bM = torch.zeros(len(branches), M, device=device)
    for number_BT, *images in zip(numbers, *branches, strict=True):
        image_bk = torch.stack(images)
        if device.type == "cuda" and not image_bk.is_cuda:
            image_bk = image_bk.pin_memory()  # so that nobody waits for the copy
        image_bk = image_bk.to(device, non_blocking=True)
        rows.append(number_BT[image_bk].flatten(1))
        scale_bM.scatter_(1, rows[-1], len(number_BT) / image_bk.shape[1])
        groups.append((image_bk.shape[1], number_BT.shape[1]))
    rows_bm = torch.cat(rows, dim=1)
    place_bm = torch.arange(rows_bm.shape[1], device=device).expand_as(rows_bm)
    place_bM = torch.zeros_like(scale_bM, dtype=torch.long).scatter_(1, rows_bm, place_bm)
    kept_packing = pack(groups, packing.backend, device)
    indices = zip(rows_bm, place_bM, scale_bM.unsqueeze(2), strict=True)
    return [(kept_packing, *each) for each in indices]


@torch.no_grad()
def assign(module, values):
    """Copy (name, value) pairs into the parameters of a module."""
    parameters = dict(module.named_parameters())
    for name, value in values:
        parameters[name].copy_(value)


def build_backbone(cfg, drop_path=0.0):
    """The backbone that a Config describes: the keys of vit.* are arguments of the same names."""
    return VisionTransformer(
        **asdict(cfg.vit) | {"drop_path": drop_path},
        image_size=cfg.crops.global_size,
        channels=cfg.data.channels,
        attention=cfg.attention,
    )
