"""What benchmarks.py compares us with: the official code, LightlySSL.

    official   a checkout of github.com/facebookresearch/dinov2, by --official PATH
    lightly    the step of examples/pytorch/dinov2.py in github.com/lightly-ai/lightly, with the
               sizes of the config; teacher targets by centering, as it has no Sinkhorn-Knopp

They compute in the precision of the config by autocast. A function <peer>_<what> makes what takes
turns with ours, run(clock), from the config and from what bench/ gives to this kind of work.
"""

import importlib.util
import io
import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from torch import nn

import config
from attention import open_cuda_12
from config import UserError
from dinov2 import LARGE_CROPS as T
from dinov2 import Output, ibot_prototypes
from optim import schedules
from parallel import dtype_of
from vit import SIZES

# ---- importing them -----------------------------------------------------------------------------

CHECKOUT = Path()  # of the official code


def find_official(path):
    """Note where the official code is, and let it do without xFormers where that has no kernels."""
    global CHECKOUT
    CHECKOUT = Path(path).expanduser().resolve()
    if not (CHECKOUT / "dinov2" / "layers").is_dir():
        raise UserError(f"{path}: not a checkout of facebookresearch/dinov2 (no dinov2/layers)")
    open_cuda_12()
    if not torch.cuda.is_available() or importlib.util.find_spec("xformers") is None:
        os.environ["XFORMERS_DISABLED"] = "1"
        sys.modules["xformers"] = None  # one of its files does not look at that


def official(name):
    """A module of the official package, whose name is also that of our dinov2.py."""
    ours = sys.modules.pop("dinov2")
    sys.path.insert(0, str(CHECKOUT))
    try:
        return installed(f"dinov2.{name}")
    finally:
        sys.path.remove(str(CHECKOUT))
        sys.modules["dinov2"] = ours


def installed(name):
    """A module of a package that may be missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = (error.name or name).split(".")[0]
        raise UserError(f"{name}: {error}; pip install {missing}") from None


def autocast(cfg, device):
    return torch.autocast(device.type, dtype_of(cfg), dtype_of(cfg) != torch.float32)


def vit_arguments(cfg, drop_path=0.0):
    """Those that the ViTs of timm and of the official code share."""
    dim, depth, heads, _ = SIZES[cfg.vit.size]
    return {
        "img_size": cfg.crops.global_size,
        "patch_size": cfg.vit.patch,
        "in_chans": cfg.data.channels,
        "embed_dim": dim,
        "depth": depth,
        "num_heads": heads,
        "init_values": cfg.vit.layerscale or None,
        "drop_path_rate": drop_path,
    }


# ---- official code ------------------------------------------------------------------------------


class Official(nn.Module):
    """Backbone and heads, built and called as in its SSLMetaArch, which itself wants FSDP and CUDA.

    Without a GPU for xFormers each size of crops has a pass of its own, with PyTorch's attention.
    """

    def __init__(self, cfg, drop_path):
        super().__init__()
        layers, h, v = official("layers"), cfg.head, cfg.vit
        dim, _, _, ffn = SIZES[v.size]
        self.backbone = official("models.vision_transformer").DinoVisionTransformer(
            **vit_arguments(cfg, drop_path),
            drop_path_uniform=v.drop_path_uniform,
            block_fn=partial(layers.NestedTensorBlock, attn_class=layers.MemEffAttention),
            ffn_layer=v.ffn or ffn,
            block_chunks=0,
            num_register_tokens=v.registers,
            interpolate_antialias=v.interpolate_antialias,
            interpolate_offset=v.interpolate_offset,
        )
        head = partial(layers.DINOHead, dim, hidden_dim=h.hidden, nlayers=h.layers)
        self.dino_head = head(h.prototypes, bottleneck_dim=h.bottleneck)
        if h.separate:
            bottleneck = h.ibot_bottleneck or h.bottleneck
            self.ibot_head = head(ibot_prototypes(cfg), bottleneck_dim=bottleneck)
        # Hidden patches go to the head in a buffer with room for as many as there can be.
        shares = torch.linspace(*cfg.mask.ratio, int(T * cfg.batch * cfg.mask.probability) + 1)
        grid = (cfg.crops.global_size // v.patch) ** 2
        self.room = sum(int(grid * share) for share in shares[1:])

    def forward(self, crops, masks, indices):
        """List of crops -> Output. The teacher's, without masks, swaps the views of [CLS]."""
        pairs = list(zip(crops, (masks, None), strict=False))
        if len(pairs) > 1 and "XFORMERS_DISABLED" not in os.environ:
            said = self.backbone(crops, masks=[masks, None], is_training=True)
        else:
            said = [self.backbone(x, masks=m, is_training=True) for x, m in pairs]
        cls = torch.cat([f["x_norm_clstoken"] for f in said])
        if masks is None:
            cls = torch.cat(cls.chunk(T)[::-1])  # so that each view meets the other
        patches = said[0]["x_norm_patchtokens"].flatten(0, 1)
        buffer = patches.new_zeros(self.room, patches.shape[1])
        buffer[: len(indices)] = patches.index_select(0, indices)
        if hasattr(self, "ibot_head"):
            scores = self.dino_head(cls), self.ibot_head(buffer)
        else:
            scores = self.dino_head(torch.cat((cls, buffer))).split((len(cls), self.room))
        return Output(said[0]["x_norm_clstoken"], scores[0], scores[1][: len(indices)])


def official_objective(cfg, device):
    """objective(student, teacher, batch) -> loss, as in SSLMetaArch.forward_backward."""
    if not dist.is_initialized():  # its Sinkhorn uses collectives, also for one process
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    loss, temp = official("loss"), cfg.loss.student_temp
    dino = loss.DINOLoss(cfg.head.prototypes, temp).to(device)
    ibot = loss.iBOTPatchLoss(ibot_prototypes(cfg), temp).to(device)
    koleo, temp = loss.KoLeoLoss(), schedules(cfg.steps // 2, cfg).teacher_temp
    L, weights = cfg.crops.local_count, cfg.loss

    def targets(cls_score, patch_score):
        count = torch.tensor([len(patch_score)], device=device)
        if weights.centering == "sinkhorn":
            cls_target = dino.sinkhorn_knopp_teacher(cls_score, temp)
            return cls_target, ibot.sinkhorn_knopp_teacher(patch_score, temp, count)
        cls_target = dino.softmax_center_teacher(cls_score, temp)
        dino.update_center(cls_score)
        patch_target = ibot.softmax_center_teacher(patch_score[None], temp)[0]
        ibot.update_center(patch_score[None])
        return cls_target, patch_target

    def objective(student, teacher, batch):
        with torch.no_grad():
            told = teacher([batch.global_crops], None, batch.mask_indices)
            cls_target, patch_target = targets(told.cls_score, told.patch_score)
        said = student([batch.global_crops, batch.local_crops], batch.masks, batch.mask_indices)
        large, small = said.cls_score.tensor_split([len(said.cls)])
        total = dino([large], [cls_target]) * T + dino(small.chunk(L), cls_target.chunk(T))
        patches = ibot.forward_masked(
            said.patch_score,
            patch_target,
            student_masks_flat=batch.masks,
            n_masked_patches=len(said.patch_score),
            masks_weight=batch.mask_weights,
        )
        total = weights.dino * total / (T * (T - 1) + T * L) + weights.ibot * patches
        return total + weights.koleo * sum(koleo(view) for view in said.cls.chunk(T))

    return objective


def official_step(cfg, device, in_phases, like):
    """The loop of its train.py, without FSDP, from the weights of `like`."""
    student, teacher = (Official(cfg, r).to(device) for r in (cfg.vit.drop_path, 0.0))
    for network in student, teacher:
        network.load_state_dict(like.state_dict())
    teacher.requires_grad_(False).eval()
    # Its groups, with their factors of lr and decay, change little time, so they are left out.
    now = schedules(cfg.steps // 2, cfg)
    optimizer = torch.optim.AdamW(
        student.parameters(), now.lr, weight_decay=now.weight_decay, foreach=True
    )

    @torch.no_grad()
    def ema(teacher, student, momentum):
        averages = list(teacher.parameters())
        torch._foreach_mul_(averages, momentum)
        torch._foreach_add_(averages, list(student.parameters()), alpha=1 - momentum)

    objective = autocast(cfg, device)(official_objective(cfg, device))
    return in_phases(student, teacher, objective, optimizer, ema)


def official_losses(cfg, device, in_phases):
    """DINO's sums the pairs of crops one by one."""
    return in_phases(official_objective(cfg, device))


def official_augment(cfg, device, file, count):
    """From the bytes of an image to normalised crops, `count` times, then stacked."""
    installed("torchvision")
    c = cfg.crops
    if cfg.augment != config.Augment() or c.ratio != config.Crops().ratio:
        raise UserError("the official code has its colours built in: leave augment.* as they are")
    transform = official("data.augmentations").DataAugmentationDINO(
        c.global_scale, c.local_scale, c.local_count, c.global_size, c.local_size
    )

    def run(clock):
        images = [transform(Image.open(io.BytesIO(file)).convert("RGB")) for _ in range(count)]
        for key in ("global_crops", "local_crops"):
            torch.stack([crop for image in images for crop in image[key]])
        clock.mark("crops and colour")

    return run


# ---- lightly ------------------------------------------------------------------------------------


class Lightly(nn.Module):
    """Backbone and heads of its example."""

    def __init__(self, cfg):
        super().__init__()
        installed("torchvision")
        h, v = cfg.head, cfg.vit
        if h.layers != 3 or v.registers or (v.ffn or SIZES[v.size][3]) != "mlp":
            raise UserError("lightly has head.layers=3, vit.registers=0 and vit.ffn=mlp: set these")
        timm = installed("timm.models.vision_transformer")
        vit = timm.VisionTransformer(**vit_arguments(cfg), num_classes=0, dynamic_img_size=True)
        parts = installed("lightly.models.modules")
        self.backbone = parts.MaskedVisionTransformerTIMM(
            vit, antialias=False, pos_embed_initialization="skip"
        )
        head = partial(parts.DINOv2ProjectionHead, vit.embed_dim, h.hidden)
        self.dino_head = self.ibot_head = head(h.bottleneck, h.prototypes)
        if h.separate:
            self.ibot_head = head(h.ibot_bottleneck or h.bottleneck, ibot_prototypes(cfg))

    def forward(self, crops, hidden, mask=None):
        """List of crops -> Output; `hidden` are the tokens whose scores are wanted."""
        large, *small = crops
        tokens = self.backbone.encode(large, mask=mask)
        cls_score = [self.dino_head(tokens[:, 0])]
        cls_score += [self.dino_head(self.backbone.encode(x)[:, 0]) for x in small]
        return Output(tokens[:, 0], torch.cat(cls_score), self.ibot_head(tokens[hidden]))


def lightly_step(cfg, device, in_phases, like):
    """The loop of its example, with the clipping of its benchmark; weights of its own."""
    student, teacher = Lightly(cfg).to(device), Lightly(cfg).to(device)
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False).eval()
    utils, loss = installed("lightly.models.utils"), installed("lightly.loss")
    if cfg.vit.drop_path:
        utils.update_drop_path_rate(student.backbone.vit, cfg.vit.drop_path, mode="uniform")
    student_temp, koleo = cfg.loss.student_temp, loss.KoLeoLoss()
    dino = loss.DINOLoss(cfg.head.prototypes, student_temp=student_temp).to(device)
    ibot = loss.IBOTPatchLoss(ibot_prototypes(cfg), student_temp=student_temp).to(device)
    now, grid = schedules(cfg.steps // 2, cfg), cfg.crops.global_size // cfg.vit.patch
    optimizer = torch.optim.AdamW(student.parameters(), now.lr, weight_decay=now.weight_decay)

    @autocast(cfg, device)
    def objective(student, teacher, batch):
        mask = nn.functional.pad(batch.masks, (1, 0))  # its masks cover [CLS] too, never hidden
        with torch.no_grad():
            told = teacher([batch.global_crops], mask)
        said = student([batch.global_crops, batch.local_crops], mask, mask)
        views, masks = T + cfg.crops.local_count, batch.masks.unflatten(1, (grid, grid))
        total = dino(told.cls_score.chunk(T), said.cls_score.chunk(views), now.teacher_temp)
        patches = ibot(told.patch_score, said.patch_score, masks, now.teacher_temp)
        total = cfg.loss.dino * total + cfg.loss.ibot * patches
        return total + cfg.loss.koleo * sum(koleo(view) for view in said.cls.chunk(T))

    def ema(teacher, student, momentum):
        utils.update_momentum(student, teacher, momentum)

    run = in_phases(student, teacher, objective, optimizer, ema)

    def without_loss(clock):
        run(clock)  # its loss, of other weights and targets, is not ours

    return without_loss
