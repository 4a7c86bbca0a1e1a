"""What people see of a run while it goes on: the start card, progress, log.jsonl, warnings.

Only rank 0 prints and writes. Losses stay on the device between reports, so that the loop never
waits for a number that nobody reads.
"""

import contextlib
import importlib
import json
import math
import os
import shutil
import sys
import textwrap
import time
from pathlib import Path

import torch
from tqdm import tqdm

import dinov2
from attention import fastest
from config import UserError, dump, to_dict, writing
from optim import scaled_lr
from parallel import (
    device_name,
    dtype_of,
    lists_of_ranks,
    multiplies_bf16,
    peak_memory,
    ranks,
    sum_over_ranks,
)

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
ELSEWHERE = "set out= to another place"
TERMS = ("dino_global", "dino_local", "ibot", "koleo")
FLOORS = {
    "knn_start": "before the first step",
    "knn_random": "untrained network",
    "knn_pixels": "raw pixels",
    "knn_teacher": "its teacher",
}
COLLAPSE = {
    "alike": "all images look alike to the teacher (rankme {rankme:.2f}): raise loss.koleo or "
    "lower optim.lr",
    "few": "the teacher puts every image on one or two prototypes (share used "
    "{prototypes_used:.5f}): use loss.centering=sinkhorn",
    "uniform": "the teacher's targets are uniform (entropy {teacher_entropy:.2f} nats): lower "
    "teacher.temp",
}


class Reporter:
    """Follows a run from its first to its last step."""

    def __init__(self, cfg, source, held_out, student, device, start, name=""):
        """name: of the student where there are several, to tell their lines apart."""
        self.name = f"{name}: " if name else ""
        self.cfg, self.device, (self.rank, self.world) = cfg, device, ranks()
        self.out, self.images = Path(cfg.out), len(source)
        self.met, self.warned, self.writers = [], set(), []
        self.waited, self.last = 0.0, (start, time.time())
        self.seconds_before, self.floors = 0.0, {}
        lines = self.earlier_lines(start)
        if self.rank == 0:
            self.open_folder(lines, start)
            print(start_card(cfg, source, held_out, student, device, start), flush=True)
        self.live = Live(cfg.steps, start, self.rank == 0 and sys.stderr.isatty(), self.name)

    def earlier_lines(self, start):
        """The log up to the checkpoint, of which it may be ahead; remembers some of it."""
        lines = []
        with contextlib.suppress(UserError):  # no log yet, or a kill before its first line was out
            lines = read_log(self.out / "log.jsonl")
        lines = [line for line in lines if belongs_before(line, start)]
        self.bad = {line["skipped"] for line in lines if "skipped" in line}
        for line in lines:
            self.seconds_before = max(self.seconds_before, line.get("seconds", 0.0))
            self.floors |= {name: line[name] for name in FLOORS if name in line}
        return lines

    def open_folder(self, lines, start):
        """Make the run folder, with a log of these lines."""
        path = self.out / "log.jsonl"
        with writing(f"out={self.cfg.out}", ELSEWHERE):
            self.out.mkdir(parents=True, exist_ok=True)
            dump(self.cfg, self.out / "config.yaml")
            replace_text(path, "".join(json.dumps(line) + "\n" for line in lines))
            self.log = path.open("a", buffering=1)  # line by line: a kill loses at most one
        self.writers = open_writers(self.cfg, start)
        self.began = time.time()

    # ---- events of the loop ----

    def waiting(self, batches):
        """Pass batches on, and count the time that the loop waits for them."""
        while True:
            before = time.time()
            batch = next(batches, None)
            self.waited += time.time() - before
            if batch is None:
                return
            yield batch

    def step(self, done, log, now):
        """Report a step: its number from 1, what it logged (tensors), and its schedule."""
        values = torch.stack([v.float() for v in log.values()])
        values = (sum_over_ranks(values) / self.world).tolist()  # one wait, one reduction
        self.tell_skipped()
        if self.rank:
            return
        before, then = self.last
        passed = time.time() - then
        line = {
            "step": done,
            "images": done * self.cfg.batch,
            **dict(zip(log, values, strict=True)),
            **now._asdict(),
            "images_per_second": (done - before) * self.cfg.batch / passed,
            "data_wait": self.waited / passed,
            "memory_gb": peak_memory(self.device),
            "seconds": self.seconds(),
        }
        self.waited, self.last = 0.0, (done, time.time())
        self.write(line)
        self.show(line)
        self.warn_of_collapse(line)

    def evaluation(self, step, result):
        """A k-NN evaluation of the teacher before `step`."""
        if self.rank == 0 and result:
            self.floors |= {name: result[name] for name in FLOORS if name in result}
            line = {"step": step, "images": step * self.cfg.batch, **result}
            self.write(line | {"seconds": self.seconds()})
            self.say(f"step {step}: k-NN {result['knn']:.1f} % of held-out images{self.to_beat()}")
        self.last, self.waited = (step, time.time()), 0.0  # not the loop's time

    def to_beat(self):
        """What needs no training, for comparison with a k-NN figure."""
        known = [
            f"{text} {self.floors[key]:.1f} %"
            for key, text in FLOORS.items()
            if self.floors.get(key) is not None
        ]
        return f" ({', '.join(known)})" if known else ""

    def skipped(self, step, names):
        """Damaged images that a batch of this rank had to replace."""
        self.met += [(step, name) for name in names]
        if self.world == 1:
            self.tell_skipped()

    def tell_skipped(self):
        """Name what all ranks have skipped since the last time; too many stop the run."""
        met, self.met = sorted(lists_of_ranks(self.met)), []
        for step, name in met:
            if name not in self.bad:
                self.bad.add(name)
                if self.rank == 0:
                    self.say(f"warning: damaged image skipped ({len(self.bad)} so far): {name}")
                    self.write({"step": step, "skipped": name})
        if len(self.bad) > 0.01 * self.images:
            raise UserError(
                f"{len(self.bad)} of {self.images} images are damaged, more than 1 %: "
                f"they are named in {self.out / 'log.jsonl'}; mend or remove them"
            )

    def summary(self, result):
        """Write summary.json, last of all: a run folder that has one is complete."""
        machine = {"device": f"{self.device} ({device_name(self.device)})"}
        result = result | {"skipped_images": len(self.bad)} | machine | {"torch": torch.__version__}
        with writing(self.out / "summary.json", ELSEWHERE):
            replace_text(self.out / "summary.json", json.dumps(result, indent=1) + "\n")

    def close(self, message):
        """Last words."""
        self.live.close()
        for _, close in self.writers:
            close()
        if self.rank == 0:
            print(message, flush=True)

    # ---- where it goes ----

    def seconds(self):
        """Training time so far, earlier parts of an interrupted run included."""
        return round(self.seconds_before + time.time() - self.began, 1)

    def write(self, line):
        line = {k: rounded(v) if isinstance(v, float) else v for k, v in line.items()}
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
        rows = [
            f"{line['images']:,} images  {rate:,.0f} images/s  ETA {eta}",
            f"loss {line['loss']:.3f} = {' + '.join(terms)}",
            f"lr {line['lr']:.1e}  data wait {line['data_wait']:.0%}  "
            f"memory {line['memory_gb']:.1f} GB",
        ]
        if self.live.rows:
            self.live.show(done, rows)
        else:
            self.say(f"step {done:,}/{self.cfg.steps:,}  " + "  ".join(rows))

    def warn_of_collapse(self, line):
        """Say so once, in plain words, when the signs of health point to a collapse."""
        if line["step"] < self.cfg.optim.warmup or "rankme" not in line:
            return
        K = self.cfg.head.prototypes
        used, entropy = line["prototypes_used"], line["teacher_entropy"]
        signs = {
            "alike": line["rankme"] < 2,
            # Softmax centering may share prototypes out although the scores favour one: then the
            # targets are not certain of it.
            "few": used < 2 / K and entropy < math.log(2),
            "uniform": entropy > 0.999 * math.log(K),
        }
        for sign, ill in signs.items():
            if ill and sign not in self.warned:
                self.warned.add(sign)
                self.say("warning: collapse? " + COLLAPSE[sign].format(**line))


class Live:
    """The foot of a terminal: a row for the progress, one for the losses, one for the rest.

    One row for all of it would be 150 columns wide, and cut off where windows have 80.
    """

    def __init__(self, steps, start, visible, name=""):
        self.rows = []
        if visible:
            bar = name + "step {n:,}/{total:,} |{bar}| {desc}"
            self.rows = [tqdm(total=steps, initial=start, bar_format=bar, desc="first step")]
            self.rows += [tqdm(bar_format="{desc}") for _ in range(2)]

    def show(self, done, texts):
        self.rows[0].n = done
        for row, text in zip(self.rows, texts, strict=True):
            row.set_description_str(text)

    def close(self):
        for row in self.rows:
            row.close()


def read_log(path):
    """The objects of log.jsonl. The last line may be half written if the run was killed."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        raise UserError(f"{path}: no such log; give the folder train.py wrote (out=)") from None
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    rows = [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]
    if not rows:
        raise UserError(f"{path}: no line with a step yet; train a little longer")
    return rows


def finished(cfg):
    """What to say of a run that is complete already, or "" for one that is not."""
    path = Path(cfg.out, "summary.json")
    with contextlib.suppress(OSError, ValueError):
        summary = json.loads(path.read_text(encoding="utf-8"))
        knn = f", k-NN {summary['knn']:.1f} %" if summary.get("knn") is not None else ""
        return (
            f"{cfg.out} is finished ({cfg.steps:,} steps{knn}): nothing to do; "
            "set out= for a new run"
        )
    return ""


def belongs_before(line, start):
    """Whether a line of the log was written by the steps before `start`, which are not repeated.

    k-NN evaluations and damaged images carry the number of the step that follows them.
    """
    return line["step"] < start or (line["step"] == start and "loss" in line)


def rounded(value):
    """Six digits are enough for a log, and json has no word for nan and inf but null."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def replace_text(path, text):
    """Write a text file whole or not at all."""
    aside = path.with_suffix(".part")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


# ---- at the start --------------------------------------------------------------------------------


def start_card(cfg, source, held_out, student, device, start):
    """Everything one asks before a long run, on one screen."""
    parts = {
        name: sum(p.numel() for p in part.parameters()) for name, part in student.named_children()
    }
    lr, world = scaled_lr(cfg.optim.lr, cfg.batch), ranks()[1]
    never = ", which it never reaches: optim.warmup is longer than the run"
    values = dinov2.start_values(cfg)
    attention = cfg.attention
    if attention == "auto":
        attention += f" ({fastest(device, dtype_of(cfg))})"
    labels = f", {len(source.classes)} classes" if source.classes else ", no labels"
    knn = "none, for want of labelled held-out images (data.val)"
    if held_out:
        knn = f"of {len(held_out[1]):,} held-out images among {len(held_out[0]):,} labelled ones"
    rows = {
        "device": f"{device} ({device_name(device)}), {NAMES[dtype_of(cfg)]}, "
        f"{world} process{'es' if world > 1 else ''}, parallel={cfg.parallel}, "
        f"attention={attention}",
        "images": f"{len(source):,} from {cfg.data.root}{labels}",
        "k-NN": knn,
        "network": f"{cfg.vit.size}/{cfg.vit.patch}: "
        + ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in parts.items())
        + " parameters",
        "teacher": f"{cfg.distill.teacher}, frozen; iBOT on {cfg.distill.tokens} patches",
        "batch": f"{cfg.batch} images x (2 crops of {cfg.crops.global_size} px + "
        f"{cfg.crops.local_count} of {cfg.crops.local_size} px)",
        "steps": f"{start:,} to {cfg.steps:,}, {cfg.steps * cfg.batch / len(source):.1f} epochs",
        "lr": f"{lr:.2e} at its peak (optim.lr={cfg.optim.lr:g} x sqrt({cfg.batch} / 1024))"
        + never * (cfg.optim.warmup > cfg.steps),
        "loss": "a healthy run starts near "
        + ", ".join(f"{name} {value:.3f}" for name, value in values.items())
        + f" (uniform over {cfg.head.prototypes:,}; ln K = {math.log(cfg.head.prototypes):.2f})",
        "output": f"{cfg.out}/ (log.jsonl, summary.json, teacher.pt, checkpoints/, pictures)",
    }
    if cfg.precision == "bf16" and not multiplies_bf16(device):
        rows["slow"] = "this device has no bf16 matrix products: precision=auto is far faster"
    if not cfg.distill.teacher:
        del rows["teacher"]
    if cfg.data.channels != 3:
        rows["note"] = f"{cfg.data.channels} channels: colour changes need RGB and are left out"
    title = f"nanoDINOv2 continues after step {start:,}" if start else "nanoDINOv2 starts"
    width = max(shutil.get_terminal_size((100, 24)).columns, 60)
    layout = textwrap.TextWrapper(
        width, subsequent_indent=" " * 11, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join([title] + [layout.fill(f"  {k:<9}{text}") for k, text in rows.items()])


def open_writers(cfg, start):
    """TensorBoard and Weights & Biases, where asked for: [(add a line of the log, close)].

    Raises UserError if the package is not installed.
    """
    writers = []
    if cfg.log.tensorboard:
        tensorboard = needed("torch.utils.tensorboard", "tensorboard", "log.tensorboard=true")
        # What an interrupted run wrote after its last checkpoint is done again: purged.
        board = tensorboard.SummaryWriter(cfg.out, purge_step=start + 1 if start else None)

        def add(line):
            for name, value in line.items():
                if isinstance(value, (int, float)):
                    board.add_scalar(name, value, line["step"])

        writers.append((add, board.close))
    if cfg.log.wandb:
        wandb = needed("wandb", "wandb", f"log.wandb={cfg.log.wandb}")
        try:
            run = wandb.init(project=cfg.log.wandb, dir=cfg.out, config=to_dict(cfg))
        except wandb.Error as error:
            text = f"log.wandb={cfg.log.wandb}: {error} Or set WANDB_MODE=offline"
            raise UserError(text) from None
        writers.append((lambda line: run.log(line, step=line["step"]), run.finish))
    return writers


def needed(module, package, key):
    """A module of a package that only this key needs."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{key} needs a package: pip install {package}") from None
