"""Images on disk -> tensors: many files, training samples, the preprocess stage."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import damaged_files, make_set, picture, prepare, save, save_mask, stamps

import config
import data_loader as dl
import image_files
import image_folders

ROOT = Path(__file__).resolve().parents[1]
PLAIN = config.AugmentSettings(
    flip_horizontal=False, rotation_deg=0.0, shift_frac=0.0, scale_frac=0.0, brightness=0.0, saturation=0.0
)


# ------------------------------------------------------------------------------------- pixels to tensors


def test_tensor_and_back():
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3), dtype=np.uint8)
    tensor = dl.to_tensor(images)
    assert tensor.shape == (3, 3, 16, 24) and tensor.dtype == torch.float32 and tensor.is_contiguous()
    assert np.allclose(tensor[1, 2].numpy() * 255, images[1, :, :, 2], atol=1e-4)
    assert torch.equal(dl.to_tensor(list(images)), tensor) and torch.equal(dl.to_tensor(images[0]), tensor[:1])
    with pytest.raises(ValueError, match="expected uint8"):
        dl.to_tensor(images.astype(np.float32))


def test_the_boundary_check():
    good = torch.rand(2, 3, 8, 8)
    assert dl.assert_images(good) is good
    nan = good.clone()
    nan[0, 0, 0, 0] = float("nan")
    for wrong in (good.double(), good[0], good[:, :1], good * 255, good - 1, nan, good.numpy()):
        with pytest.raises(ValueError, match="expected"):
            dl.assert_images(wrong)


# -------------------------------------------------------------------------------------- reading many files


def test_one_bad_file_never_costs_the_rest(tmp_path):
    reasons = damaged_files(tmp_path)
    good = [save(tmp_path / f"ok{i}.png", picture(seed=i)) for i in range(3)]
    images, kept, errors = dl.load_images(sorted(tmp_path.iterdir()), 64)
    assert kept == good and images.shape == (3, 3, 64, 64)
    assert {path.name for path, _ in errors} == set(reasons)
    assert all(reasons[path.name] in reason for path, reason in errors)
    assert dl.assert_images(images) is images


def test_one_path_or_folder_is_loaded_like_a_list_of_them(tmp_path):
    paths = [save(tmp_path / "deep er" / f"{i}.png", picture(seed=i)) for i in range(3)]
    for given in (tmp_path, str(tmp_path), str(tmp_path / "*" / "*.png")):
        images, kept, errors = dl.load_images(given, 64)
        assert kept == paths and not errors and torch.equal(images, dl.load_images(paths, 64).images)
    assert dl.load_images(paths[1], 64).paths == paths[1:2]


def test_batches_are_complete_ordered_and_equal_to_loading_at_once(tmp_path):
    paths = [save(tmp_path / f"{i:02d}.png", picture(40 + i, 60, seed=i)) for i in range(11)]
    for name in ("00a", "03a", "99a"):
        (tmp_path / f"{name}.png").write_bytes(b"")
    every = sorted(tmp_path.iterdir())
    batches = list(dl.iter_image_batches(every, 64, "letterbox", 4))
    assert [len(batch.paths) for batch in batches] == [4, 4, 3]
    assert [path for batch in batches for path in batch.paths] == paths
    assert [size for batch in batches for size in batch.original_sizes] == [(40 + i, 60) for i in range(11)]
    assert [path.name for batch in batches for path, _ in batch.errors] == ["00a.png", "03a.png", "99a.png"]
    assert torch.equal(torch.cat([batch.images for batch in batches]), dl.load_images(every, 64, "letterbox").images)


def test_a_batch_without_images_only_when_nothing_is_readable(tmp_path):
    (tmp_path / "zero.png").write_bytes(b"")
    (batch,) = dl.iter_image_batches([tmp_path / "zero.png"], 64)
    assert batch.images.shape == (0, 3, 64, 64) and batch.errors == [(tmp_path / "zero.png", "is empty (0 bytes)")]
    assert list(dl.iter_image_batches([], 64)) == []
    assert dl.load_images([tmp_path / "zero.png"], 64).images.shape == (0, 3, 64, 64)


def test_decoding_runs_ahead_by_a_bounded_number(tmp_path, monkeypatch):
    path, started = save(tmp_path / "a.png"), []
    real = dl._read_fitted
    monkeypatch.setattr(dl, "_read_fitted", lambda *arguments: started.append(1) or real(*arguments))
    batches = dl.iter_image_batches([path] * 400, 64, batch_size=4, n_threads=2)
    for n_seen, _ in enumerate(batches, 1):
        time.sleep(0.002)
        assert len(started) <= 4 * n_seen + 1 + 2 * 4 + 1
        if n_seen == 5:
            break
    batches.close()
    assert len(started) < 50, "an abandoned stream stops decoding"


# ----------------------------------------------------------------------------------------------- training


@pytest.fixture
def good_images(tmp_path):
    paths = [save(tmp_path / f"{i}.png", picture(seed=i)) for i in range(5)]
    (tmp_path / "zero.png").write_bytes(b"")
    return lambda **changes: dl.GoodImages(
        **{
            "paths": [*paths, tmp_path / "zero.png"],
            "image_size": 64,
            "resize": "stretch",
            "augment": config.TrainSettings(),
            "defect_share": 0.5,
            "seed": 3,
            **changes,
        }
    )


def test_defects_are_drawn_on_the_picture_and_not_on_grey_bars(good_images, tmp_path):
    paths = [save(tmp_path / f"wide{i}.png", np.full((60, 200, 3), 90 + i, np.uint8)) for i in range(2)]
    squares = [save(tmp_path / f"square{i}.png", picture(seed=i)) for i in range(2)]
    given = {"defect_share": 1.0, "resize": "letterbox", "image_size": 96, "augment": PLAIN}
    for dataset in (
        good_images(paths=paths, **given),
        good_images(paths=squares, letterboxed=dict.fromkeys(squares, (60, 200)), **given),
    ):
        masks = [dataset[key].defect_mask for key in range(12)] + [dataset.with_defects(i, 3)[2] for i in range(6)]
        assert min(mask[0, 33:63].sum() for mask in masks) > 0  # 96 * 60 / 200 = 29 rows in the middle
        assert not any(mask[0, :33].any() or mask[0, 63:].any() for mask in masks)


def same(a, b):
    return all(torch.equal(torch.as_tensor(left), torch.as_tensor(right)) for left, right in zip(a, b, strict=True))


def test_plain_batches_are_all_images_or_some_spread_over_all(good_images):
    dataset = good_images()
    everything = torch.cat(list(dataset.plain_batches(2)))
    assert len(everything) == 5
    assert torch.equal(torch.cat(list(dataset.plain_batches(2, 3))), everything[[0, 2, 4]])
    assert torch.equal(torch.cat(list(dataset.plain_batches(2, 9))), everything)


def test_training_samples(good_images):
    dataset = good_images()
    assert len(dataset) == 5 and [path.name for path, _ in dataset.skipped] == ["zero.png"]
    n_damaged = 0
    for key in range(200):
        sample = dataset[key]
        assert sample.images.shape == sample.corrupted.shape == (3, 64, 64) and sample.defect_mask.shape == (1, 64, 64)
        moved = (sample.images - sample.corrupted).abs().amax(0) * 255 > 5.5
        assert torch.equal(moved, sample.defect_mask[0] > 0.5) and sample.defect_mask.dtype == torch.float32
        n_damaged += bool(moved.any())
    assert 70 < n_damaged < 130, "half of them, within chance"
    dl.assert_images(torch.stack([dataset[0].images, dataset[0].corrupted]))


def test_samples_depend_on_seed_epoch_and_index_only(good_images):
    dataset, again = good_images(), good_images()
    keys = [0, 7, 3, 12]
    forward, backward = [dataset[key] for key in keys], [again[key] for key in reversed(keys)]
    assert all(same(a, b) for a, b in zip(forward, reversed(backward), strict=True))
    assert not torch.equal(dataset[2].images, dataset[7].images), "another epoch, another augmentation"
    assert not torch.equal(dataset[7].images, good_images(seed=4)[7].images)


def test_a_limited_number_of_variants_comes_round_again(good_images):
    dataset = good_images(n_variants=2)
    first, second, third = dataset[3], dataset[3 + 5], dataset[3 + 10]
    assert same(first, third) and (first.key, second.key, third.key) == (3, 8, 3)
    assert not torch.equal(first.images, second.images)
    assert good_images()[3 + 10].key == 13, "without a limit every epoch is new"


def test_the_first_variant_is_the_image_as_it_is(good_images):
    dataset = good_images(n_variants=3, defect_share=0.0)
    (whole,) = dataset.plain_batches(5)
    for index in range(5):
        assert torch.equal(dataset[index].images, whole[index]) and torch.equal(
            dataset[15 + index].images, whole[index]
        )
        assert not torch.equal(dataset[5 + index].images, whole[index])


def test_images_with_several_defects_are_told_by_their_number_alone(good_images):
    data, other = good_images(), good_images(seed=1)
    masks = []
    for number in range(8):
        clean, damaged, mask = data.with_defects(number, 3)
        assert all(
            torch.equal(*pair)
            for pair in zip((clean, damaged, mask), good_images().with_defects(number, 3), strict=True)
        )
        assert (
            damaged.shape[1:] == mask.shape[1:]
            and damaged.dtype == mask.dtype == torch.float32
            and set(mask.unique().tolist()) == {0.0, 1.0}
        )
        assert any(torch.equal(each, clean) for each in dl.to_tensor(data.images)) == (number % 4 == 0)
        changed = (clean - damaged).abs().amax(0)
        assert (changed * (1 - mask[0])).max() < 6 / 255 <= changed[mask[0] > 0].max()
        assert not torch.equal(other.with_defects(number, 3)[1], damaged)
        masks.append(mask)
    assert len({each.numpy().tobytes() for each in masks}) == 8


def test_without_memory_files_are_read_again(good_images, monkeypatch):
    kept = good_images(defect_share=0.0)
    monkeypatch.setattr(dl, "KEEP_IN_MEMORY_BYTES", 0)
    reread = good_images(defect_share=0.0)
    assert reread.images is None and same(kept[8], reread[8]) and len(reread) == 5 and len(reread.skipped) == 1
    assert good_images(defect_share=1.0)[1].defect_mask.any()


def test_no_augmentation_is_the_identity(good_images):
    dataset = good_images(augment=PLAIN, defect_share=0.0)
    for index in range(5):
        assert torch.equal(dataset[index].images, dl.to_tensor(dataset.images[index])[0])


def test_each_augmentation_does_what_it_says():
    image = np.random.default_rng(0).integers(40, 200, (64, 64, 3), dtype=np.uint8)

    def results(**changes):
        return [dl.augment_image(image, PLAIN.replace(**changes), np.random.default_rng(seed)) for seed in range(30)]

    flipped = results(flip_horizontal=True)
    assert {np.array_equal(out, image) for out in flipped} == {True, False}
    assert all(np.array_equal(out, image) or np.array_equal(out, image[:, ::-1]) for out in flipped)
    assert any(np.array_equal(out, image[::-1]) for out in results(flip_vertical=True))
    means = [out.mean() / image.mean() for out in results(brightness=0.2)]
    assert 0.75 < min(means) < 0.9 and 1.1 < max(means) < 1.25
    luma = image @ np.array([0.299, 0.587, 0.114])
    for out in results(saturation=0.5):
        assert np.abs(out @ np.array([0.299, 0.587, 0.114]) - luma)[8:-8].mean() < 2.0
    smooth = cv2.GaussianBlur(image, (0, 0), 4)
    shifts = [
        cv2.phaseCorrelate(
            smooth[..., 0].astype(float),
            dl.augment_image(smooth, PLAIN.replace(shift_frac=0.1), np.random.default_rng(s))[..., 0].astype(float),
        )[0]
        for s in range(20)
    ]
    assert 2.0 < np.abs(shifts).max() < 7.5
    dot = np.zeros((65, 65, 3), np.uint8)
    dot[28:37, 28:37] = 255
    for seed in range(10):
        out = dl.augment_image(dot, PLAIN.replace(rotation_deg=180.0, scale_frac=0.2), np.random.default_rng(seed))
        assert np.abs(np.argwhere(out[..., 0] > 127).mean(0) - 32).max() < 0.6, "turns and zooms about the middle"


def test_images_are_shifted_to_every_side():
    image = np.zeros((64, 64, 3), np.uint8)
    image[30:34, 30:34] = 255
    shifted = [dl.augment_image(image, PLAIN.replace(shift_frac=0.25), np.random.default_rng(s)) for s in range(30)]
    shifts = np.array([np.argwhere(each[..., 0] > 99).mean(0) - 31.5 for each in shifted])
    assert (shifts.min(0) < -8).all() and (shifts.max(0) > 8).all() and np.abs(shifts).max() <= 17


def test_shifted_images_stay_as_sharp_as_they_were():
    image = np.random.default_rng(0).integers(60, 200, (64, 64, 3)).astype(np.uint8)
    image = cv2.GaussianBlur(image, (0, 0), 0.8)

    def contrast(pixels):
        return np.diff(pixels.astype(float), axis=1).std()

    shifted = [dl.augment_image(image, PLAIN.replace(shift_frac=0.5 / 64), np.random.default_rng(s)) for s in range(20)]
    assert np.mean([contrast(each) for each in shifted]) > 0.9 * contrast(image)


def test_recolouring_is_saturation_then_brightness_then_contrast():
    image = np.random.default_rng(0).integers(60, 180, (16, 16, 3), dtype=np.uint8)
    grey = (image @ np.array([0.299, 0.587, 0.114]))[..., None]
    expected = (1.1 * (grey + 0.8 * (image - grey)) - 127.5) * 0.9 + 127.5
    assert np.abs(dl._recolour(image, gain=1.1, contrast=0.9, saturation=0.8) - expected).max() <= 0.6


def test_too_few_readable_training_images(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"")
    paths = [save(tmp_path / "c.png"), tmp_path / "a.png", tmp_path / "b.png"]
    with pytest.raises(config.InputError, match=r"1 of 3 training images can be read.*is empty"):
        dl.GoodImages(paths, 64, "stretch", PLAIN, 0.0, 0)


def test_sampler_visits_each_image_once_an_epoch():
    first, second = list(dl.EpochSampler(10, 0, 0)), list(dl.EpochSampler(10, 0, 3))
    assert sorted(first) == list(range(10)) and sorted(second) == list(range(30, 40))
    assert [key - 30 for key in second] != first and second == list(dl.EpochSampler(10, 0, 3))


def test_loader_is_the_same_with_workers_and_from_any_epoch(good_images):
    dataset, random_state = good_images(), torch.get_rng_state()
    plain = [list(dl.training_loader(dataset, dl.EpochSampler(len(dataset), 1, epoch), 2)) for epoch in range(2)]
    assert not same(plain[0][0], plain[1][0])
    workers = dl.training_loader(dataset, dl.EpochSampler(len(dataset), 1), 2, num_workers=1)
    for epoch in range(2):
        workers.sampler.set_epoch(epoch)
        assert all(same(a, b) for a, b in zip(plain[epoch], workers, strict=True))
    assert plain[0][0].images.shape == (2, 3, 64, 64)
    assert torch.equal(torch.get_rng_state(), random_state)  # so that a resumed run draws what it would have drawn


@pytest.mark.parametrize(("batch_size", "sizes"), [(2, [2, 2]), (4, [4]), (3, [3, 2]), (5, [5]), (8, [5])])
def test_a_last_batch_of_one_is_dropped(good_images, batch_size, sizes):
    loader = dl.training_loader(good_images(), dl.EpochSampler(5, 0), batch_size)
    assert [len(batch.images) for batch in loader] == sizes


def test_num_workers_follow_the_device():
    assert dl.resolve_num_workers(3, "cpu") == 3 and dl.resolve_num_workers(0, "cuda") == 0
    assert dl.resolve_num_workers(-1, torch.device("cpu")) == 0
    assert dl.resolve_num_workers(-1, torch.device("cuda", 0)) == min(8, os.cpu_count())


# ------------------------------------------------------------------------------------------ preprocessing


def test_preprocess_keeps_the_validation_folder(tmp_path):
    raw, out = make_set(tmp_path / "raw"), tmp_path / "out"
    save(raw / "validation" / "good" / "000.png", picture(seed=50))
    assert prepare(raw, out)["counts"]["validation/good"] == 1
    assert [
        np.array_equal(image_files.read_image(path), image_files.fit_image(picture(seed=50), 64, "stretch"))
        for path in image_folders.MVTecFolder(out).validation_good
    ] == [True]
    with pytest.raises(config.InputError, match="lies in the source folder"):
        prepare(raw, raw / "validation" / "out")


def test_the_longest_file_names_are_written_too(tmp_path):
    for folder, n in (("train/good", 3), ("test/dent", 1)):
        for i in range(n):
            image_files.write_png(
                tmp_path / "raw" / folder / f"{'l' * 250}{i}.png", np.full((64, 64, 3), 60 * i, np.uint8)
            )
    image_files.write_png(
        tmp_path / "raw" / "ground_truth" / "dent" / f"{'l' * 250}0.png", np.full((64, 64), 255, np.uint8)
    )
    report = prepare(tmp_path / "raw", tmp_path / "out")
    assert len(report["kept"]) == 5 and not report["skipped"]
    assert image_folders.MVTecFolder(tmp_path / "out").test[0].mask_paths


def test_preprocessing_warns_of_a_mask_of_another_shape_each_time(tmp_path):
    make_set(tmp_path / "raw")
    save_mask(tmp_path / "raw" / "ground_truth" / "scratch" / "000_mask.png", (64, 64))
    for _ in range(2):
        report = prepare(tmp_path / "raw", tmp_path / "out")
        assert (
            len(report["warnings"]) == 1
            and "000_mask.png is 64 x 64 px and its image" in report["warnings"][0]
            and not report["skipped"]
        )


def test_preprocess_writes_the_layout(tmp_path):
    make_set(tmp_path / "raw")
    save_mask(tmp_path / "raw" / "ground_truth" / "scratch" / "001_mask.png", (96, 128))  # another size
    reasons = damaged_files(tmp_path / "raw" / "train" / "good")
    report = prepare(tmp_path / "raw", tmp_path / "out")
    assert json.loads((tmp_path / "out" / image_folders.REPORT_NAME).read_text()) == report
    assert report["counts"] == {
        "ground_truth/scratch": 2,
        "test/good": 2,
        "test/scratch": 2,
        "train/good": 6,
        "skipped": len(reasons),
    }
    assert {Path(row["source"]).name for row in report["skipped"]} == set(reasons)
    assert all(reasons[Path(row["source"]).name] in row["reason"] for row in report["skipped"])
    data = image_folders.MVTecFolder(tmp_path / "out")
    assert len(data.train_good) == 6 and len(data.test) == 4
    assert np.array_equal(
        image_files.read_image(data.train_good[1]), image_files.fit_image(picture(seed=1), 64, "stretch")
    )
    masks = [image_files.read_defects(item.mask_paths, item.path) for item in data.test if item.mask_paths]
    expected = np.zeros((64, 64), bool)
    expected[16:32, 16:32] = True
    assert len(masks) == 2 and all(np.array_equal(mask, expected) for mask in masks)
    assert not [path for path in (tmp_path / "out").rglob("*") if ".part" in path.name]


def test_preprocess_again_redoes_only_what_changed(tmp_path):
    raw, out = make_set(tmp_path / "raw"), tmp_path / "out"
    first_report, first = prepare(raw, out), stamps(out)
    assert prepare(raw, out) == first_report and stamps(out) == first
    save(raw / "train" / "good" / "002.png", picture(seed=77))
    (out / "train" / "good" / "003.png").unlink()
    (raw / "train" / "good" / "004.png").unlink()
    (raw / "train" / "good" / "005.png").write_bytes(b"")
    prepare(raw, out)
    second = stamps(out)
    assert {name for name in second if second[name] != first.get(name)} == {"train/good/002.png", "train/good/003.png"}
    assert set(first) - set(second) == {"train/good/004.png", "train/good/005.png"}, (
        "what is gone or broken leaves nothing behind"
    )
    assert np.array_equal(
        image_files.read_image(out / "train" / "good" / "002.png"),
        image_files.fit_image(picture(seed=77), 64, "stretch"),
    )
    prepare(raw, out, resize="letterbox")
    assert all(stamps(out)[name] != second[name] for name in second), "other settings, other files"


def test_a_mask_is_made_anew_where_its_image_has_another_shape(tmp_path):
    raw = make_set(tmp_path / "raw", n_test=1)
    prepare(raw, tmp_path / "out", resize="letterbox")
    save(raw / "test" / "scratch" / "000.png", picture(48, 128, seed=40))
    for out in ("out", "anew"):
        prepare(raw, tmp_path / out, resize="letterbox")
    there, anew = (tmp_path / out / "ground_truth" / "scratch" / "000_mask.png" for out in ("out", "anew"))
    assert there.read_bytes() == anew.read_bytes()


def stopping_after(n, first=lambda: None):
    """Progress that interrupts after n files, and before that does what is asked for first."""

    def progress(items, total):
        for i, item in enumerate(items):
            if i == n:
                first()
                raise KeyboardInterrupt
            yield item

    return progress


def test_preprocess_goes_on_after_an_interruption(tmp_path):
    raw, out = make_set(tmp_path / "raw", n_good=60), tmp_path / "out"

    with pytest.raises(KeyboardInterrupt):
        dl.preprocess(config.PreprocessSettings(source=(str(raw),), out=str(out), image_size=64), stopping_after(10))
    done = [row for row in json.loads((out / image_folders.REPORT_NAME).read_text())["kept"] if row["signature"]]
    before = stamps(out)
    report = prepare(raw, out)
    assert len(done) == 10 and all(stamps(out)[row["output"]] == before[row["output"]] for row in done)
    assert report["counts"]["train/good"] == 60


@pytest.mark.parametrize("power_cut", [False, True])
@pytest.mark.parametrize("is_first", [False, True])
def test_an_interrupted_change_of_size_leaves_no_image_behind(tmp_path, power_cut, is_first):
    raw, out, left = tmp_path / "raw", tmp_path / "out", tmp_path / "left"
    for index in range(60):
        save(raw / f"{index:02d}.png", picture(48, 64, seed=index))
    if not is_first:
        dl.preprocess(config.PreprocessSettings(source=(str(raw),), out=str(out), image_size=64))

    def power_cut_now():
        shutil.copytree(out, left, ignore=shutil.ignore_patterns(".*"))  # but what is half written

    with pytest.raises(KeyboardInterrupt):
        dl.preprocess(
            config.PreprocessSettings(source=(str(raw),), out=str(out), image_size=96),
            stopping_after(10, power_cut_now),
        )
    side, where = (64, left) if power_cut else (96, out)
    assert not image_folders.MVTecFolder(where).letterboxed
    dl.preprocess(config.PreprocessSettings(source=(str(raw),), out=str(where), image_size=side, seed=1))
    names = [path.name for path in where.glob("*/good/*.png")]
    assert len(names) == len(set(names)) == 60
    assert {image_files.read_image(path).shape for path in where.glob("*/good/*.png")} == {(side, side, 3)}


def test_bars_are_known_of_those_images_alone_that_have_them_yet(tmp_path):
    raw, out = make_set(tmp_path / "raw", n_good=60), tmp_path / "out"
    prepare(raw, out, resize="stretch")

    settings = config.PreprocessSettings(source=(str(raw),), out=str(out), image_size=64, resize="letterbox")
    with pytest.raises(KeyboardInterrupt):
        dl.preprocess(settings, stopping_after(3))
    assert len(image_folders.MVTecFolder(out).letterboxed) == 3


def test_no_file_of_the_users_is_written_over_and_those_that_stay_are_told_of(tmp_path):
    raw, out = make_set(tmp_path / "raw"), tmp_path / "out"
    own = save(out / "train" / "good" / "000.png", picture(seed=20))
    content = own.read_bytes()
    with pytest.raises(config.InputError, match=r"000\.png is there and in no report of preprocessing; exp"):
        prepare(raw, out)
    assert own.read_bytes() == content and len(stamps(out)) == 1
    other = own.rename(own.with_name("other.png"))
    (told,) = (sentence for sentence in prepare(raw, out)["warnings"] if "other.png: not made by" in sentence)
    assert other.exists() and "more" not in told
    next((other_raw := make_set(tmp_path / "raw2")).glob("train/good/000*")).unlink()
    assert f"1 files in {out}, made from {raw}, are removed." in prepare(other_raw, out)["warnings"]


def test_same_stems_lose_nothing(tmp_path):
    raw, out = make_set(tmp_path / "raw"), tmp_path / "out"
    save(raw / "train" / "good" / "000.bmp", picture(seed=9))
    save(raw / "train" / "good" / "000_png.bmp", picture(seed=10))
    save(raw / "test" / "scratch" / "001_png.bmp", picture(seed=11))
    save(raw / "test" / "scratch" / "001.bmp", picture(seed=12))
    report = prepare(raw, out)
    assert report["counts"]["train/good"] == 8 and report["counts"]["test/scratch"] == 4
    outputs = [row["output"] for row in report["kept"]]
    assert len(set(outputs)) == len(outputs) == len(stamps(out))
    assert np.array_equal(
        image_files.read_image(out / "train" / "good" / "000_bmp.png"),
        image_files.fit_image(picture(seed=9), 64, "stretch"),
    )
    data = image_folders.MVTecFolder(out)
    # whose mask is that of the two images 001?
    assert [item.path.stem for item in data.test if item.mask_paths] == ["000"]


@pytest.mark.parametrize("kept", [[1], 3, [{}], [{"output": 2}]])
def test_a_report_with_rows_that_are_none_is_no_report(tmp_path, kept):
    made_with = prepare(make_set(tmp_path / "raw"), tmp_path / "out")["made_with"]
    for report in ({"kept": kept}, {"kept": kept, "made_with": made_with}):
        (tmp_path / "out" / image_folders.REPORT_NAME).write_text(json.dumps(report))
        with pytest.raises(config.InputError, match="in no report of preprocessing"):
            prepare(tmp_path / "raw", tmp_path / "out")


def test_bars_that_preprocessing_drew_are_known(tmp_path):
    raw = make_set(tmp_path / "raw")
    save(raw / "train" / "good" / "high.png", picture(80, 40))
    for resize in ("letterbox", "stretch"):
        report = prepare(raw, tmp_path / resize, resize=resize)
        sizes = {row["output"]: (row["height"], row["width"]) for row in report["kept"]}
        assert sizes["train/good/high.png"] == (80, 40) and sizes["test/scratch/000.png"] == sizes[
            "ground_truth/scratch/000_mask.png"
        ] == (48, 64)
    folder, stretched = (image_folders.MVTecFolder(tmp_path / name) for name in ("letterbox", "stretch"))
    batch = dl.load_batch(folder.train_good[-2:], 64, "letterbox")
    assert batch.windows("letterbox", folder.letterboxed) == [
        (slice(8, 56), slice(0, 64)),
        (slice(0, 64), slice(16, 48)),
    ]
    assert (
        batch.windows("letterbox") == batch.windows("stretch", folder.letterboxed) == [(slice(0, 64), slice(0, 64))] * 2
    )
    assert stretched.letterboxed == image_folders.MVTecFolder(raw).letterboxed == {}
    prepare(tmp_path / "letterbox", tmp_path / "again", resize="letterbox")  # square ones, with bars
    again = image_folders.MVTecFolder(tmp_path / "again")
    assert {again.relative(path): size for path, size in again.letterboxed.items()} == {
        folder.relative(path): size for path, size in folder.letterboxed.items()
    }
    rows = json.loads((tmp_path / "letterbox" / image_folders.REPORT_NAME).read_text())
    rows["kept"] = [
        {key: value for key, value in row.items() if key not in ("height", "width")} for row in rows["kept"]
    ]
    (tmp_path / "letterbox" / image_folders.REPORT_NAME).write_text(json.dumps(rows))  # as an earlier version wrote it
    assert image_folders.MVTecFolder(tmp_path / "letterbox").letterboxed == {}
    prepare(raw, tmp_path / "letterbox", resize="letterbox")
    assert image_folders.MVTecFolder(tmp_path / "letterbox").letterboxed == folder.letterboxed


def test_stretching_images_of_several_aspect_ratios_is_warned_of(tmp_path):
    raw = make_set(tmp_path / "raw")
    save(raw / "train" / "good" / "wide.png", picture(48, 70))
    save_mask(raw / "ground_truth" / "scratch" / "000_mask.png", (64, 64))
    assert not [told for told in prepare(raw, tmp_path / "out")["warnings"] if "letterbox" in told]
    save(raw / "train" / "good" / "high.png", picture(64, 48))
    words = "The images are from 0.75 to 1.46 times as wide as high and are stretched to squares"
    for _ in range(2):
        (told,) = (told for told in prepare(raw, tmp_path / "out")["warnings"] if "letterbox" in told)
        assert told.startswith(words) and told.endswith("expected one aspect ratio, or --resize letterbox.")
    assert f"warning: {words}" in run(raw, "--out", tmp_path / "out", "--image-size", 64).stderr
    prepare(raw, tmp_path / "bars", resize="letterbox")
    for source, out, resize in ((raw, "bars", "letterbox"), (tmp_path / "bars", "again", "stretch")):
        report = prepare(source, tmp_path / out, resize=resize)
        assert not [told for told in report["warnings"] if "--resize" in told], (out, resize)


def test_flat_source_is_split_by_seed_and_never_mixes(tmp_path):
    for i in range(20):
        save(tmp_path / "raw" / f"{i}.png", picture(seed=i))
    for i in range(3):
        save(tmp_path / "bad" / f"{i}.png", picture(seed=50 + i))
    for seed in (0, 1):
        report = prepare(tmp_path / "raw", tmp_path / "out", seed=seed, test_frac=0.25, bad_dir=str(tmp_path / "bad"))
        assert report["counts"] == {"test/defective": 3, "test/good": 5, "train/good": 15, "skipped": 0}
        names = sorted(name.split("/")[-1] for name in stamps(tmp_path / "out") if "/good/" in name)
        assert len(names) == len(set(names)) == 20, "no image in both train and test, also after another seed"
    with pytest.raises(config.InputError, match="does not exist"):
        prepare(tmp_path / "raw", tmp_path / "out", bad_dir=str(tmp_path / "absent"))


def test_copies_of_a_flat_source_stay_on_one_side_and_are_told_of(tmp_path):
    raw = tmp_path / "raw"
    for i in range(20):
        save(raw / f"{i:02d}.png", picture(seed=i))
    before = prepare(raw, tmp_path / "out", test_frac=0.25)
    for i in range(0, 20, 2):
        shutil.copy(raw / f"{i:02d}.png", raw / f"{i:02d} copy.png")
    report = prepare(raw, tmp_path / "out", test_frac=0.25)
    sides = {Path(row["output"]).stem: row["output"].split("/")[0] for row in report["kept"]}
    assert len(sides) == 30 and all(side == sides[stem.split()[0]] for stem, side in sides.items())
    assert {row["output"] for row in before["kept"]} <= {row["output"] for row in report["kept"]}
    assert not before["warnings"] and report["warnings"] == [
        f"{raw} holds 10 copies of other images there, byte for byte; each is kept on its original's side of "
        "train/good and test/good."
    ]
    for i in range(5):
        save(tmp_path / "same" / f"{i}.png")
    assert prepare(tmp_path / "same", tmp_path / "all", test_frac=0.5)["counts"] == {"train/good": 5, "skipped": 0}


def test_pictures_of_kinds_that_are_not_read_are_skipped_and_change_nothing_else(tmp_path):
    raw, bad = tmp_path / "raw", tmp_path / "bad"
    for i in range(8):
        save(raw / f"{i}.png", picture(seed=i))
    save(bad / "0.png", picture(seed=50))
    before = prepare(raw, tmp_path / "out", bad_dir=str(bad))
    save(raw / "3.cr2", format="JPEG")  # as a camera stores it beside 3.png
    unread = [save(raw / "x.HEIC", format="JPEG"), save(bad / "deep" / "x.dng", format="JPEG")]
    for _ in range(2):
        report = prepare(raw, tmp_path / "out", bad_dir=str(bad))
        assert report["kept"] == before["kept"] and report["counts"] == {**before["counts"], "skipped": 2}
        assert [row["source"] for row in report["skipped"]] == list(map(str, unread))
        assert report["skipped"][1]["reason"].startswith("is a picture in DNG format, which is not read; expected")
        assert json.loads((tmp_path / "out" / image_folders.REPORT_NAME).read_text()) == report
    assert "x.HEIC is a picture in HEIC format" in run(raw, "--out", tmp_path / "out", "--image-size", 64).stderr


def test_masks_beside_defective_images_are_their_ground_truth(tmp_path):
    for i in range(5):
        save(tmp_path / "raw" / f"{i}.png", picture(seed=i))
    for place in ("0", "day/1"):
        save(tmp_path / "bad" / f"{place}.png", picture(seed=50))
    mask = np.zeros((64, 64), np.uint8)
    mask[10:20, 10:20] = 255
    for name in ("1_GT.png", "1_GT_mask.png"):  # the second is one of what is itself a mask
        (tmp_path / "bad" / "day" / name).write_bytes(cv2.imencode(".png", mask)[1].tobytes())
    report = prepare(tmp_path / "raw", tmp_path / "out", bad_dir=str(tmp_path / "bad"))
    assert report["counts"]["test/defective"] == 2 and report["counts"]["ground_truth/defective"] == 1
    masked = [item for item in image_folders.MVTecFolder(tmp_path / "out").test if item.mask_paths]
    assert [item.path.stem for item in masked] == ["1"]


def test_three_images_of_a_flat_source_train_whatever_share_is_to_test(tmp_path):
    for i in range(4):
        save(tmp_path / "raw" / f"{i}.png", picture(seed=i))
    counts = prepare(tmp_path / "raw", tmp_path / "out", test_frac=0.5)["counts"]
    assert (counts["train/good"], counts["test/good"]) == (3, 1)


def test_defective_images_beside_a_flat_source_are_a_folder_of_their_own(tmp_path):
    flat = tmp_path / "all" / "good"
    for i in range(5):
        save(flat / f"{i}.png", picture(seed=i))
    for bad_dir in (flat, flat / ".." / "good", tmp_path / "all"):
        with pytest.raises(config.InputError, match="holds the good ones"):
            prepare(flat, tmp_path / "out", bad_dir=str(bad_dir))
    save(flat / "bad" / "0.png")
    with pytest.raises(config.InputError, match="lies in the folder of defective images"):
        prepare(flat, flat / "bad" / "out", bad_dir=str(flat / "bad"))
    report = prepare(flat, tmp_path / "out", bad_dir=str(flat / "bad" / ".." / "bad"))
    assert report["counts"]["test/defective"] == 1 and report["warnings"] == []
    assert "1 image(s) in folders below it" in prepare(flat, tmp_path / "out")["warnings"][0]
    with pytest.raises(config.UsageError, match="expected a flat one with --bad-dir"):
        prepare(make_set(tmp_path / "raw"), tmp_path / "other", bad_dir=str(flat / "bad"))


def test_preprocess_refuses_bad_places(tmp_path):
    raw = make_set(tmp_path / "raw")
    for out in (raw, raw / "sub" / "..", raw / "train" / "good", raw / "test" / "x"):
        with pytest.raises(config.InputError, match="expected another place"):
            prepare(raw, out)
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):  # refuses root as well
        with pytest.raises(config.InputError, match="cannot be made"):
            prepare(raw, out)
    with pytest.raises(config.UsageError, match="expected one"):
        dl.preprocess(config.PreprocessSettings(source=(str(raw), str(raw))))


def test_too_few_usable_images_are_said_after_the_report(tmp_path):
    make_set(tmp_path / "raw", n_good=2)
    (tmp_path / "raw" / "train" / "good" / "zero.png").write_bytes(b"")
    with pytest.raises(config.InputError, match="Only 2 good training image"):
        prepare(tmp_path / "raw", tmp_path / "out")
    assert json.loads((tmp_path / "out" / image_folders.REPORT_NAME).read_text())["skipped"]


def run(*arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "data_loader.py"), *map(str, arguments)], capture_output=True, text=True, timeout=60
    )


def test_the_script(tmp_path):
    make_set(tmp_path / "raw dir")
    (tmp_path / "raw dir" / "train" / "good" / "zero.png").write_bytes(b"")
    done = run(tmp_path / "raw dir", "--out", tmp_path / "out", "--image-size", 64)
    assert done.returncode == 0 and "train/good" in done.stdout and "Traceback" not in done.stderr
    assert "zero.png is empty (0 bytes)." in done.stderr and (tmp_path / "out" / image_folders.REPORT_NAME).is_file()
    (tmp_path / "file").write_text("x")
    for arguments, code in (
        ((tmp_path / "absent", "--out", tmp_path / "o"), 1),
        ((tmp_path / "raw dir", "--out", tmp_path / "file"), 1),
        ((), 2),
        (("x", "--image-siz", "64"), 2),
    ):
        failed = run(*arguments)
        assert (
            failed.returncode == code
            and failed.stderr.startswith("error: ")
            and len(failed.stderr.strip().splitlines()) == 1
        )


def test_help_does_not_wait_for_torch():
    code = (
        "import sys, runpy; sys.argv = ['data_loader.py', '--help']\n"
        "try: runpy.run_path('data_loader.py', run_name='__main__')\n"
        "finally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert "--image-size" in done.stdout and done.stdout.strip().endswith("False")


def test_defects_are_drawn_within_the_window_of_each_image():
    images = dl.to_tensor([picture(64, 64, seed=seed) for seed in range(3)])
    # the last a mere strip
    windows = [
        (slice(16, 48), slice(None)),
        (slice(None), slice(8, 56)),
        (slice(0, 10), slice(None)),
    ]
    drawn, masks = dl.draw_on(images, windows, 1.0, np.random.default_rng(0))
    changed = (drawn != images).any(1).numpy()
    assert masks[0].any() and masks[1].any() and not masks[2].any() and torch.equal(drawn[2], images[2])
    for window, mask, where in zip(windows, masks, changed, strict=True):
        outside = np.ones((64, 64), bool)
        outside[window] = False
        assert not mask[outside].any() and not where[outside].any() and where[mask].all()
    again = dl.draw_on(images, windows, 1.0, np.random.default_rng(0))
    assert torch.equal(drawn, again[0]) and np.array_equal(masks, again[1])
    larger = dl.draw_on(images[:2], windows[:2], 20.0, np.random.default_rng(0))[1]
    assert larger.sum() > 2 * masks.sum()


@pytest.mark.parametrize(
    "output", ["../victim.txt", "train/good/../../../victim.txt", "{root}/victim.txt", "train", "a\0b", 5]
)
def test_preprocessing_removes_nothing_that_a_report_names_elsewhere(tmp_path, output):
    for name in "abcdef":
        save(tmp_path / "raw" / f"{name}.png")
    victim = tmp_path / "victim.txt"
    victim.write_text("kept")
    row = {"output": output.format(root=tmp_path) if isinstance(output, str) else output}
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "preprocess_report.json").write_text(json.dumps({"kept": [row]}))
    dl.preprocess(config.PreprocessSettings(source=(str(tmp_path / "raw"),), out=str(tmp_path / "set"), image_size=64))
    assert victim.read_text() == "kept"


def test_a_link_to_itself_costs_preprocessing_nothing_else(tmp_path):
    for name in "abcdef":
        save(tmp_path / "raw" / f"{name}.png")
    (tmp_path / "raw" / "self.png").symlink_to("self.png")
    report = dl.preprocess(
        config.PreprocessSettings(source=(str(tmp_path / "raw"),), out=str(tmp_path / "set"), image_size=64)
    )
    assert len(report["kept"]) == 6 and "cannot be read" in report["skipped"][0]["reason"]
