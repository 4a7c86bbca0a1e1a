"""eval_knn.py: the official k-NN figure, however it is computed, or clear words why there is none.

Run: pytest tests/test_eval_knn.py        (seconds; helpers are in tests/running.py)
"""

import json
import pathlib
import re

import numpy as np
import pytest
import torch
from running import call, make_photos, run, tiny
from test_parallel import be_rank, launch

import eval_knn
from config import Config, UserError
from eval_knn import draw, few_shot, knn_probabilities, top_accuracy
from evals import frozen
from images.evaluation import Part
from images.sources import Arrays
from weights import export

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


def test_votes_are_counted_without_tf32_and_training_gets_it_back(golden, monkeypatch):
    seen, nearest = [], eval_knn.nearest

    def spy(*given):
        seen.append(torch.get_float32_matmul_precision())
        return nearest(*given)

    monkeypatch.setattr(eval_knn, "nearest", spy)
    torch.set_float32_matmul_precision("high")
    votes_of(golden)
    assert set(seen) == {"highest"} and torch.get_float32_matmul_precision() == "high"
    torch.set_float32_matmul_precision("highest")


def test_votes_and_accuracies_are_the_official_ones(golden):
    for k, vote in votes_of(golden).items():
        # fp32 sums of up to 20 weights in another order; the smallest margin of a win is 0.0066
        torch.testing.assert_close(vote, golden[f"probas_k{k}"], rtol=0, atol=1e-5)
        assert torch.equal(vote.argmax(dim=1), golden[f"pred_k{k}"])
        for top in 1, 5:
            official = float(golden[f"top{top}_accuracy_k{k}"])
            # Officially, classes without a vote fill up the best five: here by a vote of next to 0.
            found = top_accuracy(vote + 1e-9, golden["test_labels"], top)
            assert found == pytest.approx(100 * official)


def test_only_classes_with_a_vote_are_among_the_best_five(golden):
    label_M, votes = golden["test_labels"], votes_of(golden)
    for vote in votes.values():
        best = vote.argsort(dim=1, descending=True)[:, :5].tolist()
        rows = enumerate(zip(label_M.tolist(), best, strict=True))
        right = [c in row and vote[m, c] > 0 for m, (c, row) in rows]
        assert top_accuracy(vote, label_M, 5) == pytest.approx(100 * np.mean(right))
    one = torch.eye(10)[torch.arange(10).roll(1)]  # k = 1: one vote, and for another class
    assert top_accuracy(one, torch.arange(10), 5) == 0


def test_there_is_no_top_5_where_it_says_nothing():
    x, label = torch.eye(30), torch.arange(30) % 10
    found = eval_knn.accuracies((x, label), (x, label), 10, (1, 4, 5), "cpu")
    assert found.keys() == {"knn_1", "knn_4", "knn_5", "knn_5_top5"}
    assert eval_knn.accuracies((x, label % 5), (x, label), 5, (5,), "cpu").keys() == {"knn_5"}


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


def test_chunks_of_training_images_change_nothing(golden, monkeypatch):
    whole = votes_of(golden)
    monkeypatch.setattr(eval_knn, "CHUNK_M", 5)
    monkeypatch.setattr(eval_knn, "CHUNK_N", 7)  # fewer than the largest k
    for k, vote in votes_of(golden).items():
        torch.testing.assert_close(vote, whole[k], rtol=0, atol=1e-6)


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


# ---- few-shot -----------------------------------------------------------------------------------


def official_draw(labels, n, seed):
    """Rows of n images of each class as the official protocol draws them: one seed for a try."""
    torch.manual_seed(seed)
    rows = []
    for c in sorted(set(labels.tolist())):
        own = torch.tensor([i for i, label in enumerate(labels.tolist()) if label == c])
        rows += own[torch.randperm(len(own))[:n]].tolist()
    return rows


@pytest.mark.parametrize("n", [1, 3, 1000])
def test_few_shot_draws_the_images_of_the_official_protocol(golden, n):
    labels = golden["train_labels"]
    for seed in range(3):
        rows = draw(labels, n, seed)
        assert rows.tolist() == official_draw(labels, n, seed)
        per_class = labels.bincount()
        assert torch.equal(labels[rows].bincount(), per_class.clamp(max=n))


def test_few_shot_gives_mean_and_spread_over_the_tries(golden):
    train = golden["train_features"], golden["train_labels"]
    test = golden["test_features"], golden["test_labels"]
    classes = int(golden["num_classes"])
    scores = few_shot(train, test, classes, (2, 10), 3, tries=4, device="cpu")
    ks = [2, 3]  # of those asked for, the ones up to n, and n
    expected = {f"knn_{k}_per_class_3" for k in ks}
    assert {name for name in scores if not name.endswith("_std")} == expected
    tries = []
    for seed in range(4):
        rows = official_draw(train[1], 3, seed)
        vote = knn_probabilities(train[0][rows], train[1][rows], test[0], classes, (2, 3))[3]
        tries.append(top_accuracy(vote, test[1]))
    assert len(set(tries)) > 1
    assert scores["knn_3_per_class_3"] == pytest.approx(np.mean(tries))
    assert scores["knn_3_per_class_3_std"] == pytest.approx(np.std(tries, ddof=1))


# ---- from images --------------------------------------------------------------------------------


def sources(train_labels, test_labels):
    """Random images with these labels, of three classes."""
    rng = np.random.default_rng(0)

    def source(labels):
        images = rng.integers(256, size=(len(labels), 16, 16, 3), dtype=np.uint8)
        return Arrays(images, np.array(labels), ["ant", "bee", "cow"], "noise")

    return source(train_labels), source(test_labels)


def config(size=16):
    cfg = Config(precision="fp32")
    cfg.crops.global_size, cfg.data.workers = size, 0
    return cfg


def evaluate(*labels, k=(2,)):
    return eval_knn.evaluate(eval_knn.RawPixels(), sources(*labels), config(), "cpu", k)


def test_test_images_that_nothing_can_find_and_those_without_a_label_do_not_count():
    assert evaluate([0, 0, 1, -1, -1], [0, -1], k=(3,)) == {"knn_3": 100}
    assert evaluate([0, 1, 0, 1], [1, 2], k=(4,)) == evaluate([0, 1, 0, 1], [1], k=(4,))
    for labels in ([0, 1, 0], [-1, -1]), ([0, 0, 0], [0, 0]), ([0, 1], [2, 2]):
        with pytest.raises(UserError, match="readable images of two classes, and some to test"):
            evaluate(*labels)


def test_damaged_images_are_left_out_counted_and_named(capsys):
    both, said = sources([0, 1, 2] * 5, [0, 1, 2]), []
    rest = [Part(both[0], [i for i in range(15) if i not in (4, 6)]), Part(both[1], [0, 2])]
    wanted = eval_knn.evaluate(eval_knn.RawPixels(), rest, config(), "cpu", (3,))
    for source, bad in zip(both, ((4, 6), (1,)), strict=True):
        source.read = lambda i, s=source, bad=bad: 1 / 0 if i in bad else s.images[i]
    found = eval_knn.evaluate(eval_knn.RawPixels(), both, config(), "cpu", (3,), say=said.append)
    assert found == wanted
    assert said == ["13 training, 2 test images, 3 classes (ant, bee, cow)"]
    complaints = capsys.readouterr().err
    assert "2 damaged images left out, the first: noise[4]: division by zero" in complaints
    assert "1 damaged image left out, the first: noise[1]" in complaints


def test_few_test_images_are_said_to_be_few(capsys):
    frozen.tally(500, 99, ["a", "b"]), frozen.tally(500, 99, ["a", "b"])
    assert capsys.readouterr().err.count("only 99 test images: each is worth 1.0 points") == 1
    frozen.tally(500, 100, ["a", "b"])
    assert not capsys.readouterr().err


def test_a_network_in_training_is_evaluated_as_one_that_is_not():
    seen, backbone = [], eval_knn.RawPixels().train()
    backbone.register_forward_pre_hook(lambda network, _: seen.append(network.training))
    eval_knn.evaluate(backbone, sources([0, 1, 2], [0, 1, 2]), config(), "cpu")
    assert backbone.training and seen == [False, False]  # training images, test images


def test_k_is_what_was_asked_for_or_what_is_possible():
    assert evaluate([0, 1, 2], [0], k=()).keys() == {"knn_3"}
    with pytest.raises(UserError, match="k=4 neighbours, but only 3 training images: lower k"):
        evaluate([0, 1, 2], [0], k=(1, 4))


# ---- the command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    photos = make_photos(folder / "photos", [("train", 60), ("val", 34)], apart=6)
    words = ["steps=2", "log.knn_every=0", "optim.lr=0.5", "teacher.momentum=0"]
    assert run(folder, tiny(folder / "run", photos, *words)).code == 0
    return folder / "run"


def test_the_command_prints_the_figure_of_the_summary(tmp_path, trained):
    summary = json.loads((trained / "summary.json").read_text())
    told = run(tmp_path, [str(trained)], program="eval_knn.py")
    assert told.code == 0, told.err
    figures = figures_of(told.out)
    assert figures["knn_20"] == pytest.approx(summary["knn"], abs=0.005)  # two digits are printed
    assert figures.keys() == {name for name in summary if re.match(r"knn_\d", name)}
    assert json.loads((trained / "knn.json").read_text())["knn_20"] == summary["knn"]


def figures_of(text):
    return {name: float(value) for name, value in re.findall(r"(knn_\w+) +([\d.]+) %", text)}


def test_floors_are_those_of_the_training_and_few_shot_has_a_spread(tmp_path, trained):
    summary = json.loads((trained / "summary.json").read_text())
    words = [str(trained), "--floors", "per_class=1,3", "tries=2", "k=20"]
    told = run(tmp_path, words, program="eval_knn.py")
    assert told.code == 0, told.err
    kept = json.loads((trained / "knn.json").read_text())
    assert kept["knn_20"] == summary["knn"]
    for floor in "random", "pixels":
        assert kept[f"knn_20_{floor}"] == summary[f"knn_{floor}"]
    assert len({summary[name] for name in ("knn", "knn_random", "knn_pixels")}) == 3
    line = next(line for line in told.out.splitlines() if line.startswith("knn_3_per_class_3 "))
    values = [float(value) for value in re.findall(r"[\d.]+(?= %)", line)]
    assert values == pytest.approx(
        [kept[f"knn_3_per_class_3{end}"] for end in ("", "_random", "_pixels")], abs=0.005
    )
    assert line.count("±") == 3


def be_rank_and_evaluate(rank, world, port, words, folder):
    be_rank(rank, world, port)
    call("eval_knn", words, f"{folder}/{rank}.out", f"{folder}/{rank}.err", "fork", None)


@pytest.mark.parametrize("world", [2])
def test_ranks_print_the_same_figures_once(tmp_path, trained, world):
    words = [str(trained), "per_class=3"]
    alone = run(tmp_path / "alone", words, program="eval_knn.py")
    codes = launch(world, be_rank_and_evaluate, words, str(tmp_path))
    assert codes == [0] * world, (tmp_path / "1.err").read_text()
    assert (tmp_path / "0.out").read_text() == alone.out
    assert (tmp_path / "1.out").read_text() == ""


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_a_file_under_the_released_names_is_evaluated_too(tmp_path, trained, ending):
    photos = trained.parent / "photos"
    export.main([str(trained), str(tmp_path / f"x{ending}")])
    words = [str(tmp_path / f"x{ending}"), f"data.root={photos}", "data.workers=0"]
    words += ["data.mean=[.5,.5,.5]", "data.std=[.25,.25,.25]"]  # which the file does not hold
    told = run(tmp_path, words, program="eval_knn.py")
    assert told.code == 0, told.err
    summary = json.loads((trained / "summary.json").read_text())
    assert figures_of(told.out)["knn_20"] == pytest.approx(summary["knn"], abs=0.005)


BAD = [
    (["/nowhere"], "/nowhere: no such file"),
    (["{run}", "k=10,61"], "k=61 neighbours, but only 60 training images: lower k"),
    (["{run}", "per_class=1,31"], "per_class=31, but no class has more than 30 images"),
    (["{run}", "k=ten"], "k=ten: write whole numbers above 0"),
    (["{run}", "tries=0"], "tries=0 must be at least 1"),
    (["{run}", "--floor"], "unknown option --floor"),
    (["{run}", "vit.size=large"], "{run} says what its network is: leave out the keys of vit"),
    (["{run}", "crops.global_size=4"], "crops.global_size=4 is not a multiple of vit.patch=8"),
    (
        ["{run}", "data.channels=1", "data.mean=[.5]", "data.std=[.2]"],
        "data.channels=1, but {run} reads 3: give images of 3 channels",
    ),
    (["{run}", "data.val={flat}"], "no labelled test image"),
    (["{run}", "data.root={odd}/train", "data.val={odd}/val"], "no training image of class new"),
    (["{run}", "data.root={photos}/train/dark"], "fewer than two classes"),
    (["{run}", "data.root=/nowhere"], "/nowhere: no such folder"),
    (["{run}", "data.root={flat}"], "set data.val"),
    (["{run}", "optim.lrr=1"], "did you mean optim.lr?"),
]


@pytest.mark.parametrize("words, expected", BAD)
def test_bad_input_is_one_line(trained, tmp_path, capsys, words, expected):
    names = {"run": trained, "flat": trained.parent / "photos" / "val" / "dark"}
    names["photos"] = trained.parent / "photos"
    names["odd"] = make_photos(tmp_path, [("train", 2), ("val", 2)])
    (tmp_path / "val" / "dark").rename(tmp_path / "val" / "new")
    with pytest.raises(SystemExit) as leaving:
        eval_knn.main([word.format(**names) for word in words])
    *_, line = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("warning: ")]
    assert leaving.value.code == 2 and line.startswith("error: ") and not _
    assert expected.format(**names) in line
