"""bench/plan.py: what it says of a step is what a real step takes."""

import re
import subprocess
import sys

import pytest
import running
from running import ROOT

import config
from bench import plan


def planned(world=1, *words):
    cfg = config.load(running.TINY, [f"data.root={ROOT}", "vit.drop_path=0", *words])
    cfg.attention = "sdpa"
    return plan.plan_step(cfg, world)


@pytest.fixture(scope="module")
def one():
    return planned()


# ---- against a real step -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_real_ranks_take_the_memory_that_was_planned(mode):
    words = [f"data.root={ROOT}", f"parallel={mode}", "batch=128", "vit.drop_path=0.2"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    result = subprocess.run(
        [*launch, "bench/plan.py", str(running.TINY), *words],
        capture_output=True, text=True, cwd=ROOT, check=True,
    )  # fmt: skip
    error = re.search(r"for real .*the plan says ([+-][\d.]+)%", result.stdout)
    assert abs(float(error[1])) < 10, result.stdout


def test_a_real_process_takes_the_memory_that_was_planned(one):
    cfg = config.load(running.TINY, [f"data.root={ROOT}", "vit.drop_path=0"])
    cfg.attention = "sdpa"
    real = plan.real_peak(cfg, plan.torch.device("cpu"))
    assert one.peak == pytest.approx(real, rel=0.1)


# ---- against arithmetic --------------------------------------------------------------------------


def test_flops_are_those_of_a_count_by_hand(one):
    cfg = config.load(running.TINY, [f"data.root={ROOT}"])
    B, D, depth, p = cfg.batch, 128, 6, cfg.vit.patch
    hidden, b, K = cfg.head.hidden, cfg.head.bottleneck, cfg.head.prototypes

    def tokens(size):
        return (size // p) ** 2 + 1 + cfg.vit.registers

    def backbone(crops, size):
        """(patch embedding, all the rest) of one pass."""
        T = tokens(size)
        linear = 2 * T * 12 * D * D  # qkv 3, proj 1, mlp 4 + 4
        attention = 2 * 2 * T * T * D
        patches = 2 * (size // p) ** 2 * 3 * p * p * D
        return crops * patches, crops * depth * (linear + attention), crops * depth * attention

    def head(rows):
        return 2 * rows * (D * hidden + hidden * hidden + hidden * b + b * K)

    large = backbone(2 * B, cfg.crops.global_size)
    small = backbone(cfg.crops.local_count * B, cfg.crops.local_size)
    masks = plan.empty_parts(cfg, B)[0].mask_indices
    teacher = large[0] + large[1] + head(2 * B + len(masks))
    student_head = head((2 + cfg.crops.local_count) * B + len(masks))
    # Backward costs twice forward, but nothing asks for the gradient of pixels, and fused attention
    # computes its Q K^T once more.
    student = 2 * (large[0] + small[0]) + 3 * (large[1] + small[1] + student_head)
    again = (large[2] + small[2]) / 2
    koleo = 2 * 2 * B * B * D  # neighbours in two views
    assert one.flops == pytest.approx(teacher + student + again + koleo, rel=1e-2)


SLOW = [pytest.param(world, marks=pytest.mark.slow) for world in (2, 64)]


@pytest.mark.parametrize("world", [*SLOW, 1024])
def test_a_rank_of_many_holds_its_share_and_moves_everything(one, world):
    many = planned(world, "parallel=fsdp", "batch=1024")
    assert many.parameters == one.parameters and many.images == 1024 // world
    # Shards are cut along the first dimension: the first rank has whole rows.
    assert one.student / world <= many.student <= one.student / world + 200_000
    assert many.student == many.gradients == many.teacher
    assert many.moments == pytest.approx(2 * many.student, rel=0.01)
    # Student and teacher are gathered, gradients scattered. Padding to whole rows is added: much
    # with 1,024 ranks, as matrices have 128 rows here.
    padding = 8 if world == 1024 else 1.1
    assert 1 <= many.moved["all-gather"] / (2 * one.student) < padding
    assert 1 <= many.moved["reduce-scatter"] / one.student < padding


def test_ddp_reduces_every_gradient_once(one):
    two = planned(2, "parallel=ddp")
    assert two.moved["all-gather"] == two.moved["reduce-scatter"] == 0
    assert one.student <= two.moved["all-reduce"] < 1.1 * one.student


def test_stochastic_depth_saves_the_share_it_drops():
    least = ["mask.probability=0", "head.hidden=8", "head.prototypes=8", "batch=20"]
    whole, dropped = planned(1, *least), planned(1, *least, "vit.drop_path=0.5")
    teacher = 1 / 4  # its forward pass is whole, and the large crops are most of the work
    assert 0.5 < dropped.flops / whole.flops < 0.5 + teacher


@pytest.mark.slow
def test_recomputing_activations_saves_memory_and_costs_arithmetic():
    words = ["batch=64", "head.hidden=8", "head.prototypes=8"]
    none, selective, full = (
        planned(1, *words, f"activation_checkpointing={mode}")
        for mode in ("none", "selective", "full")
    )
    assert full.peak < selective.peak < none.peak
    assert none.flops <= selective.flops < full.flops < 1.5 * none.flops


@pytest.mark.slow
def test_micro_batches_need_less_memory_and_the_same_arithmetic():
    whole, parts = planned(1, "batch=64"), planned(1, "batch=64", "accumulate=4")
    assert parts.peak < 0.6 * whole.peak
    assert parts.flops == pytest.approx(whole.flops, rel=0.02)


# ---- the command ---------------------------------------------------------------------------------


def test_the_command_says_whether_it_fits(capsys):
    plan.main([str(running.TINY), f"data.root={ROOT}", "gpus=2", "gpu=h200", "parallel=fsdp"])
    printed = capsys.readouterr().out
    assert "nano/8, 2 x h200, parallel=fsdp" in printed
    assert "of 141 GB: fits" in printed and "all-gather" in printed


@pytest.mark.parametrize(
    "words, says",
    [
        (["gpus=none"], "gpus must be a whole number, got none"),
        (["mfu=-1"], "mfu=-1.0 must be above 0"),
        (["mfu=45"], "45 % is mfu=0.45"),
        (["gpus"], "write key=value"),
        (["gpu=b200"], "use one of a100, h100, h200"),
        (["gpus=3", "parallel=fsdp"], "does not divide into 3 processes"),
        (["gpus=2"], "use parallel=ddp or parallel=fsdp"),
        (["batches=2"], "unknown key batches"),
    ],
)
def test_what_cannot_work_is_one_line(capsys, words, says):
    with pytest.raises(SystemExit) as end:
        plan.main([str(running.TINY), f"data.root={ROOT}", *words])
    error = capsys.readouterr().err
    assert end.value.code == 2 and says in error and error.count("\n") == 1
