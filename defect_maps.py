"""Where and how bad: maps of defects, their morphology, the image score, and a calibration fitted on good images.

A map says of every pixel how far the image is from what the model expects there. Raw maps of several kinds
are smoothed, brought to one scale by held-out good images, and fused by the shares of ``MapSettings``. The image
score comes, by default, from the features alone: from how far they, and their deviations from what the VAE expects, lie
from any seen on training images. It says how unusual an image is, the fused map says where.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoints import finite, load_checkpoint, reading_contents
from config import MapSettings, TrainSettings, UsageError, as_dict, from_dict
from conformal import conformal_threshold, p_value, sober_threshold
from coresets import nearest_squares, rows_of
from data_loader import assert_images, flip_axes
from engine import Runtime, make_runtime
from evaluation import best_pixel_threshold, count_pixels, ssim_map
from layers import fold_layers
from perceptual_loss import PerceptualLoss, weights_here
from tiles import Blend, tile_corners, window
from vae_model import (
    KIND,
    DetailOutput,
    DetailVAE,
    assert_sides,
    detail_vae_from_checkpoint,
    resized,
    tap_roots,
)

TILES_AT_ONCE = 8
SCALE_QUANTILES = (0.5, 0.999)
"""Quantiles of a map's pixels on good images that become 0 and 1."""
USUAL_FALSE_POSITIVES = 0.001
"""Share of good pixels above the pixel threshold where no share is given and no defect is drawn."""
RING_PX = 8
"""Width of the rings along the border of an image, in which a map may be larger than further in."""
N_RINGS = 4
"""Number of these rings."""
RING_QUANTILE = 0.99
"""Quantile of a ring, over that further in, that says by how much."""
LEAST_INTERIOR = 0.1
"""Share of the pixels that must lie further in than all rings."""
OUTLINE_FLOOR = 0.02
"""Added to the head's probability of a defect: what is far below it has no shape."""
SHAPED_ABOVE = 0.25
"""Value of a fused map (1: the top 0.1 % of good pixels) above which the head shapes it: where there is little to see,
there is little to outline.
"""
DISC_PLACES = 16
"""Diameter of the outline's disc, in blocks of pixels, from which on blocks are taken for pixels."""
LINK_STRIDE = 4
"""Pixels a place of the lines along which faint evidence is linked."""
N_DIRECTIONS = 8
"""Directions of these lines."""


# ------------------------------------------------------------------------------------------------ maps


MAPS = ("pixel", "ssim", "perceptual", "feature", "deviation", "likelihood", "nearest", "bank")
FEATURE_MAPS = {"feature", "deviation", "likelihood", "nearest", "bank"}
"""Maps that need no reconstruction in pixels."""


def raw_maps(
    names: Sequence[str], model: DetailVAE, images: Tensor, output: DetailOutput, perceptual=None
) -> dict[str, Tensor]:
    """Maps by name, each (B, 1, H, W) and at least 0.

    Args:
        names: of ``MAPS``, which are ``MapSettings.map_*`` without the prefix, or "segmentation", the probability of a
            defect.
        images: (B, 3, H, W) in [0, 1].
        output: what the model said of them; painted, where any name is not in ``FEATURE_MAPS``.
        perceptual: a ``PerceptualLoss``, needed only for "perceptual".
    """
    deviation = output.deviation if {"deviation", "likelihood", "nearest"}.intersection(names) else None
    whitened = decorrelated(deviation, model) if {"likelihood", "nearest"}.intersection(names) else None
    makers: dict[str, Callable[[], Tensor]] = {
        "pixel": lambda: (output.vae.reconstruction - images).abs().mean(1, keepdim=True),
        "ssim": lambda: (1 - ssim_map(output.vae.reconstruction, images, data_range=1.0)).clamp_min(0),
        "perceptual": lambda: perceptual.distance_map(output.vae.reconstruction, images),
        "segmentation": lambda: torch.sigmoid(output.defect_logits),
        "feature": lambda: resized(feature_error(output), images),
        "deviation": lambda: resized(feature_likelihood(deviation, model.tap_channels), images),
        "likelihood": lambda: resized(feature_likelihood(whitened, model.tap_channels), images),
        "nearest": lambda: resized(nearest_distance(whitened, model.prototypes), images),
        "bank": lambda: resized(nearest_distance(output.features, model.bank), images),
    }
    return {name: makers[name]().float() for name in names}


def map_shares(settings: MapSettings, has_features: bool) -> dict[str, float]:
    """Share of each map in the fused one, of those above 0; without a backbone, of those that need none.

    Raises:
        UsageError: there is none.
    """
    shares = _shares(settings, "map_", MAPS, has_features)
    if not shares:
        raise UsageError(
            f"No map {'' if has_features else 'that needs no backbone '}has a weight above 0; expected --map-pixel 1, "
            "for example."
        )
    return shares


def score_shares(settings: MapSettings, has_features: bool) -> dict[str, float]:
    """Share of each map in the one that the image score is taken from: the fused one where none is asked for or
    possible.
    """
    return _shares(settings, "score_", ("deviation", "likelihood", "nearest", "bank"), has_features) or map_shares(
        settings, has_features
    )


def _shares(settings: MapSettings, prefix: str, names: Sequence[str], has_features: bool) -> dict[str, float]:
    shares = {name: getattr(settings, prefix + name) for name in names if has_features or name not in FEATURE_MAPS}
    total = sum(shares.values())
    return {name: share / total for name, share in shares.items() if share > 0}


def feature_error(output: DetailOutput) -> Tensor:
    """Mean over channels of the squared error of standardised features, (B, 1, H/8, W/8)."""
    return ((output.features - output.feature_mu) ** 2).mean(1, keepdim=True)


def decorrelated(deviation: Tensor, model: DetailVAE) -> Tensor:
    """Deviations (B, C, h, w) decorrelated, of the same shape; see ``DetailVAE.fit_whitening``."""
    return F.conv2d(deviation, model.whitening[:, :, None, None]).float()


def feature_likelihood(deviation: Tensor, tap_channels: Sequence[int]) -> Tensor:
    """Root of the mean Gaussian exponent of deviations (B, C, h, w), decorrelated or not, within each tap, averaged
    over taps, (B, 1, h, w).

    About 1 where features deviate as they do on good images; every tap counts alike, however many channels it has.
    """
    return tap_roots(deviation, tap_channels).mean(1, keepdim=True)


def nearest_distance(maps: Tensor, prototypes: Tensor) -> Tensor:
    """Distance of maps (B, C, h, w) to the nearest prototype (N, C) at every place, a channel, (B, 1, h, w).

    Of decorrelated deviations: where the likelihood takes those of good images for one Gaussian, this asks whether any
    good image deviated so. Of features: whether any good image looked so at all.
    """
    squared = nearest_squares(rows_of(maps), prototypes)
    return (torch.stack(squared).clamp_min(0) / maps.shape[1]).sqrt().view(len(maps), 1, *maps.shape[-2:])


def refine(defect_map: np.ndarray, smoothing_frac: float, closing_frac: float) -> np.ndarray:
    """A float32 map (H, W), smoothed by a Gaussian and closed by a disc (Serra 1982):
    dark gaps within a defect fill."""
    side = max(defect_map.shape)
    refined = np.ascontiguousarray(defect_map, np.float32)
    if smoothing_frac > 0:
        refined = cv2.GaussianBlur(refined, (0, 0), smoothing_frac * side, borderType=cv2.BORDER_REFLECT_101)
    diameter = round(closing_frac * side)
    if diameter >= 2:
        disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (diameter | 1, diameter | 1))
        refined = cv2.morphologyEx(refined, cv2.MORPH_CLOSE, disc)
    return refined


def image_score(defect_map: np.ndarray, top_frac: float) -> float:
    """Mean of the largest values of a map: the share ``top_frac`` of its pixels, at least one.

    >>> image_score(np.array([[0.0, 1.0], [2.0, 3.0]]), 0.5)
    2.5
    """
    n_top = max(1, round(top_frac * defect_map.size))
    return float(np.partition(defect_map.ravel(), -n_top)[-n_top:].mean())


# ----------------------------------------------------------------------------------------- calibration


class MapScale(NamedTuple):
    """How the values of a refined map read: which become 0 and 1, and how many times as large they are along the border
    of an image.

    What lies beyond the border no network sees: its features there are less like any that are known, on good images,
    too.
    """

    zero: float
    one: float
    border: tuple[float, ...] = ()  # of each ring of RING_PX pixels, the outermost first, falling to 1

    def read(self, maps: np.ndarray) -> np.ndarray:
        """Maps (B, H, W) on this scale."""
        return (self.level(maps) - self.zero) / (self.one - self.zero)

    def level(self, maps: np.ndarray) -> np.ndarray:
        """Maps (B, H, W) with their borders brought to the level further in."""
        if max(self.border, default=1.0) == 1.0:
            return maps
        middles, factors = RING_PX * (np.arange(N_RINGS + 1) + 0.5), (*self.border, 1.0)
        down, across = (
            np.interp(_from_border(side) + 0.5, middles, factors).astype(np.float32) for side in maps.shape[1:]
        )
        return maps / np.maximum.outer(down, across)

    @classmethod
    def of(cls, batches: Sequence[np.ndarray], windows: Sequence[tuple[slice, slice]] | None) -> MapScale:
        """The scale of a map from batches of it (B, H, W) on good images, each within its window."""
        levelling = cls(0.0, 1.0, _border_factors(batches, windows))
        values = pixels_within([levelling.level(maps) for maps in batches], windows)
        low, high = (float(value) for value in np.quantile(values, SCALE_QUANTILES))
        return levelling._replace(zero=low, one=max(high, low + 1e-6))


def _from_border(side: int) -> np.ndarray:
    """Pixels between each of ``side`` pixels in a row and the nearer end of it."""
    return np.minimum(np.arange(side), np.arange(side)[::-1])


def _border_factors(batches: Sequence[np.ndarray], windows: Sequence[tuple[slice, slice]] | None) -> tuple[float, ...]:
    """``MapScale.border``; none where hardly a pixel lies further in than all rings."""

    def rings(maps: np.ndarray) -> np.ndarray:
        down, across = (np.minimum(_from_border(side) // RING_PX, N_RINGS).astype(np.uint8) for side in maps.shape[1:])
        return np.broadcast_to(np.minimum.outer(down, across), maps.shape)

    values, ring = pixels_within(batches, windows), pixels_within([rings(maps) for maps in batches], windows)
    interior = values[ring == N_RINGS]
    if len(interior) < LEAST_INTERIOR * len(values):
        return ()
    usual = max(float(np.quantile(interior, RING_QUANTILE)), 1e-6)
    largest = [
        float(np.quantile(values[ring == each], RING_QUANTILE)) if (ring == each).any() else 0.0
        for each in range(N_RINGS)
    ]
    return tuple(np.maximum.accumulate([1.0, *(each / usual for each in reversed(largest))])[:0:-1].tolist())


@dataclass(frozen=True)
class Calibration:
    """What held-out good images say: the scale of each map, their scores and the threshold.

    Attributes:
        scales: map name -> how its values read.
        good_scores: image scores of the held-out good images, sorted.
        alpha: share of false alarms asked for.
        threshold: an image scoring above is defective.
        promised: whether alpha can be promised: there are enough held-out images, and none like no other was set aside.
        pixel_threshold: a pixel whose fused map lies above is part of a defect.
        exchangeable: False where the held-out images were chosen (``trim_frac``), so that no rate can be promised.
    """

    scales: dict[str, MapScale]
    good_scores: list[float]
    alpha: float
    threshold: float
    promised: bool
    pixel_threshold: float
    exchangeable: bool = True

    def as_dict(self) -> dict:
        return {
            **self.__dict__,
            "scales": {name: [scale.zero, scale.one, *scale.border] for name, scale in self.scales.items()},
        }

    @classmethod
    def from_dict(cls, values: dict) -> Calibration:
        """What ``as_dict`` returned.

        Raises:
            ValueError: something that must be a finite number is none, or there is no score.
        """
        numbers = {name: finite(name, values[name]) for name in ("alpha", "threshold", "pixel_threshold")}
        numbers["good_scores"] = sorted(finite("a good score", score) for score in values["good_scores"])
        if not numbers["good_scores"]:
            raise ValueError("there are no good scores")
        scales = {name: [finite(f"the scale of {name}", at) for at in each] for name, each in values["scales"].items()}
        read = {name: MapScale(zero, one, tuple(border)) for name, (zero, one, *border) in scales.items()}
        return cls(**{**values, **numbers, "scales": read})

    @classmethod
    def of(
        cls,
        scales: dict[str, MapScale],
        scores: Iterable[float],
        maps: np.ndarray,
        alpha: float,
        pixel_false_positives: float,
        exchangeable: bool = True,
    ) -> Calibration:
        """Thresholds from the image scores and the maps, of any shape, of held-out good images;
        ``pixel_false_positives`` of 0 is USUAL_FALSE_POSITIVES.
        """
        scores = sorted(scores)
        threshold, promised = sober_threshold(scores, alpha)
        pixel_threshold = float(np.quantile(maps, 1 - (pixel_false_positives or USUAL_FALSE_POSITIVES)))
        return cls(scales, scores, alpha, threshold, promised and exchangeable, pixel_threshold, exchangeable)

    def judge(self, score: float) -> Detection:
        """What an image score says, still without a map."""
        label = "good" if score <= self.threshold else "defective"  # so that a map that is not a number is no pass
        return Detection(score, p_value(score, np.array(self.good_scores)), label)

    def at(self, alpha: float) -> Calibration:
        """The same scores with the threshold for another share of false alarms."""
        threshold, promised = sober_threshold(self.good_scores, alpha)
        return replace(self, alpha=alpha, threshold=threshold, promised=promised and self.exchangeable)

    def describe(self) -> str:
        """The threshold and what it promises, in a sentence."""
        n = len(self.good_scores)
        if not self.exchangeable:
            return (
                f"threshold {self.threshold:.3f}, from {n} held-out images; "
                "with --trim-frac no rate of false alarms is promised."
            )
        if self.promised:
            return (
                f"threshold {self.threshold:.3f}: at most {self.alpha:.1%} false alarms, from {n} held-out good images."
            )
        if conformal_threshold(np.array(self.good_scores), self.alpha).threshold > self.threshold:
            return (
                f"threshold {self.threshold:.3f}, from {n} held-out good images but for one like no other, with a "
                f"score of {self.good_scores[-1]:.3f}: "
                f"at most {2 / (n + 1):.1%} false alarms, where {self.alpha:.1%} were asked for."
            )
        return (
            f"threshold {self.threshold:.3f}: {n} held-out good images are too few to promise {self.alpha:.1%} false "
            "alarms; "
            f"the largest good score is the threshold, which promises {1 / (n + 1):.1%}."
        )


# ------------------------------------------------------------------------------------------- detection


class Detection(NamedTuple):
    """What a detector says of one image."""

    score: float
    p_value: float
    label: str  # "good" or "defective"
    # float32 (H, W) of the image given, all maps fused; about 1 at the top 0.1 % of good pixels
    defect_map: np.ndarray | None = None
    reconstruction: np.ndarray | None = None  # float32 (3, H, W) in [0, 1]; both None where they were not asked for


@dataclass
class Detector:
    """A trained model with its calibration: tensors in, detections out.

    Attributes:
        settings: of the training run, resolved.
        runtime: the device of the model, and the precision in which it and the searches multiply.
    """

    model: DetailVAE
    settings: TrainSettings
    calibration: Calibration | None
    perceptual: object | None = None
    runtime: Runtime = field(default_factory=lambda: Runtime(torch.device("cpu")))

    @property
    def image_size(self) -> int:
        return self.settings.image_size

    @property
    def fitting(self) -> str:
        """``DataSettings.fitting``."""
        return self.settings.fitting

    @property
    def fused(self) -> dict[str, float]:
        """Maps that make the defect map, and their shares."""
        return map_shares(self.settings, self.model.n_features > 0)

    @property
    def gate(self) -> float:
        """How far the head that outlines defects gates the fused map; 0 where there is none."""
        return 0.0 if self.model.defect_head is None else self.settings.segmentation_gate

    @property
    def shown(self) -> list[str]:
        """Names of all maps that the defect map is made of."""
        return [*self.fused, *(["segmentation"] if self.gate else [])]

    @property
    def scored(self) -> dict[str, float]:
        """Maps that make the image score, and their shares."""
        return score_shares(self.settings, self.model.n_features > 0)

    @contextlib.contextmanager
    def _inferring(self) -> Iterator[None]:
        """No gradients, and the precision of the runtime but for float16, in which squared distances overflow."""
        with (
            torch.inference_mode(),
            contextlib.nullcontext() if self.runtime.amp_dtype is torch.float16 else self.runtime.autocast(),
        ):
            yield

    def describe(self, images: Tensor, names: Iterable[str], paint: bool = False) -> DetailOutput:
        """What the model says of images (B, 3, H, W); painted where the named maps need it or ``paint`` asks for it."""
        self.model.eval()
        with self._inferring():
            return self.model.describe(images, paint=paint or not FEATURE_MAPS.issuperset(names))

    @property
    def needed(self) -> list[str]:
        """Names of all maps that the defect map and the image score are made of."""
        return list(dict.fromkeys([*self.shown, *self.scored]))

    @property
    def mirrored(self) -> list[tuple[int, ...]]:
        """Dimensions of images (B, 3, H, W) to flip for each further view: those that training flipped at random."""
        if not self.settings.map_flips:
            return []
        return flip_axes(self.settings.flip_horizontal, self.settings.flip_vertical)

    def refined_maps(self, images: Tensor, output: DetailOutput, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Smoothed maps by name, each (B, H, W), of images (B, 3, H, W) and what ``describe`` said of them for these
        names; the head's probability by less, or its outlines would be as wide as theirs.
        """
        if not names:
            return {}
        views = [self._view_maps(images, output, names)]
        for flip in self.mirrored:
            view = images.flip(flip)
            maps = self._view_maps(view, self.describe(view, names), names)
            views.append({name: np.flip(each, [axis - 1 for axis in flip]) for name, each in maps.items()})
        return {name: np.mean([view[name] for view in views], 0) for name in names}

    def _view_maps(self, images: Tensor, output: DetailOutput, names: Sequence[str]) -> dict[str, np.ndarray]:
        with self._inferring():
            raw = raw_maps(names, self.model, images, output, self.perceptual)
        usual, of_head = (
            (self.settings.smoothing_frac, self.settings.closing_frac),
            (self.settings.outline_smoothing_frac, 0.0),
        )
        return {
            name: np.stack(
                [refine(each, *(of_head if name == "segmentation" else usual)) for each in maps[:, 0].cpu().numpy()]
            )
            for name, maps in raw.items()
        }

    def scores(self, smooth: dict[str, np.ndarray], scales: dict[str, MapScale]) -> list[float]:
        """The score of every image from its refined maps, those of ``scored``."""
        judged = fuse(smooth, scales, self.scored, self.settings.residual_ceiling)
        return [image_score(each, self.settings.top_frac * self.tile_share(*each.shape)) for each in judged]

    def defect_maps(self, smooth: dict[str, np.ndarray], scales: dict[str, MapScale]) -> np.ndarray:
        """The defect map of every image (B, H, W) from its refined maps, those of ``shown``."""
        fused = fuse(smooth, scales, self.fused, self.settings.residual_ceiling)
        if self.gate:
            shape, trust = outline(
                smooth["segmentation"],
                round(self.settings.outline_window_frac * self.settings.image_size),
                self.settings.segmentation_trust,
            )
            fused = (
                np.minimum(fused, SHAPED_ABOVE)
                + np.maximum(fused - SHAPED_ABOVE, 0) * (1 - self.gate + self.gate * shape) * trust
            )
            fused += self.settings.segmentation_weight * smooth["segmentation"]
        if not self.settings.link_frac and not self.settings.own_level:
            return fused
        logs = linked(signed_log(fused), round(self.settings.link_frac * self.settings.image_size))
        return signed_exp(
            logs - np.minimum(own_level(logs), self.settings.own_level) if self.settings.own_level else logs
        )

    def tile_share(self, height: int, width: int) -> float:
        """What share of an image one tile is, 1 where they are of one size: shares of an image are meant of a tile."""
        return min(1.0, self.settings.image_size**2 / (height * width))

    def detect(self, images: Tensor, thorough: bool = True) -> list[Detection]:
        """One detection an image, (B, 3, H, W) in [0, 1] on the model's device; of any size from ``image_size`` on
        where the detector works on tiles.

        Args:
            thorough: False makes defect maps and reconstructions of images called defective only, where the scores do
                not come from pixels; a good one then takes half the time.

        Raises:
            ValueError: the images are of another type, shape, size or value range, or there are none.
        """
        assert_images(images)
        if self.settings.fitting == "tile":
            return [self._detect_whole(image, thorough) for image in images]
        output = self.describe(assert_sides(images), self.scored, thorough)
        smooth, scales = self.refined_maps(images, output, self.scored), self.calibration.scales
        judged = [self.calibration.judge(score) for score in self.scores(smooth, scales)]
        rows = [row for row, each in enumerate(judged) if thorough or each.label == "defective"]
        if not rows:
            return judged
        shown, output = (images, output) if len(rows) == len(images) else (images[rows], output.at(rows))
        if output.vae.reconstruction is None:
            with self._inferring():
                output = self.model.paint(shown, output)
        smooth = {name: maps[rows] for name, maps in smooth.items()}
        smooth |= self.refined_maps(shown, output, [name for name in self.shown if name not in smooth])
        for row, fused, reconstruction in zip(
            rows, self.defect_maps(smooth, scales), output.vae.reconstruction.float().cpu().numpy(), strict=True
        ):
            judged[row] = judged[row]._replace(defect_map=fused, reconstruction=reconstruction)
        return judged

    def all_maps(self, images: Tensor, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Refined maps by name, each (B, H, W), of images (B, 3, H, W)."""
        if self.settings.fitting != "tile":
            return self.refined_maps(images, self.describe(images, names), names)
        blended = [self._blended(image, names, paint=False)[0] for image in images]
        return {name: np.stack([maps[name] for maps in blended]) for name in names}

    def _detect_whole(self, image: Tensor, thorough: bool) -> Detection:
        """The detection of one image (3, H, W), on overlapping tiles."""
        scales = self.calibration.scales
        smooth, reconstruction = self._blended(image, self.needed if thorough else list(self.scored), thorough)
        judged = self.calibration.judge(self.scores({name: each[None] for name, each in smooth.items()}, scales)[0])
        if not thorough and judged.label == "good":
            return judged
        if not thorough:
            missing, reconstruction = self._blended(
                image, [name for name in self.shown if name not in smooth], paint=True
            )
            smooth |= missing
        fused = self.defect_maps({name: each[None] for name, each in smooth.items()}, scales)[0]
        return judged._replace(defect_map=fused, reconstruction=reconstruction)

    def _blended(
        self, image: Tensor, names: Sequence[str], paint: bool
    ) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        """Refined maps by name, each (H, W), and, painted, the reconstruction (3, H, W) of an image (3, H, W) from its
        tiles.
        """
        side, (height, width) = self.settings.image_size, image.shape[1:]
        if min(height, width) < side:
            raise ValueError(
                f"the image is {height} x {width}; expected sides of {side} or more, a tile (see "
                "image_files.fit_image)."
            )
        corners = tile_corners(height, width, side)
        blends: dict[str, Blend] = {
            name: Blend(height, width, side) for name in [*names, *(["reconstruction"] if paint else [])]
        }
        for start in range(0, len(corners), TILES_AT_ONCE):
            some = corners[start : start + TILES_AT_ONCE]
            tiles = torch.stack([image[(..., *window(*corner, side))] for corner in some])
            output = self.describe(tiles, names, paint)
            found = self.refined_maps(tiles, output, names)
            if paint:
                found["reconstruction"] = output.vae.reconstruction.float().cpu().numpy()
            for name, each in found.items():
                for of_tile, corner in zip(each, some, strict=True):
                    blends[name].add(of_tile, *corner)
        whole = {name: blend.mean() for name, blend in blends.items()}
        reconstruction = whole.pop("reconstruction", None)
        return whole, reconstruction


def calibrate(
    detector: Detector,
    batches: Iterable[Tensor],
    windows: Sequence[tuple[slice, slice]] | None = None,
    drawn: Iterable[tuple[Tensor, np.ndarray]] = (),
) -> Calibration:
    """Fit map scales, good scores and thresholds on batches of held-out good images (B, 3, H, W), of one size within a
    batch.

    Args:
        windows: of each image, in order, the rows and columns that its picture takes (see
            ``image_files.picture_window``). Scales and the pixel threshold come from there, scores from whole images;
            None: from whole images, too.
        drawn: batches of the same images in the same order, once or several times over, with drawn defects, and where
            those are, bool (B, H, W). Where there are any, and no ``pixel_false_positives``, the pixel threshold is the
            one at which they are outlined best (``evaluation.best_pixel_threshold``).
    """
    names = detector.needed
    found = [detector.all_maps(images, names) for images in batches]
    scales = {name: MapScale.of([maps[name] for maps in found], windows) for name in names}
    scores = [score for maps in found for score in detector.scores(maps, scales)]
    fused = pixels_within([detector.defect_maps(maps, scales) for maps in found], windows)
    calibration = Calibration.of(
        scales,
        scores,
        fused,
        detector.settings.target_false_alarms,
        detector.settings.pixel_false_positives,
        not detector.settings.trim_frac,
    )
    outlined = (
        []
        if detector.settings.pixel_false_positives
        else [
            (detector.defect_maps(detector.all_maps(images, detector.shown), scales), masks) for images, masks in drawn
        ]
    )
    if not any(masks.any() for _, masks in outlined):
        return calibration
    n_rounds = sum(len(masks) for _, masks in outlined) // len(scores)
    counts = count_pixels(
        *(list(within(each, windows and [*windows] * n_rounds)) for each in zip(*outlined, strict=True))
    )
    return replace(calibration, pixel_threshold=best_pixel_threshold(counts))


def within(batches: Iterable[np.ndarray], windows: Sequence[tuple[slice, slice]] | None) -> Iterator[np.ndarray]:
    """Each of batches of maps (B, H, W), within its window or whole."""
    every = itertools.chain.from_iterable(batches)
    return every if windows is None else (each[window] for each, window in zip(every, windows, strict=True))


def pixels_within(batches: Iterable[np.ndarray], windows: Sequence[tuple[slice, slice]] | None) -> np.ndarray:
    """All values, in one row, of batches of maps (B, H, W) within the window of each map, or of whole maps."""
    return np.concatenate([each.ravel() for each in within(batches, windows)])


def fuse(
    smooth: dict[str, np.ndarray], scales: dict[str, MapScale], shares: dict[str, float], residual_ceiling: float = 0.0
) -> np.ndarray:
    """The weighted geometric mean of 1 + z, less 1, of refined maps z, each (B, H, W), on their scales, (B, H, W).

    0 and 1 are fixed points, a single map is unchanged, and a map that is high alone counts little. Negative values are
    mirrored: 1 + |z|. ``residual_ceiling``: the largest z of the residual that counts beside maps of features, which
    know better; 0 sets none.
    """
    scaled = {name: scales[name].read(smooth[name]) for name in shares}
    if residual_ceiling and "pixel" in scaled and FEATURE_MAPS.intersection(scaled):
        scaled["pixel"] = np.minimum(scaled["pixel"], residual_ceiling)
    return signed_exp(sum(share * signed_log(scaled[name]) for name, share in shares.items()))


def signed_log(maps: np.ndarray) -> np.ndarray:
    """log(1 + z) of maps, below 0 mirrored, of the same shape; by torch, which takes a sixth of NumPy's time."""
    values = torch.from_numpy(maps)
    return torch.copysign(torch.log1p(values.abs()), values).numpy()


def signed_exp(logs: np.ndarray) -> np.ndarray:
    """The float32 maps whose ``signed_log`` that is."""
    values = torch.from_numpy(logs).float()
    return torch.copysign(torch.expm1(values.abs()), values).numpy()


def outline(probability: np.ndarray, diameter: int, trust: float) -> tuple[np.ndarray, np.ndarray]:
    """How a defect is shaped, and how far the head that outlines it is believed that it is one, both (B, H, W) in (0,
    1], from its probability (B, H, W).

    The shape is the probability over its largest within a disc, so that a place is only told from its own surroundings.
    The largest itself, to the power of ``trust``, is what the head adds: with 0 nothing, and what it takes for a
    defect, rightly or not, gains nothing against another place. All have OUTLINE_FLOOR added, so that the shape is near
    1 where the head sees nothing at all.
    """
    largest = np.stack([_largest_within(each, diameter) for each in probability]) + OUTLINE_FLOOR
    return (probability + OUTLINE_FLOOR) / largest, (largest / (1 + OUTLINE_FLOOR)) ** trust


def _largest_within(values: np.ndarray, diameter: int) -> np.ndarray:
    """The largest of a map (H, W) within a disc around each pixel; of a wide disc in blocks of pixels, which at 448 px
    takes a twelfth of the time.
    """
    side = max(1, diameter // DISC_PLACES)
    height, width = values.shape
    padded = cv2.copyMakeBorder(values, 0, -height % side, 0, -width % side, cv2.BORDER_REPLICATE)
    blocks = np.maximum.reduce([padded[down::side, across::side] for down in range(side) for across in range(side)])
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (diameter // side | 1, diameter // side | 1))
    return cv2.resize(cv2.dilate(blocks, disc), padded.shape[::-1], interpolation=cv2.INTER_NEAREST)[:height, :width]


def linked(logs: np.ndarray, length_px: int) -> np.ndarray:
    """Signed logarithms of maps (B, H, W), those below SHAPED_ABOVE averaged with the mean along the best line through
    them.

    What is too faint for the head to shape, but lies in a row as the dots of a scratch do, rises, to that level at
    most; what lies alone falls. Lines of that length in N_DIRECTIONS, on the map at a quarter of its resolution; none
    where they are no longer than two places of it.
    """
    length = round(length_px / LINK_STRIDE) | 1
    if length < 3:
        return logs
    highest = np.log1p(np.float32(SHAPED_ABOVE))
    lines = [_line(length, np.pi * step / N_DIRECTIONS) for step in range(N_DIRECTIONS)]
    along = np.stack([_along_lines(each, lines) for each in logs])
    return np.where(logs > highest, logs, np.minimum(highest, (logs + along) / 2))


def _along_lines(logs: np.ndarray, lines: Sequence[np.ndarray]) -> np.ndarray:
    """The largest mean along any of the lines, kernels of one size, through each place of a map (H, W)."""
    height, width = logs.shape
    coarse = cv2.resize(
        logs, (max(1, width // LINK_STRIDE), max(1, height // LINK_STRIDE)), interpolation=cv2.INTER_AREA
    )
    means = [cv2.filter2D(coarse, -1, line, borderType=cv2.BORDER_REFLECT_101) for line in lines]
    return cv2.resize(np.max(means, 0), (width, height), interpolation=cv2.INTER_LINEAR)


def _line(length: int, angle: float) -> np.ndarray:
    """A kernel (length, length) that averages along the line through its middle at that angle, in radians."""
    middle = (length - 1) / 2
    across, down = round(middle * np.cos(angle)), round(middle * np.sin(angle))
    kernel = np.zeros((length, length), np.float32)
    cv2.line(kernel, (int(middle) - across, int(middle) - down), (int(middle) + across, int(middle) + down), 1.0)
    return kernel / kernel.sum()


def own_level(logs: np.ndarray) -> np.ndarray:
    """How much stands out all over an image: the root mean square of what is positive in signed logarithms (B, H, W),
    (B, 1, 1).

    A defect changes the latents and so, a little, what is expected everywhere; a photograph that is unusual as a whole
    deviates everywhere, too.
    """
    return np.sqrt(np.square(np.maximum(logs, 0)).mean((1, 2), keepdims=True))


def load_detector(path: Path | str, device: torch.device | str = "cpu", precision: str = "auto") -> Detector:
    """The detector in a checkpoint of train_with_validation.py.

    Args:
        device, precision: as ``engine.make_runtime`` takes them.

    Raises:
        InputError: the file cannot be read, is of another kind, its backbone's weights cannot be found, or there is no
            such device.
    """
    contents = load_checkpoint(path, KIND, ("settings", "model", "calibration"))
    with reading_contents(path):
        kept = contents["settings"]
        settings = from_dict(TrainSettings, kept | {name: kept[name] for name in ("data_dir", "image_size", "resize")})
        calibration = Calibration.from_dict(contents["calibration"])
    runtime = make_runtime(device, precision)
    model = runtime.put_model(fold_layers(detail_vae_from_checkpoint(contents, path)))
    return Detector(model, settings, calibration, load_map_perceptual(settings, runtime.device), runtime)


def load_map_perceptual(settings: TrainSettings, device: torch.device | str) -> PerceptualLoss | None:
    """The VGG16 distance where ``map_perceptual`` asks for it, else None."""
    if settings.map_perceptual <= 0:
        return None
    return PerceptualLoss(weights_here(as_dict(settings))).to(device)
