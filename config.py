"""Every setting, once: its default, unit and meaning; read from flags and YAML files.

A stage owns one frozen dataclass. Its fields give the flags, the ``--help`` text and the keys a YAML file
may hold. Flags beat the file, the file beats the defaults. Importing this
module costs milliseconds: no torch, no numpy.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import importlib
import math
import re
import sys
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

# ----------------------------------------------------------------------------------------------- errors


class InputError(Exception):
    """What the user gave cannot be used; the message is one sentence (what, where, what was expected)."""

    exit_code = 1


class UsageError(InputError):
    """A flag, key or value that the command does not take."""

    exit_code = 2


# ---------------------------------------------------------------------------------------------- a field

LARGEST_INT = 2**63 - 1
"""Largest int64, which libraries count with."""


def setting(
    default,
    meaning: str,
    *,
    unit: str = "",
    choices: Sequence[str] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    multiple_of: int | None = None,
    or_zero: bool = False,
    positional: str = "",
):
    """One field of a settings class.

    Args:
        default: value when neither a flag nor the file gives one; its type is the field's annotation.
        meaning: one sentence for ``--help``.
        unit: the unit, for example "px", "degrees", "fraction"; empty for names and switches.
        choices: the only values allowed (strings).
        minimum, maximum: inclusive bounds for numbers (each item of a tuple).
        multiple_of: the number must be a multiple of this.
        or_zero: 0 is allowed too, below the minimum.
        positional: "+" (at least one, or some in the file) or "*" to read the field from bare arguments instead of a
            flag.
    """
    return dataclasses.field(
        default=default,
        metadata={
            "meaning": meaning,
            "unit": unit,
            "choices": tuple(choices),
            "minimum": minimum,
            "maximum": maximum,
            "multiple_of": multiple_of,
            "or_zero": or_zero,
            "positional": positional,
        },
    )


@dataclass(frozen=True)
class Settings:
    """Base of all settings classes: checks every value against its field when an instance is made."""

    given = frozenset()
    """Names of fields that flags or the file gave a value, also where it is the default; set by ``parse``."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            _check_value(field, getattr(self, field.name))

    def with_preset(self, preset: dict):
        """A copy with the preset's values where nothing was given and the value is the default."""
        ours = {
            key: value
            for key, value in preset.items()
            if key not in self.given and getattr(self, key) == getattr(type(self), key)
        }
        read = from_dict(type(self), ours)
        return self.replace(**{key: getattr(read, key) for key in ours})

    def replace(self, **changes):
        """A copy with some fields changed, checked again; what was given stays known."""
        copy = dataclasses.replace(self, **changes)
        object.__setattr__(copy, "given", self.given)
        return copy


def _check_value(field: dataclasses.Field, value) -> None:
    limits = field.metadata
    for item in value if isinstance(value, tuple) else (value,):
        if isinstance(item, str) and "\0" in item:
            raise UsageError(f"{field.name} is {item!r}; expected text without a null character.")
        if limits["positional"] and not item:
            raise UsageError(f"{field.name} holds an empty path; expected a file or a folder.")
        if limits["choices"] and item not in limits["choices"]:
            raise UsageError(f"{field.name} is {item!r}; expected one of {', '.join(limits['choices'])}.")
        if isinstance(item, bool) or not isinstance(item, (int, float)):
            continue
        if not abs(item) <= sys.float_info.max:
            raise UsageError(f"{field.name} is {item}; expected a finite number.")
        if isinstance(item, int) and abs(item) > LARGEST_INT:
            raise UsageError(f"{field.name} is {item}; expected {LARGEST_INT} at most.")
        if limits["minimum"] is not None and item < limits["minimum"] and not (limits["or_zero"] and item == 0):
            raise UsageError(
                f"{field.name} is {item}; expected {'0 or ' * limits['or_zero']}at least {limits['minimum']}."
            )
        if limits["maximum"] is not None and item > limits["maximum"]:
            raise UsageError(f"{field.name} is {item}; expected at most {limits['maximum']}.")
        if limits["multiple_of"] and item % limits["multiple_of"]:
            raise UsageError(f"{field.name} is {item}; expected a multiple of {limits['multiple_of']}.")


# ----------------------------------------------------------------------------- groups shared by stages


@dataclass(frozen=True)
class RunSettings(Settings):
    """Where a run writes, and how it computes."""

    output_dir: str = setting(".", "Folder under which the fixed output folders are made.")
    device: str = setting(
        "auto", "Where to compute; auto takes CUDA when there is one.", choices=("auto", "cpu", "cuda")
    )
    seed: int = setting(
        0,
        "Seed of every random choice; the same seed gives the same run on CPU with as many threads.",
        minimum=0,
        maximum=LARGEST_INT,
    )


@dataclass(frozen=True)
class LoaderSettings(Settings):
    """Reading of training images."""

    num_workers: int = setting(
        -1,
        "Loader processes, beside the main one; -1 takes none on CPU (the cores compute) and one a core, eight at "
        "most, with CUDA.",
        minimum=-1,
    )


@dataclass(frozen=True)
class PrecisionSettings(Settings):
    """Precision."""

    precision: str = setting(
        "auto",
        "Number format of products; auto takes bfloat16 where the device multiplies it faster (float16 in training on "
        "older CUDA cards), else float32 (whose convolutions torch rounds to TF32 on newer CUDA cards). The grid of "
        "backbone features is never of half precision.",
        choices=("auto", "float32", "bfloat16"),
    )


@dataclass(frozen=True)
class SquareSettings(Settings):
    """Squares that images are made into."""

    image_size: int = setting(
        384, "Side of the square the network sees.", unit="px", minimum=64, maximum=1024, multiple_of=32
    )
    resize: str = setting(
        "stretch", "How an image becomes square: stretched, or fitted with grey bars.", choices=("stretch", "letterbox")
    )


@dataclass(frozen=True)
class DataSettings(SquareSettings):
    """Images."""

    data_dir: str = setting(
        "", "Data set in the MVTec layout or a flat folder of good images; empty means the built-in demo."
    )
    tile: bool = setting(
        False,
        "Cut every image at its own resolution into overlapping tiles of image_size; of resize only trim_frac then "
        "makes use.",
    )

    @property
    def fitting(self) -> str:
        """How images come to the network: "stretch", "letterbox" or "tile"."""
        return "tile" if self.tile else self.resize


# ------------------------------------------------------------------------------------- DetailVAE stages


@dataclass(frozen=True)
class PreprocessSettings(SquareSettings, RunSettings):
    """Preprocessing."""

    source: tuple[str, ...] = setting((), "Raw folder: MVTec layout, or a flat folder of good images.", positional="+")
    out: str = setting("data/preprocessed", "Folder that receives the MVTec layout.")
    bad_dir: str = setting("", "For a flat source: a folder of defective images, kept as test/defective.")
    test_frac: float = setting(
        0.2, "For a flat source: share of the good images kept as test/good.", unit="fraction", minimum=0.0, maximum=0.9
    )


@dataclass(frozen=True)
class AugmentSettings(Settings):
    """Random changes of training images."""

    flip_horizontal: bool = setting(True, "Mirror left and right; off where a mirrored part is a defect.")
    flip_vertical: bool = setting(False, "Mirror top and bottom.")
    rotation_deg: float = setting(5.0, "Largest rotation either way.", unit="degrees", minimum=0.0, maximum=180.0)
    shift_frac: float = setting(
        0.03, "Largest shift either way, of the side.", unit="fraction", minimum=0.0, maximum=0.5
    )
    scale_frac: float = setting(0.05, "Largest change of scale either way.", unit="fraction", minimum=0.0, maximum=0.5)
    brightness: float = setting(
        0.08, "Largest change of brightness and contrast either way.", unit="fraction", minimum=0.0, maximum=0.9
    )
    saturation: float = setting(
        0.08, "Largest change of saturation either way.", unit="fraction", minimum=0.0, maximum=0.9
    )


@dataclass(frozen=True)
class ModelSettings(Settings):
    """The model."""

    latent_dim: int = setting(64, "Length of the global latent vector.", minimum=1, maximum=4096)
    detail_channels: int = setting(
        16, "Channels of the detail latent map (a place for every 32 px).", minimum=1, maximum=512
    )
    base_channels: int = setting(
        16, "Channels at full resolution; deeper levels are multiples.", minimum=4, maximum=256
    )
    skips: bool = setting(True, "Gated skip connections from the encoder into the pixel decoder.")
    skip_noise: float = setting(
        0.05, "Standard deviation of the noise added to normalised skip features in training.", minimum=0.0, maximum=5.0
    )
    segmentation: bool = setting(
        True,
        "A head that outlines defects pixel by pixel, trained on drawn ones after the last epoch; without drawn "
        "defects there is none.",
    )
    backbone: str = setting(
        "efficientnet_lite0",
        "Frozen features that the second decoder branch predicts.",
        choices=("efficientnet_lite0", "vgg16", "none"),
    )


@dataclass(frozen=True)
class LossSettings(Settings):
    """The loss."""

    mse_weight: float = setting(1.0, "Weight of the squared pixel error.", minimum=0.0)
    l1_weight: float = setting(1.0, "Weight of the absolute pixel error.", minimum=0.0)
    painted_weight: float = setting(
        1.0,
        "Weight of the squared and absolute error of what is painted before the skip at full resolution.",
        minimum=0.0,
    )
    perceptual_weight: float = setting(
        0.1, "Weight of the VGG16 perceptual term; 0 switches it off (no weights needed).", minimum=0.0
    )
    perceptual_crop_px: int = setting(
        48,
        "Side of the random crop on which the perceptual term is computed; 0 takes the whole image.",
        unit="px",
        minimum=4,
        or_zero=True,
    )
    vgg16_weights: str = setting(
        "", "File with torchvision's VGG16 weights; empty means look in the cache, then fetch."
    )
    kl_weight: float = setting(
        0.001, "Weight of the global latent's KL divergence, in nats per latent variable.", minimum=0.0
    )
    detail_kl_weight: float = setting(
        0.001, "Weight of the detail latent's KL divergence, in nats per latent variable.", minimum=0.0
    )
    kl_warmup_epochs: int = setting(5, "Epochs over which both KL weights rise from 0.", unit="epochs", minimum=0)
    feature_weight: float = setting(1.0, "Weight of the squared error of predicted features.", minimum=0.0)
    likelihood_weight: float = setting(
        0.5, "Weight of the Gaussian likelihood that trains the features' predicted variance.", minimum=0.0
    )
    pixel_likelihood_weight: float = setting(
        0.01, "Weight of the Gaussian likelihood that trains the pixels' predicted variance.", minimum=0.0
    )
    pixel_crop_px: int = setting(
        64,
        "Side of the random crop on which the pixel branch trains; 0 takes the whole image.",
        unit="px",
        minimum=16,
        multiple_of=8,
        or_zero=True,
    )
    pixel_share: float = setting(
        0.25,
        "Share of each batch on which the pixel branch trains, which goes on after the last epoch; without a backbone "
        "the latents learn from it, and it trains on all.",
        unit="fraction",
        minimum=0.01,
        maximum=1.0,
    )
    repair_weight: float = setting(
        10.0, "Extra weight of a drawn defect's pixels in the squared and absolute pixel errors.", minimum=0.0
    )
    feature_noise: float = setting(
        0.2, "Standard deviation of the noise on the features that the encoder sees in training.", minimum=0.0
    )
    feature_paste: float = setting(
        0.5,
        "Share of training images with a rectangle of features pasted from another image.",
        unit="fraction",
        minimum=0.0,
        maximum=1.0,
    )


@dataclass(frozen=True)
class MapSettings(Settings):
    """Maps, score and thresholds."""

    map_pixel: float = setting(1.0, "Weight of the residual map |x - x_hat| in the fused map.", minimum=0.0)
    residual_ceiling: float = setting(
        0.25,
        "Where the residual counts no further in a map fused with maps of features, on the scale of good pixels (0 "
        "their median, 1 their 99.9 % quantile); 0 sets no ceiling.",
        minimum=0.0,
    )
    map_ssim: float = setting(0.0, "Weight of the 1 - SSIM map.", minimum=0.0)
    map_perceptual: float = setting(
        0.0, "Weight of the VGG16 distance between x and x_hat (slow: about 1 s an image on CPU).", minimum=0.0
    )
    map_feature: float = setting(0.0, "Weight of the plain feature error.", minimum=0.0)
    map_deviation: float = setting(
        0.0,
        "Weight of the features' error over its predicted standard deviation, every channel for itself.",
        minimum=0.0,
    )
    map_likelihood: float = setting(
        1.0,
        "Weight of the features' likelihood: their error over its predicted standard deviation, decorrelated within "
        "each tap of the backbone.",
        minimum=0.0,
    )
    map_nearest: float = setting(
        0.0,
        "Weight of the distance of the features' deviations to the nearest ones seen on training images.",
        minimum=0.0,
    )
    map_bank: float = setting(
        2.0, "Weight of the distance of the features themselves to the nearest ones of training images.", minimum=0.0
    )
    score_deviation: float = setting(
        0.0, "Weight of the plain deviation in the map that the image score is taken from.", minimum=0.0
    )
    score_likelihood: float = setting(
        0.0,
        "Weight of the likelihood in the map that the image score is taken from; where all four weights are 0, or "
        "without a backbone, that is the fused map.",
        minimum=0.0,
    )
    score_nearest: float = setting(
        1.0, "Weight of the deviations' distance in the map that the image score is taken from.", minimum=0.0
    )
    score_bank: float = setting(
        1.0, "Weight of the features' distance in the map that the image score is taken from.", minimum=0.0
    )
    segmentation_gate: float = setting(
        1.0,
        "How far the head that outlines defects shapes the fused map, where there is one: what stands out is "
        "multiplied by 1 - gate + gate * outline.",
        unit="fraction",
        minimum=0.0,
        maximum=1.0,
    )
    segmentation_trust: float = setting(
        1.0,
        "How far the head is believed that what stands out is a defect: multiplied by the largest probability nearby "
        "to this power; 0 takes the outline alone from the head.",
        minimum=0.0,
        maximum=4.0,
    )
    segmentation_weight: float = setting(
        0.3,
        "How many times the head's probability of a defect is added to the fused map (1: the top 0.1 % of good "
        "pixels), where there is a gate.",
        minimum=0.0,
    )
    outline_window_frac: float = setting(
        0.1,
        "Diameter of the disc within which the head's probability is compared with its largest, which makes the "
        "outline, of the side.",
        unit="fraction",
        minimum=0.0,
        maximum=0.5,
    )
    outline_smoothing_frac: float = setting(
        0.004,
        "Standard deviation of the Gaussian that smooths the head's probability, of the side: less for outlines as "
        "exact as can be, more where masks are drawn with a margin.",
        unit="fraction",
        minimum=0.0,
        maximum=0.2,
    )
    link_frac: float = setting(
        0.16,
        "Length of the lines along which what is too faint for the head to shape is averaged, of the side; 0 averages "
        "nothing.",
        unit="fraction",
        minimum=0.0,
        maximum=0.5,
    )
    own_level: float = setting(
        0.0,
        "Subtract what stands out all over the image (in log(1 + z), see defect_maps.own_level) from the fused map, "
        "this much of it at most: helps small defects, harms large ones, which stand out all over; 0 subtracts "
        "nothing.",
        minimum=0.0,
    )
    map_flips: bool = setting(
        False, "Average every map over the mirrored views that training allows: slower in proportion."
    )
    smoothing_frac: float = setting(
        0.008,
        "Standard deviation of the Gaussian that smooths each other map, of the side.",
        unit="fraction",
        minimum=0.0,
        maximum=0.2,
    )
    closing_frac: float = setting(
        0.01,
        "Diameter of the closing that fills gaps in each other map, of the side.",
        unit="fraction",
        minimum=0.0,
        maximum=0.2,
    )
    top_frac: float = setting(
        0.002, "Image score: mean of this share of the largest map values.", unit="fraction", minimum=0.0, maximum=1.0
    )
    target_false_alarms: float = setting(
        0.05, "Share of good images that may be called defective.", unit="fraction", minimum=0.0001, maximum=0.5
    )
    pixel_false_positives: float = setting(
        0.0,
        "Share of the pixels of good images that may lie above the pixel threshold; 0 sets the threshold where the "
        "outlines of defects drawn on held-out good images have the largest mean F1, or, where training draws none, "
        "as 0.001 does.",
        unit="fraction",
        minimum=0.0,
        maximum=0.5,
    )


@dataclass(frozen=True)
class OptimiserSettings(Settings):
    """Optimisation."""

    epochs: int = setting(
        0,
        "Passes over the training images; 0 takes as many as show train_samples of them, 150 at most.",
        unit="epochs",
        minimum=0,
    )
    batch_size: int = setting(4, "Images in one optimizer step.", unit="images", minimum=1)
    learning_rate: float = setting(
        0.003, "Peak learning rate of AdamW; it warms up and falls to zero along a cosine.", minimum=0.0
    )
    weight_decay: float = setting(0.0001, "Decoupled weight decay of AdamW.", minimum=0.0)
    gradient_clip: float = setting(1.0, "Largest gradient norm.", minimum=0.0)
    patience: int = setting(0, "Stop after this many validations without a better one; 0 never stops early.", minimum=0)
    checkpoint_every: int = setting(50, "Keep models/epoch_N.pth every so many epochs.", unit="epochs", minimum=1)
    resume: bool = setting(False, "Go on from the last checkpoint in the output folder.")


@dataclass(frozen=True)
class TrainSettings(
    OptimiserSettings,
    MapSettings,
    LossSettings,
    ModelSettings,
    AugmentSettings,
    DataSettings,
    LoaderSettings,
    PrecisionSettings,
    RunSettings,
):
    """Training."""

    weights: str = setting(
        "",
        "Checkpoint to calibrate anew without training: banks, maps and thresholds are made again, with the settings "
        "of maps and thresholds that are given.",
    )
    holdout_frac: float = setting(
        0.2,
        "Share of the good images held out for validation and calibration (19 at least, where there are 48 or more); "
        "where the data set has validation/good, that is held out instead.",
        unit="fraction",
        minimum=0.01,
        maximum=0.8,
    )
    trim_frac: float = setting(
        0.0,
        "Share of the good images to leave out, where some of them are defective: those least like the others by what "
        "a small model learns of all (some minutes). The rate of false alarms is then no longer promised.",
        unit="fraction",
        minimum=0.0,
        maximum=0.5,
    )
    train_samples: int = setting(
        4000, "Images shown in all, with repeats, where epochs is 0.", unit="images", minimum=1
    )
    variants: int = setting(
        4,
        "Variants of each training image, the first as it is, the others augmented; the backbone sees each once. 0 "
        "makes new ones in every epoch.",
        minimum=0,
    )
    crop_images: int = setting(
        0,
        "Good images, with several drawn defects each, on crops of which the pixel branch goes on learning after the "
        "last epoch, and the head that outlines defects learns; 0 takes a quarter of train_samples, or, where epochs "
        "is set, of the images shown before, 800 at most.",
        unit="images",
        minimum=0,
    )
    drawn_defects: float = setting(
        0.75, "Share of training images that get a drawn defect to repair.", unit="fraction", minimum=0.0, maximum=1.0
    )
    validate_every: int = setting(
        0, "Epochs between validations; 0 validates after about every 500 training images.", unit="epochs", minimum=0
    )
    picture_every: int = setting(
        0,
        "Epochs between reconstruction pictures, which the last one gets, too; 0 makes them after about every 1800 "
        "training images.",
        unit="epochs",
        minimum=0,
    )


@dataclass(frozen=True)
class DetectionBenchmarkSettings(TrainSettings):
    """The comparison."""

    methods: tuple[str, ...] = setting(
        ("detailvae", "patchcore", "padim"), "Methods to compare.", choices=("detailvae", "patchcore", "padim")
    )
    seeds: tuple[int, ...] = setting((), "Seeds, every method runs once with each; none means --seed alone.", minimum=0)
    train_images: tuple[int, ...] = setting(
        (),
        "Numbers of training images, drawn by the seed, every method runs once with each; none means all good ones.",
        minimum=3,
    )
    contamination: float = setting(
        0.0,
        "Share of the training images that are defective ones, taken out of the test; at least one where it is above "
        "0.",
        unit="fraction",
        minimum=0.0,
        maximum=0.5,
    )


@dataclass(frozen=True)
class AblationSettings(TrainSettings):
    """The ablation."""

    train_samples: int = setting(
        800,
        "Images shown in all, with repeats, where epochs is 0: fewer than by default, a training for each row and "
        "seed.",
        unit="images",
        minimum=1,
    )
    seeds: tuple[int, ...] = setting(
        (), "Seeds, every row runs once with each; none means --seed and the two after it.", minimum=0
    )
    rows: tuple[str, ...] = setting((), "Rows to measure beside the first; none means all.")


@dataclass(frozen=True)
class DrawnSetsSettings(RunSettings):
    """The sets."""

    out: str = setting("data/drawn_sets", "Folder that receives the sets.")
    photos: tuple[str, ...] = setting(
        (),
        "Photographs of even textures, 1,000 px or so, each made into a set of its own, named after the file: pieces "
        "of its left part to train, of its right part to test.",
    )


@dataclass(frozen=True)
class ForeignDefectsSettings(RunSettings):
    """The set."""

    data_dir: str = setting("", "Data set in the MVTec layout, whose good test images are drawn on.")
    out: str = setting("data/foreign_defects", "Folder that receives the set.")
    per_kind: int = setting(12, "Images with a defect of each kind.", unit="images", minimum=1)


@dataclass(frozen=True)
class DetectorSettings(PrecisionSettings):
    """The trained model."""

    model: str = setting(
        "",
        "Checkpoint written by train_with_validation.py; empty means models/best_model.pth in the output folder, or in "
        "the current one where there is none.",
    )
    batch_size: int = setting(
        0, "Images in one forward pass; 0 takes 2 on a CPU and 16 with CUDA.", unit="images", minimum=0
    )


@dataclass(frozen=True)
class DetailTestSettings(DetectorSettings, RunSettings):
    """Testing."""

    data_dir: str = setting("", "Data set in the MVTec layout; empty means the one the model was trained on.")
    save_maps: bool = setting(False, "Also write every raw map as test_results/maps/<category>/<stem>.npy.")
    pictures: bool = setting(True, "Write a picture of every test image.")
    bootstrap: int = setting(1000, "Resamples behind each 95 % interval.", minimum=0)


@dataclass(frozen=True)
class ClassifySettings(DetectorSettings, RunSettings):
    """Classifying."""

    images: tuple[str, ...] = setting(
        (), "Image files, folders (searched recursively) or quoted globs.", positional="+"
    )
    target_false_alarms: float = setting(
        0.0,
        "Re-derive the threshold for this share of false alarms; 0 keeps the trained one.",
        unit="fraction",
        minimum=0.0,
        maximum=0.5,
    )
    overlays: bool = setting(True, "Write an overlay picture of every defective image.")


@dataclass(frozen=True)
class FetchWeightsSettings(RunSettings):
    """Weights."""

    vgg16_weights: str = setting("", "File with torchvision's VGG16 weights to verify and keep; empty means fetch.")


# ----------------------------------------------------------------------------- plots of series, their data


@dataclass(frozen=True)
class SupervisedDataSettings(Settings):
    """Plots."""

    data_dir: str = setting(
        "", "Data set with train/<class> and test/<class> folders of plots; empty means the built-in demo."
    )
    image_size: int = setting(
        224, "Side of the square the network sees.", unit="px", minimum=32, maximum=1024, multiple_of=32
    )
    crop_axes: bool = setting(
        True, "Cut a plot to the inside of its axes, so that no pixel goes to labels and margins."
    )
    validation_frac: float = setting(
        0.15,
        "Share of the training images of each class held out for validation.",
        unit="fraction",
        minimum=0.01,
        maximum=0.8,
    )
    flip_time: bool = setting(
        True,
        "Mirror training plots left and right at random, and plots whose class is unsure: a series read backwards "
        "keeps its kind, where that is one of the nine; other classes are flipped only where this is given.",
    )
    flip_value: bool = setting(
        True,
        "Mirror training plots top and bottom at random, and plots whose class is unsure: a series of changed sign "
        "keeps its kind, where that is one of the nine; other classes are flipped only where this is given.",
    )
    stretch_frac: float = setting(
        0.04,
        "Largest stretch of a training plot along each axis, either way.",
        unit="fraction",
        minimum=0.0,
        maximum=0.3,
    )
    shift_frac: float = setting(
        0.02, "Largest shift of a training plot along each axis, either way.", unit="fraction", minimum=0.0, maximum=0.3
    )
    line_jitter: float = setting(
        0.3,
        "Largest share of a one-pixel thicker line blended into a training plot.",
        unit="fraction",
        minimum=0.0,
        maximum=1.0,
    )


@dataclass(frozen=True)
class GeneratedDataSettings(Settings):
    """Generated series."""

    generated_home: int = setting(
        1400,
        "Series of each class generated in the style of the home plots and mixed into training, where the classes are "
        "betise's nine kinds.",
        unit="series",
        minimum=0,
    )
    generated_present: int = setting(
        500,
        "Series of each class generated with betise's present parameters and mixed into training.",
        unit="series",
        minimum=0,
    )
    fresh_per_class: int = setting(
        20,
        "Series of each class with betise's present parameters kept for a validation of their own.",
        unit="series",
        minimum=0,
    )
    real_share: float = setting(
        0.4,
        "Share of an epoch's plots that come from the data set, the others are generated ones.",
        unit="fraction",
        minimum=0.01,
        maximum=1.0,
    )
    epoch_samples: int = setting(
        0, "Plots shown in one epoch; 0 shows each plot of the data set once.", unit="plots", minimum=0
    )


@dataclass(frozen=True)
class ClassifierModelSettings(Settings):
    """The model."""

    latent_dim: int = setting(128, "Length of the latent vector.", minimum=1, maximum=4096)
    profile_channels: int = setting(
        48,
        "Channels of the encoder's branch that reads the trace column by column; 0 leaves it out.",
        minimum=0,
        maximum=512,
    )
    widths: tuple[int, ...] = setting(
        (12, 24, 48, 96),
        "Channels of the encoder's branch that sees the picture in 32 rows, at every second column, every fourth and "
        "so on; none leaves it out.",
        minimum=4,
        maximum=1024,
    )
    ink: bool = setting(True, "Let the picture branch see the distance from white instead of three colours.")
    dropout: float = setting(
        0.2,
        "Share of latent means silenced before the classifier head in training.",
        unit="fraction",
        minimum=0.0,
        maximum=0.9,
    )
    decoder_channels: int = setting(
        64, "Channels of the decoder along the columns of the reconstruction.", minimum=4, maximum=1024
    )
    detail_channels: int = setting(
        4, "Detail latents of each column of the reconstruction, beside the latent vector.", minimum=1, maximum=64
    )
    reconstruction_size: int = setting(
        224,
        "Side of the reconstruction, whatever the encoder sees.",
        unit="px",
        minimum=32,
        maximum=1024,
        multiple_of=32,
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.profile_channels and not self.widths:
            raise UsageError(
                "The encoder has no branch: profile_channels is 0 and widths is empty; expected at least one of them."
            )


@dataclass(frozen=True)
class ClassifierLossSettings(Settings):
    """The loss."""

    reconstruction_weight: float = setting(
        1.0, "Weight of the reconstruction error, which is 1 for the mean training plot.", minimum=0.0
    )
    kl_weight: float = setting(
        1.0, "Weight of the KL divergence of both latents, in nats per pixel of the reconstruction.", minimum=0.0
    )
    class_weight: float = setting(1.0, "Weight of the cross-entropy in nats.", minimum=0.0)
    ssim_share: float = setting(
        0.3,
        "Share of 1 - SSIM in the reconstruction error; the rest is squared error, absolute error and earth mover's "
        "distance in equal parts.",
        unit="fraction",
        minimum=0.0,
        maximum=1.0,
    )
    reconstruction_share: float = setting(
        0.125, "Share of each training batch that is reconstructed.", unit="fraction", minimum=0.01, maximum=1.0
    )
    detail_dropout: float = setting(
        0.1,
        "Share of the reconstructed training plots that are drawn from the latent vector alone, with the details it "
        "lets expect.",
        unit="fraction",
        minimum=0.0,
        maximum=1.0,
    )
    label_smoothing: float = setting(
        0.1, "Probability moved from the true class to all classes.", unit="fraction", minimum=0.0, maximum=0.9
    )
    mixup_alpha: float = setting(
        0.0, "Beta distribution's parameter of mixing two plots and their labels; 0 never mixes.", minimum=0.0
    )


@dataclass(frozen=True)
class TrainClassifierSettings(
    ClassifierLossSettings,
    ClassifierModelSettings,
    GeneratedDataSettings,
    SupervisedDataSettings,
    LoaderSettings,
    RunSettings,
):
    """Training."""

    epochs: int = setting(60, "Passes over the training plots.", unit="epochs", minimum=1)
    batch_size: int = setting(32, "Plots in one optimizer step.", unit="plots", minimum=1)
    learning_rate: float = setting(
        0.002, "Peak learning rate of AdamW; it warms up and falls to zero along a cosine.", minimum=0.0
    )
    warmup_frac: float = setting(
        0.1, "Share of the steps over which the learning rate rises.", unit="fraction", minimum=0.0, maximum=0.9
    )
    weight_decay: float = setting(0.05, "Decoupled weight decay of AdamW.", minimum=0.0)
    gradient_clip: float = setting(1.0, "Largest gradient norm.", minimum=0.0)
    ema_decay: float = setting(
        0.998,
        "Decay per step of the running average of weights that is validated and kept; 0 keeps the plain weights.",
        minimum=0.0,
        maximum=0.99999,
    )
    precision: str = setting(
        "auto", "Number format of the forward pass; auto takes float32 on CPU.", choices=("auto", "float32", "bfloat16")
    )
    flips_below: float = setting(
        0.6,
        "Where the class of a plot is less sure than this, average over it and those of its flips (backwards, upside "
        "down, both) that training allowed; 0 never does, 1 always.",
        unit="probability",
        minimum=0.0,
        maximum=1.0,
    )
    target_false_alarms: float = setting(
        0.05,
        "Share of plots of the known kinds that may be called none of these.",
        unit="fraction",
        minimum=0.0001,
        maximum=0.5,
    )
    picture_every: int = setting(
        5, "Write a reconstruction picture every so many epochs, and after the last.", unit="epochs", minimum=1
    )
    bootstrap: int = setting(1000, "Resamples behind each 95 % interval.", minimum=0)
    resume: bool = setting(False, "Go on from the last checkpoint in the output folder.")


@dataclass(frozen=True)
class ClassifierBenchmarkSettings(TrainClassifierSettings):
    """The comparison."""

    methods: tuple[str, ...] = setting(
        ("joint", "resnet", "frozen"),
        "Methods to compare: the VAE classifier, a ResNet without VAE, a VAE without labels whose frozen encoder gets "
        "a head.",
        choices=("joint", "resnet", "frozen"),
    )
    head_share: float = setting(
        0.2,
        "Share of the epochs that the head on the frozen encoder is trained.",
        unit="fraction",
        minimum=0.01,
        maximum=0.9,
    )


@dataclass(frozen=True)
class InferClassifierSettings(RunSettings):
    """Inference."""

    inputs: tuple[str, ...] = setting(
        (), "Images, CSV series, folders of them (searched recursively) or quoted globs.", positional="*"
    )
    model: str = setting(
        "",
        "Checkpoint written by train_vae_classifier.py; empty means vae_models/best_vae_classifier.pth in the output "
        "folder, or in the current one where there is none.",
    )
    batch_size: int = setting(8, "Plots in one forward pass.", unit="plots", minimum=1)
    flips: str = setting(
        "auto",
        "Average over the flips of a plot that training allowed; auto does so for those that the model is unsure of.",
        choices=("auto", "always", "never"),
    )
    pictures: bool = setting(True, "Write a picture of original, reconstruction and class probabilities.")
    max_pictures: int = setting(200, "Pictures written at most, those of the first plots.", unit="pictures", minimum=0)
    encode: bool = setting(False, "Also write the latent means of every plot as results/latent/latent.csv.")
    scatter: str = setting(
        "none",
        "Also draw the latent means of all plots in two dimensions, coloured by class.",
        choices=("none", "pca", "tsne"),
    )
    clusters: int = setting(
        0,
        "Also group the latent means into so many clusters, a column of latent.csv and, with --scatter, a second "
        "picture; 0 groups none.",
        unit="clusters",
        minimum=0,
    )
    generate: str = setting("", "Generate plots of this class as a picture; needs no inputs.")
    interpolate: bool = setting(
        False, "Draw the way through latent space from the first plot to the second; takes exactly two."
    )
    n_pictured: int = setting(8, "Plots that --generate and --interpolate draw.", unit="plots", minimum=2, maximum=64)


CLASSES = (
    "collective_anomaly",
    "contextual_anomaly",
    "deterministic_trend",
    "mean_shift",
    "point_anomaly",
    "stochastic_trend",
    "trend_shift",
    "variance_shift",
    "volatility",
)
"""The nine kinds of series; a data set may have other classes."""
LATENT_DIM = ClassifierModelSettings.latent_dim
RECONSTRUCTION_WEIGHT = ClassifierLossSettings.reconstruction_weight
KL_WEIGHT = ClassifierLossSettings.kl_weight
CLASS_WEIGHT = ClassifierLossSettings.class_weight
EPOCHS = TrainClassifierSettings.epochs
BATCH_SIZE = TrainClassifierSettings.batch_size
LEARNING_RATE = TrainClassifierSettings.learning_rate
IMAGE_SIZE = SupervisedDataSettings.image_size


def __getattr__(name: str):
    """``config.DEVICE``, for notebooks: found out when it is first asked for,
    so that flags and --help need no torch."""
    if name != "DEVICE":
        raise AttributeError(f"module 'config' has no attribute {name!r}")
    return "cuda" if importlib.import_module("torch").cuda.is_available() else "cpu"


@dataclass(frozen=True)
class DrawingSettings(RunSettings):
    """Drawing of plots."""

    num_workers: int = setting(-1, "Processes that draw; -1 takes one a core, 0 draws in this one.", minimum=-1)


@dataclass(frozen=True)
class RenderSettings(DrawingSettings):
    """Rendering."""

    source: tuple[str, ...] = setting((), "Folder of class folders of CSV series, or of CSV series.", positional="+")
    out: str = setting(
        "data/rendered", "Folder that receives the plots, under the output folder; the folders of the source are kept."
    )


@dataclass(frozen=True)
class GenerateSettings(DrawingSettings):
    """Generating."""

    seed: int = setting(
        0,
        "Seed of every random choice; the same seed gives the same series, so a test set needs another than its "
        "training set.",
        minimum=0,
        maximum=LARGEST_INT,
    )
    per_class: int = setting(100, "Series of each of the nine kinds.", unit="series", minimum=1)
    out: str = setting(
        "data/generated",
        "Folder that receives class folders of plots, under the output folder; the CSVs go beside it, to the same "
        "name with _csv.",
    )
    home_share: float = setting(
        0.5,
        "Share of series in the style of the home plots; the others follow betise's present parameters.",
        unit="fraction",
        minimum=0.0,
        maximum=1.0,
    )


# ---------------------------------------------------------------------------------- reading flags, files


def as_dict(settings: Settings) -> dict:
    """Plain numbers, strings, lists: fit for YAML, JSON and a checkpoint."""
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(settings).items()
    }


def from_dict(settings_class: type[Settings], values: dict, given: Iterable[str] = ()) -> Settings:
    """Rebuild settings from ``as_dict``; keys of other classes are ignored, types are checked; ``given`` as
    ``Settings.given``.

    Raises:
        UsageError: a value has the wrong type or lies outside its bounds.
    """
    hints = typing.get_type_hints(settings_class)
    known = {field.name for field in dataclasses.fields(settings_class)}
    settings = settings_class(**{key: _coerce(key, value, hints[key]) for key, value in values.items() if key in known})
    object.__setattr__(settings, "given", frozenset(known.intersection(given)))
    return settings


def save(settings: Settings, path: Path) -> None:
    """Write the resolved settings as YAML, so that a run can be read and repeated."""
    import yaml

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(as_dict(settings), sort_keys=False), encoding="utf-8")


def _coerce(key: str, value, hint):
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        if not isinstance(value, (str, list, tuple)):
            raise UsageError(f"{key} is {value!r}; expected a list of {item.__name__}.")
        return tuple(_coerce(key, part, item) for part in ([value] if isinstance(value, str) else value))
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):  # YAML 1.1 reads 1e-3 as text
        try:
            return float(value)
        except OverflowError:
            return math.inf  # which no setting may be
        except ValueError:
            pass
    if type(value) is not hint:
        raise UsageError(f"{key} is {value!r}; expected {hint.__name__}.")
    return value


def all_settings() -> list[type[Settings]]:
    """Every settings class of the project."""
    found, queue = [], [Settings]
    while queue:
        for child in queue.pop().__subclasses__():
            if child not in found:
                found.append(child)
                queue.append(child)
    return found


def read_yaml(path: str) -> dict:
    """The keys and values of a YAML file; every key must belong to some stage.

    Raises:
        UsageError: no such file, not a mapping, or an unknown key (the nearest right one is named).
    """
    import yaml

    try:
        values = yaml.safe_load(_text_of(path))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        # ValueError: not UTF-8, or a date that does not exist; RecursionError: thousands of open brackets
        raise UsageError(f"The configuration file {path} cannot be read: {' '.join(str(error).split())}.") from None
    values = {} if values is None else values  # of an empty file
    if not isinstance(values, dict):
        raise UsageError(f"The configuration file {path} holds no settings; expected lines such as 'epochs: 60'.")
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    known = {field.name for cls in all_settings() for field in dataclasses.fields(cls)}
    for key in values:
        if key not in known:
            raise UsageError(f"Unknown setting '{key}' in {path}{_nearest(key, known)}")
    return values


def _text_of(path: str) -> str:
    return (
        Path(path).read_text(encoding="utf-8")
        if Path(path).is_file()
        else _text_of_pipe(path, Path(path).stat().st_ino)
    )


@functools.cache
def _text_of_pipe(path: str, inode: int) -> str:
    """What a pipe holds, which can be read once, and a command line is parsed twice."""
    return Path(path).read_text(encoding="utf-8")


def _nearest(word: str, known: Iterable[str]) -> str:
    """Suggestion for an unknown word, as the end of a sentence: by initials (``lr``), else by similarity."""
    bare, names = word.strip("-"), {name.strip("-"): name for name in sorted(known)}
    of_initials = [name for name in names if "".join(part[0] for part in re.split("[-_]", name)) == bare]
    return f"; did you mean '{names[(of_initials or difflib.get_close_matches(bare, names, 1, cutoff=0.0))[0]]}'?"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UsageError(f"{message[:1].upper()}{message[1:].rstrip('.')}. See {self.prog} --help.")


def build_parser(settings_class: type[Settings], description: str, prog: str | None = None) -> argparse.ArgumentParser:
    """An argument parser with one flag (or bare argument) for each field of the class, in groups by the classes that
    these come from, plus --config.
    """
    hints, fields = typing.get_type_hints(settings_class), dataclasses.fields(settings_class)
    bare = [
        f" {field.name} ..." if field.metadata["positional"] == "+" else f" [{field.name} ...]"
        for field in fields
        if field.metadata["positional"]
    ]
    parser = _Parser(
        prog=prog,
        usage=f"%(prog)s [options]{''.join(bare)}",
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="YAML file of settings; flags beat it.")
    for owner in settings_class.__mro__:
        own = [field for field in fields if _owner(settings_class, field.name) is owner]
        if own:
            group = parser.add_argument_group(owner.__doc__.strip(".").lower())
            for field in own:
                _add_flag(group, field, hints[field.name])
    return parser


def _owner(settings_class: type[Settings], name: str) -> type[Settings]:
    """The class, of those that a settings class inherits from, that first had a field of that name."""
    return next(cls for cls in reversed(settings_class.__mro__) if name in vars(cls).get("__annotations__", {}))


def _add_flag(group: argparse._ArgumentGroup, field: dataclasses.Field, hint) -> None:
    about, flag = field.metadata, "--" + field.name.replace("_", "-")
    text = about["meaning"].replace("%", "%%") + (f" [{about['unit']}]" if about["unit"] else "")
    if about["positional"]:
        group.add_argument(field.name, nargs="*", help=text)
        return
    text += f" (default: {field.default if field.default != '' else 'none'})"
    values = "{" + ",".join(about["choices"]) + "}" if about["choices"] else None
    if hint is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
    elif typing.get_origin(hint) is tuple:
        group.add_argument(flag, nargs="*", type=typing.get_args(hint)[0], metavar=values, help=text)
    else:
        group.add_argument(flag, type=hint, metavar=values or hint.__name__.upper(), help=text)


def parse(
    settings_class: type[Settings], description: str, argv: Sequence[str] | None = None, prog: str | None = None
) -> Settings:
    """Settings from flags, then the file of --config, then the defaults.

    Raises:
        UsageError: an unknown flag or key, a value outside its bounds, or a required argument is given nowhere.
    """
    parser = build_parser(settings_class, description, prog)
    argv = list(sys.argv[1:] if argv is None else argv)
    end = argv.index("--") if "--" in argv else len(argv)
    found, unknown = parser.parse_known_intermixed_args(argv[:end])
    bare = [field.name for field in dataclasses.fields(settings_class) if field.metadata["positional"]]
    names = argv[end + 1 :]  # which may begin with a dash
    if bare and names:
        setattr(found, bare[-1], [*getattr(found, bare[-1], ()), *names])
    else:
        unknown += names
    if unknown:
        flags = [option for action in parser._actions for option in action.option_strings]
        raise UsageError(f"Unknown argument '{unknown[0]}'{_nearest(unknown[0], flags)} See {parser.prog} --help.")
    given = vars(found)
    config_file = given.pop("config", None)
    values = {**(read_yaml(config_file) if config_file else {}), **given}
    settings = from_dict(settings_class, values, given=values)
    missing = [
        field.name
        for field in dataclasses.fields(settings_class)
        if field.metadata["positional"] == "+" and not getattr(settings, field.name)
    ]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    return settings
