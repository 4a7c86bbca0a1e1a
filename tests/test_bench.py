"""Proves that the benchmark counts what it says: work, time, memory, and who is compared with whom.

Run: pytest tests/test_bench.py        Speed itself is never asserted.
"""

import json
import time

import pytest
import torch
from running import TINY, log_of, make_photos, run
from torch.utils.flop_counter import FlopCounterMode

import bench
import bench_official
import bench_ours
import config
import measure
from config import UserError
from measure import Clock, Work

CPU = torch.device("cpu")
SMALL = ["batch=4", "attention=plain", "loss.koleo=0", "mask.probability=1"]


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
    masked = len(next(bench_ours.batches(cfg, CPU)).mask_indices)
    with FlopCounterMode(display=False) as counter:
        bench_ours.our_step(cfg, CPU, bench_ours.batches(cfg, CPU))[0](NoClock())
    assert bench_ours.step_flops(cfg, masked) == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_a_step_of_the_benchmark_is_a_step_of_training(tmp_path, photos):
    out = tmp_path / "run"
    words = [f"data.root={photos}", f"out={out}", "steps=1", "vit.drop_path=0"]
    cfg = config.load(TINY, words)
    measured = bench_ours.our_step(cfg, CPU, bench_ours.batches(cfg, CPU))[0](NoClock())
    assert run(tmp_path, [str(TINY), *words]).code == 0
    (trained,) = (line["loss"] for line in log_of(out) if "loss" in line)
    assert measured == pytest.approx(trained, rel=1e-4)


# ---- time and memory ----------------------------------------------------------------------------


def test_a_clock_books_time_under_the_name_of_the_mark_that_ends_it():
    clock = Clock(CPU)
    for name, seconds in (("a", 0.02), ("b", 0.001), ("a", 0.03)):
        time.sleep(seconds)
        clock.mark(name)
    spent = clock.seconds()
    assert list(spent) == ["a", "b"]
    assert 0.05 <= spent["a"] < 5 and spent["b"] >= 0.001


def test_cpu_time_does_not_count_waiting(monkeypatch):
    monkeypatch.setattr(Clock, "tick", staticmethod(time.process_time))
    clock = Clock(CPU)
    time.sleep(0.2)
    clock.mark("asleep")
    assert clock.seconds()["asleep"] < 0.1
    assert measure.machine(CPU)["time"] == "CPU time"


def test_contenders_take_turns_and_loading_is_not_counted():
    order = []

    def contender(name):
        def work(clock):
            order.append(name)
            time.sleep(0.02)
            clock.mark("data")

        return work

    work = Work("", {name: contender(name) for name in ("ours", "theirs")})
    found = measure.measure(work, CPU, turns=4)
    assert order[2:10] == ["ours", "theirs"] * 4  # behind the warm-up
    assert found["ours"]["phases"]["data"] >= 0.02 > max(found["ours"]["seconds"])


def test_a_contender_that_computes_something_else_is_refused():
    work = Work("", {"ours": lambda clock: [1.0, 2.0], "theirs": lambda clock: [1.0, 2.1]})
    with pytest.raises(UserError, match="theirs computes something else than ours"):
        measure.measure(work, CPU)
    work.contenders["theirs"] = lambda clock: float("nan")
    with pytest.raises(UserError, match="theirs"):
        measure.measure(work, CPU)


def test_extra_memory_is_the_peak_of_a_run_and_not_what_was_there_before():
    before = torch.ones(20_000_000)  # 80 MB

    def work():
        x = torch.ones(50_000_000)  # 200 MB, and for a moment 400
        return (x + before[0]).sum()

    found = measure.extra_memory(work, CPU)
    assert found is None or 0.35 < found < 0.45


def test_the_ratio_is_the_median_of_the_ratios_of_the_turns():
    ours, theirs = [1.0, 10.0, 2.0], [3.0, 20.0, 2.0]
    found = {
        name: {"seconds": seconds, "phases": {"student": 0.5}, "memory": 1.0}
        for name, seconds in (("ours", ours), ("theirs", theirs))
    }
    made = measure.record(Work("t", found, images=4, flops=8.0), found, 16.0, "command", CPU)
    assert made["rows"]["theirs"]["ours_over_it"] == 2.0  # of 3, 2 and 1
    assert made["rows"]["ours"]["rate"] == 2.0  # four images in the median of two seconds
    assert made["rows"]["ours"]["share_of_peak"] == 8 / 2 / 16
    assert "| theirs | 1.333 |" in measure.table(made) and "**2.00x**" in measure.table(made)


# ---- the page -----------------------------------------------------------------------------------


def test_a_row_replaces_the_one_of_the_same_work_and_machine(tmp_path):
    made = {
        "title": "Step",
        "unit": "images/s",
        "machine": {"device": "this", "threads": 1, "time": "time", "torch": "2"},
        "command": "python bench.py step",
        "rows": {"ours": {"rate": 1.0, "quartiles": [1.0, 1.0], "runs": 3, "milliseconds": {}}},
    }
    missing = [("gpu", "fast", "python bench.py gpu"), ("cpu", "fast", "python bench.py step")]
    for device, rate in ("this", 1.0), ("other", 2.0), ("this", 3.0):
        made["machine"]["device"], made["rows"]["ours"]["rate"] = device, rate
        measure.save(made, tmp_path, missing)
    kept = json.loads((tmp_path / "benchmarks.json").read_text())
    assert [r["rows"]["ours"]["rate"] for r in kept] == [2.0, 3.0]
    page = (tmp_path / "benchmarks.md").read_text()
    assert "python bench.py gpu" in page.split("## Not measured")[1]
    assert "python bench.py step" not in page.split("## Not measured")[1]


def test_the_committed_page_is_made_from_the_committed_numbers():
    folder = config.Path(bench.__file__).parent / "docs"
    records = json.loads((folder / "benchmarks.json").read_text())
    assert (folder / "benchmarks.md").read_text() == measure.page(records, bench.NOT_MEASURED)


def test_the_commands_of_rows_that_are_not_measured_can_be_read():
    for _, _, command in bench.NOT_MEASURED:
        words = command.split()[2:]
        if "--official" in words:
            del words[words.index("--official") : words.index("--official") + 2]
        what, _, peers, folder = bench.arguments(words)
        assert what in ("step", "data") and folder == "docs" and peers in ([], ["lightly"])


# ---- command line -------------------------------------------------------------------------------


@pytest.fixture
def hurry(monkeypatch):
    monkeypatch.setattr(measure, "TURNS", 2)
    monkeypatch.setattr(bench, "matmul_peak", lambda device, dtype: 1e9)


@pytest.mark.parametrize("what", ["step", "losses", "backbone", "attention", "data"])
def test_everything_that_is_measured_runs_on_a_tiny_config(hurry, what, photos, tmp_path, capsys):
    bench.main([what, str(TINY), f"data.root={photos}", "--to", str(tmp_path)])
    assert "| ours |" in capsys.readouterr().out
    (made,) = json.loads((tmp_path / "benchmarks.json").read_text())
    assert (
        made["command"].startswith(f"python bench.py {what} ") and made["rows"]["ours"]["rate"] > 0
    )


def test_augmentation_starts_from_a_jpeg_of_the_stated_size():
    assert len(bench_ours.jpeg(375, 500, 110_000)) == pytest.approx(110_000, rel=0.03)
    assert len(bench_ours.jpeg(32, 32, 1_000)) == pytest.approx(1_000, rel=0.1)
    work = bench_ours.augmentation(config.load(TINY), CPU, [])
    assert "500 x 375" not in work.title and "32 x 32" in work.title
    work.contenders["ours"](clock := Clock(CPU))
    assert list(clock.seconds()) == ["decode", "crops", "colour"]


def test_knn_is_measured_on_features_of_any_number():
    work = bench_ours.knn(None, CPU, [], train=300, test=20, D=8, classes=5)
    assert work.images == 20 and work.contenders["ours"](NoClock()).shape == (20, 5)


@pytest.mark.parametrize(
    "words, message",
    [
        (["speed"], "speed: cannot be measured; use one of step, losses"),
        (["step", "--official", "/nowhere"], "/nowhere: not a checkout of facebookresearch/dinov2"),
        (["step", "--official"], "--official: name a folder behind it"),
        (["step", "official"], "give the path of a checkout, --official PATH"),
        (["step", "no_such.yaml"], "no_such.yaml: no such config file"),
    ],
)
def test_a_wrong_word_gets_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        bench.main(words)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_importing_the_official_package_leaves_our_module_of_that_name_alone(tmp_path, monkeypatch):
    folder = tmp_path / "dinov2" / "layers"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("")
    (folder / "__init__.py").write_text("from dinov2.layers.one import ONE\n")
    (folder / "one.py").write_text("ONE = 1\n")
    monkeypatch.setitem(bench_official.sys.modules, "xformers", None)
    monkeypatch.setenv("XFORMERS_DISABLED", "1")
    monkeypatch.setattr(bench_official, "CHECKOUT", None)
    bench_official.find(tmp_path)
    (layers,) = bench_official.modules("layers")
    assert layers.ONE == 1
    import dinov2

    assert dinov2.LARGE_CROPS == 2
    for name in ("dinov2.layers", "dinov2.layers.one"):
        del bench_official.sys.modules[name]
