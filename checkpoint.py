"""Save and load a run so that nothing is lost: written aside, renamed, verified, two kept.

A checkpoint holds everything that the next step depends on: step, student, teacher, centres,
optimiser, config. Data order, crops, masks and stochastic depth are functions of seed and step, so
there is no random state to save. Files are read with weights_only=True: loading never runs code.

    RUN/checkpoints/0001000.pt   to continue the run; parameters under their full names
    RUN/teacher.pt               the product: backbone (keys as in the released checkpoints),
                                 dino_head, ibot_head, config, step
"""

import os
import zipfile
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from config import UserError, to_dict

KEEP = 2  # one to continue from, one in case that one is damaged

# Every rank takes part in gathering, rank 0 gets whole tensors in its CPU memory; loading sends
# each rank its part. So a checkpoint does not depend on the number of ranks or on the wrapping.
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def state_of(step, cfg, student, teacher, centers, optimizer):
    """All that the next step depends on, as nested dictionaries of whole CPU tensors."""
    optimizer_state = get_optimizer_state_dict(student, optimizer, options=WHOLE)
    return {
        "step": step,
        "config": to_dict(cfg),
        "student": get_model_state_dict(student, options=WHOLE),
        "teacher": get_model_state_dict(teacher, options=WHOLE),
        "centers": centers.state_dict(),
        # Learning rates and decay are functions of the step; only the moments are state.
        "optimizer": optimizer_state["state"],
    }


def restore(state, student, teacher, centers, optimizer):
    """Put a loaded state back; strict. Returns the step to continue with."""
    set_model_state_dict(student, state["student"], options=WHOLE)
    set_model_state_dict(teacher, state["teacher"], options=WHOLE)
    centers.load_state_dict(state["centers"])
    groups = get_optimizer_state_dict(student, optimizer, options=WHOLE)["param_groups"]
    optimizer_state = {"state": state["optimizer"], "param_groups": groups}
    set_optimizer_state_dict(student, optimizer, optimizer_state, options=WHOLE)
    return state["step"]


def write(state, path):
    """Write a file whole or not at all: a kill or a full disk leaves what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    try:
        with open(aside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # on the disk before the name says so
    except (OSError, RuntimeError) as error:  # RuntimeError: how torch.save reports a full disk
        aside.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error}); free some disk space") from None
    os.replace(aside, path)


def save(run, state):
    """Write RUN/checkpoints/<step>.pt and RUN/teacher.pt, then drop all but the last two."""
    write(state, Path(run, "checkpoints", f"{state['step']:07d}.pt"))
    teacher = {"step": state["step"], "config": state["config"]}
    for name, value in state["teacher"].items():
        part, _, key = name.partition(".")
        teacher.setdefault(part, {})[key] = value
    write(teacher, Path(run, "teacher.pt"))
    for old in checkpoints(run)[:-KEEP]:
        old.unlink()


def checkpoints(run):
    """The checkpoint files of a run, oldest first."""
    return sorted(Path(run, "checkpoints").glob("*.pt"))


def read(path):
    """Load a file of tensors and plain values to the CPU, or raise UserError saying why not."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not look at the checksums
        if damaged:
            raise UserError(f"{path}: damaged (checksum of {damaged})")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UserError:
        raise
    # A damaged archive raises anything, from BadZipFile to UnpicklingError and RuntimeError.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: cannot be read ({reason})") from None


def load_latest(run, warn=print):
    """The newest readable state of a run, or None if there is none; names files passed over.

    Raises UserError if there are checkpoints and none can be read.
    """
    files = checkpoints(run)
    for path in reversed(files):
        try:
            return read(path)
        except UserError as error:
            warn(f"warning: {error}; trying the checkpoint before it")
    if files:
        raise UserError(f"{run}: no checkpoint can be read; delete the folder or use another out=")
    return None


# What may differ between a run and its continuation: where and how, not what is computed.
FREE = (
    "out",
    "device",
    "parallel",
    "attention",
    "activation_checkpointing",
    "compile",
    "init_from",
    "log.",
    "data.workers",
    "data.val",
)


def check_same(state, cfg, run):
    """Raise UserError naming the first key in which a checkpoint and the config differ."""

    def flat(tree, prefix=""):
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield prefix + key, list(value) if isinstance(value, tuple) else value

    before, now = dict(flat(state["config"])), dict(flat(to_dict(cfg)))
    for key in now:
        if not key.startswith(FREE) and before.get(key) != now[key]:
            raise UserError(
                f"{run} was started with {key}={before.get(key)}, now it is {now[key]}: "
                f"use another out= for a new run, or {key}={before.get(key)} to continue this one"
            )
