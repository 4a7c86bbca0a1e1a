"""Where a run starts: from weights of another one, adapted where that is honest, else refused.

    init_from=RUN, file or name  weights that a new run starts from
    init_heads=true              with the heads, which a run folder or teacher.pt of ours has
    head_steps=1000              or fresh heads, trained first while the backbone is frozen

It is read as by weights.load_backbone: a run folder, a file, or the name of a released network.
Names are strict: one that is missing, too many, or of another shape is an error that says so. Two
things may differ and are adapted: the grid of positions and the number of input channels.

Shapes:  C input channels   N patches   D channels of the network
"""

import torch

from config import UserError
from parallel import put
from vit import SIZES, resize_positions
from weights.load import (
    PATCHES,
    POSITIONS,
    architecture,
    check_names,
    check_shape,
    contents,
    teacher_file,
)

SAME = "vit.size, vit.patch, vit.registers and vit.ffn must be those of the file"
HEADS = "the keys of head.* must be those of the file"


def start_from(cfg, *networks):
    """Give each network the weights of cfg.init_from; returns in words what was done.

    The backbone, and with cfg.init_heads the heads too. Raises UserError if anything does not fit.
    """
    path = teacher_file(cfg.init_from)
    title = f"init_from={path}"
    parts, _ = read_parts(path)
    if not cfg.init_heads:
        parts = {"backbone": parts["backbone"]}
    elif len(parts) == 1:
        raise UserError(
            f"{title} has no heads: set init_heads=false, and head_steps to train fresh ones first"
        )
    notes = ", ".join([str(path), *put_parts(networks, parts, cfg.vit, title)])
    return f"starts from {notes}; the heads are {'those of the file' if cfg.init_heads else 'new'}"


def put_parts(networks, parts, vit, title):
    """Copy {part: {name: tensor}} into networks (each its shard of it); returns notes on changes.

    Strict: of a part all names, and with one head all heads.
    """
    notes, places = [], dict(networks[0].named_children())
    if len(parts) > 1 and parts.keys() != places.keys():
        raise UserError(
            f"{title} has {' and '.join(parts)}, here it is {' and '.join(places)}: "
            f"head.separate must be that of the file"
        )
    for part, state in parts.items():
        shapes = {name: value.shape for name, value in places[part].named_parameters()}
        weights, changed = adapt(state, shapes, vit, title, SAME if part == "backbone" else HEADS)
        notes += changed
        for network in networks:
            for name, parameter in getattr(network, part).named_parameters():
                put(parameter, weights[name])
    return notes


def read_parts(path):
    """({part: {name: tensor}}, what else the file says of it: see weights.contents)."""
    backbone, about = contents(path)
    heads = {part: about[part] for part in ("dino_head", "ibot_head") if part in about}
    return {"backbone": backbone, **heads}, about


def adapt(state, shapes, vit, title, fix=SAME):
    """(fp32 weights of these shapes, notes on what was changed) from the tensors of a file."""
    check_names(state, shapes, title, fix)
    weights, notes = {}, []
    for name, shape in shapes.items():
        value = state[name].float()
        if name == POSITIONS and value.dim() == 3 and value.shape[1] != shape[1]:
            old, new = (round((s[1] - 1) ** 0.5) for s in (value.shape, shape))
            if old**2 + 1 == value.shape[1]:  # else it is refused below
                offset, antialias = vit.interpolate_offset, vit.interpolate_antialias
                value = resize_positions(value, new, new, offset, antialias)
                notes.append(f"positions {old} x {old} resized to {new} x {new}")
        if name == PATCHES and value.dim() == 4 and value.shape[1] != shape[1]:
            notes.append(f"{value.shape[1]} input channels made {shape[1]}")
            value = to_channels(value, shape[1])
        check_shape(name, value, shape, title, fix)
        weights[name] = value
    return weights, notes


def to_channels(weight_DCPP, channels):
    """Weights of the patch convolution for another number of input channels.

    New channel c has the weights of old channel c % C, divided by how many channels share them; of
    fewer channels, each has the sum of the old ones that fall to it. Either way the weights of a
    pixel have the same sum as before, so an image that is equal in all (normalised) channels,
    a grey one, gives the same patch tokens.
    """
    C = weight_DCPP.shape[1]
    share_cC = torch.zeros(channels, C)
    for i in range(max(channels, C)):
        share_cC[i % channels, i % C] = 1
    share_cC = share_cC / share_cC.sum(dim=0)
    return torch.einsum("cC,DCpq->Dcpq", share_cC, weight_DCPP)


def vit_of(state, about, vit, path):
    """Write into a section cfg.vit what network a backbone without a config is.

    Raises UserError if it is none of the named sizes.
    """
    known = architecture(state, path, about)
    names = [name for name, size in SIZES.items() if size[:3] == tuple(known["size"][:3])]
    if not names:
        raise UserError(f"{path}: its size {known['size']} is none of {', '.join(SIZES)}")
    vit.size, vit.ffn = names[0], known["size"][3]
    for key in ("patch", "registers", "interpolate_offset", "interpolate_antialias"):
        setattr(vit, key, known[key])
