"""weights.py: a run starts from weights of another one, adapted where that is honest, else refused.

Run: pytest tests/test_init_from.py        (seconds; helpers are in tests/running.py)
"""

import pathlib

import numpy as np
import pytest
import torch
from running import make_photos, run, tiny
from safetensors.torch import save_file

from checkpoint import read
from config import Config, UserError, load
from train import build
from vit import VisionTransformer
from weights import adapt, read_state, start_from, to_channels

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def rgb(tmp_path_factory):
    """A tiny run on RGB pictures."""
    folder = tmp_path_factory.mktemp("rgb")
    photos = make_photos(folder / "photos")
    done = run(folder, tiny(folder / "run", photos, "steps=2", "log.knn_every=0"))
    assert done.code == 0, done.err
    return folder / "run"


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
    vit = Config().vit
    vit.interpolate_offset, vit.interpolate_antialias = offset, antialias
    weights, notes = adapt({"pos_embed": old}, {"pos_embed": expected.shape}, vit, "x")
    torch.testing.assert_close(weights["pos_embed"], expected, rtol=0, atol=1e-5)
    assert notes and f"resized to {side} x {side}" in notes[0]


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
