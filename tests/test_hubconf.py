"""hubconf.py: code written for torch.hub and the official repository runs on this one.

Run: pytest tests/test_hubconf.py        (seconds)
"""

import inspect

import pytest
import torch
from running import ROOT
from test_vit import TOKENS, close
from test_weights_load import released, saved

import hubconf
from config import UserError
from vit import VisionTransformer
from weights.load import RELEASED
from weights.plain import plain


def hub(name, **options):
    return torch.hub.load(str(ROOT), name, source="local", **options)


@torch.no_grad()
def test_an_entry_point_is_used_as_the_official_one_is(tmp_path):
    path = saved(released(depth=12, registers=4), tmp_path / "dinov2_vits14_reg4_pretrain.pth")
    model = hub("dinov2_vits14_reg", weights=str(path))
    image = torch.randn(2, 3, 28, 42)
    features = model.forward_features(image)
    assert features.keys() == {*TOKENS, "masks"}
    assert features["x_norm_regtokens"].shape == (2, 4, 384)
    close(model(image), features["x_norm_clstoken"], 0)
    close(model(image, is_training=True)["x_prenorm"], features["x_prenorm"], 0)
    layers = model.get_intermediate_layers(
        image, n=[3, 11], reshape=True, return_class_token=True, norm=True
    )
    assert [(patch.shape, cls.shape) for patch, cls in layers] == [((2, 384, 2, 3), (2, 384))] * 2
    close(layers[1][0].flatten(2).transpose(1, 2), features["x_norm_patchtokens"], 0)
    assert model.embed_dim == 384


def test_options_have_their_official_names():
    options = {"img_size": 24, "patch_size": 4, "num_register_tokens": 2, "in_chans": 5}
    model = hub("dinov2_vits14_reg", pretrained=False, **options, init_values=1.0)
    # test_vit.py has the golden numbers of the class that it equals.
    assert isinstance(model, VisionTransformer)
    assert model.pos_embed.shape == (1, 37, 384) and model.registers == 2
    assert model(torch.randn(1, 5, 8, 8)).shape == (1, 384)
    assert (model.blocks[0].ls1.gamma == 1).all()
    found = list(inspect.signature(model.get_intermediate_layers).parameters)
    assert found == ["x", "n", "reshape", "return_class_token", "norm"]
    for strange in "img_sise", "drop_path_rate":
        with pytest.raises(TypeError, match=strange):
            hub("dinov2_vits14_reg", pretrained=False, **{strange: 0.5})


OFFICIAL = {"patch_size": 14, "num_features": 384, "embed_dim": 384, "num_heads": 6, "n_blocks": 12,
            "num_register_tokens": 4, "num_tokens": 1, "chunked_blocks": False}  # fmt: skip


@torch.no_grad()
def test_code_for_the_official_module_finds_what_it_uses():
    options = {"block_chunks": 0, "ffn_layer": "mlp", "img_size": 526}
    model = hub("dinov2_vits14_reg", pretrained=False, **options)
    assert {key: getattr(model, key) for key in OFFICIAL} == OFFICIAL
    assert model.pos_embed.shape == (1, 37**2 + 1, 384) and model.patch_embed.num_patches == 37**2
    image, masks, hooked = torch.randn(2, 3, 28, 42), torch.rand(2, 6) > 0.5, []
    model.blocks[-1].attn.qkv.register_forward_hook(lambda *args: hooked.append(args[2].shape))
    x = model.prepare_tokens_with_masks(image, masks)
    for block in model.blocks:
        x = block(x)
    features = model.forward_features(image, masks)
    close(model.norm(x)[:, 0], features["x_norm_clstoken"], 0)
    assert hooked[0] == (2, 1 + 4 + 6, 3 * 384)
    close(features["x_norm_clstoken"], model.head(model(image, masks)), 0)
    with pytest.raises(UserError, match="block_chunks=4 is not built here, but 0"):
        hub("dinov2_vits14", pretrained=False, block_chunks=4)


@pytest.mark.parametrize("registers", [0, 4])
@torch.no_grad()
def test_tools_of_pytorch_work_on_a_network_of_the_hub(registers):
    net = VisionTransformer("nano", 14, 70, registers=registers, layerscale=1,
                            interpolate_antialias=bool(registers)).eval()  # fmt: skip
    model, images = plain(net), [torch.randn(2, 3, *size) for size in ((70, 70), (28, 84))]
    traced = torch.jit.trace(model, torch.randn(1, 3, 56, 42), check_trace=False)
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
    assert sum("quantized" in type(m).__module__ for m in quantized.modules()) >= 4 * net.depth
    for image in images:
        close(model(image), net(image), 1e-5)
        close(traced(image), net(image), 1e-5)
        assert 0 < (quantized(image) - net(image)).abs().max() < 0.5


@pytest.mark.parametrize("offset, antialias", [(0.1, False), (0.0, False), (0.0, True)])
@torch.no_grad()
def test_positions_by_arithmetic_are_those_of_the_network(offset, antialias):
    net = VisionTransformer("nano", 14, 70, interpolate_offset=offset,
                            interpolate_antialias=antialias)  # fmt: skip
    for grid in (5, 5), (1, 2), (3, 9), (5, 7), (37, 2):
        found, expected = (n.interpolate_pos_encoding(*grid) for n in (plain(net), net))
        close(found, expected, 1e-6)  # values of 0.02


def test_there_is_an_entry_point_for_each_released_name_and_nothing_else():
    found = {n for n, v in vars(hubconf).items() if callable(v) and not n.startswith("_")}
    assert found == set(RELEASED)
    assert "ViT-giant2/14 with 4 registers" in hubconf.dinov2_vitg14_reg.__doc__  # torch.hub.help


@pytest.mark.parametrize("name", RELEASED)
def test_each_builds_the_released_network(name):
    with torch.device("meta"):
        model = getattr(hubconf, name)(pretrained=False)
    dim, depth = {"s": (384, 12), "b": (768, 12), "l": (1024, 24), "g": (1536, 40)}[name[10]]
    assert (model.dim, model.depth, model.patch) == (dim, depth, 14)
    assert model.registers == (4 if name.endswith("reg") else 0)
    assert model.interpolate_antialias == name.endswith("reg")
    assert model.pos_embed.shape == (1, 1370, dim)
    assert hasattr(model.blocks[0].mlp, "w12") == (name[10] == "g")


def test_a_file_of_another_network_is_refused_by_name(tmp_path):
    path = saved(released(), tmp_path / "two_blocks.pth")
    with pytest.raises(UserError, match=r"two_blocks.pth: blocks.2.norm1.weight is missing"):
        hub("dinov2_vits14", weights=path)
    with pytest.raises(UserError, match=r"is not of dinov2_vits14_reg"):
        hub("dinov2_vits14_reg", weights=path)
