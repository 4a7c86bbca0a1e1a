"""How long a piece of work takes, where the time goes, how much memory it needs: tools of bench/.

Contenders take turns, so that a machine that gets slower does so for all of them, and "ours / it"
is the median of the ratios of these turns. On a GPU, times are those of device events.
"""

import ctypes
import json
import os
import platform
import re
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from config import UserError

TURNS, LEAST, SECONDS = 15, 3, 60  # at most, at least; no new turn after so many seconds


class Clock:
    """Stamps in the order of the work: mark(name) books the time since the last one under `name`.

    On a GPU the stamps are events in its stream of work, so nothing waits for them.
    """

    def __init__(self, device):
        self.cuda = device.type == "cuda"
        self.stamps = []
        self.mark("")

    def mark(self, name):
        now = torch.cuda.Event(enable_timing=True) if self.cuda else time.perf_counter()
        if self.cuda:
            now.record()
        self.stamps.append((name, now))

    def seconds(self):
        """{name: seconds}, in the order of the first marks."""
        if self.cuda:
            torch.cuda.synchronize()
        spent = Counter()
        for (_, start), (name, end) in pairwise(self.stamps):
            spent[name] += start.elapsed_time(end) / 1000 if self.cuda else end - start
        return dict(spent)


@dataclass
class Work:
    """What is measured: contenders that do the same work, and how much work it is."""

    title: str
    contenders: dict  # name -> run(clock); it may mark phases and return what it has computed
    images: int = 1  # of one run
    flops: float = 0.0  # of one run
    given: tuple = ()  # what the same work of a peer needs to begin
    leave_out: str = ""  # a phase whose time does not count


def once(run, device):
    """(what it returns, {phase: seconds}) of one run; after its last mark comes the "rest"."""
    clock = Clock(device)
    answer = run(clock)
    clock.mark("rest")
    return answer, clock.seconds()


def take_turns(work, device):
    """{contender: [{phase: seconds} of each turn]}, the first of which is not to be counted.

    It warms up memory, caches and kernels, compiles, and must give the same numbers.
    """
    first = {name: once(run, device) for name, run in work.contenders.items()}
    check_agreement({name: answer for name, (answer, _) in first.items()})
    turns, start = {name: [seconds] for name, (_, seconds) in first.items()}, time.time()
    for turn in range(TURNS):
        if turn >= LEAST and time.time() - start > SECONDS:
            break
        for name, run in work.contenders.items():
            turns[name].append(once(run, device)[1])
    return turns


def check_agreement(answers, tolerance=0.01):
    """Raise UserError if a contender computes other numbers: then a ratio means nothing.

    answers: {contender: numbers, or None}; the tolerance is relative to the largest of ours.
    """
    known = {name: torch.as_tensor(a) for name, a in answers.items() if a is not None}
    for name, answer in known.items():
        error = ((answer - known["ours"]).abs().max() / known["ours"].abs().max()).item()
        if not error <= tolerance:
            raise UserError(f"{name} computes something else than ours: {error:.2g} apart")


def extra_memory(run, device):
    """Gigabytes that a run needs at its peak beyond what was in use before; None if unknown."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(Clock(device))
        return (torch.cuda.max_memory_allocated() - before) / 1e9
    if not os.access("/proc/self/clear_refs", os.W_OK):  # Linux only
        return None
    ctypes.CDLL(None).malloc_trim(0)  # freed memory goes back to the system, else it hides the need
    before = process_memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    run(Clock(device))
    return (process_memory("VmHWM") - before) / 1e9


def longest(work, device):
    """The operations that take longest in two runs of ours, as a text table."""
    with torch.profiler.profile() as seen:
        for _ in range(2):
            work.contenders["ours"](Clock(device))
    by = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return seen.key_averages().table(sort_by=by, row_limit=30, max_name_column_width=80)


def process_memory(key):
    """Bytes of this process: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def matmul_peak(device, dtype):
    """FLOP/s of a large matrix product: what 100 % of this device would be, in this very run."""
    n = 8192 if device.type == "cuda" else 1536
    x, y = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / min(once(lambda _: torch.mm(x, y), device)[1]["rest"] for _ in range(6))


# ---- results ------------------------------------------------------------------------------------


def measure(work, device, dtype):
    """A record: what was measured, on what, and a row of figures for each contender."""
    turns = take_turns(work, device)
    memory = {name: extra_memory(run, device) for name, run in work.contenders.items()}
    versions = f"PyTorch {torch.__version__}, Python {platform.python_version()}"
    setting = f"{versions}, threads: {torch.get_num_threads()}"
    record = {"title": work.title, "device": product(device), "setting": setting}
    record["rows"] = rows(work, turns, memory)
    if work.flops:
        record["tflops"] = work.flops * record["rows"]["ours"]["rate"] / work.images / 1e12
        record["share_of_peak"] = record["tflops"] * 1e12 / matmul_peak(device, dtype)
    return record


def product(device):
    """The name of the GPU; or of the processor, and its widest vector instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall("model name[^:]*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    return f"{(names or [platform.machine()])[0]} ({torch.backends.cpu.get_cpu_capability()})"


def rows(work, turns, memory):
    """{contender: what a row of the table shows}: medians and quartiles over the turns."""
    seconds = {
        name: [sum(turn.values()) - turn.get(work.leave_out, 0) for turn in each[1:]]
        for name, each in turns.items()
    }
    found = {}
    for name, (_, *each) in turns.items():
        rates = [work.images / s for s in seconds[name]]
        low, rate, high = statistics.quantiles(rates, n=4, method="inclusive")
        ratios = [it / ours for it, ours in zip(seconds[name], seconds["ours"], strict=True)]
        found[name] = {
            "rate": rate,
            "quartiles": [low, high],
            "runs": len(rates),
            "ours_over_it": statistics.median(ratios),
            "memory_gb": memory[name],
            "first_seconds": sum(turns[name][0].values()),
            "milliseconds": {p: 1000 * statistics.median(t[p] for t in each) for p in each[0]},
        }
    return found


def table(record):
    """The rows of a record as a markdown table, and where the time went."""
    lines = ["| | images/s | quartiles | ours / it | extra memory |", "|---|---|---|---|---|"]
    for name, row in record["rows"].items():
        (low, high), memory = row["quartiles"], row["memory_gb"]
        cells = (
            name,
            f"{row['rate']:.4g}",
            f"{low:.4g} to {high:.4g}, {row['runs']} runs",
            f"**{row['ours_over_it']:.2f}x**" if name != "ours" else "",
            f"{memory:.2f} GB" if memory is not None else "",
        )
        lines.append("| " + " | ".join(cells) + " |")
    for name, row in record["rows"].items():
        parts = [f"{p} {ms:.4g}" for p, ms in row["milliseconds"].items() if p != "rest"]
        lines += ["", f"{name}, milliseconds: {', '.join(parts)}"] if parts else []
        if "first_seconds" in row:
            lines += ["", f"{name}, first run: {row['first_seconds']:.3g} s"]
    if "tflops" in record:
        rate, share = record["tflops"], record["share_of_peak"]
        lines += ["", f"ours: {rate:.3g} TFLOP/s, {share:.0%} of the peak"]
    return "\n".join(lines)


PAGE = """# Benchmarks

Made by `python -m bench`, from `benchmarks.json` beside this page. Ratios are what to quote:
absolute figures belong to the machine. Contenders of a table ran in one process and in turns;
quartiles show the spread. "Extra memory" is the peak of one run above what was in use before it.
"The peak" is the rate of a large matrix product, measured in the same run; counted are the matrix
products of a step, without what stochastic depth leaves out. The first run, which may have to
compile, is apart. `python -m bench gpu --official PATH --to docs` measures all rows for one GPU.
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
