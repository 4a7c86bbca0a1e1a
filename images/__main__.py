"""Look at a data set before training on it, and bring it into a quicker form.

    python -m images index SOURCE                         count images and classes
    python -m images stats SOURCE [limit=10000]           sizes, mean and std, damaged images
    python -m images pack  SOURCE to=/shards [short=256]  into tar shards, shrunk if asked for
    python -m images show  SOURCE [to=crops.png]          crops and masks as the network gets them
SOURCE is a config file, or what data.root can be: a folder, a list, shards, an array, synthetic.
More words are keys of the config, as in data.channels=1 or data.workers=8 (--help of train.py).

  limit      stats: as many images, drawn at random; 0: all
  to         stats: a file for the list of damaged images; pack: a folder; show: a picture
  short      pack: pixels of the shorter side, of images that are larger; 0: all bytes as they are
  per_shard  pack: images in each tar file
A pack that was interrupted goes on where it was when the same command is given again.
"""

import io
import json
import os
import sys
import tarfile
from collections import Counter
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

import config
from config import UserError, replace_text
from data import Order
from images.evaluation import resize
from images.reader import reason
from images.sources import by_workers, counts, most_damaged, open_source, split_folder
from parallel import progress, warn

OPTIONS = {"limit": 0, "to": "", "short": 0, "per_shard": 10_000}
LEAST = {"limit": 0, "short": 0, "per_shard": 1}
SHOWN = 10  # damaged images that are named here; all are in a file if one is asked for


def parse(argv):
    """(config, options) from SOURCE and key=value words."""
    source = argv[0]
    options, overrides = config.take_options(argv[1:], OPTIONS, LEAST)
    if source.endswith((".yaml", ".yml")):
        return config.load(source, overrides), options
    cfg = config.Config(batch=8)
    cfg.data.workers = min(cfg.data.workers, os.cpu_count() or 1)
    cfg.data.root = source
    config.override(cfg, overrides)
    if len(cfg.data.mean) != cfg.data.channels:  # they are what `stats` is about to find out
        cfg.data.mean = cfg.data.std = (0.5,) * cfg.data.channels
    config.check(cfg)
    return cfg, options


def in_workers(task, numbers, cfg, what):
    """task(i) for each number, in order, worked out by the data workers, with a bar."""
    results = by_workers(numbers, cfg, batch_size=None, collate_fn=task)
    return progress(results, desc=what, total=len(numbers), unit=" images")


# ---- index --------------------------------------------------------------------------------------


def show_index(cfg, options):
    source = open_source(cfg.data.root, cfg)
    print(f"{len(source):,} images in {split_folder(cfg.data.root, 'train')}")
    print_left_out(source)
    none, *count = np.bincount(np.asarray(source.labels) + 1, minlength=len(source.classes) + 1)
    if not count:
        print("no labels")
        return
    named = [f"{name} {n:,}" for name, n in zip(source.classes, count, strict=True)]
    named = named[:20] + ["..."] * (len(named) > 20)
    print(f"{len(count):,} classes of {min(count):,} to {max(count):,} images: {', '.join(named)}")
    print(f"{none:,} images without a class" if none else "every image has a class")


def print_left_out(source):
    if source.left_out:
        print(f"left out: {counts(source.left_out)}")


# ---- stats --------------------------------------------------------------------------------------


def measure(source, i):
    """(shorter side, kind of values, mean, variance) of one image; one line if it is damaged."""
    try:
        image = source.read(i)
    except Exception as error:
        return f"{source.name(i)}: {reason(error)}"
    values = resize(image, *image.shape[:2])  # as it is; more than 8 bits become 0..1
    values = values.reshape(-1, values.shape[2]) / (255 if values.dtype == np.uint8 else 1)
    mean = values.mean(0, np.float64)
    variance = np.square(values - np.float32(mean)).mean(0, np.float64)
    return min(image.shape[:2]), str(image.dtype), mean, variance


def show_stats(cfg, options):
    """Mean and std over all pixels, where each image counts the same, large or small."""
    source = open_source(cfg.data.root, cfg)
    n, order = min(options.limit or len(source), len(source)), Order(len(source), seed=0)
    numbers = sorted(order[p] for p in range(n))
    results = list(in_workers(partial(measure, source), numbers, cfg, "measuring"))
    damaged = [result for result in results if isinstance(result, str)]
    good = [result for result in results if not isinstance(result, str)]
    kinds = Counter(kind for _, kind, *_ in good)
    print(f"images    {n:,}, {', '.join(f'{count:,} {kind}' for kind, count in kinds.items())}")
    print_left_out(source)
    if good:
        sides, _, means, variances = zip(*good, strict=True)
        mean, std = (
            np.mean(means, axis=0),
            np.sqrt(np.mean(variances, axis=0) + np.var(means, axis=0)),
        )
        low, middle, high = np.quantile(sides, (0, 0.5, 1)).astype(int)
        print(f"size      shorter side {low} to {high} px, median {middle}")
        print(f"channels  data.channels={len(mean)}")
        print(f"colour    data.mean={mean.round(4).tolist()} data.std={std.round(4).tolist()}")
    print(f"damaged   {len(damaged):,}" + (f", named in {options.to}" if options.to else ""))
    if options.to:
        with config.writing(options.to):
            replace_text(options.to, "".join(f"{line}\n" for line in damaged))
    else:
        more = [f"and {len(damaged) - SHOWN:,} more; to=damaged.txt lists them all"]
        for line in damaged[:SHOWN] + more * (len(damaged) > SHOWN):
            print(f"          {line}")
    if len(damaged) > most_damaged(cfg, n):
        print(f"a run would stop: that is more than data.max_damaged={cfg.data.max_damaged:g}")


# ---- pack ---------------------------------------------------------------------------------------


def show_pack(cfg, options):
    if not options.to:
        raise UserError("pack: where to? give a folder, as in to=/data/shards")
    source, folder = open_source(cfg.data.root, cfg), Path(options.to)
    plan = {"source": os.path.abspath(cfg.data.root), "images": len(source)}
    plan |= {key: getattr(options, key) for key in ("short", "per_shard")}
    plan, plan_file = json.dumps(plan, indent=1), folder / "pack.json"
    with config.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()) and not (plan_file.exists() and plan_file.read_text() == plan):
            raise UserError(f"{folder}: holds other things, or shards of other options (pack.json)")
        replace_text(plan_file, plan)
        if source.classes:
            replace_text(folder / "classes.txt", "".join(f"{name}\n" for name in source.classes))
        pack(source, folder, options.short, options.per_shard, cfg)
    packed = len(open_source(folder, cfg))
    print(f"{packed:,} of {len(source):,} images in {folder}; train with data.root={folder}")


def pack(source, folder, short, per_shard, cfg):
    """Write the shards that are not there yet, without damaged images.

    Image i goes to shard i // per_shard, in order: training on the shards sees the same images
    in the same order as training on the source.
    """
    for start in range(0, len(source), per_shard):
        path = folder / f"{start // per_shard:06d}.tar"
        if path.exists():
            continue
        numbers = range(start, min(start + per_shard, len(source)))
        with tarfile.open(path.with_suffix(".part"), "w") as tar:
            for found in in_workers(partial(sample, source, short), numbers, cfg, path.name):
                if isinstance(found, str):
                    warn(f"left out, damaged: {found}")
                    continue
                for name, data in found:
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        os.replace(path.with_suffix(".part"), path)


def sample(source, short, i):
    """[(name in the shard, bytes)] of an image and its class; one line if it is damaged."""
    path = PurePosixPath(source.name(i))
    ending = path.suffix.lower()
    folders = [part for part in path.parts[:-1] if part not in ("/", "..")]
    # The key of a sample ends at the first dot. The number keeps a.jpg and a.png apart.
    key = "/".join([*folders, f"{path.stem.replace('.', '_')}-{i:08d}"])
    try:
        data = source.data(i)
        image = source.read(i) if short or data is None else None
    except Exception as error:
        return f"{path}: {reason(error)}"
    large = short and min(image.shape[:2]) > short
    if large or data is None:
        image = shrunk(image, short) if large else image
        ending, data = encode(image, jpeg=ending in (".jpg", ".jpeg", ".jfif"))
    label = [(f"{key}.cls", str(source.label(i)).encode())] if source.label(i) >= 0 else []
    return [(key + ending, data), *label]


def shrunk(image, short):
    """A larger image with a shorter side of `short`, of the same kind of values."""
    height, width = image.shape[:2]
    scale, kind = short / min(height, width), image.dtype
    image = resize(image, round(height * scale), round(width * scale))
    if kind != image.dtype and kind.kind in "ui":  # resized in 0..1
        image = (image.clip(-1, 1) * np.iinfo(kind).max).round().astype(kind)
    return image


def encode(image, jpeg):
    """(ending, bytes): a photograph stays a JPEG (quality 95), the rest loses nothing."""
    file = io.BytesIO()
    if image.dtype != np.uint8 or image.shape[2] not in (1, 3, 4):
        np.save(file, image)
        return ".npy", file.getvalue()
    picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    if jpeg and image.shape[2] != 4:
        picture.save(file, "JPEG", quality=95)
        return ".jpg", file.getvalue()
    picture.save(file, "PNG")
    return ".png", file.getvalue()


# ---- show ---------------------------------------------------------------------------------------


def show_crops(cfg, options):
    from pictures.history import draw_crops  # brings the network along, which nothing else needs

    path = Path(options.to or "crops.png")
    draw_crops(open_source(cfg.data.root, cfg), cfg, path)
    print(f"see {path}")


COMMANDS = {"index": show_index, "stats": show_stats, "pack": show_pack, "show": show_crops}


@config.report_errors
def main(argv):
    if len(argv) < 2 or {"-h", "--help"} & set(argv):
        print(__doc__)
        sys.exit(0 if {"-h", "--help"} & set(argv) else 2)
    if argv[0] not in COMMANDS:
        raise UserError(f"unknown command {argv[0]}: use one of {', '.join(COMMANDS)}")
    COMMANDS[argv[0]](*parse(argv[1:]))


if __name__ == "__main__":
    main(sys.argv[1:])
