"""What only a CUDA device can show; everything here is skipped where there is none.

Run:  pytest tests/test_gpu.py        (under two minutes on one GPU, most of it compiling)
"""

import signal

import pytest
import running
import test_golden_steps as golden
import torch
from test_bench_plan import plan_page
from test_parallel import TINY, assert_golden, assert_same_numbers, golden_steps, train

import config
import data
import train as train_script
from attention import check_backend
from bench import plan
from config import UserError
from images.sources import open_source
from optim import schedules
from parallel import process_group, without_tf32

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
GPU = torch.device("cuda")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    running.make_photos(folder / "photos")
    (folder / "tiny.yaml").write_text(TINY)
    (folder / "images").symlink_to(folder / "photos" / "train")
    return folder


@pytest.fixture
def one_rank(monkeypatch):
    """The environment of a launch with one process."""
    around = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost"}
    for name, value in (around | {"MASTER_PORT": 29531}).items():
        monkeypatch.setenv(name, str(value))


def settings(folder, *words):
    words = [f"out={folder}/out", f"data.root={folder}/images", "device=cuda", *words]
    return config.load(folder / "tiny.yaml", words)


@pytest.mark.parametrize("parallel", ["none", "ddp", "fsdp"])
@pytest.mark.parametrize("case", golden.CASES)
def test_golden_steps_pass_in_fp32(folder, one_rank, case, parallel):
    changes = {"device": "cuda", "parallel": parallel}
    with process_group(settings(folder, f"parallel={parallel}")), without_tf32():
        assert_golden(golden_steps(folder, changes, case), case)


@pytest.mark.parametrize("parallel", ["none", "ddp", "fsdp"])
def test_golden_losses_are_near_in_bf16(folder, one_rank, parallel):
    changes = {"device": "cuda", "parallel": parallel, "precision": "bf16"}
    with process_group(settings(folder, f"parallel={parallel}")):
        run = golden_steps(folder, changes, golden.CASES[0])
    expected = golden.load(golden.CASES[0])[0]["total_loss_optimised"].tolist()
    got = [terms["loss"] for terms in run["terms"]]
    assert got == pytest.approx(expected, rel=0.03)  # 8 bits of mantissa: 0.4 % a rounding


def losses_of_three_steps(folder, attention, compiled):
    keys = {"precision": "bf16", "attention": attention, "compile": compiled, "device": "cuda"}
    with process_group(settings(folder)):
        torch.compiler.set_stance("default")
        run = train(folder, keys | {"vit.drop_path": 0.3}, steps=3)
    return [terms["loss"] for terms in run["terms"]]


@pytest.mark.parametrize("compiled", ["false", "true"])
@pytest.mark.parametrize("attention", ["auto", "sdpa", "varlen", "xformers", "plain"])
def test_every_attention_trains_alike_compiled_or_not(folder, attention, compiled):
    try:
        check_backend(attention, GPU, torch.bfloat16, 32)
    except UserError as error:
        pytest.skip(str(error))
    expected = losses_of_three_steps(folder, "plain", "false")
    got = losses_of_three_steps(folder, attention, compiled)
    assert got == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_step_has_the_gradients_of_a_plain_one(folder, precision):
    """Of a whole step with stochastic depth: losses, heads, blocks."""

    def gradients(compiled):
        words = f"precision={precision}", f"compile={compiled}", "vit.drop_path=0.3"
        cfg = settings(folder, *words)
        with process_group(cfg), without_tf32():
            torch.compiler.set_stance("default" if compiled == "true" else "force_eager")
            source = open_source(cfg.data.root, cfg, "train")
            run = train_script.Run(cfg, GPU, source)
            batch = next(iter(data.loader(cfg, source, 0, 0, 1)))
            parts = train_script.micro_batches(batch, cfg, GPU)
            ask, rng = train_script.own_teacher(run), train_script.seeded("")
            train_script.backward([run], ask, parts, schedules(5, cfg), rng, False)
        torch.compiler.set_stance("default")
        return {name: p.grad.cpu() for name, p in run.student.named_parameters()}

    plain, compiled = gradients("false"), gradients("true")
    for name, grad in plain.items():
        error = (compiled[name] - grad).norm() / grad.norm().clamp(min=1e-8)
        assert error < (1e-3 if precision == "fp32" else 0.1), name


def test_a_head_width_without_a_kernel_is_refused_in_one_line():
    with pytest.raises(UserError) as error:
        check_backend("varlen", GPU, torch.bfloat16, 520)
    assert "use attention=auto" in str(error.value) and "\n" not in str(error.value)


def test_a_run_that_was_interrupted_ends_as_if_it_had_not(folder):
    keys = {"precision": "bf16", "device": "cuda"}
    whole = train(folder, keys | {"out": "resumed"}, save_at=5)
    rest = train(folder, keys | {"out": "resumed"}, resume=True)
    assert rest["start"] == 5
    late = {key: whole[key][5:] for key in ("terms", "norms")}
    assert_same_numbers(rest, whole | late, tolerance=0.01)


def test_a_step_never_waits_for_the_device(folder):
    cfg = settings(folder, "precision=bf16", "compile=false", "vit.drop_path=0.3", "log.every=100")
    source = open_source(cfg.data.root, cfg, "train")
    run = train_script.Run(cfg, GPU, source)
    batches = data.loader(cfg, source, 0, 0, 1)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    watch = train_script.Watch()
    try:
        for step in (1, 2):  # the first makes the optimiser's moments, and caches
            torch.cuda.set_sync_debug_mode("error" if step == 2 else "default")
            parts = train_script.micro_batches(next(batches), cfg, GPU)
            now, rng = schedules(step, cfg), train_script.seeded("")
            ask = train_script.own_teacher(run)
            (log,) = train_script.backward([run], ask, parts, now, rng, False)
            run.update(step, now, log, watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_step_takes_the_memory_that_was_planned(folder):
    words = ["precision=bf16", "compile=false", "attention=sdpa", "batch=256", "vit.drop_path=0.3"]
    cfg = settings(folder, *words, "crops.global_size=96", "head.prototypes=4096")
    with process_group(cfg):  # which compiles nothing, the losses neither: as it was planned
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        real = plan_page.real_peak(cfg, GPU) - held
    torch.compiler.set_stance("default")
    cfg.device = "cpu"
    assert plan.plan_step(cfg, 1).peak == pytest.approx(real, rel=0.1)
