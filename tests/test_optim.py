"""Schedules, parameter groups, clipping and the EMA are those of the official code, exactly.

Run:  pytest tests/test_optim.py
"""

import math
import pathlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from config import Config
from dinov2 import Network, ema_update
from heads import DINOHead
from optim import clip_each_part, cosine, multipliers, param_groups, schedules, set_schedule
from vit import VisionTransformer

GOLDEN = pathlib.Path(__file__).parent / "golden"
EXACT = 1e-12  # float64 against float64; measured 1e-16


def load(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def network(depth=3, registers=4):
    """The smallest network with both heads."""
    backbone = VisionTransformer((8, depth, 2, "mlp"), 4, 8, registers=registers)
    heads = [DINOHead(8, 6, hidden=8, bottleneck=4) for _ in range(2)]
    return Network(backbone, *heads)


# ---- schedules ----------------------------------------------------------------------------------


def official_config(z, run):
    """Our config for a stored official one: epochs become steps."""
    start = f"{run}/config/"
    o = {k.removeprefix(start): v.item() for k, v in z.items() if k.startswith(start)}
    epoch = o["train.OFFICIAL_EPOCH_LENGTH"]
    cfg = Config(
        steps=int(o["optim.epochs"] * epoch),
        batch=int(o["train.batch_size_per_gpu"] * o["world_size"]),
    )
    cfg.optim.lr, cfg.optim.min_lr = o["optim.base_lr"], o["optim.min_lr"]
    cfg.optim.warmup = int(o["optim.warmup_epochs"] * epoch)
    cfg.optim.freeze_last_layer = int(o["optim.freeze_last_layer_epochs"] * epoch)
    cfg.optim.weight_decay = o["optim.weight_decay"]
    cfg.optim.weight_decay_end = o["optim.weight_decay_end"]
    cfg.teacher.momentum = o["teacher.momentum_teacher"]
    cfg.teacher.momentum_end = o["teacher.final_momentum_teacher"]
    cfg.teacher.temp_start = o["teacher.warmup_teacher_temp"]
    cfg.teacher.temp = o["teacher.teacher_temp"]
    cfg.teacher.temp_warmup = int(o["teacher.warmup_teacher_temp_epochs"] * epoch)
    return cfg


@pytest.mark.parametrize("run", ["vitl16_short", "vitl14", "small_from_short"])
def test_schedules_are_the_official_ones_at_every_step_and_beyond_the_end(run):
    z = load("schedules")
    cfg = official_config(z, run)
    rows = [schedules(int(step), cfg) for step in z[f"{run}/iterations"]]
    for ours, theirs in {
        "lr": "lr",
        "last_layer_lr": "last_layer_lr",
        "weight_decay": "wd",
        "momentum": "momentum",
        "teacher_temp": "teacher_temp",
    }.items():
        got = np.array([getattr(row, ours) for row in rows])
        np.testing.assert_allclose(got, z[f"{run}/{theirs}"], rtol=EXACT, err_msg=ours)


def test_a_cosine_with_freezing_is_the_official_one():
    z = load("schedules")
    args = z["raw_cosine_scheduler/args_base_final_total_warmup_start_freeze"].tolist()
    base, final, total, warmup, start, freeze = args
    values = z["raw_cosine_scheduler/values"]
    got = [
        cosine(step, base, final, int(total), int(warmup), start, int(freeze))
        for step in range(len(values))
    ]
    np.testing.assert_allclose(got, values, rtol=EXACT)


def test_a_learning_rate_below_min_lr_does_not_climb_to_it():
    cfg = Config(steps=100, batch=64)
    cfg.optim.lr, cfg.optim.min_lr, cfg.optim.warmup = 1e-3, 4e-4, 10  # a peak of 2.5e-4
    assert [schedules(step, cfg).lr for step in (10, 50, 99)] == pytest.approx([2.5e-4] * 3)


def test_the_default_config_has_the_published_values():
    cfg = Config()
    peak = 0.004 * math.sqrt(2)  # batch 2,048
    assert schedules(0, cfg).lr == 0 and schedules(0, cfg).teacher_temp == 0.04
    for step in (12499, 12500):  # both ends of the warm-up count
        assert schedules(step, cfg).lr == pytest.approx(peak, rel=EXACT)
    assert schedules(124999, cfg).lr == pytest.approx(1.0000011e-6, rel=1e-7)
    assert schedules(62500, cfg).momentum == pytest.approx(0.996, rel=EXACT)
    assert schedules(62500, cfg).weight_decay == pytest.approx(0.22, rel=EXACT)
    assert schedules(1249, cfg).last_layer_lr == 0 < schedules(1250, cfg).last_layer_lr


@pytest.mark.parametrize("warmup", [0, 1, 2, 10])
def test_a_cosine_of_any_warmup_starts_ends_and_never_jumps_over(warmup):
    values = [cosine(step, 1.0, 0.1, 10, warmup, 0.0) for step in range(12)]
    assert values[10] == values[11] == 0.1 and max(values) <= 1.0
    assert values[0] == (0.0 if warmup else 1.0)
    assert values[warmup:10] == sorted(values[warmup:10], reverse=True)


# ---- parameter groups ---------------------------------------------------------------------------


@pytest.mark.parametrize("layer_decay", [0.9, 1.0])
def test_every_parameter_has_the_official_multipliers(layer_decay):
    z, key = load("param_groups"), f"layerwise_decay_{layer_decay}"
    depth, patch_embed_lr = z["config/depth"].item(), z["config/patch_embed_lr_mult"].item()
    names = z[f"{key}/names"].tolist()
    assert [name for name, _ in network(depth).named_parameters()] == names
    for i, name in enumerate(names):
        lr, wd, last_layer = multipliers(name, depth, layer_decay, patch_embed_lr)
        assert lr == pytest.approx(z[f"{key}/lr_multiplier"][i], rel=EXACT), name
        assert wd == z[f"{key}/wd_multiplier"][i], name
        assert last_layer == z[f"{key}/is_last_layer"][i], name


@pytest.mark.parametrize("layer_decay", [0.9, 1.0])
def test_groups_are_the_official_ones_and_hold_every_parameter_once(layer_decay):
    z, net = load("param_groups"), network()
    groups = param_groups(net, layer_decay, 0.2)
    # The official code groups each part by itself; parts with equal multipliers share ours.
    by_part = {(name.partition(".")[0], i) for i, g in enumerate(groups) for name in g["names"]}
    assert len(by_part) == z[f"layerwise_decay_{layer_decay}/n_fused_groups"]
    held = {name: p for g in groups for name, p in zip(g["names"], g["params"], strict=True)}
    assert sum(len(g["params"]) for g in groups) == len(held)
    assert held.keys() == dict(net.named_parameters()).keys()
    assert all(held[name] is p for name, p in net.named_parameters())
    for g in groups:
        expected = (g["lr_mult"], g["wd_mult"], g["last_layer"])
        assert all(multipliers(name, 3, layer_decay, 0.2) == expected for name in g["names"])


def test_the_backbone_of_vit_large_has_the_published_multipliers_in_52_groups():
    with torch.device("meta"):
        backbone = VisionTransformer("large", 16, 224)
        groups = param_groups(Network(backbone, DINOHead(1024, 65536)), 0.9, 0.2)
    lr = {name: g["lr_mult"] for g in groups for name in g["names"]}
    assert sum(any("backbone" in name for name in g["names"]) for g in groups) == 52
    for name, expected in (
        ("cls_token", 0.07179),
        ("patch_embed.proj.weight", 0.014358),
        ("blocks.0.attn.qkv.weight", 0.079766),
        ("blocks.6.attn.qkv.weight", 0.15009),
        ("blocks.23.attn.qkv.weight", 0.9),
        ("norm.weight", 1.0),
    ):
        assert lr[f"backbone.{name}"] == pytest.approx(expected, rel=5e-5)  # printed digits


def test_the_schedule_reaches_every_group():
    cfg = Config()
    optimizer = torch.optim.AdamW(param_groups(network(), 0.9, 0.2))
    for step in (0, 1000, 50000):
        now = schedules(step, cfg)
        set_schedule(optimizer, now)
        for g in optimizer.param_groups:
            lr = now.last_layer_lr if g["last_layer"] else now.lr
            assert g["lr"] == lr * g["lr_mult"]
            assert g["weight_decay"] == now.weight_decay * g["wd_mult"]


# ---- clipping and EMA ---------------------------------------------------------------------------


def with_gradients(scale):
    """A network whose parts have gradient norms of scale[part], and those gradients."""
    net = network()
    for part, norm in scale.items():
        grads = [torch.randn_like(p) for p in getattr(net, part).parameters()]
        total = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        for p, g in zip(getattr(net, part).parameters(), grads, strict=True):
            p.grad = g * norm / total
    return net, {name: p.grad.clone() for name, p in net.named_parameters()}


def test_backbone_and_heads_are_clipped_apart():
    scale = {"backbone": 10.0, "dino_head": 2.0, "ibot_head": 5.0}
    net, before = with_gradients(scale)
    norms = clip_each_part(net, 3.0)
    assert norms.keys() == scale.keys()
    for part, norm in scale.items():
        assert norms[part].item() == pytest.approx(norm, rel=1e-5)  # the norm before clipping
        factor = min(1.0, 3.0 / (norm + 1e-6))
        for name, p in getattr(net, part).named_parameters():
            torch.testing.assert_close(p.grad, before[f"{part}.{name}"] * factor)


@pytest.mark.parametrize("off", [0, 0.0, None])
def test_clipping_can_be_turned_off(off):
    net, before = with_gradients({"backbone": 1e4, "dino_head": 1e-3, "ibot_head": 50.0})
    norms = clip_each_part(net, off)
    assert norms["backbone"].item() == pytest.approx(1e4, rel=1e-5)
    assert all(torch.equal(p.grad, before[name]) for name, p in net.named_parameters())


def test_the_teacher_moves_towards_the_student_by_one_minus_momentum():
    teacher, student = network(), network()
    with torch.no_grad():
        for p in (*teacher.parameters(), *student.parameters()):
            p.copy_(torch.randn_like(p))
    expected = [
        0.9 * t.double() + 0.1 * s.double()
        for t, s in zip(teacher.parameters(), student.parameters(), strict=True)
    ]
    unchanged = [p.detach().clone() for p in student.parameters()]
    ema_update(teacher, student, 0.9)
    for p, e in zip(teacher.parameters(), expected, strict=True):
        torch.testing.assert_close(p.double(), e, atol=1e-6, rtol=0)  # fp32, values up to 4
    assert all(map(torch.equal, student.parameters(), unchanged))


def test_momentum_one_keeps_the_teacher_and_zero_copies_the_student():
    teacher, student = nn.Linear(3, 4), nn.Linear(3, 4)
    kept = teacher.weight.detach().clone()
    ema_update(teacher, student, 1.0)
    assert torch.equal(teacher.weight, kept)
    ema_update(teacher, student, 0.0)
    assert torch.equal(teacher.weight, student.weight)


def test_frozen_prototypes_stand_still_while_their_moments_accumulate():
    net = network()
    optimizer = torch.optim.AdamW(param_groups(net), betas=(0.9, 0.999))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    set_schedule(optimizer, SimpleNamespace(lr=0.1, last_layer_lr=0.0, weight_decay=0.1))
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name]) == ("last_layer" in name), name
        assert optimizer.state[p]["exp_avg"].any()
