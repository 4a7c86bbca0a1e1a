"""Write docs/plan.md: what bench.plan says, beside what steps take.

usage: python scripts/plan_page.py                          a quarter of an hour on two cores
       torchrun --nproc_per_node=2 scripts/plan_page.py CONFIG.yaml [key=value ...]

The second takes two real steps on the processes there are, and prints how far the plan is from the
most bytes that PyTorch's allocator had given out: also on GPUs.
"""

import contextlib
import io
import itertools
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch.profiler import profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import product

import config
import train
from bench import plan
from parallel import process_group, ranks, replicate

ROOT = Path(__file__).resolve().parent.parent
SMALL = "configs/vits14.yaml batch=8 precision=fp32"
CHECKED = [
    (1, "none", "none"), (1, "none", "selective"), (1, "none", "full"), (2, "ddp", "none"),
    (2, "fsdp", "none"), (2, "fsdp", "selective"), (2, "fsdp", "full"),
]  # fmt: skip
LARGE = ["configs/vitl16.yaml gpus=32", "configs/vitg14.yaml gpus=256"]

# One NVIDIA H100 80GB HBM3, PyTorch 2.11.0+cu130, 2026-11-25, commit 22e8437: images/s of an eager
# step, its memory beyond the weights in GB, and the least ms that the bytes of that code need.
# (`python -m bench step`, of the two small networks the log of training, with colours and loading.)
BEFORE = "batch=512 crops.local_count=6 vit.drop_path=0.1"  # what that config was then
MEASURED = [
    ("ViT-L/16", "configs/vitl16.yaml batch=64", 221, 36.6, 210),
    ("ViT-L/16", "configs/vitl16.yaml batch=32", 195, 18.6, 108),
    ("ViT-g/14", "configs/vitg14.yaml batch=16", 51.6, 30.6, 223),
    ("ViT-S/16", "configs/imagenette_gpu.yaml", 1140, None, 126),
    ("ViT-Ti/4", f"configs/cifar10_gpu.yaml {BEFORE}", 3000, None, 41),
]


# ---- for real -----------------------------------------------------------------------------------


def real_peak(cfg, device):
    """Take two steps for real; returns the most bytes that PyTorch's allocator had given out."""
    with profile(profile_memory=True) if device.type == "cpu" else contextlib.nullcontext() as seen:
        student, teacher, centers, optimizer = train.build(cfg, device)
        images = cfg.batch // ranks()[1]
        model, parts = replicate(student, cfg), plan.filled(plan.empty_parts(cfg, images), device)
        for _ in range(2):
            plan.compute_gradients(cfg, model, teacher, centers, parts)
            plan.update(cfg, student, teacher, optimizer, mark=lambda name: None)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    changes = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = sorted((e.start_ns(), e.nbytes()) for e in changes)
    return max(itertools.accumulate(change for _, change in changes))


@config.report_errors
def compare(argv):
    """Print planned and real bytes of a step."""
    cfg = config.load(argv[0], argv[1:])
    cfg.attention, cfg.compile = "sdpa", False
    with process_group(cfg) as device:
        world, real = ranks()[1], real_peak(cfg, device)
    if os.environ.get("RANK", "0") == "0":
        planned = plan.plan_step(cfg, world, device.type).peak
        print(f"planned {planned}, real {real}: {planned / real - 1:+.1%}")


def row_for_real(world, parallel, checkpointing):
    words = [*SMALL.split(), f"parallel={parallel}", f"activation_checkpointing={checkpointing}"]
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={world}"]
    launch += ["--standalone", __file__, *words]
    said = subprocess.run(launch, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    planned, real = (int(word.strip(",:")) for word in said.split()[1:4:2])
    cells = world, parallel, checkpointing, plan.gib(planned), plan.gib(real)
    return f"| {' | '.join(map(str, cells))} | {planned / real - 1:+.1%} |"


# ---- the page -----------------------------------------------------------------------------------


def row_of_plan(words):
    """What the plan says of a large set-up."""
    cfg, world, gpu = plan.arguments(words.split())
    made = plan.plan_step(cfg, world)
    sent = sum(size * (2 if kind == "all-reduce" else 1) for kind, size in made.sent.items())
    least = plan.by_part(made.operations, plan.GPUS[gpu])["all"][2]
    cells = (
        f"`python -m bench.plan {words}`",
        plan.gib(made.peak),
        plan.readable(sent * (world - 1) / world, "B"),
        plan.readable(made.flops / (cfg.batch // world), "FLOP"),
        f"{least * plan.SLOWER:.2f} s",
    )
    return f"| {' | '.join(cells)} |"


def row_of_gpu(name, words, rate, memory, bound):
    """Counted beside measured, on an H100."""
    cfg = plan.arguments([*words.split(), "parallel=none"])[0]
    made = plan.plan_step(cfg, 1)
    moved, _, least = plan.by_part(made.operations, plan.GPUS["h100"])["all"]
    beyond = (made.peak - sum(made.stays.values()) + made.stays["gradients"]) / 1e9
    cells = (
        f"{name}, {cfg.batch} images",
        plan.readable(moved, "B"),
        f"{1000 * least:.0f} ms",
        f"{1000 * cfg.batch / rate:.0f} ms",
        f"{1000 * cfg.batch / rate / bound:.2f}",
        f"{beyond:.1f} GB" if memory else "",
        f"{memory} GB" if memory else "",
    )
    return f"| {' | '.join(cells)} |"


def table_of_plan(words):
    """The plan as it is printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        plan.main(words.split())
    return printed.getvalue().rstrip()


PAGE = """# What `bench/plan.py` says, beside what a step takes

Written by `python scripts/plan_page.py`, with the code as it is. Memory is in GiB ({gib_is} bytes),
everything else in powers of ten. A plan takes 5 to 15 seconds of one core on one GPU, some 40
for ViT-g/14 on 256 (AMD EPYC).

## Memory, on two processes

```
torchrun --nproc_per_node=2 scripts/plan_page.py {small} \\
    parallel=fsdp
```

takes two real steps on two processes and prints how far the plan is from the most bytes that
PyTorch's allocator had given out. On {device}, PyTorch {torch}:

| processes | parallel | activation_checkpointing | planned | taken | error |
|---|---|---|---|---|---|
{checked}

Tests keep the error of the embedded set's network under 10 %, on one process and on two.

## Time and memory, on one GPU

Each kernel takes at least as long as its bytes need at 3.0 TB/s, or its matrix products at
775 TFLOP/s. "Measured" are eager steps of commit 22e8437 on one NVIDIA H100 80GB HBM3 (2026-11-25,
PyTorch 2.11.0+cu130), whose code moved 448, 236, 446, 364 and 122 GB, in at least 210, 108, 223,
126 and 41 ms; what is planned is of the code as it is, which moves and keeps less. Memory is what
comes on top of weights, moments and teacher.

| network | bytes moved | at least | measured then | / least then | memory planned | then |
|---|---|---|---|---|---|---|
{gpu}

What the bound leaves out: rows were gathered and added one by one with atomics (40 ms measured in a
ViT-L/16 step of 64 images, 16 counted), LayerNorm (22, 9), and the two small networks wait for
launches, colours and the loader. The plan multiplies the bound by {slower}, as was measured for
the large ones.

## One step, by part

```
python -m bench.plan {shown}
```

```text
{table}
```

"Gathers" take the images that stochastic depth keeps and add them back, and take the tokens that
the last feed-forward layer computes; "casts" are weights and gradients between fp32 and bf16,
"residual sums" also hold the factor batch / kept, "tokens" embeds patches.

## What it says of the large set-ups

| command | memory a GPU | sent a GPU and step | FLOPs an image | step on an A100 |
|---|---|---|---|---|
{large}

The official run of the first took about one day on 32 A100s: 0.69 s a step.
"""
SHOWN = "configs/vitl16.yaml batch=64 parallel=none gpu=h100"


def main():
    text = PAGE.format(
        gib_is="2^30",
        small=SMALL,
        device=f"{os.cpu_count()} cores of {product(torch.device('cpu'))}",
        torch=torch.__version__.partition("+")[0],
        checked="\n".join(row_for_real(*row) for row in CHECKED),
        gpu="\n".join(row_of_gpu(*row) for row in MEASURED),
        slower=plan.SLOWER,
        shown=SHOWN,
        table=table_of_plan(SHOWN),
        large="\n".join(row_of_plan(words) for words in LARGE),
    )
    (ROOT / "docs" / "plan.md").write_text(text)


if __name__ == "__main__":
    main() if len(sys.argv) == 1 else compare(sys.argv[1:])
