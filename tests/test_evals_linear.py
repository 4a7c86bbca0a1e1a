"""evals/linear.py: 52 textbook probes, an honest choice among them, and classifiers to keep.

Run: pytest tests/test_evals_linear.py        (some ten seconds; helpers are in tests/running.py)
"""

import csv
import json
import os
import shutil
import socket
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from running import make_photos, server
from test_readme import README, commands

import eval_knn
import parallel
from config import Config, to_dict
from evals import classifier as classifiers
from evals import linear as eval_linear
from evals import probe
from evals.classifier import Classifier, features
from evals.logistic import logistic_path, objective, penalties
from evals.probe import Candidates, Probe, feature_sets
from images.evaluation import divide
from images.sources import Arrays
from pictures import __main__ as pictures
from vit import VisionTransformer, build_backbone

# ---- the 52 probes ------------------------------------------------------------------------------


def test_the_probe_is_52_linear_layers_with_sgd_and_a_cosine(monkeypatch):
    dim, blocks, classes, steps, batch = 3, 4, 5, 7, 16
    x, label = torch.randn(steps, batch, 5 * dim), torch.randint(classes, (steps, batch))
    fast = Probe(classes, blocks, dim, batch)
    assert len(fast.heads.names) == 52
    start = fast.heads.weight_HCF.clone()
    for step in range(steps):
        fast.step(x[step], label[step], step / steps)

    h = 0
    for rate in probe.RATES:
        for mean in False, True:
            for last in 1, 4:
                cls = list(range((blocks - last) * dim, blocks * dim))
                columns = cls + list(range(blocks * dim, (blocks + 1) * dim)) * mean
                layer = torch.nn.Linear(len(columns), classes)
                layer.weight.data, layer.bias.data = start[h][:, columns].clone(), torch.zeros(5)
                # The official constants: momentum 0.9, no decay, lr for 256 images, cosine to 0.
                solver = torch.optim.SGD(
                    layer.parameters(), rate * batch / 256, momentum=0.9, weight_decay=0
                )
                cosine = torch.optim.lr_scheduler.CosineAnnealingLR(solver, steps, eta_min=0)
                for step in range(steps):
                    loss = F.cross_entropy(layer(x[step][:, columns]), label[step])
                    solver.zero_grad()
                    loss.backward()
                    solver.step()
                    cosine.step()
                weight = fast.heads.weight_HCF[h]
                torch.testing.assert_close(weight[:, columns], layer.weight.data)
                torch.testing.assert_close(fast.heads.bias_HC[h], layer.bias.data)
                others = [c for c in range(5 * dim) if c not in columns]
                assert not weight[:, others].any(), "a classifier looks where it must not"
                h += 1
    assert not torch.equal(start, fast.heads.weight_HCF)


def test_the_first_weights_are_the_official_ones():
    start = Probe(100, 4, 64, 128).heads
    used = start.weight_HCF[start.weight_HCF != 0]
    assert used.std().item() == pytest.approx(0.01, rel=0.01) and not start.bias_HC.any()
    assert len(used) == 13 * 100 * 64 * (1 + 4 + 2 + 5)


def test_a_shallow_backbone_has_each_feature_set_once():
    assert [name for name, _ in feature_sets(1, 2)] == [
        "last 1 [CLS]",
        "last 1 [CLS] and mean patch",
    ]


def test_features_are_the_last_cls_tokens_and_the_mean_patch():
    backbone = VisionTransformer((8, 5, 2, "mlp"), 4, image_size=8, registers=2).eval()
    image = torch.randn(3, 3, 8, 12)
    x = features(backbone, image).unflatten(1, (5, 8))
    last = backbone.forward_features(image)
    torch.testing.assert_close(x[:, 3], last["x_norm_clstoken"])
    torch.testing.assert_close(x[:, 4], last["x_norm_patchtokens"].mean(dim=1))
    kept = backbone.blocks[:2]  # the first of the last four [CLS] is that after the second block
    backbone.blocks = kept
    torch.testing.assert_close(x[:, 0], backbone(image))


def twelve_images(**options):
    """What the methods are given: features of a backbone of five blocks and two channels."""
    return SimpleNamespace(
        backbone=SimpleNamespace(depth=5, dim=2), x_NF=torch.randn(12, 10), classes=["a", "b"],
        label_N=torch.arange(12) % 2, device="cpu",
        o=SimpleNamespace(seed=0, augment=False, **options),
    )  # fmt: skip


def test_the_learning_rate_falls_over_all_iterations(monkeypatch):
    seen = []
    monkeypatch.setattr(Probe, "step", lambda self, x, label, done: seen.append(done))
    eval_linear.linear_probe(twelve_images(iterations=4, batch=2), torch.arange(12))
    assert seen == [0, 0.25, 0.5, 0.75]


# ---- logistic regression ------------------------------------------------------------------------


def test_logistic_regression_looks_at_the_last_cls_token_alone():
    found = eval_linear.logistic_regression(twelve_images(logistic=2), torch.arange(12))
    used_F = found.weight_HCF.any(dim=0).any(dim=0)
    assert used_F.tolist() == [False] * 6 + [True] * 2 + [False] * 2  # the mean patch is behind it


def noisy_classes(n=60, dim=3, classes=4):
    label = torch.randint(classes, (n,))
    return (torch.randn(n, dim) + 5 + label[:, None] * torch.tensor([1.0, 0, -0.5])), label


def test_the_gradient_is_zero_at_the_optimum():
    x, label = noisy_classes()
    values = penalties(9)
    weights, biases = logistic_path(x, label, 4, values, tolerance=1e-7)
    for value, weight, bias in zip(values, weights.double(), biases.double(), strict=True):
        chance = (x.double() @ weight.T + bias).softmax(dim=1)
        error = chance - F.one_hot(label, 4)
        pull, hold = error.T @ x.double() / len(x), weight / (value * len(x))
        torch.testing.assert_close(pull, -hold, rtol=1e-3, atol=1e-5)
        assert error.mean(dim=0).abs().max() < 1e-5


def test_newtons_method_finds_the_same_optimum():
    x, label = noisy_classes(classes=2)
    (weight,), (bias,) = logistic_path(x, label, 2, [1.0], tolerance=1e-7)
    p = torch.zeros(8, dtype=torch.float64)

    def value(p):
        return objective(p[:6].view(2, 3), p[6:], x.double(), label, 1.0)

    for _ in range(20):
        gradient = torch.autograd.functional.jacobian(value, p)
        hessian = torch.autograd.functional.hessian(value, p)
        p = p - torch.linalg.pinv(hessian) @ gradient  # the sum of the biases is free
    torch.testing.assert_close(weight, p[:6].view(2, 3).float(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(bias[1] - bias[0], (p[7] - p[6]).float(), rtol=1e-3, atol=1e-3)


def test_without_a_say_of_the_images_the_classes_are_as_frequent_as_they_are():
    x, label = noisy_classes()
    (weight,), (bias,) = logistic_path(x, label, 4, [1e-12])
    share = label.bincount(minlength=4) / len(label)
    torch.testing.assert_close((x @ weight.T + bias).softmax(dim=1)[0], share, rtol=0, atol=1e-4)


def test_shares_of_classes_are_labels_too():
    x, label = noisy_classes()
    hard, soft = (logistic_path(x, y, 4, [1.0], 1e-7) for y in (label, F.one_hot(label, 4).float()))
    torch.testing.assert_close(hard, soft, rtol=1e-3, atol=1e-4)


def test_the_penalties_are_the_official_45():
    assert len(penalties()) == 45
    assert penalties()[0] == pytest.approx(1e-6) and penalties()[-1] == pytest.approx(1e5)


# ---- who chooses --------------------------------------------------------------------------------


def test_held_out_images_are_others_and_every_class_keeps_one():
    label_N = np.array([0] * 50 + [1, 1, -1] + [2] * 10)
    for seed in range(20):
        kept, held = divide(label_N, 0.3, seed)
        assert np.bincount(label_N[held]).tolist() == [15, 0, 3]  # a share of each class
        assert sorted([*kept, *held, 52]) == list(range(63))  # 52 has no label
    assert set(label_N[divide(label_N, 0.99)[0]]) == {0, 1, 2}


def test_the_test_images_do_not_choose():
    """One candidate is right about the held-out image, the other about the test images."""
    good_for_held, good_for_test = torch.tensor([[1.0], [-1]]), torch.tensor([[-1.0], [1]])
    found = Candidates(
        ["test", "held"], torch.stack((good_for_test, good_for_held)), torch.zeros(2, 2)
    )
    trained = []

    def train(s, rows, chosen=None):
        trained.append(rows.tolist())
        return found

    s = SimpleNamespace(
        label_N=torch.tensor([0, 0, 1, 0]), label_M=torch.tensor([1, 1, 1, 0]),
        x_NF=torch.ones(4, 1), x_MF=torch.ones(4, 1), device="cpu",
    )  # fmt: skip
    kept, held = torch.tensor([0, 2]), torch.tensor([1, 3])
    figures, weight_CF, _ = eval_linear.choose(s, "linear", train, kept, held)
    expected = {"chosen": "held", "held_out": 100, "test": 25, "best": 75}
    assert figures == {"method": "linear"} | expected
    assert trained == [[0, 2], [0, 1, 2, 3]]
    assert torch.equal(weight_CF, good_for_held)


# ---- images -------------------------------------------------------------------------------------


def array(n=12, size=16):
    rng = np.random.default_rng(0)
    images = rng.integers(128, size=(n, size, size, 3), dtype=np.uint8)
    images[1::2] += 127
    return Arrays(images, np.arange(n) % 2, ["a", "b"], "noise")


def tiny_config(**changes):
    cfg = Config(precision="fp32", device="cpu")
    cfg.crops.global_size, cfg.data.workers, cfg.vit.patch, cfg.vit.size = 16, 0, 8, "nano"
    for key, value in changes.items():
        setattr(cfg, key, value)
    return cfg


def tiny_backbone():
    return VisionTransformer((16, 3, 2, "mlp"), 8, image_size=16, layerscale=0.1, init_std=0).eval()


def test_random_crops_show_their_own_rows_and_each_once(monkeypatch):
    rows = torch.tensor([1, 4, 5, 7])
    o = SimpleNamespace(iterations=3, batch=4, seed=1)
    s = SimpleNamespace(train=array(), cfg=tiny_config(), o=o, device="cpu", backbone=None)
    monkeypatch.setattr(eval_linear, "features", lambda _, images: images)
    found = list(eval_linear.fresh_features(s, rows))
    assert [sorted(row.tolist()) for _, row in found] == [rows.tolist()] * 3
    assert found[0][0].shape == (4, 3, 16, 16) and not torch.equal(found[0][0][0], found[1][0][0])
    halves = []
    for rank in 0, 1:
        monkeypatch.setattr(eval_linear, "ranks", lambda rank=rank: (rank, 2))
        halves.append(list(eval_linear.fresh_features(s, rows)))
    for (image, _), (first, _), (second, _) in zip(found, *halves, strict=True):
        assert torch.equal(torch.stack((first, second), dim=1).flatten(0, 1), image)


# ---- classifiers --------------------------------------------------------------------------------


def a_classifier(backbone):
    return Classifier(backbone, ["a", "b"], torch.randn(2, 64), torch.randn(2)).eval()


def test_a_saved_classifier_is_the_same_one(tmp_path):
    backbone = tiny_backbone()
    for module in backbone.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-2  # as a file of others may say
    before = a_classifier(backbone)
    image = torch.randn(2, 3, 16, 24)
    x_BF = features(backbone, image)
    torch.testing.assert_close(
        before(image), x_BF @ before.classifier.weight.T + before.classifier.bias
    )
    classifiers.save(before, tiny_config(), tmp_path / "c.pt")
    after, cfg = classifiers.load(tmp_path / "c.pt", with_config=True)
    assert after.classes == ["a", "b"] and cfg.crops.global_size == 16
    assert (cfg.data.mean, cfg.data.std) == (tiny_config().data.mean, tiny_config().data.std)
    assert torch.equal(before(image), after(image))


# ---- the command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with photos of two classes and a backbone that was never trained."""
    folder = tmp_path_factory.mktemp("linear")
    cfg = tiny_config()
    cfg.vit.layerscale, cfg.vit.init_std = 0.1, 0
    cfg.data.root = str(make_photos(folder / "photos"))
    torch.manual_seed(0)
    state = {"backbone": build_backbone(cfg).state_dict(), "config": to_dict(cfg), "step": 0}
    (folder / "run").mkdir()
    torch.save(state, folder / "run" / "teacher.pt")
    classifiers.save(a_classifier(tiny_backbone()), cfg, folder / "run" / "c.pt")
    return folder


QUICK = ["iterations=20", "batch=8", "logistic=3"]


def test_the_command_classifies_and_predict_labels_a_folder(place, tmp_path, capsys):
    run, saved, out = place / "run", tmp_path / "c.pt", tmp_path / "labels.csv"
    eval_linear.main([str(run), *QUICK, f"save={saved}"])
    said = capsys.readouterr().out
    assert "30 training, 10 test images, 2 classes (dark, light)" in said
    assert "the best linear one on the test images, as official" in said
    linear, logistic = json.loads((run / "linear.json").read_text())
    assert linear["method"] == "linear" and linear["best"] >= linear["test"]
    assert logistic["test"] == 100, "dark and light are not told apart"

    new = make_photos(tmp_path / "new", [("x", 6)])
    (new / "x" / "dark" / "broken.png").write_bytes(b"not a picture")
    eval_linear.main(["predict", str(saved), str(new), f"out={out}"])
    assert "1 damaged image left out, the first: x/dark/broken.png: not" in capsys.readouterr().err
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and "broken" not in out.read_text()
    for row in rows:
        assert row["class"] in row["path"]
        chances = [float(row[f"class: {name}"]) for name in ("dark", "light")]
        assert sum(chances) == pytest.approx(1, abs=1e-3)
        assert float(row["class probability"]) == max(chances)


@pytest.mark.parametrize("words", commands(README, "evals.linear"), ids=" ".join)
def test_a_command_of_the_readme_runs(place, tmp_path, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(place / "run", tmp_path / "runs" / "default")
    if words[0] == "predict":
        classifiers.save(a_classifier(tiny_backbone()), tiny_config(), tmp_path / words[1])
        eval_linear.main([*words[:2], str(place / "photos"), *words[3:]])
        assert (tmp_path / "labels.csv").exists()
    else:
        eval_linear.main([*words, *QUICK])
        assert (tmp_path / "runs" / "default" / "classifier.pt").exists()


BAD = [
    (["{run}", "batch=0"], "batch=0 must be at least 1"),
    (["{run}", "iterations=few"], "iterations must be a whole number"),
    (["{run}", "seed=[1"], "seed must be a whole number"),
    (["{run}", "iterations=0", "logistic=0"], "leave nothing to do"),
    (["{run}", "data.rot=x"], "did you mean data.root?"),
    (["{run}", "iteration=5"], "unknown key iteration; did you mean iterations?"),
    (["{run}", "data.root={photos}/train/dark"], "fewer than two classes"),
    (["{run}", "data.channels=1", "data.mean=[0.5]", "data.std=[0.5]"], "reads 3"),
    (["predict", "{run}/c.pt", "{photos}", "data.channels=1", "data.mean=[0.5]", "data.std=[0.5]"],
     "c.pt reads 3: give images of 3 channels"),
    (["{run}", "vit.size=large"], "says what its network is: leave out the keys of vit"),
    (["{run}", "save=/nowhere/c.pt"], "save=/nowhere/c.pt: cannot be written"),
    (["predict", "{run}/c.pt", "{photos}", "out=/dev/full"], "out=/dev/full: cannot be written"),
    (["predict", "{run}/teacher.pt", "{photos}"], "not a classifier"),
    (["predict", "{run}", "{photos}"], "run: cannot be read"),
    (["predict", "{run}/teacher.pt"], "FOLDER is missing"),
]  # fmt: skip


@pytest.mark.parametrize("words, expected", BAD)
def test_bad_input_is_one_line(place, capsys, words, expected):
    places = {"run": place / "run", "photos": place / "photos"}
    refused([word.format(**places) for word in words], capsys, expected)


def refused(words, capsys, expected):
    with pytest.raises(SystemExit) as leaving:
        eval_linear.main([words[0], *["iterations=2"] * (words[0] != "predict"), *words[1:]])
    lines = capsys.readouterr().err.splitlines()
    (line,) = [one for one in lines if not one.startswith("warning: ")]
    assert leaving.value.code == 2 and line.startswith("error: ")
    assert expected in line


def test_a_class_that_cannot_be_learned_is_named(place, tmp_path, capsys):
    photos = make_photos(tmp_path / "photos", [("train", 8), ("val", 4)])
    (photos / "val" / "grey").mkdir()
    Image.new("RGB", (20, 20)).save(photos / "val" / "grey" / "1.png")
    refused([str(place / "run"), f"data.root={photos}"], capsys, "no training image of class grey")


def test_damaged_images_are_left_out_of_the_probe_and_counted(place, tmp_path, capsys):
    photos = make_photos(tmp_path / "photos", [("train", 20), ("val", 12)])
    (photos / "train" / "dark" / "0.png").write_bytes(b"no picture")
    (photos / "val" / "light" / "1.png").write_bytes(b"")
    eval_linear.main([str(place / "run"), f"data.root={photos}", *QUICK])
    told = capsys.readouterr()
    assert "19 training, 11 test images" in told.out
    assert "1 damaged image left out, the first: dark/0.png" in told.err
    assert "1 damaged image left out, the first: light/1.png" in told.err


def test_every_program_counts_the_same_images(place, tmp_path, capsys):
    """One is damaged, one has no class, and of a third class nothing to learn from is readable."""
    photos = make_photos(tmp_path / "photos", [("train", 20), ("val", 12)])
    for part in "train", "val":
        (photos / part / "grey").mkdir()
        Image.new("RGB", (20, 20)).save(photos / part / "grey" / "1.png")
    for damaged in "train/grey/1.png", "train/dark/0.png", "val/light/1.png":
        (photos / damaged).write_bytes(b"no picture")
    Image.new("RGB", (20, 20)).save(photos / "val" / "stray.png")
    words = [str(place / "run"), f"data.root={photos}"]
    expected = "19 training, 11 test images, 2 classes (dark, light)"
    for main, more in (eval_knn.main, []), (eval_linear.main, QUICK):
        parallel.warn_once.cache_clear()
        main([*words, *more])
        told = capsys.readouterr()
        assert told.out.startswith(expected) and "1 image without a class left out" in told.err
        assert "2 damaged images left out, the first: dark/0.png" in told.err
        assert "1 damaged image left out, the first: light/1.png" in told.err


def test_a_file_of_dino_is_probed_and_its_attention_drawn(place, tmp_path, capsys):
    net = VisionTransformer((128, 2, 2, "mlp"), 8, image_size=16)  # no LayerScale, as DINO
    names = {f"module.backbone.{n}": v for n, v in net.state_dict().items() if n != "mask_token"}
    path, saved = tmp_path / "dino_x_pretrain.pth", tmp_path / "c.pt"
    torch.save({"student": {}, "teacher": names, "epoch": 1}, path)
    photos = place / "photos"
    eval_linear.main([str(path), f"data.root={photos}", f"save={saved}", *QUICK])
    assert "30 training, 10 test images, 2 classes" in capsys.readouterr().out
    eval_linear.main(["predict", str(saved), str(photos), f"out={tmp_path / 'x.csv'}"])
    image = str(photos / "val" / "dark" / "0.png")
    pictures.main(["attention", str(path), image, f"out={tmp_path / 'x.png'}"])
    assert Image.open(tmp_path / "x.png").width > 400  # the image, the mean and both heads


def test_a_list_holds_the_answers_to_a_question(place, tmp_path, capsys):
    photos = sorted((place / "photos" / "train").rglob("*.png"))
    lines = [f"{path},{['red', 'blue'][i % 2]}" for i, path in enumerate(photos)]
    (tmp_path / "colour.csv").write_text("\n".join(lines))
    eval_linear.main([str(place / "run"), f"data.root={tmp_path / 'colour.csv'}", *QUICK])
    assert "26 training, 4 test images, 2 classes (blue, red)" in capsys.readouterr().out


def as_rank(rank, port, words):
    """What one of two processes does that torchrun would have started."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    eval_linear.main(words)


def test_two_ranks_find_what_one_finds(place):
    run, words = place / "run", [str(place / "run"), *QUICK, "augment=true", "iterations=10"]
    eval_linear.main(words)
    alone = json.loads((run / "linear.json").read_text())
    (run / "linear.json").unlink()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    both = [server().Process(target=as_rank, args=(rank, port, words)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    assert json.loads((run / "linear.json").read_text()) == alone
