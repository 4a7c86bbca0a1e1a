"""What may end a run before its last step: numbers that are not finite, SIGTERM and Ctrl-C."""

import os
import signal
import sys

import torch

from config import UserError
from parallel import max_over_ranks, ranks


class Watch:
    """Notices them on all ranks in the same step.

    All are flags on the device, sent to the CPU at once and read one step later, when they are
    there: the loop never waits for the device because of them.
    """

    def __init__(self):
        self.signal, self.saved, self.pending = 0, False, []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.remember)

    def remember(self, number, frame):
        """Finish the step, save, leave. A second signal does not wait."""
        if self.signal or self.saved:
            sys.exit(128 + number)
        self.signal = number
        text = "finishing this step, then saving (once more: leaving at once, without)"
        if ranks()[0] == 0:  # print() may not be called while it is at work, and it may be just now
            os.write(2, f"\n{signal.Signals(number).name}: {text}\n".encode())

    def guard(self, run, step, log, norms):
        """Make the optimiser skip this step, on the device, if it is not finite anywhere."""
        numbers, scaled = [log["loss"]], run.scaler.is_enabled()
        if not scaled:  # which skips a step itself, as fp16 gradients may overflow
            numbers += norms.values()
        bad = (~torch.isfinite(torch.stack(numbers))).any().float()
        flags = max_over_ranks(torch.stack((bad, torch.full_like(bad, self.signal))))
        if not scaled:
            run.optimizer.found_inf = flags[0]
        self.pending.append((step, on_its_way(flags), log | norms, run.cfg))

    def check(self, step):
        """The signal to stop for, or 0, from the steps up to this one (the newest makes it wait).

        Raises UserError naming the terms that are not finite.
        """
        asked_to_stop = 0
        while self.pending and self.pending[0][0] <= step:
            at, flags, log, cfg = self.pending.pop(0)
            bad, number = flags().tolist()
            if bad:
                terms = [f"{k}={v.item():.4g}" for k, v in log.items() if not torch.isfinite(v)]
                raise UserError(
                    f"step {at} is not finite ({', '.join(terms) or 'on another process'}) and was "
                    f"not taken: lower optim.lr={cfg.optim.lr:g}, or set precision=fp32"
                )
            asked_to_stop = max(asked_to_stop, int(number))
        return asked_to_stop


def on_its_way(x):
    """Send a tensor to the CPU; returns what waits for it, and not for later work of the device."""
    if not x.is_cuda:
        return x.cpu
    there, arrived = x.to("cpu", non_blocking=True), torch.cuda.Event()
    arrived.record()

    def receive():
        arrived.synchronize()
        return there

    return receive
