"""The recipes for small data are complete experiment cards, and their arithmetic is right.

Run: pytest tests/test_recipes.py
"""

import json
import re
import sys

import pytest
import torch
from running import ROOT, TINY, make_photos

import config
from dinov2 import build_network
from monitor.results import REFERENCES, recipe_of
from optim import schedules
from pictures import history

sys.path.insert(0, str(ROOT / "scripts"))
import recipes
import reference

RECIPES = ["config", "configs/cifar10", "configs/cifar10_gpu"]
RECIPES += ["configs/imagenette", "configs/imagenette_gpu"]
IMAGES = {"config": 8_000, "cifar10": 50_000, "imagenette": 9_469}


def card(name):
    """(config, the comment that it opens with)."""
    path = ROOT / f"{name}.yaml"
    return config.load(path), path.read_text(encoding="utf-8").partition("\n\n")[0]


@pytest.mark.parametrize("name", RECIPES)
def test_a_card_states_what_hardware_time_result_and_command(name):
    cfg, head = card(name)
    for entry in ("what", "hardware", "time", "reaches", "command"):
        assert re.search(rf"^#   {entry} +\S", head, re.MULTILINE), entry
    assert f"python train.py {name}.yaml" in head
    if "not measured" not in head:
        assert re.search(r"k-NN \d\d\.\d", head) and re.search(r"minutes", head)
        assert f"{cfg.steps * cfg.batch:,} images" in head
    with torch.device("meta"):
        build_network(cfg, student=True)


@pytest.mark.parametrize("name", RECIPES[1:])
def test_data_that_were_changed_upstream_are_said_to_be(name):
    head = card(name)[1]
    assert ("squashed to 224 x 224 px" if "imagenette" in name else "quality 75") in head.replace(
        "\n# ", " "
    )


@pytest.mark.parametrize("name", ["configs/cifar10_gpu", "configs/imagenette_gpu"])
def test_what_no_gpu_has_measured_says_so_and_its_arithmetic_is_right(name):
    cfg, head = card(name)
    if (REFERENCES / f"{name.split('/')[1]}-0.jsonl").exists():
        return  # the card is compared with it below
    assert re.search(r"^#   reaches .*not measured$", head, re.MULTILINE)
    total, images = cfg.steps * cfg.batch, IMAGES[name.split("/")[1].split("_")[0]]
    epochs = int(re.search(r"(\d+) epochs", head)[1])
    assert total / images == pytest.approx(epochs, rel=0.005)
    seconds, rate = re.search(r"(\d+) s of steps at ([\d,]+) images/s", head).groups()
    assert total / int(rate.replace(",", "")) == pytest.approx(int(seconds), rel=0.005)
    assert "10 minutes in all" in head and int(seconds) <= 490  # the rest is no step
    assert 5 <= cfg.steps / cfg.log.knn_every <= 6


@pytest.mark.parametrize("name", RECIPES)
def test_the_peak_learning_rate_is_the_one_that_the_card_states(name):
    cfg = card(name)[0]
    text = (ROOT / f"{name}.yaml").read_text(encoding="utf-8")
    stated, batch = re.search(r"lr: \S+ +# (\S+) at (\d+) images a step", text).groups()
    assert int(batch) == cfg.batch
    assert schedules(cfg.optim.warmup, cfg).lr == pytest.approx(float(stated), rel=0.02)


@pytest.mark.parametrize("name", RECIPES)
def test_warm_up_and_frozen_prototypes_are_a_small_part_of_the_run(name):
    cfg = card(name)[0]
    assert 0.02 <= cfg.optim.warmup / cfg.steps <= 0.2
    assert cfg.optim.freeze_last_layer < cfg.optim.warmup
    assert cfg.teacher.temp_warmup < cfg.steps / 2


@pytest.mark.parametrize("path", sorted(REFERENCES.glob("*.jsonl")), ids=lambda path: path.stem)
def test_the_card_of_a_recipe_states_what_its_logs_do(path):
    first, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    knn = [line for line in lines if "knn" in line]
    stated = re.search(r"^#   reaches (.*)^#   command", card(first["recipe"][:-5])[1], re.M | re.S)
    for value in knn[-1]["knn"], knn[0]["knn_random"]:
        assert re.search(rf"\b{value:.1f}\b", stated[1]), value
    assert path.stat().st_size < 100_000
    assert first["config"].keys() <= recipe_of(config.Config()).keys()  # a key that is gone: redo


def test_the_table_of_logs_is_that_of_the_logs():
    page = (REFERENCES / "README.md").read_text(encoding="utf-8")
    assert reference.table(REFERENCES.glob("*.jsonl")) in page


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"))


def test_one_command_trains_probes_and_keeps_a_log(tmp_path, photos, monkeypatch):
    monkeypatch.setattr(reference, "PROBE", ["iterations=20", "logistic=0"])
    monkeypatch.setattr(reference, "LARGEST", 4000)
    words = [str(TINY), str(photos), f"out={tmp_path / 'run-0'}", f"to={tmp_path}", "commit=abc"]
    reference.main([*words, "steps=10", "log.every=1"])
    first, *lines = map(json.loads, (tmp_path / "run-0.jsonl").read_text().splitlines())
    assert first["recipe"] == "tests/tiny.yaml steps=10" and first["commit"] == "abc"
    assert first["config"] == recipe_of(config.load(TINY, ["steps=10"])) and first["linear"] > 90
    assert [line["step"] for line in lines if "knn" in line] == [0, 5, 10]
    assert 1 < len([line for line in lines if "loss" in line]) < 10
    assert reference.row(tmp_path / "run-0.jsonl").count("%") == 3
    history.draw_curves(tmp_path / "run-0.jsonl", tmp_path / "curves.png")


@pytest.mark.parametrize(
    "words, message",
    [
        ("none.yaml", "none.yaml: cannot be read"),
        ("config.yaml stpes=3", "override stpes=3: unknown key stpes; did you mean steps?"),
        ("config.yaml /none steps=1", "data.root=/none: no such folder or file"),
        ("config.yaml seed=1 out={done}", "{done} holds another run; set out= to another place"),
        ("config.yaml to=/dev/null/x", "to=/dev/null/x: cannot be written"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    config.dump(config.load(ROOT / "config.yaml"), tmp_path / "config.yaml")
    with pytest.raises(SystemExit) as stopped:
        reference.main(words.replace("{done}", str(tmp_path)).split())
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    assert error.startswith("error: " + message.replace("{done}", str(tmp_path)))


def test_the_table_of_tries_is_that_of_the_results():
    assert recipes.table(recipes.results()) in recipes.PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("words", recipes.TRIES)
def test_a_try_is_a_config(words):
    words = f"{recipes.BASE} {recipes.QUIET} {words}".split()
    assert config.load(ROOT / "config.yaml", words).precision == "fp32"


def test_every_result_belongs_to_a_try():
    assert {result["words"] for result in recipes.results()} <= set(recipes.TRIES)
