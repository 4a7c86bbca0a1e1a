"""From a backbone to a file for other programs.

    python -m weights.export RUN out.safetensors       weights under the released names
    python -m weights.export RUN out.pth               the same as a PyTorch state dict
    python -m weights.export RUN out.pt2 [size=224]    the network for one size (torch.export)
    python -m weights.export RUN out.onnx [size=98x126]  as ONNX; pip install onnx onnxscript
RUN is whatever load_backbone takes: a run folder, a file, a released name. size is height x width
in pixels, by default that of the large crops of the run (224 for a released network).

Weights load here (load_backbone), in the official code and in anything that reads released files.
An exported network has positions for its size worked out beforehand, takes any number of images,
normalised and in fp32, and returns the two tokens most used:

    images (B, C, H, W) -> cls (B, D), patches (B, N, D), both normalised
"""

import copy
import json
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from config import UserError, report_errors
from weights.load import load_backbone


class FixedSize(nn.Module):
    """A backbone for images of one size: (B, C, H, W) -> [CLS] (B, D) and patches (B, N, D)."""

    def __init__(self, backbone, rows, columns):
        super().__init__()
        self.backbone = copy.copy(backbone)  # with the same weights
        # Other programs do not resize as PyTorch does (ONNX has no antialiased bicubic), so the
        # positions become a constant.
        positions = backbone.interpolate_pos_encoding(rows, columns).detach().clone()
        self.backbone.interpolate_pos_encoding = lambda *_: positions

    def forward(self, images):
        tokens = self.backbone.forward_features(images)
        return tokens["x_norm_clstoken"], tokens["x_norm_patchtokens"]


def export(backbone, path, height, width):
    """Write the backbone in the form that the ending of `path` names. Raises UserError."""
    path = Path(path)
    if path.suffix == ".pth":
        torch.save(backbone.state_dict(), path)
    elif path.suffix == ".safetensors":
        # What shapes do not tell; other programs ignore it.
        about = {
            "size": [backbone.dim, backbone.depth, backbone.blocks[0].attn.heads, ffn(backbone)],
            "interpolate_offset": backbone.interpolate_offset,
            "interpolate_antialias": backbone.interpolate_antialias,
        }
        save_file(backbone.state_dict(), path, {"nanodinov2": json.dumps(about)})
    else:
        export_network(backbone, path, height, width)


def ffn(backbone):
    return "swiglu" if hasattr(backbone.blocks[0].mlp, "w12") else "mlp"


def export_network(backbone, path, height, width):
    """Write the backbone for images of one size, as torch.export (.pt2) or ONNX: as path ends."""
    p, channels = backbone.patch, backbone.patch_embed.proj.in_channels
    if height % p or width % p or not height or not width:
        raise UserError(f"size={height}x{width}: height and width must be multiples of {p}")
    if path.suffix == ".onnx":
        try:
            import onnx  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise UserError(f"{path}: {error}; pip install onnx onnxscript") from None
    network = FixedSize(backbone, height // p, width // p).eval()
    images = torch.zeros(2, channels, height, width)
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    with torch.no_grad():
        program = torch.export.export(network, (images,), dynamic_shapes=shapes)
        if path.suffix == ".pt2":
            return torch.export.save(program, path)
        names = {"input_names": ["images"], "output_names": ["cls", "patches"]}
        # One ONNX file holds 2 GB; larger networks have their weights in PATH.data beside it.
        large = sum(4 * value.numel() for value in backbone.parameters()) > 2**30
        torch.onnx.export(program, (), path, verbose=False, external_data=large, **names)


FORMS = (".safetensors", ".pth", ".pt2", ".onnx")


def parse_size(word):
    """(height, width) of size=224 or size=98x126."""
    numbers = word.removeprefix("size=").split("x")
    if not word.startswith("size=") or len(numbers) > 2 or not all(n.isdecimal() for n in numbers):
        raise UserError(f"cannot read {word!r}: write size=224, or size=98x126 (height x width)")
    return int(numbers[0]), int(numbers[-1])


@report_errors
def main(argv):
    if {"-h", "--help"} & set(argv) or not 2 <= len(argv) <= 3:
        print(__doc__)
        sys.exit(0 if {"-h", "--help"} & set(argv) else 2)
    run, path, *words = argv
    if Path(path).suffix not in FORMS:
        raise UserError(f"{path}: the ending says the form, use one of {' '.join(FORMS)}")
    size = parse_size(words[0]) if words else None
    backbone, cfg = load_backbone(run, with_config=True)
    try:
        export(backbone, path, *(size or [cfg.crops.global_size] * 2))
    # RuntimeError: how torch.save reports a folder that is not there.
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and Path(path).absolute().parent.is_dir():
            raise
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be written ({reason}); choose another place") from None
    print(f"wrote {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
