"""train.py: a run can be killed at any moment and ends as if it had not been; errors are one line.

Run: pytest tests/test_train.py        (half a minute on one core; helpers are in tests/running.py)

Runs are processes of their own. Equal means equal to the last bit: CPU, fp32, one thread.
"""

import math
import os
import random
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from running import (
    ROOT,
    Run,
    assert_same_run,
    checkpoints,
    log_of,
    make_photos,
    run,
    tensors_of,
    tiny,
    wait_for,
)

import train

# The parts of PyTorch that write checkpoints say so in every process that is the only one.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, photos):
    """The folder of a run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    done = run(folder, tiny(folder / "run", photos))
    assert done.code == 0, done.err
    return folder / "run"


@pytest.fixture
def handlers():
    """For runs inside the test's process: give the signals back."""
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def refused(capsys, *words):
    """The one line on stderr of a command line that main() refuses with exit code 2."""
    with pytest.raises(SystemExit) as leaving:
        train.main([str(word) for word in words])
    assert leaving.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    return line


# ---- killed and continued -----------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_any_moment_a_run_ends_equal_bit_for_bit(tmp_path, photos, whole, workers):
    out, chance, kills = tmp_path / "run", random.Random(workers), 0
    words = tiny(out, photos, f"data.workers={workers}")
    for least in range(0, 15, 5):  # lines that the log has before the kill: later and later
        attempt = Run(tmp_path, words)
        attempt.wait_for(lambda n=least: len(log_of(out)) >= n)
        attempt.process.join(chance.random() / 10)
        attempt.kill(signal.SIGKILL)
        kills += attempt.finish().code == -signal.SIGKILL
    assert kills >= 2
    last = run(tmp_path, words)
    assert last.code == 0, last.err
    assert_same_run(out, whole)


def test_killed_while_it_saves_a_run_ends_equal_bit_for_bit(tmp_path, photos, whole):
    out = tmp_path / "run"
    for steps in 4, 8:
        attempt = Run(tmp_path, tiny(out, photos))
        attempt.wait_for(lambda n=steps: list(out.glob(f"checkpoints/*{n}.part")))
        attempt.kill(signal.SIGKILL)
        attempt.finish()
    assert run(tmp_path, tiny(out, photos)).code == 0
    assert_same_run(out, whole)
    assert not list(out.rglob("*.part"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_and_the_run_goes_on_equal(tmp_path, photos, whole, number):
    out = tmp_path / "run"
    words = tiny(out, photos, "log.save_every=1000")
    stopped = Run(tmp_path, words)
    stopped.wait_for(lambda: len(log_of(out)) >= 2)
    stopped.kill(number)
    assert stopped.finish().code == 128 + number
    assert "saved; the same command continues" in stopped.out
    assert stopped.err.strip().startswith(f"{number.name}: finishing this step")
    assert len(checkpoints(out)) == 1
    assert run(tmp_path, words).code == 0
    assert_same_run(out, whole)


def test_a_second_signal_leaves_at_once(tmp_path, photos):
    impatient = Run(tmp_path, tiny(tmp_path / "run", photos, "steps=100000"))
    impatient.wait_for(lambda: len(log_of(tmp_path / "run")) >= 3)
    impatient.kill(signal.SIGSTOP)  # so that both are there when it goes on
    impatient.kill(signal.SIGTERM)
    impatient.kill(signal.SIGINT)
    impatient.kill(signal.SIGCONT)
    assert impatient.finish().code in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    assert impatient.err.count("SIG") == 1 and "Traceback" not in impatient.err


def test_a_finished_run_says_so_and_changes_nothing(tmp_path, photos, whole):
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in whole.rglob("*") if p.is_file()}
    again = run(tmp_path, tiny(whole, photos))
    assert again.code == 0 and "is finished (12 steps" in again.out
    assert before == {
        p: (p.stat().st_mtime_ns, p.read_bytes()) for p in whole.rglob("*") if p.is_file()
    }


def test_a_run_killed_after_its_last_step_still_makes_its_report(tmp_path, photos, whole):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "summary.json").unlink()
    assert run(tmp_path, tiny(out, photos)).code == 0
    assert (out / "summary.json").exists()
    assert_same_run(out, whole)


@pytest.mark.parametrize("word", ["optim.lr=1e-3", "vit.size=micro", "seed=1", "steps=24"])
def test_another_config_is_refused_by_its_key(capsys, photos, whole, handlers, word):
    key = word.split("=")[0]
    line = refused(capsys, *tiny(whole, photos, word))
    assert f"was started with {key}=" in line
    # The run is finished: more steps begin from it, anything else is another run.
    assert ("init_from=" if key == "steps" else "to continue this one") in line


# ---- numbers that are not finite ----------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_and_is_named(tmp_path, photos):
    words = ["optim.lr=1e30", "optim.warmup=0", "log.save_every=1"]
    exploded = run(tmp_path, tiny(tmp_path / "run", photos, *words))
    assert exploded.code == 2
    assert exploded.err.count("\n") == 1 and "is not finite (loss=" in exploded.err
    assert "NaN" not in (tmp_path / "run" / "log.jsonl").read_text()  # it is not json
    assert all(torch.isfinite(value).all() for value in tensors_of(tmp_path / "run").values())


def test_a_gradient_that_is_not_finite_reaches_neither_weights_nor_disk(
    tmp_path, photos, capsys, handlers, monkeypatch
):
    honest, steps = train.backward, []

    def spoiled(runs, *rest):
        logs = honest(runs, *rest)
        steps.append(runs[0].student)
        if len(steps) == 6:
            next(steps[-1].backbone.parameters()).grad.fill_(torch.inf)
        return logs

    monkeypatch.setattr(train, "backward", spoiled)
    line = refused(capsys, *tiny(tmp_path / "run", photos, "log.save_every=2"))
    assert "step 6 is not finite (grad_backbone=" in line
    assert all(torch.isfinite(p).all() for p in steps[-1].parameters())
    wait_for(lambda: checkpoints(tmp_path / "run")[-1].name == "0000004")  # a thread writes it
    assert all(torch.isfinite(value).all() for value in tensors_of(tmp_path / "run").values())


# ---- learning -----------------------------------------------------------------------------------

# No colour changes, so that there is something to recognise at once.
LEARN = """
    augment.jitter=0 augment.grey=0 augment.blur=[0,0,0] augment.solarize=[0,0,0] vit.drop_path=0
    loss.centering=sinkhorn teacher.temp_warmup=0 teacher.temp=0.04 optim.lr=2e-2 optim.warmup=5
    log.knn=false
""".split()  # noqa: SIM905


def test_the_embedded_images_lower_the_loss_at_once(tmp_path, handlers):
    words = ["steps=16", "batch=16", "data.synthetic_images=128"]
    train.main(tiny(tmp_path, "synthetic", *LEARN, *words))
    assert not any("knn" in line for line in log_of(tmp_path))
    loss = [line["loss"] for line in log_of(tmp_path) if "loss" in line]
    assert max(loss[-5:]) < min(loss[:3])


def test_two_kinds_of_images_are_worth_one_bit(tmp_path, photos):
    run(tmp_path, tiny(tmp_path / "run", photos, *LEARN, "steps=24", "batch=16"))
    last = [line for line in log_of(tmp_path / "run") if "loss" in line][-1]
    # Knowing nothing costs ln 32 nats, knowing dark from light ln 32 - ln 2: most of the way.
    assert last["dino_global"] + last["dino_local"] < math.log(32) - 0.7 * math.log(2)


# ---- bad input ----------------------------------------------------------------------------------

BAD = [
    # words                         what the line must hold: the key or file, and the fix
    ("optim.lrr=1", "unknown key optim.lrr; did you mean optim.lr?"),
    ("steps=many", "steps must be a whole number, got many"),
    ("crops.global_size=17", "crops.global_size=17 is not a multiple of vit.patch=8: use 16"),
    ("data.root=/nowhere", "data.root=/nowhere: no such folder"),
    ("data.val=/nowhere", "data.val=/nowhere: no such folder"),
    ("data.root={tmp}", "no images"),
    ("batch=1000", "30 images are fewer than batch=1000: use batch=30 or less"),
    ("out={file}/run", "cannot be written"),
    ("precision=fp16", "precision=fp16 needs a CUDA device"),
    ("precision=fp16 device=auto", "use precision=auto"),
    ("attention=xformers", "use attention=auto"),
    ("vit.size=huge", "huge"),
    ("device=cuda", "device=cpu"),
    ("parallel=ddp", "torchrun"),
    ("data.channels=1", "data.mean"),
    ("nonsense", "key=value"),
]


@pytest.mark.parametrize("words, expected", BAD, ids=[words for words, _ in BAD])
def test_bad_input_is_one_line_with_the_fix(tmp_path, photos, capsys, handlers, words, expected):
    if torch.cuda.is_available() and ("cuda" in words or "auto" in words):
        pytest.skip("this machine can do it")
    file = tmp_path / "file"
    file.touch()
    empty = tmp_path / "empty"
    empty.mkdir()
    words = [word.format(tmp=empty, file=file) for word in words.split()]
    assert expected in refused(capsys, *tiny(tmp_path / "run", photos, *words))


def test_more_workers_than_cores_are_no_reason_for_a_warning(tmp_path, photos):
    workers = f"data.workers={os.cpu_count() + 1}"
    done = run(tmp_path, tiny(tmp_path / "run", photos, workers, "steps=1", "log.knn=false"))
    assert done.code == 0 and done.err == ""


def test_a_number_may_be_written_1e_6(tmp_path, photos):
    words = ["optim.min_lr=1e-6", "steps=1", "log.knn=false"]
    assert run(tmp_path, tiny(tmp_path / "run", photos, *words)).code == 0


def test_help_explains_every_key_and_no_words_are_an_error(tmp_path):
    helped = run(tmp_path / "a", ["--help"])
    assert helped.code == 0 and "optim.lr" in helped.out and "usage: python train.py" in helped.out
    silent = run(tmp_path / "b", [])
    assert silent.code == 2 and "usage: python train.py" in silent.out


# ---- the commands as they are typed -------------------------------------------------------------


def command(*words):
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_the_bare_script_refuses_without_a_traceback():
    refusal = command("train.py", "config.yaml", "optim.lrr=1")
    assert refusal.returncode == 2
    assert refusal.stderr == (
        "error: override optim.lrr=1: unknown key optim.lrr; did you mean optim.lr?\n"
    )


def test_ctrl_c_under_torchrun_saves(tmp_path, photos, whole):
    out = tmp_path / "run"
    words = [ROOT / "train.py", *tiny(out, photos, "steps=100000", "log.knn=false")]
    launched = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    wait_for(lambda: len(log_of(out)) >= 3)
    launched.send_signal(signal.SIGINT)
    printed, _ = launched.communicate(timeout=60)
    step = int(checkpoints(out)[-1].name)
    assert f"stopped after step {step} and saved" in printed
