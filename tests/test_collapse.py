"""The five deaths: each run changes what it says, and does what its title says.

Run: pytest tests/test_collapse.py        (some seconds)
"""

import json
import sys

import numpy as np
import pytest
import torch
from running import ROOT

import config
from losses import SoftmaxCentering, koleo_loss
from optim import schedules

sys.path.insert(0, str(ROOT / "scripts"))
import collapse

KEYS = [key for key, _ in config.documented() if key]
PAGE = (ROOT / "docs" / "collapse.md").read_text(encoding="utf-8")


def config_of(name):
    return config.load(ROOT / "config.yaml", collapse.words(name))


@pytest.mark.parametrize("name", collapse.DEATHS)
def test_a_run_differs_from_the_healthy_one_in_what_it_says(name):
    healthy, ill = config_of("healthy"), config_of(name)
    different = {k for k in KEYS if config.lookup(healthy, k) != config.lookup(ill, k)}
    assert different == collapse.DEATHS[name].changes.keys()


def test_without_centering_the_centre_stays_at_zero():
    centre = SoftmaxCentering(8, config_of("no_centering").loss.center_momentum)
    for _ in range(3):
        centre(torch.randn(16, 8) + 5, 0.03)
    assert not centre.center.any()


def test_without_sharpening_the_teacher_is_softer_than_the_student_at_every_step():
    cfg = config_of("no_sharpening")
    assert all(schedules(s, cfg).teacher_temp > cfg.loss.student_temp for s in range(cfg.steps + 1))


def test_the_fast_teacher_is_the_student_itself():
    cfg = config_of("fast_ema")
    assert all(schedules(step, cfg).momentum == 0 for step in range(cfg.steps + 1))


def test_every_second_picture_is_blank_and_the_others_are_the_embedded_ones(tmp_path):
    words = collapse.blank_images(tmp_path, count=8)
    train = np.load(tmp_path / "train.npz")["images"]
    assert (train[::2] == 255).all() and all(image.std() > 5 for image in train[1::2])
    assert words[0] == f"data.root={tmp_path}/train.npz"
    assert (np.load(tmp_path / "test.npz")["images"].std(axis=(1, 2, 3)) > 5).all()


def test_blank_pictures_make_koleo_jump():
    alone = torch.randn(16, 32)
    half = torch.cat((alone[:8], torch.ones(8, 32)))
    assert koleo_loss(half) > 5 + koleo_loss(alone)


def test_warnings_and_errors_are_quoted_word_for_word(tmp_path):
    text = "step 1/2 ...\nwarning: collapse? all alike\nwarning: damaged image\nerror: not finite\n"
    (tmp_path / "printed.txt").write_text(text)
    assert collapse.words_printed(tmp_path) == ["warning: collapse? all alike", "error: not finite"]


def test_what_is_there_is_drawn_and_quoted(tmp_path):
    for name in collapse.DEATHS:
        out = tmp_path / "runs" / name
        out.mkdir(parents=True)
        lines = [{"step": s, "loss": 1.0} | dict.fromkeys(collapse.SIGNS, s / 9) for s in range(9)]
        (out / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
        (out / "printed.txt").write_text("warning: collapse? it is dead\n")
        config.dump(config.Config(steps=8), out / "config.yaml")
    page = tmp_path / "page.md"
    page.write_text("<!-- table -->\n\n<!-- end table -->\n<!-- words -->\n\n<!-- end words -->\n")
    collapse.main([f"runs={tmp_path / 'runs'}", f"page={page}"])
    text = page.read_text()
    assert text.count("warning: collapse? it is dead") == len(collapse.DEATHS)
    assert text.count("| stopped |") == len(collapse.DEATHS) and "| 0.889 |" in text
    assert page.with_suffix(".png").stat().st_size > 10_000


def test_the_page_has_a_section_for_each_death_and_its_picture():
    for death in list(collapse.DEATHS.values())[1:]:
        assert f"\n## {death.title[0].upper()}{death.title[1:]}\n" in PAGE, death.title
    assert "](collapse.png)" in PAGE and (ROOT / "docs" / "collapse.png").exists()
    assert "python scripts/collapse.py" in PAGE
