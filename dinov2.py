"""DINOv2 on one page: a student learns to say about small and masked crops what its own moving
average, the teacher, says about whole ones.

    large crops, whole --------------------------> teacher -> scores -> Sinkhorn -> targets
    large crops with hidden patches, small crops -> student -> scores -> cross-entropy with these
    student <- gradient step;   teacher <- momentum * teacher + (1 - momentum) * student

(Oquab et al. 2023, section 4.) `objective` is the middle of this repository.

Shapes:  B images   T large crops of each (2)   S all crops of each, the large ones first
         D channels   K prototypes   M hidden patches of the batch
Crops are crop-major: row = crop * B + image.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from heads import DINOHead
from losses import SoftmaxCentering, dino_loss, ibot_loss, koleo_loss, sinkhorn_knopp
from vit import build_backbone

LARGE_CROPS = 2  # T; the pairing of views and the masks are made for two


class Output(NamedTuple):
    """What a Network says about a batch."""

    cls: Tensor  # (T * B, D) normalised [CLS] of the large crops, before the head
    cls_score: Tensor  # (S * B, K)
    patch_score: Tensor | None  # (M, K), hidden patches only


class Network(nn.Module):
    """Backbone and heads in one module; student and teacher are two of them.

    Without a separate iBOT head, patch tokens go through the DINO head ("tied").
    """

    def __init__(self, backbone, dino_head, ibot_head=None):
        super().__init__()
        self.backbone = backbone
        self.dino_head = dino_head
        if ibot_head is not None:
            self.ibot_head = ibot_head

    def initial_values(self, generator=None):
        """Yield (name, value) for every parameter of backbone and heads, one at a time."""
        for part, module in self.named_children():
            for name, value in module.initial_values(generator):
                yield f"{part}.{name}", value

    def forward(self, crops, masks=None, mask_indices=None, rng=None, kept=None):
        """List of crops (large first) -> Output.

        masks         (T * B, N) bool: patches hidden from the backbone; None hides nothing
        mask_indices  (M,) rows of the flattened (T * B * N) whose scores are wanted; None: none
        rng, kept     stochastic depth, see VisionTransformer.forward_features
        """
        masks = [masks] + [None] * (len(crops) - 1)
        none = crops[0].new_empty(0, dtype=torch.long)
        wanted = none if mask_indices is None else mask_indices
        cls, patches = self.backbone(crops, masks, True, rng, kept, wanted)
        large = cls[: len(crops[0])]
        if mask_indices is None:
            return Output(large, self.dino_head(cls), None)
        if hasattr(self, "ibot_head"):
            return Output(large, self.dino_head(cls), self.ibot_head(patches))
        scores = self.dino_head(torch.cat((cls, patches)))
        return Output(large, *scores.split((len(cls), len(patches))))


def ibot_prototypes(cfg):
    """K of the iBOT loss: of its own head if there is one, else of the shared head."""
    return cfg.head.ibot_prototypes or cfg.head.prototypes


def build_network(cfg, student):
    """A student or teacher for a config; only the student has stochastic depth."""
    h = cfg.head
    backbone = build_backbone(cfg, cfg.vit.drop_path if student else 0.0)
    shape = {"hidden": h.hidden, "layers": h.layers, "norm_last_layer": h.norm_last_layer}
    dino_head = DINOHead(backbone.dim, h.prototypes, bottleneck=h.bottleneck, **shape)
    ibot_head = None
    if h.separate and cfg.loss.ibot:
        bottleneck = h.ibot_bottleneck or h.bottleneck
        ibot_head = DINOHead(backbone.dim, ibot_prototypes(cfg), bottleneck=bottleneck, **shape)
    return Network(backbone, dino_head, ibot_head)


def build_centers(cfg):
    """The running centres of softmax centering, one for each loss; none for Sinkhorn-Knopp."""
    centers, momentum = nn.ModuleDict(), cfg.loss.center_momentum
    if cfg.loss.centering == "softmax":
        centers["dino"] = SoftmaxCentering(cfg.head.prototypes, momentum)
        centers["ibot"] = SoftmaxCentering(ibot_prototypes(cfg), momentum)
    return centers


def targets(score_NK, temp, centers, loss):
    """Teacher scores -> target probabilities (N, K), by the centre of that loss or by Sinkhorn."""
    if loss in centers:
        return centers[loss](score_NK, temp)
    # Ablation: `return (score_NK / temp).softmax(dim=1)`, and watch the teacher collapse.
    return sinkhorn_knopp(score_NK, temp)


class Targets(NamedTuple):
    """What the teacher says about a batch, as the student is to say it."""

    dino: Tensor  # (T * B, K)
    ibot: Tensor | None  # (M, K)
    signs: dict  # of health; empty unless asked for


def objective(student, teacher, centers, batch, temp, weights, rng=None, kept=None, health=False):
    """One batch -> (loss, log): the loss to differentiate, and its terms as tensors by name.

    temp     of the teacher
    weights  cfg.loss: dino, ibot, koleo (0 leaves a term out), koleo_all_ranks, student_temp
    health   also log the signs of collapse; costs a little, so not in every step
    The log shows each term as it enters the loss. (The official log halves koleo and ibot.)
    """
    told = ask_teacher(teacher, centers, batch, temp, weights, health)
    return teach_student(student, batch, told, weights, rng, kept, overwrite=True)


@torch.no_grad()
def ask_teacher(teacher, centers, batch, temp, weights, health=False):
    """The first half of the objective: the teacher sees the large crops, whole -> Targets."""
    told = teacher([batch.global_crops], mask_indices=batch.mask_indices if weights.ibot else None)
    dino_NK = targets(told.cls_score, temp, centers, "dino")
    ibot_MK = targets(told.patch_score, temp, centers, "ibot") if weights.ibot else None
    return Targets(dino_NK, ibot_MK, health_signs(told, dino_NK, temp) if health else {})


def teach_student(student, batch, told, weights, rng=None, kept=None, overwrite=False):
    """The second half: what the student says of its crops against the Targets -> (loss, log).

    overwrite  these targets are for no other student, see ibot_loss
    """
    T, indices = LARGE_CROPS, batch.mask_indices if weights.ibot else None
    crops = [c for c in (batch.global_crops, batch.local_crops) if len(c)]
    # Ablation: `said = student(crops, None, indices, rng=rng, kept=kept)` hides nothing, and iBOT
    # becomes plain distillation of visible patches.
    said = student(crops, batch.masks, indices, rng=rng, kept=kept)

    # [CLS] of the masked crops enters DINO and KoLeo too: there is no second, unmasked pass.
    B = len(batch.global_crops) // T
    small, large = dino_loss(
        said.cls_score.unflatten(0, (-1, B)), told.dino.unflatten(0, (T, B)), weights.student_temp
    )
    log = {"dino_global": weights.dino * large, "dino_local": weights.dino * small}
    if weights.ibot:
        ibot = ibot_loss(
            said.patch_score, told.ibot, batch.mask_weights, T * B, weights.student_temp, overwrite
        )
        log["ibot"] = weights.ibot * ibot
    if weights.koleo:
        # Apart for each view: two crops of one image may well be neighbours.
        views = said.cls.chunk(T)
        log["koleo"] = weights.koleo * sum(koleo_loss(v, weights.koleo_all_ranks) for v in views)
    loss = sum(log.values())
    log = {"loss": loss, **log, **told.signs}
    return loss, {name: value.detach() for name, value in log.items()}


@torch.no_grad()
def health_signs(told, target_NK, temp):
    """Numbers that show a collapse before the loss does, from the teacher's view of a batch.

    teacher_entropy   mean entropy of a target in nats: ln K says nothing, 0 says one prototype
    prototypes_used   exp(entropy of the mean prediction before centering) / K, the share of the
                      prototypes that the batch uses; 1 / K is collapse
    koleo_distance    mean distance to the nearest other image on the unit sphere; 0 is collapse
    rankme            effective rank of the [CLS] features, exp(entropy of their singular values):
                      1 is collapse (Garrido et al. 2023)
    """
    mean_K = (told.cls_score.float() / temp).softmax(dim=1).mean(dim=0)
    view_BD = nn.functional.normalize(told.cls.float().chunk(LARGE_CROPS)[0], dim=1)
    singular = torch.linalg.svdvals(told.cls.float().nan_to_num())  # svd raises on nan
    # Without matrix products, whose rounding would show equal features some way apart.
    distance_BB = torch.cdist(view_BD, view_BD, compute_mode="donot_use_mm_for_euclid_dist")
    return {
        "teacher_entropy": torch.special.entr(target_NK).sum(dim=1).mean(),
        "prototypes_used": torch.special.entr(mean_K).sum().exp() / len(mean_K),
        "koleo_distance": distance_BB.fill_diagonal_(torch.inf).amin(dim=1).mean(),
        "rankme": torch.special.entr(singular / singular.sum()).sum().exp(),
    }


def start_values(cfg):
    """The loss terms of a network that has learnt nothing, to a few percent (softmax: a fourth).

    It says the same of every crop: its K scores are the cosines of one direction with K random
    ones in b dimensions, normal numbers of std 1 / sqrt(b). Sinkhorn makes such targets uniform;
    softmax centering, whose centre is still 0, leaves them as they are, so that [CLS] of student
    and teacher agree. Hidden patches (in half of the large crops) agree with nothing.
    """
    w, h, T, L = cfg.loss, cfg.head, LARGE_CROPS, cfg.crops.local_count

    def cross_entropy(K, width, agree):
        draws = torch.randn(2**20 // K + 1, K, generator=torch.Generator().manual_seed(0))
        score_NK = draws / width**0.5
        target_NK = (score_NK / cfg.teacher.temp_start).softmax(1) if agree else 1 / K
        return -(target_NK * (score_NK / w.student_temp).log_softmax(1)).sum(1).mean().item()

    dino = w.dino * cross_entropy(h.prototypes, h.bottleneck, w.centering == "softmax")
    ibot = w.ibot * cross_entropy(ibot_prototypes(cfg), h.ibot_bottleneck or h.bottleneck, False)
    pairs = T * (T - 1) + T * L
    all_tokens = cfg.distill.teacher and cfg.distill.tokens == "all"
    values = {
        "dino_global": dino * T * (T - 1) / pairs,
        "dino_local": dino * T * L / pairs,
        "ibot": ibot * (1 if all_tokens else cfg.mask.probability),
    }
    return {name: value for name, value in values.items() if value}


@torch.no_grad()
def ema_update(teacher, student, momentum):
    """teacher <- momentum * teacher + (1 - momentum) * student, heads included (buffers: none)."""
    # Ablation: `torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1.0)`
    # copies the student; with softmax centering the two collapse.
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)
