"""Folder, list, shards and array are four forms of the same data: same images, same k-NN.

Run: pytest tests/test_eval_knn_sources.py        (seconds)
"""

import numpy as np
import pytest
import torch
from running import make_photos

from config import Config, from_dict
from eval_knn import evaluate
from images import __main__ as prepare
from images import evaluation
from images.sources import open_source
from vit import build_backbone

SMALL = {"crops": {"global_size": 16}, "data": {"workers": 0}, "precision": "fp32",
         "vit": {"size": "nano", "patch": 8, "init_std": 0}}  # fmt: skip


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """{form: (root of the training images, root of the held-out ones)}; all were PNGs."""
    base = tmp_path_factory.mktemp("forms")
    photos = make_photos(base / "photos", [("train", 40), ("val", 20)])
    for split in "train", "val":
        root = photos / split
        source = open_source(root, Config())
        rows = [
            f"{root / source.name(i)},{source.classes[source.label(i)]}" for i in range(len(source))
        ]
        (base / f"{split}.csv").write_text("\n".join(rows))
        np.savez(
            base / f"{split}.npz",
            images=np.stack([source.read(i) for i in range(len(source))]),
            labels=np.array([source.label(i) for i in range(len(source))]),
        )
        prepare.main(["pack", str(root), f"to={base / split}", "per_shard=7", "data.workers=0"])
    return {
        "folder": (photos, ""),
        "list": (base / "train.csv", base / "val.csv"),
        "shards": (base / "train", base / "val"),
        "array": (base / "train.npz", base / "val.npz"),
    }


def sources_of(forms, form):
    cfg = from_dict(SMALL)
    cfg.data.root, cfg.data.val = map(str, forms[form])
    return evaluation.evaluation_images(cfg), cfg


@pytest.mark.parametrize("form", ["list", "shards", "array"])
def test_all_forms_have_the_images_and_the_knn_of_the_folder(forms, form):
    torch.manual_seed(0)
    expected, cfg = sources_of(forms, "folder")
    found, _ = sources_of(forms, form)
    for source, same in zip(found, expected, strict=True):
        assert len(source) == len(same)
        for i in range(len(same)):
            assert np.array_equal(source.read(i), same.read(i)) and source.label(i) == same.label(i)
    backbone = build_backbone(cfg).eval()
    figures, wanted = (evaluate(backbone, s, cfg, "cpu", (3, 10)) for s in (found, expected))
    assert figures == wanted and figures["knn_3"] > 50  # dark and light differ
