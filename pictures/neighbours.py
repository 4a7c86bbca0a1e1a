"""Nearest neighbours: which images of a data set have [CLS] features most like those of a query.

Without images of the user, held-out ones ask, before and after training. That is drawn at the end
of each run: what the network has learnt, for the eye.
"""

import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ImageOps

from evals.frozen import untrained
from images.evaluation import DAMAGED, Part, evaluation_batches
from images.sources import read_or_next
from parallel import progress
from pictures import sheets
from pictures.plot import GREEN

COUNT = 5  # neighbours that are shown
MOST = 2000  # images that a finished run is searched in: its last picture must not take long


@torch.no_grad()
def cls_features(net, source, cfg, what, batch=256):
    """[CLS] features of length 1, fp32 (N, D), and the places (N,) of these images in the source.

    Damaged images are left out.
    """
    device, features, labels = net.pos_embed.device, [], []
    batches = evaluation_batches(source, cfg, batch, device)
    for image_BCSS, label_B in progress(batches, desc=what, unit=" batches"):
        features.append(F.normalize(net(image_BCSS).float(), dim=1).cpu())
        labels.append(label_B)
    good_N = torch.cat(labels) != DAMAGED
    return torch.cat(features)[good_N], good_N.nonzero().flatten()


def nearest(net, queries, pool, cfg):
    """(For each query the images of the pool that are most like it: [(cosine, place), ...],
    how many images of the pool can be read)."""
    pool_ND, place_N = cls_features(net, pool, cfg, "data set")
    # One by one, as some may have 8 bits and others 16.
    query_QD, _ = cls_features(net, queries, cfg, "queries", batch=1)
    cosines, rows = (query_QD @ pool_ND.T).topk(min(COUNT, len(pool_ND)), dim=1)
    both = zip(cosines.tolist(), place_N[rows].tolist(), strict=True)
    return [list(zip(*pair, strict=True)) for pair in both], len(pool_ND)


def draw(networks, queries, pool, cfg, path):
    """A row for each query: the images of the pool that are nearest to it, by each network.

    networks  {title: backbone}, where {n} is how many images are searched; of a single one the
              cosines are written too
    An image whose class is known to be that of the query has a green frame.
    """
    results = [nearest(net, queries, pool, cfg) for net in networks.values()]
    found, searched = zip(*results, strict=True)
    side, rows = 104, []
    for q in range(len(queries)):
        wanted, titles = class_of(queries, q), ["query"]
        pictures, words = [queries.read(q)], [name_of(queries, q)]
        for title, answers in zip(networks, found, strict=True):
            titles += ["", title.format(n=f"{searched[0]:,}"), *[""] * (len(answers[q]) - 1)]
            pictures.append(None)
            words.append("")
            for cosine, place in answers[q]:
                image = pool.read(place)
                if wanted and class_of(pool, place) == wanted:
                    smaller = sheets.fit(sheets.picture(image), side - 8)
                    image = np.asarray(ImageOps.expand(smaller, 4, GREEN))
                pictures.append(image)
                number = f"{cosine:.2f} " if len(found) == 1 else ""
                words.append(number + name_of(pool, place))
        rows.append(([] if rows else titles, pictures, words))
    return sheets.write(sheets.bands(rows, side, per_row=len(pictures)), path)


def before_and_after(trained, sources, source, cfg, path, most=MOST):
    """Neighbours of some held-out images, before and after training, as a picture.

    sources  (images to search, held-out ones), or None without labels: then some images of `source`
             ask for their neighbours among the others, or if there are few, among all
    most     search so many images, drawn at random
    """
    pool, test = sources or (source, source)
    asking = spread(test, 6)
    places = set(random.Random(0).sample(range(len(pool)), min(most, len(pool))))
    if not sources and len(places) > 2 * len(asking):
        places -= set(asking)
    green = ";  green: of the query's class" if len(test.classes) > 1 else ""
    networks = {
        "nearest of {n} images, by the untrained network": untrained(trained, cfg.seed),
        f"by the trained network{green}": trained,
    }
    return draw(networks, Part(test, asking), Part(pool, sorted(places)), cfg, path)


def spread(source, count):
    """Places of a few images that can be read, from all over a source, none of them twice."""
    count = min(count, len(source))
    # One further each time, as far as there is room: labels that take turns are all met.
    places = [i * len(source) // count + i % (len(source) // count) for i in range(count)]
    return list(dict.fromkeys(read_or_next(source, place)[1] for place in places))


def class_of(source, i):
    """The class of an image in words; "" without one, or if all images are of one class."""
    return source.classes[source.label(i)] if source.label(i) >= 0 < len(source.classes) - 1 else ""


def name_of(source, i):
    """The file of an image; of an array, where images have none, the class."""
    name = source.name(i)
    return class_of(source, i) or name if name.endswith("]") else Path(name).name
