"""eval_knn.py: the official k-NN figure, however it is computed, or clear words why there is none.

Run: pytest tests/test_eval_knn.py        (seconds; helpers are in tests/running.py)
"""

import json
import pathlib
import re

import numpy as np
import pytest
import torch
from running import make_photos, run, tiny

import eval_knn
from config import Config, UserError
from eval_knn import knn_probabilities, top_accuracy
from sources import Arrays

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "knn.npz") as file:
        return {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}


def votes_of(golden, **settings):
    return knn_probabilities(
        golden["train_features"], golden["train_labels"], golden["test_features"],
        int(golden["num_classes"]), tuple(golden["nb_knn"].tolist()), float(golden["T"]), **settings
    )  # fmt: skip


def test_votes_and_accuracies_are_the_official_ones(golden):
    for k, vote in votes_of(golden).items():
        # fp32 sums of up to 20 weights in another order; the smallest margin of a win is 0.0066
        torch.testing.assert_close(vote, golden[f"probas_k{k}"], rtol=0, atol=1e-5)
        assert torch.equal(vote.argmax(dim=1), golden[f"pred_k{k}"])
        for top in 1, 5:
            official = float(golden[f"top{top}_accuracy_k{k}"])
            assert top_accuracy(vote, golden["test_labels"], top) == pytest.approx(100 * official)


def test_chunks_change_nothing(golden):
    whole = votes_of(golden)
    for size in 1, 7:
        parts = [
            votes_of(golden | {"test_features": part})
            for part in golden["test_features"].split(size)
        ]
        for k, vote in whole.items():
            # Matrix products of another size may round differently in the last bit.
            joined = torch.cat([part[k] for part in parts])
            torch.testing.assert_close(joined, vote, rtol=0, atol=1e-6)


def test_the_textbook_loop_gives_the_same(golden):
    train, label, T = golden["train_features"], golden["train_labels"], float(golden["T"])
    vote = votes_of(golden)[10][0]
    largest = int(golden["nb_knn"].max())
    similarity = train @ golden["test_features"][0]
    nearest = similarity.argsort(descending=True)[:largest]
    weight = (similarity[nearest] / T).exp()
    expected = torch.zeros_like(vote)
    for i, w in zip(nearest[:10], weight[:10], strict=True):
        expected[label[i]] += w / weight.sum()
    torch.testing.assert_close(vote, expected, rtol=0, atol=1e-6)


def test_more_neighbours_than_training_images_are_refused(golden):
    with pytest.raises(UserError, match="k=200 neighbours, but only 50 training images: lower k"):
        few = {"train_features": golden["train_features"][:50], "nb_knn": torch.tensor([10, 200])}
        votes_of(golden | few)


# ---- from images --------------------------------------------------------------------------------


def sources(train_labels, test_labels):
    """Random images with these labels, of three classes."""
    rng = np.random.default_rng(0)

    def source(labels):
        images = rng.integers(256, size=(len(labels), 16, 16, 3), dtype=np.uint8)
        return Arrays(images, np.array(labels), ["ant", "bee", "cow"], "noise")

    return source(train_labels), source(test_labels)


def evaluate(*labels):
    cfg = Config()
    cfg.crops.global_size, cfg.data.workers, cfg.precision = 16, 0, "fp32"
    return eval_knn.evaluate(eval_knn.RawPixels(), sources(*labels), cfg, "cpu", (2,))


def test_a_class_without_training_images_is_named():
    with pytest.raises(UserError, match="no training image of class cow: "):
        evaluate([0, 1, 0], [0, 2])


def test_images_without_a_label_do_not_vote():
    assert evaluate([0, 0, -1, -1], [0, -1])["knn_2"] == 100
    with pytest.raises(UserError, match="no labelled test image"):
        evaluate([0, 0, 0], [-1, -1])


def test_a_training_network_stays_one():
    backbone = eval_knn.RawPixels().train()
    cfg = Config()
    cfg.crops.global_size, cfg.data.workers = 16, 0
    eval_knn.evaluate(backbone, sources([0, 1, 2], [0, 1, 2]), cfg, "cpu")
    assert backbone.training


# ---- the command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    photos = make_photos(folder / "photos", [("train", 60), ("val", 34)])
    words = ["steps=2", "log.knn_every=0", "optim.lr=1e-2"]
    assert run(folder, tiny(folder / "run", photos, *words)).code == 0
    return folder / "run"


def test_the_command_prints_the_figure_of_the_summary(tmp_path, trained):
    summary = json.loads((trained / "summary.json").read_text())
    told = run(tmp_path, [str(trained)], program="eval_knn")
    assert told.code == 0, told.err
    figures = {name: float(value) for name, value in re.findall(r"(knn_\w+) +([\d.]+) %", told.out)}
    assert figures["knn_20"] == pytest.approx(summary["knn"], abs=0.005)  # two digits are printed
    assert figures.keys() == {name for name in summary if re.match(r"knn_\d", name)}
    assert json.loads((trained / "knn.json").read_text())["knn_20"] == summary["knn"]


BAD = [
    (["/nowhere"], "/nowhere: no such file"),
    (["{run}", "data.root=/nowhere"], "/nowhere: no such folder"),
    (["{run}", "data.root={flat}"], "set data.val"),
    (["{run}", "optim.lrr=1"], "did you mean optim.lr?"),
]


@pytest.mark.parametrize("words, expected", BAD)
def test_bad_input_is_one_line(trained, capsys, words, expected):
    flat = trained.parent / "photos" / "val" / "dark"
    with pytest.raises(SystemExit) as leaving:
        eval_knn.main([word.format(run=trained, flat=flat) for word in words])
    line = capsys.readouterr().err
    assert leaving.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1
    assert expected in line
