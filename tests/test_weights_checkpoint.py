"""weights/checkpoint.py: whatever happens while saving, and whatever lies there when loading.

Run: pytest tests/test_weights_checkpoint.py        (ten seconds; helpers: tests/running.py)

That a continued run is equal bit for bit is in test_train.py, and on several ranks in
test_parallel.py.
"""

import json
import pickle
import shutil
import signal
import zipfile
import zlib

import pytest
import torch
from running import (
    Run,
    assert_same_run,
    checkpoints,
    log_of,
    make_photos,
    run,
    tensors_of,
    tiny,
)

from config import Config, UserError, to_dict
from weights import checkpoint
from weights.load import load_backbone


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def half(tmp_path_factory, photos):
    """The folder of a run that was stopped in the middle: checkpoints of steps 4 and 8."""
    for _ in range(5):  # on a busy machine, the kill may come too late
        out = tmp_path_factory.mktemp("half") / "run"
        stopped = Run(out.parent, tiny(out, photos))
        stopped.wait_for(lambda out=out: (out / "checkpoints" / "0000008").exists())
        stopped.kill(signal.SIGKILL)
        stopped.finish()
        if [path.name for path in checkpoints(out)] == ["0000004", "0000008"]:
            return out
    raise AssertionError("never stopped in time")


@pytest.fixture
def out(tmp_path, half):
    """A copy of it, to damage."""
    return shutil.copytree(half, tmp_path / "run")


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # in the middle of the weights: nothing but a checksum sees it
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


# ---- loading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [truncate, flip_a_byte, empty, "unlink"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, out, photos, damage):
    newest = checkpoints(out)[-1]
    largest(newest).unlink() if damage == "unlink" else damage(largest(newest))
    done = run(tmp_path, tiny(out, photos))
    assert done.code == 0, done.err
    named = [line for line in done.out.splitlines() if f"warning: {newest}: damaged" in line]
    assert len(named) == 1 and "trying the checkpoint before it" in named[0]
    assert "continues after step 4" in done.out


def test_falling_back_ends_equal_bit_for_bit(tmp_path, out, photos):
    again = shutil.copytree(out, tmp_path / "again")
    flip_a_byte(largest(checkpoints(again)[-1]))
    for folder in out, again:
        assert run(tmp_path, tiny(folder, photos)).code == 0
    assert_same_run(again, out)


@pytest.mark.parametrize("damage", [truncate, flip_a_byte])
def test_if_all_are_damaged_one_line_says_so(tmp_path, out, photos, damage):
    for folder in checkpoints(out):
        damage(largest(folder))
    refused = run(tmp_path, tiny(out, photos))
    assert refused.code == 2
    assert refused.err.count("\n") == 1 and "no checkpoint can be read" in refused.err


def test_a_file_with_code_in_it_is_refused_and_nothing_is_run(tmp_path, out, photos):
    bomb, blown = pickle.dumps(Bomb(tmp_path / "blown")), tmp_path / "blown"
    for folder in checkpoints(out):
        for path in list(folder.iterdir()):
            path.write_bytes(bomb)
    assert run(tmp_path, tiny(out, photos)).code == 2
    teacher = out / "teacher.pt"
    teacher.write_bytes(bomb)  # an old-style pickle, and one in a zip as torch.save makes them
    with pytest.raises(UserError, match="cannot be read"):
        load_backbone(out)
    torch.save({"backbone": Bomb(blown), "config": {}}, teacher)
    with pytest.raises(UserError, match="cannot be read") as error:
        load_backbone(out)
    assert len(str(error.value).splitlines()) == 1 and not blown.exists()


@pytest.mark.parametrize("damage", [truncate, flip_a_byte, empty])
def test_a_damaged_teacher_file_is_one_line(out, damage):
    damage(out / "teacher.pt")
    with pytest.raises(UserError, match=r"teacher\.pt: "):
        load_backbone(out)


def test_a_file_that_is_no_teacher_is_one_line(tmp_path):
    with zipfile.ZipFile(tmp_path / "teacher.pt", "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(UserError, match=r"teacher\.pt: "):
        load_backbone(tmp_path)
    torch.save([1, 2], tmp_path / "teacher.pt")
    with pytest.raises(UserError, match=r"teacher\.pt: "):
        load_backbone(tmp_path)


# ---- the same run? ------------------------------------------------------------------------------


def test_a_checkpoint_of_an_earlier_version_continues(tmp_path, out, photos):
    """Its card knows neither the images nor later keys; a file has its size and CRC-32."""
    for folder in checkpoints(out):
        card = json.loads((folder / "run.json").read_text())
        for name, (size, crc) in card["files"].items():
            data = (folder / name).read_bytes()
            assert (size, crc) == (len(data), zlib.crc32(data))
        del card["images"], card["config"]["log"]["knn"], card["config"]["optim"]["clip_by"]
        (folder / "run.json").write_text(json.dumps(card))
    done = run(tmp_path, tiny(out, photos))
    assert done.code == 0 and "continues after step 8" in done.out, done.err


def test_a_data_set_that_was_moved_continues(tmp_path, out, photos):
    moved = shutil.copytree(photos, tmp_path / "elsewhere")
    done = run(tmp_path, tiny(out, f"{moved}/../elsewhere/"))
    assert done.code == 0 and "continues after step 8" in done.out, done.err


def test_other_images_are_refused_wherever_they_lie(tmp_path, out, photos):
    other = shutil.copytree(photos, tmp_path / "other")
    (other / "train" / "dark" / "0.png").rename(other / "train" / "dark" / "new.png")
    refused = run(tmp_path, tiny(out, other))
    assert refused.code == 2 and refused.err.count("\n") == 1
    assert "other images: 30 in 2 classes, now 30 in 2 classes or of other names" in refused.err


def test_more_steps_are_refused_and_a_finished_run_says_how_to_go_on():
    cfg, images = Config(out="runs/x", steps=200), checkpoint.fingerprint([])
    for step, said in (50, "or steps=100 to continue"), (100, "or init_from=runs/x there to go on"):
        card = {"step": step, "config": to_dict(Config(steps=100)), "images": images}
        with pytest.raises(UserError, match=f"started with steps=100, now it is 200: .*{said}"):
            checkpoint.check_same(card, cfg, images)


# ---- saving -------------------------------------------------------------------------------------


def test_the_last_two_are_kept_with_nothing_beside_them(tmp_path, out, photos):
    stale = out / "checkpoints" / "0000004.part"
    shutil.copytree(checkpoints(out)[0], stale)  # left by a kill
    assert run(tmp_path, tiny(out, photos)).code == 0
    assert [p.name for p in sorted((out / "checkpoints").iterdir())] == ["0000008", "0000012"]
    assert not list(out.rglob("*.part"))


def test_every_nth_teacher_is_kept_and_opens_by_its_path(tmp_path, photos):
    words = ["log.keep_every=3", "log.save_every=100", "steps=8", "log.knn_every=0"]
    out = tmp_path / "run"
    assert run(tmp_path, tiny(out, photos, *words)).code == 0
    kept = sorted((out / "teachers").iterdir())
    assert [path.name for path in kept] == ["0000003.pt", "0000006.pt"]
    assert [checkpoint.read(path)["step"] for path in kept] == [3, 6]
    states = [load_backbone(path).state_dict() for path in (*kept, out)]
    norms = [state["norm.bias"] for state in states]
    assert not torch.equal(norms[0], norms[1]) and not torch.equal(norms[1], norms[2])


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_full_disk_leaves_the_checkpoint_before_whole(tmp_path, out, photos, share):
    before = tensors_of(out)
    size = max(20_000, int(share * largest(checkpoints(out)[-1]).stat().st_size))
    failed = run(tmp_path, tiny(out, photos), limit=size)
    assert failed.code == 2
    assert failed.err.count("\n") == 1 and "cannot be written" in failed.err, failed.err
    assert [p.name for p in checkpoints(out)] == ["0000004", "0000008"]
    after = tensors_of(out)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not list(out.rglob("*.part"))
    assert run(tmp_path, tiny(out, photos)).code == 0


def test_a_complete_checkpoint_has_its_teacher(tmp_path, photos):
    out = tmp_path / "run"
    killed = Run(tmp_path, tiny(out, photos))
    killed.wait_for(lambda: checkpoints(out))
    killed.kill(signal.SIGKILL)
    killed.finish()
    assert checkpoint.read(out / "teacher.pt")["step"] >= int(checkpoints(out)[-1].name)
    assert len(log_of(out)) >= 4
