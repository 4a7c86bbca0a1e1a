"""From a backbone to a file for other programs, by the ending of its name or a format= word.

    python -m weights.export RUN out.safetensors         weights under the released names
    python -m weights.export RUN out.pth                 the same as a PyTorch state dict
    python -m weights.export RUN out.pth format=timm     under the names of timm (or .safetensors)
    python -m weights.export RUN folder                  for Hugging Face's from_pretrained(folder)
    python -m weights.export RUN out.pt2 [size=224]      the network for one size (torch.export)
    python -m weights.export RUN out.onnx [size=98x126]  as ONNX; pip install onnx onnxscript
    python -m weights.export RUN out.onnx size=free      for any size, from 2 x 2 patches
RUN is whatever load_backbone takes. size is height x width in pixels, by default that of the large
crops of the run (224 for a released network).

An exported network takes any number of images, normalised and in fp32, and returns the two tokens
most used: images (B, C, H, W) -> cls (B, D), patches (B, N, D), both normalised. Every file says in
its metadata, under "nanodinov2", how to feed it: channels, mean, std and size of the images.
"""

import json
import math
import re
import sys
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from config import UserError, report_errors, take_options, writing
from parallel import warn
from weights.layouts import HUGGING_FACE, TIMM, renamed
from weights.load import OURS, beyond_shapes, load_backbone
from weights.plain import plain


def export(backbone, cfg, path, size=None, form=""):
    """Write a backbone; returns in words what was written. Raises UserError.

    cfg   Config of its images: data.mean, data.std, crops.global_size
    size  (height, width) in pixels, or "free"; None: crops.global_size
    form  "timm": weights under its names
    """
    path, weights, p = Path(path), (".safetensors", ".pth"), backbone.patch
    endings = weights if form else (*weights, ".pt2", ".onnx", "")
    if path.suffix not in endings or form not in ("", "timm"):
        known = " ".join(endings).strip() + " or a folder" * (not form)
        raise UserError(f"{path}: the ending says the form, use {known}; or format=timm")
    given = bool(size) and size != "free"
    height, width = size if given else (cfg.crops.global_size,) * 2
    if height % p or width % p or not height or not width:
        raise UserError(f"size={height}x{width}: height and width must be multiples of {p}")
    about = beyond_shapes(backbone, cfg)
    about["images"]["size"] = [height, width]
    if path.suffix in (".pt2", ".onnx"):
        return write_network(backbone, path, size or (height, width), json.dumps(about))
    if not path.suffix:
        return write_folder(backbone, path, about, given and height == width and height)
    state = backbone.state_dict()
    return write_weights(for_timm(state) if form == "timm" else state, path, about)


def write_weights(state, path, about):
    """Tensors by name, and what they do not tell in the metadata."""
    about = {"format": "pt", OURS: json.dumps(about)}  # transformers asks for the first word
    if path.suffix == ".safetensors":
        path.write_bytes(save(dict(state), about))
    else:
        state = OrderedDict(state)
        state._metadata = about  # which PyTorch keeps beside a state dict, and carries along
        torch.save(state, path)
    return str(path)


def for_timm(state):
    """Without a mask token; with registers, [CLS] has its position, which has no other place."""
    state = {name: value for name, value in state.items() if name != "mask_token"}
    if "register_tokens" in state:
        cls, positions = state["cls_token"], state["pos_embed"]
        state |= {"cls_token": cls + positions[:, :1], "pos_embed": positions[:, 1:]}
    return renamed(state, TIMM)


def write_folder(backbone, path, about, size):
    """A folder for AutoModel.from_pretrained and AutoImageProcessor.

    They resize positions in another way. With a size, positions are made for it beforehand.
    """
    p, registers, images = backbone.patch, backbone.registers, about["images"]
    state = backbone.state_dict()
    if size:
        state["pos_embed"] = backbone.interpolate_pos_encoding(size // p, size // p).detach()
    native = math.isqrt(state["pos_embed"].shape[1] - 1) * p
    theirs = (0.0, registers > 0)
    if theirs != (backbone.interpolate_offset, backbone.interpolate_antialias):
        warn(f"{path}: transformers resizes positions in another way, so the same numbers come "
             f"from images of {native} px only; size= makes another size the one")  # fmt: skip
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    config = {
        "architectures": [f"{kind}Model"],
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "hidden_size": backbone.dim,
        "num_hidden_layers": backbone.depth,
        "num_attention_heads": about["heads"],
        "use_swiglu_ffn": "blocks.0.mlp.w12.weight" in state,
        "layer_norm_eps": about["eps"],
        "image_size": native,
        "patch_size": p,
        "num_channels": images["channels"],
        "layerscale_value": 1.0,  # where the file has no such factors
    } | ({"num_register_tokens": registers} if registers else {})
    processor = {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": round(images["size"][0] * 256 / 224)},  # as centre_crop
        "crop_size": dict(zip(("height", "width"), images["size"], strict=True)),
        "resample": 3,
        "image_mean": images["mean"],
        "image_std": images["std"],
        "do_convert_rgb": images["channels"] == 3,
    }
    path.mkdir(exist_ok=True)
    for name, content in ("config.json", config), ("preprocessor_config.json", processor):
        (path / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    write_weights(renamed(state, HUGGING_FACE), path / "model.safetensors", about)
    return str(path)


class Tokens(nn.Module):
    """A network as it is exported: images (B, C, H, W) -> [CLS] (B, D) and patches (B, N, D)."""

    def __init__(self, backbone, grid):
        super().__init__()
        self.backbone = plain(backbone)
        if grid:  # one size: positions are a constant
            positions = backbone.interpolate_pos_encoding(*grid).detach().clone()
            self.backbone.interpolate_pos_encoding = lambda *_: positions

    def forward(self, images):
        tokens = self.backbone.forward_features(images)
        return tokens["x_norm_clstoken"], tokens["x_norm_patchtokens"]


def write_network(backbone, path, size, about):
    """The network as torch.export (.pt2) or ONNX, as path ends; size as `export` has it."""
    if path.suffix == ".onnx":
        try:
            import onnx  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise UserError(f"{path}: {error}; pip install onnx onnxscript") from None
    p, Dim = backbone.patch, torch.export.Dim
    dims = {0: Dim("batch", min=1)}
    if free := size == "free":
        dims |= {2: p * Dim("rows", min=2), 3: p * Dim("columns", min=2)}
        size = 2 * p, 3 * p  # of the example: three different sizes
    network = Tokens(backbone, None if free else (size[0] // p, size[1] // p)).eval()
    images = torch.zeros(4, backbone.patch_embed.proj.in_channels, *size)
    with torch.no_grad():
        program = torch.export.export(network, (images,), dynamic_shapes=(dims,))
        if path.suffix == ".pt2":
            torch.export.save(program, path, extra_files={OURS: about})
        else:
            names = {"input_names": ["images"], "output_names": ["cls", "patches"]}
            model = torch.onnx.export(program, (), verbose=False, **names)
            model.model.metadata_props[OURS] = about
            model.save(path)  # one file holds 2 GB: what is larger lies in PATH.data beside it
    shown = "any height and width" if free else f"{size[0]} x {size[1]} px"
    return f"{path} for images of {shown}"


@report_errors
def main(argv):
    o, words = take_options(argv, {"size": "", "format": ""})
    if {"-h", "--help"} & set(argv) or len(words) < 2:
        print(__doc__)
        sys.exit(0 if {"-h", "--help"} & set(argv) else 2)
    run, path, *rest = words
    if rest or not re.fullmatch(r"(\d+(x\d+)?|free)?", o.size):
        raise UserError(f"cannot read {(rest or [o.size])[0]!r}: write size=224, or size=98x126 "
                        f"(height x width), size=free, or format=timm")  # fmt: skip
    numbers = [int(number) for number in re.findall(r"\d+", o.size)]
    size, path = (numbers[0], numbers[-1]) if numbers else o.size, Path(path)
    backbone, cfg = load_backbone(run, with_config=True)
    with writing(path):
        path.absolute().parent.stat()  # without a folder, each library fails in its own way
        print(f"wrote {export(backbone, cfg, path, size, o.format)}")


if __name__ == "__main__":
    main(sys.argv[1:])
