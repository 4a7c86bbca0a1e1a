"""Linear classifiers trained side by side: the official linear probe as one tensor.

The official probe trains 52 classifiers at once on the same frozen features: 13 learning rates, on
[CLS] of the last block or of the last four, with or without the mean patch token. Here they are
the rows of one weight tensor, zero where a classifier does not look, so all 52 are one matrix
product. (DINOv2 appendix B.3; eval/linear.py.)

Shapes:  N images   B batch   D width   F features, columns: [CLS] after each of the last four
         blocks, then the mean patch   H classifiers side by side   C classes
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel import sum_over_ranks

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
MOMENTUM, INITIAL_STD = 0.9, 0.01


class Candidates(NamedTuple):
    """Linear classifiers side by side, of which one will be chosen."""

    names: list
    weight_HCF: Tensor
    bias_HC: Tensor

    def logits(self, x_BF):
        """(B, H, C): what each of them says of each image."""
        flat = F.linear(x_BF, self.weight_HCF.flatten(0, 1), self.bias_HC.flatten())
        return flat.unflatten(1, self.bias_HC.shape)


def feature_sets(blocks, dim):
    """What a classifier may look at: [(its name, 1 for each column that it uses (F,))]."""
    sets = []
    for mean, words in (0, ""), (1, " and mean patch"):
        for last in sorted({1, blocks}):
            use = torch.zeros(blocks + 1, dim)
            use[blocks - last : blocks] = 1
            use[blocks] = mean
            sets.append((f"last {last} [CLS]{words}", use.flatten()))
    return sets


class Probe:
    """Every learning rate with every feature set.

    SGD with momentum and no weight decay on the mean cross-entropy, whose gradient is
        d loss / d logit = softmax(logit) - 1[class is the label]
    divided by the number of images, so no autograd is needed. Each classifier has its own loss and
    does not know of the others.

    batch  images of a step on all ranks together; learning rates are scaled by batch / 256
    """

    def __init__(self, classes, blocks, dim, batch, seed=0, device="cpu"):
        sets = feature_sets(blocks, dim)
        use_SF = torch.stack([use for _, use in sets]).to(device)
        self.use_H1F = use_SF.repeat(len(RATES), 1).unsqueeze(1)
        self.batch, self.rate_H11 = batch, torch.tensor(RATES, device=device)
        self.rate_H11 = self.rate_H11.repeat_interleave(len(sets)).view(-1, 1, 1) * batch / 256
        H, rng = len(self.rate_H11), torch.Generator().manual_seed(seed)
        weight_HCF = torch.randn(H, classes, use_SF.shape[1], generator=rng).to(device)
        weight_HCF *= INITIAL_STD * self.use_H1F
        names = [f"{name}, lr {rate:g}" for rate in RATES for name, _ in sets]
        self.heads = Candidates(names, weight_HCF, torch.zeros(H, classes, device=device))
        self.momenta = [torch.zeros_like(x) for x in self.heads[1:]]

    def step(self, x_BF, label_B, done):
        """One step of SGD on this rank's images. done: share of the training, 0 to 1."""
        error_BHC = self.heads.logits(x_BF).softmax(dim=2)
        error_BHC[torch.arange(len(label_B), device=x_BF.device), :, label_B] -= 1
        weight_HCF = (error_BHC.flatten(1).T @ x_BF).unflatten(0, error_BHC.shape[1:])
        gradients = weight_HCF * self.use_H1F, error_BHC.sum(dim=0)
        rate_H11 = self.rate_H11 * (1 + math.cos(math.pi * done)) / 2
        rates = rate_H11, rate_H11[:, 0]
        rows = zip(self.heads[1:], self.momenta, gradients, rates, strict=True)
        for parameter, momentum, gradient, rate in rows:
            momentum.mul_(MOMENTUM).add_(sum_over_ranks(gradient) / self.batch)
            parameter.sub_(rate * momentum)


def accuracies(candidates, x_NF, label_N):
    """Percentage of the images that each candidate gets right: (H,), on the CPU."""
    right_H = torch.zeros(len(candidates.names), dtype=torch.long, device=x_NF.device)
    chunk = max(1, 2**24 // candidates.bias_HC.numel())  # 64 MB of logits
    for x_BF, label_B in zip(x_NF.split(chunk), label_N.split(chunk), strict=True):
        guess_BH = candidates.logits(x_BF).argmax(dim=2)
        right_H += (guess_BH == label_B.unsqueeze(1)).sum(dim=0)
    return 100 * right_H.cpu() / len(label_N)
