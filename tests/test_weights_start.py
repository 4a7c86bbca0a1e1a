"""A run starts from weights of another one, adapted where that is honest, else refused.

Run: pytest tests/test_weights_start.py        (seconds; helpers are in tests/running.py)

Heads come along or are trained first, on a backbone that does not change by a bit; positions are
made for another resolution.
"""

import pathlib

import numpy as np
import pytest
import torch
from PIL import Image
from running import ROOT, log_of, make_photos, run, tensors_of, tiny
from safetensors.torch import save_file

import train
from config import UserError, documented, load, lookup
from optim import compress
from train import Run, build, outline
from vit import VisionTransformer
from weights.checkpoint import read
from weights.load import contents
from weights.start import adapt, start_from, to_channels

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def rgb(tmp_path_factory):
    """A tiny run on RGB pictures."""
    folder = tmp_path_factory.mktemp("rgb")
    photos = make_photos(folder / "photos")
    done = run(folder, tiny(folder / "run", photos, "steps=2", "log.knn_every=0"))
    assert done.code == 0, done.err
    return folder / "run"


def read_state(path):
    """The backbone in a file."""
    return contents(path)[0]["backbone"]


def network(channels=3):
    return VisionTransformer("nano", 8, 16, channels=channels).eval()


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 7])
@torch.no_grad()
def test_a_grey_image_gives_the_same_tokens_through_any_number_of_channels(channels):
    old, new = network(), network(channels)
    new.load_state_dict(
        old.state_dict()
        | {"patch_embed.proj.weight": to_channels(old.patch_embed.proj.weight, channels)}
    )
    grey = torch.randn(2, 1, 16, 16)
    # fp32 sums of more or fewer terms: the difference is rounding.
    torch.testing.assert_close(
        new(grey.expand(-1, channels, -1, -1)), old(grey.expand(-1, 3, -1, -1)), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("side, offset, antialias", [(7, 0.1, False), (37, 0.0, True)])
def test_positions_are_resized_as_the_official_code_does(side, offset, antialias):
    with np.load(GOLDEN / "pos_embed.npz") as file:
        old = torch.from_numpy(file["pos_embed"])
        kind = f"offset{offset}_{'aa' if antialias else 'noaa'}"
        expected = torch.from_numpy(file[f"{kind}/{side}x{side}"])
    shapes = {"pos_embed": expected.shape}
    weights, notes = adapt({"pos_embed": old}, shapes, (offset, antialias), "x")
    torch.testing.assert_close(weights["pos_embed"], expected, rtol=0, atol=1e-5)
    assert notes and f"resized to {side} x {side}" in notes[0]


@torch.no_grad()
def test_positions_of_a_register_file_are_resized_by_its_convention(tmp_path):
    old = VisionTransformer("nano", 8, 40, registers=4, interpolate_offset=0.0,
                            interpolate_antialias=True)  # fmt: skip
    torch.save(old.state_dict(), tmp_path / "x.pth")
    line = tiny(tmp_path, "synthetic", f"init_from={tmp_path / 'x.pth'}", "vit.registers=4")
    cfg = load(line[0], line[1:])
    cfg.vit.layerscale = 1.0
    student, teacher, *_ = build(cfg, torch.device("cpu"))
    said = start_from(cfg, student, teacher)
    assert torch.equal(teacher.backbone.pos_embed, old.interpolate_pos_encoding(2, 2))
    assert "vit.interpolate_offset=0.0 and vit.interpolate_antialias=true: set both" in said


def config_of(rgb, *words):
    words = tiny(rgb.parent / "never", rgb.parent / "photos", f"init_from={rgb}", *words)
    return load(words[0], words[1:])


def test_student_and_teacher_both_start_from_the_file_and_the_heads_are_new(rgb):
    cfg = config_of(rgb)
    student, teacher, *_ = build(cfg, torch.device("cpu"))
    fresh = {n: p.clone() for n, p in student.named_parameters()}
    start_from(cfg, student, teacher)
    saved = read(rgb / "teacher.pt")["backbone"]
    for net in student, teacher:
        for name, value in net.named_parameters():
            part, _, key = name.partition(".")
            assert torch.equal(value, saved[key] if part == "backbone" else fresh[name]), name


def test_a_run_gives_the_file_to_student_and_teacher(rgb):
    begun = Run(config_of(rgb), torch.device("cpu"), ())
    saved = read(rgb / "teacher.pt")["backbone"]
    for net in begun.student, begun.teacher:
        assert all(torch.equal(p, saved[name]) for name, p in net.backbone.named_parameters())


def test_images_that_are_normalised_in_another_way_are_said(rgb):
    for words, said in ([], False), (["data.mean=[.1,.2,.3]"], True):
        cfg = config_of(rgb, *words)
        notes = start_from(cfg, *build(cfg, torch.device("cpu"))[:2])
        assert ("which was trained with data.mean=[0.5, 0.5, 0.5]" in notes) == said


def test_a_released_layout_gives_the_same_as_a_run(rgb, tmp_path):
    state = read_state(rgb / "teacher.pt")
    torch.save(state, tmp_path / "vit.pth")
    save_file(state, tmp_path / "vit.safetensors")
    for name in "vit.pth", "vit.safetensors":
        again = read_state(tmp_path / name)
        assert again.keys() == state.keys()
        assert all(torch.equal(again[key], state[key]) for key in state)


def without(state):
    del state["norm.bias"]


def with_registers(state):
    state["register_tokens"] = torch.zeros(1, 4, 128)


def narrow(state):
    state["blocks.0.mlp.fc1.bias"] = torch.zeros(3)


def odd(state):
    state["pos_embed"] = torch.zeros(1, 8, 128)


BAD = [
    (without, "norm.bias is missing"),
    (with_registers, "register_tokens has no place"),
    (narrow, r"blocks.0.mlp.fc1.bias is \(3,\), here it is \(512,\)"),
    (odd, r"pos_embed is \(1, 8, 128\)"),
    (dict.clear, "not weights of a backbone"),
]


@pytest.mark.parametrize("damage, expected", BAD)
def test_what_does_not_fit_is_refused_by_name_in_one_line(rgb, tmp_path, damage, expected):
    state = read_state(rgb / "teacher.pt")
    damage(state)
    torch.save(state, tmp_path / "x.pth")
    cfg = config_of(rgb, f"init_from={tmp_path / 'x.pth'}")
    networks = build(cfg, torch.device("cpu"))[:2]
    with pytest.raises(UserError, match=expected) as error:
        start_from(cfg, *networks)
    assert "\n" not in str(error.value) and "x.pth" in str(error.value)


def test_five_channels_train_from_an_rgb_run_and_a_resumed_run_does_not_read_the_file(
    rgb, tmp_path
):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "five.npy", rng.integers(256, size=(16, 24, 24, 5), dtype=np.uint8))
    five = ["data.channels=5", "data.mean=[.5,.5,.5,.5,.5]", "data.std=[.2,.2,.2,.2,.2]"]
    words = [*five, "crops.global_size=24", "steps=4", "log.knn_every=0", "log.save_every=2"]
    words = tiny(tmp_path / "run", tmp_path / "five.npy", *words)
    done = run(tmp_path, [*words, f"init_from={rgb}"])
    assert done.code == 0, done.err
    assert "positions 2 x 2 resized to 3 x 3" in done.out
    assert "3 input channels made 5" in done.out
    (tmp_path / "run" / "summary.json").unlink()
    again = run(tmp_path, [*words, "init_from=/nowhere"])
    assert again.code == 0, again.err


def test_a_missing_file_is_one_line(rgb, tmp_path):
    words = tiny(tmp_path / "run", rgb.parent / "photos", "init_from=/nowhere.pth")
    refused = run(tmp_path, words)
    assert refused.code == 2 and refused.err.count("\n") == 1
    assert "/nowhere.pth: no such file" in refused.err


# ---- heads --------------------------------------------------------------------------------------


def test_heads_come_along_if_asked_for(rgb):
    cfg = config_of(rgb, "init_heads=true")
    student, teacher, *_ = build(cfg, torch.device("cpu"))
    assert "the heads are those of the file" in start_from(cfg, student, teacher)
    saved = read(rgb / "teacher.pt")
    for net in student, teacher:
        for name, value in net.named_parameters():
            part, _, key = name.partition(".")
            assert torch.equal(value, saved[part][key]), name


@pytest.mark.parametrize("prefix", ["head.", "dino_head."])
def test_heads_of_a_trainer_come_along_too(rgb, tmp_path, prefix):
    parts, _ = contents(rgb / "teacher.pt")
    state = {f"backbone.{name}": value for name, value in parts["backbone"].items()}
    state |= {prefix + name: value for name, value in parts["dino_head"].items()}
    torch.save({"teacher": state}, tmp_path / "x.pth")
    cfg = config_of(rgb, f"init_from={tmp_path / 'x.pth'}", "init_heads=true")
    student, teacher, *_ = build(cfg, torch.device("cpu"))
    assert "the heads are those of the file" in start_from(cfg, student, teacher)
    for name, value in teacher.dino_head.named_parameters():
        assert torch.equal(value, parts["dino_head"][name]), name


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["head.prototypes=16"], "weight_g is (32, 1), here it is (16, 1); the keys of head.*"),
        (["head.separate=true"], "has backbone and dino_head, here it is backbone and dino_head"),
    ],
)
def test_heads_that_do_not_fit_are_refused(rgb, words, expected):
    cfg = config_of(rgb, "init_heads=true", *words)
    networks = build(cfg, torch.device("cpu"))[:2]
    with pytest.raises(UserError) as error:
        start_from(cfg, *networks)
    assert expected in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("classifier", [False, True])
def test_a_file_without_heads_says_what_to_do(rgb, tmp_path, classifier):
    state = read_state(rgb / "teacher.pt")
    if classifier:  # as evals/classifier.py saves it
        state = {f"backbone.{name}": value for name, value in state.items()}
        state["classifier.weight"] = torch.zeros(2, 5)
    torch.save(state, tmp_path / "x.pth")
    cfg = config_of(rgb, f"init_from={tmp_path / 'x.pth'}", "init_heads=true")
    with pytest.raises(UserError, match="has no heads: set init_heads=false, and head_steps"):
        start_from(cfg, *build(cfg, torch.device("cpu"))[:2])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["init_from=", "init_heads=true"], "set init_from"),
        (["init_from=", "head_steps=5"], "set init_from"),
        (["init_heads=true", "head_steps=5"], "init_heads=false, or head_steps=0"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(rgb, words, expected):
    with pytest.raises(UserError, match=expected):
        config_of(rgb, *words)


@pytest.fixture(scope="module")
def faint(tmp_path_factory):
    """Two classes of noise that differ a little, so that k-NN is neither perfect nor chance."""
    folder, rng = tmp_path_factory.mktemp("faint"), np.random.default_rng(0)
    for split, count in ("train", 40), ("val", 40):
        for i in range(count):
            path = folder / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(200, size=(16, 16, 3), dtype=np.uint8) + 6 * (i % 2)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


def test_heads_are_warmed_up_on_a_backbone_that_does_not_change_by_a_bit(tmp_path, faint):
    trained = run(tmp_path, tiny(tmp_path / "first", faint, "steps=4", "log.knn_every=0"))
    assert trained.code == 0, trained.err
    backbone = read_state(tmp_path / "first" / "teacher.pt")
    torch.save(backbone, tmp_path / "released.pth")
    out, given = tmp_path / "run", f"init_from={tmp_path / 'released.pth'}"
    # Whatever could move it is on: learning rate, weight decay, and an average that follows.
    words = ["optim.weight_decay=0.4", "optim.lr=0.02", "teacher.momentum=0.5", "steps=4"]
    done = run(tmp_path, tiny(out, faint, given, "head_steps=6", *words))
    assert done.code == 0, done.err

    line = tiny(out, faint, *words)
    fresh = build(load(line[0], line[1:]), torch.device("cpu"))[0].state_dict()
    tensors = tensors_of(out / "heads")
    for name, value in backbone.items():
        for network in "student.", "teacher.", "teacher.pt ":
            assert torch.equal(tensors[f"{network}backbone.{name}"], value), (network, name)
    assert not any(name.startswith("optimizer.backbone") for name in tensors)
    for name in (name for name in fresh if name.startswith("dino_head")):
        assert not torch.equal(tensors[f"teacher.{name}"], fresh[name]), name

    def knn(folder):
        return [line["knn"] for line in log_of(folder) if "knn" in line]

    before, after = knn(out / "heads")[0], knn(out / "heads")[-1]
    assert 40 < before < 100 and after >= before
    assert knn(out)[0] == after  # what the whole network starts with
    assert "before the first step" in done.out
    # And then the backbone moves, from heads that know it.
    continued = tensors_of(out)
    assert not torch.equal(continued["teacher.backbone.norm.weight"], backbone["norm.weight"])
    assert log_of(out)[1]["loss"] < log_of(out / "heads")[1]["loss"]


def test_schedules_are_compressed_in_proportion():
    cfg = load(ROOT / "configs" / "vitl14.yaml")
    compress(cfg, 10000)
    assert (cfg.steps, cfg.optim.warmup, cfg.teacher.temp_warmup) == (10000, 1600, 600)
    assert cfg.optim.freeze_last_layer == 20


def test_fresh_heads_have_a_config_of_their_own(monkeypatch):
    cfg, trained = load(ROOT / "configs" / "vitl14.yaml", ["init_from=x", "head_steps=10000"]), []
    monkeypatch.setattr(train, "train", lambda cfg, device: trained.append(cfg))
    train.train_heads(cfg, None)
    (heads,) = trained
    assert (heads.steps, heads.optim.warmup, heads.head_steps) == (10000, 1600, 0)
    assert (heads.init_from, heads.out) == ("x", f"{cfg.out}/heads")
    assert heads.optim.freeze_backbone and heads.vit.drop_path == 0 < cfg.vit.drop_path
    # The run itself goes on as it was, from their result.
    assert (cfg.init_from, cfg.init_heads, cfg.head_steps) == (f"{cfg.out}/heads", True, 0)
    assert (cfg.steps, cfg.optim.freeze_backbone) == (625000, False)


# ---- the high-resolution stage ------------------------------------------------------------------


def test_a_run_goes_on_at_twice_the_resolution(tmp_path, rgb):
    photos, first = rgb.parent / "photos", tmp_path / "32"
    short = ["steps=2", "log.knn_every=0"]
    low = [*short, "crops.global_size=32", "crops.local_size=16"]
    done = run(tmp_path, tiny(first, photos, *low))
    assert done.code == 0, done.err
    high = [*short, "crops.global_size=64", "crops.local_size=16", f"init_from={first}"]
    high += ["init_heads=true", "activation_checkpointing=selective"]
    words = tiny(tmp_path / "64", photos, *high)
    cfg = load(words[0], words[1:])
    student, teacher, *_ = build(cfg, torch.device("cpu"))
    start_from(cfg, student, teacher)
    old = VisionTransformer("nano", 8, 32, layerscale=0.1)
    old.load_state_dict(read_state(first / "teacher.pt"))
    # The interpolation itself is compared with official numbers above and in test_vit.py.
    expected = old.interpolate_pos_encoding(8, 8)
    for network in student, teacher:
        assert torch.equal(network.backbone.pos_embed, expected)
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(teacher.backbone(image), old.eval()(image))
    done = run(tmp_path, words)
    assert done.code == 0, done.err
    assert "positions 4 x 4 resized to 8 x 8; the heads are those of the file" in done.out
    assert read(tmp_path / "64" / "teacher.pt")["backbone"]["pos_embed"].shape == (1, 65, 128)


def test_the_card_of_the_high_resolution_stage_builds_on_the_meta_device():
    cfg, before = (load(ROOT / "configs" / f"{name}.yaml") for name in ("highres", "vitl14"))
    changed = {k for k, _ in documented() if k and lookup(cfg, k) != lookup(before, k)}
    expected = """out init_from init_heads steps activation_checkpointing crops.global_size optim.lr
        optim.warmup optim.freeze_last_layer teacher.temp_warmup log.knn_every log.save_every"""
    assert changed == set(expected.split())
    compress(before, 10000)
    for key in ("optim.warmup", "optim.freeze_last_layer", "teacher.temp_warmup"):
        assert lookup(cfg, key) == lookup(before, key)
    assert cfg.optim.lr < before.optim.lr
    cfg.parallel = "none"
    for network in outline(cfg):
        assert network.backbone.pos_embed.shape == (1, 1 + 37 * 37, 1024)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_takes_real_steps_at_518_pixels(tmp_path):
    words = ["steps=3", "batch=4", "parallel=none", "init_from=", "init_heads=false"]
    words += ["data.root=synthetic", "data.workers=0", "log.every=1", "log.pictures=false"]
    done = run(
        tmp_path, [str(ROOT / "configs" / "highres.yaml"), f"out={tmp_path / 'run'}", *words]
    )
    assert done.code == 0, done.err
    assert sum("loss" in line for line in log_of(tmp_path / "run")) == 3
