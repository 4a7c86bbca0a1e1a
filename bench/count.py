"""Every operation of a piece of work, counted as it happens: memory, bytes moved, FLOPs.

with Counter() as counter: ...       on real tensors, or on fake ones, which have shapes only

alive, peak  bytes of memory, now and at most
sent         bytes of the whole tensors that collectives gather, scatter or reduce
operations   of each kernel the bytes: what it is given and what it makes, each once. Views cost
             nothing, work in place reads and writes, a gather reads the rows that it takes.
             And the FLOPs: 2 for each multiply-add of a matrix product. What stochastic depth
             leaves out does not count; what is computed again does (activation checkpointing,
             Q K^T in the backward pass of fused attention).
"""

import contextlib
import weakref
from typing import NamedTuple
from unittest import mock

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry
from torch.utils.module_tracker import ModuleTracker
from torch.utils.weak import WeakIdKeyDictionary


class Operation(NamedTuple):
    part: str  # of the network, or phase of the step
    bytes: int
    flops: int
    half: bool  # bf16 or fp16, whose matrix products are faster


# An operation belongs to the first row that is in the name of a module around it, but for casts and
# gathers.
PARTS = {
    "_head": "heads",
    ".attn": "attention",
    ".mlp": "feed-forward",
    ".norm": "norms",
    ".blocks": "residual sums",
    "backbone": "tokens",
}
GATHERS = ("index_select", "index", "gather")
SCATTERS = ("index_add", "index_add_")
FILLS = ("copy_", "fill_", "zero_")  # do not read what they overwrite

# PyTorch knows the FLOPs of the fused attention of GPUs; a CPU's has the same.
FUSED = "_scaled_dot_product_flash_attention"
FLOPS = flop_registry | {
    getattr(torch.ops.aten, f"{FUSED}_for_cpu{way}"): flop_registry[
        getattr(torch.ops.aten, FUSED + way)
    ]
    for way in ("", "_backward")
}


class Counter(TorchDispatchMode):
    """Counts while it is entered, see above. mark(name) names what no module claimed so far.

    by_part: ModuleTracker, which knows the module of each operation, keeps alive what activation
    checkpointing computes again, so the peak is then too high.
    """

    def __init__(self, by_part=True):
        super().__init__()
        self.cells, self.alive = WeakIdKeyDictionary(), 0  # storage -> [its bytes]; their sum
        self.modules = ModuleTracker() if by_part else contextlib.nullcontext()
        self.restart()

    def restart(self):
        """Count from here on; what is alive stays so."""
        self.peak, self.operations, self.marked = self.alive, [], 0
        self.sent = {"all-gather": 0, "reduce-scatter": 0, "all-reduce": 0}

    def __enter__(self):
        # FSDP frees gathered weights by shrinking their storage, which is no operation.
        resize, counter = torch.UntypedStorage.resize_, self

        def resize_and_count(storage, size):
            result = resize(storage, size)
            if storage in counter.cells:
                counter.resize(counter.cells[storage], storage.nbytes())
            return result

        self.patch = mock.patch.object(torch.UntypedStorage, "resize_", resize_and_count)
        self.patch.start()
        self.modules.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        self.modules.__exit__(*error)
        self.patch.stop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:  # comes again with the shard of this rank
            return NotImplemented
        result = function(*args, **(kwargs or {}))
        for tensor in tensors_of(result):
            if not tensor.is_meta:
                self.follow(tensor.untyped_storage())
        if function.namespace in ("c10d", "_c10d_functional"):
            name = function.name().replace("_", "")
            most = max((x.nbytes for x in tensors_of((args, result))), default=0)
            for kind in self.sent:
                self.sent[kind] += most * (kind.replace("-", "") in name)
        elif function.namespace != "prim":
            self.book(function, args, kwargs or {}, result)
        return result

    def follow(self, storage):
        """Count this memory until nothing refers to it any more."""
        if storage not in self.cells:
            self.cells[storage] = cell = [0]
            self.resize(cell, storage.nbytes())
            weakref.finalize(storage, self.resize, cell, 0)

    def resize(self, cell, size):
        self.alive += size - cell[0]
        self.peak = max(self.peak, self.alive)
        cell[0] = size

    def book(self, function, args, kwargs, result):
        packet = function._overloadpacket
        moved = traffic(function, args, kwargs, result)
        if moved:  # else it is a view
            flops = FLOPS[packet](*args, **kwargs, out_val=result) if packet in FLOPS else 0
            half = next(tensors_of((result, args))).dtype in (torch.bfloat16, torch.float16)
            self.operations.append(Operation(self.part(packet.__name__), moved, flops, half))

    def part(self, operation):
        if operation == "_to_copy":
            return "casts"
        around = getattr(self.modules, "parents", ())
        part = next((PARTS[key] for key in PARTS if any(key in name for name in around)), "")
        if operation in GATHERS + SCATTERS and any(".blocks" in name for name in around):
            return "gathers"
        return part

    def mark(self, name):
        """Book what belongs to no module since the last mark under this name."""
        for i in range(self.marked, len(self.operations)):
            if not self.operations[i].part:
                self.operations[i] = self.operations[i]._replace(part=name)
        self.marked = len(self.operations)


def tensors_of(tree):
    return (x for x in tree_iter(tree) if isinstance(x, torch.Tensor))


def traffic(function, args, kwargs, result):
    """Bytes that an operation reads and writes."""
    name = function._overloadpacket.__name__
    if "empty" in name:
        return 0
    read = written = 0
    given, known = list(args), set()
    for i, argument in enumerate(function._schema.arguments):
        values = given[i] if i < len(given) else kwargs.get(argument.name)
        size = 0
        for x in tensors_of(values):
            size += bytes_of(x)
            known.add(x.untyped_storage()._cdata)
        writes = argument.alias_info is not None and argument.alias_info.is_write
        if name == "_fused_adamw_" and argument.name == "grads":
            writes = False  # unless they are scaled, which is for fp16
        written += size * writes
        read += size * (not writes or (name not in FILLS and not argument.is_out))
    fresh = sum(bytes_of(x) for x in tensors_of(result) if x.untyped_storage()._cdata not in known)
    if name in GATHERS:
        return 2 * fresh
    if name in SCATTERS:  # reads the rows to add, reads and writes those that they are added to
        return 3 * bytes_of(args[3]) + 2 * fresh  # not in place: after a copy
    if name == "native_layer_norm_backward":
        read *= 2  # one kernel for the input, one for gamma and beta
    return read + written + fresh if written + fresh else 0


def bytes_of(x):
    """What a tensor holds; where it is expanded, what is behind it."""
    return min(x.nbytes, x.untyped_storage().nbytes())
