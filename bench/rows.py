"""Every row of docs/benchmarks.md for one GPU, in less than 8 minutes.

    python -m bench gpu [--official PATH] [--to FOLDER] [tiny]

Each row is a `python -m bench` of its own, which ends after its limit; whatever one does, the next
follows. The most important ones come first, as no row begins when the time is over. "tiny" is a
rehearsal with the smallest network, also on a CPU.
"""

import subprocess
import sys
import time

from config import UserError

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


def take(words, option):
    """The word behind an option, or ""; both leave the list of words."""
    if option not in words:
        return ""
    at = words.index(option)
    if at + 1 == len(words):
        raise UserError(f"{option}: name a folder behind it")
    words.pop(at)
    return words.pop(at)


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
    """(whether it went well, what it printed or its last line) of `python -m bench ...`."""
    start = [sys.executable, "-m", "bench", *command]
    try:
        done = subprocess.run(start, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return False, f"took more than {limit:.0f} s"
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return done.returncode == 0, last if done.returncode else done.stdout


def main(words):
    """Run them all; the exit code is 1 if one failed."""
    end, failed = time.monotonic() + 60 * MINUTES, []
    for command in commands(words):
        line, left = " ".join(["python -m bench", *command]), end - time.monotonic()
        print(f"$ {line}", flush=True)
        well, said = outcome(command, min(LIMIT, left)) if left > 0 else (False, "no time is left")
        print(said if well else f"failed: {said}\n", flush=True)
        if not well:
            failed.append(f"  {line}: {said}")
    print("\n".join([f"{len(ROWS) - len(failed)} of {len(ROWS)} rows measured", *failed]))
    sys.exit(bool(failed))
