"""What people see of a run while it goes on: the start card, progress, log.jsonl, warnings.

Only rank 0 prints and writes. Losses stay on the device between reports, so that the loop never
waits for a number that nobody reads.
"""

import contextlib
import importlib.util
import json
import math
import platform
import shutil
import sys
import textwrap
import time
from pathlib import Path

import torch
from tqdm import tqdm

import dinov2
from attention import fastest
from config import UserError, dump, replace_text, to_dict, writing
from images.sources import most_damaged
from optim import scaled_lr
from parallel import compiles, dtype_of, lists_of_ranks, ranks, sum_over_ranks

ELSEWHERE = "set out= to another place"
TERMS = ("dino_global", "dino_local", "ibot", "koleo")
FLOORS = {
    "knn_start": "before the first step",
    "knn_random": "untrained network",
    "knn_pixels": "raw pixels",
    "knn_teacher": "its teacher",
}


class Reporter:
    """Follows a run from its first to its last step."""

    def __init__(self, cfg, source, held_out, student, device, start, name=""):
        """name: of the student where there are several, to tell their lines apart."""
        self.name = f"{name}: " if name else ""
        self.cfg, self.device, (self.rank, self.world) = cfg, device, ranks()
        self.out, self.images = Path(cfg.out), len(source)
        self.met, self.warned, self.writers, self.rows = [], set(), [], []
        self.waited, self.last, self.began = 0.0, (start, time.time()), time.time()
        lines = self.earlier_lines(start)
        if self.rank:
            return
        with writing(f"out={cfg.out}", ELSEWHERE):
            self.out.mkdir(parents=True, exist_ok=True)
            dump(cfg, self.out / "config.yaml")
            path = self.out / "log.jsonl"
            replace_text(path, "".join(json.dumps(line) + "\n" for line in lines))
            self.log = path.open("a", buffering=1)  # line by line: a kill loses at most one
        self.writers = open_writers(cfg, start)
        print(start_card(cfg, source, held_out, student, device, start), flush=True)
        # The foot of a terminal: a row for the progress, one for the losses, one for the rest. All
        # in one would be 150 columns wide, and cut off where windows have 80.
        if sys.stderr.isatty():
            bar = self.name + "step {n:,}/{total:,} |{bar}| {desc}"
            self.rows = [tqdm(total=cfg.steps, initial=start, bar_format=bar, desc="first step")]
            self.rows += [tqdm(bar_format="{desc}") for _ in range(2)]

    def earlier_lines(self, start):
        """The log up to the checkpoint, of which it may be ahead; remembers some of it.

        k-NN evaluations and damaged images carry the number of the step that follows them.
        """
        lines = []
        with contextlib.suppress(UserError):  # no log yet, or a kill before its first line was out
            lines = read_log(self.out)
        lines = [n for n in lines if n["step"] < start or (n["step"] == start and "loss" in n)]
        self.bad = {line["skipped"] for line in lines if "skipped" in line}
        self.seconds_before = max((line.get("seconds", 0.0) for line in lines), default=0.0)
        self.floors = {k: line[k] for line in lines for k in FLOORS if k in line}
        return lines

    def waiting(self, batches):
        """Pass batches on, and count the time that the loop waits for them."""
        before = time.time()
        for batch in batches:
            self.waited += time.time() - before
            yield batch
            before = time.time()

    def step(self, done, log, now):
        """Report a step: its number from 1, what it logged (tensors), and its schedule."""
        values = torch.stack([v.float() for v in log.values()])
        values = (sum_over_ranks(values) / self.world).tolist()  # one wait, one reduction
        self.tell_skipped()
        if self.rank:
            return
        (before, then), on_gpu = self.last, self.device.type == "cuda"
        passed = time.time() - then
        line = {
            "step": done,
            "images": done * self.cfg.batch,
            **dict(zip(log, values, strict=True)),
            **now._asdict(),
            "images_per_second": (done - before) * self.cfg.batch / passed,
            "data_wait": self.waited / passed,
            "memory_gb": torch.cuda.max_memory_allocated(self.device) / 1e9 if on_gpu else None,
            "seconds": self.seconds(),
        }
        self.waited, self.last = 0.0, (done, time.time())
        self.write(line)
        self.show(line)
        self.warn(line)

    def evaluation(self, step, result):
        """A k-NN evaluation of the teacher before `step`."""
        if self.rank == 0 and result:
            self.floors |= {name: result[name] for name in FLOORS if name in result}
            line = {"step": step, "images": step * self.cfg.batch, **result}
            self.write(line | {"seconds": self.seconds()})
            known = ", ".join(f"{FLOORS[key]} {value:.1f} %" for key, value in self.floors.items())
            self.say(f"step {step}: k-NN {result['knn']:.1f} % of held-out images ({known})")
        self.last, self.waited = (step, time.time()), 0.0  # not the loop's time

    def skipped(self, step, names):
        """Damaged images that a batch of this rank had to replace."""
        self.met += [(step, name) for name in names]

    def tell_skipped(self):
        """Name what all ranks have skipped since the last time; too many stop the run."""
        met, self.met = sorted(lists_of_ranks(self.met)), []
        for step, name in met:
            if name in self.bad:
                continue
            self.bad.add(name)
            if self.rank == 0:
                self.say(f"warning: damaged image skipped ({len(self.bad)} so far): {name}")
                self.write({"step": step, "skipped": name})
        if len(self.bad) > most_damaged(self.cfg, self.images):
            raise UserError(
                f"{len(self.bad)} of {self.images} images are damaged, more than "
                f"data.max_damaged={self.cfg.data.max_damaged:g}: they are named in "
                f"{self.out / 'log.jsonl'}; mend or remove them, or raise the key"
            )

    def close(self, message):
        """Last words."""
        for row in self.rows:
            row.close()
        for _, close in self.writers:
            close()
        if self.rank == 0:
            print(message, flush=True)

    def seconds(self):
        """Training time so far, earlier parts of an interrupted run included."""
        return round(self.seconds_before + time.time() - self.began, 1)

    def write(self, line):
        # Six digits are enough for a log, and json has no word for nan and inf but null.
        line = dict(line)  # the caller goes on with the numbers as they are
        for key, value in line.items():
            if isinstance(value, float):
                line[key] = float(f"{value:.6g}") if math.isfinite(value) else None
        with writing(self.out / "log.jsonl", ELSEWHERE):
            self.log.write(json.dumps(line) + "\n")
        for add, _ in self.writers:
            add(line)

    def say(self, text):
        """A line of text that does not tear the progress line."""
        tqdm.write(self.name + text, file=sys.stdout)
        sys.stdout.flush()

    def show(self, line):
        """The rows at the foot of a terminal; elsewhere one line of text."""
        done, rate = line["step"], line["images_per_second"]
        eta = tqdm.format_interval((self.cfg.steps - done) * self.cfg.batch / rate)
        terms = [f"{k} {line[k]:.3f}" for k in TERMS if k in line]
        memory = f"  memory {line['memory_gb']:.1f} GB" if line["memory_gb"] else ""
        rows = [
            f"{line['images']:,} images  {rate:,.0f} images/s  ETA {eta}",
            f"loss {line['loss']:.3f} = {' + '.join(terms)}",
            f"lr {line['lr']:.1e}  data wait {line['data_wait']:.0%}{memory}",
        ]
        if not self.rows:
            return self.say(f"step {done:,}/{self.cfg.steps:,}  " + "  ".join(rows))
        self.rows[0].n = done
        for row, text in zip(self.rows, rows, strict=True):
            row.set_description_str(text)

    def warn(self, line):
        """Say once, in plain words, what the numbers of a line warn of."""
        for words in warnings_of(line, self.cfg):
            if words.split("(")[0] not in self.warned:
                self.warned.add(words.split("(")[0])
                self.say(f"warning: {words}")


def warnings_of(line, cfg):
    """Signs of a collapse, once the warm-up is over, and of a loop that waits; in plain words."""
    if line["step"] > 1 and line["data_wait"] > 0.3:
        yield (
            f"the loop waits for images (data wait {line['data_wait']:.0%}): use more cores, "
            f"more than data.workers={cfg.data.workers}, or smaller files (python -m images pack)"
        )
    if line["step"] < cfg.optim.warmup or "rankme" not in line:
        return
    K, used, entropy = cfg.head.prototypes, line["prototypes_used"], line["teacher_entropy"]
    fix = f"raise loss.koleo={cfg.loss.koleo:g} or lower optim.lr={cfg.optim.lr:g}"
    if line["rankme"] < 2:
        yield f"collapse? all images look alike to the teacher (rankme {line['rankme']:.2f}): {fix}"
    # Softmax centering may share prototypes out although the scores favour one: then the targets
    # are not certain of it.
    if used < 2 / K and entropy < math.log(2):
        fix = "use loss.centering=sinkhorn" if cfg.loss.centering == "softmax" else fix
        words = "collapse? the teacher puts every image on one or two prototypes"
        yield f"{words} (share used {used:.5f}): {fix}"
    if entropy > 0.999 * math.log(K):
        yield (
            f"collapse? the teacher's targets are uniform (entropy {entropy:.2f} nats): lower its "
            f"temperature, now {line['teacher_temp']:.3g} (teacher.temp_start, teacher.temp)"
        )


def read_log(run):
    """The lines of RUN/log.jsonl, or of such a file; the last may be half written after a kill."""
    path = Path(run) if Path(run).is_file() else Path(run, "log.jsonl")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        raise UserError(f"{path}: no such log; give the folder train.py wrote (out=)") from None
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    rows = [row for row in rows if "step" in row]
    if not rows:
        raise UserError(f"{path}: no line with a step yet; train a little longer")
    return rows


def finished(cfg):
    """What to say of a run that is complete already, or "" for one that is not."""
    there = Path(cfg.out, "summary.json").exists()
    then = f"set out= for a new run; to train on, let it start with init_from={cfg.out}"
    return f"{cfg.out} is finished ({cfg.steps:,} steps): {then}" if there else ""


def open_writers(cfg, start):
    """TensorBoard and Weights & Biases, where asked for: [(add a line of the log, close)]."""
    writers = []
    for package in ("tensorboard", "wandb"):
        if getattr(cfg.log, package) and importlib.util.find_spec(package) is None:
            raise UserError(f"log.{package} needs a package: pip install {package}")
    if cfg.log.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        # What an interrupted run wrote after its last checkpoint is done again: purged.
        board = SummaryWriter(cfg.out, purge_step=start + 1 if start else None)

        def add(line):
            for name, value in line.items():
                if isinstance(value, (int, float)):
                    board.add_scalar(name, value, line["step"])

        writers.append((add, board.close))
    if cfg.log.wandb:
        import wandb

        run = wandb.init(project=cfg.log.wandb, dir=cfg.out, config=to_dict(cfg))
        writers.append((lambda line: run.log(line, step=line["step"]), run.finish))
    return writers


# ---- the start card: everything one asks before a long run, on one screen ----------------------


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
        "classes": f"{len(source.classes):,}: "
        + textwrap.shorten(", ".join(map(str, source.classes)) or "none", 80, placeholder=" ..."),
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
    title = f"nanoDINOv2 continues after step {start:,}" if start else "nanoDINOv2 starts"
    width = max(shutil.get_terminal_size((100, 24)).columns, 60)
    layout = textwrap.TextWrapper(width, subsequent_indent=" " * 11, break_on_hyphens=False)
    layout.break_long_words = False
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
