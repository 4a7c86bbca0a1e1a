"""The entry points of the official repository: code written for its torch.hub runs on this one.

    torch.hub.load("/path/to/this/folder", "dinov2_vits14", source="local")
    torch.hub.load(..., "dinov2_vitb14_reg", source="local", weights="dinov2_vitb14_reg4.pth")
    torch.hub.load(..., "dinov2_vitl14", source="local", pretrained=False, img_size=224)

dinov2_vits14, dinov2_vitb14, dinov2_vitl14, dinov2_vitg14, and each with _reg: the network as
released, with the methods, attributes and keywords of the official class (weights/plain.py). Not
here are the heads for classes and depth (_lc, _ld, _dd). The files of this folder are modules with
plain names (config, data, ...): a program that has imported its own by such a name cannot use both.
"""

import torch as _torch

import vit as _vit
from config import UserError as _UserError
from weights import load as _weights
from weights.plain import plain as _plain

dependencies = ["torch", "numpy", "yaml", "tqdm", "safetensors"]
_SIZES = {"s": "small", "b": "base", "l": "large", "g": "giant2"}
# Keyword of the official constructor: ours.
_OPTIONS = {
    "img_size": "image_size",
    "patch_size": "patch",
    "in_chans": "channels",
    "num_register_tokens": "registers",
    "init_values": "layerscale",
    "drop_path_rate": "drop_path",
    "drop_path_uniform": "drop_path_uniform",
    "interpolate_offset": "interpolate_offset",
    "interpolate_antialias": "interpolate_antialias",
    "ffn_layer": "ffn",
}
_FFN = {"mlp": "mlp", "swiglu": "swiglu", "swiglufused": "swiglu"}
# Keywords that have one value here.
_FIXED = {"block_chunks": 0, "mlp_ratio": 4, "qkv_bias": True, "proj_bias": True, "ffn_bias": True}


def _entry_point(name):
    size, registers = _SIZES[name[len("dinov2_vit")]], 4 if name.endswith("_reg") else 0

    # Differs from the official code, which returns the network in training mode: in eval mode
    # stochastic depth, if asked for, waits for .train(); without it both compute the same.
    def load(*, pretrained=True, weights="LVD142M", **options):
        as_released = {
            "registers": registers,
            "interpolate_offset": 0.0 if registers else 0.1,
            "interpolate_antialias": bool(registers),
        }
        for key in _FIXED.keys() & options.keys():
            if (value := options.pop(key)) != _FIXED[key]:
                raise _UserError(f"{name}: {key}={value} is not built here, but {_FIXED[key]}")
        options = {_OPTIONS.get(key, key): value for key, value in options.items()}
        if "ffn" in options:
            options["ffn"] = _FFN[options["ffn"]]
        if "image_size" in options:  # officially, what is over after the last patch is ignored
            options["image_size"] -= options["image_size"] % options.get("patch", 14)
        if not pretrained:
            return _plain(_vit.VisionTransformer(size, **as_released | options)).eval()
        with _torch.device("meta"):  # shapes only: the values come from the file
            backbone = _vit.VisionTransformer(size, **as_released | options)
        path = _weights.teacher_file(name if weights == "LVD142M" else weights)
        parts, _ = _weights.contents(path)
        fix = f"the file is not of {name} with these options"
        _weights.fill(backbone, parts["backbone"], path, fix)
        return _plain(backbone).eval()

    load.__name__ = name
    load.__doc__ = f"""DINOv2 ViT-{size}/14 with {registers} registers.

    pretrained  False: random weights, as training begins
    weights     "LVD142M" (the released ones, fetched once), or a file or run folder of ours
    options     of the network, by their official names: {", ".join(_OPTIONS | _FIXED)}
    """
    return load


for _name in _weights.RELEASED:
    globals()[_name] = _entry_point(_name)
