"""How long a piece of work takes, where the time goes, how much memory it needs: tools of bench/.

Contenders take turns, so that a machine that gets slower does so for all of them, and "ours / it"
is the median of the ratios of these turns. On a GPU, times are those of device events.
"""

import statistics
import time
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import torch

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
    """{phase: seconds} of one run; after its last mark comes the "rest"."""
    clock = Clock(device)
    run(clock)
    clock.mark("rest")
    return clock.seconds()


def take_turns(work, device):
    """{contender: [{phase: seconds} of each turn]}, the first of which is not to be counted.

    It warms up memory, caches and kernels, and compiles.
    """
    turns = {name: [once(run, device)] for name, run in work.contenders.items()}
    start = time.time()
    for turn in range(TURNS):
        if turn >= LEAST and time.time() - start > SECONDS:
            break
        for name, run in work.contenders.items():
            turns[name].append(once(run, device))
    return turns


def extra_memory(run, device):
    """Gigabytes that a run needs at its peak beyond what was in use before; None but on a GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(Clock(device))
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def longest(work, device):
    """The operations that take longest in two runs of ours, as a text table."""
    with torch.profiler.profile() as seen:
        for _ in range(2):
            work.contenders["ours"](Clock(device))
    by = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return seen.key_averages().table(sort_by=by, row_limit=30, max_name_column_width=80)


def matmul_peak(device, dtype):
    """FLOP/s of a large matrix product: what 100 % of this device would be, in this very run."""
    n = 8192 if device.type == "cuda" else 1536
    x, y = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / min(once(lambda _: torch.mm(x, y), device)["rest"] for _ in range(6))


# ---- results ------------------------------------------------------------------------------------


def measure(work, device, dtype):
    """What was measured, in figures: a row for each contender, and how near ours is to the peak."""
    turns = take_turns(work, device)
    memory = {name: extra_memory(run, device) for name, run in work.contenders.items()}
    record = {"rows": rows(work, turns, memory)}
    if work.flops:
        rate = work.flops * record["rows"]["ours"]["rate"] / work.images
        record |= {"tflops": rate / 1e12, "share_of_peak": rate / matmul_peak(device, dtype)}
    return record


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
