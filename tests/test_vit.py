"""The backbone is the official one: same numbers, same parameter names, same sizes.

Proved against outputs of the official code (tests/golden), against transformers' independent
implementation, against the published parameter counts, and by properties of packing several crop
sizes in one pass and of stochastic depth.

Run:  pytest tests/test_vit.py
"""

import itertools
import json
import math
import pathlib
from functools import partial

import numpy as np
import pytest
import torch
import torch._dynamo

from attention import SplitCrops, attend, check_backend, pack, plain_attention, split_crops
from config import UserError, from_dict, to_dict
from vit import SIZES, Linear, VisionTransformer, add_branch, build_backbone, packed_rows
from weights.load import load_backbone

GOLDEN = pathlib.Path(__file__).parent / "golden"
FILES = ["mlp_r0_off01", "mlp_r4_aa", "swiglu_r0_off01", "swiglu_r4_aa"]
INPUTS = ["native", "small", "large", "nonsquare"]
TOKENS = ["x_norm_clstoken", "x_norm_regtokens", "x_norm_patchtokens", "x_prenorm"]
FP32 = 2e-5  # tests/golden/README.md; the official code itself is 2.2e-6 from its float64 run


def load(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as z:
        arrays = {k: torch.from_numpy(z[k]) for k in z.files if k != "config_json"}
        return arrays, json.loads(str(z["config_json"])) if "config_json" in z.files else None


def golden_vit(name, attention="auto"):
    """The stored model in eval mode, and all stored arrays."""
    z, c = load(f"vit_{name}")
    ffn = {"mlp": "mlp", "swiglufused": "swiglu"}[c["ffn_layer"]]
    vit = VisionTransformer(
        (c["embed_dim"], c["depth"], c["num_heads"], ffn),
        patch=c["patch_size"],
        image_size=c["img_size"],
        registers=c["num_register_tokens"],
        interpolate_offset=c["interpolate_offset"],
        interpolate_antialias=c["interpolate_antialias"],
        attention=attention,
    )
    state = {k.removeprefix("state/"): v for k, v in z.items() if k.startswith("state/")}
    vit.load_state_dict(state, strict=True)
    return vit.eval(), z


def awake(vit):
    """Random values of ordinary size everywhere: at the start tokens and gammas are almost 0."""
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return vit


def close(got, expected, tolerance=FP32):
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)


# ---- the official numbers -----------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["plain", "sdpa", "auto"])
@pytest.mark.parametrize("x", INPUTS)
@pytest.mark.parametrize("name", FILES)
@torch.no_grad()
def test_outputs_are_those_of_the_official_backbone(name, x, attention):
    vit, z = golden_vit(name, attention)
    features = vit(z[f"{x}/input"], is_training=True)
    for key in TOKENS:
        if f"{x}/{key}" in z:  # x_prenorm is not stored for the large input
            close(features[key], z[f"{x}/{key}"])
    close(vit(z[f"{x}/input"]), z[f"{x}/forward"])


@pytest.mark.parametrize("x", ["native", "nonsquare"])
@pytest.mark.parametrize("name", FILES)
@torch.no_grad()
def test_masked_outputs_are_those_of_the_official_backbone(name, x):
    vit, z = golden_vit(name)
    masks = z[f"{x}/masks"]
    features = vit(z[f"{x}/input"], masks, is_training=True)
    for key in TOKENS:
        close(features[key], z[f"{x}/masked_{key}"])
    close(vit(z[f"{x}/input"], masks), z[f"{x}/masked_forward"])
    assert features["masks"] is masks


@pytest.mark.parametrize("name", FILES)
@torch.no_grad()
def test_intermediate_layers_are_the_official_ones_in_block_order(name):
    vit, z = golden_vit(name)
    cases = [("native", "last2", 2), ("nonsquare", "last2", 2)]
    listed = z["native/intermediate_list/n"].tolist()
    cases += [("native", "list", listed), ("native", "list", listed[::-1])]
    for x, kind, n in cases:
        layers = vit.get_intermediate_layers(
            z[f"{x}/input"], n=n, reshape=True, return_class_token=True
        )
        assert len(layers) == len(listed) == 2
        for j, (patch, cls) in enumerate(layers):
            stored = z[f"{x}/intermediate_{kind}/{j}/patch"]  # for `native` only of image 0
            close(patch[: len(stored)], stored)
            close(cls[: len(stored)], z[f"{x}/intermediate_{kind}/{j}/cls"])


@pytest.mark.parametrize("x", ["native", "nonsquare"])
@pytest.mark.parametrize("name", FILES)
@torch.no_grad()
def test_intermediate_layers_come_flat_and_without_the_norm_on_request(name, x):
    vit, z = golden_vit(name)
    (patch,) = vit.get_intermediate_layers(z[f"{x}/input"], n=1, norm=False)
    close(patch[:1], z[f"{x}/intermediate_last1_nonorm_flat/0/patch"])


@pytest.mark.parametrize("grid", ["6x6", "7x7", "12x20", "16x16", "37x37"])
@pytest.mark.parametrize("offset, antialias", [(0.1, False), (0.0, True)])
@torch.no_grad()
def test_positions_are_interpolated_as_in_the_official_code(offset, antialias, grid):
    z, _ = load("pos_embed")
    vit = VisionTransformer(
        (6, 1, 1, "mlp"), int(z["patch_size"]), 32,
        interpolate_offset=offset, interpolate_antialias=antialias,
    )  # fmt: skip
    vit.pos_embed.copy_(z["pos_embed"])
    expected = z[f"offset{offset}_{'aa' if antialias else 'noaa'}/{grid}"]
    # README: 1e-5. The same torch operator, so in fact equal; the rest allows for another version.
    close(vit.interpolate_pos_encoding(*map(int, grid.split("x"))), expected, 1e-5)


# ---- several crop sizes in one pass -------------------------------------------------------------


@pytest.mark.parametrize("attention", ["plain", "sdpa", "auto"])
@pytest.mark.parametrize("name", FILES)
@torch.no_grad()
def test_crops_of_several_sizes_in_one_pass_give_the_golden_numbers(name, attention):
    vit, z = golden_vit(name, attention)
    masks = [z["native/masks"], None, None, z["nonsquare/masks"]]
    together = vit([z[f"{x}/input"] for x in INPUTS], masks, is_training=True)
    for x, mask, features in zip(INPUTS, masks, together, strict=True):
        kind = "" if mask is None else "masked_"
        for key in TOKENS:
            if f"{x}/{kind}{key}" in z:
                close(features[key], z[f"{x}/{kind}{key}"])


def test_gradients_of_one_packed_pass_equal_those_of_separate_passes():
    vit = awake(VisionTransformer((16, 2, 2, "mlp"), 4, 16, registers=1))
    crops = [torch.randn(2, 3, 16, 16), torch.randn(3, 3, 8, 8)]
    target = torch.randn(5, 16)
    together = torch.cat([f["x_norm_clstoken"] for f in vit(crops, is_training=True)])
    (together * target).sum().backward()
    packed = [p.grad.clone() for p in vit.parameters() if p.grad is not None]
    vit.zero_grad()
    (torch.cat([vit(c) for c in crops]) * target).sum().backward()
    separate = [p.grad for p in vit.parameters() if p.grad is not None]
    for a, b in zip(packed, separate, strict=True):  # the sums are only added in another order
        close(a, b, 1e-5 * (1 + b.abs().max().item()))


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
@pytest.mark.parametrize("depth, registers", [(2, 3), (1, 0)])
def test_wanted_tokens_alone_are_those_of_the_whole_pass_with_their_gradients(
    drop_path, depth, registers
):
    size = (16, depth, 2, "swiglu")
    vit = VisionTransformer(size, 4, 16, 3, registers, drop_path=drop_path, init_std=0).train()
    crops = [torch.randn(B, 3, side, side) for B, side in ((4, 16), (5, 8), (3, 12))]
    masks, patches = [torch.rand(4, 16) < 0.3, None, None], torch.randperm(64)[:19]
    kept = vit.draw_kept([(len(c), None) for c in crops])
    all_tokens = vit(crops, masks, True, kept=kept)
    cls = torch.cat([f["x_norm_clstoken"] for f in all_tokens])
    whole = cls, all_tokens[0]["x_norm_patchtokens"].flatten(0, 1)[patches]
    alone = vit(crops, masks, True, kept=kept, patches=patches)
    target = torch.randn(12 + 19, 16)
    for got, expected in zip(alone, whole, strict=True):
        close(got, expected, 1e-5)
    losses = [(torch.cat(tokens) * target).sum() for tokens in (alone, whole)]
    grads = [torch.autograd.grad(loss, list(vit.parameters())) for loss in losses]
    for got, expected in zip(*grads, strict=True):
        assert expected.any()
        close(got, expected, 1e-5 * (1 + expected.abs().max().item()))


def test_only_wanted_tokens_pass_the_last_feed_forward_layer():
    vit, rows = VisionTransformer((16, 3, 2, "mlp"), 4, 16, registers=2), []
    for module in (*(block.mlp for block in vit.blocks), vit.norm):
        module.register_forward_hook(lambda module, given, out: rows.append(len(out)))
    crops, patches = [torch.randn(2, 3, 16, 16), torch.randn(5, 3, 8, 8)], torch.tensor([31, 4, 5])
    assert [len(x) for x in vit(crops, is_training=True, patches=patches)] == [7, 3]
    assert [len(x) for x in vit(crops, is_training=True, patches=patches[:0])] == [7, 0]
    tokens = 2 * 19 + 5 * 7
    assert rows == [tokens, tokens, 10, 10, tokens, tokens, 7, 7]


@pytest.mark.parametrize("backend", ["plain", "sdpa", "auto", "varlen", "xformers"])
@pytest.mark.parametrize(
    "device, dtype", [("cpu", torch.float32), ("cpu", torch.bfloat16), ("cuda", torch.bfloat16)]
)
def test_every_attention_path_of_this_machine_gives_the_plain_result(device, dtype, backend):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    try:
        check_backend(backend, torch.device(device), dtype)
    except UserError as error:
        pytest.skip(str(error))
    groups = ((3, 5), (2, 90), (1, 1))  # short and long crops, and one alone
    qkv = torch.randn(196, 3, 2, 32, device=device, dtype=dtype)  # xFormers refuses heads of 16
    expected = attend(qkv.float(), pack(groups, "plain", qkv.device))
    got = attend(qkv, pack(groups, backend, qkv.device, dtype)).float()
    # fp32: the order of sums. bf16: values up to 3 carry 8 bits, so half a step is 0.008.
    close(got, expected, 2e-6 if dtype == torch.float32 else 2e-2)


def test_plain_attention_is_the_textbook_formula():
    q, k, v = torch.randn(3, 1, 1, 4, 8, dtype=torch.float64)
    expected = torch.zeros(4, 8, dtype=torch.float64)
    for i in range(4):
        weights = [math.exp(sum(q[0, 0, i] * k[0, 0, j]) / math.sqrt(8)) for j in range(4)]
        for j in range(4):
            expected[i] += weights[j] / sum(weights) * v[0, 0, j]
    close(plain_attention(q, k, v)[0, 0], expected, 1e-14)


def test_gradients_of_q_k_and_v_in_one_copy_are_those_of_pytorch():
    groups, total = ((3, 5), (2, 4)), 23
    qkv = torch.randn(total, 3, 2, 8, requires_grad=True)
    weights = [torch.randn_like(x) for x in split_crops(qkv, groups)]
    grads = []
    for split in (split_crops, SplitCrops.apply):
        out = sum((w * x).sum() for w, x in zip(weights, split(qkv, groups), strict=True))
        grads += torch.autograd.grad(out, qkv)
    assert torch.equal(*grads)


def test_an_attention_path_that_cannot_run_here_is_refused_with_a_way_out():
    cpu = torch.device("cpu")
    for name in ("varlen", "xformers"):
        with pytest.raises(UserError, match="attention=auto"):
            check_backend(name, cpu, torch.float32)


# ---- stochastic depth ---------------------------------------------------------------------------


def one_block(drop_path=0.5):
    """One block, four images of 4 patches; the tokens before it, and a call with chosen subsets."""
    vit = awake(VisionTransformer((8, 1, 2, "mlp"), 4, 8, drop_path=drop_path)).train()
    images = torch.randn(4, 3, 8, 8)

    def prenorm(attn=None, ffn=None, x=images):
        kept = None if attn is None else [[[torch.tensor(attn)], [torch.tensor(ffn)]]]
        return vit.forward_features(x, kept=kept)["x_prenorm"]

    return vit, images, prenorm


@torch.no_grad()
def test_dropped_images_pass_a_block_untouched():
    vit, images, prenorm = one_block()
    out = prenorm(attn=[2, 0], ffn=[0, 3])
    before = vit.prepare_tokens(images)
    assert torch.equal(out[1], before[1])
    for kept in (0, 2, 3):
        assert not torch.allclose(out[kept], before[kept], atol=1e-2)


@torch.no_grad()
def test_kept_images_get_their_residual_times_batch_over_kept():
    vit, images, prenorm = one_block()
    block, x = vit.blocks[0], vit.prepare_tokens(images)[3]
    out = prenorm(attn=[1, 3, 2], ffn=[3])[3]
    packing = pack(((1, len(x)),), "plain", x.device)
    x = x + 4 / 3 * block.ls1.gamma * block.attn(block.norm1(x), packing)
    x = x + 4 / 1 * block.ls2.gamma * block.mlp(block.norm2(x))
    close(out, x, 1e-5)  # same numbers; other batch sizes in the matrix products


def test_rows_of_branches_that_keep_different_numbers_are_those_of_each_alone():
    packing, cpu = pack(((4, 3), (5, 2)), "plain", torch.device("cpu")), torch.device("cpu")
    few = [torch.tensor([2, 0]), torch.tensor([4])]
    many, more = ([torch.randperm(4)[:3], torch.randperm(5)[:2]] for _ in range(2))
    made = packed_rows([[many, few], [more, many]], packing, cpu)
    for got, branch in zip(itertools.chain(*made), (many, few, more, many), strict=True):
        [[alone]] = packed_rows([[branch]], packing, cpu)
        assert got[0].groups == alone[0].groups
        assert all(map(torch.equal, got[1:], alone[1:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_block_has_the_gradients_of_the_plain_one(dtype):
    vit = VisionTransformer((32, 1, 2, "mlp"), 8, 32, drop_path=0.4, layerscale=0.5, init_std=0)
    crops = [torch.randn(5, 3, 32, 32, dtype=dtype), torch.randn(8, 3, 16, 16, dtype=dtype)]

    def gradients():
        vit.zero_grad()
        features = vit.forward_features(crops, rng=torch.Generator().manual_seed(0))
        sum(f["x_prenorm"].float().pow(3).sum() for f in features).backward()
        return [x.grad for x in (vit.patch_embed.proj.weight, vit.blocks[0].mlp.fc1.weight)]

    expected = gradients()
    vit.blocks[0].compile(backend="aot_eager")  # what compiling changes, without making kernels
    for got, plain in zip(gradients(), expected, strict=True):
        close(got / plain.norm(), plain / plain.norm(), 1e-6 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gathers_of_kept_rows_are_a_sum_into_these_rows(dtype):
    packing = pack(((4, 3), (5, 2)), "plain", torch.device("cpu"))
    kept = [torch.tensor([2, 0, 3]), torch.tensor([4, 1])]
    [[given]] = packed_rows([[kept]], packing, torch.device("cpu"))
    rows, scale = given[1], given[3].to(dtype)
    x, weight = torch.randn(22, 8, dtype=dtype), torch.randn(8, 8, dtype=dtype)
    grads, outs, target = [], [], torch.randn(22, 8, dtype=dtype)
    for fast in (True, False):
        x.requires_grad_(), weight.requires_grad_()
        if fast:
            out = add_branch(x, lambda x, _: (x @ weight).sin(), packing, given)
        else:
            out = x.index_add(0, rows, scale[rows] * (x[rows] @ weight).sin())
        outs.append(out)
        grads.append(torch.autograd.grad((out * target).sum(), (x, weight)))
    assert rows.tolist() == [6, 7, 8, 0, 1, 2, 9, 10, 11, 20, 21, 14, 15]
    for got, expected in zip((outs[0], *grads[0]), (outs[1], *grads[1]), strict=True):
        # scale is fp32: 4/3 and 5/2. In bf16 the sums have 8 bits, and values reach 30.
        close(got.double(), expected.double(), 1e-6 if dtype == torch.float64 else 0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layerscale_inside_the_matrix_is_layerscale_behind_it(dtype):
    layer, x = Linear(64, 48), torch.randn(10, 64).to(dtype)
    gamma = torch.full((48,), 1e-5, requires_grad=True)
    sides = layer(x, gamma), gamma.to(dtype) * layer(x)
    grads = [torch.autograd.grad(y.float().sum(), (layer.weight, gamma)) for y in sides]
    for got, expected in zip((sides[0], *grads[0]), (sides[1], *grads[1]), strict=True):
        assert expected.any()  # in fp16 gamma * weight alone would be 0
        error = (got - expected).float().norm() / expected.float().norm()
        assert error < (1e-6 if dtype == torch.float32 else 0.02)  # 8 bits: 0.4 % a rounding


def test_blocks_compile_without_breaks_and_once_for_student_and_teacher_each():
    torch._dynamo.reset(), torch._dynamo.utils.counters.clear()
    student = awake(VisionTransformer((32, 3, 2, "mlp"), 4, 16, drop_path=0.4)).train()
    teacher = awake(VisionTransformer((32, 3, 2, "mlp"), 4, 16)).eval()
    crops = [torch.randn(6, 3, 16, 16), torch.randn(9, 3, 8, 8)]
    plain = student(crops, is_training=True, rng=torch.Generator().manual_seed(2))
    for block in (*student.blocks, *teacher.blocks):
        block.compile(backend="eager")  # which traces, and runs what it has traced
    for seed in range(3):
        with torch.no_grad():
            teacher(crops[0])
        out = student(crops, is_training=True, rng=torch.Generator().manual_seed(seed))
        sum(o["x_norm_clstoken"].sum() for o in out).backward()
    assert torch.equal(out[1]["x_prenorm"], plain[1]["x_prenorm"])
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 2


@torch.no_grad()
def test_the_mean_over_all_subsets_is_the_pass_without_stochastic_depth():
    vit, images, prenorm = one_block()
    everything = prenorm([0, 1, 2, 3], [0, 1, 2, 3])
    vit.blocks[0].ls2.gamma.zero_()  # one branch: the second is not linear in the first
    subsets = list(itertools.combinations(range(4), 2))
    mean = sum(prenorm(list(s), list(s)) for s in subsets) / len(subsets)
    close(mean, vit.eval().forward_features(images)["x_prenorm"], 1e-5)
    vit.blocks[0].ls1.gamma.zero_()
    assert not torch.allclose(everything, mean, atol=1e-2)


@pytest.mark.parametrize("rate, B, k", [(0.3, 128, 89), (0.3, 512, 358), (0.9, 4, 1), (0.1, 9, 8)])
def test_each_branch_keeps_the_official_number_of_images(rate, B, k):
    vit = VisionTransformer((8, 2, 2, "mlp"), 4, 8, drop_path=rate)
    for block in vit.draw_kept(((B, 5), (1, 2))):
        for large, small in block:
            assert len(large.unique()) == len(large) == k
            assert set(large.tolist()) <= set(range(B))
            assert small.tolist() == [0]  # never fewer than one


def test_subsets_are_independent_and_repeat_with_the_generator():
    vit = VisionTransformer((8, 3, 2, "mlp"), 4, 8, drop_path=0.5)

    def draw(seed):
        kept = vit.draw_kept(((64, 5), (64, 2)), torch.Generator().manual_seed(seed))
        return [tuple(crops.tolist()) for block in kept for branch in block for crops in branch]

    assert draw(0) == draw(0) != draw(1)
    assert len(set(draw(0))) == 3 * 2 * 2  # each block, branch and crop size draws its own


def test_the_drop_rate_is_uniform_or_grows_with_depth():
    size = (8, 5, 2, "mlp")
    assert VisionTransformer(size, 4, 8, drop_path=0.3).drop_path == [0.3] * 5
    growing = VisionTransformer(size, 4, 8, drop_path=0.4, drop_path_uniform=False)
    assert growing.drop_path == pytest.approx(torch.linspace(0, 0.4, 5).tolist(), abs=1e-7)


@torch.no_grad()
def test_stochastic_depth_is_off_in_eval_mode():
    vit, images, _ = one_block(drop_path=0.9)
    with_rate = vit.eval()(images)
    vit.drop_path = [0.0]
    assert torch.equal(with_rate, vit.train()(images))


# ---- sizes, names, initial values ---------------------------------------------------------------


@pytest.mark.parametrize("size, ffn, patch, image_size, millions", [
    ("small", "", 14, 518, "22.057"), ("small", "", 16, 224, "21.675"),
    ("base", "", 14, 518, "86.580"), ("base", "", 16, 224, "85.818"),
    ("large", "", 14, 518, "304.369"), ("large", "", 16, 224, "303.352"),
    ("large", "swiglu", 14, 518, "304.795"), ("large", "swiglu", 14, 224, "303.655"),
    ("giant2", "", 14, 518, "1136.481"), ("giant2", "", 14, 224, "1134.771"),
])  # fmt: skip
def test_parameter_counts_are_the_published_ones(size, ffn, patch, image_size, millions):
    with torch.device("meta"):  # shapes without memory
        vit = VisionTransformer(size, patch, image_size, ffn=ffn)
    assert f"{sum(p.numel() for p in vit.parameters()) / 1e6:.3f}" == millions


@pytest.mark.parametrize("size, registers, layers", [
    ("small", 0, {"fc1", "fc2"}), ("large", 4, {"fc1", "fc2"}), ("giant2", 4, {"w12", "w3"}),
])  # fmt: skip
def test_parameter_names_are_those_of_the_released_files(size, registers, layers):
    with torch.device("meta"):
        vit = VisionTransformer(size, registers=registers)
    names = {"cls_token", "pos_embed", "mask_token"} | ({"register_tokens"} if registers else set())
    both = {"patch_embed.proj", "norm"}
    for i in range(SIZES[size][1]):
        both |= {f"blocks.{i}.{m}" for m in ("norm1", "attn.qkv", "attn.proj", "norm2")}
        both |= {f"blocks.{i}.mlp.{layer}" for layer in layers}
        names |= {f"blocks.{i}.ls1.gamma", f"blocks.{i}.ls2.gamma"}
    names |= {f"{module}.{kind}" for module in both for kind in ("weight", "bias")}
    assert set(vit.state_dict()) == names
    assert vit.pos_embed.shape == (1, 1370, SIZES[size][0])


def test_initial_values_are_the_official_distributions():
    vit = VisionTransformer((384, 1, 6, "mlp"), 16, 224, registers=4)
    p = dict(vit.named_parameters())
    for name in ("blocks.0.attn.qkv.weight", "blocks.0.mlp.fc2.weight", "pos_embed"):
        # standard error of a standard deviation: std / sqrt(2 n), n > 70,000
        assert p[name].std().item() == pytest.approx(0.02, rel=4 / math.sqrt(2 * p[name].numel()))
    for name in ("cls_token", "register_tokens"):
        assert 0.8e-6 < p[name].std() < 1.2e-6  # 384 and 1,536 values: within 5 standard errors
    for name in ("patch_embed.proj.weight", "patch_embed.proj.bias"):  # uniform +-1/sqrt(3*16*16)
        assert 0.035 < p[name].abs().max() <= 1 / math.sqrt(768)
    for name, value in p.items():
        if name == "mask_token" or (name.endswith("bias") and "patch" not in name):
            assert not value.any()
        if "gamma" in name:
            assert (value == 1e-5).all()


def test_a_narrow_network_can_scale_its_start_by_width():
    vit = VisionTransformer((128, 1, 4, "mlp"), 4, 16, init_std=0)
    assert vit.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(128**-0.5, rel=0.02)
    assert vit.blocks[0].mlp.fc2.weight.std().item() == pytest.approx(512**-0.5, rel=0.02)


# ---- what may be put in -------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 5, 13])
@torch.no_grad()
def test_images_may_have_any_number_of_channels(channels):
    vit = awake(VisionTransformer((16, 1, 2, "mlp"), 4, 8, channels=channels)).eval()
    x = torch.randn(2, channels, 8, 8)
    assert vit(x).shape == (2, 16)
    changed = x.clone()
    changed[:, -1, 3, 5] += 1  # every channel is read
    assert not torch.allclose(vit(x), vit(changed), atol=1e-3)


@torch.no_grad()
def test_patches_are_embedded_as_by_a_convolution():
    vit = awake(VisionTransformer((16, 1, 2, "mlp"), 4, 16))
    x = torch.randn(2, 3, 12, 20)
    expected = vit.patch_embed.proj(x).flatten(2).transpose(1, 2)
    close(vit.patch_embed(x), expected, 1e-5)  # 48 products of ordinary size in another order


@torch.no_grad()
def test_a_hidden_patch_has_no_influence_but_keeps_its_position():
    vit = awake(VisionTransformer((16, 1, 2, "mlp"), 4, 8)).eval()
    x, mask = torch.randn(1, 3, 8, 8), torch.tensor([[True, False, False, True]])
    other = x.clone()
    other[:, :, :4, :4] = 7.0  # patch 0, which is hidden
    assert torch.equal(vit(x, mask), vit(other, mask))
    tokens = vit.prepare_tokens(x, mask)[0, 1:]
    assert not torch.allclose(tokens[0], tokens[3], atol=1e-2)


def test_precision_follows_the_images():
    vit = awake(VisionTransformer((16, 2, 2, "swiglu"), 4, 8, registers=2)).eval()
    x = torch.randn(2, 3, 8, 8)
    half = vit(x.bfloat16(), is_training=True)
    assert all(half[key].dtype == torch.bfloat16 for key in TOKENS)
    assert all(p.dtype == torch.float32 for p in vit.parameters())
    # 8 bits of precision through two blocks; outputs are of the order 1
    close(half["x_norm_clstoken"].float(), vit(x), 0.1)


def test_sizes_that_do_not_divide_into_patches_are_user_errors():
    with pytest.raises(UserError, match="multiple of"):
        VisionTransformer((16, 1, 2, "mlp"), patch=4, image_size=18)
    with pytest.raises(UserError, match="does not divide"):
        VisionTransformer((16, 1, 2, "mlp"), patch=4, image_size=16)(torch.randn(1, 3, 16, 18))
    with pytest.raises(UserError, match="choose one of"):
        VisionTransformer("huge")


# ---- loading a trained backbone -----------------------------------------------------------------


def teacher_file(path):
    """A file as checkpoint.save writes it, of a small backbone; returns that backbone."""
    cfg = from_dict({"crops": {"global_size": 16}, "vit": {"size": "nano", "patch": 8}})
    vit = awake(build_backbone(cfg))
    torch.save({"backbone": vit.state_dict(), "config": to_dict(cfg), "step": 1}, path)
    return vit


@torch.no_grad()
def test_a_saved_backbone_loads_in_eval_mode_and_gives_the_same_features(tmp_path):
    vit = teacher_file(tmp_path / "teacher.pt").eval()
    x = torch.randn(2, 3, 16, 24)
    for path in (tmp_path, tmp_path / "teacher.pt", str(tmp_path)):
        loaded = load_backbone(path)
        assert not loaded.training
        assert torch.equal(loaded(x), vit(x))


def test_a_file_that_is_no_backbone_is_a_user_error_that_names_it(tmp_path):
    path = tmp_path / "teacher.pt"
    with pytest.raises(UserError, match=r"teacher\.pt"):
        load_backbone(path)  # not there
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"teacher\.pt"):
        load_backbone(path)
    teacher_file(path)
    state = torch.load(path, weights_only=True)
    del state["backbone"]["norm.bias"]
    torch.save(state, path)
    with pytest.raises(UserError, match=r"norm\.bias"):
        load_backbone(path)


# ---- an implementation that shares no code ------------------------------------------------------


def from_transformers(state, depth, swiglu):
    """Rename the weights of transformers' Dinov2WithRegistersModel to the released names."""
    out = {
        "cls_token": state["embeddings.cls_token"],
        "mask_token": state["embeddings.mask_token"],
        "pos_embed": state["embeddings.position_embeddings"],
        "register_tokens": state["embeddings.register_tokens"],
    }
    for kind in ("weight", "bias"):
        out[f"patch_embed.proj.{kind}"] = state[f"embeddings.patch_embeddings.projection.{kind}"]
        out[f"norm.{kind}"] = state[f"layernorm.{kind}"]
        for i in range(depth):
            ours, theirs = f"blocks.{i}", f"encoder.layer.{i}"
            get = partial(lambda path, name: state[path.format(name)], f"{theirs}.{{}}.{kind}")
            qkv = [get(f"attention.{p}_proj") for p in "qkv"]
            out[f"{ours}.attn.qkv.{kind}"] = torch.cat(qkv)
            out[f"{ours}.attn.proj.{kind}"] = get("attention.o_proj")
            for n in "12":
                out[f"{ours}.norm{n}.{kind}"] = get(f"norm{n}")
                out[f"{ours}.ls{n}.gamma"] = state[f"{theirs}.layer_scale{n}.lambda1"]
            if swiglu:
                gate_up = [get("mlp.gate_proj"), get("mlp.up_proj")]
                out[f"{ours}.mlp.w12.{kind}"] = torch.cat(gate_up)
                out[f"{ours}.mlp.w3.{kind}"] = get("mlp.down_proj")
            else:
                out[f"{ours}.mlp.fc1.{kind}"] = get("mlp.fc1")
                out[f"{ours}.mlp.fc2.{kind}"] = get("mlp.fc2")
    return out


@pytest.fixture(scope="module", params=["mlp", "swiglu"])
def twins(request):
    """Transformers' model with random weights, and ours with the same ones."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=3, image_size=56, patch_size=14,
        use_swiglu_ffn=request.param == "swiglu",
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = awake(transformers.Dinov2WithRegistersModel(config)).eval()
    ours = VisionTransformer(
        (48, 3, 3, request.param), 14, 56,
        registers=4, interpolate_offset=0.0, interpolate_antialias=True,
    )  # fmt: skip
    state = from_transformers(theirs.state_dict(), 3, request.param == "swiglu")
    ours.load_state_dict(state, strict=True)
    return theirs, ours.eval()


# Register models interpolate to the exact grid with antialias, in transformers as in the official
# code, so every grid agrees; transformers has no offset of 0.1 for models without registers.
@pytest.mark.parametrize("height, width", [(56, 56), (28, 28), (84, 84), (42, 70), (28, 112)])
@torch.no_grad()
def test_the_backbone_equals_the_one_of_transformers(twins, height, width):
    theirs, ours = twins
    x = torch.randn(2, 3, height, width)
    mask = torch.rand(2, height * width // 196) < 0.3
    for m in (None, mask):
        expected = theirs(x, bool_masked_pos=m).last_hidden_state
        got = ours(x, m, is_training=True)
        close(got["x_norm_clstoken"], expected[:, 0], 1e-4)  # weights of 0.3: outputs reach 10,
        close(got["x_norm_regtokens"], expected[:, 1:5], 1e-4)  # residuals 100, so 1e-4 is rounding
        close(got["x_norm_patchtokens"], expected[:, 5:], 1e-4)
