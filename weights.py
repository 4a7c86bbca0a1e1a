"""From a file to a backbone: a trained one to use, or one to start another training from.

    load_backbone(RUN)                     our own, exactly as it was trained
    init_from=RUN or file (config)         weights that a new run starts from

A run folder means its teacher.pt. For `init_from` a file may also be a plain state dict under the
released names (.pth or .safetensors). Names are strict: one that is missing, too many, or of
another shape is an error that says so. Two things may differ and are adapted: the grid of positions
and the number of input channels. Heads always start fresh: prototypes belong to their images.

Shapes:  C input channels   N patches   D channels of the network
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from checkpoint import read
from config import UserError, from_dict
from parallel import put
from vit import build_backbone, resize_positions

PATCHES, POSITIONS = "patch_embed.proj.weight", "pos_embed"
SAME = "vit.size, vit.patch, vit.registers and vit.ffn must be those of the file"


def load_backbone(path, with_config=False):
    """The trained backbone of a run folder or teacher file, in eval mode; strict.

    path  RUN (its teacher.pt) or a file written by checkpoint.export_teacher
    Returns the network, or (network, Config) with with_config. Raises UserError if the file is
    missing, damaged, or does not hold what its config says.
    """
    path = teacher_file(path)
    state = read(path)
    if "backbone" not in state or "config" not in state:
        raise UserError(f"{path}: not a teacher file of train.py (no backbone and config in it)")
    cfg = from_dict(state["config"], str(path))
    backbone = build_backbone(cfg)
    try:
        backbone.load_state_dict(state["backbone"])
    except RuntimeError as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    backbone.eval()
    return (backbone, cfg) if with_config else backbone


def teacher_file(path):
    return Path(path, "teacher.pt") if Path(path).is_dir() else Path(path)


# ---- init_from ----------------------------------------------------------------------------------


def start_from(cfg, *networks):
    """Give each network the backbone weights of cfg.init_from; returns in words what was done."""
    path = teacher_file(cfg.init_from)
    shapes = {name: value.shape for name, value in networks[0].backbone.named_parameters()}
    weights, notes = adapt(read_state(path), shapes, cfg.vit, f"init_from={path}")
    for network in networks:
        for name, parameter in network.backbone.named_parameters():
            put(parameter, weights[name])  # of a shard, its part
    return f"starts from {path}{', '.join(['', *notes])}; the heads are new"


def read_state(path):
    """{name: tensor} of the backbone in a teacher file, or in a file under the released names."""
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"init_from={path}: cannot be read ({reason})") from None
    state = read(path)
    state = state.get("backbone", state) if isinstance(state, dict) else {}
    if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(
            f"init_from={path}: not weights of a backbone by name; "
            "give a run folder, a teacher.pt, or a released .pth or .safetensors"
        )
    return state


def adapt(state, shapes, vit, title):
    """(fp32 weights of these shapes, notes on what was changed) from the tensors of a file."""
    for problem, names in (
        ("is missing", [name for name in shapes if name not in state]),
        ("has no place in this network", [name for name in state if name not in shapes]),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(f"{title}: {names[0]} {problem}{more}; {SAME}")
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
        if value.shape != shape:
            raise UserError(
                f"{title}: {name} is {tuple(value.shape)}, here it is {tuple(shape)}; {SAME}"
            )
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
