"""Tiles cover an image, overlap, and blend back into it; the stages work on them at full resolution."""

import csv
import dataclasses
import itertools
import json

import cv2
import numpy as np
import pytest
import torch
from conftest import draw_nothing, take_tiny_backbone
from test_stages import TINY

import classify_images
import config
import data_loader
import defect_maps
import image_files
import image_folders
import test_vae as test_stage
import train_with_validation as train_stage
from tiles import OVERLAP, Blend, tile_corners


@pytest.mark.parametrize(("height", "width", "side"), [(64, 64, 64), (65, 200, 64), (300, 129, 64), (1000, 1500, 256)])
def test_tiles_cover_the_image_and_overlap(height, width, side):
    corners = tile_corners(height, width, side)
    seen = np.zeros((height, width), int)
    for top, left in corners:
        assert 0 <= top <= height - side and 0 <= left <= width - side
        seen[top : top + side, left : left + side] += 1
    assert seen.min() >= 1 and len(set(corners)) == len(corners)
    for axis in (0, 1):
        starts = sorted({corner[axis] for corner in corners})
        assert all(b - a <= side * (1 - OVERLAP) + 1 for a, b in itertools.pairwise(starts))


def test_tiles_blend_back_into_the_image_and_count_most_in_their_middle():
    image = np.random.default_rng(0).random((3, 70, 110)).astype(np.float32)
    blend = Blend(70, 110, 64)
    for top, left in tile_corners(70, 110, 64):
        blend.add(image[:, top : top + 64, left : left + 64], top, left)
    np.testing.assert_allclose(blend.mean(), image, atol=1e-5)
    two = Blend(64, 112, 64)
    two.add(np.zeros((64, 64)), 0, 0)
    two.add(np.ones((64, 64)), 0, 48)
    row = two.mean()[32]
    assert (row[:48] == 0).all() and (row[64:] == 1).all() and (np.diff(row[47:65]) > 0).all()
    assert row[48:64].mean() == pytest.approx(0.5, abs=1e-3)
    assert blend.window.min() > 0 and blend.window[0, 32] < 0.01 * blend.window[32, 32]


def write_photo(path, size, rng, scratch=False):
    """Soft stripes of (height, width), with a bright line where asked; returns the line's mask."""
    height, width = size
    image = np.tile(120 + 40 * np.sin(np.arange(width) / 8 + rng.uniform(0, 1)), (height, 1))[..., None] + rng.normal(
        0, 3, (height, width, 3)
    )
    mask = np.zeros(size, np.uint8)
    if scratch:
        cv2.line(mask, (width - 40, 20), (width - 12, 30), 255, 3)
        image[mask > 0] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image.clip(0, 255).astype(np.uint8))
    return mask


@pytest.fixture(scope="module")
def tiled(tmp_path_factory):
    """A data set of photographs of several sizes, one smaller than a tile, and what training on tiles wrote; while it
    lives, ``DetailVAE`` takes the stand-in for its backbone.
    """
    root, out = (tmp_path_factory.mktemp(name) for name in ("wide", "out"))
    rng, sizes = np.random.default_rng(0), [(80, 130), (64, 64), (150, 70), (40, 90)]
    for index in range(8):
        write_photo(root / "train" / "good" / f"{index}.png", sizes[index % 4], rng)
    for index, size in enumerate(sizes[:3]):
        write_photo(root / "test" / "good" / f"{index}.png", size, rng)
        mask = write_photo(root / "test" / "scratch" / f"{index}.png", size, rng, scratch=True)
        (root / "ground_truth" / "scratch").mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(root / "ground_truth" / "scratch" / f"{index}_mask.png"), mask)
    given = {**TINY, "backbone": "efficientnet_lite0", "tile": True, "data_dir": str(root), "output_dir": str(out)}
    with pytest.MonkeyPatch.context() as monkeypatch:
        take_tiny_backbone(monkeypatch)
        with pytest.MonkeyPatch.context() as patched:
            draw_nothing(patched)
            train_stage.main(config.from_dict(config.TrainSettings, given))
        yield root, out


def test_training_samples_are_all_tiles_of_all_images(tiled):
    root, _ = tiled
    paths = image_folders.MVTecFolder(root).train_good
    dataset = data_loader.GoodImages(paths, 64, "tile", config.TrainSettings(), 0.5, 0)
    sizes = [image_files.read_image(path).shape[:2] for path in paths]
    expected = [
        (number, *corner)
        for number, (h, w) in enumerate(sizes)
        for corner in tile_corners(max(h, 64), round(w * max(1, 64 / h)), 64)
    ]
    assert dataset.tiles == expected and len(dataset) == len(expected) > len(paths)
    tiles = torch.cat(list(dataset.plain_batches(4)))
    number, top, left = expected[1]
    np.testing.assert_allclose(
        tiles[1].permute(1, 2, 0).numpy() * 255,
        image_files.read_image(paths[number])[top : top + 64, left : left + 64],
        atol=1e-3,
    )
    assert dataset[0].images.shape == (3, 64, 64)
    loaded = data_loader.load_images(paths, 64, "tile")
    assert torch.equal(loaded.images, tiles) and loaded.paths == [paths[number] for number, _, _ in expected]


def test_maps_on_tiles_have_the_size_of_the_image_and_the_test_scores_them_there(tiled, tmp_path):
    root, out = tiled
    model = str(out / "models" / "best_model.pth")
    test_stage.main(
        config.DetailTestSettings(model=model, output_dir=str(tmp_path), save_maps=True, bootstrap=0, device="cpu")
    )
    results = tmp_path / "test_results"
    for path in sorted((root / "test").rglob("*.png")):
        saved = np.load(results / "maps" / path.parent.name / f"{path.stem}.npy")
        assert saved.shape == image_files.read_image(path).shape[:2] and np.isfinite(saved).all()
    report = json.loads((results / "metrics" / "test_metrics.json").read_text())
    assert report["pixel"]["auroc"]["value"] > 0.5 and report["reconstruction"]["psnr"]["value"] > 0


def test_classify_on_tiles_agrees_with_the_test_and_draws_at_the_photos_own_size(tiled, tmp_path):
    root, out = tiled
    model = out / "models" / "best_model.pth"
    detector = classify_images.load_detector(model)
    thorough = classify_images.classify_folder(root / "test", detector)
    assert [each.detection.defect_map.shape for each in thorough] == [
        image_files.read_image(each.path).shape[:2] for each in thorough
    ]
    assert all(each.detection.reconstruction.shape == (3, *each.detection.defect_map.shape) for each in thorough)
    settings = config.ClassifySettings(
        images=(str(root / "test"),), model=str(model), output_dir=str(tmp_path), target_false_alarms=0.5, device="cpu"
    )
    classify_images.main(settings)
    rows = list(csv.DictReader((tmp_path / "classification_results" / "results.csv").open(encoding="utf-8")))
    assert [float(row["score"]) for row in rows] == pytest.approx([each.detection.score for each in thorough], rel=1e-3)
    overlays = sorted((tmp_path / "classification_results" / "overlays").iterdir())
    defective = [row["image"] for row in rows if row["label"] == "defective"]
    assert len(overlays) == len(defective) > 0
    assert [image_files.read_image(path).shape for path in overlays] == [
        image_files.read_image(path).shape for path in defective
    ]


def test_a_defect_scores_alike_on_a_photo_of_one_tile_and_of_many(tiled):
    _, out = tiled
    detector = classify_images.load_detector(out / "models" / "best_model.pth")
    blob = np.zeros((1, 64, 64), np.float32)
    blob[0, 20:24, 30:34] = 1.0
    wide = np.zeros((1, 300, 500), np.float32)
    wide[0, 100:104, 200:204] = 1.0
    (one,), (many,) = (
        detector.scores(
            dict.fromkeys(detector.scored, each), dict.fromkeys(detector.scored, defect_maps.MapScale(0.0, 1.0))
        )
        for each in (blob, wide)
    )
    assert many == pytest.approx(one)


def test_what_covers_a_whole_tile_still_stands_out_of_the_photo(tiled):
    _, out = tiled
    detector = classify_images.load_detector(out / "models" / "best_model.pth")
    image = torch.full((3, 64, 320), 0.5)
    image[:, :, 128:256] = torch.rand(3, 64, 128)
    bank = detector.all_maps(image[None], ["bank"])["bank"][0]
    assert bank[:, :100].max() < bank[:, 150:230].min()
    with pytest.raises(ValueError, match="expected sides of 64 or more"):
        detector.detect(torch.rand(1, 3, 32, 64))


def test_a_photo_of_one_tile_gets_the_map_of_that_tile(tiled):
    _, out = tiled
    detector = classify_images.load_detector(out / "models" / "best_model.pth")
    images = torch.rand(2, 3, 64, 64)
    names = list(detector.fused | detector.scored)
    alone = dataclasses.replace(detector, settings=detector.settings.replace(tile=False)).all_maps(images, names)
    for name, maps in detector.all_maps(images, names).items():
        np.testing.assert_allclose(maps, alone[name], atol=1e-4)
