"""The classifier's data: what is real, what is generated, how both are mixed, and what is said of them."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from test_classifier_stages import CLASSES, N_TRAIN, make_data, settings_for

import classifier_data
import config
import image_files
import series_generator
import series_plots
import streams


def quiet(title):
    return lambda items, total: items


def test_every_real_plot_is_shown_once_an_epoch_and_generated_ones_in_turn():
    sampler = classifier_data.MixedSampler(6, 10, 0.6, 0, seed=3)
    seen = []
    for epoch in (1, 2, 3):
        sampler.set_epoch(epoch)
        keys = list(sampler)
        assert len(keys) == len(sampler) == 10
        assert sorted(key % 16 for key in keys if key % 16 < 6) == list(range(6))
        assert {key // 16 for key in keys if key % 16 < 6} == {epoch - 1}
        seen += [key for key in keys if key % 16 >= 6]
    assert sorted(key % 16 for key in seen) == sorted([*range(6, 16), *[key % 16 for key in seen if key >= 16]])
    assert len(set(seen)) == 12
    again = classifier_data.MixedSampler(6, 10, 0.6, 0, seed=3)
    again.set_epoch(3)
    assert list(again) == keys


@pytest.mark.parametrize(
    ("n_generated", "share", "samples", "expected"),
    [(0, 0.5, 0, (6, 0)), (10, 1.0, 0, (6, 0)), (10, 0.25, 40, (10, 30)), (10, 0.5, 3, (2, 1))],
)
def test_shares_hold_for_any_number_of_samples(n_generated, share, samples, expected):
    keys = list(classifier_data.MixedSampler(6, n_generated, share, samples, seed=0))
    n_real = sum(key % (6 + n_generated) < 6 for key in keys)
    assert (n_real, len(keys) - n_real) == expected and len(set(keys)) == len(keys)


def fake_plots(job):
    return np.full((job[3], job[3], 3), 10 * job[2][2] + job[2][3], np.uint8)


def test_generated_plots_are_made_once_and_fresh_ones_differ(tmp_path, monkeypatch):
    calls, shown, said = [], [], []

    def bar(title):
        return lambda items, total: shown.append((title, total)) or items

    def serial(work, jobs, num_workers):
        calls.append(jobs)
        return map(work, jobs)

    monkeypatch.setattr(streams, "in_processes", serial)
    monkeypatch.setattr(classifier_data, "draw_generated", fake_plots)
    settings = config.TrainClassifierSettings(image_size=32, generated_home=2, generated_present=1, fresh_per_class=1)
    mixed_in, fresh = classifier_data.make_generated(settings, list(series_generator.KINDS), tmp_path, bar, said.append)
    assert [len(each.labels) for each in mixed_in] == [18, 9] and len(fresh.labels) == 9
    assert mixed_in[0].labels.tolist() == sorted([*range(9)] * 2)
    assert (mixed_in[0].images[:, 0, 0, 0] // 10 == mixed_in[0].labels).all()
    assert shown == [("home series", 18), ("present series", 9), ("present series", 9)] and not said
    assert [{job[1] for job in jobs} for jobs in calls] == [{"home"}, {"present"}, {"present"}]
    assert not {job[2] for job in calls[1]} & {job[2] for job in calls[2]}
    again, _ = classifier_data.make_generated(settings, list(series_generator.KINDS), tmp_path, bar, said.append)
    assert len(calls) == 3 and (again[0].images == mixed_in[0].images).all()
    next(tmp_path.glob("generated_home*")).write_bytes(b"damaged")
    classifier_data.make_generated(settings, list(series_generator.KINDS), tmp_path, bar, said.append)
    classifier_data.make_generated(
        settings.replace(seed=1, generated_home=0, generated_present=0),
        list(series_generator.KINDS),
        tmp_path,
        bar,
        said.append,
    )
    assert len(calls) == 5 and calls[4][0][2] != calls[2][0][2]


def test_plots_that_are_cropped_are_kept_beside_whole_ones(tmp_path, monkeypatch):
    made = []

    def serial(work, jobs, num_workers):
        made.append(jobs[0][-1])
        return map(work, jobs)

    monkeypatch.setattr(streams, "in_processes", serial)
    monkeypatch.setattr(classifier_data, "draw_generated", lambda job: np.full((32, 32, 3), job[-1], np.uint8))
    for crop_axes in (False, True, False):
        settings = config.TrainClassifierSettings(image_size=32, crop_axes=crop_axes)
        classifier_data.generated_plots(settings, "home", 1, 1, tmp_path, quiet(""))
    assert made == [False, True]


@pytest.mark.parametrize("changed", [(series_plots, "render_series"), (image_files, "fit_image")])
def test_generated_plots_that_would_look_otherwise_today_are_made_anew(tmp_path, monkeypatch, changed):
    monkeypatch.setattr(streams, "in_processes", lambda work, jobs, num_workers: map(work, jobs))
    settings = config.TrainClassifierSettings(image_size=32)

    def made():
        return classifier_data.generated_plots(settings, "present", 1, 2, tmp_path, quiet("")).images

    before, (module, name) = made(), changed
    real = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *given: 255 - real(*given))
    assert (made() != before).any() and len(list(tmp_path.iterdir())) == 1


def test_a_generated_series_becomes_a_plot_of_the_networks_size():
    plot = classifier_data.draw_generated(("mean_shift", "home", (0, 1, 3, 0), 64, True))
    assert plot.shape == (64, 64, 3) and plot.dtype == np.uint8 and 5 < (plot.min(2) < 200).sum() < 4000
    assert (plot == classifier_data.draw_generated(("mean_shift", "home", (0, 1, 3, 0), 64, True))).all()


def test_other_classes_get_no_generated_plots_and_it_is_said(tmp_path):
    said = []
    mixed_in, fresh = classifier_data.make_generated(
        config.TrainClassifierSettings(data_dir="x"), CLASSES, tmp_path, quiet, said.append
    )
    assert not mixed_in and not len(fresh.labels)
    assert said == ["The 3 classes of x are not the nine kinds that betise makes: no generated plots are mixed in."]


def test_a_broken_plot_is_skipped_and_named(tmp_path):
    data, said = make_data(tmp_path), []
    (data / "train" / "flat" / "1.png").write_bytes(b"broken")
    read = classifier_data.read_data(settings_for(data, tmp_path / "out"), quiet, said.append)
    assert len(read.training.labels) + len(read.validation["real"].labels) == 3 * N_TRAIN - 1
    assert any("1.png is skipped: " in sentence for sentence in said)


def test_a_class_of_one_readable_plot_is_refused(tmp_path):
    data = make_data(tmp_path)
    for i in range(1, N_TRAIN):
        (data / "train" / "flat" / f"{i}.png").write_bytes(b"broken")
    with pytest.raises(config.InputError, match=r"flat holds 1 readable plot\(s\); expected at least two"):
        classifier_data.read_data(settings_for(data, tmp_path / "out"), quiet, lambda sentence: None)


def test_test_plots_among_the_training_plots_are_told(tmp_path):
    data, said = make_data(tmp_path), []
    classifier_data.read_data(settings_for(data, tmp_path / "out"), quiet, said.append)
    assert not any("test plots" in sentence for sentence in said)
    shutil.copy(data / "train" / "rise" / "0.png", data / "test" / "rise" / "9.png")
    classifier_data.read_data(settings_for(data, tmp_path / "out"), quiet, said.append)
    assert any("warning: 1 of 10 test plots also lie in the training set" in sentence for sentence in said)
