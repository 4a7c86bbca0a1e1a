"""The projection head: from a token to one score for each prototype.

    DINOHead(x) = normalise(MLP(x)) . prototypes

A three-layer MLP ends in a narrow bottleneck, is L2-normalised, and is compared with K learnt
directions. DINO puts it on [CLS] tokens, iBOT on patch tokens; both may share one head ("tied").
(DINO 2021, section 3.1 "Network architecture"; DINOv2 section 4, "Untying head weights".)

Shapes:  D channels of the backbone   b bottleneck   K prototypes
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from vit import Linear, assign


class Prototypes(nn.Module):
    """Weight-normed linear layer without bias: scores x . (g * v / ||v||), (.., b) -> (.., K).

    Each prototype is a direction v and a gain g. The gain starts at 1 and is trainable, so scores
    are not bounded by 1 and Sinkhorn has to guard against overflow. With `fixed_gain` it stays 1,
    which made DINO steadier in large networks.
    """

    def __init__(self, bottleneck, prototypes, fixed_gain=False):
        super().__init__()
        self.weight_g = nn.Parameter(torch.empty(prototypes, 1), requires_grad=not fixed_gain)
        self.weight_v = nn.Parameter(torch.empty(prototypes, bottleneck))

    def forward(self, x):
        v = self.weight_v.to(x.dtype)
        g = self.weight_g.to(x.dtype)
        return F.linear(x, v * (g / v.norm(dim=1, keepdim=True)))


class DINOHead(nn.Module):
    """MLP, L2 normalisation, prototypes: (.., D) -> scores (.., K)."""

    def __init__(
        self, dim, prototypes, hidden=2048, bottleneck=256, layers=3, norm_last_layer=False
    ):
        super().__init__()
        widths = [dim] + [hidden] * (layers - 1) + [bottleneck]
        modules = []
        for inputs, outputs in pairwise(widths):
            modules += [Linear(inputs, outputs), nn.GELU()]
        self.mlp = nn.Sequential(*modules[:-1])  # no activation at the end
        self.last_layer = Prototypes(bottleneck, prototypes, norm_last_layer)
        if not self.last_layer.weight_g.is_meta:
            assign(self, self.initial_values())

    def initial_values(self, generator=None):
        """Yield (name, fp32 value): linear std 0.02, bias 0, gains 1, directions PyTorch's default.

        The normalisation behind the MLP makes its scale irrelevant, so 0.02 serves every width.
        """
        for name, parameter in self.named_parameters():
            shape = parameter.shape
            if name.endswith("bias"):
                value = torch.zeros(shape)
            elif name.endswith("weight_g"):
                value = torch.ones(shape)
            elif name.endswith("weight_v"):
                value = (torch.rand(shape, generator=generator) * 2 - 1) * shape[1] ** -0.5
            else:
                value = torch.randn(shape, generator=generator) * 0.02
            yield name, value

    def forward(self, x):
        x = self.mlp(x)
        # A half-precision 1e-12 would be zero (official: 1e-6 in fp16, 1e-12 otherwise).
        x = F.normalize(x, dim=-1, eps=1e-6 if x.dtype == torch.float16 else 1e-12)
        return self.last_layer(x)
