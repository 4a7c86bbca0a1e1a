"""monitor/report.py: what a run prints, logs, draws and sums up, whatever the images are.

Run: pytest tests/test_monitor.py        (some ten seconds; helpers are in tests/running.py)
"""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from running import ROOT, Run, log_of, make_photos, run, tiny
from torch import nn

import config
import data
import dinov2
import train
from config import Config
from images.sources import most_damaged, open_source
from monitor import report, results
from optim import schedules

TERMS = ["dino_global", "dino_local", "ibot", "koleo"]
HEALTH = ["teacher_entropy", "prototypes_used", "koleo_distance", "rankme"]
SCHEDULE = ["lr", "last_layer_lr", "weight_decay", "momentum", "teacher_temp"]
SPEED = ["images_per_second", "data_wait", "memory_gb", "seconds"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, photos):
    """(run folder, what it printed) of a run with pictures."""
    folder = tmp_path_factory.mktemp("whole")
    done = run(folder, tiny(folder / "run", photos, "log.pictures=true", "log.every=4"))
    assert done.code == 0, done.err
    assert done.err == ""
    return folder / "run", done.out


# ---- files --------------------------------------------------------------------------------------


def test_each_line_of_the_log_has_all_numbers(whole):
    steps = [line for line in log_of(whole[0]) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 4, 8, 12]
    assert [line["images"] for line in steps] == [8, 32, 64, 96]
    for line in steps:
        assert {*TERMS, *HEALTH, *SCHEDULE, *SPEED, "grad_backbone"} <= line.keys()
        assert line["loss"] == pytest.approx(sum(line[term] for term in TERMS), rel=1e-4)


def test_knn_is_logged_where_it_is_evaluated(whole):
    found = [line for line in log_of(whole[0]) if "knn" in line]
    assert [line["step"] for line in found] == [0, 5, 10, 12]
    assert [line["images"] for line in found] == [0, 40, 80, 96]
    assert sorted(found[0]) == ["images", "knn", "knn_pixels", "knn_random", "seconds", "step"]


def test_the_figure_reached_is_said_once_beside_what_needs_no_training(whole):
    floors = r"\(untrained network [\d.]+ %, raw pixels [\d.]+ %\)"
    assert len(re.findall(rf"step 12: k-NN [\d.]+ % of held-out images {floors}\n", whole[1])) == 1
    assert whole[1].partition("done: 96 images in ")[2].count("k-NN") == 0


def test_the_summary_holds_what_the_run_has_reached(whole):
    summary = json.loads((whole[0] / "summary.json").read_text())
    evaluated = [line["knn"] for line in log_of(whole[0]) if "knn" in line]
    assert summary["knn"] == evaluated[-1] and summary["knn_random"] == evaluated[0]
    assert 0 <= summary["knn_pixels"] <= 100
    assert summary["images"] == 96 and summary["seconds"] > 0 and summary["skipped_images"] == 0


def test_a_run_is_compared_with_the_reference_runs_of_its_recipe(whole, tmp_path, monkeypatch):
    cfg, rows = config.load(whole[0] / "config.yaml"), log_of(whole[0])
    place = {"minutes": 4.25, "device": "a laptop"}
    lines = [{"config": results.recipe_of(cfg)} | place, *rows]
    (tmp_path / "a-0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "broken.jsonl").write_text("{}\n{")
    monkeypatch.setattr(results, "REFERENCES", tmp_path)
    cfg.out, cfg.seed, cfg.data.root, cfg.log.every = "x", 7, "y", 3
    said = f"k-NN 12.3 %; reference run docs/runs/a-0.jsonl: {rows[-1]['knn']:.1f} %\n"
    assert results.compared(cfg, 12.34, rows[0]) == said
    assert not results.compared(cfg, None, {})  # no labels
    assert not results.compared(
        cfg, 12.34, {"knn_pixels": rows[0]["knn_pixels"] - 2}
    )  # other images
    cfg.optim.lr *= 2
    assert not results.compared(cfg, 12.34, rows[0])


def test_reference_runs_are_named_at_both_ends_of_a_run(photos, tmp_path, monkeypatch, capsys):
    run = ("docs/runs/a-0.jsonl", {"minutes": 4.25, "device": "a laptop"}, 9, 9)
    monkeypatch.setattr(results, "references", lambda cfg: iter([run, run]))
    monkeypatch.setattr(results, "compared", lambda cfg, knn, floors: f"{knn} {floors}\n")
    train.main(tiny(tmp_path / "run", photos, "steps=1"))
    said = capsys.readouterr().out
    assert said.count("reference docs/runs/a-0.jsonl: 4.2 minutes on a laptop\n") == 1
    assert said.index("4.2 minutes") < said.index("step 0: k-NN")
    assert re.search(r"^[\d.]+ {'knn_random': .*}\ndone: 8", said, re.MULTILINE)


@pytest.mark.parametrize("name", ["curves.png", "crops.png", "neighbours.png"])
def test_the_pictures_are_there(whole, name):
    assert min(Image.open(whole[0] / name).size) > 100


# ---- print --------------------------------------------------------------------------------------


def test_the_card_says_what_one_asks_before_a_long_run(whole):
    said = " ".join(whole[1].split())
    for text in [
        "cpu (", "threads: 1)", "float32", "processes: 1", "attention=auto (plain)", "30 from",
        "classes 2: dark, light", "10 held-out", "nano/8", "backbone", "dino_head", "0 to 12",
        "3.54e-04 at its peak", "8 images x (2 crops of 16 px + 2 of 8 px)",
        "an untrained network starts near dino_global", "ln K = 3.47", str(whole[0]),
    ]:  # fmt: skip
        assert text in said, text


def test_it_is_the_teacher_that_is_evaluated(monkeypatch):
    seen, silent = [], SimpleNamespace(rank=1, evaluation=lambda *_: None)
    evaluate = lambda backbone, *_: seen.append(backbone) or {"knn_20": 50.0}  # noqa: E731
    monkeypatch.setattr(results.eval_knn, "evaluate", evaluate)
    parts = {name: SimpleNamespace(backbone=name) for name in ("student", "teacher")}
    run = SimpleNamespace(cfg=Config(), report=silent, held_out=([], []), device=None, **parts)
    run.cfg.log.pictures = False
    results.evaluate_run(run, 5)
    results.final_report(run)
    assert seen == ["teacher", "teacher"]


def test_pixels_that_would_fill_the_memory_are_no_floor(monkeypatch):
    monkeypatch.setattr(results.eval_knn, "evaluate", lambda *_: {"knn_20": 50.0})
    for images, fit in (9_469, True), (1_281_167, False):  # Imagenette, ImageNet; at 224 px
        found = {}
        said = lambda step, result: found.update(result)  # noqa: B023, E731
        report = SimpleNamespace(rank=0, evaluation=said)
        run = SimpleNamespace(cfg=Config(), held_out=(range(images), []), device=None, known={})
        run.report, run.teacher = report, SimpleNamespace(backbone=None)
        run.cfg.log.pictures = False
        results.evaluate_run(run, 0)
        assert ("knn_pixels" in found) == fit and found["knn_random"] == 50.0


def test_the_card_says_that_a_learning_rate_never_reaches_its_peak():
    class Images(list):
        classes = ()

    cfg = Config()
    cfg.data.root = "synthetic"
    for steps, said in [(20, True), (200, False)]:
        cfg.steps, cfg.optim.warmup = steps, 100
        told = report.start_card(cfg, Images([0]), None, nn.Sequential(), torch.device("cpu"), 0)
        assert ("never reaches its peak: optim.warmup" in " ".join(told.split())) == said


LINE = (
    r"step 4/12  32 images  [\d,]+ images/s  ETA \d\d:\d\d  "
    r"loss [\d.]+ = dino_global [\d.]+ \+ dino_local [\d.]+ \+ ibot [\d.]+ \+ koleo -?[\d.]+  "
    r"lr [\de.-]+  data wait \d+%"
)


def test_without_a_terminal_progress_is_lines_of_text(whole):
    assert len([line for line in whole[1].splitlines() if re.fullmatch(LINE, line)]) == 1
    assert "\r" not in whole[1] and "\x1b" not in whole[1]


def on_a_terminal(words, columns=80):
    """What a program writes to a terminal of this width."""
    main, side = pty.openpty()
    termios.tcsetwinsize(side, (24, columns))
    with subprocess.Popen(words, stdout=side, stderr=side) as program:
        os.close(side)
        written = b""
        while part := read(main):
            written += part
    assert program.returncode == 0, written.decode()
    return written.decode()


def read(file):
    try:
        return os.read(file, 65536)
    except OSError:  # how Linux says that the other side is closed
        return b""


def test_a_terminal_shows_everything_in_rows_of_its_width(tmp_path, photos):
    words = tiny(tmp_path, photos, "log.knn_every=0", "data.val=")
    text = on_a_terminal([sys.executable, ROOT / "train.py", *words])
    rows = [row.strip() for row in re.split(r"[\r\n]|\x1b\[A", text)]
    for row in [
        r"step 8/12 \|.*\| 64 images  [\d,]+ images/s  ETA \d\d:\d\d",
        r"loss [\d.]+ = dino_global [\d.]+ \+ dino_local [\d.]+ \+ ibot [\d.]+ \+ koleo -?[\d.]+",
        r"lr [\de.-]+  data wait \d+%",
    ]:
        found = [each for each in rows if re.fullmatch(row, each)]
        assert found and all(len(each) <= 80 for each in found), row


# ---- images of every kind -----------------------------------------------------------------------


def test_a_folder_without_labels_needs_no_knn(tmp_path, photos):
    words = ["log.pictures=true", "steps=2", "crops.local_count=0"]
    done = run(tmp_path, tiny(tmp_path / "run", photos / "val" / "dark", *words, "batch=4"))
    assert done.code == 0, done.err
    told = " ".join(done.out.split())
    assert "classes 0: none" in told and "none: it needs two classes or more" in told
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["knn"] is None and summary["images"] == 8
    assert (tmp_path / "run" / "neighbours.png").exists()


def test_a_grey_folder_works_and_says_that_colours_stay(tmp_path):
    make_photos(tmp_path / "grey", mode="L")
    words = ["data.channels=1", "data.mean=[0.5]", "data.std=[0.25]", "log.pictures=true"]
    done = run(tmp_path, tiny(tmp_path / "run", tmp_path / "grey", *words, "steps=2"))
    assert done.code == 0, done.err
    assert "colour changes need RGB and are left out" in done.out


def test_fewer_labelled_images_than_k_still_give_a_figure(tmp_path, photos):
    make_photos(tmp_path / "few", [("train", 8), ("val", 4)])
    done = run(tmp_path, tiny(tmp_path / "run", tmp_path / "few", "steps=1"))
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["knn"] is not None


def spoil(folder, count):
    """Turn images into text files."""
    for path in sorted((folder / "train" / "dark").iterdir())[:count]:
        path.write_text("no image")


def test_a_damaged_image_is_skipped_counted_and_named_once(tmp_path):
    spoil(make_photos(tmp_path / "photos", [("train", 120), ("val", 4)]), 1)
    words = ["steps=30", "log.every=5", "log.knn_every=0"]  # two epochs
    stopped = Run(tmp_path, tiny(tmp_path / "run", tmp_path / "photos", *words))
    stopped.wait_for(lambda: len(log_of(tmp_path / "run")) >= 5)
    stopped.kill(signal.SIGTERM)
    printed = stopped.finish().out
    done = run(tmp_path, tiny(tmp_path / "run", tmp_path / "photos", *words))
    assert done.code == 0, done.err
    named = [line for line in log_of(tmp_path / "run") if "skipped" in line]
    assert len(named) == 1 and "dark/0.png: " in named[0]["skipped"]
    assert (printed + done.out).count("warning: damaged image skipped (1 so far): ") == 1
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["skipped_images"] == 1


def test_many_damaged_images_stop_the_run_a_few_do_not(tmp_path):
    spoil(make_photos(tmp_path / "photos", [("train", 60), ("val", 4)]), 21)
    words = ["steps=16", "log.knn_every=0"]
    done = run(tmp_path, tiny(tmp_path / "run", tmp_path / "photos", *words))
    assert done.code == 2
    assert done.err.count("error: ") == 1 and "21 of 60 images are damaged" in done.err
    assert "data.max_damaged=0.01" in done.err and "log.jsonl" in done.err
    words.append("data.max_damaged=0.4")
    done = run(tmp_path, tiny(tmp_path / "more", tmp_path / "photos", *words))
    assert done.code == 0, done.err


def test_twenty_damaged_images_stop_no_run_however_small_it_is():
    assert [most_damaged(Config(), n) for n in (60, 2000, 10**6)] == [20, 20, 10**4]


@pytest.mark.slow
def test_damaged_images_of_every_rank_are_named(tmp_path):
    spoil(make_photos(tmp_path / "photos", [("train", 60), ("val", 4)]), 21)
    words = tiny(tmp_path / "run", tmp_path / "photos", "steps=30", "parallel=ddp", "log.every=10")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    done = subprocess.run([*launch, ROOT / "train.py", *words], capture_output=True, text=True)
    assert done.returncode == 1  # torchrun's own
    assert len([line for line in log_of(tmp_path / "run") if "skipped" in line]) == 21
    assert "error: 21 of 60 images are damaged" in done.stderr


# ---- TensorBoard, W&B, collapse -----------------------------------------------------------------


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_missing_package_is_one_line(tmp_path, monkeypatch, package):
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    cfg = Config(out=str(tmp_path))
    setattr(cfg.log, package, "x")
    with pytest.raises(report.UserError, match=f"log.{package} .*: pip install {package}"):
        report.open_writers(cfg, start=0)


@pytest.mark.parametrize(
    "word, near",
    [("seed=0", 0.05), ("head.bottleneck=256", 0.02), ("loss.centering=softmax", 0.3)],
)
def test_an_untrained_network_starts_where_the_card_says(word, near):
    cfg = config.load(ROOT / "config.yaml", ["batch=16", "teacher.temp_start=0.06", word])
    cfg.precision = "fp32"
    student, teacher, centers, _ = train.build(cfg, torch.device("cpu"))
    batch = next(iter(data.loader(cfg, open_source("synthetic", cfg))))
    batch = train.to_device(batch, cfg, torch.device("cpu"))
    _, log = dinov2.objective(student, teacher, centers, batch, 0.06, cfg.loss)
    for name, value in dinov2.start_values(cfg).items():
        assert log[name].item() == pytest.approx(value, rel=near), name


def test_photographs_whose_colours_stay_are_noted():
    def notes(*words):
        cfg = config.load(ROOT / "config.yaml", words)
        return " ".join(report.notes(cfg))

    assert "start from configs/imagenette.yaml" in notes("data.root=/photos")
    assert not notes() and not notes("data.root=/photos", "augment.jitter=0.8")


def silent_reporter(said):
    """A Reporter without a run, whose words go to a list."""
    reporter = object.__new__(report.Reporter)
    reporter.cfg, reporter.warned, reporter.say = Config(), set(), said.append
    return reporter


def test_speed_and_waiting_are_those_since_the_line_before(monkeypatch):
    lines, clock = [], iter([110.0] * 2 + [120.0] * 2)
    reporter = silent_reporter([])
    reporter.cfg.batch, reporter.device, reporter.met = 8, torch.device("cpu"), []
    reporter.rank, reporter.world, reporter.bad, reporter.images = 0, 1, set(), 100
    reporter.last, reporter.waited = (2, 100.0), 5.0
    reporter.seconds, reporter.write, reporter.show = lambda: 0.0, lines.append, lambda line: None
    monkeypatch.setattr(report.time, "time", lambda: next(clock))
    for done in 12, 17:
        reporter.step(done, {"loss": torch.tensor(1.0)}, schedules(done, reporter.cfg))
    assert [line["images_per_second"] for line in lines] == [8.0, 4.0]
    assert [line["data_wait"] for line in lines] == [0.5, 0.0]


def test_the_time_that_is_left_is_that_of_the_images_that_are_left():
    said = []
    reporter = silent_reporter(said)
    reporter.rows, reporter.cfg.steps, reporter.cfg.batch = [], 100, 64
    numbers = dict.fromkeys(("images", "loss", "lr", "data_wait", "memory_gb"), 0)
    reporter.show(numbers | {"step": 40, "images_per_second": 32.0})
    assert "ETA 02:00" in said[0]


def test_a_continued_run_knows_its_floors_and_the_time_before(tmp_path, monkeypatch):
    lines = [{"step": 0, "knn": 3.0, "knn_random": 1.0, "knn_pixels": 2.0, "seconds": 0.5}]
    lines += [{"step": n, "loss": 1.0, "seconds": 10.0 * n} for n in (1, 2, 3)]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    said = []
    reporter = silent_reporter(said)
    reporter.out, reporter.rank, reporter.write = tmp_path, 0, lambda line: None
    assert reporter.earlier_lines(2) == lines[:3]  # step 3 is done again
    reporter.began = 100.0
    monkeypatch.setattr(report.time, "time", lambda: 107.0)
    assert reporter.seconds() == 27.0
    reporter.evaluation(2, {"knn": 4.0})
    assert said[0].endswith("4.0 % of held-out images (untrained network 1.0 %, raw pixels 2.0 %)")


HEALTHY = dict(zip(HEALTH, [5.0, 0.5, 0.8, 100.0], strict=True))
HEALTHY |= {"step": 20_000, "data_wait": 0.0, "teacher_temp": 0.055}
ILL = {
    "all images look alike": {"rankme": 1.1},
    "on one or two prototypes": {"prototypes_used": 1.1 / 65536, "teacher_entropy": 0.01},
    "targets are uniform": {"teacher_entropy": 11.09},
}


@pytest.mark.parametrize("words", ILL)
def test_a_collapse_is_told_once_and_in_plain_words(words):
    said = []
    reporter, ill = silent_reporter(said), HEALTHY | ILL[words]
    reporter.warn(HEALTHY)
    reporter.warn(ill | {"step": 10})  # in the warm-up
    assert not said
    for _ in range(2):
        reporter.warn(ill)
    assert len(said) == 1 and words in said[0]


def test_scores_that_favour_one_prototype_are_no_collapse_while_centred_targets_are_spread():
    said = []
    silent_reporter(said).warn(HEALTHY | {"prototypes_used": 1.1 / 65536})
    assert not said


def test_advice_looks_at_the_config_that_it_advises():
    few = HEALTHY | ILL["on one or two prototypes"]
    for centering, advised in [("softmax", True), ("sinkhorn", False)]:
        cfg = Config()
        cfg.loss.centering = centering
        (said,) = report.warnings_of(few, cfg)
        assert ("use loss.centering=sinkhorn" in said) == advised
    [uniform] = report.warnings_of(HEALTHY | ILL["targets are uniform"], Config())
    assert "now 0.055" in uniform  # still between teacher.temp_start and teacher.temp
    [alike] = report.warnings_of(HEALTHY | ILL["all images look alike"], Config())
    assert "loss.koleo=0.1" in alike and "optim.lr=0.004" in alike


def test_a_loop_that_waits_for_images_says_what_helps():
    [said] = report.warnings_of(HEALTHY | {"data_wait": 0.45}, Config())
    assert "data wait 45%" in said and "data.workers=8" in said and "images pack" in said
    assert not list(report.warnings_of(HEALTHY | {"data_wait": 0.25}, Config()))
