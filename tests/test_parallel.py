"""One process and many agree: DDP and FSDP2 on 2 and 4 ranks give the numbers of a single process.

Each group of ranks is started once, does all its jobs and leaves their results in a file; the tests
look at those. Networks are tiny, in fp32 on the CPU with gloo, one thread for each rank.

Run:  pytest tests/test_parallel.py            pytest -m slow tests/test_parallel.py
"""

import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import running
import test_golden_steps as golden
import torch
from PIL import Image
from running import ROOT, server
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.tensor import DTensor

import attention
import config
import data
import eval_knn
import train as train_script
from attention import check_backend
from config import Config, UserError
from dinov2 import build_network, ema_update, objective
from images import evaluation
from images.sources import open_source
from losses import SoftmaxCentering, ibot_loss, koleo_loss, sinkhorn_knopp
from optim import clip_each_part, schedules, set_schedule
from parallel import (
    compiles,
    dtype_of,
    process_group,
    ranks,
    replicate,
    sum_over_ranks,
    whole,
    wrap,
)
from train import backward, build, own_teacher, seeded, to_device
from weights.checkpoint import Checkpoints, checkpoints

CPU = torch.device("cpu")
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
MODES = ("ddp", "fsdp")

TINY = """
steps: 10
batch: 8
precision: fp32
device: cpu
data: {workers: 0, mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25]}
crops: {global_size: 32, local_size: 16, local_count: 2}
vit: {size: nano, patch: 8, drop_path: 0.0, layerscale: 0.1, init_std: 0}
head: {prototypes: 24, hidden: 32, bottleneck: 16, separate: true}
loss: {centering: sinkhorn, koleo_all_ranks: true}
teacher: {momentum: 0.9, temp_warmup: 5}
optim: {lr: 2.0e-3, warmup: 3, layer_decay: 1.0, freeze_last_layer: 2, clip: 1.0}
log: {every: 1, knn_every: 0, save_every: 5, pictures: false}
"""


# ---- jobs: what every rank does ------------------------------------------------------------------


def tiny(folder, changes):
    """The configuration of these tests, with changes such as {"vit.drop_path": 0.3}."""
    out = changes.get("out", changes.get("parallel", "none"))
    words = [f"{key}={value}" for key, value in changes.items()]
    words += [f"out={folder}/{out}", f"data.root={folder}/images"]
    cfg = config.load(Path(folder, "tiny.yaml"), words)
    cfg.vit.size = (32, 2, 1, "mlp")  # dim, depth, heads: smaller than any of the named ones
    return cfg


def train(folder, changes, steps=10, save_at=None, resume=False):
    """The loop of train.py; returns what happened, with whole tensors."""
    cfg = tiny(folder, changes)
    device = torch.device(cfg.device)
    student, teacher, centers, optimizer = build(cfg, device)
    model, scaler = replicate(student, cfg), torch.amp.GradScaler("cpu", enabled=False)
    saved = Checkpoints(cfg, student, teacher, centers, optimizer, scaler)
    start, (rank, world) = saved.load() if resume else 0, ranks()
    run = {"start": start, "terms": [], "norms": []}
    batches = data.loader(cfg, open_source(cfg.data.root, cfg, "train"), start, rank, world)
    for step, batch in zip(range(start, steps), batches, strict=False):
        now, rng = schedules(step, cfg), seeded(f"{step} {rank}")
        set_schedule(optimizer, now)
        micro = data.split(batch, cfg.accumulate)
        micro = [to_device(part, cfg, device) for part in micro]
        own = SimpleNamespace(model=model, teacher=teacher, centers=centers, cfg=cfg, scaler=scaler)
        (log,) = backward([own], own_teacher(own), micro, now, rng, False)
        finish_step(student, teacher, optimizer, cfg, now, log, run)
        if step + 1 == save_at:
            saved.save(step + 1)  # and the loop goes on
    saved.wait()
    stored = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parts(teacher))
    return run | whole_state(student, teacher) | {
        "centers": centers.state_dict(),
        "dtypes": {p.dtype for p in student.parameters()},
        "stored": stored / sum(p.numel() for p in parts(teacher)),  # share on this rank
    }  # fmt: skip


def parts(network):
    return list(network.parameters())


def finish_step(student, teacher, optimizer, cfg, now, log, run):
    """All that follows the backward pass, noted down as numbers that every rank knows."""
    norms = clip_each_part(student, cfg.optim.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    ema_update(teacher, student, now.momentum)
    mean = sum_over_ranks(torch.stack(list(log.values()))) / ranks()[1]
    run["terms"].append(dict(zip(log, mean.tolist(), strict=True)))
    run["norms"].append({name: whole(norm).item() for name, norm in norms.items()})


def whole_state(student, teacher):
    return {
        "student": get_model_state_dict(student, options=WHOLE),
        "teacher": get_model_state_dict(teacher, options=WHOLE),
    }


def golden_steps(folder, changes, case, split=False):
    """Three official steps. With split each rank has its part of the images, else all have all."""
    z, official = golden.load(case)
    cfg = golden.config_of(official)
    for key, value in changes.items():
        setattr(cfg, key, value)
    cfg.loss.koleo_all_ranks = split
    student, teacher, centers, optimizer = build(cfg, torch.device(cfg.device))
    for name, network in {"student": student, "teacher": teacher}.items():
        set_model_state_dict(network, golden.part(z, f"initial/{name}/"), options=WHOLE)
    model, run = replicate(student, cfg), {"terms": [], "norms": []}
    for i in range(golden.STEPS):
        now, batch = schedules(i, cfg), golden.batch_of(z, i)
        set_schedule(optimizer, now)
        if split:  # there are no colours to split; anything of that many rows will do
            batch = batch._replace(global_colour=batch.masks, local_colour=batch.local_crops)
            batch = data.split(batch, ranks()[1])[ranks()[0]]
        batch = on_device(batch, cfg)
        kept = golden.kept_images(z, i)
        loss, log = objective(model, teacher, centers, batch, now.teacher_temp, cfg.loss, kept=kept)
        loss.backward()
        if i == 0:
            run["grads"] = {n: whole(p.grad).cpu().clone() for n, p in student.named_parameters()}
        finish_step(student, teacher, optimizer, cfg, now, log, run)
    return run | whole_state(student, teacher) | {"centers": centers.state_dict()}


def on_device(batch, cfg):
    """A stored batch where the training is, its crops in the precision of the training."""
    moved = {k: v.to(cfg.device) for k, v in batch._asdict().items() if torch.is_tensor(v)}
    for crops in ("global_crops", "local_crops"):
        moved[crops] = moved[crops].to(dtype_of(cfg))
    return batch._replace(**moved)


def loss_functions(folder, changes):
    """The losses that look beyond a rank, on ranks that hold unequally many rows."""
    rank, world = ranks()
    g = torch.Generator().manual_seed(0)
    score_NK, weight_N = torch.randn(12, 7, generator=g), torch.rand(12, generator=g)
    target_NK, x_GD = score_NK.flip(0).softmax(dim=1), torch.randn(8, 5, generator=g)
    own = slice(None) if world == 1 else [slice(0, 3), slice(3, 12)][rank]
    center = SoftmaxCentering(7)
    probabilities = [center(2 * score_NK[own], 0.1), center(score_NK[own], 0.1)]
    ours, score = x_GD.chunk(world)[rank].requires_grad_(), score_NK[own].requires_grad_()
    koleo = koleo_loss(ours, over_all_ranks=True)
    # 20 large crops in all, so 20 / world on this rank, wherever the masked patches are.
    ibot = ibot_loss(score, target_NK[own], weight_N[own], 20 / world)
    (koleo + ibot).backward()
    return {
        "sinkhorn": sinkhorn_knopp(score_NK[own].detach() * 4, 0.04),
        "softmax": torch.cat(probabilities, dim=1), "center": center.center,
        "koleo": sum_over_ranks(koleo.detach().clone()) / world, "koleo_grad": ours.grad / world,
        "ibot": sum_over_ranks(ibot.detach().clone()) / world, "ibot_grad": score.grad / world,
    }  # fmt: skip


def nearest_neighbours(folder, changes):
    """k-NN before the first step, and a step after it; 7 test images do not divide into 2."""
    cfg = tiny(folder, changes)
    cfg.data.root, cfg.data.val = f"{folder}/images", f"{folder}/val"
    sources = evaluation.evaluation_images(cfg)
    student, teacher, centers, _ = build(cfg, CPU)
    figures = eval_knn.evaluate(teacher.backbone, sources, cfg, CPU, neighbours=(1, 3))
    batch = next(iter(data.loader(cfg, sources[0], 0, *ranks())))
    objective(replicate(student, cfg), teacher, centers, to_device(batch, cfg, CPU), 0.05, cfg.loss)
    features = eval_knn.extract_features(teacher.backbone, sources[1], cfg, CPU)
    return {"figures": figures, "features": features}


def names(folder, changes):
    """Parameter names of the student after all wrapping, and whether memory was taken before it."""
    cfg = tiny(folder, changes)
    with torch.device("meta"):
        network = build_network(cfg, student=True)
    wrap(network, cfg, train=True)
    on_meta = all(p.is_meta for p in network.parameters())
    return {"names": list(get_model_state_dict(network)), "on_meta": on_meta}


# ---- groups of ranks -----------------------------------------------------------------------------

SOFT = {"loss.centering": "softmax", "loss.koleo": 0, "loss.center_momentum": 1.0}  # no batch in it
ALONE = {
    "train": (train, {}),
    "softmax": (train, {"loss.centering": "softmax"}, 3),
    "independent": (train, SOFT, 3),
    "accumulate": (train, SOFT | {"accumulate": 2}, 3),
    "selective": (train, {"activation_checkpointing": "selective"}, 3),
    "full": (train, {"activation_checkpointing": "full"}, 3),
    "losses": (loss_functions, {}),
    "knn": (nearest_neighbours, {}),
    "names": (names, {}),
    "names_compiled": (names, {"compile": True, "activation_checkpointing": "full"}),
    **{f"golden {case} {a}": (golden_steps, {"attention": a}, case)
       for case in golden.CASES for a in ("plain", "sdpa", "auto")},
}  # fmt: skip
SPLIT = "B_centering_shared"  # 4 images, no stochastic depth: the case that divides by 2
TWO = {
    "train": (train, {}, 10, 5),
    **{job: ALONE[job] for job in ("softmax", "accumulate", "selective", "full", "knn")},
    "names": (names, {}),
    "drop_path": (train, {"vit.drop_path": 0.3}, 3),
    "drop_path_full": (train, {"vit.drop_path": 0.3, "activation_checkpointing": "full"}, 3),
    "bf16": (train, {"precision": "bf16"}, 3),
    **{f"golden {case}": (golden_steps, {}, case) for case in golden.CASES if case != SPLIT},
    "golden split": (golden_steps, {}, SPLIT, True),
}


def launch(world, work, *arguments):
    """Start work(rank, world, port, *arguments) for every rank, as torchrun does; exit codes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [
        server().Process(target=work, args=(rank, world, port, *arguments)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(500)
    return [process.exitcode for process in processes]


def be_rank(rank, world, port):
    """Take over the environment that torchrun gives to a rank."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}


def run_jobs(rank, world, port, jobs, folder):
    """Do the jobs on one rank and leave {name: result} in a file."""
    torch.set_num_threads(1)
    be_rank(rank, world, port)
    results = {}
    with process_group(tiny(folder, {"parallel": "ddp"})):
        for name, (job, changes, *arguments) in jobs.items():
            results[name] = job(folder, changes, *arguments)
    torch.save(results, folder / f"{world} ranks, {rank}.pt")


def on_ranks(jobs, folder, world):
    """The results of all ranks: [{name: result}, ...]."""
    assert launch(world, run_jobs, jobs, folder) == [0] * world
    files = [folder / f"{world} ranks, {rank}.pt" for rank in range(world)]
    return [torch.load(file, weights_only=False) for file in files]


def in_modes(jobs):
    """Each job once with DDP and once with FSDP2."""
    return {
        f"{mode} {name}": (job, changes | {"parallel": mode}, *arguments)
        for name, (job, changes, *arguments) in jobs.items()
        for mode in MODES
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """16 training and 7 test images of two classes, and the configuration."""
    folder, rng = tmp_path_factory.mktemp("parallel"), np.random.default_rng(0)
    for split, count in ("images", 16), ("val", 7):
        for i in range(count):
            path = folder / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(100 + 100 * (i % 2), size=(40, 44, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
    (folder / "tiny.yaml").write_text(TINY)
    return folder


@pytest.fixture(scope="module")
def one(folder):
    return {name: job(folder, *arguments) for name, (job, *arguments) in ALONE.items()}


@pytest.fixture(scope="module")
def two(folder):
    """Results of both of two ranks, which save at step 5 and continue what DDP and FSDP2 saved."""
    jobs = in_modes(TWO) | {"losses": (loss_functions, {})}
    for before in MODES:
        for mode in MODES:
            changes = {"parallel": mode, "out": before}
            jobs |= {f"{mode} continues {before}": (train, changes, 10, None, True)}
    return on_ranks(jobs, folder, 2)


@pytest.fixture(scope="module")
def four(folder, two):
    continues = (train, {"parallel": "fsdp"}, 10, None, True)
    return on_ranks(in_modes({"train": (train, {})}) | {"continues": continues}, folder, 4)


# ---- tests ---------------------------------------------------------------------------------------

FOUR = pytest.param(4, marks=pytest.mark.slow)


def assert_same_numbers(got, expected, tolerance=1e-5, weights=True):
    """Losses and gradient norms step by step, then final weights, to a relative tolerance."""
    for kind in ("terms", "norms"):
        assert len(got[kind]) == len(expected[kind]) > 0
        for ours, theirs in zip(got[kind], expected[kind], strict=True):
            assert ours == pytest.approx(theirs, rel=tolerance), kind
    for network in ("student", "teacher") if weights else ():
        assert got[network].keys() == expected[network].keys()
        for name, value in expected[network].items():
            error = (without_key_bias(name, got[network][name] - value)).norm()
            assert error <= tolerance * value.norm(), (network, name, error / value.norm())


def without_key_bias(name, value):
    """The same bias on all keys changes no attention: its gradient is 0, and Adam moves it by what
    rounding leaves."""
    return torch.cat(value.chunk(3)[::2]) if name.endswith("attn.qkv.bias") else value


@pytest.mark.parametrize("world", [2, FOUR])
@pytest.mark.parametrize("mode", MODES)
def test_ten_steps_are_those_of_one_process(one, request, mode, world):
    group = request.getfixturevalue({2: "two", 4: "four"}[world])
    assert one["train"]["norms"][5]["backbone"] > 1  # so that gradients were clipped, on shards too
    assert_same_numbers(group[0][f"{mode} train"], one["train"])


@pytest.mark.parametrize("mode", MODES)
def test_softmax_centering_knows_the_batch_of_all_ranks(one, two, mode):
    assert_same_numbers(two[0][f"{mode} softmax"], one["softmax"])
    for name, center in one["softmax"]["centers"].items():
        torch.testing.assert_close(two[0][f"{mode} softmax"]["centers"][name], center)
        assert center.abs().max() > 0


def test_losses_see_all_ranks_however_unequal_they_are(one, two):
    expected, ranks_ = one["losses"], [rank["losses"] for rank in two]
    for name in ("sinkhorn", "softmax", "koleo_grad", "ibot_grad"):
        torch.testing.assert_close(torch.cat([r[name] for r in ranks_]), expected[name], msg=name)
    for name in ("center", "koleo", "ibot"):
        for rank in ranks_:
            torch.testing.assert_close(rank[name], expected[name], msg=name)


@pytest.mark.parametrize("mode", MODES)
def test_micro_batches_add_up_where_targets_do_not_depend_on_the_batch(one, two, mode):
    for run in (one["accumulate"], two[0][f"{mode} accumulate"]):
        # The terms of the log are those of the last micro-batch.
        assert_same_numbers(run | {"terms": one["independent"]["terms"]}, one["independent"])


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_activation_checkpointing_changes_nothing(one, two, checkpointing):
    expected = {key: one["train"][key][:3] for key in ("terms", "norms")}
    assert_same_numbers(one[checkpointing], expected, tolerance=0, weights=False)
    for mode in MODES:
        assert_same_numbers(two[0][f"{mode} {checkpointing}"], expected, weights=False)


def test_parameters_have_the_same_clean_names_in_every_mode(one, two):
    expected = list(one["train"]["student"])
    assert "backbone.blocks.0.attn.qkv.weight" in expected
    for found in (one["names"], one["names_compiled"], two[0]["ddp names"], two[0]["fsdp names"]):
        assert found["names"] == expected


def test_networks_have_no_memory_before_they_are_sharded(two):
    assert two[0]["fsdp names"]["on_meta"]


@pytest.mark.parametrize("world", [2, FOUR])
def test_after_a_step_a_rank_stores_its_share_of_the_teacher(request, world):
    group = request.getfixturevalue({2: "two", 4: "four"}[world])
    shares = [rank["fsdp train"]["stored"] for rank in group]  # resharded after the forward pass
    assert sum(shares) == pytest.approx(1)
    # A parameter of one row, such as [CLS], cannot be cut: the first rank has it.
    assert max(shares) < 1.1 / world
    assert group[0]["ddp train"]["stored"] == 1


def test_stochastic_depth_is_drawn_for_each_rank_and_works_in_every_mode(two):
    a, b = (two[0][f"{mode} drop_path"] for mode in MODES)
    assert_same_numbers(a, b)
    assert_same_numbers(two[0]["fsdp drop_path_full"], b)  # recomputed with the same images
    assert a["terms"] != two[0]["ddp train"]["terms"][:3]


def test_in_bf16_weights_stay_fp32_and_losses_near(one, two):
    for mode in MODES:
        run = two[0][f"{mode} bf16"]
        assert run["dtypes"] == {torch.float32}
        for ours, theirs in zip(run["terms"], one["train"]["terms"], strict=False):
            assert ours == pytest.approx(theirs, rel=0.03)  # 8 bits of mantissa: 0.4 % a rounding


def assert_golden(run, case):
    """The tolerances of tests/golden/README.md, as in test_golden_steps.py."""
    z, _ = golden.load(case)
    steps = range(golden.STEPS)
    total = torch.tensor([run["terms"][i]["loss"] for i in steps])
    golden.close(total, z["total_loss_optimised"], 2e-5)
    for name, expected in golden.part(z, "grad_norm_before_clip/").items():
        got = torch.tensor([run["norms"][i][name] for i in steps])
        golden.close(got / expected, torch.ones(len(steps)), 1e-5, name)
    for name, expected in golden.part(z, "step0/grad/").items():
        assert (run["grads"][name] - expected).abs().max() < 5e-5 * expected.abs().max(), name
    for network in ("student", "teacher"):
        for name, expected in golden.part(z, f"final/{network}/").items():
            error = without_key_bias(name, run[network][name] - expected)
            assert error.abs().max() < 5e-6, (network, name)


@pytest.mark.parametrize("case", [case for case in golden.CASES if case != SPLIT])
@pytest.mark.parametrize("mode", MODES)
def test_golden_steps_pass_on_two_ranks(two, mode, case):
    assert_golden(two[0][f"{mode} golden {case}"], case)


@pytest.mark.parametrize("mode", MODES)
def test_golden_steps_pass_when_each_rank_has_half_of_the_images(two, mode):
    assert_golden(two[0][f"{mode} golden split"], SPLIT)


@pytest.mark.parametrize("case", golden.CASES)
@pytest.mark.parametrize("attention", ["plain", "sdpa", "auto"])
def test_golden_steps_pass_with_every_attention_of_a_cpu(one, attention, case):
    assert_golden(one[f"golden {case} {attention}"], case)


def test_k_nn_is_the_same_figure_when_ranks_share_the_images(one, two):
    for mode in MODES:
        found = two[1][f"{mode} knn"]
        assert found["figures"] == one["knn"]["figures"]
        for ours, theirs in zip(found["features"], one["knn"]["features"], strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("world", [1, 2, FOUR])
def test_a_checkpoint_of_two_ranks_continues_on_one_two_and_four(request, folder, two, world):
    expected = two[0]["fsdp train"]  # which went on to step 10
    if world == 1:
        runs = [train(folder, {"out": "fsdp"}, resume=True)]
    elif world == 2:
        runs = [two[0][f"{mode} continues fsdp"] for mode in MODES]
    else:
        runs = [request.getfixturevalue("four")[0]["continues"]]
    for run in runs:
        assert run["start"] == 5
        late = {key: expected[key][5:] for key in ("terms", "norms")}
        assert_same_numbers(run, expected | late)


def test_a_checkpoint_of_ddp_continues_with_fsdp(two):
    expected = two[0]["ddp train"]
    for mode in MODES:
        run = two[0][f"{mode} continues ddp"]
        late = {key: expected[key][5:] for key in ("terms", "norms")}
        assert_same_numbers(run, expected | late)


@pytest.mark.parametrize("mode", MODES)
def test_continued_the_same_way_a_run_is_equal_bit_for_bit(two, mode):
    expected, run = two[0][f"{mode} train"], two[0][f"{mode} continues {mode}"]
    assert run["terms"] == expected["terms"][5:]
    for network in ("student", "teacher"):
        for name, value in expected[network].items():
            assert torch.equal(run[network][name], value), name


# ---- compiling -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiled_blocks_give_the_same_losses_in_every_mode(folder, one):
    expected = {key: one["train"][key][:3] for key in ("terms", "norms")}
    job = (train, {"compile": True}, 3)
    both = on_ranks(in_modes({"compiled": job}), folder, 2)[0]
    for run in [train(folder, *job[1:]), *both.values()]:
        assert_same_numbers(run, expected, weights=False)


# ---- memory --------------------------------------------------------------------------------------

KEPT = """
import torch, parallel

def left():
    before = resident()
    torch.ones(64, 2**18)
    return resident() - before

def resident():
    return next(int(row.split()[1]) / 1024 for row in open("/proc/self/status") if "VmRSS" in row)

by_default = left()
parallel.pick_device("cpu")
print(by_default, left())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only its defaults are changed")
def test_on_a_cpu_the_64_megabytes_of_a_freed_tensor_stay_for_the_next_one():
    code = [sys.executable, "-c", KEPT]
    done = subprocess.run(code, cwd=ROOT, capture_output=True, text=True, check=True)
    by_default, kept = map(float, done.stdout.split())
    assert by_default < 8 < 56 < kept < 72


# ---- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "has, dtype", [("avx512_bf16", "bfloat16"), ("amx_bf16", "bfloat16"), ("avx2", "float32")]
)
def test_precision_auto_is_bf16_where_the_processor_multiplies_it(monkeypatch, has, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {has: True, "avx512_fp16": False})
    assert dtype_of(Config(device="cpu")) == getattr(torch, dtype)
    assert dtype_of(Config(device="cpu", precision="bf16")) == torch.bfloat16


@pytest.mark.parametrize(
    ("world", "words", "says"),
    [
        (2, "", "2 processes with parallel=none: use parallel=ddp or parallel=fsdp"),
        (None, "parallel=fsdp", "parallel=fsdp needs a launcher: torchrun train.py"),
        (3, "parallel=ddp", "batch=8 does not divide into 3 processes x 1 micro-batches: use"),
        (2, "parallel=ddp accumulate=8", "2 processes x 8 micro-batches: use batch=16"),
        (None, "parallel=horovod", "parallel=horovod is unknown: use one of none, ddp, fsdp"),
        (None, "attention=flash3", "attention=flash3 is unknown: use one of auto, "),
        (None, "attention=xformers", "xformers has no kernel for cpu: use attention=auto"),
        (None, "attention=varlen", "varlen has no kernel for cpu: use attention=auto"),
        (None, "precision=fp16", "precision=fp16 needs a CUDA device, this is cpu"),
        (None, "precision=fp16 device=auto", "precision=fp16 needs a CUDA device, this is cpu"),
        (None, "device=cuda", "device=cuda, but PyTorch sees no CUDA device: use device=cpu"),
    ],
)
def test_what_does_not_fit_together_is_said_in_one_line(folder, monkeypatch, world, words, says):
    if torch.cuda.is_available() and "cuda" in says.lower():
        pytest.skip("this machine has a GPU")
    if world:
        monkeypatch.setenv("WORLD_SIZE", str(world))
        monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError) as error, process_group(tiny(folder, dict(pairs(words)))):
        pass
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def pairs(words):
    return [word.split("=") for word in words.split()]


def test_xformers_that_is_not_installed_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers", None)  # import then fails as if it was missing
    with pytest.raises(UserError, match=r"attention=xformers: .* pip install xformers"):
        check_backend("xformers", torch.device("cuda"), torch.bfloat16)


XFORMERS_SAYS = """No operator found for `memory_efficient_attention_forward` with inputs:
     query       : shape=(1, 2, 1, 16) (torch.bfloat16)
`fa2F@0.0.0` is not supported because:
    xFormers wasn't build with CUDA support
`cutlassF-pt` is not supported because:
    xFormers wasn't build with CUDA support
    operator wasn't built - see `python -m xformers.info` for more info"""


def test_xformers_without_kernels_says_in_one_line_what_is_missing(monkeypatch):
    def refuse(*_):
        raise NotImplementedError(XFORMERS_SAYS)

    monkeypatch.setattr(attention, "pack", refuse)
    with pytest.raises(UserError) as error:
        check_backend("xformers", torch.device("cuda"), torch.bfloat16, 16)
    said = str(error.value)
    assert "no kernel for bfloat16 and heads of 16 channels (xFormers wasn't build with" in said
    assert said.endswith("use attention=auto") and "\n" not in said


def test_the_cuda_library_of_xformers_is_loaded_from_where_pip_put_it(monkeypatch):
    loaded, files = [], ["nvidia/cuda_runtime/__init__.py", "nvidia/cuda_runtime/libcudart.so.12"]
    installed = [metadata.PackagePath(file) for file in files]
    for file in installed:
        file.dist = SimpleNamespace(locate_file=lambda path: Path("/site", path))
    monkeypatch.setattr(metadata, "files", lambda name: installed)
    monkeypatch.setattr(attention.ctypes, "CDLL", loaded.append)
    attention.open_cuda_12()
    assert loaded == ["/site/nvidia/cuda_runtime/libcudart.so.12"]


@pytest.mark.parametrize("asked, on_cpu", [("auto", False), ("true", True), ("false", False)])
def test_compile_auto_is_for_gpus(folder, asked, on_cpu):
    assert compiles(tiny(folder, {"compile": asked})) is on_cpu


def test_compiling_without_a_compiler_is_refused_in_one_line_and_not_done_by_itself(
    folder, monkeypatch
):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not compiles(tiny(folder, {"compile": "auto"}))
    with pytest.raises(UserError, match=r"compile=true needs g\+\+ and .*, or use compile=false"):
        compiles(tiny(folder, {"compile": "true"}))


def complain(rank, world, port, words, folder):
    """train.py on one rank, with its stderr in a file."""
    be_rank(rank, world, port)
    os.dup2(os.open(folder / f"stderr {rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    train_script.main(words)


def test_bad_input_ends_every_rank_with_code_2_and_is_printed_once(folder):
    words = [str(folder / "tiny.yaml"), "parallel=ddp", "batch=7", f"data.root={folder}/images"]
    assert launch(2, complain, words, folder) == [2, 2]
    said = [(folder / f"stderr {rank}").read_text() for rank in range(2)]
    assert said[0].startswith("error: batch=7 does not divide into 2 processes")
    assert said[0].count("\n") == 1
    assert said[1] == ""


@config.report_errors
def wait_in_vain(rank, world, port, folder):
    """Rank 0 waits for a sum in which rank 1 never takes part."""
    be_rank(rank, world, port)
    os.environ["COLLECTIVE_TIMEOUT"] = "2"
    os.dup2(os.open(folder / f"stderr {rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    with process_group(tiny(folder, {"parallel": "ddp"})):
        time.sleep(6) if rank else sum_over_ranks(torch.ones(1))


def test_a_collective_that_hangs_ends_in_a_clear_message(folder):
    assert launch(2, wait_in_vain, folder)[0] == 2
    said = (folder / "stderr 0").read_text()
    assert said.startswith("error: rank 0 of 2: another process died or did not answer within 2 s")
    assert "--max-restarts" in said
    assert said.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the rank in /proc")
def test_a_killed_rank_comes_back_under_torchrun_and_the_end_is_the_same(folder):
    photos = f"{folder}/images"
    words = ["parallel=fsdp", "steps=24", "log.save_every=6", "log.knn_every=0"]
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    program += ["--max-restarts=3", str(ROOT / "train.py")]
    undisturbed = running.tiny(folder / "undisturbed", photos, *words)
    subprocess.run([*program, *undisturbed], check=True, timeout=500)
    with subprocess.Popen([*program, *running.tiny(folder / "killed", photos, *words)]) as launcher:
        running.wait_for(lambda: checkpoints(folder / "killed"))
        os.kill(rank_1_of(launcher.pid), signal.SIGKILL)
        assert launcher.wait(500) == 0
    running.assert_same_run(folder / "killed", folder / "undisturbed")


def rank_1_of(launcher):
    """Process id of the second rank below a torchrun."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return next(int(p) for p in children if b"RANK=1" in rank_environment(p))


def rank_environment(process):
    return Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
