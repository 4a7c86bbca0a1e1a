"""The entry points of the official repository: code written for its torch.hub runs on this one.

    torch.hub.load("/path/to/this/folder", "dinov2_vits14", source="local")
    torch.hub.load(..., "dinov2_vitb14_reg", source="local", weights="dinov2_vitb14_reg4.pth")
    torch.hub.load(..., "dinov2_vitl14", source="local", pretrained=False, img_size=224)

dinov2_vits14, dinov2_vitb14, dinov2_vitl14, dinov2_vitg14, and each with _reg: the network as
released, with the methods, attributes and keywords of the official class (weights/plain.py). Not
here are stochastic depth and the heads for classes and depth (_lc, _ld, _dd). The files here are
modules with plain names (config, data, ...): a program with modules of such names cannot use both.
"""

import torch as _torch

from config import UserError as _UserError
from vit import VisionTransformer as _VisionTransformer
from weights import load as _weights
from weights.plain import plain as _plain

dependencies = ["torch", "numpy", "yaml", "tqdm", "safetensors"]
_SIZES = {"s": "small", "b": "base", "l": "large", "g": "giant2"}
# Keyword of the official constructor: ours. (interpolate_* are the same.)
_OPTIONS = {
    "img_size": "image_size",
    "patch_size": "patch",
    "in_chans": "channels",
    "num_register_tokens": "registers",
    "init_values": "layerscale",
    "ffn_layer": "ffn",
}


def _entry_point(name):
    size, registers = _SIZES[name[len("dinov2_vit")]], 4 if name.endswith("_reg") else 0

    # Differs from the official code, which returns the network in training mode: without stochastic
    # depth, which is not built here, both compute the same.
    def load(*, pretrained=True, weights="LVD142M", block_chunks=0, **options):
        if block_chunks:
            raise _UserError(f"{name}: block_chunks={block_chunks} is not built here, but 0")
        options = {
            "registers": registers,
            "interpolate_offset": 0.0 if registers else 0.1,
            "interpolate_antialias": bool(registers),
        } | {_OPTIONS.get(key, key): value for key, value in options.items()}
        options["ffn"] = options.get("ffn", "").removesuffix("fused")
        # Officially, what is over after the last patch is ignored.
        image_size, patch = options.get("image_size", 518), options.get("patch", 14)
        options["image_size"] = image_size // patch * patch
        if not pretrained:
            return _plain(_VisionTransformer(size, **options)).eval()
        with _torch.device("meta"):  # shapes only: the values come from the file
            backbone = _VisionTransformer(size, **options)
        path = _weights.teacher_file(name if weights == "LVD142M" else weights)
        parts, _ = _weights.contents(path)
        fix = f"the file is not of {name} with these options"
        _weights.fill(backbone, parts["backbone"], path, fix)
        return _plain(backbone).eval()

    load.__name__ = name
    load.__doc__ = f"""DINOv2 ViT-{size}/14 with {registers} registers.

    pretrained  False: random weights, as training begins
    weights     "LVD142M" (the released ones, fetched once), or a file or run folder of ours
    options     of the network, by their official names: {", ".join(_OPTIONS)}
    """
    return load


for _name in _weights.RELEASED:
    globals()[_name] = _entry_point(_name)
