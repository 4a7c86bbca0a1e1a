"""The start card: everything one asks before a long run, on one screen."""

import math
import platform
import shutil
import textwrap

import torch

import dinov2
from attention import fastest
from optim import scaled_lr
from parallel import compiles, dtype_of, ranks


def start_card(cfg, source, held_out, student, device, start):
    """Its text. start: so many steps were taken before."""
    c, K, dtype = cfg.crops, cfg.head.prototypes, dtype_of(cfg)
    longest = 1 + cfg.vit.registers + (c.global_size // cfg.vit.patch) ** 2
    fast = f" ({fastest(device, dtype, longest)})" if cfg.attention == "auto" else ""
    parts = [
        f"{name} {sum(p.numel() for p in part.parameters()) / 1e6:.2f} M"
        for name, part in student.named_children()
    ]
    values = [f"{name} {value:.3f}" for name, value in dinov2.start_values(cfg).items()]
    knn = "none: it needs two classes or more, each with images to train on and held out"
    if held_out:
        knn = f"of {len(held_out[1]):,} held-out images among {len(held_out[0]):,} labelled ones"
    rows = {
        "device": f"{device} ({device_name(device)}), {dtype}, processes: {ranks()[1]}, "
        f"parallel={cfg.parallel}, attention={cfg.attention}{fast}",
        "images": f"{len(source):,} from {cfg.data.root}",
        "classes": textwrap.shorten(", ".join(map(str, source.classes)), 80),
        "left out": ", ".join(f"{n:,} {why}" for why, n in getattr(source, "left_out", {}).items()),
        "k-NN": knn if cfg.log.knn else "off",
        "network": f"{cfg.vit.size}/{cfg.vit.patch}: {', '.join(parts)} parameters",
        "batch": f"{cfg.batch} images x (2 crops of {c.global_size} px + {c.local_count} of "
        f"{c.local_size} px)",
        "steps": f"{start:,} to {cfg.steps:,}, {cfg.steps * cfg.batch / len(source):.1f} epochs",
        "lr": f"{scaled_lr(cfg.optim.lr, cfg.batch):.2e} at its peak (optim.lr={cfg.optim.lr:g} x "
        f"sqrt({cfg.batch} / 1024))",
        "loss": f"an untrained network starts near {', '.join(values)} "
        f"(K = {K:,}, ln K = {math.log(K):.2f})",
        "output": f"{cfg.out}/",
        "note": "; ".join(notes(cfg)),
    }
    if cfg.distill.teacher:
        rows["teacher"] = f"{cfg.distill.teacher}, frozen; iBOT on {cfg.distill.tokens} patches"
    columns = max(shutil.get_terminal_size((100, 24)).columns, 60)
    title = f"nanoDINOv2 continues after step {start:,}" if start else "nanoDINOv2 starts"
    whole = {"break_long_words": False, "break_on_hyphens": False}
    layout = textwrap.TextWrapper(columns, subsequent_indent=" " * 11, **whole)
    rows = [layout.fill(f"  {name:<9}{text}") for name, text in rows.items() if text]
    return "\n".join([title, *rows])


def notes(cfg):
    """What a user should know of this combination of keys."""
    a = cfg.augment
    if cfg.data.channels != 3:
        yield f"{cfg.data.channels} channels: colour changes need RGB and are left out"
    elif cfg.data.root != "synthetic" and not any([a.jitter, a.grey, *a.blur, *a.solarize]):
        yield (
            "augment.* leaves all colours as they are, which photographs should not have: for "
            "those start from configs/imagenette.yaml"
        )
    if cfg.optim.warmup > cfg.steps:
        yield "the lr never reaches its peak: optim.warmup is longer than the run"
    if compiles(cfg):
        yield "the first step compiles the network, up to a minute (not with compile=false)"


def device_name(device):
    """The product behind a torch.device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, threads: {torch.get_num_threads()}"
