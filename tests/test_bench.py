"""Proves that the benchmark counts what it says: work and time.

Run: pytest tests/test_bench.py        Speed itself is never asserted.
"""

import multiprocessing
import time

import pytest
import torch
from running import ROOT, TINY, log_of, make_photos, run
from torch.utils.flop_counter import FlopCounterMode

import config
from bench import __main__ as bench
from bench import measure
from bench.measure import Clock, Work

CPU = torch.device("cpu")
SMALL = ["batch=4", "attention=plain", "loss.koleo=0", "mask.probability=1"]
SMALL += ["mask.ratio=[0.5,0.5]"]  # as many patches in every step


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"))


class NoClock:
    def mark(self, name):
        pass


# ---- how much work ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["vit.drop_path=0"],
        ["vit.drop_path=0.5"],  # of four images, two are left out: their work is not counted
        ["vit.ffn=swiglu", "vit.registers=3", "crops.local_count=3"],
        ["head.separate=true", "head.ibot_prototypes=48", "vit.drop_path=0"],
        ["loss.ibot=0", "head.layers=2", "vit.drop_path=0"],
    ],
)
def test_the_operations_of_a_step_are_those_that_pytorch_counts(words, photos):
    cfg = config.load(TINY, [f"data.root={photos}", *SMALL, "vit.drop_path=0.25", *words])
    work = bench.step(cfg, CPU)
    with FlopCounterMode(display=False) as counter:
        work.contenders["ours"](NoClock())
    assert work.flops == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_a_step_of_the_benchmark_is_a_step_of_training(tmp_path, photos):
    out = tmp_path / "run"
    words = [f"data.root={photos}", f"out={out}", "steps=1", "vit.drop_path=0"]
    measured = bench.step(config.load(TINY, words), CPU).contenders["ours"](NoClock())
    assert run(tmp_path, [str(TINY), *words]).code == 0
    (trained,) = (line["loss"] for line in log_of(out) if "loss" in line)
    assert measured == pytest.approx(trained, rel=1e-4)


# ---- time ---------------------------------------------------------------------------------------


def test_a_clock_books_time_under_the_name_of_the_mark_that_ends_it():
    clock = Clock(CPU)
    for name, seconds in (("a", 0.02), ("b", 0.001), ("a", 0.03)):
        time.sleep(seconds)
        clock.mark(name)
    spent = clock.seconds()
    assert list(spent) == ["a", "b"]
    assert 0.05 <= spent["a"] < 5 and spent["b"] >= 0.001


@pytest.mark.parametrize("leave_out, expected", [("data", 1.0), ("", 3.0)])
def test_a_phase_can_be_left_out_of_the_time(leave_out, expected):
    first = {"student": 60.0}  # to compile
    turns = {"ours": [first] + [{"data": 2.0, "student": 0.75, "rest": 0.25}] * 3}
    work = Work("", {}, leave_out=leave_out)
    (row,) = measure.rows(work, turns, {"ours": None}).values()
    assert row["rate"] == 1 / expected and row["first_seconds"] == 60
    assert row["milliseconds"] == {"data": 2000, "student": 750, "rest": 250}


def test_only_a_step_leaves_out_the_time_of_loading(photos):
    cfg = config.load(TINY, [f"data.root={photos}"])
    step, data = bench.step(cfg, CPU), bench.data(cfg, CPU)
    step.contenders["ours"](clock := Clock(CPU))
    assert step.leave_out in clock.seconds() and data.leave_out not in clock.seconds()


def test_contenders_take_turns(monkeypatch):
    order = []
    work = Work("", {name: lambda clock, name=name: order.append(name) for name in ("ours", "it")})
    monkeypatch.setattr(measure, "TURNS", 4)
    turns = measure.take_turns(work, CPU)
    assert order == ["ours", "it"] * 5  # the first to warm up
    assert len(turns["ours"]) == len(turns["it"]) == 5


def test_the_ratio_is_the_median_of_the_ratios_of_the_turns():
    ours, theirs = [1.0, 10.0, 2.0], [3.0, 20.0, 2.0]
    turns = {
        name: [{"student": seconds} for seconds in [99.0, *each]]
        for name, each in (("ours", ours), ("theirs", theirs))
    }
    rows = measure.rows(Work("", {}, images=4), turns, {"ours": 1.0, "theirs": None})
    assert rows["theirs"]["ours_over_it"] == 2.0  # of 3, 2 and 1
    assert rows["ours"]["rate"] == 2.0  # four images in the median of two seconds
    shown = measure.table({"rows": rows})
    assert "| theirs | 1.333 |" in shown and "**2.00x**" in shown


def test_the_share_of_the_peak_is_what_a_matrix_product_of_known_size_reaches(monkeypatch):
    monkeypatch.setattr(measure, "matmul_peak", lambda device, dtype: 1e6)
    work = Work("", {"ours": lambda clock: time.sleep(0.05)}, flops=2.5e4)
    record = measure.measure(work, CPU, torch.float32)
    assert 0.1 < record["share_of_peak"] <= 0.5
    assert record["tflops"] == record["share_of_peak"] * 1e6 / 1e12


# ---- command line -------------------------------------------------------------------------------


@pytest.fixture
def hurry(monkeypatch):
    monkeypatch.setattr(measure, "TURNS", 2)
    monkeypatch.setattr(measure, "matmul_peak", lambda device, dtype: 1e9)


@pytest.mark.parametrize("what", ["step", "data"])
def test_everything_that_is_measured_runs_on_a_tiny_config(hurry, what, photos, capsys):
    bench.main([what, str(TINY), f"data.root={photos}", "profile"])
    printed = capsys.readouterr().out
    assert "| ours |" in printed and "PyTorch" in printed and "aten::" in printed


@pytest.mark.parametrize("what", sorted(bench.WHAT))
def test_what_needs_no_data_asks_for_none(what):
    words = [what, str(ROOT / "configs" / "vitl16.yaml")]
    root = bench.arguments(words)[1].data.root
    assert root == ("data/imagenet" if what == "data" else "synthetic")
    assert bench.arguments([*words, "data.root=/photos"])[1].data.root == "/photos"


def test_the_processes_of_a_loader_end_before_the_program(photos, monkeypatch):
    at_exit = []
    monkeypatch.setattr(bench.atexit, "register", at_exit.append)
    cfg = config.load(TINY, [f"data.root={photos}", "data.workers=1"])
    next(batches := bench.batches(cfg, CPU))
    assert len(multiprocessing.active_children()) == 1
    for close in at_exit:
        close()
    assert not multiprocessing.active_children() and batches


@pytest.mark.parametrize(
    "words, message",
    [
        (["speed"], "speed: cannot be measured; use one of step, data"),
        (["step", str(TINY), "attention=varlen"], "attention=varlen has no kernel for cpu"),
        (["step", str(TINY), "lightly"], "cannot read 'lightly'"),
        (["step", "no_such.yaml"], "no_such.yaml: cannot be read (No such file"),
    ],
)
def test_a_wrong_word_gets_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        bench.main(words)
    assert ended.value.code == 2 and message in capsys.readouterr().err
