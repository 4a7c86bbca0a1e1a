"""Logistic regression by L-BFGS: the convex probe, with one number to choose.

    minimise over w, b     mean over images of -log p(label)  +  |w|^2 / (2 C N)
    with                   p = softmax(w x + b)

There is one optimum for each C, so nothing depends on a learning rate or a seed. C says how far the
images may move the weights: from 1e-6 (not at all) to 1e5 (as far as they like). The bias is free.
(DINOv2's log_regression.py, which leaves the work to cuML: the same sum over images times C,
features as they are, double precision.)

Shapes:  N images   D features   C classes   K values of C (the penalty)
"""

import torch
import torch.nn.functional as F

STEPS = 1000  # of L-BFGS for one value of the penalty, at most
OFFICIAL = (-6, 5, 45)  # powers of ten, from, to, how many


def penalties(count=OFFICIAL[2]):
    """The values of C that are tried, evenly spread over the exponents."""
    return torch.logspace(OFFICIAL[0], OFFICIAL[1], count, dtype=torch.float64).tolist()


def objective(weight_CD, bias_C, x_ND, label, penalty):
    """What is minimised. label: (N,) numbers of classes, or (N, C) shares of each class."""
    logits_NC = F.linear(x_ND, weight_CD, bias_C)
    return F.cross_entropy(logits_NC, label) + weight_CD.square().sum() / (2 * penalty * len(x_ND))


def logistic_path(x_ND, label, classes, values, tolerance=1e-4):
    """The optimum for each penalty in `values`: weights (K, C, D) and biases (K, C), fp32.

    tolerance  of the largest component of the gradient, once weights are scaled as below
    Values are taken in order, each from the optimum of the one before: in rising order the weights
    only have to grow a little every time.
    Differs from the official code, which starts each value from zero and stops at a tolerance of
    1e-12 on a scale of its own, or after 1000 steps. The optimum is the same.
    """
    device = "cpu" if x_ND.device.type == "mps" else x_ND.device  # which has no double precision
    x_ND = x_ND.to(device, torch.float64)
    label = label.to(device, torch.float64 if label.is_floating_point() else torch.int64)
    # None of this changes the optimum, but L-BFGS gets there in far fewer steps: the mean is taken
    # out, for which the free bias makes up; features are turned to their principal axes, where the
    # penalty is the same; and each weight is searched for in a unit of its own, such that the
    # objective bends about equally in all directions.
    mean_D = x_ND.mean(dim=0)
    x_ND = x_ND - mean_D
    variance_D, axes_DD = torch.linalg.eigh(x_ND.T @ x_ND / len(x_ND))
    x_ND = x_ND @ axes_DD
    weight_CD, bias_C = x_ND.new_zeros(classes, x_ND.shape[1]), x_ND.new_zeros(classes)
    weights, biases = [], []
    for penalty in values:
        unit_D = (variance_D.clamp(min=0) + 1 / (penalty * len(x_ND))).rsqrt()
        scaled_CD, bias_C = (weight_CD / unit_D).requires_grad_(), bias_C.requires_grad_()
        minimise(
            lambda w=scaled_CD, b=bias_C, u=unit_D, p=penalty: objective(w * u, b, x_ND, label, p),
            [scaled_CD, bias_C],
            tolerance,
        )
        weight_CD, bias_C = scaled_CD.detach() * unit_D, bias_C.detach()
        turned_CD = weight_CD @ axes_DD.T
        weights.append(turned_CD.float())
        biases.append((bias_C - turned_CD @ mean_D).float())
    return torch.stack(weights), torch.stack(biases)


def minimise(value, parameters, tolerance):
    """Move the parameters to the minimum of value()."""
    solver = torch.optim.LBFGS(
        parameters, max_iter=STEPS, history_size=10, line_search_fn="strong_wolfe",
        tolerance_grad=tolerance, tolerance_change=1e-12,
    )  # fmt: skip

    def closure():
        solver.zero_grad()
        loss = value()
        loss.backward()
        return loss

    solver.step(closure)
