"""The classifier's two stages from end to end, on tiny drawn plots of three easy classes."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import checkpoints
import classifier_training
import config
import data_loader_supervised as plot_loader
import engine
import inference_vae_classifier as inference
import latent_space
import scripts
import train_vae_classifier as training
import vae_classifier
from vae_classifier import BEST

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ["flat", "jump", "rise"]
TINY = {
    "image_size": 64,
    "widths": (8, 8),
    "profile_channels": 4,
    "decoder_channels": 8,
    "detail_channels": 2,
    "reconstruction_size": 32,
    "latent_dim": 4,
}
N_TRAIN, N_TEST = 8, 3


def write_plot(path, kind, rng):
    """A plot of 100 x 80 px with spines, as a PNG."""
    x = np.linspace(0, 1, 84)
    heights = {"flat": 36 + 0 * x, "rise": 60 - 48 * x, "jump": np.where(x > rng.uniform(0.3, 0.7), 16, 56)}[
        kind
    ] + rng.normal(0, 2, 84)
    image = np.full((80, 100, 3), 255, np.uint8)
    image[4:74, 8] = image[73, 8:98] = 0
    points = np.stack([np.arange(84) + 11, heights.clip(5, 70)], 1).round().astype(np.int32)
    cv2.polylines(image, [points], False, (180, 119, 31), 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".png", image)[1].tobytes())
    return path


def make_data(root):
    rng = np.random.default_rng(0)
    for part, n in (("train", N_TRAIN), ("test", N_TEST)):
        for kind in CLASSES:
            for i in range(n):
                write_plot(root / part / kind / f"{i}.png", kind, rng)
    return root


def settings_for(data, out, **changes):
    values = {
        **TINY,
        "data_dir": str(data),
        "output_dir": str(out),
        "epochs": 2,
        "picture_every": 2,
        "bootstrap": 20,
        "validation_frac": 0.25,
        "batch_size": 8,
    }
    return config.TrainClassifierSettings(**{**values, **changes})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(data set, output folder) of a finished run of two epochs."""
    root = tmp_path_factory.mktemp("classifier")
    data = make_data(root / "data_set")
    training.main(settings_for(data, root / "out"))
    return data, root / "out"


@pytest.fixture
def model(trained):
    return inference.load_vae_classifier(trained[1] / BEST)[0]


def run_inference(*argv):
    return scripts.run_script(
        config.InferClassifierSettings,
        "Infer.",
        inference.main,
        [str(each) for each in argv],
        prog="inference_vae_classifier.py",
    )


def run_training(*argv):
    return scripts.run_script(
        config.TrainClassifierSettings,
        "Train.",
        training.main,
        [str(each) for each in argv],
        prog="train_vae_classifier.py",
    )


def one_sentence(capsys):
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and lines[0].endswith(".")
    return lines[0]


def read_rows(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def series_csv(path, text=None):
    rng = np.random.default_rng(1)
    path.parent.mkdir(exist_ok=True)
    path.write_text(text if text is not None else "data\n" + "\n".join(map(str, rng.normal(size=120).tolist())) + "\n")
    return path


# ---------------------------------------------------------------------------------------------- training


def test_training_leaves_what_it_promises(trained):
    _, out = trained
    results = json.loads((out / "results" / "vae_classifier_results.json").read_text())
    assert {"accuracy", "macro_f1", "macro_precision", "macro_recall"} <= results.keys()
    assert (
        results["accuracy"].keys() == {"value", "ci95"}
        and results["scored_on"] == "test"
        and results["n_images"] == 3 * N_TEST
    )
    assert set(results["per_class"]) == set(CLASSES) and np.sum(results["confusion_matrix"]) == 3 * N_TEST
    assert results["validation"]["n_images"] == 6 and "fresh_series" not in results
    assert results["expected_calibration_error"].keys() == {"before", "after", "temperature", "temperature_flips"}
    assert results["reconstruction"]["ssim"]["value"] <= 1
    for name in (
        "vae_models/config.yaml",
        "results/vae_classifier_curves.png",
        "results/vae_classifier_confusion.png",
        "reconstructions/vae_classifier_epoch_2.png",
    ):
        assert (out / name).stat().st_size > 100, name
    assert not (out / "reconstructions" / "vae_classifier_epoch_1.png").exists()


def test_the_history_names_every_number_and_no_time(trained):
    history = json.loads((trained[1] / "results" / "vae_classifier_history.json").read_text())
    assert [row["epoch"] for row in history["epochs"]] == [1, 2] and history["best_epoch"] in (1, 2)
    terms = (
        "total",
        "reconstruction",
        "kl",
        "classification",
        "accuracy",
        "macro_f1",
        "macro_precision",
        "macro_recall",
    )
    assert history["epochs"][0].keys() == {"epoch", *(f"{part}/{term}" for part in ("train", "val") for term in terms)}
    best = max(history["epochs"], key=lambda row: (row["val/macro_f1"], -row["val/total"]))  # no fresh series
    assert history["best_epoch"] == best["epoch"]


def test_the_best_epoch_is_judged_on_all_validation_plots():
    assert classifier_training.validation_score({"val/macro_f1": 0.8, "test/macro_f1": 0.1}) == 0.8
    assert classifier_training.validation_score(
        {"val/macro_f1": 0.8, "fresh/macro_f1": 0.6, "train/macro_f1": 0.1}
    ) == pytest.approx(0.7)


def test_among_epochs_of_one_f1_the_lowest_loss_is_kept(trained, monkeypatch, tmp_path):
    run, kept = training.prepare(settings_for(trained[0], tmp_path)), []
    monkeypatch.setattr(classifier_training, "save_best", lambda *given: kept.append(given[-1]))
    for loss, macro_f1 in ((0.5, 0.8), (0.4, 0.8), (0.4, 0.8), (0.1, 0.7), (0.9, 0.9)):
        run.history.append({"val/total": loss})
        classifier_training.keep_if_best(run, macro_f1)
    assert kept == [1, 2, 5] and (run.best, run.best_epoch) == (0.9, 5)


@pytest.mark.parametrize(
    ("classes", "flags", "expected"),
    [
        (["rise", "fall"], [], (False, False)),
        (["rise", "fall"], ["--flip-time"], (True, False)),
        (["mean_shift", "trend_shift"], [], (True, True)),
        (["mean_shift", "trend_shift"], ["--no-flip-value"], (True, False)),
    ],
)
def test_classes_that_a_flip_may_exchange_are_flipped_only_where_that_is_asked_for(classes, flags, expected, capsys):
    settings = config.parse(config.TrainClassifierSettings, "", flags)
    found = training.flipped_as_classes_allow(settings, classes)
    assert (found.flip_time, found.flip_value) == expected
    assert ("plots are not flipped" in capsys.readouterr().err) == ("rise" in classes)


def test_a_run_that_goes_on_flips_as_it_did(trained, tmp_path, capsys):
    data, out = trained
    shutil.copytree(out / "vae_models", tmp_path / "vae_models")
    last = tmp_path / vae_classifier.LAST
    state = torch.load(last, weights_only=True)
    assert not state["settings"]["flip_time"], "the three classes are none of the nine kinds"
    state["settings"]["flip_time"] = True  # as before it was asked whether classes allow it
    torch.save(state, last)
    settings = settings_for(data, tmp_path, resume=True)
    capsys.readouterr()
    found = training.flipped_as_classes_allow(settings, CLASSES)
    assert (found.flip_time, found.flip_value) == (True, False) and not capsys.readouterr().err


def test_the_checkpoint_is_enough_for_inference(trained):
    contents = checkpoints.load_checkpoint(trained[1] / BEST, vae_classifier.KIND)
    assert contents["class_names"] == CLASSES and contents["image_size"] == 64
    assert contents["settings"]["crop_axes"] is True and list(contents["calibration"]["scores"]) == ["real"]
    last = checkpoints.load_training(trained[1] / vae_classifier.LAST, vae_classifier.KIND)
    assert {"optimizer", "scheduler", "random", "averaged"} <= last.keys()


def test_a_resumed_run_equals_an_uninterrupted_one_and_test_labels_change_nothing(trained, tmp_path, monkeypatch):
    data, out = trained
    shutil.copytree(data, tmp_path / "data_set")
    (tmp_path / "data_set" / "test" / "flat").rename(tmp_path / "data_set" / "test" / "other")
    (tmp_path / "data_set" / "test" / "rise").rename(tmp_path / "data_set" / "test" / "flat")
    (tmp_path / "data_set" / "test" / "other").rename(tmp_path / "data_set" / "test" / "rise")
    settings = settings_for(tmp_path / "data_set", tmp_path / "out")
    save_last = training.save_last

    def stop_after_one(run, *rest):
        save_last(run, *rest)
        if run.history:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "save_last", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        training.main(settings)
    monkeypatch.setattr(training, "save_last", save_last)
    training.main(settings.replace(resume=True, precision="float32"))  # as auto is on a CPU
    history = "results/vae_classifier_history.json"
    assert (tmp_path / "out" / history).read_bytes() == (out / history).read_bytes()
    ours, theirs = (
        checkpoints.load_checkpoint(folder / BEST, vae_classifier.KIND) for folder in (tmp_path / "out", out)
    )
    assert all(torch.equal(ours["model"][name], theirs["model"][name]) for name in theirs["model"])
    assert not ours["settings"]["resume"]  # though it was
    assert (
        ours["calibration"]["scores"] == theirs["calibration"]["scores"]
        and ours["calibration"]["temperature"] == theirs["calibration"]["temperature"]
    )
    confusion = [
        json.loads((folder / "results" / "vae_classifier_results.json").read_text())["confusion_matrix"]
        for folder in (tmp_path / "out", out)
    ]
    assert confusion[0] == [confusion[1][2], confusion[1][1], confusion[1][0]]


def test_a_resumed_run_makes_the_pictures_that_an_interrupted_one_did_not(trained, tmp_path, monkeypatch):
    data, out = trained
    settings, name = settings_for(data, tmp_path), "reconstructions"

    def interrupted(run, epoch):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "write_pictures", interrupted)
        training.main(settings)
    training.main(settings.replace(resume=True))
    made = {path.name for path in (out / name).iterdir()}
    assert made and made == {path.name for path in (tmp_path / name).iterdir()}


def test_a_run_goes_on_where_the_data_folder_is_spelled_in_another_way(trained, tmp_path, monkeypatch):
    shutil.copytree(trained[1], tmp_path / "out")
    monkeypatch.chdir(trained[0].parent)
    training.main(settings_for("./data_set/", tmp_path / "out", epochs=3, resume=True))
    assert len(json.loads((tmp_path / "out" / "results" / "vae_classifier_history.json").read_text())["epochs"]) == 3


def test_resuming_with_other_settings_or_from_nothing_is_refused(trained, tmp_path, capsys):
    data, out = trained
    shutil.copytree(out / "vae_models", tmp_path / "vae_models")
    flags = ["--data-dir", data, "--resume", "--validation-frac", 0.25, "--output-dir"]
    assert run_training(*flags, tmp_path, "--image-size", 64) == 1
    assert "was trained with" in one_sentence(capsys)
    assert (tmp_path / "vae_models" / "config.yaml").read_text() == (out / "vae_models" / "config.yaml").read_text()
    assert run_training(*flags, tmp_path / "nowhere", "--image-size", 64) == 1
    assert "no checkpoint at" in one_sentence(capsys)


def swap(one, other):
    contents = one.read_bytes(), other.read_bytes()
    other.write_bytes(contents[0])
    one.write_bytes(contents[1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda train: (train / "flat").rename(train / "even"),
            "class_names ['flat', 'jump', 'rise'], not ['even', 'jump', 'rise']",
        ),
        (lambda train: shutil.copy(train / "flat" / "0.png", train / "flat" / "9.png"), "n_training_files 24, not 25"),
        (lambda train: (train / "flat" / "0.png").rename(train / "flat" / "9.png"), "training_files '"),
        (lambda train: swap(train / "flat" / "0.png", train / "flat" / "1.png"), "training_"),
    ],
    ids=["another class", "another file", "another name", "another order"],
)
def test_resuming_with_other_data_is_refused(trained, tmp_path, change, words):
    shutil.copytree(trained[0], tmp_path / "data_set")
    shutil.rmtree(tmp_path / "data_set" / "test")
    settings = settings_for(tmp_path / "data_set", tmp_path / "out", epochs=1)
    training.main(settings)
    change(tmp_path / "data_set" / "train")
    with pytest.raises(config.InputError, match=f"was trained with {re.escape(words)}.* expected the data of then"):
        training.main(settings.replace(resume=True, epochs=2))


def test_a_diverged_run_says_which_checkpoint_is_kept_where_there_is_one(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(
        training.ClassifierLoss,
        "terms",
        lambda self, model, images, labels: ({"total": torch.tensor(float("nan"))}, torch.zeros(len(labels), 3)),
    )
    with pytest.raises(engine.DivergedError, match=r"became nan; training stops \(try a lower --learning-rate\)\.$"):
        training.main(settings_for(trained[0], tmp_path))
    shutil.copytree(trained[1] / "vae_models", tmp_path / "vae_models", dirs_exist_ok=True)
    with pytest.raises(engine.DivergedError, match=r"best_vae_classifier\.pth of epoch [12] is kept\.$"):
        training.main(settings_for(trained[0], tmp_path, epochs=3, resume=True))


@pytest.mark.parametrize("learning_rate", [1e2, 1e6])
def test_a_run_that_diverges_within_its_last_step_says_so(trained, tmp_path, learning_rate):
    with pytest.raises(engine.DivergedError, match=r"try a lower --learning-rate"):
        training.main(settings_for(trained[0], tmp_path, epochs=1, learning_rate=learning_rate, batch_size=64))
    assert not (tmp_path / BEST).exists()


def test_a_validation_that_is_not_finite_ends_training_and_keeps_what_was_best(trained, tmp_path, monkeypatch):
    save_best = classifier_training.save_best

    def broken_later(run, *rest):
        if len(run.history) > 1:
            raise KeyboardInterrupt
        save_best(run, *rest)

    monkeypatch.setattr(classifier_training, "save_best", broken_later)
    monkeypatch.setattr(training, "validation_score", lambda row: row["epoch"])
    runs, prepare = [], training.prepare
    monkeypatch.setattr(training, "prepare", lambda settings: runs.append(prepare(settings)) or runs[-1])
    with pytest.raises(KeyboardInterrupt):
        training.main(settings_for(trained[0], tmp_path))
    assert (runs[0].best, runs[0].best_epoch) == (1, 1)
    assert checkpoints.load_checkpoint(tmp_path / BEST, vae_classifier.KIND)["epoch"] == 1
    evaluate = engine.evaluate
    monkeypatch.setattr(engine, "evaluate", lambda *rest: {**evaluate(*rest), "total": float("nan")})
    with pytest.raises(
        engine.DivergedError,
        match=r"total of validation became nan; training stops \(try a lower --learning-rate\); "
        r".*best_vae_classifier\.pth is of an earlier run\.$",
    ):
        training.main(settings_for(trained[0], tmp_path))


def test_a_fresh_run_leaves_no_report_of_an_earlier_one_but_its_models(trained, tmp_path, monkeypatch):
    for folder in ("vae_models", "results", "reconstructions"):
        shutil.copytree(trained[1] / folder, tmp_path / folder)
    mine = {"vae_models/mine.pth", "results/mine.json", "reconstructions/mine.png"}
    for name in mine:
        (tmp_path / name).write_text("")

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "validate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        training.main(settings_for(trained[0], tmp_path))
    found = {
        path.relative_to(tmp_path).as_posix()
        for folder in ("vae_models", "results", "reconstructions")
        for path in (tmp_path / folder).iterdir()
    }
    assert found == mine | {
        "vae_models/config.yaml",
        "vae_models/best_vae_classifier.pth",
        "vae_models/last_vae_classifier.pth",
        "results/vae_classifier_history.json",
    }
    assert json.loads((tmp_path / "results" / "vae_classifier_history.json").read_text())["epochs"] == []


def test_no_run_goes_on_with_the_model_of_another(trained, tmp_path, monkeypatch):
    shutil.copytree(trained[1], tmp_path, dirs_exist_ok=True)

    def interrupted(run, epoch):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "write_pictures", interrupted)
        training.main(settings_for(trained[0], tmp_path, learning_rate=0.5))
    with pytest.raises(config.InputError, match=r"was trained with learning_rate 0\.5"):
        training.main(settings_for(trained[0], tmp_path, resume=True))
    shutil.copytree(trained[1], tmp_path, dirs_exist_ok=True)
    contents = torch.load(tmp_path / BEST, weights_only=True)
    torch.save({**contents, "epoch": 0}, tmp_path / BEST)
    with pytest.raises(config.InputError, match=r"holds the model of epoch 0; expected that of epoch \d, the best of"):
        training.main(settings_for(trained[0], tmp_path, resume=True))


def test_the_average_forgets_its_start_and_follows_statistics():
    model, averaged = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    average = training.WeightAverage(model, averaged, 0.5)
    with torch.no_grad():
        model.weight.fill_(3.0)
        model.running_mean.fill_(2.0)
        model.num_batches_tracked.fill_(5)
    average.update()
    # (1+1)/(10+1) of the old
    assert averaged.weight.tolist() == pytest.approx([1 + 2 * 9 / 11] * 2) and averaged.num_batches_tracked == 5
    for _ in range(60):
        average.update()
    assert averaged.running_mean.tolist() == pytest.approx([2.0, 2.0])


# ---------------------------------------------------------------------------------------------- its data


def test_what_is_wrong_with_plots_and_how_far_reading_is_are_told_on_stderr(tmp_path, capsys):
    data = make_data(tmp_path / "data_set")
    broken = [data / part / "flat" / "1.png" for part in ("train", "test")]
    for path in broken:
        path.write_bytes(b"broken")
    training.main(settings_for(data, tmp_path / "out", epochs=1))
    said = capsys.readouterr()
    for words in (
        *(f"warning: {path} is skipped: " for path in broken),
        "The 3 classes of ",
        "training plots: 100%",
        "test plots: 100%",
    ):
        assert words in said.err and words not in said.out, words


def empty_class(data):
    shutil.rmtree(data / "train" / "jump")
    (data / "train" / "jump").mkdir()


def one_class(data):
    for name in ("jump", "rise"):
        shutil.rmtree(data / "train" / name)


def other_test_classes(data):
    (data / "test" / "jump").rename(data / "test" / "leap")


def class_called_error(data):
    (data / "train" / "jump").rename(data / "train" / "error")


def unreadable_class(data):
    for path in (data / "train" / "jump").iterdir():
        path.write_bytes(b"broken")


BAD_DATA = {
    empty_class: "jump holds no image",
    one_class: "holds 1 class folder(s); expected at least two",
    other_test_classes: "has leap, which train does not and lacks jump",
    class_called_error: "error has the name of a column of predictions, or of what cannot be read; expected any but",
    unreadable_class: "jump holds 0 readable plot(s)",
    lambda data: shutil.rmtree(data / "train"): "is no folder",
}


@pytest.mark.parametrize("spoil", BAD_DATA, ids=lambda spoil: spoil.__name__.strip("<>"))
def test_a_bad_data_set_is_refused_in_one_sentence(tmp_path, capsys, spoil):
    data = make_data(tmp_path / "data_set")
    spoil(data)
    assert run_training("--data-dir", data, "--output-dir", tmp_path, "--image-size", 32) == 1
    assert BAD_DATA[spoil] in one_sentence(capsys)


def test_fewer_plots_than_a_batch_and_no_test_set_still_train(tmp_path, capsys):
    data = make_data(tmp_path / "data_set")
    shutil.rmtree(data / "test")
    training.main(settings_for(data, tmp_path / "out", epochs=1, batch_size=64, mixup_alpha=0.2, ema_decay=0.0))
    results = json.loads((tmp_path / "out" / "results" / "vae_classifier_results.json").read_text())
    assert results["scored_on"] == "validation" and "has no readable test plots" in capsys.readouterr().err


def test_too_few_validation_plots_for_the_rate_of_unknown_ones_are_told(trained, tmp_path, capsys):
    training.main(settings_for(trained[0], tmp_path, epochs=1))
    assert "6 validation plots are too few to call a plot none of these at 5.0% false alarms" in capsys.readouterr().out
    training.main(settings_for(trained[0], tmp_path, epochs=1, target_false_alarms=1 / 7))
    assert "too few" not in capsys.readouterr().out


def test_without_data_the_demo_and_its_preset_are_used(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plot_loader, "make_demo", lambda root, progress: root)
    settings = training.use_demo(config.TrainClassifierSettings(output_dir="out", epochs=3))
    preset = config.read_yaml(str(ROOT / "configs" / "classifier_demo.yaml"))
    assert (
        settings.epochs == 3
        and settings.image_size == preset["image_size"]
        and settings.data_dir == str(Path("out/data/demo_series"))
    )
    assert "built-in demo" in capsys.readouterr().err
    (tmp_path / "data" / "train" / "good").mkdir(parents=True)  # a folder of DetailVAE's
    (tmp_path / "data" / "train" / ".ipynb_checkpoints").mkdir()
    assert training.use_demo(config.TrainClassifierSettings()).data_dir != "data"
    (tmp_path / "data" / "train" / "flat").mkdir()
    assert training.use_demo(config.TrainClassifierSettings()) == config.TrainClassifierSettings(data_dir="data")


# --------------------------------------------------------------------------------------------- inference


@pytest.mark.parametrize("n_files", [2, 21])
def test_remarks_on_many_files_are_told_of_once(trained, tmp_path, capsys, n_files):
    for i in range(n_files):
        path = tmp_path / "series" / f"{i}.csv"
        path.parent.mkdir(exist_ok=True)
        path.write_text("value\n1\nnan\n3\n2\n")
    assert run_inference(path.parent, "--model", trained[1] / BEST, "--output-dir", tmp_path, "--no-pictures") == 0
    said = capsys.readouterr()
    assert said.err.count("1 of 4 rows hold no number") == (2 if n_files == 2 else 0)
    assert ("warning: remarks on 21 files are in " in said.err) == (n_files == 21)
    assert said.out.startswith(f"model: {trained[1] / BEST}\n")
    assert len(read_rows(tmp_path / "results" / "vae_classifier_predictions" / "remarks.csv")) == n_files


def test_images_folders_and_csvs_in_one_table(trained, tmp_path, capsys):
    data, out = trained
    good_csv, bad_csv, empty = (
        series_csv(tmp_path / "a.csv", 'data\n0.5\n""\nnan\n-1\n2\n'),
        series_csv(tmp_path / "b.csv", "data\n1\n1\n1\n"),
        series_csv(tmp_path / "c.csv", ""),
    )
    (tmp_path / "broken.png").write_bytes(b"no image")
    noise = tmp_path / "noise.png"
    noise.write_bytes(
        cv2.imencode(".png", np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8))[1].tobytes()
    )
    inputs = [data / "test" / "rise", good_csv, bad_csv, tmp_path / "broken.png", empty, noise]
    assert (
        run_inference(
            *inputs,
            "--model",
            out / BEST,
            "--output-dir",
            tmp_path,
            "--max-pictures",
            2,
            "--batch-size",
            2,
        )
        == 0
    )
    folder = tmp_path / "results" / "vae_classifier_predictions"
    rows = read_rows(folder / "predictions.csv")
    assert list(rows[0]) == ["path", "predicted", "confidence", "p_value", *CLASSES]
    assert [Path(row["path"]).name for row in rows] == [
        "0.png",
        "1.png",
        "2.png",
        "a.csv",
        "b.csv",
        "broken.png",
        "c.csv",
        "noise.png",
    ]
    assert [row["predicted"] == "error" for row in rows] == [False] * 4 + [True] * 3 + [False]
    remarks = {Path(row["path"]).name: row["remark"] for row in read_rows(folder / "remarks.csv")}
    assert remarks.keys() == {"a.csv", "b.csv", "broken.png", "c.csv"} and rows[4]["flat"] == ""
    assert remarks["a.csv"] == "2 of 5 rows hold no number" and remarks["broken.png"]
    assert "constant" in remarks["b.csv"] and "is empty" in remarks["c.csv"]
    for row in (rows[0], rows[3]):
        shares = {name: float(row[name]) for name in CLASSES}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-4) and row["predicted"] == max(shares, key=shares.get)
        assert (
            float(row["confidence"]) == pytest.approx(max(shares.values()), abs=1e-6) and 0 < float(row["p_value"]) <= 1
        )
    assert [path.name for path in sorted(folder.glob("*.png"))] == ["00001_0.png", "00002_1.png"]
    said = capsys.readouterr()
    assert "8 files, 3 unreadable" in said.out and "plots/s" in said.out and f"{noise}: " in said.out
    assert "a.csv: 2 of 5 rows hold no number." in said.err and "b.csv" in said.err and "Traceback" not in said.err


def test_where_no_plot_can_be_read_the_table_says_why_and_inference_fails(trained, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert (
        run_inference(
            tmp_path / "broken.png",
            "--model",
            trained[1] / BEST,
            "--output-dir",
            tmp_path,
            "--encode",
        )
        == 1
    )
    assert "error: No file can be read; the last, " in capsys.readouterr().err
    out = tmp_path / "results" / "vae_classifier_predictions"
    (row,), (remark,) = read_rows(out / "predictions.csv"), read_rows(out / "remarks.csv")
    assert row["predicted"] == "error" and remark["path"] == row["path"] and remark["remark"]


def test_many_files_get_a_summary_and_no_pictures_means_none(trained, tmp_path, capsys):
    data, out = trained
    assert run_inference(data / "train", "--model", out / BEST, "--output-dir", tmp_path, "--no-pictures") == 0
    said = capsys.readouterr().out
    assert f"{3 * N_TRAIN} files, 0 unreadable" in said and "0.png" not in said
    counted = {line.split()[0]: int(line.split()[1]) for line in said.splitlines() if line.split()[0] in CLASSES}
    assert sum(counted.values()) == 3 * N_TRAIN
    assert not list((tmp_path / "results" / "vae_classifier_predictions").glob("*.png"))


def test_the_longest_file_names_cost_nothing(trained, tmp_path):
    data, out = trained
    plot = (data / "test" / "flat" / "0.png").read_bytes()
    (tmp_path / "plots").mkdir()
    for name in ("l" * 251, "l" * 250 + "m", "ä" * 125):
        (tmp_path / "plots" / f"{name}.png").write_bytes(plot)
    assert run_inference(tmp_path / "plots", "--model", out / BEST, "--output-dir", tmp_path) == 0
    folder = tmp_path / "results" / "vae_classifier_predictions"
    assert len(read_rows(folder / "predictions.csv")) == len(list(folder.glob("*.png"))) == 3
    series_csv(tmp_path / "csvs" / f"{'l' * 251}.csv")
    assert plot_loader.render_folder(tmp_path / "csvs", tmp_path / "drawn", 0)["rendered"] == 1
    model, names = inference.load_vae_classifier(out / BEST)
    inference.predict_from_csv(tmp_path / "csvs" / f"{'l' * 251}.csv", model, names, output_dir=tmp_path / "drawn")
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 2


@pytest.mark.drawn
def test_pictures_of_an_earlier_run_are_removed_unless_they_are_given(trained, tmp_path):
    data, out = trained
    folder, flags = (
        tmp_path / "results" / "vae_classifier_predictions",
        ["--model", out / BEST, "--output-dir", tmp_path],
    )
    assert run_inference(data / "test", *flags) == 0
    shutil.copy(folder / "00001_0.png", folder / "mine.png")
    assert run_inference(data / "test" / "jump" / "2.png", *flags) == 0
    assert {path.name for path in folder.glob("*.png")} == {"00001_2.png", "mine.png"}
    assert run_inference(folder / "00001_2.png", *flags) == 0
    assert {path.name for path in folder.glob("*.png")} == {"00001_2.png", "00001_00001_2.png", "mine.png"}


def test_pictures_of_an_earlier_run_are_no_plots(trained, model, tmp_path, monkeypatch):
    data, out = trained
    for name in ("plots", "more"):
        shutil.copytree(data / "test" / "flat", tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert len(inference.batch_predict("plots", model, CLASSES, output_dir="plots/found")) == N_TEST
        assert run_inference("more", "more/*", "--model", out / BEST, "--output-dir", "more", "--scatter", "pca") == 0
        assert len(read_rows(Path("more/results/vae_classifier_predictions/predictions.csv"))) == N_TEST
    assert len(inference.batch_predict("plots/found", model, CLASSES)) == N_TEST + 2  # asked for, with the tables


def test_what_is_flagged_is_said_to_be_none_of_these(model):
    calibration = model.calibration
    calibration.alpha = 0.2
    known, strange = (
        inference.Predicted(Path("x.png"), {"flat": 0.9, "rise": 0.07, "jump": 0.03}, p) for p in (0.3, 0.2)
    )
    assert inference.top_three(known, model) == "x.png: flat 90.0%, rise 7.0%, jump 3.0% (p = 0.30)"
    assert (
        inference.top_three(strange, model)
        == "x.png: none of these (p = 0.200; nearest: flat 90.0%, rise 7.0%, jump 3.0%)"
    )
    assert inference.row(strange, CLASSES)[1] == "flat"


@pytest.mark.drawn
def test_the_four_functions_for_notebooks(trained, model, tmp_path, monkeypatch):
    data, out = trained
    monkeypatch.chdir(tmp_path)
    loaded, class_names = inference.load_vae_classifier(str(out / BEST), torch.device("cpu"))
    path = data / "test" / "jump" / "0.png"
    predicted, probs, reconstruction = inference.predict_single_image(
        image_path=str(path),
        model=loaded,
        class_names=class_names,
        device=torch.device("cpu"),
        save_visualization="result.png",
    )
    assert (
        predicted == next(iter(probs))
        and list(probs.values()) == sorted(probs.values(), reverse=True)
        and set(probs) == set(CLASSES)
    )
    assert reconstruction.shape == (3, 32, 32) and Path("result.png").stat().st_size > 1000
    results = inference.batch_predict(
        image_dir=data / "test", model=loaded, class_names=class_names, device="cpu", output_dir="batch"
    )
    assert (
        len(results) == 3 * N_TEST and ("jump/0.png", predicted, pytest.approx(probs[predicted], abs=1e-5)) in results
    )
    assert (
        len(read_rows(Path("batch/predictions.csv"))) == 3 * N_TEST
        and len(list(Path("batch").glob("*.png"))) == 3 * N_TEST
    )
    named, shares = inference.predict_from_csv(
        csv_path=series_csv(tmp_path / "s.csv"), model=loaded, class_names=class_names, device="cpu", save_plot=True
    )
    drawn = Path("results/vae_classifier_predictions/s_plot.png")
    assert inference.predict_single_image(drawn, loaded, class_names)[0] == named == next(iter(shares))
    with pytest.raises(config.InputError, match=r"bad\.csv holds a header and no rows"):
        inference.predict_from_csv(series_csv(tmp_path / "bad.csv", "data\n"), loaded, class_names, "cpu")
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "x.png").write_bytes(b"broken")
    for same in ("mixed", tmp_path / "mixed"):
        with pytest.raises(config.InputError, match="mixed, the folder of the plots; expected another"):
            inference.batch_predict(tmp_path / "mixed", loaded, class_names, "cpu", same)
    assert inference.batch_predict(tmp_path / "mixed", loaded, class_names, "cpu") == [("x.png", "error", 0.0)]


def test_a_model_and_its_class_names_belong_together(trained, model, tmp_path):
    new, plot = (
        vae_classifier.VAEClassifier(
            config.ClassifierModelSettings(**{key: TINY[key] for key in TINY if key != "image_size"}), 3
        ),
        trained[0] / "test" / "flat" / "0.png",
    )
    for call, path in (
        (inference.predict_single_image, plot),
        (inference.predict_from_csv, series_csv(tmp_path / "s.csv")),
    ):
        with pytest.raises(
            config.InputError, match=r"^2 class names for a model of 3 classes; expected flat, jump, rise\.$"
        ):
            call(path, model, CLASSES[:2])
        with pytest.raises(
            config.InputError, match=r"^The model comes from no file; expected one that load_vae_classifier returns\.$"
        ):
            call(path, new, CLASSES)


def test_readmes_lines_run(trained, tmp_path, run_readme_code):
    (tmp_path / "vae_models").mkdir()
    shutil.copy(trained[1] / BEST, tmp_path / "vae_models" / "best_vae_classifier.pth")
    shutil.copy(trained[0] / "test" / "flat" / "0.png", tmp_path / "one.png")
    series_csv(tmp_path / "series.csv")
    names = run_readme_code("load_vae_classifier")
    assert (
        set(names["probs"]) == set(CLASSES) and names["predicted"] in CLASSES and names["reconstruction"].shape[0] == 3
    )
    assert (tmp_path / "result.png").is_file() and (
        tmp_path / "results" / "vae_classifier_predictions" / "series_plot.png"
    ).is_file()


@pytest.mark.drawn
def test_the_notebook_of_the_classifier_runs(trained, tmp_path, run_notebook, capsys):
    data, out = trained
    shutil.copytree(out / "vae_models", tmp_path / "vae_models")
    shutil.copytree(data / "test", tmp_path / "data" / "demo_series" / "test")
    names = run_notebook("vae_classifier")
    assert names["confusion"].sum() == len(names["points"]) == 3 * N_TEST
    assert set(names["probs"]) == set(CLASSES) and "'value': " in capsys.readouterr().out


def test_the_callers_own_class_names_are_those_of_the_table(trained, model, tmp_path):
    results = inference.batch_predict(trained[0] / "test", model, ["eben", "Sprung", "Anstieg"], output_dir=tmp_path)
    rows = read_rows(tmp_path / "predictions.csv")
    assert [row["predicted"] for row in rows] == [name for _, name, _ in results] and set(rows[0]) == {
        "path",
        "predicted",
        "confidence",
        "p_value",
        "eben",
        "Sprung",
        "Anstieg",
    }


def test_a_file_is_no_folder_for_predictions(trained, model, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(config.InputError, match=r"out cannot be made \("):
        inference.batch_predict(trained[0] / "test", model, CLASSES, output_dir=tmp_path / "out")


def test_model_and_images_meet_on_the_device_asked_for_or_the_models_own(trained, tmp_path, monkeypatch):
    class Judged(Exception):
        pass

    def judge(model, images, flips_below):
        assert images.device == next(model.parameters()).device
        raise Judged(images.device.type)

    monkeypatch.setattr(vae_classifier, "judge", judge)
    monkeypatch.setattr(engine, "resolve_device", torch.device)
    for call, path in (
        (inference.predict_single_image, trained[0] / "test" / "flat" / "0.png"),
        (inference.batch_predict, trained[0] / "test"),
        (inference.predict_from_csv, series_csv(tmp_path / "s.csv")),
    ):
        model = inference.load_vae_classifier(trained[1] / BEST)[0]
        for asked, expected in ((None, "cpu"), ("meta", "meta"), (None, "meta")):
            with pytest.raises(Judged, match=expected):
                call(path, model, CLASSES, asked)


def test_a_series_is_read_as_csv_whatever_its_ending(trained, model, tmp_path):
    said = [
        inference.predict_from_csv(series_csv(tmp_path / name), model, CLASSES, output_dir=tmp_path)
        for name in ("series.csv", "series.txt")
    ]
    assert said[0] == said[1] and (tmp_path / "series_plot.png").stat().st_size > 1000
    with pytest.raises(config.InputError, match=r"0\.png is not a text file; expected a CSV\.$"):
        inference.predict_from_csv(trained[0] / "test" / "flat" / "0.png", model, CLASSES, output_dir=tmp_path)


def test_a_prediction_does_not_depend_on_the_batch_or_its_neighbours(trained, model):
    paths = sorted((trained[0] / "test").glob("*/*.png"))
    singly, together = (
        [
            (each.path, each.p_value, each.probabilities)
            for each in inference.predict(paths, model, CLASSES, batch_size=n)
        ]
        for n in (1, 4)
    )
    for one, other in zip(singly, together, strict=True):
        assert one[0] == other[0] and one[1] == other[1] and one[2] == pytest.approx(other[2], abs=1e-5)


def test_results_keep_the_order_of_paths_also_where_one_comes_twice(trained, model, tmp_path):
    first, second = (trained[0] / "test" / "flat" / name for name in ("0.png", "1.png"))
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    paths = [first, broken, second, first, broken]
    assert [each.path for each in inference.predict(paths, model, CLASSES)] == paths


def test_clusters_are_compared_with_the_folders_of_plots_alone(model):
    kept = [inference.Predicted(Path(folder) / f"{number}.png") for folder in CLASSES[:2] for number in range(3)]
    clusters, apart = (
        np.array([1, 1, 1, 0, 0, 0]),
        [each._replace(path=Path("unknown") / each.path.name) for each in kept],
    )
    assert latent_space.agreement([inference.folder_class(each, model) for each in kept], clusters) == (
        {"adjusted_rand_index": 1.0, "n_plots": 6}
    )
    assert latent_space.agreement([inference.folder_class(each, model) for each in apart], clusters) == {}


@pytest.mark.drawn
def test_latent_table_scatter_generation_and_interpolation(trained, tmp_path, capsys):
    data, out = trained
    flags = ["--model", out / BEST, "--output-dir", tmp_path, "--no-pictures"]
    assert run_inference(data / "test", *flags, "--encode", "--scatter", "pca") == 0
    rows = read_rows(tmp_path / "results" / "latent" / "latent.csv")
    assert len(rows) == 3 * N_TEST and list(rows[0]) == ["path", "predicted", *(f"mu_{i}" for i in range(4))]
    capsys.readouterr()
    assert run_inference(data / "test", *flags, "--clusters", 3, "--scatter", "pca") == 0
    assert "3 clusters: adjusted Rand index" in capsys.readouterr().out
    told = json.loads((tmp_path / "results" / "latent" / "clusters.json").read_text())
    assert (told["n_clusters"], told["n_plots"]) == (3, len(rows)) and -1 <= told["adjusted_rand_index"] <= 1
    rows = read_rows(tmp_path / "results" / "latent" / "latent.csv")
    assert list(rows[0])[:4] == ["path", "predicted", "cluster", "mu_0"] and {row["cluster"] for row in rows} == {
        "0",
        "1",
        "2",
    }
    assert run_inference("--generate", "rise", "--n-pictured", 4, *flags) == 0
    assert (
        run_inference(
            data / "test" / "flat" / "0.png",
            data / "test" / "rise" / "0.png",
            "--interpolate",
            "--n-pictured",
            5,
            *flags,
        )
        == 0
    )
    shapes = {path.name: cv2.imread(str(path)).shape[:2] for path in (tmp_path / "results" / "latent").glob("*.png")}
    assert (
        shapes["generated_rise.png"] == (40, 160)
        and shapes["interpolation.png"] == (40, 200)
        and {"scatter_pca.png", "clusters_pca.png"} <= set(shapes)
    )
    capsys.readouterr()
    assert run_inference("--generate", "seasonal", *flags) == 1
    assert "no class 'seasonal'; expected one of flat, jump, rise" in one_sentence(capsys)


def test_a_plot_that_cannot_be_read_costs_the_clusters_but_not_the_latent_table(trained, tmp_path, capsys):
    shutil.copytree(trained[0] / "test" / "flat", tmp_path / "plots")
    (tmp_path / "plots" / "broken.png").write_bytes(b"no image")
    assert (
        run_inference(
            tmp_path / "plots",
            "--encode",
            "--clusters",
            N_TEST + 1,
            "--model",
            trained[1] / BEST,
            "--output-dir",
            tmp_path,
            "--no-pictures",
        )
        == 1
    )
    assert "clusters" in one_sentence(capsys)
    assert len(read_rows(tmp_path / "results" / "latent" / "latent.csv")) == N_TEST


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        ([], 2, "No plots given"),
        (["{data}/nowhere.png"], 1, "nowhere.png does not exist"),
        (["{data}/test", "--interpolate"], 2, "--interpolate takes exactly two plots; got 9"),
        (["{data}/test", "--model", "{data}/none.pth"], 1, "no checkpoint at"),
        (["{data}/test", "--model", "{detail}"], 1, "holds a 'detail_vae'; expected a 'vae_classifier'"),
        (["{data}/test", "--clusters", "40"], 2, "9 plots cannot make 40 clusters"),
        (["{data}/test", "--scater", "pca"], 2, "did you mean '--scatter'?"),
    ],
)
def test_wrong_usage_is_answered_in_one_sentence(trained, tmp_path, capsys, argv, code, words):
    data, out = trained
    checkpoints.save_checkpoint(tmp_path / "detail.pth", "detail_vae", {"model": {}})
    given = [each.format(data=data, detail=tmp_path / "detail.pth") for each in argv]
    assert run_inference("--model", out / BEST, *given, "--output-dir", tmp_path) == code
    assert words in one_sentence(capsys)


@pytest.mark.parametrize("stage", ["train_vae_classifier.py", "inference_vae_classifier.py"])
def test_help_needs_no_heavy_imports(stage):
    code = (
        f"import sys, runpy; sys.argv = ['{stage}', '--help']\n"
        f"try: runpy.run_path('{ROOT / stage}', run_name='__main__')\n"
        "finally: print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0 and found.stdout.rstrip().endswith("False False") and "--batch-size" in found.stdout
