"""distill.py: a step is what a double loop says; the teacher speaks once; students do not mix.

Run: pytest tests/test_distill.py      (half a minute on one core; helpers are in tests/running.py)

Runs are tiny. Equal means equal to the last bit unless a tolerance is stated.
"""

import copy
import math
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_parallel as ranks
import torch
import torch.nn.functional as F
from running import ROOT, Run, log_of, losses_of, make_photos, run, tensors_of, tiny

import config
import distill
import train
from config import from_dict
from data import Batch, index_masks
from dinov2 import ask_teacher, build_network
from optim import schedules
from vit import SIZES, VisionTransformer
from weights import checkpoint
from weights.load import architecture, load_backbone, vit_of

# The parts of PyTorch that write checkpoints say so in every process that is the only one.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

SINKHORN = ["loss.centering=sinkhorn", "log.knn_every=0", "log.every=1", "teacher.temp_warmup=0"]


@pytest.fixture(autouse=True)
def no_handlers(monkeypatch):
    """Runs inside the test's process leave its signals alone."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """photos/, and teacher/: a run of ViT micro over them."""
    folder = tmp_path_factory.mktemp("distill")
    photos = make_photos(folder / "photos", apart=8)
    done = run(folder, tiny(folder / "teacher", photos, "vit.size=micro", "steps=2", *SINKHORN))
    assert done.code == 0, done.err
    return folder


def words(folder, out, *more):
    """The command line of a tiny distillation."""
    given = [*SINKHORN, "steps=6", "log.save_every=2", f"distill.teacher={folder / 'teacher'}"]
    return tiny(out, folder / "photos", *given, *more)


def assert_same(out, expected):
    """Two run folders have the same losses, weights and moments."""
    assert losses_of(out) == losses_of(expected)
    found, wanted = tensors_of(out), tensors_of(expected)
    assert found.keys() == wanted.keys() and any("exp_avg_sq" in name for name in found)
    assert all(torch.equal(found[name], wanted[name]) for name in found)


# ---- one step is what it should be --------------------------------------------------------------


def tiny_cfg(*overrides):
    cfg = config.load(ROOT / "tests" / "tiny.yaml", [*SINKHORN, "distill.teacher=x", *overrides])
    cfg.vit.size, cfg.vit.drop_path = (32, 2, 2, "mlp"), 0.0
    return cfg


def random_network(cfg, seed):
    """A Network with scores that differ, as those of a trained one do."""
    torch.manual_seed(seed)
    network = build_network(cfg, student=False)
    with torch.no_grad():
        for value in network.parameters():
            value.add_(0.2 * torch.randn(value.shape))
    return network


def balanced(score_NK, temp):
    """Sinkhorn-Knopp as it is written down: three rounds of columns and rows."""
    Q = (score_NK.double() / temp).exp()
    N, K = Q.shape
    for _ in range(3):
        Q = Q / Q.sum(0, keepdim=True) * N / K
        Q = Q / Q.sum(1, keepdim=True)
    return Q


def cross_entropy(target_K, score_K):
    return -(target_K * (score_K.double() / 0.1).log_softmax(0)).sum()


def spread(cls_BD):
    """KoLeo of one view, image by image."""
    x = F.normalize(cls_BD.double(), dim=1)
    nearest = [min((a - b).norm() for j, b in enumerate(x) if j != i) for i, a in enumerate(x)]
    return -torch.stack(nearest).log().mean()


def double_loop(student, teacher, batch, masks, temp, cfg):
    """The loss of a distillation step, one crop and one patch at a time."""
    head, B = {True: "ibot_head", False: "dino_head"}[cfg.head.separate], batch.B
    crops = [*batch.large, *batch.small]
    said = [student.backbone(c[None], is_training=True) for c in crops]
    with torch.no_grad():
        told = [teacher.backbone(c[None], is_training=True) for c in batch.large]
        target = balanced(torch.cat([teacher.dino_head(t["x_norm_clstoken"]) for t in told]), temp)
        patch_heads = getattr(teacher, head), getattr(student, head)
        at = [(c, n) for c in range(2 * B) for n in range(masks.shape[1]) if masks[c, n]]
        seen = torch.cat([told[c]["x_norm_patchtokens"][:, n] for c, n in at])
        patch_target = balanced(patch_heads[0](seen), temp)
    score = [student.dino_head(s["x_norm_clstoken"])[0] for s in said]
    S, pairs = len(crops) // B, []
    for t in range(2):
        for s in range(S):
            if s != t:
                pairs += [cross_entropy(target[t * B + b], score[s * B + b]) for b in range(B)]
    dino = torch.stack(pairs).mean()
    ibot = 0
    for (c, n), goal in zip(at, patch_target, strict=True):
        guess = patch_heads[1](said[c]["x_norm_patchtokens"][0, n])
        ibot = ibot + cross_entropy(goal, guess) / masks[c].sum() / (2 * B)
    cls = torch.cat([s["x_norm_clstoken"] for s in said[: 2 * B]])
    koleo = spread(cls[:B]) + spread(cls[B:])
    return cfg.loss.dino * dino + cfg.loss.ibot * ibot + cfg.loss.koleo * koleo


@pytest.mark.parametrize("tokens", ["all", "masked"])
@pytest.mark.parametrize("separate", ["true", "false"])
def test_one_step_equals_a_double_loop_over_crops_and_patches(tokens, separate):
    cfg = tiny_cfg(f"distill.tokens={tokens}", f"head.separate={separate}", "loss.ibot=0.7")
    teacher, student = random_network(cfg, 1), random_network(cfg, 2)
    expected_student, B, g = copy.deepcopy(student), 3, torch.Generator().manual_seed(3)
    large, small = (torch.randn(2 * B, 3, side, side, generator=g) for side in (16, 8))
    masks = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]] * 2, dtype=torch.bool)
    none = torch.zeros(0)
    batch = Batch(large, small, none, none, *index_masks(masks), skipped=[])

    scaler = torch.amp.GradScaler("cpu", enabled=False)
    one = SimpleNamespace(model=student, scaler=scaler, cfg=cfg)
    now = SimpleNamespace(teacher_temp=0.05)

    def ask(part, temp, health):
        return ask_teacher(teacher, {}, part, temp, cfg.loss, health)

    [log] = train.backward([one], ask, [distill.visible(batch, cfg)], now, None, False)

    given = SimpleNamespace(large=large, small=small, B=B)
    voting = torch.ones_like(masks) if tokens == "all" else masks
    loss = double_loop(expected_student, teacher, given, voting, 0.05, cfg)
    loss.backward()
    # fp32 against fp64 sums.
    assert log["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    for (name, ours), theirs in zip(
        student.named_parameters(), expected_student.parameters(), strict=True
    ):
        if name == "backbone.mask_token":  # takes part, so that DDP does not wait, and stays
            assert theirs.grad is None and not ours.grad.any()
        else:
            error = (ours.grad - theirs.grad).norm()
            assert error <= 1e-4 * theirs.grad.norm() + 1e-7, (name, error)
    assert all(value.grad is None for value in teacher.parameters())


# ---- whole runs ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(folder):
    """The folder of two students that nobody interrupted."""
    out = folder / "two"
    done = run(folder, words(folder, out, "distill.students=[nano,micro]"), program="distill.py")
    assert done.code == 0, done.err
    assert "micro: step 6/6" in done.out
    return out


@pytest.mark.parametrize("tokens", ["all", "masked"])
@pytest.mark.parametrize("students", ["[]", "[nano,micro]"])
def test_the_teacher_looks_once_at_each_part_of_a_batch(
    tmp_path, folder, monkeypatch, tokens, students
):
    honest, seen = distill.open_teacher, []

    def watched(*arguments):
        teacher = honest(*arguments)
        teacher.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        return teacher

    monkeypatch.setattr(distill, "open_teacher", watched)
    more = [f"distill.students={students}", f"distill.tokens={tokens}", "steps=2", "accumulate=2"]
    distill.main(words(folder, tmp_path / "run", *more))
    assert len(seen) == 4  # two parts of two steps
    assert all(len(crops) == 1 and len(crops[0]) == 8 for crops in seen)  # 2 large crops of 4


def test_a_student_among_several_is_the_same_as_alone(tmp_path, folder, two):
    done = run(tmp_path, words(folder, tmp_path / "run"), program="distill.py")
    assert done.code == 0, done.err
    assert_same(tmp_path / "run", two / "nano")


def test_the_average_of_the_student_is_what_evaluation_loads(two):
    tensors = tensors_of(two / "nano")
    name = "backbone.blocks.0.attn.qkv.weight"
    loaded = load_backbone(two / "nano").state_dict()[name.removeprefix("backbone.")]
    assert torch.equal(loaded, tensors[f"teacher.{name}"])
    assert not torch.equal(loaded, tensors[f"student.{name}"])


def test_the_teacher_is_the_one_of_the_file(folder):
    cfg = config.load(words(folder, "x")[0], words(folder, "x")[1:])
    teacher = distill.open_teacher(cfg, torch.device("cpu"))
    saved = checkpoint.read(folder / "teacher" / "teacher.pt")
    for name, value in teacher.named_parameters():
        part, _, key = name.partition(".")
        assert torch.equal(value, saved[part][key]) and not value.requires_grad
    assert not teacher.training


def test_nothing_is_dropped_or_hidden_and_the_log_names_what_a_fresh_student_costs(two):
    cfg = from_dict(checkpoint.read(two / "nano" / "teacher.pt")["config"])
    assert cfg.vit.drop_path == 0 and cfg.mask.probability == 0
    first = next(line for line in log_of(two / "nano") if "loss" in line)
    # All patches vote, so an ignorant student pays ln 32 for iBOT, not half of it.
    assert first["ibot"] > math.log(32)


def test_the_figure_beside_the_first_evaluation_is_that_of_the_teacher(folder, two):
    first = log_of(two / "nano")[0]
    assert first["knn_teacher"] == log_of(folder / "teacher")[-1]["knn"] != first["knn_random"]


@pytest.mark.slow
def test_killed_between_two_saves_a_distillation_ends_equal_bit_for_bit(tmp_path, folder, two):
    out = tmp_path / "run"
    line = words(folder, out, "distill.students=[nano,micro]")
    stopped = Run(tmp_path, line, program="distill.py")
    stopped.wait_for(lambda: len(checkpoint.checkpoints(out / "micro")) == 2)
    stopped.kill(signal.SIGKILL)
    stopped.finish()
    shutil.rmtree(checkpoint.checkpoints(out / "micro")[-1])  # as if the kill had come before it
    steps = [checkpoint.checkpoints(out / size)[-1].name for size in ("micro", "nano")]
    assert steps[0] < steps[1]
    (out / "micro" / "summary.json").unlink(missing_ok=True)
    done = run(tmp_path, line, program="distill.py")
    assert done.code == 0, done.err
    for size in "nano", "micro":
        assert_same(out / size, two / size)


def heads_on_a_rank(folder, changes):
    """Head warm-up and two more steps within the process group of the rank."""
    given = [f"init_from={folder / 'teacher'}", "head_steps=2", "steps=2", "vit.size=micro"]
    given += ["log.knn=false"]
    line = tiny(folder / f"heads {changes['parallel']}", folder / "photos", *SINKHORN, *given)
    line += ["loss.koleo_all_ranks=true", "vit.drop_path=0", f"parallel={changes['parallel']}"]
    cfg, device = config.load(line[0], line[1:]), torch.device("cpu")
    train.train_heads(cfg, device)
    train.train(cfg, device)


def on_a_rank(folder, changes):
    """A distillation within the process group of the rank, to a folder named by the mode."""
    out = folder / changes["parallel"]
    line = words(folder, out, "loss.koleo_all_ranks=true", "distill.students=[nano,micro]")
    line += [f"{key}={value}" for key, value in changes.items()]
    cfg = config.load(line[0], line[1:])
    distill.distill(cfg, distill.student_configs(cfg), torch.device("cpu"))


def terms_of(out):
    """The loss terms and gradient norms in a log; signs of health are means over the ranks."""
    terms = ("loss", "dino_global", "dino_local", "ibot", "koleo", "grad_backbone", "knn")
    return {key: value for key, value in losses_of(out).items() if key[1] in terms}


def test_two_ranks_distil_and_train_heads_to_the_numbers_of_one(folder):
    (folder / "tiny.yaml").write_text(ranks.TINY)  # what run_jobs() opens its process group with
    short = {"steps": 3}
    on_a_rank(folder, {"parallel": "none", **short})
    heads_on_a_rank(folder, {"parallel": "none"})
    jobs = {mode: (on_a_rank, {"parallel": mode, **short}) for mode in ranks.MODES}
    jobs |= {f"{mode} heads": (heads_on_a_rank, {"parallel": mode}) for mode in ranks.MODES}
    ranks.on_ranks(jobs, folder, 2)
    for mode in ranks.MODES:
        for out in "{}/nano", "{}/micro", "heads {}/heads", "heads {}":
            assert_close(folder / out.format(mode), folder / out.format("none"))


def assert_close(out, expected):
    """Two run folders have the same losses and the same teacher.pt, up to rounding."""
    assert terms_of(out) == pytest.approx(terms_of(expected), rel=1e-5)
    found = tensors_of(out)
    for name, value in tensors_of(expected).items():
        if name.startswith("teacher.pt"):
            error = ranks.without_key_bias(name, found[name] - value).norm()
            assert error <= 1e-5 * value.norm(), (out, name)


# ---- a teacher without heads --------------------------------------------------------------------


def test_a_teacher_without_heads_first_gets_some_on_its_frozen_backbone(tmp_path, folder):
    backbone = checkpoint.read(folder / "teacher" / "teacher.pt")["backbone"]
    torch.save(backbone, tmp_path / "released.pth")
    out, given = tmp_path / "run", f"distill.teacher={tmp_path / 'released.pth'}"
    line = words(folder, out, given, "head_steps=3", "steps=2")
    done = run(tmp_path, line, program="distill.py")
    assert done.code == 0, done.err
    assert "3 steps train some, backbone frozen" in done.out
    heads = checkpoint.read(out / "heads" / "teacher.pt")
    assert all(torch.equal(heads["backbone"][name], value) for name, value in backbone.items())
    logged = [line["ibot"] for line in log_of(out / "heads") if "loss" in line]
    assert len(logged) == 3 and max(logged) > 0  # the head of the patches is trained too
    cfg = config.load(line[0], line[1:])
    teacher = distill.open_teacher(cfg, torch.device("cpu"))
    assert torch.equal(teacher.dino_head.mlp[0].weight, heads["dino_head"]["mlp.0.weight"])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("registers", [0, 4])
def test_the_weights_of_a_backbone_tell_what_network_it_is(size, registers):
    with torch.device("meta"):
        state = VisionTransformer(size, 14, 28, registers=registers).state_dict()
    vit = config.Vit()
    vit_of(architecture(state, "x", {}), vit)
    assert (vit.size, vit.patch, vit.registers) == (size, 14, registers)
    assert vit.ffn == SIZES[size][3]
    assert vit.interpolate_antialias == (registers > 0)


# ---- the cards ----------------------------------------------------------------------------------


def different(ours, other):
    """The keys in which two config files differ."""
    a, b = (config.load(ROOT / path) for path in (ours, other))
    keys = [key for key, _ in config.documented() if key]
    return {key for key in keys if config.lookup(a, key) != config.lookup(b, key)}


def test_the_full_distillation_builds_on_the_meta_device():
    cfg = config.load(ROOT / "configs" / "distill.yaml", ["parallel=none"])
    students = distill.student_configs(cfg)
    assert [each.out for each in students] == [f"runs/distill/{s}" for s in cfg.distill.students]
    with torch.device("meta"):
        teacher = build_network(config.load(ROOT / "configs" / "vitg14.yaml"), student=False)
    for each in students:
        student, average = train.outline(each)
        assert average.dino_head.last_layer.weight_g.shape == (131072, 1)
        for head in "dino_head", "ibot_head":
            ours, theirs = (getattr(n, head).last_layer.weight_g for n in (student, teacher))
            assert ours.shape == theirs.shape
    its = config.load(ROOT / "configs" / "vitg14.yaml")
    distill.check_match(its, cfg, Path("x"), heads=True)
    assert schedules(cfg.optim.warmup, cfg).lr == pytest.approx(1e-3, rel=1e-3)  # table 16


def test_the_small_card_differs_from_the_default_experiment_in_what_it_says():
    assert different("configs/distill_small.yaml", "config.yaml") == {
        "out", "steps", "optim.warmup", "optim.min_lr", "teacher.momentum_end", "distill.teacher",
        "log.knn_every", "log.save_every", "vit.size", "crops.local_scale", "crops.local_count",
        "optim.freeze_last_layer",
    }  # fmt: skip


# ---- bad input ----------------------------------------------------------------------------------

BAD = [
    # words                            what the line must hold: the key or file, and the fix
    ("vit.patch=4", "vit.patch=4, but distill.teacher={teacher} has vit.patch=8: set vit.patch=8"),
    ("head.prototypes=16", "head.prototypes=16, but distill.teacher={teacher} has head."),
    ("data.mean=[0,0,0]", "set data.mean=[0.5, 0.5, 0.5]"),
    ("crops.global_size=20", "crops.global_size=20 is not a multiple of vit.patch=8: use 16"),
    ("distill.students=[nano,huge]", "distill.students: huge is unknown, choose from pico"),
    ("distill.students=[nano,nano]", "twice"),
    ("distill.students=[3]", "distill.students[0] must be text"),
    ("distill.teacher=", "distill.teacher is empty"),
    ("distill.teacher=/nowhere.pt", "/nowhere.pt: no such file"),
    ("distill.teacher={headless}", "{headless} has no heads: set head_steps"),
    ("distill.tokens=some", "distill.tokens=some is unknown: use one of all, masked"),
    ("loss.centering=softmax", "set loss.centering=sinkhorn"),
]


@pytest.mark.parametrize(("change", "expected"), BAD, ids=[change for change, _ in BAD])
def test_bad_input_is_one_line_with_the_fix(tmp_path, folder, capsys, change, expected):
    headless = tmp_path / "headless.pth"
    torch.save(checkpoint.read(folder / "teacher" / "teacher.pt")["backbone"], headless)
    names = {"teacher": folder / "teacher" / "teacher.pt", "headless": headless}
    line = refused(capsys, distill.main, words(folder, tmp_path / "run", change.format(**names)))
    assert expected.format(**names) in line


def test_train_py_sends_a_distillation_to_distill_py(tmp_path, folder, capsys):
    assert "use distill.py" in refused(capsys, train.main, words(folder, tmp_path / "run"))


def refused(capsys, main, line):
    """The one line on stderr of a command line that main() refuses with exit code 2."""
    with pytest.raises(SystemExit) as leaving:
        main(line)
    assert leaving.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said
