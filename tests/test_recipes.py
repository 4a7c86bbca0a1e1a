"""The recipes for small data are complete experiment cards, and their arithmetic is right.

Run: pytest tests/test_recipes.py
"""

import json
import re
import sys

import pytest
import torch
from running import ROOT

import config
from dinov2 import build_network
from optim import schedules

sys.path.insert(0, str(ROOT / "scripts"))
import recipes

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
    assert re.search(r"^#   reaches .*not measured$", head, re.MULTILINE)
    total, images = cfg.steps * cfg.batch, IMAGES[name.split("/")[1].split("_")[0]]
    epochs = int(re.search(r"(\d+) epochs", head)[1])
    assert total / images == pytest.approx(epochs, rel=0.005)
    rate = int(re.search(r"25 minutes need ([\d,]+) images/s", head)[1].replace(",", ""))
    assert total / (25 * 60) == pytest.approx(rate, rel=0.005)


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


def test_the_log_of_the_default_run_gives_the_figures_of_its_card():
    lines = (ROOT / "docs" / "runs" / "default-0.jsonl").read_text(encoding="utf-8").splitlines()
    first, *_, last = [line for line in map(json.loads, lines) if "knn" in line]
    said = f"{last['knn']:.1f} % from {first['knn_random']:.1f} %"
    for page in ("config.yaml", "docs/runs/README.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert said in text or said.replace(" from", ",") in text


def test_the_table_of_tries_is_that_of_the_results():
    assert recipes.table(recipes.results()) in recipes.PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("words", recipes.TRIES)
def test_a_try_is_a_config(words):
    words = f"{recipes.BASE} {recipes.QUIET} {words}".split()
    assert config.load(ROOT / "config.yaml", words).precision == "fp32"


def test_every_result_belongs_to_a_try():
    assert {result["words"] for result in recipes.results()} <= set(recipes.TRIES)
