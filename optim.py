"""What the optimiser sees at step t: five schedules, and a learning rate for every parameter.

Schedules are pure functions of the step. Resuming therefore needs no scheduler state, and a run can
be plotted before it starts. Parameter groups come from a table of rules that multiply.
(DINOv2 appendix B.1 and table 16; DINO 2021, "Implementation details".)
"""

import math
from typing import NamedTuple

import torch


def cosine(step, base, final, total, warmup=0, start=0.0, freeze=0):
    """Zero for `freeze` steps, linear from start to base over `warmup`, half a cosine to final.

    Both ends of the warm-up count, so steps warmup - 1 and warmup give base; from `total` on the
    value is final.
    """
    if step >= total:
        return final
    if step < freeze:
        return 0.0
    step -= freeze
    if step < warmup:
        return start + (base - start) * step / (warmup - 1) if warmup > 1 else start
    progress = (step - warmup) / (total - warmup - freeze)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * progress))


class Schedule(NamedTuple):
    """The five numbers that change from step to step."""

    lr: float
    last_layer_lr: float
    weight_decay: float
    momentum: float
    teacher_temp: float


def compress(cfg, steps):
    """Give a Config this many steps, and shrink what is counted in steps in proportion."""
    share = steps / cfg.steps
    keys = (cfg.optim, "warmup"), (cfg.optim, "freeze_last_layer"), (cfg.teacher, "temp_warmup")
    for section, key in keys:
        setattr(section, key, round(share * getattr(section, key)))
    cfg.steps = steps


def scaled_lr(lr, batch):
    """lr is stated for 1,024 images a step and scaled by the square root of the real number."""
    return lr * math.sqrt(batch / 1024)


def schedules(step, cfg):
    """Learning rates, weight decay, EMA momentum and teacher temperature at one step."""
    o, t = cfg.optim, cfg.teacher
    peak = scaled_lr(o.lr, cfg.batch)
    lr = cosine(step, peak, min(o.min_lr, peak), cfg.steps, o.warmup)  # down, never up
    return Schedule(
        lr=lr,
        # The prototypes stand still at first (lr 0, not frozen: Adam's moments warm up meanwhile).
        last_layer_lr=0.0 if step < o.freeze_last_layer else lr,
        weight_decay=cosine(step, o.weight_decay, o.weight_decay_end, cfg.steps),
        momentum=cosine(step, t.momentum, t.momentum_end, cfg.steps),
        teacher_temp=cosine(step, t.temp, t.temp, t.temp_warmup, t.temp_warmup, t.temp_start),
    )


def multipliers(name, depth, layer_decay=1.0, patch_embed_lr=1.0):
    """(lr multiplier, weight decay multiplier, is it a prototype) of a parameter of `Network`.

    lr x layer_decay ^ (layers above)    backbone only; heads x 1
    lr x patch_embed_lr                  every token passes through it: let it move slowly
    decay x 0                            biases, norms and LayerScale; the tokens, positions and
                                         prototype gains do decay, as in the official code
    """
    lr = 1.0
    if name.startswith("backbone."):
        layer = 0  # cls_token, pos_embed, mask_token, register_tokens, patch_embed
        if name.startswith("backbone.blocks."):
            layer = int(name.split(".")[2]) + 1
        elif name.startswith("backbone.norm."):
            layer = depth + 1
        lr *= layer_decay ** (depth + 1 - layer)
    if "patch_embed" in name:
        lr *= patch_embed_lr
    no_decay = name.endswith(".bias") or "norm" in name or "gamma" in name
    return lr, 0.0 if no_decay else 1.0, "last_layer" in name


def param_groups(network, layer_decay=1.0, patch_embed_lr=1.0):
    """Group the parameters of a Network by their multipliers, in order of appearance.

    Frozen parameters are left out: weight decay does not reach them either.
    """
    groups = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        key = multipliers(name, network.backbone.depth, layer_decay, patch_embed_lr)
        rule = dict(zip(("lr_mult", "wd_mult", "last_layer"), key, strict=True))
        group = groups.setdefault(key, {"params": [], "names": [], **rule})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def set_schedule(optimizer, now):
    """Write this step's learning rate and weight decay into every group."""
    for group in optimizer.param_groups:
        group["lr"] = (now.last_layer_lr if group["last_layer"] else now.lr) * group["lr_mult"]
        group["weight_decay"] = now.weight_decay * group["wd_mult"]


def forget_moments(optimizer):
    """Zero Adam's moments and step count of the prototypes, as if they had had no gradient yet.

    DINO and iBOT remove the gradient of a frozen last layer. With an lr of 0 this comes to the
    same, and a checkpoint holds the same tensors after every step.
    """
    for group in optimizer.param_groups:
        for p in group["params"] if group["last_layer"] else []:
            for value in optimizer.state.get(p, {}).values():
                value.zero_()


def clip_each_part(network, max_norm, by="part"):
    """Clip the gradient of backbone and each head apart to max_norm; return the norms before.

    0 or None turns clipping off. One norm over everything would let the heads, whose gradients are
    larger, scale the backbone down. A frozen part has none. by="parameter": each tensor alone, as
    DINO and iBOT do; the norms returned are of each part all the same.
    """
    norms = {}
    for name, part in network.named_children():
        if not any(p.requires_grad for p in part.parameters()):
            continue
        limit = max_norm or math.inf
        together = limit if by == "part" else math.inf
        norms[name] = torch.nn.utils.clip_grad_norm_(part.parameters(), together)
        for parameter in part.parameters() if by == "parameter" else []:
            torch.nn.utils.clip_grad_norm_(parameter, limit)
    return norms
