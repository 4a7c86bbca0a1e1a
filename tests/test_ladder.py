"""The ladder: rows change what they say and nothing else, and the page shows the results file.

Run: pytest tests/test_ladder.py        (some ten seconds; one tiny training)
"""

import itertools
import json
import sys

import pytest
import torch
import torch.nn.functional as F
from running import ROOT, make_photos

import config

sys.path.insert(0, str(ROOT / "scripts"))
import ladder

KEYS = [key for key, _ in config.documented() if key]
PAGE = (ROOT / "docs" / "ladder.md").read_text(encoding="utf-8")


def config_of(number):
    return config.load(ROOT / "config.yaml", ladder.words(ladder.changes_up_to(number)))


def result(number, seed, knn=50.0):
    fields = {"knn": knn, "linear": 60.0, "knn_random": 30.0, "knn_pixels": 20.0}
    fields["linear_random"] = 40.0
    overrides = ladder.changes_up_to(number)
    return {"row": ladder.LADDER[number].name, "seed": seed, "overrides": overrides} | fields


@pytest.mark.parametrize("number", range(1, len(ladder.LADDER)))
def test_a_row_changes_what_it_says_and_nothing_else(number):
    before, now = config_of(number - 1), config_of(number)
    different = {k for k in KEYS if config.lookup(before, k) != config.lookup(now, k)}
    assert different == ladder.LADDER[number].changes.keys()


def test_the_first_row_names_the_value_of_everything_that_changes_later():
    later = {key for row in ladder.LADDER[1:] for key in row.changes}
    assert later <= ladder.LADDER[0].changes.keys()


def test_the_last_row_has_the_parts_of_the_official_vit_g():
    official, ours = (
        config.load(ROOT / "configs" / "vitg14.yaml"),
        config_of(len(ladder.LADDER) - 1),
    )
    for key in ("loss.centering", "head.separate"):
        assert config.lookup(ours, key) == config.lookup(official, key)
    for key in ("loss.koleo", "vit.layerscale", "vit.drop_path"):
        assert config.lookup(ours, key) > 0 and config.lookup(official, key) > 0
    assert ours.vit.ffn == "swiglu"


def test_finished_runs_are_not_done_again(tmp_path, monkeypatch):
    done, results = [], tmp_path / "results.jsonl"

    def train(out, words):
        done.append(words)
        return {"knn": 1.0, "linear": 2.0}

    monkeypatch.setattr(ladder, "train", train)
    monkeypatch.setattr(ladder, "LADDER", ladder.LADDER[:3])
    ladder.run_all([0], range(3), results, tmp_path, {})
    assert [words[-1] for words in done] == ["seed=0"] * 3
    ladder.run_all([0, 1], range(3), results, tmp_path, {})
    assert [words[-1] for words in done] == ["seed=0"] * 3 + ["seed=1"] * 3
    lines = results.read_text().splitlines()
    results.write_text("\n".join(lines[:2] + lines[3:]) + "\n")
    ladder.run_all([0, 1], range(3), results, tmp_path, {})
    assert done[6:] == [done[2]]
    ladder.run_all([0], range(3), results, tmp_path, {"steps": 7})  # another ladder
    assert len(done) == 10


def test_all_rows_of_a_seed_come_before_the_next_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(ladder, "train", lambda out, words: {"knn": 1.0, "linear": 2.0})
    ladder.run_all([0, 1], range(len(ladder.LADDER)), tmp_path / "results.jsonl", tmp_path, {})
    order = [(r["seed"], r["row"]) for r in ladder.read_results(tmp_path / "results.jsonl")]
    assert order == [(seed, row.name) for seed in (0, 1) for row in ladder.LADDER]


def test_a_run_is_trained_and_evaluated(tmp_path, monkeypatch):
    photos = make_photos(tmp_path / "photos")
    monkeypatch.setattr(ladder, "LADDER", ladder.LADDER[:1])
    small = {"steps": 2, "batch": 8, "data.root": str(photos), "crops.local_count": 2}
    results = tmp_path / "results.jsonl"
    ladder.run_all([3], [0], results, tmp_path / "runs", small)
    (line,) = ladder.read_results(results)
    assert line["seed"] == 3 and line["overrides"]["head.prototypes"] == 32
    assert line["linear"] == line["linear_random"] == 100  # dark and light pictures
    written = config.load(tmp_path / "runs" / "00-seed3" / "config.yaml")
    assert (written.seed, written.steps, written.vit.layerscale) == (3, 2, 0.0)
    assert line["knn"] == json.loads((tmp_path / "runs/00-seed3/summary.json").read_text())["knn"]


def test_the_logistic_regression_is_at_the_minimum_of_its_loss():
    x_ND, label_N = torch.randn(200, 5), torch.arange(200) % 3
    layer = ladder.fit(x_ND, label_N, decay=1e-2)
    loss = F.cross_entropy(layer(x_ND), label_N) + 1e-2 * layer.weight.square().sum()
    for slope in torch.autograd.grad(loss, layer.parameters()):
        assert slope.abs().max() < 1e-4


def test_the_logistic_regression_tells_shifted_clouds_apart():
    label_N = torch.arange(300) % 3
    x_ND = torch.randn(300, 4) + 100 * F.one_hot(label_N, 4) + 7
    assert ladder.logistic_regression(x_ND, label_N, x_ND, label_N) == 100
    assert ladder.logistic_regression(x_ND, label_N, x_ND, (label_N + 1) % 3) == 0


def test_three_equal_runs_against_three_are_called_different_once_in_ten_times():
    said = []
    for chosen in itertools.combinations(range(6), 3):
        others = [value for value in range(6) if value not in chosen]
        said.append(ladder.verdict(list(chosen), others))
    assert sum(word != "no difference" for word in said) == len(said) / 10
    assert ladder.verdict([1, 2, 3], [4, 5, 6]) == "helps"
    assert ladder.verdict([4, 5, 6], [1, 2, 3]) == "harms"
    assert ladder.verdict([1, 2], [4, 5]) == "too few seeds"


def test_the_table_states_mean_range_and_verdict():
    results = [result(0, seed, knn) for seed, knn in enumerate([40, 41, 42])]
    results += [result(1, seed, knn) for seed, knn in enumerate([50, 51, 55])]
    text = ladder.table(ladder.by_row(results, {}))
    assert "| 41.0 (40.0-42.0) |" in text
    cells = "3 | 52.0 (50.0-55.0) | 60.0 (60.0-60.0) | 30.0 and 40.0 | +11.0: helps"
    assert f"| `vit.layerscale=0.1` | {cells} |" in text


def test_a_row_is_not_compared_where_the_row_above_is_missing():
    rows = ladder.by_row([result(0, 0), result(2, 0)], {})
    assert [row.name for row, *_ in rows] == ["iBOT-like", "+ stochastic depth"]
    assert ladder.conclusion(rows) == "" and "seeds |" not in ladder.table(rows).splitlines()[-1]


def test_results_of_another_ladder_are_not_shown():
    other = result(1, 0) | {"overrides": ladder.changes_up_to(1) | {"steps": 7}}
    assert [row.name for row, *_ in ladder.by_row([result(0, 0), other], {})] == ["iBOT-like"]


def test_the_page_shows_the_results_file():
    results = ladder.read_results(ROOT / "docs" / "ladder.jsonl")
    rows = ladder.by_row(results, {})
    assert ladder.table(rows) in PAGE and ladder.conclusion(rows) in PAGE


def test_draw_writes_the_picture_and_the_table(tmp_path):
    results = [json.dumps(result(number, seed)) for number in range(3) for seed in range(2)]
    (tmp_path / "results.jsonl").write_text("\n".join(results))
    marks = ["<!-- table -->", "old", "<!-- end table -->", "<!-- conclusion -->", "old"]
    (tmp_path / "page.md").write_text("\n".join(["before", *marks, "<!-- end conclusion -->", ""]))
    ladder.main(["draw", f"results={tmp_path}/results.jsonl", f"page={tmp_path}/page.md"])
    text = (tmp_path / "page.md").read_text()
    assert text.startswith("before\n<!-- table -->\n| |")
    assert "- **too few seeds**: LayerScale, stochastic depth\n<!-- end" in text
    assert "old" not in text and "+ stochastic depth" in text
    assert (tmp_path / "page.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["draw", "results=nowhere.jsonl"], "nowhere.jsonl"),
        (["run", "seeds"], "seeds=[0]"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(capsys, words, complaint):
    with pytest.raises(SystemExit) as left:
        ladder.main(words)
    error = capsys.readouterr().err
    assert left.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and complaint in error


def test_the_page_names_commands_that_exist(capsys):
    with pytest.raises(SystemExit) as left:
        ladder.main(["--help"])
    assert not left.value.code
    help_text = capsys.readouterr().out
    for word in ("run", "draw"):
        assert f"python scripts/ladder.py {word}" in PAGE and word in help_text
