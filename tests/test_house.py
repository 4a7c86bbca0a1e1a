"""The house: imports run one way, the root is the method, and the whole stays small.

Run: pytest tests/test_house.py -s        (seconds; -s prints the counts of lines)
"""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter

import pytest
from running import ROOT

ROOMS = ("images", "weights", "evals", "pictures", "bench", "monitor", "kernels")
CORE = {"vit", "heads", "losses", "augment", "dinov2", "optim", "attention"}
# What the root takes from the rooms. Of images/ it is what data.py reads, of kernels/ what stands
# for a plain function on a GPU; the others are doors towards results, opened where they are used.
DOORS = {
    "attention": {"kernels.build", "kernels.short"},
    "parallel": {"kernels.build"},
    "data": {"images.sources"},
    "eval_knn": {"evals.frozen"},
    "hubconf": {"weights.load", "weights.plain"},
    "train": {
        "images.evaluation",
        "images.sources",
        "weights.checkpoint",
        "weights.start",
        "monitor.report",
        "monitor.results",
        "monitor.watch",
        "pictures.history",
    },
    "distill": {
        "images.evaluation",
        "images.sources",
        "weights.load",
        "weights.start",
        "monitor.results",
    },
}


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


FILES = {module_of(path): path for path in ROOT.glob("*.py")}
FILES |= {module_of(path): path for room in ROOMS for path in (ROOT / room).glob("*.py")}


def imports(text):
    """The modules of ours that a file imports, at its top or inside of a function."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & FILES.keys()


GRAPH = {name: imports(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def faults(graph):
    """What a graph {module: modules that it imports} has against the rules, in words."""
    wrong = []
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        wrong.append(f"a circle: {' -> '.join(reversed(error.args[1]))}")
    for name in CORE & graph.keys():
        inside = {"parallel", "config"} | {m for m in graph if m.startswith("kernels.")}
        wrong += [f"{name} -> {m}" for m in graph[name] - CORE - inside]
    for name in graph:
        if "." not in name:
            rooms = {m for m in graph[name] if "." in m}
            wrong += [f"no door: {name} -> {m}" for m in rooms - DOORS.get(name, set())]
    return sorted(wrong)


def test_imports_run_one_way():
    assert not faults(GRAPH)


@pytest.mark.parametrize(
    "name, more, fault",
    [
        ("config", "parallel", "a circle"),
        ("monitor.report", "pictures.history", "a circle"),
        ("vit", "eval_knn", "vit -> eval_knn"),
        ("losses", "images.index", "no door: losses -> images.index"),
        ("train", "evals.linear", "no door: train -> evals.linear"),
    ],
)
def test_a_wrong_direction_is_noticed(name, more, fault):
    planted = GRAPH | {name: GRAPH[name] | {more}}
    assert any(words.startswith(fault) for words in faults(planted))


def lines(names):
    return sum(FILES[name].read_text(encoding="utf-8").count("\n") for name in names)


def test_the_root_holds_the_method_and_little_else():
    root = [name for name in FILES if "." not in name]
    print(f"\nroot: {len(root)} files, {lines(root):,} lines")
    assert len(root) <= 14 and lines(root) <= 3600


def test_training_loads_little_and_no_tools():
    code = "import sys, train; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    loaded = set(done.stdout.split())
    files = {name if name in FILES else f"{name}.__init__" for name in loaded} & FILES.keys()
    print(f"\nimport train: {len(files)} files, {lines(files):,} lines")
    assert "train" in files and len(files) <= 18 and lines(files) <= 4500
    assert not {name.partition(".")[0] for name in files} & {"pictures", "evals", "bench"}


def test_all_tools_together_stay_readable():
    print(f"\nall but tests and scripts: {len(FILES)} files, {lines(FILES):,} lines")
    assert lines(FILES) <= 9500


def test_no_room_hides_a_package_of_python_or_of_ours():
    names = {name.partition(".")[0] for name in FILES}
    assert not names & (sys.stdlib_module_names | {"datasets", "models", "utils", "torch", "numpy"})
