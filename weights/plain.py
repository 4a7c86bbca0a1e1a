"""The network as other programs expect it: one image size at a time, in plain parts of PyTorch.

vit.py packs crops of several sizes in one row and casts weights as it goes, for speed in training.
Here the same weights compute the same numbers on tokens (B, T, D), in plain nn.Linear and
nn.LayerNorm, with positions by tensor arithmetic. So torch.jit.trace, torch.export with free height
and width, quantize_dynamic, forward hooks, and code written for the official modules all work.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

import vit


class Attention(vit.Attention):
    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(vit.Block):
    def forward(self, x, packing=None):
        if packing is not None:  # tokens in one row, from get_intermediate_layers
            return self.forward(x.unflatten(0, packing.groups[0])).flatten(0, 1)
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class DinoVisionTransformer(vit.VisionTransformer):
    """The backbone with the methods of the official class, too."""

    prepare_tokens_with_masks = vit.VisionTransformer.prepare_tokens

    def interpolate_pos_encoding(self, rows, columns):
        """Positions for a grid of patches, as vit.resize_positions: (1, 1 + rows * columns, D)."""
        side, steps = self.side, [torch.arange(n).float() for n in (rows, columns)]
        counts = [step[-1] + 1 for step in steps]
        # A grid that is stored is used as it is: without the offset, bicubic is the identity.
        same = (counts[0] == side) & (counts[1] == side)
        offset = torch.where(same, 0.0, self.interpolate_offset)
        grid = self.pos_embed[0, 1:].float().unflatten(0, (side, side))
        for step, count, axis in zip(steps, counts, ("rcd,nr->ncd", "rcd,nc->rnd"), strict=True):
            weights = bicubic(step, side / (count + offset), side, self.interpolate_antialias)
            grid = torch.einsum(axis, grid, weights.to(grid.device))
        grid = grid.flatten(0, 1).unsqueeze(0).to(self.pos_embed.dtype)
        return torch.cat((self.pos_embed[:, :1], grid), dim=1)

    def forward_features(self, x, masks=None):
        """A dict of tokens as in vit.py."""
        x = self.prepare_tokens(x, masks)
        for block in self.blocks:
            x = block(x)
        return self.split_tokens(self.norm(x), x, masks)

    def forward(self, x, masks=None, is_training=False):
        features = self.forward_features(x, masks)
        return features if is_training else features["x_norm_clstoken"]


def bicubic(step, scale, side, antialias):
    """Weights (n, side) of `side` values in n places, `scale` apart: PyTorch's bicubic resize."""
    # Its kernel is another one with antialias, wider by the scale, and cut off at the border, which
    # is repeated without.
    a, width, beyond = -0.75, 1.0, 2
    if antialias:
        a, width, beyond = -0.5, scale.clamp(min=1), 0
    taps = torch.arange(-beyond, side + beyond)
    x = (((step + 0.5) * scale).unsqueeze(1) - taps - 0.5).abs() / width
    near, far = ((a + 2) * x - a - 3) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    at = F.one_hot(taps.clamp(0, side - 1), side).float()  # what is beyond the border counts there
    return (weights / weights.sum(dim=1, keepdim=True)) @ at


PLAIN = {
    vit.Linear: nn.Linear,
    vit.LayerNorm: nn.LayerNorm,
    vit.Attention: Attention,
    vit.Block: Block,
    vit.VisionTransformer: DinoVisionTransformer,
}


def plain(backbone):
    """The same network, with the same parameters, in plain parts: without stochastic depth."""
    assert not any(backbone.drop_path)
    net = copy.deepcopy(backbone, {id(p): p for p in backbone.parameters()})
    for module in net.modules():
        module.__class__ = PLAIN.get(type(module), type(module))
    # What code for the official class reads.
    for block in net.blocks:
        block.attn.num_heads = block.attn.heads
    net.patch_size, net.num_features, net.num_tokens = net.patch, net.dim, 1
    net.n_blocks, net.chunked_blocks, net.num_register_tokens = net.depth, False, net.registers
    net.num_heads, net.head = net.blocks[0].attn.heads, nn.Identity()
    net.patch_embed.patch_size = (net.patch, net.patch)
    net.patch_embed.num_patches = net.pos_embed.shape[1] - 1
    net.side = round(net.patch_embed.num_patches**0.5)
    return net
