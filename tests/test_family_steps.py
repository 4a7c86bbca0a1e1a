"""Complete training steps of DINO and iBOT give the numbers of their official code.

The stored crops, masks and first weights go through our objective, clipping, AdamW and EMA, with
the keys of the cards (head.norm_last_layer, optim.clip_by, optim.freeze_by). Tolerances are those
of tests/golden/family/README.md; to clip by part, to freeze by lr, and the other kind of gain each
move weights by at least ten times as much.

Run:  pytest tests/test_family_steps.py
"""

import sys
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from test_family import EXACT, below, close, config_of, load, ours, relative

import config
import optim
from data import Batch, index_masks
from dinov2 import ask_teacher, teach_student
from train import Run, build

STEPS = 3


def training_config(o):
    cfg = config_of(o)
    cfg.vit.size = (o["embed_dim"], o["depth"], o["num_heads"], "mlp")
    cfg.vit.patch = o["patch_size"]
    cfg.vit.layerscale = cfg.vit.drop_path = cfg.loss.koleo = 0.0
    cfg.crops.global_size, cfg.crops.local_size = o["img_size"], o["local_size"]
    cfg.crops.local_count, cfg.log.every = o["local_crops_number"], 1
    cfg.head.prototypes, cfg.head.hidden = o["out_dim"], o["hidden_dim"]
    cfg.head.bottleneck, cfg.head.layers = o["bottleneck_dim"], o["nlayers"]
    cfg.head.norm_last_layer = o["norm_last_layer"]
    cfg.loss.dino, cfg.loss.ibot = o.get("lambda1", 1.0), o.get("lambda2", 0.0)
    cfg.optim.clip, cfg.optim.clip_by, cfg.optim.freeze_by = o["clip_grad"], "parameter", "gradient"
    cfg.optim.freeze_last_layer = o["freeze_last_layer"] * o["niter_per_ep"]
    cfg.optim.layer_decay = cfg.optim.patch_embed_lr = 1.0
    config.check(cfg)
    return cfg


def put(network, z, prefix):
    """Load stored weights; iBOT's teacher and both networks of DINO have no mask token."""
    state = {ours(name): value for name, value in below(z, prefix).items()}
    token = {"backbone.mask_token": torch.zeros(1, network.backbone.dim)}
    network.load_state_dict(token | state, strict=True)


def batch_of(z, i, o):
    crops = [z[f"step{i}/crop{c}"] for c in range(2 + o["local_crops_number"])]
    patches = (o["img_size"] // o["patch_size"]) ** 2
    masks = torch.zeros(2 * len(crops[0]), patches, dtype=torch.bool)
    if f"step{i}/masks" in z:
        masks = z[f"step{i}/masks"].flatten(2).flatten(0, 1)
    return Batch(torch.cat(crops[:2]), torch.cat(crops[2:]), None, None, *index_masks(masks), [])


def asked(teacher, centers, z, i, batch, cfg):
    """What our teacher says in step i at the stored temperature.

    iBOT has a second one for patches, and a centre that knows all patches of the steps before, not
    the hidden ones: these two are given from outside.
    """
    temps = {kind: z.get(f"schedule/teacher_{kind}") for kind in ("temp", "patch_temp")}
    theirs = deepcopy(centers)
    told = ask_teacher(teacher, centers, batch, temps["temp"][i].item(), cfg.loss)
    if cfg.loss.ibot:
        theirs["ibot"].center.copy_(z[f"step{i}/center2_used"][0])
        patch = ask_teacher(teacher, theirs, batch, temps["patch_temp"][i].item(), cfg.loss)
        told = told._replace(ibot=patch.ibot)
    return told


def train_three_steps(z, o):
    """The halves of the objective and Run.update on the stored batches; what happened."""
    cfg, steps = training_config(o), []
    student, teacher, centers, optimizer = build(cfg, torch.device("cpu"))
    put(student, z, "initial/student/")
    put(teacher, z, "initial/teacher/")
    idle = SimpleNamespace(check=lambda: None, guard=lambda *_: None, step=lambda *_: None)
    run = SimpleNamespace(cfg=cfg, student=student, teacher=teacher, optimizer=optimizer)
    run.scaler, run.saved, run.report = torch.amp.GradScaler("cpu", enabled=False), idle, idle
    named = dict(student.named_parameters())
    for i in range(STEPS):
        batch, now = batch_of(z, i, o), optim.schedules(i, cfg)
        used = centers["dino"].center.clone()
        told = asked(teacher, centers, z, i, batch, cfg)
        loss, log = teach_student(student, batch, told, cfg.loss)
        loss.backward()
        grads = {name: p.grad.clone() for name, p in named.items() if p.requires_grad}
        Run.update(run, i, now, log, idle)
        count = {name: int(optimizer.state[named[name]]["step"]) for name in grads}
        steps.append(SimpleNamespace(now=now, log=log, grads=grads, used=used, count=count))
    return SimpleNamespace(student=student, teacher=teacher, centers=centers, steps=steps)


STEP_CASES = [("dino", "norm_last"), ("dino", "free_last"), ("ibot", "shared")]


@pytest.fixture(scope="module", params=STEP_CASES, ids=lambda case: "_".join(case))
def trained(request):
    """(stored arrays, official options, what our code did with them); each is trained once."""
    family, case = request.param
    z, o = load(f"{family}_train_step", case)
    return z, o, train_three_steps(z, o)


def test_schedules_in_training_are_the_official_ones(trained):
    z, o, run = trained
    for mine, theirs in (("lr", "lr"), ("weight_decay", "wd"), ("momentum", "momentum")):
        close([getattr(s.now, mine) for s in run.steps], z[f"schedule/{theirs}"], EXACT, mine)
    if o["niter_per_ep"] == 1:  # else it is another one within an epoch
        close([s.now.teacher_temp for s in run.steps], z["schedule/teacher_temp"], EXACT)


def test_losses_in_training_are_the_official_ones(trained):
    z, _, run = trained
    close([s.log["loss"] for s in run.steps], z["loss"], 2e-5)
    if "cls" in z:
        cls = [s.log["dino_global"] + s.log["dino_local"] for s in run.steps]
        close(cls, z["cls"], 2e-5)
        close([s.log["ibot"] for s in run.steps], z["patch"], 2e-5)


@torch.no_grad()
def test_scores_in_training_are_the_official_ones(trained):
    z, o, _ = trained
    student, teacher, *_ = build(training_config(o), torch.device("cpu"))
    put(student, z, "initial/student/")
    put(teacher, z, "initial/teacher/")
    batch = batch_of(z, 0, o)
    indices = batch.mask_indices if len(batch.mask_indices) else None
    said = student([batch.global_crops, batch.local_crops], batch.masks, indices)
    told = teacher([batch.global_crops], None, indices)
    if indices is None:
        close(said.cls_score, z["step0/student_out"], 1e-5)
        close(told.cls_score, z["step0/teacher_out"], 1e-5)
        return
    expected = z["step0/student_cls"], z["step0/student_local_cls"]
    close(said.cls_score, torch.cat(expected), 1e-5)
    close(told.cls_score, z["step0/teacher_cls"], 1e-5)
    close(said.patch_score, z["step0/student_patch_masked"], 1e-5)
    close(told.patch_score, z["step0/teacher_patch_masked"], 1e-5)


def test_gradients_and_their_norms_in_training_are_the_official_ones(trained):
    z, _, run = trained
    stored = {ours(name): grad for name, grad in below(z, "step0/grad/").items()}
    assert run.steps[0].grads.keys() - stored.keys() <= {"backbone.mask_token"}
    for name, expected in stored.items():
        relative(run.steps[0].grads[name], expected, 5e-5, name)
    names = [ours(name) for name in z["grad_norm_names"].tolist()]
    for step, expected in zip(run.steps, z["grad_norms"], strict=True):
        relative(torch.stack([step.grads[name].norm() for name in names]), expected, 1e-5)


def test_centres_in_training_are_the_official_ones(trained):
    z, _, run = trained
    for i, step in enumerate(run.steps):
        close(step.used, z[f"step{i}/center_used"], 1e-6, i)
    close(run.centers["dino"].center, z["final/center"], 1e-6)


def test_a_frozen_last_layer_takes_no_step_of_adam(trained):
    z, _, run = trained
    before = {}
    for i, step in enumerate(run.steps):
        moved = {name for name, count in step.count.items() if count > before.get(name, 0)}
        assert moved - {"backbone.mask_token"} == expected_names(z, f"step{i}/updated"), i
        before = step.count
    for name, count in zip(z["final/adam_step_names"], z["final/adam_step"].tolist(), strict=True):
        assert before[ours(name)] == count, name


def expected_names(z, key):
    return {ours(name) for name in z[key].tolist()} - {"backbone.mask_token"}


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_weights_after_three_steps_are_the_official_ones(trained, role):
    z, o, run = trained
    weights, tolerance = getattr(run, role).state_dict(), {"student": 2e-5, "teacher": 5e-6}[role]
    # The bias of the keys has no gradient but rounding, of which Adam makes whole steps.
    noise = 6 * z["schedule/lr"].max().item()
    noise *= 1 if role == "student" else 2 * (1 - z["schedule/momentum"].min().item())
    for name, expected in below(z, f"final/{role}/").items():
        got = weights[ours(name)]
        if name.endswith("attn.qkv.bias"):
            assert (got - expected).chunk(3)[1].abs().max() < noise, name
            got, expected = (torch.cat(x.chunk(3)[::2]) for x in (got, expected))
        close(got, expected, tolerance, name)
    if o["norm_last_layer"] and role == "student":
        assert (weights["dino_head.last_layer.weight_g"] == 1).all()


@pytest.mark.parametrize(
    ("key", "other"),
    [("optim.clip_by", "part"), ("optim.freeze_by", "lr"), ("head.norm_last_layer", None)],
)
def test_without_its_key_a_run_goes_elsewhere(trained, monkeypatch, key, other):
    z, o, run = trained
    cfg, (section, name) = training_config(o), key.split(".")
    value = not o["norm_last_layer"] if other is None else other
    setattr(getattr(cfg, section), name, value)
    monkeypatch.setattr(sys.modules[__name__], "training_config", lambda _: cfg)
    before, after = (r.student.state_dict() for r in (run, train_three_steps(z, o)))
    apart = [(after[k] - w).abs().max() for k, w in before.items() if "qkv.bias" not in k]
    assert max(apart) > 10 * 2e-5  # ten times what is allowed above


def test_a_centre_of_hidden_patches_moves_the_patch_loss_by_a_thousandth(monkeypatch):
    z, o = load("ibot_train_step", "shared")

    def with_our_centre(teacher, centers, z, i, batch, cfg):
        theirs, temp = deepcopy(centers), z["schedule/teacher_patch_temp"][i].item()
        told = ask_teacher(teacher, centers, batch, z["schedule/teacher_temp"][i].item(), cfg.loss)
        return told._replace(ibot=ask_teacher(teacher, theirs, batch, temp, cfg.loss).ibot)

    monkeypatch.setattr(sys.modules[__name__], "asked", with_our_centre)
    got = torch.stack([s.log["ibot"] for s in train_three_steps(z, o).steps])
    assert 5e-4 < (got / z["patch"] - 1).abs().max() < 1.2e-3
