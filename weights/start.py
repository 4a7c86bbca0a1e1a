"""Where a run starts: from weights of another one, adapted where that is honest, else refused.

    init_from=RUN, file or name  weights that a new run starts from
    init_heads=true              with the heads, which a run folder or teacher.pt of ours has
    head_steps=1000              or fresh heads, trained first while the backbone is frozen

It is read as by load.py, where names and shapes are strict. Two things may differ and are adapted:
the grid of positions and the number of input channels.

Shapes:  C input channels   N patches   D channels of the network
"""

import torch

from config import UserError
from parallel import put
from vit import resize_positions
from weights.load import PATCHES, POSITIONS, architecture, contents, fitting, teacher_file

SAME = "vit.size, vit.patch, vit.registers and vit.ffn must be those of the file"
HEADS = "the keys of head.* must be those of the file"


def start_from(cfg, *networks):
    """Give each network the weights of cfg.init_from; returns in words what was done.

    The backbone, and with cfg.init_heads the heads too. Raises UserError if anything does not fit.
    """
    path = teacher_file(cfg.init_from)
    title = f"init_from={path}"
    parts, about = contents(path)
    its = architecture(parts["backbone"], title, about)
    how = its["interpolate_offset"], its["interpolate_antialias"]
    if not cfg.init_heads:
        parts = {"backbone": parts["backbone"]}
    elif "dino_head" not in parts:
        raise UserError(f"{title} has no heads: set init_heads=false, and head_steps to train some")
    notes = [str(path), *put_parts(networks, parts, how, title)]
    if how != (cfg.vit.interpolate_offset, cfg.vit.interpolate_antialias):
        notes.append(f"which was trained with vit.interpolate_offset={how[0]} and "
                     f"vit.interpolate_antialias={str(how[1]).lower()}: set both")  # fmt: skip
    fed = about.get("config", {}).get("data", about.get("images", {}))
    for key, ours in ("mean", cfg.data.mean), ("std", cfg.data.std):
        if list(fed.get(key, ours)) != list(ours):
            notes.append(f"which was trained with data.{key}={fed[key]}")
    whose = "those of the file" if cfg.init_heads else "new"
    return f"starts from {', '.join(notes)}; the heads are {whose}"


def put_parts(networks, parts, how, title):
    """Copy {part: {name: tensor}} into networks (each its shard of it); returns notes on changes.

    Strict: of a part all names, and with one head all heads. how: see `adapt`.
    """
    notes, places = [], dict(networks[0].named_children())
    if len(parts) > 1 and parts.keys() != places.keys():
        raise UserError(
            f"{title} has {' and '.join(parts)}, here it is {' and '.join(places)}: "
            f"head.separate must be that of the file"
        )
    for part, state in parts.items():
        shapes = {name: value.shape for name, value in places[part].named_parameters()}
        weights, changed = adapt(state, shapes, how, title, SAME if part == "backbone" else HEADS)
        notes += changed
        for network in networks:
            for name, parameter in getattr(network, part).named_parameters():
                put(parameter, weights[name])
    return notes


def adapt(state, shapes, how, title, fix=SAME):
    """(fp32 weights of these shapes, notes on what was changed) from the tensors of a file.

    how: (offset, antialias) of resizing positions, by the convention of the file.
    """
    state, notes = dict(state), []
    value, shape = state.get(POSITIONS), shapes.get(POSITIONS)
    if value is not None and shape and value.shape[1] != shape[1]:
        old, new = (round((count - 1) ** 0.5) for count in (value.shape[1], shape[1]))
        if old**2 + 1 == value.shape[1]:  # else it is refused below
            state[POSITIONS] = resize_positions(value.float(), new, new, *how)
            notes.append(f"positions {old} x {old} resized to {new} x {new}")
    value, shape = state.get(PATCHES), shapes.get(PATCHES)
    if value is not None and shape and value.shape[1] != shape[1]:
        state[PATCHES] = to_channels(value.float(), shape[1])
        notes.append(f"{value.shape[1]} input channels made {shape[1]}")
    return fitting(state, shapes, title, fix), notes


def to_channels(weight_DCPP, channels):
    """Weights of the patch convolution for another number of input channels.

    New channel c has the weights of old channel c % C, divided by how many share them; fewer sum
    up what falls to each. So a grey image, equal in all normalised channels, gives equal tokens.
    """
    C = weight_DCPP.shape[1]
    i = torch.arange(max(channels, C))
    share_cC = torch.zeros(channels, C)
    share_cC[i % channels, i % C] = 1
    return torch.einsum("cC,DCpq->Dcpq", share_cC / share_cC.sum(dim=0), weight_DCPP)
