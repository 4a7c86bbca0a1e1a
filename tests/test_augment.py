"""Crops, colours and masks are the official ones, and every crop gets what was drawn for it.

Three kinds of proof: numbers of the official code (tests/golden: augment.npz, masking.npz), a plain
twin that treats one crop with Pillow as the official code does, and properties.

Run:  pytest tests/test_augment.py
"""

import colorsys
import math
import pathlib
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

import augment
from augment import HUE, KINDS, LOCAL, ORDERS, Colour, block_mask, colour, draw_view
from config import Config

GOLDEN = pathlib.Path(__file__).parent / "golden"
NOTHING = Colour(1.0, 1.0, 1.0, 0.0, 0, False, False, 0.0, False)
SAME = [0.0], [1.0]  # mean and std that change nothing


@pytest.fixture(scope="module")
def z():
    with np.load(GOLDEN / "augment.npz", allow_pickle=False) as file:
        return {k: file[k] for k in file.files}


@pytest.fixture(scope="module")
def golden_masks():
    with np.load(GOLDEN / "masking.npz", allow_pickle=False) as file:
        return {k: file[k] for k in file.files}


def below(arrays, prefix):
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def params(*looks):
    return torch.tensor(looks, dtype=torch.float32)


def as_batch(*images):
    """uint8 (S, S, C) arrays -> (N, C, S, S)"""
    return torch.stack([torch.from_numpy(image.transpose(2, 0, 1).copy()) for image in images])


def levels(crop_SSC, look):
    """colour() on one crop, as float levels 0..255 (S, S, C)."""
    return colour(as_batch(crop_SSC), params(look), *SAME)[0].permute(1, 2, 0).numpy() * 255


def draws(n, kind, height=375, width=500, cfg=None):
    rng = random.Random(0)
    return [draw_view(rng, height, width, cfg or Config(), kind) for _ in range(n)]


def small_config(**changes):
    cfg = Config()
    cfg.crops.global_size, cfg.crops.local_size, cfg.crops.local_count = 32, 16, 3
    for name, value in changes.items():
        setattr(cfg.augment, name, value)
    return cfg


# ---- the twin: one crop, Pillow, uint8 after each operation -------------------------------------


def pillow_hue(image, shift):
    hue, saturation, value = image.convert("HSV").split()
    hue = Image.fromarray(((np.asarray(hue).astype(int) + int(shift * 255)) % 256).astype(np.uint8))
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def plain_blur(pixels, sigma):
    kernel = np.exp(-0.5 * (np.arange(-4, 5) / sigma) ** 2)
    kernel /= kernel.sum()
    wide = np.pad(pixels.astype(float), ((4, 4), (4, 4), (0, 0)), mode="reflect")
    rows = sum(w * wide[k : k + len(pixels)] for k, w in enumerate(kernel))
    return sum(w * rows[:, k : k + len(pixels)] for k, w in enumerate(kernel))


def twin(crop_SSC, look):
    image = Image.fromarray(crop_SSC)
    for operation in ORDERS[look.order] if look.jitter else ():
        if look[operation] == NOTHING[operation]:
            continue  # for the stored single operations: 8-bit HSV costs levels even without a turn
        if operation == HUE:
            image = pillow_hue(image, look.hue)
        else:
            enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
            image = enhance[operation](image).enhance(look[operation])
    if look.grey:
        image = image.convert("L").convert("RGB")
    if look.blur:
        image = Image.fromarray(np.rint(plain_blur(np.asarray(image), look.blur)).astype(np.uint8))
    return np.asarray(ImageOps.solarize(image, 128) if look.solarize else image)


def golden_operations(z, source):
    """(name, what the official code did, its result) for everything stored of one picture."""
    for key in z:
        if not key.startswith(f"{source}/") or not key.endswith("/pil"):
            continue
        name = key.split("/")[1]
        kind, number = name.split("_")[0], name.split("_")[-1]
        if kind in Colour._fields[:4]:
            look = NOTHING._replace(jitter=True, **{kind: float(number)})
        elif kind == "chain":
            names = ("contrast", "hue", "brightness", "saturation")
            factors = z[key.replace("/pil", "/factors")]
            order = ORDERS.index(tuple(Colour._fields.index(n) for n in names))
            look = NOTHING._replace(jitter=True, order=order, blur=factors[4], solarize=True)
            look = look._replace(**dict(zip(names, factors, strict=False)))
        elif kind in ("grayscale3", "gaussian", "solarize"):
            sigma = float(number[5:]) if kind == "gaussian" else 0.0
            look = NOTHING._replace(
                grey=kind == "grayscale3", blur=sigma, solarize=kind == "solarize"
            )
        else:
            continue
        yield name, look, z[key]


# ---- colour -------------------------------------------------------------------------------------

# Of 255 levels: (largest difference after rounding, mean difference before it). Pillow cuts off
# the fractions that we keep, 0.5 on average, and its hue goes through 8-bit HSV.
ALLOWED = {"hue": (10, 1.1), "chain": (7, 1.6)}


@pytest.mark.parametrize("source", ["natural", "random"])
def test_colour_operations_stay_within_the_stated_levels_of_the_official_ones(z, source):
    crop = z[f"{source}/resized_crop_32/pil"]
    operations = list(golden_operations(z, source))
    assert len(operations) == 17
    for name, look, expected in operations:
        most, mean = ALLOWED.get(name.split("_")[0], (1, 0.6))
        got = levels(crop, look)
        assert abs(got.round() - expected).max() <= most, name
        assert abs(got - expected).mean() <= mean, name


@pytest.mark.parametrize("operation", ["brightness_0.6", "contrast_0.6", "hue_-0.1", "grayscale3"])
def test_colour_operations_equal_the_official_ones_in_float(z, operation):
    look = next(look for name, look, _ in golden_operations(z, "natural") if name == operation)
    got = levels(z["natural/resized_crop_32/pil"], look)
    expected = z[f"natural/{operation}/tensor_float"] * 255
    # torchvision's grey weighs red 0.2989, Pillow's (and ours) 0.299: 0.0001 * 255 = 0.03 levels
    assert abs(got - expected).max() < 0.03


def test_normalisation_is_the_official_one(z):
    cfg = Config()
    crop = as_batch(z["natural/resized_crop_32/pil"])
    got = colour(crop, params(NOTHING), cfg.data.mean, cfg.data.std)[0]
    expected = torch.from_numpy(z["natural/to_tensor_normalize"])
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)  # values up to 2.6


@pytest.mark.parametrize("source", ["natural", "random"])
def test_the_twin_is_the_official_code(z, source):
    for name, look, expected in golden_operations(z, source):
        assert np.array_equal(twin(z[f"{source}/resized_crop_32/pil"], look), expected), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_drawn_colours_equals_the_twin_crop_by_crop(z, kind):
    crop = z["natural/resized_crop_32/pil"]
    looks = [view.colour for view in draws(150, kind)]
    got = colour(as_batch(*[crop] * 150), params(*looks), *SAME).permute(0, 2, 3, 1).numpy() * 255
    difference = abs(got - np.stack([twin(crop, look) for look in looks]))
    # Of 255 levels: rounding, and hue in 8 bits, cost 1.3 on average, 2.3 in the worst crop, 16 in
    # the worst pixel. Taking the next of the 24 orders costs 3.3 and 27; the next crop's draws, 38.
    assert difference.mean() < 1.4
    assert difference.mean(axis=(1, 2, 3)).max() < 2.6
    assert difference.max() < 20


def test_solarise_inverts_the_levels_from_128_on():
    every = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    got = levels(every, NOTHING._replace(solarize=True)).round()
    assert np.array_equal(got, np.where(every < 128, every, 255 - every))


def test_a_crop_does_not_depend_on_the_batch_it_is_in():
    crops = torch.randint(0, 256, (60, 3, 16, 16), dtype=torch.uint8)
    looks = params(*(view.colour for view in draws(60, augment.GLOBAL_2)))
    alone = [colour(*pair, *SAME) for pair in zip(crops.split(1), looks.split(1), strict=True)]
    torch.testing.assert_close(torch.cat(alone), colour(crops, looks, *SAME), atol=1e-6, rtol=0)


def test_each_crop_has_its_operations_in_its_own_order(z):
    looks = [NOTHING._replace(order=i, jitter=True) for i in range(24)]
    looks = [k._replace(brightness=1.4, contrast=0.6, saturation=1.2, hue=0.1) for k in looks]
    crops = as_batch(*[z["natural/resized_crop_32/pil"]] * 24)
    together = colour(crops, params(*looks), *SAME)
    for order, got in zip(ORDERS, together, strict=True):
        x = crops[:1] / 255
        for operation in order:  # one call each; floats go in as they are
            name = Colour._fields[operation]
            one = NOTHING._replace(jitter=True, **{name: getattr(looks[0], name)})
            x = colour(x, params(one), *SAME)
        torch.testing.assert_close(got, x[0], atol=2e-6, rtol=0)
    assert len({tuple(x.flatten().tolist()) for x in together}) > 12  # and the order matters


def test_hue_turns_every_colour_as_the_standard_library_does():
    shifts = torch.linspace(-0.5, 0.5, 21)
    crops = torch.rand(21, 3, 6, 6)
    crops[:, :, 0] = crops[:, :, 0].round()  # black, white and the six corners of the circle
    got = colour(crops, params(*(NOTHING._replace(jitter=True, hue=s) for s in shifts)), *SAME)
    for crop, shift, turned in zip(crops, shifts.tolist(), got, strict=True):
        for before, after in zip(crop.flatten(1).T, turned.flatten(1).T, strict=True):
            h, s, v = colorsys.rgb_to_hsv(*before.tolist())
            expected = torch.tensor(colorsys.hsv_to_rgb((h + shift) % 1, s, v))
            torch.testing.assert_close(after, expected, atol=2e-6, rtol=0)


def test_grey_images_keep_their_grey_when_hue_turns():
    crop = torch.rand(1, 1, 8, 8).expand(1, 3, 8, 8)
    got = colour(crop, params(NOTHING._replace(jitter=True, hue=0.1)), *SAME)
    torch.testing.assert_close(got, crop, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [5, 16, 33])
def test_blur_equals_the_sum_over_mirrored_neighbours(size):
    crops, sigmas = torch.rand(3, 3, size, size), (0.1, 0.9, 2.0)
    got = colour(crops, params(*(NOTHING._replace(blur=s) for s in sigmas)), *SAME)
    for crop, sigma, blurred in zip(crops, sigmas, got, strict=True):
        expected = torch.from_numpy(plain_blur(crop.permute(1, 2, 0).numpy(), sigma))
        torch.testing.assert_close(blurred.double(), expected.permute(2, 0, 1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_images_that_are_not_rgb_are_cropped_flipped_and_blurred_but_keep_their_colours(channels):
    image = np.random.default_rng(0).integers(0, 256, (40, 30, channels), dtype=np.uint8)
    cut, looks = augment.crops(image, random.Random(0), small_config(blur=(0.0, 0.0, 0.0)))
    assert [x.shape for x in cut] == [(channels, s, s) for s in (32, 32, 16, 16, 16)]
    everything = looks.clone()
    everything[:, Colour._fields.index("jitter")] = everything[:, -1] = 1
    got = colour(torch.stack(cut[:2]), everything[:2], [0.0] * channels, [1.0] * channels)
    assert torch.equal(got, torch.stack(cut[:2]) / 255)
    everything[:, Colour._fields.index("blur")] = 1.0
    blurred = colour(torch.stack(cut[:2]), everything[:2], *SAME)
    assert blurred.std(dim=(2, 3)).max() < got.std(dim=(2, 3)).min()


def test_no_crops_give_no_crops():
    empty = torch.zeros(0, 3, 16, 16, dtype=torch.uint8)
    assert colour(empty, torch.zeros(0, len(NOTHING)), *SAME).shape == empty.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_colour_on_a_gpu_equals_the_cpu_and_never_waits_for_it():
    crops = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    looks = params(*(view.colour for view in draws(64, augment.GLOBAL_2)))
    on_gpu = crops.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = colour(on_gpu, looks, *SAME)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # The largest jump is solarise at its threshold, 1 / 255, where a rounding error decides.
    torch.testing.assert_close(got.cpu(), colour(crops, looks, *SAME), atol=0.005, rtol=0)


# ---- crops --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "picture, box, result",
    [
        ("natural", "box", "resized_crop"),
        ("random", "box", "resized_crop"),
        ("random", "box2", "resized_crop_box2"),
    ],
)
def test_resized_crops_are_within_one_level_of_the_official_ones(z, picture, box, result):
    image, box = z[f"{picture}/image"], z[f"{picture}/{box}_ijhw"]
    expected = torch.tensor(z[f"{picture}/{result}_32/pil"]).permute(2, 0, 1)
    got = augment.resized_crop(image, box, 32)
    off = (got.int() - expected.int()).abs()
    assert got.dtype == torch.uint8 and off.max() <= 1 and off.float().mean() < 0.01
    for channel in range(3):  # the way of images with one channel, or four
        plane = augment.resized_crop(image[:, :, [channel]], box, 32)[0]
        assert (plane.int() - expected[channel].int()).abs().max() <= 1
    four = augment.resized_crop(np.concatenate((image, image[:, :, :2]), axis=2), box, 32)
    assert (four[:3].int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("seed", range(8))
def test_resized_crops_are_those_of_pillow_even_for_noise_in_black_and_white(seed):
    rng = np.random.default_rng(seed)
    (height, width), size = rng.integers(1, 300, 2), int(rng.choice([16, 32, 96, 224]))
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = image // 128 * 255 if seed % 2 else image
    rows = Image.fromarray(image).resize((size, height), Image.Resampling.BICUBIC)
    twin = np.asarray(rows.resize((size, size), Image.Resampling.BICUBIC))
    got = augment.resized_crop(image, (0, 0, height, width), size).permute(1, 2, 0).numpy()
    off = abs(got.astype(int) - twin)
    assert off.max() <= 2 and (off > 0).mean() < 0.02


def test_other_types_of_pixels_keep_their_precision(z):
    image, box = z["natural/image"], z["natural/box_ijhw"]
    expected = torch.tensor(z["natural/resized_crop_32/pil"]).permute(2, 0, 1) / 255
    sixteen = augment.resized_crop(image.astype(np.uint16) * 257, box, 32)
    floats = augment.resized_crop(image / 255, box, 32)
    assert sixteen.dtype == floats.dtype == torch.float32
    # Pillow rounds uint8 twice, after rows and after columns: 1.5 levels of 255.
    assert abs(sixteen.clip(0, 1) - expected).max() < 1.5 / 255
    assert abs(floats - sixteen).max() < 1e-6


def test_a_flip_mirrors_the_crop():
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    never = augment.crops(image, random.Random(3), small_config(flip=0.0))
    always = augment.crops(image, random.Random(3), small_config(flip=1.0))
    for crop, mirrored in zip(never[0], always[0], strict=True):
        assert torch.equal(crop.flip(-1), mirrored)
        assert crop.is_contiguous() and mirrored.is_contiguous()
    assert torch.equal(never[1], always[1])  # and changes no other draw


def test_the_same_random_state_gives_the_same_crops():
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    (a, looks_a), (b, looks_b), (c, looks_c) = (
        augment.crops(image, random.Random(seed), small_config()) for seed in ("7", "7", "8")
    )
    assert torch.equal(looks_a, looks_b) and not torch.equal(looks_a, looks_c)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[0], c[0])


# ---- draws --------------------------------------------------------------------------------------


def close_in_mean(values, mean, std, n_golden):
    """Within 4 standard errors of two samples."""
    error = std * math.sqrt(1 / len(values) + 1 / n_golden)
    return abs(np.mean(values) - mean) <= 4 * error


@pytest.mark.parametrize("kind, scale", [(augment.GLOBAL_1, "0.32-1.0"), (LOCAL, "0.05-0.32")])
def test_boxes_are_distributed_as_in_the_official_code(z, kind, scale):
    golden = below(z, f"rrc_W500_H375_scale{scale}/")
    boxes = np.array([view.box for view in draws(8000, kind)])
    top, left, height, width = boxes.T
    assert (top >= 0).all() and (top + height <= 375).all() and (left + width <= 500).all()
    measured = {
        "area_fraction": height * width / (375 * 500), "log_aspect": np.log(width / height),
        "height": height, "width": width,
    }  # fmt: skip
    for name, values in measured.items():
        mean = golden["log_aspect_w_over_h_mean" if name == "log_aspect" else f"{name}_mean"]
        assert close_in_mean(values, mean, golden[f"{name}_std"], golden["draws"]), name
        # Standard error of a standard deviation: std / sqrt(2 n) for a bell curve, less for these.
        spread = golden[f"{name}_std"] * math.sqrt(0.5 / 8000 + 0.5 / golden["draws"])
        assert abs(values.std() - golden[f"{name}_std"]) < 4 * spread, name
        if f"{name}_quantiles" in golden:
            got = np.quantile(values, golden["quantile_levels"])
            assert abs(got - golden[f"{name}_quantiles"]).max() < 4 * 0.5 * 0.8 / math.sqrt(8000)


@pytest.mark.parametrize(
    "height, width, box", [(10, 1000, (0, 493, 10, 13)), (90, 3, (43, 0, 4, 3))]
)
def test_an_image_too_narrow_for_any_shape_gives_its_centre(height, width, box):
    rng = random.Random(0)
    assert augment.draw_box(rng, height, width, (0.9, 1.0), (0.75, 1.3333)) == box


OFFICIAL_KINDS = pytest.mark.parametrize(
    "name, kind", [("global1", 0), ("global2", 1), ("local", 2)]
)


@OFFICIAL_KINDS
def test_operations_happen_as_often_as_in_the_official_code(z, name, kind):
    views = draws(6000, kind)
    happened = Colour(*(np.array([view.colour for view in views], dtype=float).T > 0))
    ours = {
        "gaussian_blur": happened.blur, "rgb_to_grayscale": happened.grey,
        "solarize": happened.solarize, "adjust_hue": happened.jitter,
    }  # fmt: skip
    for official, values in ours.items():
        p = float(z[f"effective_probability/{name}/{official}"])
        assert close_in_mean(values, p, math.sqrt(p * (1 - p)), 6000), official
    p = float(z[f"effective_probability/geometric_{name.rstrip('12')}/hflip"])
    assert close_in_mean([view.flip for view in views], p, 0.5, 6000)


@OFFICIAL_KINDS
def test_operations_are_as_strong_as_in_the_official_code(z, name, kind):
    ours = Colour(*np.array([view.colour for view in draws(6000, kind)], dtype=float).T)
    official = below(z, f"effective_factor/{name}/")
    assert len(official) == (4 if name == "global1" else 5)
    for key, (low, mean, high) in official.items():
        field = key.removesuffix("_min_mean_max").removeprefix("adjust_").removeprefix("gaussian_")
        values = getattr(ours, field)
        values = values[values > 0] if field == "blur" else values
        std = (high - low) / math.sqrt(12)  # uniform
        assert close_in_mean(values, mean, std, 6000 * 0.5), field
        # The extremes of 3,000 draws: one in 3e-7 is further away.
        assert abs(values.min() - low) < 0.005 * (high - low), field
        assert abs(values.max() - high) < 0.005 * (high - low), field


def test_all_orders_of_the_jitter_are_equally_likely():
    counts = np.bincount([view.colour.order for view in draws(6000, LOCAL)], minlength=24)
    assert len(set(ORDERS)) == len(counts) == 24
    assert abs(counts / 6000 - 1 / 24).max() < 4 * math.sqrt(1 / 24 * 23 / 24 / 6000)


def test_changing_a_probability_changes_no_other_draw():
    cfg = small_config(jitter=0.1, blur=(1.0, 0.1, 0.5), grey=0.9)
    for a, b in zip(draws(50, LOCAL), draws(50, LOCAL, cfg=cfg), strict=True):
        assert a.box == b.box and a.colour[:5] == b.colour[:5]


# ---- masks --------------------------------------------------------------------------------------


def test_masks_are_the_official_ones_patch_for_patch(golden_masks):
    keys = [key for key in golden_masks if "/exact/" in key and key.endswith("_mask")]
    assert len(keys) == 12
    for key in keys:
        expected, n = golden_masks[key], int(golden_masks[key.replace("_mask", "_target")])
        seed = int(key.split("seed")[1].split("_")[0])
        assert np.array_equal(block_mask(*expected.shape, n, random.Random(seed)), expected), key


@pytest.mark.parametrize("grid", ["7x7_img112_p16", "14x14_img224_p16", "16x16_img224_p14"])
def test_masks_are_distributed_as_in_the_official_code(golden_masks, grid):
    side, n = int(grid.split("x")[0]), 300
    golden = below(golden_masks, f"grid_{grid}/")
    rng = random.Random(0)
    for i, target in enumerate(golden["targets"]):
        masks = np.stack([block_mask(side, side, int(target), rng) for _ in range(n)])
        counts = masks.sum(axis=(1, 2))
        assert counts.max() <= target  # never more than asked for
        assert close_in_mean(counts, golden["count_mean"][i], golden["count_std"][i], 2000)
        p = golden["mean_mask_map"][i]
        error = np.sqrt(p * (1 - p) * (1 / n + 1 / golden["draws_per_target"]))
        # 5 standard errors: over all grids and targets, 2,505 patches are compared
        assert (abs(masks.mean(0) - p) < 5 * error + 1e-9).all()


def test_one_rectangle_covers_at_most_the_official_share_of_the_grid(golden_masks):
    for key, official in golden_masks.items():
        if key.endswith("/max_num_patches"):
            side = [int(x) for x in key.split("_")[1].split("/")[0].split("x")]
            offered, rng = [], random.Random(0)
            spy = SimpleNamespace(
                uniform=lambda a, b, o=offered, r=rng: o.append(b) or r.uniform(a, b),
                randint=rng.randint,
            )
            block_mask(*side, side[0] * side[1], spy)
            assert max(offered) == official, key  # 98, 128, 666, not half of the grid rounded


@pytest.mark.parametrize("n", [0, 1, 3, 30, 59, 60])
def test_a_mask_hides_at_most_n_patches_on_any_grid(n):
    rng = random.Random(0)
    grids = [(10, 6), (6, 10), (1, 60)] * 30
    masks = [block_mask(height, width, n, rng) for height, width in grids]
    assert all(mask.sum() <= n for mask in masks)
    assert n == 0 or any(mask.sum() >= 0.9 * min(n, 50) for mask in masks)


@pytest.mark.parametrize("batch", ["B8_grid14", "B5_grid16"])
def test_the_masks_of_a_batch_are_the_official_ones(golden_masks, batch):
    key = f"collate_{batch}_ratio0.1-0.5_prob0.5"
    expected = golden_masks[f"{key}/first/collated_masks"]
    side = math.isqrt(expected.shape[1])
    rng = random.Random(int(golden_masks[f"{key}/python_random_seed"]))
    got = augment.batch_masks(len(expected), side, side, 0.5, (0.1, 0.5), rng)
    assert np.array_equal(got, expected)


def test_the_masks_of_a_batch_hide_as_much_as_the_official_ones(golden_masks):
    key = "collate_B8_grid14_ratio0.1-0.5_prob0.5"
    rng = random.Random(0)
    batches = [augment.batch_masks(16, 14, 14, 0.5, (0.1, 0.5), rng) for _ in range(200)]
    total = [masks.sum() for masks in batches]
    mean, std = golden_masks[f"{key}/n_masked_mean"], golden_masks[f"{key}/n_masked_std"]
    assert close_in_mean(total, mean, std, golden_masks[f"{key}/draws"])
    assert max(total) <= golden_masks[f"{key}/upperbound"]
    assert all((masks.sum(1) > 0).sum() == 8 for masks in batches)
    where = np.mean([masks.any(1) for masks in batches], axis=0)
    assert abs(where - 0.5).max() < 4 * 0.5 / math.sqrt(200)  # any crop is as likely to be masked
