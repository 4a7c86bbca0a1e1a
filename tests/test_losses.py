"""Targets and losses are the official ones, and also what their equations say.

Each function is compared with numbers of the official code (tests/golden), with a slow, plain
transcription of its equation in float64, and with properties that must hold for any input.

Run:  pytest tests/test_losses.py
"""

import math
import pathlib

import numpy as np
import pytest
import torch
import torch._dynamo

import losses
from losses import SoftmaxCentering, dino_loss, exponentials, ibot_loss, koleo_loss, sinkhorn_knopp

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def z():
    with np.load(GOLDEN / "losses.npz", allow_pickle=False) as file:
        return {k: torch.from_numpy(file[k]) for k in file.files}


def close(got, expected, tolerance):
    torch.testing.assert_close(got, expected.to(got.dtype), atol=tolerance, rtol=0)


def relative(got, expected):
    """Largest difference, relative to the largest entry (the README's "rel")."""
    return ((got - expected).abs().max() / expected.abs().max()).item()


# ---- Sinkhorn-Knopp -----------------------------------------------------------------------------


def textbook_sinkhorn(score_NK, temp, iterations=3):
    """Prototypes to equal sums, rows to equal sums, in turns; on logarithms in float64."""
    log_NK = score_NK.double() / temp
    log_NK = log_NK - log_NK.flatten().logsumexp(0)
    N, K = log_NK.shape
    for _ in range(iterations):
        log_NK = log_NK - log_NK.logsumexp(0, keepdim=True) - math.log(K)
        log_NK = log_NK - log_NK.logsumexp(1, keepdim=True) - math.log(N)
    return (log_NK + math.log(N)).exp()


@pytest.mark.parametrize("i", [0, 1])
@pytest.mark.parametrize("kind", ["dino", "ibot"])
def test_sinkhorn_gives_the_official_targets(z, kind, i):
    got = sinkhorn_knopp(z[f"sinkhorn_{kind}/logits"], z[f"sinkhorn_{kind}/temp{i}"].item())
    close(got, z[f"sinkhorn_{kind}/probs_temp{i}"], 1e-6)  # README; probabilities up to 1


@pytest.mark.parametrize("n", [1, 5])
def test_sinkhorn_gives_the_official_targets_for_other_numbers_of_iterations(z, n):
    got = sinkhorn_knopp(z["sinkhorn_dino/logits"], z["sinkhorn_dino/temp0"].item(), n)
    close(got, z[f"sinkhorn_dino/probs_temp0_niter{n}"], 1e-6)


@pytest.mark.parametrize("i, temp", [(0, 0.04), (1, 0.07)])
@pytest.mark.parametrize("kind", ["dino", "ibot"])
def test_sinkhorn_is_exact_where_exp_almost_overflows(z, kind, i, temp):
    key = f"sinkhorn_{kind}_extreme"
    got = sinkhorn_knopp(z[f"{key}/logits_temp{i}"], temp)
    close(got, z[f"{key}/probs_temp{i}"], 1e-6)
    close(got, z[f"{key}/probs_temp{i}_exact"], 1e-6)


@pytest.mark.parametrize("shift", [0.0, 100.0, -100.0])
@pytest.mark.parametrize("spread", [0.01, 0.3, 1.0, 2.0, 3.0])
def test_sinkhorn_matches_the_textbook_in_float64(spread, shift):
    # score / temp spans up to +-200 here, and with the shift 2,500: exp() of that is infinite.
    score, temp = torch.randn(20, 15) * spread + shift, 0.04
    rounding = 1.2e-7 * score.abs().max().item() / temp  # of score / temp in fp32
    close(sinkhorn_knopp(score, temp), textbook_sinkhorn(score, temp), 1e-6 + rounding)


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_sinkhorn_rows_sum_to_one(iterations):
    rows = sinkhorn_knopp(torch.randn(30, 12), 0.05, iterations).sum(dim=1)
    close(rows, torch.ones(30), 1e-5)  # 12 fp32 products each


def test_sinkhorn_uses_every_prototype_equally_often():
    score = torch.randn(30, 12) + torch.linspace(-2, 2, 12)  # some are much more popular
    usage = sinkhorn_knopp(score, 0.5, iterations=100).sum(dim=0)
    close(usage, torch.full((12,), 30 / 12), 1e-4)  # converged
    before = (score / 0.5).softmax(dim=1).sum(dim=0)
    three = sinkhorn_knopp(score, 0.5).sum(dim=0)
    assert (three - 2.5).abs().max() < 0.1 * (before - 2.5).abs().max()


@pytest.mark.parametrize("spread", [10.0, 1e2, 1e3, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sinkhorn_stays_a_distribution_for_huge_spreads_of_scores(spread, dtype):
    score = (torch.randn(40, 25).clamp(-3, 3) * spread).to(dtype)
    target = sinkhorn_knopp(score, 0.04)
    assert target.dtype == torch.float32 and target.isfinite().all() and (target >= 0).all()
    close(target.sum(dim=1), torch.ones(40), 1e-4)


def test_sinkhorn_stays_a_distribution_when_rows_or_prototypes_are_far_apart():
    score = torch.randn(20, 10)
    for offset in (torch.linspace(0, 500, 20)[:, None], torch.linspace(0, 500, 10)):
        target = sinkhorn_knopp(score + offset, 0.04)
        close(target.sum(dim=1), torch.ones(20), 1e-4)


@pytest.mark.parametrize("spread", [0.3, 3.0, 30.0])
def test_what_is_taken_from_rows_before_sinkhorn_comes_back_as_their_factors(spread):
    score, temp = torch.randn(20, 15) * spread, 0.05
    Q, row = exponentials(score, temp)
    rounding = 1e-6 + 1.2e-7 * score.abs().max().item() / temp  # of score / temp in fp32
    exact = (score.double() - score.double().amax(dim=0)).div(temp).exp()
    close(row.unsqueeze(1) * Q, exact, rounding)
    assert (Q.amax(dim=1) == 1).all()
    close((row.unsqueeze(1) * Q).amax(dim=0), torch.ones(15), rounding)


def test_sinkhorn_of_one_row_and_of_no_rows_is_defined():
    close(sinkhorn_knopp(torch.randn(1, 8), 0.05).sum(), torch.tensor(1.0), 1e-6)
    assert sinkhorn_knopp(torch.randn(0, 8), 0.05).shape == (0, 8)  # no masked patch in a batch


def test_sinkhorn_leaves_the_scores_alone():
    score = torch.randn(6, 5)
    copy = score.clone()
    sinkhorn_knopp(score, 1.0)  # at temperature 1 the division need not make a copy
    assert torch.equal(score, copy)


# ---- centering ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dino", "ibot"])
def test_centering_gives_the_official_targets_and_centres(z, kind):
    key = f"centering_{kind}"
    centering = SoftmaxCentering(z[f"{key}/center_after_all"].shape[-1])
    for i in range(3):
        close(centering.center, z[f"{key}/step{i}/center_used"].view(1, -1), 1e-7)  # README
        score = z[f"{key}/step{i}/teacher_logits"].flatten(0, -2)
        probs = centering(score, z[f"{key}/step{i}/temp"].item())
        close(probs, z[f"{key}/step{i}/probs"].view_as(score), 2e-6)
    close(centering.center, z[f"{key}/center_after_all"].view(1, -1), 1e-7)


def test_the_centre_is_saved_and_uses_only_the_steps_before():
    centering = SoftmaxCentering(4)
    score = torch.randn(6, 4)
    close(centering(score, 0.1), (score / 0.1).softmax(dim=1), 1e-6)  # the first centre is 0
    close(centering.state_dict()["center"], 0.1 * score.mean(dim=0, keepdim=True), 1e-7)


def test_a_batch_without_rows_leaves_the_centre_as_it_is():
    centering = SoftmaxCentering(4)
    centering(torch.randn(6, 4), 0.1)
    before = centering.center.clone()
    assert centering(torch.randn(0, 4), 0.1).shape == (0, 4)
    assert torch.equal(centering.center, before)


# ---- DINO ---------------------------------------------------------------------------------------


def golden_dino(z, suffix=""):
    """The stored case as (student scores of all crops, targets in the order of the crops).

    The official code swaps the teacher's crops beforehand and then compares like with like; our
    targets are in the student's order, so the stored ones are swapped back.
    """
    large = z["dino_loss/student_global_logits"].unflatten(0, (2, -1))
    n = z["dino_loss/n_local_crops"].item()
    small = z[f"dino_loss/student_local_logits{suffix}"].unflatten(0, (n, -1))
    score = torch.cat((large, small)).requires_grad_()
    return score, z["dino_loss/teacher_probs"].flip(0), n


@pytest.mark.parametrize("suffix", ["", "_large"])
def test_dino_loss_of_small_crops_is_the_official_one(z, suffix):
    score, target, n = golden_dino(z, suffix)
    small, _ = dino_loss(score, target)
    pairs = 2 + 2 * n  # the stored loss is the sum over pairs, before weighting
    assert relative(small * pairs, z[f"dino_loss/local_loss{suffix}"]) < 1e-6
    (small * pairs).backward()
    assert relative(score.grad[2:].flatten(0, 1), z[f"dino_loss/grad_local{suffix}"]) < 1e-5
    assert not score.grad[:2].any()


def test_dino_loss_of_large_crops_is_the_official_one(z):
    score, target, n = golden_dino(z)
    _, large = dino_loss(score, target)
    weight = 2 / (2 + 2 * n)  # the stored loss is the mean over both pairs
    assert relative(large / weight, z["dino_loss/global_loss"]) < 1e-6
    (large / weight).backward()
    assert relative(score.grad[:2].flatten(0, 1), z["dino_loss/grad_global"]) < 1e-5
    assert not score.grad[2:].any()


def cross_entropy(score_K, target_K, temp):
    return -(target_K * (score_K / temp).log_softmax(dim=0)).sum()


@pytest.mark.parametrize("S, T", [(2, 2), (5, 2), (6, 3), (3, 1)])
def test_dino_loss_is_the_mean_over_all_crop_pairs_but_a_crop_with_itself(S, T):
    B, K = 3, 7
    score = torch.randn(S, B, K, dtype=torch.float64)
    target = torch.randn(T, B, K, dtype=torch.float64).softmax(dim=-1)
    pairs = [(s, t) for s in range(S) for t in range(T) if s != t]
    sums = {True: 0.0, False: 0.0}  # is it one of the teacher's crops?
    for s, t in pairs:
        for b in range(B):
            term = cross_entropy(score[s, b], target[t, b], 0.1)
            sums[s < T] += term / (B * len(pairs))
    small, large = dino_loss(score.float(), target.float())
    close(small, torch.as_tensor(sums[False]), 2e-5)  # fp32, values up to 20
    close(large, torch.as_tensor(sums[True]), 2e-5)


def test_gradients_of_dino_loss_are_those_of_the_plain_formula():
    score = torch.randn(4, 3, 6, requires_grad=True)
    target = torch.randn(2, 3, 6).softmax(dim=-1)
    sum(dino_loss(score, target)).backward()
    slow = score.detach().clone().requires_grad_()
    terms = [
        cross_entropy(slow[s, b], target[t, b], 0.1)
        for s in range(4) for t in range(2) if s != t for b in range(3)
    ]  # fmt: skip
    torch.stack(terms).mean().backward()
    assert relative(score.grad, slow.grad) < 1e-5  # fp32, other order of sums


def test_an_untrained_network_has_the_loss_ln_k():
    K = 50
    uniform = torch.full((2, 3, K), 1 / K)
    small, large = dino_loss(torch.zeros(10, 3, K), uniform)
    assert small + large == pytest.approx(math.log(K), rel=1e-6)
    assert large == pytest.approx(math.log(K) * 2 / 18, rel=1e-6)  # 2 of 18 pairs
    weight = torch.full((8,), 1 / 4)  # 2 of 4 crops masked, 4 patches each
    assert ibot_loss(torch.zeros(8, K), uniform[0, :1].expand(8, K), weight, 4) == pytest.approx(
        math.log(K) / 2, rel=1e-6
    )


# ---- iBOT ---------------------------------------------------------------------------------------


def test_ibot_loss_is_the_official_one(z):
    score = z["ibot_loss/student_logits"].clone().requires_grad_()
    crops = len(z["ibot_loss/masks"])
    loss = ibot_loss(score, z["ibot_loss/teacher_probs"], z["ibot_loss/masks_weight"], crops)
    assert relative(loss, z["ibot_loss/loss"]) < 1e-6
    loss.backward()
    assert relative(score.grad, z["ibot_loss/grad"]) < 1e-5


def test_ibot_loss_gives_every_masked_crop_one_vote():
    counts, K, crops = [1, 4, 7], 6, 6  # three of six crops are masked
    score, target = torch.randn(12, K), torch.randn(12, K).softmax(dim=-1)
    weight = torch.cat([torch.full((n,), 1 / n) for n in counts])
    expected = 0.0
    for s, t in zip(score.split(counts), target.split(counts), strict=True):
        terms = [cross_entropy(a, b, 0.1) for a, b in zip(s.double(), t.double(), strict=True)]
        expected += sum(terms) / len(terms) / crops
    close(ibot_loss(score, target, weight, crops), expected, 1e-5)  # fp32, values up to 10


def test_ibot_loss_of_no_patches_is_zero_and_can_be_differentiated():
    score = torch.randn(0, 6, requires_grad=True)
    loss = ibot_loss(score, torch.zeros(0, 6), torch.zeros(0), 4)
    loss.backward()
    assert loss == 0 and score.grad.shape == (0, 6)


def test_the_cross_entropy_in_slices_is_that_in_one_piece():
    rows, K = 200, 2**16  # 4 rows make a slice
    score = torch.randn(rows, K, requires_grad=True)
    target, weight = torch.rand(rows, K) / K, torch.rand(rows)
    loss = ibot_loss(score, target, weight, 10)
    loss.backward()
    some = torch.tensor([0, 3, 4, 130, 199])  # on both sides of the borders
    slow = score.detach()[some].double().requires_grad_()
    terms = -(target[some] * (slow / 0.1).log_softmax(dim=1)).sum(dim=1) * weight[some] / 10
    terms.sum().backward()
    assert relative(score.grad[some], slow.grad) < 1e-5  # fp32 softmax over 65,536 entries
    whole = (score.detach() / 0.1).logsumexp(1) * target.sum(1) - (score * target).sum(1) / 0.1
    assert relative(loss, (whole * weight).sum() / 10) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_of_the_targets_holds_the_same_gradient(dtype):
    score = torch.randn(9, 2**16).to(dtype).requires_grad_()
    target, weight = torch.randn(9, 2**16).softmax(dim=1), torch.rand(9)
    loss = ibot_loss(score, target, weight, 4)
    (grad,) = torch.autograd.grad(loss, score)
    kept = target.clone()
    again = ibot_loss(score, target, weight, 4, overwrite=True)
    assert not torch.equal(target, kept)  # the gradient is there
    assert torch.equal(again, loss)
    (same,) = torch.autograd.grad(again, score)
    assert same.dtype == dtype
    # The targets are fp32, so their memory rounds to bf16 once instead of twice.
    assert relative(same, grad) < (1e-7 if dtype == torch.float32 else 2**-7)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_half_precision_scores_survive_with_loss_scaling(dtype, overwrite):
    K, crops, scale = 65536, 128, 65536.0  # the released recipe; where torch's GradScaler starts
    score = torch.randn(4, K).to(dtype).requires_grad_()
    target, weight = torch.randn(4, K).softmax(dim=1), torch.full((4,), 1 / 98)
    # In fp32 a gradient of 1e-8, times 65,536. Rounded to fp16 before that, it would be 0.
    exact = ((score.detach().double() / 0.1).softmax(dim=1) - target) / 0.1 / 98 / crops * scale
    (ibot_loss(score, target, weight, crops, overwrite=overwrite) * scale).backward()
    error = (score.grad - exact).norm() / exact.norm()
    assert error < 0.01  # a number of 8 bits is 0.2 % off


def test_losses_compile_without_breaks_and_not_anew_for_each_batch_and_temperature(monkeypatch):
    torch._dynamo.reset(), torch._dynamo.utils.counters.clear()
    plain = {}
    for compiled in (False, True):
        for name in ("cross_entropies", "exponentials_of_rows") if compiled else ():
            function = getattr(losses, name).__wrapped__
            compiled_one = torch.compile(function, dynamic=True, backend="aot_eager")
            monkeypatch.setattr(losses, name, compiled_one)
        g = torch.Generator().manual_seed(0)
        for rows, temp in [(7, 0.04), (9, 0.05), (12, 0.06)]:
            score = torch.randn(rows, 40, generator=g).bfloat16().requires_grad_()
            target = sinkhorn_knopp(score.detach(), temp)
            loss = ibot_loss(score, target.clone(), torch.ones(rows), 4, overwrite=True)
            found = target, loss, torch.autograd.grad(loss, score)[0]
            for got, expected in zip(found, plain.setdefault(rows, found), strict=True):
                close(got, expected, 1e-6)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 2


# ---- KoLeo --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case, tolerance", [
    ("random", 1e-5), ("spread_scale", 1e-5), ("close_pair", 1e-3), ("duplicate", 1e-3),
])  # fmt: skip
def test_koleo_loss_is_the_official_one(z, case, tolerance):
    x = z[f"koleo/{case}/features"].clone().requires_grad_()
    loss = koleo_loss(x)
    assert relative(loss, z[f"koleo/{case}/loss"]) < tolerance  # README
    loss.backward()
    assert relative(x.grad, z[f"koleo/{case}/grad"]) < tolerance


def test_koleo_loss_is_minus_the_mean_log_distance_to_the_nearest_neighbour():
    x = torch.randn(9, 5)
    unit = [row / row.norm() for row in x.double()]
    nearest = [min((a - b).norm() for b in unit if b is not a) for a in unit]
    close(koleo_loss(x), -torch.stack(nearest).log().mean(), 1e-5)


def test_koleo_pushes_a_close_pair_apart():
    x = torch.nn.functional.normalize(torch.randn(6, 8), dim=1)
    x[1] = x[0] + 0.01 * torch.randn(8)
    x.requires_grad_()
    koleo_loss(x).backward()
    moved = (x - 1e-3 * x.grad).detach()
    assert (moved[0] - moved[1]).norm() > (x[0] - x[1]).norm()


@pytest.mark.parametrize("zeros", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_koleo_and_its_gradient_are_finite_for_duplicates_and_zeros(dtype, zeros):
    if dtype == torch.float16 and zeros:
        pytest.skip("the slope at 0 is 1e8, and fp16 ends at 65,504; LayerNorm gives no zeros")
    x = torch.randn(6, 16).to(dtype)
    x[1], x[6 - zeros :] = x[0], 0  # official, in fp16: infinity
    x.requires_grad_()
    loss = koleo_loss(x)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert x.grad.isfinite().all()


def test_koleo_is_finite_for_a_batch_of_one():
    x = torch.randn(1, 16, requires_grad=True)
    loss = koleo_loss(x)
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()


def test_koleo_does_not_depend_on_the_length_of_the_features():
    x = torch.randn(7, 12)
    close(koleo_loss(x * torch.rand(7, 1) * 100 + 0), koleo_loss(x), 1e-5)


def test_a_few_rows_at_a_time_give_what_all_rows_give(monkeypatch):
    score, target = torch.randn(11, 7, requires_grad=True), torch.rand(11, 7)
    weight = torch.rand(11)

    def everything():
        loss = ibot_loss(score, target, weight, 2)
        return sinkhorn_knopp(score, 0.1), loss, torch.autograd.grad(loss, score)[0]

    whole = everything()
    monkeypatch.setattr(
        losses, "a_few_rows", lambda x: [slice(i, i + 3) for i in range(0, len(x), 3)]
    )
    for part, expected in zip(everything(), whole, strict=True):
        close(part, expected, 1e-6)
    assert len(losses.sinkhorn_knopp(torch.randn(0, 7), 0.1)) == 0
