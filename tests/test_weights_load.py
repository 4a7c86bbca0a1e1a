"""load_backbone: the file says what network it is, and the network says what the official one does.

Proved against outputs of the official code (tests/golden), against transformers and timm, which
share no code with this repository, and by files that are wrong in one place. Files in the released
layout are made here; nothing is fetched.

Run: pytest tests/test_weights_load.py        (seconds; full depth, a minute and 4 GB: -m slow)
"""

import hashlib
import json
import math
import pickle
import sys
import zipfile

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from test_vit import FILES, INPUTS, TOKENS, close, from_transformers, golden_vit

from config import Config, UserError, to_dict
from vit import SIZES, VisionTransformer
from weights import load as weights
from weights.load import RELEASED, architecture, load_backbone

WIDTHS = {
    name: size for name, size in SIZES.items() if name in ("small", "base", "large", "giant2")
}


def released(dim=384, depth=2, ffn="mlp", registers=0, side=37, patch=14):
    """Random tensors with names and shapes of a released file, written out by hand."""
    hidden = {"mlp": 4 * dim, "swiglu": (4 * dim * 2 // 3 + 7) // 8 * 8}[ffn]
    first, second = {
        "mlp": (("fc1", hidden), ("fc2", hidden)),
        "swiglu": (("w12", 2 * hidden), ("w3", hidden)),
    }[ffn]
    shapes = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, side * side + 1, dim),
        "mask_token": (1, dim),
        "patch_embed.proj.weight": (dim, 3, patch, patch),
        "patch_embed.proj.bias": (dim,),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
    }
    if registers:
        shapes["register_tokens"] = (1, registers, dim)
    for i in range(depth):
        for name, shape in {
            "norm1": (dim,),
            "norm2": (dim,),
            "attn.qkv": (3 * dim, dim),
            "attn.proj": (dim, dim),
            f"mlp.{first[0]}": (first[1], dim),
            f"mlp.{second[0]}": (dim, second[1]),
        }.items():
            shapes[f"blocks.{i}.{name}.weight"] = shape
            shapes[f"blocks.{i}.{name}.bias"] = shape[:1]
        shapes |= {f"blocks.{i}.ls1.gamma": (dim,), f"blocks.{i}.ls2.gamma": (dim,)}
    return {name: lively(shape) for name, shape in shapes.items()}


def lively(shape):
    """Values that let every part be felt: matrices keep the size of what goes through them."""
    matrix = len(shape) == 4 or (len(shape) == 2 and shape[0] > 1)
    return torch.randn(shape) * (math.prod(shape[1:]) ** -0.5 if matrix else 0.5)


def saved(state, path):
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


# ---- released files -----------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.parametrize("registers", [0, 4])
@torch.no_grad()
def test_a_518_pixel_file_is_used_at_every_size_as_documented(tmp_path, registers, ending):
    state = released(registers=registers)
    net, cfg = load_backbone(saved(state, tmp_path / f"vit{ending}"), with_config=True)
    assert (net.dim, net.depth, net.patch, net.registers) == (384, 2, 14, registers)
    assert not net.training and cfg.crops.global_size == 224
    grid = state["pos_embed"][:, 1:].unflatten(1, (37, 37)).permute(0, 3, 1, 2)
    for height, width in (224, 224), (518, 518), (98, 126):
        rows, columns = height // 14, width // 14
        if registers:  # exact size, antialiased
            options = {"size": (rows, columns), "antialias": True}
        else:  # a tenth of a patch is added to the scale
            options = {"scale_factor": ((rows + 0.1) / 37, (columns + 0.1) / 37)}
        expected = F.interpolate(grid, mode="bicubic", **options).flatten(2).transpose(1, 2)
        if height == 518:
            expected = state["pos_embed"][:, 1:]  # as it is stored
        image = torch.zeros(1, 3, height, width)
        tokens = net.prepare_tokens(image)[:, 1 + registers :]
        # A black image has the bias of the convolution as the content of every patch.
        close(tokens - state["patch_embed.proj.bias"], expected, 1e-5)
        assert net(image).isfinite().all()


@pytest.mark.parametrize("name", FILES)
@torch.no_grad()
def test_a_golden_network_that_went_through_a_file_gives_the_golden_numbers(tmp_path, name):
    vit, z = golden_vit(name)
    about = {"heads": vit.blocks[0].attn.heads}  # 16 and 24 channels do not tell them
    path = tmp_path / "golden.safetensors"
    save_file(vit.state_dict(), path, {"nanodinov2": json.dumps(about)})
    net = load_backbone(path)
    for x in INPUTS:
        features = net(z[f"{x}/input"], is_training=True)
        for key in TOKENS:
            if f"{x}/{key}" in z:
                close(features[key], z[f"{x}/{key}"])
    layers = net.get_intermediate_layers(z["nonsquare/input"], 2, True, True)
    for j, (patch, cls) in enumerate(layers):
        close(patch, z[f"nonsquare/intermediate_last2/{j}/patch"])
        close(cls, z[f"nonsquare/intermediate_last2/{j}/cls"])


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("size", SIZES)
def test_the_shapes_of_a_file_say_which_of_all_sizes_it_is(size, registers):
    dim, depth, heads, ffn = SIZES[size]
    with torch.device("meta"):
        state = VisionTransformer(size, 14, 518, registers=registers).state_dict()
    read = architecture(state, "x.pth", {})
    assert read["size"] == (dim, depth, heads, ffn)
    assert (read["patch"], read["image_size"], read["registers"]) == (14, 518, registers)
    offset_and_antialias = read["interpolate_offset"], read["interpolate_antialias"]
    assert offset_and_antialias == ((0.0, True) if registers else (0.1, False))


def test_weights_in_half_precision_become_fp32(tmp_path):
    state = {name: value.half() for name, value in released().items()}
    net = load_backbone(saved(state, tmp_path / "half.pth"))
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert torch.equal(net.norm.weight, state["norm.weight"].float())


@torch.no_grad()
def test_a_checkpoint_of_the_official_training_loads(tmp_path):
    state = released(depth=4)
    chunked = {}
    for name, value in state.items():
        if name.startswith("blocks."):
            i = int(name.split(".")[1])
            name = f"blocks.{i // 2}.{name.removeprefix('blocks.')}"
        chunked[f"backbone.{name}"] = value
    chunked["dino_head.last_layer.weight_g"] = torch.ones(8, 1)
    net = load_backbone(saved({"teacher": chunked}, tmp_path / "teacher_checkpoint.pth"))
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_a_run_of_a_gpu_opens_anywhere(tmp_path):
    cfg = Config(attention="xformers")
    cfg.vit.size, cfg.vit.patch, cfg.crops.global_size = "nano", 8, 16
    net = VisionTransformer("nano", 8, 16)
    teacher = {"backbone": net.state_dict(), "config": to_dict(cfg), "step": 1}
    torch.save(teacher, tmp_path / "teacher.pt")
    net, cfg = load_backbone(tmp_path, with_config=True)
    assert cfg.attention == "auto" and net(torch.zeros(1, 3, 16, 16)).isfinite().all()


def test_a_file_that_does_not_say_how_its_images_were_normalised_says_what_is_assumed(
    tmp_path, capsys
):
    for channels, mean in (3, 0.485), (5, 0.5):
        net = VisionTransformer((384, 1, 6, "mlp"), 14, 28, channels=channels)
        path = saved(net.state_dict(), tmp_path / "x.pth")
        _, cfg = load_backbone(path, with_config=True)
        assert len(cfg.data.mean) == len(cfg.data.std) == channels and cfg.data.mean[0] == mean
        warned = capsys.readouterr().err
        assert warned.count("\n") == 1 and f"assumed are data.mean=[{mean:g}, " in warned
    load_backbone(saved(released(side=2), tmp_path / "dinov2_vits14_pretrain.pth"), True)
    assert capsys.readouterr().err == ""  # ImageNet's for sure


# ---- files that are wrong -----------------------------------------------------------------------


def without(state):
    del state["norm.bias"]


def without_a_block(state):
    for name in [name for name in state if name.startswith("blocks.0.")]:
        del state[name]


def of_another_network(state):
    state["head.weight"] = torch.zeros(3)


def narrow(state):
    state["blocks.1.mlp.fc1.bias"] = torch.zeros(3)


def oblong(state):
    state["pos_embed"] = torch.zeros(1, 13, 384)


def one_that_is_no_tensor(state):
    state["epoch"] = 7


BAD = [
    (without, "norm.bias is missing"),
    (without_a_block, "blocks.0.norm1.weight is missing"),
    (of_another_network, "head.weight is in none of the known layouts"),
    (narrow, r"blocks.1.mlp.fc1.bias is \(3,\), here it is \(1536,\)"),
    (oblong, r"pos_embed is \(1, 13, 384\), here it is \(1, 10, 384\)"),
    (one_that_is_no_tensor, "not weights of a backbone by name"),
    (dict.clear, "not weights of a backbone by name"),
]


@pytest.mark.parametrize("damage, expected", BAD)
def test_what_does_not_fit_is_refused_by_name_in_one_line(tmp_path, damage, expected):
    state = released(side=2)
    damage(state)
    with pytest.raises(UserError, match=expected) as error:
        load_backbone(saved(state, tmp_path / "x.pth"))
    assert "\n" not in str(error.value) and "x.pth" in str(error.value)


def test_a_width_that_does_not_tell_the_heads_is_refused(tmp_path):
    state = released(dim=24, side=2)
    with pytest.raises(UserError, match=r"x.pth: 24 channels do not tell the number of heads"):
        load_backbone(saved(state, tmp_path / "x.pth"))


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_a_missing_or_damaged_file_is_one_line(tmp_path, ending):
    path = tmp_path / f"x{ending}"
    with pytest.raises(UserError, match=f"x{ending}: "):
        load_backbone(path)
    whole = saved(released(side=2), path).read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"<html>not found</html>"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"x{ending}: cannot be read") as error:
            load_backbone(path)
        assert "\n" not in str(error.value)


class Code:
    def __reduce__(self):
        return sys.exit, ("code of the file has run",)


def test_what_torch_does_not_load_is_said_in_our_words(tmp_path):
    torch.save({"norm.bias": torch.zeros(3), "x": hashlib.sha256}, tmp_path / "x.pth")
    (tmp_path / "y.pth").write_text("version https://git-lfs.github.com/spec/v1")
    with zipfile.ZipFile(tmp_path / "z.pth", "w") as archive:  # as is a .pt2
        archive.writestr("archive/version", "3")
    for name in "x", "y", "z":
        with pytest.raises(UserError, match=r"not of torch.save, or more") as error:
            load_backbone(tmp_path / f"{name}.pth")
        assert str(error.value).isprintable() and len(str(error.value)) < 200


def test_a_folder_without_weights_says_what_it_needs(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"no teacher.pt, model.safetensors, .* in this folder"):
        load_backbone(tmp_path)
    saved({}, tmp_path / "teacher.pt")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert weights.teacher_file("~") == tmp_path / "teacher.pt"


def test_code_in_a_file_never_runs(tmp_path):
    torch.save({"norm.bias": torch.zeros(3), "x": Code()}, tmp_path / "x.pth")
    (tmp_path / "y.pth").write_bytes(pickle.dumps(Code()))
    for name in "x.pth", "y.pth":
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            load_backbone(tmp_path / name)


# ---- released names -----------------------------------------------------------------------------


@pytest.fixture
def address(tmp_path, monkeypatch):
    """A public address that is a folder here, and an empty cache."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(tmp_path / "hub")
    monkeypatch.setattr(weights, "ADDRESS", (tmp_path / "public").as_uri())
    yield tmp_path / "public"
    torch.hub.set_dir(before)


def publish(address, monkeypatch, name="dinov2_vits14_reg", folder="dinov2_vits14"):
    (address / folder).mkdir(parents=True)
    path = address / folder / f"{folder}_reg4_pretrain.pth"
    saved(released(registers=4), path)
    known = {name: hashlib.sha256(path.read_bytes()).hexdigest()}
    monkeypatch.setattr(weights, "RELEASED", RELEASED | known)
    return path


def test_a_released_name_is_fetched_once_and_checked(address, monkeypatch, capfd):
    path = publish(address, monkeypatch)
    first = load_backbone("dinov2_vits14_reg").state_dict()
    assert capfd.readouterr().err == ""  # the bar is for terminals
    path.unlink()  # from now on it is in the cache
    again = load_backbone("dinov2_vits14_reg").state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_fetched_file_with_another_checksum_is_refused_and_not_kept(address, monkeypatch):
    path = publish(address, monkeypatch)
    path.write_bytes(path.read_bytes() + b"x")
    for _ in range(2):
        with pytest.raises(UserError, match=r"cannot be fetched .*invalid hash value"):
            load_backbone("dinov2_vits14_reg")


def test_without_internet_one_line_says_how_to_give_the_file(address):
    with pytest.raises(UserError, match=r"dinov2_vitg14: .*cannot be fetched") as error:
        load_backbone("dinov2_vitg14")
    assert "\n" not in str(error.value) and "give its path" in str(error.value)


def test_checksums_are_there_for_all_sizes_and_all_different():
    sizes = {f"dinov2_vit{letter}14{end}" for letter in "sblg" for end in ("", "_reg")}
    assert RELEASED.keys() == sizes and len(set(RELEASED.values())) == 8
    assert all(len(value) == 64 and int(value, 16) for value in RELEASED.values())


# ---- implementations that share no code ---------------------------------------------------------


def tokens_of(net, image):
    features = net.forward_features(image)
    cls = features["x_norm_clstoken"].unsqueeze(1)
    return torch.cat((cls, features["x_norm_regtokens"], features["x_norm_patchtokens"]), dim=1)


@torch.no_grad()
def compare_with_transformers(folder, size, depth, registers):
    transformers = pytest.importorskip("transformers")
    dim, _, heads, ffn = SIZES[size]
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    more = {"num_register_tokens": registers} if registers else {}
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=dim, num_hidden_layers=depth, num_attention_heads=heads, image_size=56,
        patch_size=14, use_swiglu_ffn=ffn == "swiglu", **more,
    )  # fmt: skip
    theirs = getattr(transformers, f"{kind}Model")(config).eval()
    for parameter in theirs.parameters():
        parameter.copy_(lively(parameter.shape))
    state = {"embeddings.register_tokens": None} | theirs.state_dict()
    state = from_transformers(state, depth, ffn == "swiglu")
    state = {name: value for name, value in state.items() if value is not None}
    ours = load_backbone(saved(state, folder / "vit.pth"))
    # Without registers transformers resizes positions without the offset of the official code.
    for height, width in [(56, 56)] + [(28, 84)] * bool(registers):
        image = torch.randn(2, 3, height, width)
        close(tokens_of(ours, image), theirs(image).last_hidden_state, 1e-4)


@torch.no_grad()
def compare_with_timm(folder, size, depth, registers):
    timm = pytest.importorskip("timm")
    dim, _, _, ffn = SIZES[size]
    kind = f"vit_{size.removesuffix('2')}_patch14_{'reg4_' * bool(registers)}dinov2"
    theirs = timm.create_model(kind, img_size=56, depth=depth, num_classes=0).eval()
    state = released(dim, depth, ffn, registers, side=4)
    ours = load_backbone(saved(state, folder / "vit.pth"))
    converted = timm.models.vision_transformer.checkpoint_filter_fn(dict(state), theirs)
    theirs.load_state_dict(converted)
    image = torch.randn(2, 3, 56, 56)
    close(tokens_of(ours, image), theirs.forward_features(image), 1e-4)


COMPARE = {"transformers": compare_with_transformers, "timm": compare_with_timm}


@pytest.mark.parametrize("other", COMPARE)
@pytest.mark.parametrize("size, registers", [("small", 0), ("small", 4), ("giant2", 4)])
def test_another_implementation_gives_the_same_with_one_block(tmp_path, size, registers, other):
    COMPARE[other](tmp_path, size, 1, registers)


@pytest.mark.slow
@pytest.mark.parametrize("other", COMPARE)
@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("size, depth", [("small", 12), ("base", 12), ("large", 24), ("giant2", 4)])
def test_another_implementation_gives_the_same(tmp_path, size, depth, registers, other):
    COMPARE[other](tmp_path, size, depth, registers)
