"""Look at a data set before training on it, and bring it into a quicker form.

    python -m images stats SOURCE [limit=10000]           classes, sizes, mean, std, what is damaged
    python -m images pack  SOURCE to=/shards [short=256]  into tar shards, shrunk if asked for
    python -m images show  SOURCE [to=crops.png]          crops and masks as the network gets them
SOURCE is a config file, or what data.root can be: a folder, a list, shards, an array, synthetic.
More words are keys of the config, as in data.channels=1 or data.workers=8 (--help of train.py).

  limit      stats: of the pixels of as many images, drawn at random; 0: all
  to         pack: a new folder; show: a picture
  short      pack: pixels of the shorter side, of images that are larger; 0: all bytes as they are
  per_shard  pack: images in each tar file
"""

import io
import os
import sys
import tarfile
from collections import Counter
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

import config
from config import UserError
from images.evaluation import resize
from images.reader import reason
from images.sources import Files, by_workers, counts, most_damaged, open_source, split_folder
from parallel import progress, warn

OPTIONS = {"limit": 0, "to": "", "short": 0, "per_shard": 10_000}
LEAST = {"limit": 0, "short": 0, "per_shard": 1}


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


# ---- stats --------------------------------------------------------------------------------------


def show_classes(source):
    none, *count = np.bincount(np.asarray(source.labels) + 1, minlength=len(source.classes) + 1)
    if not count:
        print("classes   no labels")
        return
    named = [f"{name} {n:,}" for name, n in zip(source.classes, count, strict=True)]
    named = named[:20] + ["..."] * (len(named) > 20)
    sizes = f"{min(count):,} to {max(count):,} images"
    print(f"classes   {len(count):,} of {sizes}: {', '.join(named)}")
    if none:
        print(f"          {none:,} images without a class")


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
    print(f"images    {len(source):,} in {split_folder(cfg.data.root, 'train')}")
    if source.left_out:
        print(f"left out  {counts(source.left_out)}")
    show_classes(source)
    numbers = np.random.default_rng(0).permutation(len(source))[: options.limit or len(source)]
    numbers = np.sort(numbers).tolist()
    results = list(in_workers(partial(measure, source), numbers, cfg, "measuring"))
    damaged = [result for result in results if isinstance(result, str)]
    good = [result for result in results if not isinstance(result, str)]
    if good:
        sides, kinds, means, variances = zip(*good, strict=True)
        mean = np.mean(means, axis=0)
        std = np.sqrt(np.mean(variances, axis=0) + np.var(means, axis=0))
        low, middle, high = np.quantile(sides, (0, 0.5, 1)).astype(int)
        print(f"values    {', '.join(f'{n:,} {kind}' for kind, n in Counter(kinds).items())}")
        print(f"size      shorter side {low} to {high} px, median {middle}")
        print(f"colour    data.channels={len(mean)}", end=" ")
        print(f"data.mean={mean.round(4).tolist()} data.std={std.round(4).tolist()}")
    print(f"damaged   {len(damaged):,}", *damaged, sep="\n          ")
    if len(damaged) > most_damaged(cfg, len(numbers)):
        print(f"a run would stop: that is more than data.max_damaged={cfg.data.max_damaged:g}")


# ---- pack ---------------------------------------------------------------------------------------


def show_pack(cfg, options):
    """Write shards of the images that are not damaged, in the same order.

    So training on the shards sees the same images in the same order as training on the source.
    """
    if not options.to:
        raise UserError("pack: where to? give a folder, as in to=/data/shards")
    source, folder = open_source(cfg.data.root, cfg), Path(options.to)
    if not isinstance(source, Files):
        raise UserError(f"pack: {cfg.data.root} is one array already")
    if options.short and (source.dtype != np.uint8 or cfg.data.channels not in (1, 3, 4)):
        raise UserError("pack: short= shrinks pictures of 8 bits only; leave it away")
    with config.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"{folder}: is not empty; give a new folder")
        for start in range(0, len(source), options.per_shard):
            path = folder / f"{start // options.per_shard:06d}.tar"
            numbers = range(start, min(start + options.per_shard, len(source)))
            samples = in_workers(partial(sample, source, options.short), numbers, cfg, path.name)
            with tarfile.open(path, "w") as tar:
                for name, data in chain.from_iterable(samples):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    packed = len(open_source(folder, cfg))
    print(f"{packed:,} of {len(source):,} images in {folder}; train with data.root={folder}")


def sample(source, short, i):
    """[(name in the shard, bytes)] of an image and its class; none, and a warning, if damaged."""
    path = PurePosixPath(source.name(i))
    folders = [part for part in path.parts[:-1] if part not in ("/", "..")]
    # The key of a sample ends at the first dot. The number keeps a.jpg and a.png apart.
    key = "/".join([*folders, f"{path.stem.replace('.', '_')}-{i:08d}"])
    ending, c = path.suffix.lower(), source.label(i)
    try:
        data = source.data(i)
        if short and min((image := source.read(i)).shape[:2]) > short:
            ending, data = shrunk(image, short, jpeg=ending in (".jpg", ".jpeg", ".jfif"))
    except Exception as error:
        warn(f"left out, damaged: {path}: {reason(error)}")
        return []
    label = [(f"{key}.cls", os.fsencode(source.classes[c]))] if c >= 0 else []
    return [(key + ending, data), *label]


def shrunk(image, short, jpeg):
    """(ending, bytes): a photograph stays a JPEG (quality 95), the rest loses nothing more."""
    height, width = image.shape[:2]
    scale = short / min(height, width)
    image = resize(image, round(height * scale), round(width * scale))
    picture, file = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image), io.BytesIO()
    if jpeg and image.shape[2] < 4:
        picture.save(file, "JPEG", quality=95)
        return ".jpg", file.getvalue()
    picture.save(file, "PNG")
    return ".png", file.getvalue()


def show_crops(cfg, options):
    from pictures.history import draw_crops  # brings the network along, which nothing else needs

    path = Path(options.to or "crops.png")
    draw_crops(open_source(cfg.data.root, cfg), cfg, path)
    print(f"see {path}")


COMMANDS = {"stats": show_stats, "pack": show_pack, "show": show_crops}


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
