"""What people see of a run: the start card, a live line, log.jsonl, warnings, summary, pictures.

Only rank 0 prints and writes. Losses stay on the device between reports, so that the loop never
waits for a number that nobody reads.
"""

import json
import math
import platform
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import data
import dinov2
import eval_knn
import visualize
from augment import colour
from config import UserError, dump
from optim import scaled_lr
from parallel import materialize, sum_over_ranks
from vit import load_backbone

K_REPORTED = 20  # the `knn` of log and summary; the other k are in the summary


class Reporter:
    """Follows a run from its first to its last step."""

    def __init__(self, cfg, source, student, device, rank, world, start):
        self.cfg, self.device, self.rank, self.world = cfg, device, rank, world
        self.out, self.images = Path(cfg.out), len(source)
        self.bad, self.warned, self.writers = set(), set(), []
        self.waited, self.last = 0.0, (start, time.time())
        self.seconds_before = 0.0
        if rank == 0:
            self.open_folder(start)
            print(start_card(cfg, source, student, device, world, start), flush=True)
            if cfg.log.pictures and start == 0:
                draw_crops(source, cfg, self.out / "crops.png")
        live = rank == 0 and sys.stderr.isatty()
        self.bar = tqdm(
            total=cfg.steps, initial=start, unit="step", disable=not live, smoothing=0.05
        )

    def open_folder(self, start):
        """Make the run folder; a log that is ahead of the checkpoint goes back to it."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            dump(self.cfg, self.out / "config.yaml")
            path = self.out / "log.jsonl"
            lines = visualize.read_log(path) if path.exists() else []
            lines = [line for line in lines if line["step"] < start or line["step"] == start > 0]
            self.seconds_before = max((line.get("seconds", 0.0) for line in lines), default=0.0)
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
            self.log = path.open("a", buffering=1)  # line by line: a kill loses at most one
        except OSError as error:
            raise UserError(f"out={self.cfg.out}: cannot be written ({error.strerror})") from None
        self.writers = open_writers(self.cfg)
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
        values = torch.stack([torch.as_tensor(v, device=self.device).float() for v in log.values()])
        values = (sum_over_ranks(values) / self.world).tolist()  # one wait, one reduction
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
            "memory_gb": memory(self.device),
            "seconds": self.seconds(),
        }
        self.waited, self.last = 0.0, (done, time.time())
        self.write(line)
        self.show(line)
        self.warn_of_collapse(line)

    def evaluation(self, step, result):
        """A k-NN evaluation of the teacher before `step`."""
        if self.rank == 0 and result:
            line = {
                "step": step,
                "images": step * self.cfg.batch,
                **result,
                "seconds": self.seconds(),
            }
            self.write(line)
            text = "   ".join(f"{name} {value:.1f} %" for name, value in result.items())
            self.say(f"step {step}: {text}")
        self.last, self.waited = (step, time.time()), 0.0  # not the loop's time

    def skipped(self, names):
        """Damaged images that a batch had to replace; too many of them stop the run."""
        new = [name for name in names if name not in self.bad]
        self.bad.update(new)
        for name in new:
            if self.rank == 0:
                self.say(f"warning: damaged image skipped ({len(self.bad)} so far): {name}")
                self.write({"step": self.last[0], "skipped": name})
        if len(self.bad) > 0.01 * self.images:
            raise UserError(
                f"{len(self.bad)} of {self.images} images are damaged, more than 1 %: "
                f"they are named in {self.out / 'log.jsonl'}; mend or remove them"
            )

    def close(self, message):
        """Last words."""
        self.bar.close()
        for writer in self.writers:
            writer.close()
        if self.rank == 0:
            print(message, flush=True)

    # ---- where it goes ----

    def seconds(self):
        """Training time so far, earlier parts of an interrupted run included."""
        return round(self.seconds_before + time.time() - self.began, 1)

    def write(self, line):
        line = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in line.items()}
        try:
            self.log.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(
                f"{self.out / 'log.jsonl'}: cannot be written ({error.strerror})"
            ) from None
        for writer in self.writers:
            writer.add(line)

    def say(self, text):
        """A line of text that does not tear the progress line."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def show(self, line):
        """The live line; without a terminal, a line of text every `log.every` steps."""
        terms = " ".join(
            f"{k} {line[k]:.3f}"
            for k in ("dino_global", "dino_local", "ibot", "koleo")
            if k in line
        )
        text = (
            f"{line['images']:,} images  loss {line['loss']:.3f} ({terms})  "
            f"{line['images_per_second']:.0f} img/s  data wait {line['data_wait']:.0%}  "
            f"{line['memory_gb']:.1f} GB  lr {line['lr']:.1e}"
        )
        done = line["step"]
        if self.bar.disable:
            left = (self.cfg.steps - done) * self.cfg.batch / line["images_per_second"]
            self.say(f"step {done}/{self.cfg.steps}  {text}  ETA {tqdm.format_interval(left)}")
        else:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(done - self.bar.n)

    def warn_of_collapse(self, line):
        """Say so once, in plain words, when the signs of health point to a collapse."""
        if line["step"] < self.cfg.optim.warmup or "rankme" not in line:
            return
        uniform = 0.999 * math.log(self.cfg.head.prototypes)
        signs = [
            (
                line["rankme"] < 2,
                "all images look alike to the teacher (rankme {rankme:.2f}): "
                "raise loss.koleo or lower optim.lr",
            ),
            (
                line["prototypes_used"] < 0.01,
                "the teacher puts every image on the same few prototypes (share used "
                "{prototypes_used:.4f}): use loss.centering=sinkhorn",
            ),
            (
                line["teacher_entropy"] > uniform,
                "the teacher's targets are uniform (entropy {teacher_entropy:.2f} nats): "
                "lower teacher.temp",
            ),
        ]
        for ill, text in signs:
            if ill and text not in self.warned:
                self.warned.add(text)
                self.say("warning: collapse? " + text.format(**line))


# ---- at the start --------------------------------------------------------------------------------


def start_card(cfg, source, student, device, world, start):
    """Everything one asks before a long run, on one screen."""
    parts = {
        name: sum(p.numel() for p in part.parameters()) for name, part in student.named_children()
    }
    lr = scaled_lr(cfg.optim.lr, cfg.batch)
    values = dinov2.start_values(cfg)
    labels = f", {len(source.classes)} classes" if source.classes else ", no labels"
    rows = {
        "device": f"{device} ({device_name(device)}), {cfg.precision}, {world} process(es), "
        f"parallel={cfg.parallel}, attention={cfg.attention}",
        "images": f"{len(source):,} from {cfg.data.root}{labels}",
        "network": f"{cfg.vit.size}/{cfg.vit.patch}: "
        + ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in parts.items())
        + " parameters",
        "batch": f"{cfg.batch} images x (2 crops of {cfg.crops.global_size} px + "
        f"{cfg.crops.local_count} of {cfg.crops.local_size} px)",
        "steps": f"{start:,} to {cfg.steps:,}, {cfg.steps * cfg.batch / len(source):.1f} epochs",
        "lr": f"{lr:.2e} at its peak (optim.lr={cfg.optim.lr:g} x sqrt({cfg.batch} / 1024))",
        "loss": "a healthy run starts near "
        + ", ".join(f"{name} {value:.3f}" for name, value in values.items())
        + f" (uniform over {cfg.head.prototypes:,}; ln K = {math.log(cfg.head.prototypes):.2f})",
        "output": f"{cfg.out}/ (log.jsonl, summary.json, teacher.pt, checkpoints/, pictures)",
    }
    if cfg.data.channels != 3:
        rows["note"] = f"{cfg.data.channels} channels: colour changes need RGB and are left out"
    title = "continues" if start else "starts"
    return f"nanoDINOv2 {title}\n" + "\n".join(f"  {name:<9}{text}" for name, text in rows.items())


def device_name(device):
    """The product behind a torch.device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def memory(device):
    """Peak memory so far in GB: of the GPU, or of this process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def open_writers(cfg):
    """TensorBoard and Weights & Biases, where asked for. Raises UserError if not installed."""
    writers = []
    if cfg.log.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("log.tensorboard=true: pip install tensorboard") from None
        writers.append(TensorBoard(SummaryWriter(cfg.out)))
    if cfg.log.wandb:
        try:
            import wandb
        except ImportError:
            raise UserError("log.wandb: pip install wandb") from None
        from config import to_dict

        writers.append(WandB(wandb.init(project=cfg.log.wandb, dir=cfg.out, config=to_dict(cfg))))
    return writers


class TensorBoard:
    """Sends each number of a log line to TensorBoard."""

    def __init__(self, writer):
        self.writer = writer

    def add(self, line):
        for name, value in line.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, line["step"])

    def close(self):
        self.writer.close()


class WandB:
    """Sends each log line to Weights & Biases."""

    def __init__(self, run):
        self.run = run

    def add(self, line):
        self.run.log(line, step=line["step"])

    def close(self):
        self.run.finish()


# ---- evaluation, summary, pictures ---------------------------------------------------------------


def evaluate(backbone, held_out, cfg, device, floors=False):
    """k-NN accuracy of the backbone; with floors (at step 0) also of raw pixels.

    At step 0 the backbone is a random network, which is the other floor.
    """
    if held_out is None:
        return {}
    scores = eval_knn.evaluate(backbone, held_out, cfg, device)
    result = {"knn": scores.get(f"knn_{K_REPORTED}", next(iter(scores.values())))}
    if floors:
        pixels = eval_knn.evaluate(eval_knn.RawPixels(), held_out, cfg, device)
        result["knn_random"] = result["knn"]
        result["knn_pixels"] = pixels.get(f"knn_{K_REPORTED}", next(iter(pixels.values())))
    return result


def final_report(report, backbone, source, held_out, cfg, device):
    """After the last step: k-NN with every k, summary.json, and the pictures of the run."""
    scores = eval_knn.evaluate(backbone, held_out, cfg, device) if held_out else {}
    if report.rank:
        return
    knn = scores.get(f"knn_{K_REPORTED}")
    seconds = report.seconds()
    report.evaluation(cfg.steps, {"knn": knn} if held_out else {})
    lines = visualize.read_log(report.out / "log.jsonl")
    first = next((line for line in lines if "knn_random" in line), {})
    summary = {
        "knn": knn,
        "knn_random": first.get("knn_random"),
        "knn_pixels": first.get("knn_pixels"),
        "images": cfg.steps * cfg.batch,
        "seconds": seconds,
        "steps": cfg.steps,
        "skipped_images": sum("skipped" in line for line in lines),
        **scores,
        "device": f"{device} ({device_name(device)})",
        "torch": torch.__version__,
    }
    (report.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    if cfg.log.pictures:
        visualize.curves(report.out)
        draw_pca(held_out[1] if held_out else source, cfg, report.out / "pca.png")
    text = f"done: {summary['images']:,} images in {seconds:.0f} s"
    if held_out:
        text += (
            f"; k-NN {knn:.1f} % (random network {summary['knn_random']:.1f} %, "
            f"raw pixels {summary['knn_pixels']:.1f} %)"
        )
    report.close(
        f"{text}\nsee {report.out}/: summary.json, curves.png, crops.png, pca.png, teacher.pt"
    )


def draw_crops(source, cfg, path, count=4):
    """The first images of the run, as the network will see them."""
    dataset = data.Dataset(source, cfg)
    batch = data.collate([dataset[position] for position in range(cfg.batch)], cfg)
    order = [dataset.order[position] for position in range(min(count, cfg.batch))]
    images = [data.read_or_next(source, index)[0] for index in order]
    mean, std = cfg.data.mean, cfg.data.std
    large = colour(batch.global_crops, batch.global_colour, mean, std).unflatten(0, (2, -1))
    small = colour(batch.local_crops, batch.local_colour, mean, std).unflatten(0, (-1, cfg.batch))
    masks = batch.masks.unflatten(0, (2, -1))
    rows = [[x[:, i] for i in range(len(images))] for x in (large, small, masks)]
    visualize.crop_sheet(images, *rows, mean, std, path)


def draw_pca(source, cfg, path, count=8):
    """PCA colours of images spread over a source, by the network before and after training."""
    with torch.device("meta"):
        untrained = dinov2.build_network(cfg, student=False)
    materialize(untrained, "cpu", cfg.seed)
    networks = {"random network": untrained.backbone.eval(), "trained": load_backbone(cfg.out)}
    count = min(count, len(source))
    images = [data.read_or_next(source, i * len(source) // count)[0] for i in range(count)]
    columns = [
        (
            f"PCA of patch features, {name}",
            [visualize.patch_features(net, image, cfg.data.mean, cfg.data.std) for image in images],
        )
        for name, net in networks.items()
    ]
    visualize.pca_sheet(images, columns, path)
