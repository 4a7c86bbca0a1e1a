"""bench/plan.py: what it says of a step is what a real step takes."""

import re
import subprocess
import sys

import pytest
import running
import torch
from running import ROOT

import config
from bench import plan
from bench.count import Counter, Operation

sys.path.insert(0, str(ROOT / "scripts"))
import plan_page


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
        [*launch, "scripts/plan_page.py", str(running.TINY), *words],
        capture_output=True, text=True, cwd=ROOT, check=True,
    )  # fmt: skip
    planned, real = map(int, re.findall(r"planned (\d+), real (\d+)", result.stdout)[0])
    assert planned == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_a_real_process_takes_the_memory_that_was_planned(checkpointing):
    words = [f"data.root={ROOT}", "vit.drop_path=0.3", "batch=64", "head.prototypes=256"]
    cfg = config.load(running.TINY, [*words, f"activation_checkpointing={checkpointing}"])
    cfg.attention = "sdpa"
    real = plan_page.real_peak(cfg, torch.device("cpu"))
    assert plan.plan_step(cfg, 1, "cpu").peak == pytest.approx(real, rel=0.05)


def test_losses_are_planned_in_the_slices_of_the_device(monkeypatch):
    seen = []

    def outline(cfg):
        seen.append(len(plan.losses.a_few_rows(torch.empty(40, 2**16))))
        raise config.UserError("enough")

    monkeypatch.setattr(plan.train, "outline", outline)
    for device in "cuda", "cpu":
        with pytest.raises(config.UserError, match="enough"):
            plan.plan_step(config.load(running.TINY), 1, device)
    assert seen == [1, 3]


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
    # The last feed-forward layer has the rows of the heads only.
    layer, crops = 2 * 8 * D * D, cfg.crops.local_count * B
    teacher -= layer * (2 * B * (tokens(cfg.crops.global_size) - 1) - len(masks))
    dead = 2 * B * (tokens(cfg.crops.global_size) - 1) - len(masks)
    dead += crops * (tokens(cfg.crops.local_size) - 1)
    # Backward costs twice forward, but nothing asks for the gradient of pixels, and fused attention
    # computes its Q K^T once more.
    student = 2 * (large[0] + small[0]) + 3 * (large[1] + small[1] + student_head - dead * layer)
    again = (large[2] + small[2]) / 2
    koleo = 2 * 2 * B * B * D  # neighbours in two views
    assert one.flops == pytest.approx(teacher + student + again + koleo, rel=1e-2)


SLOW = [pytest.param(world, marks=pytest.mark.slow) for world in (2, 64)]


@pytest.mark.parametrize("world", [*SLOW, 1024])
def test_a_rank_of_many_holds_its_share_and_moves_everything(one, world):
    alone = one.stays["student"]
    many = planned(world, "parallel=fsdp", "batch=1024")
    student, gradients, moments, teacher = many.stays.values()
    assert many.parameters == one.parameters
    # Shards are cut along the first dimension: the first rank has whole rows.
    assert alone / world <= student <= alone / world + 200_000
    assert student == gradients == teacher
    assert moments == pytest.approx(2 * student, rel=0.01)
    # Student and teacher are gathered, gradients scattered. Padding to whole rows is added: much
    # with 1,024 ranks, as matrices have 128 rows here.
    padding = 8 if world == 1024 else 1.1
    assert 1 <= many.sent["all-gather"] / (2 * alone) < padding
    assert 1 <= many.sent["reduce-scatter"] / alone < padding


def test_ddp_reduces_every_gradient_once(one):
    two = planned(2, "parallel=ddp")
    assert two.sent["all-gather"] == two.sent["reduce-scatter"] == 0
    assert 1 <= two.sent["all-reduce"] / one.stays["student"] < 1.1


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


# ---- bytes ---------------------------------------------------------------------------------------

X, Y, ROW = torch.ones(6, 8), torch.ones(8, 4), torch.tensor([1, 3])  # 192, 128, 16 bytes


@pytest.mark.parametrize(
    "work, moved, flops",
    [
        (lambda: X.view(8, 6).t()[1:], 0, 0),
        (lambda: X @ Y, 192 + 128 + 96, 2 * 6 * 8 * 4),
        (lambda: X + 1, 2 * 192, 0),
        (lambda: X.add_(1), 2 * 192, 0),
        (lambda: X.zero_(), 192, 0),
        (lambda: X.copy_(X[:1].expand(6, 8)), 192 + 192, 0),  # PyTorch's storage is what is there
        (lambda: torch.empty(100), 0, 0),
        (lambda: torch.zeros(100), 400, 0),
        (lambda: X.bfloat16(), 192 + 96, 0),
        (lambda: torch.cat((X, X)), 4 * 192, 0),
        (lambda: X.index_select(0, ROW), 2 * 64, 0),
        (lambda: X.index_add_(0, ROW, Y.view(4, 8)[:2]), 3 * 64, 0),
        (lambda: X.index_add(0, ROW, X[:2]), 3 * 64 + 2 * 192, 0),
        (lambda: torch._foreach_lerp_([X, Y], [X, Y], 0.5), 3 * (192 + 128), 0),
        (lambda: torch.add(X, X, out=X), 3 * 192, 0),
    ],
)
def test_an_operation_moves_what_its_kernel_reads_and_writes(work, moved, flops):
    with Counter() as counter:
        work()
    assert sum(operation.bytes for operation in counter.operations) == moved
    assert sum(operation.flops for operation in counter.operations) == flops


def test_every_operation_belongs_to_a_part_forward_and_backward():
    made = planned(1, "vit.drop_path=0.5", "loss.centering=sinkhorn", "precision=bf16")
    parts = plan.by_part(made.operations, plan.GPUS["h100"])
    told = {"heads", "attention", "feed-forward", "norms", "residual sums", "tokens"}
    told |= {"gathers", "casts", "losses", "clipping", "optimiser", "EMA", "all"}
    assert parts.keys() == told
    # The matrices of a feed-forward layer are 8 D^2 of the 12 D^2 of a block.
    ratio = parts["attention"][1] / parts["feed-forward"][1]
    assert 0.5 < ratio < 0.6
    assert parts["all"][1] == made.flops


def test_weights_that_are_used_once_move_as_often_as_the_optimiser_says(one):
    moved = plan.by_part(one.operations, plan.GPUS["h100"])
    assert moved["EMA"][0] == 3 * one.stays["student"]
    assert moved["optimiser"][0] == pytest.approx(7 * one.stays["student"], rel=0.01)


def test_a_kernel_waits_for_its_bytes_or_its_products():
    gpu = plan.GPU(
        tflops=1 / plan.RATE_REACHED, memory=1, bandwidth=1 / plan.BANDWIDTH_REACHED, network=1
    )
    assert plan.seconds(Operation("", 10**12, 10**11, True), gpu) == pytest.approx(1)
    assert plan.seconds(Operation("", 10**11, 10**12, True), gpu) == pytest.approx(1)
    assert plan.seconds(Operation("", 10**11, 10**12, False), gpu) == pytest.approx(2)  # fp32


@pytest.mark.slow
def test_a_step_of_vitl_is_as_long_as_was_measured_on_an_h100():
    words = ["batch=64", "parallel=none", f"data.root={ROOT}"]
    cfg = plan.arguments([str(ROOT / "configs" / "vitl16.yaml"), *words])[0]
    least = plan.by_part(plan.plan_step(cfg, 1).operations, plan.GPUS["h100"])["all"][2]
    assert 0.5 < least / 0.285 < 1  # 285 ms, commit 22e8437; less where bytes were taken off


@pytest.mark.slow
def test_the_page_says_what_the_plan_says():
    page = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    for words in plan_page.LARGE:
        assert plan_page.row_of_plan(words) in page
    assert plan_page.table_of_plan(plan_page.SHOWN) in page


# ---- the command ---------------------------------------------------------------------------------


def test_the_command_says_whether_it_fits(capsys):
    plan.main([str(running.TINY), f"data.root={ROOT}", "gpus=2", "gpu=h200", "parallel=fsdp"])
    printed = capsys.readouterr().out
    assert "nano/8, 2 x h200, parallel=fsdp" in printed
    assert "of 141 GiB: fits" in printed and "all-gather" in printed


@pytest.mark.parametrize(
    "words, says",
    [
        (["gpus=none"], "gpus must be a whole number, got none"),
        (["gpus=0"], "gpus=0 must be at least 1"),
        (["gpus"], "write key=value"),
        (["gpu=v100"], "use one of a100, h100, h200, b200, 4090, or add a line to GPUS"),
        (["memory=24"], "unknown key memory"),
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
