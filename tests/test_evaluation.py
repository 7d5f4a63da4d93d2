"""The numbers, against scikit-image, scikit-learn, scipy and brute force."""

import json
import time

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import trapezoid
from skimage.measure import label as connected
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity
from sklearn import metrics

import evaluation
from config import InputError


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    images = rng.random((2, 3, 37, 52))
    noisy = np.clip(images + 0.2 * rng.standard_normal(images.shape), 0, 1)
    return torch.from_numpy(noisy), torch.from_numpy(images)


def rare_maps(n_images=12, side=128, seed=1):
    """Smooth-ish maps; a third carry defects on 0.05 % of all pixels or fewer, two blobs each."""
    rng = np.random.default_rng(seed)
    maps = rng.gamma(2.0, 1.0, (n_images, side, side)).astype(np.float32)
    masks = np.zeros((n_images, side, side), np.uint8)
    for i in range(0, n_images, 3):
        masks[i, 10:13, 20:24] = masks[i, 60 + i : 62 + i, 70:76] = 255
        maps[i][masks[i] > 0] += rng.normal(4.0 + 0.6 * i, 2.5, 24)
    return list(maps), list(masks)


# ------------------------------------------------------------------------------ reconstruction


def test_mse_mae_psnr_agree_with_scikit_image(pair):
    x, y = pair
    for i in range(2):
        assert evaluation.mse(x, y)[i].item() == pytest.approx(mean_squared_error(x[i].numpy(), y[i].numpy()))
        assert evaluation.mae(x, y)[i].item() == pytest.approx(np.abs(x[i].numpy() - y[i].numpy()).mean())
        expected = peak_signal_noise_ratio(y[i].numpy(), x[i].numpy(), data_range=1)
        assert evaluation.psnr(x, y, data_range=1.0)[i].item() == pytest.approx(expected)


@pytest.mark.parametrize("scale", [1.0, 255.0])
def test_ssim_agrees_with_scikit_image_borders_included(pair, scale):
    x, y = (part * scale for part in pair)
    maps, means = evaluation.ssim_map(x, y, data_range=scale), evaluation.ssim(x, y, data_range=scale)
    for i in range(2):
        mean, full = structural_similarity(
            x[i].numpy(),
            y[i].numpy(),
            channel_axis=0,
            full=True,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=scale,
        )
        assert means[i].item() == pytest.approx(mean, abs=1e-9)
        np.testing.assert_allclose(maps[i, 0], full.mean(0), atol=1e-9)


def test_ssim_in_float32_is_near_and_ignores_autocast(pair):
    x, y = pair
    with torch.autocast("cpu", dtype=torch.bfloat16):
        single = evaluation.ssim(x.float(), y.float(), data_range=1.0)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), evaluation.ssim(x, y, data_range=1.0), atol=1e-4, rtol=0)


def test_gradients_of_the_reconstruction_figures():
    x = torch.rand(1, 1, 11, 12, dtype=torch.float64, requires_grad=True)
    y = torch.rand(1, 1, 11, 12, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a: evaluation.ssim_map(a, y, data_range=1.0), x)
    assert torch.autograd.gradcheck(lambda a: evaluation.psnr(a, y, data_range=1.0), x)


def test_equal_images_and_wrong_shapes(pair):
    _, y = pair
    torch.testing.assert_close(evaluation.ssim(y, y, data_range=1.0), torch.ones(2, dtype=torch.float64))
    assert torch.isinf(evaluation.psnr(y, y, data_range=1.0)).all()
    for function in (evaluation.mse, evaluation.mae):
        with pytest.raises(ValueError, match="reconstruction is"):
            function(y[:1], y)
    with pytest.raises(ValueError, match="11 px"):
        evaluation.ssim_map(y[..., :8], y[..., :8], data_range=1.0)
    with pytest.raises(TypeError, match="data_range"):
        evaluation.psnr(y, y)


# ------------------------------------------------------------------------------ intervals


def test_bootstrap_interval_of_a_mean_is_near_the_normal_one():
    values = np.random.default_rng(3).normal(5.0, 2.0, 200)
    low, high = evaluation.bootstrap_interval(lambda index: values[index].mean(), 200, 4000, seed=0)
    expected = stats.norm.interval(0.95, values.mean(), values.std() / np.sqrt(200))
    assert (low, high) == pytest.approx(expected, abs=0.03)
    assert evaluation.bootstrap_interval(lambda index: values[index].mean(), 200, 0, seed=0) is None
    assert evaluation.bootstrap_interval(lambda index: None, 200, 10, seed=0) is None
    assert evaluation.bootstrap_interval(lambda index: values[index].mean(), 1, 10, seed=0) is None


def test_each_resample_keeps_the_size_of_every_stratum():
    strata = np.array([True] + [False] * 9)
    draws = evaluation.resample_indices(10, 200, seed=0, strata=strata)
    assert draws.shape == (200, 10) and (strata[draws].sum(1) == 1).all()
    assert len(np.unique(draws)) == 10 and len(np.unique(np.sort(draws, 1), axis=0)) > 100
    np.testing.assert_array_equal(draws, evaluation.resample_indices(10, 200, seed=0, strata=strata))


def test_each_draw_of_a_report_has_as_many_defective_images_as_the_test():
    weights = evaluation._resample_weights(np.array([True] + 5 * [False]), 50, seed=0)
    assert (weights[:, 0] == 1).all() and (weights[:, 1:].sum(1) == 5).all()


@pytest.mark.parametrize(("successes", "n"), [(0, 30), (3, 30), (30, 30), (17, 41)])
def test_wilson_interval_agrees_with_scipy(successes, n):
    expected = stats.binomtest(successes, n).proportion_ci(method="wilson")
    assert evaluation.wilson_interval(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert evaluation.wilson_interval(0, 0) is None


def test_summarise_leaves_infinite_values_out():
    found = evaluation.summarise([1.0, 3.0, float("inf")], 500, seed=0)
    assert found == {"value": 2.0, "ci95": [1.0, 3.0]}
    assert evaluation.summarise([], 500, seed=0) is None
    assert evaluation.summarise([2.0], 0, seed=0) == {"value": 2.0}


# ------------------------------------------------------------------------------ image detection


def test_image_figures_agree_with_scikit_learn():
    rng = np.random.default_rng(5)
    labels = rng.random(80) < 0.4
    scores = np.round(rng.normal(labels * 1.0, 1.0), 1)  # rounding makes ties
    predicted = scores > 0.7
    assert evaluation.image_auroc(labels, scores) == pytest.approx(metrics.roc_auc_score(labels, scores))
    assert evaluation.average_precision(labels, scores) == pytest.approx(
        metrics.average_precision_score(labels, scores)
    )
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(labels, predicted, average="binary")
    assert evaluation.precision_recall_f1(labels, predicted) == pytest.approx((precision, recall, f1))
    assert evaluation.best_f1(labels, scores) == pytest.approx(
        max(metrics.f1_score(labels, scores >= t) for t in scores)
    )


def test_the_weighted_curves_of_the_bootstrap_equal_scikit_learn_on_the_same_draw():
    rng = np.random.default_rng(6)
    labels = rng.random(60) < 0.3
    scores = np.round(rng.normal(labels * 1.0, 1.0), 1)
    predicted = scores > 0.5
    draws = evaluation.resample_indices(60, 5, seed=0, strata=labels)
    weights = np.stack([np.bincount(draw, minlength=60) for draw in draws]).astype(float)
    found = evaluation._image_draws(labels, scores, predicted, weights)
    for row, draw in enumerate(draws):
        truth, score = labels[draw], scores[draw]
        assert found["auroc"][row] == pytest.approx(metrics.roc_auc_score(truth, score))
        assert found["average_precision"][row] == pytest.approx(metrics.average_precision_score(truth, score))
        assert found["f1"][row] == pytest.approx(metrics.f1_score(truth, predicted[draw]))
        assert found["precision"][row] == pytest.approx(metrics.precision_score(truth, predicted[draw]))
        assert found["f1_max"][row] == pytest.approx(max(metrics.f1_score(truth, score >= t) for t in score))


@pytest.mark.parametrize("labels", [[True, True], [False, False], []])
def test_one_class_only_is_none(labels):
    scores = [0.1, 0.9][: len(labels)]
    for function in (evaluation.image_auroc, evaluation.average_precision, evaluation.best_f1):
        assert function(labels, scores) is None


# ------------------------------------------------------------------------------ pixels


def exact_aupro(maps, masks, limit=0.3):
    """Every threshold, one at a time, from the definition."""
    truth = np.stack(masks) > 0
    values = np.stack(maps)
    regions = [
        (i, connected(mask, connectivity=2) == k)
        for i, mask in enumerate(truth)
        for k in range(1, connected(mask, connectivity=2).max() + 1)
    ]
    fpr, pro = [0.0], [0.0]
    for threshold in np.quantile(values, np.linspace(1, 0, 1500)):
        called = values >= threshold
        fpr.append((called & ~truth).sum() / (~truth).sum())
        pro.append(np.mean([called[i][region].mean() for i, region in regions]))
    grid = np.linspace(0, limit, 20001)
    return trapezoid(np.interp(grid, fpr, pro), grid) / limit


@pytest.mark.parametrize("seed", [1, 2])
def test_pixel_figures_agree_with_scikit_learn_when_defects_are_rare(seed):
    maps, masks = rare_maps(seed=seed)
    truth, values = np.concatenate([m.ravel() > 0 for m in masks]), np.concatenate([m.ravel() for m in maps])
    assert truth.mean() <= 0.0005
    threshold = float(np.quantile(values, 0.999))
    counts = evaluation.count_pixels(maps, masks, threshold)
    found = {name: value[0] for name, value in evaluation.pixel_metrics(counts, threshold=threshold).items()}
    precision, recall, _ = metrics.precision_recall_curve(truth, values)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    called = values > np.float32(threshold)
    assert found["auroc"] == pytest.approx(metrics.roc_auc_score(truth, values), abs=1e-3)
    assert found["average_precision"] == pytest.approx(metrics.average_precision_score(truth, values), abs=1e-3)
    assert found["f1_max"] == pytest.approx(f1.max(), abs=1e-3)
    assert found["iou_max"] == pytest.approx((f1 / (2 - f1)).max(), abs=1e-3)
    assert found["f1"] == pytest.approx(metrics.f1_score(truth, called), abs=1e-12)
    assert found["iou"] == pytest.approx(metrics.jaccard_score(truth, called), abs=1e-12)


def test_aupro_agrees_with_the_definition_and_weighs_small_regions_as_large_ones():
    rng = np.random.default_rng(0)
    maps, masks = list(rng.random((3, 40, 40)).astype(np.float32)), [np.zeros((40, 40), np.uint8) for _ in range(3)]
    masks[0][2:20, 2:20] = 1
    masks[0][30, 30] = masks[0][31, 31] = 1  # touch at a corner: one region
    masks[1][5:9, 5:9] = 1
    maps[0][masks[0] > 0] += 0.5
    counts = evaluation.count_pixels(maps, masks)
    assert counts.n_regions.tolist() == [2, 1, 0]
    assert evaluation.pixel_metrics(counts)["aupro"][0] == pytest.approx(exact_aupro(maps, masks), abs=2e-3)
    rare = rare_maps()
    assert evaluation.pixel_metrics(evaluation.count_pixels(*rare))["aupro"][0] == pytest.approx(
        exact_aupro(*rare), abs=2e-3
    )


def test_perfect_and_constant_maps():
    mask = np.zeros((32, 32), np.uint8)
    mask[4:8, 4:8] = 1
    perfect = evaluation.pixel_metrics(evaluation.count_pixels([mask.astype(float)], [mask], 0.5), threshold=0.5)
    assert {name: value[0] for name, value in perfect.items()} == pytest.approx(dict.fromkeys(perfect, 1.0))
    flat = evaluation.pixel_metrics(evaluation.count_pixels([np.zeros((32, 32))], [mask]))
    assert flat["auroc"][0] == pytest.approx(0.5)
    assert flat["average_precision"][0] == pytest.approx(16 / 1024)
    assert flat["aupro"][0] == pytest.approx(0.15)


def test_weights_equal_repeated_images():
    maps, masks = rare_maps()
    counts = evaluation.count_pixels(maps, masks, 5.0)
    order = [0, 0, 3, 5, 5, 5, 9]
    weighted = evaluation.pixel_metrics(counts, np.bincount(order, minlength=12)[None], 5.0)
    truth = np.concatenate([masks[i].ravel() > 0 for i in order])
    values = np.concatenate([maps[i].ravel() for i in order])
    assert weighted["average_precision"][0] == pytest.approx(metrics.average_precision_score(truth, values), abs=1e-3)
    assert weighted["f1"][0] == pytest.approx(metrics.f1_score(truth, values > 5.0), abs=1e-12)


def test_images_without_mask_are_left_out_and_no_positive_is_undefined():
    maps, masks = rare_maps()
    all_counts = evaluation.count_pixels(maps[1:], masks[1:])
    some = evaluation.count_pixels(maps, [None, *masks[1:]])
    np.testing.assert_array_equal(some.positive, all_counts.positive)
    assert some.image_index.tolist() == list(range(1, 12))
    assert evaluation.count_pixels(maps, [None] * 12) is None
    good_only = evaluation.pixel_metrics(evaluation.count_pixels(maps[1:3], masks[1:3], 5.0), threshold=5.0)
    assert all(np.isnan(value).all() for value in good_only.values())


def test_where_all_is_defective_pixel_figures_are_undefined():
    counts = evaluation.count_pixels([np.arange(4.0).reshape(2, 2)], [np.ones((2, 2))], 1.0)
    assert all(np.isnan(value).all() for value in evaluation.pixel_metrics(counts, threshold=1.0).values())


def test_bad_maps_are_refused():
    with pytest.raises(InputError, match="Map 0 is"):
        evaluation.count_pixels([np.zeros((4, 4))], [np.zeros((4, 5))])
    with pytest.raises(InputError, match="not finite"):
        evaluation.count_pixels([np.full((4, 4), np.nan)], [np.zeros((4, 4))])
    counts = evaluation.count_pixels([np.eye(4)], [np.eye(4)])
    with pytest.raises(ValueError, match="no edge"):
        evaluation.pixel_metrics(counts, threshold=0.123)


def test_pointing_allows_two_percent_of_the_side():
    mask = np.zeros((100, 100), np.uint8)
    mask[50, 50] = 1
    near, far = np.zeros((100, 100)), np.zeros((100, 100))
    near[50, 52] = far[50, 53] = 1.0
    assert evaluation.pointing([near, far, near], [mask, mask, None]) == (1, 2)
    assert evaluation.pointing([near], [np.zeros((100, 100))]) == (0, 0)


# ------------------------------------------------------------------------------ the report


def report_input():
    maps, masks = rare_maps(n_images=18)
    categories = ["scratch", "good", "good", "paint", "good", "good"] * 3
    scores = [float(m.max()) for m in maps]
    return categories, scores, [score > 12.0 for score in scores], maps, masks


def test_report_has_the_contracted_shape_and_values():
    categories, scores, predicted, maps, masks = report_input()
    report = evaluation.detection_report(categories, scores, predicted, maps, masks, 6.0, 200, seed=0)
    json.dumps(report, allow_nan=False)
    assert set(report) == {"n_images", "false_alarm_rate", "image", "pixel", "categories"}
    assert {"auroc", "average_precision", "f1", "precision", "recall"} <= set(report["image"])
    assert {"auroc", "average_precision", "aupro", "f1", "iou", "f1_max", "iou_max", "pointing"} == set(report["pixel"])
    assert set(report["categories"]) == {"good", "paint", "scratch"}
    for section in (report, report["categories"]["paint"]):
        for entry in (*section["image"].values(), *section["pixel"].values()):
            assert (
                set(entry) == {"value", "ci95"} and entry["ci95"][0] - 1e-9 <= entry["value"] <= entry["ci95"][1] + 1e-9
            )
    rows = [i for i, name in enumerate(categories) if name in ("good", "paint")]
    expected = metrics.roc_auc_score([categories[i] == "paint" for i in rows], [scores[i] for i in rows])
    assert report["categories"]["paint"]["image"]["auroc"]["value"] == pytest.approx(expected)
    truth, values = (
        np.concatenate([masks[i].ravel() > 0 for i in rows]),
        np.concatenate([maps[i].ravel() for i in rows]),
    )
    expected = metrics.average_precision_score(truth, values)
    assert report["categories"]["paint"]["pixel"]["average_precision"]["value"] == pytest.approx(expected, abs=1e-3)
    alarms = np.mean([called for called, name in zip(predicted, categories, strict=True) if name == "good"])
    assert report["categories"]["good"] == {"n_images": 12, "image": {"false_alarm_rate": report["false_alarm_rate"]}}
    assert report["false_alarm_rate"]["value"] == pytest.approx(alarms)


def test_report_is_a_function_of_the_seed():
    first, again, other = (evaluation.detection_report(*report_input(), 6.0, 100, seed=seed) for seed in (0, 0, 1))
    assert first == again and first["pixel"]["auroc"]["ci95"] != other["pixel"]["auroc"]["ci95"]


def test_report_leaves_out_what_is_undefined():
    categories, scores, predicted, maps, masks = report_input()
    no_masks = [mask if name == "good" else None for mask, name in zip(masks, categories, strict=True)]
    report = evaluation.detection_report(categories, scores, predicted, maps, no_masks, 6.0, 0, seed=0)
    assert "pixel" not in report and "pixel" not in report["categories"]["paint"]
    assert set(report["image"]["auroc"]) == {"value"}
    one_each = [categories.index("good"), categories.index("paint")]  # which tell nothing of a spread
    two = evaluation.detection_report(
        *([part[i] for i in one_each] for part in (categories, scores, predicted, maps, masks)), 6.0, 50, seed=0
    )
    assert set(two["image"]["auroc"]) == set(two["pixel"]["auroc"]) == {"value"}
    good = [i for i, name in enumerate(categories) if name == "good"]
    only = evaluation.detection_report(
        *([part[i] for i in good] for part in (categories, scores, predicted, maps, masks)), 6.0, 50, seed=0
    )
    assert set(only) == {"n_images", "false_alarm_rate", "categories"}
    bad = [i for i, name in enumerate(categories) if name != "good"]
    only = evaluation.detection_report(
        *([part[i] for i in bad] for part in (categories, scores, predicted, maps, masks)), 6.0, 50, seed=0
    )
    assert set(only["image"]) == {"recall"} and "false_alarm_rate" not in only
    with pytest.raises(InputError, match="differ in length"):
        evaluation.detection_report(categories[1:], scores, predicted, maps, masks, 6.0, 0, seed=0)


def some_of_the_report_input(rows):
    return [[part[i] for i in rows] for part in report_input()]


def test_one_defective_image_beside_many_good_ones_has_intervals():
    categories = report_input()[0]
    rows = [categories.index("paint"), *(i for i, name in enumerate(categories) if name == "good")]
    report = evaluation.detection_report(*some_of_the_report_input(rows), 6.0, 50, seed=0)
    assert "ci95" in report["image"]["auroc"] and "ci95" in report["pixel"]["auroc"]


def test_an_image_without_a_mask_moves_no_pixel_figure():
    rows = [0, 1, 2, 3, 4, 6, 9]
    *parts, masks = some_of_the_report_input(rows)
    without_it = [part[1:] for part in (*parts, masks)]
    with_it, expected = (
        evaluation.detection_report(*given, 6.0, 50, seed=0)["pixel"]
        for given in ([*parts, [None, *masks[1:]]], without_it)
    )
    assert with_it == expected


def test_interval_covers_the_truth_about_as_often_as_it_says():
    """The AUROC of two unit normals one apart is known; 100 small tests, each with its own interval."""
    truth, inside = stats.norm.cdf(1 / np.sqrt(2)), 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        labels = np.arange(80) < 40
        report = evaluation._image_report(labels, rng.normal(labels * 1.0), np.zeros(80, bool), 200, seed)
        low, high = report["auroc"]["ci95"]
        inside += low <= truth <= high
    assert 0.86 <= inside / 100 <= 0.99


def test_report_of_a_large_test_takes_seconds():
    rng = np.random.default_rng(0)
    maps = [rng.random((192, 192), dtype=np.float32) for _ in range(50)]
    masks = [np.zeros((192, 192), np.uint8) for _ in range(50)]
    for mask in masks[::2]:
        mask[100:104, 50:60] = 1
    start = time.perf_counter()
    evaluation.detection_report(
        ["a", "good"] * 25, rng.random(50), rng.random(50) > 0.5, maps, masks, 0.9, 1000, seed=0
    )
    assert time.perf_counter() - start < 10


# ------------------------------------------------------------------------------ classes


def test_classification_report_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    true = rng.integers(0, 4, 200)
    predicted = np.where(rng.random(200) < 0.7, true, 0)
    confusion = evaluation.confusion_matrix(true, predicted, 5)  # class 4 never occurs
    np.testing.assert_array_equal(confusion, metrics.confusion_matrix(true, predicted, labels=range(5)))
    report = evaluation.classification_report_dict(confusion, list("abcde"), n_resamples=300, seed=0)
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        true, predicted, average="macro", zero_division=0
    )
    assert report["accuracy"]["value"] == pytest.approx(metrics.accuracy_score(true, predicted))
    assert report["macro_precision"]["value"] == pytest.approx(precision)
    assert report["macro_recall"]["value"] == pytest.approx(recall)
    assert report["macro_f1"]["value"] == pytest.approx(f1)
    each = metrics.precision_recall_fscore_support(true, predicted, labels=range(5), zero_division=0)
    for k, name in enumerate("abcde"):
        found = report["per_class"][name]
        assert [found[key]["value"] for key in ("precision", "recall", "f1")] == pytest.approx(
            [column[k] for column in each[:3]]
        )
    low, high = report["accuracy"]["ci95"]
    half = 1.96 * np.sqrt(report["accuracy"]["value"] * (1 - report["accuracy"]["value"]) / 200)
    assert high - low == pytest.approx(2 * half, rel=0.3) and low < report["accuracy"]["value"] < high
    json.dumps(report, allow_nan=False)


def test_rates_of_few_plots_have_wilsons_interval_and_without_any_none():
    report = evaluation.classification_report_dict(np.array([[3, 0, 0], [1, 2, 0], [0, 0, 0]]), list("abc"))
    assert report["accuracy"] == {"value": 5 / 6, "ci95": list(evaluation.wilson_interval(5, 6))}
    a, b, c = (report["per_class"][name] for name in "abc")
    assert a["recall"] == {"value": 1.0, "ci95": list(evaluation.wilson_interval(3, 3))}
    assert a["precision"]["ci95"] == list(evaluation.wilson_interval(3, 4))
    assert b["precision"]["ci95"] == list(evaluation.wilson_interval(2, 2)) and b["precision"]["ci95"][0] < 0.5
    assert c["recall"] == c["precision"] == {"value": 0.0}


def test_a_class_that_is_only_guessed_counts_in_the_means_over_classes():
    true, guess = [0, 0, 1, 1], [0, 2, 1, 1]
    report = evaluation.classification_report_dict(evaluation.confusion_matrix(true, guess, 4), n_resamples=0)
    assert report["macro_f1"]["value"] == pytest.approx(metrics.f1_score(true, guess, average="macro"))


def test_confusion_matrices_of_batches_add_up_and_bad_classes_are_refused():
    true, predicted = [0, 1, 2, 2, 1], [0, 2, 2, 1, 1]
    whole = evaluation.confusion_matrix(true, predicted, 3)
    parts = evaluation.confusion_matrix(true[:2], predicted[:2], 3) + evaluation.confusion_matrix(
        true[2:], predicted[2:], 3
    )
    np.testing.assert_array_equal(whole, parts)
    assert whole[1].tolist() == [0, 1, 1] and whole.dtype.kind == "i"
    with pytest.raises(ValueError, match=r"0\.\.2"):
        evaluation.confusion_matrix([3], [0], 3)
    empty = evaluation.classification_report_dict(np.zeros((3, 3), int))
    assert empty["n_images"] == 0 and "accuracy" not in empty


def test_expected_calibration_error_follows_the_definition():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(4), 500)
    true = rng.integers(0, 4, 500)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == true
    expected = 0.0
    for m in range(15):
        inside = (confidence > m / 15) & (confidence <= (m + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert evaluation.expected_calibration_error(probabilities, true) == pytest.approx(expected)
    assert evaluation.expected_calibration_error(np.eye(3), [0, 1, 2]) == 0.0
    assert evaluation.expected_calibration_error(np.zeros((0, 3)), []) is None


def test_surviving_share_of_a_copy_a_repair_and_a_half():
    generator = torch.Generator().manual_seed(3)
    good = torch.rand(1, 3, 8, 8, generator=generator)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:5, 3:6] = True
    images = torch.cat([good, good + 0.3 * mask])
    for share in (0.0, 0.5, 1.0):
        reconstructions = torch.cat([good - 0.1, good - 0.1 + 0.3 * share * mask])
        pairs = [evaluation.surviving_contrast(reconstructions, images, mask)] * 4
        assert evaluation.surviving_share(pairs, 20, 0)["value"] == pytest.approx(share, abs=1e-5)
    assert evaluation.surviving_share([], 20, 0) is None
    assert evaluation.surviving_share([(1.0, 1.0), (0.0, 3.0)], 0, 0)["value"] == 0.25  # of the sums


def test_the_best_f1_of_pixels_is_exact_where_few_are_defective():
    for seed in range(5):
        rng = np.random.default_rng(seed)
        defect_map, mask = rng.normal(size=(64, 64)), np.zeros((64, 64), bool)
        mask[10:14, 20:30] = True
        defect_map[mask] += 2
        found = evaluation.pixel_metrics(evaluation.count_pixels([defect_map], [mask], n_edges=100))
        called = [defect_map.astype(np.float32) >= np.float32(value) for value in defect_map[mask]]
        assert found["f1_max"][0] == pytest.approx(
            max(metrics.f1_score(mask.ravel(), each.ravel()) for each in called), abs=1e-12
        )


def test_the_best_pixel_threshold_is_that_of_the_mean_f1_of_images():
    for seed in range(2):
        rng = np.random.default_rng(seed)
        maps, masks = rng.normal(size=(3, 32, 32)).astype(np.float32), np.zeros((3, 32, 32), bool)
        masks[0, 2:30, 2:30] = masks[1, 10:13, 10:14] = masks[2, 20:22, 5:9] = (
            True  # a large one, which would lower the threshold of all pixels together
        )
        maps += masks * np.array([1.0, 3.0, 3.0], np.float32)[:, None, None]
        found = evaluation.best_pixel_threshold(evaluation.count_pixels(list(maps), list(masks)))

        def f1(true, found):
            return 2 * (true & found).sum() / (true.sum() + found.sum())

        def mean_f1(threshold, maps=maps, masks=masks):
            return np.mean([f1(mask, each > threshold) for each, mask in zip(maps, masks, strict=True)])

        pooled = max(np.unique(maps[masks])[::4], key=lambda value: f1(masks, maps >= value))
        assert mean_f1(found) >= max(mean_f1(value) for value in maps[masks][::4]) - 5e-3
        assert mean_f1(found) > mean_f1(pooled) + 0.05


def test_images_without_a_defect_do_not_move_the_best_pixel_threshold():
    maps = [np.array([[0, 0.2, 0.6, 0.7]], np.float32), np.array([[0.5, 0, 0, 0]], np.float32)]
    masks = [np.array([[0, 1, 1, 1]], bool), np.zeros((1, 4), bool)]
    assert 0 <= evaluation.best_pixel_threshold(evaluation.count_pixels(maps, masks)) < 0.2
