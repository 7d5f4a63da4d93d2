"""VAEClassifier: a variational autoencoder of plots with a classifier head on its latent means, its loss, and loading
one from a file.

The encoder sees the ink of a plot, its distance from white, in two ways: column by column (where the trace runs, how
far it spreads, how much ink there is), which is nearly the series itself, through a one-dimensional residual network,
and as a picture of few rows, through a small two-dimensional one. Both are pooled to one vector and lead to the latent;
the head names the class from its mean. The decoder draws the plot from a sample of it, stroke by stroke, and from a
second latent that holds the details of each column, such as its noise, which no short vector could.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoints import load_checkpoint, load_weights, reading_contents
from config import (
    CLASSES,
    ClassifierLossSettings,
    ClassifierModelSettings,
    SupervisedDataSettings,
    from_dict,
)
from data_loader import assert_images, flip_axes
from engine import resolve_device
from evaluation import ssim_map
from layers import LOGVAR_RANGE, Down, conv_norm, fold_layers, kl_divergence, reparameterise
from plot_calibration import ClassifierCalibration, Encoded, picture_statistics
from plot_strokes import PROFILE_FEATURES, DetailEncoder, Gaussian, PlotDecoder, column_profile, ink_of

KIND = "vae_classifier"
BEST, LAST = Path("vae_models") / "best_vae_classifier.pth", Path("vae_models") / "last_vae_classifier.pth"
"""Checkpoints that training leaves under its output folder: for inference, and to go on from."""
PICTURE_ROWS = 32
"""Heights that the picture branch tells apart; the exact ones are in the profile."""
PROFILE_FACTORS = (1, 1, 2, 2)
"""Channels of the branch along the columns at a half, a quarter ... of their number, in units of ``profile_channels``.
"""


class ClassifierOutput(NamedTuple):
    """What ``VAEClassifier(images)`` returns; D = latent_dim, K = number of classes, R = reconstruction_size."""

    reconstruction: Tensor  # (B, 3, R, R) in [0, 1]
    mu: Tensor  # (B, D)
    logvar: Tensor  # (B, D)
    logits: Tensor  # (B, K)


# ---------------------------------------------------------------------------------------------- blocks


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
    reconstruction has its own fixed size. ``class_names``, ``calibration`` and ``run_settings`` come with a loaded
    model.
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
        self.decoder = PlotDecoder(
            settings.latent_dim, settings.decoder_channels, settings.detail_channels, settings.reconstruction_size
        )
        self.to_detail = DetailEncoder(settings.decoder_channels, settings.detail_channels)
        self.register_buffer("error_scale", torch.tensor([0.03, 0.1, 0.1]))

    def _build_encoder(self) -> int:
        """The branches that the settings ask for; returns how many pooled features they give."""
        s, n_features = self.settings, 0
        if s.profile_channels:
            widths = [PROFILE_FEATURES, *(factor * s.profile_channels for factor in PROFILE_FACTORS)]
            self.profile = nn.ModuleList(
                ProfileBlock(n_in, n_out, 5 if level else 9) for level, (n_in, n_out) in enumerate(pairwise(widths))
            )
            n_features += 2 * sum(widths[1:])
        if s.widths:
            stages: list[nn.Module] = [
                nn.AdaptiveAvgPool2d((PICTURE_ROWS, None)),
                conv_norm(1 if s.ink else 3, s.widths[0], 5, (1, 2)),
                nn.SiLU(),
            ]
            stages += [Down(n_in, n_out) for n_in, n_out in pairwise(s.widths)]
            self.trunk = nn.Sequential(*stages)
            n_features += 2 * s.widths[-1]
        return n_features

    @property
    def flips(self) -> list[tuple[int, ...]]:
        """Dimensions of images (B, 3, S, S) to flip for each further view: those that training flipped at random."""
        return flip_axes(*(self.run_settings.get(name, True) for name in ("flip_time", "flip_value")))

    @torch.no_grad()
    def fit_reconstruction_scale(self, batches) -> None:
        """Learn from batches of training plots how wrong the mean plot is (its errors become 1),
        and their two colours."""
        targets = torch.cat([self.target(images).cpu() for images in batches])
        mean = targets.mean(0, keepdim=True)
        self.error_scale.copy_(error_parts(mean.expand_as(targets), targets).mean(1).clamp_min(1e-4))
        self.decoder.set_colours(targets)

    def target(self, images: Tensor) -> Tensor:
        """What the reconstruction of images (B, 3, S, S) should be: the same at its size, (B, 3, R, R)."""
        side = self.settings.reconstruction_size
        if images.shape[-1] == side == images.shape[-2]:
            return images
        if min(images.shape[-2:]) >= side:
            return F.adaptive_avg_pool2d(images, side)
        return F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)

    def encode(self, images: Tensor, profile: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(mu, logvar), each (B, D), of images (B, 3, S, S); ``profile`` is their ``column_profile``, where already
        computed.
        """
        features: list[Tensor] = []
        if self.settings.profile_channels:
            level = column_profile(images) if profile is None else profile
            for block in self.profile:
                level = block(level)
                features.append(pooled(level))
        if self.settings.widths:
            features.append(pooled(self.trunk(ink_of(images) if self.settings.ink else images)))
        mu, logvar = self.to_latent(torch.cat(features, 1)).float().chunk(2, 1)
        return mu, logvar.clamp(*LOGVAR_RANGE)

    def encode_detail(self, images: Tensor, profile: Tensor | None = None) -> Gaussian:
        """What the columns of images (B, 3, S, S) hold beyond the latent vector: mean and log-variance,
        each (B, d, R)."""
        target = self.target(images)
        return self.to_detail(column_profile(target) if profile is None or target is not images else profile)

    def decode(self, z: Tensor, detail: Tensor | None = None) -> Tensor:
        """Plots (B, 3, R, R) in [0, 1] from latent vectors (B, D) and details (B, d, R); without, the details expected
        of z.
        """
        columns = self.decoder.columns(z)
        return self.decoder.draw(columns, self.decoder.prior_of(columns).mean if detail is None else detail)

    def reconstruct(self, images: Tensor, mu: Tensor, profile: Tensor | None = None) -> Tensor:
        """Plots (B, 3, R, R) from the means of both latents of images (B, 3, S, S)."""
        return self.decode(mu, self.encode_detail(images, profile).mean)

    def forward(self, images: Tensor) -> ClassifierOutput:
        """What the model says of plots (B, 3, H, W).

        Raises:
            ValueError: another type, shape or value range.
        """
        profile = column_profile(assert_images(images))
        mu, logvar = self.encode(images, profile)
        detail = reparameterise(*self.encode_detail(images, profile), self.training)
        z = reparameterise(mu, logvar, self.training)
        return ClassifierOutput(self.decode(z, detail), mu, logvar, self.head(mu))


# ------------------------------------------------------------------------------------------------ loss


def error_parts(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Squared error, absolute error and earth mover's distance along columns, (B, 3, R, R) twice in [0, 1] -> (3, B).

    The last is the mean over columns of the one-dimensional Wasserstein distance between how the ink is spread over
    heights, in units of the side (Rubner et al. 2000); ink that one has more than the other comes half from above, half
    from below. A thin line a few pixels off is as wrong by the first two as no line at all; the last draws it near from
    any distance.
    """
    gap = reconstruction - target
    above = gap.mean(1).cumsum(1)
    below = above[:, -1:] - above
    moved = 0.5 * (above.abs() + below.abs()).mean((1, 2)) / gap.shape[-1]
    return torch.stack([gap.square().mean((1, 2, 3)), gap.abs().mean((1, 2, 3)), moved])


def reconstruction_error(reconstruction: Tensor, target: Tensor, error_scale: Tensor, ssim_share: float) -> Tensor:
    """Error of each reconstruction, (B, 3, R, R) twice in [0, 1] -> (B,): 0 when equal, about 1 for the mean plot.

    ``error_parts``, each divided by that of the mean training plot (``error_scale``), and 1 - SSIM of the brightness.
    Independent of the number of pixels, so that one weight serves every image size.
    """
    error = (error_parts(reconstruction, target) / error_scale[:, None]).mean(0)
    if ssim_share <= 0:
        return error
    likeness = (
        ssim_map(reconstruction.mean(1, keepdim=True), target.mean(1, keepdim=True), data_range=1.0).flatten(1).mean(1)
    )
    return (1 - ssim_share) * error + ssim_share * (1 - likeness)


def smoothed_targets(labels: Tensor, n_classes: int, label_smoothing: float) -> Tensor:
    """Class indices (B,) -> probabilities (B, K) with a share spread over all classes (Szegedy et al. 2016, eq. 7)."""
    return F.one_hot(labels, n_classes).float() * (1 - label_smoothing) + label_smoothing / n_classes


class ClassifierLoss:
    """Named loss terms: ``reconstruction``, ``kl``, ``classification`` and ``total``, their weighted sum."""

    def __init__(self, settings: ClassifierLossSettings):
        self.settings = settings

    def __call__(self, model: VAEClassifier, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Terms of a batch: images (B, 3, S, S) in [0, 1], labels (B,). In training, plots may be mixed and smoothed
        labels are the target, and only a share of the batch is reconstructed; in evaluation all of it, against true
        labels.
        """
        return self.terms(model, images, labels)[0]

    def terms(self, model: VAEClassifier, images: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The terms, and the logits (B, K) they were computed from."""
        s = self.settings
        targets = smoothed_targets(labels, model.head[-1].out_features, s.label_smoothing if model.training else 0.0)
        if model.training and s.mixup_alpha > 0:
            images, targets = mixed(images, targets, s.mixup_alpha)
        profile = column_profile(images)
        mu, logvar = model.encode(images, profile)
        logits = model.head(mu).float()
        n_drawn = max(1, math.ceil(s.reconstruction_share * len(images))) if model.training else len(images)
        seen = images[:n_drawn]
        drawn, detail = model.target(seen), model.encode_detail(seen, profile[:n_drawn])
        columns = model.decoder.columns(reparameterise(mu[:n_drawn], logvar[:n_drawn], model.training))
        expected = model.decoder.prior_of(columns)
        known = reparameterise(*detail, model.training)
        if model.training:
            known = torch.where(torch.rand(n_drawn, 1, 1, device=known.device) < s.detail_dropout, expected.mean, known)
        reconstruction = model.decoder.draw(columns, known)
        detail_nats = kl_divergence(*detail, expected) * detail.mean[0].numel()
        found = {
            "reconstruction": reconstruction_error(reconstruction, drawn, model.error_scale, s.ssim_share).mean(),
            "kl": (kl_divergence(mu, logvar) * mu.shape[1] + detail_nats) / drawn[0, 0].numel(),
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


# --------------------------------------------------------------------------------------------- judging


def view_log_probabilities(
    model: VAEClassifier, images: Tensor, logits: Tensor, flips: Sequence[tuple[int, ...]]
) -> Tensor:
    """Uncalibrated log-probabilities of images (B, 3, S, S) and of their flips, (1 + flips, B, K).

    Args:
        logits: (B, K) of the images as they are, which come first.
        flips: dimensions to flip for each further view.
    """
    if flips:
        flipped = torch.cat([images.flip(axes) for axes in flips])
        logits = torch.cat([logits, model.head(model.encode(flipped)[0])])
    return F.log_softmax(logits.float(), 1).view(1 + len(flips), len(images), -1)


def novelty_distances(
    model: VAEClassifier, calibration: ClassifierCalibration, images: Tensor, mu: Tensor, reconstruction: Tensor
) -> Tensor:
    """Reconstruction error, latent distance and picture distance of images (B, 3, S, S), (B, 3) on the CPU."""
    error = reconstruction_error(reconstruction, model.target(images), model.error_scale, 0.0)
    return calibration.distances(error, mu, picture_statistics(images))


@torch.inference_mode()
def encode_plots(model: VAEClassifier, batches, labels: Sequence[int], flips: bool = True) -> Encoded:
    """Run the model, in evaluation mode, over batches of images (B, 3, S, S) on its device; without flips there is one
    view.
    """
    model.eval()
    parts: list[tuple[Tensor, ...]] = []
    for images in batches:
        profile = column_profile(images)
        mu, _ = model.encode(images, profile)
        logits = model.head(mu)
        views = view_log_probabilities(model, images, logits, model.flips if flips else ())
        error = reconstruction_error(
            model.reconstruct(images, mu, profile), model.target(images), model.error_scale, 0.0
        )
        parts.append((mu.cpu(), views.transpose(0, 1).cpu(), picture_statistics(images).cpu(), error.cpu()))
    mu, views, pictures, errors = (torch.cat(column) for column in zip(*parts, strict=True))
    return Encoded(mu, views.transpose(0, 1), pictures, errors, np.asarray(labels))


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
        flips_below: average over the flips of training where the class is less sure than this; None does as the
            calibration says.
    """
    model.eval()
    calibration, profile = model.calibration, column_profile(images)
    mu, _ = model.encode(images, profile)
    logits = model.head(mu)
    probabilities = calibration.probabilities(F.log_softmax(logits.float(), 1)[None])
    unsure = calibration.unsure(probabilities, flips_below)
    if len(unsure) and model.flips:
        views = view_log_probabilities(model, images[unsure], logits[unsure], model.flips)
        probabilities[unsure] = calibration.probabilities(views)
    reconstruction = model.reconstruct(images, mu, profile)
    distances = novelty_distances(model, calibration, images, mu, reconstruction)
    p_values = calibration.p_values(calibration.novelty(distances))
    return Judgement(probabilities.cpu().numpy(), p_values, reconstruction.float().cpu().numpy(), mu.cpu().numpy())


# --------------------------------------------------------------------------------------- from a file


def checkpoint_contents(
    model: VAEClassifier, calibration: ClassifierCalibration, settings: dict, class_names: Sequence[str], epoch: int
) -> dict:
    """All that inference needs, for ``checkpoints.save_checkpoint``."""
    return {
        "settings": settings,
        "value_range": [0.0, 1.0],
        "image_size": settings["image_size"],
        "class_names": list(class_names),
        "epoch": epoch,
        "calibration": dict(calibration.__dict__),
        "model": model.state_dict(),
    }


def load_vae_classifier(
    path: Path | str, device: torch.device | str = "cpu", fuse: bool = True
) -> tuple[VAEClassifier, list[str]]:
    """(model in evaluation mode, class names) from a checkpoint of train_vae_classifier.py.

    ``device`` is as ``engine.resolve_device`` takes it. The model carries its calibration and the settings of its
    training run. With ``fuse`` it is a fifth faster and can neither be trained nor saved again.

    Raises:
        InputError: the file cannot be read, is damaged or incomplete, or holds another kind of model.
    """
    contents = load_checkpoint(path, KIND, ("settings", "class_names", "calibration", "model"))
    with reading_contents(path):
        settings, names = dict(contents["settings"]), [str(name) for name in contents["class_names"]]
        model = VAEClassifier(from_dict(ClassifierModelSettings, settings), len(names))
        calibration = ClassifierCalibration.from_dict(contents["calibration"], len(names), model.settings.latent_dim)
        from_dict(SupervisedDataSettings, {name: settings[name] for name in ("image_size", "crop_axes")})
    load_weights(model, contents["model"], path)
    model.class_names, model.calibration = names, calibration
    model.run_settings = settings
    if fuse:
        fold_layers(model)
    return model.eval().to(resolve_device(device), memory_format=torch.channels_last), names
