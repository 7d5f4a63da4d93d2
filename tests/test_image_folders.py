"""Which images and masks are where: files, folders and globs, layouts, masks over their images,
good images held out."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import make_set, picture, prepare, save, save_mask
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import config
import image_files
import image_folders

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "data" / "bracket_white"


# ----------------------------------------------------------------------------------------- finding images


def test_find_images(tmp_path, monkeypatch):
    for name in ("b.png", "a.JPG", "sub/deep/c.webp", ".hidden.png", ".cache/d.png", "e.tiff"):
        save(tmp_path / name, format="PNG")
    (tmp_path / "notes.txt").write_text("x")
    names = [path.relative_to(tmp_path).as_posix() for path in image_folders.find_images(tmp_path)]
    assert names == ["a.JPG", "b.png", "e.tiff", "sub/deep/c.webp"]
    twice = image_folders.find_images(
        [tmp_path, str(tmp_path / "b.png"), str(tmp_path / "*.png"), tmp_path / "sub" / ".." / "b.png"]
    )
    assert len(twice) == 4
    assert [path.name for path in image_folders.find_images(str(tmp_path / "**" / "*.webp"))] == ["c.webp"]
    assert image_folders.find_images(tmp_path / "notes.txt") == [tmp_path / "notes.txt"], (
        "a file named outright is kept"
    )
    (tmp_path / "loop").symlink_to(tmp_path)
    assert len(image_folders.find_images(tmp_path)) == 4
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "absent.png")
    for given in (tmp_path, [str(tmp_path / "*.*"), str(tmp_path / "sub")]):
        assert {path.name for path in image_folders.find_images(given)} - {path.name for path in twice} == {
            "gone.png"
        }, "a broken link is told, a pipe would be waited on, notes.txt is no image"
    assert image_folders.find_images(tmp_path / "gone.png") == [tmp_path / "gone.png"], "as a shell's glob names it"


def test_nothing_found_is_said(tmp_path):
    for given, words in (
        (tmp_path, "No image found"),
        (str(tmp_path / "*.png"), "No image found"),
        (tmp_path / "absent", "does not exist"),
        ("", "An input is an empty path; expected a file, a folder or a glob"),
        ([], "No image found"),
    ):
        with pytest.raises(config.InputError, match=words):
            image_folders.find_images(given)


# ---------------------------------------------------------------------------------------------- data sets


def test_mvtec_layout(tmp_path):
    data = image_folders.MVTecFolder(make_set(tmp_path))
    assert len(data.train_good) == 6 and data.categories == ["good", "scratch"] and not data.flat and not data.warnings
    assert [item.category for item in data.test] == ["good"] * 2 + ["scratch"] * 2
    assert [[path.name for path in item.mask_paths] for item in data.test] == [
        [],
        [],
        ["000_mask.png"],
        ["001_mask.png"],
    ]
    assert data.relative(data.test[2].path) == "test/scratch/000.png"


@pytest.mark.parametrize(
    "name", ["{}_mask.png", "{}.png", "{}_gt.bmp", "class1/{}_mask.png", "class1/{}.tif", "{}-label.png"]
)
def test_mask_names(tmp_path, name):
    make_set(tmp_path, masks=False)
    for stem in ("000", "001", "1", "1_2"):
        save(tmp_path / "test" / "scratch" / f"{stem}.png")
        save_mask(tmp_path / "ground_truth" / "scratch" / name.format(stem))
    data = image_folders.MVTecFolder(tmp_path)
    found = {item.path.stem: item.mask_paths for item in data.test if item.category == "scratch"}
    assert (
        found == {stem: (tmp_path / "ground_truth" / "scratch" / name.format(stem),) for stem in found}
        and len(found) == 4
    )


def test_masks_prefer_the_same_sub_folder(tmp_path):
    make_set(tmp_path, masks=False, n_test=0)
    for side in ("left", "right"):
        save(tmp_path / "test" / "dent" / side / "000.png")
        save_mask(tmp_path / "ground_truth" / "dent" / side / "000_mask.png")
    for item in image_folders.MVTecFolder(tmp_path).test:
        assert [path.parent.name for path in item.mask_paths] == [item.path.parent.name]


def masks_of(root):
    """Image below test/ -> its masks below ground_truth/, and the warnings."""
    data = image_folders.MVTecFolder(root)
    return {
        data.relative(item.path)[5:]: [data.relative(path)[13:] for path in item.mask_paths] for item in data.test
    }, data.warnings


def test_a_mask_in_a_sub_folder_is_no_mask_of_another_sub_folder(tmp_path):
    make_set(tmp_path, masks=False, n_test=0)
    for side in ("left", "right"):
        save(tmp_path / "test" / "dent" / side / "000.png")
    save_mask(tmp_path / "ground_truth" / "dent" / "left" / "000_mask.png")
    found, warnings = masks_of(tmp_path)
    assert found == {"dent/left/000.png": ["dent/left/000_mask.png"], "dent/right/000.png": []}
    assert len(warnings) == 1 and "test/dent/right/000.png has no mask" in warnings[0]
    save_mask(tmp_path / "ground_truth" / "dent" / "000_mask.png")  # of which of the two?
    assert masks_of(tmp_path)[0] == found and "(ground_truth/dent/000_mask.png)" in masks_of(tmp_path)[1][0]


@pytest.mark.parametrize(
    "names", [("000_mask_1.png", "000_mask_2.png"), ("000/000.png", "000/001.png"), ("000_a.png", "000_b.png")]
)
def test_several_masks_of_one_image_are_united_and_given_to_no_other(tmp_path, names):
    make_set(tmp_path, n_test=3, masks=False)
    for place, name in zip((slice(4, 8), slice(20, 24)), names, strict=True):
        mask = np.zeros((48, 64), np.uint8)
        mask[place, 4:8] = 255
        save(tmp_path / "ground_truth" / "scratch" / name, mask)
    save_mask(tmp_path / "ground_truth" / "scratch" / "002_mask.png")
    save_mask(tmp_path / "ground_truth" / "scratch" / "002_3_mask.png")  # of an image that is gone
    found, warnings = masks_of(tmp_path)
    assert found["scratch/000.png"] == [f"scratch/{name}" for name in names]
    assert found["scratch/001.png"] == [] and found["scratch/002.png"] == ["scratch/002_mask.png"]
    assert "1 mask(s)" in warnings[0] and "002_3_mask.png" in warnings[0] and "named after no image" in warnings[0]
    item = next(item for item in image_folders.MVTecFolder(tmp_path).test if item.mask_paths)
    assert image_files.read_defects(item.mask_paths, item.path).sum() == 2 * 4 * 4
    prepare(tmp_path, tmp_path / "out")
    assert masks_of(tmp_path / "out")[0]["scratch/000.png"] == ["scratch/000_mask.png"]


def test_a_mask_named_after_no_image_is_laid_on_none(tmp_path):
    make_set(tmp_path, n_test=1, masks=False)
    save_mask(tmp_path / "ground_truth" / "scratch" / "0000_mask.png")  # begins like 000 and goes on
    found, warnings = masks_of(tmp_path)
    assert found["scratch/000.png"] == [] and "(ground_truth/scratch/0000_mask.png)" in warnings[0]


def test_a_missing_mask_is_listed_and_none_at_all_is_fine(tmp_path):
    make_set(tmp_path / "some")
    (tmp_path / "some" / "ground_truth" / "scratch" / "001_mask.png").unlink()
    data = image_folders.MVTecFolder(tmp_path / "some")
    assert not data.test[-1].mask_paths and data.test[-2].mask_paths
    assert len(data.warnings) == 1 and "test/scratch/001.png has no mask" in data.warnings[0]
    none = image_folders.MVTecFolder(make_set(tmp_path / "none", masks=False))
    assert not none.warnings and not any(item.mask_paths for item in none.test)


def test_a_test_folder_without_defects_or_without_test(tmp_path):
    make_set(tmp_path)
    shutil.rmtree(tmp_path / "test" / "scratch")
    assert image_folders.MVTecFolder(tmp_path).categories == ["good"]
    (tmp_path / "test" / "empty").mkdir()
    assert "holds no images" in image_folders.MVTecFolder(tmp_path).warnings[0]
    shutil.rmtree(tmp_path / "test")
    assert image_folders.MVTecFolder(tmp_path).test == []
    with pytest.raises(config.InputError, match="no images in test"):
        image_folders.MVTecFolder(tmp_path, require_train=False)


def test_good_images_of_a_validation_folder_are_held_out(tmp_path):
    assert image_folders.MVTecFolder(make_set(tmp_path)).validation_good == []
    for name in ("a.png", "session 2/b.jpg", ".hidden.png"):
        save(tmp_path / "validation" / "good" / name)
    data = image_folders.MVTecFolder(tmp_path)
    assert [data.relative(path) for path in data.validation_good] == [
        "validation/good/a.png",
        "validation/good/session 2/b.jpg",
    ]
    assert data.split(data.train_good[1:], 0.5, 3) == (data.train_good[1:], data.validation_good)
    shutil.rmtree(tmp_path / "validation" / "good")
    (tmp_path / "validation" / "good").mkdir()
    data = image_folders.MVTecFolder(tmp_path)
    assert data.split(data.train_good, 0.5, 3) == image_folders.split_holdout(data.train_good, 0.5, 3)
    assert data.warnings == [f"{tmp_path / 'validation' / 'good'} holds no images; some of train/good are held out."]


def test_flat_folder(tmp_path):
    for i in range(4):
        save(tmp_path / f"{i}.png")
    save(tmp_path / "bad" / "x.png")
    data = image_folders.MVTecFolder(tmp_path)
    assert data.flat and len(data.train_good) == 4 and data.test == [] and data.categories == []
    assert data.warnings == [f"{tmp_path} holds 1 image(s) in folders below it; they are left out."]


def test_pictures_of_kinds_that_are_not_read_are_counted_once(tmp_path):
    make_set(tmp_path / "set")
    for name in ("train/good/b.HEIC", "train/good/day/a.nef", "test/good/c.dng", "d.heic"):
        save(tmp_path / "set" / name, format="JPEG")
    data = image_folders.MVTecFolder(tmp_path / "set")
    assert [path.name for path in data.unread] == ["b.HEIC", "a.nef", "c.dng"] and len(data.train_good) == 6
    assert data.warnings == [
        f"{tmp_path / 'set'} holds 3 picture(s) in formats that are not read (train/good/b.HEIC, ...); they are left "
        "out, expected them exported as JPEG or PNG."
    ]
    flat = tmp_path / "flat"
    save(flat / "a.heic", format="JPEG")
    with pytest.raises(config.InputError, match=r"no folder train/good.* 1 picture\(s\) there are in formats that are"):
        image_folders.MVTecFolder(flat)
    save(flat / "b.jpg")
    with pytest.raises(config.InputError, match=r"holds 1 image.* 1 picture\(s\) there are in formats that are not"):
        image_folders.MVTecFolder(flat)
    save(flat / "c.jpg"), save(flat / "d.jpg"), save(flat / "deep" / "e.heic", format="JPEG")
    save(flat / "b.CR2", format="JPEG")  # as a camera stores it beside the readable one
    assert "holds 1 picture(s) in formats that are not read (a.heic);" in image_folders.MVTecFolder(flat).warnings[0]
    assert [path.name for path in image_folders.find_images(flat)] == ["a.heic", "b.jpg", "c.jpg", "d.jpg", "e.heic"]


def test_masks_beside_the_images_of_a_flat_folder_are_left_out(tmp_path):
    names = ("1.jpg", "2.jpg", "3.PNG", "4.jpg", "5_mask.jpg", "mask.png", "4_masked.png")
    masks = ("1_mask.png", "2_GT.png", "3_gt.bmp", "4_label.jpg", "5_mask_Mask.png")
    for name in names + masks:
        save(tmp_path / name)
    data = image_folders.MVTecFolder(tmp_path)
    assert [path.name for path in data.train_good] == sorted(names)
    assert data.warnings == [
        f"{tmp_path} holds 5 mask(s) beside the images that they are named after (1_mask.png, ...); they are left out."
    ]


def test_good_images_under_another_spelling_are_told_of(tmp_path):
    for name in ("train/good/1.png", "train/good/2.png", "train/good/3.png", "test/Good/1.png"):
        save(tmp_path / name)
    warnings = image_folders.MVTecFolder(tmp_path).warnings
    where = [tmp_path / "test" / name for name in ("Good", "good")]
    assert warnings == [f"{where[0]} counts as a kind of defect; expected good images in {where[1]}."]


def test_unusable_data_folders(tmp_path):
    with pytest.raises(config.InputError, match="does not exist; expected"):
        image_folders.MVTecFolder(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(config.InputError, match="no folder train/good"):
        image_folders.MVTecFolder(tmp_path / "empty")
    for name in ("1/a.png", "2/a.png", "2/b.png", "3/noon/a.png", ".hidden/a.png"):
        save(tmp_path / "days" / name)
    with pytest.raises(config.InputError, match=r"train/good, but 3 sub-folder\(s\) .* --bad-dir\)"):
        image_folders.MVTecFolder(tmp_path / "days")
    save(tmp_path / "only_test" / "test" / "good" / "0.png")
    with pytest.raises(config.InputError, match=r"no folder train/good; expected the good training images there\.$"):
        image_folders.MVTecFolder(tmp_path / "only_test")
    assert len(image_folders.MVTecFolder(tmp_path / "only_test", require_train=False).test) == 1
    for n in (1, 2):
        with pytest.raises(config.InputError, match=f"holds {n} image"):
            image_folders.MVTecFolder(make_set(tmp_path / str(n), n_good=n))


@pytest.mark.parametrize(
    ("n", "frac", "held"),
    [
        (110, 0.2, 22),
        (54, 0.2, 19),
        (48, 0.2, 19),
        (40, 0.2, 16),
        (10, 0.2, 4),
        (3, 0.2, 1),
        (4, 0.01, 1),
        (5, 0.8, 3),
        (1000, 0.2, 200),
    ],
)
def test_holdout_sizes(n, frac, held):
    train, held_out = image_folders.split_holdout(n, frac, seed=0)
    assert len(held_out) == held and sorted(train + held_out) == list(range(n))


def test_holdout_depends_on_the_seed_only():
    paths = [Path(f"{i}.png") for i in range(50)]
    first = image_folders.split_holdout(paths, 0.2, 1)
    assert first == image_folders.split_holdout(paths, 0.2, 1) and first != image_folders.split_holdout(paths, 0.2, 2)
    assert [int(path.stem) for path in first[1]] == image_folders.split_holdout(50, 0.2, 1)[1]
    with pytest.raises(config.InputError, match="expected 3 or more"):
        image_folders.split_holdout(2, 0.2, 0)


def test_copies_are_held_out_together_and_nothing_else_changes(tmp_path):
    paths = [save(tmp_path / f"{i:02d}.png", picture(seed=i)) for i in range(20)]
    train, held = image_folders.split_holdout(paths, 0.2, 1)
    assert [paths.index(path) for path in held] == image_folders.split_holdout(20, 0.2, 1)[1]
    copies = [Path(shutil.copy(path, tmp_path / f"{path.stem} copy.png")) for path in paths]
    for name in ("empty 1.png", "empty 2.png"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "gone.png").symlink_to(tmp_path / "absent.png")
    all_paths = image_folders.files_under(tmp_path)
    assert len(set(image_folders.first_copies(all_paths))) == 23, "what cannot be read is no copy"
    both = image_folders.split_holdout(paths + copies, 0.2, 1)
    assert [path for path in both[0] if path in paths] == train and [path for path in both[1] if path in paths] == held
    assert {path.stem.split()[0] for path in both[0]}.isdisjoint(path.stem.split()[0] for path in both[1])
    with pytest.raises(config.InputError, match=r"There are 2 usable good image\(s\) and 2 copies; expected 3 or more"):
        image_folders.split_holdout([*paths[:2], *copies[:2]], 0.2, 0)


# -------------------------------------------------------------------------------- masks over their images


def truth_of(image, masks, resize="letterbox"):
    """Ground truth at 64 px of an image with these masks, and what is warned of."""
    warnings = []
    return image_folders.read_truth(
        image_folders.MVTecItem(image, "scratch", tuple(masks)), 64, resize, (64, 64), warnings.append
    ), warnings


def test_mask_of_another_size_is_laid_over_its_image(tmp_path):
    mask = np.zeros((24, 24), bool)  # as wide as high, its image is not
    mask[6:12, 6:12] = True
    image, path = save(tmp_path / "0.png", picture(96, 192)), save(tmp_path / "0_mask.png", mask)
    large = np.kron(mask, np.ones((4, 8), bool))
    for resize in ("stretch", "letterbox"):
        assert np.array_equal(truth_of(image, [path], resize)[0], image_files.fit_mask(large, 64, resize))


def test_a_mask_of_another_shape_is_used_and_named(tmp_path):
    image, square = save(tmp_path / "0.png", picture(64, 128)), save_mask(tmp_path / "0_mask.png", (64, 64))
    found, warnings = truth_of(image, [square], "stretch")
    assert found[16:32, 16:32].all() and found.sum() == 256
    assert warnings == [
        f"{square} is 64 x 64 px and its image {image} 128 x 64 px; expected the same aspect ratio. The mask is "
        "stretched over the image."
    ]
    odd = save(tmp_path / "1.png", picture(67, 101))
    for shape in ((67, 101), (33, 50), (34, 51), (20, 30), (201, 303)):  # as sides are rounded
        assert not truth_of(odd, [save_mask(tmp_path / "1_mask.png", shape)])[1], shape
    assert truth_of(odd, [save_mask(tmp_path / "1_mask.png", (67, 98))])[1]


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [(5, lambda m: m.T), (6, lambda m: np.rot90(m, -1)), (7, lambda m: np.rot90(m, 2).T), (8, np.rot90)],
)
def test_a_mask_of_a_photograph_as_it_is_stored_turns_with_it(tmp_path, orientation, turn):
    exif, mask = Image.Exif(), np.zeros((48, 64), bool)
    exif[0x0112] = orientation
    mask[4:16, 4:24] = True
    image, path = save(tmp_path / "0.jpg", exif=exif), save(tmp_path / "0_mask.png", mask)
    found, warnings = truth_of(image, [path])
    assert np.array_equal(found, image_files.fit_mask(turn(mask), 64, "letterbox")) and not warnings
    found, warnings = truth_of(image, [save(tmp_path / "1_mask.png", turn(mask))])
    assert np.array_equal(found, image_files.fit_mask(turn(mask), 64, "letterbox")) and not warnings
    found, warnings = truth_of(save(tmp_path / "upright.png"), [save(tmp_path / "2_mask.png", turn(mask))])
    assert (
        found is None
        and len(warnings) == 1
        and "2_mask.png is 48 x 64 px and lies across its image; expected 64 x 48." in warnings[0]
    )


@pytest.mark.parametrize(
    ("shape", "orientation", "told"),
    [((48, 64), 3, True), ((64, 64), 6, True), ((48, 64), 6, False), ((64, 64), 1, False)],
)
def test_a_mask_that_may_have_been_drawn_on_a_turned_photograph_is_warned_of(tmp_path, shape, orientation, told):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = save(tmp_path / "0.jpg", np.zeros((*shape, 3), np.uint8), exif=exif)
    upright = shape[::-1] if orientation == 6 else shape
    found, warnings = truth_of(image, [save_mask(tmp_path / "0_mask.png", upright)])
    assert found.any() and [f"EXIF orientation {orientation}" in each for each in warnings] == [True] * told
    own = save(tmp_path / "1_mask.png", np.eye(*shape, dtype=np.uint8) * 255, exif=exif)
    assert not truth_of(image, [own])[1]


def test_what_pillow_cannot_read_beside_the_pixels_is_no_matter_of_masks(tmp_path):
    text = PngInfo()
    text.add_text("comment", "a" * 3_000_000, zip=True)
    image = save(tmp_path / "0.png", np.zeros((48, 64, 3), np.uint8), pnginfo=text)
    assert truth_of(image, [save_mask(tmp_path / "0_mask.png")])[0].any()


def test_a_mask_that_marks_nothing_is_none(tmp_path):
    make_set(tmp_path / "raw")
    save(tmp_path / "raw" / "ground_truth" / "scratch" / "000_mask.png", np.zeros((48, 64), np.uint8))
    item = image_folders.MVTecFolder(tmp_path / "raw").test[2]
    found, warnings = truth_of(item.path, item.mask_paths)
    assert (
        found is None
        and len(warnings) == 1
        and "000_mask.png marks no pixel as defective. Its image is left out" in warnings[0]
    )
    report = prepare(tmp_path / "raw", tmp_path / "out")
    assert [row["reason"] for row in report["skipped"]] == ["marks no pixel as defective"] and report["counts"][
        "ground_truth/scratch"
    ] == 1


# ---------------------------------------------------------------------------------------------- real data


@pytest.mark.skipif(not REAL.is_dir(), reason="the real data is not here")
def test_real_data():
    data = image_folders.MVTecFolder(REAL)
    assert len(data.train_good) == 110 and data.categories == ["good", "defective_painting", "scratches"]
    assert sum(len(item.mask_paths) for item in data.test) == 30 and not data.warnings
    for item in data.test:
        if item.mask_paths:
            assert image_files.fit_mask(image_files.read_defects(item.mask_paths, item.path), 128, "stretch").any(), (
                "the smallest defect survives at 128 px"
            )
