"""scripts/benchmarks.py: who is compared with whom, and what is written of it.

Run: pytest tests/test_benchmarks.py        Speed itself is never asserted.
"""

import json
import sys

import pytest
import torch
from running import ROOT, TINY

import config
from bench import measure
from bench.measure import Clock, Work
from config import UserError

sys.path.insert(0, str(ROOT / "scripts"))
import benchmarks
import parts
import peers

CPU = torch.device("cpu")


# ---- parts alone --------------------------------------------------------------------------------


def test_augmentation_starts_from_a_jpeg_of_the_stated_size():
    assert len(parts.jpeg(375, 500, 95)) == pytest.approx(110_000, rel=0.03)
    assert len(parts.jpeg(32, 32, 79)) == pytest.approx(1_000, rel=0.1)
    work = parts.augment(config.load(TINY), CPU)
    assert "500 x 375" not in work.title and "32 x 32" in work.title
    work.contenders["ours"](clock := Clock(CPU))
    assert list(clock.seconds()) == ["decode", "crops", "colour"]


# ---- the comparison -----------------------------------------------------------------------------


def test_a_contender_that_computes_something_else_is_refused():
    for theirs in [1.0, 2.1], float("nan"):
        given = {"ours": lambda clock: [1.0, 2.0], "theirs": lambda clock, it=theirs: it}
        with pytest.raises(UserError, match="theirs computes something else than ours"):
            measure.take_turns(Work("", benchmarks.agreeing(given)), CPU)
    given["theirs"] = lambda clock: [1.0, 2.01]
    measure.take_turns(Work("", benchmarks.agreeing(given)), CPU)


def test_extra_memory_is_the_peak_of_a_run_and_not_what_was_there_before():
    before = torch.ones(20_000_000)  # 80 MB

    def work():
        x = torch.ones(50_000_000)  # 200 MB, and for a moment 400
        return (x + before[0]).sum()

    found = benchmarks.extra_memory(lambda clock: work())
    assert found is None or 0.35 < found < 0.45


# ---- the page -----------------------------------------------------------------------------------


def test_a_row_replaces_the_one_of_the_same_command_and_device(tmp_path):
    told = {"title": "Told", "text": ["by others"]}
    (tmp_path / "benchmarks.json").write_text(json.dumps([told]))
    numbers = {"quartiles": [1.0, 1.0], "runs": 3, "memory_gb": None, "milliseconds": {}}
    for device, rate in ("this", 1.0), ("other", 2.0), ("this", 3.0):
        made = {"title": "Step", "device": device, "setting": "", "command": "the same"}
        benchmarks.save(made | {"rows": {"ours": {"rate": rate, **numbers}}}, tmp_path)
    first, *kept = json.loads((tmp_path / "benchmarks.json").read_text())
    assert first == told and [r["rows"]["ours"]["rate"] for r in kept] == [2.0, 3.0]
    page = (tmp_path / "benchmarks.md").read_text()
    assert "## Told\n\nby others" in page and "| ours | 3 |" in page


DOCS = ROOT / "docs"


def test_the_committed_page_is_made_from_the_committed_numbers():
    records = json.loads((DOCS / "benchmarks.json").read_text())
    assert (DOCS / "benchmarks.md").read_text() == benchmarks.page(records)


def test_every_command_of_the_page_can_be_read(monkeypatch):
    found = []
    monkeypatch.setattr(peers, "find_official", found.append)
    records = json.loads((DOCS / "benchmarks.json").read_text())
    for record in (record for record in records if "command" in record):
        what, _, named, folder, _ = benchmarks.arguments(record["command"].split()[2:])
        assert what in benchmarks.WHAT and folder == "docs"
        assert all(hasattr(peers, f"{peer}_{what}") for peer in named)
    assert "~/dinov2" in found


# ---- all rows at once ---------------------------------------------------------------------------


def test_every_row_for_a_gpu_can_be_read(monkeypatch):
    monkeypatch.setattr(peers, "find_official", lambda path: None)
    commands = list(benchmarks.commands(["--official", "/d", "--to", "docs", "tiny"]))
    assert len(commands) == len(benchmarks.ROWS) >= 9
    for command in commands:
        _, cfg, _, folder, _ = benchmarks.arguments(command)
        assert folder == "docs" and cfg.vit.size == "nano" and cfg.data.root == "synthetic"
    assert sum("--official" in command for command in commands) == 2
    assert not any("--official" in command for command in benchmarks.commands([]))


def test_when_a_row_fails_the_next_one_follows(monkeypatch, capsys):
    said = iter([(True, "a table"), (False, "out of memory"), (True, "another table")])
    monkeypatch.setattr(benchmarks, "ROWS", ["step", "losses", "augment"])
    monkeypatch.setattr(benchmarks, "outcome", lambda command, limit: next(said))
    with pytest.raises(SystemExit) as ended:
        benchmarks.main(["gpu"])
    printed = capsys.readouterr().out
    assert ended.value.code == 1 and "2 of 3 rows measured" in printed
    assert printed.endswith("\n  python scripts/benchmarks.py losses --to runs: out of memory\n")


@pytest.mark.slow
def test_a_rehearsal_on_a_cpu_writes_table_numbers_and_profile(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)
    kept = [benchmarks.ROWS[0], benchmarks.ROWS[1], "step config.yaml attention=varlen"]
    monkeypatch.setattr(benchmarks, "ROWS", kept)
    with pytest.raises(SystemExit):
        benchmarks.main(["gpu", "--to", str(tmp_path), "tiny"])
    assert "attention=varlen has no kernel for cpu" in capsys.readouterr().out
    made = json.loads((tmp_path / "benchmarks.json").read_text())
    assert [r["title"].split(":")[0] for r in made] == ["Step", "Losses, sinkhorn"]
    assert "aten::addmm" in (tmp_path / "profile.txt").read_text()


@pytest.mark.slow
def test_a_row_has_a_limit():
    well, said = benchmarks.outcome(["step"], limit=0.5)
    assert not well and said == "took more than 0 s"


# ---- command line -------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["losses", "attention"])
def test_what_is_measured_is_added_to_the_page(what, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(measure, "TURNS", 2)
    monkeypatch.setattr(measure, "matmul_peak", lambda device, dtype: 1e9)
    benchmarks.main([what, str(TINY), "data.root=synthetic", "--to", str(tmp_path)])
    assert "| ours |" in capsys.readouterr().out
    (made,) = json.loads((tmp_path / "benchmarks.json").read_text())
    assert made["command"].startswith(f"python scripts/benchmarks.py {what} ")
    assert made["rows"]["ours"]["rate"] > 0


@pytest.mark.parametrize(
    "words, message",
    [
        (["speed"], "speed: cannot be measured; use one of step, data"),
        (["step", "--official", "/nowhere"], "/nowhere: not a checkout of facebookresearch/dinov2"),
        (["step", "--official"], "--official: name a folder behind it"),
        (["losses", str(TINY), "lightly"], "lightly: has nothing to compare with losses"),
        (["gpu", "--form"], "gpu: --form is unknown; use --official PATH, --to FOLDER or tiny"),
        (["step", str(TINY), "--to", "/dev/null/x"], "--to /dev/null/x: cannot be written"),
    ],
)
def test_a_wrong_word_gets_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        benchmarks.main(words)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_importing_the_official_package_leaves_our_module_of_that_name_alone(tmp_path, monkeypatch):
    folder = tmp_path / "dinov2" / "layers"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("")
    (folder / "__init__.py").write_text("from dinov2.layers.one import ONE\n")
    (folder / "one.py").write_text("ONE = 1\n")
    monkeypatch.setitem(peers.sys.modules, "xformers", None)
    monkeypatch.setenv("XFORMERS_DISABLED", "1")
    monkeypatch.setattr(peers, "CHECKOUT", None)
    peers.find_official(tmp_path)
    layers = peers.official("layers")
    assert layers.ONE == 1
    import dinov2

    assert dinov2.LARGE_CROPS == 2
    for name in ("dinov2.layers", "dinov2.layers.one"):
        del peers.sys.modules[name]
