"""How fast is it, and where does the time go?

    python -m bench WHAT [CONFIG.yaml] [key=value ...] [profile]
    python -m bench step configs/vitl16.yaml batch=16

WHAT is step or data: functions of these names make the work below, and measure.py times it. Images
are made in memory unless data.root=... is given; only "data", which measures loading too, reads
those of the config. "profile" also prints the operations that took longest. scripts/benchmarks.py
measures the same beside the official code and LightlySSL, and attention, losses and crops alone.
"""

import atexit
import sys
from dataclasses import replace
from functools import partial

import torch

import config
from bench.measure import Work, longest, measure, table
from bench.plan import plan_step, update
from config import UserError
from data import loader
from dinov2 import LARGE_CROPS, ema_update, objective
from images.sources import open_source
from optim import schedules, set_schedule
from parallel import check_launch, dtype_of, pick_device
from train import build, to_device

# ---- a training step ----------------------------------------------------------------------------


def described(cfg):
    c = cfg.crops
    return (
        f"ViT {cfg.vit.size}/{cfg.vit.patch}, {LARGE_CROPS} x {c.global_size} + {c.local_count} x "
        f"{c.local_size} px, {cfg.batch} images, K = {cfg.head.prototypes:,}, {dtype_of(cfg)}"
    )


def batches(cfg, device):
    """Endless batches on the device, as train.py makes them; each contender has its own."""
    source = loader(replace(cfg, steps=10**9), open_source(cfg.data.root, cfg))
    atexit.register(source.close)  # after an error too, while its threads can still end quietly
    for batch in source:
        yield to_device(batch, cfg, device)


def timed(network, clock, name):
    """A network that books the time until it is called under "losses", its own under `name`."""

    def call(*args, **kwargs):
        clock.mark("losses")
        said = network(*args, **kwargs)
        clock.mark(name)
        return said

    return call


def step_in_phases(cfg, device, student, teacher, objective, optimizer, average):
    """The body of the loop of train.py, with stamps: a run(clock) that returns the loss.

    objective(student, teacher, batch) -> loss; average(teacher, student, momentum).
    """
    source = batches(cfg, device)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.precision == "fp16")

    def run(clock):
        batch = next(source)
        clock.mark("data")
        loss = objective(timed(student, clock, "student"), timed(teacher, clock, "teacher"), batch)
        clock.mark("losses")
        scaler.scale(loss).backward()
        clock.mark("backward")
        update(cfg, student, teacher, optimizer, clock.mark, scaler, average)
        return loss.item()

    return run


def step(cfg, device):
    """From crops on the device to the updated teacher."""
    student, teacher, centers, optimizer = build(cfg, device)
    now = schedules(cfg.steps // 2, cfg)
    set_schedule(optimizer, now)

    def loss_of(student, teacher, batch):
        return objective(student, teacher, centers, batch, now.teacher_temp, cfg.loss)[0]

    run = step_in_phases(cfg, device, student, teacher, loss_of, optimizer, ema_update)
    # Of the matrix products, nothing twice: plain attention computes nothing again.
    own = {"attention": "plain", "compile": False, "activation_checkpointing": "none"}
    flops = plan_step(replace(cfg, **own), 1).flops
    given = partial(step_in_phases, cfg, device), student
    # All contenders get crops from our loader, so that time is left out.
    return Work(f"Step: {described(cfg)}", {"ours": run}, cfg.batch, flops, given, leave_out="data")


def data(cfg, device):
    """The same step, where the time that it waits for the loader counts."""
    return replace(step(cfg, device), title=f"Step with loading: {described(cfg)}", leave_out="")


# ---- command line -------------------------------------------------------------------------------

WHAT = {work.__name__: work for work in (step, data)}


def arguments(argv, works=WHAT):
    """(what, config, whether to profile) from the command line."""
    what, words = config.main_arguments(argv, __doc__)
    if what not in works:
        raise UserError(f"{what}: cannot be measured; use one of {', '.join(works)}")
    wants_profile = "profile" in words
    words = [word for word in words if word != "profile"]
    path = words.pop(0) if words and "=" not in words[0] else "config.yaml"
    cfg = config.load(path, words)
    cfg.parallel = "none"  # one process is measured
    if what != "data" and not any(word.startswith("data.root=") for word in words):
        cfg.data.root = "synthetic"
    return what, cfg, wants_profile


def prepare(make, cfg):
    """(Work, device) by one of the functions above."""
    device = pick_device(cfg.device)
    check_launch(cfg, device, 1)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as train.py
    torch.manual_seed(0)
    return make(cfg, device), device


@config.report_errors
def main(argv):
    what, cfg, wants_profile = arguments(argv)
    work, device = prepare(WHAT[what], cfg)
    setting = f"{device}, PyTorch {torch.__version__}, threads: {torch.get_num_threads()}"
    print(f"{work.title}\n{setting}\n\n{table(measure(work, device, dtype_of(cfg)))}")
    if wants_profile:
        print(longest(work, device))


if __name__ == "__main__":
    main(sys.argv[1:])
