"""Every number of a run: typed, documented once, checked before anything starts.

A run is configured by one yaml file and by `key=value` words after it on the command line:
    torchrun train.py config.yaml out=runs/x optim.lr=1e-3
A yaml section is one dataclass below. The defaults are those of the official ViT-L/16 short set-up
(ssl_default_config.yaml), so a yaml only says what is different. The comment behind a field (unit,
what it does, what to try) is also what `--help` prints (config.py): it is read from this source.
A file that is wrong raises UserError: one line, with the key, what is wrong and what to do.
"""

import contextlib
import difflib
import functools
import inspect
import json
import math
import os
import re
import sys
import time
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import get_origin

import yaml


class UserError(Exception):
    """What the user gave cannot work. The message is one line that names the fix."""


class RankError(UserError):
    """A UserError that one of several processes meets alone; the others all have the same one."""


@contextlib.contextmanager
def writing(what, fix="choose another place"):
    """Make an OSError of the lines inside (a full disk, no permission) a UserError with a fix."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{what}: cannot be written ({reason}); {fix}") from None


def replace_text(path, text):
    """Write a text file whole or not at all."""
    aside = Path(f"{path}.{os.getpid()}.part")
    aside.write_text(text, encoding="utf-8", errors="surrogateescape")  # names in any encoding
    os.replace(aside, path)


Pair = tuple[float, float]
Triple = tuple[float, float, float]
Floats = tuple[float, ...]
Words = tuple[str, ...]
NUMBERS = (int, float, Pair, Triple, Floats)
Switch = bool | str  # true, false or auto


@dataclass
class Data:
    root: str = ""  # folder of images (sub-folders are labels), or "synthetic": made in memory
    val: str = ""  # folder of labelled images for k-NN; empty: root/val or root/test if there
    workers: int = 8  # processes per rank that read and crop images; 0: the training process
    mean: Floats = (0.485, 0.456, 0.406)  # subtracted per channel, of values 0..1 (ImageNet's)
    std: Floats = (0.229, 0.224, 0.225)  # divided by, per channel; one number per channel
    channels: int = 3  # of the images: 1 grey, 3 RGB, more for other sensors
    max_damaged: float = 0.01  # share of damaged images at which a run stops, if they are above 20
    max_pixels: int = 178_956_970  # width x height of a picture, above it is damaged; 0: no limit
    synthetic_images: int = 8000  # size of the embedded set; a fourth as many are held out


@dataclass
class Crops:
    global_size: int = 224  # px, the two large crops; a multiple of vit.patch
    global_scale: Pair = (0.32, 1.0)  # share of the image's area a large crop covers
    local_count: int = 8  # small crops per image; fewer is faster, 0: global crops only
    local_size: int = 96  # px; a multiple of vit.patch (98 for patches of 14)
    local_scale: Pair = (0.05, 0.32)  # share of the area; raise it if objects are small
    ratio: Pair = (0.75, 1.3333)  # width / height before resizing to a square


@dataclass
class Augment:
    flip: float = 0.5  # probability of a left-right flip; 0 where left and right differ in meaning
    jitter: float = 0.8  # probability of the four colour changes below, in random order
    brightness: float = 0.4  # factor from 1 - this to 1 + this
    contrast: float = 0.4  # the same
    saturation: float = 0.2  # the same
    hue: float = 0.1  # shift, as a share of the colour circle, at most 0.5
    grey: float = 0.2  # probability of losing all colour
    blur: Triple = (0.0, 0.9, 0.5)  # probability in: first global, second global, local crops
    # (the released code's names say 1.0, 0.1, 0.5; these are the ones that take effect)
    blur_sigma: Pair = (0.1, 2.0)  # px, width of the blur
    solarize: Triple = (0.0, 0.2, 0.0)  # probability of inverting the bright half, per kind of crop


@dataclass
class Mask:
    probability: float = 0.5  # share of the global crops that hide patches from the student
    ratio: Pair = (0.1, 0.5)  # share of patches hidden, spread evenly over the masked crops


@dataclass
class Vit:
    size: str = "large"  # pico, nano, micro, tiny (our own), small, base, large, giant2
    patch: int = 16  # px; smaller sees finer and costs more (14 in the released models)
    registers: int = 0  # extra tokens that take up global notes: 4 makes attention maps clean
    ffn: str = ""  # mlp or swiglu; empty: the size's own
    drop_path: float = 0.3  # share of images that skip a block; 0 if small, 0.4 for giant2
    drop_path_uniform: bool = True  # the same share in every block; false: growing with depth
    layerscale: float = 1e-5  # initial weight of each block's branch; 0: no LayerScale
    interpolate_offset: float = 0.1  # patches, added when resizing positions; 0 for register models
    interpolate_antialias: bool = False  # when resizing positions; true for register models
    init_std: float = 0.02  # of linear weights; 0: 1 / sqrt(inputs), which narrow networks need


@dataclass
class Head:
    prototypes: int = 65536  # outputs of the DINO head; 64 to 256 for small data sets
    hidden: int = 2048  # width of the head's layers
    bottleneck: int = 256  # width before the prototypes
    layers: int = 3  # linear layers up to the bottleneck
    norm_last_layer: bool = False  # true: the prototypes' gains stay 1 (DINO's larger networks)
    separate: bool = False  # true: iBOT has its own head (giant2); false: shares the DINO head
    ibot_prototypes: int = 0  # of a separate iBOT head; 0: as prototypes
    ibot_bottleneck: int = 0  # of a separate iBOT head; 0: as bottleneck


@dataclass
class Loss:
    dino: float = 1.0  # weight of the image-level loss; 0 leaves it out
    ibot: float = 1.0  # weight of the masked-patch loss; 0 leaves it out
    koleo: float = 0.1  # weight of spreading the features apart; 0 leaves it out
    koleo_all_ranks: bool = False  # true: nearest neighbour over all processes, not only this one
    centering: str = "softmax"  # of the teacher: softmax (running centre) or sinkhorn (balanced)
    student_temp: float = 0.1  # temperature of the student's softmax
    center_momentum: float = 0.9  # of the running centre (softmax only)


@dataclass
class Teacher:
    momentum: float = 0.992  # per step: teacher = m * teacher + (1 - m) * student; short runs 0.98
    momentum_end: float = 1.0  # reached by a cosine over the run
    temp: float = 0.07  # temperature of the teacher's softmax, below student_temp
    temp_start: float = 0.04  # at step 0; sharper at first
    temp_warmup: int = 37500  # steps from temp_start to temp, in a line


@dataclass
class Optim:
    lr: float = 0.004  # peak, for 1024 images a step; scaled by sqrt(batch / 1024), see start
    min_lr: float = 1e-6  # at the end of the cosine, if below its peak; not scaled
    warmup: int = 12500  # steps from 0 to the peak, about a tenth of the run
    weight_decay: float = 0.04  # at the start; not of biases, norms and LayerScale
    weight_decay_end: float = 0.4  # at the end of its cosine; 0.2 for giant2
    clip: float = 3.0  # largest gradient norm of what clip_by says; 0: no clipping
    clip_by: str = "part"  # part: backbone and heads apart; parameter: each alone (DINO, iBOT)
    layer_decay: float = 0.9  # lr times this per layer below the last norm; 1: off (giant2)
    patch_embed_lr: float = 0.2  # factor on the lr of the patch embedding
    freeze_last_layer: int = 1250  # steps at the start in which prototypes do not move
    freeze_by: str = "lr"  # lr: they gather Adam's moments; gradient: they have none (DINO, iBOT)
    betas: Pair = (0.9, 0.999)  # AdamW's averages of gradient and squared gradient
    freeze_backbone: bool = False  # true: only the heads are trained


@dataclass
class Distill:
    teacher: str = ""  # for distill.py: run folder, file or released name of what teaches
    students: Words = ()  # sizes taught at once, each in a folder below out; empty: vit.size in out
    tokens: str = "all"  # patches in the iBOT loss: all, or masked (those that mask.* picks)


@dataclass
class Log:
    every: int = 10  # steps between lines of progress
    knn: bool = True  # k-NN before the first step, on the way and at the end; false: none at all
    knn_every: int = 12500  # steps between k-NN evaluations; 0: only at the start and the end
    knn_images: int = 0  # at most so many training and so many held-out images for it; 0: all
    save_every: int = 3750  # steps between checkpoints, of which the last two are kept
    keep_every: int = 0  # steps between teachers that are kept, as out/teachers/*.pt; 0: none
    pictures: bool = True  # curves, crops and neighbours in the run folder
    tensorboard: bool = False  # also write TensorBoard files (pip install tensorboard)
    wandb: str = ""  # project: also send the log to Weights & Biases (pip install wandb); empty: no


@dataclass
class Config:
    """A run: what concerns the whole of it, and a section for each of its parts."""

    out: str = "runs/default"  # folder where everything of the run is written
    seed: int = 0  # same seed, same images, crops, masks and weights
    steps: int = 125000  # length of the run; every schedule is a function of the step
    batch: int = 2048  # images per step, over all processes
    precision: str = "auto"  # of activations: fp32, bf16, fp16 (old GPUs); auto: bf16 if fast
    device: str = "auto"  # auto, cpu, cuda or mps
    parallel: str = "none"  # none (one process), ddp (each has all weights), fsdp (weights split)
    attention: str = "auto"  # auto, xformers, sdpa, varlen or plain; auto takes the fastest
    activation_checkpointing: str = "none"  # none, selective or full: compute again, save memory
    compile: Switch = "auto"  # torch.compile: slow first step, faster ones; auto: on NVIDIA GPUs
    accumulate: int = 1  # parts in which a process works through its images, to save memory
    init_from: str = ""  # run folder, file or released name (dinov2_vits14) to start from
    init_heads: bool = False  # also take the heads of init_from; false: fresh ones
    head_steps: int = 0  # first so many steps of fresh heads on the frozen backbone, in out/heads
    data: Data = field(default_factory=Data)
    crops: Crops = field(default_factory=Crops)
    augment: Augment = field(default_factory=Augment)
    mask: Mask = field(default_factory=Mask)
    vit: Vit = field(default_factory=Vit)
    head: Head = field(default_factory=Head)
    loss: Loss = field(default_factory=Loss)
    teacher: Teacher = field(default_factory=Teacher)
    optim: Optim = field(default_factory=Optim)
    distill: Distill = field(default_factory=Distill)
    log: Log = field(default_factory=Log)


# ---- reading ----------------------------------------------------------------------------------


def load(path, overrides=()):
    """The defaults, then the yaml file, then the overrides in order; checked."""
    if "=" in str(path) and not Path(path).exists():
        raise UserError(f"{path}: the config file comes first, as in config.yaml {path}")
    try:
        given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        reason = f"cannot be read ({error.strerror}); config.yaml is the default one"
        raise UserError(f"{path}: {reason}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or "it is not plain text"
        raise UserError(f"{path}{line}: not valid yaml ({reason}); compare config.yaml") from None
    cfg = from_dict({} if given is None else given, path)
    override(cfg, overrides)
    check(cfg)
    return cfg


def from_dict(given, source="config"):
    """A Config from nested dictionaries: yaml, or what to_dict() put in a checkpoint."""
    if not isinstance(given, dict):
        raise UserError(f"{source}: expected lines like `steps: 100`, got {shown(given)}")
    cfg = Config()
    for name, value in given.items():
        if is_dataclass(type_of(name)) and isinstance(value, (dict, type(None))):
            for key, inner in (value or {}).items():  # None: all its keys are commented out
                assign(cfg, f"{name}.{key}", inner, source)
        else:
            assign(cfg, str(name), value, source)
    return cfg


def override(cfg, words):
    """Apply `key=value` words of a command line, in order; the values are read as yaml."""
    for word in words:
        key, equals, text = word.partition("=")
        if word.startswith("-"):
            raise UserError(f"unknown option {word}: keys have no dashes, as in optim.lr=1e-3")
        if not equals or not key:
            raise UserError(f"cannot read {word!r}: write key=value, without spaces")
        assign(cfg, key, parsed(text, type_of(key)), f"override {word}")


def parsed(text, kind):
    """The text behind `key=` as yaml reads it; where text is expected, as it stands (out=2024)."""
    if kind is not str:
        with contextlib.suppress(yaml.YAMLError):
            return yaml.safe_load(text)
    return text


def type_of(key):
    """The type of a dotted key, or None where there is no such key."""
    kind = Config
    for name in str(key).split("."):
        kind = {f.name: f.type for f in fields(kind)}.get(name) if is_dataclass(kind) else None
    return kind


def assign(cfg, key, value, source):
    """Set one dotted key after comparing the value with the key's type."""
    kind = type_of(key)
    if kind is None:
        raise UserError(f"{source}: unknown key {key}; {nearest(key)}")
    section, _, name = key.rpartition(".")
    setattr(lookup(cfg, section) if section else cfg, name, convert(value, kind, key, source))


def nearest(key, options=()):
    """`did you mean ...`: options of the program first, then keys, by their last part too."""
    keys = {name.rpartition(".")[2]: name for name, _ in reversed(documented())}
    keys |= {name: name for name, _ in documented()}
    for known in {name: name for name in options}, keys:
        for word in (key, key.rpartition(".")[2]):
            for close in difflib.get_close_matches(word, known, n=1, cutoff=0.75):
                return f"did you mean {known[close]}?"
    return "--help lists them all"


EXPECTED = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    Switch: "true, false or auto",
    str: "text",
    Pair: "two numbers [a, b]",
    Triple: "three numbers [a, b, c]",
    Floats: "a list of numbers",
    Words: "a list of words",
}


def convert(value, kind, key, source):
    """The value as `kind`, or UserError. Whole numbers serve as numbers; true and false do not."""
    if kind is float and isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)  # PyYAML reads 1e-6, without a dot, as text
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if kind is str and type(value) is str:
        return os.path.expanduser(value)  # ~/photos, in whatever key
    if kind in (int, bool) and type(value) is kind:
        return value
    if kind is Switch and (type(value) is bool or value == "auto"):
        return value
    if get_origin(kind) is tuple and isinstance(value, (list, tuple)):
        each, *others = kind.__args__
        if others == [...] or len(value) == 1 + len(others):
            return tuple(convert(v, each, f"{key}[{i}]", source) for i, v in enumerate(value))
    expected = EXPECTED.get(kind) or f"a section with keys such as {key}.{fields(kind)[0].name}"
    raise UserError(f"{source}: {key} must be {expected}, got {shown(value)}")


def shown(value):
    """A value as one would write it in the yaml file."""
    value = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).split("\n")[0]


# ---- checking ---------------------------------------------------------------------------------

CHOICES = {
    "precision": ("auto", "fp32", "bf16", "fp16"),
    "device": ("auto", "cpu", "cuda", "mps"),
    "parallel": ("none", "ddp", "fsdp"),
    "attention": ("auto", "xformers", "sdpa", "varlen", "plain"),
    "activation_checkpointing": ("none", "selective", "full"),
    "loss.centering": ("softmax", "sinkhorn"),
    "optim.clip_by": ("part", "parameter"),
    "optim.freeze_by": ("lr", "gradient"),
    "distill.tokens": ("all", "masked"),
}

# All numbers but data.mean are at least 0. A list of numbers is checked one by one.
# must be      if within      keys
BOUNDS = [
    ("at least 1", (1, math.inf), """steps batch accumulate data.channels crops.global_size
        crops.local_size vit.patch head.prototypes head.hidden head.bottleneck head.layers
        log.every log.save_every"""),
    ("at least 48", (48, math.inf), "data.synthetic_images"),  # 12 held out: one of each class
    ("above 0", (1e-12, math.inf), """data.std crops.ratio augment.blur_sigma loss.student_temp
        teacher.temp teacher.temp_start"""),
    ("above 0 and at most 1", (1e-12, 1), "crops.global_scale crops.local_scale optim.layer_decay"),
    ("from 0 to 1", (0, 1), """augment.flip augment.jitter augment.grey augment.blur
        augment.solarize mask.probability mask.ratio loss.center_momentum teacher.momentum
        teacher.momentum_end data.max_damaged"""),
    ("from 0 to 0.5", (0, 0.5), "augment.hue"),
    ("at least 0 and below 1", (0, 1 - 1e-9), "vit.drop_path optim.betas"),
]  # fmt: skip

ORDERED = "crops.global_scale crops.local_scale crops.ratio augment.blur_sigma mask.ratio"


def check(cfg):
    """Raise UserError for what cannot work, before anything starts."""
    get = functools.partial(lookup, cfg)
    for key, choices in CHOICES.items():
        if get(key) not in choices:
            raise UserError(f"{key}={get(key)} is unknown: use one of {', '.join(choices)}")
    numbers = [key for key, _ in documented() if type_of(key) in NUMBERS and key != "data.mean"]
    for rule, (least, most), keys in [*BOUNDS, ("at least 0", (0, math.inf), " ".join(numbers))]:
        for key in keys.split():
            values = get(key) if isinstance(get(key), tuple) else [get(key)]
            if not all(least <= value <= most for value in values):
                raise UserError(f"{key} must be {rule}, got {shown(get(key))}")
    for key in ORDERED.split():
        low, high = get(key)
        if low > high:
            raise UserError(f"{key} must run from small to large: write [{high}, {low}]")
    for key in ["data.mean", "data.std"]:
        if len(get(key)) != cfg.data.channels:
            per = f"must have one number per channel (data.channels={cfg.data.channels})"
            raise UserError(f"{key}={shown(get(key))} {per}")
    for key in ["crops.global_size"] + ["crops.local_size"] * (cfg.crops.local_count > 0):
        size, patch = get(key), cfg.vit.patch
        if size % patch:
            fix = max(round(size / patch), 1) * patch
            raise UserError(f"{key}={size} is not a multiple of vit.patch={patch}: use {fix}")
    if not cfg.out:
        raise UserError("out is empty: set it to a folder, such as out=runs/default")
    if cfg.loss.dino == cfg.loss.ibot == cfg.loss.koleo == 0:
        raise UserError("loss.dino, loss.ibot and loss.koleo are all 0: set one above 0")
    if cfg.init_heads and not cfg.init_from:
        raise UserError("init_heads=true has no file to take heads from: set init_from")
    if cfg.head_steps and (cfg.init_heads or not (cfg.init_from or cfg.distill.teacher)):
        raise UserError(f"head_steps={cfg.head_steps} trains fresh heads on given weights: "
                        "set init_from and init_heads=false, or head_steps=0")  # fmt: skip
    if (cfg.head.ibot_prototypes or cfg.head.ibot_bottleneck) and not cfg.head.separate:
        raise UserError("head.ibot_prototypes and head.ibot_bottleneck need head.separate=true")


def lookup(cfg, key):
    return functools.reduce(getattr, key.split("."), cfg)


# ---- writing and explaining -------------------------------------------------------------------


def to_dict(cfg):
    """Plain dictionaries and lists: safe in yaml, in json and in a weights_only checkpoint."""
    return json.loads(json.dumps(asdict(cfg)))


def dump(cfg, path):
    """Write the resolved config, every key included, so that a run folder explains itself."""
    text = yaml.safe_dump(to_dict(cfg), sort_keys=False, default_flow_style=None)
    with writing(path, "set out=..."):
        Path(path).write_text(text, encoding="utf-8")


@functools.cache
def documented():
    """(key, comment) of every key in order, read from the source above, so it cannot go stale."""
    rows = []
    for section in [Config] + [f.type for f in fields(Config) if is_dataclass(f.type)]:
        prefix = "" if section is Config else f"{section.__name__.lower()}."
        found = re.findall(r"^    (\w+): .+?  # (.+)", inspect.getsource(section), re.MULTILINE)
        rows += [(prefix + name, comment) for name, comment in found]
    return rows


# ---- command line -----------------------------------------------------------------------------


def main_arguments(argv, usage, keys=("",)):
    """(first word, the others) of the command line. No words: prints the usage; --help: also keys.

    keys  how the keys begin that --help explains
    """
    if not argv:
        print(usage.strip("\n") + "\n(--help also explains the keys)")
        sys.exit(2)
    if "-h" in argv or "--help" in argv:
        print(help_text(usage, keys))
        sys.exit(0)
    return os.path.expanduser(argv[0]), argv[1:]


def help_text(usage, keys=("",)):
    """What --help prints: usage, examples, and every such key with its default and comment."""
    lines, before = [usage.strip("\n"), "", f"{'key':<28}{'default':<23}meaning"], ""
    for key, comment in documented():
        if key.startswith(keys):
            section = key.rpartition(".")[0]
            lines += [""] * (section != before)
            lines.append(f"  {key:<26}{shown(lookup(Config(), key)):<23}{comment}")
            before = section
    return "\n".join(lines)


def take_options(words, defaults, least=None):
    """A program's own options, by their defaults, out of key=value words: (namespace, the rest).

    least: the smallest values that options may have
    Raises UserError where a value is not of the default's type, or a word is almost an option.
    """
    options, rest = SimpleNamespace(**defaults), []
    for word in words:
        key, equals, text = word.partition("=")
        if equals and key in defaults:
            kind = type(defaults[key])
            setattr(options, key, convert(parsed(text, kind), kind, key, f"override {word}"))
        elif equals and type_of(key) is None and not os.path.exists(word):
            raise UserError(f"override {word}: unknown key {key}; {nearest(key, defaults)}")
        else:
            rest.append(os.path.expanduser(word))
    for key, value in (least or {}).items():
        if getattr(options, key, value) < value:
            raise UserError(f"{key}={getattr(options, key)} must be at least {value}")
    return options, rest


def report_errors(main):
    """Decorator of an entry point: a UserError becomes one line on stderr and exit code 2."""

    @functools.wraps(main)
    def run(*args, **kwargs):
        if hasattr(sys.stdout, "reconfigure"):  # names of files may be in any encoding
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            return main(*args, **kwargs)
        except UserError as error:
            text = " ".join(str(error).split())
            # What all processes of a run have to say is said once, by the first.
            if os.environ.get("RANK", "0") == "0" or isinstance(error, RankError):
                print(f"error: {text}", file=sys.stderr)
            if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
                # torchrun ends its own report of a failed process with this line.
                extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
                message = {"message": {"message": text, "extraInfo": extra}}
                Path(path).write_text(json.dumps(message))
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(130)

    return run


@report_errors
def check_command_line(usage):
    """Read and check `CONFIG.yaml key=value ...`: what is mistyped is refused before PyTorch,
    which takes seconds, is imported."""
    load(*main_arguments(sys.argv[1:], usage))
