"""docs/family.md: its keys are those of the cards, its table is that of the results.

Run:  pytest tests/test_family_page.py
"""

import re
import sys

import pytest
import yaml
from running import ROOT

import config

sys.path.insert(0, str(ROOT / "scripts"))
import family
import ladder

PAGE = (ROOT / "docs" / "family.md").read_text(encoding="utf-8")
STEPS = {
    "DINO to iBOT": ("dino_vits16", "ibot_vits16"),
    "iBOT to DINOv2": ("ibot_vits16", "vitl14"),
    "DINOv2 to registers": ("vitl14", "vitl14_reg4"),
}


def card(name):
    return config.load(ROOT / "configs" / f"{name}.yaml")


@pytest.mark.parametrize("heading", STEPS)
def test_each_key_of_a_step_goes_from_one_card_to_the_next(heading):
    text = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([\w.]+)` \| (\S+) \| (\S+) \|", text, re.MULTILINE)
    assert rows
    for key, *values in rows:
        expected = [config.lookup(card(name), key) for name in STEPS[heading]]
        kind = config.type_of(key)
        assert [config.convert(yaml.safe_load(v), kind, key, "") for v in values] == expected, key


def test_the_keys_of_the_ancestors_are_off_in_every_other_card():
    keys = "head.norm_last_layer", "optim.clip_by", "optim.freeze_by"
    assert all(f"| `{key}` |" in PAGE for key in keys)
    for path in (ROOT / "configs").glob("*.yaml"):
        if not path.name.startswith(("dino_", "ibot_")):
            values = [config.lookup(config.load(path), key) for key in keys]
            assert values == [False, "part", "lr"], path.name


def test_members_differ_in_what_the_table_says():
    def of(member):
        return config.load(ROOT / "config.yaml", ladder.words(member.overrides))

    def differ(a, b):
        keys, a, b = [key for key, _ in config.documented() if key], of(a), of(b)
        return {key for key in keys if config.lookup(a, key) != config.lookup(b, key)}

    dino, ibot, dinov2, registers = family.FAMILY
    assert differ(dino, ibot) == {"loss.ibot", "mask.probability"}
    assert differ(ibot, dinov2) == {key for row in ladder.LADDER[1:] for key in row.changes}
    assert differ(dinov2, registers) == family.REGISTERS.keys()


def test_the_page_shows_the_results_file():
    rows = family.by_member(family.read_results(family.RESULTS))
    assert family.table(rows) in PAGE


def test_a_row_without_runs_says_so():
    rows = [(member, []) for member in family.FAMILY]
    assert family.table(rows).count("| 0 | not measured |") == 4
