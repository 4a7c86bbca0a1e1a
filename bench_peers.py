"""LightlySSL and timm as contenders of bench.py.

    lightly    the step of examples/pytorch/dinov2.py in github.com/lightly-ai/lightly, with the
               sizes of the config; teacher targets by centering, as it has no Sinkhorn-Knopp
    timm       the ViT of timm, which has no DINOv2 training: the backbone only

They compute in the precision of the config by autocast. Each contender is a function run(clock),
see measure.py.
"""

import importlib
from functools import partial

import torch

from bench_official import autocast, import_torchvision
from config import UserError
from dinov2 import LARGE_CROPS as T
from dinov2 import ibot_prototypes
from optim import schedules
from vit import SIZES


def installed(name):
    """A package that may be missing."""
    try:
        import_torchvision()
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{error}; pip install {name.split('.')[0]}") from None


def timm_vit(cfg, drop_path=0.0):
    """timm's ViT of the size of the config."""
    v, (dim, depth, heads, ffn) = cfg.vit, SIZES[cfg.vit.size]
    if (v.ffn or ffn) != "mlp" or v.registers:
        raise UserError("timm and lightly are compared without registers and with vit.ffn=mlp")
    return installed("timm.models.vision_transformer").VisionTransformer(
        img_size=cfg.crops.global_size,
        patch_size=v.patch,
        in_chans=cfg.data.channels,
        num_classes=0,
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        init_values=v.layerscale or None,
        drop_path_rate=drop_path,
        dynamic_img_size=True,
    )


def backbone(cfg, device, crops):
    """All crops of a size in one pass, forward and backward."""
    net = timm_vit(cfg, cfg.vit.drop_path).to(device)

    def run(clock):
        with autocast(cfg, device):
            out = [net.forward_features(x) for x in crops]
        clock.mark("forward")
        sum(x.float().sum() for x in out).backward()
        net.zero_grad(set_to_none=True)
        clock.mark("backward")

    return run


class Lightly(torch.nn.Module):
    """Backbone and heads of its example."""

    def __init__(self, cfg):
        super().__init__()
        parts = installed("lightly.models.modules")
        self.backbone = parts.MaskedVisionTransformerTIMM(
            timm_vit(cfg), antialias=False, pos_embed_initialization="skip"
        )
        dim, h = self.backbone.vit.embed_dim, cfg.head
        head = partial(parts.DINOv2ProjectionHead, dim, h.hidden)
        self.dino_head = head(h.bottleneck, h.prototypes)
        self.ibot_head = self.dino_head
        if h.separate:
            self.ibot_head = head(h.ibot_bottleneck or h.bottleneck, ibot_prototypes(cfg))

    def forward(self, crops, mask=None):
        """Scores of [CLS], [CLS] itself, all tokens."""
        tokens = self.backbone.encode(crops, mask=mask)
        return self.dino_head(tokens[:, 0]), tokens[:, 0], tokens


def lightly_step(cfg, device, source):
    """The loop of its example."""
    if cfg.head.layers != 3:
        raise UserError("the heads of lightly have three layers: head.layers=3")
    student, teacher = Lightly(cfg).to(device), Lightly(cfg).to(device)
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False).eval()
    utils, loss = installed("lightly.models.utils"), installed("lightly.loss")
    if cfg.vit.drop_path:
        utils.update_drop_path_rate(student.backbone.vit, cfg.vit.drop_path, mode="uniform")
    dino = loss.DINOLoss(cfg.head.prototypes, student_temp=cfg.loss.student_temp).to(device)
    ibot = loss.IBOTPatchLoss(ibot_prototypes(cfg), student_temp=cfg.loss.student_temp).to(device)
    koleo, now = loss.KoLeoLoss(), schedules(cfg.steps // 2, cfg)
    optimizer = torch.optim.AdamW(student.parameters(), lr=now.lr, weight_decay=now.weight_decay)
    grid = cfg.crops.global_size // cfg.vit.patch
    views = T + cfg.crops.local_count

    def forward(clock, batch):
        # Its masks cover [CLS] too, which is never hidden.
        mask = torch.nn.functional.pad(batch.masks, (1, 0))
        with torch.no_grad():
            told, _, tokens = teacher(batch.global_crops)
            patch_told = teacher.ibot_head(tokens[mask])
        clock.mark("teacher")
        large, cls, tokens = student(batch.global_crops, mask)
        patch_said = student.ibot_head(tokens[mask])
        said = torch.cat((large, student(batch.local_crops)[0]))
        clock.mark("student")
        temp = now.teacher_temp
        total = cfg.loss.dino * dino(told.chunk(T), said.chunk(views), temp)
        hidden = batch.masks.unflatten(1, (grid, grid))
        total = total + cfg.loss.ibot * ibot(patch_told, patch_said, hidden, temp)
        return total + cfg.loss.koleo * sum(koleo(x) for x in cls.chunk(T))

    def run(clock):
        batch = next(source)
        clock.mark("data")
        with autocast(cfg, device):
            loss = forward(clock, batch)
        clock.mark("losses")
        loss.backward()
        clock.mark("backward")
        optimizer.step()
        optimizer.zero_grad()
        clock.mark("optimiser")
        utils.update_momentum(student, teacher, m=now.momentum)
        clock.mark("EMA")

    return run
