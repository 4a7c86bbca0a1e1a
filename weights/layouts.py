"""The names that weights have elsewhere, as one table, and the way from one to the other.

Ours are those of the released DINOv2 files. A row of a table is

    our name              their name             # is the number of the block
                                                 {a,b}: matrices, one above the other in ours
and stands for .weight and .bias too. Where a name of ours has several rows, all are read and the
first is written. Nothing is guessed: a name without a row is an error.
"""

import math
import re

import torch

from config import UserError
from weights.checkpoint import flat

# Below the others stands its ViTModel, which holds the networks of DINO.
HUGGING_FACE = """
    cls_token             embeddings.cls_token
    mask_token            embeddings.mask_token
    pos_embed             embeddings.position_embeddings
    register_tokens       embeddings.register_tokens
    patch_embed.proj      embeddings.patch_embeddings.projection
    blocks.#.norm1        encoder.layer.#.norm1
    blocks.#.attn.qkv     encoder.layer.#.attention.attention.{query,key,value}
    blocks.#.attn.proj    encoder.layer.#.attention.output.dense
    blocks.#.ls1.gamma    encoder.layer.#.layer_scale1.lambda1
    blocks.#.norm2        encoder.layer.#.norm2
    blocks.#.mlp.fc1      encoder.layer.#.mlp.fc1
    blocks.#.mlp.fc2      encoder.layer.#.mlp.fc2
    blocks.#.mlp.w12      encoder.layer.#.mlp.weights_in
    blocks.#.mlp.w3       encoder.layer.#.mlp.weights_out
    blocks.#.ls2.gamma    encoder.layer.#.layer_scale2.lambda1
    norm                  layernorm
    blocks.#.norm1        encoder.layer.#.layernorm_before
    blocks.#.norm2        encoder.layer.#.layernorm_after
    blocks.#.mlp.fc1      encoder.layer.#.intermediate.dense
    blocks.#.mlp.fc2      encoder.layer.#.output.dense
"""
# In timm the rest is as ours; a network has no mask token. SwiGLU is told by its shapes.
TIMM = """
    register_tokens       reg_token
    blocks.#.mlp.w12      blocks.#.mlp.fc1
    blocks.#.mlp.w3       blocks.#.mlp.fc2
"""
IBOT = "mask_token masked_embed"

# What wrappers put into names; the official training numbers blocks by chunk, so blocks.1.7 is
# block 7; a pooler, trained for another task.
CLEAN = [
    (r"\b(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.", ""),
    (r"\bblocks\.\d+\.(\d+)\.", r"blocks.\1."),
    (r".*\bpooler\.dense\..*", ""),
]
INSIDE = ("teacher.", "student.", "state_dict.", "model.")  # where weights lie in files, best first
PARTS = ("backbone", "head", "dino_head", "ibot_head", "classifier")


def rows(table):
    """(our name, [their names]) of each row."""
    for ours, theirs in (line.split() for line in table.strip().splitlines()):
        head, *pieces = re.split(r"[{,}]", theirs.rstrip("}"))
        yield ours, [head + piece for piece in pieces or [""]]


# {their name: (our name, number of the piece)}, of all layouts
KNOWN = {
    their: (ours, i)
    for ours, theirs in (*rows(HUGGING_FACE), *rows(TIMM), *rows(IBOT))
    for i, their in enumerate(theirs)
}
KNOWN |= {ours: (ours, 0) for ours, _ in rows(HUGGING_FACE)}


def take_apart(name):
    """blocks.7.norm1.weight -> (blocks.#.norm1, .weight, 7)."""
    base, ending = re.fullmatch(r"(.+?)(\.weight|\.bias)?", name).groups("")
    number = re.search(r"\.(\d+)(?=\.|$)", base)
    return re.sub(r"\.\d+(?=\.|$)", ".#", base, count=1), ending, number[1] if number else ""


def parts_of(tree, path):
    """{"backbone": {our name: tensor}, and each other part that it has} of a file.

    Raises UserError naming the first key that no layout knows.
    """
    state = {}
    for name, value in flat(tree).items():
        for pattern, plain in CLEAN:
            name = re.sub(pattern, plain, name)
        state |= {name: value} if name else {}
    # It may lie deep, with the other network and the optimiser beside it.
    while inside := [prefix for prefix in INSIDE if any(name.startswith(prefix) for name in state)]:
        state = {n[len(inside[0]) :]: v for n, v in state.items() if n.startswith(inside[0])}
    if not any(name.startswith("backbone.") for name in state):
        state = {f"backbone.{name}": value for name, value in state.items()}
    parts = {"backbone": {}}
    for name, value in state.items():
        part, _, rest = name.partition(".")
        if part not in PARTS:
            raise unknown(name, path)
        parts.setdefault("dino_head" if part == "head" else part, {})[rest] = value
    return parts | {"backbone": backbone_of(parts["backbone"], path)}


def unknown(name, path):
    return UserError(
        f"{path}: not weights of a backbone by name: {name} is in none of the known layouts (DINO, "
        "DINOv2, iBOT, timm (vit_*_dinov2, vit_*_dino), Hugging Face (Dinov2, ViT))"
    )


def backbone_of(state, path):
    """The tensors of a backbone under our names; what DINO and timm leave out is put back."""
    pieces = {}
    for name, value in state.items():
        pattern, ending, number = take_apart(name)
        if pattern not in KNOWN or not torch.is_tensor(value):
            raise unknown(name, path)
        ours, i = KNOWN[pattern]
        place = pieces.setdefault(ours.replace("#", number) + ending, {})
        if i in place:
            raise UserError(f"{path}: {name} is there twice, under two names")
        place[i] = value
    found = {}
    for name, place in pieces.items():  # where a piece is missing, the shape will be wrong
        values = [place[i] for i in sorted(place)]
        found[name] = values[0] if len(values) == 1 else torch.cat(values)
    first, second = (found.get(f"blocks.0.mlp.{layer}.weight") for layer in ("fc1", "fc2"))
    if first is not None and second is not None and len(first) == 2 * second.shape[-1]:
        # SwiGLU in timm: the first matrix is twice as wide as the second.
        found = {n.replace("fc1", "w12").replace("fc2", "w3"): v for n, v in found.items()}
    positions = found.get("pos_embed")
    if positions is not None and math.isqrt(positions.shape[1]) ** 2 == positions.shape[1]:
        # In timm with registers, [CLS] has no position: it was added to the token.
        found["pos_embed"] = torch.cat((torch.zeros_like(positions[:, :1]), positions), dim=1)
    if "norm.weight" in found:  # networks that never hid a patch have no token for it
        found.setdefault("mask_token", torch.zeros(1, len(found["norm.weight"])))
    return found


def renamed(state, table):
    """The tensors of a backbone of ours under the names of a table; others keep theirs."""
    names, out = dict([*rows(table)][::-1]), {}  # of several rows, the first
    for name, value in state.items():
        pattern, ending, number = take_apart(name)
        theirs = names.get(pattern, [pattern])
        for their, piece in zip(theirs, value.chunk(len(theirs)), strict=True):
            out[their.replace("#", number) + ending] = piece.clone()
    return out
