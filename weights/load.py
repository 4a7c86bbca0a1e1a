"""From a file to a backbone: a trained one to use. (To start a training from one: start.py.)

    load_backbone("runs/x")               a run of ours (its teacher.pt), exactly as it was trained
    load_backbone("dinov2_vits14.pth")    a file under the released names; .safetensors as well
    load_backbone("dinov2_vitb14_reg")    a released network by name: fetched once, then kept

A file under the released names is nothing but tensors, and their shapes say what network it is.
Names are strict: one that is missing, too many, or of another shape is an error that says so. Files
are read as tensors only, so no code in them is ever run. From a backbone to a file: export.py.
"""

import json
import math
import os
import re
import socket
import sys
import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from config import Config, UserError, from_dict
from vit import SIZES, VisionTransformer, build_backbone
from weights.checkpoint import read

PATCHES, POSITIONS = "patch_embed.proj.weight", "pos_embed"
OURS = ("config", "dino_head", "ibot_head")  # what a teacher.pt has beside its backbone

ADDRESS = "https://dl.fbaipublicfiles.com/dinov2"
# SHA-256 of the released files. Meta does not publish them: these are the values that independent
# public projects state of what they have fetched (all eight: finegrain-ai/refiners).
RELEASED = {
    "dinov2_vits14": "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9",
    "dinov2_vitb14": "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73",
    "dinov2_vitl14": "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
    "dinov2_vitg14": "baf8467e50af277596bbbafa06887c177ee899ab46033649c383577d7e9309d3",
    "dinov2_vits14_reg": "f433177089a681826f849f194ece3bb48f4d63fb38d32fc837e3dc7a4e5641fb",
    "dinov2_vitb14_reg": "73182a088cf94833c94b1666d1c99e02fe87e2007bff57b564fb6206e25dba71",
    "dinov2_vitl14_reg": "36e4deffbaef061a2576705b0c36f93621e2ae20bf6274694821b0b492551b51",
    "dinov2_vitg14_reg": "746ecb8c6301c645c5c855be91687d274587d6e48fdaec4a729753160b34a283",
}


def load_backbone(path, with_config=False):
    """The trained backbone of a run, of a file, or released under a name; in eval mode, strict.

    path  RUN (its teacher.pt), such a file, one under the released names (.pth, .safetensors), or
          a name of RELEASED
    Returns the network, or (network, Config) with with_config; for a released file, which has no
    config, that is a fitting one to evaluate it. Attention is `auto`, whatever the run had, so
    that a run on GPUs opens anywhere. Raises UserError if the file is missing, damaged, or does
    not hold what its config or its shapes say.
    """
    path = teacher_file(path)
    state, about = contents(path)
    with torch.device("meta"):  # shapes only: the values come from the file
        if "config" in about:
            cfg = from_dict(about["config"], str(path))
            cfg.attention = "auto"
            backbone = build_backbone(cfg)
        else:
            backbone = VisionTransformer(**architecture(state, path, about))
            cfg = evaluation_config(backbone)
    fill(backbone, state, path, "the file is damaged, or holds another network")
    return (backbone.eval(), cfg) if with_config else backbone.eval()


def fill(backbone, state, path, fix):
    """Make the tensors of a file the weights of a network on the meta device; strict."""
    shapes = {name: value.shape for name, value in backbone.named_parameters()}
    check_names(state, shapes, path, fix)
    for name, shape in shapes.items():
        check_shape(name, state[name], shape, path, fix)
    state = {name: value.float() for name, value in state.items()}
    backbone.load_state_dict(state, assign=True)


def check_names(state, shapes, title, fix):
    for problem, names in (
        ("is missing", [name for name in shapes if name not in state]),
        ("has no place in this network", [name for name in state if name not in shapes]),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(f"{title}: {names[0]} {problem}{more}; {fix}")


def check_shape(name, value, shape, title, fix):
    if value.shape != shape:
        raise UserError(
            f"{title}: {name} is {tuple(value.shape)}, here it is {tuple(shape)}; {fix}"
        )


# ---- what network a file holds ------------------------------------------------------------------


def architecture(state, path, about):
    """Arguments of VisionTransformer, read off the shapes of tensors under the released names.

    Two things have no shape, and if the file does not say them (`about`) are as in the released
    networks. Heads: those of SIZES, else one per 64 channels. How positions are resized: with an
    offset of 0.1, or for registers with antialias.
    """

    def shape(name, axes):
        if name not in state:
            raise UserError(f"{path}: {name} is missing: not a backbone under the released names")
        if state[name].dim() != axes:
            raise UserError(f"{path}: {name} is {tuple(state[name].shape)}, not of {axes} axes")
        return tuple(state[name].shape)

    dim, channels, patch, _ = shape(PATCHES, 4)
    side = math.isqrt(shape(POSITIONS, 3)[1] - 1)
    if side**2 + 1 != state[POSITIONS].shape[1]:
        count = state[POSITIONS].shape[1]
        raise UserError(f"{path}: {POSITIONS} has {count} rows, not those of a square and [CLS]")
    shape("blocks.0.norm1.weight", 1)
    depth = 1 + max(int(name.split(".")[1]) for name in state if re.match(r"blocks\.\d+\.", name))
    ffn = "swiglu" if "blocks.0.mlp.w12.weight" in state else "mlp"
    registers = shape("register_tokens", 3)[1] if "register_tokens" in state else 0
    known = {size[:2]: size[2] for size in SIZES.values()}
    heads = known.get((dim, depth), dim // 64)
    if "size" not in about and (not heads or dim % heads):
        raise UserError(
            f"{path}: {dim} channels do not tell the number of heads; use the run folder or "
            "a .safetensors of export.py, which do"
        )
    return {
        "size": (dim, depth, heads, ffn),
        "patch": patch,
        "image_size": side * patch,
        "channels": channels,
        "registers": registers,
        "layerscale": 1e-5 if "blocks.0.ls1.gamma" in state else 0,
        "interpolate_offset": 0.0 if registers else 0.1,
        "interpolate_antialias": bool(registers),
        **about,
    }


def evaluation_config(backbone):
    """A Config to evaluate a released network: 224 px, as officially, or less if it is for less."""
    # Differs from the official code, which evaluates in fp16 (autocast): fp32 runs everywhere.
    cfg, patch = Config(precision="fp32"), backbone.patch
    sizes = {size[:2]: name for name, size in SIZES.items()}
    shape = (backbone.dim, backbone.depth)
    cfg.vit.size = sizes.get(shape, "{} x {}".format(*shape))
    cfg.vit.patch, cfg.vit.registers = patch, backbone.registers
    cfg.vit.interpolate_offset = backbone.interpolate_offset
    cfg.vit.interpolate_antialias = backbone.interpolate_antialias
    side = math.isqrt(backbone.pos_embed.shape[1] - 1)
    cfg.crops.global_size = min(side, max(round(224 / patch), 1)) * patch
    cfg.crops.local_count = 0  # there is no training; their size need not fit
    cfg.data.channels = backbone.patch_embed.proj.in_channels
    cfg.data.workers = min(cfg.data.workers, os.cpu_count() or 1)
    return cfg


# ---- reading ------------------------------------------------------------------------------------


def teacher_file(path):
    """The file that a run folder, a file or a released name stands for."""
    if str(path) in RELEASED and not Path(path).exists():
        return fetch(str(path))
    file = Path(path, "teacher.pt") if Path(path).is_dir() else Path(path)
    if not file.exists():
        raise UserError(
            f"{file}: no such file; give a run folder in which train.py left a teacher.pt, "
            "a file of weights, or a released name such as dinov2_vits14"
        )
    return file


def fetch(name):
    """The file of a released name, from PyTorch's cache, or first from the public address into it.

    A fetched file must have the SHA-256 of RELEASED. Raises UserError without internet.
    """
    stem = name.removesuffix("_reg")
    file = f"{stem}{'_reg4' if name != stem else ''}_pretrain.pth"
    address, path = f"{ADDRESS}/{stem}/{file}", Path(torch.hub.get_dir(), "checkpoints", file)
    while not path.exists() and int(os.environ.get("LOCAL_RANK", 0)):
        time.sleep(1)  # for the first process of the machine; if it fails, torchrun ends all
    if not path.exists():
        patience = socket.getdefaulttimeout()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            socket.setdefaulttimeout(30)  # seconds of silence; without, it may wait for ever
            show = sys.stderr.isatty()
            torch.hub.download_url_to_file(address, str(path), RELEASED[name], progress=show)
        # RuntimeError: another checksum. The others are OSErrors: no internet, no place.
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{name}: {address} cannot be fetched ({reason}); "
                f"get this file in another way and give its path, or put it at {path}"
            ) from None
        finally:
            socket.setdefaulttimeout(patience)
    return path


def contents(path):
    """({name: tensor} of a backbone, what else the file says: config and heads, or arguments)."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                about = json.loads((file.metadata() or {}).get("nanodinov2", "{}"))
        except (OSError, ValueError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path}: cannot be read ({reason})") from None
    else:
        state = read(path)
        ours = isinstance(state, dict) and "backbone" in state and "config" in state
        about = {key: state[key] for key in OURS if key in state} if ours else {}
    state = state.get("backbone", state.get("teacher", state)) if isinstance(state, dict) else {}
    whole = isinstance(state, dict) and all(torch.is_tensor(value) for value in state.values())
    if not state or not whole:
        raise UserError(
            f"{path}: not weights of a backbone by name; "
            "give a run folder, a teacher.pt, or a released .pth or .safetensors"
        )
    return released_names(state), about


def released_names(state):
    """The names of the official training as they are released.

    Its checkpoints hold the heads too, and number blocks by chunk: blocks.1.7 is block 7.
    """
    if any(name.startswith("backbone.") for name in state):
        parts = {name.partition(".")[::2]: value for name, value in state.items()}
        state = {name: value for (part, name), value in parts.items() if part == "backbone"}
    chunk = re.compile(r"^blocks\.\d+\.(\d+)\.")
    return {chunk.sub(r"blocks.\1.", name): value for name, value in state.items()}
