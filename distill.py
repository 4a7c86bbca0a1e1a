"""Distil DINOv2: small students learn from a large, frozen teacher instead of from their own past.

usage: python distill.py CONFIG.yaml distill.teacher=RUN [key=value ...]    or torchrun, as train.py

    python distill.py configs/distill_small.yaml distill.teacher=runs/micro
    python distill.py configs/distill.yaml distill.teacher=runs/vitg14 'distill.students=[small]'
    python distill.py configs/distill.yaml distill.teacher=dinov2_vitg14 head_steps=10000

The events of train.py, with these differences (DINOv2, section 5, "Model distillation"; threads 114
and 176 of the official repository, which has no code for it):
  - the teacher is a larger network with its heads, both frozen
  - nothing is hidden from the student, and it has no stochastic depth
  - iBOT is about all patches of the large crops (distill.tokens=masked: about those that mask.*
    picks, but in plain sight; so does the code of DINOv3)
  - the product, in teacher.pt as ever, is a moving average of the student, who never listens to it
Teacher and students have the size of patches and the number of prototypes in common, nothing else.
The teacher looks once at each batch, however many students there are, and each process has its own
images. A student is a run with a folder of its own; the same command continues an interrupted one.

A teacher without heads, such as a released file, first gets fresh ones, in out/heads: head_steps
steps of self-distillation on its frozen backbone. This is our way: the official heads were never
released.
"""

import sys

import config

if __name__ == "__main__":
    config.check_command_line(__doc__)

import copy
from pathlib import Path

import torch

from config import UserError, report_errors
from dinov2 import ask_teacher, build_network, ibot_prototypes
from images.sources import open_source
from parallel import process_group, wrap
from train import Run, follow, print_once, train_heads
from vit import SIZES
from weights.load import architecture, contents, teacher_file, vit_of
from weights.start import put_parts


@report_errors
def main(argv):
    cfg = config.load(*config.main_arguments(argv, __doc__))
    students = student_configs(cfg)
    teacher_file(cfg.distill.teacher)  # a missing one is refused before images are looked for
    with process_group(cfg) as device:
        distill(cfg, students, device)


def distill(cfg, students, device):
    """Train a student for each Config in `students`, on the same batches."""
    from images.evaluation import evaluation_images

    source = open_source(cfg.data.root, cfg, "train")
    held_out = evaluation_images(cfg)
    teacher = open_teacher(cfg, device)
    runs = [Run(each, device, source) for each in students]
    for run in filter(Run.finished, runs):
        print_once(run.finished())
    runs = [run for run in runs if not run.finished()]
    known = {}
    if held_out and any(run.start == 0 for run in runs):
        from monitor.results import evaluate

        known["knn_teacher"] = evaluate(teacher.backbone, held_out, cfg, device)["knn"]
    for run in runs:
        run.open(source, held_out, run.cfg.vit.size if cfg.distill.students else "", known)

    def ask(part, temp, health):
        return ask_teacher(teacher, {}, part, temp, cfg.loss, health)

    if runs:
        follow(runs, ask, source, device, change=lambda part: visible(part, cfg))


def visible(batch, cfg):
    """The batch with nothing hidden; with tokens=all, every patch of a large crop has its vote."""
    masks = torch.zeros_like(batch.masks)
    if cfg.distill.tokens == "masked":
        return batch._replace(masks=masks)
    everywhere = torch.arange(masks.numel(), device=masks.device)
    return batch._replace(
        masks=masks,
        mask_indices=everywhere,
        mask_weights=torch.full_like(everywhere, 1 / masks.shape[1], dtype=torch.float32),
    )


# ---- students -----------------------------------------------------------------------------------


def student_configs(cfg):
    """The Config of each student's run, after a check of what distillation asks of a config."""
    if not cfg.distill.teacher:
        raise UserError("distill.teacher is empty: set it to the run folder of the teacher")
    if cfg.loss.centering != "sinkhorn":
        raise UserError("no softmax centre follows a frozen teacher: set loss.centering=sinkhorn")
    for size in cfg.distill.students:
        if size not in SIZES:
            raise UserError(f"distill.students: {size} is unknown, choose from {', '.join(SIZES)}")
    if len(set(cfg.distill.students)) < len(cfg.distill.students):
        raise UserError("distill.students names one size twice: both would have the same folder")
    student = copy.deepcopy(cfg)
    student.vit.drop_path, student.head_steps, student.distill.students = 0.0, 0, ()
    if cfg.distill.tokens == "all":
        student.mask.probability = 0.0  # there is nothing to pick
    several = {size: copy.deepcopy(student) for size in cfg.distill.students}
    for size, each in several.items():
        each.out, each.vit.size = f"{cfg.out}/{size}", size
    return list(several.values()) or [student]


# ---- the teacher --------------------------------------------------------------------------------


def open_teacher(cfg, device):
    """The frozen teacher; one without heads is first given some, if cfg.head_steps allows it."""
    path = teacher_file(cfg.distill.teacher)
    parts, its = read_teacher(path, cfg)
    check_match(its, cfg, path, "dino_head" in parts)
    if "dino_head" not in parts:
        path = train_its_heads(path, its, cfg, device)
        parts, its = read_teacher(path, cfg)
    with torch.device("meta"):
        network = build_network(its, student=False)
    wrap(network, its, train=False)
    network.to_empty(device=device)
    how = its.vit.interpolate_offset, its.vit.interpolate_antialias
    put_parts([network], parts, how, f"distill.teacher={path}")
    return network.requires_grad_(False).eval()


def read_teacher(path, cfg):
    """(weights by part, Config) of a teacher: its own network, on the machine of cfg."""
    parts, about = contents(path)
    if "config" in about:
        its = config.from_dict(about["config"], str(path))
    else:  # a released file: the weights tell what network it is
        its = copy.deepcopy(cfg)
        vit_of(architecture(parts["backbone"], path, about), its.vit)
        if images := about.get("images"):
            its.data.mean, its.data.std = tuple(images["mean"]), tuple(images["std"])
    for key in ("precision", "device", "parallel", "attention", "compile"):
        setattr(its, key, getattr(cfg, key))
    return parts, its


def check_match(its, cfg, path, heads):
    """Raise UserError unless teacher and students look at the same patches and prototypes."""
    keys = ["vit.patch", "data.channels", "data.mean", "data.std", *["head.prototypes"] * heads]
    pairs = [(key, config.lookup(cfg, key), config.lookup(its, key)) for key in keys]
    if heads and cfg.loss.ibot:
        pairs.append(("head.ibot_prototypes", ibot_prototypes(cfg), ibot_prototypes(its)))
        pairs.append(("loss.ibot", cfg.loss.ibot, cfg.loss.ibot if its.loss.ibot else 0))
    for key, ours, theirs in pairs:
        if ours != theirs:
            fix = f"{key}={config.shown(theirs)}"
            raise UserError(
                f"{key}={config.shown(ours)}, but distill.teacher={path} has {fix}: set {fix}"
            )


def train_its_heads(path, its, cfg, device):
    """Train heads on the frozen backbone of a teacher without any, in out/heads; its new file."""
    if not cfg.head_steps:
        fix = "set head_steps, the number of steps that first train some on its frozen backbone"
        raise UserError(f"distill.teacher={path} has no heads: {fix}")
    print_once(f"the teacher has no heads: {cfg.head_steps:,} steps train some, backbone frozen")
    first = copy.deepcopy(cfg)
    first.vit, first.init_from, first.distill = its.vit, str(path), config.Distill()
    train_heads(first, device)
    return Path(first.init_from, "teacher.pt")


if __name__ == "__main__":
    main(sys.argv[1:])
