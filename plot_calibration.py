"""What validation plots say of a classifier: honest probabilities, and how far a picture lies from everything known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoints import finite
from conformal import p_value
from plot_strokes import PROFILE_INK, ink_of

TEMPERATURES = np.geomspace(0.1, 10.0, 400)
FEWEST_UNSURE = 30
"""Validation plots on which the temperature of flips may be fitted; with fewer it is fitted on all."""


def fit_temperature(log_probabilities: np.ndarray, labels: Sequence[int]) -> float:
    """The temperature T that makes softmax(log p / T) likeliest on validation plots (Guo et al. 2017, section 4.2).

    >>> log_p = np.log([[0.99, 0.01]] * 10)
    >>> round(fit_temperature(log_p, [0] * 8 + [1] * 2), 1)  # says 99 %, is right in 80 %
    3.3
    """
    labels, log_p = np.asarray(labels), torch.from_numpy(np.asarray(log_probabilities, np.float64))
    losses = [F.nll_loss(F.log_softmax(log_p / t, 1), torch.from_numpy(labels).long()).item() for t in TEMPERATURES]
    return float(TEMPERATURES[int(np.argmin(losses))])


# --------------------------------------------------------------------------- far from everything known


def picture_statistics(images: Tensor) -> Tensor:
    """Eleven plain numbers of a picture, (B, 3, S, S) in [0, 1] -> (B, 11): its ink, its colour, its strokes.

    A plot of a series has one stroke a column in one colour on white; photographs, noise, text and blank pages have
    not.
    """
    images = images.float()
    ink = ink_of(images)[:, 0].contiguous()
    dark = ink > PROFILE_INK
    strokes = torch.stack(
        [
            (dark[:, 1:] > dark[:, :-1]).sum(1).float().mean(1),
            (dark[:, :, 1:] > dark[:, :, :-1]).sum(2).float().mean(1),
        ],
        1,
    )
    steps = torch.stack(
        [(ink[:, 1:] - ink[:, :-1]).abs().mean((1, 2)), (ink[:, :, 1:] - ink[:, :, :-1]).abs().mean((1, 2))], 1
    )
    inked = (images * ink[:, None]).sum((2, 3)) / ink.sum((1, 2)).clamp_min(1e-3)[:, None]
    shares = torch.stack([dark.float().mean((1, 2)), dark.any(1).float().mean(1), ink.mean((1, 2)), ink.std((1, 2))], 1)
    return torch.cat([shares, torch.log1p(strokes), torch.log(steps + 1e-4), inked], 1)


def shrunk_covariance(rows: np.ndarray) -> np.ndarray:
    """Covariance of rows (n, D) drawn towards a multiple of the identity (Ledoit & Wolf 2004)."""
    from sklearn.covariance import ledoit_wolf

    scale = rows.std(0) + 1e-6
    return ledoit_wolf(rows / scale)[0] * np.outer(scale, scale) + 1e-9 * np.eye(rows.shape[1])


def mahalanobis(rows: Tensor, means: Tensor, precision: Tensor) -> Tensor:
    """Distance of rows (n, D) to the nearest of means (K, D) under an inverse covariance (D, D), (n,).

    >>> mahalanobis(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2), torch.eye(2)).item()
    5.0
    """
    offset = rows[:, None].double() - means[None].double()
    squared = torch.einsum("nkd,de,nke->nk", offset, precision.double(), offset)
    return squared.clamp_min(0).amin(1).sqrt()


@dataclass
class ClassifierCalibration:
    """What training and validation plots say of probabilities and of what is known.

    Attributes:
        temperature, temperature_flips: divide log-probabilities of the plot alone, of the mean over its flips.
        flips_below: plots whose class, seen once, is less sure than this are averaged over their flips.
        class_means: (K, D) mean latent of each class; class_covariances: (K, D, D), shrunk.
        latent_precision: (D, D) inverse of the pooled covariance within classes.
        picture_mean, picture_precision: (1, P) and (P, P) of ``picture_statistics``.
        centre, spread: (3,) of the logarithms of reconstruction error, latent and picture distance on validation plots.
        scores: novelty scores of validation plots, sorted, by group; a p-value is the largest over groups.
        alpha: share of plots of known kinds that may be called none of these.
    """

    temperature: float
    temperature_flips: float
    flips_below: float
    class_means: Tensor
    class_covariances: Tensor
    latent_precision: Tensor
    picture_mean: Tensor
    picture_precision: Tensor
    centre: Tensor
    spread: Tensor
    scores: dict[str, list[float]]
    alpha: float

    @classmethod
    def from_dict(cls, values: dict, n_classes: int, latent_dim: int) -> ClassifierCalibration:
        """The calibration of so many classes (K) and latent variables (D) that a checkpoint holds.

        Raises:
            ValueError: something is no finite number, or of another shape.
        """
        shapes = {"class_means": (n_classes, latent_dim), "class_covariances": (n_classes, latent_dim, latent_dim)}
        shapes |= {"latent_precision": (latent_dim, latent_dim), "centre": (3,), "spread": (3,)}
        for field in fields(cls):
            value = values[field.name]
            if field.type == "float":
                finite(field.name, value)
            elif field.type == "Tensor" and not (isinstance(value, Tensor) and torch.isfinite(value).all()):
                raise ValueError(f"{field.name} is no tensor of finite numbers")
            elif field.name in shapes and tuple(value.shape) != shapes[field.name]:
                raise ValueError(f"{field.name} has shape {tuple(value.shape)}; expected {shapes[field.name]}")
        scores = {name: [finite("a score", score) for score in group] for name, group in values["scores"].items()}
        if not scores or not all(scores.values()):
            raise ValueError("there are no scores")
        return cls(**{**values, "scores": scores})

    def probabilities(self, views: Tensor) -> Tensor:
        """Calibrated probabilities (n, K) from log-probabilities of views (v, n, K), one or several."""
        return F.softmax(views.double().mean(0) / (self.temperature if len(views) == 1 else self.temperature_flips), 1)

    def unsure(self, probabilities: Tensor, flips_below: float | None = None) -> Tensor:
        """Indices of the plots to look at flipped, too, from probabilities (n, K) of one view; None asks as
        calibrated.
        """
        return torch.nonzero(
            probabilities.amax(1) <= (self.flips_below if flips_below is None else flips_below)
        ).flatten()

    def distances(self, errors: Tensor, mu: Tensor, pictures: Tensor) -> Tensor:
        """Reconstruction error, latent distance and picture distance, (n, 3) on the CPU, of errors (n,), mu (n, D) and
        statistics (n, P).
        """
        latent = mahalanobis(mu.cpu(), self.class_means, self.latent_precision)
        picture = mahalanobis(pictures.cpu(), self.picture_mean, self.picture_precision)
        return torch.stack([errors.cpu().double(), latent, picture], 1)

    def novelty(self, distances: Tensor) -> np.ndarray:
        """One score for each row of ``novelty_distances``, (n, 3) -> (n,): the largest of the three, standardised."""
        logs = torch.log(distances.cpu().double().clamp_min(1e-9))
        return ((logs - self.centre) / self.spread).amax(1).numpy()

    def p_values(self, scores: np.ndarray) -> np.ndarray:
        """Chance of so high a score, were the picture a plot of a known kind (of the group it fits best)."""
        return np.array([max(p_value(score, np.array(group)) for group in self.scores.values()) for score in scores])

    @property
    def promised(self) -> bool:
        """Whether there are enough validation plots to call anything none of these at about the rate alpha.

        Their scores are standardised by themselves, so that of new plots a few more are called so: 8.0 % for 5 % with
        19 of them, 6.2 % with 40, 5.2 % with 180 (3,000 simulated calibrations of three normal log-distances).
        """
        return all(1 / (len(group) + 1) <= self.alpha for group in self.scores.values())


class Encoded(NamedTuple):
    """Everything calibration needs of a set of labelled plots."""

    mu: Tensor  # (n, D)
    views: Tensor  # (v, n, K) log-probabilities of each plot and of its flips
    pictures: Tensor  # (n, P)
    errors: Tensor  # (n,) reconstruction errors
    labels: np.ndarray  # (n,)


def calibrated_probabilities(
    encoded: Encoded, calibration: ClassifierCalibration, calibrated: bool = True
) -> np.ndarray:
    """Probabilities (n, K) of plots already encoded, as ``judge`` gives them; or what the same views say before
    calibration.
    """
    probabilities = calibration.probabilities(encoded.views[:1])
    unsure = calibration.unsure(probabilities)
    if not calibrated:
        calibration = replace(calibration, temperature=1.0, temperature_flips=1.0)
        probabilities = calibration.probabilities(encoded.views[:1])
    probabilities[unsure] = calibration.probabilities(encoded.views)[unsure]
    return probabilities.numpy()


def fit_calibration(
    training: Encoded, validation: dict[str, Encoded], n_classes: int, alpha: float, flips_below: float
) -> ClassifierCalibration:
    """Fit class Gaussians on training plots; temperatures on the first group of validation, novelty scores on all
    groups.
    """
    means, covariances, pooled_rows = [], [], []
    mu = training.mu.double().numpy()
    for k in range(n_classes):
        rows = mu[training.labels == k] if (training.labels == k).any() else mu
        means.append(rows.mean(0))
        pooled_rows.append(rows - rows.mean(0))
        covariances.append(shrunk_covariance(rows))
    pictures = training.pictures.double().numpy()
    first = next(iter(validation.values()))
    fitted = ClassifierCalibration(
        temperature=fit_temperature(first.views[0].numpy(), first.labels),
        temperature_flips=1.0,
        flips_below=flips_below,
        class_means=torch.from_numpy(np.stack(means)),
        class_covariances=torch.from_numpy(np.stack(covariances)),
        latent_precision=torch.from_numpy(np.linalg.inv(shrunk_covariance(np.concatenate(pooled_rows)))),
        picture_mean=torch.from_numpy(pictures.mean(0, keepdims=True)),
        picture_precision=torch.from_numpy(np.linalg.inv(shrunk_covariance(pictures))),
        centre=torch.zeros(3, dtype=torch.float64),
        spread=torch.ones(3, dtype=torch.float64),
        scores={},
        alpha=alpha,
    )
    unsure = fitted.unsure(fitted.probabilities(first.views[:1])).numpy()
    judged_by_flips = unsure if len(unsure) >= FEWEST_UNSURE else slice(None)
    fitted.temperature_flips = fit_temperature(
        first.views.mean(0).numpy()[judged_by_flips], first.labels[judged_by_flips]
    )
    return _with_scores(fitted, validation)


def _with_scores(fitted: ClassifierCalibration, validation: dict[str, Encoded]) -> ClassifierCalibration:
    distances = {name: fitted.distances(group.errors, group.mu, group.pictures) for name, group in validation.items()}
    logs = torch.log(torch.cat(list(distances.values())).clamp_min(1e-9))
    fitted.centre, fitted.spread = logs.mean(0), logs.std(0, correction=0).clamp_min(1e-3)
    fitted.scores = {name: sorted(fitted.novelty(each).tolist()) for name, each in distances.items()}
    return fitted
