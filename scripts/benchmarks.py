"""Write docs/benchmarks.md: how fast we are, beside the official code and LightlySSL.

    python scripts/benchmarks.py WHAT [CONFIG.yaml] [key=value ...] [profile] [lightly]
                                 [--official PATH] [--to FOLDER]
    python scripts/benchmarks.py step config.yaml lightly --official ~/dinov2 --to docs
    python scripts/benchmarks.py gpu [--official PATH] [--to FOLDER] [tiny]

WHAT is losses, attention or augment (parts.py), or one of `python -m bench`, with its CONFIG and
keys. Peers that are named run in the same process, in turns with ours, and have to compute the same
numbers (peers.py): a checkout of the official code, and pip install lightly. --to is the folder of
benchmarks.json and benchmarks.md, to which results are added (runs); "profile" also writes
profile.txt there.

"gpu" measures every row of the page for one GPU in less than 8 minutes. Each row is a process of
its own, which ends after its limit; whatever one does, the next follows. The most important ones
come first, as no row begins when the time is over. "tiny" is a rehearsal with the smallest network,
also on a CPU.
"""

import ctypes
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import parts
import peers

import config
from bench import __main__ as bench
from bench.measure import Clock, longest, measure, table
from config import UserError
from parallel import dtype_of, keep_memory

PROGRAM = "python scripts/benchmarks.py"

M_MMAP_THRESHOLD, M_MMAP_MAX = -3, -4  # of malloc.h
WHAT = bench.WHAT | {work.__name__: work for work in (parts.losses, parts.attention, parts.augment)}

# ---- one row -------------------------------------------------------------------------------------


def take(words, option):
    """The word behind an option, or ""; both leave the list of words."""
    if option not in words:
        return ""
    at = words.index(option)
    if at + 1 == len(words):
        raise UserError(f"{option}: name a folder behind it")
    words.pop(at)
    return words.pop(at)


def arguments(argv):
    """(what, config, peers, folder, whether to profile) from the command line."""
    words = list(argv)
    folder, checkout = take(words, "--to") or "runs", take(words, "--official")
    named = [word for word in words if word == "lightly"]
    if checkout:
        peers.find_official(checkout)
        named.insert(0, "official")
    what, cfg, wants_profile = bench.arguments([w for w in words if w != "lightly"], WHAT)
    return what, cfg, named, folder, wants_profile


def check_agreement(answers, tolerance=0.01):
    """Raise UserError if a contender computes other numbers: then a ratio means nothing.

    answers: {contender: numbers, or None}; the tolerance is relative to the largest of ours.
    """
    known = {name: torch.as_tensor(a) for name, a in answers.items() if a is not None}
    for name, answer in known.items():
        error = ((answer - known["ours"]).abs().max() / known["ours"].abs().max()).item()
        if not error <= tolerance:
            raise UserError(f"{name} computes something else than ours: {error:.2g} apart")


def agreeing(contenders):
    """The contenders, each of which in its first run must compute what ours, the first, did."""
    answers = {}

    def checked(name, run):
        def run_and_check(clock):
            answer = run(clock)
            if name not in answers:
                answers[name] = answer
                check_agreement(answers)

        return run_and_check

    return {name: checked(name, run) for name, run in contenders.items()}


def with_its_own_memory(run, device):
    """A peer's run, for which glibc hands large pieces of memory back, as it does by default."""
    mallopt = os.name == "posix" and getattr(ctypes.CDLL(None), "mallopt", None)
    if device.type != "cpu" or not mallopt:
        return run

    def run_by_default(clock):
        mallopt(M_MMAP_MAX, 65536)
        mallopt(M_MMAP_THRESHOLD, 32 << 20)  # to which the default rises by itself
        try:
            return run(clock)
        finally:
            keep_memory()

    return run_by_default


def compare(argv):
    """Measure one kind of work, ours and the peers' in turns; print it and add it to the page."""
    what, cfg, named, folder, wants_profile = arguments(argv)
    with config.writing(f"--to {folder}", "choose another folder"):  # not after minutes of work
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    work, device = bench.prepare(WHAT[what], cfg)
    for name in named:
        peer = getattr(peers, f"{name}_{what}", None)
        if peer is None:
            raise UserError(f"{name}: has nothing to compare with {what}")
        work.contenders[name] = with_its_own_memory(peer(cfg, device, *work.given), device)
    work.contenders = agreeing(work.contenders)
    versions = f"PyTorch {torch.__version__}, Python {platform.python_version()}"
    setting = f"{versions}, threads: {torch.get_num_threads()}"
    record = {"title": work.title, "device": product(device), "setting": setting}
    record |= measure(work, device, dtype_of(cfg)) | {"command": " ".join([PROGRAM, *argv])}
    if device.type == "cpu":
        for name, run in work.contenders.items():
            record["rows"][name]["memory_gb"] = extra_memory(run)
    print(f"{record['title']}\n{record['device']}, {record['setting']}\n\n{table(record)}")
    save(record, folder)
    if wants_profile:
        Path(folder, "profile.txt").write_text(record["command"] + "\n" + longest(work, device))


def extra_memory(run):
    """Gigabytes that a run on a CPU needs at its peak beyond what was in use before; or None."""
    if not os.access("/proc/self/clear_refs", os.W_OK):  # Linux only
        return None
    ctypes.CDLL(None).malloc_trim(0)  # freed memory goes back to the system, else it hides the need
    before = process_memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    run(Clock(torch.device("cpu")))
    return (process_memory("VmHWM") - before) / 1e9


def process_memory(key):
    """Bytes of this process: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def product(device):
    """The name of the GPU; or of the processor, and its widest vector instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall("model name[^:]*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    return f"{(names or [platform.machine()])[0]} ({torch.backends.cpu.get_cpu_capability()})"


# ---- the page ------------------------------------------------------------------------------------

PAGE = """# Benchmarks

Made by `python scripts/benchmarks.py`, from `benchmarks.json` beside this page; `python -m bench`
measures ours alone. Ratios are what to quote: absolute figures belong to the machine. Contenders of
a table ran in one process and in turns; quartiles show the spread. "Extra memory" is the peak of
one run above what was in use before it. "The peak" is the rate of a large matrix product, measured
in the same run; counted are the matrix products of a step, without what stochastic depth leaves
out. The first run, which may have to compile, is apart. On a CPU, ours keeps the memory of freed
tensors; for the others glibc hands large pieces back, as by default. All rows for one GPU:

    python scripts/benchmarks.py gpu --official ~/dinov2 --to docs
"""


def page(records):
    """All records as a page; some are a text instead, of figures that came from elsewhere."""
    parts = [PAGE]
    for r in records:
        parts.append(f"## {r['title']}\n")
        if "text" in r:
            parts += [*r["text"], ""]
        else:
            parts += [f"{r['device']}, {r['setting']}\n", f"    {r['command']}\n", table(r) + "\n"]
    return "\n".join(parts)


def save(record, folder):
    """Put a record among those of FOLDER/benchmarks.json, and write FOLDER/benchmarks.md anew.

    It takes the place of what the same command gave on this device.
    """
    path, new = Path(folder, "benchmarks.json"), (record["command"], record["device"])
    try:
        records = json.loads(path.read_text()) if path.exists() else []
        records = [r for r in records if (r.get("command"), r.get("device")) != new] + [record]
        path.write_text(json.dumps(records, indent=1) + "\n")
        path.with_suffix(".md").write_text(page(records))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}; choose another folder with --to") from None


# ---- all rows for one GPU ------------------------------------------------------------------------

MINUTES, LIMIT = 8, 150  # for all; seconds for one row, of which the first compiled step takes most
LARGE = "configs/vitl16.yaml batch=64 loss.centering=sinkhorn"

# "official" stands for --official PATH, if it is given.
ROWS = [
    f"step {LARGE} compile=true official profile",
    f"losses {LARGE} official",
    "step configs/cifar10_gpu.yaml compile=true",
    "step configs/imagenette_gpu.yaml compile=true",
    f"step {LARGE} compile=false",
    "step configs/vitg14.yaml batch=24 compile=true",
    f"step {LARGE} compile=true attention=varlen",
    f"step {LARGE} compile=true attention=xformers",
    f"attention {LARGE}",
]
TINY = (
    "vit.size=nano vit.ffn=mlp vit.patch=8 batch=4 crops.global_size=32 crops.local_size=16 "
    "head.prototypes=64 head.ibot_prototypes=0 head.hidden=32 precision=fp32 compile=false "
    "data.workers=0"
)


def commands(words):
    """The command lines of all rows, from the words behind `gpu`."""
    words = list(words)
    checkout, folder = take(words, "--official"), take(words, "--to") or "runs"
    if words not in ([], ["tiny"]):
        raise UserError(f"gpu: {words[0]} is unknown; use --official PATH, --to FOLDER or tiny")
    for row in ROWS:
        own = [word for word in row.split() if word != "official"]
        compared = ["--official", checkout] if checkout and "official" in row else []
        yield [*own, *compared, *(TINY.split() if words else []), "--to", folder]


def outcome(command, limit):
    """(whether it went well, what it printed or its last line) of a row."""
    start = [sys.executable, __file__, *command]
    try:
        done = subprocess.run(start, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return False, f"took more than {limit:.0f} s"
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return done.returncode == 0, last if done.returncode else done.stdout


def measure_all(words):
    """Run them all; the exit code is 1 if one failed."""
    end, failed = time.monotonic() + 60 * MINUTES, []
    for command in commands(words):
        line, left = " ".join([PROGRAM, *command]), end - time.monotonic()
        print(f"$ {line}", flush=True)
        well, said = outcome(command, min(LIMIT, left)) if left > 0 else (False, "no time is left")
        print(said if well else f"failed: {said}\n", flush=True)
        if not well:
            failed.append(f"  {line}: {said}")
    print("\n".join([f"{len(ROWS) - len(failed)} of {len(ROWS)} rows measured", *failed]))
    sys.exit(bool(failed))


@config.report_errors
def main(argv):
    if not argv or {"-h", "--help"} & set(argv):
        print(__doc__.strip())
    elif argv[0] == "gpu":
        measure_all(argv[1:])
    else:
        compare(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
