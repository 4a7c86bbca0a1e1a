"""From a file to a backbone: a trained one to use. (To start a training from one: start.py.)

    load_backbone("runs/x")               a run of ours (its teacher.pt), exactly as it was trained
    load_backbone("dinov2_vits14.pth")    weights in any layout of layouts.py; .safetensors as well
    load_backbone("folder")               of Hugging Face: config.json beside model.safetensors
    load_backbone("dinov2_vitb14_reg")    a released network by name: fetched once, then kept

A file of others is little but tensors, and their names and shapes say what network it is. Names are
strict: one that is missing, too many, or of another shape is an error that says so. Files are read
as tensors only, so no code in them is ever run. From a backbone to a file: export.py.
"""

import json
import math
import os
import re
import sys
import time
from pathlib import Path

import torch

from config import Config, UserError, from_dict, shown
from parallel import warn
from vit import SIZES, VisionTransformer, build_backbone
from weights.checkpoint import read, reason
from weights.layouts import parts_of

PATCHES, POSITIONS = "patch_embed.proj.weight", "pos_embed"
OURS = "nanodinov2"  # the place in other formats for what tensors do not tell
FILES = ("teacher.pt", "model.safetensors", "pytorch_model.bin")  # in a folder

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

    Returns the network, or with with_config (network, Config): for a file without one, a fitting
    one to evaluate it. Attention is `auto`, so that a run on GPUs opens anywhere. Raises UserError
    if the file is missing, damaged, or does not hold what its config or its shapes say.
    """
    path = teacher_file(path)
    parts, about = contents(path)
    if "config" in about:
        cfg = from_dict(about["config"], str(path))
        cfg.attention = "auto"
        with torch.device("meta"):
            backbone = build_backbone(cfg)  # even its initial values are those of the run
        fill(backbone, parts["backbone"], path)
    else:
        backbone, known = network_of(parts["backbone"], path, about)
        cfg = evaluation_config(known, about.get("images"), path) if with_config else None
    return (backbone.eval(), cfg) if with_config else backbone.eval()


def network_of(state, path, about):
    """(backbone, arguments it was built with) that the tensors of a file are; see architecture."""
    known = architecture(state, path, about)
    with torch.device("meta"):  # shapes only: the values come from the file
        backbone = VisionTransformer(**known)
    for module in backbone.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = about.get("eps", module.eps)
    fill(backbone, state, path)
    return backbone, known


def fill(backbone, state, path, fix="the file is damaged, or holds another network"):
    """Make the tensors of a file the weights of a network on the meta device; strict."""
    shapes = {name: value.shape for name, value in backbone.named_parameters()}
    backbone.load_state_dict(fitting(state, shapes, path, fix), assign=True)


def fitting(state, shapes, title, fix):
    """The tensors in fp32. Raises UserError unless they have just these names and shapes."""
    for name in [*shapes, *state]:
        if name not in state:
            problem = "is missing"
        elif name not in shapes:
            problem = "has no place in this network"
        elif state[name].shape != shapes[name]:
            problem = f"is {tuple(state[name].shape)}, here it is {tuple(shapes[name])}"
        else:
            continue
        raise UserError(f"{title}: {name} {problem}; {fix}")
    return {name: value.float() for name, value in state.items()}


# ---- what network a file holds ------------------------------------------------------------------


def architecture(state, path, about):
    """Arguments of VisionTransformer, read off the shapes of tensors under the released names.

    Two things have no shape, and if the file does not say them (`about`) are as in the released
    networks. Heads: those of SIZES, else one per 64 channels. How positions are resized: with an
    offset of 0.1 or, with registers, antialias.
    """
    for name in PATCHES, POSITIONS:
        if name not in state:
            raise UserError(f"{path}: not weights of a backbone by name: {name} is missing")
    dim, channels, patch, _ = state[PATCHES].shape
    side = math.isqrt(state[POSITIONS].shape[1] - 1)
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    known = {size[:2]: size[2] for size in SIZES.values()}
    heads = about.get("heads", known.get((dim, depth), dim // 64))
    if not heads or dim % heads:
        raise UserError(f"{path}: {dim} channels do not tell the number of heads; use a run")
    ffn = "swiglu" if "blocks.0.mlp.w12.weight" in state else "mlp"
    return {
        "size": (dim, depth, heads, ffn),
        "patch": patch,
        "image_size": side * patch,
        "channels": channels,
        "registers": registers,
        "layerscale": 1e-5 if "blocks.0.ls1.gamma" in state else 0,
        "interpolate_offset": about.get("interpolate_offset", 0.0 if registers else 0.1),
        "interpolate_antialias": about.get("interpolate_antialias", registers > 0),
    }


def beyond_shapes(backbone, cfg):
    """What tensors do not tell, as a file keeps it: `about` of `contents`. cfg: of its images."""
    images = {key: getattr(cfg.data, key) for key in ("channels", "mean", "std")}
    return {
        "heads": backbone.blocks[0].attn.heads,
        "interpolate_offset": backbone.interpolate_offset,
        "interpolate_antialias": backbone.interpolate_antialias,
        "eps": backbone.norm.eps,
        "images": images | {"size": [cfg.crops.global_size] * 2},
    }


def vit_of(known, vit):
    """Write into a section cfg.vit what network `architecture` has found."""
    dim, depth, heads, vit.ffn = known["size"]
    names = [name for name, size in SIZES.items() if size[:3] == (dim, depth, heads)]
    vit.size = names[0] if names else f"{dim} x {depth}"
    for key in vars(vit).keys() & known.keys() - {"size"}:
        setattr(vit, key, known[key])


def evaluation_config(known, images, path):
    """A Config to evaluate a file that has none, from what `architecture` has found.

    images  what the file says of its images: mean, std, size (height, width); None: nothing. Then
            they have 224 px, as officially, or less if the network is for less.
    """
    # Differs from the official code, which evaluates in fp16 (autocast): fp32 runs everywhere.
    cfg, patch = Config(precision="fp32"), known["patch"]
    vit_of(known, cfg.vit)
    cfg.crops.local_count = 0  # there is no training; their size need not fit
    d = cfg.data
    d.channels, d.workers = known["channels"], min(d.workers, os.cpu_count() or 1)
    if images:
        d.mean, d.std = tuple(images["mean"]), tuple(images["std"])
        cfg.crops.global_size = max(min(images["size"]) // patch, 1) * patch
        return cfg
    cfg.crops.global_size = min(known["image_size"], max(round(224 / patch), 1) * patch)
    if d.channels != 3:
        d.mean, d.std = (0.5,) * d.channels, (0.25,) * d.channels
    # Released files are of ImageNet's for sure.
    if not re.fullmatch(r"dino.*_pretrain(_full_checkpoint)?\.pth", path.name):
        warn(f"{path} does not say how its images were normalised: assumed are "
             f"data.mean={shown(d.mean)} and data.std={shown(d.std)}")  # fmt: skip
    return cfg


# ---- reading ------------------------------------------------------------------------------------


def teacher_file(path):
    """The file that a folder (a run, or of Hugging Face), a file or a released name stands for."""
    path = os.path.expanduser(path)
    if path in RELEASED and not os.path.exists(path):
        return fetch(path)
    path = Path(path)
    for file in [path / name for name in FILES] if path.is_dir() else [path]:
        if file.exists():
            return file
    what = f"no {', '.join(FILES)} in this folder" if path.is_dir() else "no such file"
    fix = "give a run folder, a file, or a released name like dinov2_vits14"
    raise UserError(f"{path}: {what}; {fix}")


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
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            bar = sys.stderr.isatty()
            torch.hub.download_url_to_file(address, str(path), RELEASED[name], progress=bar)
        # RuntimeError: another checksum. The others are OSErrors: no internet, no place.
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{name}: {address} cannot be fetched ({reason(error)}); "
                f"get this file in another way and give its path, or put it at {path}"
            ) from None
    return path


def contents(path):
    """({part: {our name: tensor}}, what else it says) of a file of weights.

    Its parts are the backbone, and the heads it has. It may say: config and keys of vit.*, of a run
    of ours; or heads, interpolate_* and eps of the network, and images (mean, std, size).
    """
    state = read(path)
    if not isinstance(state, dict):
        raise UserError(f"{path}: not weights of a backbone by name; give a file of them")
    about = beside(path) | json.loads(getattr(state, "_metadata", {}).get(OURS, "{}"))
    if "backbone" in state and isinstance(state.get("config"), dict):
        about = state["config"].get("vit", {}) | {"config": state["config"]}
        state = {part: value for part, value in state.items() if part not in ("config", "step")}
    return parts_of(state, path), about


def beside(path):
    """What the json files in a folder of Hugging Face say of the weights there, in our words."""
    said, about = {}, {}
    names = ("config.json", "preprocessor_config.json") if path.name in FILES[1:] else ()
    try:
        for file in filter(Path.exists, map(path.with_name, names)):
            said |= json.loads(file.read_text(encoding="utf-8"))
        if said.get("hidden_act", "gelu") != "gelu":
            raise ValueError(f"hidden_act is {said['hidden_act']} there, and gelu here")
        if "layer_norm_eps" in said:
            about["eps"] = float(said["layer_norm_eps"])
        if "num_attention_heads" in said:
            about["heads"] = int(said["num_attention_heads"])
        if "image_mean" in said:
            size = said.get("crop_size", said.get("size", 224))
            about["images"] = {
                "mean": [float(x) for x in said["image_mean"]],
                "std": [float(x) for x in said["image_std"]],
                "size": [int(n) for n in (size.values() if isinstance(size, dict) else [size])],
            }
    # What somebody has edited is anything: no json, no dictionary, other keys, other types.
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        files = " and ".join(names)
        raise UserError(f"{path.parent}: {files} cannot be understood ({reason(error)})") from None
    return about
