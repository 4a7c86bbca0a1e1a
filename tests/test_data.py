"""data.py: the order is endless, exact and the same for any ranks and workers; damage is survived.

Run: pytest tests/test_data.py        (seconds; all images are random)
"""

import multiprocessing
import pathlib
import random
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import data
from config import Config, UserError
from data import Order, loader
from images import evaluation
from images.evaluation import divide, evaluation_batches, evaluation_images, labelled_images
from images.sources import Arrays, open_source

GOLDEN = pathlib.Path(__file__).parent / "golden"


def tiny_config(**data_keys):
    cfg = Config(batch=8, steps=5)
    cfg.crops.global_size, cfg.crops.local_size, cfg.crops.local_count = 16, 8, 2
    cfg.vit.patch, cfg.data.workers = 4, 0
    for key, value in data_keys.items():
        setattr(cfg.data, key, value)
    return cfg


def tiny_source(n=20):
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(n, 24, 20, 3), dtype=np.uint8)
    return Arrays(images, np.arange(n) % 2, ["a", "b"], "tiny")


def write_images(folder, count=4, size=(20, 24)):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(count)
    for i in range(count):
        pixels = rng.integers(256, size=(*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.jpg")


def assert_equal(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        for name, value, wanted in zip(batch._fields, batch, other, strict=True):
            same = torch.equal(value, wanted) if torch.is_tensor(value) else value == wanted
            assert same, name


# ---- order --------------------------------------------------------------------------------------


def test_each_epoch_has_each_image_once_in_another_order():
    order = Order(101, seed=0)
    epochs = [[order[p] for p in range(e * 101, (e + 1) * 101)] for e in range(3)]
    assert all(sorted(epoch) == list(range(101)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != [Order(101, seed=1)[p] for p in range(101)]


def test_a_position_has_the_same_image_whatever_was_asked_before():
    order = Order(50, seed=3)
    forward = [order[p] for p in range(200)]
    scattered = random.Random(0).sample(range(200), 200)
    assert [order[p] for p in scattered] == [forward[p] for p in scattered]


def test_the_order_of_ten_million_images_takes_forty_megabytes():
    order = Order(10_000_000, seed=0)
    assert 0 <= order[12_345_678] < 10_000_000
    assert order.permutation.nbytes == 40_000_000


# ---- loader -------------------------------------------------------------------------------------


def test_workers_change_nothing():
    cfg, source = tiny_config(), tiny_source()
    alone = list(loader(cfg, source))
    cfg.data.workers = 2
    assert_equal(list(loader(cfg, source)), alone)
    assert len(alone) == cfg.steps


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere forking is not safe")
def test_workers_are_forked_whatever_python_does_by_default():
    source, method = tiny_source(), multiprocessing.get_start_method()
    source.extra = lambda: "what cannot be sent to a process that starts afresh"
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        batches = list(loader(tiny_config(workers=1), source))
    finally:
        multiprocessing.set_start_method(method, force=True)
    assert_equal(batches, list(loader(tiny_config(), source)))


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_see_what_one_process_sees(world):
    cfg, source = tiny_config(), tiny_source()
    for one, *parts in zip(
        loader(cfg, source), *(loader(cfg, source, 0, r, world) for r in range(world)), strict=True
    ):
        for name, crops in [("global_crops", 2), ("local_colour", 2), ("masks", 2)]:
            shares = [getattr(p, name).unflatten(0, (crops, -1)) for p in parts]
            assert torch.equal(torch.cat(shares, 1).flatten(0, 1), getattr(one, name)), name


def test_resuming_in_the_middle_of_an_epoch_gives_exactly_the_rest():
    cfg, source = tiny_config(workers=2), tiny_source()  # 20 images: an epoch ends within step 2
    whole = list(loader(cfg, source, 0, rank=1, world=2))
    assert_equal(list(loader(cfg, source, 3, rank=1, world=2)), whole[3:])


def test_crops_are_crop_major():
    cfg, source = tiny_config(), tiny_source()
    cfg.crops.global_scale = cfg.crops.local_scale = (1.0, 1.0)
    source.images[:] = np.arange(20, dtype=np.uint8)[:, None, None, None]  # image i is all i
    order, batch = Order(20, cfg.seed), next(loader(cfg, source))
    expected = [order[p] for p in range(8)] * 2
    assert batch.global_crops.amax((1, 2, 3)).tolist() == expected
    assert batch.local_crops.amin((1, 2, 3)).tolist() == expected


def test_every_masked_crop_has_one_vote():
    batch = next(loader(tiny_config(), tiny_source()))
    assert torch.equal(batch.masks.flatten().nonzero().flatten(), batch.mask_indices)
    votes = torch.zeros(16).index_add_(0, batch.mask_indices // 16, batch.mask_weights)
    assert torch.allclose(votes, batch.masks.any(1).float())  # sums of up to 8 rounded fractions
    assert batch.masks.any(1).sum() == 8  # mask.probability of the 16 global crops of the step


def test_no_local_crops_give_an_empty_tensor():
    cfg = tiny_config()
    cfg.crops.local_count = 0
    batch = next(loader(cfg, tiny_source()))
    assert batch.local_crops.shape == (0, 3, 8, 8)
    assert [len(part.local_crops) for part in data.split(batch, 2)] == [0, 0]


def test_micro_batches_share_out_the_images_with_all_their_crops():
    batch = next(loader(tiny_config(), tiny_source()))
    parts = data.split(batch, 2)
    for name in ["global_crops", "local_crops", "global_colour", "local_colour", "masks"]:
        shares = [getattr(p, name).unflatten(0, (2, 4)) for p in parts]
        assert torch.equal(torch.cat(shares, 1).flatten(0, 1), getattr(batch, name)), name
    assert sum(len(p.mask_indices) for p in parts) == len(batch.mask_indices)


def test_loading_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    list(loader(tiny_config(workers=2), tiny_source()))
    assert torch.equal(before, torch.get_rng_state())


# ---- damage -------------------------------------------------------------------------------------


def test_damaged_images_are_replaced_by_the_next_and_named(tmp_path):
    write_images(tmp_path, count=8)
    whole = (tmp_path / "5.jpg").read_bytes()
    (tmp_path / "2.jpg").write_bytes(whole[:300])  # truncated
    (tmp_path / "3.jpg").write_bytes(b"")
    (tmp_path / "7.jpg").write_text("this is not a picture")
    cfg = tiny_config()
    source = open_source(tmp_path, cfg)
    batch = next(loader(cfg, source))
    assert sorted({line.split(":")[0] for line in batch.skipped}) == ["2.jpg", "3.jpg", "7.jpg"]
    assert len(batch.skipped) == 4  # 3.jpg also on the way from 2.jpg to 4.jpg
    assert data.read_or_next(source, 2)[1] == 4 and data.read_or_next(source, 7)[1] == 0
    assert_equal([next(loader(cfg, source, 0, 0, 1))], [batch])


def test_a_source_out_of_reach_stops_with_one_line_from_a_worker_too(tmp_path):
    write_images(tmp_path, count=9)
    cfg = tiny_config(workers=1)
    batches = loader(cfg, open_source(tmp_path, cfg))
    for file in tmp_path.iterdir():
        file.unlink()
    with pytest.raises(UserError, match="images in a row cannot be read") as error:
        list(batches)
    assert "\n" not in str(error.value) and "Traceback" not in str(error.value)


def test_fewer_images_than_a_batch_are_refused_in_one_line():
    with pytest.raises(UserError, match="7 images are fewer than batch=8") as error:
        loader(tiny_config(), tiny_source(7))
    assert "\n" not in str(error.value)


# ---- evaluation ---------------------------------------------------------------------------------


def test_the_evaluation_crop_equals_the_official_transform():
    golden = np.load(GOLDEN / "augment.npz")
    crop = evaluation.centre_crop(golden["natural/image"], 28) / 255  # 28 * 256 / 224 = 32
    cfg = tiny_config()
    mean, std = (torch.tensor(x)[:, None, None] for x in (cfg.data.mean, cfg.data.std))
    expected = torch.from_numpy(golden["eval_transform/resize32_crop28_natural"])
    assert torch.allclose((crop - mean) / std, expected, atol=1e-6)  # one rounding of each step


def test_images_of_the_crop_size_are_evaluated_as_they_are():
    pixels = tiny_source(1).read(0)  # 24 x 20
    crop = evaluation.centre_crop(pixels, 20)
    assert torch.equal(crop.permute(1, 2, 0), torch.from_numpy(pixels[2:22]))


def test_three_channels_are_resized_as_each_alone():
    image = np.random.default_rng(0).integers(256, size=(20, 30, 3), dtype=np.uint8)
    alone = [evaluation.resize(image[:, :, c : c + 1], 24, 17) for c in range(3)]
    assert np.array_equal(evaluation.resize(image, 24, 17), np.concatenate(alone, axis=2))


def test_evaluation_batches_are_normalised_and_labelled():
    cfg, source = tiny_config(), tiny_source()
    cfg.crops.global_size = 20
    images, labels = zip(*evaluation_batches(source, cfg, batch=8), strict=True)
    assert [len(x) for x in images] == [8, 8, 4]
    assert torch.cat(labels).tolist() == [0, 1] * 10
    pixels = source.read(19)[2:22].transpose(2, 0, 1) / 255
    expected = (pixels - np.reshape(cfg.data.mean, (3, 1, 1))) / np.reshape(cfg.data.std, (3, 1, 1))
    assert np.allclose(images[-1][-1].numpy(), expected, atol=1e-5)


def test_held_out_images_are_found_beside_the_training_images(tmp_path):
    for name in ["train/cat", "train/dog", "test/dog"]:
        write_images(tmp_path / name, count=3)
    cfg = tiny_config(root=str(tmp_path))
    train, test = evaluation_images(cfg)
    assert (len(train), len(test)) == (6, 3)
    assert {test.label(i) for i in range(3)} == {train.classes.index("dog")}
    assert len(open_source(cfg.data.root, cfg)) == 6  # pretraining leaves the held-out images out


def test_without_held_out_images_a_tenth_of_each_class_is_classified_by_the_others(tmp_path):
    for name, count in {"cat": 10, "dog": 20, "eel": 3, "fox": 2}.items():
        write_images(tmp_path / name, count=count)
    bank, queries = evaluation_images(tiny_config(root=str(tmp_path)))
    names = [[part.name(i) for i in range(len(part))] for part in (bank, queries)]
    assert len(bank) == 31 and not set(names[0]) & set(names[1])
    assert queries.labels.tolist() == [0, 1, 1, 2]  # one at least of a class that has three


@pytest.mark.parametrize("period", [2, 5, 7, 10])
def test_labels_in_any_order_have_all_classes_on_both_sides(period):
    label_N = np.arange(10 * period) % period
    kept, held = divide(label_N, 0.1)
    assert np.bincount(label_N[held]).tolist() == [1] * period
    assert np.bincount(label_N[kept]).tolist() == [9] * period
    assert sorted([*kept, *held]) == list(range(10 * period))
    assert not np.array_equal(held % 10, held[:1].repeat(period)), "systematic"
    again, other = divide(label_N, 0.1)[1], divide(label_N, 0.1, seed=1)[1]
    assert np.array_equal(again, held) and not np.array_equal(other, held)


def test_parts_of_a_data_set_do_not_pass_for_classes(tmp_path, capsys):
    for name in ["train/cat", "Validation/cat"]:
        write_images(tmp_path / name, count=10)
    with pytest.raises(UserError, match="Validation and train are parts of a data set"):
        labelled_images(tiny_config(root=str(tmp_path)))
    assert evaluation_images(tiny_config(root=str(tmp_path))) is None
    assert "no k-NN during training" in capsys.readouterr().err
    (tmp_path / "Validation").rename(tmp_path / "bus")  # a train may be a class, too
    assert evaluation_images(tiny_config(root=str(tmp_path)))


@pytest.mark.parametrize(
    "odd, expected",
    [
        ("val", "no labelled test image; it needs a folder for each class"),
        ("val/cow", "no training image of class cow; it needs a folder for each class, named as"),
        ("val/empty/empty", "val: no images in it; left out: nothing"),
    ],
)
def test_held_out_images_that_do_not_fit_stop_no_training(tmp_path, capsys, odd, expected):
    for name in ["train/cat", "train/dog", odd]:
        write_images(tmp_path / name, count=0 if "empty" in name else 3)
    cfg = tiny_config(root=str(tmp_path))
    with pytest.raises(UserError, match=expected):
        labelled_images(cfg)
    assert evaluation_images(cfg) is None and expected in capsys.readouterr().err
    cfg.log.knn = False
    assert evaluation_images(cfg) is None and not capsys.readouterr().err
    with pytest.raises(UserError, match="no such folder"):  # one that was named must be there
        evaluation_images(tiny_config(root=str(tmp_path), val="/nowhere"))


def test_images_without_a_class_are_counted_and_left_out(tmp_path, capsys):
    counts = {"train/cat": 3, "train/dog": 4, "train": 2, "val": 6, "val/dog": 3}
    for name, count in counts.items():
        write_images(tmp_path / name, count=count)
    train, test = labelled_images(tiny_config(root=str(tmp_path)))
    assert (len(train), len(test)) == (7, 3) and set(test.labels) == {1}
    assert "8 images without a class left out of the evaluation" in capsys.readouterr().err


def test_training_compares_as_few_images_as_asked(tmp_path):
    cfg = tiny_config(root="synthetic")
    cfg.data.synthetic_images = 480
    assert [len(part) for part in evaluation_images(cfg)] == [480, 120]
    cfg.log.knn_images = 50
    few, again = evaluation_images(cfg), evaluation_images(cfg)
    for part, same in zip(few, again, strict=True):
        assert len(part) == 50 and np.array_equal(part.indices, same.indices)
        assert max(part.indices) > 50 and len(set(np.diff(part.indices))) > 1  # drawn
    assert set(few[1].labels) <= set(few[0].labels) and len(set(few[0].labels)) > 6


def test_one_class_is_nothing_to_evaluate(tmp_path):
    write_images(tmp_path / "2024", count=12)
    assert evaluation_images(tiny_config(root=str(tmp_path))) is None


def test_a_folder_without_labels_has_no_evaluation(tmp_path):
    write_images(tmp_path, count=12)
    assert evaluation_images(tiny_config(root=str(tmp_path))) is None


def test_a_folder_of_its_own_can_be_held_out(tmp_path):
    for name in ["photos/cat", "photos/dog", "other/cat", "odd/cow"]:
        write_images(tmp_path / name, count=2)
    cfg = tiny_config(root=str(tmp_path / "photos"))
    cfg.data.val = str(tmp_path / "other")
    assert [len(s) for s in evaluation_images(cfg)] == [4, 2]
    cfg.data.val = str(tmp_path / "odd")
    for compared in (labelled_images, evaluation_images):  # what was named must fit
        with pytest.raises(UserError, match="odd: no training image of class cow"):
            compared(cfg)
