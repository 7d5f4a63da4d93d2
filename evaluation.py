"""Numbers: how near a reconstruction is, how well defects are found, how often a class is right.

Every figure over a data set is a ratio of sums over images, so ragged batches are exact and a bootstrap
over images only reweights rows. What is undefined (one class only, no masks) is None: absent, not zero.
scikit-learn is imported where it is used: it takes longer than all else here, and classifying needs nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import cv2
import numpy as np
import torch

from config import InputError

GOOD = "good"
FPR_LIMIT = 0.3
POINTING_FRAC = 0.02
SSIM_RADIUS_PX = 5
SSIM_SIGMA_PX = 1.5
_CHUNK = 16

# ------------------------------------------------------------------------------ reconstruction, per image


def mse(reconstruction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each image, (B, C, H, W) twice -> (B,).

    >>> mse(torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.5)).item()
    0.25
    """
    _assert_same_shape(reconstruction, images)
    return (reconstruction - images).square().flatten(1).mean(1)


def mae(reconstruction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Mean absolute error of each image, (B, C, H, W) twice -> (B,)."""
    _assert_same_shape(reconstruction, images)
    return (reconstruction - images).abs().flatten(1).mean(1)


def psnr(reconstruction: torch.Tensor, images: torch.Tensor, data_range: float) -> torch.Tensor:
    """Peak signal-to-noise ratio 10 log10(data_range^2 / MSE) of each image in dB, (B,); inf where equal.

    >>> round(psnr(torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.1), data_range=1.0).item(), 3)
    20.0
    """
    return 10.0 * torch.log10(data_range**2 / mse(reconstruction, images))


def ssim_map(reconstruction: torch.Tensor, images: torch.Tensor, data_range: float) -> torch.Tensor:
    """Structural similarity at every pixel, mean over channels, (B, C, H, W) twice -> (B, 1, H, W) in [-1, 1].

    Wang et al. 2004, "Image quality assessment", eq. 13, with their 11 px Gaussian window (sigma 1.5 px),
    K1 = 0.01, K2 = 0.03, mirrored borders.

    Raises:
        ValueError: H or W is below 11, or the shapes differ.
    """
    _assert_same_shape(reconstruction, images)
    if min(images.shape[-2:]) <= 2 * SSIM_RADIUS_PX:
        raise ValueError(f"images are {tuple(images.shape)}; expected sides of 11 px or more")
    with torch.autocast(images.device.type, enabled=False):
        x, y = reconstruction.to(torch.promote_types(reconstruction.dtype, torch.float32)), images
        y = y.to(x.dtype)
        # Only the sum of the two variances enters the formula, so four blurs are enough.
        mean_x, mean_y, square, product = _gaussian_blur(torch.cat((x, y, x * x + y * y, x * y))).chunk(4)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    cross, power = mean_x * mean_y, mean_x * mean_x + mean_y * mean_y
    value = (2 * cross + c1) * (2 * (product - cross) + c2) / ((power + c1) * (square - power + c2))
    return value.mean(1, keepdim=True)


def ssim(reconstruction: torch.Tensor, images: torch.Tensor, data_range: float) -> torch.Tensor:
    """Mean of `ssim_map` over each image without its 5 px border (as scikit-image leaves it out), (B,)."""
    border = slice(SSIM_RADIUS_PX, -SSIM_RADIUS_PX)
    return ssim_map(reconstruction, images, data_range)[..., border, border].flatten(1).mean(1)


def surviving_contrast(reconstructions: torch.Tensor, images: torch.Tensor, mask: torch.Tensor) -> tuple[float, float]:
    """How much of a pasted defect a reconstruction keeps: (<x_hat_d - x_hat, x_d - x>, <x_d - x, x_d - x>).

    The quotient of the two, or of their sums over images, is the least-squares share of the defect's contrast that
    survives: 0 repaired, 1 copied.

    Args:
        reconstructions, images: (2, 3, H, W), first the good image, then the same with a defect pasted in.
        mask: bool (H, W), true on the defect.
    """
    contrast, kept = ((pair[1] - pair[0])[:, mask] for pair in (images, reconstructions))
    return float((kept * contrast).sum()), float((contrast * contrast).sum())


def surviving_share(pairs: Sequence[tuple[float, float]], n_resamples: int, seed: int) -> dict | None:
    """The share of contrast that survives over many images, from ``surviving_contrast``, with a bootstrap interval."""
    kept, contrast = np.asarray(pairs, float).reshape(-1, 2).T
    if not contrast.sum() > 0:
        return None
    interval = bootstrap_interval(lambda index: kept[index].sum() / contrast[index].sum(), len(kept), n_resamples, seed)
    return figure(kept.sum() / contrast.sum(), interval)


def _assert_same_shape(reconstruction: torch.Tensor, images: torch.Tensor) -> None:
    if images.ndim != 4 or reconstruction.shape != images.shape:
        shapes = f"reconstruction is {tuple(reconstruction.shape)}, images are {tuple(images.shape)}"
        raise ValueError(f"{shapes}; expected one (B, C, H, W)")


def _gaussian_blur(planes: torch.Tensor) -> torch.Tensor:
    # Two products with banded matrices: several times faster on a CPU than one-channel convolutions.
    height, width = planes.shape[-2:]
    return _blur_matrix(height, planes) @ planes @ _blur_matrix(width, planes).T


def _blur_matrix(length: int, like: torch.Tensor) -> torch.Tensor:
    offsets = torch.arange(-SSIM_RADIUS_PX, SSIM_RADIUS_PX + 1, device=like.device)
    kernel = torch.exp(-0.5 * (offsets.to(like.dtype) / SSIM_SIGMA_PX) ** 2)
    index = torch.arange(length, device=like.device)[:, None] + offsets
    # d c b a | a b c d: scikit-image's border, which torch's own "reflect" padding is not.
    index = torch.where(index < 0, -1 - index, index)
    index = torch.where(index >= length, 2 * length - 1 - index, index)
    return like.new_zeros(length, length).scatter_add_(1, index, (kernel / kernel.sum()).expand(length, -1))


# ---------------------------------------------------------------------------------- intervals


def resample_indices(n_images: int, n_resamples: int, seed: int, strata: Sequence | None = None) -> np.ndarray:
    """Bootstrap draws of image indices with replacement, (n_resamples, n_images); each stratum keeps its size."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(n_images, int) if strata is None else np.unique(np.asarray(strata), return_inverse=True)[1]
    groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    return np.concatenate([group[rng.integers(0, len(group), (n_resamples, len(group)))] for group in groups], axis=1)


def bootstrap_interval(
    statistic: Callable[[np.ndarray], float | None],
    n_images: int,
    n_resamples: int,
    seed: int,
) -> tuple[float, float] | None:
    """95 % percentile bootstrap interval of a statistic of image indices (Efron and Tibshirani 1993, ch. 13).

    Resamples where the statistic is None or NaN are left out; None when nothing is left, n_resamples is 0, or there are
    fewer than two images, which say nothing of a spread.
    """
    if n_images < 2 or n_resamples == 0:
        return None
    values = [statistic(index) for index in resample_indices(n_images, n_resamples, seed)]
    return _percentile_interval(np.array([np.nan if value is None else value for value in values], dtype=float))


def _percentile_interval(values: np.ndarray) -> tuple[float, float] | None:
    values = values[np.isfinite(values)]
    if values.size == 0:
        return None
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def wilson_interval(successes: int, n: int) -> tuple[float, float] | None:
    """95 % interval of a rate (Wilson 1927, eq. 4); None when n is 0.

    >>> [round(bound, 4) for bound in wilson_interval(0, 30)]
    [0.0, 0.1135]
    """
    if n == 0:
        return None
    z = NormalDist().inv_cdf(0.975)
    rate = successes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else float(centre - half)
    high = 1.0 if successes == n else float(centre + half)
    return low, high


def figure(value: float | None, interval: tuple[float, float] | None) -> dict | None:
    """One number of a report, {"value": v, "ci95": [low, high]}; None when undefined; no "ci95" without an interval."""
    if value is None or not np.isfinite(value):
        return None
    entry: dict = {"value": float(value)}
    return entry if interval is None else {**entry, "ci95": [float(interval[0]), float(interval[1])]}


def figure_text(figure: dict | None, label: str = "95 %: ") -> str:
    """What ``figure`` returned, as text; "-" where it is undefined.

    >>> figure_text({"value": 0.5, "ci95": [0.25, 0.75]})
    '0.500 (95 %: 0.250 to 0.750)'
    """
    if figure is None:
        return "-"
    low_and_high = figure.get("ci95")
    return f"{figure['value']:.3f}" + (" ({}{:.3f} to {:.3f})".format(label, *low_and_high) if low_and_high else "")


def rate_figure(successes: int, n: int) -> dict | None:
    """A rate successes/n with its Wilson interval; None when n is 0."""
    return figure(successes / n, wilson_interval(successes, n)) if n else None


def summarise(values: Sequence[float], n_resamples: int, seed: int) -> dict | None:
    """Mean of per-image values with its bootstrap interval; infinite values (PSNR of equal images) are left out."""
    finite = np.asarray(values, dtype=float)
    finite = finite[np.isfinite(finite)]
    if finite.size == 0:
        return None
    return figure(finite.mean(), bootstrap_interval(lambda index: finite[index].mean(), len(finite), n_resamples, seed))


# ---------------------------------------------------------------------------------- detection, one score an image


def image_auroc(labels: Sequence[bool], scores: Sequence[float]) -> float | None:
    """Area under the ROC curve; labels true for defective, larger scores for worse; None with one class only."""
    from sklearn import metrics

    return float(metrics.roc_auc_score(labels, scores)) if _both_classes(labels) else None


def average_precision(labels: Sequence[bool], scores: Sequence[float]) -> float | None:
    """Average precision, the sum over thresholds of (R_k - R_{k-1}) P_k; None with one class only."""
    from sklearn import metrics

    return float(metrics.average_precision_score(labels, scores)) if _both_classes(labels) else None


def precision_recall_f1(
    labels: Sequence[bool], predicted: Sequence[bool]
) -> tuple[float | None, float | None, float | None]:
    """Precision, recall and F1 of yes/no predictions; each None where undefined.

    Recall needs a defective image, precision a predicted one; precision and F1 need both classes.

    >>> precision_recall_f1([True, True, False, False], [True, False, True, False])
    (0.5, 0.5, 0.5)
    """
    from sklearn import metrics

    truth, called = np.asarray(labels, bool), np.asarray(predicted, bool)
    hits = int((truth & called).sum())
    both = _both_classes(truth)
    precision = hits / int(called.sum()) if both and called.any() else None
    recall = hits / int(truth.sum()) if truth.any() else None
    return precision, recall, float(metrics.f1_score(truth, called)) if both else None


def best_f1(labels: Sequence[bool], scores: Sequence[float]) -> float | None:
    """The largest F1 of any threshold on these very labels; None with one class only."""
    from sklearn import metrics

    if not _both_classes(labels):
        return None
    precision, recall, _ = metrics.precision_recall_curve(labels, scores)
    total = precision + recall
    return float(np.divide(2 * precision * recall, total, out=np.zeros_like(total), where=total > 0).max())


def _both_classes(labels: Sequence[bool]) -> bool:
    truth = np.asarray(labels, bool)
    return bool(truth.any() and not truth.all())


# ---------------------------------------------------------------------- curves of many weighted histograms at once
# Rows are resamples, columns are score bins from low to high; a bin plays the part of a tied score.


class _Curve(NamedTuple):
    positive: np.ndarray  # (R, K), the highest bin first, as are the others
    negative: np.ndarray
    true_positive: np.ndarray
    false_positive: np.ndarray
    n_positive: np.ndarray  # (R, 1)
    n_negative: np.ndarray


def _curve(positive: np.ndarray, negative: np.ndarray) -> _Curve:
    positive, negative = positive[:, ::-1], negative[:, ::-1]
    tp, fp = positive.cumsum(1), negative.cumsum(1)
    return _Curve(positive, negative, tp, fp, tp[:, -1:], fp[:, -1:])


def _ratio(numerator: np.ndarray, denominator: np.ndarray, undefined: float = np.nan) -> np.ndarray:
    numerator, denominator = np.broadcast_arrays(np.asarray(numerator, float), np.asarray(denominator, float))
    return np.divide(numerator, denominator, out=np.full(numerator.shape, undefined), where=denominator > 0)


def _curve_auroc(curve: _Curve) -> np.ndarray:
    area = (curve.negative * (curve.true_positive - 0.5 * curve.positive)).sum(1)
    return _ratio(area, (curve.n_positive * curve.n_negative)[:, 0])


def _curve_average_precision(curve: _Curve) -> np.ndarray:
    precision = _ratio(curve.true_positive, curve.true_positive + curve.false_positive, undefined=0.0)
    return _ratio((curve.positive * precision).sum(1), curve.n_positive[:, 0])


def _curve_f1(curve: _Curve) -> np.ndarray:
    return _ratio(2 * curve.true_positive, curve.true_positive + curve.false_positive + curve.n_positive)


def _curve_f1_max(curve: _Curve) -> np.ndarray:
    return _curve_f1(curve).max(1)


def _curve_aupro(curve: _Curve, regions: np.ndarray, n_regions: np.ndarray) -> np.ndarray:
    overlap = _ratio(regions[:, ::-1].cumsum(1), n_regions[:, None])
    alarms = _ratio(curve.false_positive, curve.n_negative)
    x0, y0 = _shifted(alarms), _shifted(overlap)
    width = np.clip(np.minimum(alarms, FPR_LIMIT) - x0, 0.0, None)
    reached = y0 + (overlap - y0) * _ratio(width, alarms - x0, undefined=0.0)
    return (width * (y0 + reached)).sum(1) / (2 * FPR_LIMIT)


def _shifted(values: np.ndarray) -> np.ndarray:
    return np.concatenate((np.zeros_like(values[:, :1]), values[:, :-1]), axis=1)


# ---------------------------------------------------------------------------------- detection, every pixel


class PixelCounts(NamedTuple):
    """Histograms of the maps' values, a row for each image that has a mask.

    Bin k holds values in (edges[k-1], edges[k]], so "value > edges[k]" is exactly the bins after k.
    `regions` sums, over the connected defects of an image, the histogram of each divided by its area.
    """

    edges: np.ndarray  # (K - 1,) rising
    positive: np.ndarray  # (n, K) defective pixels
    negative: np.ndarray  # (n, K) good pixels
    regions: np.ndarray  # (n, K)
    n_regions: np.ndarray  # (n,)
    image_index: np.ndarray  # (n,) position in the lists given


def count_pixels(
    maps: Sequence[np.ndarray],
    masks: Sequence[np.ndarray | None],
    threshold: float | None = None,
    n_edges: int = 1000,
) -> PixelCounts | None:
    """Count defective and good pixels over fine bins of map value; None when no image has a mask.

    Args:
        maps: H x W floats, larger where worse.
        masks: H x W, non-zero on a defect, all zero for a good image; None leaves the image out.
        threshold: becomes an edge, so that F1 and IoU there are exact.
        n_edges: edges on each of five scales: all pixels, the top 1 % evenly and ever finer, the defective pixels and
            just below them (average precision hangs on the few highest values, since a defect covers 0.02-0.1 % of an
            image).

    Raises:
        InputError: shapes differ or a map holds a value that is not finite.
    """
    kept = [i for i, mask in enumerate(masks) if mask is not None]
    if not kept:
        return None
    pairs = [(_checked_map(maps[i], masks[i], i), np.asarray(masks[i]) > 0) for i in kept]
    edges = _bin_edges(pairs, threshold, n_edges)
    counted = [_count_image(defect_map, mask, edges) for defect_map, mask in pairs]
    positive, negative, regions, n_regions = (np.array(column, dtype=float) for column in zip(*counted, strict=True))
    return PixelCounts(edges, positive, negative, regions, n_regions, np.array(kept))


def _checked_map(defect_map: np.ndarray, mask: np.ndarray, number: int) -> np.ndarray:
    defect_map = np.ascontiguousarray(defect_map, dtype=np.float32)
    if defect_map.shape != np.shape(mask) or defect_map.ndim != 2:
        raise InputError(
            f"Map {number} is {defect_map.shape} and its mask {np.shape(mask)}; expected one H x W for both."
        )
    if not np.isfinite(defect_map).all():
        raise InputError(f"Map {number} holds a value that is not finite; expected finite numbers.")
    return defect_map


def _bin_edges(pairs: list[tuple[np.ndarray, np.ndarray]], threshold: float | None, n_edges: int) -> np.ndarray:
    n_pixels = sum(defect_map.size for defect_map, _ in pairs)
    stride = max(1, n_pixels // 1_000_000) | 1  # odd, so that it walks over all columns of an even width
    bulk = np.concatenate([defect_map.ravel()[::stride] for defect_map, _ in pairs])
    defective = np.concatenate([defect_map[mask] for defect_map, mask in pairs])
    start = np.quantile(bulk, 0.99)
    tail = np.concatenate([defect_map[defect_map > start] for defect_map, _ in pairs])
    even = np.linspace(0.0, 1.0, n_edges)
    steep = 1.0 - np.geomspace(1.0, 1.0 / max(tail.size, 2), n_edges)  # ends at single pixels
    found = _quantiles(defective, even)
    below = np.nextafter(found, np.float32(-np.inf))  # so that a bin holds one such value and no good pixel beneath it
    parts = [_quantiles(bulk, even), _quantiles(tail, even), _quantiles(tail, steep), found, below]
    parts.append(np.array([] if threshold is None else [threshold], dtype=np.float32))
    return np.unique(np.concatenate(parts))


def _quantiles(values: np.ndarray, levels: np.ndarray) -> np.ndarray:
    if values.size == 0:
        return values
    return np.sort(values)[np.round(levels * (values.size - 1)).astype(int)]


def _count_image(
    defect_map: np.ndarray, mask: np.ndarray, edges: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    n_bins = len(edges) + 1
    bins = torch.bucketize(torch.from_numpy(defect_map), torch.from_numpy(edges), out_int32=True).numpy()
    everything = np.bincount(bins.ravel(), minlength=n_bins)
    if not mask.any():
        return np.zeros(n_bins), everything, np.zeros(n_bins), 0
    inside = bins[mask]
    n_labels, label_image = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)  # 0 is what is no region
    label = label_image[mask]
    share = 1.0 / np.bincount(label, minlength=n_labels)[label]
    positive = np.bincount(inside, minlength=n_bins)
    return positive, everything - positive, np.bincount(inside, weights=share, minlength=n_bins), n_labels - 1


def pixel_metrics(
    counts: PixelCounts, weights: np.ndarray | None = None, threshold: float | None = None
) -> dict[str, np.ndarray]:
    """Pixel figures for each row of image weights, (R, n) -> {name: (R,)}; NaN where undefined.

    auroc, average_precision, f1_max, iou_max, aupro (the mean share found of each connected defect, over the
    false-positive rate from 0 to 0.3, divided by 0.3: Bergmann et al. 2021, "The MVTec anomaly detection
    dataset", sec. 5.2), and f1 and iou of "value > threshold" for a threshold given to `count_pixels`.
    """
    weights = np.ones((1, len(counts.positive))) if weights is None else np.asarray(weights, dtype=float)
    chunks = [_pixel_metrics_chunk(counts, weights[i : i + _CHUNK], threshold) for i in range(0, len(weights), _CHUNK)]
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def _pixel_metrics_chunk(counts: PixelCounts, weights: np.ndarray, threshold: float | None) -> dict[str, np.ndarray]:
    curve = _curve(weights @ counts.positive, weights @ counts.negative)
    found = {
        "auroc": _curve_auroc(curve),
        "average_precision": _curve_average_precision(curve),
        "aupro": _curve_aupro(curve, weights @ counts.regions, weights @ counts.n_regions),
        "f1_max": _curve_f1_max(curve),
    }
    found["iou_max"] = found["f1_max"] / (2 - found["f1_max"])  # the two rise and fall together
    if threshold is not None:
        tp, fp = _above(counts, curve, threshold)
        n_positive = curve.n_positive[:, 0]
        found["f1"], found["iou"] = _ratio(2 * tp, tp + fp + n_positive), _ratio(tp, fp + n_positive)
    one_class = (curve.n_positive[:, 0] == 0) | (curve.n_negative[:, 0] == 0)
    return {name: np.where(one_class, np.nan, value) for name, value in found.items()}


def best_pixel_threshold(counts: PixelCounts) -> float:
    """The threshold at which the mean over images of the F1 of "value > threshold" is largest: so a large defect, or an
    odd image, counts no more than another.
    """
    f1 = np.nan_to_num(_curve_f1(_curve(counts.positive, counts.negative))).mean(0)
    # the curve falls from the highest bin, above the last edge; the lowest holds no defective pixel and is never best
    return float(counts.edges[len(counts.edges) - 1 - int(f1.argmax())])


def _above(counts: PixelCounts, curve: _Curve, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    n_above = len(counts.edges) - int(np.searchsorted(counts.edges, np.float32(threshold)))
    if n_above == 0 or counts.edges[-n_above] != np.float32(threshold):
        raise ValueError(f"threshold {threshold} is no edge of these counts; expected the one given to count_pixels")
    return curve.true_positive[:, n_above - 1], curve.false_positive[:, n_above - 1]


def pointing(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray | None]) -> tuple[int, int]:
    """(hits, defective images with a mask): a hit has its map's largest value within 2 % of the side of the defect."""
    hits, n_images = 0, 0
    for defect_map, mask in zip(maps, masks, strict=True):
        if mask is None or not np.any(mask):
            continue
        peak = np.unravel_index(np.argmax(defect_map), np.shape(defect_map))
        distance_px = np.sqrt(((np.argwhere(mask) - peak) ** 2).sum(1).min())
        n_images += 1
        hits += int(distance_px <= POINTING_FRAC * max(np.shape(mask)))
    return hits, n_images


# ---------------------------------------------------------------------------------- the report of a test


def detection_report(
    categories: Sequence[str],
    scores: Sequence[float],
    predicted: Sequence[bool],
    maps: Sequence[np.ndarray],
    masks: Sequence[np.ndarray | None],
    pixel_threshold: float,
    n_resamples: int,
    seed: int,
) -> dict:
    """Image and pixel figures of a whole test and of each category, as test_metrics.json holds them.

    Args:
        categories: of each image; "good" is the negative class.
        scores: of each image, larger for worse.
        predicted: of each image, true when called defective.
        maps, masks: H x W of each image; an image whose mask is None is left out of the pixel figures.
        pixel_threshold: a pixel is called defective where map > pixel_threshold.
        n_resamples: bootstrap draws behind each interval; 0 leaves the intervals out.
        seed: of the bootstrap.

    Returns:
        {"n_images", "false_alarm_rate", "image": {...}, "pixel": {...}, "categories": {name: {"n_images",
        "image", "pixel"}}}; each figure is {"value", "ci95"}; a defect category is measured against the good
        images, recall and pointing on its own. Undefined figures are left out.

    Raises:
        InputError: lengths or shapes differ, or a value is not finite.
    """
    names, score, called = np.asarray(categories, dtype=str), np.asarray(scores, float), np.asarray(predicted, bool)
    lengths = {
        "categories": len(names),
        "scores": len(score),
        "predicted": len(called),
        "maps": len(maps),
        "masks": len(masks),
    }
    if len(set(lengths.values())) != 1:
        raise InputError(f"The lists differ in length ({lengths}); expected one entry an image in each.")
    if not np.isfinite(score).all():
        raise InputError("An image score is not finite; expected finite numbers.")
    test = _Test(
        names=names,
        scores=score,
        predicted=called,
        maps=maps,
        masks=masks,
        counts=count_pixels(maps, masks, pixel_threshold),
        threshold=pixel_threshold,
        n_resamples=n_resamples,
        seed=seed,
    )
    whole = _group_report(test, np.ones(len(names), bool))
    report = {"n_images": len(names), "false_alarm_rate": _false_alarm_rate(test), **whole, "categories": {}}
    for name in sorted(set(categories)):
        report["categories"][name] = _category_report(test, name)
    return _without_undefined(report)


class _Test(NamedTuple):
    names: np.ndarray
    scores: np.ndarray
    predicted: np.ndarray
    maps: Sequence[np.ndarray]
    masks: Sequence[np.ndarray | None]
    counts: PixelCounts | None
    threshold: float
    n_resamples: int
    seed: int


def _false_alarm_rate(test: _Test) -> dict | None:
    good = test.names == GOOD
    return rate_figure(int(test.predicted[good].sum()), int(good.sum()))


def _category_report(test: _Test, name: str) -> dict:
    members = test.names == name
    if name == GOOD:
        return {"n_images": int(members.sum()), "image": {"false_alarm_rate": _false_alarm_rate(test)}}
    return {"n_images": int(members.sum()), **_group_report(test, members | (test.names == GOOD))}


def _group_report(test: _Test, rows: np.ndarray) -> dict:
    defective = test.names[rows] != GOOD
    image = _image_report(defective, test.scores[rows], test.predicted[rows], test.n_resamples, test.seed)
    pixel = _pixel_report(test, rows) if test.counts is not None else {}
    chosen = np.flatnonzero(rows)
    pixel["pointing"] = rate_figure(*pointing([test.maps[i] for i in chosen], [test.masks[i] for i in chosen]))
    return {"image": image, "pixel": pixel}


def _image_report(
    defective: np.ndarray, scores: np.ndarray, predicted: np.ndarray, n_resamples: int, seed: int
) -> dict:
    precision, _, f1 = precision_recall_f1(defective, predicted)
    values = {
        "auroc": image_auroc(defective, scores),
        "average_precision": average_precision(defective, scores),
        "f1": f1,
        "f1_max": best_f1(defective, scores),
        "precision": precision,
    }
    weights = _resample_weights(defective, n_resamples, seed)
    draws = _image_draws(defective, scores, predicted, weights) if len(weights) else {}
    report = {
        name: figure(value, _percentile_interval(draws[name]) if draws else None) for name, value in values.items()
    }
    report["recall"] = rate_figure(int((defective & predicted).sum()), int(defective.sum()))
    return report


def _image_draws(
    defective: np.ndarray, scores: np.ndarray, predicted: np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    order = np.argsort(scores)
    first_of_ties = np.flatnonzero(np.diff(scores[order], prepend=np.nan))
    curve = _curve(*(np.add.reduceat((weights * some)[:, order], first_of_ties, 1) for some in (defective, ~defective)))
    hits, calls, truths = weights @ (defective & predicted), weights @ predicted, weights @ defective
    return {
        "auroc": _curve_auroc(curve),
        "average_precision": _curve_average_precision(curve),
        "f1": _ratio(2 * hits, calls + truths),
        "f1_max": _curve_f1_max(curve),
        "precision": _ratio(hits, calls),
    }


def _resample_weights(defective: np.ndarray, n_resamples: int, seed: int) -> np.ndarray:
    n_images = len(defective)
    if n_resamples == 0 or max(defective.sum(), n_images - defective.sum()) < 2:  # nothing to choose among
        return np.zeros((0, n_images))
    index = resample_indices(n_images, n_resamples, seed, defective)
    return np.stack([np.bincount(draw, minlength=n_images) for draw in index]).astype(float)


def _pixel_report(test: _Test, rows: np.ndarray) -> dict:
    chosen = rows[test.counts.image_index]
    if not chosen.any():
        return {}
    counts = test.counts._replace(
        **{
            name: getattr(test.counts, name)[chosen]
            for name in ("positive", "negative", "regions", "n_regions", "image_index")
        }
    )
    values = pixel_metrics(counts, threshold=test.threshold)
    weights = _resample_weights(test.names[counts.image_index] != GOOD, test.n_resamples, test.seed)
    draws = pixel_metrics(counts, weights, test.threshold) if len(weights) else {}
    return {
        name: figure(value[0], _percentile_interval(draws[name]) if draws else None) for name, value in values.items()
    }


def _without_undefined(report: dict) -> dict:
    kept = {key: _without_undefined(value) if isinstance(value, dict) else value for key, value in report.items()}
    return {key: value for key, value in kept.items() if value is not None and value != {}}


# ---------------------------------------------------------------------------------- classes


def confusion_matrix(true: Sequence[int], predicted: Sequence[int], n_classes: int) -> np.ndarray:
    """Counts of (true class, predicted class), (K, K) integers; matrices of batches or ranks simply add up.

    Raises:
        ValueError: the lists differ in length, or a class number is not among those of K classes.

    >>> confusion_matrix([0, 1, 1], [0, 1, 0], 2).tolist()
    [[1, 0], [1, 1]]
    """
    truth, guess = np.asarray(true, dtype=np.int64), np.asarray(predicted, dtype=np.int64)
    if truth.shape != guess.shape:
        raise ValueError(f"true is {truth.shape}, predicted is {guess.shape}; expected equal lengths")
    both = np.concatenate((truth, guess))
    if both.size and (both.min() < 0 or both.max() >= n_classes):
        raise ValueError(f"class numbers must lie in 0..{n_classes - 1}")
    return np.bincount(truth * n_classes + guess, minlength=n_classes**2).reshape(n_classes, n_classes)


def classification_report_dict(
    confusion: np.ndarray,
    class_names: Sequence[str] | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
) -> dict:
    """Accuracy, macro and per-class precision, recall and F1, each {"value", "ci95"}, all from the matrix.

    A zero denominator counts as 0, without an interval, and the macro mean runs over the classes that occur, as in
    scikit-learn. Accuracy, precision and recall have Wilson's interval; for that of the others the images of each true
    class are drawn again with replacement.
    """
    confusion = np.asarray(confusion)
    names = [str(i) for i in range(len(confusion))] if class_names is None else list(class_names)
    if len(names) != len(confusion):
        raise ValueError(f"{len(names)} class names for {len(confusion)} classes")
    if confusion.sum() == 0:
        return {"n_images": 0, "confusion_matrix": confusion.tolist(), "class_names": names}
    values = _class_figures(confusion[None])
    draws = _class_figures(_redrawn(confusion, n_resamples, seed)) if n_resamples else None
    right, truth, guess = np.diagonal(confusion), confusion.sum(1), confusion.sum(0)

    def one(name: str, *index: int) -> dict | None:
        column = (slice(None), *index)
        return figure(values[name][column][0], None if draws is None else _percentile_interval(draws[name][column]))

    def rate(hits: int, n: int) -> dict:
        return rate_figure(int(hits), int(n)) or {"value": 0.0}

    overall = {
        "accuracy": rate(right.sum(), truth.sum()),
        **{name: one(name) for name in ("macro_precision", "macro_recall", "macro_f1")},
    }
    per_class = {
        label: {
            "n_images": int(truth[k]),
            "precision": rate(right[k], guess[k]),
            "recall": rate(right[k], truth[k]),
            "f1": one("f1", k),
        }
        for k, label in enumerate(names)
    }
    return {
        "n_images": int(confusion.sum()),
        **overall,
        "per_class": per_class,
        "confusion_matrix": confusion.tolist(),
        "class_names": names,
    }


def _redrawn(confusion: np.ndarray, n_resamples: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = [
        rng.multinomial(row.sum(), row / max(row.sum(), 1), n_resamples)
        if row.sum()
        else np.zeros((n_resamples, len(row)), int)
        for row in confusion
    ]
    return np.stack(rows, axis=1)


def _class_figures(confusions: np.ndarray) -> dict[str, np.ndarray]:
    right = np.diagonal(confusions, axis1=1, axis2=2)
    truth, guess = confusions.sum(2), confusions.sum(1)
    found = {
        "precision": _ratio(right, guess, 0.0),
        "recall": _ratio(right, truth, 0.0),
        "f1": _ratio(2 * right, truth + guess, 0.0),
    }
    occurs = (truth + guess) > 0
    macro = {f"macro_{name}": (value * occurs).sum(1) / occurs.sum(1) for name, value in found.items()}
    return {**found, **macro}


def expected_calibration_error(probabilities: np.ndarray, true: Sequence[int], n_bins: int = 15) -> float | None:
    """Mean gap between confidence and accuracy over equal bins of confidence; None without images.

    Guo et al. 2017, "On calibration of modern neural networks", eq. 3. `probabilities` is (n, K), rows sum to 1.

    >>> round(expected_calibration_error(np.array([[0.8, 0.2], [0.8, 0.2]]), [0, 1]), 3)
    0.3
    """
    probabilities = np.asarray(probabilities, dtype=float)
    if len(probabilities) == 0:
        return None
    confidence, right = probabilities.max(1), probabilities.argmax(1) == np.asarray(true)
    bins = np.clip(np.ceil(confidence * n_bins).astype(int) - 1, 0, n_bins - 1)
    gaps = np.bincount(bins, weights=right - confidence, minlength=n_bins)
    return float(np.abs(gaps).sum() / len(confidence))
