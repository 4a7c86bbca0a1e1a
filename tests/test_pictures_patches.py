"""Proves the maths of pictures/patches.py: PCA, foreground, attention, shifts.

Run: pytest tests/test_pictures_patches.py
"""

import numpy as np
import pytest
import torch

from attention import plain_attention
from pictures import patches
from vit import VisionTransformer

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def network(registers=0, depth=2, patch=4, size=16):
    net = VisionTransformer(
        (32, depth, 2, "mlp"), patch, size, registers=registers, layerscale=0.5, init_std=0
    )
    return net.eval()


def image(height, width, seed=0):
    return np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)


# ---- PCA ----------------------------------------------------------------------------------------


def test_components_are_those_of_numpys_singular_vectors():
    x = torch.randn(20, 10, 12) * torch.linspace(1, 4, 12) + 5
    centred = x.flatten(0, 1).double().numpy()
    centred = centred - centred.mean(axis=0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:3].T
    axes = axes * np.sign(np.take_along_axis(axes, abs(axes).argmax(axis=0)[None], axis=0))
    assert np.allclose(patches.components([x[:5], x[5:]]), centred @ axes, atol=1e-8)


def two_kinds(sizes=((4, 6), (5, 5)), dim=16):
    """Feature maps whose left columns are of one kind and whose others are of another."""
    kinds = torch.randn(2, dim)
    return [kinds[(torch.arange(w) >= 2).long()].expand(h, w, dim) + 0.01 * torch.randn(h, w, dim)
            for h, w in sizes]  # fmt: skip


def test_pca_gives_one_kind_of_patch_one_colour_in_all_images():
    features = two_kinds()
    colours = patches.pca_colours(features)
    assert [c.shape for c in colours] == [(4, 6, 3), (5, 5, 3)]
    red = [c[:, :, 0].astype(int) for c in colours]  # red is the strongest direction
    left, right = [np.concatenate([part.ravel() for part in parts])
                   for parts in ([r[:, :2] for r in red], [r[:, 2:] for r in red])]  # fmt: skip
    assert abs(left.mean() - right.mean()) > 200
    assert max(np.ptp(left), np.ptp(right)) < 40


def test_pca_colours_are_the_same_every_time_and_for_turned_features():
    features = two_kinds()
    turn = torch.linalg.qr(torch.randn(16, 16))[0]
    first, again = patches.pca_colours(features), patches.pca_colours(features)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    turned = patches.pca_colours([f @ turn for f in features])
    for a, b in zip(first, turned, strict=True):  # up to the direction of each axis
        a, b = a.astype(int), b.astype(int)
        same = [min(abs(a - b)[:, :, c].max(), abs(a + b - 255)[:, :, c].max()) for c in range(3)]
        assert max(same) <= 2


@pytest.mark.parametrize("features", [torch.ones(3, 3, 8), torch.rand(1, 1, 4)])
def test_pca_of_equal_or_few_features_is_still_a_picture(features):
    [colours] = patches.pca_colours([features])
    assert colours.shape == (*features.shape[:2], 3)
    if features.shape[:2] == (1, 1) or (features == 1).all():
        assert (colours == 128).all()


def test_patches_that_are_not_kept_are_black_and_do_not_count():
    [features] = two_kinds(sizes=[(6, 6)])
    keep = torch.zeros(6, 6, dtype=torch.bool)
    keep[1:5, 1:5] = True
    wild = torch.where(keep[:, :, None], features, 1000 * torch.randn(6, 6, 16))
    [colours], [of_wild] = (patches.pca_colours([f], [keep]) for f in (features, wild))
    assert (colours == of_wild).all() and (colours[~keep.numpy()] == 0).all()
    assert (colours[1:5, 1:5].max(axis=-1) > 0).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_foreground_is_what_lies_inside_whichever_way_the_axis_points(sign):
    inside = torch.zeros(2, 8, 10, dtype=torch.bool)
    inside[0, 2:6, 3:9] = True
    inside[1, 0:5, 4:7] = True  # touches the border, as objects do
    kind = torch.randn(16) * sign
    features = [i[:, :, None] * kind + 0.05 * torch.randn(8, 10, 16) for i in inside]
    assert all((f == i).all() for f, i in zip(patches.foreground(features), inside, strict=True))


def test_colours_are_steady_when_features_only_turn():
    [features] = two_kinds(sizes=[(6, 6)])
    features = features + torch.randn(6, 6, 16)
    turned = features @ torch.linalg.qr(torch.randn(16, 16))[0]
    frames = patches.steady_colours([[turned], [-3 * features], [features]])
    for [colours] in frames:
        assert abs(colours.astype(int) - frames[-1][0]).max() <= 1
    [own] = patches.pca_colours([features])
    assert (frames[-1][0] == own).all()  # the last has the colours of its own PCA


# ---- reading an image ---------------------------------------------------------------------------


def direct(net, pixels):
    return net.forward_features(pixels)["x_norm_patchtokens"][0].detach()


@pytest.mark.parametrize("height, width", [(16, 16), (24, 40), (21, 9)])
def test_one_shift_is_the_plain_forward_pass(height, width):
    net, picture = network(), image(height, width)
    pixels = patches.to_pixels(picture, 4, MEAN, STD)
    want = direct(net, pixels).unflatten(0, (pixels.shape[2] // 4, -1))
    got = patches.patch_features(net, picture, MEAN, STD, shifts=1)
    assert got.shape == (round(height / 4), round(width / 4), 32)
    assert torch.allclose(got, want, atol=1e-5)


def test_shifts_give_each_place_the_patch_around_it():
    """A network that returns the mean of each patch; the image is a slope, so the mean is where."""

    class Mean(torch.nn.Module):
        patch, dim, pos_embed = 4, 3, torch.zeros(1)

        def forward(self, x, is_training):
            means = x.unflatten(3, (-1, 4)).unflatten(2, (-1, 4)).mean(dim=(3, 5))
            return {"x_norm_patchtokens": means.flatten(2).transpose(1, 2)}

    y, x = np.mgrid[:16, :24].astype(np.float32)
    slope = np.stack([y, x, 0 * x], axis=-1)
    for shifts in (1, 2, 4):
        got = patches.patch_features(Mean(), slope, (0.0,) * 3, (1.0,) * 3, shifts=shifts)
        assert got.shape == (4 * shifts, 6 * shifts, 3)
        inner = slice(shifts, -shifts)  # the outermost patches look over the border
        places = (torch.arange(4 * shifts) + 0.5) * 4 / shifts - 0.5
        error = got[inner, inner, 0] - places[inner, None]
        assert error.abs().max() <= (0 if shifts == 1 else 0.51)  # moved by whole pixels
        columns = (torch.arange(6 * shifts) + 0.5) * 4 / shifts - 0.5
        assert (got[inner, inner, 1] - columns[inner]).abs().max() <= (0 if shifts == 1 else 0.51)


def test_images_keep_their_size_and_proportions_up_to_32_patches():
    assert patches.to_pixels(image(20, 40), 4, MEAN, STD).shape[2:] == (20, 40)
    assert patches.to_pixels(image(2, 16), 4, MEAN, STD).shape[2:] == (4, 32)  # a patch at least
    big = patches.to_pixels(image(400, 800), 4, MEAN, STD)
    assert big.shape[2:] == (128, 256)  # 32 patches


# ---- attention ----------------------------------------------------------------------------------


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_attention_rows_sum_to_one_and_make_the_output_of_the_block(registers, layer):
    net = network(registers, depth=3)
    seen = {}
    net.blocks[layer].attn.qkv.register_forward_hook(lambda m, i, o: seen.update(qkv=o.detach()))
    net.blocks[layer].attn.proj.register_forward_pre_hook(lambda m, i: seen.update(out=i[0]))
    pixels = torch.cat([patches.to_pixels(image(16, 24, s), 4, MEAN, STD) for s in (0, 1)])
    with torch.no_grad():
        net(pixels)
    out = seen["out"].unflatten(0, (2, -1)).unflatten(2, (2, 16)).transpose(1, 2)  # (B, A, T, E)
    q, k, v = seen["qkv"].unflatten(1, (3, 2, 16)).unflatten(0, (2, -1)).permute(2, 0, 3, 1, 4)

    weights = patches.attention_weights(net, pixels, layer)
    assert weights.shape == (2, 2, 1 + registers, 1 + registers + 24)
    assert torch.allclose(weights.sum(dim=-1), torch.ones(2, 2, 1 + registers), atol=1e-6)
    assert torch.allclose(plain_attention(q, k, v), out, atol=1e-5)
    # The weights are right if they mix the values into what the network itself computed.
    assert torch.allclose(weights @ v, out[:, :, : 1 + registers], atol=1e-5)


def test_attention_maps_are_laid_out_as_the_image_is():
    net = network(registers=2)
    picture = image(16, 24)
    maps = patches.attention_maps(net, picture, MEAN, STD, layer=1, shifts=1)
    weights = patches.attention_weights(net, patches.to_pixels(picture, 4, MEAN, STD), 1)[0]
    assert maps.shape == (3, 2, 4, 6)
    for token in range(3):
        for head in range(2):
            assert torch.allclose(maps[token, head], weights[head, token, 3:].reshape(4, 6))
    assert (maps.sum(dim=(2, 3)) < 1).all()


def test_no_more_shifts_are_made_than_a_patch_has_pixels():
    assert len(patches.shifted(torch.zeros(1, 3, 8, 8), 4, 9)) == 4 * 4


def test_shifted_attention_maps_keep_their_share():
    net, picture = network(registers=1), image(16, 24)
    maps = patches.attention_maps(net, picture, MEAN, STD, layer=0, shifts=2)
    assert maps.shape == (2, 2, 8, 12)
    views = patches.shifted(patches.to_pixels(picture, 4, MEAN, STD), 4, 2)
    each = patches.attention_weights(net, views, 0)  # (4, A, 2, T)
    share = each[..., 2:].sum(dim=-1).mean(dim=0).T  # what patches get, over all views
    assert torch.allclose(maps.sum(dim=(2, 3)), share) and (share < 1).all()
    assert torch.allclose(maps[0, 1, 1::2, 0::2] * 4, each[2, 1, 0, 2:].reshape(4, 6), atol=1e-6)


# ---- matching -----------------------------------------------------------------------------------


def test_mutual_nearest_neighbours_are_those_of_a_double_loop():
    a, b = torch.randn(4, 5, 8), torch.randn(3, 6, 8)
    flat_a, flat_b = a.flatten(0, 1), b.flatten(0, 1)
    cosine = torch.stack([torch.cosine_similarity(row[None], flat_b) for row in flat_a])
    want = []
    for i in range(20):
        for j in range(18):
            if cosine[i, j] == cosine[i].max() and cosine[i, j] == cosine[:, j].max():
                want.append([i, j])
    assert patches.mutual_nearest(a, b).tolist() == want
    assert 1 < len(want) < 18


def test_nearest_is_that_of_a_loop_however_it_is_cut():
    a, b = torch.randn(70, 70, 4), torch.randn(3, 3, 4)  # more rows than one chunk
    place = patches.nearest(a, b)
    assert place.shape == (70, 70)
    for y, x in [(0, 0), (58, 36), (69, 69)]:
        assert place[y, x] == torch.cosine_similarity(a[y, x][None], b.flatten(0, 1)).argmax()
