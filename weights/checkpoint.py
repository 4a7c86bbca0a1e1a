"""Save and load a run so that nothing is lost, on any number of ranks.

A checkpoint holds everything that the next step depends on: step, student, teacher, centres,
optimiser, config. Data order, crops, masks and stochastic depth are functions of seed and step, so
there is no random state to save. PyTorch's distributed checkpoint does the work: every rank writes
its shards, and reading cuts them anew, so a run continues on any number of ranks, wrapped or not.

    RUN/checkpoints/0001000/            has this name only once it is complete; the last two stay
        shard-00001-....safetensors     the tensors of the first rank, and so on
        run.json                        step, config, and the checksum of each file
    RUN/checkpoints/0002000.part/       being written, or left by a kill; never read
    RUN/teacher.pt                      the product: backbone, dino_head, ibot_head, config, step
    RUN/teachers/0001000.pt             the same after so many steps, where log.keep_every says so

Ranks on several machines need a RUN folder that they share. Safetensors and json hold no code, and
teacher.pt is read with weights_only=True: loading never runs code.
"""

import argparse
import hashlib
import json
import os
import pickle
import shutil
import warnings
import zipfile
import zlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

from config import Config, UserError, shown, to_dict
from parallel import lists_of_ranks, ranks

KEEP = 2  # one to continue from, one in case that one is damaged
warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process: fine


class Checkpoints:
    """The checkpoints of one run: what is in them, and the thread that writes them.

    save() copies the state to CPU memory and returns: the loop goes on while a thread writes.
    """

    def __init__(self, cfg, student, teacher, centers, optimizer, scaler, source=()):
        self.cfg, self.images, self.writing = cfg, fingerprint(source), None
        self.networks, self.centers = (student, teacher), centers
        self.optimizer, self.scaler = optimizer, scaler
        # A new thread begins on GPU 0, and would take memory there for each rank of the machine.
        gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else -1  # -1: leave it
        self.thread = ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(gpu,))
        # The threads of all ranks talk in a group of their own: in a common one their messages
        # would be taken for those of the training step.
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None

    def tensors(self):
        """All tensors that the next step depends on, by name: the live ones, shards as shards."""
        student, teacher = self.networks
        parts = {
            # Learning rates and decay are functions of the step; only the moments are state.
            "optimizer": get_optimizer_state_dict(student, self.optimizer)["state"],
            "student": get_model_state_dict(student),
            "teacher": get_model_state_dict(teacher),
            "centers": self.centers.state_dict(),
        }
        return flat(parts)

    def save(self, step):
        """Take what the run is after `step` steps; all ranks call it. Raises like wait()."""
        self.wait()
        card = {"step": step, "config": to_dict(self.cfg), "images": self.images,
                "scaler": self.scaler.state_dict()}  # fmt: skip
        # Plain copies, by a stager for each save: that of PyTorch 2.11 does not serve a second one.
        stager = DefaultStager(StagingOptions(False, False, False, False))
        copy = stager.stage(self.tensors())
        stager.close()
        self.writing = self.thread.submit(write, copy, card, Path(self.cfg.out), self.group)

    def wait(self):
        """Until the last save is on the disk. Raises UserError if it could not be written."""
        if self.writing:
            self.writing.result()

    def check(self):
        """Raise UserError if the last save has failed; does not wait."""
        if self.writing and self.writing.done():
            self.wait()

    def load(self):
        """Put the newest readable checkpoint back; returns the step to continue with, 0 if none.

        Raises UserError if there are checkpoints and none can be read, or if the config differs.
        """
        folders = checkpoints(self.cfg.out)
        for folder in reversed(folders):
            card, problem = verified(folder, self.group)
            if problem:
                if ranks()[0] == 0:
                    words = f"damaged ({problem}); trying the checkpoint before it"
                    print(f"warning: {folder}: {words}", flush=True)
                continue
            check_same(card, self.cfg, self.images)
            reader = dcp.HuggingFaceStorageReader(str(folder))
            dcp.load(self.tensors(), storage_reader=reader, process_group=self.group)
            self.scaler.load_state_dict(card["scaler"])
            return card["step"]
        if folders:
            raise UserError(f"{self.cfg.out}: no checkpoint can be read; use another out=")
        return 0


def checkpoints(run):
    """The complete checkpoint folders of a run, oldest first."""
    return sorted(path for path in Path(run, "checkpoints").glob("*") if path.name.isdigit())


# ---- writing, in the thread ----------------------------------------------------------------------


def write(tensors, card, run, group):
    """Write RUN/checkpoints/<step> and RUN/teacher.pt, then drop all but the last two checkpoints.

    Each file is written aside and flushed, and the last thing is a new name: a kill or a full disk
    leaves what was there before.
    """
    folder = run / "checkpoints" / f"{card['step']:07d}"
    aside, first = folder.with_suffix(".part"), ranks()[0] == 0
    try:
        if first:
            for stale in folder.parent.glob("*.part"):
                shutil.rmtree(stale)
            folder.parent.mkdir(parents=True, exist_ok=True)
        writer = dcp.HuggingFaceStorageWriter(str(aside), save_distributed=True)
        dcp.save(tensors, storage_writer=writer, process_group=group)
        own = sorted(aside.glob(f"shard-{ranks()[0] + 1:05d}-*"))
        sums = lists_of_ranks([(path.name, checksum(path)) for path in own], group)
        if first:
            card["files"] = dict(sums)
            write_file(aside / "run.json", lambda file: file.write(json.dumps(card).encode()))
            export_teacher(aside, card, run / "teacher.pt")  # a complete checkpoint has one
            if (every := card["config"]["log"]["keep_every"]) and card["step"] % every == 0:
                export_teacher(aside, card, run / "teachers" / f"{folder.name}.pt")
            discard(folder)  # a step that was saved before, by a run that was then set back
            os.replace(aside, folder)
            for old in checkpoints(run)[:-KEEP]:
                discard(old)
    # RuntimeError: how torch.save reports a full disk. CheckpointException: an error of any rank.
    except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
        if first:
            shutil.rmtree(aside, ignore_errors=True)
        raise UserError(f"{folder}: cannot be written ({reason(error)})") from None


def export_teacher(folder, card, path):
    """Write the teacher of a checkpoint, whole and under plain names, to one file."""
    reader = dcp.HuggingFaceStorageReader(str(folder))
    stored = reader.read_metadata().state_dict_metadata
    whole = {k: torch.empty(v.size) for k, v in stored.items() if k.startswith("teacher.")}
    dcp.load(whole, storage_reader=reader, no_dist=True)
    teacher = {"step": card["step"], "config": card["config"]}
    for name, value in whole.items():
        _, part, key = name.split(".", 2)
        teacher.setdefault(part, {})[key] = value
    write_file(folder / path.name, lambda file: torch.save(teacher, file))
    path.parent.mkdir(exist_ok=True)
    os.replace(folder / path.name, path)


def write_file(path, writer):
    """A file that is on the disk when this returns."""
    with open(path, "wb") as file:
        writer(file)
        file.flush()
        os.fsync(file.fileno())


def discard(folder):
    """Remove a checkpoint; its name goes first, so that half a checkpoint never looks whole."""
    if folder.exists():
        shutil.rmtree(folder.rename(folder.with_suffix(".old.part")))


def checksum(path):
    """[bytes, CRC-32] of a file."""
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(2**22):
            crc = zlib.crc32(chunk, crc)
    return [path.stat().st_size, crc]


def reason(error):
    """The words of an exception in one line, whichever rank it comes from."""
    if isinstance(error, dcp.api.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split()) or type(error).__name__


# ---- reading -------------------------------------------------------------------------------------


def verified(folder, group):
    """What run.json says, and what is wrong with the files ("": nothing); as all ranks see it."""
    rank, world = ranks()
    card, problem = None, ""
    try:
        card = json.loads((folder / "run.json").read_text())
        for name in sorted(card["files"])[rank::world]:
            if checksum(folder / name) != card["files"][name]:
                problem = f"checksum of {name}"
    # A damaged run.json is anything: no json, no dictionary, other keys, other bytes.
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = reason(error)
    return card, next(filter(None, lists_of_ranks([problem], group)), "")


def read(path):
    """Load a file of tensors and plain values to the CPU, or raise UserError saying why not.

    The metadata of .safetensors is put where torch.save keeps that of a state dict: in _metadata.
    """
    try:
        if str(path).endswith(".safetensors"):
            with safe_open(path, "pt") as file:
                state = OrderedDict((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
                state._metadata = file.metadata() or {}
                return state
        # torch.load does not look at the checksums. (Files of PyTorch 1.5 have none.)
        if zipfile.is_zipfile(path) and (damaged := zipfile.ZipFile(path).testzip()):
            raise ValueError(f"checksum of {damaged}")
        # The official code of DINO and iBOT saves its options too: plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive raises anything, BadZipFile to RuntimeError
        what = reason(error)
        if isinstance(error, pickle.UnpicklingError) or "data.pkl" in what:  # a page of advice
            what = "not of torch.save, or more than tensors and plain values: give a state dict"
        raise UserError(f"{path}: cannot be read ({what})") from None


def flat(tree, prefix=""):
    """{dotted name: value} of dictionaries in dictionaries."""
    rows = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        rows |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return rows


# What may differ between a run and its continuation: where and how, not what is computed.
FREE = (
    "out", "device", "parallel", "attention", "activation_checkpointing", "compile",
    "init_from", "init_heads", "head_steps", "log.", "data.workers", "data.val", "data.root",
)  # fmt: skip


def fingerprint(source):
    """What the images of a source are, wherever they lie: in words, and names, of at most 1000."""
    some = range(0, len(source), max(len(source) // 1000, 1))
    names = "\n".join(f"{os.path.basename(source.name(i))} {source.label(i)}" for i in some)
    words = f"{len(source)} in {len(getattr(source, 'classes', ()))} classes"
    return [words, hashlib.sha256(os.fsencode(names)).hexdigest()]


def check_same(card, cfg, images):
    """Raise UserError naming the first thing in which a checkpoint differs from this run."""
    was, here = flat(to_dict(Config())) | flat(card["config"]), flat(to_dict(cfg))
    for key, value in here.items():
        before, now = shown(was[key]), shown(value)
        if not key.startswith(FREE) and before != now:
            fix = f"{key}={before} to continue this one"
            if key == "steps" and card["step"] == was["steps"]:
                fix = f"init_from={cfg.out} there to go on from this one, which is finished"
            raise UserError(f"{cfg.out} was started with {key}={before}, now it is {now}: "
                            f"use another out= for a new run, or {fix}")  # fmt: skip
    if card.get("images", images) != images:  # a card may be older than this entry
        now = f"{images[0]} or of other names in {cfg.data.root}: use another out="
        raise UserError(f"{cfg.out} was started with other images: {card['images'][0]}, now {now}")
