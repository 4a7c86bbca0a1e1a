"""evals/features.py: the features of a folder in one file, none twice and none of another image.

Run: pytest tests/test_evals_features.py        (seconds)
"""

import numpy as np
import pytest
import torch
from running import make_photos

from config import Config, to_dict
from evals import features as eval_features
from images.sources import open_source
from vit import build_backbone


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A backbone that was never trained (its file, as any kept teacher) and 14 photos."""
    folder = tmp_path_factory.mktemp("features")
    cfg = Config(precision="fp32", device="cpu")
    cfg.crops.global_size, cfg.vit.patch, cfg.vit.size, cfg.data.workers = 16, 8, "nano", 0
    cfg.vit.layerscale, cfg.vit.init_std = 0.1, 0
    torch.manual_seed(0)
    state = {"backbone": build_backbone(cfg).state_dict(), "config": to_dict(cfg), "step": 1000}
    torch.save(state, folder / "0001000.pt")
    photos = make_photos(folder / "photos", [("train", 10), ("val", 4)])
    (photos / "train" / "dark" / "4.png").write_bytes(b"no picture")
    return folder


def features_of(place, out, *words, folder="photos"):
    words = [str(place / "0001000.pt"), str(place / folder), f"out={out}", *words]
    eval_features.main(words)
    with np.load(out) as file:
        return dict(file)


@torch.no_grad()
def test_every_image_has_its_own_features_names_and_labels(place, tmp_path, capsys):
    found = features_of(place, tmp_path / "x.npz", "patches=true")
    assert "damaged image left out, the first: train/dark/4.png" in capsys.readouterr().err
    from images.evaluation import centre_crop, normalised
    from weights.load import load_backbone

    net, cfg = load_backbone(place / "0001000.pt", with_config=True)
    source = open_source(place / "photos", cfg, "")
    rows = [i for i in range(14) if "4.png" not in source.name(i)]
    assert found["names"].tolist() == [source.name(i) for i in rows] and len(rows) == 13
    assert found["classes"][found["labels"]].tolist() == [source.name(i)[: -len("/dark/x.png")]
           .split("/")[0] for i in rows]  # fmt: skip
    crops = torch.stack([centre_crop(source.read(i), 16) for i in rows])
    tokens = net.forward_features(normalised(crops, cfg.data.mean, cfg.data.std))
    wanted = tokens["x_norm_clstoken"].numpy(), tokens["x_norm_patchtokens"].numpy()
    np.testing.assert_allclose(found["features"], wanted[0], atol=1e-5)
    np.testing.assert_allclose(found["patches"].reshape(13, 4, -1), wanted[1], atol=1e-5)


def test_images_of_an_array_have_features_too(place, tmp_path):
    np.save(
        place / "some.npy",
        np.random.default_rng(0).integers(255, size=(5, 16, 16, 3), dtype=np.uint8),
    )
    found = features_of(place, tmp_path / "x.npz", folder="some.npy")
    assert found["features"].dtype == np.float32 and found["features"].shape == (5, 128)
    assert "patches" not in found and found["labels"].tolist() == [-1] * 5


@pytest.mark.parametrize(
    "words, expected",
    [
        (["{run}"], "FOLDER is missing"),
        (["{run}", "out=x.npz"], "FOLDER is missing"),
        (["{run}", "{photos}", "out=/nowhere/x.npz"], "out=/nowhere/x.npz: cannot be written"),
        (["{run}", "{photos}/val", "out=/dev/full"], "out=/dev/full: cannot be written"),
        (["{run}", "{photos}", "out={photos}"], "photos: cannot be written; choose a file in"),
        (["{run}", "{photos}", "patch=true"], "unknown key patch; did you mean patches?"),
        (["{run}", "/nowhere"], "FOLDER=/nowhere: no such folder"),
    ],
)
def test_bad_input_is_one_line(place, capsys, words, expected):
    places = {"run": place / "0001000.pt", "photos": place / "photos"}
    with pytest.raises(SystemExit) as leaving:
        eval_features.main([word.format(**places) for word in words])
    line = capsys.readouterr().err
    assert leaving.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1
    assert expected in line
