"""How fast is it, compared with whom, and where does the time go? Anyone can run this.

    python bench.py step config.yaml                         a training step, in phases
    python bench.py step config.yaml --official ~/dinov2     compared with the official code
    python bench.py step config.yaml lightly                 compared with LightlySSL
    python bench.py losses configs/vitl16.yaml batch=16      and: attention, backbone, augment,
                                                             data, knn
Prints a table, and adds it to TO/benchmarks.json and TO/benchmarks.md (--to; runs). What can be
measured is in bench_ours.py, the peers are in bench_official.py and bench_peers.py, and how time
and memory are measured in measure.py.
"""

import sys
import time

import torch

import bench_official
import bench_ours
import command
import config
from config import UserError
from measure import Clock, matmul_peak, measure, record, save, table
from parallel import dtype_of, pick_device

WHAT = {
    "step": bench_ours.step,
    "losses": bench_ours.losses,
    "backbone": bench_ours.backbone,
    "attention": bench_ours.attention,
    "augment": bench_ours.augmentation,
    "data": bench_ours.loading,
    "knn": bench_ours.knn,
}
PEERS = ("official", "lightly", "timm")

ON_GPU = "data.root=/imagenet --official ~/dinov2 --to docs"
NOT_MEASURED = [  # what, target, the command that measures it
    (
        "step, ViT-L/16, 64 images, one H200",
        "2.0x official, 300 images/s, 45 % of the matrix peak",
        f"python bench.py step configs/vitl16.yaml batch=64 compile=true {ON_GPU}",
    ),
    (
        "step, ViT-S/16, 16 images, two cores that multiply bf16",
        "1.6x official in bf16, 3x in fp32",
        "python bench.py step configs/vitl16.yaml vit.size=small batch=16 loss.centering=sinkhorn "
        "data.root=synthetic --official ~/dinov2 --to docs",
    ),
    (
        "step, config.yaml, two cores that multiply bf16",
        "2.0x lightly",
        "python bench.py step config.yaml lightly --to docs",
    ),
    (
        "step, ViT-g/14, K = 131,072, one H200",
        "80 images/s (published, H100: 46 to 67)",
        "python bench.py step configs/vitg14.yaml batch=16 compile=true data.root=/imagenet "
        "--to docs",
    ),
    (
        "loading included, ViT-S/16, one H200, 16 CPU cores",
        "90 % of the rate without loading",
        "python bench.py data configs/vitl16.yaml vit.size=small batch=128 data.workers=15 "
        "data.root=/imagenet --to docs",
    ),
]

USAGE = f"""
usage: python bench.py WHAT [CONFIG.yaml] [key=value ...] [lightly] [timm] [--official PATH]
                       [--to FOLDER] [shared]

WHAT is one of {", ".join(WHAT)}. Peers that are named run in the same process:
  python bench.py step config.yaml lightly                       pip install lightly
  python bench.py step config.yaml --official ~/dinov2           a checkout of the official code
  python bench.py backbone configs/vits14.yaml batch=4 timm      pip install timm
shared: on a processor that others use too, one thread, and CPU time instead of time.
The results are added to FOLDER/benchmarks.json and FOLDER/benchmarks.md (default: runs).
"""


def arguments(argv):
    """(what, config, peers, folder) from the command line."""
    words = command.main_arguments(argv, USAGE)
    what, words = words[0], words[1]
    if what not in WHAT:
        raise UserError(f"{what}: cannot be measured; use one of {', '.join(WHAT)}")
    options, rest, words = {"--official": "", "--to": "runs"}, [], iter(words)
    for word in words:
        if word in options:
            options[word] = next(words, "")
            if not options[word]:
                raise UserError(f"{word}: name a folder behind it")
        else:
            rest.append(word)
    peers = [word for word in rest if word in PEERS]
    if "shared" in rest:
        Clock.tick = staticmethod(time.process_time)
        torch.set_num_threads(1)
    rest = [word for word in rest if word not in (*PEERS, "shared")]
    if "official" in peers and not options["--official"]:
        raise UserError("official: give the path of a checkout, --official PATH")
    if options["--official"]:
        bench_official.find(options["--official"])
        peers = ["official", *(name for name in peers if name != "official")]
    path = rest.pop(0) if rest and "=" not in rest[0] else "config.yaml"
    cfg = config.load(path, rest)
    cfg.parallel = "none"  # one process is measured
    return what, cfg, peers, options["--to"]


@command.report_errors
def main(argv):
    what, cfg, peers, folder = arguments(argv)
    device = pick_device(cfg.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as train.py
    torch.manual_seed(0)
    work = WHAT[what](cfg, device, peers)
    found = measure(work, device)
    peak = matmul_peak(device, dtype_of(cfg)) if work.flops else 0
    found = record(work, found, peak, "python bench.py " + " ".join(argv), device)
    print(f"{found['title']}\n{found['machine']}\n\n{table(found)}")
    save(found, folder, NOT_MEASURED)


if __name__ == "__main__":
    main(sys.argv[1:])
