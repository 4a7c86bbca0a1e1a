"""README.md: its commands run, and the files it speaks of exist.

Run: pytest tests/test_readme.py        (some ten seconds; helpers are in tests/running.py)

Commands are taken from the code blocks. Each runs as it stands, with words added that make it tiny
and put photographs and run folders where they are.
"""

import re
import shlex
import subprocess
import sys

import pytest
from running import ROOT, make_photos, run, tiny

README = (ROOT / "README.md").read_text(encoding="utf-8")


def code_lines(text):
    """The lines of fenced and of indented blocks; a line that ends in \\ goes on in the next."""
    fenced = r"^```[^\n]*\n(.*?)^```"
    blocks = re.findall(fenced, text, re.MULTILINE | re.DOTALL)
    blocks += re.findall(r"(?:^    .*\n?)+", re.sub(fenced, "", text, flags=re.M | re.S), re.M)
    return "\n".join(blocks).replace("\\\n", " ").splitlines()


def commands(text, script):
    """What the README gives to a script, as lists of words."""
    found = []
    for line in code_lines(text):
        for part in re.split(r"&&|;|\|", re.sub(r"\s#.*", "", line)):
            words = shlex.split(part)
            if words[:1] in (["torchrun"], ["python"], ["python3"]) and script in words:
                found.append(words[words.index(script) + 1 :])
    return found


TRAIN = commands(README, "train.py")
MADE_TINY = """
    steps=2 batch=8 accumulate=1 precision=fp32 device=cpu parallel=none attention=auto
    compile=false data.workers=0 crops.global_size=16 crops.local_size=8 crops.local_count=2
    vit.size=nano vit.patch=8 head.prototypes=32 head.hidden=32 head.bottleneck=16
""".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, photos):
    folder = tmp_path_factory.mktemp("trained")
    assert run(folder, tiny(folder / "run", photos, "steps=2", "log.pictures=true")).code == 0
    return folder / "run"


def test_blocks_of_both_kinds_are_found():
    text = "a\n\n    pip install x && torchrun --nproc 2 train.py a.yaml  # why\n\nb\n```sh\n" + (
        "python train.py c.yaml \\\n  out=d\n```\n    python eval_knn.py e\n"
    )
    assert commands(text, "train.py") == [["c.yaml", "out=d"], ["a.yaml"]]
    assert commands(text, "eval_knn.py") == [["e"]]


def test_the_two_commands_are_there():
    assert "pip install -r requirements.txt && python train.py config.yaml" in README
    assert "pip install -r requirements-dev.txt && pytest" in README


@pytest.mark.parametrize("words", TRAIN, ids=" ".join)
def test_a_training_command_runs(tmp_path, photos, words, monkeypatch):
    if "--help" in words:
        pytest.skip("test_train.py has it")
    monkeypatch.chdir(ROOT)
    places = [f"out={tmp_path / 'run'}", f"data.root={photos}", "data.val="]
    done = run(tmp_path, [*words, *MADE_TINY, *places])
    assert done.code == 0, done.err
    assert (tmp_path / "run" / "summary.json").exists()


def test_torchrun_is_a_way_to_start_it(tmp_path, photos):
    words = tiny(tmp_path / "run", photos, "steps=2", "log.knn=false")
    launch = [sys.executable, "-m", "torch.distributed.run", str(ROOT / "train.py"), *words]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr


@pytest.mark.parametrize("words", commands(README, "distill.py"), ids=" ".join)
def test_a_distillation_command_runs(tmp_path, trained, photos, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    places = [f"out={tmp_path / 'run'}", f"data.root={photos}", f"distill.teacher={trained}"]
    done = run(tmp_path, [*words, *MADE_TINY, *places], program="distill.py")
    assert done.code == 0, done.err
    assert (tmp_path / "run" / "teacher.pt").exists()


@pytest.mark.parametrize("words", commands(README, "eval_knn.py"), ids=" ".join)
def test_an_evaluation_command_runs(tmp_path, trained, photos, words):
    words = [word for word in words[1:] if not word.startswith("data.")]
    done = run(tmp_path, [str(trained), *words, f"data.root={photos}"], program="eval_knn.py")
    assert done.code == 0, done.err


@pytest.mark.parametrize("words", commands(README, "pictures"), ids=" ".join)
def test_a_picture_command_runs(tmp_path, trained, photos, words):
    if "--help" in words:
        pytest.skip("test_pictures.py has it")
    photo = str(next(photos.rglob("*.png")))
    there = [word.replace("docs/", f"{ROOT}/docs/") for word in words[2:] if "out=" not in word]
    there = [photo if word.startswith("/photos/") else word for word in there]
    done = run(tmp_path, [words[0], str(trained), *there, f"out={tmp_path / 'a.gif'}"], "pictures")
    assert done.code == 0, done.err
    assert (tmp_path / "a.gif").stat().st_size > 1000


@pytest.mark.parametrize("words", commands(README, "images"), ids=" ".join)
def test_a_command_about_data_runs(tmp_path, photos, words):
    words = [str(photos) if word == "/photos" else word for word in words]
    done = run(tmp_path, words, program="images")
    assert done.code == 0, done.err


def test_every_command_in_a_block_belongs_to_a_program_whose_commands_run():
    programs = {
        program
        for line in code_lines(README)
        for program in re.findall(r"(\w+\.py)\b|-m ([\w.]+)", line)
    }
    programs = {file or module for file, module in programs}
    here = {"train.py", "distill.py", "eval_knn.py", "pictures", "images"}
    beside_their_program = {"evals.linear", "evals.dense", "evals.features", "weights.export"}
    assert programs == here | beside_their_program


def test_files_that_are_named_exist():
    named = set(re.findall(r"`([\w./-]+\.(?:py|yaml|txt|toml))`", README))
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]
