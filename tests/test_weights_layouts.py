"""Weights travel: every layout is made from one random network, and opens as that network.

The names of Hugging Face and timm come from their own packages here, those of trainers are written
out by hand.

Run: pytest tests/test_weights_layouts.py        (seconds; timm only where it is installed)
"""

import argparse
import json

import pytest
import torch
from test_vit import close
from test_weights_load import lively

from config import Config, UserError
from heads import DINOHead
from vit import VisionTransformer
from weights import export
from weights.load import load_backbone

CASES = [(0, "mlp", 1), (4, "mlp", 1), (0, "swiglu", 1), (4, "swiglu", 1), (0, "mlp", 0)]


def network(registers=0, ffn="mlp", layerscale=1, image=70, **options):
    """Two blocks of width 128, with random weights that let every part be felt."""
    how = {"interpolate_offset": 0.0, "interpolate_antialias": True} if registers else {}
    net = VisionTransformer((128, 2, 2, ffn), 14, image, registers=registers,
                            layerscale=layerscale, **how, **options)  # fmt: skip
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(lively(parameter.shape))
    return net.eval()


def of_dino(net):
    """A network as DINO has it: without a mask token."""
    net.mask_token.data.zero_()
    return {name: value for name, value in net.state_dict().items() if name != "mask_token"}


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


def head_of(dim=128, **options):
    return DINOHead(dim, 6, 16, 8, **options).state_dict()


@torch.no_grad()
def assert_equal(found, net, size=(70, 56)):
    state = net.state_dict()
    assert found.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in found.state_dict().items())
    image = torch.randn(2, 3, *size)
    assert torch.equal(found(image), net(image))


def saved(content, path):
    torch.save(content, path)
    return path


# ---- trainers -----------------------------------------------------------------------------------


def chunked(state):
    """As the official training numbers its blocks in chunks of one."""
    return {n.replace("blocks.", f"blocks.{n.split('.')[1]}.") if "blocks" in n else n: v
            for n, v in state.items()}  # fmt: skip


LAYOUTS = {
    "released": lambda s: s,
    "the official trainer's": lambda s: {
        "teacher": prefixed(chunked(s), "backbone.") | prefixed(head_of(), "dino_head.")
    },
    "both networks in one": lambda s: {
        "model": prefixed(s, "teacher.backbone.") | prefixed(head_of(), "student.backbone.")
    },
    "DDP and compile": lambda s: prefixed(s, "module._orig_mod."),
    "FSDP": lambda s: {n.replace("norm", "_fsdp_wrapped_module.norm"): v for n, v in s.items()},
    "a full checkpoint of DINO": lambda s: {
        "student": {}, "args": argparse.Namespace(arch="vit_small"), "optimizer": {"state": {}},
        "teacher": prefixed(s, "module.backbone.") | prefixed(head_of(), "module.head."),
    },
    "iBOT's checkpoint_teacher": lambda s: {
        "state_dict": {n.replace("mask_token", "masked_embed"): v for n, v in s.items()}
    },
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_what_a_trainer_writes_opens_as_the_same_network(tmp_path, layout, case):
    net = network(*case)
    path = saved(LAYOUTS[layout](net.state_dict()), tmp_path / "x.pth")
    assert_equal(load_backbone(path), net)


def test_a_file_of_dino_opens_without_its_mask_token(tmp_path):
    net = network(0, "mlp", 0, image=518)
    assert_equal(load_backbone(saved(of_dino(net), tmp_path / "x.pth")), net, (224, 224))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_it_is(tmp_path, dtype):
    net = network().to(dtype).float()
    state = {name: value.to(dtype) for name, value in net.state_dict().items()}
    assert_equal(load_backbone(saved(state, tmp_path / "x.pth")), net)


def test_a_file_in_the_form_of_old_pytorch_opens(tmp_path):
    net = network()
    torch.save(net.state_dict(), tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    assert_equal(load_backbone(tmp_path / "x.pth"), net)


@pytest.mark.parametrize("strange", ["backbone.decoder.weight", "predictor.weight"])
def test_a_name_that_nobody_knows_is_named_with_the_layouts(tmp_path, strange):
    state = prefixed(network().state_dict(), "backbone.") | {strange: torch.zeros(3)}
    name = strange.removeprefix("backbone.")
    with pytest.raises(UserError, match=f"x.pth: .*{name} is in none of the known .*timm") as error:
        load_backbone(saved({"teacher": state}, tmp_path / "x.pth"))
    assert "\n" not in str(error.value)


def test_two_names_for_one_tensor_are_refused(tmp_path):
    state = network().state_dict() | {"embeddings.cls_token": torch.zeros(1, 1, 128)}
    with pytest.raises(UserError, match=r"embeddings.cls_token is there twice"):
        load_backbone(saved(state, tmp_path / "x.pth"))


# ---- Hugging Face -------------------------------------------------------------------------------


def tokens_of(net, image):
    features = net.forward_features(image)
    cls = features["x_norm_clstoken"].unsqueeze(1)
    return torch.cat((cls, features["x_norm_regtokens"], features["x_norm_patchtokens"]), dim=1)


def config():
    cfg = Config()
    cfg.data.mean, cfg.data.std, cfg.crops.global_size = (0.5, 0.4, 0.3), (0.2, 0.3, 0.1), 56
    return cfg


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_transformers_opens_our_folder_and_gives_our_outputs(tmp_path, case):
    transformers = pytest.importorskip("transformers")
    net = network(*case, image=518)
    export.export(net, config(), tmp_path / "folder")
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "folder").eval()
    for size in [(518, 518)] + [(56, 84)] * (case[0] > 0):
        image = torch.randn(1, 3, *size)
        close(theirs(image).last_hidden_state, tokens_of(net, image), 1e-5)
    again, cfg = load_backbone(tmp_path / "folder", with_config=True)
    assert_equal(again, net)
    assert (cfg.data.mean, cfg.data.std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.1))


@torch.no_grad()
def test_a_folder_for_one_size_has_positions_for_it_and_says_how_to_feed_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    net = network(image=140)
    export.export(net, config(), tmp_path / "folder", (98, 98))
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "folder").eval()
    image = torch.randn(1, 3, 98, 98)
    close(theirs(image).last_hidden_state, tokens_of(net, image), 1e-5)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "folder")
    pixels = torch.full((3, 200, 120), 51, dtype=torch.uint8)  # 0.2
    fed = processor(pixels, return_tensors="pt")["pixel_values"]
    assert fed.shape == (1, 3, 98, 98)
    for channel, (mean, std) in enumerate([(0.5, 0.2), (0.4, 0.3), (0.3, 0.1)]):
        close(fed[0, channel], torch.full((98, 98), (0.2 - mean) / std), 1e-5)


KINDS = [("Dinov2", {}), ("Dinov2", {"use_swiglu_ffn": True}), ("Dinov2WithRegisters", {}),
         ("ViT", {"intermediate_size": 512})]  # fmt: skip


@pytest.mark.parametrize("kind, options", KINDS)
@torch.no_grad()
def test_a_model_of_transformers_opens_here_as_folder_and_as_file(tmp_path, kind, options):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14,
        **options,
    )  # fmt: skip
    theirs = getattr(transformers, f"{kind}Model")(config).eval()
    for parameter in theirs.parameters():
        parameter.copy_(lively(parameter.shape) / 4)  # eps of ViTModel is felt
    theirs.save_pretrained(tmp_path)
    image = torch.randn(2, 3, 56, 56)
    for path in tmp_path, tmp_path / "model.safetensors":
        close(tokens_of(load_backbone(path), image), theirs(image).last_hidden_state, 1e-5)


def test_another_activation_is_refused(tmp_path):
    export.export(network(), config(), tmp_path / "folder")
    path = tmp_path / "folder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": "relu"}))
    with pytest.raises(UserError, match="hidden_act is relu there"):
        load_backbone(tmp_path / "folder")


MALFORMED = [
    ("config.json", "{"),
    ("config.json", "[1]"),
    ("config.json", '{"num_attention_heads": "two"}'),
    ("config.json", '{"layer_norm_eps": null}'),
    ("preprocessor_config.json", '{"image_mean": 0.5, "image_std": 0.5}'),
    ("preprocessor_config.json", '{"image_mean": [0.5, 0.5, 0.5]}'),
    ("preprocessor_config.json", "\0\udcff"),
]


@pytest.mark.parametrize("name, text", MALFORMED)
def test_a_json_file_of_a_folder_that_cannot_be_understood_is_named(tmp_path, name, text):
    export.export(network(), config(), tmp_path / "folder")
    path = tmp_path / "folder" / name
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UserError, match=r"config.json and .* cannot be understood") as error:
        load_backbone(tmp_path / "folder")
    assert "\n" not in str(error.value)


# ---- timm ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_names_of_timm_come_back_to_the_same_numbers(tmp_path, case):
    net = network(*case, image=518)
    if not case[0]:
        net.mask_token.data.zero_()
    export.export(net, config(), tmp_path / "x.safetensors", form="timm")
    again = load_backbone(tmp_path / "x.safetensors")
    image = torch.randn(2, 3, 56, 84)
    close(tokens_of(again, image), tokens_of(net, image), 1e-6)
    if not case[0]:  # else [CLS] holds its position
        assert_equal(again, net)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_timm_opens_what_is_written_for_it(tmp_path, case):
    timm = pytest.importorskip("timm")
    registers, ffn, layerscale = case
    net = network(*case)
    if not layerscale:
        kind, options = "vit_small_patch16_224.dino", {"patch_size": 14}
    else:
        size = "giant" if ffn == "swiglu" else "small"
        kind, options = f"vit_{size}_patch14_{'reg4_' * bool(registers)}dinov2", {}
    if ffn == "swiglu":
        options["mlp_ratio"] = 688 / 128  # both matrices of SwiGLU together
    theirs = timm.create_model(
        kind, img_size=70, depth=2, embed_dim=128, num_heads=2, num_classes=0, **options
    ).eval()
    export.export(net, config(), tmp_path / "x.pth", form="timm")
    theirs.load_state_dict(torch.load(tmp_path / "x.pth", weights_only=True))
    image = torch.randn(2, 3, 70, 70)
    close(tokens_of(net, image), theirs.forward_features(image), 1e-5)
