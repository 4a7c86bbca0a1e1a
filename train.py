"""Train DINOv2: the events of a run, in order.

usage: python train.py CONFIG.yaml [key=value ...]            one process: CPU, CUDA or MPS
       torchrun --nproc_per_node=8 train.py CONFIG.yaml parallel=fsdp [key=value ...]

    python train.py config.yaml                               the embedded images
    python train.py configs/imagenette.yaml data.root=/photos      a folder of photographs
    python train.py config.yaml out=runs/x optim.lr=1.0e-3         any key can be overridden
    python train.py config.yaml 'augment.blur=[0, 0.5, 0.5]'       lists in quotes

The same command again continues an interrupted run, to the same end as if nothing had happened.
The method is in dinov2.py, its numbers are in the yaml; `python train.py --help` explains each,
and shows its default, which a key has that the yaml does not mention.

    RUN/log.jsonl      one object a line: step, images, loss, its terms, health signs, knn, ...
    RUN/summary.json   at the end: knn, knn_random, knn_pixels, images, seconds
    RUN/teacher.pt     the trained teacher, for eval_knn.py, pictures/ and weights/load.py
    RUN/*.png          loss and k-NN over time, crops and masks, neighbours before and after
    RUN/frames/        features of a few images at each evaluation, for the animation
"""

import sys

import config

if __name__ == "__main__":
    config.check_command_line(__doc__)

import copy
import random

import torch

import data
from augment import colour
from config import UserError, report_errors
from dinov2 import ask_teacher, build_centers, build_network, ema_update, teach_student
from images.sources import open_source
from monitor.watch import Watch
from optim import clip_each_part, compress, forget_moments, param_groups, schedules, set_schedule
from parallel import (
    dtype_of,
    materialize,
    process_group,
    ranks,
    replicate,
    synchronized,
    whole,
    wrap,
)
from weights.checkpoint import Checkpoints, checkpoints


def outline(cfg):
    """Student and teacher as shapes only: what is sharded later must not take memory before."""
    with torch.device("meta"):
        networks = build_network(cfg, student=True), build_network(cfg, student=False)
    for network in networks:
        wrap(network, cfg, train=network is networks[0])
    return networks


def build(cfg, device, networks=None):
    """Student, teacher (equal at first), centres of softmax centering, and the optimiser."""
    student, teacher = networks or outline(cfg)
    for network in (student, teacher):
        materialize(network, device, cfg.seed)
    teacher.requires_grad_(False).eval()
    student.backbone.requires_grad_(not cfg.optim.freeze_backbone)
    groups = param_groups(student, cfg.optim.layer_decay, cfg.optim.patch_embed_lr)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=cfg.optim.betas, fused=True)
    return student, teacher, build_centers(cfg).to(device), optimizer


def to_device(batch, cfg, device):
    """Move a batch, and do the colour work of its crops where the training is."""
    dtype, mean, std = dtype_of(cfg), cfg.data.mean, cfg.data.std

    def move(x):
        return x.to(device, non_blocking=True)

    # What colour() is to do stays on the CPU, which sorts the crops by it.
    return batch._replace(
        global_crops=colour(move(batch.global_crops), batch.global_colour, mean, std).to(dtype),
        local_crops=colour(move(batch.local_crops), batch.local_colour, mean, std).to(dtype),
        masks=move(batch.masks),
        mask_indices=move(batch.mask_indices),
        mask_weights=move(batch.mask_weights),
    )


def micro_batches(batch, cfg, device):
    """The parts in which a process works through its batch, on the device."""
    return [to_device(part, cfg, device) for part in data.split(batch, cfg.accumulate)]


def backward(runs, ask, parts, now, rng, health):
    """Gradients of one step, from the micro-batches it is cut into; each run's log of the last.

    ask(part, temp, health) gives the teacher's Targets of a part: it speaks once, to all students.
    With several parts, Sinkhorn, the centre and KoLeo see one at a time: targets are balanced, and
    neighbours sought, among fewer images than in one large batch.
    """
    for i, part in enumerate(parts, 1):
        last, logs = i == len(parts), []
        told = ask(part, now.teacher_temp, health and last)
        for run in runs:
            with synchronized(run.model, last):  # gradients meet once, after the last part
                loss, log = teach_student(
                    run.model, part, told, run.cfg.loss, rng, overwrite=len(runs) == 1
                )
                run.scaler.scale(loss / len(parts)).backward()
            logs.append(log)
    return logs


class Run:
    """A student in training and all that belongs to it. (distill.py has several side by side.)

    `teacher` is the moving average of the student: what is evaluated, and written to teacher.pt.
    """

    def __init__(self, cfg, device, source):
        """Build it, and continue where an interrupted run over these images has stopped."""
        self.cfg, self.device = cfg, device
        self.student, self.teacher, self.centers, self.optimizer = build(cfg, device)
        self.model = replicate(self.student, cfg)
        self.scaler = torch.amp.GradScaler(device.type, enabled=cfg.precision == "fp16")
        networks = self.student, self.teacher
        self.saved = Checkpoints(cfg, *networks, self.centers, self.optimizer, self.scaler, source)
        self.start = self.saved.load()
        if self.start == 0 and cfg.init_from:
            from weights.start import start_from

            print_once(start_from(cfg, *networks))

    def finished(self):
        """What to say of a run that has nothing left to do, else ""."""
        from monitor.report import finished  # rooms open where they are needed

        return finished(self.cfg) if self.start == self.cfg.steps else ""

    def open(self, source, held_out, name="", known=None):
        """Begin the report of the run on these images.

        name   of one student among several
        known  figures to put beside the first evaluation
        """
        from monitor.report import Reporter

        self.source, self.held_out, self.known = source, held_out, known or {}
        self.report = Reporter(
            self.cfg, source, held_out, self.student, self.device, self.start, name
        )
        if self.cfg.log.pictures and self.start == 0 and ranks()[0] == 0:
            from pictures.history import draw_crops

            draw_crops(source, self.cfg, self.report.out / "crops.png")

    def evaluate(self, step):
        """k-NN of the teacher, where it is due before this step."""
        every = self.cfg.log.knn_every
        if step == 0 or (every and step % every == 0):
            from monitor.results import evaluate_run  # which loads what training does not need

            evaluate_run(self, step)

    def update(self, step, now, log, watch):
        """All that follows the backward pass: clip, refuse what is not finite, step, average."""
        self.scaler.unscale_(self.optimizer)
        o = self.cfg.optim
        norms = clip_each_part(self.student, o.clip, o.clip_by)
        norms = {f"grad_{name}": whole(norm) for name, norm in norms.items()}
        watch.guard(self, step + 1, log, norms)  # what is not finite changes no weight
        set_schedule(self.optimizer, now)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if o.freeze_by == "gradient" and step < o.freeze_last_layer:
            forget_moments(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        ema_update(self.teacher, self.student, now.momentum)
        if reporting(step, self.cfg):
            self.saved.check()
            self.report.step(step + 1, log | norms, now)

    def finish(self):
        """The last evaluation, the pictures and summary.json."""
        from monitor.results import final_report

        final_report(self)


def reporting(step, cfg):
    """Whether this step is one that the log shows."""
    return step == 0 or (step + 1) % cfg.log.every == 0


@report_errors
def main(argv):
    cfg = config.load(*config.main_arguments(argv, __doc__))
    if cfg.distill.teacher:
        raise UserError(f"distill.teacher is set: use distill.py {argv[0]}, or leave it out")
    with process_group(cfg) as device:
        if cfg.head_steps and not checkpoints(cfg.out):
            train_heads(cfg, device)
        train(cfg, device)


def train_heads(cfg, device):
    """Train fresh heads on the frozen backbone of cfg.init_from, as a run of its own in out/heads.

    Its schedules are those of the config, compressed. Afterwards cfg starts from its result.
    """
    first = copy.deepcopy(cfg)
    compress(first, cfg.head_steps)
    first.out, first.head_steps, first.optim.freeze_backbone = f"{cfg.out}/heads", 0, True
    first.vit.drop_path = 0.0
    train(first, device)
    cfg.init_from, cfg.init_heads, cfg.head_steps = first.out, True, 0


def train(cfg, device):
    """One run, from opening its images to its report."""
    from images.evaluation import evaluation_images

    source = open_source(cfg.data.root, cfg, "train")
    held_out = evaluation_images(cfg)
    run = Run(cfg, device, source)
    if words := run.finished():
        return print_once(words)
    run.open(source, held_out)

    follow([run], own_teacher(run), source, device)


def own_teacher(run):
    """What `backward` asks where a run is taught by the moving average of its own student."""
    cfg = run.cfg
    return lambda part, temp, health: ask_teacher(
        run.teacher, run.centers, part, temp, cfg.loss, health
    )


def follow(runs, ask, source, device, change=lambda part: part):
    """The loop: from each batch to the next weights. (Only a distillation has several runs.)

    Every number is a function of the step, so there is nothing else to resume. ask: see backward.
    """
    cfg, watch, (rank, world) = runs[0].cfg, Watch(), ranks()
    start = min(run.start for run in runs)  # a kill may have come between two saves
    batches = data.loader(cfg, source, start, rank, world)
    for run in runs:
        batches = run.report.waiting(batches)
    for step, batch in enumerate(batches, start):
        present = [run for run in runs if run.start <= step]
        for run in present:
            run.evaluate(step)
            run.report.skipped(step, batch.skipped)
        now = schedules(step, cfg)
        rng = seeded(f"{cfg.seed} drop path {step} {rank}")
        parts = [change(part) for part in micro_batches(batch, cfg, device)]
        logs = backward(present, ask, parts, now, rng, reporting(step, cfg))
        for run, log in zip(present, logs, strict=True):
            run.update(step, now, log, watch)
        save_or_leave(present, step + 1, watch)
    for run in runs:
        run.saved.wait()
    watch.saved = True
    for run in runs:
        run.finish()


def save_or_leave(runs, done, watch):
    """After so many steps: a checkpoint of each run where it is due, and the end if asked to."""
    cfg = runs[0].cfg
    asked_to_stop = watch.check(done - 1)
    every = [n for n in (cfg.steps, cfg.log.save_every, cfg.log.keep_every) if n]
    if asked_to_stop or any(done % n == 0 for n in every):
        asked_to_stop = watch.check(done)  # a step that was not finite spoils the centres: no save
        for run in runs:
            run.report.tell_skipped()
            run.saved.save(done)  # in the background
    if asked_to_stop:
        for run in runs:
            run.saved.wait()
            run.report.close(f"stopped after step {done} and saved; the same command continues")
        sys.exit(128 + asked_to_stop)


def print_once(words):
    """Print by the first of all processes."""
    if ranks()[0] == 0:
        print(words, flush=True)


def seeded(words):
    """A torch.Generator that depends on nothing but these words."""
    return torch.Generator().manual_seed(random.Random(words).getrandbits(63))


if __name__ == "__main__":
    main(sys.argv[1:])
