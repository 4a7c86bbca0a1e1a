"""docs/: what it points at exists, what it prints is so, what it lists is complete.

Run: pytest tests/test_docs.py        (some twenty seconds; `-m slow` draws the figures too)

  links      [words](path) leads to a file; `file.py:name` names a function, class or constant there
  python     blocks of a lesson run from top to bottom; a text block behind one is what it prints
  commands   name programs, configs and keys that exist; those in fenced blocks run, made tiny,
             unless they are marked `# needs a GPU` or `# needs data`, or the tests of their program
             run them (indented ones record how a figure was measured)
  lists      docs/ablations.md has every line marked "Ablation:", docs/map.md every comment
             "Differs from the official code", and neither has more
"""

import ast
import collections
import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from running import ROOT, file_of, make_photos, run, tiny
from test_readme import MADE_TINY, README, code_lines

sys.path.insert(0, str(ROOT / "scripts"))
import ablations

import config

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LESSONS = sorted((ROOT / "docs" / "lessons").glob("[0-9]*.md"))
MAP, FLIPS = ROOT / "docs" / "map.md", ROOT / "docs" / "ablations.md"
ROOMS = ("images", "weights", "evals", "pictures", "bench", "monitor")
PROGRAMS = [*ROOT.glob("*.py"), *(file for room in ROOMS for file in (ROOT / room).glob("*.py"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def title(path):
    return str(path.relative_to(ROOT))


# ---- links --------------------------------------------------------------------------------------


def names_in(path):
    """Every function, class, method and constant of a Python file, as `name` or `Class.name`."""
    found = set()

    def collect(body, prefix):
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                collect(node.body, f"{prefix}{node.name}.")
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            for target in targets if isinstance(node, (ast.Assign, ast.AnnAssign)) else []:
                elements = target.elts if isinstance(target, ast.Tuple) else [target]
                found.update(prefix + e.id for e in elements if isinstance(e, ast.Name))

    collect(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return found


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_every_function_that_a_page_names_exists(page):
    wrong = []
    for file, name in re.findall(r"`([\w/]+\.py):([\w.]+)`", page.read_text(encoding="utf-8")):
        if not (ROOT / file).exists() or name not in names_in(ROOT / file):
            wrong.append(f"{file}:{name}")
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_every_relative_link_leads_to_a_file(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    wrong = [link for link in links if not leads_somewhere(link, page)]
    assert not wrong


def leads_somewhere(link, page):
    """Whether a relative link leads to a file, and its #anchor to a heading there."""
    file, _, anchor = link.partition("#")
    target = page.parent / file if file else page
    if not anchor or not target.exists():
        return target.exists()
    headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
    slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
    return anchor in slugs


def test_a_link_to_a_missing_file_or_heading_is_noticed(tmp_path):
    page = tmp_path / "a.md"
    page.write_text("# One, [two]\n")
    links = ["a.md", "b.md", "#one-two", "a.md#one-two", "a.md#two"]
    assert [leads_somewhere(link, page) for link in links] == [True, False, True, True, False]


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_a_link_to_a_function_leads_to_its_file(page):
    links = re.findall(r"\[`([\w/]+\.py)(?::[\w.]+)?`\]\(([^)\s]+)\)", page.read_text("utf-8"))
    wrong = [link for file, link in links if (page.parent / link).resolve() != ROOT / file]
    assert not wrong


def test_the_names_of_a_file_are_found(tmp_path):
    file = tmp_path / "a.py"
    file.write_text("A, B = 1, 2\nC: int = 3\nclass D:\n    def e(self): pass\n\ndef f(): g = 1\n")
    assert names_in(file) == {"A", "B", "C", "D", "D.e", "f"}


# ---- the lessons --------------------------------------------------------------------------------


def test_the_lessons_are_numbered_and_the_first_page_lists_them_in_order():
    assert [path.name[:2] for path in LESSONS] == [f"{n:02}" for n in range(1, len(LESSONS) + 1)]
    text = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\(lessons/([\w-]+\.md)\)", text) == [path.name for path in LESSONS]


@pytest.mark.parametrize("lesson", LESSONS, ids=title)
def test_a_lesson_has_all_its_parts(lesson):
    text = lesson.read_text(encoding="utf-8")
    assert text.startswith("# ")
    for part in ("## What and why", "## In the paper", "## In the code", "## Try it"):
        assert part in text, part
    assert text.count("<details>") == text.count("</details>") == 2  # two exercises with answers
    assert re.search(r"!\[[^\]]+\]\([\w.-]+\.png\)", text), "no figure"
    assert 60 <= len(text.splitlines()) <= 150


def snippets(page):
    """[(code, what it prints or None)] of a page, in order."""
    blocks = FENCE.findall(page.read_text(encoding="utf-8"))
    pairs = zip(blocks, [*blocks[1:], ("", "")], strict=True)
    return [
        (b[1], after[1] if after[0] == "text" else None) for b, after in pairs if b[0] == "python"
    ]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def desk(tmp_path_factory, photos):
    """A folder like the repository's, in which somebody has trained already (but briefly)."""
    folder = tmp_path_factory.mktemp("desk")
    for name in ("configs", "config.yaml"):
        (folder / name).symlink_to(ROOT / name)
    words = tiny(folder / "runs" / "default", photos, "steps=2", "crops.global_size=32")
    words += ["log.pictures=true"]
    done = run(folder / "log", words)
    assert done.code == 0, done.err
    return folder


@pytest.mark.parametrize("page", [*LESSONS, ROOT / "docs" / "faq.md"], ids=title)
def test_snippets_run_and_print_what_the_page_says(page, desk, monkeypatch):
    monkeypatch.chdir(desk)
    names = {}
    for code, expected in snippets(page):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, title(page), "exec"), names)
        if expected is not None:
            assert printed.getvalue() == expected


def test_a_snippet_is_paired_with_the_text_behind_it(tmp_path):
    page = tmp_path / "a.md"
    page.write_text("```python\na\n```\n```text\n1\n```\nb\n```python\nc\n```\n")
    assert snippets(page) == [("a\n", "1\n"), ("c\n", None)]


# ---- commands -----------------------------------------------------------------------------------


def shell_lines(text):
    """The commands of a page, with their comments: first those in blocks, then those in a text."""
    lines = [line.strip() for line in code_lines(text)]
    lines += re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    lines = [part for line in lines for part in line.split(" && ")]
    command = r"(python|torchrun) .*(\.py\b|-m (?!pip|pytest))"
    return [line for line in lines if re.match(command, line)]


def split(line):
    """(words before the program, program, words behind it), without the comment."""
    words = shlex.split(line, comments=True)
    at = next(i for i, w in enumerate(words) if w.endswith(".py") or words[i - 1] == "-m")
    return words[:at], words[at], words[at + 1 :]


def understands(program, key):
    """Whether `key` is one of the config's, or one that the program's text explains."""
    text = file_of(program).read_text(encoding="utf-8")
    return bool(config.type_of(key) or re.search(rf"\b{key}\b", text))


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_every_command_names_a_program_a_config_and_keys_that_there_are(page):
    wrong = []
    for line in shell_lines(page.read_text(encoding="utf-8")):
        _, program, words = split(line)
        files = [file_of(program), *(ROOT / word for word in words if word.endswith(".yaml"))]
        wrong += [f"{line}: {file}" for file in files if not file.exists()]
        keys = [word.partition("=")[0] for word in words if "=" in word] if not wrong else []
        wrong += [f"{line}: {key}" for key in keys if not understands(program, key)]
    assert not wrong


def test_the_commands_of_a_page_are_found():
    page = "Say `python -m bench.plan C gpus=8`.\n\n"
    page += "    python train.py a.yaml && torchrun --n 2 x.py\n\n"
    page += "```sh\npython eval_knn.py RUN \\\n  k=1  # needs a GPU\n```\n"
    lines = shell_lines(page)
    assert [split(line)[1] for line in lines] == ["eval_knn.py", "train.py", "x.py", "bench.plan"]
    assert split(lines[0]) == (["python"], "eval_knn.py", ["RUN", "k=1"])
    assert understands("bench.plan", "gpus") and understands("bench.plan", "optim.lr")
    assert not understands("bench.plan", "gpuss") and not understands("bench.plan", "optim.lrr")


# Run by the tests of the program itself, or too long: timing, planning, whole experiments.
ELSEWHERE = ("scripts/", "bench", "distill.py")


def is_run(line):
    launcher, program, words = split(line)
    alone = not any(word.startswith("--nproc") for word in launcher)
    elsewhere = program.startswith(ELSEWHERE) or any(word.endswith(".onnx") for word in words)
    return alone and not elsewhere and not re.search("# needs (a GPU|data)", line)


def blocks(page):
    """The text of the fenced blocks of a page that hold commands, fences included."""
    found = FENCE.finditer(page.read_text(encoding="utf-8"))
    return "\n".join(block[0] for block in found if block[1] in ("", "sh"))


COMMANDS = {line for page in PAGES[1:] for line in shell_lines(blocks(page))}
COMMANDS = sorted(COMMANDS - set(shell_lines(README)))  # test_readme.py runs those
BRIEF = {
    "train.py": [*MADE_TINY, "crops.global_size=32", "log.pictures=false"],
    "evals.linear": ["iterations=5", "batch=8", "logistic=2"],
}


@pytest.mark.parametrize("line", list(filter(is_run, COMMANDS)))
def test_a_command_runs(line, desk, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(desk)
    _, program, words = split(line)
    photo = str(next(photos.rglob("*.png")))
    ours = {"/photos": str(photos), "photo.jpg": photo, "init_from=FILE": "init_from=runs/default"}
    ours |= {"curated=/good": f"curated={photos}/train", "data.root=chosen/list.txt": "seed=0"}
    ours |= {"to=/shards": f"to={tmp_path / 'made'}", "head_steps=1000": "head_steps=1"}
    words = [ours.get(word, word).replace("docs/", f"{ROOT}/docs/") for word in words]
    if "--help" not in words:
        words += BRIEF.get(program, [])
    if program in ("train.py", "eval_knn.py", "evals.linear") or "config.yaml" in words:
        words += [f"data.root={photos}"]
    if program in ("train.py", "pictures"):
        words += [f"out={tmp_path / 'made.gif'}"]
    done = run(tmp_path / "log", words, program)
    assert done.code == 0, done.err


@pytest.mark.slow
def test_training_on_two_processes_runs_as_the_lesson_says(photos, tmp_path):
    line = next(line for line in COMMANDS if "--nproc_per_node=2 train.py" in line)
    words = shlex.split(line)[1:]
    words += [*(w for w in MADE_TINY if "parallel" not in w), f"data.root={photos}"]
    launch = [sys.executable, "-m", "torch.distributed.run", *words, f"out={tmp_path / 'run'}"]
    done = subprocess.run(launch, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_one_command_draws_the_figures(tmp_path, monkeypatch, desk):
    import drawing
    import figures

    monkeypatch.setattr(drawing, "FOLDER", tmp_path)
    for figure in figures.FREE:
        figure()
    drawn = {path.name for path in tmp_path.glob("*.png")}
    shown = re.findall(r"\(([\w-]+\.png)\)", "".join(path.read_text("utf-8") for path in LESSONS))
    assert set(shown) - drawn <= {"10-neighbours.png"}  # which needs a trained network


# ---- lists that must be complete ----------------------------------------------------------------


def file_name(path):
    return title(path) if path.is_relative_to(ROOT) else path.name


def places(path, phrase):
    """Where a phrase stands in a file: `file.py:function`, `file.py:CONSTANT` or `file.py`."""
    text, name = path.read_text(encoding="utf-8"), file_name(path)
    tree, found = ast.parse(text), []
    # A phrase may run over a line's end, so search without line ends, indents and comment signs.
    lines = [line.strip().lstrip("#").strip() for line in text.splitlines()]
    flat, starts = "", []
    for line in lines:
        starts.append(len(flat))
        flat += line + " "
    for match in re.finditer(re.escape(phrase), flat):
        number = sum(start <= match.start() for start in starts)
        found.append(":".join(filter(None, [name, owner(tree, number)])))
    return found


def owner(tree, number):
    """The function or class around a line, or the constant that it stands at or before."""
    words, body, at = [], tree.body, None
    while body is not None:
        inside = [n for n in body if n.lineno <= number <= n.end_lineno]
        node = inside[0] if inside else None
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            words.append(node.name)
            body = node.body
            continue
        if not words:  # in the module itself
            after = [n for n in body if n.end_lineno >= number and isinstance(n, ast.Assign)]
            in_docstring = node is not None and isinstance(node, ast.Expr)
            at = None if in_docstring or not after else after[0].targets[0].id
        body = None
    return ".".join(words) or at


def listed(page, heading):
    """The `file.py:name` that begin the rows or headings of a page, below one of its headings."""
    text = page.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(r"^(?:\| |### )\[`([\w/]+\.py(?::[\w.]+)?)`\]", text, re.MULTILINE)


def test_the_owner_of_a_line_is_found(tmp_path):
    file = tmp_path / "a.py"
    file.write_text(
        '"""Odd: this\n is."""\nA = 1  # Odd: this is\n# Odd: this is\nB = 2\n\n\ndef f():\n'
        "    # Odd: this\n    # is\n    return 1\n\n\nclass C:\n    def g(self):\n"
        '        """Odd: this is."""\n'
    )
    assert places(file, "Odd: this is") == ["a.py", "a.py:A", "a.py:B", "a.py:f", "a.py:C.g"]


def test_every_deviation_from_the_official_code_is_on_the_map():
    marked = [
        place for path in PROGRAMS for place in places(path, "Differs from the official code")
    ]
    counted = collections.Counter(marked)
    assert collections.Counter(listed(MAP, "Where we differ on purpose")) == counted


def test_every_ablation_line_is_listed():
    marked = [place for path in PROGRAMS for place in places(path, "Ablation:")]
    assert sorted(listed(FLIPS, "The lines")) == sorted(marked)


@pytest.mark.parametrize("change", ablations.CHANGES, ids=lambda change: change.name)
def test_an_ablation_still_fits_the_code_and_is_in_the_table(change):
    if change.file:
        text = (ROOT / change.file).read_text(encoding="utf-8")
        assert ablations.patched(text, change.old, change.new, change.file) != text
        assert change.new in ablations.patched(text, change.old, change.new, change.file)
    assert f"\n| {change.name} |" in FLIPS.read_text(encoding="utf-8")
    assert change.against in {other.name for other in ablations.CHANGES}


def test_the_table_of_ablations_is_written_between_its_markers(tmp_path):
    page = tmp_path / "a.md"
    for old in ("", "old\n"):
        page.write_text(f"one\n<!-- measured -->\n{old}<!-- end -->\ntwo\n")
        ablations.insert(page, "new")
        assert page.read_text() == "one\n<!-- measured -->\nnew\n<!-- end -->\ntwo\n"


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_a_program_that_a_page_speaks_of_exists(page):
    named = re.findall(r"`([\w/]+\.(?:py|yaml|slurm))`", page.read_text(encoding="utf-8"))
    roots = (ROOT, page.parent)
    assert not [name for name in named if not any(Path(r, name).exists() for r in roots)]
