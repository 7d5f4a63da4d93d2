"""One training as it stands: what its calibration comes from, and what is said of odd held-out images."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import torch
from conftest import picture, save
from test_stages import TINY, make_data

import config
import conformal
import defect_maps
import detail_training
import engine
import train_with_validation


def test_a_finished_model_learns_deviations_from_every_reference_image(tmp_path, tiny_backbone, monkeypatch):
    values = {**TINY, "backbone": "efficientnet_lite0", "batch_size": 1}
    values |= {"data_dir": str(make_data(tmp_path / "data")), "output_dir": str(tmp_path)}
    run = train_with_validation.prepare(config.from_dict(config.TrainSettings, values))
    shown, fit = [], run.model.fit_deviations
    monkeypatch.setattr(run.model, "fit_deviations", lambda batches, n: shown.append(n) or fit(batches, n))
    monkeypatch.setattr(detail_training, "drawn_held_out", lambda run, detector: ())
    for run.finished in (False, True):
        run.calibrated = None
        detail_training.calibrated_detector(run)
    n = sum(map(len, run.reference))
    assert shown == [-(-n // detail_training.INTERIM_STEP), n] and n > detail_training.INTERIM_STEP


def said_of(folder, scores):
    """The sentences on a held-out image of a score of 9 beside those scores, and the calibration on all."""
    calibration = defect_maps.Calibration.of({}, scores, np.arange(9.0), 0.05, 0.0)
    settings = config.TrainSettings(image_size=64, resize="stretch")
    run = SimpleNamespace(
        held_paths=[save(folder / "a.png", picture())], settings=settings, runtime=engine.Runtime(torch.device("cpu"))
    )
    found = [defect_maps.Detection(9.0, 0.0, "defective")]
    detector = SimpleNamespace(calibration=calibration, detect=lambda images, thorough: found)
    return detail_training.odd_images(run, detector), calibration


def test_one_odd_image_does_not_set_the_threshold_and_it_is_said(tmp_path):
    (sentence,), calibration = said_of(tmp_path, [*np.linspace(1, 1.1, 19), 9.0])
    assert sentence.endswith("it does not set the threshold.") and calibration.threshold < 9


def test_the_rate_advised_sets_the_threshold_without_odd_images(tmp_path):
    scores = [*np.linspace(1, 1.1, 18), 9.0, 9.0]
    (sentence,), calibration = said_of(tmp_path, scores)
    rate = float(re.search(r"--target-false-alarms ([\d.]+)", sentence)[1])
    assert calibration.at(rate).threshold < conformal.outer_fence(scores) < calibration.threshold


def test_without_odd_images_nothing_is_said(tmp_path):
    assert said_of(tmp_path, np.linspace(1, 1.1, 20))[0] == []
