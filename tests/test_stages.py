"""The DetailVAE stages from end to end on tiny images: what they write, what they promise, how they fail."""

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import classify_images
import config
import crop_training
import data_loader
import data_loader_supervised
import detail_data
import detail_training
import engine
import image_files
import image_folders
import scripts
import test_vae as test_stage
import train_with_validation as train_stage
import trimming
import vae_model

ROOT = Path(__file__).parent.parent
TINY = {
    "image_size": 64,
    "backbone": "none",
    "perceptual_weight": 0.0,
    "base_channels": 4,
    "epochs": 2,
    "batch_size": 4,
    "latent_dim": 8,
    "detail_channels": 4,
    "device": "cpu",
    "picture_every": 2,
    "validate_every": 1,
    "crop_images": 1,
}


def photograph(rng, scratch=False):
    """A 64 px picture of soft stripes, with a white line on it where asked, and the mask of the line."""
    x = np.linspace(0, 6, 64)
    image = np.stack([np.tile(120 + 40 * np.sin(x + rng.uniform(0, 1)), (64, 1))] * 3, -1) + rng.normal(
        0, 3, (64, 64, 3)
    )
    mask = np.zeros((64, 64), np.uint8)
    if scratch:
        cv2.line(mask, (10, int(rng.integers(10, 50))), (50, int(rng.integers(10, 50))), 255, 3)
        image[mask > 0] = 255
    return image.clip(0, 255).astype(np.uint8), mask


def make_data(root):
    rng = np.random.default_rng(0)
    for folder, count in (("train/good", 12), ("test/good", 4), ("test/scratch", 4)):
        (root / folder).mkdir(parents=True)
        for index in range(count):
            image, mask = photograph(rng, "scratch" in folder)
            cv2.imwrite(str(root / folder / f"{index:03d}.png"), image)
            if "scratch" in folder:
                (root / "ground_truth" / "scratch").mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(root / "ground_truth" / "scratch" / f"{index:03d}_mask.png"), mask)
    return root


def train(data, out, **changes):
    settings = config.from_dict(
        config.TrainSettings, {**TINY, "data_dir": str(data), "output_dir": str(out), **changes}
    )
    train_stage.main(settings)
    return out / "models" / "best_model.pth"


def run_cli(script, *arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Output folder of a finished training run."""
    out = tmp_path_factory.mktemp("out")
    train(data, out)
    return out


# ------------------------------------------------------------------------------------ what the stages write


def test_training_writes_what_the_contract_names(trained):
    for name in (
        "models/best_model.pth",
        "models/last.pth",
        "models/config.yaml",
        "metrics/training_curves.png",
        "metrics/training_history.json",
        "metrics/calibration.json",
        "reconstructions/train/epoch_2.png",
        "reconstructions/validation/scratch_epoch_2.png",
        "reconstructions/validation/good_epoch_2.png",
    ):
        assert (trained / name).stat().st_size > 0, name
    history = json.loads((trained / "metrics" / "training_history.json").read_text())["epochs"]
    assert [each["epoch"] for each in history] == [1, 2]
    kept = classify_images.load_detector(trained / "models" / "best_model.pth").calibration
    told = json.loads((trained / "metrics" / "calibration.json").read_text())
    assert (told["threshold"], told["promised"]) == (kept.threshold, kept.promised)
    assert {"train/total", "val/total", "train/l1", "train/kl", "train/kl_detail"} <= set(history[0])


def test_held_out_images_get_the_scores_again_that_set_the_threshold(data, tmp_path):
    detector = classify_images.load_detector(
        train(data, tmp_path, epochs=1, precision="bfloat16"), precision="bfloat16"
    )
    paths = image_folders.find_images([data / "train" / "good"])
    found = {f"{each.detection.score:.7g}" for each in classify_images.classify(detector, paths)}
    assert found >= {f"{score:.7g}" for score in detector.calibration.good_scores}


def test_a_checkpoint_keeps_the_deviations_that_scores_come_from(data, tmp_path, tiny_backbone):
    path = train(data, tmp_path, backbone="efficientnet_lite0")
    run = train_stage.prepare(
        config.from_dict(
            config.TrainSettings,
            {**TINY, "backbone": "efficientnet_lite0", "data_dir": str(data), "output_dir": str(tmp_path)},
        )
    )
    assert sum(map(len, run.reference)) == len(run.training) and run.reference[0].dtype == torch.float16
    detector = classify_images.load_detector(path)
    kept = detector.model.prototypes
    assert kept.any() and len(torch.unique(kept, dim=0)) > 100
    assert detector.model.bank.any() and torch.equal(detector.model.bank, run.model.bank)
    sparing = list(classify_images.classify(detector, image_folders.find_images(data / "test"), 3))
    thorough = classify_images.classify_folder(data / "test", detector)
    assert [each.detection.score for each in sparing] == pytest.approx(
        [each.detection.score for each in thorough], rel=1e-4
    )
    assert all((each.detection.defect_map is not None) == (each.detection.label == "defective") for each in sparing)
    assert all(each.detection.defect_map is not None for each in thorough)
    kept.zero_()
    assert [each.detection.score for each in classify_images.classify_folder(data / "test", detector)] != pytest.approx(
        [each.detection.score for each in thorough], rel=1e-2
    )


def test_weights_that_are_kept_get_other_maps_and_thresholds(data, trained, tmp_path, capsys):
    before = classify_images.load_detector(trained / "models" / "best_model.pth")
    arguments = [
        "--weights",
        str(trained / "models" / "best_model.pth"),
        "--output-dir",
        str(tmp_path),
        "--map-ssim",
        "3",
        "--target-false-alarms",
        "0.4",
    ]
    assert scripts.run_script(config.TrainSettings, "", train_stage.main, arguments) == 0
    assert "calibrated anew" in capsys.readouterr().out
    after = classify_images.load_detector(tmp_path / "models" / "best_model.pth")
    for name, kept in before.model.state_dict().items():
        torch.testing.assert_close(after.model.state_dict()[name], kept)
    assert (before.fused, after.fused) == ({"pixel": 1.0}, {"pixel": 0.25, "ssim": 0.75})
    assert set(after.calibration.scales) == {"pixel", "ssim", "segmentation"} and after.calibration.alpha == 0.4
    assert after.calibration.scales["pixel"][:2] == pytest.approx(before.calibration.scales["pixel"][:2])
    assert scripts.run_script(config.TrainSettings, "", train_stage.main, [*arguments, "--base-channels", "8"]) == 1
    assert (
        "was trained with base_channels 4, not 8; expected settings of maps and thresholds alone"
        in capsys.readouterr().err
    )
    again = [
        "--weights",
        str(tmp_path / "models" / "best_model.pth"),
        "--output-dir",
        str(tmp_path / "again"),
        "--base-channels",
        "4",
        "--map-pixel",
        "0",
    ]
    assert scripts.run_script(config.TrainSettings, "", train_stage.main, again) == 0
    twice = classify_images.load_detector(tmp_path / "again" / "models" / "best_model.pth")
    assert twice.fused == {"ssim": 1.0} and twice.calibration.alpha == 0.4  # what is not given stays


def test_weights_from_before_the_head_go_with_the_configuration_of_their_run(data, tmp_path, capsys):
    models = train(data, tmp_path, epochs=2, checkpoint_every=1).parent
    arguments = ["--config", str(models / "config.yaml"), "--weights", str(models / "epoch_0001.pth")]
    arguments += ["--output-dir", str(tmp_path / "again")]
    assert scripts.run_script(config.TrainSettings, "", train_stage.main, arguments) == 0, capsys.readouterr().err
    assert classify_images.load_detector(tmp_path / "again" / "models" / "best_model.pth").model.defect_head is None
    assert scripts.run_script(config.TrainSettings, "", train_stage.main, [*arguments, "--map-pixel", "0"]) == 2
    assert "No map that needs no backbone has a weight above 0; expected --map-pixel 1" in capsys.readouterr().err


def test_data_and_weights_files_may_lie_elsewhere_as_long_as_they_are_the_same(data, trained, tmp_path, monkeypatch):
    weights, moved, other = str(trained / "models" / "best_model.pth"), tmp_path / "moved", tmp_path / "other"
    for root in (moved, other):
        shutil.copytree(data, root)
    image_files.write_png(other / "train" / "good" / "000.png", np.zeros((32, 32, 3), np.uint8))
    monkeypatch.chdir(tmp_path)

    def anew(*given):
        asked = ["--weights", weights, "--output-dir", "anew", *given]
        return train_stage.recalibrate(config.parse(config.TrainSettings, "", asked))

    assert anew("--data-dir", "moved/").settings.data_dir == "moved/"
    assert anew().settings.data_dir == anew("--data-dir", "").settings.data_dir == str(data)
    assert anew("--vgg16-weights", "elsewhere.pth").settings.vgg16_weights == "elsewhere.pth"
    with pytest.raises(
        config.InputError, match=r"was trained with training_files .*expected the data of then with --weights"
    ):
        anew("--data-dir", "other")
    shutil.copytree(trained, tmp_path / "resumed")
    train("moved/", tmp_path / "resumed", resume=True, epochs=3, vgg16_weights="elsewhere.pth")
    assert config.read_yaml(tmp_path / "resumed" / "models" / "config.yaml")["data_dir"] == "moved/"
    with pytest.raises(
        config.InputError, match=r"was trained with training_files .*expected the data of then to resume"
    ):
        train("other", tmp_path / "resumed", resume=True, epochs=4)


def test_the_least_usual_of_the_good_images_can_be_left_out(data, tmp_path, tiny_backbone, capsys):
    odd = data / "train" / "good" / "odd.png"
    cv2.imwrite(str(odd), photograph(np.random.default_rng(8), scratch=True)[0])
    try:
        settings = config.from_dict(
            config.TrainSettings,
            {
                **TINY,
                "backbone": "efficientnet_lite0",
                "data_dir": str(data),
                "output_dir": str(tmp_path),
                "trim_frac": 0.08,
            },
        )
        run = train_stage.prepare(settings)
        assert odd not in run.training.paths + run.held_paths and len(run.training.paths + run.held_paths) == 12
        assert f"{odd} is left out" in capsys.readouterr().err
        calibration = detail_training.calibrated_detector(run).calibration
        assert (
            not calibration.promised
            and not calibration.at(0.5).promised
            and "no rate of false alarms is promised" in calibration.describe()
        )
        assert odd in (whole := train_stage.prepare(settings.replace(trim_frac=0.0))).training.paths + whole.held_paths
        with pytest.raises(config.UsageError, match="no --backbone none with --trim-frac"):
            train_stage.prepare(settings.replace(backbone="none"))
    finally:
        odd.unlink()


def test_what_is_left_out_stays_so_in_a_resumed_run_and_with_weights_that_are_kept(
    data, tmp_path, tiny_backbone, monkeypatch
):
    settings = {"backbone": "efficientnet_lite0", "trim_frac": 0.2, "drawn_defects": 0.0}
    best = train(data, tmp_path / "run", epochs=1, **settings)
    left_out = torch.load(best, weights_only=True)["left_out"]
    assert len(left_out) == 2 and all((data / name).is_file() for name in left_out)
    monkeypatch.setattr(trimming, "suspects", lambda *args: [data / "train" / "good" / "000.png"])
    again = train(data, tmp_path / "run", epochs=2, resume=True, **settings)
    anew = tmp_path / "anew"
    train_stage.recalibrate(config.parse(config.TrainSettings, "", ["--weights", str(best), "--output-dir", str(anew)]))
    for path in (again, anew / "models" / "best_model.pth"):
        contents = torch.load(path, weights_only=True)
        assert contents["left_out"] == left_out
    del contents["left_out"]
    torch.save(contents, tmp_path / "earlier.pth")
    with pytest.raises(config.InputError, match=r"earlier\.pth"):
        train(data, tmp_path / "anew", weights=str(tmp_path / "earlier.pth"))


@pytest.mark.parametrize("n_readable", [0, 1])
def test_too_few_readable_images_to_trim_are_said_in_a_sentence(tmp_path, tiny_backbone, n_readable):
    good = tmp_path / "train" / "good"
    good.mkdir(parents=True)
    for index in range(5):
        picture = (
            cv2.imencode(".png", photograph(np.random.default_rng(index))[0])[1].tobytes()
            if index < n_readable
            else b""
        )
        (good / f"{index}.png").write_bytes(picture)
    settings = config.from_dict(
        config.TrainSettings,
        {
            **TINY,
            "backbone": "efficientnet_lite0",
            "data_dir": str(tmp_path),
            "output_dir": str(tmp_path),
            "trim_frac": 0.1,
        },
    )
    with pytest.raises(config.InputError, match=r"training images can be read, expected 2 or more; .*\.png is empty"):
        train_stage.prepare(settings)


def test_a_held_out_image_far_from_the_others_is_named(tmp_path, capsys):
    data = make_data(tmp_path / "data")
    _, held = image_folders.split_holdout(sorted((data / "train" / "good").iterdir()), 0.75, 0)
    train(data, tmp_path / "usual", holdout_frac=0.75)
    assert len(held) == 9 and "far above" not in capsys.readouterr().err
    cv2.imwrite(str(held[4]), photograph(np.random.default_rng(8), scratch=True)[0])
    train(data, tmp_path / "odd", holdout_frac=0.75)
    warnings = [
        line for line in capsys.readouterr().err.splitlines() if "far above the other held-out good images" in line
    ]
    assert len(warnings) == 1 and warnings[0].startswith(f"warning: {held[4]} scores ")


def test_numbered_checkpoints_can_infer(data, tmp_path):
    train(data, tmp_path, checkpoint_every=1)
    detector = classify_images.load_detector(tmp_path / "models" / "epoch_0001.pth")
    assert len(classify_images.classify_folder(data / "test", detector)) == 8


@pytest.mark.drawn
def test_test_stage_reports_figures_scores_and_maps(data, trained, tmp_path, capsys):
    model = trained / "models" / "best_model.pth"
    test_stage.main(
        config.DetailTestSettings(
            model=str(model), data_dir=str(data), output_dir=str(tmp_path), save_maps=True, bootstrap=20, device="cpu"
        )
    )
    out = tmp_path / "test_results"
    rows = list(csv.DictReader((out / "scores.csv").open(encoding="utf-8")))
    assert list(rows[0]) == ["image", "category", "score", "p_value", "label"]
    assert {row["image"] for row in rows} == {
        f"test/{kind}/{i:03d}.png" for kind in ("good", "scratch") for i in range(4)
    }
    report = json.loads((out / "metrics" / "test_metrics.json").read_text())
    assert {"auroc", "average_precision", "f1"} <= set(report["image"])
    assert {"auroc", "average_precision", "aupro", "f1", "iou", "f1_max", "iou_max"} <= set(report["pixel"])
    assert {"mse", "psnr", "ssim", "skip_leak"} <= set(report["reconstruction"])
    assert report["categories"]["good"]["reconstruction"] == report["reconstruction"] and report["skipped"] == []
    assert {"categories", "threshold", "alpha", "false_alarm_rate"} <= set(report)
    assert {"auroc", "f1"} <= set(report["drawn_defects"]["image"]) and {
        "auroc",
        "average_precision",
        "pointing",
    } <= set(report["drawn_defects"]["pixel"])
    threshold = report["threshold"]
    for row in rows:
        assert row["label"] == ("defective" if float(row["score"]) > threshold else "good")
        panel = cv2.imread(str(out / row["category"] / f"{Path(row['image']).stem}.png"))
        assert panel.shape[1] > 3 * panel.shape[0] and panel.std() > 10
        saved = np.load(out / "maps" / row["category"] / f"{Path(row['image']).stem}.npy")
        assert saved.shape == (64, 64) and saved.dtype == np.float32
    assert (report["model"], report["data_dir"], report["seed"]) == (str(model), str(data), 0)
    said = capsys.readouterr().out
    assert f"{report['image']['auroc']['value']:.3f}" in said and f"model: {model}   data: {data}\n" in said


@pytest.mark.parametrize("there", [True, False])
def test_the_model_of_the_output_folder_is_taken_and_without_one_that_of_the_current(
    data, trained, tmp_path, monkeypatch, there
):
    out = tmp_path / "out"
    shutil.copytree(trained / "models", (out if there else tmp_path) / "models")
    monkeypatch.chdir(tmp_path)
    test_stage.main(config.DetailTestSettings(output_dir="out", bootstrap=0, pictures=False))
    classify_images.main(config.ClassifySettings(images=(str(data / "test"),), output_dir="out"))
    report = json.loads((out / "test_results" / "metrics" / "test_metrics.json").read_text())
    summary = json.loads((out / "classification_results" / "summary.json").read_text())
    assert report["model"] == summary["model"] == ("out/models/best_model.pth" if there else "models/best_model.pth")
    assert (summary["threshold"], summary["alpha"]) == (report["threshold"], report["alpha"])
    assert summary["good"] + summary["defective"] == 8 and summary["error"] == 0


def test_classify_writes_rows_overlays_and_reasons(data, trained, tmp_path, capsys):
    photos = tmp_path / "photos"
    (photos / "deep er").mkdir(parents=True)
    rng = np.random.default_rng(5)
    for name in ('it\'s ä "quoted" 名.png', "deep er/wide.jpg", "grey.png"):
        image, _ = photograph(rng)
        image = cv2.resize(image, (90, 40)) if "wide" in name else image
        encoded = cv2.imencode(Path(name).suffix, image[:, :, 0] if "grey" in name else image)[1]
        (photos / name).write_bytes(encoded.tobytes())
    white = np.full((64, 64, 3), 255, np.uint8)
    cv2.imwrite(str(photos / "white.png"), white)
    (photos / "text.png").write_text("no picture")
    (photos / "empty.png").write_bytes(b"")
    (photos / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    settings = config.ClassifySettings(
        images=(str(photos),),
        model=str(trained / "models" / "best_model.pth"),
        output_dir=str(tmp_path),
        device="cpu",
        target_false_alarms=0.5,
    )
    classify_images.main(settings)
    rows = {
        Path(row["image"]).name: row
        for row in csv.DictReader((tmp_path / "classification_results" / "results.csv").open(encoding="utf-8"))
    }
    assert len(rows) == 7
    assert {name for name, row in rows.items() if row["label"] == "error" and row["reason"]} == {
        "text.png",
        "empty.png",
        "IMG_1.HEIC",
    }
    assert rows["IMG_1.HEIC"]["reason"].startswith("is a picture in HEIC format, which is not read; expected")
    assert rows["white.png"]["label"] == "defective"
    overlays = [path.name for path in (tmp_path / "classification_results" / "overlays").iterdir()]
    assert any("white" in name for name in overlays)
    assert "3 unreadable" in capsys.readouterr().out


def test_an_overlay_longer_than_jpeg_holds_is_made_smaller(trained, tmp_path, monkeypatch):
    cv2.imwrite(str(tmp_path / "long.png"), np.full((400, 100, 3), 255, np.uint8))
    monkeypatch.setattr(classify_images, "JPEG_SIDE_PX", 200)
    detector = classify_images.load_detector(trained / "models" / "best_model.pth")
    (found,) = classify_images.classify_folder(tmp_path / "long.png", detector)
    classify_images.write_overlay(found, detector, tmp_path / "overlay.jpg")
    assert cv2.imread(str(tmp_path / "overlay.jpg")).shape == (200, 50, 3)


def test_where_no_image_can_be_read_the_table_says_why_and_classifying_fails(trained, tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    settings = config.ClassifySettings(
        images=(str(tmp_path),), model=str(trained / "models" / "best_model.pth"), output_dir=str(tmp_path)
    )
    with pytest.raises(config.InputError, match=r"No image can be read; the last, .*empty.png, is empty"):
        classify_images.main(settings)
    (row,) = csv.DictReader((tmp_path / "classification_results" / "results.csv").open())
    assert row["label"] == "error" and "is empty" in row["reason"]


def test_the_longest_file_names_cost_nothing(data, trained, tmp_path):
    shutil.copytree(data / "train", tmp_path / "data" / "train")
    (tmp_path / "data" / "test" / "good").mkdir(parents=True)
    for name in ("l" * 251, "l" * 250 + "m"):
        cv2.imwrite(str(tmp_path / "data" / "test" / "good" / f"{name}.png"), np.full((64, 64, 3), 255, np.uint8))
    model = str(trained / "models" / "best_model.pth")
    for _ in range(2):  # the second removes what the first wrote
        test_stage.main(
            config.DetailTestSettings(
                data_dir=str(tmp_path / "data"), model=model, output_dir=str(tmp_path), save_maps=True, bootstrap=0
            )
        )
        assert (
            len(list((tmp_path / "test_results" / "good").iterdir()))
            == len(list((tmp_path / "test_results" / "maps" / "good").iterdir()))
            == 2
        )
    classify_images.main(
        config.ClassifySettings(
            images=(str(tmp_path / "data" / "test"),), model=model, output_dir=str(tmp_path), target_false_alarms=0.5
        )
    )
    assert len(list((tmp_path / "classification_results" / "overlays").iterdir())) == 2


def test_an_image_that_goes_before_its_overlay_is_drawn_costs_the_overlay_alone(
    data, trained, tmp_path, monkeypatch, capsys
):
    photos = shutil.copytree(data / "test", tmp_path / "photos")
    write_overlay = classify_images.write_overlay

    def write_after_all_are_gone(result, detector, path):
        result.path.unlink()
        write_overlay(result, detector, path)

    monkeypatch.setattr(classify_images, "write_overlay", write_after_all_are_gone)
    model = str(trained / "models" / "best_model.pth")
    classify_images.main(
        config.ClassifySettings(images=(str(photos),), model=model, output_dir=str(tmp_path), target_false_alarms=0.5)
    )
    with (tmp_path / "classification_results" / "results.csv").open() as file:
        labels = [row["label"] for row in csv.DictReader(file)]
    assert len(labels) == 8 and "defective" in labels and "error" not in labels
    assert capsys.readouterr().err.count("has no overlay") == labels.count("defective")


def test_overlays_of_an_earlier_run_are_no_images(trained, tmp_path):
    cv2.imwrite(str(tmp_path / "white.png"), np.full((64, 64, 3), 255, np.uint8))
    for _ in range(2):
        classify_images.main(
            config.ClassifySettings(
                images=(str(tmp_path),),
                model=str(trained / "models" / "best_model.pth"),
                output_dir=str(tmp_path),
                target_false_alarms=0.5,
            )
        )
        assert len((tmp_path / "classification_results" / "results.csv").read_text().splitlines()) == 2
    (overlay,) = (tmp_path / "classification_results" / "overlays").iterdir()
    classify_images.main(
        config.ClassifySettings(
            images=(str(overlay),), model=str(trained / "models" / "best_model.pth"), output_dir=str(tmp_path)
        )
    )
    assert overlay.exists(), "what is asked for is not removed"


def test_a_model_of_trimmed_images_promises_no_rate_at_another_threshold_either(data, trained, tmp_path, capsys):
    contents = torch.load(trained / "models" / "best_model.pth", weights_only=True)
    contents["calibration"]["exchangeable"] = contents["calibration"]["promised"] = False
    torch.save(contents, tmp_path / "trimmed.pth")
    classify_images.main(
        config.ClassifySettings(
            images=(str(data / "test" / "good"),),
            model=str(tmp_path / "trimmed.pth"),
            output_dir=str(tmp_path),
            target_false_alarms=0.4,
        )
    )
    said = capsys.readouterr().err
    assert "with --trim-frac no rate of false alarms is promised." in said and "at best" not in said


def test_what_an_earlier_run_wrote_goes_and_nothing_else(data, trained, tmp_path):
    model, first, second = (
        str(trained / "models" / "best_model.pth"),
        make_data(tmp_path / "first"),
        make_data(tmp_path / "second"),
    )
    (first / "test" / "scratch" / "003.png").rename(first / "test" / "scratch" / "old.png")
    (first / "test" / "good" / "class1").mkdir()
    for name in ("class1/000.png", "white.png"):
        cv2.imwrite(str(first / "test" / "good" / name), np.full((64, 64, 3), 255, np.uint8))
    kept = [
        tmp_path / name
        for name in (
            "test_results/scratch/mine.png",
            "test_results/notes.txt",
            "classification_results/overlays/mine.jpg",
        )
    ]
    for path in kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    for root in (first, second):
        test_stage.main(
            config.DetailTestSettings(
                data_dir=str(root), model=model, output_dir=str(tmp_path), bootstrap=0, save_maps=True
            )
        )
        classify_images.main(
            config.ClassifySettings(
                images=(str(root / "test" / "good"),), model=model, output_dir=str(tmp_path), target_false_alarms=0.5
            )
        )
    results = tmp_path / "test_results"
    expected = {f"{kind}/{i:03d}" for kind in ("good", "scratch") for i in range(4)}
    for folder, suffix, others in (
        (results, ".png", {"metrics/metrics_heatmap", "scratch/mine"}),
        (results / "maps", ".npy", set()),
    ):
        assert {
            path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob(f"*{suffix}")
        } == expected | others
    rows = list(csv.DictReader((tmp_path / "classification_results" / "results.csv").open(encoding="utf-8")))
    called = {
        f"{number:05d}_{Path(row['image']).stem}.jpg"
        for number, row in enumerate(rows, 1)
        if row["label"] == "defective"
    }
    assert {path.name for path in (tmp_path / "classification_results" / "overlays").iterdir()} == called | {"mine.jpg"}
    assert all(path.exists() for path in kept)


def test_a_validation_folder_sets_the_threshold_and_all_of_training_trains(data, tmp_path, capsys):
    root = tmp_path / "set"
    shutil.copytree(data, root)
    held = root / "validation" / "good"
    held.mkdir(parents=True)
    for path in sorted((root / "test" / "good").iterdir())[:3]:
        path.rename(held / path.name)
    detector = classify_images.load_detector(train(root, tmp_path, epochs=1))
    scores = sorted(
        each.detection.score for each in classify_images.classify(detector, image_folders.find_images(held))
    )
    assert scores == pytest.approx(detector.calibration.good_scores)
    settings = config.parse(
        config.TrainSettings, "", ["--config", str(tmp_path / "models" / "config.yaml"), "--holdout-frac", "0.5"]
    )
    train_stage.prepare(config.parse(config.TrainSettings, "", ["--config", str(tmp_path / "models" / "config.yaml")]))
    assert "has no say" not in capsys.readouterr().err, "nobody gave that flag"
    run = train_stage.prepare(settings)
    assert len(run.training) == 12 and "--holdout-frac has no say" in capsys.readouterr().err
    (held / "003.png").write_bytes((held / "002.png").read_bytes())
    with pytest.raises(config.InputError, match="expected the data of then"):
        train_stage.main(
            config.TrainSettings(
                weights=str(tmp_path / "models" / "best_model.pth"), output_dir=str(tmp_path / "new"), device="cpu"
            )
        )


@pytest.mark.parametrize("preprocessed", [False, True])
def test_grey_bars_are_no_pixels_to_be_judged(data, tmp_path, monkeypatch, preprocessed):
    """Wide photographs, letterboxed here or by preprocessing: figures of pixels are of what is inside the bars, and
    there defects are drawn.
    """
    wide = tmp_path / "wide"
    for path in data.rglob("*.png"):
        (wide / path.relative_to(data)).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(wide / path.relative_to(data)), cv2.imread(str(path))[:32])
    if preprocessed:
        data_loader.preprocess(
            config.PreprocessSettings(source=(str(wide),), out=str(tmp_path / "set"), image_size=64, resize="letterbox")
        )
        wide = tmp_path / "set"
    model = str(train(wide, tmp_path, epochs=1, resize="letterbox"))
    judged, report_of = [], test_stage.figures
    monkeypatch.setattr(
        test_stage,
        "figures",
        lambda categories, detections, masks, *rest: (
            judged.extend(zip(detections, masks, strict=True)),
            report_of(categories, detections, masks, *rest),
        )[1],
    )
    test_stage.main(
        config.DetailTestSettings(
            data_dir=str(wide), model=model, output_dir=str(tmp_path), save_maps=True, bootstrap=0
        )
    )
    assert {(each.defect_map.shape, mask.shape) for each, mask in judged} == {((32, 64), (32, 64))} and len(judged) > 20
    assert np.load(tmp_path / "test_results" / "maps" / "good" / "000.npy").shape == (64, 64)
    # 8 tested, then each good one with those drawn on it
    assert [mask.any() for _, mask in judged[8:]] == 4 * [
        False,
        True,
        True,
        True,
    ]


def test_grey_bars_are_no_pixels_to_be_reconstructed(data, tmp_path):
    wide, results = tmp_path / "wide", test_stage.Results()
    for index in range(3):
        image_files.write_png(
            wide / f"{index}.png", cv2.imread(str(data / "test" / "good" / "000.png"))[: (40, 12, 8)[index]]
        )
    batch = data_loader.load_batch(wide, 64, "letterbox")
    detector = detail_training.calibrated_detector(
        train_stage.prepare(
            config.from_dict(config.TrainSettings, {**TINY, "data_dir": str(data), "resize": "letterbox"})
        )
    )
    for image, inside, found in zip(
        batch.images, batch.windows("letterbox"), detector.detect(batch.images), strict=True
    ):
        # a bar reconstructed badly
        spoilt = np.where(np.arange(64)[None, :, None] < inside[0].start, 9.0, found.reconstruction).astype(np.float32)
        test_stage.measure_good(
            results, detector, image[None], found._replace(reconstruction=spoilt), inside, np.random.default_rng(0)
        )
        picture, drawn = (each[:, inside[0]] for each in (image, torch.from_numpy(found.reconstruction)))
        assert results.quality["mse"][-1] == pytest.approx((picture - drawn).square().mean().item(), rel=1e-4)
    assert np.isfinite(results.quality["psnr"]).all() and [*np.isfinite(results.quality["ssim"])] == [True, True, False]
    assert len(results.skip_leak) == 1 and [category for category, *_ in results.drawn] == [
        "good",
        *["drawn"] * test_stage.N_DRAWN,
    ]


def test_strips_too_thin_to_draw_on_are_tested_all_the_same(data, tmp_path):
    for path in data.rglob("*.png"):
        image_files.write_png(
            tmp_path / "strips" / path.relative_to(data), cv2.resize(cv2.imread(str(path)), (400, 10))
        )
    model = str(train(tmp_path / "strips", tmp_path, epochs=1, resize="letterbox"))
    test_stage.main(
        config.DetailTestSettings(
            data_dir=str(tmp_path / "strips"), model=model, output_dir=str(tmp_path), pictures=False, bootstrap=0
        )
    )
    report = json.loads((tmp_path / "test_results" / "metrics" / "test_metrics.json").read_text())
    assert (
        "drawn_defects" not in report and set(report["reconstruction"]) == {"mse", "psnr"} and report["n_images"] == 8
    )


def test_a_test_image_that_cannot_be_read_is_told_in_the_report(data, trained, tmp_path):
    root = tmp_path / "d"
    shutil.copytree(data, root)
    (root / "test" / "good" / "000.png").write_bytes(b"no picture")
    settings = config.DetailTestSettings(
        data_dir=str(root),
        model=str(trained / "models" / "best_model.pth"),
        output_dir=str(tmp_path),
        pictures=False,
        bootstrap=0,
    )
    test_stage.main(settings)
    report = json.loads((tmp_path / "test_results" / "metrics" / "test_metrics.json").read_text())
    (told,) = report["skipped"]
    assert told["image"] == "test/good/000.png" and "image" in told["reason"] and report["n_images"] == 7


def test_an_interrupted_test_leaves_the_rows_of_what_it_judged_and_no_earlier_figures(
    data, trained, tmp_path, monkeypatch
):
    settings = config.DetailTestSettings(
        data_dir=str(data), model=str(trained / "models" / "best_model.pth"), output_dir=str(tmp_path), bootstrap=0
    )
    test_stage.main(settings)
    write_image, written = test_stage.write_image, []

    def interrupted(out, name, *args):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(name)
        write_image(out, name, *args)

    monkeypatch.setattr(test_stage, "write_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        test_stage.main(settings)
    out = tmp_path / "test_results"
    assert sorted(path.stem for path in out.rglob("*.png")) == sorted(written) and not list(out.rglob("*.json"))
    assert len((out / "scores.csv").read_text().splitlines()) == 5


@pytest.mark.parametrize("preprocessed", [False, True])
def test_grey_bars_are_no_pixels_to_calibrate_on(data, tmp_path, preprocessed):
    """Wide photographs and high ones, one of them broken:
    so many pixels of the pictures alone lie above the threshold."""
    raw = tmp_path / "raw"
    for index, path in enumerate(sorted((data / "train" / "good").iterdir())):
        image = cv2.imread(str(path))
        image_files.write_png(raw / "train" / "good" / path.name, image[:24] if index % 2 else image[:, :40])
    root = tmp_path / "set" if preprocessed else raw
    if preprocessed:
        data_loader.preprocess(
            config.PreprocessSettings(source=(str(raw),), out=str(root), image_size=64, resize="letterbox")
        )
    settings = config.from_dict(
        config.TrainSettings,
        {
            **TINY,
            "resize": "letterbox",
            "pixel_false_positives": 0.02,
            "data_dir": str(root),
            "output_dir": str(tmp_path),
        },
    )
    held = image_folders.split_holdout(image_folders.find_images(root), settings.holdout_frac, settings.seed)[1]
    held[0].write_bytes(b"broken")
    run = train_stage.prepare(settings)
    detector = detail_training.calibrated_detector(run)
    batch = next(data_loader.iter_image_batches(held, 64, "letterbox", 12))
    maps = [
        each.defect_map[window]
        for each, window in zip(
            detector.detect(batch.images), batch.windows("letterbox", run.folder.letterboxed), strict=True
        )
    ]
    assert {each.shape for each in maps} == {(24, 64), (64, 40)}
    assert (
        np.concatenate([each.ravel() for each in maps]) > detector.calibration.pixel_threshold
    ).mean() == pytest.approx(0.02, abs=2e-3)


def test_a_finished_model_outlines_what_was_drawn_on_held_out_images(data, tmp_path):
    """Its pixel threshold comes from there, that of an unfinished one, or where nothing is drawn, or a share is given,
    from good pixels alone.
    """

    def thresholds(**changes):
        settings = config.from_dict(
            config.TrainSettings, {**TINY, "data_dir": str(data), "output_dir": str(tmp_path), **changes}
        )
        run = train_stage.prepare(settings)
        found = [detail_training.calibrated_detector(run).calibration]
        run.finished, run.calibrated = True, None
        return [each.pixel_threshold for each in [*found, detail_training.calibrated_detector(run).calibration]]

    unfinished, finished = thresholds()
    assert unfinished != finished
    assert thresholds(pixel_false_positives=0.001) == [unfinished] * 2
    assert len(set(thresholds(drawn_defects=0.0))) == 1


def test_a_damaged_mask_costs_its_own_image_alone(data, trained, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "data")
    mask = tmp_path / "data" / "ground_truth" / "scratch" / "001_mask.png"
    mask.write_bytes(mask.read_bytes()[:40])
    test_stage.main(
        config.DetailTestSettings(
            data_dir=str(tmp_path / "data"),
            model=str(trained / "models" / "best_model.pth"),
            output_dir=str(tmp_path),
            pictures=False,
            bootstrap=0,
        )
    )
    assert "001_mask.png" in (said := capsys.readouterr().err) and "left out of pixel metrics" in said
    assert len((tmp_path / "test_results" / "scores.csv").read_text().splitlines()) == 9
    report = json.loads((tmp_path / "test_results" / "metrics" / "test_metrics.json").read_text())
    assert report["categories"]["scratch"]["n_images"] == 4


@pytest.mark.parametrize(
    "names",
    [
        ("class1/000.png", "class2/000.png", "only.png"),
        ("a.png", "a.jpg", "cost $_{5$.png"),
        (os.fsdecode(b"\xe9.png"), "b.png", "c.png"),
    ],
)
def test_every_image_has_its_own_picture_map_and_row_whatever_its_name(data, trained, tmp_path, names):
    good = tmp_path / "data" / "test" / "good"
    image = cv2.imread(str(data / "test" / "good" / "000.png"))
    for name in names:
        (good / name).parent.mkdir(parents=True, exist_ok=True)
        (good / name).write_bytes(cv2.imencode(Path(name).suffix, image)[1].tobytes())
    model = str(trained / "models" / "best_model.pth")
    test_stage.main(
        config.DetailTestSettings(
            data_dir=str(tmp_path / "data"), model=model, output_dir=str(tmp_path), bootstrap=0, save_maps=True
        )
    )
    results = tmp_path / "test_results"
    assert len(list((results / "good").rglob("*.png"))) == len(list((results / "maps" / "good").rglob("*.npy"))) == 3
    unique = [name for name in names if [Path(each).stem for each in names].count(Path(name).stem) == 1]
    assert all((results / "maps" / "good" / f"{Path(name).stem}.npy").is_file() for name in unique)
    classify_images.main(config.ClassifySettings(images=(str(good),), model=model, output_dir=str(tmp_path)))
    for table, column in (
        (results / "scores.csv", "image"),
        (tmp_path / "classification_results" / "results.csv", "image"),
    ):
        with table.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            assert sorted(Path(row[column]).name for row in csv.DictReader(file)) == sorted(
                Path(name).name for name in names
            )


def test_a_stem_that_is_the_name_of_another_image_is_no_output_name(tmp_path):
    for name in (
        "000.png",
        "000.jpg",
        "000.png.png",
        "001.png",
        "001.PNG.bmp",
        "002.tif",
        "side/002.PNG",
        "side/002.png",
    ):
        (tmp_path / "test" / "cut" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "test" / "cut" / name).touch()
    named = test_stage.output_names(image_folders.MVTecFolder(tmp_path, require_train=False))
    found = {path.relative_to(tmp_path / "test" / "cut").as_posix(): name for path, name in named.items()}
    assert found.pop("001.png") == "001"
    assert all(path == name for path, name in found.items()) and len(found) == 7


def test_result_does_not_depend_on_batch_size(data, trained):
    detector = classify_images.load_detector(trained / "models" / "best_model.pth")
    one, many = (classify_images.classify_folder(data / "test", detector, batch_size=size) for size in (1, 5))
    assert [each.path for each in one] == [each.path for each in many]
    np.testing.assert_allclose(
        [each.detection.score for each in one], [each.detection.score for each in many], rtol=1e-4
    )


# --------------------------------------------------------------------------------------------- promises


def test_same_seed_gives_same_history_and_scores(data, trained, tmp_path):
    model = train(data, tmp_path)
    assert (tmp_path / "metrics" / "training_history.json").read_text() == (
        trained / "metrics" / "training_history.json"
    ).read_text()
    scores = [
        [
            each.detection.score
            for each in classify_images.classify_folder(data / "test", classify_images.load_detector(path))
        ]
        for path in (model, trained / "models" / "best_model.pth")
    ]
    assert scores[0] == scores[1]


@pytest.mark.parametrize(("precision", "dtype"), [("float32", None), ("bfloat16", torch.bfloat16)])
def test_training_testing_and_classifying_multiply_in_the_precision_asked_for(
    data, trained, tmp_path, monkeypatch, precision, dtype
):
    asked, autocast = [], engine.Runtime.autocast
    monkeypatch.setattr(
        engine.Runtime, "autocast", lambda runtime: (asked.append(runtime.amp_dtype), autocast(runtime))[1]
    )
    model = {
        "model": str(trained / "models" / "best_model.pth"),
        "output_dir": str(tmp_path),
        "device": "cpu",
        "precision": precision,
    }
    for run in (
        lambda: train(data, tmp_path, epochs=1, precision=precision),
        lambda: test_stage.main(config.DetailTestSettings(data_dir=str(data), pictures=False, bootstrap=0, **model)),
        lambda: classify_images.main(config.ClassifySettings(images=(str(data / "test"),), **model)),
    ):
        asked.clear()
        run()
        assert set(asked) == {dtype}


def test_another_seed_gives_another_history(data, trained, tmp_path):
    train(data, tmp_path, seed=1)
    assert (tmp_path / "metrics" / "training_history.json").read_text() != (
        trained / "metrics" / "training_history.json"
    ).read_text()


def test_resumed_run_equals_an_uninterrupted_one(data, tmp_path, monkeypatch):
    train(data, tmp_path / "whole", epochs=3)
    validate, calls = train_stage.validate, []

    def interrupted(run):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return validate(run)

    monkeypatch.setattr(train_stage, "validate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(data, tmp_path / "parts", epochs=3)
    monkeypatch.setattr(train_stage, "validate", validate)
    train(data, tmp_path / "parts", epochs=3, resume=True)
    whole, parts = (
        torch.load(tmp_path / name / "models" / "last.pth", weights_only=True) for name in ("whole", "parts")
    )
    assert whole["history"] == parts["history"]
    for name, value in whole["model"].items():
        assert torch.equal(value, parts["model"][name]), name


def test_a_resumed_run_makes_what_an_interrupted_one_did_not(data, tmp_path, monkeypatch):
    train(data, tmp_path / "whole", epochs=3, checkpoint_every=2)

    def interrupted(run, epoch):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_stage, "write_pictures", interrupted)
        train(data, tmp_path / "parts", epochs=3, checkpoint_every=2)
    (tmp_path / "parts" / "models" / "epoch_0002.pth").unlink()
    train(data, tmp_path / "parts", epochs=3, checkpoint_every=2, resume=True)
    whole, parts = (
        {path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*")} for name in ("whole", "parts")
    )
    assert whole == parts and Path("reconstructions/train/epoch_2.png") in whole


def test_what_is_learned_last_an_interrupted_run_learns_too(data, tmp_path, monkeypatch):
    train(data, tmp_path / "whole", checkpoint_every=1)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(crop_training, "train_head", interrupted)
        train(data, tmp_path / "parts")
    load = lambda run, name: torch.load(tmp_path / run / "models" / f"{name}.pth", weights_only=True)  # noqa: E731
    has_head = lambda contents: any(name.startswith("defect_head") for name in contents["model"])  # noqa: E731
    assert not any(
        has_head(load(*each)) for each in (("parts", "best_model"), ("whole", "epoch_0001"), ("whole", "last"))
    )
    assert classify_images.load_detector(tmp_path / "parts" / "models" / "best_model.pth").shown == ["pixel"]
    train(data, tmp_path / "parts", resume=True)
    best = load("parts", "best_model")
    assert has_head(best) and best["calibration"] == load("whole", "best_model")["calibration"]
    assert all(torch.equal(value, best["model"][name]) for name, value in load("whole", "best_model")["model"].items())
    monkeypatch.setattr(crop_training, "learn_last", interrupted)  # what has learned it keeps it
    train(data, tmp_path / "parts", resume=True)
    assert load("parts", "best_model")["calibration"] == best["calibration"]


def test_a_finished_model_is_kept_where_training_on_is_interrupted(data, tmp_path, monkeypatch, capsys):
    losses = iter([3.0, 2.0, 1.0])
    monkeypatch.setattr(train_stage, "validate", lambda run: {"total": next(losses)})
    finished = train(data, tmp_path).read_bytes()

    def interrupted(run):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_stage, "finish", interrupted)
        train(data, tmp_path, epochs=3, resume=True)
    load = lambda name: torch.load(tmp_path / "models" / name, weights_only=True)  # noqa: E731
    assert load("best_model.pth")["epoch"] == 3 and not load("best_model.pth")["finished"]
    kept = tmp_path / "models" / "finished_epoch_0002.pth"
    assert kept.read_bytes() == finished and str(kept) in capsys.readouterr().err
    train(data, tmp_path, epochs=3, resume=True)  # has ended: nothing more to keep
    assert load("best_model.pth")["finished"] and not (tmp_path / "models" / "finished_epoch_0003.pth").exists()


def test_training_does_not_go_on_where_a_finished_model_cannot_be_kept(data, trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)

    whole_file = train_stage.files.whole_file

    def full(path, *how, **more):
        if "finished" in path.name:
            raise config.InputError("The disk is full.")
        return whole_file(path, *how, **more)

    monkeypatch.setattr(train_stage.files, "whole_file", full)
    with pytest.raises(config.InputError, match=r"The disk is full\."):
        train(data, tmp_path, epochs=3, resume=True)


def test_a_run_interrupted_after_its_best_epoch_can_be_wound_up(data, tmp_path, monkeypatch):
    losses = iter([3.0, 2.0, 1.0])
    monkeypatch.setattr(train_stage, "validate", lambda run: {"total": next(losses)})

    def interrupted(run, epoch):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_stage, "write_pictures", interrupted)
        train(data, tmp_path, epochs=4)
    best = train(data, tmp_path, epochs=1, resume=True)  # the model of epoch 2 is there already
    assert torch.load(best, weights_only=True)["finished"]


def test_a_best_model_of_another_version_hinders_no_resumed_run(data, tmp_path, monkeypatch):
    best = train(data, tmp_path, epochs=1)
    contents = torch.load(best, weights_only=True)
    torch.save({**contents, "format": 1}, best)
    validate = train_stage.validate
    monkeypatch.setattr(train_stage, "validate", lambda run: {**validate(run), "total": 0.0})
    train(data, tmp_path, epochs=2, resume=True)
    assert torch.load(best, weights_only=True)["epoch"] == 2


def test_another_model_is_neither_written_over_nor_taken_for_the_best(data, tmp_path, capsys):
    best = train(data, tmp_path, checkpoint_every=1)
    finished, early = best.read_bytes(), tmp_path / "models" / "epoch_0001.pth"

    def recalibrated(weights, out):
        return scripts.run_script(
            config.TrainSettings, "", train_stage.main, ["--weights", str(weights), "--output-dir", str(out)]
        )

    assert recalibrated(early, tmp_path) == 1
    assert f"{best} holds another model than {early}; expected another --output-dir." in capsys.readouterr().err
    assert best.read_bytes() == finished
    assert recalibrated(best, tmp_path) == 0
    assert [recalibrated(early, tmp_path / "early") for _ in range(2)] == [0, 0]  # over its own
    assert recalibrated(best, tmp_path / "early") == 1
    shutil.copy(early, best)
    with pytest.raises(
        config.InputError, match=r"best_model\.pth holds the model of epoch 1; expected that of epoch 2"
    ):
        train(data, tmp_path, resume=True)


def test_patience_counts_validations(data, tmp_path, monkeypatch):
    losses = iter([3.0, 2.0, 4.0, 5.0, 1.0, 6.0])
    monkeypatch.setattr(train_stage, "validate", lambda run: {"total": next(losses)})
    changes = {"epochs": 12, "validate_every": 2, "picture_every": 20}
    pictures, curves = tmp_path / "reconstructions" / "train", tmp_path / "metrics" / "training_curves.png"
    for resume in (False, True):  # what has ended has ended
        train(data, tmp_path, patience=2, resume=resume, **changes)
        history = json.loads((tmp_path / "metrics" / "training_history.json").read_text())
        assert history["best_epoch"] == 4 and [row["epoch"] for row in history["epochs"]] == list(range(1, 9))
        assert torch.load(tmp_path / "models" / "best_model.pth", weights_only=True)["epoch"] == 4
        assert [path.name for path in pictures.iterdir()] == ["epoch_8.png"]
        curves.unlink()
    train(data, tmp_path, patience=3, resume=True, **changes)
    assert json.loads((tmp_path / "metrics" / "training_history.json").read_text())["best_epoch"] == 10


def test_pictures_and_validations_lie_so_many_images_apart_and_not_epochs(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train_stage, "VALIDATED_AFTER", 17)  # of 8 images: two epochs
    monkeypatch.setattr(train_stage, "PICTURED_AFTER", 31)  # four
    train(data, tmp_path, epochs=9, picture_every=0, validate_every=0)
    pictured = {path.name for path in (tmp_path / "reconstructions" / "train").iterdir()}
    assert pictured == {"epoch_4.png", "epoch_8.png", "epoch_9.png"}
    epochs = json.loads((tmp_path / "metrics" / "training_history.json").read_text())["epochs"]
    assert [row["epoch"] for row in epochs if "val/total" in row] == [2, 4, 6, 8, 9]


@pytest.mark.parametrize(
    ("changes", "n_epochs", "n_crops"),
    [({"train_samples": 16}, 2, 4), ({"train_samples": 80}, 3, 20), ({"epochs": 4}, 4, 8)],
)
def test_few_images_are_not_shown_as_often_as_many_are(data, tmp_path, monkeypatch, changes, n_epochs, n_crops):
    monkeypatch.setattr(train_stage, "MOST_EPOCHS", 3)
    drawn_on = []
    monkeypatch.setattr(
        crop_training, "learn_last", lambda model, training, n, *rest: drawn_on.append(n) or {"pixels": 0.0}
    )
    train(data, tmp_path, crop_images=0, segmentation=False, **{"epochs": 0, **changes})
    history = json.loads((tmp_path / "metrics" / "training_history.json").read_text())
    assert len(history["epochs"]) == n_epochs and drawn_on == [n_crops]


@pytest.mark.parametrize(
    ("changes", "best"),
    [({"backbone": "efficientnet_lite0"}, 2), ({"backbone": "efficientnet_lite0", "drawn_defects": 0.0}, 1), ({}, 1)],
)
def test_an_epoch_is_judged_by_what_no_later_learning_changes(
    data, tmp_path, monkeypatch, tiny_backbone, changes, best
):
    told = iter([{"total": 1.0, "feature": 0.3}, {"total": 2.0, "feature": 0.2}])
    monkeypatch.setattr(
        train_stage, "validate", lambda run: {"kl": 1.0, "kl_detail": 1.0, "feature_nll": 0.1, **next(told)}
    )
    train(data, tmp_path, epochs=2, validate_every=1, **changes)
    assert torch.load(tmp_path / "models" / "best_model.pth", weights_only=True)["epoch"] == best


def test_fewer_epochs_than_done_are_refused_and_nothing_is_written(data, tmp_path):
    train(data, tmp_path, epochs=2)
    before = (tmp_path / "models" / "config.yaml").read_text()
    with pytest.raises(config.InputError, match=r"last\.pth has 2 epochs behind it; expected --epochs of 2 or more"):
        train(data, tmp_path, epochs=1, resume=True)
    assert (tmp_path / "models" / "config.yaml").read_text() == before


@pytest.mark.parametrize("given", [(), ("--resize", "stretch")])
def test_a_model_of_preprocessed_images_takes_others_as_these_were_made(data, tmp_path, capsys, given):
    data_loader.preprocess(
        config.PreprocessSettings(source=(str(data),), out=str(tmp_path / "set"), image_size=64, resize="letterbox")
    )
    arguments = [
        "--data-dir",
        str(tmp_path / "set"),
        "--output-dir",
        str(tmp_path),
        *given,
        *flags({**TINY, "epochs": 1}),
    ]
    assert scripts.run_script(config.TrainSettings, "", train_stage.main, arguments) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "letterbox" in line]
    assert len(said) == 1 and said[0].startswith("warning: ") == bool(given)
    assert classify_images.load_detector(tmp_path / "models" / "best_model.pth").fitting == (
        "stretch" if given else "letterbox"
    )
    assert config.read_yaml(tmp_path / "models" / "config.yaml")["resize"] == ("stretch" if given else "letterbox")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": 96}, "made 64 px square, and image_size 96 is asked for"),
        ({"tile": True}, "made 64 px square, and tile is asked for"),
        ({"image_size": 64}, ""),
    ],
)
def test_images_made_smaller_than_they_are_wanted_are_told(data, tmp_path, capsys, changes, words):
    data_loader.preprocess(config.PreprocessSettings(source=(str(data),), out=str(tmp_path / "set"), image_size=64))
    settings = config.TrainSettings(data_dir=str(tmp_path / "set"), **{"image_size": 64, **changes})
    assert detail_data.fitted_as_on_disk(settings, print) == settings
    said = capsys.readouterr().out
    assert said.startswith("warning: ") and words in said and "expected" in said if words else not said
    assert detail_data.fitted_as_on_disk(settings.replace(data_dir=str(data)), print)
    assert not capsys.readouterr().out


def test_training_draws_nothing_on_the_grey_bars_of_preprocessing(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    for index in range(8):
        cv2.imwrite(str(raw / f"{index}.png"), np.full((40, 160, 3), 80 + index, np.uint8))
    data_loader.preprocess(
        config.PreprocessSettings(
            source=(str(raw),), out=str(tmp_path / "set"), image_size=96, resize="letterbox", test_frac=0.0
        )
    )
    values = {**TINY, "image_size": 96, "resize": "letterbox", "drawn_defects": 1.0}
    settings = config.from_dict(config.TrainSettings, {**values, "data_dir": str(tmp_path / "set")})
    training = train_stage.prepare(settings.replace(output_dir=str(tmp_path))).training
    masks = torch.stack([training[key].defect_mask for key in range(len(training))])  # of images as they are
    assert masks[:, :, 36:60].any() and not masks[:, :, :36].any() and not masks[:, :, 60:].any()


def test_a_run_without_a_best_epoch_shows_no_model_of_an_earlier_one(data, tmp_path, monkeypatch, capsys):
    train(data, tmp_path, epochs=1)
    capsys.readouterr()
    monkeypatch.setattr(train_stage, "validate", lambda run: {"total": float("nan")})
    with pytest.raises(config.InputError, match="No validation loss was a finite number"):
        train(data, tmp_path, epochs=2)
    assert "threshold" not in capsys.readouterr().out


def test_a_fresh_run_leaves_no_picture_of_an_earlier_one_but_its_models(data, trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    mine = {
        "models/mine.pth",
        "reconstructions/train/mine.png",
        "reconstructions/validation/mine.png",
        "metrics/mine.png",
    }
    for name in {*mine, "models/epoch_0050.pth"}:
        (tmp_path / name).write_text("")
    found = lambda: {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}  # noqa: E731
    before, model = found(), tmp_path / "models" / "best_model.pth"
    assert (
        scripts.run_script(
            config.TrainSettings, "", train_stage.main, ["--weights", str(model), "--output-dir", str(tmp_path)]
        )
        == 0
    )
    with pytest.raises(config.InputError, match="batch_size"):
        train(data, tmp_path, batch_size=3, resume=True)
    with pytest.raises(config.InputError, match="expected a folder"):
        train(data / "none", tmp_path)
    assert found() == before

    def interrupted(run):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_stage, "validate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(data, tmp_path, epochs=3, resume=True)
    assert found() == before | {"models/finished_epoch_0002.pth"}
    with pytest.raises(KeyboardInterrupt):
        train(data, tmp_path)
    models = {path for path in found() if path.endswith(".pth")}  # never lost before there is a better one
    assert models == {path for path in before if path.endswith(".pth")} | {"models/finished_epoch_0002.pth"}
    assert found() == mine | models | {"models/config.yaml", "metrics/training_history.json"}


def test_the_settings_of_a_resumed_run_ask_for_no_checkpoint(data, tmp_path, capsys):
    train(data, tmp_path, epochs=1)
    train(data, tmp_path, epochs=2, resume=True)
    assert config.read_yaml(tmp_path / "models" / "config.yaml")["resume"] is False
    file = tmp_path / "all.yaml"
    file.write_text((tmp_path / "models" / "config.yaml").read_text() + "bootstrap: 200\n")  # of another stage
    arguments = [
        "--config",
        str(file),
        "--weights",
        str(tmp_path / "models" / "best_model.pth"),
        "--output-dir",
        str(tmp_path / "again"),
    ]
    assert scripts.run_script(config.TrainSettings, "", train_stage.main, arguments) == 0, capsys.readouterr().err


def test_a_vgg16_backbone_takes_the_users_file_as_long_as_it_is_there(data, tmp_path, monkeypatch, tiny_backbone):
    asked, weights = [], tmp_path / "vgg16.pth"
    weights.touch()
    monkeypatch.setattr(vae_model, "load_backbone", lambda *args: (asked.append(args), tiny_backbone)[1])
    model = train(data, tmp_path, epochs=1, backbone="vgg16", vgg16_weights=str(weights), trim_frac=0.1)
    assert set(asked) == {("vgg16", str(weights))} and len(asked) == 3  # to trim, to train, and from the checkpoint
    weights.unlink()
    vae_model.load_detail_vae(model)
    assert asked[-1] == ("vgg16", "")


def test_nothing_is_fitted_on_the_test_split(data, trained, tmp_path):
    """With the images of test/good and test/scratch exchanged, checkpoint and calibration stay the same."""
    shuffled = tmp_path / "data"
    for path in data.rglob("*.png"):
        parts = path.relative_to(data).parts
        if parts[0] == "test":
            parts = ("test", {"good": "scratch", "scratch": "good"}[parts[1]], parts[2])
        target = shuffled.joinpath(*parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    model = train(shuffled, tmp_path / "out")
    original, again = (torch.load(path, weights_only=True) for path in (trained / "models" / "best_model.pth", model))
    assert original["calibration"] == again["calibration"]
    for name, value in original["model"].items():
        assert torch.equal(value, again["model"][name]), name


def test_resume_with_other_settings_is_refused(data, trained):
    before = (trained / "models" / "config.yaml").read_text()
    with pytest.raises(config.InputError, match="latent_dim"):
        train(data, trained, latent_dim=9, resume=True)
    assert (trained / "models" / "config.yaml").read_text() == before


def test_resume_with_other_good_images_is_refused(tmp_path):
    data = make_data(tmp_path / "data")
    train(data, tmp_path, epochs=1)
    shutil.copy(data / "train" / "good" / "000.png", data / "train" / "good" / "100.png")
    with pytest.raises(
        config.InputError, match="was trained with n_training_files 12, not 13; expected the data of then"
    ):
        train(data, tmp_path, epochs=2, resume=True)


def test_weights_are_not_calibrated_anew_on_other_good_images(tmp_path, capsys):
    data = make_data(tmp_path / "data")
    model = train(data, tmp_path, epochs=1)
    shutil.copy(data / "train" / "good" / "000.png", data / "train" / "good" / "100.png")
    assert (
        scripts.run_script(
            config.TrainSettings,
            "",
            train_stage.main,
            ["--weights", str(model), "--output-dir", str(tmp_path / "again")],
        )
        == 1
    )
    assert "was trained with n_training_files 12, not 13; expected the data of then" in capsys.readouterr().err


def test_diverging_loss_stops_and_keeps_the_checkpoint(data, tmp_path, monkeypatch):
    train(data, tmp_path, epochs=1)
    before = (tmp_path / "models" / "best_model.pth").read_bytes()
    monkeypatch.setattr(vae_model.DetailLoss, "_weigh", lambda self, terms, scale: terms["mse"] * float("nan"))
    with pytest.raises(config.InputError, match=r"nan.*; .*best_model\.pth of epoch 1 is kept\.$"):
        train(data, tmp_path, epochs=2, resume=True)
    with pytest.raises(config.InputError, match=r"nan.*; .*best_model\.pth is of an earlier run\.$"):
        train(data, tmp_path, epochs=2)
    assert (tmp_path / "models" / "best_model.pth").read_bytes() == before
    with pytest.raises(config.InputError, match="nan") as caught:
        train(data, tmp_path / "new", epochs=2)
    assert "kept" not in str(caught.value)


# ------------------------------------------------------------------------------------------- bad input


def test_an_epoch_that_cannot_be_kept_is_not_called_kept(data, tmp_path, monkeypatch):
    def diverged(*arguments):
        raise engine.DivergedError("The model's predictions became infinite; training stops.")

    monkeypatch.setattr(vae_model.DetailVAE, "fit_deviations", diverged)
    with pytest.raises(engine.DivergedError, match=r"training stops\.$"):
        train(data, tmp_path)


def test_weights_of_vgg16_that_are_not_there(data, tmp_path):
    with pytest.raises(config.InputError, match=r"There is no file .*none\.pth; expected VGG16's weights\."):
        train(data, tmp_path, map_perceptual=1.0, vgg16_weights=str(tmp_path / "none.pth"))


def test_no_data_folder_is_one_sentence(tmp_path):
    result = run_cli("train_with_validation.py", "--data-dir", tmp_path / "none", "--output-dir", tmp_path)
    assert result.returncode == 1
    assert result.stderr.strip().count("\n") == 0 and "none" in result.stderr and "expected" in result.stderr


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_images(tmp_path, count):
    (tmp_path / "d" / "train" / "good").mkdir(parents=True)
    for index in range(count):
        cv2.imwrite(
            str(tmp_path / "d" / "train" / "good" / f"{index}.png"), photograph(np.random.default_rng(index))[0]
        )
    with pytest.raises(config.InputError, match="expected 3 or more"):
        train(tmp_path / "d", tmp_path / "o")


def test_broken_training_image_is_skipped_with_a_warning(data, tmp_path, capsys):
    root = make_data(tmp_path / "d")
    (root / "train" / "good" / "000.png").write_bytes((root / "train" / "good" / "000.png").read_bytes()[:200])
    train(root, tmp_path / "o", epochs=1)
    assert "000.png is skipped" in capsys.readouterr().err
    assert (tmp_path / "o" / "models" / "best_model.pth").exists()


def test_test_folder_without_defects_or_masks(tmp_path, trained):
    root = make_data(tmp_path / "d")
    for path in (root / "test" / "scratch").iterdir():
        path.unlink()
    settings = config.DetailTestSettings(
        model=str(trained / "models" / "best_model.pth"),
        data_dir=str(root),
        output_dir=str(tmp_path),
        device="cpu",
        bootstrap=5,
    )
    test_stage.main(settings)
    report = json.loads((tmp_path / "test_results" / "metrics" / "test_metrics.json").read_text())
    assert "auroc" not in report.get("image", {}) and report["reconstruction"]["psnr"]["value"] > 0


@pytest.mark.parametrize("name", ["metrics", "Maps", "scores.csv"])
def test_a_category_does_not_lie_among_other_results(trained, data, tmp_path, name):
    for category in ("good", name):
        shutil.copytree(data / "test" / "good", tmp_path / "test" / category)
    with pytest.raises(config.InputError, match=f"{name} has the name of other results; expected any but maps, metric"):
        test_stage.main(
            config.DetailTestSettings(
                data_dir=str(tmp_path),
                model=str(trained / "models" / "best_model.pth"),
                output_dir=str(tmp_path),
            )
        )
    assert not (tmp_path / "test_results").exists()


def test_a_category_called_all_does_not_hide_the_whole_test():
    report = {
        "categories": {"good": {}, "all": {"image": {"auroc": {"value": 0.25}}}},
        "image": {"auroc": {"value": 0.75}},
    }
    found = {name: row["image auroc"] for name, row in test_stage.rows_of(report).items()}
    assert found == {"all": 0.25, "all categories": 0.75}
    report["categories"]["dent"] = report["categories"].pop("all")
    assert list(test_stage.rows_of(report)) == ["dent", "all"]


def test_the_table_names_every_figure_in_full_over_its_column():
    report = {"categories": {"dent": {}}, "pixel": {"aupro": {"value": 0.25}, "pointing": {"value": 0.75}}}
    header, dent, whole = test_stage.table(report).splitlines()[:3]
    for name, value in (("pixel aupro", "0.250"), ("pixel pointing", "0.750")):
        assert whole.index(value) + len(value) == header.index(name) + len(name)
        assert dent[: header.index(name) + len(name)].endswith(" -")


@pytest.mark.parametrize(
    "content", [b"image\x00\n", b'image,category\n"test/good', b"\xff\xfe" * 40, b"image\n" + b"a" * 2**18]
)
def test_a_damaged_table_of_an_earlier_run_costs_nothing(tmp_path, content):
    (tmp_path / "scores.csv").write_bytes(content)
    test_stage.remove_earlier(tmp_path)
    assert (tmp_path / "scores.csv").read_bytes() == content


def test_mask_of_another_size_and_a_missing_mask(tmp_path, trained, capsys):
    root = make_data(tmp_path / "d")
    masks = root / "ground_truth" / "scratch"
    cv2.imwrite(str(masks / "000_mask.png"), cv2.resize(cv2.imread(str(masks / "000_mask.png"), 0), (200, 200)))
    (masks / "001_mask.png").unlink()
    settings = config.DetailTestSettings(
        model=str(trained / "models" / "best_model.pth"),
        data_dir=str(root),
        output_dir=str(tmp_path),
        device="cpu",
        bootstrap=5,
    )
    test_stage.main(settings)
    assert "001.png has no mask" in capsys.readouterr().err
    assert (tmp_path / "test_results" / "scratch" / "001.png").exists()


def test_unwritable_output_folder(data, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    arguments = ["--data-dir", str(data), "--output-dir", str(tmp_path / "file"), *flags(TINY)]
    assert scripts.run_script(config.TrainSettings, "", train_stage.main, arguments) == 1
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_data_of_the_training_that_are_gone_are_called_so(trained, tmp_path):
    contents = torch.load(trained / "models" / "best_model.pth", weights_only=True)
    contents["settings"]["data_dir"] = "parts"
    torch.save(contents, tmp_path / "moved.pth")
    for given, said in (({}, "parts, which the model was trained on, is not"), ({"data_dir": "none"}, "none does not")):
        with pytest.raises(config.InputError, match=said):
            test_stage.main(
                config.DetailTestSettings(model=str(tmp_path / "moved.pth"), output_dir=str(tmp_path), **given)
            )


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut"])
def test_unreadable_checkpoint(tmp_path, data, content):
    (tmp_path / "m.pth").write_bytes(content)
    with pytest.raises(config.InputError, match=r"m\.pth"):
        classify_images.main(config.ClassifySettings(images=(str(data),), model=str(tmp_path / "m.pth"), device="cpu"))


def test_training_state_is_no_model(trained, data):
    with pytest.raises(config.InputError, match="expected a 'detail_vae'"):
        classify_images.main(
            config.ClassifySettings(images=(str(data),), model=str(trained / "models" / "last.pth"), device="cpu")
        )


def test_ctrl_c_keeps_the_checkpoint_and_exits_with_130(data, tmp_path):
    process = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "train_with_validation.py"),
            "--data-dir",
            str(data),
            "--output-dir",
            str(tmp_path),
            *flags({**TINY, "epochs": 10_000}),
        ],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # a suite in the background would hand down "ignored"
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 100
    while not (tmp_path / "models" / "best_model.pth").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert torch.load(tmp_path / "models" / "last.pth", weights_only=True)["kind"] == "detail_vae_training"


def flags(values):
    return [part for key, value in values.items() for part in (f"--{key.replace('_', '-')}", str(value))]


# ------------------------------------------------------------------------------------- help and the README


SCRIPTS = {
    "data_loader.py": config.PreprocessSettings,
    "train_with_validation.py": config.TrainSettings,
    "test_vae.py": config.DetailTestSettings,
    "classify_images.py": config.ClassifySettings,
    "perceptual_loss.py": config.FetchWeightsSettings,
    "train_vae_classifier.py": config.TrainClassifierSettings,
    "inference_vae_classifier.py": config.InferClassifierSettings,
    "benchmarks/detection.py": config.DetectionBenchmarkSettings,
    "benchmarks/classifier.py": config.ClassifierBenchmarkSettings,
    "benchmarks/ablation.py": config.AblationSettings,
    "benchmarks/drawn_sets.py": config.DrawnSetsSettings,
    "benchmarks/foreign_defects.py": config.ForeignDefectsSettings,
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_loads_nothing_heavy(script):
    code = (
        f"import runpy, sys; sys.argv = ['{script}', '--help']\n"
        f"try: runpy.run_path('{script}', run_name='__main__')\n"
        "except SystemExit as e: assert not e.code\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "--output-dir" in result.stdout


def test_wrong_flag_exits_with_2():
    result = run_cli("train_with_validation.py", "--epoch", "3")
    assert result.returncode == 2 and "--epochs" in result.stderr


def test_image_size_not_a_multiple_of_32_exits_with_2():
    result = run_cli("train_with_validation.py", "--image-size", "100")
    assert result.returncode == 2 and "multiple of 32" in result.stderr


def readme_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = [
        command for block in re.findall(r"```bash\n(.*?)```", text, re.S) for command in re.split(r"&&|\n", block)
    ]
    for command in blocks + re.findall(r"`(python [^`]*)`", text):
        words = shlex.split(command)
        if words[:1] == ["python"] and words[1] != "-m":
            yield words[1:]


def test_readme_commands_are_found():
    assert {words[0] for words in readme_commands()} >= SCRIPTS.keys()


@pytest.mark.parametrize("words", list(readme_commands()), ids=" ".join)
def test_readme_commands_are_understood(words):
    if words[0] == "data_loader_supervised.py":
        config.parse(data_loader_supervised.COMMANDS[words[1]][0], "", words[2:])
    else:
        config.parse(SCRIPTS[words[0]], "", words[1:])


def test_readmes_notebook_lines_run(data, trained, tmp_path, run_readme_code, capsys):
    shutil.copytree(trained / "models", tmp_path / "models")
    shutil.copytree(data / "test", tmp_path / "data" / "demo_textures" / "test")
    run_readme_code("load_detector")
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(image_folders.find_images(data / "test")) and all(
        " p=" in line and ".png " in line for line in said
    )


@pytest.mark.drawn
def test_defects_drawn_in_the_test_are_others_than_those_that_set_the_pixel_threshold(
    data, trained, tmp_path, monkeypatch
):
    found, draw_on = [], data_loader.draw_on

    def drawing(images, windows, area_share, rng):
        drawn, masks = draw_on(images, windows, area_share, rng)
        found.append(masks[0])
        return drawn, masks

    monkeypatch.setattr(data_loader, "draw_on", drawing)
    model = str(trained / "models" / "best_model.pth")
    train_stage.main(config.TrainSettings(weights=model, output_dir=str(tmp_path)))
    n_calibrated = len(found)
    test_stage.main(
        config.DetailTestSettings(
            model=model, data_dir=str(data), output_dir=str(tmp_path), bootstrap=0, pictures=False
        )
    )
    calibrated, tested = found[:n_calibrated], found[n_calibrated:]
    assert calibrated and tested and not any(np.array_equal(a, b) for a in calibrated for b in tested)


@pytest.mark.drawn
def test_the_notebook_of_detail_vae_runs(data, trained, tmp_path, run_notebook, capsys):
    shutil.copytree(trained / "models", tmp_path / "models")
    shutil.copytree(data / "test", tmp_path / "data" / "demo_textures" / "test")
    names = run_notebook("detail_vae")
    assert len(names["judged"]) == len(names["is_defective"]) == 8 and sum(names["is_defective"]) == 4
    assert capsys.readouterr().out.count(", p = ") == 5 and names["output"].reconstruction.shape == (1, 3, 64, 64)


@pytest.mark.parametrize(("drawn_defects", "head"), [(0.75, True), (0.0, False)])
def test_without_drawn_defects_there_is_no_head_to_outline_them(data, tmp_path, drawn_defects, head):
    detector = classify_images.load_detector(
        train(data, tmp_path, epochs=1, drawn_defects=drawn_defects, segmentation=True)
    )
    assert (detector.model.defect_head is not None) == ("segmentation" in detector.shown) == head
    assert np.isfinite(detector.detect(torch.rand(1, 3, 64, 64))[0].defect_map).all()


def test_demo_is_used_when_no_data_is_given(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = train_stage.use_demo(config.TrainSettings(output_dir=str(tmp_path), batch_size=3))
    assert settings.image_size == 128 and settings.batch_size == 3
    assert len(image_folders.MVTecFolder(settings.data_dir).train_good) >= 50
    assert "demo" in capsys.readouterr().err


@pytest.mark.parametrize("below", ["train/good/0.png", "0.png"])
def test_a_data_folder_that_fits_is_used_and_no_demo_written_into_it(tmp_path, monkeypatch, below):
    monkeypatch.chdir(tmp_path)
    picture = tmp_path / "data" / below
    picture.parent.mkdir(parents=True)
    cv2.imwrite(str(picture), photograph(np.random.default_rng(0))[0])
    assert train_stage.use_demo(config.TrainSettings(output_dir=str(tmp_path))).data_dir == "data"
    assert [path for path in (tmp_path / "data").rglob("*") if path.is_file()] == [picture]
