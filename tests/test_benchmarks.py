"""The benchmarks on tiny data; what needs anomalib is skipped where that is not installed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import draw_nothing, take_tiny_backbone
from test_classifier_stages import make_data as make_plots
from test_classifier_stages import settings_for as classifier_settings
from test_stages import make_data as make_parts

import checkpoints
import config
import data_loader
import defect_maps
import image_files
import image_folders
import scripts
import vae_classifier
from benchmarks import ablation, classifier, detection, drawn_sets, foreign_defects

TINY = {
    "image_size": 64,
    "epochs": 1,
    "perceptual_weight": 0.0,
    "base_channels": 4,
    "picture_every": 9,
    "crop_images": 1,
    "device": "cpu",
}


@pytest.fixture
def anomalib():
    return pytest.importorskip(
        "anomalib",
        reason="the baselines are anomalib's: pip install -r benchmarks/requirements.txt",
        exc_type=ImportError,
    )


def good_images(n, seed=1):
    return 0.5 + 0.02 * torch.randn(n, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["patchcore", "padim"])
def test_a_baseline_finds_the_place_that_no_good_image_has(anomalib, tiny_backbone, name):
    good = good_images(6)
    model = detection.anomalib_model(name, tiny_backbone, good, seed=0)
    seen = good[:2].clone()
    seen[0, :, 32:40, 40:48] = 1.0
    found = model(seen)
    assert found.anomaly_map.shape == (2, 1, 64, 64) and found.pred_score[0] > 3 * found.pred_score[1]
    y, x = divmod(int(found.anomaly_map[0].argmax()), 64)
    assert abs(y - 36) <= 8 and abs(x - 44) <= 8


def test_the_coreset_holds_the_place_unlike_all_others(anomalib, tiny_backbone):
    good = good_images(4)
    good[2, :, :8, :8] = 0.0
    bank = detection.anomalib_model("patchcore", tiny_backbone, good, seed=0).memory_bank
    assert bank.shape == (round(4 * 8 * 8 / 10), tiny_backbone.channels)
    odd = torch.nn.functional.avg_pool2d(tiny_backbone.grid(good[2:3]), 3, 1, 1)[0, :, 0, 0]
    assert (bank - odd).norm(dim=1).min() < 1e-5


def test_without_anomalib_its_methods_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(detection.importlib.util, "find_spec", lambda name: None)
    settings = config.DetectionBenchmarkSettings(data_dir=str(make_parts(tmp_path / "parts")), output_dir=str(tmp_path))
    with pytest.raises(
        config.InputError, match=r"expected pip install -r benchmarks/requirements.txt, or --methods detailvae"
    ):
        detection.main(settings)
    assert (Path(detection.__file__).parent / "requirements.txt").is_file()


@pytest.mark.parametrize("methods", [("detailvae",), ("detailvae", "patchcore", "padim")])
def test_the_detection_benchmark_compares_all_methods_on_the_same_images(
    tmp_path, capsys, request, monkeypatch, methods
):
    if len(methods) > 1:
        request.getfixturevalue("anomalib")
    monkeypatch.setattr(detection, "in_own_process", detection.measure)
    settings = config.DetectionBenchmarkSettings(
        data_dir=str(make_parts(tmp_path / "parts")),
        output_dir=str(tmp_path),
        **TINY,
        methods=methods,
        train_samples=4,
    )
    detection.main(settings)
    rows = json.loads((tmp_path / "benchmark_results" / "detection.json").read_text())["rows"]
    assert [row["method"] for row in rows] == list(methods)
    assert all(row["image auroc"]["value"] >= 0.9 and row["pixel auroc"]["value"] >= 0.9 for row in rows)
    assert all(row["images_per_s"] > 0 and row["training_s"] > 0 for row in rows)
    assert sum(line.startswith(methods) for line in capsys.readouterr().out.splitlines()) == len(methods)


def test_a_method_runs_in_a_process_of_its_own_and_says_there_what_is_wrong(tmp_path):
    settings = config.DetectionBenchmarkSettings(data_dir=str(tmp_path / "none"), output_dir=str(tmp_path))
    with pytest.raises(config.InputError, match=r"none.*expected") as caught:
        detection.in_own_process("detailvae", settings)
    assert type(caught.value.__cause__).__name__ == "_RemoteTraceback"


def test_the_detection_benchmark_counts_no_grey_bars(tmp_path, monkeypatch):
    wide, mask = np.full((32, 64, 3), 90, np.uint8), np.zeros((32, 64), np.uint8)
    mask[8:16, 20:30] = 255
    wides = [
        f"{folder}/{n:03d}"
        for folder, n in (("train/good", 0), ("train/good", 1), ("train/good", 2), ("test/good", 0), ("test/cut", 0))
    ]
    for name, picture in [*((name, wide) for name in wides), ("ground_truth/cut/000_mask", mask)]:
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), picture)
    calibration = defect_maps.Calibration.of({}, [1.0, 2.0], np.zeros(4), 0.05, 0.01)
    row = np.arange(64.0)[:, None] * np.ones((1, 64))  # a map that says in which row of the square a pixel lies
    stub = type(
        "Stub",
        (),
        {
            "calibration": calibration,
            "detect": lambda self, images: [calibration.judge(1.0)._replace(defect_map=row) for _ in images],
        },
    )()
    judged = []
    monkeypatch.setattr(detection, "train_baseline", lambda *args: stub)
    monkeypatch.setattr(detection.evaluation, "detection_report", lambda *args: judged.append(args) or {})
    detection.measure(
        "padim", config.DetectionBenchmarkSettings(data_dir=str(tmp_path), image_size=64, resize="letterbox")
    )
    maps, masks = judged[0][3:5]
    assert all(np.array_equal(each, row[16:48]) for each in maps)
    assert [int(each.sum()) for each in masks] == [80, 0] and masks[0][8:16, 20:30].all()


def brightness(name, backbone, images, seed):
    """Stands in for ``anomalib_model``: how bright is how odd."""
    return lambda seen: SimpleNamespace(pred_score=seen.amax((1, 2, 3)), anomaly_map=seen.mean(1, keepdim=True))


def test_a_baseline_is_calibrated_on_no_grey_bars(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for index in range(12):
        image_files.write_png(
            tmp_path / "train" / "good" / f"{index:03d}.png", rng.integers(0, 255, (24, 64, 3)).astype(np.uint8)
        )
    settings = config.DetectionBenchmarkSettings(
        data_dir=str(tmp_path), image_size=64, resize="letterbox", pixel_false_positives=0.02, device="cpu"
    )
    monkeypatch.setattr(detection, "anomalib_model", brightness)
    baseline = detection.train_baseline("padim", settings)
    held = image_folders.split_holdout(image_folders.find_images(tmp_path), settings.holdout_frac, settings.seed)[1]
    _, maps = baseline.maps(data_loader.load_images(held, 64, "letterbox").images)
    assert (maps[:, 20:44] > baseline.calibration.pixel_threshold).mean() == pytest.approx(0.02, abs=1e-3)


@pytest.mark.parametrize("n_broken", [1, 3, 12])
def test_a_baseline_says_which_images_it_skips_and_that_none_is_left(tmp_path, monkeypatch, capsys, n_broken):
    settings = config.DetectionBenchmarkSettings(
        data_dir=str(make_parts(tmp_path / "parts")), image_size=64, device="cpu"
    )
    monkeypatch.setattr(detection, "anomalib_model", brightness)
    training, held = image_folders.split_holdout(
        image_folders.find_images(tmp_path / "parts" / "train"), settings.holdout_frac, settings.seed
    )
    broken = {1: training[:1], 3: held, 12: training}[n_broken]
    for path in broken:
        path.write_bytes(b"broken " + path.name.encode())  # no copies: they would be split otherwise
    if n_broken == 1:
        assert detection.train_baseline("padim", settings).calibration.good_scores
    else:
        with pytest.raises(config.InputError, match=f"None of the {len(broken)} .* images of .*parts can be read"):
            detection.train_baseline("padim", settings)
    said = capsys.readouterr().err
    assert all(f"warning: {path} is skipped: is not an image" in said for path in broken)


def test_a_method_that_fails_does_not_end_the_others(tmp_path, monkeypatch, capsys):
    def measure(name, settings):
        if name == "padim" or settings.seed == 1:
            raise config.InputError("None can be read.")
        return {
            "method": name,
            "seed": settings.seed,
            "train_images": 12,
            "images_per_s": 1.0,
            "training_s": 1.0,
            "peak_memory_mb": None,
            **{f"{level} {key}": None for level, key in detection.MEASURED},
        }

    monkeypatch.setattr(detection, "in_own_process", measure)
    monkeypatch.setattr(detection, "require_anomalib", lambda: None)
    settings = config.DetectionBenchmarkSettings(
        data_dir=str(make_parts(tmp_path / "parts")), output_dir=str(tmp_path), seeds=(0, 1, 2)
    )
    detection.main(settings)
    rows = json.loads((tmp_path / "benchmark_results" / "detection.json").read_text())["rows"]
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("detailvae", 0),
        ("patchcore", 0),
        ("detailvae", 2),
        ("patchcore", 2),
    ]
    assert capsys.readouterr().err.count("padim fails with seed") == 3
    with pytest.raises(config.InputError, match="No method could be measured"):
        detection.main(settings.replace(methods=("padim",)))


def test_a_test_without_readable_images_is_one_sentence(tmp_path, monkeypatch):
    parts = make_parts(tmp_path / "parts")
    for path in image_folders.find_images(parts / "test"):
        path.write_bytes(b"broken")
    monkeypatch.setattr(detection, "train_baseline", lambda *args: None)
    with pytest.raises(config.InputError, match=r"None of the images in .*test can be read"):
        detection.measure("padim", config.DetectionBenchmarkSettings(data_dir=str(parts), image_size=64))


def test_the_detection_benchmark_trains_every_method_itself(tmp_path):
    with pytest.raises(config.UsageError, match="expected no --weights"):
        detection.main(config.DetectionBenchmarkSettings(data_dir=str(tmp_path), weights="models/best_model.pth"))


@pytest.mark.parametrize("given", [frozenset(), frozenset({"resize"})])
def test_images_preprocessed_with_grey_bars_are_judged_as_training_sees_them(tmp_path, monkeypatch, given):
    parts = make_parts(tmp_path / "parts")
    for path in image_folders.find_images(parts):
        cv2.imwrite(str(path), cv2.resize(cv2.imread(str(path)), (160, 64)))
    data_loader.preprocess(
        config.PreprocessSettings(source=(str(parts),), out=str(tmp_path / "set"), image_size=64, resize="letterbox")
    )
    measured, trained = [], []
    monkeypatch.setattr(
        detection,
        "in_own_process",
        lambda name, settings: (
            measured.append(settings)
            or {
                "method": name,
                **dict.fromkeys(("seed", "train_images", "images_per_s", "training_s"), 1),
                "peak_memory_mb": None,
                **{f"{level} {key}": None for level, key in detection.MEASURED},
            }
        ),
    )
    settings = config.from_dict(
        config.DetectionBenchmarkSettings,
        {
            "data_dir": str(tmp_path / "set"),
            "output_dir": str(tmp_path),
            "image_size": 64,
            "methods": ["detailvae"],
            "train_images": [6],
        },
        given,
    )
    detection.main(settings)
    assert measured[0].resize == ("stretch" if given else "letterbox")
    found = image_folders.MVTecFolder(measured[0].data_dir)
    assert {found.letterboxed[path] for path in found.train_good} == {(64, 160)} and all(
        item.path in found.letterboxed for item in found.test
    )
    monkeypatch.setattr(detection.train_with_validation, "main", trained.append)
    monkeypatch.setattr(detection.defect_maps, "load_detector", lambda *args, **kwargs: None)
    detection.train_detailvae(measured[0])
    assert detection.detail_data.fitted_as_on_disk(trained[0], print).resize == measured[0].resize


def test_a_training_set_of_fewer_images_holds_as_many_defective_ones_as_asked_for(tmp_path):
    parts = make_parts(tmp_path / "parts")
    deeper = parts / "test" / "scratch" / "deeper"  # of the same name as another
    deeper.mkdir()
    original = (parts / "test" / "scratch" / "000.png").read_bytes()
    (deeper / "000.png").write_bytes((parts / "test" / "scratch" / "001.png").read_bytes())
    image_files.write_png(parts / "validation" / "good" / "000.png", np.zeros((8, 8), np.uint8))
    settings = config.DetectionBenchmarkSettings(data_dir=str(parts), contamination=0.1, seed=3)
    before, found = (
        image_folders.MVTecFolder(parts),
        image_folders.MVTecFolder(detection.training_set(settings, 4, tmp_path / "few")),
    )
    hidden = [path for path in found.train_good if "scratch" in path.parts]
    assert len(found.train_good) == 4 and len(hidden) == 1
    assert [path.resolve() for path in found.validation_good] == before.validation_good
    assert len(found.test) == len(before.test) - 1 and hidden[0].resolve() not in {
        item.path.resolve() for item in found.test
    }
    assert {path.resolve() for path in found.train_good if path not in hidden} <= {
        path.resolve() for path in before.train_good
    }
    assert sum(item.mask_paths != () for item in found.test) >= 3
    assert (parts / "test" / "scratch" / "000.png").read_bytes() == original
    assert detection.training_set(settings.replace(contamination=0.0), 0, tmp_path / "all") == str(parts)
    with pytest.raises(config.InputError, match="good training images; 900 were asked for"):
        detection.training_set(settings, 1000, tmp_path / "many")
    n_bad = sum(item.category != "good" for item in before.test)
    with pytest.raises(config.InputError, match=f"{n_bad - 1} defective test images beside one that must stay"):
        detection.training_set(settings.replace(contamination=0.5), 2 * n_bad, tmp_path / "all")


def test_where_grey_bars_are_is_known_of_hidden_images_too(tmp_path):
    data_loader.preprocess(
        config.PreprocessSettings(
            source=(str(make_parts(tmp_path / "parts")),), out=str(tmp_path / "set"), image_size=64, resize="letterbox"
        )
    )
    settings = config.DetectionBenchmarkSettings(data_dir=str(tmp_path / "set"), contamination=0.1)
    found = image_folders.MVTecFolder(detection.training_set(settings, 0, tmp_path / "linked"))
    assert any("scratch" in path.parts for path in found.train_good)
    assert found.letterboxed.keys() >= {*found.train_good, *(item.path for item in found.test)}


@pytest.fixture(scope="module")
def ablated(tmp_path_factory):
    """The folder of the ablation of tiny parts: the whole model, one part of training and one of the score left out."""
    root = tmp_path_factory.mktemp("ablated")
    earlier = root / "benchmark_results" / "ablation" / "score_of_the_bank_alone_3" / "models" / "best_model.pth"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("an earlier run's, of other weights")
    with pytest.MonkeyPatch.context() as patched:
        draw_nothing(patched)
        take_tiny_backbone(patched)
        ablation.main(
            config.AblationSettings(
                data_dir=str(make_parts(root / "parts")),
                output_dir=str(root),
                **TINY,
                precision="float32",
                seeds=(3,),
                rows=("no skips", "score of the bank alone"),
            )
        )
    return root / "benchmark_results"


def test_the_ablation_leaves_out_what_a_row_says(ablated):
    rows = json.loads((ablated / "ablation.json").read_text())["rows"]
    assert [(row["row"], row["seed"]) for row in rows] == [
        ("everything", 3),
        ("no skips", 3),
        ("score of the bank alone", 3),
    ]
    whole, no_skips, bank = (
        config.read_yaml(ablated / "ablation" / name / "models" / "config.yaml")
        for name in ("everything_3", "no_skips_3", "score_of_the_bank_alone_3")
    )
    changed = lambda other: {key for key in whole if whole[key] != other[key]} - {"output_dir", "weights"}  # noqa: E731
    assert changed(no_skips) == {"skips"} and changed(bank) == {"score_nearest"}


def test_a_row_of_maps_keeps_the_weights_of_the_first(ablated):
    weights = [
        checkpoints.load_checkpoint(
            ablated / "ablation" / name / "models" / "best_model.pth", "detail_vae", ("model",)
        )["model"]
        for name in ("everything_3", "score_of_the_bank_alone_3")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    recalibrated = ablated / "ablation" / "score_of_the_bank_alone_3"
    assert not (recalibrated / "models" / "last.pth").exists() and config.read_yaml(
        recalibrated / "models" / "config.yaml"
    )["weights"].endswith("everything_3/models/best_model.pth")


@pytest.mark.parametrize(
    ("preset", "same"),
    [
        ({}, set()),
        ({"map_bank": 0.0, "score_bank": 0.0}, {"map without bank", "score of the nearest deviations alone"}),
        ({"perceptual_weight": 0.0, "map_flips": True}, {"no perceptual loss", "averaged over flips"}),
    ],
)
def test_rows_that_change_nothing_are_known(preset, same):
    settings = config.from_dict(config.AblationSettings, preset)
    rows = [*ablation.TRAINED, *ablation.RECALIBRATED][1:]
    assert {name for name in rows if ablation.changes_nothing(name, settings)} == same


@pytest.mark.parametrize("name", ["nearest", "bank", "likelihood"])
def test_a_score_alone_is_alone_whatever_the_preset(name):
    preset = config.read_yaml(Path(ablation.__file__).parent.parent / "configs" / "bracket_white.yaml")
    asked = config.parse(config.TrainSettings, "", ablation.alone("score", name))
    maps = config.from_dict(
        config.MapSettings,
        {**config.as_dict(config.TrainSettings()), **preset, **{key: getattr(asked, key) for key in asked.given}},
    )
    assert defect_maps.score_shares(maps, has_features=True) == {name: 1.0}


def test_an_unknown_row_of_the_ablation_is_refused():
    with pytest.raises(config.UsageError, match="no row 'no skip'; expected some of 'everything'"):
        ablation.main(config.AblationSettings(rows=("no skip",)))
    with pytest.raises(config.UsageError, match="no --weights and no --resume"):
        ablation.main(config.AblationSettings(resume=True))


def test_a_row_of_maps_takes_no_weights_of_an_earlier_run(tmp_path, monkeypatch, capsys):
    def measure(name, settings, out):
        if name == ablation.DEFAULT and settings.seed == 1:
            raise config.InputError("it diverged.")
        return {"row": name, "seed": settings.seed, "minutes": 1.0, **dict.fromkeys(ablation.COLUMNS)}

    monkeypatch.setattr(ablation, "measure", measure)
    data = make_parts(tmp_path / "parts")
    settings = config.AblationSettings(
        data_dir=str(data), output_dir=str(tmp_path), seeds=(1, 2), rows=("map without bank",)
    )
    ablation.main(settings)
    rows = json.loads((tmp_path / "benchmark_results" / "ablation.json").read_text())["rows"]
    assert [(row["row"], row["seed"]) for row in rows] == [("everything", 2), ("map without bank", 2)]
    assert "'map without bank' fails with seed 1: the row 'everything' left no weights" in capsys.readouterr().err
    with pytest.raises(config.InputError, match="No row could be measured"):
        ablation.main(settings.replace(seeds=(1,)))


@pytest.mark.parametrize("given", [(), ("--resize", "stretch")])
def test_rows_of_preprocessed_images_are_fitted_as_these_were(tmp_path, monkeypatch, capsys, given):
    data_loader.preprocess(
        config.PreprocessSettings(
            source=(str(make_parts(tmp_path / "parts")),), out=str(tmp_path / "set"), image_size=64, resize="letterbox"
        )
    )
    fitted = []
    monkeypatch.setattr(
        ablation,
        "measure",
        lambda name, settings, out: (
            fitted.append(settings.resize)
            or {"row": name, "seed": 0, "minutes": 1.0, **dict.fromkeys(ablation.COLUMNS)}
        ),
    )
    arguments = [
        "--data-dir",
        str(tmp_path / "set"),
        "--output-dir",
        str(tmp_path),
        "--image-size",
        "64",
        "--rows",
        "no skips",
        "--seeds",
        "0",
        *given,
    ]
    assert scripts.run_script(config.AblationSettings, "", ablation.main, arguments) == 0
    assert fitted == ["stretch" if given else "letterbox"] * 2 and ("warning: " in capsys.readouterr().err) == bool(
        given
    )


def test_mean_and_spread_stand_in_a_row_of_the_ablation():
    rows = [{**dict.fromkeys(ablation.COLUMNS), "pixel AP": value, "minutes": 2.0} for value in (0.25, 0.5)]
    assert (
        ablation.line("x", rows).split(" | ")[3] == "0.375 (0.250)" and ablation.line("x", rows).split(" | ")[1] == "-"
    )


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Rows of the classifier benchmark on tiny plots, by method."""
    root = tmp_path_factory.mktemp("compared")
    settings = classifier_settings(make_plots(root / "plots"), root / "out", epochs=2)
    classifier.main(
        config.from_dict(config.ClassifierBenchmarkSettings, {**config.as_dict(settings), "head_share": 0.5})
    )
    return {
        row["method"]: row
        for row in json.loads((root / "out" / "benchmark_results" / "classifier.json").read_text())["rows"]
    }


def test_the_classifier_benchmark_scores_every_method_on_test_and_validation(compared):
    assert list(compared) == ["joint", "resnet", "frozen"]
    for row in compared.values():
        assert (
            0 <= row["test"]["accuracy"]["value"] <= 1
            and set(row["test"]["macro_f1"]) == {"value", "ci95"}
            and "real" in row
        )
    assert compared["resnet"]["parameters"] == sum(p.numel() for p in classifier.PlainResNet(3).parameters())


def test_a_frozen_encoder_learns_nothing_from_labels():
    torch.manual_seed(0)
    model = vae_classifier.VAEClassifier(
        config.ClassifierModelSettings(
            widths=(8, 8),
            profile_channels=4,
            decoder_channels=8,
            detail_channels=2,
            reconstruction_size=32,
            latent_dim=4,
        ),
        3,
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    terms, _ = classifier.CrossEntropy(0.1, frozen=True).terms(
        model.train(), torch.rand(4, 3, 64, 64), torch.tensor([0, 1, 2, 0])
    )
    terms["total"].backward()
    assert {name for name, each in model.named_parameters() if each.grad is not None} == {
        "head.1.weight",
        "head.1.bias",
    }
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    learning, _ = classifier.CrossEntropy(0.1).terms(
        model.train(), torch.rand(4, 3, 64, 64), torch.tensor([0, 1, 2, 0])
    )
    learning["total"].backward()
    assert model.to_latent.weight.grad is not None


# ------------------------------------------------------------------------------------------------ drawn sets


# patches of 10 px
PHOTO = np.random.default_rng(3).integers(40, 200, (40, 50, 3), np.uint8).repeat(10, 0).repeat(10, 1)


def drawings():
    """(name, image before, image after, mask) of every kind of defect of all sets, three of each, 256 px."""
    rng = np.random.default_rng(0)
    for _ in range(3):
        for name, draw in drawn_sets.SURFACE_DEFECTS.items():
            image = drawn_sets.surface(rng, 256)
            yield name, image, *draw(rng, image, 1)
        for name, draw in drawn_sets.CAP_DEFECTS.items():
            if name != "missing":  # drawn on a cap of its own
                image = drawn_sets.cap(rng, side=256)
                yield name, image, *draw(rng, image)
        for name, draw in drawn_sets.PIECE_DEFECTS.items():
            image = drawn_sets.piece(rng, PHOTO, 140, 256)
            yield name, image, *draw(rng, image)


@pytest.mark.parametrize("kind", ["broken", "thick"])
def test_a_yarn_of_the_fabric_differs_for_a_length_and_nothing_else(kind):
    whole, (changed, mask) = (drawn_sets.fabric(np.random.default_rng(2), 256, **given) for given in ({}, {kind: 0.4}))
    down, across = np.ptp(np.argwhere(mask), axis=0) + 1
    length, width = (down, across) if kind == "broken" else (across, down)
    assert 0.15 * 256 < length < 0.65 * 256 and 8 < width < 24  # a yarn of 11 or 12 px, a little turned
    before, after = ([each[mask == inside].mean() for inside in (True, False)] for each in (whole[0], changed))
    assert (after[0] < before[0] - 20) if kind == "broken" else (after[0] > before[0] + 10)
    assert after[1] == pytest.approx(before[1], rel=0.1)


def test_a_drawn_sets_masks_cover_what_was_changed():
    for name, before, after, mask in drawings():
        change = np.abs(after - before).max(2)
        assert mask.any() and mask.mean() < 0.2, name
        assert change[mask].mean() > 5 * change[~mask].mean() + 3, name


@pytest.mark.parametrize("missing", [("hole", 3), ("screw", 1), ("rib", 7), ("label", 0)])
def test_a_cap_lacks_what_is_missing_and_nothing_else(missing):
    whole, lacking = (drawn_sets.cap(np.random.default_rng(1), each, 256) for each in (None, missing))
    changed = np.argwhere(np.abs(whole - lacking).max(2) > 12)
    assert 0 < len(changed) < 0.02 * 256**2
    assert np.ptp(changed, axis=0).max() < 50


def test_a_piece_to_test_is_of_no_part_of_the_photo_that_was_trained_on(tmp_path):
    photo = np.full((400, 400, 3), 80, np.uint8)
    photo[:, 240:] = 160
    drawn_sets.write_pieces(tmp_path, photo, 0, 4, 4, 0, side=64)
    train, test = (
        np.mean([image_files.read_image(path).mean() for path in (tmp_path / part / "good").iterdir()])
        for part in ("train", "test")
    )
    assert train == pytest.approx(80, rel=0.15) and test == pytest.approx(160, rel=0.15)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((300, 300), "300 x 300 px; expected a shorter side of 366 px"),
        ((800, 500), "800 x 500 px"),
        (None, "cannot be read (No such file"),
    ],
)
def test_a_photo_that_makes_no_set_is_named(tmp_path, monkeypatch, capsys, shape, words):
    monkeypatch.setattr(drawn_sets, "write_surfaces", lambda root, seed: None)
    monkeypatch.setattr(drawn_sets, "write_caps", lambda root, seed: None)
    monkeypatch.setattr(drawn_sets, "write_fabrics", lambda root, seed: None)
    monkeypatch.setattr(drawn_sets, "PIECE_FRAC", 0.35 if shape != (800, 500) else 0.45)
    path = tmp_path / "wall.png"
    if shape:
        image_files.write_png(path, np.zeros((*shape, 3), np.uint8))
    arguments = ["--photos", str(path), "--output-dir", str(tmp_path)]
    assert scripts.run_script(config.DrawnSetsSettings, "", drawn_sets.main, arguments) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "wall.png" in said and words in said


def test_drawn_sets_are_in_the_layout_and_the_same_every_time(tmp_path):
    def pieces(root, *args, side):
        drawn_sets.write_pieces(root, PHOTO, *args, side=side)

    for name, write in (
        ("surfaces", drawn_sets.write_surfaces),
        ("cap", drawn_sets.write_caps),
        ("fabric", drawn_sets.write_fabrics),
        ("pieces", pieces),
    ):
        for run in ("first", "second"):
            write(tmp_path / run / name, 3, 3, 2, 1, side=128)
        write(tmp_path / "other" / name, 4, 1, 0, 0, side=128)
        folder = image_folders.MVTecFolder(str(tmp_path / "first" / name))
        assert len(folder.train_good) == 3 and not folder.warnings
        assert [item.category for item in folder.test].count("good") == 2
        defective = [item for item in folder.test if item.category != "good"]
        assert len(defective) == 5
        for item in defective:
            mask = image_folders.read_truth(item, 128, "stretch", (128, 128), pytest.fail)
            assert mask is not None and mask.any()
        for path in (tmp_path / "first" / name).rglob("*.png"):
            assert path.read_bytes() == (tmp_path / "second" / path.relative_to(tmp_path / "first")).read_bytes()
        one = Path("train") / "good" / "000.png"
        assert (tmp_path / "first" / name / one).read_bytes() != (tmp_path / "other" / name / one).read_bytes()


def test_drawn_sets_are_written_below_the_output_folder(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(drawn_sets, "write_surfaces", lambda root, seed: written.append((root, seed)))
    monkeypatch.setattr(drawn_sets, "write_caps", lambda root, seed: written.append((root, seed)))
    monkeypatch.setattr(drawn_sets, "write_fabrics", lambda root, seed: written.append((root, seed)))
    monkeypatch.setattr(
        drawn_sets, "write_pieces", lambda root, photo, seed: written.append((root, photo[0, 0].tolist(), seed))
    )
    image_files.write_png(tmp_path / "a wall.png", np.full((8, 8, 3), (1, 2, 3), np.uint8))
    drawn_sets.main(
        config.DrawnSetsSettings(output_dir=str(tmp_path), out="sets", seed=4, photos=(str(tmp_path / "a wall.png"),))
    )
    assert written == [
        (tmp_path / "sets" / "a wall", [3, 2, 1], 4),
        (tmp_path / "sets" / "surfaces", 4),
        (tmp_path / "sets" / "cap", 4),
        (tmp_path / "sets" / "fabric", 4),
    ]
    with pytest.raises(config.UsageError, match="expected photographs of different names"):
        drawn_sets.main(config.DrawnSetsSettings(photos=("here/cap.jpg",)))


# ---------------------------------------------------------------------------------------- foreign defects


@pytest.mark.parametrize("kind", foreign_defects.KINDS)
@pytest.mark.parametrize("shape", [(96, 160), (130, 90)])
def test_a_foreign_defect_is_of_the_right_size_and_where_its_mask_says(kind, shape):
    rng = np.random.default_rng(5)
    image = rng.integers(60, 180, (*shape, 3)).astype(np.float32)
    other = rng.integers(60, 180, (*shape, 3)).astype(np.float32)
    places = []
    for _ in range(4):
        before = image.copy()
        changed, mask = foreign_defects.draw_foreign(rng, image, kind, other)
        np.testing.assert_array_equal(image, before)  # what is drawn on stays as it is
        change = np.abs(changed - image).max(2)
        np.testing.assert_array_equal(mask, change >= 6)
        assert 0.0002 <= mask.mean() <= 0.02 and (change[mask] >= 10).mean() >= 0.5
        assert changed.min() >= 0 and changed.max() <= 255 and (changed == changed.round()).all()
        places.append(tuple(np.argwhere(mask).mean(0)))
    assert len(set(places)) == 4


def test_a_defect_that_cannot_be_seen_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setitem(foreign_defects.KINDS, "line", lambda rng, image, area_px, other: image + 3)
    images = [np.full((64, 64, 3), 120, np.uint8)]
    assert foreign_defects.write_foreign(images, tmp_path, 0, 1) == ["line 000"]
    assert not (tmp_path / "test" / "line").exists() and (tmp_path / "test" / "shade").exists()


def test_foreign_defects_are_drawn_on_good_test_images_alone(tmp_path, capsys):
    data, rng = tmp_path / "data", np.random.default_rng(0)
    for place in ("test/good/0.png", "test/good/1.png", "test/scratch/0.png"):
        image_files.write_png(data / place, rng.integers(60, 180, (64, 80, 3), np.uint8))
    (data / "test" / "good" / "2.png").write_bytes(b"no image")
    arguments = ["--data-dir", str(data), "--output-dir", str(tmp_path), "--per-kind", "2", "--seed", "4"]
    for out in ("first", "second"):
        assert (
            scripts.run_script(config.ForeignDefectsSettings, "", foreign_defects.main, [*arguments, "--out", out]) == 0
        )
    said = capsys.readouterr()
    assert "2 good images, 8 kinds" in said.out and "2.png" in said.err
    folder = image_folders.MVTecFolder(str(tmp_path / "first"), require_train=False)
    found = {kind: [item for item in folder.test if item.category == kind] for kind in ("good", *foreign_defects.KINDS)}
    assert [len(items) for items in found.values()] == [2] * 9 and len(folder.test) == 18 and not folder.warnings
    good = [image_files.read_image(data / "test" / "good" / name) for name in ("0.png", "1.png")]
    for before, item in zip(good, found["good"], strict=True):
        np.testing.assert_array_equal(image_files.read_image(item.path), before)
    for items in (found[kind] for kind in foreign_defects.KINDS):
        for item, before in zip(items, good, strict=True):
            mask = image_files.read_mask(item.mask_paths[0])
            differs = (image_files.read_image(item.path) != before).any(2)
            assert mask.any() and differs[mask].all()
    for path in (tmp_path / "first").rglob("*.png"):
        assert path.read_bytes() == (tmp_path / "second" / path.relative_to(tmp_path / "first")).read_bytes()


@pytest.mark.parametrize(("place", "code", "words"), [(None, 2, "--data-dir"), ("test/dent/0.png", 1, "test/good")])
def test_a_set_without_good_test_images_is_refused(tmp_path, capsys, place, code, words):
    if place:
        image_files.write_png(tmp_path / "data" / place, np.zeros((32, 32, 3), np.uint8))
    arguments = ["--output-dir", str(tmp_path), *(["--data-dir", str(tmp_path / "data")] if place else [])]
    assert scripts.run_script(config.ForeignDefectsSettings, "", foreign_defects.main, arguments) == code
    said = capsys.readouterr().err
    assert said.startswith("error: ") and words in said and not (tmp_path / "data" / "foreign_defects").exists()
