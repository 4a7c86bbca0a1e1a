"""The shipped experiment cards are complete, build, and have the published sizes and constants.

Networks are built on the meta device: shapes without memory, so that ViT-g takes a second.

Run:  pytest tests/test_configs.py
"""

import re
from pathlib import Path

import pytest
import torch
import yaml

import config
from dinov2 import build_network
from optim import schedules
from vit import VisionTransformer

CONFIGS = Path(__file__).parent.parent / "configs"
NAMES = ("vits14", "vitb14", "vitl16", "vitl14", "vitg14")
ALL = [name + registers for name in NAMES for registers in ("", "_reg4")]
FAMILY = ["dino_vits16", "dino_vitb16", "ibot_vits16"]  # their numbers: tests/test_family.py


def load(name):
    return config.load(CONFIGS / f"{name}.yaml")


def millions(module):
    return sum(p.numel() for p in module.parameters()) / 1e6


# Backbones as the official code builds them, mask token and LayerScale included, in millions.
# The released ones have positions for 518 px; ours are trained at 224 px, as the official ones were
# before their last stage. ViT-L/14 is trained with SwiGLU; the released one is another, distilled.
@pytest.mark.parametrize(
    ("name", "pixels", "count"),
    [
        ("vits14", 518, 22.057),
        ("vitb14", 518, 86.580),
        ("vitl16", 224, 303.352),
        ("vitl14", 518, 304.795),
        ("vitl14", 224, 303.655),
        ("vitg14", 518, 1136.481),
        ("vitg14", 224, 1134.771),
    ],
)
@pytest.mark.parametrize("registers", [0, 4])
def test_backbones_have_the_published_number_of_parameters(name, pixels, count, registers):
    v = load(name + ("_reg4" if registers else "")).vit
    with torch.device("meta"):
        backbone = VisionTransformer(
            v.size, v.patch, image_size=pixels, registers=v.registers, ffn=v.ffn
        )
    count += registers * backbone.dim / 1e6
    assert millions(backbone) == pytest.approx(count, abs=0.0006)


@pytest.mark.parametrize(
    ("name", "heads"),
    [("vits14", [22.35]), ("vitl16", [23.66]), ("vitl14", [57.55]), ("vitg14", [58.59])],
)
@pytest.mark.parametrize("registers", ["", "_reg4"])
def test_networks_have_the_published_heads(name, heads, registers):
    cfg = load(name + registers)
    with torch.device("meta"):
        network = build_network(cfg, student=True)
    assert millions(network.dino_head) == pytest.approx(heads[0], abs=0.006)
    assert hasattr(network, "ibot_head") == cfg.head.separate


# key                    short        ViT-L long    ViT-g long       (official.md, section 2.1)
OFFICIAL = """
    steps                125000       625000        625000
    batch                2048         3072          3072
    vit.patch            16           14            14
    vit.drop_path        0.3          0.4           0.4
    vit.drop_path_uniform  true       true          true
    vit.layerscale       1.0e-5       1.0e-5        1.0e-5
    vit.ffn              mlp          swiglu        swiglu
    head.prototypes      65536        131072        131072
    head.bottleneck      256          384           384
    head.hidden          2048         2048          2048
    head.layers          3            3             3
    head.separate        false        true          true
    head.ibot_prototypes 0            131072        131072
    head.ibot_bottleneck 0            256           256
    loss.dino            1.0          1.0           1.0
    loss.ibot            1.0          1.0           1.0
    loss.koleo           0.1          0.1           0.1
    loss.centering       softmax      sinkhorn      sinkhorn
    loss.student_temp    0.1          0.1           0.1
    loss.center_momentum 0.9          0.9           0.9
    mask.probability     0.5          0.5           0.5
    mask.ratio           [0.1,0.5]    [0.1,0.5]     [0.1,0.5]
    teacher.momentum     0.992        0.994         0.994
    teacher.momentum_end 1.0          1.0           1.0
    teacher.temp         0.07         0.07          0.07
    teacher.temp_start   0.04         0.04          0.04
    teacher.temp_warmup  37500        37500         37500
    optim.lr             4.0e-3       2.0e-4        2.0e-4
    optim.min_lr         1.0e-6       1.0e-6        1.0e-6
    optim.warmup         12500        100000        100000
    optim.weight_decay   0.04         0.04          0.04
    optim.weight_decay_end  0.4       0.2           0.2
    optim.clip           3.0          3.0           3.0
    optim.layer_decay    0.9          1.0           1.0
    optim.patch_embed_lr 0.2          0.2           0.2
    optim.freeze_last_layer  1250     1250          1250
    optim.betas          [0.9,0.999]  [0.9,0.999]   [0.9,0.999]
    crops.global_size    224          224           224
    crops.global_scale   [0.32,1.0]   [0.32,1.0]    [0.32,1.0]
    crops.local_count    8            8             8
    crops.local_size     96           98            98
    crops.local_scale    [0.05,0.32]  [0.05,0.32]   [0.05,0.32]
    log.knn_every        12500        12500         12500
    log.save_every       3750         3750          3750
"""


@pytest.mark.parametrize(("column", "name"), [(1, "vitl16"), (2, "vitl14"), (3, "vitg14")])
def test_every_constant_is_the_official_one(column, name):
    cfg = load(name)
    for line in OFFICIAL.strip().splitlines():
        row = line.split()
        value, expected = config.lookup(cfg, row[0]), yaml.safe_load(row[column])
        assert (list(value) if isinstance(value, tuple) else value) == expected, row[0]


@pytest.mark.parametrize("name", ["vits14", "vitb14"])
def test_smaller_backbones_have_the_short_set_up(name):
    ours, short = load(name), load("vitl16")
    for key, _ in config.documented():
        if key and key not in ("out", "vit.size", "vit.patch", "crops.local_size", "vit.drop_path"):
            assert config.lookup(ours, key) == config.lookup(short, key), key


@pytest.mark.parametrize("name", NAMES)
def test_with_registers_only_registers_and_positions_differ(name):
    plain, registers = load(name), load(name + "_reg4")
    different = {
        key: config.lookup(registers, key)
        for key, _ in config.documented()
        if key and config.lookup(plain, key) != config.lookup(registers, key)
    }
    assert different == {
        "out": f"runs/{name}_reg4",
        "vit.registers": 4,
        "vit.interpolate_offset": 0.0,
        "vit.interpolate_antialias": True,
    }


# Where a run happens and what it tells is up to whoever runs it; where it begins is not.
OPEN = {"device", "init_from", "data.val", "log.pictures", "log.tensorboard", "log.wandb"}
OPEN |= {"data.max_damaged", "data.max_pixels"}  # which images are refused
OPEN |= {"log.keep_every", "log.knn", "log.knn_images", "data.synthetic_images", "compile"}
# These belong to starting from other weights, and to distill.py.
OPEN |= {"init_heads", "head_steps", "optim.freeze_backbone"}
OPEN |= {f"distill.{key}" for key in ("teacher", "students", "tokens")}
# These are as in DINOv2, except in its ancestors.
ANCESTRAL = {"head.norm_last_layer", "optim.clip_by", "optim.freeze_by"}


@pytest.mark.parametrize("name", ALL + FAMILY)
def test_cards_say_everything(name):
    text = (CONFIGS / f"{name}.yaml").read_text()
    head = text.partition("\n\n")[0]
    for entry in ("what", "source", "hardware", "reaches", "command"):
        assert re.search(rf"^#   {entry} ", head, re.MULTILINE), entry
    assert f"configs/{name}.yaml" in head
    given = yaml.safe_load(text)
    flat = {k for k, v in given.items() if not isinstance(v, dict)}
    flat |= {f"{k}.{name}" for k, v in given.items() if isinstance(v, dict) for name in v}
    keys = {key for key, _ in config.documented() if key} - OPEN
    if name not in FAMILY:
        keys -= ANCESTRAL
    if not given["head"]["separate"]:  # they belong to a separate iBOT head
        keys -= {"head.ibot_prototypes", "head.ibot_bottleneck"}
    assert keys <= flat, keys - flat


@pytest.mark.parametrize("name", ALL + FAMILY)
def test_the_peak_learning_rate_is_the_one_that_the_card_states(name):
    cfg = load(name)
    stated = re.search(r"sqrt\(batch / 1024\) = (\S+)", (CONFIGS / f"{name}.yaml").read_text())
    assert schedules(cfg.optim.warmup, cfg).lr == pytest.approx(float(stated[1]), rel=2e-3)


def test_the_script_for_slurm_starts_train_py_with_the_words_it_is_given():
    script = (CONFIGS.parent / "scripts" / "train.slurm").read_text()
    assert 'train.py "$@"' in script
    assert "torchrun" in script
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in script
