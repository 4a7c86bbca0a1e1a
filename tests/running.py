"""Tiny runs of train.py for the tests, each in a process of its own.

A server imports PyTorch once and forks for every run (the `forkserver` of multiprocessing), which
saves the seconds that `python train.py` needs to start. What it forks is a process like any other:
it has an exit code, writes to files, and can be killed.
"""

import importlib
import json
import multiprocessing
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from weights import checkpoint
from weights.checkpoint import checkpoints

ROOT = Path(__file__).resolve().parent.parent

TINY = ROOT / "tests" / "tiny.yaml"


def tiny(out, photos, *words):
    """The command line of a tiny run into `out` over the images in `photos`."""
    return [str(TINY), f"out={out}", f"data.root={photos}", *words]


def make_photos(root, splits=(("train", 30), ("val", 10)), mode="RGB", apart=127):
    """A folder with train/{dark,light} and val/{dark,light}: noise of two brightnesses.

    They are so many levels apart. Where any network tells all from all, floors cannot be mixed up.
    """
    rng = np.random.default_rng(0)
    for split, count in splits:
        for i in range(count):
            name = ["dark", "light"][i % 2]
            folder = Path(root, split, name)
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(255 - apart, size=(24, 28, 3), dtype=np.uint8) + apart * (i % 2)
            Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(folder / f"{i}.png")
    return root


class Run:
    """A main() of this repository in its own process, from now on."""

    def __init__(self, folder, words, program="train.py", limit=None):
        folder.mkdir(parents=True, exist_ok=True)
        self.printed, self.complained = folder / "stdout.txt", folder / "stderr.txt"
        words, files = list(words), (str(self.printed), str(self.complained))
        args = (program, words, *files, multiprocessing.get_start_method(), limit)
        self.process = server().Process(target=call, args=args)
        self.process.start()

    def finish(self):
        """Wait for the end; returns self, with code, out and err."""
        self.process.join(120)
        assert self.process.exitcode is not None, f"hangs: {self.complained.read_text()}"
        return self

    def wait_for(self, condition):
        """Until condition() is true, or the process has ended."""
        wait_for(lambda: condition() or not self.process.is_alive())

    def kill(self, number):
        if self.process.is_alive():
            os.kill(self.process.pid, number)

    code = property(lambda self: self.process.exitcode)
    out = property(lambda self: self.printed.read_text())
    err = property(lambda self: self.complained.read_text())


def run(folder, words, program="train.py", limit=None):
    """limit: bytes that no file of the process may exceed, as if the disk were full."""
    return Run(folder, words, program, limit).finish()


def call(program, words, out, err, start_method, limit):
    """What the forked process does."""
    if limit is not None:  # Python ignores the signal, so writing raises OSError
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    # Its data workers start as they do in a process that was not forked.
    multiprocessing.set_start_method(start_method, force=True)
    for number, path in (1, out), (2, err):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.exit(main_of(program)(words))


def file_of(program):
    """The file behind `python train.py`, `python -m evals.linear` or `python -m pictures`."""
    if program.endswith(".py"):
        return ROOT / program
    path = ROOT / program.replace(".", "/")
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


def main_of(program):
    """Its main()."""
    path = file_of(program).relative_to(ROOT).with_suffix("")
    return importlib.import_module(".".join(path.parts)).main


def server():
    context = multiprocessing.get_context("forkserver")
    # The server does not know the path that pytest has set; it inherits the environment.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    context.set_forkserver_preload(["train", "eval_knn", "running", "torch._dynamo"])
    return context


def wait_for(condition, seconds=60):
    """Until condition() is true; returns what it returned."""
    end = time.time() + seconds
    while not (value := condition()):
        assert time.time() < end, "this never happened"
        time.sleep(0.002)
    return value


def log_of(out):
    """The lines of a run's log.jsonl."""
    path = Path(out, "log.jsonl")
    text = path.read_text() if path.exists() else ""
    # The last line may be half written: by a run that is at work, or by one that was killed.
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def losses_of(out):
    """What a log says that does not depend on the clock: {(step, key): value}; no step twice."""
    values = {}
    for line in log_of(out):
        for key in line.keys() - {"images_per_second", "data_wait", "memory_gb", "seconds"}:
            assert (line["step"], key) not in values or key in ("step", "images"), "a step twice"
            values[line["step"], key] = line[key]
    return values


def tensors_of(out):
    """All tensors of the newest checkpoint and of teacher.pt, by name."""
    newest = checkpoints(out)[-1]
    found = {}
    for path in newest.glob("*.safetensors"):
        found |= load_file(path)
    teacher = checkpoint.read(Path(out, "teacher.pt"))
    for part, values in teacher.items():
        if isinstance(values, dict) and part != "config":
            found |= {f"teacher.pt {part}.{name}": value for name, value in values.items()}
    return found


def assert_same_run(out, expected):
    """Two run folders hold the same weights, moments, centres and losses, to the last bit."""
    assert losses_of(out) == losses_of(expected)
    found, wanted = tensors_of(out), tensors_of(expected)
    assert found.keys() == wanted.keys()
    assert any("exp_avg_sq" in name for name in found) and any("center" in name for name in found)
    different = [name for name in found if not torch.equal(found[name], wanted[name])]
    assert not different, different
