"""Does images/curate.py find what was planted? The two figures of docs/curate.md.

    python scripts/measure_curate.py IMAGENETTE CIFAR10 backbone=RUN out=FOLDER

Near-copies: 300 images of IMAGENETTE/train are planted beside it a second time, 100 each as a crop
(50 to 90 % of the area, anywhere), as a JPEG of quality 30, and mirrored. Retrieval: from a pool of
as many CIFAR-10 as Imagenette images, for 500 images of IMAGENETTE/val, each with 4 neighbours or
with one. only=retrieval leaves the near-copies out.
"""

import csv
import random
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from images import curate

KINDS = "crop", "jpeg", "flip"
WAYS = "keep=4", "keep=1"


def plant(files, folder, seed=1, count=300):
    """Write near-copies of some of the files; {name of the copy: file}."""
    rng, made = random.Random(seed), {}
    folder.mkdir(parents=True, exist_ok=True)
    for k, file in enumerate(rng.sample(files, count)):
        image, kind = Image.open(file).convert("RGB"), KINDS[k % 3]
        if kind == "crop":
            side = rng.uniform(0.5, 0.9) ** 0.5
            width, height = (round(n * side) for n in image.size)
            x, y = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
            image = image.crop((x, y, x + width, y + height))
        elif kind == "flip":
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        path = folder / f"{kind}_{k:03}.jpg"
        image.save(path, quality=30 if kind == "jpeg" else 95)
        made[str(path)] = str(file)
    return made


def fates(out):
    with open(out / "why.csv", newline="") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


def near_copies(imagenette, out, words):
    files = sorted(imagenette.glob("train/*/*"))
    made = plant(files, out / "planted")
    (out / "pool.txt").write_text("\n".join([*map(str, files), *made]))  # the originals come first
    curate.main([str(out / "pool.txt"), f"out={out / 'copies'}", *words])
    gone = {
        n: r["because of"] for n, r in fates(out / "copies").items() if r["fate"] == "near-copy"
    }
    for kind in KINDS:
        those = [name for name in made if Path(name).name.startswith(kind)]
        print(f"{kind:<6}{sum(name in gone for name in those):>5} of {len(those)} found")
    others = [(name, of) for name, of in gone.items() if name not in made]
    print(f"{len(others)} of {len(files)} images not planted were removed (look at them):")
    print(*(f"  {name}  {of}" for name, of in others), sep="\n")


def retrieval(imagenette, cifar10, out, words):
    rng = random.Random(3)
    pool = [
        str(f) for root in (imagenette, cifar10)
        for f in rng.sample(sorted(root.glob("train/*/*")), 3000)
    ]  # fmt: skip
    queries = rng.sample(sorted(imagenette.glob("val/*/*")), 500)
    rng.shuffle(pool)
    (out / "mixed.txt").write_text("\n".join(pool))
    (out / "queries.txt").write_text("\n".join(map(str, queries)))
    given = [str(out / "mixed.txt"), f"curated={out / 'queries.txt'}", f"out={out / 'retrieval'}"]
    for how in WAYS:
        curate.main([*given, how, *words])
        kept = (out / "retrieval" / "list.txt").read_text().splitlines()
        right = sum(path.startswith(str(imagenette)) for path in kept)
        share = 100 * right / len(kept)
        print(f"{how}: {share:.1f} % of {len(kept)} kept images are Imagenette's")


if __name__ == "__main__":
    imagenette, cifar10, *words = sys.argv[1:]
    out = Path(next(w for w in words if w.startswith("out=")).removeprefix("out="))
    alone = "only=retrieval" in words
    words = [word for word in words if not word.startswith(("out=", "only="))]
    out.mkdir(parents=True, exist_ok=True)
    if not alone:
        near_copies(Path(imagenette), out, words)
    retrieval(Path(imagenette), Path(cifar10), out, words)
