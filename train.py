"""Train DINOv2: the events of a run, in order.

    torchrun train.py config.yaml                                 one process: CPU, CUDA or MPS
    torchrun train.py config.yaml out=runs/x optim.lr=1.0e-3      any key can be overridden
    torchrun train.py config.yaml data.root=/photos               a folder of your own images
    torchrun --nproc_per_node=8 train.py config.yaml parallel=fsdp

The same command again continues an interrupted run, to the same end as if nothing had happened.
The method is in dinov2.py, its numbers are in config.yaml; `python train.py --help` explains each.

    RUN/log.jsonl      one object a line: step, images, loss, its terms, health signs, knn, ...
    RUN/summary.json   at the end: knn, knn_random, knn_pixels, images, seconds
    RUN/teacher.pt     the trained teacher, for eval_knn.py, visualize.py and weights.py
    RUN/*.png          loss and k-NN over time, crops and masks, PCA colours before and after
    RUN/frames/        features of a few images at each evaluation, for `visualize.py animation`
"""

import os
import random
import signal
import sys

import torch

import config
import data
from augment import colour
from checkpoint import Checkpoints
from dinov2 import build_centers, build_network, ema_update, objective
from frames import keep_frame
from optim import clip_each_part, param_groups, schedules, set_schedule
from parallel import (
    dtype_of,
    materialize,
    max_over_ranks,
    process_group,
    replicate,
    synchronized,
    whole,
    wrap,
)
from report import Reporter
from results import evaluate, final_report, finished
from weights import start_from


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


def backward(model, teacher, centers, parts, temp, cfg, scaler, rng, health):
    """Gradients of one step from the micro-batches it is cut into; the log of the last of them.

    With several, Sinkhorn, the centre and KoLeo see one at a time: targets are balanced, and
    neighbours sought, among fewer images than in one large batch.
    """
    for i, part in enumerate(parts, 1):
        last = i == len(parts)
        with synchronized(model, last):  # gradients meet once, after the last part
            loss, log = objective(
                model, teacher, centers, part, temp, cfg.loss, rng, health=health and last
            )
            scaler.scale(loss / len(parts)).backward()
    return log


@config.report_errors
def main(argv):
    cfg = config.load(*config.main_arguments(argv))
    with process_group(cfg) as (device, rank, world):
        train(cfg, device, rank, world)


def train(cfg, device, rank, world):
    watch = Watch(device, rank)

    # ---- data, networks, optimiser ----
    source = data.open_source(cfg.data.root, cfg, "train")
    held_out = data.evaluation_images(cfg)
    student, teacher, centers, optimizer = build(cfg, device)
    model = replicate(student, cfg)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.precision == "fp16")

    # ---- continue an interrupted run ----
    saved = Checkpoints(cfg, student, teacher, centers, optimizer, scaler)
    start = saved.load()
    if start == cfg.steps and (words := finished(cfg)):
        return print(words) if rank == 0 else None
    if start == 0 and cfg.init_from:
        words = start_from(cfg, student, teacher)
        if rank == 0:
            print(words)
    report = Reporter(cfg, source, held_out, student, device, rank, world, start)

    # ---- the loop: every number is a function of the step, so there is nothing else to resume ----
    batches = report.waiting(data.loader(cfg, source, start, rank, world))
    for step, batch in enumerate(batches, start):
        if step == 0 or (cfg.log.knn_every and step % cfg.log.knn_every == 0):
            scores = evaluate(teacher.backbone, held_out, cfg, device, floors=step == 0)
            keep_frame(step, teacher.backbone, held_out[1] if held_out else source, cfg)
            report.evaluation(step, scores)
        report.skipped(step, batch.skipped)
        now = schedules(step, cfg)
        set_schedule(optimizer, now)
        rng = seeded(f"{cfg.seed} drop path {step} {rank}")
        reporting = step == 0 or (step + 1) % cfg.log.every == 0

        parts = data.split(batch, cfg.accumulate) if cfg.accumulate > 1 else [batch]
        parts = [to_device(part, cfg, device) for part in parts]
        log = backward(
            model, teacher, centers, parts, now.teacher_temp, cfg, scaler, rng, reporting
        )
        scaler.unscale_(optimizer)
        norms = clip_each_part(student, cfg.optim.clip)
        norms = {f"grad_{name}": whole(norm) for name, norm in norms.items()}
        watch.guard(step + 1, optimizer, log, norms, scaler)  # what is not finite changes no weight
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        ema_update(teacher, student, now.momentum)

        if reporting:
            saved.check()
            report.step(step + 1, log | norms, now)
        asked_to_stop = watch.check()
        if (step + 1) % cfg.log.save_every == 0 or step + 1 == cfg.steps or asked_to_stop:
            asked_to_stop = watch.settle()  # a step that was not finite spoils the centres: no save
            report.tell_skipped()
            saved.save(step + 1)  # in the background
        if asked_to_stop:
            saved.wait()
            report.close(f"stopped after step {step + 1} and saved; the same command continues")
            sys.exit(128 + asked_to_stop)
    saved.wait()
    watch.saved = True
    final_report(report, teacher.backbone, source, held_out, cfg, device)


def seeded(words):
    """A torch.Generator that depends on nothing but these words."""
    return torch.Generator().manual_seed(random.Random(words).getrandbits(63))


class Watch:
    """Non-finite numbers, SIGTERM and Ctrl-C: noticed by all ranks in the same step.

    All are flags on the device, and they are read one step later, when the answer is there: the
    loop never waits for the device because of them.
    """

    def __init__(self, device, rank):
        self.device, self.rank = device, rank
        self.signal, self.saved, self.pending, self.answer = 0, False, None, None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.remember)

    def remember(self, number, frame):
        """Finish the step, save, leave. A second signal does not wait."""
        leave = bool(self.signal) or self.saved
        text = "leaving now; the same command continues from the last checkpoint"
        if not leave:
            text = "finishing this step, then saving (once more: leaving at once, without)"
        if self.rank == 0:  # print() may not be called while it is at work, and it may be just now
            os.write(2, f"\n{signal.Signals(number).name}: {text}\n".encode())
        self.signal = number
        if leave:
            sys.exit(128 + number)

    def guard(self, step, optimizer, log, norms, scaler):
        """Make the optimiser skip this step, on the device, if it is not finite anywhere."""
        numbers = [log["loss"]]
        if not scaler.is_enabled():  # which skips a step itself, as fp16 gradients may overflow
            numbers += norms.values()
        bad = (~torch.isfinite(torch.stack(numbers))).any().float()
        flags = max_over_ranks(torch.stack((bad, bad.new_tensor(float(self.signal)))))
        if not scaler.is_enabled():
            optimizer.found_inf = flags[0]
        self.answer, self.pending = self.pending, (step, flags, log | norms)

    def check(self):
        """The signal to stop for, or 0. Raises UserError naming the terms that are not finite."""
        if self.answer is None:
            return 0
        step, flags, log = self.answer
        bad, asked_to_stop = flags.tolist()
        if bad:
            terms = [f"{k}={v.item():.4g}" for k, v in log.items() if not torch.isfinite(v)]
            raise config.UserError(
                f"step {step} is not finite ({', '.join(terms) or 'on another process'}): it was "
                "not taken and the last checkpoint is kept; lower optim.lr, or use precision=fp32"
            )
        return int(asked_to_stop)

    def settle(self):
        """The same of the step just taken; waits for it."""
        self.answer = self.pending
        return self.check()


if __name__ == "__main__":
    main(sys.argv[1:])
