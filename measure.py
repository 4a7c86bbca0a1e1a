"""Time, memory and the table that shows them: the tools of bench.py.

Contenders take turns, so that a machine that gets slower does so for all of them, and "ours over
theirs" is the median of the ratios of these turns. On a GPU, times are those of device events.
"""

import ctypes
import json
import os
import platform
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from config import UserError

TURNS, LEAST, SECONDS = 15, 3, 60  # at most, at least; no new turn after so many seconds


class Clock:
    """Stamps in the order of the work: mark(name) books the time since the last one under `name`.

    On a GPU the stamps are events in its stream of work, so nothing waits for them. Where others
    use the same processor, `tick` can be time.process_time: what this process itself computed.
    """

    tick = staticmethod(time.perf_counter)

    def __init__(self, device):
        self.cuda = device.type == "cuda"
        self.stamps = [("", self.now())]

    def now(self):
        if not self.cuda:
            return self.tick()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def mark(self, name):
        self.stamps.append((name, self.now()))

    def seconds(self):
        """{name: seconds}, in the order of the first marks."""
        if self.cuda:
            torch.cuda.synchronize()
        spent = Counter()
        for (_, start), (name, end) in zip(self.stamps, self.stamps[1:], strict=False):
            spent[name] += start.elapsed_time(end) / 1000 if self.cuda else end - start
        return dict(spent)


@dataclass
class Work:
    """What is measured: contenders that do the same work, and how much work it is."""

    title: str
    contenders: dict  # name -> run(clock); it may mark phases and return what it has computed
    images: int = 1  # of one run
    flops: float = 0.0  # of one run
    unit: str = "images/s"
    turns: bool = True  # False: all runs of one contender, then all of the next
    tolerance: float = 0.01  # of what contenders return, relative to the largest value of ours


def measure(work, device, turns=None):
    """{contender: {"seconds": [..], "phases": {name: seconds}, "memory": GB or None}}.

    Time booked under "data" is not part of the seconds: contenders of a training step all get the
    same crops from our loader.
    """

    def once(name):
        clock = Clock(device)
        work.contenders[name](clock)
        clock.mark("rest")
        return clock.seconds()

    # The first run of each warms up memory, caches and kernels. Is it the same work?
    answers = {name: run(Clock(device)) for name, run in work.contenders.items()}
    check_agreement(work, answers)
    runs = {name: [] for name in work.contenders}
    rounds = [list(runs)] if work.turns else [[name] for name in runs]
    for names in rounds:
        start = time.time()
        for turn in range(turns or TURNS):
            if turn >= LEAST and time.time() - start > SECONDS / len(rounds):
                break
            for name in names:
                runs[name].append(once(name))
    found = {}
    for name, times in runs.items():
        found[name] = {
            "seconds": [sum(v for phase, v in run.items() if phase != "data") for run in times],
            "phases": {p: statistics.median(run.get(p, 0) for run in times) for p in times[0]},
            "memory": extra_memory(lambda name=name: once(name), device),
        }
    return found


def check_agreement(work, answers):
    """Raise UserError if a contender returns other numbers: then a ratio means nothing."""
    if (ours := answers.get("ours")) is None:
        return
    for name, answer in answers.items():
        if answer is not None:
            ours, answer = torch.as_tensor(ours), torch.as_tensor(answer)
            error = ((answer - ours).abs().max() / ours.abs().max()).item()
            if not error <= work.tolerance:
                raise UserError(f"{name} computes something else than ours: {error:.2g} apart")


def extra_memory(run, device):
    """Gigabytes that a run needs at its peak beyond what was in use before; None if unknown."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e9
    if not os.access("/proc/self/clear_refs", os.W_OK):  # Linux only
        return None
    ctypes.CDLL(None).malloc_trim(0)  # freed memory goes back to the system, else it hides the need
    before = process_memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    run()
    return (process_memory("VmHWM") - before) / 1e9


def process_memory(key):
    """Bytes of this process: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def matmul_peak(device, dtype):
    """FLOP/s of a large matrix product: what 100 % of this device would be, in this very run."""
    n = 8192 if device.type == "cuda" else 1536
    x, y = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    work = Work("", {"": lambda clock: torch.mm(x, y)})
    return 2 * n**3 / min(measure(work, device, turns=5)[""]["seconds"])


# ---- results ------------------------------------------------------------------------------------


def machine(device):
    """What a figure depends on besides the code."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "time": "CPU time" if Clock.tick == time.process_time else "time",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def processor():
    """The name of the CPU and its widest vector instructions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return (
        f"{names[0] if names else platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"
    )


def record(work, found, peak, command, device):
    """A row of the JSON file for each piece of work: plain numbers, medians and quartiles."""
    ours = found["ours"]["seconds"]
    rows = {}
    for name, result in found.items():
        rate = sorted(work.images / s for s in result["seconds"])
        quartiles = statistics.quantiles(rate, n=4, method="inclusive")
        rows[name] = {
            "rate": quartiles[1],
            "quartiles": [quartiles[0], quartiles[2]],
            "runs": len(rate),
            "memory_gb": result["memory"],
            "milliseconds": {p: s * 1000 for p, s in result["phases"].items() if s > 2e-5},
        }
        if name != "ours":
            ratios = [s / o for s, o in zip(result["seconds"], ours, strict=False)]
            rows[name]["ours_over_it"] = statistics.median(ratios)
        if work.flops and name == "ours":
            rows[name]["tflops"] = work.flops * quartiles[1] / work.images / 1e12
            rows[name]["share_of_peak"] = work.flops * quartiles[1] / work.images / peak
    return {
        "title": work.title,
        "unit": work.unit,
        "machine": machine(device),
        "command": command,
        "rows": rows,
    }


def table(found):
    """One record as a markdown table, with its machine, its command and where the time went."""
    unit = found["unit"]
    lines = [f"| | {unit} | quartiles | ours / it | extra memory | TFLOP/s | share of peak |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for name, row in found["rows"].items():
        low, high = row["quartiles"]
        ratio, memory, share = (row.get(k) for k in ("ours_over_it", "memory_gb", "share_of_peak"))
        cells = (
            name,
            f"{row['rate']:.4g}",
            f"{low:.4g} to {high:.4g}, {row['runs']} runs",
            f"**{ratio:.2f}x**" if ratio else "",
            f"{memory:.2f} GB" if memory is not None else "",
            f"{row['tflops']:.3g}" if share else "",
            f"{100 * share:.0f} %" if share else "",
        )
        lines.append("| " + " | ".join(cells) + " |")
    for name, row in found["rows"].items():
        phases = {p: ms for p, ms in row["milliseconds"].items() if p != "rest"}
        if phases:
            parts = ", ".join(f"{phase} {ms:.4g}" for phase, ms in phases.items())
            lines += ["", f"{name}, milliseconds: {parts}"]
    return "\n".join(lines)


PAGE = """# Benchmarks

Made by `python bench.py`, from `benchmarks.json` beside this page. Ratios are what to quote:
absolute figures belong to the machine. Contenders of a table ran in one process and in turns;
quartiles show the spread. "Extra memory" is the peak of one run above what was in use before it.
"Share of peak" counts the matrix products of one step, without what stochastic depth leaves out,
against a large matrix product measured in the same run. "CPU time" stands where other work shared
the processor: it counts what the process itself computed, with one thread.
"""


def save(found, folder, not_measured):
    """Put a record among those of FOLDER/benchmarks.json, and write FOLDER/benchmarks.md anew."""
    path = Path(folder, "benchmarks.json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = json.loads(path.read_text()) if path.exists() else []
        same = (found["title"], found["machine"]["device"])
        kept = [r for r in kept if (r["title"], r["machine"]["device"]) != same] + [found]
        path.write_text(json.dumps(kept, indent=1) + "\n")
        path.with_suffix(".md").write_text(page(kept, not_measured))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}; choose another folder with --to") from None


def page(records, not_measured):
    """The whole page of records; not_measured: (what, target, command) of rows that have none."""
    parts = [PAGE]
    for found in records:
        m = found["machine"]
        where = f"{m['device']}, threads: {m['threads']}, {m['time']}, PyTorch {m['torch']}"
        parts.append(
            f"## {found['title']}\n\n{where}\n\n    {found['command']}\n\n{table(found)}\n"
        )
    missing = [row for row in not_measured if not any(r["command"] == row[2] for r in records)]
    if missing:
        rows = [f"| {what} | {target} | `{command}` |" for what, target, command in missing]
        head = (
            "## Not measured\n\n| work | target | the command that measures it |\n|---|---|---|\n"
        )
        parts.append(head + "\n".join(rows) + "\n")
    return "\n".join(parts)
