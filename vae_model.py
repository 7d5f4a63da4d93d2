"""DetailVAE: a variational autoencoder with a global and a detail latent, its loss, and loading one from a file.

The encoder starts from the features of a frozen perceptual backbone (or, without one, from a trained pixel
stem) and leads through residual blocks to two latents: ``z`` (a vector: pose, light, kind of part) and
``z_detail`` (a map, one place for every 32 px: what is where). From these latents alone the decoder predicts
the features *and how sure it is of each* (a log-variance). A second branch goes on to pixels, with
detail-enhancement layers and skip connections from the pixel stem. Each skip passes a gate that closes where
the features came as a surprise, so that a defect is not copied through the skip into the reconstruction. Its
gradient stops at what both branches share: the latents learn from features alone, where there are any. A head
that no other part learns from outlines defects, from all that the model sees and says of an image.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoints import load_checkpoint, load_weights, reading_contents
from config import LossSettings, ModelSettings, from_dict
from coresets import ROWS_AT_ONCE, cell_means, farthest_points, sample_rows
from data_loader import assert_images
from engine import DivergedError, resolve_device
from evaluation import mae, mse
from layers import (
    BATCH_NORM_MOMENTUM,
    LOGVAR_RANGE,
    Down,
    ResidualBlock,
    conv_norm,
    kl_divergence,
    reparameterise,
)
from perceptual_loss import load_backbone, weights_here

KIND = "detail_vae"
BEST, LAST = Path("models") / "best_model.pth", Path("models") / "last.pth"
"""Checkpoints that training leaves under its output folder: for inference, and to go on from."""
SIDE_MULTIPLE_PX = 32
"""Sides that the model takes: it halves them five times."""
LATENT_TERMS = ("kl", "kl_detail", "feature", "feature_nll")
"""Terms of the loss that the pixel branch has no part in."""
GATE_LEVEL = 0.95
"""Surprise at which every skip is half shut; good places lie near log(2) = 0.69."""
GATE_SHARPNESS = 8.0
"""How steeply it shuts."""
FEATURE_STRIDE = 8
SHRINKAGE = 0.02
"""Share of the identity in the correlation of features."""
N_PROTOTYPES = 2048
"""Deviations, and features, that are kept."""
N_CANDIDATES = 2**19
"""Places that either are chosen from: all those of 227 images of 384 px, 370 MB of Lite0's features while they are
chosen; fewer of a wider backbone's.
"""
MOST_CANDIDATE_NUMBERS = 2**27
"""Numbers that those hold at most."""


class VAEOutput(NamedTuple):
    """What ``DetailVAE(images)`` returns; D = latent_dim, d = detail_channels."""

    reconstruction: Tensor | None  # (B, 3, H, W) in [0, 1]; None where ``describe`` did not paint
    mu: Tensor  # (B, D)
    logvar: Tensor  # (B, D)
    detail_mu: Tensor  # (B, d, H/32, W/32)
    detail_logvar: Tensor  # (B, d, H/32, W/32)


class Painting(NamedTuple):
    """What the pixel decoder returns."""

    reconstruction: Tensor  # (B, 3, H, W) in [0, 1], with what passed the skip at full resolution
    painted: Tensor  # (B, 3, H, W) in [0, 1], without it
    logvar: Tensor  # (B, 1, H, W) log-variance of ``painted``


class DetailOutput(NamedTuple):
    """What ``DetailVAE.describe`` returns; C = channels of the backbone's grid, None without a backbone."""

    vae: VAEOutput
    pixel_logvar: Tensor | None  # (B, 1, H, W), None where the pixel branch did not run
    defect_logits: Tensor | None  # (B, 1, H, W) log-odds of a defect, None there too and without the head
    features: Tensor | None  # (B, C, H/8, W/8) standardised features of the input
    feature_mu: Tensor | None  # (B, C, H/8, W/8) predicted from the latents alone
    feature_logvar: Tensor | None  # (B, C, H/8, W/8)
    trunk: Tensor  # (B, 8 * base_channels, H/8, W/8) what both decoder branches start from

    @property
    def deviation(self) -> Tensor:
        """Errors of features in units of their predicted standard deviation, (B, C, H/8, W/8)."""
        return deviations(self.features, self.feature_mu, self.feature_logvar)

    def at(self, rows: list[int]) -> DetailOutput:
        """The same of some images of the batch."""

        def taken(tensors):
            return [None if each is None else each[rows] for each in tensors]

        return DetailOutput(VAEOutput(*taken(self.vae)), *taken(self[1:]))


# ---------------------------------------------------------------------------------------------- blocks


class Up(nn.Module):
    """Double the resolution (bilinear, so no checkerboard), then one residual block."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.reduce = conv_norm(n_in, n_out)
        self.block = ResidualBlock(n_out)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(F.silu(self.reduce(x)), scale_factor=2, mode="bilinear", align_corners=False)
        return self.block(x)


class DetailEnhancement(nn.Module):
    """Add a learned multiple of what a blur removes, the edges and fine texture (as in unsharp masking)."""

    def __init__(self, channels: int):
        super().__init__()
        self.sharpen = conv_norm(channels, channels)
        self.strength = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        detail = x - F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return x + self.strength.to(x.dtype) * torch.tanh(self.sharpen(detail))


class GatedSkip(nn.Module):
    """A skip connection that closes where the features came as a surprise.

    Two factors open it: one learned from what is decoded and the surprise, and ``ceiling``, so that a defect unlike
    all drawn ones closes it too. In training the normalised skip gets noise, so that the decoder leans on the latents.
    """

    def __init__(self, channels: int, noise: float):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, momentum=BATCH_NORM_MOMENTUM, affine=False)
        self.gate = nn.Sequential(nn.Conv2d(channels + 1, channels, 1), nn.SiLU(), nn.Conv2d(channels, 1, 3, padding=1))
        self.mix = conv_norm(channels, channels)
        self.noise = noise

    def forward(self, decoded: Tensor, skip: Tensor, surprise: Tensor) -> Tensor:
        skip = self.norm(skip)
        if self.training and self.noise:
            skip = skip + self.noise * (12**0.5) * (torch.rand_like(skip) - 0.5)
        surprise = resized(surprise, skip)
        openness = torch.sigmoid(self.gate(side_by_side(decoded, surprise))) * ceiling(surprise)
        return decoded + self.mix(openness.to(skip.dtype) * skip)


class ImageSkip(nn.Module):
    """The skip connection at full resolution: where its gate is open the image itself passes, elsewhere what was
    painted.

    The gate compares what is decoded with and without the skip at half resolution and the skip itself; ``ceiling``
    bounds it.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, momentum=BATCH_NORM_MOMENTUM, affine=False)
        self.gate = nn.Sequential(
            conv_norm(3 * channels + 1, channels),
            nn.SiLU(),
            ResidualBlock(channels),
            nn.Conv2d(channels, 4, 3, padding=1),
            nn.PixelShuffle(2),
        )

    def forward(
        self, decoded: Tensor, joined: Tensor, skip: Tensor, painted: Tensor, images: Tensor, surprise: Tensor
    ) -> Tensor:
        """Reconstruction (B, 3, H, W) from ``decoded``, ``joined`` and ``skip`` (B, C, H/2, W/2); ``painted`` and
        ``images`` (B, 3, H, W).
        """
        seen = side_by_side(decoded, joined, self.norm(skip), resized(surprise, skip))
        openness = torch.sigmoid(self.gate(seen).float()) * ceiling(resized(surprise, images))
        return painted + openness * (images - painted)


class DefectHead(nn.Module):
    """Log-odds of a defect at every pixel: a small U-Net (Ronneberger et al. 2015) over all that the model says of an
    image.

    It learns from drawn defects, as the second network of DRAEM does (Zavrtanik et al. 2021).

    Args:
        tap_channels: channels of each tap of the backbone; all of them, and how far they deviate, enter at stride 8.
        width: channels at half resolution.
    """

    def __init__(self, tap_channels: Sequence[int], width: int):
        super().__init__()
        n_features, n_squeezed = sum(tap_channels), 2 * width if tap_channels else 0
        self.enter = nn.Sequential(nn.PixelUnshuffle(2), conv_norm(4 * 9, width), nn.SiLU(), ResidualBlock(width))
        self.down4, self.down8 = Down(width, 3 * width), Down(3 * width, 4 * width)
        self.squeeze = (
            nn.Sequential(conv_norm(2 * n_features, n_squeezed, 1), nn.SiLU()) if n_features else nn.Identity()
        )
        self.join = nn.Sequential(
            conv_norm(4 * width + len(tap_channels) + n_squeezed, 4 * width), nn.SiLU(), ResidualBlock(4 * width)
        )
        self.up4, self.up2 = Up(4 * width, 3 * width), Up(3 * width, width)
        self.leave = nn.Sequential(nn.Conv2d(width, 4, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, images: Tensor, painting: Painting, taps: Tensor, features: Tensor) -> Tensor:
        """(B, 1, H, W) from images (B, 3, H, W) in [0, 1], what was painted of them, and what ``DetailVAE.seen``
        returns.
        """
        residual = painting.reconstruction - images
        likely = ((painting.painted - images) * torch.exp(-0.5 * painting.logvar)).clamp(-10, 10)
        x2 = self.enter(side_by_side(images - 0.5, 10 * residual, likely))
        x4 = self.down4(x2)
        x = self.join(side_by_side(self.down8(x4), taps.clamp_min(0.01).log(), self.squeeze(side_by_side(features))))
        return self.leave(self.up2(self.up4(x) + x4) + x2).float()


def side_by_side(*maps: Tensor) -> Tensor:
    """Maps (B, C_i, H, W) as one (B, sum of C_i, H, W) in the type that convolutions work in, its channels last in
    memory.

    ``torch.cat`` widens mixed types, and lays all out anew beside a map of one channel; the convolutions after that
    took twice the time.
    """
    device = maps[0].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else maps[0].dtype
    return torch.cat([each.to(dtype).permute(0, 2, 3, 1) for each in maps], -1).permute(0, 3, 1, 2)


def ceiling(surprise: Tensor) -> Tensor:
    """How far a skip may open at most, in (0, 1): near 1 where features are as expected, near 0 where they surprise."""
    return torch.sigmoid(GATE_SHARPNESS * (GATE_LEVEL - surprise))


def resized(maps: Tensor, like: Tensor) -> Tensor:
    """Maps (B, C, h, w) at the height and width of ``like``."""
    return F.interpolate(maps, size=like.shape[-2:], mode="bilinear", align_corners=False)


# ----------------------------------------------------------------------------------------------- model


class DetailVAE(nn.Module):
    """The dual-latent variational autoencoder.

    Args:
        settings: architecture (latent sizes, width, skips, backbone).
        vgg16_weights: the user's file for a VGG16 backbone; empty means the places ``load_backbone`` knows.

    Images are float32 RGB in [0, 1], (B, 3, H, W) with H and W multiples of 32. The frozen backbone is no
    part of ``state_dict``.
    """

    def __init__(self, settings: ModelSettings | None = None, vgg16_weights: str = ""):
        super().__init__()
        self.settings = settings = settings or ModelSettings()
        width = settings.base_channels
        self.widths = (width, 2 * width, 4 * width, 8 * width, 12 * width)
        self._hold_backbone(settings.backbone, vgg16_weights)
        self._build_encoder()
        self._build_decoder()
        self.defect_head = None
        if settings.segmentation:
            self.add_defect_head()

    def add_defect_head(self) -> None:
        """A new head that outlines defects; without one nothing is outlined."""
        self.defect_head = DefectHead(self.tap_channels, self.settings.base_channels)

    @property
    def pixel_branch(self) -> nn.ModuleList:
        """All that only pixels are painted with: the layers from the trunk on, and the pixel stem where the latents do
        not come from it.
        """
        names = ["up4", "up2", "detail4", "detail2", "pixel_head"]
        if self.settings.skips:
            names += ["skip4", "skip2", "skip1", *(["stem2", "stem4"] if self.n_features else [])]
        return nn.ModuleList(getattr(self, name) for name in names)

    def _hold_backbone(self, name: str, vgg16_weights: str) -> None:
        backbone = None if name == "none" else load_backbone(name, vgg16_weights)
        self.__dict__["backbone"] = backbone  # past nn.Module's registry: never saved, never trained
        self.tap_channels = () if backbone is None else backbone.tap_channels
        self.n_features = sum(self.tap_channels)
        self.register_buffer("feature_mean", torch.zeros(1, max(self.n_features, 1), 1, 1))
        self.register_buffer("feature_std", torch.ones(1, max(self.n_features, 1), 1, 1))
        self.register_buffer("whitening", torch.eye(self.n_features))
        self.register_buffer("prototypes", torch.zeros(N_PROTOTYPES, self.n_features))
        self.register_buffer("bank", torch.zeros(N_PROTOTYPES, self.n_features))

    def _build_encoder(self) -> None:
        w, s = self.widths, self.settings
        self.stem2 = nn.Sequential(nn.PixelUnshuffle(2), conv_norm(12, w[0]), nn.SiLU(), ResidualBlock(w[0]))
        self.stem4 = Down(w[0], w[1])
        if self.n_features:
            self.enter = nn.Sequential(conv_norm(self.n_features, w[3], 1), nn.SiLU())
        else:
            self.enter = Down(w[1], w[3])
        self.down16 = Down(w[3], w[3])
        self.down32 = Down(w[3], w[4])
        self.to_global = nn.Linear(w[4], 2 * s.latent_dim)
        self.to_detail = nn.Conv2d(w[4], 2 * s.detail_channels, 1)

    def _build_decoder(self) -> None:
        w, s = self.widths, self.settings
        self.from_global = nn.Linear(s.latent_dim, w[4])
        self.from_detail = nn.Conv2d(s.detail_channels + 2, w[4], 3, padding=1)
        self.block32 = ResidualBlock(w[4])
        self.up16 = Up(w[4], w[3])
        self.up8 = Up(w[3], w[3])
        if self.n_features:
            self.feature_head = nn.Sequential(conv_norm(w[3], w[3]), nn.SiLU(), nn.Conv2d(w[3], 2 * self.n_features, 1))
        self.up4 = Up(w[3], w[1])
        self.up2 = Up(w[1], w[0])
        self.detail4, self.detail2 = DetailEnhancement(w[1]), DetailEnhancement(w[0])
        if s.skips:
            self.skip4, self.skip2 = GatedSkip(w[1], s.skip_noise), GatedSkip(w[0], s.skip_noise)
            self.skip1 = ImageSkip(w[0])
        self.pixel_head = nn.Sequential(nn.Conv2d(w[0], 16, 3, padding=1), nn.PixelShuffle(2))

    # --------------------------------------------------------------------------------------- features

    @torch.no_grad()
    def grid_features(self, images: Tensor) -> Tensor | None:
        """Standardised backbone features (B, C, H/8, W/8) of images, or None without a backbone."""
        if self.backbone is None:
            return None
        self.backbone.to(images.device)
        return (self.backbone.grid(images).float() - self.feature_mean) / self.feature_std

    @torch.no_grad()
    def fit_feature_scale(self, batches) -> None:
        """Set mean and standard deviation of every feature channel from batches of good training images."""
        if self.backbone is None:
            return
        total = square = count = 0
        for images in batches:
            grid = self.backbone.to(images.device).grid(images).double()
            total, square = total + grid.sum((0, 2, 3)), square + (grid**2).sum((0, 2, 3))
            count += grid.shape[0] * grid.shape[2] * grid.shape[3]
        mean = total / count
        std = (square / count - mean**2).clamp_min(1e-12).sqrt()
        std = torch.maximum(std, 0.01 * std.mean()).clamp_min(1e-4)  # a channel at rest here may wake on a defect
        self.feature_mean.copy_(mean.float().view(1, -1, 1, 1))
        self.feature_std.copy_(std.float().view(1, -1, 1, 1))

    @torch.no_grad()
    def fit_bank(self, features: Iterable[Tensor], n_images: int) -> None:
        """Keep features that represent those of all n good training images, from batches of them (B, C, h, w).

        A memory bank as in Roth et al. 2022 (algorithm 1), of fixed size: a greedy coreset of a sample of places, then
        each moved into the middle of those that are nearest to it, for a greedy choice takes what is extreme.
        """
        generator = torch.Generator().manual_seed(0)
        candidates = sample_rows((batch.cpu() for batch in features), n_images, self._n_candidates, generator)
        self.bank.copy_(cell_means(candidates, candidates[farthest_points(candidates, N_PROTOTYPES, generator)]))

    @torch.no_grad()
    def fit_deviations(self, features: Iterable[Tensor], n_images: int) -> None:
        """Learn how features deviate from their prediction on n good training images, from batches of their features
        (B, C, h, w): ``whitening``, and ``prototypes``.

        The latter are deviations, decorrelated, that represent all others: a greedy coreset (as in Roth et al. 2022,
        algorithm 1), each the farthest from those before it.
        """
        if self.backbone is None:
            return
        generator = torch.Generator().manual_seed(0)
        candidates = self.fit_whitening(features, n_images, generator)
        self.prototypes.copy_(candidates[farthest_points(candidates, N_PROTOTYPES, generator)])

    @torch.no_grad()
    def fit_whitening(self, features: Iterable[Tensor], n_images: int, generator: torch.Generator) -> Tensor:
        """Learn how the channels' deviations go together, likewise; returns a sample of them decorrelated, (N, C).

        The likelihood of features is a Gaussian with covariance D R D: D, the predicted standard deviations, is of the
        place; R, the second moments of deviations over D within each tap of the backbone (drawn by 2 % to a multiple of
        the identity), is of the data set. ``whitening`` W has W R W' = 1.

        Raises:
            DivergedError: a deviation is not finite.
        """
        self.eval()
        told = (self.describe(None, batch, paint=False).deviation.cpu() for batch in features)
        sample = sample_rows(told, n_images, self._n_candidates, generator)
        parts = sample.split(ROWS_AT_ONCE)
        moments = sum(part.double().T @ part.double() for part in parts) / len(sample)
        moments = (1 - SHRINKAGE) * moments + SHRINKAGE * moments.diagonal().mean() * torch.eye(
            self.n_features, dtype=torch.float64
        )
        if not moments.isfinite().all():
            raise DivergedError(
                "The model's predictions became infinite; training stops (try a lower --learning-rate)."
            )
        same_tap = torch.block_diag(*(torch.ones(n, n) for n in self.tap_channels))
        whitening = _inverse_factor(moments * same_tap).float()
        self.whitening.copy_(whitening)
        for part in parts:
            part.copy_(part @ whitening.T)
        return sample

    @property
    def _n_candidates(self) -> int:
        return min(N_CANDIDATES, MOST_CANDIDATE_NUMBERS // self.n_features)

    # ---------------------------------------------------------------------------------------- forward

    def encode(self, images: Tensor | None, features: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(mu, logvar, detail_mu, detail_logvar) from standardised features, or from images without a backbone."""
        x = self.enter(self.stem4(self.stem2(images)) if features is None else features)
        x = self.down32(self.down16(x))
        mu, logvar = self.to_global(x.mean((2, 3))).chunk(2, 1)
        detail_mu, detail_logvar = self.to_detail(x).chunk(2, 1)
        return (
            mu.float(),
            logvar.float().clamp(*LOGVAR_RANGE),
            detail_mu.float(),
            detail_logvar.float().clamp(*LOGVAR_RANGE),
        )

    def latents(self, mu: Tensor, logvar: Tensor, detail_mu: Tensor, detail_logvar: Tensor) -> tuple[Tensor, Tensor]:
        """Both latents of what ``encode`` says, z (B, D) and z_detail (B, d, H/32, W/32): samples in training, else the
        means.
        """
        return reparameterise(mu, logvar, self.training), reparameterise(detail_mu, detail_logvar, self.training)

    def decode_trunk(self, z: Tensor, z_detail: Tensor) -> Tensor:
        """(B, 8 * base_channels, H/8, W/8) from both latents: z (B, D) and z_detail (B, d, H/32, W/32)."""
        x = self.from_detail(torch.cat([z_detail, _coordinates(z_detail)], 1))
        x = F.silu(x + self.from_global(z)[:, :, None, None])
        return self.up8(self.up16(self.block32(x)))

    def decode_features(self, trunk: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Predicted standardised features and their log-variance, (B, C, H/8, W/8) each."""
        if not self.n_features:
            return None, None
        feature_mu, feature_logvar = self.feature_head(trunk).float().chunk(2, 1)
        return feature_mu, feature_logvar.clamp(*LOGVAR_RANGE)

    def decode_pixels(self, trunk: Tensor, images: Tensor, surprise: Tensor) -> Painting:
        """The reconstruction of images (B, 3, H, W) from the trunk, and how sure it is.

        All three arguments may be the same crop of a larger image (sides multiples of 8).
        """
        x = self.up4(trunk)
        if self.settings.skips:
            skip2 = self.stem2(images)
            x = self.skip4(x, self.stem4(skip2), surprise)
        decoded = self.up2(self.detail4(x))
        joined = self.detail2(self.skip2(decoded, skip2, surprise) if self.settings.skips else decoded)
        # what is painted has more levels than bfloat16 has
        mean, logvar = self.pixel_head(joined).float().split((3, 1), 1)
        reconstruction = painted = torch.sigmoid(mean)
        if self.settings.skips:
            reconstruction = self.skip1(decoded, joined, skip2, painted, images, surprise)
        return Painting(reconstruction, painted, logvar.clamp(*LOGVAR_RANGE))

    def describe(self, images: Tensor | None, features: Tensor | None = None, paint: bool = True) -> DetailOutput:
        """Everything the model says of images (B, 3, H, W) in [0, 1].

        Args:
            features: their standardised features, where already computed; without painting, images are not needed then.
            paint: run the pixel branch; without it reconstruction, pixel_logvar and defect_logits are None, for half
                the time.
        """
        features = self.grid_features(images) if features is None else features
        mu, logvar, detail_mu, detail_logvar = self.encode(images, features)
        trunk = self.decode_trunk(*self.latents(mu, logvar, detail_mu, detail_logvar))
        feature_mu, feature_logvar = self.decode_features(trunk)
        output = DetailOutput(
            vae=VAEOutput(None, mu, logvar, detail_mu, detail_logvar),
            pixel_logvar=None,
            defect_logits=None,
            features=features,
            feature_mu=feature_mu,
            feature_logvar=feature_logvar,
            trunk=trunk,
        )
        return self.paint(images, output) if paint else output

    @torch.no_grad()
    def seen(self, output: DetailOutput) -> tuple[Tensor, Tensor]:
        """Of what ``describe`` said: ``tap_deviations`` (B, n_taps, H/8, W/8), and features beside their deviations,
        both cut at 10 (B, 2 * C, H/8, W/8); no gradient.
        """
        if not self.n_features:
            return output.trunk[:, :0], output.trunk[:, :0]
        deviation = output.deviation
        return tap_roots(deviation, self.tap_channels), torch.cat([output.features, deviation], 1).clamp(-10, 10)

    def paint(self, images: Tensor, output: DetailOutput) -> DetailOutput:
        """What ``describe`` said of these images without painting, with reconstruction,
        pixel_logvar and defect_logits."""
        taps, features = self.seen(output)
        painting = self.decode_pixels(output.trunk, images, feature_surprise(taps, self.tap_channels))
        defect_logits = self.defect_head and self.defect_head(images, painting, taps, features)
        return output._replace(
            vae=output.vae._replace(reconstruction=painting.reconstruction),
            pixel_logvar=painting.logvar,
            defect_logits=defect_logits,
        )

    def forward(self, images: Tensor) -> VAEOutput:
        """What the latents and the pixel decoder say of images (B, 3, H, W).

        Raises:
            ValueError: another type, shape or value range, or sides that are no multiple of SIDE_MULTIPLE_PX.
        """
        return self.describe(assert_sides(assert_images(images))).vae


def assert_sides(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) as they are.

    Raises:
        ValueError: a side is no multiple of SIDE_MULTIPLE_PX.
    """
    if any(side % SIDE_MULTIPLE_PX for side in images.shape[2:]):
        raise ValueError(
            f"images are {images.shape[2]} x {images.shape[3]}; expected multiples of {SIDE_MULTIPLE_PX} "
            "(see image_files.fit_image)."
        )
    return images


def _coordinates(like: Tensor) -> Tensor:
    """Normalised (y, x) in [-1, 1] for every place of a map, (B, 2, h, w): a convolution alone has no place."""
    batch, _, height, width = like.shape
    y = torch.linspace(-1, 1, height, device=like.device, dtype=like.dtype).view(1, 1, height, 1)
    x = torch.linspace(-1, 1, width, device=like.device, dtype=like.dtype).view(1, 1, 1, width)
    return torch.cat([y.expand(batch, 1, height, width), x.expand(batch, 1, height, width)], 1)


def deviations(features: Tensor, feature_mu: Tensor, feature_logvar: Tensor) -> Tensor:
    """Errors in units of the predicted standard deviation, (B, C, h, w)."""
    return (features - feature_mu) * torch.exp(-0.5 * feature_logvar)


def _inverse_factor(matrix: Tensor) -> Tensor:
    """W with W M W' = 1 for a positive definite M (C, C)."""
    factor = torch.linalg.cholesky(matrix)
    return torch.linalg.solve_triangular(factor, torch.eye(len(matrix), dtype=matrix.dtype), upper=False)


def feature_surprise(taps: Tensor, tap_channels: Sequence[int]) -> Tensor:
    """log(1 + mean squared error over predicted variance) at every place, (B, 1, h, w) of ``tap_deviations`` (B,
    n_taps, h, w); 0 where there are no taps.
    """
    weighted = (n / sum(tap_channels) * tap**2 for n, tap in zip(tap_channels, taps.unbind(1), strict=True))
    return torch.log1p(sum(weighted, start=taps[:, :0].sum(1))).unsqueeze(1)


@torch.no_grad()
def tap_deviations(
    features: Tensor | None,
    feature_mu: Tensor | None,
    feature_logvar: Tensor | None,
    tap_channels: Sequence[int],
    like: Tensor,
) -> Tensor:
    """Root mean square of the deviations within each tap of the backbone, (B, n_taps, H/8, W/8), no gradient."""
    return (
        like[:, :0] if features is None else tap_roots(deviations(features, feature_mu, feature_logvar), tap_channels)
    )


def tap_roots(deviation: Tensor, tap_channels: Sequence[int]) -> Tensor:
    """Root of the mean square of the channels of each tap, (B, n_taps, h, w) of (B, C, h, w)."""
    return torch.cat([(tap**2).mean(1, keepdim=True).sqrt() for tap in deviation.split(list(tap_channels), 1)], 1)


# ------------------------------------------------------------------------------------------------ loss


def gaussian_nll(squared_error: Tensor, logvar: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean negative log-likelihood in nats of a Gaussian with that log-variance, (B, C, H, W) both, without the
    constant.

    Kendall & Gal 2017, eq. 5. The caller detaches the error where only the variance is to learn from it. ``weight``
    (B, 1, H, W), of 0 and 1, says which places count; where none does, this is 0.
    """
    nats = 0.5 * (logvar + squared_error * torch.exp(-logvar))
    return nats.mean() if weight is None else (nats.mean(1, keepdim=True) * weight).sum() / weight.sum().clamp_min(1)


def sound_places(defect_mask: Tensor, pasted: Tensor) -> Tensor:
    """1 where features see nothing of a drawn defect (B, 1, H, W) nor of what was ``pasted`` (B, 1, h, w), else 0; (B,
    1, h, w).

    The predicted variance is to tell how much good parts vary: learned from defects too, it grows wherever one was
    drawn, and faint real ones drown in it. A place sees its surroundings, so two more on each side are left out.
    """
    drawn = F.adaptive_max_pool2d(defect_mask.to(pasted), pasted.shape[-2:])
    return 1 - F.max_pool2d(torch.maximum(drawn, pasted), 5, 1, 2)


def corrupt_features(features: Tensor, noise: float, paste_probability: float) -> tuple[Tensor, Tensor]:
    """Features (B, C, h, w) with uniform noise and, in some images, a rectangle pasted from another image; and where,
    (B, 1, h, w) of 0 and 1.

    ``noise`` is a standard deviation (uniform, because Gaussian numbers cost a sixth of a training step on CPU).

    The decoder still has to predict the clean features: the latents learn to leave out what does not belong.
    """
    seen = features + noise * (12**0.5) * (torch.rand_like(features) - 0.5)
    pasted = torch.zeros_like(features[:, :1])
    batch, _, height, width = features.shape
    for index in torch.nonzero(torch.rand(batch) < paste_probability).flatten().tolist():
        h, w = (int(torch.randint(1, max(2, side // 4) + 1, ())) for side in (height, width))
        (y, x), (from_y, from_x) = (
            (int(torch.randint(0, height - h + 1, ())), int(torch.randint(0, width - w + 1, ()))) for _ in range(2)
        )
        donor = int(torch.randint(0, batch, ()))
        seen[index, :, y : y + h, x : x + w] = features[donor, :, from_y : from_y + h, from_x : from_x + w]
        pasted[index, :, y : y + h, x : x + w] = 1
    return seen, pasted


class DetailLoss:
    """Named loss terms of DetailVAE on good images, some of them with a drawn defect to repair.

    Args:
        settings: weights of the terms, crop sizes, feature corruption.
        perceptual: a ``PerceptualLoss``, or None when its weight is 0.
    """

    def __init__(self, settings: LossSettings, perceptual: nn.Module | None):
        self.settings, self.perceptual = settings, perceptual

    def __call__(
        self,
        model: DetailVAE,
        images: Tensor,
        corrupted: Tensor,
        kl_scale: float,
        defect_mask: Tensor | None = None,
        clean: Tensor | None = None,
        actual: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Terms for a batch: what the model makes of ``corrupted`` against the clean ``images``.

        Both (B, 3, H, W) in [0, 1]; ``clean`` and ``actual`` are their standardised features where already
        computed. In training, where ``defect_mask`` (B, 1, H, W) is given, the pixel branch runs on a crop of
        some images of the batch (its convolutions are local, so a crop teaches the same for less). Returns a dict of
        scalars; "total" is the weighted sum of the others.
        """
        clean = model.grid_features(images) if clean is None else clean
        actual = clean if corrupted is images else model.grid_features(corrupted) if actual is None else actual
        latent_terms, trunk, told = self._latent_terms(model, corrupted, clean, actual, defect_mask)
        # pixels' gradients made the latents predict features worse
        drawn_from = trunk if clean is None else trunk.detach()
        terms = self._pixel_terms(model, *self._cropped(model, images, corrupted, defect_mask, drawn_from, told))
        terms |= latent_terms
        return {**terms, "total": self._weigh(terms, kl_scale)}

    def of_features(self, model: DetailVAE, features: Tensor) -> dict[str, Tensor]:
        """The terms that the pixel branch has no part in, and "total", their weighted sum, of standardised features (B,
        C, h, w) alone.
        """
        terms, _, _ = self._latent_terms(model, None, features, features, torch.zeros_like(features[:, :1]))
        return {**terms, "total": self._weigh(terms, 1.0)}

    def _latent_terms(
        self,
        model: DetailVAE,
        corrupted: Tensor | None,
        clean: Tensor | None,
        actual: Tensor | None,
        defect_mask: Tensor | None,
    ) -> tuple[dict[str, Tensor], Tensor, tuple[Tensor | None, ...]]:
        """The terms that the pixel branch has no part in, the trunk, and the features that are judged with their
        prediction and its log-variance.
        """
        seen, pasted = actual, None
        if model.training and actual is not None:
            seen, pasted = corrupt_features(actual, self.settings.feature_noise, self.settings.feature_paste)
        mu, logvar, detail_mu, detail_logvar = model.encode(corrupted, seen)
        trunk = model.decode_trunk(*model.latents(mu, logvar, detail_mu, detail_logvar))
        feature_mu, feature_logvar = model.decode_features(trunk)
        terms = {"kl": kl_divergence(mu, logvar), "kl_detail": kl_divergence(detail_mu, detail_logvar)}
        if clean is not None:
            error = (clean - feature_mu) ** 2
            sound = None if defect_mask is None or pasted is None else sound_places(defect_mask, pasted)
            terms["feature"], terms["feature_nll"] = error.mean(), gaussian_nll(error.detach(), feature_logvar, sound)
        return terms, trunk, (actual, feature_mu, feature_logvar)

    def of_pixels(
        self,
        model: DetailVAE,
        images: Tensor,
        corrupted: Tensor,
        defect_mask: Tensor,
        trunk: Tensor,
        taps: Tensor,
        n_perceptual: int | None = None,
    ) -> dict[str, Tensor]:
        """The terms of the pixel branch alone, and "total", their weighted sum, as it paints ``corrupted`` (B, 3, H, W)
        from its trunk and ``tap_deviations``, H/8 x W/8; the perceptual one of the first ``n_perceptual`` images, None
        of all.
        """
        terms = self._pixel_terms(model, images, corrupted, defect_mask, trunk, taps, n_perceptual)
        return {**terms, "total": self._weigh(terms, 1.0)}

    def of_latents(self, terms: dict[str, float]) -> float:
        """The weighted sum of those terms that the pixel branch has no part in, with the whole weight of the KL
        divergences.
        """
        return self._weigh({name: terms[name] for name in LATENT_TERMS}, 1.0)

    def _cropped(
        self,
        model: DetailVAE,
        images: Tensor,
        corrupted: Tensor,
        defect_mask: Tensor | None,
        trunk: Tensor,
        told: tuple[Tensor | None, ...],
    ) -> tuple[Tensor | None, ...]:
        """What the pixel branch is given, in training crops of it, else of whole images; ``told``: features, their
        prediction and its log-variance.
        """
        if model.training and defect_mask is not None:
            # without features the latents learn from pixels alone
            share = self.settings.pixel_share if model.n_features else 1.0
            windows = crop_windows(defect_mask, self.settings.pixel_crop_px, share)
            trunk, *told = (None if each is None else cut(each, windows, 1) for each in (trunk, *told))
            images, corrupted, defect_mask = (
                cut(each, windows, FEATURE_STRIDE) for each in (images, corrupted, defect_mask.to(images.device))
            )
        return images, corrupted, defect_mask, trunk, tap_deviations(*told, model.tap_channels, trunk)

    def _pixel_terms(
        self,
        model: DetailVAE,
        images: Tensor,
        corrupted: Tensor,
        defect_mask: Tensor | None,
        trunk: Tensor,
        taps: Tensor,
        n_perceptual: int | None = None,
    ) -> dict[str, Tensor]:
        painting = model.decode_pixels(trunk, corrupted, feature_surprise(taps, model.tap_channels))
        weight = (
            torch.ones_like(images[:, :1]) if defect_mask is None else 1 + self.settings.repair_weight * defect_mask
        )
        return self._painted_terms(painting, images, weight, n_perceptual)

    def _painted_terms(
        self, painting: Painting, target: Tensor, weight: Tensor, n_perceptual: int | None
    ) -> dict[str, Tensor]:
        """``weight`` (B, 1, H, W) lets a drawn defect count for more: a copied one is a small part of an image."""
        scale = (weight / weight.mean()).sqrt()

        def errors(drawn: Tensor) -> tuple[Tensor, Tensor]:
            drawn, aim = scale * drawn, scale * target
            return mse(drawn, aim).mean(), mae(scale * drawn, scale * aim).mean()

        terms = dict(zip(("mse", "l1"), errors(painting.reconstruction), strict=True))
        terms["painted"] = sum(errors(painting.painted))
        squared = ((painting.painted - target) ** 2).mean(1, keepdim=True)
        terms["pixel_nll"] = gaussian_nll(squared.detach(), painting.logvar)
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(painting.painted[:n_perceptual], target[:n_perceptual])
        return terms

    def _weigh(self, terms: dict[str, Tensor], kl_scale: float) -> Tensor:
        s = self.settings
        weights = {
            "mse": s.mse_weight,
            "l1": s.l1_weight,
            "painted": s.painted_weight,
            "perceptual": s.perceptual_weight,
            "kl": s.kl_weight * kl_scale,
            "kl_detail": s.detail_kl_weight * kl_scale,
            "feature": s.feature_weight,
            "feature_nll": s.likelihood_weight,
            "pixel_nll": s.pixel_likelihood_weight,
        }
        return sum(weights[name] * term for name, term in terms.items())


def crop_windows(defect_mask: Tensor, side_px: int, share: float) -> list[tuple[int, int, int, int]]:
    """(top, left, height, width) in stride-8 places for each of the first images of a batch, a square for each.

    A crop is placed at random around a random pixel of the image's drawn defect (where it has one), so that most
    crops hold something to repair.

    Args:
        defect_mask: (B, 1, H, W), above 0 on drawn defects.
        side_px: side of the crop, a multiple of 8; 0, or more than the image has, takes whole images.
        share: share of the batch that is cropped and used.
    """
    n_used = max(1, round(share * len(defect_mask)))
    height, width = (length // FEATURE_STRIDE for length in defect_mask.shape[-2:])
    side = side_px // FEATURE_STRIDE
    if side <= 0 or side >= min(height, width):
        return [(0, 0, height, width)] * n_used
    windows = []
    for mask in defect_mask[:n_used, 0]:
        on_defect = torch.nonzero(mask)
        if len(on_defect):
            y, x = (on_defect[int(torch.randint(0, len(on_defect), ()))] // FEATURE_STRIDE).tolist()
            top, left = (place - int(torch.randint(0, side, ())) for place in (y, x))
        else:
            top, left = (int(torch.randint(0, length - side + 1, ())) for length in (height, width))
        windows.append((min(max(top, 0), height - side), min(max(left, 0), width - side), side, side))
    return windows


def cut(maps: Tensor, windows: list[tuple[int, int, int, int]], scale: int) -> Tensor:
    """One window of each of the first maps, (N, C, h * scale, w * scale); ``scale`` is pixels a stride-8 place."""
    return torch.stack(
        [
            each[:, scale * top : scale * (top + height), scale * left : scale * (left + width)]
            for each, (top, left, height, width) in zip(maps, windows, strict=False)
        ]
    )


class FeatureCache:
    """Standardised features of training samples, computed once for each key and kept in half precision.

    One image at a time, so that the values do not depend on which images happen to share a batch.

    Args:
        capacity_bytes: when so much is kept, features of further keys are computed each time.
    """

    def __init__(self, model: DetailVAE, capacity_bytes: int = 3 * 2**29):
        self.model, self.capacity_bytes = model, capacity_bytes
        self.kept: dict[int, Tensor] = {}
        self.n_bytes = 0

    def __call__(self, keys: list[int], images: Tensor) -> Tensor | None:
        """Features (B, C, H/8, W/8) of images (B, 3, H, W) with these keys, on the device of the images."""
        if self.model.backbone is None:
            return None
        # autocast stacks no halves
        kept = [self._one(key, images[index : index + 1]).float() for index, key in enumerate(keys)]
        return torch.stack(kept).to(images.device, memory_format=torch.channels_last)

    def _one(self, key: int, image: Tensor) -> Tensor:
        if key in self.kept:
            return self.kept[key]
        features = self.model.grid_features(image)[0].half().cpu()
        size = features.numel() * features.element_size()
        if self.n_bytes + size <= self.capacity_bytes:
            self.kept[key], self.n_bytes = features, self.n_bytes + size
        return features


# --------------------------------------------------------------------------------------- from a file


def detail_vae_from_checkpoint(contents: dict, path: Path | str) -> DetailVAE:
    """The model in a checkpoint that ``checkpoints.load_checkpoint`` has read, in evaluation mode."""
    with reading_contents(path):
        model = DetailVAE(from_dict(ModelSettings, contents["settings"]), weights_here(contents["settings"]))
    return load_weights(model, contents["model"], path).eval()


def load_detail_vae(path: Path | str, device: torch.device | str = "cpu") -> DetailVAE:
    """The trained DetailVAE in a checkpoint of train_with_validation.py, in evaluation mode.

    Args:
        device: as ``engine.resolve_device`` takes it.

    Raises:
        InputError: the file cannot be read, is of another kind, its backbone's weights cannot be found, or there is no
            such device.
    """
    return detail_vae_from_checkpoint(load_checkpoint(path, KIND, ("settings", "model")), path).to(
        resolve_device(device)
    )
