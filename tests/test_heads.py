"""The projection head gives the official scores and gradients, under the official names.

Run:  pytest tests/test_heads.py
"""

import math
import pathlib

import numpy as np
import pytest
import torch

from heads import DINOHead

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture
def golden():
    """The stored head with its weights, and all stored arrays."""
    with np.load(GOLDEN / "head.npz", allow_pickle=False) as file:
        z = {k.removeprefix("nlayers3/"): torch.from_numpy(file[k]) for k in file.files}
    state = {k.removeprefix("state/"): v for k, v in z.items() if k.startswith("state/")}
    hidden, dim = state["mlp.0.weight"].shape
    prototypes, bottleneck = state["last_layer.weight_v"].shape
    head = DINOHead(dim, prototypes, hidden, bottleneck)
    head.load_state_dict(state, strict=True)
    return head, z


def test_scores_are_those_of_the_official_head(golden):
    head, z = golden
    torch.testing.assert_close(head(z["input"]), z["output"], atol=5e-6, rtol=0)  # README


def test_gradients_are_those_of_the_official_head(golden):
    head, z = golden
    x = z["input"].clone().requires_grad_()
    (head(x) * z["fixed_random"]).sum().backward()
    grads = {"grad_input": x.grad}
    grads |= {f"grad/{name}": p.grad for name, p in head.named_parameters()}
    assert set(grads) == {k for k in z if k.startswith("grad")}
    for key, got in grads.items():
        error = (got - z[key]).abs().max() / z[key].abs().max()
        assert error < 1e-5, (key, error)  # README: relative to the largest entry


def test_scores_are_the_cosine_with_each_prototype_times_its_gain(golden):
    head, z = golden
    x = head.mlp(z["input"].double().float())
    v, g = head.last_layer.weight_v, head.last_layer.weight_g
    cosine = torch.nn.functional.cosine_similarity(x[:, None], v[None], dim=-1)
    torch.testing.assert_close(head(z["input"]), cosine * g.T, atol=5e-6, rtol=0)


def test_tokens_of_any_shape_are_scored_one_by_one(golden):
    head, z = golden
    x = z["input"][:8]
    torch.testing.assert_close(head(x.view(2, 4, -1)).flatten(0, 1), head(x), atol=1e-6, rtol=0)
    assert head(x[:0]).shape == (0, len(head.last_layer.weight_g))  # no masked patch at all


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_a_head_of_any_depth_has_the_official_names(layers):
    head = DINOHead(12, 30, hidden=16, bottleneck=8, layers=layers)
    names = {f"mlp.{2 * i}.{kind}" for i in range(layers) for kind in ("weight", "bias")}
    assert set(head.state_dict()) == names | {"last_layer.weight_g", "last_layer.weight_v"}
    assert head.last_layer.weight_g.shape == (30, 1) and head.last_layer.weight_v.shape == (30, 8)
    assert head(torch.randn(5, 12)).shape == (5, 30)


def test_the_published_head_sizes_are_met():
    for dim, prototypes, bottleneck, millions in (
        (1024, 65536, 256, "23.66"),
        (1024, 131072, 384, "57.55"),
        (1536, 131072, 384, "58.59"),
        (384, 65536, 256, "22.35"),
    ):
        with torch.device("meta"):
            head = DINOHead(dim, prototypes, bottleneck=bottleneck)
        assert f"{sum(p.numel() for p in head.parameters()) / 1e6:.2f}" == millions


def test_initial_values_are_the_official_distributions():
    p = dict(DINOHead(64, 1000, hidden=512, bottleneck=256).named_parameters())
    assert (p["last_layer.weight_g"] == 1).all()
    assert 0.0624 < p["last_layer.weight_v"].abs().max() <= 1 / math.sqrt(256)
    for i in (0, 2, 4):
        # standard error of the standard deviation: 0.02 / sqrt(2 * 32,768) = 0.4 %
        assert p[f"mlp.{i}.weight"].std().item() == pytest.approx(0.02, rel=0.016)
        assert not p[f"mlp.{i}.bias"].any()


def test_every_parameter_is_trained_the_gain_too(golden):
    head, _ = golden
    assert all(p.requires_grad for p in head.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_head_is_finite_in_half_precision_even_for_zeros(golden, dtype):
    head, z = golden
    with torch.no_grad():
        for p in head.mlp.parameters():
            p.mul_(0)
    assert head(z["input"].to(dtype)).isfinite().all()
