"""A plot as upright strokes, one in each column of pixels: reading them off a picture,
and drawing a picture of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers import LOGVAR_RANGE

PROFILE_INK = 0.2  # grid lines, 0.1 dark, are no trace
PROFILE_FEATURES = 6
COLUMN_DOUBLINGS = 5


def ink_of(images: Tensor) -> Tensor:
    """Distance of each pixel from white, its darkest channel counting: (B, 3, H, W) -> (B, 1, H, W), both in [0, 1]."""
    red, green, blue = images.split(1, 1)
    return 1 - torch.minimum(torch.minimum(red, green), blue)  # four times as fast as amin over a last dimension of 3


def column_profile(images: Tensor) -> Tensor:
    """What each pixel column holds of the trace, (B, 3, H, W) in [0, 1] -> (B, 6, W).

    Mean height of the ink and its spread, highest and lowest trace pixel (heights in [-1, 1], 0 in empty columns),
    share of the column that is ink, and whether there is any.

    >>> plot = torch.ones(1, 3, 5, 2); plot[:, :, 0, 1] = 0
    >>> [[round(value, 2) for value in column] for column in column_profile(plot)[0, [0, 1, 3, 4, 5]].T.tolist()]
    [[0.0, 0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.2, 1.0]]
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


class Gaussian(NamedTuple):
    mean: Tensor
    logvar: Tensor


class DetailEncoder(nn.Module):
    """Details of each column from its profile: (B, 6, R) -> mean and log-variance, each (B, d, R)."""

    def __init__(self, channels: int, detail_channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(PROFILE_FEATURES, channels, 5, padding=2), nn.SiLU(), nn.Conv1d(channels, 2 * detail_channels, 1)
        )

    def forward(self, profile: Tensor) -> Gaussian:
        mean, logvar = self.layers(profile).float().chunk(2, 1)
        return Gaussian(mean, (logvar - 4).clamp(*LOGVAR_RANGE))


class Longer(nn.Module):
    """Twice as many columns, then a residual block along them."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Sequential(nn.Conv1d(channels, channels, 5, padding=2, bias=False), nn.BatchNorm1d(channels))
        self.second = nn.Sequential(nn.Conv1d(channels, channels, 5, padding=2, bias=False), nn.BatchNorm1d(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="linear", align_corners=False)
        return F.silu(x + self.second(F.silu(self.first(x))))


class PlotDecoder(nn.Module):
    """Draws a plot as a pen does, one upright stroke in each column of the picture.

    The latent vector says how the strokes run along the columns and what details to expect of them; latent vector and
    details together say where each stroke begins and ends, how sharply, and how dark it is. Since a stroke is a
    position and not a pattern of pixels, a thin line stays a line.
    """

    def __init__(self, latent_dim: int, channels: int, detail_channels: int, side: int):
        super().__init__()
        self.side, self.coarse = side, side // 2**COLUMN_DOUBLINGS
        self.from_latent = nn.Linear(latent_dim, channels * self.coarse)
        self.grow = nn.Sequential(*(Longer(channels) for _ in range(COLUMN_DOUBLINGS)))
        self.expect = nn.Conv1d(channels, 2 * detail_channels, 1)
        self.stroke = nn.Sequential(
            nn.Conv1d(channels + detail_channels, channels, 5, padding=2),
            nn.SiLU(),
            nn.Conv1d(channels, channels, 5, padding=2),
            nn.SiLU(),
            nn.Conv1d(channels, 5, 1),
        )
        self.colours = nn.Parameter(torch.tensor([4.0, 4.0, 4.0, 0.0, 0.0, 0.0]))

    @torch.no_grad()
    def set_colours(self, plots: Tensor) -> None:
        """Begin with the median colour of the plots (B, 3, H, W), their ground, and the mean one of their darkest
        hundredth.
        """
        pixels = plots.transpose(0, 1).flatten(1)
        darkest = pixels.mean(0).topk(max(1, pixels.shape[1] // 100), largest=False).indices
        self.colours.copy_(
            torch.logit(torch.cat([pixels.median(1).values, pixels[:, darkest].mean(1)]).clamp(0.005, 0.995))
        )

    def columns(self, z: Tensor) -> Tensor:
        """Features (B, C, side) of the columns from latent vectors (B, D)."""
        return self.grow(self.from_latent(z).view(len(z), -1, self.coarse))

    def prior_of(self, columns: Tensor) -> Gaussian:
        """The details (B, d, side) to expect."""
        mean, logvar = self.expect(columns).float().chunk(2, 1)
        return Gaussian(mean, logvar.clamp(*LOGVAR_RANGE))

    def draw(self, columns: Tensor, detail: Tensor) -> Tensor:
        """Plots (B, 3, side, side) in [0, 1]."""
        middle, extent, blur_above, blur_below, ink = (
            self.stroke(torch.cat([columns, detail], 1)).float()[:, :, None].unbind(1)
        )
        half = F.softplus(extent) * self.side / 16
        middle = (middle + 0.5) * self.side
        rows = torch.arange(self.side, device=columns.device, dtype=torch.float32)[:, None] + 0.5
        below_top = torch.sigmoid((rows - middle + half) * torch.exp(blur_above.clamp(-5, 3)))
        above_bottom = torch.sigmoid((middle + half - rows) * torch.exp(blur_below.clamp(-5, 3)))
        cover = (below_top * above_bottom * torch.sigmoid(ink))[:, None]
        ground, line = torch.sigmoid(self.colours)[None, :, None, None].chunk(2, 1)
        return ground + cover * (line - ground)
