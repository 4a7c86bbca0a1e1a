"""Every comment `Ablation:` is an instruction that works to the letter.

Run: pytest tests/test_ablations.py        (some ten seconds; helpers are in tests/running.py)

The code in backticks behind `Ablation:` replaces the line below the comment, or the line at whose
end the comment stands; words like `key=value` go to the command line. Each is followed here in a
copy of the code, by a process that takes one step with it.
"""

import multiprocessing
import re
import shutil
import sys

import pytest
from running import ROOT, TINY

ROOMS = ("images", "weights", "evals", "pictures", "bench", "monitor")
COMMENT = re.compile(r"Ablation: `(?P<new>[^`]+)`")
# With these, a step shows each of the changes.
WORDS = """
    data.root=synthetic data.synthetic_images=48 log.every=1000 loss.centering=sinkhorn
    vit.drop_path=0.5 augment.jitter=1 augment.blur=[0.5,0.5,0.5]
""".split()  # noqa: SIM905


def instructions():
    """[(file, number of the line to change, its new text)], from the comments of the code."""
    found = []
    for path in [*ROOT.glob("*.py"), *(p for room in ROOMS for p in (ROOT / room).glob("*.py"))]:
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        for number, line in enumerate(lines):
            if "Ablation:" not in line:
                continue
            said = " ".join(row.strip().lstrip("# ") for row in lines[number : number + 3])
            new = COMMENT.search(said)
            assert new, f"{path.name}:{number + 1}: no code in backticks behind `Ablation:`"
            at = number
            if line.lstrip().startswith("#"):
                at = next(i for i in range(number, len(lines)) if lines[i].lstrip()[:1] != "#")
            found.append((str(path.relative_to(ROOT)), at, new["new"]))
    return found


INSTRUCTIONS = instructions()


def step_in(tree, words, pipe):
    """In a forked process: a step by the code of `tree`, as numbers."""
    ours = {path.stem for path in ROOT.glob("*.py")} | {*ROOMS, "test_loop"}
    for name in [name for name in sys.modules if name.partition(".")[0] in ours]:
        del sys.modules[name]
    sys.path.insert(0, str(tree))
    from test_loop import is_step_of

    import config

    assert config.__file__ == str(tree / "config.py")
    pipe.send(is_step_of(words, 3))


def step(tree, words):
    """What a step by the code in a folder is."""
    ours, theirs = multiprocessing.Pipe()
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=step_in, args=(tree, words, theirs))
    process.start()
    theirs.close()
    numbers = ours.recv()  # EOFError if it died
    process.join()
    return numbers


@pytest.fixture(scope="module")
def before():
    return step(ROOT, WORDS)


@pytest.mark.parametrize("file, at, new", INSTRUCTIONS)
def test_an_instruction_works_as_it_is_written(file, at, new, tmp_path, before):
    for path in [*ROOT.glob("*.py"), *(p for room in ROOMS for p in (ROOT / room).glob("*.py"))]:
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    if re.fullmatch(r"[a-z_.]+=\S+", new):  # a key of the config
        assert step(tmp_path, [*WORDS, new]) != before
        return
    lines = (tmp_path / file).read_text(encoding="utf-8").splitlines()
    indent = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
    lines[at] = indent + new
    (tmp_path / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert step(tmp_path, WORDS) != before


def test_the_instructions_are_found():
    assert len(INSTRUCTIONS) >= 9 and TINY.exists()
