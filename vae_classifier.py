"""VAEClassifier: a variational autoencoder of plots with a classifier head on its latent means, its loss, and loading one from a file.

The encoder sees the ink of a plot, its distance from white, in two ways: as a picture, through a residual network, and
column by column (where the trace runs, how far it spreads, how much ink there is), through a one-dimensional one, which is
nearly the series itself. Both are pooled to one vector and lead to the latent; the head names the class from its mean, the
decoder draws the plot from a sample of it. A calibration fitted on validation plots makes the probabilities honest and says
how far a picture lies from everything known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import CLASSES, ClassifierLossSettings, ClassifierModelSettings, InputError, from_dict
from data_loader_supervised import four_flips
from defect_maps import p_value
from engine import load_checkpoint, load_weights, reading_contents, resolve_device
from evaluation import mae, mse, ssim_map
from vae_model import LOGVAR_RANGE, Down, ResidualBlock, Up, conv_norm, fold_norms, kl_divergence

KIND = "vae_classifier"
STEM_STRIDE = 4
PROFILE_INK = 0.2  # grid lines, 0.1 dark, are no trace
PROFILE_FEATURES = 6
TEMPERATURES = np.geomspace(0.1, 10.0, 400)
FEWEST_UNSURE = 30
"""Validation plots on which the temperature of flips may be fitted; with fewer it is fitted on all."""


class ClassifierOutput(NamedTuple):
    """What ``VAEClassifier(images)`` returns; D = latent_dim, K = number of classes, R = reconstruction_size."""

    reconstruction: Tensor  # (B, 3, R, R) in [0, 1]
    mu: Tensor  # (B, D)
    logvar: Tensor  # (B, D)
    logits: Tensor  # (B, K)


# ---------------------------------------------------------------------------------------------- blocks


def ink_of(images: Tensor) -> Tensor:
    """Distance of each pixel from white, its darkest channel counting: (B, 3, H, W) -> (B, 1, H, W), both in [0, 1]."""
    red, green, blue = images.split(1, 1)
    return 1 - torch.minimum(torch.minimum(red, green), blue)  # four times as fast as amin over a last dimension of 3


def column_profile(images: Tensor) -> Tensor:
    """What each pixel column holds of the trace, (B, 3, H, W) in [0, 1] -> (B, 6, W).

    Mean height of the ink and its spread, highest and lowest trace pixel (heights in [-1, 1], 0 in empty columns), share of
    the column that is ink, and whether there is any.

    >>> plot = torch.ones(1, 3, 5, 2); plot[:, :, 0, 1] = 0
    >>> column_profile(plot)[0].T.tolist()
    [[0.0, 0.0, 0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 1.0, 1.0, 0.20000000298023224, 1.0]]
    """
    ink = F.relu(ink_of(images.float())[:, 0] - PROFILE_INK) / (1 - PROFILE_INK)
    height = torch.linspace(1, -1, ink.shape[1], device=ink.device).view(1, -1, 1)
    total = ink.sum(1)
    mass = total.clamp_min(1e-6)
    mean = (ink * height).sum(1) / mass
    spread = ((ink * height**2).sum(1) / mass - mean**2).clamp_min(0).sqrt()
    traced = ink > 0.5 * ink.amax(1, keepdim=True).clamp_min(1e-3)
    present = (total > 0.05).float()
    top = height.masked_fill(~traced, -1).amax(1)
    bottom = height.masked_fill(~traced, 1).amin(1)
    return torch.stack([mean, spread, top, bottom, total / ink.shape[1], torch.ones_like(mean)], 1) * present[:, None]


class ProfileBlock(nn.Module):
    """Two convolutions along time with a shortcut; halves the length."""

    def __init__(self, n_in: int, n_out: int, kernel: int = 5):
        super().__init__()
        self.first = nn.Sequential(nn.Conv1d(n_in, n_out, kernel, 2, kernel // 2, bias=False), nn.BatchNorm1d(n_out))
        self.second = nn.Sequential(nn.Conv1d(n_out, n_out, kernel, 1, kernel // 2, bias=False), nn.BatchNorm1d(n_out))
        self.shortcut = nn.Conv1d(n_in, n_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(F.silu(self.first(x)))
        return F.silu(self.shortcut(F.avg_pool1d(x, 2, ceil_mode=True)) + y)


def pooled(x: Tensor) -> Tensor:
    """Global mean and maximum of a map (B, C, ...) -> (B, 2C)."""
    flat = x.flatten(2)
    return torch.cat([flat.mean(2), flat.amax(2)], 1)


# ----------------------------------------------------------------------------------------------- model


class VAEClassifier(nn.Module):
    """The variational autoencoder with a classifier head on its latent means.

    Args:
        settings: architecture.
        n_classes: length of the head's output.

    Images are float32 RGB in [0, 1], (B, 3, S, S) with S a multiple of 32, prepared by ``prepare_image``; the
    reconstruction has its own fixed size. ``class_names``, ``calibration`` and ``run_settings`` come with a loaded model.
    """

    def __init__(self, settings: ClassifierModelSettings | None = None, n_classes: int = len(CLASSES)):
        super().__init__()
        self.settings = settings = settings or ClassifierModelSettings()
        self.class_names: list[str] = list(CLASSES) if n_classes == len(CLASSES) else [str(i) for i in range(n_classes)]
        self.calibration: ClassifierCalibration | None = None
        self.run_settings: dict = {}
        n_features = self._build_encoder()
        self.to_latent = nn.Linear(n_features, 2 * settings.latent_dim)
        self.head = nn.Sequential(nn.Dropout(settings.dropout), nn.Linear(settings.latent_dim, n_classes))
        self._build_decoder()

    def _build_encoder(self) -> int:
        s, channels = self.settings, 1 if self.settings.ink else 3
        stages: list[nn.Module] = [nn.PixelUnshuffle(STEM_STRIDE), conv_norm(channels * STEM_STRIDE**2, s.widths[0]), nn.SiLU(), ResidualBlock(s.widths[0])]
        for level, width in enumerate(s.widths):
            stages += [Down(s.widths[level - 1], width)] if level else []
            stages += [ResidualBlock(width) for _ in range(s.blocks - 1)]
        self.trunk = nn.Sequential(*stages)
        if not s.profile_channels:
            return 2 * s.widths[-1]
        c = s.profile_channels
        self.profile = nn.Sequential(ProfileBlock(PROFILE_FEATURES, c, 9), ProfileBlock(c, c), ProfileBlock(c, 2 * c), ProfileBlock(2 * c, 2 * c))
        return 2 * s.widths[-1] + 4 * c

    def _build_decoder(self) -> None:
        s, widths = self.settings, self.settings.decoder_widths
        stride = STEM_STRIDE * 2 ** (len(widths) - 1)
        if s.reconstruction_size % stride:
            raise InputError(f"reconstruction_size is {s.reconstruction_size}; expected a multiple of {stride}, as {len(widths)} decoder_widths ask for.")
        self.coarse = s.reconstruction_size // stride
        self.from_latent = nn.Linear(s.latent_dim, widths[0] * self.coarse**2)
        self.up = nn.Sequential(nn.SiLU(), *(Up(a, b) for a, b in pairwise(widths)))
        self.draw = nn.Sequential(nn.Conv2d(widths[-1], 3 * STEM_STRIDE**2, 3, padding=1), nn.PixelShuffle(STEM_STRIDE))
        self.register_buffer("mean_logit", torch.full((1, 3, s.reconstruction_size, s.reconstruction_size), 2.0))
        self.register_buffer("error_scale", torch.tensor([0.03, 0.1]))

    @torch.no_grad()
    def fit_reconstruction_scale(self, batches) -> None:
        """Learn from batches of training plots what the mean plot is and how wrong it is: its errors become 1."""
        targets = torch.cat([self.target(images).cpu() for images in batches])
        mean = targets.mean(0, keepdim=True)
        self.mean_logit.copy_(torch.logit(mean.clamp(0.003, 0.997)))
        self.error_scale.copy_(torch.stack([mse(mean.expand_as(targets), targets).mean(), mae(mean.expand_as(targets), targets).mean()]).clamp_min(1e-4))

    def target(self, images: Tensor) -> Tensor:
        """What the reconstruction of images (B, 3, S, S) should be: the same at its size, (B, 3, R, R)."""
        side = self.settings.reconstruction_size
        if images.shape[-1] == side == images.shape[-2]:
            return images
        if min(images.shape[-2:]) >= side:
            return F.adaptive_avg_pool2d(images, side)
        return F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(mu, logvar), each (B, D), of images (B, 3, S, S)."""
        features = pooled(self.trunk(ink_of(images) if self.settings.ink else images))
        if self.settings.profile_channels:
            features = torch.cat([features, pooled(self.profile(column_profile(images)))], 1)
        mu, logvar = self.to_latent(features).float().chunk(2, 1)
        return mu, logvar.clamp(*LOGVAR_RANGE)

    def decode(self, z: Tensor) -> Tensor:
        """Plots (B, 3, R, R) in [0, 1] from latent vectors (B, D)."""
        x = self.from_latent(z).view(len(z), -1, self.coarse, self.coarse)
        return torch.sigmoid(self.draw(self.up(x)).float() + self.mean_logit)

    def sample(self, mu: Tensor, logvar: Tensor) -> Tensor:
        """The reparameterised sample in training (Kingma & Welling 2014, section 2.4), the mean otherwise."""
        return mu + torch.exp(0.5 * logvar) * torch.randn_like(mu) if self.training else mu

    def forward(self, images: Tensor) -> ClassifierOutput:
        mu, logvar = self.encode(images)
        return ClassifierOutput(self.decode(self.sample(mu, logvar)), mu, logvar, self.head(mu))


# ------------------------------------------------------------------------------------------------ loss


def reconstruction_error(reconstruction: Tensor, target: Tensor, error_scale: Tensor, ssim_share: float) -> Tensor:
    """Error of each reconstruction, (B, 3, R, R) twice in [0, 1] -> (B,): 0 when equal, about 1 for the mean plot.

    Squared and absolute error, each divided by that of the mean training plot (``error_scale``), and 1 - SSIM of the
    brightness. Independent of the number of pixels, so that one weight serves every image size.
    """
    gap = reconstruction - target  # evaluation.mse and mae would each copy a channels-last batch
    error = 0.5 * (gap.square().mean((1, 2, 3)) / error_scale[0] + gap.abs().mean((1, 2, 3)) / error_scale[1])
    if ssim_share <= 0:
        return error
    likeness = ssim_map(reconstruction.mean(1, keepdim=True), target.mean(1, keepdim=True), data_range=1.0).flatten(1).mean(1)
    return (1 - ssim_share) * error + ssim_share * (1 - likeness)


def smoothed_targets(labels: Tensor, n_classes: int, label_smoothing: float) -> Tensor:
    """Class indices (B,) -> probabilities (B, K) with a share spread over all classes (Szegedy et al. 2016, eq. 7)."""
    return F.one_hot(labels, n_classes).float() * (1 - label_smoothing) + label_smoothing / n_classes


class ClassifierLoss:
    """Named loss terms: ``reconstruction``, ``kl``, ``classification`` and ``total``, their weighted sum."""

    def __init__(self, settings: ClassifierLossSettings):
        self.settings = settings

    def __call__(self, model: VAEClassifier, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Terms of a batch: images (B, 3, S, S) in [0, 1], labels (B,). In training, plots may be mixed and smoothed labels
        are the target, and only a share of the batch is reconstructed; in evaluation all of it, against true labels."""
        return self.terms(model, images, labels)[0]

    def terms(self, model: VAEClassifier, images: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The terms, and the logits (B, K) they were computed from."""
        s = self.settings
        targets = smoothed_targets(labels, model.head[-1].out_features, s.label_smoothing if model.training else 0.0)
        if model.training and s.mixup_alpha > 0:
            images, targets = mixed(images, targets, s.mixup_alpha)
        mu, logvar = model.encode(images)
        logits = model.head(mu).float()
        n_drawn = max(1, math.ceil(s.reconstruction_share * len(images))) if model.training else len(images)
        reconstruction = model.decode(model.sample(mu[:n_drawn], logvar[:n_drawn]))
        found = {
            "reconstruction": reconstruction_error(reconstruction, model.target(images[:n_drawn]), model.error_scale, s.ssim_share).mean(),
            "kl": kl_divergence(mu, logvar),
            "classification": F.cross_entropy(logits, targets),
        }
        weights = {"reconstruction": s.reconstruction_weight, "kl": s.kl_weight, "classification": s.class_weight}
        found["total"] = sum(weights[name] * term for name, term in found.items())
        return found, logits


def mixed(images: Tensor, targets: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Every plot blended with another of the batch, and its label likewise (Zhang et al. 2018, mixup, eq. 1)."""
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    order = torch.randperm(len(images)).to(images.device)
    return share * images + (1 - share) * images[order], share * targets + (1 - share) * targets[order]


# ------------------------------------------------------------------------------ probabilities, calibrated


def view_log_probabilities(model: VAEClassifier, images: Tensor, logits: Tensor) -> Tensor:
    """Uncalibrated log-probabilities of images (B, 3, S, S) and of their three flips, (4, B, K).

    Args:
        logits: (B, K) of the images as they are, which come first.
    """
    flipped = [model.head(model.encode(view)[0]) for view in four_flips(images)[1:]]
    return torch.stack([F.log_softmax(each.float(), 1) for each in (logits, *flipped)])


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

    A plot of a series has one stroke a column in one colour on white; photographs, noise, text and blank pages have not.
    """
    images = images.float()
    ink = ink_of(images)[:, 0].contiguous()
    dark = ink > PROFILE_INK
    strokes = torch.stack([(dark[:, 1:] > dark[:, :-1]).sum(1).float().mean(1), (dark[:, :, 1:] > dark[:, :, :-1]).sum(2).float().mean(1)], 1)
    steps = torch.stack([(ink[:, 1:] - ink[:, :-1]).abs().mean((1, 2)), (ink[:, :, 1:] - ink[:, :, :-1]).abs().mean((1, 2))], 1)
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
        temperature, temperature_flips: divide log-probabilities of the plot alone, of the mean of its four flips.
        flips_below: plots whose class, seen once, is less sure than this are averaged over four flips.
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

    def probabilities(self, views: Tensor) -> Tensor:
        """Calibrated probabilities (n, K) from log-probabilities of views (1, n, K) or (4, n, K)."""
        return F.softmax(views.double().mean(0) / (self.temperature if len(views) == 1 else self.temperature_flips), 1)

    def unsure(self, probabilities: Tensor, flips_below: float | None = None) -> Tensor:
        """Indices of the plots to look at in four flips, from probabilities (n, K) of one view; None asks as calibrated."""
        return torch.nonzero(probabilities.amax(1) <= (self.flips_below if flips_below is None else flips_below)).flatten()

    def distances(self, errors: Tensor, mu: Tensor, pictures: Tensor) -> Tensor:
        """Reconstruction error, latent distance and picture distance, (n, 3) on the CPU, of errors (n,), mu (n, D) and statistics (n, P)."""
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
        """Whether there are enough validation plots to call anything none of these at the rate alpha."""
        return all(1 / (len(group) + 1) <= self.alpha for group in self.scores.values())


def novelty_distances(model: VAEClassifier, calibration: ClassifierCalibration, images: Tensor, mu: Tensor, reconstruction: Tensor) -> Tensor:
    """Reconstruction error, latent distance and picture distance of images (B, 3, S, S), (B, 3) on the CPU."""
    error = reconstruction_error(reconstruction, model.target(images), model.error_scale, 0.0)
    return calibration.distances(error, mu, picture_statistics(images))


class Encoded(NamedTuple):
    """Everything calibration needs of a set of labelled plots."""

    mu: Tensor  # (n, D)
    views: Tensor  # (4, n, K) log-probabilities; (1, n, K) without flips
    pictures: Tensor  # (n, P)
    errors: Tensor  # (n,) reconstruction errors
    labels: np.ndarray  # (n,)


@torch.inference_mode()
def encode_plots(model: VAEClassifier, batches, labels: Sequence[int], flips: bool = True) -> Encoded:
    """Run the model, in evaluation mode, over batches of images (B, 3, S, S) on its device; without flips there is one view."""
    model.eval()
    parts: list[tuple[Tensor, ...]] = []
    for images in batches:
        mu, _ = model.encode(images)
        logits = model.head(mu)
        views = view_log_probabilities(model, images, logits) if flips else F.log_softmax(logits.float(), 1)[None]
        error = reconstruction_error(model.decode(mu), model.target(images), model.error_scale, 0.0)
        parts.append((mu.cpu(), views.transpose(0, 1).cpu(), picture_statistics(images).cpu(), error.cpu()))
    mu, views, pictures, errors = (torch.cat(column) for column in zip(*parts, strict=True))
    return Encoded(mu, views.transpose(0, 1), pictures, errors, np.asarray(labels))


def fit_calibration(training: Encoded, validation: dict[str, Encoded], n_classes: int, alpha: float, flips_below: float) -> ClassifierCalibration:
    """Fit class Gaussians on training plots; temperatures on the first group of validation, novelty scores on all groups."""
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
    fitted.temperature_flips = fit_temperature(first.views.mean(0).numpy()[judged_by_flips], first.labels[judged_by_flips])
    return _with_scores(fitted, validation)


def _with_scores(fitted: ClassifierCalibration, validation: dict[str, Encoded]) -> ClassifierCalibration:
    distances = {name: fitted.distances(group.errors, group.mu, group.pictures) for name, group in validation.items()}
    logs = torch.log(torch.cat(list(distances.values())).clamp_min(1e-9))
    fitted.centre, fitted.spread = logs.mean(0), logs.std(0, correction=0).clamp_min(1e-3)
    fitted.scores = {name: sorted(fitted.novelty(each).tolist()) for name, each in distances.items()}
    return fitted


# --------------------------------------------------------------------------------------------- judging


class Judgement(NamedTuple):
    """What a calibrated model says of a batch."""

    probabilities: np.ndarray  # float64 (B, K), rows sum to 1
    p_values: np.ndarray  # float64 (B,)
    reconstruction: np.ndarray  # float32 (B, 3, R, R) in [0, 1]
    mu: np.ndarray  # float32 (B, D)


@torch.inference_mode()
def judge(model: VAEClassifier, images: Tensor, flips_below: float | None = None) -> Judgement:
    """Calibrated probabilities, p-values and reconstructions of images (B, 3, S, S) on the model's device.

    Args:
        flips_below: average over four flips where the class is less sure than this; None does as the calibration says.
    """
    model.eval()
    calibration = model.calibration
    mu, _ = model.encode(images)
    logits = model.head(mu)
    probabilities = calibration.probabilities(F.log_softmax(logits.float(), 1)[None])
    unsure = calibration.unsure(probabilities, flips_below)
    if len(unsure):
        probabilities[unsure] = calibration.probabilities(view_log_probabilities(model, images[unsure], logits[unsure]))
    reconstruction = model.decode(mu)
    distances = novelty_distances(model, calibration, images, mu, reconstruction)
    p_values = calibration.p_values(calibration.novelty(distances))
    return Judgement(probabilities.cpu().numpy(), p_values, reconstruction.float().cpu().numpy(), mu.cpu().numpy())


def calibrated_probabilities(encoded: Encoded, calibration: ClassifierCalibration, calibrated: bool = True) -> np.ndarray:
    """Probabilities (n, K) of plots already encoded, as ``judge`` gives them; or what the same views say before calibration."""
    probabilities = calibration.probabilities(encoded.views[:1])
    unsure = calibration.unsure(probabilities)
    if not calibrated:
        calibration = replace(calibration, temperature=1.0, temperature_flips=1.0)
        probabilities = calibration.probabilities(encoded.views[:1])
    probabilities[unsure] = calibration.probabilities(encoded.views)[unsure]
    return probabilities.numpy()


# ---------------------------------------------------------------------------------------- latent space


@torch.inference_mode()
def generate_class(model: VAEClassifier, class_name: str, n: int, seed: int = 0) -> Tensor:
    """Plots (n, 3, R, R) in [0, 1] drawn from the Gaussian of a class's latent means.

    Raises:
        InputError: there is no such class.
    """
    if class_name not in model.class_names:
        raise InputError(f"There is no class {class_name!r}; expected one of {', '.join(model.class_names)}.")
    k, calibration = model.class_names.index(class_name), model.calibration
    factor = torch.linalg.cholesky(calibration.class_covariances[k])
    noise = torch.randn(n, len(factor), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    z = calibration.class_means[k] + noise @ factor.T
    return model.eval().decode(z.float().to(model.mean_logit.device)).cpu()


@torch.inference_mode()
def interpolate(model: VAEClassifier, first: Tensor, second: Tensor, n: int) -> tuple[Tensor, np.ndarray]:
    """Plots (n, 3, R, R) on the straight way between the latents of two plots (3, S, S), and their probabilities (n, K)."""
    mu, _ = model.eval().encode(torch.stack([first, second]).to(model.mean_logit.device))
    share = torch.linspace(0, 1, n, device=mu.device)[:, None]
    z = (1 - share) * mu[0] + share * mu[1]
    temperature = model.calibration.temperature if model.calibration else 1.0
    return model.decode(z).cpu(), F.softmax(model.head(z).double() / temperature, 1).cpu().numpy()


def project_2d(mu: np.ndarray, method: str, seed: int = 0) -> np.ndarray:
    """Latent means (n, D) in two dimensions, (n, 2), by "pca" or "tsne" (van der Maaten & Hinton 2008).

    Raises:
        InputError: fewer than 3 plots.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if len(mu) < 3:
        raise InputError(f"A scatter of {len(mu)} plots shows nothing; expected at least 3.")
    if method == "pca":
        return PCA(2, random_state=seed).fit_transform(mu)
    return TSNE(2, perplexity=min(30.0, (len(mu) - 1) / 3), init="pca", random_state=seed).fit_transform(mu)


def tiled(rows: Sequence[Tensor], gap_px: int = 4) -> np.ndarray:
    """Rows of pictures, each (n, 3, H, W) in [0, 1], as one uint8 picture with grey gaps."""
    cells = [[F.pad(picture.float().cpu(), [gap_px] * 4, value=0.6) for picture in row] for row in rows]
    sheet = torch.cat([torch.cat(row, 2) for row in cells], 1)
    return (sheet.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


# --------------------------------------------------------------------------------------- from a file


def checkpoint_contents(model: VAEClassifier, calibration: ClassifierCalibration, settings: dict, class_names: Sequence[str], epoch: int) -> dict:
    """All that inference needs, for ``engine.save_checkpoint``."""
    return {
        "settings": settings,
        "value_range": [0.0, 1.0],
        "image_size": settings["image_size"],
        "class_names": list(class_names),
        "epoch": epoch,
        "calibration": dict(calibration.__dict__),
        "model": model.state_dict(),
    }


def load_vae_classifier(path: Path | str, device: torch.device | str = "cpu", fuse: bool = True) -> tuple[VAEClassifier, list[str]]:
    """(model in evaluation mode, class names) from a checkpoint of train_vae_classifier.py.

    ``device`` may also be "auto". The model carries its calibration and the settings of its training run. With ``fuse``
    it is a fifth faster and can neither be trained nor saved again.

    Raises:
        InputError: the file cannot be read, is damaged or incomplete, or holds another kind of model.
    """
    contents = load_checkpoint(path, KIND, ("settings", "class_names", "calibration", "model"))
    with reading_contents(path):
        settings, names = contents["settings"], [str(name) for name in contents["class_names"]]
        model = VAEClassifier(from_dict(ClassifierModelSettings, settings), len(names))
        calibration = ClassifierCalibration(**contents["calibration"])
        image_size, crop_axes = int(settings["image_size"]), bool(settings["crop_axes"])
    load_weights(model, contents["model"], path)
    model.class_names, model.calibration = names, calibration
    model.run_settings = {**settings, "image_size": image_size, "crop_axes": crop_axes}
    where = resolve_device(device) if device in ("auto", "cuda", "cpu") else torch.device(device)
    return (fold_norms(model) if fuse else model).eval().to(where, memory_format=torch.channels_last), names
