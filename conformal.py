"""From the scores of good images: a threshold with a promised rate of false alarms, and p-values (conformal)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

N_FENCED = 8
"""Fewest scores for which an outer fence is computed."""


class ConformalThreshold(NamedTuple):
    """A threshold with a promised false-alarm rate; ``promised`` is False where too few scores, or one set aside, allow
    only a higher one.
    """

    threshold: float
    promised: bool


def conformal_threshold(good_scores: np.ndarray, alpha: float) -> ConformalThreshold:
    """The score above which an image is called defective: the ceil((n+1)(1-alpha))-th smallest of n good scores.

    For exchangeable good images the chance of a false alarm is then at most alpha (Vovk et al. 2005; Angelopoulos
    & Bates 2023, eq. 1). With n below 1/alpha - 1 no finite threshold promises that; the largest score is taken.

    Raises:
        ValueError: there is no score.

    >>> conformal_threshold(np.arange(1.0, 20.0), 0.05)
    ConformalThreshold(threshold=19.0, promised=True)
    """
    ordered = np.sort(np.asarray(good_scores, float))
    if not len(ordered):
        raise ValueError("There are no good scores; expected one or more.")
    rank = math.ceil((len(ordered) + 1) * (1 - alpha) - 1e-9)
    return ConformalThreshold(float(ordered[min(rank, len(ordered)) - 1]), rank <= len(ordered))


def outer_fence(good_scores: Sequence[float]) -> float:
    """Score above which a good image lies far out: Q3 + 3 (Q3 - Q1) of all (Tukey 1977, "outer fence"), at least 1.5
    Q3; infinite for fewer than N_FENCED.
    """
    if len(good_scores) < N_FENCED:
        return math.inf
    low, high = np.quantile(good_scores, (0.25, 0.75))
    return float(max(high + 3 * (high - low), 1.5 * high))


def sober_threshold(good_scores: Sequence[float], alpha: float) -> ConformalThreshold:
    """As ``conformal_threshold``, but a single outlier beyond the outer fence may not set it; then the next largest
    score does.

    So one good image like no other does not let most defects pass. The chance of a false alarm is then at most 2 / (n +
    1), not alpha.
    """
    found, ordered = conformal_threshold(np.array(good_scores), alpha), sorted(good_scores)
    fence = outer_fence(ordered)
    if found.threshold > fence and ordered[-2] <= fence:
        return ConformalThreshold(ordered[-2], False)
    return found


def p_value(score: float, good_scores: np.ndarray) -> float:
    """(1 + number of good scores >= score) / (n + 1): the chance of so high a score if the image were good.

    >>> p_value(2.5, np.array([1.0, 2.0, 3.0]))
    0.5
    """
    good = np.asarray(good_scores, float)
    return float((1 + np.count_nonzero(good >= score)) / (len(good) + 1))
