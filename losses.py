"""What DINOv2 optimises, as functions: teacher targets (Sinkhorn, centering), DINO, iBOT, KoLeo.

The teacher's scores become target probabilities; the student's softmax is pulled towards them by
cross-entropy, for whole images (DINO) and for hidden patches (iBOT); KoLeo spreads the images out.
(Oquab et al. 2023, section 4.)

Probabilities and losses are fp32 whatever the precision of the scores. Differs from the official
code, whose student log-softmax is rounded to fp16 (largest error 0.014 at K = 65,536).

Shapes:  K prototypes   N rows of scores   B images   T crops of the teacher (2)
         S crops of the student (the T of the teacher first, then the small ones)
         M masked patches of the batch   D channels
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn

from parallel import gather_from_ranks, max_over_ranks, sum_over_ranks


def one_pass(function):
    """Compile a function if its first tensor is on a GPU: few passes over memory for many lines.

    Numbers that change from step to step must be tensors, or each would be compiled anew. Only
    sizes that do change become variables of the kernels (the rows): with a fixed K they read more
    than one number at a time.
    """
    compiled = functools.cache(lambda: torch.compile(function))

    @functools.wraps(function)
    def call(x, *others):
        return (compiled() if x.is_cuda else function)(x, *others)

    return call


@torch.no_grad()
def sinkhorn_knopp(score_NK, temp, iterations=3):
    """Teacher targets: every image one unit of probability, every prototype the same total.

    Q = exp(score / temp), then `iterations` times
        scale each column such that sum_n Q_nk = N / K   (prototypes are used equally often)
        scale each row such that    sum_k Q_nk = 1       (each row is a distribution)
    Section 4, "Sinkhorn-Knopp centering"; Caron et al. 2020 (SwAV), section 3.1.

    Returns (N, K) fp32. Rows belong to one process, columns span them all, and so does N.
    """
    N = sum_over_ranks(torch.full((), float(len(score_NK)), device=score_NK.device))
    K, (Q_NK, row_N) = score_NK.shape[1], exponentials(score_NK, temp)
    # A step changes one factor of every column or row; Q is written when the last ones are known.
    for _ in range(iterations):
        column_K = N / (K * sum_over_ranks(torch.mv(Q_NK.T, row_N)))  # mv is fp32, mm may be TF32
        row_N = 1 / (Q_NK @ column_K)
    return Q_NK.mul_(column_K).mul_(row_N.unsqueeze(1))


def exponentials(score_NK, temp):
    """(Q_NK, row_N): row_n * Q_nk is exp(score_nk / temp), but for a factor of each column.

    The gains of the prototypes are trainable, so this exp could overflow fp32, or be 0 in all of a
    row or column. Columns may lose their maximum, because to be scaled is the first thing that
    happens to them. What a row loses must come back as its factor: scaled rows would be another
    start, and three alternations do not forget it (targets change by up to 0.2). So every row of Q
    has a 1, and every column has one where the row's factor is 1: no sum over it is 0 or infinite.
    """
    top_K = score_NK.new_full(score_NK.shape[1:], -torch.inf)
    for rows in a_few_rows(score_NK):
        top_K = torch.maximum(top_K, score_NK[rows].amax(dim=0))
    scale = torch.full((), 1 / temp, device=score_NK.device)
    top_K = max_over_ranks(top_K.float() * scale)
    Q_NK = torch.empty_like(score_NK, dtype=torch.float32)
    row_N = Q_NK.new_empty(len(Q_NK))
    for rows in a_few_rows(score_NK):
        row_N[rows] = exponentials_of_rows(score_NK[rows], scale, top_K, Q_NK[rows])
    return Q_NK, row_N


@one_pass
def exponentials_of_rows(score_NK, scale, top_K, Q_NK):
    """Fill a part of Q; its factors row_N."""
    torch.addcmul(-top_K, score_NK, scale, out=Q_NK)  # one pass on a CPU too
    top_N = Q_NK.amax(dim=1)
    Q_NK.sub_(top_N.unsqueeze(1)).exp_()
    return top_N.exp()


SLICE = {"cpu": 2**20, "cuda": 2**26}  # numbers


def a_few_rows(x_NK):
    """Slices of the rows of a large tensor, for intermediate results that are smaller than it.

    On a CPU what its caches hold, as memory is slower than arithmetic; on a GPU a quarter gigabyte.
    """
    step = max(1, SLICE.get(x_NK.device.type, SLICE["cuda"]) // x_NK.shape[1])
    return [slice(first, first + step) for first in range(0, len(x_NK), step)]


class SoftmaxCentering(nn.Module):
    """Teacher targets as in DINO: softmax((score - center) / temp), center a moving mean of scores.

        center <- momentum * center + (1 - momentum) * mean of the batch over all processes

    The centre used in a step knows the batches before it only. Centering alone pushes towards the
    uniform distribution, a low temperature towards one prototype; together they avoid both
    collapses. DINO 2021, section 3.1 "Avoiding collapse".

    Differs from the official code for iBOT on several processes: it averages the means of the
    processes, we average all masked patches, so that the number of processes does not matter.
    """

    def __init__(self, prototypes, momentum=0.9):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(1, prototypes))

    @torch.no_grad()
    def forward(self, score_NK, temp):
        score_NK = score_NK.float()
        target_NK = ((score_NK - self.center) / temp).softmax(dim=1)
        count = sum_over_ranks(torch.full((), float(len(score_NK)), device=score_NK.device))
        mean_K = sum_over_ranks(score_NK.sum(dim=0)) / count.clamp(min=1)
        # A batch without a masked patch says nothing about the centre.
        self.center.lerp_(mean_K, (1 - self.momentum) * (count > 0))
        return target_NK


class CrossEntropy(torch.autograd.Function):
    """sum_n weight_n * -sum_k target_nk log softmax(score_n / temp)_k, with little memory.

    With K = 65,536 a softmax of all masked patches is a gigabyte. The loss is linear in the
    log-probabilities,
        - sum_k t_k (s_k - logsumexp(s)) = sum(t) * logsumexp(s) - t . s        (s = score / temp)
    and its gradient is weight * (sum(t) * softmax(s) - t) / temp. Both are computed a few rows at a
    time in the forward pass; only the bracket is kept: in the precision of the scores, or in the
    memory of the targets if these may be overwritten.
    """

    @staticmethod
    def forward(ctx, score_NK, target_NK, weight_N, temp, overwrite=False):
        loss, grad_NK = weight_N.new_zeros(()), None
        if ctx.needs_input_grad[0]:
            grad_NK = target_NK if overwrite else torch.empty_like(score_NK)
        for rows in a_few_rows(score_NK):
            t = target_NK[rows]
            grad = t if grad_NK is target_NK else None if grad_NK is None else grad_NK[rows]
            loss += weight_N[rows] @ cross_entropies(score_NK[rows], t, 1 / temp, grad)
        ctx.save_for_backward(grad_NK, weight_N)
        ctx.temp = temp
        return loss

    @staticmethod
    def backward(ctx, grad):
        # The weights (1e-5 and less) join here, with the loss scale: alone they vanish in fp16.
        # In place, one rounding; a second backward through the same graph is an error.
        grad_NK, weight_N = ctx.saved_tensors
        return grad_NK.mul_((weight_N * (grad / ctx.temp)).unsqueeze(1)), None, None, None, None


@one_pass
def cross_entropies(score_NK, target_NK, scale, grad_NK):
    """The bracket of CrossEntropy and, written to grad_NK if that is a tensor, its gradient."""
    top_N1 = score_NK.amax(dim=1, keepdim=True).float()  # only for the rounding
    s_NK = torch.add(top_N1 * -scale, score_NK, alpha=scale)
    mass_N, dot_N = target_NK.sum(dim=1), (target_NK * s_NK).sum(dim=1)
    exp_NK = s_NK.exp_()
    sum_N = exp_NK.sum(dim=1)
    if grad_NK is not None:
        share_N1 = (mass_N / sum_N).unsqueeze(1)
        torch.sub(exp_NK.mul_(share_N1), target_NK, out=grad_NK)
    return mass_N * sum_N.log() - dot_N


def dino_loss(score_SBK, target_TBK, temp=0.1):
    """Each student crop predicts each teacher crop of the same image, except itself.

        L_dino = - mean_{s != t, b}  target[t, b] . log softmax(score[s, b] / temp)

    Section 4, "Image-level objective"; DINO 2021, equation 3. Returned in two parts that add up to
    it: (small crops, large crops). The targets of all partners of a crop are summed first, so each
    crop costs one cross-entropy however many teacher crops there are.

    Differs from the official code without small crops, where it weighs the loss 2/3 instead of 1.
    """
    S, B, _ = score_SBK.shape
    T = len(target_TBK)
    sum_BK = target_TBK.sum(dim=0)
    weight_B = torch.full((B,), 1 / (B * (S * T - T)), device=score_SBK.device)
    large = small = score_SBK.new_zeros((), dtype=torch.float32)
    for s, score_BK in enumerate(score_SBK.unbind(0)):
        if s < T:
            # Ablation: `large = large + CrossEntropy.apply(score_BK, sum_BK, weight_B, temp)`, and
            # a crop also predicts itself.
            large = large + CrossEntropy.apply(score_BK, sum_BK - target_TBK[s], weight_B, temp)
        else:
            small = small + CrossEntropy.apply(score_BK, sum_BK, weight_B, temp)
    return small, large


def ibot_loss(score_MK, target_MK, weight_M, crops, temp=0.1, overwrite=False):
    """Each hidden patch predicts what the teacher, who sees it, says about it.

        L_ibot = - 1/crops * sum_crops mean_{masked i}  target[i] . log softmax(score[i] / temp)

    Section 4, "Patch-level objective"; iBOT (Zhou et al. 2022), section 3.1. weight_M is 1 over the
    masked patches of the crop: one crop, one vote. `crops` counts all large crops, although only
    half of them are masked, so an untrained network has ln(K) / 2.

    overwrite  the gradient may take the memory of target_MK, the largest tensor of a step, which
               nobody reads again
    """
    return CrossEntropy.apply(score_MK, target_MK, weight_M / crops, temp, overwrite)


def koleo_loss(x_BD, over_all_ranks=False, eps=1e-8):
    """Push every feature away from its nearest neighbour, so that the batch spreads on the sphere.

        L_koleo = - mean_i  log( min_{j != i} || x_i - x_j || + eps )

    Section 4, "KoLeo regularizer"; Sablayrolles et al. 2019. Always in fp32: the official code
    stays in fp16, where two equal images give infinity. A batch of one has no neighbour and gives 0
    (official: infinity).
    """
    x_BD = F.normalize(x_BD.float(), dim=-1, eps=eps)
    all_GD, first = gather_from_ranks(x_BD) if over_all_ranks else (x_BD, 0)
    if len(all_GD) < 2:
        return x_BD.sum() * 0
    with torch.no_grad():
        cosine_BG = x_BD @ all_GD.T
        cosine_BG.diagonal(first).fill_(-1)  # nobody is his own neighbour
        nearest_B = cosine_BG.argmax(dim=1)  # on the sphere, a high cosine is a small distance
    # eps inside the difference keeps the gradient of equal features finite.
    distance_B = (x_BD - all_GD[nearest_B] + eps).norm(dim=-1)
    return -(distance_B + eps).log().mean()
