"""The loop of train.py against a plain oracle, and no key of the config is dead.

Run: pytest tests/test_loop.py        (seconds)

The oracle takes every number of a step from its formula by the number of the step: order of images,
crops, masks, stochastic depth, schedules, the average of the teacher. It shares with train.py what
golden numbers hold elsewhere: crops of one image, networks, losses.
"""

import math
import random
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from running import ROOT, log_of, make_photos, tensors_of, tiny

import augment
import config
import data
import train
from dinov2 import build_network
from images.sources import open_source
from losses import SoftmaxCentering, dino_loss, ibot_loss, koleo_loss
from optim import schedules

CPU, B, STEPS = torch.device("cpu"), 8, 5
WORDS = """
    steps=5 log.save_every=5 log.knn_every=0 data.val= seed=3 loss.student_temp=0.15 loss.ibot=0.7
    optim.betas=[0.8,0.95] optim.clip=0.5 optim.layer_decay=0.8 optim.patch_embed_lr=0.5
    optim.weight_decay=0.1 teacher.momentum=0.9 mask.probability=0.75 accumulate=2
    optim.freeze_last_layer=1 loss.center_momentum=0.6 crops.global_size=32
""".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos")) / "train"


# ---- the oracle ---------------------------------------------------------------------------------


def half_cosine(step, first, last, total, warmup=0):
    if step < warmup:
        return first * step / max(warmup - 1, 1)
    return last + (first - last) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def images_of(step, source, cfg):
    """(crops of the images of a step, first large ones; colours), crop by crop."""
    found = []
    for position in range(step * B, (step + 1) * B):
        epoch, place = divmod(position, len(source))
        order = np.arange(len(source), dtype=np.uint32)
        np.random.default_rng([3, epoch]).shuffle(order)
        rng = random.Random(f"3 crops {position}")
        found.append(augment.crops(source.read(int(order[place])), rng, cfg))
    crops, colours = zip(*found, strict=True)
    return [
        augment.colour(
            torch.stack([crop[i] for crop in crops]),
            torch.stack([colour[i] for colour in colours]),
            cfg.data.mean,
            cfg.data.std,
        )
        for i in range(2 + cfg.crops.local_count)
    ]


def loss_of(student, teacher, centers, crops, masks, temp, rng):
    """One micro-batch: DINO, iBOT and KoLeo with their weights; masks (2 * images, patches)."""
    hidden = masks.flatten().nonzero().flatten()
    votes = (1 / masks.sum(1, keepdim=True).clamp(min=1)).expand(masks.shape)[masks]
    with torch.no_grad():
        told = teacher([torch.cat(crops[:2])], mask_indices=hidden)
        dino, ibot = centers["dino"](told.cls_score, temp), centers["ibot"](told.patch_score, temp)
    said = student([torch.cat(crops[:2]), torch.cat(crops[2:])], masks, hidden, rng=rng)
    score, count = said.cls_score.unflatten(0, (len(crops), -1)), len(crops[0])
    loss = sum(dino_loss(score, dino.unflatten(0, (2, -1)), 0.15))
    loss = loss + 0.7 * ibot_loss(said.patch_score, ibot, votes, 2 * count, 0.15)
    return loss + 0.1 * sum(koleo_loss(view) for view in said.cls.chunk(2))


def adamw(parameter, state, step, lr, decay):
    """Loshchilov and Hutter 2019, with betas 0.8 and 0.95."""
    mean, square = state
    mean.mul_(0.8).add_(parameter.grad, alpha=0.2)
    square.mul_(0.95).addcmul_(parameter.grad, parameter.grad, value=0.05)
    parameter.mul_(1 - lr * decay)
    scale = (square / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8
    parameter.sub_(lr * mean / (1 - 0.8 ** (step + 1)) / scale)


def lr_of(name, step):
    """Peak 4e-3 for 1,024 images; six blocks."""
    lr = half_cosine(step, 4e-3 * math.sqrt(B / 1024), 1e-6, STEPS, warmup=2)
    if "last_layer" in name and step < 1:
        return 0.0
    if not name.startswith("backbone."):
        return lr
    layer = 7 if name.startswith("backbone.norm") else 0
    layer = int(name.split(".")[2]) + 1 if ".blocks." in name else layer
    return lr * 0.8 ** (7 - layer) * (0.5 if "patch_embed" in name else 1.0)


def oracle(cfg, source):
    """Student, teacher and centre of DINO after five steps; norms of gradients of the backbone."""
    student, teacher = build_network(cfg, student=True), build_network(cfg, student=False).eval()
    named = dict(student.named_parameters())
    with torch.no_grad():
        for name, value in student.initial_values(torch.Generator().manual_seed(3)):
            named[name].copy_(value)
    teacher.load_state_dict(student.state_dict())
    centers = {name: SoftmaxCentering(32, 0.6) for name in ("dino", "ibot")}
    state = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in named.items()}
    norms = []
    for step in range(STEPS):
        crops = images_of(step, source, cfg)
        rng = random.Random(f"3 masks {step}")
        masks = torch.from_numpy(augment.batch_masks(2 * B, 4, 4, 0.75, (0.1, 0.5), rng))
        drop = random.Random(f"3 drop path {step} 0").getrandbits(63)
        drop = torch.Generator().manual_seed(drop)
        temp = 0.04 + (0.07 - 0.04) * min(step / 3, 1)
        for half in slice(0, B // 2), slice(B // 2, B):
            part = masks.unflatten(0, (2, B))[:, half].flatten(0, 1)
            own = [crop[half] for crop in crops]
            (loss_of(student, teacher, centers, own, part, temp, drop) / 2).backward()
        with torch.no_grad():
            own = [torch.nn.utils.clip_grad_norm_(p.parameters(), 0.5) for p in student.children()]
            norms.append(own[0].item())
            decay = half_cosine(step, 0.1, 0.4, STEPS)
            momentum = half_cosine(step, 0.9, 1.0, STEPS)
            for (name, p), mean in zip(named.items(), teacher.parameters(), strict=True):
                free = name.endswith(".bias") or "norm" in name or "gamma" in name
                adamw(p, state[name], step, lr_of(name, step), 0.0 if free else decay)
                mean.mul_(momentum).add_(p, alpha=1 - momentum)
                p.grad = None
    return student, teacher, centers["dino"].center, norms


def test_five_steps_are_those_of_a_plain_oracle(tmp_path, photos, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # those of the tests stay
    words = tiny(tmp_path / "run", photos, *WORDS)
    train.main(words)
    cfg = config.load(words[0], words[1:])
    student, teacher, center, norms = oracle(cfg, open_source(str(photos), cfg))
    found = tensors_of(tmp_path / "run")
    assert torch.allclose(found["centers.dino.center"], center, atol=1e-6)
    logged = [line["grad_backbone"] for line in log_of(tmp_path / "run") if "loss" in line]
    assert logged == pytest.approx(norms, rel=1e-3)  # Adam and the clipping would hide a factor
    for part, network in ("student", student), ("teacher", teacher):
        for name, value in network.state_dict().items():
            assert torch.allclose(found[f"{part}.{name}"], value, atol=2e-5), f"{part}.{name}"


# ---- what no number of a CPU shows --------------------------------------------------------------


def test_all_of_a_batch_but_its_colours_moves_to_the_device():
    cfg = config.load(ROOT / "tests" / "tiny.yaml", ["data.root=synthetic", *BASE])
    batch = next(data.loader(cfg, open_source("synthetic", cfg)))
    moved = train.to_device(batch, cfg, torch.device("meta"))._asdict()
    stayed = [name for name, x in moved.items() if torch.is_tensor(x) and not x.is_meta]
    assert stayed == ["global_colour", "local_colour"]


def test_the_teacher_drops_nothing_and_is_no_network_in_training():
    cfg = config.load(ROOT / "tests" / "tiny.yaml", ["data.root=synthetic", *BASE])
    student, teacher, *_ = train.build(cfg, CPU)
    assert student.training and all(student.backbone.drop_path)
    assert not teacher.training and not any(teacher.backbone.drop_path)
    assert not any(p.requires_grad for p in teacher.parameters())


# ---- no key is dead -----------------------------------------------------------------------------

# Keys that change nothing of what a step is, and who looks after them.
ELSEWHERE = {
    "device": "where", "parallel": "where, test_parallel", "attention": "how, test_vit",
    "activation_checkpointing": "how, test_parallel", "compile": "how, test_parallel",
    "out": "test_train", "data.workers": "how, test_data", "data.val": "test_eval_knn_sources",
    "data.max_damaged": "test_monitor", "data.max_pixels": "test_images_sources",
    "init_from": "test_weights_start", "init_heads": "test_weights_start",
    "head_steps": "test_weights_start", "distill.teacher": "test_distill",
    "distill.students": "test_distill", "distill.tokens": "test_distill",
    "optim.freeze_backbone": "test_weights_start", "loss.koleo_all_ranks": "test_parallel",
}  # fmt: skip
# log.* is about words, and evaluations; test_monitor and test_eval_knn_sources.
BASE = """
    batch=4 head.separate=true head.ibot_prototypes=24 head.ibot_bottleneck=12 steps=40
    optim.warmup=12 optim.clip=0.1 optim.layer_decay=0.9 optim.patch_embed_lr=0.5 vit.drop_path=0.5
    teacher.temp_warmup=16 loss.koleo=0.1 vit.init_std=0.02 optim.freeze_last_layer=6 log.every=1000
    crops.global_size=24 augment.grey=0.5 data.synthetic_images=48
""".split()  # noqa: SIM905
CHANGED = {
    "data.root": "{photos}", "data.mean": "[0.4,0.5,0.5]", "data.std": "[0.2,0.25,0.25]",
    "data.channels": ["data.channels=1", "data.mean=[0.5]", "data.std=[0.5]", "data.root={grey}"],
    "crops.global_size": "32", "crops.local_size": "16", "crops.ratio": "[0.9,1.1]",
    "augment.blur": "[1,0.1,0.1]", "augment.blur_sigma": "[1,3]", "augment.solarize": "[1,1,1]",
    "vit.size": "micro", "vit.patch": "4", "vit.ffn": "swiglu", "vit.registers": "2",
    "vit.interpolate_antialias": "true", "loss.centering": "sinkhorn", "precision": "bf16",
    "head.separate": ["head.separate=false", "head.ibot_prototypes=0", "head.ibot_bottleneck=0"],
    "optim.freeze_last_layer": "1", "optim.warmup": "2", "batch": "6", "accumulate": "2",
    "optim.clip_by": "parameter", "optim.freeze_by": "gradient", "steps": "60",
    "seed": "1", "vit.layerscale": "0.5", "mask.ratio": "[0.3,0.5]",
}  # fmt: skip
# With the step in which they show: after the warm-up, at its end, ... (others: step 3).
STEP = {"teacher.momentum_end": 20, "optim.min_lr": 30, "optim.weight_decay_end": 20}


def is_step_of(words, step):
    """Numbers that say what a step is: its losses, and the weights of both networks behind it."""
    cfg = config.load(ROOT / "tests" / "tiny.yaml", words)
    source = open_source(cfg.data.root, cfg)
    run = object.__new__(train.Run)  # without a folder and a report
    run.student, run.teacher, run.centers, run.optimizer = train.build(cfg, CPU)
    run.cfg, run.model, run.scaler = cfg, run.student, torch.amp.GradScaler(enabled=False)
    now = schedules(step, cfg)
    parts = train.micro_batches(next(data.loader(cfg, source, step)), cfg, CPU)

    ask = train.own_teacher(run)
    (log,) = train.backward([run], ask, parts, now, torch.Generator().manual_seed(0), False)
    run.update(step, now, log, SimpleNamespace(guard=lambda *_: None))
    networks = run.student, run.teacher
    sums = [p.double().abs().sum().item() for n in networks for p in n.parameters()]
    moments = [x for state in run.optimizer.state.values() for x in state.values()]
    moments = [x.double().abs().sum().item() for x in moments]
    centre = [c.center.abs().sum().item() for c in run.centers.values()]
    return [*map(float, log.values()), *sums, *moments, *centre]


KEYS = [key for key, _ in config.documented() if key and not key.startswith("log.")]
KEYS = [key for key in KEYS if key not in ELSEWHERE]


def changed(key, places):
    """Words that give a key another value."""
    if key in CHANGED:
        words = CHANGED[key] if isinstance(CHANGED[key], list) else [f"{key}={CHANGED[key]}"]
        return [word.format(**places) for word in words]
    value = config.lookup(config.load(ROOT / "tests" / "tiny.yaml", BASE), key)
    other = {
        bool: lambda: not value,
        int: lambda: value + 1,
        float: lambda: value * 0.7 if value else 0.3,
        tuple: lambda: tuple(round(0.9 * v, 4) for v in value),
    }[type(value)]()
    return [f"{key}={config.shown(other)}"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    grey = make_photos(tmp_path_factory.mktemp("grey"), [("train", 12)], mode="L")
    return {"photos": make_photos(tmp_path_factory.mktemp("rgb"), [("train", 12)]), "grey": grey}


@pytest.fixture(scope="module")
def baseline():
    return {}


@pytest.mark.parametrize("key", KEYS)
def test_no_key_is_dead(key, places, baseline):
    step, words = STEP.get(key, 3), ["data.root=synthetic", *BASE]
    if step not in baseline:
        baseline[step] = is_step_of(words, step)
    assert is_step_of([*words, *changed(key, places)], step) != baseline[step]
