"""A checkout of the official code (github.com/facebookresearch/dinov2) as a contender of bench.py.

Its training step is put together here from its own modules, because its train.py wants FSDP, CUDA
and ImageNet. It computes in the precision of the config by autocast. xFormers needs a GPU; without
one the backbone takes the crops of each size in a pass of their own, with PyTorch's attention, as
it does by itself for a single tensor. Each contender is a function run(clock), see measure.py.
"""

import importlib
import io
import os
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from PIL import Image
from torch import nn

import config
from config import UserError
from dinov2 import LARGE_CROPS as T
from dinov2 import ibot_prototypes
from eval_knn import NEIGHBOURS, TEMPERATURE
from optim import schedules
from parallel import dtype_of
from vit import SIZES

# ---- importing it -------------------------------------------------------------------------------

CHECKOUT = Path()  # set by find()


def find(path):
    """Note where the official code is, and let it do without xFormers where that has no kernels."""
    global CHECKOUT
    CHECKOUT = Path(path).expanduser().resolve()
    if not (CHECKOUT / "dinov2" / "layers").is_dir():
        raise UserError(f"{path}: not a checkout of facebookresearch/dinov2 (no dinov2/layers)")
    if not torch.cuda.is_available():
        os.environ["XFORMERS_DISABLED"] = "1"
        sys.modules["xformers"] = None  # one of its files does not look at that


def modules(*names):
    """Modules of the official package, whose name is also that of our dinov2.py."""
    ours = sys.modules.pop("dinov2")
    sys.path.insert(0, str(CHECKOUT))
    try:
        return [importlib.import_module(f"dinov2.{name}") for name in names]
    except ImportError as error:
        raise UserError(f"official code: {error}; pip install {error.name}") from None
    finally:
        sys.path.remove(str(CHECKOUT))
        sys.modules["dinov2"] = ours


def single_process():
    """Its Sinkhorn and k-NN use collectives, also for one process."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def autocast(cfg, device):
    return torch.autocast(device.type, dtype_of(cfg), dtype_of(cfg) != torch.float32)


def import_torchvision():
    """torchvision, also beside a PyTorch for which its compiled operators are not built.

    The transforms of Pillow images need none of these operators, only that importing them works.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:
        with mock.patch("torch.library.register_fake", lambda name: lambda function: function):
            return importlib.import_module("torchvision")


# ---- a training step ----------------------------------------------------------------------------


def network(cfg, drop_path):
    """Backbone and heads of the official code, as its SSLMetaArch builds them."""
    vit, layers = modules("models.vision_transformer", "layers")
    v, h = cfg.vit, cfg.head
    dim, depth, heads, ffn = SIZES[v.size]
    backbone = vit.DinoVisionTransformer(
        img_size=cfg.crops.global_size,
        patch_size=v.patch,
        in_chans=cfg.data.channels,
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        init_values=v.layerscale or None,
        drop_path_rate=drop_path,
        drop_path_uniform=v.drop_path_uniform,
        block_fn=partial(layers.NestedTensorBlock, attn_class=layers.MemEffAttention),
        ffn_layer=v.ffn or ffn,
        block_chunks=0,
        num_register_tokens=v.registers,
        interpolate_antialias=v.interpolate_antialias,
        interpolate_offset=v.interpolate_offset,
    )
    head = partial(layers.DINOHead, hidden_dim=h.hidden, nlayers=h.layers)
    parts = {
        "backbone": backbone,
        "dino_head": head(dim, h.prototypes, bottleneck_dim=h.bottleneck),
    }
    if h.separate:
        bottleneck = h.ibot_bottleneck or h.bottleneck
        parts["ibot_head"] = head(dim, ibot_prototypes(cfg), bottleneck_dim=bottleneck)
    return nn.ModuleDict(parts)


def score(net, cls, patches):
    """Scores of [CLS] tokens and of patches, which share a pass through a shared head."""
    if "ibot_head" in net:
        return net["dino_head"](cls), net["ibot_head"](patches)
    return net["dino_head"](torch.cat((cls, patches))).split((len(cls), len(patches)))


def features(backbone, large, small, masks):
    """Its packed pass where xFormers is there, otherwise a pass for each size."""
    if os.environ.get("XFORMERS_DISABLED") is None:
        return backbone([large, small], masks=[masks, None], is_training=True)
    return [backbone(large, masks=masks, is_training=True), backbone(small, is_training=True)]


def targets_of(cfg, losses, cls_score, patch_score, temp):
    """Teacher targets by Sinkhorn or by centering, with the centres for the next step."""
    dino, ibot, _ = losses
    count = torch.tensor([len(patch_score)], device=cls_score.device)
    if cfg.loss.centering == "sinkhorn":
        cls_target = dino.sinkhorn_knopp_teacher(cls_score, temp)
        patch_target = ibot.sinkhorn_knopp_teacher(patch_score, temp, count)
    else:
        cls_target = dino.softmax_center_teacher(cls_score, temp)
        dino.update_center(cls_score)
        patch_target = ibot.softmax_center_teacher(patch_score[None], temp)[0]
        ibot.update_center(patch_score[None])
    return cls_target.unflatten(0, (T, -1)), patch_target


def loss_modules(cfg, device):
    (loss,) = modules("loss")
    single_process()
    K, temp = cfg.head.prototypes, cfg.loss.student_temp
    losses = loss.DINOLoss(K, temp), loss.iBOTPatchLoss(ibot_prototypes(cfg), temp)
    return [*(module.to(device) for module in losses), loss.KoLeoLoss()]


def total_loss(cfg, losses, targets, cls_score, patch_score, cls, batch):
    """Its loss; in the targets the two large crops are swapped, so that each meets the other."""
    dino, ibot, koleo = losses
    B, L = len(cls) // T, cfg.crops.local_count
    terms = T * (T - 1) + T * L
    large, small = cls_score[: T * B], cls_score[T * B :]
    total = dino([large], [targets[0].flatten(0, 1)]) * T / terms
    if L:
        total = total + dino(small.chunk(L), targets[0]) / terms
    total = cfg.loss.dino * total + cfg.loss.koleo * sum(koleo(x) for x in cls.chunk(T))
    patches = ibot.forward_masked(
        patch_score,
        targets[1],
        student_masks_flat=batch.masks,
        n_masked_patches=len(patch_score),
        masks_weight=batch.mask_weights,
    )
    return total + cfg.loss.ibot * patches


def step(cfg, device, like, source):
    """SSLMetaArch.forward_backward and the loop of train.py, without FSDP; weights of `like`."""
    student, teacher = (network(cfg, r).to(device) for r in (cfg.vit.drop_path, 0.0))
    for each in student, teacher:
        each.load_state_dict(like.state_dict())
    teacher.requires_grad_(False).eval()
    (groups,) = modules("utils.param_groups")
    parameters = []
    for part in student.values():
        rows = groups.get_params_groups_with_decay(
            part, cfg.optim.layer_decay, cfg.optim.patch_embed_lr
        )
        parameters += [{**group, "foreach": True} for group in groups.fuse_params_groups(rows)]
    optimizer = torch.optim.AdamW(parameters, betas=cfg.optim.betas)
    losses, now = loss_modules(cfg, device), schedules(cfg.steps // 2, cfg)
    # Hidden patches go to the head in a buffer as large as they can become, the rest is zeros.
    probabilities = torch.linspace(*cfg.mask.ratio, int(T * cfg.batch * cfg.mask.probability) + 1)
    grid = (cfg.crops.global_size // cfg.vit.patch) ** 2
    room = sum(int(grid * p) for p in probabilities[1:])

    def in_buffer(features, batch):
        patches = features["x_norm_patchtokens"].flatten(0, 1)
        buffer = patches.new_zeros(room, patches.shape[1])
        buffer[: len(batch.mask_indices)] = patches.index_select(0, batch.mask_indices)
        return buffer

    def forward(clock, batch):
        M = len(batch.mask_indices)
        with torch.no_grad():
            told = teacher["backbone"](batch.global_crops, is_training=True)
            swapped = torch.cat(told["x_norm_clstoken"].chunk(T)[::-1])
            scores = score(teacher, swapped, in_buffer(told, batch))
            clock.mark("teacher")
            targets = targets_of(cfg, losses, scores[0], scores[1][:M], now.teacher_temp)
        clock.mark("losses")
        said = features(student["backbone"], batch.global_crops, batch.local_crops, batch.masks)
        cls = torch.cat([f["x_norm_clstoken"] for f in said])
        cls_score, patch_score = score(student, cls, in_buffer(said[0], batch))
        clock.mark("student")
        large = said[0]["x_norm_clstoken"]
        return total_loss(cfg, losses, targets, cls_score, patch_score[:M], large, batch)

    def run(clock):
        batch = next(source)
        clock.mark("data")
        for group in optimizer.param_groups:
            lr = now.last_layer_lr if group["is_last_layer"] else now.lr
            group["lr"] = lr * group["lr_multiplier"]
            group["weight_decay"] = now.weight_decay * group["wd_multiplier"]
        optimizer.zero_grad(set_to_none=True)
        with autocast(cfg, device):
            loss = forward(clock, batch)
        clock.mark("losses")
        loss.backward()
        clock.mark("backward")
        for part in student.values():
            nn.utils.clip_grad_norm_(part.parameters(), cfg.optim.clip)
        optimizer.step()
        clock.mark("optimiser")
        with torch.no_grad():
            averages = list(teacher.parameters())
            torch._foreach_mul_(averages, now.momentum)
            torch._foreach_add_(averages, list(student.parameters()), alpha=1 - now.momentum)
        clock.mark("EMA")
        return loss.item()

    return run


# ---- parts of it --------------------------------------------------------------------------------


def losses(cfg, told, said, batch):
    """Targets and losses from given scores; DINO's sums the pairs of crops one by one."""
    terms = loss_modules(cfg, said[0].device)

    def run(clock):
        with torch.no_grad():
            swapped = torch.cat(told[0].chunk(T)[::-1])
            targets = targets_of(cfg, terms, swapped, told[1], cfg.teacher.temp)
        clock.mark("targets")
        loss = total_loss(cfg, terms, targets, said[0], said[1], said[2], batch)
        clock.mark("losses")
        grads = torch.autograd.grad(loss, said)
        clock.mark("backward")
        return [x.item() for x in (loss, *(grad[:8].norm() for grad in grads))]

    return run


def augmentation(cfg, file, count):
    """From the bytes of an image to normalised crops, `count` times, then stacked."""
    import_torchvision()
    (augmentations,) = modules("data.augmentations")
    c = cfg.crops
    if cfg.augment != config.Augment() or c.ratio != config.Crops().ratio:
        raise UserError("the official code has its colours built in: leave augment.* as they are")
    transform = augmentations.DataAugmentationDINO(
        c.global_scale, c.local_scale, c.local_count, c.global_size, c.local_size
    )

    def run(clock):
        images = [transform(Image.open(io.BytesIO(file)).convert("RGB")) for _ in range(count)]
        for key in ("global_crops", "local_crops"):
            torch.stack([crop for image in images for crop in image[key]])
        clock.mark("crops and colour")

    return run


def knn(train_ND, label_N, test_MD, classes):
    """Its module for one process, with the batches of 256 of its evaluation."""
    single_process()
    import_torchvision()
    # What evaluation needs besides (metrics, config files) is not part of this work.
    others = ("eval.metrics", "eval.setup", "eval.utils")
    with mock.patch.dict(sys.modules, {f"dinov2.{name}": mock.MagicMock() for name in others}):
        (evaluation,) = modules("eval.knn")
    neighbours = evaluation.KnnModule(
        train_ND, label_N, NEIGHBOURS, TEMPERATURE, train_ND.device, classes
    )

    def run(clock):
        votes = [neighbours(batch) for batch in test_MD.split(256)]
        return torch.cat([vote[max(NEIGHBOURS)] for vote in votes])

    return run
