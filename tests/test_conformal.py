"""The promise of the threshold, and of p-values, in closed form and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from conformal import conformal_threshold, outer_fence, p_value, sober_threshold
from defect_maps import Calibration


@pytest.mark.parametrize(
    ("n", "alpha", "rank", "promised"),
    [
        (19, 0.05, 19, True),
        (20, 0.05, 20, True),
        (39, 0.05, 38, True),
        (9, 0.1, 9, True),
        (99, 0.1, 90, True),
        (4, 0.2, 4, True),
        (1, 0.5, 1, True),
        (249, 0.172, 207, True),
        (18, 0.05, 18, False),
        (8, 0.1, 8, False),
        (1, 0.05, 1, False),
        (22, 0.01, 22, False),
    ],
)
def test_the_threshold_is_the_score_of_the_conformal_rank(n, alpha, rank, promised):
    scores = np.random.default_rng(0).permutation(np.arange(1.0, n + 1))
    assert conformal_threshold(scores, alpha) == (float(rank), promised)


def test_a_threshold_needs_a_score():
    with pytest.raises(ValueError, match="no good scores; expected one or more"):
        conformal_threshold(np.array([]), 0.05)


@pytest.mark.parametrize(
    ("odd", "alpha", "expected"),
    [
        ([], 0.05, (19.0, True)),
        ([60.0], 0.05, (19.0, False)),  # beyond 15 + 3 * 9.5 = 43.5: set aside
        ([40.0], 0.05, (40.0, True)),
        ([60.0, 70.0], 0.05, (70.0, True)),  # two are no exception
        ([60.0], 0.1, (19.0, True)),  # it would not be the threshold
    ],
)
def test_one_good_score_far_from_the_others_does_not_set_the_threshold(odd, alpha, expected):
    scores = [*map(float, range(1, 20)), *odd]
    assert sober_threshold(scores, alpha) == expected
    calibration = Calibration.of({}, scores[::-1], np.arange(10.0), alpha, 0.1)
    assert (calibration.threshold, calibration.promised) == expected
    assert calibration.at(0.5).at(alpha).threshold == calibration.threshold
    told = "but for one like no other, with a score of 60.000: at most 9.5% false alarms, where 5.0% were asked for"
    assert (told in calibration.describe()) == (expected == (19.0, False))


@pytest.mark.parametrize(("n", "alpha"), [(9, 0.1), (19, 0.05), (22, 0.05)])
def test_false_alarms_stay_below_two_in_n_also_where_one_like_no_other_is_set_aside(n, alpha):
    n_draws = 2000
    scores = np.random.default_rng(n).lognormal(sigma=2.0, size=(n_draws, n + 1))  # heavy tails
    found = [sober_threshold(row[:-1].tolist(), alpha) for row in scores]
    rate = np.mean([row[-1] > each.threshold for row, each in zip(scores, found, strict=True)])
    bound = 2 / (n + 1)
    assert rate <= bound + 4 * math.sqrt(bound * (1 - bound) / n_draws)
    assert {each.promised for each in found} == {True, False}


@pytest.mark.parametrize("n", [4, 9, 19, 22, 50])
@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.2])
def test_false_alarms_stay_below_the_rate_asked_for(n, alpha):
    """The realised rate over 4,000 calibrations is the exact one, (n + 1 - rank) / (n + 1),
    within 4 standard errors."""
    n_draws = 4000
    scores = np.random.default_rng(n).lognormal(size=(n_draws, n + 1))
    found = [conformal_threshold(row[:-1], alpha) for row in scores]
    rate = np.mean([row[-1] > each.threshold for row, each in zip(scores, found, strict=True)])
    enough = n >= 1 / alpha - 1 - 1e-9
    assert {each.promised for each in found} == {enough}
    bound = alpha if enough else 1 / (n + 1)
    exact = math.floor((n + 1) * bound + 1e-9) / (n + 1)
    error = 4 * math.sqrt(bound * (1 - bound) / n_draws)
    assert exact <= bound + 1e-12 and rate <= bound + error
    assert abs(rate - exact) <= error


def test_the_p_value_counts_good_scores_that_are_as_high():
    good = np.array([3.0, 1.0, 2.0, 2.0])
    assert [p_value(score, good) for score in (0.0, 1.0, 2.0, 2.5, 3.0, 4.0)] == pytest.approx(
        [1.0, 1.0, 0.8, 0.4, 0.4, 0.2]
    )


def test_p_values_of_good_images_are_not_too_small():
    """P(p <= u) <= u for every u, whatever the distribution of scores; ties only make p larger."""
    rng = np.random.default_rng(0)
    for draw in (rng.normal(size=(4000, 20)), rng.integers(0, 4, (4000, 20)).astype(float)):
        p = np.array([p_value(row[-1], row[:-1]) for row in draw])
        for u in (0.05, 0.1, 0.25, 0.5, 0.9):
            assert np.mean(p <= u + 1e-12) <= u + 4 * math.sqrt(u * (1 - u) / len(p))


@pytest.mark.parametrize(
    ("scores", "fence"), [(range(1, 10), 7 + 3 * 4), (range(101, 110), 1.5 * 107), (range(1, 8), math.inf)]
)
def test_the_outer_fence_is_three_interquartile_ranges_and_half_of_the_upper_quartile_away(scores, fence):
    assert outer_fence([float(score) for score in scores]) == fence


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.3])
def test_a_score_is_above_the_threshold_exactly_where_its_p_value_is_at_most_alpha(alpha):
    rng = np.random.default_rng(1)
    for n in (19, 25, 40):
        good = rng.integers(0, 15, n).astype(float)  # with ties
        threshold = conformal_threshold(good, alpha).threshold
        for score in np.arange(-1, 17, 0.5):
            assert (score > threshold) == (p_value(score, good) <= alpha + 1e-12)
